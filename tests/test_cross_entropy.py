"""cece.cross_entropy against float64 truth and torch: every meaning of every argument."""

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from conftest import DTYPES, SHAPES, assert_as_good_as_torch, check_against_truth

import cece


def rows_of(shape):
    return shape[:1] + shape[2:] if len(shape) > 1 else ()


def make(shape, dtype, soft, weight=None, ignored=True):
    """Logits of some spread, labels (the first ignored where there are others) or probabilities, class weights."""
    classes = shape[0] if len(shape) == 1 else shape[1]
    x = (torch.randn(shape) * 3).to(dtype)
    if soft:
        t = torch.randn(shape).softmax(0 if len(shape) == 1 else 1).to(dtype)
    else:
        t = torch.randint(0, classes, rows_of(shape))
        if ignored and t.numel() > 1:
            t.view(-1)[0] = -100
    w = None if weight is None else (torch.rand(classes) + 0.1).to(weight)
    return {"input": x.requires_grad_(), "target": t, "weight": w}


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_is_torch(shape, soft):
    """The truth of all other tests: cece.reference in float64 is torch in float64."""
    for w, s, r in itertools.product((None, torch.float64), (0.0, 0.1, 1.0), ("none", "mean", "sum")):
        t = make(shape, torch.float64, soft, w)
        ours = cece.reference.cross_entropy(**t, label_smoothing=s, reduction=r)
        torch.testing.assert_close(ours, F.cross_entropy(**t, label_smoothing=s, reduction=r), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient(backend, shape, dtype, soft):
    large = torch.Size(shape).numel() > 20000
    for w, s, r in itertools.product((None, dtype), (0.0, 0.1), ("none", "mean", "sum")):
        if large and r == "sum":
            continue
        check_against_truth(
            "cross_entropy",
            make(shape, dtype, soft, w),
            device=backend.device,
            reduction=r,
            label_smoothing=s,
            what=f"{shape} {dtype} soft={soft} weight={w}",
        )


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("smoothing", [1.0, 1e-3, 0.5])
def test_label_smoothing(backend, smoothing, soft):
    for shape in [(37, 5), (19, 49), (2, 300, 9)]:
        t = make(shape, torch.float32, soft, torch.float32)
        check_against_truth("cross_entropy", t, device=backend.device, label_smoothing=smoothing, reduction="none")


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("weight", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_of_another_dtype(backend, dtype, weight, soft):
    t = make((33, 70), dtype, soft, weight)
    truth = dict(t, weight=t["weight"].to(torch.float64 if dtype == torch.float64 else torch.float32))
    ours = check_against_truth("cross_entropy", truth, device=backend.device, reduction="none")
    loss = cece.cross_entropy(*(v.to(backend.device) for v in t.values()), reduction="none")
    assert torch.equal(loss.detach(), ours["loss"])  # a weight's dtype changes nothing


@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probabilities_of_another_dtype(backend, dtype, target):
    for shape in [(33, 10), (9, 300), (2, 21, 40)]:
        t = make(shape, dtype, True)
        t["target"] = t["target"].to(target)
        check_against_truth("cross_entropy", t, device=backend.device, reduction="none", what=f"{dtype} {target}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_is_at_least_float32(backend, dtype):
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    for soft, r in itertools.product((False, True), ("none", "mean", "sum")):
        t = make((4, 5), dtype, soft)
        loss = cece.cross_entropy(t["input"].to(backend.device), t["target"].to(backend.device), reduction=r)
        assert loss.dtype == expected
        (grad,) = torch.autograd.grad(loss.sum(), t["input"])
        assert grad.dtype == dtype


@pytest.mark.parametrize("shape", [(37, 5), (19, 100), (2, 21, 40), (2, 66000)], ids=str)
def test_label_dtypes(backend, shape):
    """Labels of any integer dtype: the same bits."""
    t = make(shape, torch.float32, False, torch.float32, ignored=False)
    labels = t["target"] % 120
    labels.view(-1)[0] = 3
    results = []
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        x, w = t["input"].detach().to(backend.device).requires_grad_(), t["weight"].to(backend.device)
        loss = cece.cross_entropy(x, labels.to(backend.device, dtype), w, ignore_index=3)
        results.append((loss.detach(), *torch.autograd.grad(loss, x)))
    truth = F.cross_entropy(t["input"].double(), labels, t["weight"].double(), ignore_index=3)
    assert_as_good_as_torch(results[0][0], truth.detach())
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16], ids=str)
def test_negative_labels_of_small_integers(backend, dtype):
    """-100 is -100 in them too, and other negative numbers are no classes."""
    x, y = torch.randn(6, 5, device=backend.device), torch.tensor([0, -100, 4, 2, -100, 1], device=backend.device)
    assert torch.equal(cece.cross_entropy(x, y.to(dtype)), cece.cross_entropy(x, y))
    if backend.name == "cpu":
        with pytest.raises(IndexError, match=r"Target -3 is out of bounds: target\[2\]"):
            cece.cross_entropy(x, y.masked_fill(y == 4, -3).to(dtype))


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 3, 4])
@pytest.mark.parametrize("shape", [(37, 5), (19, 49), (2, 5, 30)], ids=str)
def test_ignore_index(backend, shape, ignore_index):
    """Of any value, also that of a class; in the mean an ignored sample does not count."""
    for w, s, r in itertools.product((None, torch.float32), (0.0, 0.1), ("none", "mean", "sum")):
        t = make(shape, torch.float32, False, w, ignored=False)
        t["target"].view(-1)[::3] = ignore_index
        ours = check_against_truth(
            "cross_entropy", t, device=backend.device, ignore_index=ignore_index, label_smoothing=s, reduction=r
        )
        ignored = (t["target"] == ignore_index).to(backend.device)
        assert not ours["input"].movedim(1, -1)[ignored].any()
        if r == "none":
            assert not ours["loss"][ignored].any()


