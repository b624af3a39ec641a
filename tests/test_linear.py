"""Losses of logits that are never held, against the logits' own losses in float64 (cece.reference)."""

import copy
import inspect
import itertools
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_as_good_as_torch, derive
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import cece
from cece import reference

f64 = {"dtype": torch.float64}
REDUCTIONS = ["none", "mean", "sum"]


def tensors(soft=False, deep=False, dtype=torch.float64, rows=7, features=5, classes=11, bias=True):
    """input, linear_weight, target, linear_bias; a row of the labels and one label more are ignored."""
    outputs = (classes, 3) if deep else (classes,)
    x, w = torch.randn(rows, features, **f64), torch.randn(*outputs, features, **f64)
    b = torch.randn(outputs, **f64) if bias else None
    if soft:
        t = torch.randn(rows, *outputs, **f64).softmax(1)
    else:
        t = torch.randint(classes, (rows, *outputs[1:]))
        t[1] = -100
        t.view(-1)[-1] = -100
    return [v if v is None or not v.is_floating_point() else v.to(dtype) for v in (x, w, t, b)]


def close(ours, truth, tolerance=1e-11, what=""):
    assert ours.shape == truth.shape
    torch.testing.assert_close(
        ours.double(), truth.double(), rtol=tolerance, atol=tolerance, msg=lambda m: f"{m}\n{what}"
    )


# ---- values and gradients: a grid of options, each backend

OPTIONS = {
    "plain": {},
    "weight": {"weight": True},
    "smoothing": {"label_smoothing": 0.2},
    "token_weight": {"token_weight": True},
    "z_loss": {"z_loss": 0.1},
    "logit_scale": {"logit_scale": 0.5},
    "softcap": {"softcap": 1.5},
    "all": {
        "weight": True,
        "label_smoothing": 0.1,
        "token_weight": True,
        "z_loss": 0.01,
        "logit_scale": 1.3,
        "softcap": 2.0,
    },
}


def with_options(name, x, w, t, deep):
    options = dict(OPTIONS[name])
    if "weight" in options:
        options["weight"] = torch.rand(w.shape[0], device=x.device, **f64) + 0.1
    extra = {}
    if "token_weight" in options:
        del options["token_weight"]
        extra["token_weight"] = torch.rand(x.shape[0], *w.shape[1:-1], device=x.device, **f64).requires_grad_()
        extra["token_weight"].data.view(-1)[0] = 0
    return options, extra


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("deep", [False, True], ids=["flat", "deep"])
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
def test_option_grid(backend, soft, deep, name):
    x, w, t, b = (v.to(backend.device) for v in tensors(soft, deep))
    options, extra = with_options(name, x, w, t, deep)
    for reduction, bias, chunk_size in itertools.product(REDUCTIONS, (False, True), (None, 3)):
        args = {"input": x, "linear_weight": w, "linear_bias": b if bias else None, **extra}
        args = {k: None if v is None else v.detach().requires_grad_() for k, v in args.items()}
        more = {"reduction": reduction, **options}
        if name == "all" and reduction == "mean":
            more["normalizer"] = 3.5

        def loss(module, target, more=more, **own):
            return lambda **named: module.linear_cross_entropy(target=target, **named, **more, **own)

        g = torch.randn(t.shape[:1] + w.shape[1:-1] if reduction == "none" else (), **f64)
        ours = derive(loss(cece, t, chunk_size=chunk_size), args, g)
        truth = derive(loss(reference, t), args, g)
        assert ours.keys() == truth.keys()
        for k, v in truth.items():
            close(ours[k], v, what=f"{name} {more} {chunk_size} {k}")


def test_blocks_of_classes():
    """Products of more classes than one block has: 512 at 2048 features."""
    x, w, t, b = tensors(rows=5, features=2048, classes=1100)
    for reduction in ("sum", "none"):
        results = []
        for module in (cece, reference):
            args = [v.detach().requires_grad_() for v in (x, w, b)]
            loss = module.linear_cross_entropy(*args[:2], t, linear_bias=args[2], reduction=reduction)
            results.append([loss, *torch.autograd.grad(loss.sum(), args)])
        for ours, truth in zip(*results, strict=True):
            close(ours, truth)


@pytest.mark.parametrize("shape", [(), (2, 3), (0,), (2, 0)])
def test_any_batch(shape):
    x, w = torch.randn(*shape, 5, **f64, requires_grad=True), torch.randn(11, 5, **f64)
    t = torch.randint(11, shape)
    for reduction in REDUCTIONS:
        ours = cece.linear_cross_entropy(x, w, t, reduction=reduction)
        truth = F.cross_entropy((x @ w.t()).reshape(-1, 11), t.reshape(-1), reduction=reduction)
        assert ours.shape == (shape if reduction == "none" else ())
        torch.testing.assert_close(ours, truth.reshape(ours.shape), rtol=1e-11, atol=1e-11, equal_nan=True)
        close(*(torch.autograd.grad(v.sum(), x)[0] for v in (ours, truth)))
    s = cece.linear_token_statistics(x, w, t, entropy=True)
    assert s.log_prob.shape == s.entropy.shape == shape and s.argmax is None


