"""The multi-label family: options of binary cross-entropy, focal and asymmetric losses, label lists, pairs."""

import copy
import itertools
import math
import pickle
from functools import partial

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from conftest import DTYPES, assert_as_good_as_torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacrev, jvp, vjp, vmap

import cece
from cece import ops

f64 = {"dtype": torch.float64}
nan, inf = float("nan"), float("inf")
BCE = "binary_cross_entropy_with_logits"
LOSSES = {  # an elementwise loss and its own options
    "smoothing": (BCE, {"label_smoothing": 0.1}),
    "poly": (BCE, {"poly": 1.5}),
    "focal": ("sigmoid_focal_loss", {}),
    "focal 0": ("sigmoid_focal_loss", {"gamma": 0, "alpha": -1}),
    "focal 0.5": ("sigmoid_focal_loss", {"gamma": 0.5, "alpha": 0.7}),
    "focal 2.7, poly, smoothing": ("sigmoid_focal_loss", {"gamma": 2.7, "poly": -0.5, "label_smoothing": 0.2}),
    "asymmetric": ("asymmetric_loss", {}),
    "asymmetric, no clip": ("asymmetric_loss", {"clip": 0, "gamma_neg": 2.5, "gamma_pos": 0}),
    "asymmetric, smoothing": ("asymmetric_loss", {"clip": 0.2, "gamma_neg": 0.3, "label_smoothing": 0.1}),
}
REDUCTIONS = ("none", "mean", "sum")
ids = {"ids": str}


def both(case, **more):
    name, options = LOSSES[case]
    return [partial(getattr(m, name), **options, **more) for m in (cece, cece.reference)]


def same_digits(ours, truth, rtol=1e-12, atol=0):
    torch.testing.assert_close(ours, truth, rtol=rtol, atol=atol, equal_nan=True)


# ---- values and gradients


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("truths", [torch.float32, torch.bool], ids=str)
@pytest.mark.parametrize("case", LOSSES)
def test_a_sum_of_any_length(case, truths, weighted):
    """What fills up the last vector costs nothing, also where a smoothed truth is nowhere 0."""
    ours = both(case)[0]
    for n in (1, 5, 8, 15, 16, 17, 33, 63, 65, 130, 1025, 1070):
        x, y = 3 * torch.randn(n), torch.randint(2, (n,)).to(truths)
        more = {"weight": torch.rand(n)} if weighted else {}
        losses = ours(x, y, reduction="none", **more)
        same_digits(ours(x, y, reduction="sum", **more).double(), losses.double().sum(), rtol=4e-7)


def errors(case, x, y, p):
    """Of the loss and its slope, what they are the sums and powers of: units of rounding, as a multiple of the type's.

    A power q^e is off by e times what q is, and by e log q where e is not whole; m = p - clip by what p is.
    """
    name, options = LOSSES[case]
    gamma = max(options.get("gamma", 2), options.get("gamma_neg", 4), options.get("gamma_pos", 1))
    units = 4 + gamma if name != BCE else 1
    if gamma % 1:
        units = units + gamma * (F.softplus(-x.abs()) + x.abs())
    u = x.detach().requires_grad_()
    loss = both(case, reduction="none")[1](u, y, **p)
    (slope,) = torch.autograd.grad(loss.sum(), u, create_graph=True)
    loss_scale, terms = loss.abs() * units, 0
    for truth in (0.0, 1.0):  # the two sides, which have opposite signs
        part = both(case, reduction="none")[1](u, torch.full_like(y, truth), **p)
        terms = terms + torch.autograd.grad(part.sum(), u)[0].abs()
    slope_scale = terms * units * (1 if name != BCE else 2)
    if name == "asymmetric_loss":
        moved = (x.sigmoid() + 1e-300) / (x.sigmoid() * (-x).sigmoid() + 1e-300)
        (bend,) = torch.autograd.grad(slope.sum(), u)
        loss_scale, slope_scale = loss_scale + slope.abs() * moved, slope_scale + bend.abs() * moved
    return loss_scale.detach(), slope_scale.detach()


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize("case", LOSSES)
def test_loss_and_gradient(backend, case, dtype):
    name, _ = LOSSES[case]
    for shape, target in (((), None), ((3, 1025), None), ((33, 31), torch.bool)):  # a block and one, tails of lanes
        x = (torch.randn(shape) * 6).to(dtype)
        y = torch.rand(shape).to(dtype) if target is None else torch.randint(2, shape).to(target)
        p = {"weight": torch.rand(shape[-1:])}
        if name == BCE:
            p["pos_weight"] = torch.rand(shape[-1:]) * 3
        wide = {k: v.double() for k, v in p.items()}
        narrow = torch.float64 if dtype is torch.float64 else torch.float32
        scales = errors(case, x.double(), y.double(), wide)
        g = torch.randn(shape)
        for reduction in ("none", "mean"):
            results = []
            for f, as_dtype, q, device in (
                (both(case)[1], torch.float64, wide, "cpu"),
                (both(case)[1], narrow, {k: v.to(narrow) for k, v in p.items()}, "cpu"),
                (both(case)[0], dtype, p, backend.device),
            ):
                u = x.to(as_dtype).to(device).requires_grad_()
                t = y.to(device)
                loss = f(u, t.to(as_dtype) if t.is_floating_point() else t, reduction=reduction,
                         **{k: v.to(device) for k, v in q.items()})  # fmt: skip
                incoming = (g if reduction == "none" else g.sum()).to(loss)
                results.append((loss.detach(), torch.autograd.grad(loss, u, incoming)[0]))
            (loss, slope), (loss32, slope32), ours = results
            n = max(1, x.numel()) if reduction == "mean" else 1
            size = scales[0] if reduction == "none" else scales[0].sum() / n
            assert_as_good_as_torch(ours[0], loss, loss32, scale=size, what=f"{case} {shape} {target} {reduction}")
            size = scales[1] * (g.abs() if reduction == "none" else g.sum().abs()) / n
            assert_as_good_as_torch(ours[1], slope, slope32, scale=size, what=f"{case} {shape} {target} {reduction} x")