@pytest.mark.parametrize("labels", [torch.int32, torch.int64])
def test_ignore_index_beyond_the_label_dtype(labels):
    """An ignore_index no label can be equal to ignores nothing, whatever its low bits say."""
    x, y = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    plain = cece.cross_entropy(x, y, reduction="none")
    assert torch.equal(cece.cross_entropy(x, y.to(labels), ignore_index=2**32, reduction="none"), plain)
    assert torch.equal(cece.cross_entropy(x, y.to(torch.uint8), ignore_index=256, reduction="none"), plain)
    assert torch.equal(cece.cross_entropy(x, y.to(torch.uint8), ignore_index=-254, reduction="none"), plain)
    some = cece.cross_entropy(x, y.to(torch.uint8), ignore_index=2, reduction="none")
    assert some[2] == 0 and torch.equal(some[[0, 1, 3, 4, 5]], plain[[0, 1, 3, 4, 5]])


@pytest.mark.parametrize("shape", [(4, 5), (4, 100), (2, 5, 3), (5,)], ids=str)
def test_all_ignored(backend, shape):
    for r in ("none", "mean", "sum"):
        x = torch.randn(shape, device=backend.device).requires_grad_()
        t = torch.full(rows_of(shape), -100, device=backend.device)
        ours, theirs = cece.cross_entropy(x, t, reduction=r), F.cross_entropy(x, t, reduction=r)
        assert torch.equal(ours.isnan(), theirs.isnan()) and ours.isnan().any() == (r == "mean")
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
        (grad,) = torch.autograd.grad(ours.sum(), x)
        assert not grad.any()


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (2, 5, 0), (0, 100), (0, 70000)], ids=str)
def test_empty_batch(backend, shape, soft):
    for w, s, r in itertools.product((None, torch.float32), (0.0, 0.1), ("none", "mean", "sum")):
        t = {k: v if v is None else v.to(backend.device) for k, v in make(shape, torch.float32, soft, w).items()}
        x = t["input"] = t["input"].detach().requires_grad_()
        ours = cece.cross_entropy(**t, reduction=r, label_smoothing=s)
        theirs = F.cross_entropy(**t, reduction=r, label_smoothing=s)
        assert ours.shape == theirs.shape
        assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.nan_to_num(), theirs.nan_to_num())
        assert torch.autograd.grad(ours.sum(), x)[0].shape == shape


