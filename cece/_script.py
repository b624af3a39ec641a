"""What TorchScript compiles in place of the functions in ``functional.py``.

It knows neither keyword-only arguments with defaults nor ``__torch_function__``, and checks types itself. Arguments,
their order and their defaults are the public functions' (``tests/test_signatures.py`` compares them).
"""

from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch
from torch import Tensor
from torch.nn import _reduction as _Reduction

from .ops import label_weights, used_labels

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
    token_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    skip_masked_rows: bool = False,
) -> Tensor:
    number = reduction_number("cross_entropy", size_average, reduce, reduction)
    if (
        token_weight is not None
        or normalizer is not None
        or z_loss != 0
        or logit_scale != 1
        or softcap is not None
        or skip_masked_rows
    ):
        return cross_entropy_with_options(
            input,
            target,
            weight,
            number,
            ignore_index,
            label_smoothing,
            inplace_backward,
            token_weight,
            normalizer,
            z_loss,
            logit_scale,
            softcap,
            skip_masked_rows,
        )
    return torch.ops.cece.cross_entropy_forward(
        input, target, weight, number, ignore_index, label_smoothing, inplace_backward
    )[0]


def cross_entropy_with_options(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    inplace_backward: bool,
    token_weight: Tensor | None,
    normalizer: Tensor | float | None,
    z_loss: float,
    logit_scale: float,
    softcap: float | None,
    skip_masked_rows: bool,
) -> Tensor:
    """Rows from one of the two operators; what follows is as small as the rows, and torch's to differentiate."""
    if normalizer is not None and reduction != 1:
        raise ValueError("cece.cross_entropy: normalizer is what reduction='mean' divides by, got another reduction")
    if z_loss == 0 and logit_scale == 1 and softcap is None and not skip_masked_rows:
        loss = torch.ops.cece.cross_entropy_forward(
            input, target, weight, 0 if token_weight is not None else 2, ignore_index, label_smoothing, inplace_backward
        )[0]
        if normalizer is not None and token_weight is None:
            return over(loss, normalizer)
        alive: Tensor | None = None
    else:
        cap = 0.0 if softcap is None else softcap
        loss, _, logsumexp, _, _, stats = torch.ops.cece.token_statistics_forward(
            input,
            target,
            weight,
            ignore_index,
            label_smoothing,
            logit_scale,
            cap,
            skip_masked_rows,
            5 if z_loss != 0 else 1,
        )
        if z_loss != 0:
            loss = loss + z_loss * logsumexp.square()
        alive = stats.select(0, 1) > -float("inf") if skip_masked_rows else None
    soft = target.dim() == input.dim()
    if token_weight is not None:
        loss = _weighted(loss, token_weight, None if soft else used_labels(target, ignore_index), alive)
    if reduction == 0:
        return loss
    total = loss.sum()
    if reduction == 2:
        return total
    if normalizer is not None:
        return over(total, normalizer)
    count = torch.ones_like(loss) if soft else label_weights(target, weight, ignore_index, loss.dtype)
    if alive is not None:
        count = torch.where(alive, count, 0)
    return total / count.sum()


def over(total: Tensor, normalizer: Tensor | float) -> Tensor:
    return total / normalizer.reshape(()) if isinstance(normalizer, Tensor) else total / normalizer


def _weighted(loss: Tensor, token_weight: Tensor, used: Tensor | None, alive: Tensor | None) -> Tensor:
    """What has no loss has none whatever its weight, and what has no weight costs nothing, were it impossible."""
    if token_weight.shape != loss.shape:
        raise ValueError(
            f"cece.cross_entropy: token_weight must have the shape of the samples' losses, {list(loss.shape)}, got"
            f" {list(token_weight.shape)}"
        )
    token_weight = token_weight.to(loss.dtype)
    if used is not None:
        token_weight = torch.where(used, token_weight, 0)
    if alive is not None:
        token_weight = torch.where(alive, token_weight, 0)
    return token_weight * torch.where((token_weight == 0) & loss.isinf(), 0, loss)


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