@pytest.mark.parametrize("label", [torch.int8, torch.int16, torch.int32, torch.uint8], ids=str)
def test_labels_of_other_dtypes(label):
    x, w, t, b = tensors()
    t[t == -100] = 9
    if label == torch.uint8:
        x2, t2 = x[:1], torch.tensor([156 - 150], dtype=label)  # as int8 nothing of it is -100
        close(cece.linear_cross_entropy(x2, w, t2), reference.linear_cross_entropy(x2, w, t2.long()))
    ours = cece.linear_cross_entropy(x, w, t.to(label), linear_bias=b, ignore_index=9, chunk_size=2)
    close(ours, reference.linear_cross_entropy(x, w, t, linear_bias=b, ignore_index=9))


def test_float32_is_as_good_as_torch(backend):
    x, w, t, b = tensors(dtype=torch.float32, rows=33, features=17, classes=70)
    args = {"input": x, "linear_weight": w, "linear_bias": b}
    args = {k: v.to(backend.device).requires_grad_() for k, v in args.items()}
    t = t.to(backend.device)
    g = torch.tensor(3.0)
    ours = derive(lambda **a: cece.linear_cross_entropy(target=t, chunk_size=8, **a), args, g)
    torchs = derive(lambda **a: reference.linear_cross_entropy(target=t, **a), args, g)
    wide = {k: v.detach().double().requires_grad_() for k, v in args.items()}
    truth = derive(lambda **a: reference.linear_cross_entropy(target=t, **a), wide, g.double())
    for k, v in truth.items():
        assert ours[k].dtype == torch.float32
        # a logit is a sum of 17 products, each gradient one of 70 or 33
        assert_as_good_as_torch(ours[k], v, torchs[k], scale=20 * v.abs().max(), what=k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [0.01, 0.1])
def test_low_precision_is_as_good_as_float32_sums(dtype, scale):
    """Gradients are off by the rounding of their own dtype: at most 1.5 times what float32 is that is rounded once."""
    x = torch.randn(60, 2048).to(dtype)  # blocks of 512 classes
    w, t = (torch.randn(1300, 2048) * scale).to(dtype), torch.randint(1300, (60,))
    truth = [v.requires_grad_() for v in (x.double(), w.double())]
    narrow = [v.detach().requires_grad_() for v in (x, w)]
    loss = F.cross_entropy(truth[0] @ truth[1].t(), t)
    for reduction, incoming in (("mean", 1.0), ("none", 1 / 60)):
        ours = cece.linear_cross_entropy(*narrow, t, reduction=reduction, chunk_size=16)
        assert ours.dtype == torch.float32
        close(ours.mean(), loss, 1e-5)
        grads = torch.autograd.grad(ours, narrow, torch.full_like(ours, incoming))
        for g, y in zip(grads, torch.autograd.grad(loss, truth, retain_graph=True), strict=True):
            assert g.dtype == dtype
            error, rounding = (g.double() - y).norm(), (y.to(dtype).double() - y).norm()
            assert error <= 1.5 * rounding, (error, rounding)


def test_a_gradient_is_scaled_before_it_is_rounded():
    """An incoming gradient of 2^-20 or 2^20 changes no bit of a float16 gradient that it does not have to."""
    x, w, t, _ = tensors(dtype=torch.float16, bias=False)
    w.requires_grad_()
    loss = cece.linear_cross_entropy(x, w, t)
    (g,) = torch.autograd.grad(loss, w, torch.tensor(2.0**-6), retain_graph=True)
    (h,) = torch.autograd.grad(loss, w, torch.tensor(2.0**6))
    wide = w.detach().double().requires_grad_()
    (y,) = torch.autograd.grad(cece.linear_cross_entropy(x.double(), wide, t), wide)
    for got, factor in ((g, 2.0**-6), (h, 2.0**6)):
        off = (got.double() - y * factor).abs()
        assert (off <= 0.51 * torch.finfo(torch.float16).eps * (y * factor).abs() + 2.0**-25).all()


def test_many_rows():
    """Ten million rows, whose losses differ by 1e6: the mean is right to 1e-6."""
    n = 10_000_000
    x = torch.rand(n, 1)
    t = torch.zeros(n, dtype=torch.long)
    w = torch.tensor([[0.0], [1.0]])
    x[::1000] = 1e4
    truth = sum(F.softplus(part.double()).sum() for part in x.split(1 << 20)) / n
    ours = cece.linear_cross_entropy(x, w, t, chunk_size=1 << 20)
    assert abs(ours.double() - truth) <= 1e-6 * truth


# ---- ignored rows