def test_no_classes():
    """No class can be a label, and probabilities of no classes cost nothing. A process of its own: it crashed once."""
    code = """if True:
        import cece, torch
        x = torch.zeros(3, 0)
        assert torch.equal(cece.cross_entropy(x, x, reduction="sum"), torch.tensor(0.0))
        try:
            cece.cross_entropy(x, torch.zeros(3, dtype=torch.long))
        except IndexError:
            print("refused")"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr


# ---- which gradients, and what else is touched


@pytest.mark.parametrize("wanted", [w for n in (1, 2, 3) for w in itertools.combinations(range(3), n)], ids=str)
def test_only_requested_gradients(backend, wanted):
    """Any subset of (input, soft target, weight) may require a gradient; each is right whatever the others do."""
    for shape, s, r in itertools.product([(6, 5), (2, 60), (2, 5, 3)], (0.0, 0.2), ("none", "mean", "sum")):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            t = make(shape, dtype, True, dtype)
            for i, k in enumerate(t):
                t[k] = t[k].detach().requires_grad_(i in wanted)
            ours = check_against_truth("cross_entropy", t, device=backend.device, reduction=r, label_smoothing=s)
            assert len(ours) == 1 + len(wanted)


def test_no_gradient_asked(backend):
    t = make((6, 5), torch.float32, True, torch.float32)
    loss = cece.cross_entropy(*(v.detach().to(backend.device) for v in t.values()))
    assert not loss.requires_grad and loss.grad_fn is None
    with torch.no_grad():
        assert not cece.cross_entropy(*(v.to(backend.device) for v in t.values())).requires_grad


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("shape", [(37, 5), (3, 1100), (2, 70000), (2, 5, 7)], ids=str)
def test_nothing_is_modified(backend, shape, soft):
    """Not the inputs, their versions, nor the incoming gradient; and backward through a kept graph gives the same."""
    t = {k: v.detach().to(backend.device) for k, v in make(shape, torch.float32, soft, torch.float32).items()}
    before = {k: (v.clone(), v._version) for k, v in t.items()}
    x = t["input"].requires_grad_()
    loss = cece.cross_entropy(**t, reduction="none")
    grad = torch.randn_like(loss)
    kept = grad.clone()
    (first,) = torch.autograd.grad(loss, x, grad, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x, grad)
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()
    assert torch.equal(grad, kept) and grad._version == 0
    for k, (value, version) in before.items():
        assert torch.equal(t[k], value) and t[k]._version == version, k


def test_gradient_of_an_expanded_incoming_gradient(backend):
    """loss.sum().backward() sends an expanded scalar; any strides may come."""
    x, y = torch.randn(6, 5, 4, device=backend.device).requires_grad_(), torch.randint(5, (6, 4), device=backend.device)
    for grad in (torch.tensor(2.0).expand(6, 4), torch.randn(4, 6).t(), torch.randn(6, 8)[:, ::2]):
        grad = grad.to(backend.device)
        ours = torch.autograd.grad(cece.cross_entropy(x, y, reduction="none"), x, grad)[0]
        same = torch.autograd.grad(cece.cross_entropy(x, y, reduction="none"), x, grad.contiguous())[0]
        assert torch.equal(ours, same)


# ---- inplace_backward


INPLACE = [(37, 5), (19, 100), (2, 70000), (2, 5, 7), (2, 300, 9)]


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", INPLACE, ids=str)
def test_inplace_backward(backend, shape, dtype, soft):
    """The same bits as without, in the logits' own storage."""
    t = {k: v.detach().to(backend.device) for k, v in make(shape, dtype, soft, dtype).items()}
    x, target, w = t["input"].requires_grad_(), t["target"], t["weight"]
    plain = torch.autograd.grad(cece.cross_entropy(x, target, w, label_smoothing=0.1), x)[0]
    logits = x * 1
    loss = cece.cross_entropy(logits, target, w, label_smoothing=0.1, inplace_backward=True)
    kept = logits.detach().clone()
    assert torch.equal(kept, x)  # the forward leaves them
    (grad,) = torch.autograd.grad(loss, logits)
    assert torch.equal(grad, plain)
    assert grad.data_ptr() == logits.data_ptr() and grad.stride() == logits.stride()
    assert logits._version == 1


