"""Bad input: the error's type, and a message that names the argument, what it must be and what it got.

Then hypothesis: whatever comes, cece agrees with torch in float64 or both refuse.
"""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, vmap

import cece

CE, BCE, PROBS = cece.cross_entropy, cece.binary_cross_entropy_with_logits, cece.binary_cross_entropy


def x(*shape, dtype=torch.float32):
    return torch.rand(shape).to(dtype)


def y(*values):
    return torch.tensor(values)


def bad(i, value, n=6):
    labels = torch.zeros(n, dtype=torch.long)
    labels[i] = value
    return labels


# call -> type, and pieces of the message in order
ERRORS = {
    "label too large": (
        lambda: CE(x(6, 5), bad(4, 5)),
        IndexError,
        "cece.cross_entropy: Target 5 is out of bounds",
        "target[4] must be in [0, 5)",
        "got 5",
    ),
    "label negative": (
        lambda: CE(x(6, 5), bad(0, -1)),
        IndexError,
        "Target -1 is out of bounds",
        "target[0]",
        "got -1",
    ),
    "label far out": (
        lambda: CE(x(6, 5), bad(0, 2**40)),
        IndexError,
        f"Target {2**40} is out of bounds",
        f"got {2**40}",
    ),
    "label whose low bits are one": (
        lambda: CE(x(6, 5), bad(1, 2**32 + 1)),
        IndexError,
        "target[1]",
        f"got {2**32 + 1}",
    ),
    "label in a wide row": (
        lambda: CE(x(6, 3000), bad(5, 3000)),
        IndexError,
        "target[5] must be in [0, 3000)",
        "got 3000",
    ),
    "label of a row in segments": (lambda: CE(x(1, 70000), y(70000)), IndexError, "target[0] must be in [0, 70000)"),
    "label at a pixel": (
        lambda: CE(x(2, 3, 4, 5), bad(25, 7, 40).view(2, 4, 5)),
        IndexError,
        "target[1, 1, 0] must be in [0, 3)",
        "got 7",
    ),
    "the first of several labels": (lambda: CE(x(6, 5), y(0, 9, 0, 8, 7, 0)), IndexError, "target[1]", "got 9"),
    "label without a batch": (lambda: CE(x(5), torch.tensor(5)), IndexError, "Target 5 is out of bounds"),
    "ignore_index is not the label's": (
        lambda: CE(x(6, 5), bad(2, -100), ignore_index=-1),
        IndexError,
        "target[2]",
        "ignore_index (-1)",
        "got -100",
    ),
    "uint8 label": (lambda: CE(x(6, 5), bad(3, 255).byte()), IndexError, "target[3]", "got 255"),
    "smoothed and weighted": (
        lambda: CE(x(6, 5), bad(3, 5), x(5), label_smoothing=0.1),
        IndexError,
        "target[3]",
        "got 5",
    ),
    "input of integers": (
        lambda: CE(torch.zeros(6, 5, dtype=torch.long), bad(0, 0)),
        RuntimeError,
        "cece.cross_entropy: input must be float64, float32, float16 or bfloat16, got Long",
    ),
    "input complex": (
        lambda: CE(torch.zeros(6, 5, dtype=torch.cfloat), bad(0, 0)),
        RuntimeError,
        "input must be float64",
        "got ComplexFloat",
    ),
    "input without classes": (
        lambda: CE(torch.tensor(1.0), torch.tensor(0)),
        RuntimeError,
        "cece.cross_entropy: input must have shape (C), (N, C)",
        "got []",
    ),
    "input no tensor": (
        lambda: CE([1.0, 2.0], torch.tensor(0)),
        TypeError,
        "cece.cross_entropy: input must be a torch.Tensor, got list",
    ),
    "target no tensor": (
        lambda: CE(x(6, 5), 3),
        TypeError,
        "cece.cross_entropy: target must be a torch.Tensor, got int",
    ),
    "float labels": (
        lambda: CE(x(6, 5), x(6)),
        RuntimeError,
        "cece.cross_entropy: expected target dtype to be Long or Byte (or Int)",
        "got Float",
    ),
    "bool labels": (
        lambda: CE(x(6, 5), torch.zeros(6, dtype=torch.bool)),
        RuntimeError,
        "expected target dtype",
        "got Bool",
    ),
    "integer probabilities": (
        lambda: CE(x(6, 5), torch.zeros(6, 5, dtype=torch.long)),
        RuntimeError,
        "Expected floating point type for target with class probabilities",
        "got Long",
    ),
    "batch sizes": (
        lambda: CE(x(6, 5), bad(0, 0, 7)),
        ValueError,
        "cece.cross_entropy: Expected input batch_size (6) to match target batch_size (7)",
        "input is [6, 5]",
        "shape [6]",
        "got [7]",
    ),
    "pixels": (
        lambda: CE(x(2, 5, 4), torch.zeros(2, 3, dtype=torch.long)),
        RuntimeError,
        "Expected target size [2, 4] for class indices or [2, 5, 4] for probabilities, got [2, 3]",
    ),
    "probabilities of another shape": (
        lambda: CE(x(6, 5), x(6, 4)),
        RuntimeError,
        "Expected target size [6] for class indices or [6, 5] for probabilities, got [6, 4]",
    ),
    "weight too short": (
        lambda: CE(x(6, 5), bad(0, 0), x(4)),
        RuntimeError,
        "cece.cross_entropy: weight tensor should be defined either for all 5 classes",
        "weight tensor of shape [4]",
    ),
    "weight 2-d": (
        lambda: CE(x(6, 5), bad(0, 0), x(1, 5)),
        RuntimeError,
        "weight tensor should be defined",
        "shape [1, 5]",
    ),
    "weight of integers": (
        lambda: CE(x(6, 5), bad(0, 0), torch.ones(5, dtype=torch.long)),
        RuntimeError,
        "cece.cross_entropy: weight must be float64",
        "got Long",
    ),
    "smoothing above 1": (
        lambda: CE(x(6, 5), bad(0, 0), label_smoothing=1.01),
        RuntimeError,
        "cece.cross_entropy: label_smoothing must be between 0.0 and 1.0, got 1.01",
    ),
    "smoothing below 0": (
        lambda: CE(x(6, 5), bad(0, 0), label_smoothing=-0.5),
        RuntimeError,
        "label_smoothing must be between 0.0 and 1.0, got -0.5",
    ),
    "smoothing NaN": (
        lambda: CE(x(6, 5), bad(0, 0), label_smoothing=float("nan")),
        RuntimeError,
        "label_smoothing must be between 0.0 and 1.0, got nan",
    ),
    "ignore_index with probabilities": (
        lambda: CE(x(6, 5), x(6, 5), ignore_index=1),
        RuntimeError,
        "cece.cross_entropy: ignore_index is not supported for floating point target",
        "got 1",
    ),
    "target elsewhere": (
        lambda: CE(x(6, 5), bad(0, 0).to("meta")),
        RuntimeError,
        "cece.cross_entropy: target must be on input's device cpu, got meta",
    ),
    "weight elsewhere": (
        lambda: CE(x(6, 5), bad(0, 0), x(5).to("meta")),
        RuntimeError,
        "cece.cross_entropy: weight must be on input's device cpu, got meta",
    ),
    "BCE: shapes": (
        lambda: BCE(x(6, 5), x(6)),
        ValueError,
        "cece.binary_cross_entropy_with_logits: Target size ([6])",
        "must be the same as input size ([6, 5])",
    ),
    "BCE: same number of elements": (
        lambda: BCE(x(6, 5), x(5, 6)),
        ValueError,
        "Target size ([5, 6]) must be the same as input size ([6, 5])",
    ),
    "BCE: input of integers": (
        lambda: BCE(torch.zeros(6, dtype=torch.long), x(6)),
        RuntimeError,
        "cece.binary_cross_entropy_with_logits: input must be float64",
        "got Long",
    ),
    "BCE: complex target": (
        lambda: BCE(x(6), torch.zeros(6, dtype=torch.cfloat)),
        RuntimeError,
        "target must be a float, integer or bool tensor, got ComplexFloat",
    ),
    "BCE: weight": (
        lambda: BCE(x(6, 5), x(6, 5), x(4)),
        RuntimeError,
        "cece.binary_cross_entropy_with_logits: weight",
        "must be broadcastable to input's shape [6, 5], got [4]",
    ),
    "BCE: weight larger than input": (
        lambda: BCE(x(6, 5), x(6, 5), x(2, 6, 5)),
        RuntimeError,
        "weight must be broadcastable to input's shape [6, 5], got [2, 6, 5]",
    ),
    "BCE: weight of integers": (
        lambda: BCE(x(6), x(6), torch.ones(6, dtype=torch.long)),
        RuntimeError,
        "weight must be float64",
        "got Long",
    ),
    "BCE: pos_weight": (
        lambda: BCE(x(6, 5), x(6, 5), pos_weight=x(6)),
        RuntimeError,
        "cece.binary_cross_entropy_with_logits: pos_weight",
        "must be broadcastable to input's shape [6, 5], got [6]",
    ),
    "BCE: target no tensor": (
        lambda: BCE(x(6), 1.0),
        TypeError,
        "cece.binary_cross_entropy_with_logits: target must be a torch.Tensor, got float",
    ),
    "BCE: target elsewhere": (
        lambda: BCE(x(6), x(6).to("meta")),
        RuntimeError,
        "target must be on input's device cpu, got meta",
    ),
    "probability above 1": (
        lambda: PROBS(torch.tensor([0.5, 1.5]), x(2)),
        RuntimeError,
        "cece.binary_cross_entropy: all elements of input should be between 0 and 1",
        "got input[1] = 1.5",
        "applies no sigmoid",
    ),
    "probability below 0": (
        lambda: PROBS(torch.tensor([[0.5, 0.5], [-0.25, 2.0]]), x(2, 2)),
        RuntimeError,
        "got input[1, 0] = -0.25",
    ),
    "probability NaN": (
        lambda: PROBS(torch.tensor([0.5, float("nan")]), x(2)),
        RuntimeError,
        "input should be between 0 and 1, got input[1] = nan",
    ),
    "target above 1": (
        lambda: PROBS(x(2), torch.tensor([0.5, 2.0])),
        RuntimeError,
        "all elements of target should be between 0 and 1, got target[1] = 2",
    ),
    "integer target above 1": (lambda: PROBS(x(2), torch.tensor([1, 2])), RuntimeError, "got target[1] = 2"),
    "PROBS: shapes": (
        lambda: PROBS(x(6, 1), x(6)),
        ValueError,
        "cece.binary_cross_entropy: Target size ([6]) must be the same as input size ([6, 1])",
    ),
    "check_targets": (
        lambda: cece.check_targets(bad(4, 9), 5),
        IndexError,
        "cece.check_targets: Target 9 is out of bounds: target[4] must be in [0, 5)",
        "got 9; 1 of 6",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    call, kind, *pieces = ERRORS[case]
    with pytest.raises(kind, match=".*".join(re.escape(p) for p in pieces)) as e:
        call()
    assert type(e.value) is kind  # IndexError and not a relative of it


# What a tensor holds, not what it is.
OF_DATA = [k for k, (_, kind, *pieces) in ERRORS.items() if kind is IndexError or k.startswith("probability ")]
OF_DATA += ["target above 1", "integer target above 1"]


def on_meta(call):
    with torch.device("meta"):
        call()


def on_fakes(call):
    with FakeTensorMode():
        call()


@pytest.mark.parametrize("mode", [on_meta, on_fakes])
@pytest.mark.parametrize("case", [k for k in ERRORS if k not in OF_DATA and "elsewhere" not in k])
def test_errors_without_data(case, mode):
    """What is wrong with a shape, dtype or option is said where only those are known, in the same words."""
    call, kind, *pieces = ERRORS[case]
    with pytest.raises(kind, match=".*".join(re.escape(p) for p in pieces)) as e:
        mode(call)
    assert type(e.value) is kind


@pytest.mark.parametrize("mode", [on_meta, on_fakes])
def test_the_same_calls_right_are_taken_without_data(mode):
    def right():
        for logits, labels in ((x(6, 5), bad(0, 0)), (x(5), torch.tensor(0)), (x(2, 5, 4), bad(0, 0, 8).view(2, 4))):
            CE(logits, labels, x(5))
            CE(logits, logits, label_smoothing=0.1)
            BCE(logits, logits > 0.5, x(1), pos_weight=x(logits.shape[-1]))
            PROBS(logits, logits)

    mode(right)


@pytest.mark.parametrize("mode", [lambda call: call(), on_meta, on_fakes], ids=["real", "meta", "fake"])
def test_a_backward_that_is_not_the_forwards_is_refused(mode):
    """Called by hand, the operators take nothing that would make a kernel read beyond what it was given."""
    backward, binary = torch.ops.cece.cross_entropy_backward, torch.ops.cece.binary_cross_entropy_backward

    def ce(grad=(), stats=(3, 6), total=(), reduction=1):
        backward(x(*grad), x(6, 5), torch.zeros(6).long(), None, x(*stats), x(*total), reduction, -100, 0.0)

    def bce(grad, reduction):
        binary(x(*grad), x(6, 5), x(6, 5), None, None, True, reduction)

    mode(ce)
    mode(lambda: ce((6,), reduction=0))
    mode(lambda: bce((), 1))
    wrong = {
        "grad must have the shape of the loss, got [6]": lambda: ce((6,)),
        "grad must have the shape of the loss, got []": lambda: ce(reduction=0),
        "stats and total_weight must be the forward's, got shapes [3, 5] and []": lambda: ce(stats=(3, 5)),
        "stats and total_weight must be the forward's, got shapes [3, 6] and [6]": lambda: ce(total=(6,)),
        "_backward: grad must have the shape of the loss, got [5]": lambda: bce((5,), 0),
    }
    for message, call in wrong.items():
        with pytest.raises(RuntimeError, match=re.escape(message)):
            mode(call)


def test_fakes_of_different_devices_are_told_apart():
    """In our words, also where a tensor without dimensions is one that torch would take from anywhere."""
    with FakeTensorMode():
        logits, labels = torch.empty(6, 5, device="cuda"), torch.zeros(6, dtype=torch.long)
        for call in (
            lambda: CE(logits, labels),
            lambda: CE(torch.empty(5, device="cuda"), torch.tensor(0)),
            lambda: BCE(torch.empty((), device="cuda"), torch.tensor(0.5)),
        ):
            with pytest.raises(RuntimeError, match="target must be on input's device cuda:0, got cpu"):
                call()
        with pytest.raises(RuntimeError, match="pos_weight must be on input's device cuda:0, got cpu"):
            BCE(logits, logits, pos_weight=torch.tensor(2.0))


# a batch of three of what one call takes -> what eager says of one
UNDER_VMAP = {
    "batch sizes": (CE, lambda: (x(3, 4, 5), torch.zeros(3, 7, dtype=torch.long))),
    "no dimension for one label": (CE, lambda: (x(3, 1, 5), torch.zeros(3, dtype=torch.long))),
    "one label too many": (CE, lambda: (x(3, 5), torch.zeros(3, 1, dtype=torch.long))),
    "pixels": (CE, lambda: (x(3, 2, 5, 4), torch.zeros(3, 2, 3, dtype=torch.long))),
    "weight": (CE, lambda: (x(3, 4, 5), torch.zeros(3, 4, dtype=torch.long), x(3, 6))),
    "BCE of another rank": (BCE, lambda: (x(3, 4, 5), x(3, 5))),
    "BCE of broadcastable shape": (BCE, lambda: (x(3, 4, 5), x(3, 1, 5))),
    "BCE weight of a larger rank": (BCE, lambda: (x(3, 5), x(3, 5), x(3, 4, 5))),
    "probabilities of another rank": (PROBS, lambda: (x(3, 4, 5), x(3, 4))),
}


@pytest.mark.parametrize("case", UNDER_VMAP)
def test_errors_under_vmap(case):
    loss, make = UNDER_VMAP[case]
    args = make()
    with pytest.raises((ValueError, RuntimeError)) as eager:
        loss(*(a[0] for a in args))
    for call in (vmap(loss), vmap(grad(loss)), torch.compile(vmap(loss), backend="eager", dynamic=False)):
        with pytest.raises(Exception, match=re.escape(str(eager.value).split("\n")[0])):
            call(*args)
    on_last = [a.movedim(0, -1) for a in args]
    with pytest.raises(type(eager.value), match=re.escape(str(eager.value).split("\n")[0])):
        vmap(loss, in_dims=-1)(*on_last)


def test_a_bad_label_under_vmap_is_named_by_its_own_index():
    labels = torch.zeros(3, 4, dtype=torch.long)
    labels[1, 2] = 9
    with pytest.raises(IndexError, match=r"Target 9 is out of bounds: target\[1, 2\] must be in \[0, 5\)"):
        vmap(CE)(x(3, 4, 5), labels)
    with pytest.raises(IndexError, match=r"target\[1, 2\]"):
        vmap(CE, in_dims=(2, 1))(x(4, 5, 3), labels.t())
    with pytest.raises(IndexError, match=r"target\[1, 2\]"):
        vmap(vmap(CE))(x(3, 4, 5), labels)
    pixels = torch.zeros(3, 2, 4, 4, dtype=torch.long)
    pixels[2, 1, 0, 3] = -1
    with pytest.raises(IndexError, match=r"target\[2, 1, 0, 3\]"):
        vmap(CE)(x(3, 2, 5, 4, 4), pixels)


def test_a_batch_of_size_0():
    """The shapes that torch's losses have there, gradients too."""
    cases = [
        (CE, F.cross_entropy, (x(0, 4, 5), torch.zeros(0, 4, dtype=torch.long))),
        (CE, F.cross_entropy, (x(0, 4, 5, 2), x(0, 4, 5, 2))),
        (BCE, F.binary_cross_entropy_with_logits, (x(0, 4, 5), x(0, 4, 5))),
        (PROBS, F.binary_cross_entropy, (x(0, 4, 5), x(0, 4, 5))),
    ]
    for ours, theirs, args in cases:
        for r in ("none", "mean", "sum"):
            values = [vmap(lambda *a, f=f, r=r: f(*a, reduction=r))(*args) for f in (ours, theirs)]
            assert values[0].shape == values[1].shape
        assert vmap(grad(ours))(*args).shape == args[0].shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_value_just_out_of_range_shows_it(dtype):
    """1.0000001 does not read as 1."""
    above = torch.tensor(1.0, dtype=dtype).nextafter(torch.tensor(2.0, dtype=dtype))
    shown = {torch.float32: "1.0000001", torch.float64: "1.0000000000000002"}[dtype]
    half = torch.tensor([0.5], dtype=dtype)
    with pytest.raises(RuntimeError, match=re.escape(f"input[0] = {shown};")):
        PROBS(above[None], half)
    with pytest.raises(RuntimeError, match=re.escape(f"target[0] = {shown}") + "$"):
        PROBS(half, above[None])
    with pytest.raises(RuntimeError, match="got -4.94e-324|got -4.9406"):
        CE(x(6, 5), bad(0, 0), label_smoothing=-5e-324)
    with pytest.raises(RuntimeError, match="got 1.0000000000000002"):
        CE(x(6, 5), bad(0, 0), label_smoothing=1 + 2**-52)


@pytest.mark.parametrize("reduction", ["average", "Mean", "", None, 1, ["mean"]], ids=repr)
@pytest.mark.parametrize("loss", [CE, BCE, PROBS], ids=lambda f: f.__name__)
def test_an_unknown_reduction(loss, reduction):
    target = bad(0, 0) if loss is CE else x(6, 5)
    message = f"cece.{loss.__name__}: reduction must be 'none', 'mean' or 'sum', got {reduction!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        loss(x(6, 5), target, reduction=reduction)


# ---- arguments of the wrong type

FULL = {CE: bad(0, 0), BCE: torch.rand(6, 5), PROBS: torch.rand(6, 5)}  # a target each
A_TENSOR, A_WEIGHT, AN_INT, A_FLOAT = "a torch.Tensor", "a torch.Tensor or None", "an int", "a float"
WEIGHTS = [[1.0, 1.0], (1.0,), 2.0, np.float64(2), np.ones(5), True, "a"]
WRONG_TYPES = {  # argument: functions, what it must be, what it is not
    "target": ([CE, BCE, PROBS], A_TENSOR, [None, 3, [0] * 6, np.zeros(6)]),
    "weight": ([CE, BCE, PROBS], A_WEIGHT, WEIGHTS),
    "pos_weight": ([BCE], A_WEIGHT, WEIGHTS),
    "ignore_index": ([CE], AN_INT, [None, 3.0, "3", [3], True, np.float64(3), np.bool_(1), np.array([3]), x(1), x(2)]),
    "label_smoothing": (
        [CE],
        A_FLOAT,
        [None, "0.1", [0.1], 1j, np.array([0.1]), x(1), torch.tensor(0.1, requires_grad=True)],
    ),
    "inplace_backward": ([CE], "a bool", [None, 3, "yes", 1.0, torch.tensor(True)]),
    "reduction": ([CE, BCE, PROBS], "'none', 'mean' or 'sum'", [torch.tensor(1), np.zeros(3)]),
}


@pytest.mark.parametrize(
    "name, loss, wanted, value",
    [(name, f, wanted, v) for name, (fs, wanted, values) in WRONG_TYPES.items() for f in fs for v in values],
    ids=lambda v: "tensor" if isinstance(v, torch.Tensor) else getattr(v, "__name__", str(v)[:20]),
)
def test_a_wrong_type_is_named_in_one_line(name, loss, wanted, value):
    with pytest.raises(TypeError) as e:
        loss(x(6, 5), **{"target": FULL[loss], name: value})
    assert str(e.value) == f"cece.{loss.__name__}: {name} must be {wanted}, got {type(value).__name__}"


@pytest.mark.parametrize("loss", FULL, ids=lambda f: f.__name__)
def test_an_input_of_the_wrong_type(loss):
    for value in (None, 3.0, [1.0], np.zeros((6, 5))):
        with pytest.raises(TypeError) as e:
            loss(value, FULL[loss])
        assert str(e.value) == f"cece.{loss.__name__}: input must be a torch.Tensor, got {type(value).__name__}"


def test_check_targets_wants_integers():
    for options in ({"num_classes": 5.0}, {"num_classes": None}, {"num_classes": 5, "ignore_index": "3"}):
        with pytest.raises(TypeError, match="cece.check_targets: .* must be an int, got (float|NoneType|str)$"):
            cece.check_targets(bad(0, 0), **options)


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 2**70])
def test_an_ignore_index_beyond_64_bits(value):
    with pytest.raises(ValueError, match=f"^cece.cross_entropy: ignore_index must fit into 64 bits, got {value}$"):
        CE(x(6, 5), bad(0, 0), ignore_index=value)
    CE(x(6, 5), bad(0, 0), ignore_index=2**63 - 1)
    CE(x(6, 5), bad(0, 0), ignore_index=-(2**63))


