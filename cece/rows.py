"""What a row of logits says beside its cross-entropy: log-probability, entropy and more, in one pass each way."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ._arguments import as_bool, as_float, as_integer, check_dim, check_tensors, dtensor_among
from ._script import classes_second
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
    dim: int = 1,
) -> TokenStatistics:
    """Statistics of every row ``p = softmax(logits / temperature)``, in one pass over the logits and one for gradients.

    For reinforcement learning, distillation and monitoring. Nothing of the logits' size is held but the gradient, and
    tiny values keep their bits: an entropy or ``-log_prob`` of 1e-12 is right to some units of the last place.

    Args:
        logits: shape ``(C)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``, or as another `dim` says; float64, float32,
            float16 or bfloat16; any strides, without a copy.
        target: class indices, logits' shape without `dim`; an integer dtype. Needed for log_prob. Rows whose target is
            `ignore_index` have 0 in all statistics, and no gradient.
        log_prob: ``log p[target]``, which is minus the cross-entropy. None: wherever there is a target.
        entropy: ``-sum_j p_j log p_j`` in nats.
        logsumexp: ``log sum_j exp(logits_j / temperature)``; -inf for a row of -inf.
        collision: ``sum_j p_j ** 2``, the probability that two draws agree.
        argmax: the index of the largest logit, int64: the first NaN or maximum, as :func:`torch.argmax`. No gradient.
        temperature: a positive number.
        ignore_index: as in :func:`cross_entropy`.
        dim: the dimension of the classes (of one row, the only one); -1 for ``(batch, sequence, C)``.

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
    if dtensor := dtensor_among(logits, target):
        asked = {
            "log_prob": log_prob,
            "entropy": entropy,
            "logsumexp": logsumexp,
            "collision": collision,
            "argmax": argmax,
            "temperature": temperature,
            "ignore_index": ignore_index,
        }
        found: TokenStatistics = dtensor.token_statistics(logits, target, check_dim(name, logits, dim), **asked)
        return found
    ignore_index = as_integer(name, "ignore_index", ignore_index)
    asked = Asked(name, target, temperature, log_prob, entropy, logsumexp, collision, argmax)
    dim = check_dim(name, logits, dim)
    shape = torch.Size(n for d, n in enumerate(logits.shape) if d != dim % logits.dim())
    if target is not None and target.shape != shape:
        raise ValueError(
            f"cece.{name}: target must have shape {tuple(shape)}, logits' without the classes in dimension {dim}, got"
            f" {tuple(target.shape)}; are the classes in another dimension, say so: dim=-1"
        )
    return asked.named(
        TOKEN_STATISTICS(
            classes_second(logits, dim), target, None, ignore_index, 0.0, asked.scale, 0.0, False, asked.wanted
        )
    )


class Asked:
    """Which statistics a call asks for, at which temperature, checked."""

    scale: float  # of the logits
    names: list[str]
    wanted: int

    def __init__(
        self, loss: str, target: Tensor | None, temperature: float, log_prob: bool | None, *others: bool
    ) -> None:
        temperature = as_float(loss, "temperature", temperature)
        if not 0 < temperature < float("inf"):
            raise ValueError(f"cece.{loss}: temperature must be a positive number, got {temperature}")
        self.scale = 1 / temperature
        values = (target is not None if log_prob is None else log_prob, *others)
        self.names = [name for name, value in zip(WANTED, values, strict=True) if as_bool(loss, name, value)]
        if not self.names:
            raise ValueError(f"cece.{loss}: ask for at least one of {', '.join(WANTED)}")
        if "log_prob" in self.names and target is None:
            raise ValueError(f"cece.{loss}: log_prob needs a target, got None")
        self.wanted = sum(WANTED[name] for name in self.names)

    def named(self, outputs: Sequence[Tensor]) -> TokenStatistics:
        """What of the operator's outputs was asked for; its loss is minus the log-probability."""
        by_name = dict(zip(WANTED, outputs, strict=False))
        if "log_prob" in self.names:
            by_name["log_prob"] = -by_name["log_prob"]
        return TokenStatistics(**{name: by_name[name] for name in self.names})


def entropy(logits: Tensor, *, temperature: float = 1.0, dim: int = 1) -> Tensor:
    """Entropy ``-sum_j p_j log p_j`` of every row ``p = softmax(logits / temperature)``, in nats.

    Args:
        logits: shape ``(C)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``, or as another `dim` says; float64, float32,
            float16 or bfloat16; any strides, without a copy.
        temperature: a positive number.
        dim: the dimension of the classes (of one row, the only one); -1 for ``(batch, sequence, C)``.

    Returns:
        logits' shape without `dim`; float32, or float64 if logits are. Raises and is exact as :func:`token_statistics`.

    Source: Shannon (1948).
    """
    value = token_statistics(logits, entropy=True, temperature=temperature, dim=dim).entropy
    assert value is not None
    return value
