"""Any strides: the values of a contiguous copy, gradients laid out like the input, and no copy made."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_as_good_as_torch

import cece

LAYOUTS = {  # (logits, labels' shape); the memory is what the name says
    "contiguous": lambda: (torch.randn(60, 100), (60,)),
    "few classes": lambda: (torch.randn(600, 10), (600,)),
    "channels first": lambda: (torch.randn(2, 21, 20, 16), (2, 20, 16)),
    "channels first, many classes": lambda: (torch.randn(2, 300, 20), (2, 20)),
    "channels last": lambda: (torch.randn(2, 60, 8, 10).to(memory_format=torch.channels_last), (2, 8, 10)),
    "channels last, few classes": lambda: (torch.randn(2, 21, 8, 10).to(memory_format=torch.channels_last), (2, 8, 10)),
    "channels last 3d": lambda: (torch.randn(2, 7, 3, 4, 5).to(memory_format=torch.channels_last_3d), (2, 3, 4, 5)),
    "transpose(1, 2)": lambda: (torch.randn(3, 20, 100).transpose(1, 2), (3, 20)),
    "transpose(1, 2), few classes": lambda: (torch.randn(3, 20, 10).transpose(1, 2), (3, 20)),
    "all but the last token": lambda: (torch.randn(3, 21, 100)[:, :-1].transpose(1, 2), (3, 20)),
    "all but the last token, flat": lambda: (torch.randn(21, 3, 100)[:-1].flatten(0, 1), (60,)),
    "transposed": lambda: (torch.randn(100, 60).t(), (60,)),
    "every second class": lambda: (torch.randn(60, 200)[:, ::2], (60,)),
    "every second row": lambda: (torch.randn(120, 100)[::2], (60,)),
    "padded rows": lambda: (torch.randn(60, 128)[:, 3:103], (60,)),
    "misaligned": lambda: (torch.randn(6001)[1:].view(60, 100), (60,)),
    "misaligned, odd": lambda: (torch.randn(60 * 101 + 3)[3:].view(60, 101), (60,)),
    "expanded rows": lambda: (torch.randn(1, 100).expand(60, 100), (60,)),
    "expanded classes": lambda: (torch.randn(60, 1).expand(60, 100), (60,)),
    "expanded pixels": lambda: (torch.randn(2, 21, 1, 16).expand(2, 21, 20, 16), (2, 20, 16)),
    "rolled dimensions": lambda: (torch.randn(4, 5, 6, 7, 3).permute(2, 4, 0, 3, 1), (6, 4, 7, 5)),
    "ten dimensions": lambda: (torch.randn(2, 2, 3, 2, 2, 2, 2, 2, 2, 2).permute(9, 2, 7, 0, 5, 1, 3, 8, 4, 6), None),
    "a long row, strided": lambda: (torch.randn(2, 140_002)[:, ::2], (2,)),
}


def make(layout):
    logits, rows = LAYOUTS[layout]()
    rows = logits.shape[:1] + logits.shape[2:] if rows is None else rows
    assert rows == logits.shape[:1] + logits.shape[2:]
    return logits, torch.randint(logits.shape[1], rows)


def strided_like(t, values):
    """values in memory of t's strides, where t's elements do not share memory."""
    return torch.empty_strided(t.shape, t.stride(), dtype=values.dtype).copy_(values)


def loss_and_grads(logits, target, **options):
    x = logits.detach().requires_grad_()
    loss = cece.cross_entropy(x, target, reduction="none", **options)
    return loss.detach(), torch.autograd.grad(loss, x, torch.linspace(-1, 1, loss.numel()).to(loss).view(loss.shape))[0]


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values(backend, layout, soft):
    logits, target = make(layout)
    logits = logits.to(backend.device) if backend.name != "cuda" else logits.cuda()
    if soft:
        target = torch.rand_like(logits.contiguous()).softmax(1)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = logits.to(dtype) if dtype != torch.float32 else logits
        ours, grad = loss_and_grads(x, target.to(logits.device))
        truth = cece.reference.cross_entropy(x.double().cpu(), target.cpu(), reduction="none")
        assert_as_good_as_torch(ours, truth, scale=10.0, what=layout)
        same, same_grad = loss_and_grads(x.contiguous(), target.to(logits.device))
        torch.testing.assert_close(ours, same, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(grad, same_grad, rtol=1e-5 if dtype != torch.bfloat16 else 1e-2, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_a_gradient(layout):
    """Those of empty_like: the input's where its elements are dense, so that the layer before gets what it wrote."""
    logits, target = make(layout)
    grad = loss_and_grads(logits, target)[1]
    assert grad.stride() == torch.empty_like(logits).stride()
    if "channels last" in layout:
        memory = torch.channels_last if logits.dim() == 4 else torch.channels_last_3d
        assert grad.is_contiguous(memory_format=memory) and not grad.is_contiguous()


