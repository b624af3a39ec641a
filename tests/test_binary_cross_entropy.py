"""cece.binary_cross_entropy and ..._with_logits against float64 truth and torch."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, assert_as_good_as_torch, check_against_truth

import cece

WITH_LOGITS, ON_PROBABILITIES = "binary_cross_entropy_with_logits", "binary_cross_entropy"
LOSSES = [WITH_LOGITS, ON_PROBABILITIES]
# one task is 16384 elements, one vector 8 or 16: tails of both, several tasks, no dimension at all
BCE_SHAPES = [(), (1,), (7,), (33, 31), (3, 16384), (5, 9999), (2, 3, 4, 5, 6)]


def make(name, shape, dtype, target=None, weight=None, pos_weight=None):
    """weight and pos_weight: shapes; their values are of `dtype`."""
    x = (torch.randn(shape) * 3).to(dtype) if name == WITH_LOGITS else (torch.rand(shape) * 0.98 + 0.01).to(dtype)
    if target is None:
        y = torch.rand(shape).to(dtype)
    elif target.is_floating_point:
        y = torch.rand(shape).to(target)
    else:
        y = torch.randint(0, 2, shape).to(target)
    t = {"input": x.requires_grad_(), "target": y, "weight": None if weight is None else torch.rand(weight).to(dtype)}
    if name == WITH_LOGITS:
        t["pos_weight"] = None if pos_weight is None else (torch.rand(pos_weight) * 3).to(dtype)
    return t


@pytest.mark.parametrize("name", LOSSES)
def test_reference_is_torch(name):
    for shape, r in itertools.product(BCE_SHAPES, ("none", "mean", "sum")):
        t = make(name, shape, torch.float64, weight=shape[-1:], pos_weight=shape[-1:])
        ours, theirs = getattr(cece.reference, name)(**t, reduction=r), getattr(F, name)(**t, reduction=r)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", BCE_SHAPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient(backend, name, shape, dtype):
    last = shape[-1:]
    for (w, p), r in itertools.product(
        [(None, None), (last, None), (None, last), (shape, last)], ("none", "mean", "sum")
    ):
        if name == ON_PROBABILITIES and p is not None and w is None:
            continue
        t = make(name, shape, dtype, weight=w, pos_weight=p)
        check_against_truth(name, t, device=backend.device, reduction=r, what=f"{shape} {dtype} w={w} p={p}")


@pytest.mark.parametrize(
    "broadcast", [(), (1,), (5,), (4, 1), (1, 5), (3, 1, 1), (3, 4, 5), (1, 1, 1), (3, 1, 5)], ids=str
)
@pytest.mark.parametrize("which", ["weight", "pos_weight"])
def test_weights_broadcast(backend, which, broadcast):
    """Also their gradients, which are summed back to their shapes."""
    names = LOSSES if which == "weight" else [WITH_LOGITS]
    for name, r in itertools.product(names, ("none", "mean", "sum")):
        t = make(name, (3, 4, 5), torch.float32, **{which: broadcast})
        t[which].requires_grad_()
        check_against_truth(name, t, device=backend.device, reduction=r)


@pytest.mark.parametrize("wanted", [w for n in (1, 2, 3, 4) for w in itertools.combinations(range(4), n)], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_only_requested_gradients(backend, name, wanted):
    """Any subset of (input, target, weight, pos_weight) may require a gradient."""
    if name == ON_PROBABILITIES and 3 in wanted:
        wanted = tuple(i for i in wanted if i != 3) or (0,)
    for dtype, r in itertools.product((torch.float64, torch.float32), ("none", "mean", "sum")):
        t = make(name, (6, 5), dtype, weight=(5,), pos_weight=(6, 1))
        for i, k in enumerate(t):
            t[k] = t[k].detach().requires_grad_(i in wanted)
        assert len(check_against_truth(name, t, device=backend.device, reduction=r)) == 1 + len(wanted)


@pytest.mark.parametrize(
    "target", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_bool_and_integer_targets(backend, name, dtype, target):
    """They mean what the same float targets mean, bit for bit, also where there is a vector tail."""
    for shape, r in itertools.product([(37, 41), (16391,)], ("none", "mean")):
        t = make(name, shape, dtype, target=target, weight=shape[-1:], pos_weight=shape[-1:])
        t = {k: None if v is None else v.detach().to(backend.device) for k, v in t.items()}
        x = t["input"].requires_grad_()
        results = []
        for y in (t["target"], t["target"].to(dtype)):
            loss = getattr(cece, name)(**(t | {"target": y}), reduction=r)
            results.append((loss.detach(), torch.autograd.grad(loss.sum(), x)[0]))
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
        assert 0.4 < t["target"].float().mean() < 0.6


def test_integer_truths_of_any_size(backend):
    """Some ways to make floats of eight int64 take 32 bits of each."""
    y = torch.tensor([0, 1, 2**31, -(2**31), 2**31 - 1, 2**33, -(2**40), 2**62 + 1] * 3, device=backend.device)
    x = torch.full((24,), 0.5, device=backend.device)
    for shift in range(8):
        truth = y.roll(shift)
        ours = cece.binary_cross_entropy_with_logits(x, truth, reduction="none")
        assert torch.equal(ours, cece.binary_cross_entropy_with_logits(x, truth.float(), reduction="none"))


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("truth", [None, torch.bool], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_lengths(name, dtype, truth, masked):
    """Of what a loop takes at once and more or less, beside elements that would show: x is NaN there."""
    for n in (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 129, 511, 513, 1023, 1025, 1087, 2063):
        beside = make(name, (n + 64,), dtype, target=truth)
        x, y = beside["input"].detach(), beside["target"]
        mask = torch.rand(n + 64) < 0.7
        x[n:] = float("nan")
        more = {"mask": mask[:n]} if masked and name == WITH_LOGITS else {}
        a = x[:n].requires_grad_()
        loss = getattr(cece, name)(a, y[:n], reduction="sum", **more)
        (grad,) = torch.autograd.grad(loss, a)
        used = mask[:n] if more else torch.ones(n, dtype=torch.bool)
        b, t = x[:n].detach().double()[used].requires_grad_(), y[:n].double()[used]
        truth_loss = getattr(F, name)(b, t, reduction="sum")
        torch.testing.assert_close(loss.double(), truth_loss, rtol=3e-7, atol=0)
        (expected,) = torch.autograd.grad(truth_loss, b)
        rtol = 2e-6 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(grad[used].double(), expected, rtol=rtol, atol=1e-6)
        assert not grad[~used].any()


@pytest.mark.parametrize("x", [0.0, 1e-4, -1e-4, 0.3, -5.0, 20.0, -46.0, 88.0, 1e4, float("inf"), float("-inf")])
def test_a_sum_of_the_same(x):
    """What is rounded goes the same way each time, and a product of many is far from 1."""
    for dtype, n in itertools.product((torch.float32, torch.float64), (1, 63, 5000)):
        for y in (0.0, 0.25, 1.0):
            if abs(x) == float("inf") and y != (x > 0):
                continue
            given = torch.full((n,), x, dtype=dtype), torch.full((n,), y, dtype=dtype)
            loss = cece.binary_cross_entropy_with_logits(*given, reduction="sum")
            z = given[0][0].double()
            one = z.abs().neg().exp().log1p() + (abs(x) * (y if x < 0 else 1 - y) if abs(x) < 1e9 else 0)
            torch.testing.assert_close(loss.double(), n * one, rtol=4e-7 if dtype == torch.float32 else 1e-14, atol=0)


@pytest.mark.parametrize("other", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_mixed_dtypes(backend, name, dtype, other):
    """Targets, weights and pos_weights of another float dtype; the result is float64 if one of the first three is."""
    for k in ("target", "weight", "pos_weight"):
        t = make(name, (19, 23), dtype, weight=(23,), pos_weight=(23,))
        if k not in t:
            continue
        t[k] = t[k].to(other)
        if k == "pos_weight" and other == torch.float64:
            t[k] = t[k].float().double()  # it is rounded to the dtype that sums are formed in
        ours = check_against_truth(name, t, device=backend.device, what=f"{k} {other}")
        wide = dtype == torch.float64 or (other == torch.float64 and k != "pos_weight")
        assert ours["loss"].dtype == (torch.float64 if wide else torch.float32)
        assert ours["input"].dtype == dtype


@pytest.mark.parametrize("name", LOSSES)
def test_empty(backend, name):
    for shape, r in itertools.product([(0,), (0, 5), (3, 0, 2)], ("none", "mean", "sum")):
        t = {
            k: None if v is None else v.detach().to(backend.device) for k, v in make(name, shape, torch.float32).items()
        }
        x = t["input"].requires_grad_()
        ours, theirs = (getattr(m, name)(**t, reduction=r) for m in (cece, F))
        assert ours.shape == theirs.shape
        assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.nan_to_num(), theirs.nan_to_num())
        assert torch.autograd.grad(ours.sum(), x)[0].shape == shape


@pytest.mark.parametrize("name", LOSSES)
def test_targets_outside_the_unit_interval(backend, name):
    """With logits any target is taken, as by torch; on probabilities none."""
    t = make(name, (9, 7), torch.float32)
    t["target"] = torch.randn(9, 7) * 3
    if name == WITH_LOGITS:
        loss = cece.binary_cross_entropy_with_logits(
            t["input"].to(backend.device), t["target"].to(backend.device), reduction="none"
        )
        truth = cece.reference.binary_cross_entropy_with_logits(
            t["input"].double(), t["target"].double(), reduction="none"
        )
        x, y = t["input"].double(), t["target"].double()
        parts = (1 - y).abs() * F.softplus(x) + y.abs() * F.softplus(-x)
        assert_as_good_as_torch(loss.detach(), truth.detach(), scale=parts.detach())
    elif backend.name == "cpu":
        with pytest.raises(RuntimeError, match="target should be between 0 and 1"):
            cece.binary_cross_entropy(t["input"], t["target"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_probabilities_of_0_and_1(backend, dtype):
    """Each logarithm ends at -100, the slope's denominator at 1e-12, as in torch."""
    x = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1e-30, 1e-44], dtype=dtype, device=backend.device).requires_grad_()
    y = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.5, 0.5, 1.0, 0.25], dtype=dtype, device=backend.device)
    ours, theirs = (m.binary_cross_entropy(x, y, reduction="none") for m in (cece, F))
    torch.testing.assert_close(ours, theirs)
    assert ours.tolist()[:4] == [0, 0, 100, 100]
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), x), torch.autograd.grad(theirs.sum(), x))


