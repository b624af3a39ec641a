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
    labels = None if target.dim() == input.dim() else target
    counts: Tensor | None = None
    if reduction == 1 and normalizer is None and labels is not None:
        counts = label_weights(labels, weight, ignore_index, loss.dtype)
    return of_rows(loss, labels, ignore_index, reduction, token_weight, normalizer, counts, alive)


def of_rows(
    loss: Tensor,
    labels: Tensor | None,
    ignore_index: int,
    reduction: int,
    token_weight: Tensor | None,
    normalizer: Tensor | float | None,
    counts: Tensor | None,
    alive: Tensor | None,
) -> Tensor:
    """The rows' losses weighed and reduced. counts: what a mean divides by is their sum; None: the number of rows."""
    if token_weight is not None:
        used = None if labels is None else used_labels(labels, ignore_index)
        loss = _weighted("cross_entropy", loss, token_weight, used, alive)
    if reduction == 0:
        return loss
    total = loss.sum()
    if reduction == 2:
        return total
    if normalizer is not None:
        return over(total, normalizer)
    if counts is None:
        counts = torch.ones_like(loss)
    if alive is not None:
        counts = torch.where(alive, counts, 0)
    return total / counts.sum()


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


def elementwise(
    loss: str,
    kind: int,
    own: list[float],
    reduction: int,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    label_smoothing: float,
    mask: Tensor | None,
    ignore_index: int | None,
    normalizer: Tensor | float | None,
    mean_dim: int | None,
) -> Tensor:
    """An elementwise loss of a dense truth with all the options that one may have."""
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"cece.{loss}: label_smoothing must be between 0.0 and 1.0, got {label_smoothing}")
    if ignore_index is not None:
        if target.is_floating_point() or target.dtype == torch.bool:
            raise ValueError(f"cece.{loss}: ignore_index is for integer truths, got target of dtype {target.dtype}")
        used = target != ignore_index
        mask = used if mask is None else mask & used
    keep, spread = 1.0 - label_smoothing, 0.5 * label_smoothing
    return normalized(
        loss, reduction, input, target, weight, pos_weight, kind, mask, [keep, spread] + own, None, None, normalizer,
        mean_dim,
    )  # fmt: skip


def normalized(
    loss: str,
    reduction: int,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    kind: int,
    mask: Tensor | None,
    parameters: list[float],
    offsets: Tensor | None,
    padding: int | None,
    normalizer: Tensor | float | None,
    mean_dim: int | None,
) -> Tensor:
    """The operator's sum, divided by what a mean divides by, or its other reductions."""
    forward = torch.ops.cece.binary_cross_entropy_forward
    if normalizer is not None or mean_dim is not None:
        if reduction != 1:
            raise ValueError(f"cece.{loss}: normalizer and mean_dim are for reduction 'mean'")
        if normalizer is not None and mean_dim is not None:
            raise ValueError(f"cece.{loss}: normalizer and mean_dim must not be given both")
    if mean_dim is not None and mask is not None:  # each mean has a count of its own
        wide = input.dtype == torch.float64 or (weight is not None and weight.dtype == torch.float64)
        used = mask.expand(input.shape).to(torch.float64 if wide else torch.float32).sum(mean_dim, keepdim=True)
        share = 1 / used.clamp_min(1)
        weight = share if weight is None else share * weight
        return forward(input, target, weight, pos_weight, kind, 2, mask, parameters, offsets, padding)
    if mask is not None and reduction == 1 and normalizer is None:
        both = forward(input, target, weight, pos_weight, kind, 3, mask, parameters, offsets, padding)
        return both[0] / both[1]
    number = 2 if normalizer is not None or mean_dim is not None else reduction
    total = forward(input, target, weight, pos_weight, kind, number, mask, parameters, offsets, padding)
    if mean_dim is not None:
        return total / input.size(mean_dim)
    return total if normalizer is None else over(total, normalizer)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
    ignore_index: int | None = None,
    normalizer: Tensor | float | None = None,
    mean_dim: int | None = None,
    poly: float = 0.0,
) -> Tensor:
    number = reduction_number("binary_cross_entropy_with_logits", size_average, reduce, reduction)
    kind, own = (1, [0.0, 0.0, 0.0, 0.0]) if poly == 0 else (2, [1.0, 1.0, 0.0, poly])
    return elementwise(
        "binary_cross_entropy_with_logits", kind, own, number, input, target, weight, pos_weight, label_smoothing, mask,
        ignore_index, normalizer, mean_dim,
    )  # fmt: skip


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    number = reduction_number("binary_cross_entropy", size_average, reduce, reduction)
    return torch.ops.cece.binary_cross_entropy_forward(input, target, weight, None, 0, number)


