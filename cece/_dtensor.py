"""The losses of DTensors: each rank runs the ordinary kernels on its own rows; one all-reduce adds what they sum to.

Any dimension may be sharded but that of the classes: input is gathered along it first, and where it is a partial sum.
A rank never takes a mean of its own: shards may be uneven, empty or all ignored, so means could not be averaged.
Only a call with a DTensor imports this module, which imports torch.distributed.
"""

import math

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from .ops import BCE, CROSS_ENTROPY, MEAN, NONE, SUM, label_weights


def cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing):
    input, target, weight = _as_dtensors("cross_entropy", input=input, target=target, weight=weight)
    every, class_dim = range(input.dim()), min(1, input.dim() - 1)
    rows = [d for d in every if d != class_dim]
    soft = target.dim() == input.dim()
    args = (input, every), (target, every if soft else rows), (weight, [class_dim])
    shards = _shards(args, rows)
    logits, target, weight = (_local(t, dims, shards) for t, dims in args)

    local_reduction = NONE if reduction == NONE else SUM
    loss = CROSS_ENTROPY(logits, target, weight, local_reduction, ignore_index, label_smoothing)[0]
    if reduction == MEAN and not soft:
        total = label_weights(target, weight, ignore_index, loss.dtype).sum()
        loss, total = _sum(torch.stack([loss, total]), input.device_mesh, shards)
        return loss / total
    return _reduced(loss, input, rows, shards, reduction)


def binary_cross_entropy(name, input, target, weight, pos_weight, kind, reduction, parameters=()):
    args = _as_dtensors(name, input=input, target=target, weight=weight, pos_weight=pos_weight)
    input, target, *factors = args
    every = range(input.dim())
    args = (input, every), (target, every), *((t, _broadcast_dims(t, input)) for t in factors)
    shards = _shards(args, every)
    parts = (_local(t, dims, shards) for t, dims in args)
    loss = BCE(*parts, kind, NONE if reduction == NONE else SUM, None, parameters)
    return _reduced(loss, input, every, shards, reduction)


def _as_dtensors(loss, **args):
    """The arguments as DTensors of one mesh, on torch's terms: plain tensors only where its own losses take them."""
    first, mesh = next((name, t.device_mesh) for name, t in args.items() if isinstance(t, DTensor))
    for name, t in args.items():
        if isinstance(t, DTensor):
            if t.device_mesh != mesh:
                raise RuntimeError(f"cece.{loss}: {name} must be on {first}'s mesh {mesh}, got {t.device_mesh}")
        elif isinstance(t, torch.Tensor) and (t.numel() == 1 or DTensor._op_dispatcher._allow_implicit_replication):
            args[name] = DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim)
        elif t is not None:
            raise RuntimeError(
                f"cece.{loss}: got mixed torch.Tensor and DTensor: {name} must be a DTensor, as {first} is, got"
                f" {type(t).__name__}; torch.distributed.tensor.distribute_tensor makes it one"
            )
    return args.values()


# ---- placements. An argument's `dims` say which of input's dimensions each of its own is, None where it is broadcast.


def _broadcast_dims(t, input):
    return [] if t is None else [None if n == 1 and d >= 0 else d for d, n in enumerate(t.shape, input.dim() - t.dim())]


def _fits(t, dims, input):
    sizes = [1 if d is None else input.size(d) if d >= 0 else None for d in dims]
    return t is None or list(t.shape) == sizes


def _shards(args, rows):
    """How the rows are sharded: as input is. Where shapes disagree, not at all: each rank then raises, and the same."""
    input = args[0][0]
    fit = all(_fits(t, dims, input) for t, dims in args)
    return [p if fit and type(p) is Shard and p.dim in rows else Replicate() for p in input.placements]


def _follow(shards, dims, otherwise):
    """The shards in the dimensions of an argument; `otherwise` where it lacks the one that is sharded."""
    where = {d: Shard(i) for i, d in enumerate(dims)}
    return [where.get(p.dim, otherwise) if p.is_shard() else p for p in shards]


def _local(t, dims, shards):
    """What the rows of this rank need of t. Its gradient is summed over the ranks that share it and placed as t is."""
    if t is None:
        return None
    t = t.redistribute(placements=_follow(shards, dims, Replicate()))
    return t.to_local(grad_placements=_follow(shards, dims, Partial()))


# ---- reductions


def _dtensor(local, mesh, placements, **shape):
    """from_local alone has no second derivative where the gradient arrives placed otherwise; redistribute has."""
    return DTensor.from_local(local, mesh, placements, **shape).redistribute(placements=placements)


def _sum(local, mesh, shards):
    """The sum of the ranks' `local`, on every rank. Stacked: from_local as Partial has a wrong second derivative."""
    stacked = _dtensor(local.unsqueeze(0), mesh, _follow(shards, (), Shard(0)))
    return stacked.sum(0).redistribute(placements=[Replicate()] * mesh.ndim)


def _reduced(loss, input, rows, shards, reduction):
    """From a rank's losses, or their sum, to those of all; a mean is over rows, whatever their weights."""
    shape = torch.Size([input.size(d) for d in rows])
    if reduction == NONE:
        stride = torch.empty(shape, device="meta").stride()
        return _dtensor(loss, input.device_mesh, _follow(shards, rows, None), shape=shape, stride=stride)
    loss = _sum(loss, input.device_mesh, shards)
    return loss / math.prod(shape) if reduction == MEAN else loss
