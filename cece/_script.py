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
        used = None if soft else used_labels(target, ignore_index)
        loss = _weighted("cross_entropy", loss, token_weight, used, alive)
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


def _weighted(name: str, loss: Tensor, token_weight: Tensor, used: Tensor | None, alive: Tensor | None) -> Tensor:
    """What has no loss has none whatever its weight, and what has no weight costs nothing, were it impossible."""
    if token_weight.shape != loss.shape:
        raise ValueError(
            f"cece.{name}: token_weight must have the shape of the samples' losses, {list(loss.shape)}, got"
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


# ---- divergences of two rows: what is here is the functions' own body, too (divergence.py)


def check_choice(loss: str, name: str, value: str, choices: list[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        wanted = "', '".join(choices)
        raise ValueError(f"cece.{loss}: {name} must be one of '{wanted}', got '{value}'")


def sum_in_order(rows: Tensor) -> Tensor:
    """The sum, in an order that the number of rows alone decides: torch's own depends on the number of threads."""
    if not torch.jit.is_scripting():  # a constant there, so what follows is left out
        if not torch.compiler.is_compiling() and rows.numel() <= 32768:  # torch takes one thread
            return rows.sum(dtype=torch.float64).to(rows.dtype)
    flat = rows.flatten()
    blocks = (flat.numel() + 1023) // 1024
    padded = torch.nn.functional.pad(flat, [0, blocks * 1024 - flat.numel()])
    return padded.reshape(blocks, 1024).sum(1, dtype=torch.float64).sum().to(rows.dtype)


def reduce_rows(
    loss: str,
    rows: Tensor,
    reduction: str,
    mask: Tensor | None,
    token_weight: Tensor | None,
    normalizer: Tensor | float | None,
) -> Tensor:
    """Rows' values, 0 where masked, times their weights and reduced."""
    check_choice(loss, "reduction", reduction, ["none", "mean", "batchmean", "sum"])
    if normalizer is not None and reduction != "mean":
        raise ValueError(f"cece.{loss}: normalizer is what 'mean' divides by, got it with reduction '{reduction}'")
    if token_weight is not None:
        rows = _weighted(loss, rows, token_weight, mask, None)
    if reduction == "none":
        return rows
    total = sum_in_order(rows)
    if reduction == "sum":
        return total
    if reduction == "batchmean":
        return total / (rows.shape[0] if rows.dim() > 0 else 1)
    if normalizer is not None:
        return over(total, normalizer)
    return total / rows.numel() if mask is None else total / mask.sum()


def classes_second(logits: Tensor, dim: int) -> Tensor:
    """logits as the operators take them: classes in dimension 1, wherever there is another."""
    return logits.movedim(dim, 1) if logits.dim() > 1 else logits


def kl_divergence(
    logits: Tensor,
    target_logits: Tensor,
    temperature: float = 1.0,
    reduction: str = "mean",
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    target_indices: Tensor | None = None,
    tail: str = "lump",
    dim: int = 1,
) -> Tensor:
    logits, target_logits = classes_second(logits, dim), classes_second(target_logits, dim)
    if target_indices is not None:
        target_indices = classes_second(target_indices, dim)
    if target_indices is None:
        rows = torch.ops.cece.divergence_forward(logits, target_logits, mask, temperature, False)[0]
    else:
        rows = top_k_divergence(logits, target_logits, target_indices, mask, temperature, tail)
    return reduce_rows("kl_divergence", rows, reduction, mask, token_weight, normalizer)


def js_divergence(
    logits: Tensor,
    other_logits: Tensor,
    temperature: float = 1.0,
    reduction: str = "mean",
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    dim: int = 1,
) -> Tensor:
    logits, other_logits = classes_second(logits, dim), classes_second(other_logits, dim)
    rows = torch.ops.cece.divergence_forward(logits, other_logits, mask, temperature, True)[0]
    return reduce_rows("js_divergence", rows, reduction, mask, token_weight, normalizer)


def top_k_divergence(
    logits: Tensor, values: Tensor, indices: Tensor, mask: Tensor | None, temperature: float, tail: str
) -> Tensor:
    """KL(q || p) a row where log q is known at some classes. By the chain rule of divergences: what the k classes
    differ in among themselves, and what they and all others differ in as wholes. Nothing here cancels."""
    check_choice("kl_divergence", "tail", tail, ["lump", "renormalize", "ignore"])
    if not temperature > 0.0:
        raise ValueError(f"cece.kl_divergence: temperature must be a finite number above 0, got {temperature}")
    dim = 0 if logits.dim() == 1 else 1
    fits = values.shape == indices.shape and values.dim() == logits.dim() and logits.dim() > 0
    for d in range(logits.dim()):
        fits = fits and (d == dim or values.shape[d] == logits.shape[d])
    if not fits:
        raise ValueError(
            f"cece.kl_divergence: target_logits and target_indices must both have logits' shape {list(logits.shape)}"
            f" with K classes for its C, got {list(values.shape)} and {list(indices.shape)}"
        )
    if indices.dtype != torch.int64:
        raise RuntimeError(f"cece.kl_divergence: target_indices must be int64, got {indices.dtype}")
    wide = logits.dtype == torch.float64 or values.dtype == torch.float64
    x = logits.to(torch.float64 if wide else torch.float32)
    log_q = values.to(x.dtype)
    if mask is not None:
        out = (~mask).unsqueeze(dim)
        x, log_q, indices = x.masked_fill(out, 0.0), log_q.masked_fill(out, 0.0), indices.masked_fill(out, 0)
    x_k = x.gather(dim, indices)
    if tail != "renormalize":
        log_q = log_q * temperature  # which divides them again
    among = torch.ops.cece.divergence_forward(x_k, log_q, mask, temperature, False)[0]
    x_k, log_q, x = x_k / temperature, log_q / temperature, x / temperature
    # how much less all others have than the k: log(others / k)
    if values.shape[dim] < logits.shape[dim]:
        others = x.scatter(dim, indices, -float("inf")).logsumexp(dim)
        margin = others - x_k.logsumexp(dim)
    else:
        margin = torch.full_like(among, -float("inf"))
    if mask is not None:
        margin = margin.masked_fill(~mask, 0.0)
    minus_log_p = torch.nn.functional.softplus(margin)  # of all k
    log_mass = log_q.logsumexp(dim).clamp_max(0.0)
    if tail == "renormalize":
        rows = among + minus_log_p
    elif tail == "ignore":
        rows = log_mass.exp() * (among + minus_log_p + log_mass)
    else:
        rest = -torch.expm1(log_mass)
        some = (rest > 0) & (margin > -float("inf"))
        log_rest = torch.where(some, torch.where(some, rest, 1.0).log(), -float("inf"))
        ours, theirs = torch.stack([torch.zeros_like(margin), margin], 1), torch.stack([log_mass, log_rest], 1)
        as_wholes = torch.ops.cece.divergence_forward(ours, theirs, mask, 1.0, False)[0]
        rows = log_mass.exp() * among + as_wholes
    return rows if mask is None else rows.masked_fill(~mask, 0.0)