def torchvisions_focal(x, y, alpha, gamma):
    p = torch.sigmoid(x)
    ce = F.binary_cross_entropy_with_logits(x, y, reduction="none")
    loss = ce * (1 - (p * y + (1 - p) * (1 - y))) ** gamma
    return loss if alpha < 0 else (alpha * y + (1 - alpha) * (1 - y)) * loss


def timms_asymmetric(x, y, gamma_neg, gamma_pos, clip):
    positive, negative = torch.sigmoid(x), 1 - torch.sigmoid(x)
    if clip > 0:
        negative = (negative + clip).clamp(max=1)
    loss = y * torch.log(positive.clamp(min=1e-8)) + (1 - y) * torch.log(negative.clamp(min=1e-8))
    pt = positive * y + negative * (1 - y)
    return -(loss * (1 - pt) ** (gamma_pos * y + gamma_neg * (1 - y))).sum()


def timms_bce(x, label, smoothing, sum_classes=False):
    off = smoothing / x.shape[-1]
    y = torch.full_like(x, off).scatter_(1, label.view(-1, 1), 1 - smoothing + off)
    loss = F.binary_cross_entropy_with_logits(x, y, reduction="none")
    return loss.sum(-1).mean() if sum_classes else loss.mean()


def test_other_libraries_formulas():
    x, soft, hard = torch.randn(40, 9, **f64) * 3, torch.rand(40, 9, **f64), torch.randint(2, (40, 9)).double()
    for y, alpha, gamma in itertools.product((soft, hard), (-1, 0.25, 0.9), (0, 0.5, 1, 2, 3.5)):
        same_digits(cece.sigmoid_focal_loss(x, y, alpha, gamma), torchvisions_focal(x, y, alpha, gamma), 1e-10)
    for gamma_neg, gamma_pos, clip in itertools.product((0, 2.5, 4), (0, 1, 1.5), (0, 0.05, 0.3)):
        ours = cece.asymmetric_loss(x, hard, gamma_neg, gamma_pos, clip)
        same_digits(ours, timms_asymmetric(x, hard, gamma_neg, gamma_pos, clip), 1e-10)
    label = torch.randint(9, (40,))
    for smoothing in (0.0, 0.1):
        ours = partial(cece.multilabel_cross_entropy, x, label, label_smoothing=smoothing)
        same_digits(ours(), timms_bce(x, label, smoothing))
        same_digits(ours(mean_dim=0), timms_bce(x, label, smoothing, sum_classes=True))
    plain = F.binary_cross_entropy_with_logits(x, hard, reduction="none")
    same_digits(cece.sigmoid_focal_loss(x, hard, -1, 0), plain, 1e-10)
    same_digits(  # Keras's smoothing
        cece.binary_cross_entropy_with_logits(x, hard, label_smoothing=0.2),
        F.binary_cross_entropy_with_logits(x, hard * 0.8 + 0.1),
    )


# x, truth, the loss and its slope there
FAR = [
    ("focal", {"alpha": -1}, 8192.0, 0.0, 8192.0, 1.0),
    ("focal", {"alpha": -1}, -8192.0, 1.0, 8192.0, -1.0),
    ("focal", {"alpha": -1}, -8192.0, 0.0, 0.0, 0.0),
    ("focal", {"alpha": -1}, inf, 1.0, 0.0, 0.0),
    ("focal", {"alpha": -1}, inf, 0.0, inf, 1.0),
    ("focal", {"alpha": 0.0}, -inf, 1.0, 0.0, 0.0),
    ("focal 0", {}, inf, 1.0, 0.0, 0.0),
    ("focal 0", {}, 8192.0, 0.0, 8192.0, 1.0),
    ("focal 0.5", {"alpha": -1}, -inf, 0.0, 0.0, 0.0),
    ("focal 0.5", {"alpha": -1}, -inf, 1.0, inf, -1.0),
    ("poly", {}, 8192.0, 0.0, 8193.5, 1.0),
    ("smoothing", {"label_smoothing": 0.0}, -inf, 0.0, 0.0, 0.0),
    ("asymmetric", {}, -8192.0, 1.0, 8192.0, -1.0),
    ("asymmetric", {}, 8192.0, 0.0, -(0.95**4) * math.log(0.05), 0.0),
    ("asymmetric", {}, -inf, 0.0, 0.0, 0.0),
    ("asymmetric", {}, inf, 1.0, 0.0, 0.0),
    ("asymmetric", {}, -3.0, 0.0, 0.0, 0.0),  # p below the clip
    ("asymmetric, no clip", {}, 8192.0, 0.0, 8192.0, 1.0),
    ("asymmetric, no clip", {}, inf, 0.0, inf, 1.0),
    ("asymmetric, no clip", {}, -inf, 0.0, 0.0, 0.0),
]


def test_far_logits(backend):
    """Also in float16, whose largest number is 65504, and NaN where the logit is one."""
    for (case, more, x, y, loss, slope), dtype in itertools.product(FAR, DTYPES):
        f = partial(getattr(cece, LOSSES[case][0]), **{**LOSSES[case][1], **more}, reduction="none")
        u = torch.tensor([x, nan, 0.5], dtype=dtype, device=backend.device).requires_grad_()
        ours = f(u, torch.full_like(u.detach(), y))
        (g,) = torch.autograd.grad(ours.sum(), u)
        assert ours[0].item() == pytest.approx(float(torch.tensor(loss)), rel=1e-3 if abs(x) == 8192.0 else 1e-6), (
            case,
            x,
        )
        assert g[0].item() == pytest.approx(slope, rel=1e-3, abs=1e-30), (case, x, y, dtype)
        assert (ours[1].isnan() and g[1].isnan()) or more.get("alpha") == 0, (case, x, y)
        assert ours[2].isfinite() and g[2].isfinite()


