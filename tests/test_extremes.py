"""The numerics contract (csrc/numerics.h), a test a promise, against truth of more digits than the result's.

Each was seen to fail with the promise broken: torch's own losses stand in the assertions that say "torch's is off".
"""

import re
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHAPES, Tolerance, assert_as_good_as_torch

import cece

mpmath.mp.prec = 400
INF, NAN = float("inf"), float("nan")
BCE = cece.binary_cross_entropy_with_logits

# (shape, class dim last) where the classes of one sample go to: side by side, row by row, one row in segments
WIDTHS = [2, 5, 48, 49, 1024, 1030, 3000, 65536, 65600, 140001]


def ulps(x, truth):
    """The distance of a float tensor's only element from an mpmath number, in units of the last place."""
    value = x.item()
    finfo = torch.finfo(x.dtype)
    exponent = max(int(mpmath.floor(mpmath.log(abs(truth), 2))), int(np.log2(finfo.tiny)))
    return float(abs(mpmath.mpf(value) - truth) / mpmath.mpf(2) ** (exponent + int(np.log2(finfo.eps))))


def exact(row, label):
    """log sum_j exp(x_j - x_label), p_label - 1, of a row of floats: two values, one of them in the tail's number."""
    values, counts = np.unique(np.asarray(row, dtype=np.float64), return_counts=True)
    x_y = mpmath.mpf(float(row[label]))
    terms = [(mpmath.mpf(float(v)), int(n)) for v, n in zip(values, counts, strict=True)]
    total = mpmath.fsum(n * mpmath.exp(v - x_y) for v, n in terms)
    return mpmath.log(total), 1 / total - 1


def layouts(x, label):
    """One sample's logits (C) as a row, and as the middle one of three pixels whose classes are far apart."""
    pixels = torch.stack([x.flip(0), x, -x], 1)[None]
    labels = torch.tensor([[0, label, 0]])
    return [("row", x[None], torch.tensor([label])), ("pixels", pixels, labels)]


def of_sample(out):  # of either layout, the sample itself
    return out[0] if out.dim() == 1 else out[0, 1]


@pytest.mark.parametrize("classes", [501, 1001, 1024])
def test_equal_terms_do_not_drift(classes):
    """Of as many equal terms the sum is as many times that of one: added up one by one, 1000 are 9 ULP off."""
    for least in torch.linspace(17, 85, 200).tolist():
        rows = torch.full((2, classes), -least)
        rows[:, 0] = 0
        rows[1, 2:] = -torch.inf
        many, one = cece.cross_entropy(rows, torch.tensor([0, 0]), reduction="none")
        truth = np.log1p((classes - 1) * np.expm1(one.double().item()))
        assert ulps(many, truth) <= 4, (least, many.item(), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("classes", WIDTHS)
def test_a_tiny_loss_keeps_its_bits(backend, classes, dtype):
    """A loss of 1e-20 is right to 4 ULP where torch's is 0, and so is its label's gradient, expm1(-loss).

    To 6 on a GPU, whose functions add up: expf may be off by 2, log1pf and expm1f by 1 each, and sums are rounded.
    float64's sums of up to 140001 terms are float64's, so a few units more, and float32's other tiny losses.
    """
    if backend.name != "cpu" and classes > 70000:
        return
    for label in sorted({0, classes // 2, classes - 1}):
        for target_loss in (1e-20, 1e-12, 1e-30):
            x = torch.full((classes,), float(np.log(target_loss / (classes - 1))), dtype=dtype)
            x[label] = 0
            truth, slope = exact(x.numpy(), label)
            assert 0.5 * target_loss < truth < 2 * target_loss
            least = 4 if backend.name == "cpu" else 6
            limit = 16 if dtype == torch.float64 else least if target_loss == 1e-20 else 8
            for name, logits, labels in layouts(x, label):
                logits, labels = logits.to(backend.device).requires_grad_(), labels.to(backend.device)
                loss = cece.cross_entropy(logits, labels, reduction="none")
                (grad,) = torch.autograd.grad(loss.sum(), logits)
                assert ulps(of_sample(loss), truth) <= limit, (name, label, of_sample(loss).item(), truth)
                g = grad[0, label] if name == "row" else grad[0, label, 1]
                assert ulps(g, slope) <= limit, (name, label, g.item(), slope)
                one_hot = torch.zeros_like(logits).scatter_(1, labels.unsqueeze(1), 1)
                soft = cece.cross_entropy(logits, one_hot, reduction="none")
                assert ulps(of_sample(soft), truth) <= limit, (name, label, of_sample(soft).item(), truth)
            if dtype == torch.float32:
                assert F.cross_entropy(x[None], torch.tensor([label])) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_tiny_loss_is_as_exact_as_the_difference_of_its_logits(backend, dtype):
    """A difference d that is rounded moves e^d by |d| half units of the dtype: that much, and 4 units of our own.

    float64's logarithms and sums are float64's: a few units more.
    """
    n, eps = 4000, torch.finfo(dtype).eps
    top = torch.rand(n, dtype=torch.float64) * 80
    x = torch.stack([top, top - 2 - 80 * torch.rand(n, dtype=torch.float64)], 1).to(dtype)
    x[0] = torch.tensor([40.1, -5.9513], dtype=dtype)
    gap = [mpmath.mpf(a) - mpmath.mpf(b) for a, b in x.double().tolist()]
    truth = torch.tensor([float(mpmath.log1p(mpmath.exp(-d))) for d in gap], dtype=torch.float64)
    bound = (4 + torch.tensor([float(d) / 2 for d in gap], dtype=torch.float64)) * eps * (2 if eps < 1e-10 else 1)
    labels = torch.zeros(n, dtype=torch.long, device=backend.device)
    for logits, y in ((x, labels), (x.t()[None].contiguous(), labels[None])):
        loss = cece.cross_entropy(logits.to(backend.device), y, reduction="none").flatten().cpu().double()
        error = (loss / truth - 1).abs() / bound
        assert error.max() <= 1, (error.argmax(), x[error.argmax()], error.max())
    assert (bound[0] / eps) > 17  # where 4 units alone would be promised too much


@pytest.mark.parametrize("shape", [(300, 10), (20, 60), (5, 3000), (2, 70000), (2, 21, 40), (2, 300, 9)], ids=str)
def test_an_offset_of_the_logits_changes_no_bit(backend, shape):
    """x + 1e4: the logits are multiples of 2^-9, so the shift is exact. `(max + log sum) - x_y` would lose 10 bits."""
    x = (torch.randn(shape) * 3 * 512).round() / 512
    classes = shape[1]
    y = torch.randint(classes, shape[:1] + shape[2:]).to(backend.device)
    results = []
    for offset in (0, 1e4, -1e4):
        logits = (x + offset).to(backend.device).requires_grad_()
        loss = cece.cross_entropy(logits, y, reduction="none")
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), logits)[0]))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])
    careless = (x + 1e4).logsumexp(1) - (x + 1e4).gather(1, y.cpu().unsqueeze(1)).squeeze(1)
    assert not torch.allclose(careless, results[0][0].cpu(), rtol=1e-6)