def sigmoid_focal_loss(
    input: Tensor,
    target: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    poly: float = 0.0,
    mask: Tensor | None = None,
    ignore_index: int | None = None,
    normalizer: Tensor | float | None = None,
    mean_dim: int | None = None,
) -> Tensor:
    number = reduction_number("sigmoid_focal_loss", None, None, reduction)
    return elementwise(
        "sigmoid_focal_loss", 2, focal_parameters(alpha, gamma, poly), number, input, target, weight, None,
        label_smoothing, mask, ignore_index, normalizer, mean_dim,
    )  # fmt: skip


def asymmetric_loss(
    input: Tensor,
    target: Tensor,
    gamma_neg: float = 4.0,
    gamma_pos: float = 1.0,
    clip: float = 0.05,
    reduction: str = "sum",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
    ignore_index: int | None = None,
    normalizer: Tensor | float | None = None,
    mean_dim: int | None = None,
) -> Tensor:
    number = reduction_number("asymmetric_loss", None, None, reduction)
    return elementwise(
        "asymmetric_loss", 3, asymmetric_parameters(gamma_pos, gamma_neg, clip), number, input, target, weight, None,
        label_smoothing, mask, ignore_index, normalizer, mean_dim,
    )  # fmt: skip


def multilabel_cross_entropy(
    input: Tensor,
    labels: Tensor,
    offsets: Tensor | None = None,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    mean_dim: int | None = None,
) -> Tensor:
    if not 0 <= label_smoothing <= 1:
        raise ValueError(
            f"cece.multilabel_cross_entropy: label_smoothing must be between 0.0 and 1.0, got {label_smoothing}"
        )
    number = reduction_number("multilabel_cross_entropy", None, None, reduction)
    if offsets is None and labels.dim() == 1:  # one label a sample
        labels = labels.unsqueeze(1)
    spread = label_smoothing / max(1, input.size(-1)) if input.dim() > 0 else 0.0
    parameters = [1.0 - label_smoothing, spread]
    return normalized(
        "multilabel_cross_entropy", number, input, labels, weight, pos_weight, 1, mask, parameters, offsets,
        ignore_index, normalizer, mean_dim,
    )  # fmt: skip


def pairwise_sigmoid_loss(
    input: Tensor,
    other: Tensor | None = None,
    scale: Tensor | float | None = None,
    bias: Tensor | float | None = None,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
) -> Tensor:
    if input.dim() != 2 or (other is not None and (other.dim() != 2 or other.size(1) != input.size(1))):
        shapes = f"{list(input.shape)}" if other is None else f"{list(input.shape)} and {list(other.shape)}"
        raise ValueError(
            f"cece.pairwise_sigmoid_loss: input must be logits (N, M), or input (N, D) and other (M, D), got {shapes}"
        )
    number = reduction_number("pairwise_sigmoid_loss", None, None, reduction)
    if isinstance(scale, Tensor):  # of the embeddings, which are fewer than the pairs
        input = input * scale
    elif scale is not None:
        input = input * scale
    logits = input if other is None else input @ other.t()
    if isinstance(bias, Tensor):
        logits = logits + bias
    elif bias is not None:
        logits = logits + bias
    rows = logits.size(0)
    if rows > logits.size(1):
        raise ValueError(
            f"cece.pairwise_sigmoid_loss: each of N rows must have a match among M columns, got {list(logits.shape)}"
        )
    diagonal = torch.arange(rows, device=logits.device).unsqueeze(1)
    divisor = normalizer
    if number == 1 and normalizer is None:
        divisor = float(rows)
    return normalized(
        "pairwise_sigmoid_loss", number, logits, diagonal, None, None, 1, None, [1.0, 0.0], None, -1, divisor, None
    )


