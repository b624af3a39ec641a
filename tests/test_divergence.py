"""Divergences of two rows: values and gradients against an 80-bit truth, every order, top-k teachers, identities."""

import functools
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TOLERANCE, assert_as_good_as_torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import cece

KINDS = {"kl": cece.kl_divergence, "js": cece.js_divergence}
REFERENCE = {"kl": cece.reference.kl_divergence, "js": cece.reference.js_divergence}
INF, NAN = torch.inf, torch.nan
f64 = {"dtype": torch.float64}


# ---- the truth, in numpy's 80 bits


def log_softmaxes(x, y, temperature):
    def one(t):
        z = t.detach().cpu().double().numpy().astype(np.longdouble) / np.longdouble(temperature)
        z = z - z.max(1, keepdims=True)
        return z - np.log(np.exp(z).sum(1, keepdims=True))

    return one(x), one(y)


def divergence(log_q, log_p):
    """sum_j q_j (d_j + p_j / q_j - 1), d = log q - log p: what is added is 0 in sum, and no term is below 0."""
    d = log_q - log_p
    small = d * d * (1 / np.longdouble(2) - d / 6 + d**2 / 24 - d**3 / 120 + d**4 / 720 - d**5 / 5040 + d**6 / 40320)
    return (np.exp(log_q) * np.where(abs(d) < 1e-3, small, np.expm1(-d) + d)).sum(1, keepdims=True)


def truth(kind, x, y, temperature=1.0):
    """The divergence of every row and its gradients in x and y, as float64; and what a gradient's error is relative to,
    beside itself: a mass times the largest |log q - log p| of its row, whose rounding it bears, and a quarter of itself
    times -log of its mass, whose two roundings it bears."""
    log_p, log_q = log_softmaxes(x, y, temperature)
    p, q = np.exp(log_p), np.exp(log_q)
    apart = abs(log_q - log_p).max(1, keepdims=True)
    if kind == "kl":
        value = divergence(log_q, log_p)
        slopes = p - q, q * (log_q - log_p - value)
        scales = np.maximum(p, q) * np.minimum(apart, 1), q * apart
    else:
        log_m = np.log((p + q) / 2)
        kl = divergence(log_p, log_m), divergence(log_q, log_m)
        value = (kl[0] + kl[1]) / 2
        slopes = p * (log_p - log_m - kl[0]) / 2, q * (log_q - log_m - kl[1]) / 2
        scales = p * apart, q * apart
    scales = [a + abs(b * log) / 4 for a, b, log in zip(scales, slopes, (log_p, log_q), strict=True)]
    t = np.longdouble(temperature)
    results = value.squeeze(1), slopes[0] / t, slopes[1] / t, scales[0] / t, scales[1] / t
    value, *rest = (torch.from_numpy(np.float64(a)) for a in results)
    return value, rest[:2], rest[2:]


def pair(rows, classes, apart, offset=0.0, spread=2.0):
    x = spread * torch.randn(rows, classes)
    return x, x + apart * torch.randn(rows, classes) + offset


def derived(f, x, y, weights=None, **options):
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    value = f(x, y, reduction="none", **options)
    weights = torch.ones_like(value) if weights is None else weights
    return value.detach(), *torch.autograd.grad(value, (x, y), weights.to(value))


@pytest.mark.parametrize("apart", [1e-6, 1e-4, 1e-2, 0.5, 1.2, 3.0, 20.0])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(backend, kind, apart):
    """1e-6 of a value down to 1e-12 nats, with and without an offset; gradients to their size, not p and q's."""
    cases = list(itertools.product([(7, 2), (5, 19), (2, 1025)], (0.0, 100.0), (1.0, 2.5)))
    if backend.name != "emulated":
        cases.append(((1, 40001), 100.0, 2.5))
    for (rows, classes), offset, temperature in cases:
        x, y = pair(rows, classes, apart, offset)
        value, gradients, scales = truth(kind, x, y, temperature)
        ours = derived(KINDS[kind], x.to(backend.device), y.to(backend.device), temperature=temperature)
        what = f"{kind} {classes} classes, {apart} apart, offset {offset}, temperature {temperature}"
        tight = TOLERANCE[torch.float32]._replace(relative=1e-6, parts=1e-6)
        assert_as_good_as_torch(ours[0], value, scale=1e-12, what=what, tolerance=tight)
        tight = TOLERANCE[torch.float32]._replace(least=2**-140)  # of subnormal masses, times 100
        for name, a, b, scale in zip("xy", ours[1:], gradients, scales, strict=True):
            assert_as_good_as_torch(a, b, scale=scale, what=f"{what}: {name}", tolerance=tight)


@pytest.mark.parametrize("kind", KINDS)
def test_of_certain_rows(backend, kind):
    """Nearly all mass on one class: values of 1e-9 and less keep their digits."""
    x = torch.zeros(4, 50)
    x[:, 3] = torch.tensor([20.0, 25.0, 30.0, 40.0])
    y = x + 0.01 * torch.randn(4, 50)
    value, _, _ = truth(kind, x, y)
    ours = KINDS[kind](x.to(backend.device), y.to(backend.device), reduction="none")
    assert value.max() < 1e-9
    assert_as_good_as_torch(ours, value, what=kind, tolerance=TOLERANCE[torch.float32]._replace(relative=4e-6))


