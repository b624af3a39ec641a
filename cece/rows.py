"""What a row of logits says beside its cross-entropy: log-probability, entropy and more, in one pass each way."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ._arguments import as_bool, as_float, as_integer, check_tensors, not_for_dtensors
from .ops import TOKEN_STATISTICS, WANTED

__all__ = ["TokenStatistics", "entropy", "token_statistics"]


class TokenStatistics(NamedTuple):
    """What :func:`token_statistics` returns: each of the rows' shape, or None where it was not asked for."""

    log_prob: Tensor | None = None
    entropy: Tensor | None = None
    logsumexp: Tensor | None = None
    collision: Tensor | None = None
    argmax: Tensor | None = None


def token_statistics(
    logits: Tensor,
    target: Tensor | None = None,
    *,
    log_prob: bool | None = None,
    entropy: bool = False,
    logsumexp: bool = False,
    collision: bool = False,
    argmax: bool = False,
    temperature: float = 1.0,
    ignore_index: int = -100,
    dim: int = -1,
) -> TokenStatistics:
    """Statistics of every row ``p = softmax(logits / temperature)``, in one pass over the logits and one for gradients.

    For reinforcement learning, distillation and monitoring. Nothing of the logits' size is held but the gradient, and
    tiny values keep their bits: an entropy or ``-log_prob`` of 1e-12 is right to some units of the last place.

    Args:
        logits: any shape, classes in dimension `dim`; float64, float32, float16 or bfloat16; any strides, no copy.
        target: class indices, logits' shape without `dim`; an integer dtype. Needed for log_prob. Rows whose target is
            `ignore_index` have 0 in all statistics, and no gradient.
        log_prob: ``log p[target]``, which is minus the cross-entropy. None: wherever there is a target.
        entropy: ``-sum_j p_j log p_j`` in nats.
        logsumexp: ``log sum_j exp(logits_j / temperature)``; -inf for a row of -inf.
        collision: ``sum_j p_j ** 2``, the probability that two draws agree.
        argmax: the index of the largest logit, int64: the first NaN or maximum, as :func:`torch.argmax`. No gradient.
        temperature: a positive number.
        ignore_index: as in :func:`cross_entropy`.
        dim: the dimension of the classes.

    Returns:
        A :class:`TokenStatistics` of logits' shape without `dim`; float32, or float64 if logits are. What was not asked
        for is None. A row of -inf, or with a NaN or two infinities, is NaN.

    Raises:
        IndexError: a label out of range, by position and value (CUDA: that row is NaN); a dim out of range.
        ValueError: nothing asked for, log_prob without a target, target's shape, or a temperature not positive.
        RuntimeError: a dtype or device that does not fit.
        TypeError: an argument of the wrong type.

    Source: Cover, Thomas, Elements of Information Theory (2006), 2.1; collision: Rényi (1961).
    """
    if has_torch_function_variadic(logits, target):
        return handle_torch_function(
            token_statistics,
            (logits, target),
            logits,
            target,
            log_prob=log_prob,
            entropy=entropy,
            logsumexp=logsumexp,
            collision=collision,
            argmax=argmax,
            temperature=temperature,
            ignore_index=ignore_index,
            dim=dim,
        )
    name = "token_statistics"
    check_tensors(name, {"logits": logits}, {"target": target})
    not_for_dtensors(name, logits, target)
    dim, ignore_index = as_integer(name, "dim", dim), as_integer(name, "ignore_index", ignore_index)
    temperature = as_float(name, "temperature", temperature)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"cece.{name}: temperature must be a positive number, got {temperature}")
    if log_prob is None:
        log_prob = target is not None
    asked = {"log_prob": log_prob, "entropy": entropy, "logsumexp": logsumexp, "collision": collision, "argmax": argmax}
    wanted = sum(WANTED[key] for key, value in asked.items() if as_bool(name, key, value))
    if not wanted:
        raise ValueError(f"cece.{name}: ask for at least one of {', '.join(asked)}")
    if log_prob and target is None:
        raise ValueError(f"cece.{name}: log_prob needs a target, got None")
    rows, shape = _classes_second(name, logits, dim)
    if target is not None and target.shape != shape:
        raise ValueError(f"cece.{name}: target must have shape {tuple(shape)}, got {tuple(target.shape)}")
    *values, _ = TOKEN_STATISTICS(rows, target, None, ignore_index, 0.0, 1 / temperature, 0.0, False, wanted)
    if log_prob:
        values[0] = -values[0]
    return TokenStatistics(*(v if asked[key] else None for key, v in zip(asked, values, strict=True)))


def entropy(logits: Tensor, *, temperature: float = 1.0, dim: int = -1) -> Tensor:
    """Entropy ``-sum_j p_j log p_j`` of every row ``p = softmax(logits / temperature)``, in nats.

    Args:
        logits: any shape, classes in dimension `dim`; float64, float32, float16 or bfloat16; any strides, no copy.
        temperature: a positive number.
        dim: the dimension of the classes.

    Returns:
        logits' shape without `dim`; float32, or float64 if logits are. Raises and is exact as :func:`token_statistics`.

    Source: Shannon (1948).
    """
    value = token_statistics(logits, entropy=True, temperature=temperature, dim=dim).entropy
    assert value is not None
    return value


def _classes_second(name: str, logits: Tensor, dim: int) -> tuple[Tensor, torch.Size]:
    """logits as the operators take them, the classes in dimension 1 of more than one; and the shape of their rows."""
    if not -logits.dim() <= dim < logits.dim():
        raise IndexError(f"cece.{name}: dim must be a dimension of logits of shape {tuple(logits.shape)}, got {dim}")
    rest = [n for d, n in enumerate(logits.shape) if d != dim % logits.dim()]
    return logits.movedim(dim, 1) if logits.dim() > 1 else logits, torch.Size(rest)
