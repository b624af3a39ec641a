"""What TorchScript compiles in place of the functions in ``functional.py``.

It knows neither keyword-only arguments with defaults nor ``__torch_function__``, and checks types itself. Arguments,
their order and their defaults are the public functions' (``tests/test_signatures.py`` compares them).
"""

from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch
from torch import Tensor
from torch.nn import _reduction as _Reduction

_F = TypeVar("_F", bound=Callable[..., object])


def scripted_as(twin: Callable[..., object]) -> Callable[[_F], _F]:
    """torch.jit.script of the decorated function compiles the twin, wherever it meets the function."""

    def mark(function: _F) -> _F:
        setattr(function, "__prepare_scriptable__", lambda: twin)  # noqa: B010, a function has no such attribute
        return function

    return mark


def constant_when_compiled(function: _F) -> _F:
    """torch.compile calls the function while it traces and takes what it returns for a constant.

    What torch.compiler.assume_constant_result does, which takes a second to import all of torch.compile.
    """
    setattr(function, "_dynamo_marked_constant", True)  # noqa: B010, a function has no such attribute
    return function


def check_reduction(loss: str, reduction: str) -> None:
    if not isinstance(reduction, str) or reduction not in ["mean", "sum", "none", "elementwise_mean"]:
        if torch.jit.is_scripting():
            raise ValueError(f"cece.{loss}: reduction must be 'none', 'mean' or 'sum', got '{reduction}'")
        else:
            _refuse_reduction(loss, reduction)


def _refuse_reduction(loss: str, reduction: object) -> NoReturn:
    wanted = f"cece.{loss}: reduction must be 'none', 'mean' or 'sum', got"
    if hasattr(reduction, "__array__"):  # a tensor: its numbers would say less than what it is
        raise TypeError(f"{wanted} {type(reduction).__name__}")
    raise ValueError(f"{wanted} {reduction!r}")


def reduction_number(loss: str, size_average: bool | None, reduce: bool | None, reduction: str) -> int:
    """torch's number of a reduction: 0 none, 1 mean, 2 sum. Its deprecated names are torch's to read and to warn of."""
    if size_average is not None or reduce is not None:
        return _legacy_number(size_average, reduce)
    check_reduction(loss, reduction)
    return _Reduction.get_enum(reduction)


@constant_when_compiled
def _legacy_number(size_average: bool | None, reduce: bool | None) -> int:
    return _Reduction.legacy_get_enum(size_average, reduce)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    inplace_backward: bool = False,
) -> Tensor:
    number = reduction_number("cross_entropy", size_average, reduce, reduction)
    return torch.ops.cece.cross_entropy_forward(
        input, target, weight, number, ignore_index, label_smoothing, inplace_backward
    )[0]


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    number = reduction_number("binary_cross_entropy_with_logits", size_average, reduce, reduction)
    return torch.ops.cece.binary_cross_entropy_forward(input, target, weight, pos_weight, True, number)


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    number = reduction_number("binary_cross_entropy", size_average, reduce, reduction)
    return torch.ops.cece.binary_cross_entropy_forward(input, target, weight, None, False, number)


def check_targets(target: Tensor, num_classes: int, ignore_index: int = -100) -> None:
    bad = ((target < 0) | (target >= num_classes)) & (target != ignore_index)
    if bool(bad.any()):
        where: list[int] = bad.nonzero()[0].tolist()
        value, count = int(target[bad][0].item()), int(bad.sum().item())
        raise IndexError(
            f"cece.check_targets: Target {value} is out of bounds: target{where} must be in [0, {num_classes}) or equal"
            f" ignore_index ({ignore_index}), got {value}; {count} of {target.numel()} targets are"
        )
