"""Each loss in a few lines of plain torch: what it means, in any dtype, with every derivative torch can take.

Slow, and no more accurate than its dtype; tests feed it float64. `csrc/numerics.h` has the same formulas arranged so
that nothing cancels.
"""

import torch
from torch import Tensor


def _reduce(loss: Tensor, reduction: str, divisor: Tensor | int) -> Tensor:
    if reduction == "none":
        return loss
    return loss.sum() / divisor if reduction == "mean" else loss.sum()


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    token_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """``-sum_j q_j log softmax(z)_j + z_loss logsumexp(z) ** 2``, masses ``q_j = w_j ((1 - s) t_j + s / C)``.

    ``z = logit_scale input``, or with a softcap ``softcap tanh(logit_scale input / softcap)``.
    """
    if logit_scale != 1:
        input = logit_scale * input
    if softcap is not None:
        input = softcap * (input / softcap).tanh()
    dim = 0 if input.dim() == 1 else 1
    classes = input.shape[dim]
    log_p = input.log_softmax(dim)
    soft = target.shape == input.shape
    used = torch.ones_like(log_p.select(dim, 0), dtype=torch.bool) if soft else target != ignore_index
    t = target if soft else torch.nn.functional.one_hot(torch.where(used, target, 0).long(), classes).to(log_p)
    if not soft:
        t = t.movedim(-1, dim)
    w = torch.ones(classes, dtype=log_p.dtype) if weight is None else weight.to(log_p)
    w = w.reshape(-1, *(1,) * (input.dim() - 1 - dim))
    q = w * ((1 - label_smoothing) * t + label_smoothing / classes)
    loss = -torch.where(q == 0, 0, q * log_p).sum(dim)
    if z_loss:
        loss = loss + z_loss * input.logsumexp(dim) ** 2
    loss = torch.where(used, loss if token_weight is None else loss * token_weight.to(loss), 0)
    total = loss.numel() if soft else ((w * t).sum(dim) * used).sum()
    return _reduce(loss, reduction, total if normalizer is None else normalizer)


def linear_logits(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None = None) -> Tensor:
    """(..., C, d...) of input (..., in), linear_weight (C, d..., in) and linear_bias (C, d...)."""
    logits = torch.tensordot(input, linear_weight, ([-1], [-1]))
    return logits if linear_bias is None else logits + linear_bias


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    token_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """:func:`cross_entropy` of the logits, input of shape (in) or (N, in)."""
    return cross_entropy(
        linear_logits(input, linear_weight, linear_bias),
        target,
        weight,
        ignore_index=-100 if ignore_index is None else ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        token_weight=token_weight,
        normalizer=normalizer,
        z_loss=z_loss,
        logit_scale=logit_scale,
        softcap=softcap,
    )


def token_statistics(
    logits: Tensor, target: Tensor | None = None, *, temperature: float = 1.0, ignore_index: int = -100, dim: int = 1
) -> dict[str, Tensor]:
    """All of them, by name: ``p = softmax(logits / temperature)``; rows of ignored targets are 0."""
    z, dim = logits / temperature, dim if logits.dim() > 1 else 0
    log_p = z.log_softmax(dim)
    p = log_p.exp()
    out = {
        "entropy": -torch.where(p == 0, 0, p * log_p).sum(dim),
        "logsumexp": z.logsumexp(dim),
        "collision": (p * p).sum(dim),
    }
    if target is not None:
        used = target != ignore_index
        index = torch.where(used, target, 0).long().unsqueeze(dim)
        out["log_prob"] = log_p.gather(dim, index).squeeze(dim)
        out = {name: torch.where(used, value, 0) for name, value in out.items()}
    return out


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    pos_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``(1 - y) softplus(x) + p y softplus(-x)``, times the weight."""
    y = target.to(input.dtype)
    p = 1 if pos_weight is None else pos_weight.to(input.dtype)
    loss = -(1 - y) * torch.nn.functional.logsigmoid(-input) - p * y * torch.nn.functional.logsigmoid(input)
    loss = loss if weight is None else loss * weight.to(input.dtype)
    return _reduce(loss, reduction, loss.numel())


def binary_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, reduction: str = "mean"
) -> Tensor:
    """``-y log x - (1 - y) log(1 - x)`` of probabilities x, each logarithm no lower than -100, times the weight."""
    y = target.to(input.dtype)
    loss = -y * input.log().clamp_min(-100) - (1 - y) * (-input).log1p().clamp_min(-100)
    loss = loss if weight is None else loss * weight.to(input.dtype)
    return _reduce(loss, reduction, loss.numel())


def _log_softmaxes(logits: Tensor, other: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    dim = 0 if logits.dim() == 1 else 1
    return (logits / temperature).log_softmax(dim), (other / temperature).log_softmax(dim)


def _kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """``sum_j q_j (log q_j - log p_j)`` of each row; a class that q rules out costs nothing."""
    possible = log_q > -torch.inf
    term = log_q.exp() * (torch.where(possible, log_q, 0) - torch.where(possible, log_p, 0))
    return term.sum(0 if log_q.dim() == 1 else 1)


def kl_divergence(logits: Tensor, target_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """``KL(softmax(target_logits / T) || softmax(logits / T))`` of each row."""
    log_p, log_q = _log_softmaxes(logits, target_logits, temperature)
    return _kl(log_q, log_p)


def js_divergence(logits: Tensor, other_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """``(KL(p || m) + KL(q || m)) / 2`` of each row, ``m = (p + q) / 2``."""
    log_p, log_q = _log_softmaxes(logits, other_logits, temperature)
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, dtype=log_p.dtype))
    return (_kl(log_p, log_m) + _kl(log_q, log_m)) / 2
