"""The operators in plain torch, for an exported program that shall need no operator of ours.

``program.run_decompositions(cece.decompositions())`` ends in core ATen. The values are those of
``csrc/numerics.h`` to the dtype that sums are formed in; tiny losses are as exact as torch's, not as ours.
"""

from collections.abc import Callable
from typing import Any

import torch

from . import ops


def _acc(*tensors):
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


class _Rows:
    """One call of cross-entropy: the masses q_j = w_j ((1 - s) t_j + s / C) of each row."""

    def __init__(self, logits, target, weight, ignore_index, label_smoothing):
        soft = target.dim() == logits.dim()
        self.dim = dim = 0 if logits.dim() == 1 else 1
        acc = _acc(logits, target if soft else None)
        self.x, classes = logits.to(acc), logits.shape[dim]
        by_class = (-1, *(1,) * (logits.dim() - 1 - dim))
        if soft:
            self.used, one = None, target.to(acc)
        else:
            self.used = ops.used_labels(target, ignore_index).unsqueeze(dim)
            index = torch.arange(classes, device=logits.device).reshape(by_class)
            one = (target.unsqueeze(dim) == index).to(acc)
        w = 1 if weight is None else weight.to(acc).reshape(by_class)
        self.q = (one * (1 - label_smoothing) + label_smoothing / classes) * w
        self.label_weight = (one * w).sum(dim)

    def only_used(self, a):
        return a if self.used is None else torch.where(self.used, a, 0)


def cross_entropy_forward(logits, target, weight, reduction, ignore_index, label_smoothing, inplace_backward=False):
    r = _Rows(logits, target, weight, ignore_index, label_smoothing)
    top = r.x.amax(r.dim, keepdim=True)
    gap = torch.where(r.x == top, 0, top - r.x)
    log_sum = (-gap).exp().sum(r.dim, keepdim=True).log()
    loss = torch.where(r.q == 0, 0, r.q * (gap + log_sum)).sum(r.dim, keepdim=True)
    mass = r.q.sum(r.dim, keepdim=True)
    loss, *stats = (r.only_used(a).squeeze(r.dim) for a in (loss, top, log_sum, mass))
    stats = torch.stack(stats)
    if reduction == ops.NONE:
        return loss, stats, torch.ones_like(loss.sum())
    if reduction == ops.SUM or r.used is None:
        total = torch.ones_like(loss).sum()
    else:
        total = (r.label_weight * r.used.squeeze(r.dim)).sum()
    return (loss.sum() / total if reduction == ops.MEAN else loss.sum()), stats, total


def cross_entropy_backward(grad, logits, target, weight, stats, total_weight, reduction, ignore_index, label_smoothing):
    r = _Rows(logits, target, weight, ignore_index, label_smoothing)
    top, log_sum, mass = (a.unsqueeze(r.dim) for a in stats.unbind(0))
    g = grad.unsqueeze(r.dim) if reduction == ops.NONE else grad / total_weight if reduction == ops.MEAN else grad
    p = (-(torch.where(r.x == top, 0, top - r.x) + log_sum)).exp()
    return r.only_used(g * (p * mass - r.q)).to(logits.dtype)


def _softplus(x):  # of both signs: log(1 + e^x), log(1 + e^-x)
    rest = (-x.abs()).exp().log1p()
    return x.clamp_min(0) + rest, (-x).clamp_min(0) + rest


