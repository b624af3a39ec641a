"""What a row says beside its loss, and the options of cross-entropy that come of it, against float64 definitions."""

import itertools
import math

import mpmath
import pytest
import torch
from conftest import DTYPES, SHAPES, assert_as_good_as_torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacrev, vmap

import cece
from cece import reference

INF, NAN = float("inf"), float("nan")
f64 = {"dtype": torch.float64}
NAMES = ["log_prob", "entropy", "logsumexp", "collision"]
ALL = dict.fromkeys(NAMES, True)
STATISTICS = torch.ops.cece.token_statistics_forward.default
BACKWARD = torch.ops.cece.token_statistics_backward.default


def class_dim(x):
    return min(1, x.dim() - 1)


def labels_of(x, ignored=True):
    dim = class_dim(x)
    y = torch.randint(x.shape[dim], [n for d, n in enumerate(x.shape) if d != dim])
    if ignored and y.numel() > 2:
        y.view(-1)[1] = -100
    return y


def gradient(values, x):
    g = [torch.randn(v.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float32) for v in values]
    total = sum((v * a.to(v)).sum() for v, a in zip(values, g, strict=True))
    return torch.autograd.grad(total, x)[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics(backend, shape):
    """Every dtype, kernel and subset of what can be asked for; a subset's gradient is that of the subset."""
    if backend.name != "cpu" and math.prod(shape) > 50000:
        return
    subsets = [NAMES] if shape[-1] > 1000 else [NAMES, *([n] for n in NAMES)]
    for dtype, subset in itertools.product(DTYPES, subsets):
        x = (torch.randn(shape) * 4).to(dtype)
        y, t = labels_of(x), 0.7 if dtype == torch.float32 else 1.0
        dim = class_dim(x)
        truth_x, ours_x = x.double().requires_grad_(), x.to(backend.device).requires_grad_()
        truth = reference.token_statistics(truth_x, y, temperature=t, dim=dim)
        asked = {n: n in subset for n in NAMES}
        ours = cece.token_statistics(ours_x, y.to(backend.device), **asked, argmax=True, temperature=t, dim=dim)
        for name in NAMES:
            value = getattr(ours, name)
            assert (value is None) == (name not in subset)
            if value is not None:
                # logsumexp is a difference of max and log_sum where they have two signs. Tiny values: as exact as the
                # difference of the two largest logits, which is rounded.
                top = (truth_x.detach() / t).topk(min(2, x.shape[dim]), dim).values.movedim(dim, 0)
                scale = truth[name].detach().abs() * (top[0] - top[-1]) / 8
                if name == "logsumexp" or dtype == torch.float64:
                    scale = truth_x.abs().max().item() / t
                assert_as_good_as_torch(value, truth[name], scale=scale, what=f"{name} {shape} {dtype}")
        used = y != -100
        best = (x.double() / t).argmax(dim)
        assert torch.equal(ours.argmax.cpu()[used], best[used]) and not ours.argmax.requires_grad
        slope = gradient([getattr(ours, n) for n in subset], ours_x)
        true_slope = gradient([truth[n] for n in subset], truth_x)
        p = (truth_x / t).softmax(dim).detach()
        scale = 12 * (p * (1 - p.clamp_min(1e-300).log()) ** 2 + 1e-3 * p.max())
        if "log_prob" in subset:
            index = torch.where(used, y, 0).unsqueeze(dim)
            scale = scale + torch.zeros_like(scale).scatter_(dim, index, 4.0)
        assert_as_good_as_torch(slope, true_slope, scale=scale / t, what=f"gradient of {subset} {shape} {dtype}")
        assert not slope[(~used).unsqueeze(dim).expand(x.shape)].any()


@pytest.mark.parametrize("classes", [2, 40, 60, 3000])
@pytest.mark.parametrize("nats", [1e-3, 1e-6, 1e-9, 1e-12])
def test_tiny_values_keep_their_bits(backend, classes, nats):
    """Entropy and -log_prob to 1e-6 of themselves down to 1e-12 nats; their gradients, and collision's, to 5e-6."""
    low = round(math.log(nats / (classes - 1)) * 64) / 64  # so that differences are exact
    x = torch.full((3, classes), low).index_fill_(1, torch.tensor([classes // 2]), 0.5)
    y = torch.full((3,), classes // 2)
    for layout in (x, x.t().contiguous().t()):
        logits = layout.to(backend.device).requires_grad_()
        s = cece.token_statistics(logits, y.to(backend.device), **ALL)
        with mpmath.workprec(200):
            gap = mpmath.mpf(0.5 - low)
            rest = (classes - 1) * mpmath.exp(-gap)
            nll = mpmath.log1p(rest)
            entropy = nll + rest * gap / (1 + rest)
            p = 1 / (1 + rest)
            d_entropy = -p * (mpmath.log(p) + entropy)  # of the largest logit
            collision = (1 + (classes - 1) * mpmath.exp(-2 * gap)) * p * p
            d_collision = 2 * p * (p - collision)
        assert abs(-s.log_prob[0].item() / float(nll) - 1) < 1e-6
        assert abs(s.entropy[0].item() / float(entropy) - 1) < 1e-6
        at = 0, classes // 2
        for value, truth in ((s.entropy, d_entropy), (s.collision, d_collision), (s.log_prob, 1 - p)):
            (slope,) = torch.autograd.grad(value.sum(), logits, retain_graph=True)
            assert abs(slope[at].item() / float(truth) - 1) < 5e-6, (slope[at].item(), float(truth))


def test_infinities_and_nans(backend):
    x = torch.tensor(
        [[-INF] * 4, [1, -INF, 2, 3], [0, INF, 1, 2], [NAN, 0, 1, 5], [INF, INF, 0, 0], [-INF, -INF, 0, -INF]]
    )
    y = torch.tensor([0, 3, 1, 2, 0, 2])
    for wide in (False, True):
        z = torch.cat([x, torch.full((6, 60), -INF)], 1) if wide else x
        z = z.to(backend.device).requires_grad_()
        s = cece.token_statistics(z, y.to(backend.device), **ALL, argmax=True)
        expected = {
            n: v.item() for n, v in reference.token_statistics(torch.tensor([1.0, 2, 3], **f64), y[1] - 1).items()
        }
        for n in NAMES:  # of the logits 1, 2, 3
            assert abs(getattr(s, n)[1].item() - expected[n]) < 1e-6, n
        assert torch.equal(s.argmax.cpu(), x.argmax(1))
        assert s.logsumexp.tolist()[0] == -INF and s.logsumexp.tolist()[2] == INF
        assert (s.entropy[2], s.collision[2], s.log_prob[2]) == (0, 1, 0)
        assert (s.entropy[5], s.collision[5], s.log_prob[5], s.logsumexp[5]) == (0, 1, 0, 0)
        for n in NAMES:
            assert getattr(s, n)[3:5].isnan().all(), n
        for n in ("log_prob", "entropy", "collision"):
            assert getattr(s, n)[0].isnan()
            (slope,) = torch.autograd.grad(getattr(s, n).sum(), z, retain_graph=True)
            assert slope[[0, 3, 4]].isnan().all() and not slope[[2, 5]].any()
            assert slope[1].isfinite().all() and slope[1, 1] == 0
        ignored = cece.token_statistics(z, torch.full_like(y, -100).to(backend.device), **ALL)
        ignored = torch.stack([v for v in ignored if v is not None])
        assert not ignored.any() and not torch.autograd.grad(ignored.sum(), z)[0].any()


def test_argmax_is_the_first(backend):
    for classes in (5, 60, 3000):
        x = torch.zeros(4, classes)
        x[1, [2, 4]], x[2, classes - 1], x[3, [1, 3]] = 1, 1, NAN
        lowest = torch.full((1, classes), -INF).index_fill_(1, torch.tensor([3]), torch.finfo().min)
        x = torch.cat([x, lowest])
        found = cece.token_statistics(x.to(backend.device), argmax=True).argmax.cpu()
        assert torch.equal(found, x.argmax(1)) and found.dtype == torch.int64
        if backend.name == "cpu":  # blocks, and segments of a row
            wide = torch.zeros(2, 140001)
            wide[0, [5, 2000, 70000, 140000]], wide[1, [70000, 70001, 139999]] = 1, 1
            assert cece.token_statistics(wide, argmax=True).argmax.tolist() == [5, 70000]
        turned = cece.token_statistics(x.t().contiguous().to(backend.device), argmax=True, dim=0).argmax.cpu()
        assert torch.equal(turned, found)


# ---- options of cross_entropy

OPTIONS = [
    {"z_loss": 0.1},
    {"logit_scale": 0.3},
    {"softcap": 2.5},
    {"z_loss": 0.01, "logit_scale": 1.7, "softcap": 4.0},
]


@pytest.mark.parametrize("shape", [(7,), (37, 5), (19, 49), (3, 2503), (2, 5, 7), (2, 300, 9)], ids=str)
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_options(backend, kind, shape):
    for dtype, smoothing, reduction in itertools.product(DTYPES[:2] + DTYPES[3:], (0.0, 0.2), ("none", "mean", "sum")):
        for i, options in enumerate(OPTIONS):
            weighed = (i + (reduction == "none")) % 2 == 1
            x = (torch.randn(shape) * 3).to(dtype)
            dim, rows = class_dim(x), labels_of(x)
            y = rows if kind == "labels" else torch.rand(shape, dtype=torch.float64).softmax(dim).to(dtype)
            w = torch.rand(shape[dim], dtype=torch.float64).to(dtype) if weighed else None
            token = torch.rand(rows.shape) - 0.3 if weighed else None
            more = {**options, "label_smoothing": smoothing, "reduction": reduction}
            if reduction == "mean" and i % 2 == 0:
                more["normalizer"] = torch.tensor(5.5)
            truth_x, ours_x = x.double().requires_grad_(), x.to(backend.device).requires_grad_()
            up = None if token is None else token.double().requires_grad_()
            token_ours = None if token is None else token.to(backend.device).requires_grad_()
            truth = reference.cross_entropy(
                truth_x,
                y if kind == "labels" else y.double(),
                None if w is None else w.double(),
                token_weight=up,
                **more,
            )
            ours = cece.cross_entropy(
                ours_x,
                y.to(backend.device),
                None if w is None else w.to(backend.device),
                token_weight=token_ours,
                **more,
            )
            what = f"{kind} {shape} {dtype} {more}"
            size = max(1.0, truth.abs().max().item())
            assert_as_good_as_torch(ours, truth, scale=size, what=what)
            g = torch.randn(truth.shape)
            slope = torch.autograd.grad(ours, [ours_x, token_ours] if weighed else [ours_x], g.to(ours))
            true_slope = torch.autograd.grad(truth, [truth_x, up] if weighed else [truth_x], g.double())
            for a, b in zip(slope, true_slope, strict=True):
                assert_as_good_as_torch(a, b, scale=3 * b.abs().max().item() + 1e-6, what="gradient " + what)


def test_ignored_rows_have_no_options(backend):
    """Nothing leaks from an ignored row: not its NaN, not its weight's."""
    x = torch.randn(4, 6)
    x[1] = NAN
    token = torch.tensor([1.0, NAN, 2.0, 0.0])
    y = torch.tensor([2, -100, 5, 0])
    ours_x, ours_token = x.to(backend.device).requires_grad_(), token.to(backend.device).requires_grad_()
    for options in ({}, *OPTIONS):
        loss = cece.cross_entropy(ours_x, y.to(backend.device), token_weight=ours_token, **options)
        g = torch.autograd.grad(loss, [ours_x, ours_token])
        assert loss.isfinite() and all(a.isfinite().all() for a in g) and not g[0][[1, 3]].any() and g[1][1] == 0
        assert g[1][3] > 0  # a weight of 0 still has a derivative
        kept = [0, 2, 3]
        truth = reference.cross_entropy(x[kept].double(), y[kept], token_weight=token[kept].double(), **options)
        torch.testing.assert_close(loss.cpu().double(), truth, rtol=1e-6, atol=0)


def test_a_weight_of_0_costs_nothing():
    x = torch.tensor([[0.0, -INF], [1.0, 0.0]], requires_grad=True)
    w = torch.tensor([0.0, 1.0], requires_grad=True)
    loss = cece.cross_entropy(x, torch.tensor([1, 0]), token_weight=w, reduction="sum")
    assert loss.isfinite() and torch.autograd.grad(loss, x)[0].isfinite().all()


def test_masked_rows(backend):
    """A row of -inf is NaN, or with skip_masked_rows counts as ignored, in every layout, with labels and without."""
    for shape in ((4, 5), (4, 60), (2, 5, 7)):
        x = torch.randn(shape)
        x[0] = -INF
        y = labels_of(x, ignored=False)
        soft = torch.rand(shape).softmax(1)
        for target, w in itertools.product((y, soft), (None, torch.rand(shape[1]))):
            ours = x.to(backend.device).requires_grad_()
            args = ours, target.to(backend.device), None if w is None else w.to(backend.device)
            kept = x[1:].double().requires_grad_()
            for more in ({}, {"z_loss": 0.1, "label_smoothing": 0.1}, {"token_weight": torch.rand(y.shape)}):
                on = {k: v.to(backend.device) if isinstance(v, torch.Tensor) else v for k, v in more.items()}
                assert cece.cross_entropy(*args, **on).isnan()
                loss = cece.cross_entropy(*args, **on, skip_masked_rows=True)
                more = {k: v[1:].double() if isinstance(v, torch.Tensor) else v for k, v in more.items()}
                truth = reference.cross_entropy(kept, target[1:], None if w is None else w.double(), **more)
                torch.testing.assert_close(loss.cpu().double(), truth, rtol=2e-6, atol=1e-7)
                (slope,) = torch.autograd.grad(loss, ours)
                assert not slope[0].any()
                torch.testing.assert_close(
                    slope[1:].cpu().double(), torch.autograd.grad(truth, kept)[0], rtol=1e-5, atol=1e-7
                )


def test_normalizer():
    x, y = torch.randn(6, 5, dtype=torch.float64, requires_grad=True), torch.tensor([1, 2, -100, 0, 4, 3])
    total = cece.cross_entropy(x, y, reduction="sum")
    n = torch.tensor([4], requires_grad=False)
    for normalizer in (4, 4.0, n, n.double(), n[0]):
        torch.testing.assert_close(cece.cross_entropy(x, y, normalizer=normalizer), total / 4, rtol=1e-15, atol=0)
    d = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, d: cece.cross_entropy(x, y, normalizer=d), (x, d), check_forward_ad=True)
    # Accumulated over parts, the mean over all: what num_items_in_batch is for.
    parts = sum(cece.cross_entropy(x[i : i + 2], y[i : i + 2], normalizer=5) for i in (0, 2, 4))
    torch.testing.assert_close(parts, cece.cross_entropy(x, y))
    module = cece.CrossEntropyLoss(z_loss=0.1, softcap=3.0)
    w = torch.rand(6)
    theirs = cece.cross_entropy(x, y, z_loss=0.1, softcap=3.0, token_weight=w, normalizer=5)
    assert torch.equal(module(x, y, w, 5), theirs) and torch.equal(torch.jit.script(module)(x, y, w, 5.0), theirs)


# ---- derivatives


@pytest.mark.parametrize("shape", [(6,), (3, 5), (2, 50), (2, 4, 3)], ids=str)
def test_derivatives(shape):
    x = (torch.randn(shape, **f64) * 2).requires_grad_()
    y, dim = labels_of(x), class_dim(x)
    modes = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}

    def statistics(x):
        return tuple(v for v in cece.token_statistics(x, y, **ALL, temperature=1.3, dim=dim) if v is not None)

    assert gradcheck(statistics, (x,), **modes)
    assert gradgradcheck(statistics, (x,), check_fwd_over_rev=True, check_batched_grad=True)
    assert gradcheck(lambda x: cece.entropy(x, dim=dim), (x,), **modes)

    w, token = torch.rand(shape[dim], **f64), torch.rand(y.shape, **f64).requires_grad_()
    for soft in (False, True):
        more = (torch.rand(shape, **f64).requires_grad_(), w.clone().requires_grad_()) if soft else ()

        def loss(x, token, t=y, w=w):
            return cece.cross_entropy(
                x, t, w, label_smoothing=0.1, token_weight=token, z_loss=0.1, logit_scale=0.7, softcap=3.0
            )

        assert gradcheck(loss, (x, token, *more), **modes)
        assert gradgradcheck(loss, (x, token, *more), check_fwd_over_rev=True, check_batched_grad=True)


def test_second_order_of_ignored_and_masked_rows():
    x = torch.randn(4, 5, **f64)
    x[1], x[2] = NAN, -INF
    y = torch.tensor([0, -100, 2, 3])
    x.requires_grad_()
    loss = cece.cross_entropy(x, y, z_loss=0.1, softcap=4.0, skip_masked_rows=False, reduction="none")[[0, 3]].sum()
    for skip in (True,):
        loss = cece.cross_entropy(x, y, z_loss=0.1, logit_scale=2.0, skip_masked_rows=skip)
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        (h,) = torch.autograd.grad(g.square().sum(), x)
        assert h.isfinite().all() and not h[1:3].any() and h[[0, 3]].abs().min() > 0


def test_transforms():
    """torch.func, vmap over either or both, and torch.compile with and without dynamic shapes."""
    x, y = torch.randn(3, 6, 5, **f64), torch.randint(5, (3, 6))

    def total(x, y):
        s = cece.token_statistics(x, y, **ALL, dim=-1)
        return sum(v.sin().sum() for v in s if v is not None)

    for a, b in ((grad, 0), (jacrev, 0), (hessian, 0)):
        one = torch.stack([a(total, b)(x[i], y[i]) for i in range(3)])
        torch.testing.assert_close(vmap(a(total, b))(x, y), one)
    shared = torch.stack([grad(total)(x[i], y[0]) for i in range(3)])
    torch.testing.assert_close(vmap(grad(total), (0, None))(x, y[0]), shared)
    assert vmap(lambda x: cece.entropy(x))(x[:0]).shape == (0, 6)
    w = torch.rand(3, 5, **f64)
    per_weight = vmap(lambda x, y, w: cece.cross_entropy(x, y, w, z_loss=0.1))(x, y, w)
    torch.testing.assert_close(
        per_weight, torch.stack([cece.cross_entropy(x[i], y[i], w[i], z_loss=0.1) for i in range(3)])
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def loss(x, y, token, n):
        s = cece.token_statistics(x, y, entropy=True, argmax=True)
        more = cece.cross_entropy(x, y, token_weight=token, normalizer=n, z_loss=0.1, softcap=4.0)
        return more + (s.entropy * s.argmax).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (4, 6):
        x, y = torch.randn(rows, 7, requires_grad=True), torch.randint(7, (rows,))
        args = x, y, torch.rand(rows), torch.tensor(3)
        ours, theirs = loss(*args), compiled(*args)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(theirs, x))


def op_arguments(soft, wanted=31, shape=(3, 5, 2), **more):
    x = torch.randn(shape, requires_grad=True)
    t = torch.rand(shape) if soft else labels_of(x)
    return (
        x,
        None if soft is None else t,
        torch.rand(5) if soft else None,
        -100,
        0.1 if soft else 0.0,
        0.7,
        3.0,
        True,
        wanted,
    )


@pytest.mark.parametrize("soft", [False, True, None])
def test_operators(soft):
    """opcheck; meta; and what an exported program is left with."""
    wanted = 30 if soft is None else 31
    forward = op_arguments(soft, wanted)
    torch.library.opcheck(STATISTICS, forward)
    stats = STATISTICS(*forward)[-1].detach()
    grads = [torch.rand(3, 2, requires_grad=True) for _ in range(4)]
    if soft is None:
        grads[0] = None
    backward = (*grads, *forward[:3], stats, *forward[3:8])
    torch.library.opcheck(BACKWARD, backward)
    over = (*grads, forward[0].detach().clone(), *forward[1:3], stats, *forward[3:8])
    torch.library.opcheck(torch.ops.cece.token_statistics_backward_.default, over)

    class Module(torch.nn.Module):
        def forward(self, x, t):
            s = cece.token_statistics(x, t, **ALL, argmax=True, dim=1)
            return sum(s[:4]) + s.argmax + cece.cross_entropy(x, t, z_loss=0.1, softcap=3.0, skip_masked_rows=True)

    x, t = forward[0].detach(), labels_of(forward[0])
    program = torch.export.export(Module(), (x, t)).run_decompositions(cece.decompositions())
    assert not [n for n in program.graph.nodes if "cece" in str(n.target)]
    torch.testing.assert_close(program.module()(x, t), Module()(x, t))


# ---- what is refused, and in which words

X, Y = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
REFUSED = [
    (lambda: cece.token_statistics(X), ValueError, "ask for at least one of log_prob"),
    (lambda: cece.token_statistics(X, log_prob=True), ValueError, "log_prob needs a target"),
    (lambda: cece.token_statistics(X, Y[:3]), ValueError, r"target must have shape \(4,\).*got \(3,\).*dim=-1"),
    (lambda: cece.token_statistics(X, Y, temperature=0), ValueError, "temperature must be a positive number, got 0"),
    (
        lambda: cece.token_statistics(X, Y, temperature=NAN),
        ValueError,
        "temperature must be a positive number, got nan",
    ),
    (
        lambda: cece.token_statistics(X, Y, dim=2),
        IndexError,
        r"dim must be a dimension of logits of shape \(4, 5\), got 2",
    ),
    (lambda: cece.token_statistics(X, Y + 2), IndexError, r"target\[3\] must be in \[0, 5\)"),
    (lambda: cece.token_statistics(X.long(), Y), RuntimeError, "input must be float64"),
    (lambda: cece.token_statistics([1.0], Y), TypeError, "logits must be a torch.Tensor, got list"),
    (lambda: cece.token_statistics(X, Y, entropy=1), TypeError, "entropy must be a bool, got int"),
    (lambda: cece.cross_entropy(X, Y, token_weight=torch.ones(3)), ValueError, "token_weight must have the shape"),
    (lambda: cece.cross_entropy(X, Y, token_weight=Y), TypeError, "token_weight must be a floating point tensor"),
    (lambda: cece.cross_entropy(X, Y, normalizer=3, reduction="sum"), ValueError, "reduction='mean' divides by"),
    (lambda: cece.cross_entropy(X, Y, normalizer=torch.ones(2)), ValueError, r"a tensor of one, got shape \(2,\)"),
    (lambda: cece.cross_entropy(X, Y, normalizer="3"), TypeError, "normalizer must be a float, got str"),
    (lambda: cece.cross_entropy(X, Y, softcap=-1.0), ValueError, "softcap must be a positive number or None, got -1"),
    (lambda: cece.cross_entropy(X, Y, softcap=0), ValueError, "softcap must be a positive number or None, got 0"),
    (lambda: cece.cross_entropy(X, Y, logit_scale=0.0), ValueError, "logit_scale must be a positive, finite number"),
    (lambda: cece.cross_entropy(X, Y, logit_scale=INF), ValueError, "logit_scale must be a positive, finite number"),
    (lambda: cece.cross_entropy(X, Y, z_loss="1"), TypeError, "z_loss must be a float, got str"),
    (lambda: cece.cross_entropy(X, Y, skip_masked_rows=1), TypeError, "skip_masked_rows must be a bool, got int"),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_refused(case):
    call, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        call()


def test_layouts_and_inputs(backend):
    """Classes last of three dimensions, strided and expanded logits; no input is changed."""
    x = torch.randn(2, 7, 60)
    y = torch.randint(60, (2, 7))
    for logits in (x, x.transpose(0, 1).contiguous().transpose(0, 1), x[..., ::2], x[:1].expand(2, 7, 60)):
        t = y % logits.shape[-1]
        on = logits.to(backend.device) if backend.name != "cpu" else logits
        before = on.clone()
        s = cece.token_statistics(on.requires_grad_() if on.is_leaf else on, t.to(backend.device), **ALL, dim=-1)
        r = reference.token_statistics(logits.double(), t, dim=-1)
        for n in NAMES:
            assert_as_good_as_torch(getattr(s, n), r[n].detach(), scale=4.0 if n == "logsumexp" else 0.0, what=n)
        assert torch.equal(on, before)


def test_no_rows_no_classes():
    s = cece.token_statistics(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long), **ALL, argmax=True)
    assert all(v.shape == (0,) for v in s)
    with pytest.raises(RuntimeError, match="at least one class"):
        cece.token_statistics(torch.zeros(3, 0), entropy=True)


def test_torch_functions_see_them():
    from torch.overrides import TorchFunctionMode

    class Seen(TorchFunctionMode):
        def __init__(self):
            super().__init__()
            self.names, self.keywords = [], set()

        def __torch_function__(self, function, kinds, args=(), kwargs=None):
            self.names.append(getattr(function, "__name__", ""))
            self.keywords |= set(kwargs or {})
            return function(*args, **(kwargs or {}))

    with Seen() as seen:
        s = cece.token_statistics(X, Y, entropy=True, temperature=2.0)
        loss = cece.cross_entropy(X, Y, z_loss=0.1, normalizer=torch.tensor(3))
    assert seen.names[0] == "token_statistics" and "cross_entropy" in seen.names
    assert {"temperature", "z_loss", "normalizer"} <= seen.keywords and "softcap" not in seen.keywords
    assert torch.equal(s.entropy, cece.entropy(X, temperature=2.0))
    assert torch.equal(loss, cece.cross_entropy(X, Y, z_loss=0.1, normalizer=3))


def test_only_requested_gradients():
    """A target's gradient, a weight's and a token weight's where they are asked for, and of nothing else."""
    x, t = torch.randn(4, 5), torch.rand(4, 5)
    for wanted in itertools.product((False, True), repeat=4):
        leaves = [x, t, torch.rand(5), torch.rand(4)]
        leaves = [leaf.clone().requires_grad_(w) for leaf, w in zip(leaves, wanted, strict=True)]
        loss = cece.cross_entropy(*leaves[:3], token_weight=leaves[3], z_loss=0.1)
        assert loss.requires_grad == any(wanted)
        if any(wanted):
            loss.backward()
        assert [leaf.grad is not None for leaf in leaves] == list(wanted)


def test_bit_identical_for_any_number_of_threads():
    x, y = torch.randn(3, 140001), torch.tensor([5, 70000, 140000])
    results = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        logits = x.clone().requires_grad_()
        s = cece.token_statistics(logits, y, **ALL)
        results.append([*(v for v in s if v is not None), gradient([s.log_prob, s.entropy, s.collision], logits)])
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