def test_tiny_losses(backend):
    """A few units of the last place of what a certain and right answer costs, and of its slope."""
    x = torch.tensor([-5.0, -20.0, -40.0, -80.0], device=backend.device).requires_grad_()
    wide, y = x.detach().double().cpu(), torch.zeros(4, device=backend.device)
    p, cost = wide.sigmoid(), F.softplus(wide)
    for gamma in (0, 1):
        loss = cece.sigmoid_focal_loss(x, y, -1, gamma)
        (slope,) = torch.autograd.grad(loss.sum(), x)
        truth, of_x = p**gamma * cost, p**gamma * (gamma * (-wide).sigmoid() * cost + p)
        for ours, true in ((loss.detach(), truth), (slope, of_x)):
            kept = true > 1e-37
            assert ((ours.cpu().double() / true)[kept] - 1).abs().max() < 8 * 2**-23
    clipless = cece.asymmetric_loss(x, y, 1, 0, 0, reduction="none")
    assert ((clipless.cpu().double() / (p * cost))[:3] - 1).abs().max() < 8 * 2**-23


# ---- derivatives


@pytest.mark.parametrize("case", LOSSES)
def test_every_order(case):
    name, _ = LOSSES[case]
    x, y, w = torch.randn(2, 3, **f64), torch.rand(2, 3, **f64) * 0.9 + 0.05, torch.rand(3, **f64) + 0.1
    inputs = [x, y, w] if name != BCE else [x, y, w, torch.rand(3, **f64) + 0.2]
    inputs = [v.requires_grad_() for v in inputs]
    mask = torch.tensor([[True, False, True], [True, True, False]])
    for reduction, m in (("none", None), ("mean", mask), ("sum", None)):

        def loss(x, y, w, *p, m=m, reduction=reduction):
            return both(case)[0](x, y, weight=w, mask=m, reduction=reduction, **({"pos_weight": p[0]} if p else {}))

        assert gradcheck(loss, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
        assert gradgradcheck(loss, inputs, check_fwd_over_rev=True, check_batched_grad=True)
    ours, truth = both(case, reduction="sum")
    third = [jacrev(hessian(f))(x.detach()[0], y.detach()[0]) for f in (ours, truth)]
    same_digits(*third, 1e-9, 1e-10)


@pytest.mark.parametrize("case", LOSSES)
def test_derivatives_at_hard_truths_and_at_0(case):
    """Where a formula selects: the reference's, which has no such places."""
    x = torch.tensor([0.0, 0.0, -3.0, 40.0, -40.0, 2.0], **f64)
    y = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 1.0], **f64)
    ours, truth = both(case, reduction="sum")
    for wanted in ((0, 0), (1, 0)):
        if wanted == (1, 0) and case in ("focal 0.5", "focal 2.7, poly, smoothing"):
            continue  # of a power below 1 at 0
        of = [jacrev(grad(f, wanted[1]), wanted[0])(x, y) for f in (ours, truth)]
        same_digits(*of, 1e-9, 1e-13)


@pytest.mark.parametrize("case", LOSSES)
def test_the_derivative_along_a_tangent_is_linear_at_0(case):
    """Where a factor of the formula is 0, what it is multiplied by is not lost."""
    given = torch.randn(5, **f64), torch.tensor([0, 1, 0.5, 0, 1], **f64), torch.tensor([0, 1, 2, 0.5, 0], **f64)

    def loss(x, y, w):
        return both(case)[0](x, y, weight=w, reduction="sum")

    zero = torch.zeros(5, **f64)
    along = grad(lambda *v: jvp(loss, given, v)[1], (0, 1, 2))(zero, zero, zero)
    for ours, truth in zip(along, grad(loss, (0, 1, 2))(*given), strict=True):
        same_digits(ours, truth, 1e-10, 1e-14)


def derivatives(case, x, t, u, a, m, g):
    """Value, losses, gradients, second order in two modes along a, third order, of elements masked by m."""

    def loss(x, t, u, reduction="mean"):
        return both(case)[0](x, t, weight=u, mask=m, reduction=reduction)

    slopes = grad(loss, (0, 1, 2))
    third = grad(lambda x: grad(lambda x: loss(x, t, u).square())(x)[m].square().sum())(x)
    return [
        loss(x, t, u),
        loss(x, t, u, "none"),
        vjp(lambda x: loss(x, t, u, "none"), x)[1](g)[0],
        *slopes(x, t, u),
        *vjp(slopes, x, t, u)[1]((a, torch.ones_like(a), torch.ones_like(a))),
        *jvp(slopes, (x, t, u), (a, a, a))[1],
        third,
    ]


@pytest.mark.parametrize("bad", [nan, inf, -inf])
@pytest.mark.parametrize("case", LOSSES)
def test_masked_elements_are_nowhere(backend, case, bad):
    """Not in the value, in the count or in any derivative, whatever is in them; the others' as without them."""
    clean, y, w, v = (torch.randn(4, 6, **f64) for _ in range(4))
    y, w, mask = y.sigmoid(), w.exp(), torch.rand(4, 6) < 0.6
    mask[0] = False
    results = []
    for fill in (0.0, bad):
        given = [torch.where(mask, t, fill) for t in (clean, y, w, v)]
        given += [mask, torch.where(mask, 1.0, fill).double()]
        found = [t.cpu() for t in derivatives(case, *(t.to(backend.device) for t in given))]
        for r in found[1:]:
            assert r.isfinite().all() and not r[~mask].any() and r[mask].any()
        results.append(found)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    same_digits(results[0][0], results[0][1].sum() / mask.sum())


