"""Losses of logits that are never held: ``input @ linear_weight.T`` in chunks of rows.

Shapes and types of arguments are checked here; what becomes of a chunk is in ``csrc/linear.cpp``, derivatives in
``csrc/autograd/linear.cpp``.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.modules.loss import _WeightedLoss
from torch.overrides import handle_torch_function, has_torch_function

from ._arguments import (
    as_bool,
    as_divisor,
    as_float,
    as_integer,
    as_positive,
    asked_for,
    check_tensors,
    dtensor_among,
    not_for_dtensors,
    refuse,
)
from ._script import check_reduction, over, reduction_number
from .modules import _Shown
from .ops import LINEAR_CROSS_ENTROPY, LINEAR_TOKEN_STATISTICS, MEAN, NONE, SUM
from .rows import Asked, TokenStatistics

__all__ = ["LinearCrossEntropyLoss", "linear_cross_entropy", "linear_token_statistics"]

NO_GRADIENTS = 0  # which of them to bring along is the operator's to know

if TYPE_CHECKING or not hasattr(torch.nn, "LinearCrossEntropyLoss"):  # torch < 2.13 has none
    _Base = _WeightedLoss
else:
    _Base = torch.nn.LinearCrossEntropyLoss


class _Call:
    """The arguments that every linear loss has, checked, as rows: input (N, in), labels (N, d...)."""

    def __init__(
        self, loss: str, input: Tensor, linear_weight: Tensor, target: Tensor | None, linear_bias: Tensor | None
    ) -> None:
        if input.dim() < 1:
            raise RuntimeError(f"cece.{loss}: expected input of shape (in), (N, in) or (..., in), got {_shape(input)}")
        if linear_weight.dim() < 2:
            raise RuntimeError(
                f"cece.{loss}: expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}:"
                " it must have shape (C, in) or (C, d1, ..., in)"
            )
        if input.shape[-1] != linear_weight.shape[-1]:
            raise RuntimeError(
                f"cece.{loss}: expected equal input and linear_weight last dimensions (in_features), got"
                f" {input.shape[-1]} and {linear_weight.shape[-1]}, respectively"
            )
        batch, outputs = input.shape[:-1], linear_weight.shape[:-1]
        if len(outputs) > 1 and not batch:
            raise RuntimeError(
                f"cece.{loss}: K-dimensional loss defined by linear_weight shape {_shape(linear_weight)} requires"
                f" batched input, (N, {input.shape[-1]}), got unbatched input with shape {_shape(input)}"
            )
        if linear_bias is not None and linear_bias.shape != outputs:
            raise RuntimeError(
                f"cece.{loss}: expected linear_bias shape {tuple(outputs)}, got {tuple(linear_bias.shape)}"
            )
        self.rows, soft_shape = (*batch, *outputs[1:]), (*batch, *outputs)
        self.soft = target is not None and tuple(target.shape) == soft_shape
        if target is not None and not self.soft and tuple(target.shape) != self.rows:
            raise RuntimeError(
                f"cece.{loss}: target must have shape {self.rows} for class indices or {soft_shape} for probabilities,"
                f" got {_shape(target)}"
            )
        kind = input.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):  # as torch's linear: its dtype for all but float64
            dtype = torch.get_autocast_dtype(kind)
            input, linear_weight, linear_bias = (
                t if t is None or t.dtype is torch.float64 or not t.is_floating_point() else t.to(dtype)
                for t in (input, linear_weight, linear_bias)
            )
        for name, t in (("linear_weight", linear_weight), ("linear_bias", linear_bias), ("target", target)):
            if t is not None and t.device != input.device:
                raise RuntimeError(f"cece.{loss}: {name} must be on input's device {input.device}, got {t.device}")
            if t is not None and name != "target" and t.dtype is not input.dtype:
                raise RuntimeError(f"cece.{loss}: {name} must have input's dtype {input.dtype}, got {t.dtype}")
        self.input = input.reshape(math.prod(batch), input.shape[-1])
        self.linear_weight, self.linear_bias = linear_weight, linear_bias
        self.target = None if target is None else target.reshape(self.input.shape[0], *target.shape[len(batch) :])
        self.compact = _may_wait(kind)

    def token_weight(self, loss: str, t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        if not t.is_floating_point():
            raise refuse(loss, "token_weight", "a floating point tensor", t.dtype)
        if tuple(t.shape) != self.rows:
            raise ValueError(
                f"cece.{loss}: token_weight must have the shape of the rows' losses, {list(self.rows)}, got"
                f" {list(t.shape)}"
            )
        return t.reshape(self.input.shape[0], *self.linear_weight.shape[1:-1])

    def shaped(self, t: Tensor) -> Tensor:
        """A result of rows, in the rows' shape."""
        return t.reshape(self.rows)


