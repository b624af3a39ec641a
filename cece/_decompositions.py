"""The operators in plain torch, for an exported program that shall need no operator of ours.

``program.run_decompositions(cece.decompositions())`` ends in core ATen. The values are those of
``csrc/numerics.h`` to the dtype that sums are formed in; tiny losses are as exact as torch's, not as ours.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from . import ops


def _acc(*tensors):
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


class _Rows:
    """One call of cross-entropy: the masses q_j = w_j ((1 - s) t_j + s / C) of each row."""

    def __init__(self, logits, target, weight, ignore_index, label_smoothing):
        soft = target is not None and target.dim() == logits.dim()
        self.dim = dim = 0 if logits.dim() == 1 else 1
        acc = _acc(logits, target if soft else None)
        self.x, classes = logits.to(acc), logits.shape[dim]
        by_class = (-1, *(1,) * (logits.dim() - 1 - dim))
        if target is None:
            self.used, one = None, torch.zeros_like(self.x)
        elif soft:
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

    def statistics(self):
        """max, log_sum, p and u = max - x of each row."""
        top = self.x.amax(self.dim, keepdim=True)
        gap = torch.where(self.x == top, 0, top - self.x)
        log_sum = (-gap).exp().sum(self.dim, keepdim=True).log()
        return top, log_sum, (-(gap + log_sum)).exp(), gap


def cross_entropy_forward(logits, target, weight, reduction, ignore_index, label_smoothing, inplace_backward=False):
    r = _Rows(logits, target, weight, ignore_index, label_smoothing)
    top, log_sum, _, gap = r.statistics()
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


def _transformed(r, logit_scale, softcap):
    """Sets the rows' x to the logits as they are used; returns what those change by."""
    x = r.x * logit_scale
    r.x = softcap * (x / softcap).tanh() if softcap > 0 else x
    return logit_scale * (1 - (x / softcap).tanh().square()) if softcap > 0 else logit_scale


def _masked(r, a, log_sum, skip_masked_rows):
    a = r.only_used(a)
    return torch.where(log_sum == -math.inf, 0, a) if skip_masked_rows else a


def token_statistics_forward(
    logits, target, weight, ignore_index, label_smoothing, logit_scale, softcap, skip_masked_rows, wanted
):
    r = _Rows(logits, target, weight, ignore_index, label_smoothing)
    _transformed(r, logit_scale, softcap)
    top, log_sum, p, gap = r.statistics()
    mass = r.q.sum(r.dim, keepdim=True)
    heat = torch.where(p == 0, 0, p * gap).sum(r.dim, keepdim=True)
    collision = p.square().sum(r.dim, keepdim=True)
    loss = torch.where(r.q == 0, 0, r.q * (gap + log_sum)).sum(r.dim, keepdim=True)
    loss = torch.where(log_sum >= 0, loss, math.nan)
    values = loss, log_sum + heat, torch.where(log_sum == -math.inf, log_sum, top + log_sum), collision
    stats = top, log_sum, mass, heat, 1 - collision
    values, stats = ([_masked(r, v, log_sum, skip_masked_rows).squeeze(r.dim) for v in vs] for vs in (values, stats))
    if skip_masked_rows:  # by which such a row is known
        stats[1] = r.only_used(log_sum).squeeze(r.dim)
    values.append(_masked(r, r.x.argmax(r.dim, keepdim=True), log_sum, skip_masked_rows).squeeze(r.dim))
    return (*(v if wanted >> i & 1 else v.new_empty(0) for i, v in enumerate(values)), torch.stack(stats))


def token_statistics_backward(
    grad_loss,
    grad_entropy,
    grad_logsumexp,
    grad_collision,
    logits,
    target,
    weight,
    stats,
    ignore_index,
    label_smoothing,
    logit_scale,
    softcap,
    skip_masked_rows,
):
    r = _Rows(logits, target, weight, ignore_index, label_smoothing)
    slope = _transformed(r, logit_scale, softcap)
    top, log_sum, mass, heat, spread = (a.unsqueeze(r.dim) for a in stats.unbind(0))
    gap = torch.where(r.x == top, 0, top - r.x)
    p = (-(gap + log_sum)).exp()
    factor, less = 0, 0
    if grad_loss is not None:
        g = grad_loss.unsqueeze(r.dim)
        factor, less = factor + g * mass, g * r.q
    if grad_entropy is not None:
        factor = factor + grad_entropy.unsqueeze(r.dim) * (gap - heat)
    if grad_logsumexp is not None:
        factor = factor + grad_logsumexp.unsqueeze(r.dim)
    if grad_collision is not None:
        factor = factor + 2 * grad_collision.unsqueeze(r.dim) * (p - (1 - spread))
    out = slope * (torch.where(p == 0, 0, p * factor) - less)
    return _masked(r, out, log_sum, skip_masked_rows).to(logits.dtype)


