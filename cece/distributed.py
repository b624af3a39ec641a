"""Losses of logits whose classes are cut over the processes of a group, as a vocabulary-parallel output layer has them.

Every rank calls with its own shard of the classes, in rank order, and has the same rows; labels count among all
classes. Each reads its shard once, one small all-gather tells the others what it leaves of each row (16 bytes a row for
a label's loss, 32 at most), and every rank comes to the same result, bit for bit. Backward exchanges nothing: the
incoming gradient is taken to be the same on every rank, and a shard's gradient is its own.

A label that ranks do not agree about makes its row NaN; a rank that stays away ends in torch's own timeout error.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ._arguments import (
    as_bool,
    as_divisor,
    as_float,
    as_integer,
    as_positive,
    check_dim,
    check_tensors,
    not_for_dtensors,
    refuse,
)
from ._script import classes_second, constant_when_compiled, label_weights, of_rows, reduce_rows, reduction_number
from .linear import chunked_cross_entropy, chunked_statistics
from .ops import MEAN, SHARDED_DIVERGENCE, SHARDED_STATISTICS, WANTED
from .rows import Asked, TokenStatistics

__all__ = ["cross_entropy", "kl_divergence", "linear_cross_entropy", "linear_token_statistics", "token_statistics"]


# ---- which classes are here


class Shard(NamedTuple):
    """As the operators take it: classes first, first + 1, ... of all, the others with the ranks of a group."""

    first: int
    all: int
    ranks: int
    group: str


def shard_of(
    loss: str, name: str, t: Tensor, dim: int, group: dist.ProcessGroup | None, classes: int | Sequence[int] | None
) -> Shard:
    """This rank's, whose classes are dimension `dim` of its argument t."""
    if t.dim() == 0:
        raise RuntimeError(f"cece.{loss}: {name} must have a dimension of classes, got shape ()")
    if group is None:
        group = dist.distributed_c10d._get_default_group()
    if not isinstance(group, dist.ProcessGroup):
        raise refuse(loss, "group", "a torch.distributed.ProcessGroup or None", group)
    rank, ranks, here = dist.get_rank(group), dist.get_world_size(group), t.shape[dim]
    if rank < 0:
        raise ValueError(f"cece.{loss}: this process must be of the group, which has ranks of others only")
    counts = _counts(loss, group, ranks, here, classes, t.device)
    if here != counts[rank]:
        raise ValueError(
            f"cece.{loss}: {name} must have this rank's classes in dimension {dim}, {counts[rank]} of {sum(counts)},"
            f" got {here}; classes says how they are cut, classes=None asks the ranks"
        )
    if sum(counts) < 1:
        raise ValueError(f"cece.{loss}: there must be at least one class on some rank, got {counts}")
    return Shard(sum(counts[:rank]), sum(counts), ranks, group.group_name)