def _may_wait(device: str) -> bool:
    """Whether the number of rows that count may be read on the host."""
    return device != "cuda" or not (torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing())


def _shape(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)


def _check_chunk_size(loss: str, chunk_size: Any) -> int:
    if chunk_size is None:
        return 0
    chunk_size = as_integer(loss, "chunk_size", chunk_size)
    if chunk_size < 1:
        raise ValueError(f"cece.{loss}: chunk_size must be a positive number of rows or None, got {chunk_size}")
    return chunk_size


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    token_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    skip_masked_rows: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    """``cross_entropy(linear(input, linear_weight, linear_bias), target)``, logits held for a chunk of rows at a time.

    A drop-in for :func:`torch.nn.functional.linear_cross_entropy` of torch 2.13, on every torch. With ``'mean'`` and
    ``'sum'`` the gradients are formed along with the loss, three matrix products in all; with ``'none'`` the backward
    forms the logits again. The logits of all rows are held only where a gradient must itself be differentiable, in
    forward mode, under ``torch.func`` and for gradients of probability targets and class weights.

    Args:
        input: what the last layer gets, shape ``(in)``, ``(N, in)`` or ``(..., in)``; float64, float32, float16 or
            bfloat16. Logits and sums of the last two are float32.
        linear_weight: shape ``(C, in)`` or ``(C, d1, ..., dk, in)``, input's dtype. Logits are
            ``(..., C, d1, ..., dk)``.
        target: class indices in ``[0, C)`` or ``ignore_index``, shape ``(...)`` or ``(..., d1, ..., dk)``, any integer
            dtype; or probabilities of the logits' shape, floating point.
        linear_bias: shape ``(C)`` or ``(C, d1, ..., dk)``, input's dtype.
        weight: a factor for each class, shape ``(C)``, any floating dtype.
        reduction: ``'none'``; ``'sum'``; ``'mean'``, which divides by the summed weights of the labels, and with
            probabilities by the number of rows.
        ignore_index: rows with this label have loss and gradient 0 and do not count in the mean; None is -100. They
            are left out of the matrix products. (On CUDA their number is waited for, but for torch.compile and CUDA
            graphs, where they take part with a gradient of 0.)
        label_smoothing: in [0, 1], the part of the target that is spread over all classes.
        options: torch's ``LinearCrossEntropyOptions``: ``batch_chunk_size`` is taken for ``chunk_size``, the rest is
            not needed.
        token_weight: a factor for each row's loss, shape of the rows, floating point, differentiable.
        normalizer: what ``'mean'`` divides by in place of the above, a number or a tensor of shape ``()``: the labels
            of a whole accumulated step, say (``num_items_in_batch``). Never waited for.
        z_loss: adds ``z_loss * logsumexp(logits) ** 2`` to each row's loss, before its factor.
        logit_scale: a factor of the logits.
        softcap: the logits are ``softcap * tanh(logits / softcap)``, after ``logit_scale``.
        skip_masked_rows: a row whose logits are all -inf has loss and gradient 0; else NaN.
        chunk_size: rows whose logits are held at a time. None: a fourteenth of the rows, in whole 48s, but no fewer
            than 48 or than fill 16 MiB with logits, and no more than 4096.

    Returns:
        The loss in nats, float32 (float64 if input or probabilities are): a scalar, with ``'none'`` the rows' shape.

    Raises:
        IndexError: a label out of range, by position and value. On CUDA its row's loss and gradient are NaN instead.
        ValueError: an unknown reduction, a normalizer with another reduction than ``'mean'``, a chunk_size below 1.
        RuntimeError: a shape, dtype or device that does not fit, ignore_index beside probabilities.
        TypeError: an argument of the wrong type.

    Source: as :func:`cross_entropy`; z-loss: Chowdhery et al. (2022), PaLM, 5; softcap: Gemma Team (2024), Gemma 2, 2.
    """
    tensors = input, linear_weight, target, linear_bias, weight, token_weight, normalizer
    if has_torch_function(tensors):
        return handle_torch_function(
            linear_cross_entropy,
            tensors,
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
            **asked_for(
                token_weight=token_weight,
                normalizer=normalizer,
                z_loss=z_loss,
                logit_scale=logit_scale,
                softcap=softcap,
                skip_masked_rows=skip_masked_rows,
                chunk_size=chunk_size,
            ),
        )
    if chunk_size is None:
        chunk_size = getattr(options, "batch_chunk_size", None)
    if dtensor := dtensor_among(input, linear_weight, target, linear_bias, weight, token_weight):
        given = asked_for(
            z_loss=z_loss,
            logit_scale=logit_scale,
            softcap=softcap,
            skip_masked_rows=skip_masked_rows,
            chunk_size=chunk_size,
        )
        loss: Tensor = dtensor.linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias,
            weight,
            token_weight,
            reduction_number("linear_cross_entropy", None, None, reduction),
            as_divisor("linear_cross_entropy", normalizer),
            ignore_index,
            label_smoothing=label_smoothing,
            **given,
        )
        return loss
    return chunked_cross_entropy(
        input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing, token_weight,
        normalizer, z_loss, logit_scale, softcap, skip_masked_rows, chunk_size,
    )  # fmt: skip