@pytest.mark.parametrize("deep", [False, True], ids=["flat", "deep"])
@pytest.mark.parametrize("compact", [True, False])
def test_ignored_rows_leak_nothing(backend, deep, compact, monkeypatch):
    """A NaN in them is seen in no value and no derivative, whether they are left out or take part with nothing."""
    x, w, t, b = (v.to(backend.device) for v in tensors(deep=deep))
    assert (t[1] == -100).all()
    if not compact:
        monkeypatch.setattr(sys.modules["cece.linear"], "_may_wait", lambda device: False)
    tw = torch.rand(t.shape, device=t.device, **f64)
    tw[1] = torch.nan
    dirty = x.clone()
    dirty[1] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1, torch.nan])
    for reduction in REDUCTIONS:
        results = []
        for input, factor in ((dirty, tw), (x, tw.nan_to_num(0.5))):
            args = [v.detach().requires_grad_() for v in (input, w, b, factor)]
            loss = cece.linear_cross_entropy(
                *args[:2], t, linear_bias=args[2], token_weight=args[3], reduction=reduction, z_loss=0.1, chunk_size=2
            )
            first = torch.autograd.grad(loss.sum(), args, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), args)
            results.append([loss, *first, *second])
        for ours, clean in zip(*results, strict=True):
            assert torch.equal(ours, clean)
        assert not results[0][1][1].any() and not results[0][5][1].any()


@pytest.mark.parametrize("compact", [True, False])
def test_ignored_rows_beside_infinite_weights(compact, monkeypatch):
    monkeypatch.setattr(sys.modules["cece.linear"], "_may_wait", lambda device: compact)
    x, w, t, _ = tensors()
    w[3, 2] = torch.inf
    for reduction in REDUCTIONS:
        y = x.clone().requires_grad_()
        loss = cece.linear_cross_entropy(y, w, t, reduction=reduction, chunk_size=2)
        for create_graph in (False, True):
            (g,) = torch.autograd.grad(loss.sum(), y, retain_graph=True, create_graph=create_graph)
            assert g[0].isnan().any() and not g[1].any()


def products(function):
    """The (rows, inner, columns) of the matrix products that a call runs."""
    with torch.profiler.profile(record_shapes=True) as profile:
        function()
    shapes = [e.input_shapes for e in profile.events() if e.name in ("aten::addmm_", "aten::mm")]
    return [(*s[-2], s[-1][1]) if len(s) == 2 else (*s[1], s[2][1]) for s in shapes]


def test_ignored_rows_cost_nothing():
    x, w, t, _ = tensors(rows=100, bias=False)
    t[:] = -100
    t[::10] = 3
    x.requires_grad_(), w.requires_grad_()
    for reduction in REDUCTIONS:
        loss = []
        forward = products(lambda r=reduction, out=loss: out.append(cece.linear_cross_entropy(x, w, t, reduction=r)))
        backward = products(lambda out=loss: out[0].sum().backward())
        assert len(forward) + len(backward) == (4 if reduction == "none" else 3)
        assert all(10 in p and 100 not in p for p in forward + backward), (forward, backward)


def test_only_what_is_asked_for():
    x, w, t, b = tensors(rows=10)
    for needs in itertools.product((False, True), repeat=3):
        args = [v.detach().requires_grad_(n) for v, n in zip((x, w, b), needs, strict=True)]
        loss = []
        count = products(
            lambda a=args, out=loss: out.append(cece.linear_cross_entropy(*a[:2], t, linear_bias=a[2], reduction="sum"))
        )
        assert len(count) == 1 + needs[0] + needs[1]
        if any(needs):
            assert len(products(lambda out=loss: out[0].backward())) == 0
        assert [a.grad is not None for a in args] == list(needs)
    with torch.no_grad():
        args = [v.detach().requires_grad_() for v in (x, w)]
        assert len(products(lambda: cece.linear_cross_entropy(*args, t))) == 1


# ---- chunks


def rows_of_chunks(n, **options):
    x, w = torch.randn(n, 4), torch.randn(options.pop("classes", 8), 4)
    return [
        p[0] for p in products(lambda: cece.linear_cross_entropy(x, w, torch.zeros(n, dtype=torch.long), **options))
    ]


def test_rule_of_chunks():
    """Docstring of linear_cross_entropy: a fourteenth in whole 48s, at least 48 and 16 MiB, at most 4096."""
    assert rows_of_chunks(2000, classes=65536) == [96] * 20 + [80]
    assert rows_of_chunks(100, classes=65536) == [64, 36]
    assert rows_of_chunks(100, classes=131072) == [48, 48, 4]
    assert rows_of_chunks(2000, classes=8192) == [512] * 3 + [464]
    assert rows_of_chunks(60000, classes=2048) == [4096] * 14 + [2656]
    assert rows_of_chunks(2000) == [2000]
    assert rows_of_chunks(10, chunk_size=4) == [4, 4, 2]
    assert rows_of_chunks(10, chunk_size=10**12) == [10]