def _counts(
    loss: str,
    group: dist.ProcessGroup,
    ranks: int,
    here: int,
    classes: int | Sequence[int] | None,
    device: torch.device,
) -> list[int]:
    """How many classes each rank has."""
    if classes is None:
        return _asked(group.group_name, ranks, here, str(device))
    if isinstance(classes, Sequence):
        counts = [as_integer(loss, "classes", n) for n in classes]
        if len(counts) != ranks or any(n < 0 for n in counts):
            raise ValueError(f"cece.{loss}: classes must have a number for each of {ranks} ranks, got {counts}")
        return counts
    every = as_integer(loss, "classes", classes)
    if every < 1:
        raise ValueError(f"cece.{loss}: classes must be the number of all classes, got {every}")
    each = -(-every // ranks)  # as torch.chunk and DTensor cut
    return [min(each, max(0, every - rank * each)) for rank in range(ranks)]


@constant_when_compiled
def _asked(group: str, ranks: int, here: int, device: str) -> list[int]:
    mine = torch.tensor([here], device=device)
    every = torch.empty(ranks, dtype=mine.dtype, device=device)
    dist.all_gather_into_tensor(every, mine, group=dist.distributed_c10d._resolve_process_group(group))
    return every.tolist()


# ---- the losses


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    classes: int | Sequence[int] | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    token_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    skip_masked_rows: bool = False,
    dim: int = 1,
) -> Tensor:
    """:func:`cece.cross_entropy` of logits whose classes are cut over the ranks of a group.

    Args:
        logits: this rank's classes, shape ``(C)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``, or as `dim` says; C may
            differ from rank to rank and be 0.
        target: class indices among all classes, the same on every rank; or probabilities of this rank's classes, of
            logits' shape.
        weight: a factor for each of this rank's classes, shape ``(C)``.
        group: the processes that have the other classes, in rank order; None: the default group.
        classes: the number of all classes, cut as :func:`torch.chunk` and DTensor cut them (equal parts, the last ones
            less or nothing); or a sequence, each rank's number. None: the ranks tell each other, a second, tiny
            exchange that is waited for (under :func:`torch.compile` as it compiles).
        ignore_index, reduction, label_smoothing, token_weight, normalizer, z_loss, logit_scale, softcap,
            skip_masked_rows: as in :func:`cece.cross_entropy`; of rows, and so the same on every rank.
        dim: the dimension of the classes (of one row, the only one); -1 for ``(batch, sequence, C)``.

    Returns:
        The loss of all classes in nats, the same bits on every rank; float32 (float64 if logits or probabilities are):
        a scalar, with ``'none'`` the rows' shape. Every order of derivative is that of one process, where each rank
        differentiates the same thing; a derivative with respect to logits is this rank's.

    Raises:
        IndexError: a label out of range, on every rank (CUDA: that row is NaN); a dim out of range.
        ValueError: logits that have not the number of classes that `classes` says; a process outside the group; what
            :func:`cece.cross_entropy` raises.
        RuntimeError: a shape, dtype or device that does not fit; torch's own where there is no process group, or a rank
            is dead or late.
        TypeError: an argument of the wrong type.

    Source: as :func:`cece.cross_entropy`; shards of classes: Shoeybi et al. (2019), "Megatron-LM", 3.
    """
    tensors = logits, target, weight, token_weight, normalizer
    if has_torch_function(tensors):
        return handle_torch_function(
            cross_entropy,
            tensors,
            logits,
            target,
            weight,
            group=group,
            classes=classes,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            token_weight=token_weight,
            normalizer=normalizer,
            z_loss=z_loss,
            logit_scale=logit_scale,
            softcap=softcap,
            skip_masked_rows=skip_masked_rows,
            dim=dim,
        )
    name = "distributed.cross_entropy"
    check_tensors(name, {"logits": logits, "target": target}, {"weight": weight, "token_weight": token_weight})
    not_for_dtensors(name, logits, target, weight, token_weight)
    if token_weight is not None and not token_weight.is_floating_point():
        raise refuse(name, "token_weight", "a floating point tensor", token_weight.dtype)
    number, normalizer = reduction_number(name, None, None, reduction), as_divisor(name, normalizer)
    if normalizer is not None and number != MEAN:
        raise ValueError(f"cece.{name}: normalizer is what reduction='mean' divides by, got another reduction")
    ignore_index, z_loss = as_integer(name, "ignore_index", ignore_index), as_float(name, "z_loss", z_loss)
    skip_masked_rows = as_bool(name, "skip_masked_rows", skip_masked_rows)
    dim = check_dim(name, logits, dim)
    soft = target.dim() == logits.dim()
    rows = classes_second(logits, dim)
    loss, _, logsumexp, _, _, stats = SHARDED_STATISTICS(
        rows,
        classes_second(target, dim) if soft else target,
        weight,
        ignore_index,
        as_float(name, "label_smoothing", label_smoothing),
        as_float(name, "logit_scale", logit_scale),
        as_positive(name, "softcap", softcap) or 0.0,
        skip_masked_rows,
        WANTED["log_prob"] | (WANTED["logsumexp"] if z_loss else 0),
        *shard_of(name, "logits", logits, dim, group, classes),
    )
    if z_loss:
        loss = loss + z_loss * logsumexp.square()
    alive = stats.select(0, 1) > -float("inf") if skip_masked_rows else None
    labels = None if soft else target
    if labels is None or number != MEAN:
        counts = None
    elif weight is None:
        counts = label_weights(labels, None, ignore_index, loss.dtype)
    else:
        counts = stats[-1]  # the label's weight, which another rank may have
    return of_rows(loss, labels, ignore_index, number, token_weight, normalizer, counts, alive)