class _Elements:
    """One call of an elementwise loss."""

    def __init__(self, input, target, weight, pos_weight, kind, reduction, mask, parameters, offsets, padding):
        acc = _acc(input, None if padding is not None else target, weight)
        self.keep, self.spread, *self.own = parameters or (1.0, 0.0)
        y = target.to(acc) if padding is None else written_out(input, target, offsets, padding).to(acc)
        self.x, self.y = input.to(acc), y * self.keep + self.spread
        self.p = 1 if pos_weight is None else pos_weight.to(acc)
        self.w = 1 if weight is None else weight.to(acc)
        self.kind, self.reduction, self.mask = kind, reduction, mask

    def unmasked(self, a):
        return a if self.mask is None else torch.where(self.mask, a, 0)

    def loss(self):
        y, yes = self.y, self.y * self.p
        if self.kind == ops.ON_PROBABILITIES:
            return -y * self.x.log().clamp_min(-100) - (1 - y) * (-self.x).log1p().clamp_min(-100)
        up, down = _softplus(self.x)
        if self.kind == ops.ASYMMETRIC:
            return _product(yes, self._asymmetric(0)) + _product(1 - y, self._asymmetric(1))
        cost = _product(1 - y, up) + _product(yes, down)
        if self.kind == ops.WITH_LOGITS:
            return cost
        positive, negative, gamma, poly = self.own
        p, rest = self.x.sigmoid(), (-self.x).sigmoid()
        q, wrong = (1 - y) * p + y * rest, (1 - y) * p + yes * rest
        return _product(positive * y + negative * (1 - y), q**gamma * (cost + poly * wrong))

    def _asymmetric(self, side):
        """(loss of a truth of 1 or, side 1, of 0)"""
        gamma_pos, gamma_neg, clip, _ = self.own
        up, down = _softplus(self.x)
        if side == 0:
            return (-self.x).sigmoid() ** gamma_pos * down
        m = (self.x.sigmoid() - clip).clamp_min(0)
        return m**gamma_neg * (up if clip == 0 else -(-m).log1p())

    def slope(self):
        y, yes, no = self.y, self.y * self.p, 1 - self.y
        if self.kind == ops.ON_PROBABILITIES:
            return (self.x - y) / ((1 - self.x) * self.x).clamp_min(1e-12)
        p, rest = self.x.sigmoid(), (-self.x).sigmoid()
        up, down = _softplus(self.x)
        if self.kind == ops.WITH_LOGITS:
            return no * p - yes * rest
        if self.kind == ops.ASYMMETRIC:
            gamma_pos, gamma_neg, clip, _ = self.own
            m = (p - clip).clamp_min(0)
            inside = torch.where(p < clip, 0, 1) * p * rest
            if clip == 0:
                of_no = gamma_neg * _product(rest, up) + p
            else:
                of_no = inside * (gamma_neg * -(-m).log1p() / torch.where(m == 0, 1, m) + 1 / (1 - m))
            return no * m**gamma_neg * of_no - yes * rest**gamma_pos * (gamma_pos * _product(p, down) + rest)
        positive, negative, gamma, poly = self.own
        q, wrong = no * p + y * rest, no * p + yes * rest
        cost = _product(no, up) + _product(yes, down) + poly * wrong
        relative = (no - y) * p * rest / torch.where(q == 0, 1, q)
        slope = gamma * _product(relative, cost) + no * p - yes * rest + poly * (no - yes) * p * rest
        return (positive * y + negative * no) * q**gamma * slope


def _product(a, b):
    return torch.where(a == 0, 0, a * b)


def written_out(input, labels, offsets, padding):
    """The truth that labels list, (N, C), bool."""
    rows, classes = input.shape
    place = torch.where(labels == padding, -1, labels.long()) + 1  # 0: none, and cut off
    if offsets is None:
        row = torch.arange(rows, device=input.device).unsqueeze(1)
    else:
        row = torch.searchsorted(offsets.long(), torch.arange(len(labels), device=input.device), right=True) - 1
    y = torch.zeros(rows * (classes + 1), device=input.device)
    at = (row * (classes + 1) + place).reshape(-1)
    return y.scatter(0, at, 1.0).reshape(rows, classes + 1)[:, 1:] != 0


def binary_cross_entropy_forward(
    input, target, weight, pos_weight, kind, reduction, mask=None, parameters=(), offsets=None, padding=None
):
    e = _Elements(input, target, weight, pos_weight, kind, reduction, mask, parameters, offsets, padding)
    loss = e.unmasked(e.loss() * e.w)
    if reduction == ops.COUNTED:
        used = torch.ones_like(loss) if mask is None else mask.expand(loss.shape).to(loss.dtype)
        return torch.stack([loss.sum(), used.sum()])
    return loss if reduction == ops.NONE else loss.mean() if reduction == ops.MEAN else loss.sum()


def binary_cross_entropy_backward(
    grad, input, target, weight, pos_weight, kind, reduction, mask=None, parameters=(), offsets=None, padding=None
):
    e = _Elements(input, target, weight, pos_weight, kind, reduction, mask, parameters, offsets, padding)
    g = grad[0] if reduction == ops.COUNTED else grad
    slope = e.unmasked(g * e.slope() * e.w)
    return (slope / (input.numel() if reduction == ops.MEAN else 1)).to(input.dtype)


def decompositions() -> dict[torch._ops.OperatorBase, Callable[..., Any]]:
    """A table for ``ExportedProgram.run_decompositions`` and AOTAutograd that leaves none of cece's operators.

    torch's default table to core ATen, and beside it one entry for each of ours. Without it an exported program keeps
    cece's operators, and with them its kernels: whoever loads it needs cece.

    Returns:
        A dict-like of operator to function.
    """
    table = torch.export.default_decompositions()
    table.update(
        {
            ops.CROSS_ENTROPY: cross_entropy_forward,
            ops.CROSS_ENTROPY_BACKWARD: cross_entropy_backward,
            ops.BCE: binary_cross_entropy_forward,
            ops.BCE_BACKWARD: binary_cross_entropy_backward,
        }
    )
    return table
