"""Losses of logits that are never held: ``input @ linear_weight.T`` in chunks of rows.

Shapes and types of arguments are checked here; what becomes of a chunk is in ``csrc/linear.cpp``, derivatives in
``csrc/autograd/linear.cpp``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.loss import _WeightedLoss
from torch.overrides import handle_torch_function, has_torch_function

from . import functional
from ._script import check_reduction, reduction_number
from .functional import _bool, _check_tensors, _dtensor_among, _float, _integer
from .modules import _Shown
from .ops import LINEAR_CROSS_ENTROPY, MEAN, NONE, label_weights

__all__ = ["LinearCrossEntropyLoss", "linear_cross_entropy"]

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
        if torch.is_autocast_enabled(kind):  # as torch's linear: its dtype for all but float64
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
        # What rows count is read on the host where that can be waited for.
        self.compact = kind != "cuda" or not (
            torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing()
        )

    def of_rows(self, loss: str, name: str, t: Tensor | None) -> Tensor | None:
        """A factor of each row, (...) or (..., d...), as (N, d...)."""
        if t is None:
            return None
        if tuple(t.shape) != self.rows:
            raise RuntimeError(f"cece.{loss}: {name} must have the shape of the rows {self.rows}, got {_shape(t)}")
        if not t.is_floating_point() or t.device != self.input.device:
            raise RuntimeError(
                f"cece.{loss}: {name} must be a floating point tensor on input's device {self.input.device}, got"
                f" {t.dtype} on {t.device}"
            )
        return t.reshape(self.input.shape[0], *self.linear_weight.shape[1:-1])


def _shape(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)


def _check_chunk_size(loss: str, chunk_size: Any, options: Any) -> int:
    if chunk_size is None:
        chunk_size = getattr(options, "batch_chunk_size", None)
    if chunk_size is None:
        return 0
    chunk_size = _integer(loss, "chunk_size", chunk_size)
    if chunk_size < 1:
        raise ValueError(f"cece.{loss}: chunk_size must be a positive number of rows or None, got {chunk_size}")
    return chunk_size


def _check_softcap(loss: str, softcap: Any) -> float:
    if softcap is None:
        return 0.0
    softcap = _float(loss, "softcap", softcap)
    if not softcap > 0:
        raise ValueError(f"cece.{loss}: softcap must be greater than 0 or None, got {softcap}")
    return softcap


def _check_normalizer(loss: str, normalizer: Any, reduction: int) -> Any:
    if normalizer is None:
        return None
    if reduction != MEAN:
        raise ValueError(f"cece.{loss}: normalizer is what reduction 'mean' divides by, got another reduction with it")
    if isinstance(normalizer, Tensor):
        if normalizer.dim():
            raise ValueError(f"cece.{loss}: normalizer must be a number or a tensor of shape (), got {_shape(normalizer)}")
        return normalizer
    return _float(loss, "normalizer", normalizer)


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
    """``cross_entropy(linear(input, linear_weight, linear_bias), target)`` without the logits: a chunk of rows at a time.

    A drop-in for :func:`torch.nn.functional.linear_cross_entropy` of torch 2.13, on every torch. With ``'mean'`` and
    ``'sum'`` the gradients are formed along with the loss, three matrix products in all; with ``'none'`` the backward
    forms the logits again. The logits of all rows are held only where a gradient must itself be differentiable, in
    forward mode, under ``torch.func`` and for gradients of probability targets and class weights.

    Args:
        input: what the last layer gets, shape ``(in)``, ``(N, in)`` or ``(..., in)``; float64, float32, float16 or
            bfloat16. Logits and sums of the last two are float32.
        linear_weight: shape ``(C, in)`` or ``(C, d1, ..., dk, in)``, input's dtype. Logits are ``(..., C, d1, ..., dk)``.
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
        chunk_size: rows whose logits are held at a time. None: a tenth of the rows, in whole 64s, but no fewer than 64
            or than fill 16 MiB with logits, no more than 4096.

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
        ours = {
            "token_weight": token_weight,
            "normalizer": normalizer,
            "z_loss": z_loss,
            "logit_scale": logit_scale,
            "softcap": softcap,
            "skip_masked_rows": skip_masked_rows,
            "chunk_size": chunk_size,
        }
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
            # Only what is asked for: handlers written for torch's function do not know the others.
            **{k: v for k, v in ours.items() if v is not _DEFAULTS[k]},
        )
    name = "linear_cross_entropy"
    _check_tensors(
        name,
        {"input": input, "linear_weight": linear_weight, "target": target},
        {"linear_bias": linear_bias, "weight": weight, "token_weight": token_weight},
    )
    number = reduction_number(name, None, None, reduction)
    chunk_size = _check_chunk_size(name, chunk_size, options)
    cap, normalizer = _check_softcap(name, softcap), _check_normalizer(name, normalizer, number)
    label_smoothing, z_loss = _float(name, "label_smoothing", label_smoothing), _float(name, "z_loss", z_loss)
    logit_scale = _float(name, "logit_scale", logit_scale)
    skip_masked_rows = skip_masked_rows if type(skip_masked_rows) is bool else _bool(name, "skip_masked_rows", skip_masked_rows)
    if ignore_index is not None:
        ignore_index = _integer(name, "ignore_index", ignore_index)

    call = _Call(name, input, linear_weight, target, linear_bias)
    if call.soft and ignore_index is not None:
        raise RuntimeError(f"cece.{name}: ignore_index cannot be specified when target contains probabilities")
    ignored = -100 if ignore_index is None else ignore_index
    row_weight = call.of_rows(name, "token_weight", token_weight)
    if _dtensor_among(*(t for t in tensors if isinstance(t, Tensor))):
        return _of_dtensors(call, weight, reduction, ignored, label_smoothing, tensors[5:], _DEFAULTS)
    loss = LINEAR_CROSS_ENTROPY(
        call.input,
        call.linear_weight,
        call.linear_bias,
        call.target,
        weight,
        row_weight,
        ignored,
        label_smoothing,
        logit_scale,
        cap,
        skip_masked_rows,
        chunk_size,
        call.compact,
        z_loss,
        number != NONE,
    )[0]
    if number == NONE:
        return loss.reshape(call.rows)
    if number != MEAN:
        return loss
    if normalizer is not None:
        return loss / (normalizer.to(loss.dtype) if isinstance(normalizer, Tensor) else normalizer)
    if call.soft:
        return loss / math.prod(call.rows)
    return loss / label_weights(target, weight, ignored, loss.dtype).sum()