PEAK = """
import sys, torch, cece
sys.path.insert(0, "benchmarks")
torch.set_num_threads(1)
n, c, d = 2048, 16000, 64
x, w, t = torch.randn(n, d, requires_grad=True), torch.randn(c, d, requires_grad=True), torch.randint(c, (n,))
def peak():
    return next(int(r.split()[1]) for r in open("/proc/self/status") if r.startswith("VmHWM")) * 1024
cece.linear_cross_entropy(x[:64], w, t[:64]).backward()  # the libraries' own memory
before = peak()
cece.linear_cross_entropy(x, w, t).backward()
print((peak() - before) / (4 * n * c))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory():
    """A tenth of the logits', and the 3 % that the gradient of linear_weight takes twice: it is added to .grad."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.17, done.stdout


# ---- autograd


def call(module, soft, deep, reduction, name="plain", **own):
    x, w, t, b = tensors(soft, deep, rows=4, features=3, classes=4)
    options, extra = with_options(name, x, w, t, deep)
    if not soft:
        t[1] = 2 if deep else -100

    def loss(x, w, b, *rest):
        more = {"token_weight": rest[0]} if rest else {}
        return module.linear_cross_entropy(x, w, t, linear_bias=b, reduction=reduction, **options, **more, **own)

    return loss, [v.detach().requires_grad_() for v in (x, w, b, *extra.values())]