@pytest.mark.parametrize("layout", ["transpose(1, 2)", "channels first", "contiguous", "all but the last token"])
def test_strided_targets(layout):
    """Labels and probabilities of any strides, the same or others than the logits'."""
    logits, labels = make(layout)
    expected = loss_and_grads(logits, labels)
    for strided in (
        torch.stack([labels, labels - 1], -1)[..., 0],
        torch.stack([labels + 1, labels])[1],
        labels.flip(0).flip(0),
    ):
        for a, b in zip(loss_and_grads(logits, strided), expected, strict=True):
            assert torch.equal(a, b)
    p = torch.rand(logits.shape).softmax(1)
    expected = loss_and_grads(logits, p)
    forms = [torch.stack([p, p])[1], torch.stack([p, p], -1)[..., 1], p.transpose(0, 1).contiguous().transpose(0, 1)]
    for strided in forms + ([strided_like(logits, p)] if torch._debug_has_internal_overlap(logits) == 0 else []):
        for a, b in zip(loss_and_grads(logits, strided), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    one = torch.tensor(3).expand(labels.shape)
    for a, b in zip(loss_and_grads(logits, one), loss_and_grads(logits, one.contiguous()), strict=True):
        assert torch.equal(a, b)


BCE_LAYOUTS = {
    "contiguous": lambda: torch.rand(60, 101),
    "transposed": lambda: torch.rand(101, 60).t(),
    "channels last": lambda: torch.rand(2, 5, 8, 9).to(memory_format=torch.channels_last),
    "every second": lambda: torch.rand(60, 202)[:, ::2],
    "padded": lambda: torch.rand(60, 128)[:, 3:104],
    "misaligned": lambda: torch.rand(6061)[1:].view(60, 101),
    "expanded": lambda: torch.rand(60, 1).expand(60, 101),
    "expanded scalar": lambda: torch.rand(()).expand(60, 101),
    "rolled": lambda: torch.rand(4, 5, 6, 7, 3).permute(2, 4, 0, 3, 1),
    "ten dimensions": lambda: torch.rand(2, 2, 3, 2, 2, 2, 2, 2, 2, 2).permute(9, 2, 7, 0, 5, 1, 3, 8, 4, 6),
}


@pytest.mark.parametrize("layout", BCE_LAYOUTS)
@pytest.mark.parametrize("name", ["binary_cross_entropy_with_logits", "binary_cross_entropy"])
def test_binary_losses(backend, name, layout):
    """Each operand strided while the others are not."""
    strided = BCE_LAYOUTS[layout]().to(backend.device)
    plain = {k: torch.rand(strided.shape, device=backend.device) for k in ("input", "target", "weight", "pos_weight")}
    if name == "binary_cross_entropy":
        del plain["pos_weight"]
    for which in plain:
        for kind in (torch.float32, torch.bool):
            if kind == torch.bool and which != "target":
                continue
            t = plain | {which: (strided > 0.5) if kind == torch.bool else strided}
            results = []
            for tensors in (t, {k: v.contiguous() for k, v in t.items()}):
                x = tensors["input"].detach().requires_grad_()
                loss = getattr(cece, name)(**(tensors | {"input": x}), reduction="none")
                g = torch.linspace(-1, 1, loss.numel(), device=backend.device).view(loss.shape)
                results.append((loss.detach(), torch.autograd.grad(loss, x, g)[0]))
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
            if which == "input":
                assert results[0][1].stride() == torch.empty_like(strided).stride()


# ---- memory


def peak(work):
    """The most bytes that are allocated at one time in work(), beyond those before it, counted by torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events
    now = most = 0
    for e in sorted(events, key=lambda e: e.start_ns()):
        now += e.nbytes()
        most = max(most, now)
    del kept
    return most


@pytest.mark.parametrize("layout", [*BCE_LAYOUTS, "fourteen dimensions"])
def test_a_loss_keeps_the_memory_format(backend, layout):
    """As torch's elementwise losses do: of an element's loss, with data and without, however its operands lie."""
    if layout == "fourteen dimensions":  # of which no two can be merged, beside the target's: more than a kernel takes
        x = torch.rand([2] * 14).permute(*range(13, 0, -2), *range(0, 14, 2)).to(backend.device)
    else:
        x = BCE_LAYOUTS[layout]().to(backend.device)
    x = x.detach().requires_grad_()
    target = torch.rand(x.shape, device=x.device)
    loss = cece.binary_cross_entropy(x, target, reduction="none")
    expected = F.binary_cross_entropy(x.detach(), target, reduction="none")
    assert loss.stride() == torch.empty_like(x).stride()
    if x.stride() == torch.empty_like(x).stride():  # dense
        assert loss.stride() == expected.stride()
    torch.testing.assert_close(loss, expected)
    (grad,) = torch.autograd.grad(loss, x, target)
    assert grad.stride() == torch.empty_like(x).stride()
    torch.testing.assert_close(grad, (x - target) / (x * (1 - x)) * target, rtol=1e-5, atol=1e-5)
    meta = torch.empty_strided(x.shape, x.stride(), device="meta")
    assert cece.binary_cross_entropy(meta, meta, reduction="none").stride() == loss.stride()


def test_the_place_of_a_bad_probability():
    """By the tensor's own indices, in whatever order memory is read."""
    x = torch.rand(2, 5, 8, 9).to(memory_format=torch.channels_last)
    x[1, 4, 0, 3] = 1.5
    with pytest.raises(RuntimeError, match=r"got input\[1, 4, 0, 3\] = 1\.5"):
        cece.binary_cross_entropy(x, torch.rand(x.shape))


def test_peak_sees_a_copy():
    x = torch.randn(100, 100).t()
    assert peak(lambda: x.contiguous()) >= 40_000
    assert peak(lambda: x.sum()) < 1000


def training_step(loss, x):
    value = loss(x)
    return value, torch.autograd.grad(value, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", ["labels", "probabilities", "int32"])
@pytest.mark.parametrize("layout", [k for k in LAYOUTS if k != "ten dimensions"])
def test_peak_memory_of_cross_entropy(layout, target, dtype):
    """Beyond inputs and gradient: 5 float32 numbers a row (3 statistics, its loss, int64 labels made contiguous)."""
    logits, labels = make(layout)
    if dtype != torch.float32:
        logits = logits.to(dtype)  # an expanded or padded tensor becomes dense here: fewer layouts, other kernels
    t = labels.to(torch.int32) if target == "int32" else labels
    if target == "probabilities":
        t = torch.rand(logits.shape).to(dtype)
        if torch._debug_has_internal_overlap(logits) == 0:
            t = strided_like(logits, t)
    x, w = logits.detach().requires_grad_(), torch.rand(logits.shape[1])
    rows, gradient = labels.numel(), logits.numel() * logits.element_size()
    budget = 28 * rows + 4 * len(w) + 2048
    for r in ("mean", "none"):
        used = peak(lambda r=r: cece.cross_entropy(x, t, w, reduction=r, label_smoothing=0.1))
        assert used <= budget, (used, budget)
        assert used <= gradient / 2 or gradient < 30_000
    used = peak(lambda: training_step(lambda x: cece.cross_entropy(x, t, w, label_smoothing=0.1), x))
    assert used <= gradient + budget, (used, gradient, budget)


def test_peak_memory_of_inplace_backward():
    """None for the gradient."""
    x, y = torch.randn(64, 20_000).requires_grad_(), torch.randint(20_000, (64,))
    h = x * 1
    used = peak(lambda: training_step(lambda h: cece.cross_entropy(h, y, inplace_backward=True), h))
    assert used <= 28 * 64 + 2048


def test_peak_memory_of_a_long_row():
    """A row in segments keeps a state a segment, not a copy."""
    x, y = torch.randn(1, 4_000_000).requires_grad_(), torch.tensor([5])
    assert peak(lambda: cece.cross_entropy(x, y)) < 100_000
    assert peak(lambda: training_step(lambda x: cece.cross_entropy(x, y), x)) < 16_000_000 + 2**22


@pytest.mark.parametrize("target", [torch.float32, torch.bool, torch.int64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", BCE_LAYOUTS)
def test_peak_memory_of_the_binary_losses(layout, target):
    """Nothing beyond inputs, gradient and, where asked for, the losses: bool and integer targets are not converted."""
    x = BCE_LAYOUTS[layout]()
    if layout == "ten dimensions":
        return
    y = (torch.rand(x.shape) > 0.5).to(target)
    if torch._debug_has_internal_overlap(x) == 0:
        y = strided_like(x, y)
    size, x = x.numel() * 4, x.detach().requires_grad_()
    w, p = torch.rand(x.shape[-1]), torch.rand(x.shape[-1])
    for loss in (
        lambda x, r: cece.binary_cross_entropy_with_logits(x, y, w, pos_weight=p, reduction=r),
        lambda x, r: cece.binary_cross_entropy(x, y, w, reduction=r),
    ):
        assert peak(lambda loss=loss: loss(x, "mean")) <= 1024
        assert peak(lambda loss=loss: loss(x, "none")) <= size + 1024
        assert peak(lambda loss=loss: training_step(lambda x: loss(x, "mean"), x)) <= size + 2048


def test_eager_torch_needs_more():
    """The count sees what it is there to see: torch's own losses break the budget."""
    x, y = torch.randn(60, 100).requires_grad_(), torch.randint(100, (60,))
    assert peak(lambda: training_step(lambda x: F.cross_entropy(x, y, label_smoothing=0.1), x)) > 2 * 24_000
    z = torch.rand(60, 100)
    assert peak(lambda: training_step(lambda x: F.binary_cross_entropy_with_logits(x, z), x)) > 2 * 24_000