def chunked_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int | None,
    label_smoothing: float,
    token_weight: Tensor | None,
    normalizer: float | Tensor | None,
    z_loss: float,
    logit_scale: float,
    softcap: float | None,
    skip_masked_rows: bool,
    chunk_size: int | None,
    shard: Sequence[Any] = (),
) -> Tensor:
    """Of all classes, or of a shard of them: (first_class, all_classes, ranks, group)."""
    name = "linear_cross_entropy"
    check_tensors(
        name,
        {"input": input, "linear_weight": linear_weight, "target": target},
        {"linear_bias": linear_bias, "weight": weight, "token_weight": token_weight},
    )
    not_for_dtensors(name, input, linear_weight, target, linear_bias, weight, token_weight)
    number = reduction_number(name, None, None, reduction)
    normalizer = as_divisor(name, normalizer)
    if normalizer is not None and number != MEAN:
        raise ValueError(f"cece.{name}: normalizer is what reduction='mean' divides by, got another reduction")
    call = _Call(name, input, linear_weight, target, linear_bias)
    if call.soft and ignore_index is not None:
        raise RuntimeError(f"cece.{name}: ignore_index cannot be specified when target contains probabilities")
    loss: Tensor = LINEAR_CROSS_ENTROPY(
        call.input,
        call.linear_weight,
        call.linear_bias,
        call.target,
        weight,
        call.token_weight(name, token_weight),
        -100 if ignore_index is None else as_integer(name, "ignore_index", ignore_index),
        as_float(name, "label_smoothing", label_smoothing),
        as_float(name, "logit_scale", logit_scale),
        as_positive(name, "softcap", softcap) or 0.0,
        as_bool(name, "skip_masked_rows", skip_masked_rows),
        _check_chunk_size(name, chunk_size),
        call.compact,
        as_float(name, "z_loss", z_loss),
        SUM if normalizer is not None else number,
        NO_GRADIENTS,
        *shard,
    )[0]
    if number == NONE:
        return call.shaped(loss)
    return loss if normalizer is None else over(loss, normalizer)


def linear_token_statistics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None = None,
    *,
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
    """:func:`token_statistics` of ``linear(input, linear_weight, linear_bias)``, whose logits are never held.

    A chunk of rows at a time; the backward forms the logits again. Those of all rows are held only where
    :func:`linear_cross_entropy` holds them.

    Args:
        input: shape ``(in)``, ``(N, in)`` or ``(..., in)``; float64, float32, float16 or bfloat16.
        linear_weight: shape ``(C, in)`` or ``(C, d1, ..., dk, in)``, input's dtype.
        target: class indices, shape ``(...)`` or ``(..., d1, ..., dk)``; an integer dtype. Needed for log_prob. Rows
            whose target is `ignore_index` have 0 in all statistics, no gradient, and no part in the matrix products.
        linear_bias: shape ``(C)`` or ``(C, d1, ..., dk)``, input's dtype.
        log_prob, entropy, logsumexp, collision, argmax, temperature: as in :func:`token_statistics`.
        ignore_index: as in :func:`cross_entropy`.
        chunk_size: as in :func:`linear_cross_entropy`.

    Returns:
        A :class:`TokenStatistics` of target's shape; float32, or float64 if input is. What was not asked for is None.

    Raises:
        IndexError: a label out of range, by position and value (CUDA: that row is NaN).
        ValueError: nothing asked for, log_prob without a target, a temperature or chunk_size not positive.
        RuntimeError: a shape, dtype or device that does not fit.
        TypeError: an argument of the wrong type.

    Source: as :func:`token_statistics`.
    """
    name = "linear_token_statistics"
    tensors = input, linear_weight, target, linear_bias
    if has_torch_function(tensors):
        return handle_torch_function(
            linear_token_statistics,
            tensors,
            input,
            linear_weight,
            target,
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
    if dtensor := dtensor_among(input, linear_weight, target, linear_bias):
        found: TokenStatistics = dtensor.linear_token_statistics(
            input,
            linear_weight,
            target,
            linear_bias,
            log_prob=log_prob,
            entropy=entropy,
            logsumexp=logsumexp,
            collision=collision,
            argmax=argmax,
            temperature=temperature,
            ignore_index=ignore_index,
            chunk_size=chunk_size,
        )
        return found
    asked = Asked(name, target, temperature, log_prob, entropy, logsumexp, collision, argmax)
    return chunked_statistics(input, linear_weight, target, linear_bias, asked, ignore_index, chunk_size)


def chunked_statistics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None,
    linear_bias: Tensor | None,
    asked: Asked,
    ignore_index: int,
    chunk_size: int | None,
    shard: Sequence[Any] = (),
) -> TokenStatistics:
    """Of all classes, or of a shard of them, as above."""
    name = "linear_token_statistics"
    check_tensors(
        name, {"input": input, "linear_weight": linear_weight}, {"target": target, "linear_bias": linear_bias}
    )
    not_for_dtensors(name, input, linear_weight, target, linear_bias)
    call = _Call(name, input, linear_weight, target, linear_bias)
    if call.soft:
        raise RuntimeError(f"cece.{name}: target must be class indices of shape {call.rows}, got {_shape(target)}")
    outputs = LINEAR_TOKEN_STATISTICS(
        call.input,
        call.linear_weight,
        call.linear_bias,
        call.target,
        None,
        as_integer(name, "ignore_index", ignore_index),
        0.0,
        asked.scale,
        0.0,
        False,
        _check_chunk_size(name, chunk_size),
        call.compact,
        asked.wanted,
        *shard,
    )
    return TokenStatistics(*(None if v is None else call.shaped(v) for v in asked.named(outputs)))