@pytest.mark.parametrize("kind", KINDS)
def test_ties_and_blocks_without_a_class(backend, kind):
    """Many maximal logits, and a run of impossible classes as long as what a kernel takes at a time."""
    x, y = torch.randint(-1, 2, (2, 2100)).float(), torch.randint(-1, 2, (2, 2100)).float()
    x[1, :1100] = y[1, :1100] = -INF
    finite = [t.masked_fill(t == -INF, -1e4) for t in (x, y)]
    value, gradients, scales = truth(kind, *finite)
    ours = derived(KINDS[kind], x.to(backend.device), y.to(backend.device))
    assert_as_good_as_torch(ours[0], value, what=kind)
    for a, b, scale in zip(ours[1:], gradients, scales, strict=True):
        assert_as_good_as_torch(a, b, scale=scale, what=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtypes", list(itertools.product(["float64", "float32", "float16", "bfloat16"], repeat=2)))
def test_dtypes(backend, kind, dtypes):
    """Any of both; summed in float64 if one is, else float32, each gradient in its logits' dtype."""
    a, b = (getattr(torch, name) for name in dtypes)
    for shape in [(9, 37), (2, 300)]:
        x, y, g = torch.randn(shape).to(a), torch.randn(shape).to(b), torch.randn(shape[0])
        value, gradients, scales = truth(kind, x, y, 1.5)
        ours = derived(KINDS[kind], x.to(backend.device), y.to(backend.device), g.to(backend.device), temperature=1.5)
        assert ours[0].dtype == (torch.float64 if torch.float64 in (a, b) else torch.float32)
        assert (ours[1].dtype, ours[2].dtype) == (a, b)
        tight = 1e-6 if ours[0].dtype == torch.float32 else 1e-13
        assert_as_good_as_torch(ours[0], value, tolerance=TOLERANCE[ours[0].dtype]._replace(relative=tight))
        for ours_, true, scale in zip(ours[1:], gradients, scales, strict=True):
            assert_as_good_as_torch(ours_, g.double()[:, None] * true, scale=4 * scale * g.abs()[:, None])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("apart", [1e-6, 0.5, 20.0])
def test_many_rows(backend, kind, apart):
    """More than go side by side, some left out; adjacent classes or pixels, also more of them than a tile has."""
    cases = [(77, 2, False), (70, 19, False), (9, 96, False), (11, 97, False), (70, 3, True), (77, 200, True)]
    for rows, classes, pixels in cases:
        x, y = pair(rows, classes, apart, 100.0 if apart > 1e-3 else 0.0)  # beside 100, 1e-6 would be rounded off
        x[:, -1] += 4  # among the largest: what the tiles before it sum up shrinks
        y[:, -1] += 4
        g, mask = torch.randn(rows), torch.rand(rows) < 0.8
        value, gradients, scales = truth(kind, x, y, 2.5)
        a, b = (t.masked_fill(~mask[:, None], NAN).to(backend.device) for t in (x, y))
        if pixels:
            a, b = (t.t().contiguous()[None] for t in (a, b))
        options = {"temperature": 2.5, "mask": mask.to(backend.device).view(1, -1) if pixels else mask.to(a.device)}
        weights = g.to(backend.device).view(options["mask"].shape)
        ours = derived(KINDS[kind], a, b, weights, **options)
        ours = [t[0].mT if pixels and t.dim() == 3 else t.view(rows, -1).squeeze() for t in ours]
        what = f"{kind} {rows} x {classes}, pixels {pixels}, {apart} apart"
        tight = TOLERANCE[torch.float32]._replace(relative=1e-6, parts=1e-6)
        assert_as_good_as_torch(ours[0], value * mask, scale=1e-12, what=what, tolerance=tight)
        tight = TOLERANCE[torch.float32]._replace(least=1e-18)  # the truth's own error where rows are equal
        for name, z, slope, scale in zip("xy", ours[1:], gradients, scales, strict=True):
            assert not z[~mask].any()
            true = (g * mask)[:, None] * slope
            assert_as_good_as_torch(z, true, scale=g.abs()[:, None] * scale, what=f"{what}: {name}", tolerance=tight)


LAYOUTS = {
    "one row": lambda: torch.randn(9),
    "channels first": lambda: torch.randn(2, 21, 5, 6),
    "channels last": lambda: torch.randn(2, 21, 5, 6).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(40, 6).t(),
    "every second class": lambda: torch.randn(6, 80)[:, ::2],
    "padded rows": lambda: torch.randn(6, 64)[:, 3:43],
    "all but the last token": lambda: torch.randn(3, 6, 70)[:, :-1].transpose(1, 2),
    "misaligned": lambda: torch.randn(241)[1:].view(6, 40),
    "expanded": lambda: torch.randn(1, 40).expand(6, 40),
    "ten dimensions": lambda: torch.randn((2,) * 10).permute(9, 2, 7, 0, 5, 1, 3, 8, 4, 6),
    "thirteen dimensions": lambda: torch.randn((2,) * 13).permute(12, 1, 10, 3, 8, 5, 6, 7, 4, 9, 2, 11, 0),
    "one class": lambda: torch.randn(6, 1),
    "no row": lambda: torch.randn(0, 7),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout):
    """As of contiguous copies, gradients laid out like the logits, no argument changed."""
    x = LAYOUTS[layout]()
    for y in (LAYOUTS[layout]().sin(), torch.randn(x.shape)):
        rows = x.shape[:1] + x.shape[2:] if x.dim() > 1 else ()
        mask = torch.rand(rows) < 0.8
        for f in KINDS.values():
            a, b = x.to(backend.device), y.to(backend.device)
            before = a.clone(), b.clone()
            ours = derived(f, a, b, mask=mask.to(backend.device))
            same = derived(f, a.contiguous(), b.contiguous(), mask=mask.to(backend.device))
            assert ours[0].shape == rows
            for one, other in zip(ours, same, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
            assert ours[1].stride() == torch.empty_like(a).stride() and ours[2].stride() == torch.empty_like(b).stride()
            assert torch.equal(a, before[0]) and torch.equal(b, before[1])


# ---- infinities, NaN, rows left out

ROWS = [  # x, y, KL, JS; None: what the finite classes make of it
    ([0.0, 1.0, -INF], [0.0, 2.0, -INF], None, None),  # ruled out by both
    ([0.0, 1.0, 2.0], [0.0, 2.0, -INF], None, None),  # by the target only: costs nothing
    ([0.0, 1.0, -INF], [0.0, 2.0, 1.0], INF, None),  # possible, but the model rules it out
    ([0.0, 1.0, -INF], [0.0, 2.0, -200.0], INF, None),  # however small its mass
    ([INF, 1.0, -INF], [INF, 0.0, 1.0], 0.0, 0.0),  # certain of the same
    ([INF, 1.0, 0.0], [0.0, INF, 1.0], INF, np.log(2)),  # certain of different ones
    ([0.0, 0.0, 0.0], [0.0, INF, 1.0], np.log(3), None),  # a certain target: the cross-entropy
    ([INF, 0.0, 0.0], [0.0, 0.0, 0.0], INF, None),
    ([-1e4, 1e4, 0.0], [-1e4, 1e4, 0.0], 0.0, 0.0),
    ([-1e4, 1e4, 0.0], [1e4, -1e4, 0.0], 2e4, np.log(2)),
    ([NAN, 0.0, 1.0], [0.0, 0.0, 1.0], NAN, NAN),
    ([0.0, 0.0, 1.0], [0.0, NAN, 1.0], NAN, NAN),
    ([-INF, -INF, -INF], [0.0, 0.0, 1.0], NAN, NAN),  # no distribution
    ([0.0, 0.0, 1.0], [-INF, -INF, -INF], NAN, NAN),
    ([INF, INF, 0.0], [0.0, 0.0, 1.0], NAN, NAN),
    ([0.0, 0.0, 1.0], [0.0, INF, INF], NAN, NAN),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_infinite_logits(backend, dtype):
    x, y, *known = (list(column) for column in zip(*ROWS, strict=True))
    x, y = torch.tensor(x, **f64), torch.tensor(y, **f64)
    for classes in (3, 40, 200):  # the classes between, ruled out by both, change nothing
        wide = [torch.cat([t[:, :1], torch.full((len(t), classes - 3), -INF), t[:, 1:]], 1) for t in (x, y)]
        for (kind, f), values in zip(KINDS.items(), known, strict=True):
            shrunk = [t.clamp(-1e4, 1e4).masked_fill(t == -INF, -INF) for t in (x, y)]
            finite = REFERENCE[kind](*[t.masked_fill(t == -INF, -1e3) for t in shrunk])
            true = torch.tensor([v if v is not None else finite[i] for i, v in enumerate(values)], **f64)
            a, b = (t.to(backend.device, dtype) for t in wide)
            value, of_x, of_y = derived(f, a, b)
            assert_as_good_as_torch(value, true, what=f"{kind} {classes}")
            nan = true.isnan()
            assert of_x[nan].isnan().all() and of_y[nan].isnan().all()
            usual = true.isfinite()
            assert of_x[usual].isfinite().all() and of_y[usual].isfinite().all()
            assert not of_x[usual][(a[usual] == -INF).to(of_x.device)].any()
            assert not of_y[usual][(b[usual] == -INF).to(of_y.device)].any()
            if kind == "kl":  # the model's gradient p - q is finite, however infinite the divergence
                assert of_x[true == INF].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_rows_left_out(backend, kind, bad):
    """Their value and every derivative are exactly 0, the others' what they are without them."""
    f = KINDS[kind]
    for shape in [(6, 40), (2, 5, 3)]:
        x, y, mask = torch.randn(shape, **f64), torch.randn(shape, **f64), torch.ones(shape[:1] + shape[2:]).bool()
        mask[1] = False
        dirty = [t.clone() for t in (x, y)]
        for t in dirty:
            t.movedim(1, -1)[1] = bad
        x, y, mask, dirty = *(t.to(backend.device) for t in (x, y, mask)), [t.to(backend.device) for t in dirty]
        count = int(mask.sum())
        for options, scale in (({"reduction": "none"}, 1.0), ({"reduction": "sum"}, 1.0), ({}, 1 / count)):
            weight = torch.rand(mask.shape, **f64).to(mask.device)
            spoilt = weight.masked_fill(~mask, bad)

            def total(x, y, w, options=options, mask=mask):
                return f(x, y, mask=mask, token_weight=w, **options).sum()

            true = (f(x, y, reduction="none") * weight * mask).sum() * scale
            assert f(*dirty, mask=mask, reduction="none")[1].eq(0).all()
            torch.testing.assert_close(total(*dirty, spoilt), true)
            v = [torch.randn_like(x), torch.randn_like(x)]
            first = vjp(lambda x, y, w=spoilt: total(x, y, w), *dirty)[1](true.new_ones(()))
            second = jvp(grad(lambda x, y, w=spoilt: total(x, y, w), (0, 1)), tuple(dirty), tuple(v))[1]
            clean = jvp(grad(lambda x, y, w=weight: total(x, y, w), (0, 1)), (x, y), tuple(v))[1]
            for g in (*first, *second):
                assert not g[1].any() and g.isfinite().all() and g[0].any()
            torch.testing.assert_close(second, clean)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_nan_where_a_row_is_left_out(backend, kind):
    x, y, v = (torch.randn(3, 5, **f64).to(backend.device) for _ in range(3))
    mask, g = torch.tensor([True, False, True]).to(x.device), torch.tensor([1.0, NAN, 2.0], **f64).to(x.device)

    def gradients(x, y):
        return vjp(lambda x, y: KINDS[kind](x, y, mask=mask, reduction="none"), x, y)[1](g)

    for derivative in (*gradients(x, y), *jvp(gradients, (x, y), (v, v))[1]):
        assert not derivative[1].any() and derivative.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_second_order_of_certain_rows(kind):
    """An infinite logit and impossible classes: 0, beside a row as usual."""
    x = torch.tensor([[INF, 1.0, -INF], [0.3, 1.0, 2.0]], **f64)
    y = torch.tensor([[INF, 0.0, 1.0], [0.1, 2.0, 1.0]], **f64)
    v = torch.randn(2, 3, **f64), torch.randn(2, 3, **f64)
    for temperature in (1.0, 0.5, 2.0):
        f = functools.partial(KINDS[kind], temperature=temperature)
        for change in jvp(grad(f, (0, 1)), (x, y), v)[1]:
            assert not change[0].any() and change[1].all() and change.isfinite().all()


# ---- classes in parts, as several processes have them: each part's statistics, merged


def in_parts(x, y, cuts, temperature=1.0):
    """Values and gradients of KL, by the operators and without the processes."""
    forward, merge, backward = (
        getattr(torch.ops.cece, f"divergence_{name}") for name in ("forward", "merge", "backward")
    )
    parts = list(zip(x.split(cuts, 1), y.split(cuts, 1), strict=True))
    left = torch.stack([forward(a, b, None, temperature, False)[1][:7] for a, b in parts])
    value, stats = merge(left, temperature)
    one = torch.ones_like(value)
    slopes = [[backward(one, a, b, None, stats, temperature, False, of_y) for a, b in parts] for of_y in (False, True)]
    return value, *(torch.cat(s, 1) for s in slopes)


@pytest.mark.parametrize("apart", [1e-6, 1e-4, 1e-2, 1.2, 20.0])
def test_parts(backend, apart):
    """As one process is: 1e-6 of a value down to 1e-12 nats, gradients to their size. Parts uneven, empty, many."""
    for cuts, offset, temperature in itertools.product(
        ([5, 0, 7, 7], [1, 1000, 24], [1] * 64), (0.0, 100.0), (1.0, 2.5)
    ):
        x, y = pair(3, sum(cuts), apart, offset)
        value, gradients, scales = truth("kl", x, y, temperature)
        ours = in_parts(x.to(backend.device), y.to(backend.device), cuts, temperature)
        what = f"{len(cuts)} parts of {sum(cuts)}, {apart} apart, offset {offset}, temperature {temperature}"
        tight = TOLERANCE[torch.float32]._replace(relative=1e-6, parts=1e-6)
        assert_as_good_as_torch(ours[0], value, scale=1e-12, what=what, tolerance=tight)
        tight = TOLERANCE[torch.float32]._replace(least=2**-140)
        for name, a, b, scale in zip("xy", ours[1:], gradients, scales, strict=True):
            assert_as_good_as_torch(a, b, scale=scale, what=f"{what}: {name}", tolerance=tight)


@pytest.mark.parametrize("cuts", [[2, 2], [1, 1, 1, 1], [0, 3, 1, 0], [4]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_parts_of_uncommon_rows(backend, dtype, cuts):
    """Parts that one or both rows rule out, certainties here and elsewhere, rows that are no distributions."""
    x, y = (torch.tensor(t, dtype=dtype, device=backend.device) for t in zip(*IN_PARTS, strict=True))
    whole = derived(cece.kl_divergence, x, y)
    for ours, true in zip(in_parts(x, y, cuts), whole, strict=True):
        torch.testing.assert_close(ours, true, equal_nan=True)


IN_PARTS = [
    ([0.0, 0.0, -INF, -INF], [0.0, 1.0, -INF, -INF]),
    ([0.0, 0.0, -INF, -INF], [0.0, 1.0, -INF, 2.0]),
    ([0.0, 0.0, -INF, 1.0], [1.0, 1.0, -INF, -3e4]),
    ([0.0, 0.0, 1.0, 1.0], [0.0, 1.0, -INF, -INF]),
    ([-INF, -INF, 1.0, 2.0], [-INF, -INF, 2.0, 0.0]),
    ([-INF, 0.0, 1.0, 2.0], [-1e5, 1.0, 2.0, 0.0]),
    ([0.0, 0.0, 0.0, -INF], [0.0, 1.0, -2e3, -2e3]),  # a part without a mass to speak of, but with some
    ([INF, 1.0, -INF, 0.0], [INF, 0.0, 1.0, 0.0]),
    ([INF, 1.0, 0.0, 1.0], [0.0, INF, 1.0, 0.0]),
    ([INF, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]),
    ([0.0, 0.0, 0.0, 1.0], [0.0, INF, 1.0, 0.0]),
    ([INF, 0.0, 1.0, INF], [0.0, 1.0, 2.0, 1.0]),
    ([0.0, 1.0, 2.0, 1.0], [0.0, INF, 1.0, INF]),
    ([0.0, NAN, 1.0, 1.0], [0.0, 1.0, -INF, -INF]),
    ([0.0, 1.0, 1.0, 1.0], [0.0, NAN, -INF, -INF]),
    ([-INF] * 4, [0.0, 1.0, 2.0, 3.0]),
    ([0.0, 1.0, 2.0, 3.0], [-INF] * 4),
    ([3e38, 0.0, 0.0, 0.0], [3e38, 0.0, -3e38, 0.0]),
]


# ---- reductions


@pytest.mark.parametrize("kind", KINDS)
def test_reductions(kind):
    f = KINDS[kind]
    x, y, w = torch.randn(4, 5, 3), torch.randn(4, 5, 3), torch.rand(4, 3)
    mask = torch.rand(4, 3) < 0.7
    rows = REFERENCE[kind](x.double(), y.double(), temperature=2.0)
    masked = rows * mask

    def value(**options):
        return f(x, y, temperature=2.0, **options).double()

    for ours, true in [
        (value(reduction="none"), rows),
        (value(), rows.mean()),
        (value(reduction="sum"), rows.sum()),
        (value(reduction="batchmean"), rows.sum() / 4),
        (value(mask=mask), masked.sum() / mask.sum()),
        (value(mask=mask, reduction="batchmean"), masked.sum() / 4),
        (value(token_weight=w), (rows * w).mean()),
        (value(token_weight=w.double(), mask=mask, reduction="sum"), (masked * w).sum()),
        (value(normalizer=7), rows.sum() / 7),
        (value(normalizer=torch.tensor(7.5, dtype=torch.float64), mask=mask), masked.sum() / 7.5),
        (f(x[0, :, 0], y[0, :, 0], reduction="batchmean", temperature=2.0).double(), rows[0, 0]),
    ]:
        torch.testing.assert_close(ours, true, rtol=1e-6, atol=1e-8)
    infinite = torch.tensor([[0.0, -INF], [0.0, 1.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    if kind == "kl":  # what has no weight costs nothing, but a NaN stays
        assert f(*infinite, token_weight=torch.tensor([0.0, 1.0]), reduction="sum").isfinite()
    assert f(infinite[0] * NAN, infinite[1], token_weight=torch.zeros(2)).isnan()


def test_sums_do_not_depend_on_threads_and_do_not_drift():
    x, y = torch.randn(1_000_000, 10), torch.randn(1_000_000, 10)
    true = cece.kl_divergence(x.double(), y.double())
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append([cece.kl_divergence(x, y, reduction=r) for r in ("none", "mean")])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for r in results for a, b in zip(r, results[0], strict=True))
    torch.testing.assert_close(results[0][1].double(), true, rtol=1e-6, atol=0)


# ---- derivatives


@pytest.mark.parametrize("kind, masked", list(itertools.product(KINDS, (False, True))))
def test_every_order(kind, masked):
    f = KINDS[kind]
    for shape, reduction in [((2, 3, 2), "none"), ((2, 3), "mean"), ((3,), "sum")]:
        x, y = (torch.randn(shape, **f64).requires_grad_() for _ in range(2))
        mask = (torch.arange(x[..., 0].numel() if x.dim() == 2 else x.shape[0] * 2) % 3 > 0) if masked else None
        if masked:
            mask = mask.reshape(shape[:1] + shape[2:]) if x.dim() > 1 else torch.tensor(True)
        w = torch.rand(shape[:1] + shape[2:] if len(shape) > 1 else (), **f64).requires_grad_()

        def loss(x, y, w, reduction=reduction, mask=mask):
            return f(x, y, temperature=1.5, reduction=reduction, mask=mask, token_weight=w)

        assert gradcheck(
            loss, (x, y, w), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
        )
        assert gradgradcheck(loss, (x, y, w), check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_torch_func(backend, kind):
    x, y = torch.randn(3, 5, **f64).to(backend.device), torch.randn(3, 5, **f64).to(backend.device)

    def ours(x, y):
        return KINDS[kind](x, y, temperature=0.7).sum()

    def theirs(x, y):
        return REFERENCE[kind](x, y, temperature=0.7).mean()

    for transform in (grad, jacfwd, jacrev, hessian):
        for argument in (0, 1):
            a, b = (transform(f, argument)(x, y) for f in (ours, theirs))
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    batch = torch.randn(4, 3, 5, **f64).to(backend.device)
    mixed = [(0, None), (None, 0), (0, 0)]
    for dims in mixed:
        a, b = (vmap(grad(f, (0, 1)), dims)(*(batch if d == 0 else x for d in dims)) for f in (ours, theirs))
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    mask = torch.rand(4, 3) < 0.6
    rows = vmap(lambda x, m: KINDS[kind](x, y, mask=m, reduction="none"))(batch, mask.to(batch.device))
    assert torch.equal(
        rows,
        torch.stack([KINDS[kind](b, y, mask=m.to(b.device), reduction="none") for b, m in zip(batch, mask)]),  # noqa: B905
    )
    pixels, other = torch.randn(2, 3, 5, 2, **f64), torch.randn(3, 5, 2, **f64)
    ours_, theirs_ = (
        vmap(grad(lambda x, f=f: f(x, other)), 0)(pixels) for f in (KINDS[kind], lambda *a: REFERENCE[kind](*a).mean())
    )
    torch.testing.assert_close(ours_, theirs_, rtol=1e-10, atol=1e-12)
    assert vmap(lambda x: KINDS[kind](x, y, reduction="sum"))(batch[:0]).shape == (0,)


def test_third_order():
    x, y = torch.randn(2, 5, **f64), torch.randn(2, 5, **f64)
    for kind, f in KINDS.items():

        def third(f):
            return jacfwd(hessian(lambda x: f(x, y).mean()))(x)

        torch.testing.assert_close(third(f), third(REFERENCE[kind]), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_asked_for(kind):
    """One gradient is one call of the operator, and the incoming gradient stays as it is."""
    calls = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    x, y = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    g = torch.randn(3)
    before = g.clone()
    with Count():
        KINDS[kind](x, y, reduction="none").backward(g)
    assert calls.count("cece::divergence_backward") == 1 and torch.equal(g, before) and y.grad is None
    calls.clear()
    with Count():
        KINDS[kind](x.detach(), y)
    assert "cece::divergence_backward" not in calls


def test_tangents_and_gradients_of_low_precision():
    x, y, v = torch.randn(3, 40), torch.randn(3, 40), torch.randn(3, 40)
    for kind, f in KINDS.items():
        for dtype in (torch.float16, torch.bfloat16):
            a, b, w = x.to(dtype), y.to(dtype), v.to(dtype)
            value, tangent = jvp(lambda a, b=b, f=f: f(a, b), (a,), (w,))
            true = jvp(lambda a, b=b, k=kind: REFERENCE[k](a, b.double()).mean(), (a.double(),), (w.double(),))
            assert value.dtype == tangent.dtype == torch.float32
            torch.testing.assert_close(tangent.double(), true[1], rtol=1e-5, atol=1e-6)
            slope, second = jvp(grad(lambda a, b=b, f=f: f(a, b)), (a,), (w,))
            assert slope.dtype == second.dtype == dtype


# ---- compilers


def everything(x, y, mask, weight, values, indices):
    kl = cece.kl_divergence(x, y, temperature=2.0, mask=mask, token_weight=weight)
    js = cece.js_divergence(x, y, reduction="batchmean")
    top = cece.kl_divergence(x, values, target_indices=indices)
    return kl + js + top


def everything_inputs(n):
    x, y = torch.randn(n, 7), torch.randn(n, 7)
    values, indices = y.log_softmax(1).topk(3)
    return x, y, torch.arange(n) % 3 > 0, torch.rand(n), values, indices


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    compiled = torch.compile(everything, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (6, 9) if dynamic else (6,):
        args = everything_inputs(n)
        results = []
        for f in (everything, compiled):
            x, y = args[0].clone().requires_grad_(), args[1].clone().requires_grad_()
            value = f(x, y, *args[2:])
            results.append((value.detach(), *torch.autograd.grad(value, (x, y))))
        torch.testing.assert_close(*results)


def test_script():
    """torch.jit.script compiles the functions, wherever it meets them."""

    def f(x: torch.Tensor, y: torch.Tensor, m: torch.Tensor, i: torch.Tensor):
        return cece.kl_divergence(x, y, temperature=2.0, mask=m) + cece.js_divergence(x, y, normalizer=3.0)

    def g(x: torch.Tensor, v: torch.Tensor, i: torch.Tensor):
        return cece.kl_divergence(x, v, target_indices=i, reduction="none")

    x, y, m, _, v, i = everything_inputs(6)
    torch.testing.assert_close(torch.jit.script(f)(x, y, m, i), f(x, y, m, i))
    torch.testing.assert_close(torch.jit.script(g)(x, v, i), g(x, v, i))


def test_meta_and_torch_function():
    x = torch.empty(3, 5, device="meta")
    assert cece.kl_divergence(x, x).shape == () and cece.js_divergence(x, x, reduction="none").shape == (3,)
    with pytest.raises(ValueError, match="target_logits must have logits' shape"):
        cece.kl_divergence(x, x[:2])
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        cece.kl_divergence(torch.zeros(2, 3), torch.zeros(2, 3))
        cece.js_divergence(torch.zeros(2, 3), torch.zeros(2, 3))
    assert cece.kl_divergence in seen and cece.js_divergence in seen


# ---- a teacher that gives its k best


def top_k_truth(x, log_q, indices, tail, temperature):
    """In float64 on all classes."""
    log_p = (x.double() / temperature).log_softmax(1)
    q, p = log_q.double().exp(), log_p.gather(1, indices).exp()
    if tail == "renormalize":
        log_q = (log_q.double() / temperature).log_softmax(1)
        return (log_q.exp() * (log_q - p.log())).sum(1)
    rows = (q * (q.log() - p.log())).sum(1)
    if tail == "ignore":
        return rows
    rest_q, rest_p = 1 - q.sum(1), 1 - p.sum(1)
    return rows + rest_q * (rest_q / rest_p).log()


@pytest.mark.parametrize("tail", ["lump", "renormalize", "ignore"])
def test_top_k(tail):
    for shape, k, temperature in itertools.product([(6, 30), (2, 30, 3)], (1, 4), (1.0, 2.0)):
        x, y = torch.randn(shape), torch.randn(shape)
        values, indices = (y / (1 if tail == "renormalize" else temperature)).log_softmax(1).topk(k, 1)
        options = {"target_indices": indices, "tail": tail, "temperature": temperature, "reduction": "none"}
        true = top_k_truth(x, values, indices, tail, temperature)
        ours = cece.kl_divergence(x, values, **options)
        torch.testing.assert_close(ours.double(), true, rtol=2e-6, atol=2e-7)
        a, b = x.clone().double().requires_grad_(), values.double().requires_grad_()
        ours = torch.autograd.grad(cece.kl_divergence(a, b, **options).sum(), (a, b))
        true = torch.autograd.grad(top_k_truth(a, b, indices, tail, temperature).sum(), (a, b))
        torch.testing.assert_close(ours, true, rtol=1e-9, atol=1e-10)
        mask = torch.arange(ours[0][:, 0].numel()).reshape(ours[0][:, 0].shape) % 3 != 1
        spoilt = [t.detach().masked_fill(~mask.unsqueeze(1), NAN) for t in (a, b)]
        spoilt_k = indices.masked_fill(~mask.unsqueeze(1), 10**9)
        for t in spoilt:
            t.requires_grad_()
        rows = cece.kl_divergence(*spoilt, **{**options, "target_indices": spoilt_k, "mask": mask})
        left = torch.autograd.grad(rows.sum(), spoilt)
        assert not rows[~mask].any()
        for g, t in zip(left, true, strict=True):
            torch.testing.assert_close(g, torch.where(mask.unsqueeze(1), t, 0), rtol=1e-9, atol=1e-10)


def test_top_k_of_all_classes_is_the_divergence():
    x, y = torch.randn(5, 9, **f64), torch.randn(5, 9, **f64)
    values, indices = y.log_softmax(1).topk(9)
    for tail in ("lump", "renormalize", "ignore"):
        torch.testing.assert_close(
            cece.kl_divergence(x, values, target_indices=indices, tail=tail), cece.kl_divergence(x, y)
        )


def test_top_k_keeps_small_divergences():
    """A teacher that is the student, nearly: the lumped divergence is right to 1e-5 of 1e-9 nats."""
    y = torch.randn(4, 50)
    x = y + 1e-4 * torch.randn(4, 50)
    values, indices = y.double().log_softmax(1).topk(5)
    ours = cece.kl_divergence(x.double(), values, target_indices=indices, reduction="none")
    log_p, log_q = log_softmaxes(x, y, 1.0)
    log_p, log_q = (np.take_along_axis(a, indices.numpy(), 1) for a in (log_p, log_q))
    log_p, log_q = (np.concatenate([a, np.log1p(-np.exp(a).sum(1, keepdims=True))], 1) for a in (log_p, log_q))
    true = torch.from_numpy(np.float64((np.exp(log_q) * (log_q - log_p)).sum(1)))
    assert true.max() < 1e-8
    torch.testing.assert_close(ours, true, rtol=1e-5, atol=0)


# ---- identities


def test_cross_entropy_is_entropy_and_divergence():
    """H(q, p) = H(q) + KL(q || p), in value and in the model's gradient."""
    x, y = torch.randn(6, 40, **f64), torch.randn(6, 40, **f64)
    q = y.softmax(1)
    entropy = cece.cross_entropy(y, q)
    torch.testing.assert_close(cece.cross_entropy(x, q), entropy + cece.kl_divergence(x, y))
    torch.testing.assert_close(grad(lambda x: cece.cross_entropy(x, q))(x), grad(cece.kl_divergence)(x, y))


def test_jensen_shannon_is_symmetric_and_bounded(backend):
    for apart in (1e-3, 1.0, 30.0):
        x, y = (t.to(backend.device) for t in pair(50, 33, apart))
        there, back = cece.js_divergence(x, y, reduction="none"), cece.js_divergence(y, x, reduction="none")
        torch.testing.assert_close(there, back, rtol=1e-6, atol=0)
        assert (there >= 0).all() and (there <= np.log(2) * (1 + 1e-6)).all()
        assert (cece.kl_divergence(x, y, reduction="none") >= 0).all()
        assert not cece.kl_divergence(x.round(), x.round() + 4).any() and not cece.js_divergence(x, x).any()


def test_two_classes_are_one_logit_and_many_labels_many_of_them():
    """softmax of two is the sigmoid of their difference; a multi-label loss is the sum of binary ones."""
    x, y = torch.randn(8, 2, **f64), torch.randint(2, (8,))
    two = cece.cross_entropy(x, y, reduction="none")
    torch.testing.assert_close(two, cece.binary_cross_entropy_with_logits(x[:, 1] - x[:, 0], y, reduction="none"))
    z, truths = torch.randn(8, 5, **f64), torch.rand(8, 5) < 0.5
    each = [cece.cross_entropy(F.pad(z[:, k : k + 1], (1, 0)), truths[:, k].long()) for k in range(5)]
    torch.testing.assert_close(cece.binary_cross_entropy_with_logits(z, truths) * 5, sum(each))


# ---- errors

x, y = torch.zeros(2, 3), torch.zeros(2, 3)
i = torch.zeros(2, 1, dtype=torch.long)
ERRORS = [
    (lambda: cece.kl_divergence([1], y), TypeError, "logits must be a torch.Tensor, got list"),
    (lambda: cece.kl_divergence(x, y, mask=[True]), TypeError, "mask must be a torch.Tensor or None, got list"),
    (lambda: cece.kl_divergence(x, y, temperature="hot"), TypeError, "temperature must be a float, got str"),
    (lambda: cece.kl_divergence(x, y, normalizer="many"), TypeError, "normalizer must be a float, got str"),
    (
        lambda: cece.kl_divergence(x.long(), y),
        RuntimeError,
        "logits must be float64, float32, float16 or bfloat16, got",
    ),
    (lambda: cece.js_divergence(x, y.long()), RuntimeError, "other_logits must be float64, .* got Long"),
    (
        lambda: cece.kl_divergence(x, y.to("meta")),
        RuntimeError,
        "target_logits must be on input's device cpu, got meta",
    ),
    (lambda: cece.kl_divergence(x[0, 0], y[0, 0]), RuntimeError, r"logits must have shape \(C\), .* got \[\]"),
    (lambda: cece.kl_divergence(x, y[:1]), ValueError, r"target_logits must have logits' shape \[2, 3\], got \[1, 3\]"),
    (lambda: cece.js_divergence(x, y.t()), ValueError, r"other_logits must have logits' shape \[2, 3\], got \[3, 2\]"),
    (lambda: cece.kl_divergence(x, y, temperature=0), ValueError, "temperature must be a finite number above 0, got 0"),
    (lambda: cece.kl_divergence(x, y, temperature=NAN), ValueError, "temperature must be a finite number above 0"),
    (lambda: cece.js_divergence(x, y, temperature=INF), ValueError, "temperature must be a finite number above 0"),
    (lambda: cece.kl_divergence(x, y, mask=torch.ones(2)), RuntimeError, "mask must be bool, got Float"),
    (lambda: cece.kl_divergence(x, y, mask=torch.ones(3).bool()), ValueError, r"mask must have the rows' shape \[2\]"),
    (lambda: cece.kl_divergence(x, y, reduction="avg"), ValueError, "reduction must be one of 'none', .* got 'avg'"),
    (lambda: cece.kl_divergence(x, y, reduction=None), ValueError, "reduction must be one of 'none', .* got 'None'"),
    (
        lambda: cece.kl_divergence(x, y, normalizer=2, reduction="sum"),
        ValueError,
        "normalizer is what 'mean' divides by",
    ),
    (
        lambda: cece.kl_divergence(x, y, normalizer=y),
        ValueError,
        r"normalizer must be a number or a tensor of one, got shape \(2, 3\)",
    ),
    (
        lambda: cece.kl_divergence(x, y, token_weight=x),
        ValueError,
        r"token_weight must have the shape of .* \[2\], got",
    ),
    (lambda: cece.kl_divergence(x, y, target_indices=i), ValueError, "target_logits and target_indices must both have"),
    (
        lambda: cece.kl_divergence(x, i.float(), target_indices=i.int()),
        RuntimeError,
        "target_indices must be int64, got",
    ),
    (
        lambda: cece.kl_divergence(x, i.float(), target_indices=i, tail="cut"),
        ValueError,
        "tail must be one of 'lump', .* 'cut'",
    ),
    (lambda: cece.kl_divergence(x, i.float(), target_indices=i, temperature=0), ValueError, "temperature must be"),
    (lambda: cece.kl_divergence(x, i.float(), target_indices=i + 3), RuntimeError, "index 3 is out of bounds"),
]


@pytest.mark.parametrize("call, kind, message", ERRORS, ids=[m for *_, m in ERRORS])
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message) as e:
        call()
    assert "\n" not in str(e.value) or "index 3" in message


def test_classes_in_another_dimension():
    x, t = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    for loss in (cece.kl_divergence, cece.js_divergence):
        rows = loss(x.flatten(0, 1), t.flatten(0, 1), reduction="none")
        assert torch.equal(loss(x, t, dim=-1, reduction="none"), rows.unflatten(0, (2, 3)))
        assert torch.equal(loss(x.movedim(2, 0), t.movedim(2, 0), dim=0, reduction="none"), rows.unflatten(0, (2, 3)))
        with pytest.raises(IndexError, match="dim must be a dimension of logits"):
            loss(x, t, dim=3)
    best = t.log_softmax(2).topk(2, 2)
    ours = cece.kl_divergence(x, best.values, target_indices=best.indices, dim=2)
    theirs = cece.kl_divergence(x.mT, best.values.mT, target_indices=best.indices.mT)
    torch.testing.assert_close(ours, theirs)
