"""What tracing and vmap need to know of the operators in ``csrc/ops.cpp``: the shapes they return, and batching rules.

Derivatives are registered in ``csrc/autograd.cpp``. Nothing here runs in plain eager mode.
"""

import torch

CROSS_ENTROPY = torch.ops.cece.cross_entropy_forward.default
CROSS_ENTROPY_BACKWARD = torch.ops.cece.cross_entropy_backward.default
BCE = torch.ops.cece.binary_cross_entropy_forward.default
BCE_BACKWARD = torch.ops.cece.binary_cross_entropy_backward.default

NONE, MEAN, SUM = 0, 1, 2  # reductions, with torch's numbers


def _acc(*tensors):
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def _rows(logits):
    return logits.shape[:1] + logits.shape[2:] if logits.dim() > 1 else logits.shape[:0]


# ---- shapes


def _check_devices(loss, input, **others):
    """What csrc/check.h says of real tensors; a meta tensor among them comes here instead."""
    for name, t in others.items():
        if t is not None and t.device != input.device:
            raise RuntimeError(f"cece.{loss}: {name} must be on input's device {input.device}, got {t.device}")


@torch.library.register_fake("cece::cross_entropy_forward")
def _(logits, target, weight, reduction, ignore_index, label_smoothing, inplace_backward=False):
    _check_devices("cross_entropy", logits, target=target, weight=weight)
    rows = _rows(logits)
    acc = _acc(logits, target if target.dim() == logits.dim() else None)
    loss = logits.new_empty(rows if reduction == NONE else (), dtype=acc)
    return loss, logits.new_empty((3, *rows), dtype=acc), logits.new_empty((), dtype=acc)


@torch.library.register_fake("cece::cross_entropy_backward")
def _(grad, logits, target, weight, stats, total_weight, reduction, ignore_index, label_smoothing):
    return torch.empty_like(logits)


@torch.library.register_fake("cece::cross_entropy_backward_")
def _(grad, logits, target, weight, stats, total_weight, reduction, ignore_index, label_smoothing):
    return None


@torch.library.register_fake("cece::binary_cross_entropy_forward")
def _(input, target, weight, pos_weight, with_logits, reduction):
    loss = "binary_cross_entropy_with_logits" if with_logits else "binary_cross_entropy"
    _check_devices(loss, input, target=target, weight=weight, pos_weight=pos_weight)
    return input.new_empty(input.shape if reduction == NONE else (), dtype=_acc(input, target, weight))


@torch.library.register_fake("cece::binary_cross_entropy_backward")
def _(grad, input, target, weight, pos_weight, with_logits, reduction):
    return torch.empty_like(input)


# ---- batching: the batch becomes rows. Each rule calls the operator once; only a batch of class weights takes a loop.


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


def _fold(logits, target):
    """Batch and rows as rows: (B, C) and (B, N, C, d...) logits as (B * N, C, d...)."""
    soft = target.dim() == logits.dim()
    if logits.dim() == 2:
        return logits, target
    return logits.flatten(0, 1), target.flatten(0, 1) if soft or target.dim() > 1 else target


@torch.library.register_vmap("cece::cross_entropy_forward")
def _(info, in_dims, logits, target, weight, reduction, ignore_index, label_smoothing, inplace_backward=False):
    size = info.batch_size
    args = (logits, target, weight, reduction, ignore_index, label_smoothing)
    if weight is not None and in_dims[2] is not None:
        return _loop(CROSS_ENTROPY, size, in_dims[:6], args)
    logits, target = _batched(size, in_dims[0], logits), _batched(size, in_dims[1], target)
    rows = (size, *_rows(logits[0])) if size else (0,)
    soft = target.dim() == logits.dim()
    flat_logits, flat_target = _fold(logits, target)
    loss, stats, _ = CROSS_ENTROPY(flat_logits, flat_target, weight, NONE, ignore_index, label_smoothing)
    loss, stats = loss.reshape(rows), stats.reshape(3, *rows).movedim(1, 0)
    per_batch = loss.reshape(size, -1)
    if soft:
        total = torch.full_like(per_batch[:, 0], per_batch.shape[1]) if per_batch.shape[1] else loss.new_zeros(size)
    else:
        valid = (target != ignore_index).reshape(size, -1)
        weights = valid if weight is None else torch.where(valid, weight[target.reshape(size, -1).long() * valid], 0)
        total = weights.to(loss.dtype).sum(1)
    if reduction != NONE:
        loss = per_batch.sum(1) / total if reduction == MEAN else per_batch.sum(1)
    return (loss, stats, total), (0, 0, 0)


@torch.library.register_vmap("cece::cross_entropy_backward")
def _(info, in_dims, grad, logits, target, weight, stats, total_weight, reduction, ignore_index, label_smoothing):
    size = info.batch_size
    args = (grad, logits, target, weight, stats, total_weight, reduction, ignore_index, label_smoothing)
    if weight is not None and in_dims[3] is not None:
        return _loop(CROSS_ENTROPY_BACKWARD, size, in_dims, args)
    grad, logits, target, stats, total_weight = (_batched(size, in_dims[i], args[i]) for i in (0, 1, 2, 4, 5))
    rows = stats.shape[2:]
    if reduction == MEAN:
        grad = grad / total_weight
    if reduction != NONE:
        grad = grad.reshape(size, *(1 for _ in rows)).expand(size, *rows)
    flat_logits, flat_target = _fold(logits, target)
    flat_rows = (size * rows[0], *rows[1:]) if len(rows) else (size,)
    out = CROSS_ENTROPY_BACKWARD(
        grad.reshape(flat_rows),
        flat_logits,
        flat_target,
        weight,
        stats.movedim(0, 1).reshape(3, *flat_rows),
        total_weight.new_ones(()),
        NONE,
        ignore_index,
        label_smoothing,
    )
    return out.reshape(logits.shape), 0


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


@torch.library.register_vmap("cece::binary_cross_entropy_forward")
def _(info, in_dims, input, target, weight, pos_weight, with_logits, reduction):
    size = info.batch_size
    input, target, weight, pos_weight = _batch_in_front(in_dims[:4], input, target, weight, pos_weight)
    input, target = input.expand(size, *input.shape[1:]), target.expand(size, *target.shape[1:])
    loss = BCE(input, target, weight, pos_weight, with_logits, NONE)
    if reduction != NONE:
        loss = loss.reshape(size, -1)
        loss = loss.mean(1) if reduction == MEAN else loss.sum(1)
    return loss, 0


@torch.library.register_vmap("cece::binary_cross_entropy_backward")
def _(info, in_dims, grad, input, target, weight, pos_weight, with_logits, reduction):
    size = info.batch_size
    grad, input, target, weight, pos_weight = _batch_in_front(in_dims[:5], grad, input, target, weight, pos_weight)
    input, target = input.expand(size, *input.shape[1:]), target.expand(size, *target.shape[1:])
    if reduction == MEAN:
        grad = grad / input[0].numel()
    grad = grad.expand(input.shape)
    return BCE_BACKWARD(grad, input, target, weight, pos_weight, with_logits, NONE), 0