@pytest.mark.parametrize("shape", [(), (1,), (40,), (30, 1), (2, 1, 1), (1, 30, 40), (2, 30, 40)], **ids)
def test_masks_broadcast(backend, shape):
    x, y, mask = torch.randn(2, 30, 40), torch.rand(2, 30, 40) < 0.5, torch.rand(shape) < 0.6
    mask = mask | (torch.arange(mask.numel()).reshape(shape) == 0)
    used = mask.expand(x.shape)
    truth = F.binary_cross_entropy_with_logits(x.double(), y.double(), reduction="none")[used]
    for layout in (lambda t: t, lambda t: t.transpose(0, 2).contiguous().transpose(0, 2)):
        a, b = (layout(t).to(backend.device) for t in (x, y))
        a.requires_grad_()
        m = mask.to(backend.device)
        for r, expected in (("mean", truth.mean()), ("sum", truth.sum())):
            loss = cece.binary_cross_entropy_with_logits(a, b, mask=m, reduction=r)
            same_digits(loss.detach().cpu().double(), expected, 1e-6)
            (g,) = torch.autograd.grad(loss, a)
            slope = torch.where(used, x.sigmoid() - y.float(), 0) / (used.sum() if r == "mean" else 1)
            torch.testing.assert_close(g.cpu(), slope, rtol=1e-5, atol=1e-9)


# ---- reductions


def test_ignore_index(backend):
    x = torch.randn(50, 20, device=backend.device).requires_grad_()
    y = torch.randint(2, (50, 20), device=backend.device)
    ignored = torch.rand(50, 20, device=backend.device) < 0.3
    for dtype, index in ((torch.int64, -1), (torch.uint8, 255), (torch.int32, 2**30)):
        t = torch.where(ignored, index, y).to(dtype)
        for f in (cece.binary_cross_entropy_with_logits, cece.sigmoid_focal_loss, cece.asymmetric_loss):
            ours = f(x, t, ignore_index=index, reduction="mean")
            assert torch.equal(ours, f(x, y, mask=~ignored, reduction="mean"))
            both_ways = f(x, t, ignore_index=index, mask=x > 0, reduction="sum")
            assert torch.equal(both_ways, f(x, y, mask=~ignored & (x > 0), reduction="sum"))
    with pytest.raises(ValueError, match="ignore_index is for integer truths, got target of dtype torch.float32"):
        cece.binary_cross_entropy_with_logits(x, y.float(), ignore_index=1)


def test_normalizer_and_mean_dim(backend):
    x, y, mask = torch.randn(6, 5, **f64), torch.rand(6, 5, **f64), torch.rand(6, 5) < 0.6
    mask[2] = False
    w = torch.rand(5, **f64)
    each = F.binary_cross_entropy_with_logits(x, y, w, reduction="none")
    x, y, w, m = (t.to(backend.device) for t in (x, y, w, mask))
    f = partial(cece.binary_cross_entropy_with_logits, x, y, w)
    for n in (7, 7.0, torch.tensor(7), torch.tensor(7.0)):
        same_digits(f(normalizer=n).cpu(), each.sum() / 7)
        same_digits(f(normalizer=n, mask=m).cpu(), each[mask].sum() / 7)
    divisor = torch.tensor(7.0, **f64).requires_grad_()
    (g,) = torch.autograd.grad(f(normalizer=divisor), divisor)
    same_digits(g.cpu(), -each.sum() / 49)
    same_digits(f(mean_dim=1).cpu(), each.mean(1).sum())
    same_digits(f(mean_dim=-1).cpu(), each.mean(1).sum())
    same_digits(f(mean_dim=0).cpu(), each.mean(0).sum())
    used = torch.where(mask, each, 0)
    same_digits(f(mean_dim=1, mask=m).cpu(), (used.sum(1) / mask.sum(1).clamp_min(1)).sum())
    same_digits(f(mean_dim=0, mask=m).cpu(), (used.sum(0) / mask.sum(0).clamp_min(1)).sum())
    bare = torch.where(mask, F.binary_cross_entropy_with_logits(x.cpu(), y.cpu(), reduction="none"), 0)
    ours = cece.binary_cross_entropy_with_logits(x, y, mask=m, mean_dim=1)
    same_digits(ours.cpu(), (bare.sum(1) / mask.sum(1).clamp_min(1)).sum())
    for options in ({"normalizer": 3}, {"mean_dim": 1}):
        with pytest.raises(ValueError, match="normalizer and mean_dim are for reduction 'mean'"):
            f(reduction="sum", **options)
    with pytest.raises(ValueError, match="must not be given both"):
        f(normalizer=3, mean_dim=1)
    with pytest.raises(ValueError, match=r"normalizer must be a number or a tensor of one, got shape \(2,\)"):
        f(normalizer=torch.ones(2))


def test_counts_beyond_float32():
    """A mean of 20 million masked elements, whose count is above 2^24."""
    x = torch.zeros(20_000_003, dtype=torch.bfloat16)
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[::7] = False
    loss = cece.binary_cross_entropy_with_logits(x, mask, mask=mask)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)


# ---- label lists

ROWS = [[0], [], [3, 3, 1], [4, 0], [2, 1, 0, 3], [1]]


def padded(rows, index=-100, dtype=torch.int64):
    width = max(map(len, rows)) + 1
    return torch.tensor([[index] + r + [index] * (width - 1 - len(r)) for r in rows], dtype=dtype)