@pytest.mark.parametrize("prefix", [1, 15, 47, 256, 1024, 1025, 3000, 65536, 66000, 131073])
def test_a_prefix_of_minus_infinities(backend, prefix):
    """Impossible classes, whole blocks and segments of them, before or behind the others: as if they were not there."""
    if backend.name != "cpu" and prefix > 70000:
        return
    few = torch.randn(9) * 3
    truth = F.cross_entropy(few[None].double(), torch.tensor([4]), reduction="none")
    slopes = few.double().softmax(0) - F.one_hot(torch.tensor(4), 9)
    for before in (True, False):
        none = torch.full((prefix,), -INF)
        x = torch.cat([none, few] if before else [few, none])
        at = prefix if before else 0
        pixels = torch.stack([x, x, x], 1)[None]
        for logits in (x[None], pixels):
            labels = torch.full(logits.shape[:1] + logits.shape[2:], at + 4).to(backend.device)
            logits = logits.to(backend.device).requires_grad_()
            loss = cece.cross_entropy(logits, labels, reduction="none")
            (grad,) = torch.autograd.grad(loss.sum(), logits)
            assert_as_good_as_torch(loss.detach().flatten()[:1], truth)
            g = grad[0] if grad.dim() == 2 else grad[0, :, 1]
            assert_as_good_as_torch(g[at : at + 9], slopes, scale=1.0)
            assert not torch.cat([g[:at], g[at + 9 :]]).any()


