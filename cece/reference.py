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


def _elements(loss: Tensor, weight: Tensor | None, reduction: str, mask: Tensor | None = None) -> Tensor:
    loss = loss if weight is None else loss * weight.to(loss.dtype)
    used = torch.ones_like(loss, dtype=torch.bool) if mask is None else mask.expand(loss.shape)
    return _reduce(torch.where(used, loss, 0), reduction, used.sum())


def _smoothed(target: Tensor, input: Tensor, label_smoothing: float) -> Tensor:
    return (1 - label_smoothing) * target.to(input.dtype) + label_smoothing / 2


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    pos_weight: Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
    poly: float = 0.0,
) -> Tensor:
    """``(1 - y) (softplus(x) + e sigmoid(x)) + p y (softplus(-x) + e sigmoid(-x))``, times the weight; e is poly."""
    y = _smoothed(target, input, label_smoothing)
    p = 1 if pos_weight is None else pos_weight.to(input.dtype)
    up, down = -torch.nn.functional.logsigmoid(-input), -torch.nn.functional.logsigmoid(input)
    loss = (1 - y) * (up + poly * input.sigmoid()) + p * y * (down + poly * (-input).sigmoid())
    return _elements(loss, weight, reduction, mask)


def binary_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, reduction: str = "mean"
) -> Tensor:
    """``-y log x - (1 - y) log(1 - x)`` of probabilities x, each logarithm no lower than -100, times the weight."""
    y = target.to(input.dtype)
    loss = -y * input.log().clamp_min(-100) - (1 - y) * (-input).log1p().clamp_min(-100)
    return _elements(loss, weight, reduction)


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


def sigmoid_focal_loss(
    input: Tensor,
    target: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    *,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    poly: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """``a q^gamma (l + e q)``, l the binary cross-entropy, ``q = 1 - p`` what is given to what is not so; e is poly."""
    y = _smoothed(target, input, label_smoothing)
    q = (1 - y) * input.sigmoid() + y * (-input).sigmoid()
    cross_entropy = binary_cross_entropy_with_logits(input, y, reduction="none")
    a = 1 if alpha < 0 else alpha * y + (1 - alpha) * (1 - y)
    return _elements(a * q**gamma * (cross_entropy + poly * q), weight, reduction, mask)


def asymmetric_loss(
    input: Tensor,
    target: Tensor,
    gamma_neg: float = 4.0,
    gamma_pos: float = 1.0,
    clip: float = 0.05,
    reduction: str = "sum",
    *,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """``-y (1 - p)^gamma_pos log p - (1 - y) m^gamma_neg log(1 - m)``, with ``m = max(p - clip, 0)``."""
    y = _smoothed(target, input, label_smoothing)
    down = -torch.nn.functional.logsigmoid(input)
    p = input.sigmoid()
    above = p > clip
    m = torch.where(above, p - clip, 0.5)  # 0.5: a power below 1 has no derivative at 0
    rest = -torch.nn.functional.logsigmoid(-input) if clip == 0 else -torch.log1p(-m)
    negative = torch.where(above, m**gamma_neg * rest, 0)
    loss = y * (-input).sigmoid() ** gamma_pos * down + (1 - y) * negative
    return _elements(loss, weight, reduction, mask)


def softmax_focal_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    gamma: float = 2.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    poly: float = 0.0,
) -> Tensor:
    """``w (1 - p)^gamma (-log p + e (1 - p))`` of the label's probability p; e is poly."""
    cost = cross_entropy(input, target, None, ignore_index=ignore_index, reduction="none")
    used = target != ignore_index
    w = torch.ones(input.shape[min(1, input.dim() - 1)], dtype=cost.dtype) if weight is None else weight.to(cost.dtype)
    w = torch.where(used, w[torch.where(used, target, 0).long()], 0)
    q = -torch.expm1(-cost)
    return _reduce(torch.where(used, w * q**gamma * (cost + poly * q), 0), reduction, w.sum())


def multilabel_cross_entropy(
    input: Tensor,
    labels: list[list[int]],
    weight: Tensor | None = None,
    *,
    pos_weight: Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """The binary cross-entropy of a truth that is ``(1 - s) + s / C`` at each sample's labels and else ``s / C``."""
    y = torch.full_like(input, label_smoothing / input.shape[1])
    for row, listed in zip(y, labels, strict=True):
        row[listed] = 1 - label_smoothing + label_smoothing / input.shape[1]
    return binary_cross_entropy_with_logits(input, y, weight, pos_weight=pos_weight, reduction=reduction, mask=mask)


def pairwise_sigmoid_loss(
    input: Tensor, other: Tensor, scale: Tensor | float, bias: Tensor | float, reduction: str = "mean"
) -> Tensor:
    """``-log sigmoid(z (scale x_i . y_j + bias))``, z = 1 on the diagonal and -1 elsewhere; a mean is over rows."""
    logits = scale * input @ other.t() + bias
    z = 2 * torch.eye(*logits.shape, dtype=logits.dtype) - 1
    return _reduce(-torch.nn.functional.logsigmoid(z * logits), reduction, len(input))