def test_inplace_backward_through_a_layer():
    layer, h = torch.nn.Linear(8, 50), torch.randn(30, 8).requires_grad_()
    y = torch.randint(50, (30,))
    grads = [
        torch.autograd.grad(cece.cross_entropy(layer(h), y, inplace_backward=i), [h, layer.weight, layer.bias])
        for i in (False, True)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_inplace_backward_writes_only_its_own_elements():
    x, y = torch.randn(6, 9).requires_grad_(), torch.randint(5, (6,))
    base = x * 1
    view = base[:, 2:7]
    cece.cross_entropy(view, y, inplace_backward=True).backward()
    assert torch.equal(base[:, :2], x[:, :2]) and torch.equal(base[:, 7:], x[:, 7:])
    plain = torch.autograd.grad(cece.cross_entropy(x[:, 2:7], y), x)[0]
    assert torch.equal(x.grad, plain) and torch.equal(base[:, 2:7], plain[:, 2:7])


def test_inplace_backward_with_all_three_gradients():
    """The target's and the weight's gradients need the logits that the input's overwrites."""
    t = make((12, 60), torch.float64, True, torch.float64)
    leaves = [v.detach().requires_grad_() for v in t.values()]
    plain = torch.autograd.grad(cece.cross_entropy(*leaves), leaves)
    ours = torch.autograd.grad(cece.cross_entropy(leaves[0] * 1, *leaves[1:], inplace_backward=True), leaves)
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a, b)


def test_inplace_backward_tells_autograd():
    """Whoever still needs the logits gets torch's error, not a wrong number."""
    x, y = torch.randn(6, 5).requires_grad_(), torch.randint(5, (6,))
    changed = "modified by an inplace operation"
    h = x * 1
    other = h.sin()  # saves h; runs its backward after the loss's, which is the younger node
    loss = cece.cross_entropy(h, y, inplace_backward=True)
    with pytest.raises(RuntimeError, match=changed):
        (loss + other.sum()).backward()
    h = x.exp()  # saves its output, the logits
    with pytest.raises(RuntimeError, match=changed):
        cece.cross_entropy(h, y, inplace_backward=True).backward()
    h = x * 1
    loss = cece.cross_entropy(h, y, inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=changed):
        loss.backward()
    h = x * 1
    two = cece.cross_entropy(h, y, inplace_backward=True) + cece.cross_entropy(h, y, inplace_backward=True)
    with pytest.raises(RuntimeError, match=changed):
        two.backward()


def test_inplace_backward_where_it_would_destroy_something():
    x, y = torch.randn(6, 5).requires_grad_(), torch.randint(5, (6,))
    with pytest.raises(RuntimeError, match="cece.cross_entropy: inplace_backward=True.*leaf"):
        cece.cross_entropy(x, y, inplace_backward=True)
    for expanded in ((x[:1] * 1).expand(6, 5), (x[:, :1] * 1).expand(6, 5)):
        with pytest.raises(RuntimeError, match="cece.cross_entropy: inplace_backward=True.*expanded"):
            cece.cross_entropy(expanded, y, inplace_backward=True)
    plain = x.detach().clone()
    cece.cross_entropy(plain, y, inplace_backward=True)  # no gradient, nothing to overwrite
    assert torch.equal(plain, x)


def z_loss(h):
    return h.logsumexp(1).square().mean()


HOOKS = {  # contexts in which autograd's check of saved tensors is blind
    "identity": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "offload": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy().copy(), torch.from_numpy),
}
SECOND_USERS = {  # someone else who needs the logits that inplace_backward would overwrite
    "z-loss": lambda h, y, loss: loss(h, y) + z_loss(h),
    "z-loss before": lambda h, y, loss: z_loss(h) + loss(h, y),
    "mixup": lambda h, y, loss: 0.7 * loss(h, y) + 0.3 * loss(h, y.flip(0)),
    "no one": lambda h, y, loss: loss(h, y),
}