def test_a_label_of_probability_0_costs_infinitely_much(backend):
    for classes in (5, 60, 3000):
        x = torch.zeros(2, classes, device=backend.device)
        x[0, 1] = -INF
        loss = cece.cross_entropy(x, torch.tensor([1, 1], device=backend.device), reduction="none")
        assert loss[0] == INF
        torch.testing.assert_close(loss[1].item(), float(np.log(classes)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("classes", [2, 5, 40, 49, 1030])
def test_mass_on_a_class_of_probability_0_costs_infinitely_much(backend, classes):
    """Probabilities' or smoothing's, wherever the class stands among the others that cost something."""
    for at in sorted({0, classes // 2, classes - 1}):
        x = torch.randn(2, classes)
        x[1, at] = -INF
        labels = torch.full((2,), classes - 1 - at if classes - 1 - at != at else 0)
        for t, smoothing in ((torch.full((2, classes), 1 / classes), 0.0), (labels, 0.1)):
            for u, v in ((x, t), (x.t()[None].contiguous(), t.t()[None].contiguous() if t.dim() == 2 else t[None])):
                u, v = u.to(backend.device), v.to(backend.device)
                loss = cece.cross_entropy(u, v, label_smoothing=smoothing, reduction="none").flatten()
                assert loss[0].isfinite() and loss[1] == INF


@pytest.mark.parametrize("classes", [1, 2, 5, 48, 49, 1024, 1030, 65600])
def test_nan_comes_out_as_nan(backend, classes):
    """Wherever it stands; of that sample only."""
    for at in sorted({0, classes // 2, max(0, classes - 1), min(1023, classes - 1)}):
        for label in sorted({0, classes - 1, at}):
            for soft in (False, True):
                for pixels in (False, True):
                    x = torch.randn(3, classes)
                    x[1, at] = NAN
                    t = torch.tensor([0, label, 0])
                    t = F.one_hot(t, classes).float() if soft else t
                    if pixels:
                        x, t = x.t()[None].contiguous(), t.t()[None].contiguous() if soft else t[None]
                    x = x.to(backend.device).requires_grad_()
                    loss = cece.cross_entropy(x, t.to(backend.device), reduction="none")
                    (grad,) = torch.autograd.grad(loss.sum(), x)
                    assert loss.isnan().flatten().tolist() == [False, True, False]
                    grad = grad[0].t() if pixels else grad
                    assert grad[1].isnan().all() and not grad[[0, 2]].isnan().any()
                    assert cece.cross_entropy(x, t.to(backend.device)).isnan()


WITHOUT_MASS = {  # targets that expect nothing of a row of C classes
    "weight 0": lambda rows, c: (torch.full((rows,), 1), {"weight": torch.arange(c) % 2 * 0.0}),
    "smoothed, all weights 0": lambda rows, c: (
        torch.full((rows,), 1),
        {"weight": torch.zeros(c), "label_smoothing": 0.1},
    ),
    "all-zero probabilities": lambda rows, c: (torch.zeros(rows, c), {}),
    "probabilities of weight 0": lambda rows, c: (torch.ones(rows, c), {"weight": torch.zeros(c)}),
}


@pytest.mark.parametrize("pixels", [False, True], ids=["rows", "pixels"])
@pytest.mark.parametrize("classes", [5, 17, 60, 3000, 66000])
@pytest.mark.parametrize("target", WITHOUT_MASS)
def test_a_row_without_mass_hides_no_nan(backend, target, classes, pixels):
    """Loss, gradient and second derivative tell the same story: NaN of a row that is no distribution, else 0."""
    if backend.name == "emulated" and classes > 3000:
        return
    x = torch.randn(5, classes)
    x[0, classes // 2], x[1], x[2, :2], x[3, 0] = NAN, -INF, INF, INF
    t, options = WITHOUT_MASS[target](5, classes)
    if pixels:
        x, t = x.t()[None].contiguous(), t.t()[None].contiguous() if t.dim() == 2 else t[None]
    x = x.to(backend.device).requires_grad_()
    options = {k: v.to(backend.device) if k == "weight" else v for k, v in options.items()}
    loss = cece.cross_entropy(x, t.to(backend.device), **options, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((grad * torch.ones_like(grad)).sum(), x)
    assert loss.isnan().flatten().tolist() == [True, True, True, False, False]
    assert not loss.flatten()[3:].any()
    for g in (grad, second):
        g = g[0].t() if pixels else g
        assert g.isnan().any(1).tolist() == [True, True, True, False, False]
        assert g[:3].isnan().all() and not g[3:].any()


def test_a_weight_of_0_pays_for_an_infinite_binary_loss_but_hides_no_nan(backend):
    x = torch.tensor([INF, -INF, INF, NAN, 1.0], device=backend.device)
    y = torch.tensor([0.0, 1.0, 0.5, 0.0, 1.0], device=backend.device)
    for w in (torch.zeros(5, device=backend.device), torch.zeros(1, device=backend.device)):
        u = x.clone().requires_grad_()
        loss = BCE(u, y, w, reduction="none")
        (grad,) = torch.autograd.grad(loss.sum(), u)
        for v in (loss.detach(), grad):
            assert v.isnan().tolist() == [False, False, False, True, False] and not v.nan_to_num().any()
    w = torch.ones(5, device=backend.device)
    assert BCE(x, y, w, reduction="none").isposinf().tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("classes", [3, 60])
def test_all_derivatives_at_a_certainty(classes):
    """One logit of +inf: every derivative of the loss is 0, or infinite where an impossible class is expected."""
    x = torch.randn(2, classes, dtype=torch.float64)
    x[0, 1] = INF
    label, one_hot = torch.tensor([1, 1]), F.one_hot(torch.tensor([1, 1]), classes).double()
    for t in (label, one_hot):
        second = torch.func.hessian(lambda x, t=t: cece.cross_entropy(x, t, reduction="sum"))(x)
        assert not second[0].any() and second.isfinite().all() and second[1].any()
        v = torch.randn_like(x)
        third = torch.func.jvp(torch.func.hessian(lambda x, t=t: cece.cross_entropy(x, t)), (x,), (v,))[1]
        assert third.isfinite().all()
    w = torch.ones(classes, dtype=torch.float64)
    of_target, of_weight = torch.func.grad(lambda t, w: cece.cross_entropy(x[:1], t, w), (0, 1))(one_hot[:1], w)
    assert of_target[0, 1] == 0 and of_target[0, [0, *range(2, classes)]].isposinf().all()
    assert not of_weight.any()
    x[0] = torch.randn(classes)
    x[0, 2] = -INF  # an impossible class that nobody expects
    for dw in (torch.zeros_like(w), torch.ones_like(w)):
        _, change = torch.func.jvp(lambda w: cece.cross_entropy(x[:1], one_hot[:1], w), (w,), (dw,))
        assert change.isfinite()
    assert torch.func.grad(lambda w: cece.cross_entropy(x[:1], one_hot[:1], w))(w).isfinite().all()


@pytest.mark.parametrize(
    "shape", [(2, 40), (2, 100), (2, 1000), (2, 5000), (2, 70_000), (1, 40, 2), (1, 300, 2)], ids=str
)
def test_smoothing_over_the_lowest_numbers_is_finite(backend, shape):
    """A mask at finfo.min in a tenth of the classes: their share of a smoothed loss is huge, and a number."""
    low = torch.finfo(torch.float32).min
    for scale in (1.0, 0.5):
        x = torch.randn(shape)
        x[:, ::10] = low * scale
        y = torch.ones(shape[:1] + shape[2:], dtype=torch.long)
        truth = cece.reference.cross_entropy(x.double(), y, label_smoothing=0.1, reduction="none")
        u = x.to(backend.device).requires_grad_()
        loss = cece.cross_entropy(u, y.to(backend.device), label_smoothing=0.1, reduction="none")
        assert_as_good_as_torch(loss.detach(), truth)
        assert torch.autograd.grad(loss.sum(), u)[0].isfinite().all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_smoothing_does_not_drift(backend, smoothing, weighted):
    """Many rows of many equal terms: no sum of them loses what it rounds off, nor does the mass the gradient needs."""
    rows, classes = (199, 20_001) if backend.name == "emulated" else (199, 128_256)
    for x in (torch.randn(rows, classes) * 3, torch.full((rows, classes), 1.1).index_fill_(1, torch.tensor([7]), 30.3)):
        x, y = x.to(backend.device), torch.full((rows,), 5, device=backend.device)
        w = torch.ones(classes, device=backend.device) if weighted else None
        loss, stats, _ = torch.ops.cece.cross_entropy_forward(x, y, w, 0, -100, smoothing)
        # the mass is a constant where all weights are equal by being absent, else a sum of that many rounded terms
        assert (stats[2].double() - 1).abs().max() <= (4 if weighted else 1) * 2**-23
        wide = x.double().cpu()
        truth = (1 - smoothing) * (wide.logsumexp(1) - wide[:, 5]) + smoothing * (wide.logsumexp(1) - wide.mean(1))
        assert (loss.cpu().double() / truth - 1).abs().max() <= 4 * 2**-23


def test_nan_in_the_binary_losses(backend):
    x, y = torch.randn(40), torch.rand(40)
    for bad_x, bad_y in ((7, None), (None, 39), (0, 0)):
        u, v = x.clone(), y.clone()
        if bad_x is not None:
            u[bad_x] = NAN
        if bad_y is not None:
            v[bad_y] = NAN
        u = u.to(backend.device).requires_grad_()
        loss = BCE(u, v.to(backend.device), reduction="none")
        (grad,) = torch.autograd.grad(loss.sum(), u)
        expected = (u.isnan() | v.to(backend.device).isnan()).tolist()
        assert loss.isnan().tolist() == expected and grad.isnan().tolist() == expected
        assert BCE(u, v.to(backend.device)).isnan()
    for target in (0.0, 1.0):  # where the factor of one term is 0
        assert BCE(torch.tensor(NAN, device=backend.device), torch.tensor(target, device=backend.device)).isnan()


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1], ids=["positive", "negative"])
@pytest.mark.parametrize("shape", [(70, 5), (40, 21), (4, 3000), (2, 21, 70), (2, 300, 9)], ids=str)
def test_an_incoming_nan_of_any_bits_is_one_in_bfloat16(backend, shape, bits):
    """Rounded by adding to its bits it would become -0."""
    x = torch.randn(shape, dtype=torch.bfloat16, device=backend.device, requires_grad=True)
    y = torch.randint(shape[1], shape[:1] + shape[2:], device=backend.device)
    loss = cece.cross_entropy(x, y, reduction="none")
    g = torch.full(loss.shape, bits, dtype=torch.int32, device=backend.device).view(torch.float32)
    assert torch.autograd.grad(loss, x, g)[0].isnan().all()
    loss = BCE(x, torch.ones_like(x))
    assert torch.autograd.grad(loss, x, g.flatten()[0].to(loss.dtype))[0].isnan().all()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("shape", [(40, 5), (40, 60), (4, 3000), (3, 66000), (2, 21, 40), (2, 300, 9)], ids=str)
def test_an_ignored_sample_touches_nothing(backend, shape, bad):
    """Whatever is in it, and whatever gradient comes in: loss and gradient exactly 0, the others as without it."""
    classes = shape[1]
    y = torch.randint(classes, shape[:1] + shape[2:])
    y.view(-1)[1::3] = -100
    used = y != -100
    clean, dirty = torch.randn(shape), None
    dirty = clean.clone()
    dirty.movedim(1, -1)[~used] = bad
    w = torch.rand(classes) + 0.1
    for weight in (None, w):
        for smoothing in (0.0, 0.1):
            for r in ("none", "mean", "sum"):
                results = []
                for x in (clean, dirty):
                    x = x.to(backend.device).requires_grad_()
                    weight = None if weight is None else weight.to(backend.device)
                    loss = cece.cross_entropy(x, y.to(backend.device), weight, reduction=r, label_smoothing=smoothing)
                    g = torch.ones_like(loss)
                    if r == "none":
                        g[~used.to(g.device)] = bad
                    results.append((loss.detach().cpu(), torch.autograd.grad(loss, x, g)[0].cpu()))
                (loss, grad), (dirty_loss, dirty_grad) = results
                assert torch.equal(loss, dirty_loss) and torch.equal(grad, dirty_grad)
                assert loss.isfinite().all() and grad.isfinite().all()
                assert not dirty_grad.movedim(1, -1)[~used].any()
                if r == "none":
                    assert not dirty_loss[~used].any()


def test_infinite_logits_that_agree_with_the_target_cost_nothing(backend):
    """BCE: 0 where torch has NaN. Against the target they cost infinitely much."""

    def tensor(*values):
        return torch.tensor(values, device=backend.device)

    x, y = tensor(INF, -INF, INF, -INF, INF, -INF), tensor(1.0, 0.0, 0.0, 1.0, 0.5, 0.5)
    for p in (None, tensor(3.0)):
        for wide in (torch.float32, torch.float64):
            u = x.to(wide).requires_grad_()
            loss = BCE(u, y.to(wide), pos_weight=p, reduction="none")
            assert loss.tolist() == [0, 0, INF, INF, INF, INF]
            (grad,) = torch.autograd.grad(loss.sum(), u)
            k = 1.0 if p is None else 3.0
            assert grad.tolist() == [0, 0, 1, -k, 0.5, -0.5 * k]
    assert F.binary_cross_entropy_with_logits(x, y, reduction="none")[:2].isnan().any()


@pytest.mark.parametrize("classes", [2, 5, 49, 1030, 65600])
def test_one_infinite_logit_is_a_certainty(backend, classes):
    """Loss 0 and gradient 0 for its label, where torch has NaN; infinite for any other."""
    for at in (0, classes - 1):
        for soft in (False, True):
            x = torch.randn(3, classes)
            x[1, at] = INF
            for pixels in (False, True):
                t = torch.tensor([0, at, 0])
                t = F.one_hot(t, classes).float() if soft else t
                u = x
                if pixels:
                    u, t = x.t()[None].contiguous(), t.t()[None].contiguous() if soft else t[None]
                u = u.to(backend.device).requires_grad_()
                loss = cece.cross_entropy(u, t.to(backend.device), reduction="none")
                (grad,) = torch.autograd.grad(loss.sum(), u)
                assert loss.flatten()[1] == 0 and loss.isfinite().all()
                assert not (grad[0].t() if pixels else grad)[1].any()
        wrong = cece.cross_entropy(
            x.to(backend.device)[1:2], torch.tensor([1 if at == 0 else 0], device=backend.device)
        )
        assert wrong == INF
        assert F.cross_entropy(x[1:2], torch.tensor([at])).isnan()


@pytest.mark.parametrize("classes", [2, 5, 49, 1030, 65600])
def test_an_impossible_class_that_nobody_expects_costs_nothing(backend, classes):
    """Soft targets: 0 * log 0 = 0. torch has NaN."""
    x, t = torch.randn(2, classes), torch.rand(2, classes)
    x[:, 1], t[:, 1] = -INF, 0
    t /= t.sum(1, keepdim=True)
    rest = [i for i in range(classes) if i != 1]
    truth = F.cross_entropy(x[:, rest].double(), t[:, rest].double(), reduction="none")
    for pixels in (False, True):
        u, v = (x.t()[None].contiguous(), t.t()[None].contiguous()) if pixels else (x, t)
        u = u.to(backend.device).requires_grad_()
        loss = cece.cross_entropy(u, v.to(backend.device), reduction="none")
        (grad,) = torch.autograd.grad(loss.sum(), u)
        assert_as_good_as_torch(loss.detach().flatten(), truth, scale=1.0)
        assert not grad.select(1, 1).any() and grad.isfinite().all()
    assert F.cross_entropy(x, t, reduction="none").isnan().all()


def test_a_subnormal_probability_keeps_its_logarithm(backend):
    """Down to the bound of 100 nats, between 2^-144 and 2^-145; also where it is an outcome's that is not expected."""
    x = torch.tensor([2.0**-126, 1e-38, 5e-39, 1e-40, 1e-42, 2.0**-144, 2.0**-145, 2.0**-149, 0.0])
    for dtype in (torch.float32, torch.bfloat16):
        u = x.to(dtype)
        truth = -u.double().log().clamp_min(-100)
        loss = cece.binary_cross_entropy(u.to(backend.device), torch.ones_like(u).to(backend.device), reduction="none")
        assert_as_good_as_torch(loss, truth)
        loss = cece.binary_cross_entropy(u.to(backend.device), torch.zeros_like(u).to(backend.device), reduction="none")
        assert_as_good_as_torch(loss, -(-u.double()).log1p())


def test_float32_binary_loss_is_right_to_1e_6(backend):
    """2 M samples, x ~ N(0, 20^2), y within 1e-8..1 of 0 or of 1: torch's is off by more than 100 %."""
    n = 2_000_000 if backend.name == "cpu" else 200_000
    x, small = torch.randn(n) * 20, 10 ** (-8 * torch.rand(n))
    y = torch.where(torch.rand(n) < 0.5, small, 1 - small)
    truth = cece.reference.binary_cross_entropy_with_logits(x.double(), y.double(), reduction="none")

    def worst(loss):
        return ((loss.cpu().double() - truth).abs() / truth).max().item()

    ours = worst(BCE(x.to(backend.device), y.to(backend.device), reduction="none"))
    theirs = worst(F.binary_cross_entropy_with_logits(x, y, reduction="none"))
    print(f"worst relative error: cece {ours:.2g}, torch {theirs:.2g}")
    assert ours <= 1e-6
    assert theirs > 1


def test_binary_slope_is_right_to_a_few_units(backend):
    """(1 - y) sigmoid(x) - y sigmoid(-x) for y = 0 and 1, where nothing cancels: also where sigmoid(x) rounds to 1."""
    x = torch.cat([torch.randn(100_000) * 20, torch.linspace(-103, 103, 20_001)])
    for y in (0.0, 1.0):
        u = x.to(backend.device).requires_grad_()
        (grad,) = torch.autograd.grad(BCE(u, torch.full_like(u, y), reduction="sum"), u)
        truth = x.double().sigmoid() if y == 0 else -(-x.double()).sigmoid()
        assert_as_good_as_torch(grad, truth, tolerance=Tolerance(4 * 2**-23, 0, 2 * 2**-149))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_mean_over_1e7_losses(dtype):
    """Within 1e-6 of the truth. Adding them up in one float32 would be off by 10 %."""
    n = 10_000_000
    x, y = (torch.randn(n) * 3).to(dtype), torch.rand(n).to(dtype)
    truth = cece.reference.binary_cross_entropy_with_logits(x.double(), y.double())
    assert abs(BCE(x, y).double() / truth - 1) <= 1e-6
    assert abs(BCE(x, y, reduction="sum").double() / (truth * n) - 1) <= 1e-6
    p = torch.sigmoid(x)
    truth = cece.reference.binary_cross_entropy(p.double(), y.double())
    assert abs(cece.binary_cross_entropy(p, y).double() / truth - 1) <= 1e-6
    del p, y
    x = x.view(n // 2, 2)  # 5e6 samples of 2 classes
    labels = torch.randint(2, (n // 2,))
    truth = F.cross_entropy(x.double(), labels)
    assert abs(cece.cross_entropy(x, labels).double() / truth - 1) <= 1e-6


def test_a_mean_over_1e7_samples():
    """Equal losses of 0.1: a running float32 sum would stop growing."""
    x = torch.zeros(10_000_000, 1).expand(-1, 2) + torch.tensor([2.2521685, 0.0])
    truth = F.cross_entropy(x[:1].double(), torch.tensor([0]))
    assert abs(cece.cross_entropy(x, torch.zeros(len(x), dtype=torch.uint8)).double() / truth - 1) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(500, 10), (50, 500), (2, 21, 200)], ids=str)
def test_the_incoming_gradient_is_multiplied_before_rounding(backend, dtype, shape):
    """Rounded once: the correctly rounded gradient. Rounding first and scaling then would differ in many elements."""
    x, y = torch.randn(shape).to(dtype), torch.randint(shape[1], shape[:1] + shape[2:])
    u = x.to(backend.device).requires_grad_()
    scale = 0.7718
    (grad,) = torch.autograd.grad(cece.cross_entropy(u, y.to(backend.device), reduction="sum") * scale, u)
    (slope,) = torch.autograd.grad(F.cross_entropy(d := x.double().requires_grad_(), y, reduction="sum"), d)
    scale = float(np.float32(scale))
    right = (slope * scale).to(dtype)
    twice = (slope.to(dtype).double() * scale).to(dtype)
    assert (grad.cpu() == right).float().mean() > 0.998
    assert (twice == right).float().mean() < 0.9


def test_loss_scaling_saves_float16_gradients(backend):
    """Gradients of 1e-9 underflow in float16; scaled by 65536 before they are rounded they do not."""
    x, y = torch.zeros(4096, 1000, dtype=torch.float16), torch.zeros(4096, dtype=torch.long)
    if backend.name == "emulated":
        x, y = x[:200], y[:200]
    u = x.to(backend.device).requires_grad_()
    scale = 65536.0 * 200 / len(x)
    (grad,) = torch.autograd.grad(cece.cross_entropy(u, y.to(backend.device)) * scale, u)
    expected = scale / len(x) / 1000
    assert abs(grad[0, 1].item() / expected - 1) < 1e-3
    assert torch.tensor(1 / 4096 / 1000 / 64, dtype=torch.float16) == 0


# ---- determinism


def some_of_everything():
    torch.manual_seed(1)
    out = []
    cases = [(1000, 10), (300, 1000), (7, 3000), (1, 300_000), (3, 140_001), (4, 21, 50, 50), (2, 300, 50)]
    for shape in cases:
        x, y = torch.randn(shape).requires_grad_(), torch.randint(shape[1], shape[:1] + shape[2:])
        for t, s in ((y, 0.0), (y, 0.1), (torch.rand(shape), 0.1)):
            loss = cece.cross_entropy(x, t, torch.rand(shape[1]), label_smoothing=s)
            out += [loss.detach(), torch.autograd.grad(loss, x)[0]]
    for n in (10, 16_385, 1_000_003):
        x, y = torch.rand(n).requires_grad_(), torch.rand(n)
        for loss in (BCE(x, y, torch.rand(n), pos_weight=torch.rand(1)), cece.binary_cross_entropy(x, y)):
            out += [loss.detach(), torch.autograd.grad(loss, x)[0]]
    return out


def test_bit_identical_from_run_to_run_and_for_any_number_of_threads():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = some_of_everything()
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for a, b in zip(first, some_of_everything(), strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


# ---- parts


def ulp_distance(values, truth):
    """Of float32 values from float64 truth, in float32's units, which end at 2^-149."""
    spacing = np.spacing(np.maximum(np.abs(truth), 2.0**-126).astype(np.float32)).astype(np.float64)
    return np.abs(values.astype(np.float64) - truth) / spacing


def exp_inputs(n):
    uniform = torch.rand(n) * -104
    near_0 = -(2.0 ** (torch.rand(n // 4) * -40))
    ends = torch.tensor(
        [0.0, -0.0, -87.33654, -87.33655, -88.0, -103.0, -103.27893, -103.9, -104.0, -105.0, -1e30, -INF]
    )
    halves = (torch.arange(-150, 1) + 0.5) * float(np.log(2))  # where the reduction changes over
    halves = torch.cat([halves, halves.nextafter(torch.tensor(INF)), halves.nextafter(torch.tensor(-INF))]).clamp_max(0)
    return torch.cat([uniform, near_0, ends, halves])


def test_exp_is_right_to_2_ulp(backend):
    """Through the backward operator, which takes the statistics of a row: with max 0, log sum 0 and mass 1 the
    gradient p - q of any class but the label is exp(x)."""
    x = exp_inputs(1_000_000 if backend.name == "cpu" else 60_000)
    row = torch.cat([torch.zeros(1), x]).to(backend.device)
    truth = np.exp(x.numpy().astype(np.float64))
    for pixels in (False, True):
        n = x.numel()
        if pixels:  # as (1, 2, n): class 0 is the label
            logits, label = torch.stack([torch.zeros_like(row[1:]), row[1:]])[None], torch.zeros(1, n, dtype=torch.long)
            stats = torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1).expand(3, 1, n).contiguous()
        else:
            logits, label = row[None], torch.zeros(1, dtype=torch.long)
            stats = torch.tensor([0.0, 0.0, 1.0]).view(3, 1)
        one = torch.ones((), device=backend.device)
        grad = torch.ops.cece.cross_entropy_backward(
            one, logits, label.to(backend.device), None, stats.to(backend.device), one, 2, -100, 0.0
        )
        ours = grad[0, 1].cpu().numpy() if pixels else grad[0, 1:].cpu().numpy()
        worst = ulp_distance(ours, truth)
        assert worst.max() <= 2, (x[worst.argmax()].item(), ours[worst.argmax()], truth[worst.argmax()], worst.max())
        assert ours[n - 1 - 3 * 151] == 0 and (ours[x.numpy() == 0] == 1).all()


def test_expm1_is_right_to_2_and_a_half_ulp(backend):
    """The label's slope of a row with max 0, log sum 0 and mass 1 is expm1(x_y)."""
    x = exp_inputs(1_000_000 if backend.name == "cpu" else 60_000)
    x = torch.cat([x, -torch.rand(len(x) // 4)])
    truth, n = np.expm1(x.numpy().astype(np.float64)), x.numel()
    logits, label = torch.stack([x, torch.zeros_like(x)])[None].to(backend.device), torch.zeros(1, n, dtype=torch.long)
    stats = torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1).expand(3, 1, n).contiguous()
    one = torch.ones((), device=backend.device)
    grad = torch.ops.cece.cross_entropy_backward(
        one, logits, label.to(backend.device), None, stats.to(backend.device), one, 2, -100, 0.0
    )
    worst = ulp_distance(grad[0, 0].cpu().numpy(), truth)
    assert worst.max() <= 2.5, (x[worst.argmax()].item(), worst.max())


def test_softplus_of_a_negative_logit_is_right_to_4_ulp(backend):
    """log1p(exp(x)): 2 units of each. Also where exp(x) is far below 1's last bit."""
    x = exp_inputs(1_000_000 if backend.name == "cpu" else 60_000)
    loss = BCE(x.to(backend.device), torch.zeros_like(x).to(backend.device), reduction="none")
    truth = np.log1p(np.exp(x.numpy().astype(np.float64)))
    assert ulp_distance(loss.cpu().numpy(), truth).max() <= 4


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="longdouble is no wider than float64 here")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_is_right_to_8_units(backend, shape):
    """Against an 80-bit truth. torch's gradient is off by up to 1.5e-12 at 140001 classes."""
    x = torch.randn(shape, dtype=torch.float64) * 3
    dim = min(len(shape) - 1, 1)
    classes = shape[dim]
    t = torch.randint(classes, shape[:dim] + shape[dim + 1 :])
    wide = x.numpy().astype(np.longdouble)
    shifted = wide - wide.max(dim, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(dim, keepdims=True))
    for smoothing in (0.0, 0.1):
        q = F.one_hot(t, classes).movedim(-1, dim).numpy().astype(np.longdouble)
        q = (1 - np.longdouble(smoothing)) * q + np.longdouble(smoothing) / classes
        u = x.to(backend.device).requires_grad_()
        loss = cece.cross_entropy(u, t.to(backend.device), label_smoothing=smoothing, reduction="none")
        (grad,) = torch.autograd.grad(loss.sum(), u)
        p = np.exp(log_p)
        true_loss, true_grad = -(q * log_p).sum(dim), p - q
        unit = np.longdouble(8 * 2**-52)
        assert (np.abs(loss.detach().cpu().numpy() - true_loss) <= unit * true_loss).all()
        assert (np.abs(grad.cpu().numpy() - true_grad) <= unit * (p * (1 - log_p) + q)).all()


def test_no_fast_math():
    """Neither in the build's flags nor as a pragma: NaN, infinities and the order of operations are promises."""
    root = Path(__file__).resolve().parents[1]
    files = [root / "setup.py", *(f for f in (root / "csrc").rglob("*") if f.is_file())]
    assert len(files) > 10
    for f in files:
        text = f.read_text()
        found = re.findall(
            r"""["'\s(](-ffast-math|-Ofast|-f(?:unsafe|finite|associative|reciprocal)-math\S*|-?-?use_fast_math|"""
            r"""fast-math|-ftz=true|-prec-\w+=false)""",
            text,
        )
        assert not found, f"{f}: {found}"