def token_statistics(
    logits: Tensor,
    target: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    classes: int | Sequence[int] | None = None,
    log_prob: bool | None = None,
    entropy: bool = False,
    logsumexp: bool = False,
    collision: bool = False,
    argmax: bool = False,
    temperature: float = 1.0,
    ignore_index: int = -100,
    dim: int = 1,
) -> TokenStatistics:
    """:func:`cece.token_statistics` of logits whose classes are cut over the ranks of a group.

    Args:
        logits, target, group, classes, dim: as in :func:`cross_entropy`; target holds class indices.
        log_prob, entropy, logsumexp, collision, argmax, temperature, ignore_index: as in
            :func:`cece.token_statistics`. argmax counts among all classes.

    Returns:
        A :class:`cece.TokenStatistics` of all classes, the same bits on every rank.

    Raises:
        IndexError: a label out of range, on every rank (CUDA: that row is NaN); a dim out of range.
        ValueError: nothing asked for, log_prob without a target, a temperature not positive; `classes`, as above.
        RuntimeError: a shape, dtype or device that does not fit; of a rank that is dead or late, torch's.
        TypeError: an argument of the wrong type.

    Source: as :func:`cece.token_statistics`.
    """
    if has_torch_function((logits, target)):
        return handle_torch_function(
            token_statistics,
            (logits, target),
            logits,
            target,
            group=group,
            classes=classes,
            log_prob=log_prob,
            entropy=entropy,
            logsumexp=logsumexp,
            collision=collision,
            argmax=argmax,
            temperature=temperature,
            ignore_index=ignore_index,
            dim=dim,
        )
    name = "distributed.token_statistics"
    check_tensors(name, {"logits": logits}, {"target": target})
    not_for_dtensors(name, logits, target)
    ignore_index = as_integer(name, "ignore_index", ignore_index)
    asked = Asked(name, target, temperature, log_prob, entropy, logsumexp, collision, argmax)
    dim = check_dim(name, logits, dim)
    if target is not None and target.dim() == logits.dim():
        raise ValueError(
            f"cece.{name}: target must be class indices, without the classes' dimension, got {target.dim()}"
        )
    shard = shard_of(name, "logits", logits, dim, group, classes)
    rows = classes_second(logits, dim)
    return asked.named(
        SHARDED_STATISTICS(rows, target, None, ignore_index, 0.0, asked.scale, 0.0, False, asked.wanted, *shard)
    )


def kl_divergence(
    logits: Tensor,
    target_logits: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    classes: int | Sequence[int] | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    dim: int = 1,
) -> Tensor:
    """:func:`cece.kl_divergence` of logits whose classes are cut over the ranks of a group, both in the same way.

    By the chain rule of divergences a shard is one more class: 7 numbers of each row (28 bytes) say how far the shard's
    two distributions are apart, and by how much it as a whole. Tiny divergences keep their digits.

    Args:
        logits, target_logits: this rank's classes, of the same shape; otherwise as in :func:`cece.kl_divergence`. A
            teacher that gives only its top k is not among them: its classes would be other ranks'.
        group, classes, dim: as in :func:`cross_entropy`.
        temperature, reduction, mask, token_weight, normalizer: as in :func:`cece.kl_divergence`; of rows, and so the
            same on every rank.

    Returns:
        The divergence of all classes in nats, the same bits on every rank. Differentiable in both, in every order.

    Raises:
        ValueError: shapes that differ, a temperature that is not above 0, an unknown reduction, a normalizer without
            ``'mean'``; `classes`, as in :func:`cross_entropy`.
        RuntimeError: any other shape, dtype or device that does not fit; of a rank that is dead or late, torch's.
        TypeError: an argument of the wrong type.

    Source: as :func:`cece.kl_divergence`; chain rule: Cover, Thomas, Elements of Information Theory (2006), 2.5.
    """
    tensors = logits, target_logits, mask, token_weight, normalizer
    if has_torch_function(tensors):
        return handle_torch_function(
            kl_divergence,
            tensors,
            logits,
            target_logits,
            group=group,
            classes=classes,
            temperature=temperature,
            reduction=reduction,
            mask=mask,
            token_weight=token_weight,
            normalizer=normalizer,
            dim=dim,
        )
    name = "distributed.kl_divergence"
    optional: dict[str, object] = {"mask": mask, "token_weight": token_weight}
    check_tensors(name, {"logits": logits, "target_logits": target_logits}, optional)
    not_for_dtensors(name, logits, target_logits, mask, token_weight)
    temperature, normalizer = as_float(name, "temperature", temperature), as_divisor(name, normalizer)
    dim = check_dim(name, logits, dim)
    shard = shard_of(name, "logits", logits, dim, group, classes)
    x, y = classes_second(logits, dim), classes_second(target_logits, dim)
    rows = SHARDED_DIVERGENCE(x, y, mask, temperature, shard.ranks, shard.group)[0]
    return reduce_rows(name, rows, reduction, mask, token_weight, normalizer)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    classes: int | Sequence[int] | None = None,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    token_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    skip_masked_rows: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    """:func:`cece.linear_cross_entropy` with linear_weight cut along its classes over the ranks of a group.

    Each chunk of rows is one exchange, as in :func:`cross_entropy`. input is the same on every rank, and so is its
    gradient, a sum over the ranks: one reduction, where the gradients are formed.

    Args:
        input: shape ``(in)``, ``(N, in)`` or ``(..., in)``, the same on every rank.
        linear_weight, linear_bias, weight: of this rank's classes, shapes ``(C, in)`` or ``(C, d1, ..., dk, in)``,
            ``(C)`` or ``(C, d1, ..., dk)``, and ``(C)``.
        target, group, classes: as in :func:`cross_entropy`; probabilities of shape ``(..., C, d1, ..., dk)``.
        reduction, ignore_index, label_smoothing, token_weight, normalizer, z_loss, logit_scale, softcap,
            skip_masked_rows, chunk_size: as in :func:`cece.linear_cross_entropy`.

    Returns:
        The loss of all classes, the same bits on every rank. Raises what the two functions above raise.

    Source: as :func:`cross_entropy`.
    """
    tensors = input, linear_weight, target, linear_bias, weight, token_weight, normalizer
    if has_torch_function(tensors):
        return handle_torch_function(
            linear_cross_entropy,
            tensors,
            input,
            linear_weight,
            target,
            group=group,
            classes=classes,
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            token_weight=token_weight,
            normalizer=normalizer,
            z_loss=z_loss,
            logit_scale=logit_scale,
            softcap=softcap,
            skip_masked_rows=skip_masked_rows,
            chunk_size=chunk_size,
        )
    shard = _linear_shard("distributed.linear_cross_entropy", linear_weight, group, classes)
    return chunked_cross_entropy(
        input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing, token_weight,
        normalizer, z_loss, logit_scale, softcap, skip_masked_rows, chunk_size, shard,
    )  # fmt: skip