def ragged(rows, dtype=torch.int64):
    offsets = torch.tensor([0, *itertools.accumulate(map(len, rows))])
    return torch.tensor([label for r in rows for label in r], dtype=dtype), offsets


@pytest.mark.parametrize("classes", [5, 300, 1100])
@pytest.mark.parametrize("dtype", DTYPES, **ids)
def test_lists_are_the_dense_truth(backend, classes, dtype):
    """Bit for bit but for the order of a sum, of any integer dtype, in any layout; and the reference's."""
    many = [[int(k) for k in torch.randint(classes, (n,))] for n in (3, 0, 20, 1, 7)]
    rows = ROWS if classes == 5 else many
    x = torch.randn(len(rows), classes).to(dtype)
    y = torch.zeros(x.shape)
    for row, listed in zip(y, rows, strict=True):
        row[listed] = 1
    w, p, m = torch.rand(classes), torch.rand(classes) * 2, torch.rand(x.shape) < 0.7
    transposed = x.t().contiguous().t()
    x, transposed, y, w, p, m = (t.to(backend.device) for t in (x, transposed, y, w, p, m))
    kinds = [(torch.int64, x, "none"), (torch.int16, x, "mean"), (torch.uint8, transposed, "mean")]
    for integers, given, r in kinds if classes < 256 else kinds[:2]:
        for options in ({}, {"weight": w, "pos_weight": p}, {"mask": m}):
            truth = given.detach().requires_grad_()
            dense = cece.binary_cross_entropy_with_logits(truth, y, reduction=r, **options)
            expected = torch.autograd.grad(dense.sum(), truth)[0]
            values, offsets = (t.to(backend.device) for t in ragged(rows, integers))
            index = 250 if integers is torch.uint8 else -100
            pads = padded(rows, index, integers).to(backend.device)
            for labels in ((pads,), (values, offsets), (values, offsets.int())):
                u = given.detach().requires_grad_()
                loss = cece.multilabel_cross_entropy(u, *labels, ignore_index=index, reduction=r, **options)
                assert torch.equal(loss, dense) or r == "mean", (integers, options.keys())
                same_digits(loss.double(), dense.double(), 2**-22 if loss.dtype != torch.float64 else 1e-15)
                assert torch.equal(torch.autograd.grad(loss.sum(), u)[0], expected)
    truth = cece.reference.multilabel_cross_entropy(x.cpu().double(), rows, label_smoothing=0.2, reduction="none")
    ours = cece.multilabel_cross_entropy(x, padded(rows).to(backend.device), label_smoothing=0.2, reduction="none")
    assert_as_good_as_torch(ours, truth)


@pytest.mark.parametrize("form", ["padded", "ragged"])
def test_lists_in_every_order(form):
    x, w, p = (torch.randn(6, 5, **f64), torch.rand(6, 5, **f64) + 0.1, torch.rand(5, **f64) + 0.1)
    labels = (padded(ROWS),) if form == "padded" else ragged(ROWS)
    mask = torch.rand(6, 5) < 0.7

    def loss(x, w, p):
        return cece.multilabel_cross_entropy(x, *labels, weight=w, pos_weight=p, label_smoothing=0.1, mask=mask)

    inputs = [t.requires_grad_() for t in (x, w, p)]
    assert gradcheck(loss, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(loss, inputs, check_fwd_over_rev=True)


def test_lists_under_vmap_and_in_a_graph():
    x, t = torch.randn(3, 6, 5, **f64), torch.stack([padded(ROWS)] * 3).roll(1, 1)
    f = cece.multilabel_cross_entropy
    same_digits(vmap(f)(x, t), torch.stack([f(a, b) for a, b in zip(x, t, strict=True)]))
    same_digits(vmap(grad(f), (0, None))(x, t[0]), torch.stack([grad(f)(a, t[0]) for a in x]))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, *t: torch.func.grad(f)(x, *t), fullgraph=True, backend=counter, dynamic=True)
    for n in (6, 4, 5):
        for labels in ((t[0][:n],), (*ragged(ROWS[:n]),)):
            same_digits(compiled(x[0, :n], *labels), grad(f)(x[0, :n], *labels))
    assert counter.frame_count <= 4  # two forms, each once for all sizes but the first


def test_bad_labels_and_offsets(backend):
    x, t = torch.randn(3, 5, device=backend.device), torch.tensor([[0, 1], [2, -7], [5, -100]], device=backend.device)
    values, offsets = torch.tensor([0, 9], device=backend.device), torch.tensor([0, 1, 1, 2], device=backend.device)
    if backend.name == "cpu":
        wanted = r"Label -7 is out of bounds: labels\[1, 1\] must be in \[0, 5\) or equal ignore_index \(-100\), got -7"
        with pytest.raises(IndexError, match=wanted):
            cece.multilabel_cross_entropy(x, t)
        with pytest.raises(IndexError, match=r"Label 5 is out of bounds: labels\[2, 0\]"):
            cece.multilabel_cross_entropy(x, t.clamp_min(-1), ignore_index=-1)
        with pytest.raises(IndexError, match=r"Label 9 is out of bounds: labels\[1\]"):
            cece.multilabel_cross_entropy(x, values, offsets)
        for wrong in ([0, 1, 1, 1], [1, 1, 1, 2], [0, 2, 1, 2], [0, -1, 1, 2], [0, 10**9, 10**9, 2]):
            with pytest.raises(ValueError, match="offsets must go up from 0 to the number of labels, 2, got"):
                cece.multilabel_cross_entropy(x, values, torch.tensor(wrong))
        return
    u = x.requires_grad_()
    for labels, bad in (((t,), [False, True, True]), ((values, offsets), [False, False, True])):
        loss = cece.multilabel_cross_entropy(u, *labels, reduction="none")
        g = torch.autograd.grad(loss.sum(), u)[0]
        for of in (loss, g):
            assert of.isnan().all(1).tolist() == bad and of.isnan().any(1).tolist() == bad


