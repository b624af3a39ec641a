"""Batching rules of the operators in ``csrc/ops.cpp``: what vmap does with them.

Shapes for tracing are in ``csrc/meta.cpp``, derivatives in ``csrc/autograd``. Nothing here runs
in plain eager mode.
"""

import functools

import torch
from torch import Tensor

CROSS_ENTROPY = torch.ops.cece.cross_entropy_forward.default
CROSS_ENTROPY_BACKWARD = torch.ops.cece.cross_entropy_backward.default
TOKEN_STATISTICS = torch.ops.cece.token_statistics_forward.default
SHARDED_STATISTICS = torch.ops.cece.sharded_statistics_forward.default
TOKEN_STATISTICS_BACKWARD = torch.ops.cece.token_statistics_backward.default
LINEAR_CROSS_ENTROPY = torch.ops.cece.linear_cross_entropy.default
LINEAR_TOKEN_STATISTICS = torch.ops.cece.linear_token_statistics_forward.default
LINEAR_TOKEN_STATISTICS_BACKWARD = torch.ops.cece.linear_token_statistics_backward.default
BCE = torch.ops.cece.binary_cross_entropy_forward.default
BCE_BACKWARD = torch.ops.cece.binary_cross_entropy_backward.default
DIVERGENCE = torch.ops.cece.divergence_forward.default
SHARDED_DIVERGENCE = torch.ops.cece.sharded_divergence_forward.default
DIVERGENCE_BACKWARD = torch.ops.cece.divergence_backward.default
ACROSS_RANKS = torch.ops.cece.across_ranks.default

# What token_statistics_forward is asked for, its outputs in this order.
WANTED = {"log_prob": 1, "entropy": 2, "logsumexp": 4, "collision": 8, "argmax": 16}

NONE, MEAN, SUM = 0, 1, 2  # reductions, with torch's numbers
COUNTED = 3  # (2): the sum, and of how many elements; elementwise losses only
ON_PROBABILITIES, WITH_LOGITS, FOCAL, ASYMMETRIC = 0, 1, 2, 3  # kinds of elementwise losses (csrc/numerics.h)


def used_labels(target: Tensor, ignore_index: int) -> Tensor:
    return target.long() != ignore_index  # smaller integers would wrap ignore_index around: uint8's 156 is not -100