# around where float32 rounds 1 - x, where the logarithm's table changes over, and where torch's -100 begins
EDGES = [
    0,
    1,
    1e-45,
    3.7e-44,
    3.9e-44,
    1e-38,
    1e-30,
    2**-25,
    2**-24,
    1e-7,
    1e-3,
    0.0625,
    0.25,
    0.3,
    0.4999,
    0.5,
    0.5001,
]
EDGES += [0.75, 0.7501, 0.9375, 0.999, 1 - 2**-23, 1 - 2**-24]


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_outcomes_beside_probabilities(backend, reduction):
    """Truths of 0 and 1 take one logarithm on a CPU wherever a vector has no others: with one other at every place."""
    x = torch.cat([torch.tensor(EDGES), torch.rand(84 - len(EDGES))])[torch.randperm(84)]
    wide = x.double()
    for other in [None, *range(0, 84, 1 if backend.name == "cpu" else 20)]:
        y = torch.randint(2, (84,)).float()
        if other is not None:
            y[other] = torch.rand(())
        ours = cece.binary_cross_entropy(x.to(backend.device), y.to(backend.device), reduction=reduction)
        truth = -y.double() * wide.log().clamp_min(-100) - (1 - y.double()) * (-wide).log1p().clamp_min(-100)
        assert_as_good_as_torch(ours, truth if reduction == "none" else truth.sum())