class LinearCrossEntropyLoss(_Shown, _Base):
    """:func:`cece.linear_cross_entropy` and its layer, a drop-in for :class:`torch.nn.LinearCrossEntropyLoss`.

    Takes what the last linear layer takes, and holds that layer's parameters: ``linear.weight`` of shape
    ``(num_classes * prod(out_features), in_features)`` and with ``bias=True`` ``linear.bias``, as torch's module, with
    the same state_dict. A model's own head is tied to it by ``loss.linear.weight = head.weight``. ``weight`` is a
    buffer. token_weight and normalizer change from step to step: they are arguments of the call.

    Args:
        in_features: size of a row of the input.
        num_classes: C.
        out_features: (d1, ..., dk), where each row has so many labels.
        bias: whether the logits have one.
        device, dtype: of the parameters.
        reduction, weight, ignore_index, label_smoothing, options, z_loss, logit_scale, softcap, skip_masked_rows,
            chunk_size: the function's.
    """

    __constants__: list[str] = [
        "num_classes",
        "out_features",
        "reduction",
        "ignore_index",
        "label_smoothing",
        "z_loss",
        "logit_scale",
        "softcap",
        "skip_masked_rows",
        "chunk_size",
    ]
    num_classes: int
    out_features: tuple[int, ...]
    ignore_index: int | None
    label_smoothing: float
    options: Any
    z_loss: float
    logit_scale: float
    softcap: float | None
    skip_masked_rows: bool
    chunk_size: int | None
    linear: torch.nn.Linear

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        z_loss: float = 0.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        skip_masked_rows: bool = False,
        chunk_size: int | None = None,
    ) -> None:
        name = "LinearCrossEntropyLoss"
        if weight is not None and tuple(weight.shape) != (num_classes,):
            raise RuntimeError(f"cece.{name}: expected weight shape to be {(num_classes,)}, got {_shape(weight)}")
        if not 0 <= label_smoothing <= 1:
            raise RuntimeError(f"cece.{name}: expected label_smoothing to be in range [0, 1], got {label_smoothing}")
        check_reduction(name, reduction)
        _WeightedLoss.__init__(self, weight, None, None, reduction)
        self.num_classes, self.out_features = num_classes, out_features
        self.ignore_index, self.label_smoothing, self.options = ignore_index, label_smoothing, options
        self.z_loss, self.logit_scale, self.softcap = z_loss, logit_scale, softcap
        self.skip_masked_rows, self.chunk_size = skip_masked_rows, chunk_size
        outputs = math.prod(out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, outputs, bias=bias, device=device, dtype=dtype)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        token_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        outputs, bias = (self.num_classes, *self.out_features), self.linear.bias
        return linear_cross_entropy(
            input,
            self.linear.weight.reshape(*outputs, self.linear.in_features),
            target,
            linear_bias=None if bias is None else bias.reshape(outputs),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            token_weight=token_weight,
            normalizer=normalizer,
            z_loss=self.z_loss,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            skip_masked_rows=self.skip_masked_rows,
            chunk_size=self.chunk_size,
        )