# ---- pairs


def test_pairs(backend):
    a, b = torch.randn(7, 4, **f64), torch.randn(9, 4, **f64)
    scale, bias = torch.tensor(3.0, **f64), torch.tensor(-2.0, **f64)
    for reduction in REDUCTIONS:
        grads = []
        for f, device in ((cece.reference.pairwise_sigmoid_loss, "cpu"), (cece.pairwise_sigmoid_loss, backend.device)):
            leaves = [t.clone().to(device).requires_grad_() for t in (a, b, scale, bias)]
            loss = f(*leaves, reduction=reduction)
            grads.append([loss.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(loss.square().sum(), leaves))])
        for truth, ours in zip(*grads, strict=True):
            same_digits(ours, truth, 1e-11, 1e-13)
    a, b, scale, bias = (t.to(backend.device) for t in (a, b, scale, bias))
    logits = 3 * a @ b.t() - 2
    same_digits(cece.pairwise_sigmoid_loss(logits), cece.pairwise_sigmoid_loss(a, b, scale, bias))
    same_digits(cece.pairwise_sigmoid_loss(a @ b.t(), scale=3.0, bias=-2.0), cece.pairwise_sigmoid_loss(logits))
    same_digits(cece.pairwise_sigmoid_loss(logits, normalizer=63), cece.pairwise_sigmoid_loss(logits) / 9)
    if backend.name == "cpu":
        inputs = [t.clone().requires_grad_() for t in (a[:3], b[:3], scale, bias)]
        assert gradcheck(cece.pairwise_sigmoid_loss, inputs, check_forward_ad=True)
        assert gradgradcheck(cece.pairwise_sigmoid_loss, inputs, check_fwd_over_rev=True)


# ---- a row's focal loss


@pytest.mark.parametrize("gamma, poly", [(0, 0.0), (0, 1.5), (0.5, 0.0), (2, 0.0), (2.5, 1.0)])
def test_softmax_focal(backend, gamma, poly):
    for shape, dtype, r in itertools.product([(7, 5), (3, 60, 4)], (torch.float64, torch.float32), REDUCTIONS):
        x = torch.randn(shape, dtype=dtype) * 3
        t = torch.randint(shape[1], (shape[0], *shape[2:]))
        t.view(-1)[0] = -100
        for w in (None, torch.rand(shape[1], dtype=dtype)):
            results = []
            for f, kind, device in (
                (cece.reference.softmax_focal_loss, torch.float64, "cpu"),
                (cece.softmax_focal_loss, dtype, backend.device),
            ):
                u = x.to(kind).to(device).requires_grad_()
                v = None if w is None else w.to(kind).to(device)
                loss = f(u, t.to(device), v, gamma, reduction=r, poly=poly)
                results.append((loss.detach().cpu().double(), torch.autograd.grad(loss.sum(), u)[0].cpu().double()))
            eps = torch.finfo(dtype).eps
            for truth, ours in zip(*results, strict=True):
                torch.testing.assert_close(ours, truth, rtol=64 * eps, atol=16 * eps)
    if backend.name == "cpu":
        x, t = torch.randn(4, 5, **f64).requires_grad_(), torch.tensor([0, -100, 3, 2])
        loss = partial(cece.softmax_focal_loss, target=t, gamma=gamma, poly=poly)
        assert gradcheck(loss, (x,), check_forward_ad=True)
        assert gradgradcheck(loss, (x,), check_fwd_over_rev=True)