@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.parametrize("deep", [False, True], ids=["flat", "deep"])
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
def test_gradcheck(soft, deep, name):
    for reduction in REDUCTIONS:
        loss, inputs = call(cece, soft, deep, reduction, name, chunk_size=2)
        assert gradcheck(loss, inputs, check_forward_ad=True, check_batched_grad=reduction != "none", fast_mode=True)
        assert gradgradcheck(loss, inputs, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_third_order(reduction):
    results = []
    for module in (cece, reference):
        torch.manual_seed(0)
        loss, inputs = call(module, False, False, reduction, "all")
        torch.manual_seed(1)
        value = loss(*inputs)
        for _ in range(3):
            grads = torch.autograd.grad(value.square().sum(), inputs, create_graph=True)
            value = torch.cat([(g * torch.randn_like(g)).reshape(-1) for g in grads])
        results.append(value)
    close(*results, 1e-9)


def test_gradients_of_probabilities_and_class_weights():
    x, w, t, b = tensors(soft=True)
    for reduction, asked in itertools.product(REDUCTIONS, ([0, 1, 2, 3, 4], [0, 2], [4])):
        results = []
        for module in (cece, reference):
            args = [v.detach().clone() for v in (x, w, t, b, torch.arange(1.0, 12, **f64))]
            wanted = [args[i].requires_grad_() for i in asked]
            value = module.linear_cross_entropy(*args[:3], linear_bias=args[3], weight=args[4], reduction=reduction)
            results.append(torch.autograd.grad(value.square().sum(), wanted))
        for ours, truth in zip(*results, strict=True):
            close(ours, truth)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_torch_func(reduction):
    def functions(module):
        torch.manual_seed(0)
        loss, inputs = call(module, False, False, reduction)
        inputs = [v.detach() for v in inputs]
        tangents = [torch.randn_like(v) for v in inputs]
        batch = [torch.stack([v, v + 1, -v]) for v in inputs]

        def scalar(*a):
            return loss(*a).square().sum()

        every = tuple(range(len(inputs)))
        yield torch.func.grad(scalar, every)(*inputs)
        yield torch.func.jvp(loss, tuple(inputs), tuple(tangents))
        yield torch.func.vmap(loss)(*batch)
        yield torch.func.vmap(torch.func.grad(scalar, every))(*batch)
        yield torch.func.vmap(loss, in_dims=(None, 0, None))(inputs[0], batch[1], inputs[2])
        yield torch.func.hessian(scalar)(*inputs)
        yield torch.func.jacrev(loss, every)(*inputs)
        yield torch.func.jacfwd(loss, every)(*inputs)
        yield torch.func.jvp(torch.func.grad(scalar), tuple(inputs), tuple(tangents))

    for ours, truth in zip(functions(cece), functions(reference), strict=True):
        ours, truth = ([*v] if isinstance(v, tuple) else [v] for v in (ours, truth))
        for a, b in zip(ours, truth, strict=True):
            close(a, b, 1e-9)


def test_forward_mode_of_statistics():
    x, w, t, b = tensors()
    v = torch.randn_like(x)
    with forward_ad.dual_level():
        s = cece.linear_token_statistics(forward_ad.make_dual(x, v), w, t, linear_bias=b, entropy=True)
        ours = [forward_ad.unpack_dual(a).tangent for a in (s.log_prob, s.entropy)]
    truth = torch.func.jvp(
        lambda x: [reference.token_statistics(reference.linear_logits(x, w, b), t)[k] for k in ("log_prob", "entropy")],
        (x,),
        (v,),
    )[1]
    for a, y in zip(ours, truth, strict=True):
        close(a, y)


def test_retain_graph():
    """The graph that is kept gives the same gradients again; the one that is not is gone; nobody's tensor changes."""
    x, w, t, b = tensors()
    args = [v.requires_grad_() for v in (x, w, b)]
    kept = [v.detach().clone() for v in args]
    loss = cece.linear_cross_entropy(x, w, t, linear_bias=b)
    g = torch.tensor(2.5, **f64)
    first = [v.clone() for v in torch.autograd.grad(loss, args, g, retain_graph=True)]
    again = torch.autograd.grad(loss, args, g, retain_graph=True)
    last = torch.autograd.grad(loss, args, g)
    for a, b2, c in zip(first, again, last, strict=True):
        assert torch.equal(a, b2) and torch.equal(a, c)
    assert g == 2.5 and all(torch.equal(a, k) for a, k in zip(args, kept, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_saved_tensor_hooks_see_no_change():
    x, w, t, b = tensors()
    x.requires_grad_()
    packed = []

    def pack(v):
        packed.append((v, v.clone()))
        return v

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        loss = cece.linear_cross_entropy(x, w, t, linear_bias=b)
    loss.backward(torch.tensor(3.0, **f64))
    assert packed and all(torch.equal(v, was) for v, was in packed)

    def layer(x):
        return cece.linear_cross_entropy(x, w, t, linear_bias=b)

    y = x.detach().requires_grad_()
    (3 * torch.utils.checkpoint.checkpoint(layer, y, use_reentrant=False)).backward()
    close(y.grad, x.grad)


def test_deterministic():
    x, w, t, _ = tensors(dtype=torch.float32, rows=300, features=64, classes=2000)
    results = []
    for _ in range(2):
        args = [v.detach().requires_grad_() for v in (x, w)]
        loss = cece.linear_cross_entropy(*args, t)
        results.append([loss, *torch.autograd.grad(loss, args)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- statistics of a row


@pytest.mark.parametrize("deep", [False, True], ids=["flat", "deep"])
def test_statistics(backend, deep):
    x, w, t, b = (v.to(backend.device) for v in tensors(deep=deep))
    names = ["log_prob", "entropy", "logsumexp", "collision"]
    for asked in (names, ["entropy"], ["log_prob", "collision"]):
        results = []
        for ours in (True, False):
            args = [v.detach().requires_grad_() for v in (x, w, b)]
            if ours:
                s = cece.linear_token_statistics(
                    args[0], args[1], t, linear_bias=args[2], temperature=0.7, chunk_size=3, argmax=True,
                    log_prob="log_prob" in asked, **{n: True for n in asked if n != "log_prob"},
                )  # fmt: skip
                assert all((getattr(s, n) is None) == (n not in asked) for n in names)
                best = reference.linear_logits(*args).argmax(1)
                assert torch.equal(s.argmax, torch.where(t == -100, 0, best))
                values = [getattr(s, n) for n in asked]
            else:
                truth = reference.token_statistics(reference.linear_logits(*args), t, temperature=0.7, dim=1)
                values = [truth[n] for n in asked]
            torch.manual_seed(5)
            total = sum((v * torch.randn_like(v)).sum() for v in values)
            first = torch.autograd.grad(total, args, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), args)
            results.append([*values, *first, *second])
        for a, y in zip(*results, strict=True):
            close(a, y, 1e-10, what=str(asked))


def test_statistics_without_a_target():
    x, w, _, b = tensors()
    s = cece.linear_token_statistics(x, w, linear_bias=b, entropy=True)
    close(s.entropy, reference.token_statistics(reference.linear_logits(x, w, b))["entropy"])
    assert s.log_prob is None


# ---- compilers


def compiled_outcome(function, x, w, b, t):
    args = [v.detach().requires_grad_() for v in (x, w, b)]
    loss = function(*args, t)
    return [loss, *torch.autograd.grad(loss.square().sum(), args)]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compile(reduction, dynamic):
    def loss(x, w, b, t):
        return cece.linear_cross_entropy(2 * x, w, t, linear_bias=b, reduction=reduction, z_loss=0.1, chunk_size=3)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (7, 9) if dynamic else (7,):
        x, w, t, b = tensors(rows=rows)
        for a, y in zip(compiled_outcome(compiled, x, w, b, t), compiled_outcome(loss, x, w, b, t), strict=True):
            close(a, y)


def test_compile_of_transforms_and_statistics():
    x, w, t, b = tensors()

    def f(x, w):
        s = cece.linear_token_statistics(x, w, t, linear_bias=b, entropy=True)
        return torch.func.grad(lambda x: cece.linear_cross_entropy(x, w, t))(x).sum() + (s.entropy * s.log_prob).sum()

    torch._dynamo.reset()
    close(torch.compile(f, fullgraph=True, backend="aot_eager")(x, w), f(x, w))


def test_compiled_graph_holds_no_logits():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def compiler(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    x, w, t, b = tensors(rows=50, classes=40)
    torch._dynamo.reset()
    f = torch.compile(
        lambda x, w, b: cece.linear_cross_entropy(x, w, t, linear_bias=b),
        fullgraph=True,
        backend=aot_autograd(fw_compiler=compiler),
    )
    f(*(v.requires_grad_() for v in (x, w, b))).backward()
    shapes = [n.meta["val"].shape for g in graphs for n in g.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    assert len(graphs) == 2 and shapes and (50, 40) not in shapes


def test_compiled_autograd():
    x, w, t, b = tensors()
    results = []
    for on in (False, True):
        for reduction in ("mean", "none"):
            args = [v.detach().requires_grad_() for v in (x, w, b)]
            loss = cece.linear_cross_entropy(*args[:2], t, linear_bias=args[2], reduction=reduction).sum()
            if on:
                with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
                    loss.backward()
            else:
                loss.backward()
            results.append([a.grad for a in args])
    for eager, compiled in zip(results[:2], results[2:], strict=True):
        for a, y in zip(compiled, eager, strict=True):
            close(a, y)


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
def test_opcheck(soft):
    x, w, t, b = tensors(soft)
    x, w, b = (v.requires_grad_() for v in (x, w, b))
    tw = torch.rand(7, **f64).requires_grad_()
    options = (-100, 0.1, 1.0, 0.0, False, 3, True)
    for reduction in (0, 1, 2):
        args = (x, w, b, t, None, tw, *options, 0.1, reduction)
        torch.library.opcheck(torch.ops.cece.linear_cross_entropy.default, args)
    args = (x, w, b, t, None, *options, 5)
    torch.library.opcheck(torch.ops.cece.linear_token_statistics_forward.default, args)
    stats = torch.ops.cece.linear_token_statistics_forward(*args)[-1].detach()
    g = torch.rand(7, **f64)
    args = (g, None, g, None, x.detach(), w.detach(), b.detach(), t, None, stats, *options, 5, 7)
    torch.library.opcheck(torch.ops.cece.linear_token_statistics_backward.default, args)


def test_export_and_decompositions():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.loss = cece.LinearCrossEntropyLoss(5, 11, bias=True, dtype=torch.float64, label_smoothing=0.1)

        def forward(self, x, t):
            return self.loss(x, t) + cece.linear_token_statistics(x, self.loss.linear.weight, t).log_prob.sum()

    x, _, t, _ = tensors()
    model = Model()
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(model, (x, t), dynamic_shapes=({0: rows}, {0: rows}))
    close(program.module()(x, t), model(x, t))
    plain = program.run_decompositions(cece.decompositions())
    assert "cece" not in str(plain.graph)
    close(plain.module()(x[:3], t[:3]), model(x[:3], t[:3]))


@pytest.mark.parametrize("deep", [False, True], ids=["flat", "deep"])
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
def test_decompositions_are_the_operators(soft, deep):
    from cece import _decompositions as plain

    x, w, t, b = tensors(soft, deep)
    tw, weight = torch.rand(7, *w.shape[1:-1], **f64), torch.rand(11, **f64)
    ops = torch.ops.cece
    for scale, z_loss, wanted, reduction in ((1.0, 0.0, 1, 1), (0.5, 0.1, 15, 2), (1.0, 0.1, 5, 0)):
        options = (-100, 0.1, scale, 0.0, False, 3, True)
        args = (x, w, b, t, weight, tw, *options, z_loss, reduction, 0 if reduction == 0 else 7)
        rows = (x, w, b, t, weight, *options, wanted)
        stats = ops.linear_token_statistics_forward(*rows)[-1]
        grads = [torch.rand_like(tw) if wanted >> i & 1 else None for i in range(4)]
        back = (*grads, *rows[:5], stats, *options, wanted, 7)
        for name, given in (
            ("linear_cross_entropy", args),
            ("linear_token_statistics_forward", rows),
            ("linear_token_statistics_backward", back),
        ):
            for ours, truth in zip(getattr(plain, name)(*given), getattr(ops, name)(*given), strict=True):
                close(ours, truth, 1e-10, what=f"{name} {given[5:]}")


def test_meta():
    x, w, t, b = (v.to("meta") for v in tensors(dtype=torch.bfloat16))
    x.requires_grad_()
    loss = cece.linear_cross_entropy(x, w, t, linear_bias=b)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert torch.autograd.grad(loss, x)[0].dtype == torch.bfloat16
    assert cece.linear_cross_entropy(x, w, t, reduction="none").shape == (7,)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_autocast(reduction):
    """As torch's linear and cross_entropy under autocast: products of bfloat16, a float32 loss, float32 gradients."""
    x, w, t, b = tensors(dtype=torch.float32)
    args = [v.requires_grad_() for v in (x, w, b)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = cece.linear_cross_entropy(x, w, t, linear_bias=b, reduction=reduction)
    grads = torch.autograd.grad(loss.sum(), args, create_graph=True)
    assert loss.dtype == torch.float32 and all(g.dtype == torch.float32 for g in grads)
    narrow = [v.detach().bfloat16().requires_grad_() for v in args]
    same = cece.linear_cross_entropy(*narrow[:2], t, linear_bias=narrow[2], reduction=reduction)
    assert torch.equal(loss, same)
    for g, y in zip(grads, torch.autograd.grad(same.sum(), narrow), strict=True):
        close(g, y, 1e-2)


# ---- extremes and errors


def test_nothing_to_learn_from():
    x, w, t, b = tensors()
    x.requires_grad_()
    t[:] = -100
    for reduction, value in (("mean", torch.nan), ("sum", 0.0)):
        loss = cece.linear_cross_entropy(x, w, t, linear_bias=b, reduction=reduction)
        assert torch.equal(loss.detach(), torch.tensor(value, **f64)) or (loss.isnan() and value != value)
        (g,) = torch.autograd.grad(loss, x)
        assert g.shape == x.shape and (not g.any() or reduction == "mean")


def test_infinite_logits_and_tiny_losses():
    x = torch.tensor([[1.0], [30.0]], requires_grad=True)
    w, b = torch.tensor([[1.0], [0.0], [0.0]]), torch.tensor([0.0, 0.0, -torch.inf])
    ours = cece.linear_cross_entropy(x, w, torch.tensor([0, 0]), linear_bias=b, reduction="none")
    truth = F.softplus(-x.detach().double()).squeeze(1)
    assert ((ours.double() - truth).abs() <= 4 * 2**-23 * truth).all()
    total = cece.linear_cross_entropy(x, w, torch.tensor([0, 0]), linear_bias=b, reduction="sum")
    (g,) = torch.autograd.grad(total, x)
    assert ((g.double() + (-x.detach().double()).sigmoid()).abs() <= 1e-6 * g.abs()).all()
    impossible = cece.linear_cross_entropy(x, w, torch.tensor([2, 0]), linear_bias=b, reduction="none")
    assert impossible[0] == torch.inf
    assert cece.linear_cross_entropy(
        x, w, torch.tensor([2, 0]), linear_bias=b, token_weight=torch.tensor([0.0, 1.0]), reduction="sum"
    ).isfinite()


def test_skip_masked_rows():
    x, w = torch.randn(3, 2, **f64, requires_grad=True), torch.randn(4, 2, 2, **f64)
    b = torch.zeros(4, 2, **f64)
    b[:, 1] = -torch.inf
    t = torch.tensor([[0, 1], [2, 3], [1, -100]])
    ours = cece.linear_cross_entropy(x, w, t, linear_bias=b, skip_masked_rows=True, z_loss=0.1)
    truth = reference.linear_cross_entropy(x, w[:, 0], t[:, 0], z_loss=0.1)
    close(ours, truth)
    close(*(torch.autograd.grad(v, x)[0] for v in (ours, truth)))
    assert cece.linear_cross_entropy(x, w, t, linear_bias=b).isnan()


x, w, t = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, dtype=torch.long)
ERRORS = {
    "dimensions of linear_weight": (lambda: (x, w[0], t), {}, RuntimeError, "dimensionality at least 2, got 1"),
    "features": (lambda: (x, w[:, :2], t), {}, RuntimeError, r"expected equal input and linear_weight last .* 3 and 2"),
    "target": (lambda: (x, w, t[:3]), {}, RuntimeError, r"target must have shape \(4,\) .* or \(4, 5\) .*, got \(3,\)"),
    "bias": (lambda: (x, w, t), {"linear_bias": w[:, :2]}, RuntimeError, r"expected linear_bias shape \(5,\), got"),
    "dtype": (lambda: (x, w.double(), t), {}, RuntimeError, "linear_weight must have input's dtype torch.float32, got"),
    "no float": (lambda: (t, t[:, None], t), {}, RuntimeError, "last dimensions|must be float64"),
    "scalar": (lambda: (x[0, 0], w, t), {}, RuntimeError, r"expected input of shape"),
    "unbatched": (lambda: (x[0], torch.zeros(5, 2, 3), t), {}, RuntimeError, "requires batched input"),
    "soft": (lambda: (x, w, torch.rand(4, 5)), {"ignore_index": 1}, RuntimeError, "ignore_index cannot be specified"),
    "label": (lambda: (x, w, t + 7), {}, IndexError, r"Target 7 is out of bounds: target\[0\] must be in \[0, 5\)"),
    "float labels": (lambda: (x, w, t.float()), {}, RuntimeError, "expected target dtype to be"),
    "weight": (lambda: (x, w, t), {"weight": torch.ones(3)}, RuntimeError, "weight tensor should be defined"),
    "smoothing": (lambda: (x, w, t), {"label_smoothing": 2.0}, RuntimeError, r"between 0.0 and 1.0, got 2"),
    "chunk_size": (lambda: (x, w, t), {"chunk_size": 0}, ValueError, "chunk_size must be a positive .*, got 0"),
    "chunk_size's type": (lambda: (x, w, t), {"chunk_size": 1.5}, TypeError, "chunk_size must be an int, got float"),
    "normalizer": (lambda: (x, w, t), {"normalizer": 2, "reduction": "sum"}, ValueError, "normalizer is what"),
    "token_weight": (
        lambda: (x, w, t),
        {"token_weight": torch.ones(3)},
        ValueError,
        r"token_weight must .* \[4\], got",
    ),
    "softcap": (lambda: (x, w, t), {"softcap": -1.0}, ValueError, "softcap must be a positive number or None, got -1"),
    "logit_scale": (lambda: (x, w, t), {"logit_scale": -1.0}, ValueError, "logit_scale must be a positive"),
    "reduction": (lambda: (x, w, t), {"reduction": "all"}, ValueError, "reduction must be 'none', 'mean' or 'sum'"),
    "a list": (lambda: ([1.0], w, t), {}, TypeError, "input must be a torch.Tensor, got list"),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_errors(name, device):
    args, options, error, message = ERRORS[name]
    if device == "meta" and name == "label":
        return

    def put(v):
        return v.to(device) if isinstance(v, torch.Tensor) else v

    with pytest.raises(error, match=message):
        cece.linear_cross_entropy(*map(put, args()), **{k: put(v) for k, v in options.items()})


def test_position_of_a_bad_label():
    """Of the whole target, also in a later chunk and behind ignored rows."""
    bad = torch.tensor([[0, 1], [-100, -100], [2, 3], [4, 5]])
    with pytest.raises(
        IndexError, match=r"cece.linear_cross_entropy: Target 5 is out of bounds: target\[3, 1\] must be in \[0, 5\)"
    ):
        cece.linear_cross_entropy(x, torch.zeros(5, 2, 3), bad, chunk_size=1)


def test_errors_of_statistics():
    for options, message in (
        ({}, "ask for at least one"),
        ({"log_prob": True}, "log_prob needs a target"),
        ({"entropy": True, "temperature": 0}, "temperature must be a positive number, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            cece.linear_token_statistics(x, w, **options)
    with pytest.raises(RuntimeError, match="target must be class indices"):
        cece.linear_token_statistics(x, w, torch.rand(4, 5))


# ---- module


@pytest.mark.parametrize("outputs", [(), (3, 2)])
def test_module(outputs):
    options = {"bias": True, "weight": torch.rand(11, **f64), "ignore_index": 2, "label_smoothing": 0.1}
    loss = cece.LinearCrossEntropyLoss(5, 11, out_features=outputs, dtype=torch.float64, softcap=3.0, **options)
    assert list(loss.state_dict()) == ["weight", "linear.weight", "linear.bias"]
    x, t = torch.randn(7, 5, **f64), torch.randint(11, (7, *outputs))
    w = loss.linear.weight.reshape(11, *outputs, 5)
    b = loss.linear.bias.reshape(11, *outputs)
    tw = torch.rand(t.shape, **f64)
    truth = reference.linear_cross_entropy(
        x, w, t, linear_bias=b, weight=options["weight"], ignore_index=2, label_smoothing=0.1, softcap=3.0,
        token_weight=tw, normalizer=3.0,
    )  # fmt: skip
    close(loss(x, t, tw, 3.0), truth)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(twin(x, t), loss(x, t))
    assert "num_classes=11" in repr(loss) and "softcap=3.0" in repr(loss)


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyLoss"), reason="torch 2.13's")
def test_module_is_torchs():
    theirs = torch.nn.LinearCrossEntropyLoss(5, 11, bias=True, dtype=torch.float64)
    ours = cece.LinearCrossEntropyLoss(5, 11, bias=True, dtype=torch.float64)
    assert isinstance(ours, torch.nn.LinearCrossEntropyLoss)
    for a, b in (
        (cece.linear_cross_entropy, F.linear_cross_entropy),
        (cece.LinearCrossEntropyLoss.__init__, torch.nn.LinearCrossEntropyLoss.__init__),
        (cece.LinearCrossEntropyLoss.forward, torch.nn.LinearCrossEntropyLoss.forward),
    ):
        a, b = ([(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()] for f in (a, b))
        assert a[: len(b)] == b
    ours.load_state_dict(theirs.state_dict())
    x, t = torch.randn(7, 5, **f64), torch.randint(11, (7,))
    close(ours(x, t), theirs(x, t))
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2)
    count = products(lambda: cece.linear_cross_entropy(x, theirs.linear.weight.detach(), t, options=options))
    assert len(count) == 4
    for bad in ({"weight": torch.ones(3)}, {"label_smoothing": 2.0}):
        for cls in (torch.nn.LinearCrossEntropyLoss, cece.LinearCrossEntropyLoss):
            with pytest.raises(RuntimeError, match="expected"):
                cls(5, 11, **bad)