@pytest.mark.parametrize("near", [1.0, 0.5, 2**-3, 2**-6, 2**-12, 2**-23])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_many_outcomes(backend, dtype, near):
    """Many go into one logarithm on a CPU, unless one of them is nearly impossible; the product may be near 1."""
    for n in (64, 128, 300, 3000):
        for least in (1e-4, 1e-7):
            y = torch.randint(2, (n,)).to(dtype)
            p = (1 - near * torch.rand(n)).clamp_min(least).to(dtype)
            x = torch.where(y == 1, p, 1 - p)
            x[n // 2] = 1 - near / 2 if y[n // 2] == 1 else near / 2
            wide = x.double()
            truth = torch.where(y == 1, -wide.log(), -(-wide).log1p()).clamp_max(100).sum()
            ours = cece.binary_cross_entropy(x.to(backend.device), y.to(backend.device), reduction="sum")
            assert_as_good_as_torch(ours, truth)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", ["input", "target"])
def test_which_probability_is_none(which, dtype):
    """The first of them, at any place of a vector and in its tail. -0 is one."""
    n = 140  # more than go into one logarithm
    good = {"input": (torch.rand(n) * 0.9 + 0.05).to(dtype), "target": torch.randint(2, (n,)).to(dtype)}
    signed = {name: t.clone() for name, t in good.items()}
    signed["input"][::9] = signed["target"][::7] = -0.0  # looked at one by one, as what is beside them is then
    cece.binary_cross_entropy(**signed)
    nan = torch.tensor(float("nan"), dtype=dtype)
    none = [-1e-30, 1.01, float("inf"), -float("inf"), nan, -nan]
    for place in range(n):
        wrong = {name: t.clone() for name, t in good.items()}
        wrong[which][place : place + 2] = none[place % len(none)]
        with pytest.raises(RuntimeError, match=rf"got {which}\[{place}\] = "):
            cece.binary_cross_entropy(**wrong)


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_is_modified(backend, name):
    t = make(name, (33, 31), torch.float32, weight=(31,), pos_weight=(31,))
    t = {k: v.detach().to(backend.device) for k, v in t.items()}
    before = {k: (v.clone(), v._version) for k, v in t.items()}
    x = t["input"].requires_grad_()
    loss = getattr(cece, name)(**t, reduction="none")
    grad = torch.randn_like(loss)
    kept = grad.clone()
    first, second = torch.autograd.grad(loss, x, grad, retain_graph=True)[0], torch.autograd.grad(loss, x, grad)[0]
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()
    assert torch.equal(grad, kept) and grad._version == 0
    for k, (value, version) in before.items():
        assert torch.equal(t[k], value) and t[k]._version == version, k


def test_two_class_softmax_is_the_sigmoid():
    """cross_entropy of (0, x) is binary_cross_entropy_with_logits of x."""
    x, y = torch.randn(1000, dtype=torch.float64) * 5, torch.randint(0, 2, (1000,))
    two = cece.cross_entropy(torch.stack([torch.zeros_like(x), x], 1), y, reduction="none")
    torch.testing.assert_close(two, cece.binary_cross_entropy_with_logits(x, y, reduction="none"), rtol=1e-14, atol=0)