def softmax_focal_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    gamma: float = 2.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    poly: float = 0.0,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    check_exponent("softmax_focal_loss", "gamma", gamma)
    number = reduction_number("softmax_focal_loss", None, None, reduction)
    if normalizer is not None and number != 1:
        raise ValueError("cece.softmax_focal_loss: normalizer is for reduction 'mean'")
    if target.is_floating_point():
        raise ValueError(
            f"cece.softmax_focal_loss: target must be class indices of an integer dtype, got {target.dtype}"
        )
    nll = torch.ops.cece.cross_entropy_forward(input, target, None, 0, ignore_index, 0.0, False)[0]
    # 1 - p = -expm1(-nll). Where nll is 0, so is the loss and its gradient, but that of a power below 1 is not finite;
    # where p is 0, nothing is left of its derivative, which must not be multiplied by an infinite nll.
    fine = nll != 0
    least = torch.where(fine, nll, 1.0)
    missed = -torch.expm1(-least.clamp_max(746.0 if nll.dtype == torch.float64 else 104.0))
    loss = least + poly * missed
    if gamma != 0:
        loss = missed**gamma * loss
        loss = torch.where(fine, loss, 0.0)
    else:
        loss = nll + poly * torch.where(fine, missed, 0.0)
    used = target.long() != ignore_index
    factor = used.to(loss.dtype)
    if weight is not None:
        factor = torch.where(used, weight.to(loss.dtype)[target.long().clamp(0, weight.size(0) - 1)], 0.0)
        loss = torch.where(used, loss * factor, 0.0)
    if number == 0:
        return loss
    total = loss.sum()
    if number == 2:
        return total
    if normalizer is None:
        return total / factor.sum()
    if isinstance(normalizer, Tensor):
        return total / normalizer.to(total.dtype)
    return total / normalizer


# The losses' own parameters as their structs in csrc/numerics.h take them.


def focal_parameters(alpha: float, gamma: float, poly: float) -> list[float]:
    if not (0 <= alpha <= 1 or alpha == -1):
        raise ValueError(f"cece.sigmoid_focal_loss: alpha must be between 0.0 and 1.0, or -1 for none, got {alpha}")
    check_exponent("sigmoid_focal_loss", "gamma", gamma)
    positive, negative = (alpha, 1.0 - alpha) if alpha >= 0 else (1.0, 1.0)
    return [positive, negative, gamma, poly]


def asymmetric_parameters(gamma_pos: float, gamma_neg: float, clip: float) -> list[float]:
    check_exponent("asymmetric_loss", "gamma_neg", gamma_neg)
    check_exponent("asymmetric_loss", "gamma_pos", gamma_pos)
    if not 0 <= clip < 1:
        raise ValueError(f"cece.asymmetric_loss: clip must be at least 0.0 and below 1.0, got {clip}")
    return [gamma_pos, gamma_neg, clip, 0.0]


def check_exponent(loss: str, name: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise ValueError(f"cece.{loss}: {name} must be at least 0.0, got {value}")


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


def one_thread_sums(rows: Tensor) -> bool:
    """Whether torch, too, sums them up in an order that does not depend on the number of threads."""
    if not torch.jit.is_scripting():  # a constant there, so what follows is left out
        if not torch.compiler.is_compiling():
            return rows.numel() <= 32768
    return False


def sum_in_order(rows: Tensor) -> Tensor:
    """The sum, in an order that the number of rows alone decides: torch's own depends on the number of threads."""
    if one_thread_sums(rows):
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
    if reduction == "mean" and mask is None and normalizer is None and one_thread_sums(rows):
        return rows.mean(dtype=torch.float64).to(rows.dtype)  # a node of the graph less
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
    if logits.dim() < 2 or dim % logits.dim() == 1:  # a view of it would be a node of the graph, too
        return logits
    return logits.movedim(dim, 1)


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