class _Linear:
    """One call of a linear loss: its logits, of which plain torch holds all, and what their gradient makes of them."""

    def __init__(self, input, linear_weight, linear_bias, target, weight, options, wanted):
        self.target, self.weight, self.options, self.wanted = target, weight, options, wanted
        self.shapes, acc = (input.shape, linear_weight.shape, linear_weight.shape[:-1]), _acc(input)
        self.x, self.matrix, self.used = input.to(acc), linear_weight.to(acc).flatten(0, -2), None
        if target is not None and target.dim() < linear_weight.dim():
            used = ops.used_labels(target, options[0])
            self.used = (used if used.dim() == 1 else used.flatten(1).any(1)).unsqueeze(1)
            self.x = torch.where(self.used, self.x, 0)
        bias = None if linear_bias is None else linear_bias.to(acc).flatten()
        logits = torch.nn.functional.linear(self.x, self.matrix, bias)
        self.logits = logits.reshape(input.shape[0], *linear_weight.shape[:-1])
        self.plain = wanted == 1 and target is not None and options[2:] == (1, 0, False)

    def rows(self):
        if not self.plain:
            return ops.TOKEN_STATISTICS(self.logits, self.target, self.weight, *self.options, self.wanted)
        loss, stats, _ = ops.CROSS_ENTROPY(self.logits, self.target, self.weight, ops.NONE, *self.options[:2])
        none = self.logits.new_empty(0)
        return loss, none, none, none, none, stats

    def gradients(self, grads, stats, wanted, dtype):
        args = self.logits, self.target, self.weight, stats
        if self.plain:
            one = stats.new_ones(())
            g = ops.CROSS_ENTROPY_BACKWARD(grads[0], *args, one, ops.NONE, *self.options[:2])
        else:
            g = ops.TOKEN_STATISTICS_BACKWARD(*grads, *args, *self.options)
        g = g.reshape(g.shape[0], -1)
        x = g @ self.matrix if wanted & 1 else None
        x = x if x is None or self.used is None else torch.where(self.used, x, 0)
        out = x, g.t() @ self.x if wanted & 2 else None, g.sum(0) if wanted & 4 else None
        return tuple(
            g.new_empty(0, dtype=dtype) if t is None else t.reshape(shape).to(dtype)
            for t, shape in zip(out, self.shapes, strict=True)
        )


def linear_cross_entropy(input, linear_weight, linear_bias, target, weight, token_weight, *options, gradients=0):
    *row, _, _, z_loss, reduction = options[:9]
    gradients = options[9] if len(options) > 9 else gradients
    row, soft = tuple(row), target.dim() == linear_weight.dim()
    call = _Linear(input, linear_weight, linear_bias, target, weight, row, 1 if z_loss == 0 else 5)
    loss, _, lse, _, _, stats = call.rows()
    losses = loss if z_loss == 0 else loss + z_loss * lse.square()
    used = torch.ones_like(losses, dtype=torch.bool) if soft else ops.used_labels(target, row[0])
    if row[4]:
        used = used & (stats[1] > -float("inf"))
    f = torch.ones_like(losses) if token_weight is None else torch.where(used, token_weight.to(losses.dtype), 0)
    value = f * torch.where((f == 0) & losses.isinf(), 0, losses)
    share = torch.ones_like(losses) if soft else ops.label_weights(target, weight, row[0], losses.dtype)
    total = torch.where(used, share, 0).sum() if reduction == ops.MEAN else torch.ones_like(losses.sum())
    if reduction == ops.NONE:
        none = losses.new_empty(0)
        return (value, *(none,) * 5)
    grads = f, None, None if z_loss == 0 else f * lse * (2 * z_loss), None
    found = call.gradients(grads, stats, gradients, _acc(input)) if gradients else (call.x.new_empty(0),) * 3
    return value.sum() / total, losses, total, *found