def test_softmax_focal_at_the_ends():
    """Certain and right, certain and wrong, ignored: 0, all of the logit's difference, 0; none is NaN."""
    for gamma, dtype in itertools.product((0, 0.5, 1, 2), (torch.float64, torch.float32, torch.float16)):
        x = torch.tensor([[0.0, 6e4], [6e4, 0.0], [nan, inf], [0.0, inf], [-inf, 0.0]], dtype=dtype).requires_grad_()
        loss = cece.softmax_focal_loss(x, torch.tensor([1, 1, -100, 1, 0]), gamma=gamma, reduction="none")
        (g,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
        assert loss.tolist() == [0, float(x[1, 0]), 0, 0, inf]
        assert g[1].tolist() == [1, -1] and not g[[0, 2, 3]].any() and g[4].tolist() == [-1, 1]


# ---- torch's machinery


def calls():
    x, y = torch.randn(6, 5, **f64), torch.rand(6, 5, **f64)
    m, t, label = torch.rand(6, 5) < 0.7, padded(ROWS), torch.tensor([0, 1, 2, 3, 4, 2])
    return {
        BCE: ((x, y), {"label_smoothing": 0.1, "mask": m, "poly": 0.5}),
        "sigmoid_focal_loss": ((x, y), {"reduction": "mean", "mask": m, "gamma": 1.5}),
        "asymmetric_loss": ((x, y), {"reduction": "mean", "mean_dim": 1}),
        "multilabel_cross_entropy": ((x, t), {"label_smoothing": 0.1, "mask": m}),
        "pairwise_sigmoid_loss": ((x, y, 2.0, torch.tensor(-1.0, **f64)), {}),
        "softmax_focal_loss": ((x, label), {"gamma": 1.5, "weight": torch.rand(5, **f64)}),
    }


@pytest.mark.parametrize("name", calls())
def test_compile_script_fx_and_overrides(name):
    (x, *rest), options = calls()[name]
    f = partial(getattr(cece, name), **options)
    expected, slope = f(x, *rest), grad(f)(x, *rest)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, *rest: (f(x, *rest), grad(f)(x, *rest)), fullgraph=True, backend="aot_eager")
    for ours, truth in zip(compiled(x, *rest), (expected, slope), strict=True):
        same_digits(ours, truth)
    same_digits(torch.jit.script(getattr(cece, name))(x, *rest, **options), expected)
    same_digits(vmap(f)(x.expand(2, 6, 5), *(v.expand(2, *v.shape) if isinstance(v, torch.Tensor) else v for v in rest))
                if name != "pairwise_sigmoid_loss" else vmap(lambda x: f(x, *rest))(x.expand(2, 6, 5)),
                expected.expand(2))  # fmt: skip
    meta = [v.to("meta") if isinstance(v, torch.Tensor) else v for v in (x, *rest)]
    on_meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    ours = getattr(cece, name)(*meta, **on_meta)
    assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype)

    seen = []

    class Mine(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    assert type(f(x.as_subclass(Mine), *rest)) is Mine and seen[0] is getattr(cece, name)
    before = [v.clone() for v in (x, *rest) if isinstance(v, torch.Tensor)]
    f(x.requires_grad_(), *rest).backward()
    for v, was in zip([v for v in (x, *rest) if isinstance(v, torch.Tensor)], before, strict=True):
        assert torch.equal(v, was) and v._version == 0


@pytest.mark.parametrize("name", calls())
def test_decompositions(name):
    """An exported program keeps none of our operators and computes the same."""
    (x, *rest), options = calls()[name]

    class Model(torch.nn.Module):
        def forward(self, x, *rest):
            return getattr(cece, name)(x, *rest, **options)

    tensors = tuple(v if isinstance(v, torch.Tensor) else torch.tensor(v, **f64) for v in rest)
    program = torch.export.export(Model(), (x, *tensors)).run_decompositions(cece.decompositions())
    assert "cece" not in program.graph_module.code
    same_digits(program.module()(x, *tensors), Model()(x, *tensors), 1e-12)


@pytest.mark.parametrize("case", LOSSES)
def test_decompositions_of_the_gradient(case):
    from cece import _decompositions

    name, _ = LOSSES[case]
    kind = {BCE: ops.FOCAL if case == "poly" else ops.WITH_LOGITS, "sigmoid_focal_loss": ops.FOCAL}.get(name, 3)
    own = {"smoothing": [0.9, 0.05, 0, 0, 0, 0], "poly": [1, 0, 1, 1, 0, 1.5]}.get(case)
    own = own or (
        [0.8, 0.1, 0.3, 0.7, 2.7, -0.5] if kind == ops.FOCAL else [1, 0, 0.5, 2.5, 0.1 * ("no" not in case), 0]
    )
    x, y, w, m = torch.randn(6, 5, **f64) * 3, torch.rand(6, 5, **f64), torch.rand(5, **f64), torch.rand(6, 5) < 0.7
    p = torch.rand(5, **f64)
    for reduction in (ops.NONE, ops.MEAN, ops.SUM, ops.COUNTED):
        args = (x, y, w, p, kind, reduction, m, [float(a) for a in own])
        loss = ops.BCE(*args)
        same_digits(_decompositions.binary_cross_entropy_forward(*args), loss)
        g = torch.randn_like(loss)
        ours = ops.BCE_BACKWARD(g, *args)
        same_digits(_decompositions.binary_cross_entropy_backward(g, *args), ours, 1e-9, 1e-13)
        batch = vmap(lambda x, m, args=args: ops.BCE(x, *args[1:6], m, args[7]))(
            torch.stack([x, -x]), torch.stack([m, ~m])
        )
        same_digits(batch[0], loss)
        back = vmap(lambda g, args=args: ops.BCE_BACKWARD(g, *args))(torch.stack([g, -g]))
        same_digits(back, torch.stack([ours, -ours]))


OPCHECKS = [
    (torch.float32, ops.FOCAL, ops.MEAN, [0.9, 0.05, 0.25, 0.75, 1.5, 0.5], False),
    (torch.bfloat16, ops.ASYMMETRIC, ops.COUNTED, [1.0, 0.0, 1.0, 4.0, 0.05, 0.0], False),
    (torch.float32, ops.WITH_LOGITS, ops.SUM, [0.9, 0.02], True),
]


@pytest.mark.parametrize("dtype, kind, reduction, own, listed", OPCHECKS)
def test_opcheck(dtype, kind, reduction, own, listed):
    x, m = torch.randn(6, 5).to(dtype).requires_grad_(), torch.rand(6, 5) < 0.7
    truth = [(padded(ROWS), None, -100), (*ragged(ROWS), -100)] if listed else [(torch.rand(6, 5), None, None)]
    for t, offsets, padding in truth:
        args = (x, t, torch.rand(5), None, kind, reduction, m, own, offsets, padding)
        torch.library.opcheck(ops.BCE, args)
        g = torch.ones_like(ops.BCE(*args).detach())
        torch.library.opcheck(ops.BCE_BACKWARD, (g, x.detach(), *args[1:]))


MODULES = {
    "BCEWithLogitsLoss": {"label_smoothing": 0.1, "poly": 0.5, "mean_dim": 1},
    "SigmoidFocalLoss": {"alpha": 0.5, "gamma": 1.5, "weight": torch.tensor([1.0, 2, 3, 4, 5], **f64)},
    "AsymmetricLoss": {"gamma_neg": 3, "clip": 0.1, "reduction": "mean"},
    "MultilabelCrossEntropyLoss": {"pos_weight": torch.tensor([1.0, 2, 3, 4, 5], **f64), "label_smoothing": 0.1},
    "SoftmaxFocalLoss": {"weight": torch.tensor([1.0, 2, 3, 4, 5], **f64), "gamma": 1.5, "poly": 0.5},
}
FUNCTION = dict(zip(MODULES, calls(), strict=False)) | {
    "MultilabelCrossEntropyLoss": "multilabel_cross_entropy",
    "SoftmaxFocalLoss": "softmax_focal_loss",
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name):
    module, (args, _) = getattr(cece, name)(**MODULES[name]), calls()[FUNCTION[name]]
    reduction = {"SigmoidFocalLoss": {"reduction": "mean"}}.get(name, {})
    expected = getattr(cece, FUNCTION[name])(*args, **{**reduction, **MODULES[name]})
    for m in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.jit.script(module)):
        same_digits(m(*args), expected)
    loaded = getattr(cece, name)(**MODULES[name])
    loaded.load_state_dict(module.state_dict())
    assert f"{name}(" in repr(module) and all(k in repr(module) for k in MODULES[name])
    assert set(module.state_dict()) == {k for k in MODULES[name] if "weight" in k}