@pytest.mark.parametrize("user", SECOND_USERS)
@pytest.mark.parametrize("context", [*HOOKS, "checkpoint"])
def test_inplace_backward_behind_saved_tensor_hooks(context, user):
    """Nobody would notice the overwritten logits, so they are not: the gradient is that of the ordinary backward."""
    y, x = torch.randint(5, (6,)), torch.randn(6, 5)

    def gradients(inplace, retain=False):
        w = x.clone().requires_grad_()

        def loss(h, y):
            return cece.cross_entropy(h, y, inplace_backward=inplace)

        def block(w):
            h = w * 1
            return SECOND_USERS[user](h, y, loss)

        if context == "checkpoint":
            value = torch.utils.checkpoint.checkpoint(block, w, use_reentrant=False)
        else:
            with HOOKS[context]():
                value = block(w)
        if retain:
            value.backward(retain_graph=True)
        value.backward()
        return w.grad

    for retain in (False, True) if context != "checkpoint" else (False,):
        assert torch.equal(gradients(True, retain), gradients(False, retain))


def test_inplace_backward_beside_a_checkpoint():
    """Whoever is recomputed from the logits later gets torch's error."""
    x, y = torch.randn(6, 5).requires_grad_(), torch.randint(5, (6,))
    h = x * 1
    z = torch.utils.checkpoint.checkpoint(z_loss, h, use_reentrant=False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (cece.cross_entropy(h, y, inplace_backward=True) + z).backward()


OF_A_LEAF = {
    "view": lambda: torch.randn(30).requires_grad_().view(6, 5),
    "slice": lambda: torch.randn(8, 5).requires_grad_()[:6],
    "expand": lambda: torch.randn(1, 5).requires_grad_().expand(6, 5),
    "transpose": lambda: torch.nn.Parameter(torch.randn(5, 6)).t(),
    "view of a view": lambda: torch.randn(2, 30).requires_grad_()[1].view(6, 5)[:, :],
    "chunk": lambda: torch.randn(12, 5).requires_grad_().chunk(2)[1],
    "an alias that is no view": lambda: torch.ops.aten._unsafe_view(torch.randn(30).requires_grad_(), [6, 5]),
    "a view of such an alias": lambda: torch.ops.aten._unsafe_view(torch.randn(60).requires_grad_(), [12, 5])[::2],
    "detached and a leaf again": lambda: torch.randn(30).view(6, 5).requires_grad_(),
}


@pytest.mark.parametrize("how", OF_A_LEAF)
def test_inplace_backward_never_writes_into_a_leaf(how):
    with pytest.raises(RuntimeError, match="cece.cross_entropy: inplace_backward=True.*must not be a leaf"):
        cece.cross_entropy(OF_A_LEAF[how](), torch.randint(5, (6,)), inplace_backward=True)


OVERLAPPING = {
    "as_strided": lambda b: b.as_strided((4, 5), (3, 1)),
    "unfold": lambda b: b.unfold(0, 5, 3)[:4],
    "rows on rows": lambda b: b.as_strided((4, 5), (0, 1)),
    "interleaved": lambda b: b.as_strided((4, 5, 2), (5, 1, 3)),
    "steps that meet": lambda b: b.as_strided((4, 5), (2, 4)),
}


@pytest.mark.parametrize("how", OVERLAPPING)
def test_inplace_backward_refuses_overlapping_memory(how):
    logits = OVERLAPPING[how](torch.randn(80).requires_grad_() * 1)
    y = torch.randint(5, logits.shape[:1] + logits.shape[2:])
    with pytest.raises(RuntimeError, match="whose elements have memory of their own, got an expanded or overlapping"):
        cece.cross_entropy(logits, y, inplace_backward=True)
    assert cece.cross_entropy(logits, y).isfinite()


def a_soft_target_in_the_logits_buffer(x):
    both = torch.cat([x, x.softmax(1)], 1) * 1
    return both[:, :5], both[:, 2:7].detach()


LOGITS = {  # the logits and target made of x
    "plain": lambda x: (x * 1, None),
    "soft target in the logits' buffer": a_soft_target_in_the_logits_buffer,
    "the logits are their own target": lambda x: ((h := x.softmax(1)), h.detach()),
    "copy on write": lambda x: (torch._lazy_clone(x * 1), None),
    "negated": lambda x: (torch._neg_view(x * 1), None),
    "thirteen dimensions": lambda x: ((x * 1).view(6, 5, *(1,) * 11), None),
}


@pytest.mark.parametrize("how", LOGITS)
def test_inplace_backward_is_right_wherever_it_is_taken(how):
    x, y = torch.randn(6, 5), torch.randint(5, (6,))

    def run(inplace):
        w = x.clone().requires_grad_()
        logits, target = LOGITS[how](w)
        target = y.view(6, *logits.shape[2:]) if target is None else target
        loss = cece.cross_entropy(logits, target, inplace_backward=inplace)
        return torch.autograd.grad(loss, w)[0], loss.detach()

    for a, b in zip(run(True), run(False), strict=True):
        assert torch.equal(a, b)


def test_inplace_backward_leaves_lazily_shared_memory_alone():
    """A lazy copy's memory is another tensor's until it is written to."""
    x, y = torch.randn(6, 5).requires_grad_(), torch.randint(5, (6,))
    original = x * 1
    kept, lazy = original.detach().clone(), torch._lazy_clone(original)
    cece.cross_entropy(lazy, y, inplace_backward=True).backward()
    assert torch.equal(original, kept)
    torch.testing.assert_close(x.grad, torch.autograd.grad(F.cross_entropy(x, y), x)[0])


def test_inplace_backward_of_batched_gradients():
    x, y = torch.randn(6, 5).requires_grad_(), torch.randint(5, (6,))
    many = torch.randn(3, 6)
    results = []
    for inplace in (False, True):
        h = x * 1
        loss = cece.cross_entropy(h, y, reduction="none", inplace_backward=inplace)
        results.append(torch.autograd.grad(loss, h, many, is_grads_batched=True)[0])
        assert torch.equal(h, x)
    assert torch.equal(*results)


def test_inplace_backward_under_create_graph():
    """A gradient that is differentiated again must not stand where the logits stood."""
    x, y = torch.randn(6, 5, dtype=torch.float64).requires_grad_(), torch.randint(5, (6,))
    second = []
    for inplace in (False, True):
        h = x * 1
        loss = cece.cross_entropy(h, y, inplace_backward=inplace)
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        assert torch.equal(h, x)
        second.append(torch.autograd.grad(g.square().sum(), x)[0])
    assert torch.equal(*second)


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
def test_many_channels_first(soft):
    """Sums over many classes side by side lose no more than sums along a row: 8 units, also at 5000 classes."""
    for smoothing in (0.0, 0.1):
        t = make((2, 5000, 12), torch.float32, soft)
        check_against_truth("cross_entropy", t, label_smoothing=smoothing, reduction="none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [49, 63, 64, 65, 97, 128, 1025, 1087, 2080])
def test_a_label_and_a_maximum_anywhere_in_a_row(dtype, classes):
    """Rows of every remainder of a vector, the label at each class in turn, the maximum at random, losses from 1e-12;
    slopes of 16 bits are those of float64, rounded to the nearest."""
    torch.manual_seed(classes)
    x = torch.randn(classes, classes) * torch.linspace(1, 12, classes)[:, None]
    x[torch.arange(0, classes, 2), torch.arange(0, classes, 2)] += 20  # confident and right: every other row
    x, y = x.to(dtype).requires_grad_(), torch.arange(classes)
    wide = x.detach().double()
    ours = cece.cross_entropy(x, y, reduction="none")
    top, at = wide.max(1)
    others = (wide - top[:, None]).exp().scatter(1, at[:, None], 0).sum(1).log1p()
    truth = (top - wide.diagonal()) + others
    torch.testing.assert_close(ours.detach().double(), truth, rtol=3e-6, atol=0)
    g = torch.rand(classes) + 0.5
    (ours * g).sum().backward()
    slope = (wide - top[:, None] - others[:, None]).exp()
    slope.diagonal().copy_(torch.expm1(-truth))
    slope = slope * g[:, None].double()
    off = (x.grad.double() - slope).abs()
    if dtype == torch.float32:
        far = torch.maximum(top[:, None] - wide, -truth.log()[:, None])  # differences are rounded
        bound = (4 + far + others[:, None]) * torch.finfo(dtype).eps
        assert (off <= bound * slope.abs() + 1e-38).all(), (off / slope.abs() / bound).max()
    else:
        unit = slope.abs().clamp_min(2.0**-126).log2().floor().exp2() * 2.0**-7
        assert (off <= 0.501 * unit).all(), (off / unit).max()