def label_weights(target: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """What a mean divides by is the sum of these: each label's weight, 0 where it is ignored."""
    used = used_labels(target, ignore_index)
    if weight is None:
        return used.to(dtype)
    # A label out of range, whose loss is NaN on CUDA, must not stop the process here either.
    return torch.where(used, weight.to(dtype)[target.long().clamp(0, weight.numel() - 1)], 0)


# The batch becomes a dimension of rows. Each rule calls the operator once; only a batch of class weights takes a loop.


def _one(op, dims, args):
    """What the operator says of one element of the batch, without data: eager's checks in eager's words, and shapes."""

    def one(a, d):
        if not isinstance(a, torch.Tensor):
            return a
        return torch.empty([n for i, n in enumerate(a.shape) if i != d], dtype=a.dtype, device="meta")

    outs = op(*(one(a, d if d is None else d % a.dim()) for a, d in zip(args, dims, strict=True)))
    return outs if isinstance(outs, tuple) else (outs,)


def _nothing(input, outs):
    """The results for a batch of size 0."""
    empty = tuple(input.new_empty((0, *o.shape), dtype=o.dtype) for o in outs)
    return (empty, (0,) * len(empty)) if len(empty) > 1 else (empty[0], 0)


def _batched(size, dim, t):
    """t with its batch in front, expanded where it has none."""
    if t is None:
        return None
    return t.movedim(dim, 0) if dim is not None else t.expand(size, *t.shape)


def _loop(op, size, dims, args):
    """One call for each element of the batch."""
    outs = [op(*(a.select(d, i) if d is not None else a for a, d in zip(args, dims, strict=True))) for i in range(size)]
    if isinstance(outs[0], torch.Tensor):
        return torch.stack(outs), 0
    return tuple(torch.stack(o) for o in zip(*outs, strict=True)), (0,) * len(outs[0])


def _classes_second(logits):
    """(B, C) as it is, (B, N, C, d...) as (B, C, N, d...): rows are the batch's and its samples'."""
    return logits.movedim(2, 1) if logits.dim() > 2 else logits


def _as_rows(logits, target):
    soft = target.dim() == logits.dim()
    return _classes_second(logits), _classes_second(target) if soft else target, soft


@torch.library.register_vmap("cece::cross_entropy_forward")
def _(info, in_dims, logits, target, weight, reduction, ignore_index, label_smoothing, inplace_backward=False):
    size = info.batch_size
    args = (logits, target, weight, reduction, ignore_index, label_smoothing)
    one = _one(CROSS_ENTROPY, in_dims[:6], args)
    if size == 0:
        return _nothing(logits, one)
    if weight is not None and in_dims[2] is not None:
        return _loop(CROSS_ENTROPY, size, in_dims[:6], args)
    logits, target = _batched(size, in_dims[0], logits), _batched(size, in_dims[1], target)
    logits, target, soft = _as_rows(logits, target)
    loss, stats, _ = CROSS_ENTROPY(logits, target, weight, NONE, ignore_index, label_smoothing)
    per_batch = loss.reshape(size, -1)
    if soft:
        total = torch.full_like(per_batch[:, 0], per_batch.shape[1]) if per_batch.shape[1] else loss.new_zeros(size)
    else:
        total = label_weights(target, weight, ignore_index, loss.dtype).reshape(size, -1).sum(1)
    if reduction != NONE:
        loss = per_batch.sum(1) / total if reduction == MEAN else per_batch.sum(1)
    return (loss, stats.movedim(1, 0), total), (0, 0, 0)


@torch.library.register_vmap("cece::cross_entropy_backward")
def _(info, in_dims, *args):
    grad, logits, target, weight, stats, total_weight, reduction, *options = args
    size = info.batch_size
    one = _one(CROSS_ENTROPY_BACKWARD, in_dims, args)
    if size == 0:
        return _nothing(logits, one)
    if weight is not None and in_dims[3] is not None:
        return _loop(CROSS_ENTROPY_BACKWARD, size, in_dims, args)
    grad, logits, target, stats, total_weight = (_batched(size, in_dims[i], args[i]) for i in (0, 1, 2, 4, 5))
    rows = stats.shape[2:]
    if reduction == MEAN:
        grad = grad / total_weight
    if reduction != NONE:
        grad = grad.reshape(size, *(1 for _ in rows)).expand(size, *rows)
    logits, target, _ = _as_rows(logits, target)
    out = CROSS_ENTROPY_BACKWARD(
        grad,
        logits,
        target,
        weight,
        stats.movedim(0, 1),
        total_weight.new_empty(()),  # read by a mean alone
        NONE,
        *options,
    )
    return out.movedim(1, 2) if out.dim() > 2 else out, 0


def _batched_statistics(op, info, in_dims, logits, target, weight, *options):
    size = info.batch_size
    args = (logits, target, weight, *options)
    one = _one(op, in_dims, args)
    if size == 0:
        return _nothing(logits, one)
    if weight is not None and in_dims[2] is not None:
        return _loop(op, size, in_dims, args)
    logits, target = _batched(size, in_dims[0], logits), _batched(size, in_dims[1], target)
    rows, target = _classes_second(logits), _rows_target(logits, target)
    *values, stats = op(rows, target, weight, *options)
    # What was not asked for has no rows.
    values = [v if v.shape == stats.shape[1:] else v.new_empty(size, 0) for v in values]
    return (*values, stats.movedim(1, 0)), (0,) * 6


for _op in (TOKEN_STATISTICS, SHARDED_STATISTICS):
    torch.library.register_vmap(_op, functools.partial(_batched_statistics, _op))


@torch.library.register_vmap("cece::token_statistics_backward")
def _(info, in_dims, *args):
    size = info.batch_size
    one = _one(TOKEN_STATISTICS_BACKWARD, in_dims, args)
    if size == 0:
        return _nothing(args[4], one)
    if args[6] is not None and in_dims[6] is not None:
        return _loop(TOKEN_STATISTICS_BACKWARD, size, in_dims, args)
    *grads, logits, target, _, stats = (_batched(size, d, a) for d, a in zip(in_dims[:8], args[:8], strict=True))
    rows, target = _classes_second(logits), _rows_target(logits, target)
    out = TOKEN_STATISTICS_BACKWARD(*grads, rows, target, args[6], stats.movedim(0, 1), *args[8:])
    return out.movedim(1, 2) if out.dim() > 2 else out, 0


def _rows_target(logits, target):
    return target if target is None or target.dim() < logits.dim() else _classes_second(target)


def _batch_in_front(dims, *tensors):
    """Operands that broadcast against each other, each with the batch in front."""
    ranks = [t.dim() - (d is not None) for t, d in zip(tensors, dims, strict=True) if t is not None]
    rank = max(ranks)

    def lift(t, d):
        if t is None:
            return None
        t = t.movedim(d, 0) if d is not None else t[None]
        return t.reshape(t.shape[0], *(1,) * (rank - t.dim() + 1), *t.shape[1:])

    return [lift(t, d) for t, d in zip(tensors, dims, strict=True)]


def _dims(in_dims, args):
    """One batch dimension or None for each argument: those left out have none, and a list of numbers has one in all."""
    dims = [*in_dims, *[None] * (len(args) - len(in_dims))]
    return [d if isinstance(a, torch.Tensor) else None for a, d in zip(args, dims, strict=True)]


@torch.library.register_vmap("cece::binary_cross_entropy_forward")
def _(info, in_dims, input, target, weight, pos_weight, kind, reduction, mask=None, own=(), offsets=None, padding=None):
    size, args = info.batch_size, (input, target, weight, pos_weight, kind, reduction, mask, own, offsets, padding)
    dims = _dims(in_dims, args)
    one = _one(BCE, dims, args)
    if size == 0:
        return _nothing(input, one)
    if padding is not None:
        return _loop(BCE, size, dims, args)
    tensors = _batch_in_front([*dims[:4], dims[6]], input, target, weight, pos_weight, mask)
    input, target, weight, pos_weight, mask = tensors
    input, target = input.expand(size, *input.shape[1:]), target.expand(size, *target.shape[1:])
    loss = BCE(input, target, weight, pos_weight, kind, NONE, mask, own)
    if reduction != NONE:
        loss = loss.reshape(size, -1)
        used = torch.full_like(loss[:, 0], loss.shape[1]) if mask is None else _used(mask, input)
        loss = loss.mean(1) if reduction == MEAN else loss.sum(1)
        loss = torch.stack([loss, used], 1) if reduction == COUNTED else loss
    return loss, 0


def _used(mask, input):
    return mask.expand(input.shape).reshape(len(input), -1).sum(1)


@torch.library.register_vmap("cece::binary_cross_entropy_backward")
def _(
    info,
    in_dims,
    grad,
    input,
    target,
    weight,
    pos_weight,
    kind,
    reduction,
    mask=None,
    own=(),
    offsets=None,
    padding=None,
):
    size, args = (
        info.batch_size,
        (grad, input, target, weight, pos_weight, kind, reduction, mask, own, offsets, padding),
    )
    dims = _dims(in_dims, args)
    one = _one(BCE_BACKWARD, dims, args)
    if size == 0:
        return _nothing(input, one)
    if padding is not None:
        return _loop(BCE_BACKWARD, size, dims, args)
    if reduction == COUNTED:
        grad = grad[0] if dims[0] is None else grad.movedim(dims[0], 0)[:, 0]
        dims[0] = None if dims[0] is None else 0
    tensors = _batch_in_front([*dims[:5], dims[7]], grad, input, target, weight, pos_weight, mask)
    grad, input, target, weight, pos_weight, mask = tensors
    input, target = input.expand(size, *input.shape[1:]), target.expand(size, *target.shape[1:])
    if reduction == MEAN:
        grad = grad / input[0].numel()
    grad = grad.expand(input.shape)
    return BCE_BACKWARD(grad, input, target, weight, pos_weight, kind, NONE, mask, own), 0


def _divergence(op, info, in_dims, *args):
    size = info.batch_size
    one = _one(op, in_dims, args)
    if size == 0:
        return _nothing(args[0], one)
    logits, other, mask = (_batched(size, d, t) for d, t in zip(in_dims[:3], args[:3], strict=True))
    loss, stats = op(_classes_second(logits), _classes_second(other), mask, *args[3:])
    return (loss, stats.movedim(1, 0)), (0, 0)


torch.library.register_vmap("cece::divergence_forward", functools.partial(_divergence, DIVERGENCE))
torch.library.register_vmap("cece::sharded_divergence_forward", functools.partial(_divergence, SHARDED_DIVERGENCE))


@torch.library.register_vmap("cece::divergence_backward")
def _(info, in_dims, grad, logits, other, mask, stats, *options):
    size = info.batch_size
    args = (grad, logits, other, mask, stats, *options)
    one = _one(DIVERGENCE_BACKWARD, in_dims, args)
    if size == 0:
        return _nothing(logits, one)
    grad, logits, other, mask, stats = (_batched(size, d, t) for d, t in zip(in_dims[:5], args[:5], strict=True))
    logits, other, stats = _classes_second(logits), _classes_second(other), stats.movedim(1, 0)
    out = DIVERGENCE_BACKWARD(grad, logits, other, mask, stats, *options)
    return out.movedim(1, 2) if out.dim() > 2 else out, 0


@torch.library.register_vmap("cece::across_ranks")
def _(info, in_dims, input, *options):
    return ACROSS_RANKS(input, *options), in_dims[0]