def test_pairwise_module():
    a, b = torch.randn(6, 4), torch.randn(6, 4)
    module = cece.PairwiseSigmoidLoss()
    loss = module(a, b)
    same_digits(loss, cece.pairwise_sigmoid_loss(a, b, 10.0, -10.0), 1e-5)
    loss.backward()
    assert set(module.state_dict()) == {"log_scale", "bias"} and module.log_scale.grad.abs() > 0
    assert "reduction='mean'" in repr(module) and module.bias.grad is not None
    same_digits(torch.jit.script(module)(a, b), loss)


X, Y = torch.zeros(3, 5), torch.zeros(3, 5)
ERRORS = [
    (lambda: cece.sigmoid_focal_loss(X, Y, 1.5), ValueError, "sigmoid_focal_loss: alpha must be between 0.0 and 1.0"),
    (
        lambda: cece.sigmoid_focal_loss(X, Y, 0.5, -1),
        ValueError,
        "sigmoid_focal_loss: gamma must be at least 0.0, got -1",
    ),
    (lambda: cece.sigmoid_focal_loss(X, Y, 0.5, "2"), TypeError, "sigmoid_focal_loss: gamma must be a float, got str"),
    (lambda: cece.sigmoid_focal_loss(X, Y[:2]), ValueError, "sigmoid_focal_loss: Target size .* must be the same"),
    (lambda: cece.sigmoid_focal_loss(X, 1), TypeError, "sigmoid_focal_loss: target must be a torch.Tensor, got int"),
    (lambda: cece.sigmoid_focal_loss(X, Y, reduction="all"), ValueError, "reduction must be 'none', 'mean' or 'sum'"),
    (
        lambda: cece.asymmetric_loss(X, Y, clip=1),
        ValueError,
        "asymmetric_loss: clip must be at least 0.0 and below 1.0",
    ),
    (lambda: cece.asymmetric_loss(X, Y, nan), ValueError, "asymmetric_loss: gamma_neg must be at least 0.0, got nan"),
    (
        lambda: cece.asymmetric_loss(X, Y, mask=Y),
        RuntimeError,
        "asymmetric_loss: mask must be a bool tensor, got Float",
    ),
    (
        lambda: cece.asymmetric_loss(X, Y, mask=Y[:, :4] > 0),
        RuntimeError,
        "mask must be broadcastable to input's shape",
    ),
    (lambda: cece.asymmetric_loss(X, Y, mask=[True]), TypeError, "mask must be a torch.Tensor or None, got list"),
    (lambda: cece.asymmetric_loss(X, Y, ignore_index=0.5), TypeError, "asymmetric_loss: ignore_index must be an int"),
    (
        lambda: cece.binary_cross_entropy_with_logits(X, Y, label_smoothing=2),
        ValueError,
        "label_smoothing must be between",
    ),
    (
        lambda: cece.binary_cross_entropy_with_logits(X, Y, normalizer="n"),
        TypeError,
        "normalizer must be a float, got str",
    ),
    (lambda: cece.multilabel_cross_entropy(X, Y), RuntimeError, "labels must be class indices of an integer dtype"),
    (
        lambda: cece.multilabel_cross_entropy(X[0], Y[0].long()),
        RuntimeError,
        r"input must have shape \(N, C\), got \[5\]",
    ),
    (lambda: cece.multilabel_cross_entropy(X, Y[:2].long()), ValueError, r"labels must have shape \(N, K\), N = 3"),
    (
        lambda: cece.multilabel_cross_entropy(X, Y[0].long(), torch.tensor([0, 1])),
        ValueError,
        r"offsets must have shape \(N \+ 1\), N = 3, got \[2\]",
    ),
    (
        lambda: cece.multilabel_cross_entropy(X, Y[0].long(), torch.zeros(4)),
        RuntimeError,
        "offsets must be int64 or int32, got Float",
    ),
    (lambda: cece.pairwise_sigmoid_loss(X, Y[:2]), ValueError, "each of N rows must have a match among M columns"),
    (lambda: cece.pairwise_sigmoid_loss(X, Y[:, :2]), ValueError, r"got \[3, 5\] and \[3, 2\]"),
    (lambda: cece.softmax_focal_loss(X, Y), ValueError, "softmax_focal_loss: target must be class indices"),
    (lambda: cece.softmax_focal_loss(X, Y[:, 0].long(), gamma=inf), ValueError, "gamma must be at least 0.0, got inf"),
]


@pytest.mark.parametrize("call, error, words", ERRORS, ids=[str(i) for i in range(len(ERRORS))])
def test_errors(call, error, words):
    with pytest.raises(error, match=words) as e:
        call()
    assert str(e.value).startswith("cece.") and "\n" not in str(e.value)