def linear_token_statistics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    classes: int | Sequence[int] | None = None,
    linear_bias: Tensor | None = None,
    log_prob: bool | None = None,
    entropy: bool = False,
    logsumexp: bool = False,
    collision: bool = False,
    argmax: bool = False,
    temperature: float = 1.0,
    ignore_index: int = -100,
    chunk_size: int | None = None,
) -> TokenStatistics:
    """:func:`cece.linear_token_statistics` with linear_weight cut along its classes over the ranks of a group.

    Args:
        input, linear_weight, linear_bias, target, group, classes: as in :func:`linear_cross_entropy`; target holds
            class indices.
        log_prob, entropy, logsumexp, collision, argmax, temperature, ignore_index, chunk_size: as in
            :func:`cece.linear_token_statistics`.

    Returns:
        A :class:`cece.TokenStatistics` of all classes, the same bits on every rank. Raises what
        :func:`token_statistics` raises.

    Source: as :func:`cece.token_statistics`.
    """
    tensors = input, linear_weight, target, linear_bias
    if has_torch_function(tensors):
        return handle_torch_function(
            linear_token_statistics,
            tensors,
            input,
            linear_weight,
            target,
            group=group,
            classes=classes,
            linear_bias=linear_bias,
            log_prob=log_prob,
            entropy=entropy,
            logsumexp=logsumexp,
            collision=collision,
            argmax=argmax,
            temperature=temperature,
            ignore_index=ignore_index,
            chunk_size=chunk_size,
        )
    name = "distributed.linear_token_statistics"
    asked = Asked(name, target, temperature, log_prob, entropy, logsumexp, collision, argmax)
    shard = _linear_shard(name, linear_weight, group, classes)
    return chunked_statistics(input, linear_weight, target, linear_bias, asked, ignore_index, chunk_size, shard)


def _linear_shard(
    name: str, linear_weight: Tensor, group: dist.ProcessGroup | None, classes: int | Sequence[int] | None
) -> Shard:
    check_tensors(name, {"linear_weight": linear_weight}, {})
    not_for_dtensors(name, linear_weight)
    if linear_weight.dim() < 2:
        raise RuntimeError(
            f"cece.{name}: linear_weight must have shape (C, in) or (C, d1, ..., in), got {tuple(linear_weight.shape)}"
        )
    return shard_of(name, "linear_weight", linear_weight, 0, group, classes)