def linear_token_statistics_forward(input, linear_weight, linear_bias, target, weight, *options):
    return _Linear(input, linear_weight, linear_bias, target, weight, options[:5], options[7]).rows()


def linear_token_statistics_backward(*args):
    grads, (input, linear_weight, linear_bias, target, weight, stats), options = args[:4], args[4:10], args[10:]
    call = _Linear(input, linear_weight, linear_bias, target, weight, options[:5], options[7])
    return call.gradients(grads, stats, options[8], input.dtype)


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


class _Pair:
    """Two rows of logits: their masses p and q, the logarithms of these, and what is saved of them."""

    def __init__(self, logits, other, mask, temperature):
        self.dim, acc = 0 if logits.dim() == 1 else 1, _acc(logits, other)
        self.used = None if mask is None else mask.unsqueeze(self.dim)
        self.rows = [self.only_used(t.to(acc)) for t in (logits, other)]
        self.p, self.q = ((t / temperature).softmax(self.dim) for t in self.rows)
        self.log_p, self.log_q = ((t / temperature).log_softmax(self.dim) for t in self.rows)

    def only_used(self, a):
        return a if self.used is None else torch.where(self.used, a, 0)

    def kl(self, q, log_q, log_p):
        return torch.where(q == 0, 0, q * (log_q - log_p)).sum(self.dim, keepdim=True)

    def log_mean(self):
        return ((self.p + self.q) / 2).log()


def divergence_forward(logits, other, mask, temperature, symmetric):
    r = _Pair(logits, other, mask, temperature)
    if symmetric:
        log_m = r.log_mean()
        levels = r.kl(r.p, r.log_p, log_m), r.kl(r.q, r.log_q, log_m)
        loss = (levels[0] + levels[1]) / 2
    else:
        loss = r.kl(r.q, r.log_q, r.log_p)
        levels = torch.zeros_like(loss), loss
    tops = [t.amax(r.dim, keepdim=True) for t in r.rows]
    sums = [((t - top) / temperature).exp().sum(r.dim, keepdim=True).log() for t, top in zip(r.rows, tops, strict=True)]
    offset = tops[1] - tops[0] + temperature * (sums[1] - sums[0])
    stats = [*tops, *sums, offset, torch.zeros_like(offset), *reversed(levels)]
    loss, *stats = (r.only_used(a).squeeze(r.dim) for a in (loss, *stats))
    return loss, torch.stack(stats)


def divergence_backward(grad, logits, other, mask, stats, temperature, symmetric, of_other, ranks=1, group=""):
    r = _Pair(logits, other, mask, temperature)
    p, log_p, q, log_q = (r.q, r.log_q, r.p, r.log_p) if of_other else (r.p, r.log_p, r.q, r.log_q)
    if symmetric:
        log_m = r.log_mean()
        slope = torch.where(p == 0, 0, p * (log_p - log_m - r.kl(p, log_p, log_m))) / 2
    elif of_other:
        slope = torch.where(p == 0, 0, p * (log_p - log_q - r.kl(p, log_p, log_q)))
    else:
        slope = p - q
    return r.only_used(grad.unsqueeze(r.dim) * slope / temperature).to((other if of_other else logits).dtype)


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
            ops.TOKEN_STATISTICS: token_statistics_forward,
            ops.TOKEN_STATISTICS_BACKWARD: token_statistics_backward,
            ops.LINEAR_CROSS_ENTROPY: linear_cross_entropy,
            ops.LINEAR_TOKEN_STATISTICS: linear_token_statistics_forward,
            ops.LINEAR_TOKEN_STATISTICS_BACKWARD: linear_token_statistics_backward,
            ops.BCE: binary_cross_entropy_forward,
            ops.BCE_BACKWARD: binary_cross_entropy_backward,
            ops.DIVERGENCE: divergence_forward,
            ops.DIVERGENCE_BACKWARD: divergence_backward,
        }
    )
    return table