NUMBERS = {  # whatever torch takes for a number
    "ignore_index": [3, np.int64(3), np.int32(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor([3])],
    "label_smoothing": [0, 1, True, 0.1, np.int64(1), np.float32(0.1), np.float64(0.1), np.float16(0.1), np.bool_(1)]
    + [torch.tensor(0.1), torch.tensor(0.1, dtype=torch.float64), torch.tensor(1)],
}


@pytest.mark.parametrize("name, value", [(name, v) for name, vs in NUMBERS.items() for v in vs], ids=repr)
def test_what_behaves_as_a_number_is_one(name, value):
    logits, labels = x(6, 5), torch.tensor([0, 1, 2, 3, 4, 3])
    torch.testing.assert_close(CE(logits, labels, **{name: value}), F.cross_entropy(logits, labels, **{name: value}))


def test_check_targets_accepts_what_the_losses_do():
    cece.check_targets(bad(4, -100), 5)
    cece.check_targets(bad(4, 7), 5, ignore_index=7)
    cece.check_targets(torch.zeros(0, dtype=torch.long), 5)
    cece.check_targets(bad(4, 4).byte(), 5)


def test_a_bad_label_on_a_gpu_is_a_nan(backend):
    """No wait, no dead context: that sample's loss and gradient are NaN, no other's. On the CPU: IndexError."""
    if backend.name == "cpu":
        with pytest.raises(IndexError):
            CE(x(6, 5), bad(2, 5))
        return
    for classes in (5, 100, 3000):
        logits = torch.randn(6, classes, device=backend.device).requires_grad_()
        loss = CE(logits, bad(2, classes).to(backend.device), reduction="none")
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        assert loss.isnan().tolist() == grad.isnan().all(1).tolist() == [False, False, True, False, False, False]
        assert grad.isnan().any(1).sum() == 1


def test_an_error_leaves_nothing_behind():
    """The same tensors, corrected, work; no state of a failed call is kept."""
    logits, labels = x(600, 50).requires_grad_(), bad(300, 77, 600)
    for _ in range(3):
        with pytest.raises(IndexError, match="target\\[300\\]"):
            CE(logits, labels)
    labels[300] = 7
    torch.testing.assert_close(CE(logits, labels), F.cross_entropy(logits, labels))


def test_the_smallest_bad_position_is_named_whatever_the_threads():
    before = torch.get_num_threads()
    logits, labels = x(20_000, 60), torch.zeros(20_000, dtype=torch.long)
    labels[3000:] = 60
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with pytest.raises(IndexError, match=r"target\[3000\]"):
                CE(logits, labels)
            p = torch.full((200_000,), 0.5)
            p[70_000:] = 2
            with pytest.raises(RuntimeError, match=r"input\[70000\] = 2"):
                PROBS(p, p)
    finally:
        torch.set_num_threads(before)


# ---- hypothesis

FLOATS = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])
SIZES = st.sampled_from([1, 2, 3, 5, 8, 17])
RELATIVE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@st.composite
def strided(draw, shape):
    """How to lay a tensor of that shape out: a permutation of its dimensions, steps and an offset."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 2])) for _ in shape]
    offset = draw(st.sampled_from([0, 0, 1, 3]))

    def lay(t):
        sizes = [shape[d] * steps[d] for d in order]
        n = 1
        for s in sizes:
            n *= s
        memory = torch.zeros(n + offset, dtype=t.dtype)[offset:].view(sizes)
        view = memory[tuple(slice(None, None, steps[d]) for d in order)]
        view = view.permute([list(order).index(d) for d in range(len(shape))]) if shape else view
        view.copy_(t)
        return view

    return lay


def both_or_neither(ours, theirs, tolerance):
    """Runs both; the errors must come together, else the results must agree."""
    results = []
    for call in (ours, theirs):
        try:
            results.append(call())
        except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError) as e:
            results.append(e)
    a, b = results
    if isinstance(a, Exception) or isinstance(b, Exception):
        assert isinstance(a, Exception) and isinstance(b, Exception), f"ours: {a!r}; torch's: {b!r}"
        assert "cece" in str(a) and "INTERNAL ASSERT" not in str(a), a
        return
    for u, v in zip(a, b, strict=True):
        assert u.shape == v.shape
        torch.testing.assert_close(u.double(), v.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


def run(loss, logits, *args, **options):
    logits = logits.detach().requires_grad_()
    value = loss(logits, *args, **options)
    return value.detach(), torch.autograd.grad(value.sum(), logits)[0]


@settings(max_examples=200)
@given(data=st.data())
def test_fuzz_cross_entropy(data):
    draw = data.draw
    shape = draw(st.lists(SIZES, min_size=1, max_size=4), "input's shape")
    if draw(st.integers(0, 15)) == 0:
        shape[draw(st.integers(0, len(shape) - 1))] = draw(st.sampled_from([0, 1100, 66000 if len(shape) == 1 else 70]))
    dtype, soft = draw(FLOATS), draw(st.booleans())
    dim = min(len(shape) - 1, 1)
    classes, rows = shape[dim], shape[:dim] + shape[dim + 1 :]
    if classes == 0 or len(shape) != 1 and 0 in shape[1:] and shape[0] == 0:
        return
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    logits = draw(strided(shape))((torch.randn(shape, generator=generator) * 3).to(dtype))
    if soft:
        target = torch.rand(shape, generator=generator).to(draw(FLOATS))
    else:
        low, high = draw(st.sampled_from([(0, 0), (0, 0), (0, 0), (-1, 0), (0, 1)]), "labels out of range")
        target = torch.randint(low, classes + high, rows, generator=generator)
        kind = draw(
            st.sampled_from([torch.int64] * 3 + [torch.int32, torch.int16, torch.uint8, torch.float32, torch.bool])
        )
        target = target.to(kind) if kind != torch.uint8 else target.clamp(0, 255).to(kind)
    if draw(st.integers(0, 9)) == 0:
        target = target[..., :-1] if target.dim() else target[None]
    elif target.dim():
        target = draw(strided(list(target.shape)))(target)
    weight = torch.rand(draw(st.sampled_from([classes] * 6 + [classes + 1])), generator=generator)
    weight = draw(st.sampled_from([None, weight, weight.double()]))
    options = {
        "ignore_index": draw(st.sampled_from([-100, -100, -1, 0, 3])),
        "reduction": draw(st.sampled_from(["none", "mean", "sum", "other"] if draw(st.booleans()) else ["mean"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 1.0, 1.5])),  # below 0 torch raises nothing
    }
    wide = target.double() if target.is_floating_point() and target.shape == logits.shape else target
    wide = wide.long() if wide.dtype in (torch.int32, torch.int16, torch.uint8) else wide  # torch takes fewer
    both_or_neither(
        lambda: run(CE, logits, target, weight, **options),
        lambda: run(F.cross_entropy, logits.double(), wide, None if weight is None else weight.double(), **options),
        RELATIVE[dtype],
    )


@settings(max_examples=200)
@given(data=st.data())
def test_fuzz_binary_cross_entropy(data):
    draw = data.draw
    shape = draw(st.lists(SIZES, min_size=0, max_size=4), "input's shape")
    if shape and draw(st.integers(0, 15)) == 0:
        shape[draw(st.integers(0, len(shape) - 1))] = draw(st.sampled_from([0, 1100, 33000 if len(shape) == 1 else 70]))
    dtype, logits = draw(FLOATS), draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    values = torch.rand(shape, generator=generator)
    if logits or draw(st.integers(0, 9)) == 0:
        values = (values - 0.4) * 20
    if dtype == torch.float16 and not logits:
        values = values.clamp(-1, 0.99) if values.max() <= 1 else values  # 1 - x is compared in float64
    inputs = draw(strided(shape))(values.to(dtype))
    target = torch.rand(shape, generator=generator)
    kind = draw(st.sampled_from([torch.float32, dtype, torch.float64, torch.bool, torch.uint8, torch.int64]))
    target = draw(strided(shape))((target if kind.is_floating_point else target.round()).to(kind))
    if draw(st.integers(0, 9)) == 0:
        target = target[..., :-1] if target.dim() else target[None]

    def factor():
        sizes = [draw(st.sampled_from([s, s, s, 1])) for s in shape[draw(st.integers(0, len(shape))) if shape else 0 :]]
        if sizes and draw(st.integers(0, 9)) == 0:
            sizes[-1] += 1
        return draw(st.sampled_from([None, torch.rand(sizes, generator=generator) + 0.1]))

    options = {
        "reduction": draw(st.sampled_from(["none", "mean", "sum", "other"] if draw(st.booleans()) else ["mean"]))
    }
    weight, name = factor(), "binary_cross_entropy_with_logits" if logits else "binary_cross_entropy"
    wide = dict(options)
    if logits:
        options["pos_weight"] = factor()
        wide["pos_weight"] = None if options["pos_weight"] is None else options["pos_weight"].double()
    both_or_neither(
        lambda: run(getattr(cece, name), inputs, target, weight, **options),
        lambda: run(
            getattr(F, name), inputs.double(), target.double(), None if weight is None else weight.double(), **wide
        ),
        RELATIVE[dtype],
    )
