"""The losses as functions, with ``torch.nn.functional``'s names, signatures and meanings.

Types of arguments are checked here, everything else about them in the compiled operators (``csrc/check.h``), once for
every backend. TorchScript compiles their twins in ``_script.py``, DTensors go to ``_dtensor.py``.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _script
from ._arguments import (
    INT64,
    as_bool,
    as_divisor,
    as_float,
    as_integer,
    as_positive,
    asked_for,
    check_tensors,
    dtensor_among,
    refuse,
)
from ._script import reduction_number, scripted_as
from .ops import BCE, CROSS_ENTROPY, FOCAL, ON_PROBABILITIES, WITH_LOGITS

__all__ = ["binary_cross_entropy", "binary_cross_entropy_with_logits", "check_targets", "cross_entropy"]


@scripted_as(_script.cross_entropy)
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    inplace_backward: bool = False,
    token_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    skip_masked_rows: bool = False,
) -> Tensor:
    """Softmax cross-entropy of logits: ``log(sum_j exp(x_j)) - x_y`` for one label y a sample.

    A drop-in for :func:`torch.nn.functional.cross_entropy`. With the smoothed and weighted target masses
    ``q_j = weight_j ((1 - label_smoothing) t_j + label_smoothing / C)``, t one-hot for class indices, the loss of a
    sample is ``-sum_j q_j log softmax(x)_j``.

    Args:
        input: logits, shape ``(C)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``; float64, float32, float16 or bfloat16; any
            strides, without a copy.
        target: class indices in ``[0, C)`` or ``ignore_index``, shape ``()``, ``(N)`` or ``(N, d1, ..., dk)``; int8,
            int16, int32, int64 or uint8. Or probabilities of input's shape, floating point.
        weight: a factor for each class, shape ``(C)``, any floating dtype.
        ignore_index: samples with this label have loss and gradient 0 and do not count in the mean. Class indices only.
        reduction: ``'none'``; ``'sum'``; ``'mean'``, which divides by the summed weights of the labels, and with
            probabilities by the number of samples.
        label_smoothing: in [0, 1], the part of the target that is spread over all classes.
        inplace_backward: backward writes the gradient over input's values and so needs no memory of its own. Only for
            logits nobody reads afterwards; autograd raises if some other operation still needs them (it cannot know of
            one that saved them itself through hooks that return the same tensor). Refused for a leaf that requires
            grad, a view of one, and overlapping memory. Ignored, at the price of a gradient's memory, where a gradient
            must itself be differentiable, under torch.func and torch.compile, within saved-tensor hooks (activation
            checkpointing, ``save_on_cpu``), for logits that share memory with the target, for DTensors, and beside
            z_loss, logit_scale, softcap and skip_masked_rows.
        token_weight: a factor for each sample's loss, of the samples' shape, any floating dtype; differentiable. It
            does not enter what a mean divides by: for a weighted mean pass ``normalizer=token_weight.sum()``.
        normalizer: what ``'mean'`` divides the sum by instead, a number or a tensor of one, differentiable and never
            looked at: the tokens of all accumulated batches, say.
        z_loss: adds ``z_loss * logsumexp(x) ** 2`` to each sample's loss.
        logit_scale: a positive factor for the logits, an inverse temperature.
        softcap: a positive bound; the logits become ``softcap * tanh(logit_scale * x / softcap)``, -inf too.
        skip_masked_rows: a sample all of whose logits are -inf counts as an ignored one. Otherwise its loss is NaN, as
            it is in torch.

    Returns:
        The loss in nats, float32 (float64 if input or probabilities are): a scalar, with ``'none'`` the samples' shape.

    Raises:
        IndexError: a label out of range, by position and value. On CUDA, which is never made to wait, such a sample's
            loss and gradient are NaN instead; :func:`check_targets` names it.
        ValueError: batch sizes that differ, an unknown reduction, token_weight of another shape, a normalizer without
            ``'mean'``, a logit_scale or softcap that is not positive.
        RuntimeError: any other shape, dtype or device that does not fit, or label_smoothing outside [0, 1].
        TypeError: an argument of the wrong type.

    Source: Goodfellow, Bengio, Courville, Deep Learning (2016), 6.2.2.3; label smoothing: Szegedy et al. (2016), 7;
    z-loss: Chowdhery et al. (2022), PaLM, 5; soft capping: Gemma Team (2024), 2.
    """
    if has_torch_function_variadic(input, target, weight, token_weight, normalizer):
        return handle_torch_function(
            cross_entropy,
            (input, target, weight, token_weight, normalizer),
            input,
            target,
            weight=weight,
            size_average=size_average,
            ignore_index=ignore_index,
            reduce=reduce,
            reduction=reduction,
            label_smoothing=label_smoothing,
            **asked_for(
                inplace_backward=inplace_backward,
                token_weight=token_weight,
                normalizer=normalizer,
                z_loss=z_loss,
                logit_scale=logit_scale,
                softcap=softcap,
                skip_masked_rows=skip_masked_rows,
            ),
        )
    check_tensors("cross_entropy", {"input": input, "target": target}, {"weight": weight})
    if type(ignore_index) is not int or not INT64[0] <= ignore_index <= INT64[1]:
        ignore_index = as_integer("cross_entropy", "ignore_index", ignore_index)
    if type(label_smoothing) is not float:
        label_smoothing = as_float("cross_entropy", "label_smoothing", label_smoothing)
    if type(inplace_backward) is not bool:
        inplace_backward = as_bool("cross_entropy", "inplace_backward", inplace_backward)
    if inplace_backward and (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()):
        inplace_backward = False
    number = reduction_number("cross_entropy", size_average, reduce, reduction)
    if dtensor := dtensor_among(input, target, weight, token_weight):
        options = asked_for(z_loss=z_loss, logit_scale=logit_scale, softcap=softcap, skip_masked_rows=skip_masked_rows)
        return dtensor.cross_entropy(
            input, target, weight, number, ignore_index, label_smoothing, token_weight, normalizer, **options
        )
    plain = logit_scale == 1 and softcap is None and not (z_loss or skip_masked_rows)
    if not plain or token_weight is not None or normalizer is not None:
        check_tensors("cross_entropy", {}, {"token_weight": token_weight})
        if token_weight is not None and not token_weight.is_floating_point():
            raise refuse("cross_entropy", "token_weight", "a floating point tensor", token_weight.dtype)
        return _script.cross_entropy_with_options(
            input,
            target,
            weight,
            number,
            ignore_index,
            label_smoothing,
            inplace_backward,
            token_weight,
            as_divisor("cross_entropy", normalizer),
            as_float("cross_entropy", "z_loss", z_loss),
            as_float("cross_entropy", "logit_scale", logit_scale),
            as_positive("cross_entropy", "softcap", softcap),
            as_bool("cross_entropy", "skip_masked_rows", skip_masked_rows),
        )
    return CROSS_ENTROPY(input, target, weight, number, ignore_index, label_smoothing, inplace_backward)[0]


@scripted_as(_script.binary_cross_entropy_with_logits)
def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
    ignore_index: int | None = None,
    normalizer: Tensor | float | None = None,
    mean_dim: int | None = None,
    poly: float = 0.0,
) -> Tensor:
    """Sigmoid and binary cross-entropy of *logits*, one loss an element: a yes or no each, or several labels a sample.

    A drop-in for :func:`torch.nn.functional.binary_cross_entropy_with_logits`:
    ``(1 - y) softplus(x) + pos_weight y softplus(-x)``, times weight; ``softplus(x) = log(1 + exp(x))``.

    Args:
        input: logits, any shape; float64, float32, float16 or bfloat16; any strides, without a copy.
        target: the truth, input's shape: floating point (in [0, 1], not checked), bool or integer, without a copy.
        weight: a factor for each element, any floating dtype, broadcastable to input's shape.
        reduction: ``'none'``, ``'mean'`` over all elements that are not masked, or ``'sum'``.
        pos_weight: a factor for the positive term, typically (C); broadcastable to input's shape.
        label_smoothing: s in [0, 1]: the truth counts as ``(1 - s) y + s / 2``.
        mask: bool, broadcastable to input's shape; where it is False, loss and gradient are 0, whatever is there, and
            the element does not count in the mean.
        ignore_index: elements of this truth are masked; for integer truths.
        normalizer: what ``'mean'`` divides the sum by: a number, or a tensor of one, which is never waited for.
        mean_dim: ``'mean'`` is one along this dimension only, and sums up the means: 1 for a mean over classes and a
            sum over samples, 0 for the reverse. With a mask each mean is over what is not masked, 0 where all is.
        poly: e adds ``e (1 - p)`` to the loss, p the probability of what is so: PolyLoss's Poly-1.

    Returns:
        The loss in nats, float32 (float64 if input, target or weight is): a scalar, or with ``'none'`` input's shape.

    Raises:
        ValueError: target's shape is not input's, an unknown reduction, or options that do not go together.
        RuntimeError: any other shape, dtype or device that does not fit.
        TypeError: an argument of the wrong type.
        NotImplementedError: mask, ignore_index, normalizer or mean_dim with DTensors.

    Source: Goodfellow, Bengio, Courville, Deep Learning (2016), 6.2.2.2; poly: Leng et al. (2022), PolyLoss, 4.
    """
    options: dict[str, Any] = {}
    if not (label_smoothing == 0 and poly == 0 and mask is ignore_index is normalizer is mean_dim is None):
        options = {
            "label_smoothing": label_smoothing,
            "mask": mask,
            "ignore_index": ignore_index,
            "normalizer": normalizer,
            "mean_dim": mean_dim,
            "poly": poly,
        }
    if has_torch_function_variadic(input, target, weight, pos_weight, mask):
        return handle_torch_function(
            binary_cross_entropy_with_logits,
            (input, target, weight, pos_weight, mask),
            input,
            target,
            weight=weight,
            size_average=size_average,
            reduce=reduce,
            reduction=reduction,
            pos_weight=pos_weight,
            **options,  # as in cross_entropy
        )
    optional: dict[str, object] = {"weight": weight, "pos_weight": pos_weight}
    check_tensors("binary_cross_entropy_with_logits", {"input": input, "target": target}, optional)
    number = reduction_number("binary_cross_entropy_with_logits", size_average, reduce, reduction)
    if options:
        label_smoothing = as_float("binary_cross_entropy_with_logits", "label_smoothing", label_smoothing)
        poly = as_float("binary_cross_entropy_with_logits", "poly", poly)
        kind, own = (WITH_LOGITS, [0.0] * 4) if poly == 0 else (FOCAL, [1.0, 1.0, 0.0, poly])
        return elementwise(
            "binary_cross_entropy_with_logits",
            kind,
            own,
            number,
            (input, target, weight, pos_weight),
            label_smoothing,
            mask=mask,
            ignore_index=ignore_index,
            normalizer=normalizer,
            mean_dim=mean_dim,
        )
    if dtensor := dtensor_among(input, target, weight, pos_weight):
        name = "binary_cross_entropy_with_logits"
        return dtensor.binary_cross_entropy(name, input, target, weight, pos_weight, WITH_LOGITS, number)
    return BCE(input, target, weight, pos_weight, WITH_LOGITS, number)


def elementwise(
    loss: str,
    kind: int,
    own: list[float],
    reduction: int,
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    label_smoothing: float,
    **options: Any,
) -> Tensor:
    """What the elementwise losses have in common: the types of mask, ignore_index, normalizer and mean_dim."""
    check_tensors(loss, {}, {"mask": options["mask"]})
    for name in ("ignore_index", "mean_dim"):
        if options[name] is not None:
            options[name] = as_integer(loss, name, options[name])
    options["normalizer"] = as_divisor(loss, options["normalizer"])
    if dtensor := dtensor_among(*tensors, options["mask"]):
        given = [name for name, value in options.items() if value is not None]
        if given:
            raise NotImplementedError(f"cece.{loss}: {given[0]} of DTensors is not implemented; pass it to each rank")
        parameters = [1.0 - label_smoothing, 0.5 * label_smoothing, *own]
        return dtensor.binary_cross_entropy(loss, *tensors, kind, reduction, parameters)
    return _script.elementwise(loss, kind, own, reduction, *tensors, label_smoothing, **options)


@scripted_as(_script.binary_cross_entropy)
def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Binary cross-entropy of *probabilities*: ``-y log x - (1 - y) log(1 - x)``. **It applies no sigmoid.**

    A drop-in for :func:`torch.nn.functional.binary_cross_entropy`, with its lower bound of -100 for each logarithm. For
    logits use :func:`binary_cross_entropy_with_logits`, which is exact where a probability has rounded to 0 or 1.

    Args:
        input: probabilities in [0, 1], any shape; float64, float32, float16 or bfloat16; any strides.
        target: the truth in [0, 1], input's shape: floating point, bool or integer.
        weight: a factor for each element, any floating dtype, broadcastable to input's shape.
        reduction: ``'none'``, ``'mean'`` over all elements, or ``'sum'``.

    Returns:
        The loss in nats, float32 (float64 if input, target or weight is): a scalar, or with ``'none'`` input's shape.

    Raises:
        RuntimeError: an input or target outside [0, 1], by position and value (on CUDA: that loss is NaN), or a shape,
            dtype or device that does not fit.
        ValueError: target's shape is not input's, or an unknown reduction.

    Source: as :func:`binary_cross_entropy_with_logits`; bounds: torch, aten/src/ATen/native/Loss.cpp.
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            binary_cross_entropy,
            (input, target, weight),
            input,
            target,
            weight=weight,
            size_average=size_average,
            reduce=reduce,
            reduction=reduction,
        )
    optional: dict[str, object] = {"weight": weight}
    check_tensors("binary_cross_entropy", {"input": input, "target": target}, optional)
    number = reduction_number("binary_cross_entropy", size_average, reduce, reduction)
    if dtensor := dtensor_among(input, target, weight):
        return dtensor.binary_cross_entropy(
            "binary_cross_entropy", input, target, weight, None, ON_PROBABILITIES, number
        )
    return BCE(input, target, weight, None, ON_PROBABILITIES, number)


@scripted_as(_script.check_targets)
def check_targets(target: Tensor, num_classes: int, *, ignore_index: int = -100) -> None:
    """Raises IndexError naming the first class index outside ``[0, num_classes)`` that is not ``ignore_index``.

    What to call when a loss on CUDA is NaN: the losses never wait for the GPU to look at a label, this does.

    Args:
        target: class indices, any shape, an integer dtype.
        num_classes: how many classes there are, C.
        ignore_index: the label that is allowed beside them.
    """
    check_tensors("check_targets", {"target": target}, {})
    if dtensor_among(target):
        target = target.full_tensor()  # type: ignore[attr-defined]  # positions are of the whole; every rank raises
    num_classes = as_integer("check_targets", "num_classes", num_classes)
    ignore_index = as_integer("check_targets", "ignore_index", ignore_index)
    _script.check_targets(target, num_classes, ignore_index)
