"""The losses of several labels a sample that torch has not: focal, asymmetric, label lists, pairs.

Types of arguments are checked here, values in ``_script.py``, which TorchScript compiles, shapes in ``csrc/check.h``.
"""

from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _script
from ._arguments import as_divisor, as_float, as_integer, check_tensors, not_for_dtensors
from ._script import asymmetric_parameters, focal_parameters, reduction_number, scripted_as
from .functional import elementwise
from .ops import ASYMMETRIC, FOCAL

__all__ = [
    "asymmetric_loss",
    "multilabel_cross_entropy",
    "pairwise_sigmoid_loss",
    "sigmoid_focal_loss",
    "softmax_focal_loss",
]


def _number_or_tensor(loss: str, name: str, value: Any) -> Any:
    return value if value is None or isinstance(value, Tensor) else as_float(loss, name, value)


@scripted_as(_script.sigmoid_focal_loss)
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
    ignore_index: int | None = None,
    normalizer: Tensor | float | None = None,
    mean_dim: int | None = None,
) -> Tensor:
    """Focal loss of *logits*, one an element: binary cross-entropy times ``(1 - p)^gamma``, p the truth's probability.

    ``a (1 - p)^gamma l``, with l :func:`binary_cross_entropy_with_logits` of the element, ``p = y sigmoid(x) + (1 - y)
    sigmoid(-x)`` and ``a = alpha y + (1 - alpha) (1 - y)``: torchvision's formula, arguments and default reduction.

    Args:
        input: logits, any shape; float64, float32, float16 or bfloat16; any strides, without a copy.
        target: the truth in [0, 1], input's shape: floating point, bool or integer.
        alpha: in [0, 1], the weight of a truth of 1; -1 for none.
        gamma: at least 0, whole or not.
        reduction: ``'none'``, ``'mean'`` over all elements that are not masked, or ``'sum'``.
        weight: a factor for each element, any floating dtype, broadcastable to input's shape.
        poly: e adds ``e (1 - p)`` to l: the Poly-1 focal loss.
        label_smoothing, mask, ignore_index, normalizer, mean_dim: as in :func:`binary_cross_entropy_with_logits`.

    Returns:
        The loss in nats, float32 (float64 if input, target or weight is): a scalar, or with ``'none'`` input's shape.

    Raises:
        ValueError: alpha or gamma out of range, target's shape is not input's, an unknown reduction, or options that do
            not go together.
        RuntimeError: any other shape, dtype or device that does not fit.
        TypeError: an argument of the wrong type.
        NotImplementedError: mask, ignore_index, normalizer or mean_dim with DTensors.

    Source: Lin et al. (2017), Focal Loss for Dense Object Detection, 3; poly: Leng et al. (2022), PolyLoss, 4.
    """
    if has_torch_function_variadic(input, target, weight, mask):
        return handle_torch_function(
            sigmoid_focal_loss,
            (input, target, weight, mask),
            input,
            target,
            alpha=alpha,
            gamma=gamma,
            reduction=reduction,
            weight=weight,
            label_smoothing=label_smoothing,
            poly=poly,
            mask=mask,
            ignore_index=ignore_index,
            normalizer=normalizer,
            mean_dim=mean_dim,
        )
    loss = "sigmoid_focal_loss"
    check_tensors(loss, {"input": input, "target": target}, {"weight": weight})
    alpha, gamma, poly = (
        as_float(loss, name, value) for name, value in (("alpha", alpha), ("gamma", gamma), ("poly", poly))
    )
    return elementwise(
        loss,
        FOCAL,
        focal_parameters(alpha, gamma, poly),
        reduction_number(loss, None, None, reduction),
        (input, target, weight, None),
        as_float(loss, "label_smoothing", label_smoothing),
        mask=mask,
        ignore_index=ignore_index,
        normalizer=normalizer,
        mean_dim=mean_dim,
    )


@scripted_as(_script.asymmetric_loss)
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
    ignore_index: int | None = None,
    normalizer: Tensor | float | None = None,
    mean_dim: int | None = None,
) -> Tensor:
    """Asymmetric loss of *logits*: the two outcomes focused each in its own way, clear negatives left alone.

    With ``p = sigmoid(x)`` and ``m = max(p - clip, 0)``: ``-y (1 - p)^gamma_pos log p - (1 - y) m^gamma_neg
    log(1 - m)``. Arguments, their order and defaults, the sum among them, are those of the paper's own code; no
    logarithm is cut off at 1e-8, as it is there.

    Args:
        input: logits, any shape; float64, float32, float16 or bfloat16; any strides, without a copy.
        target: the truth in [0, 1], input's shape: floating point, bool or integer.
        gamma_neg, gamma_pos: at least 0, whole or not.
        clip: in [0, 1): negatives of no more probability than this have loss and gradient 0.
        reduction: ``'none'``, ``'mean'`` over all elements that are not masked, or ``'sum'``.
        weight: a factor for each element, any floating dtype, broadcastable to input's shape.
        label_smoothing, mask, ignore_index, normalizer, mean_dim: as in :func:`binary_cross_entropy_with_logits`.

    Returns:
        The loss in nats, float32 (float64 if input, target or weight is): a scalar, or with ``'none'`` input's shape.

    Raises:
        ValueError: an exponent or clip out of range, target's shape is not input's, an unknown reduction, or options
            that do not go together.
        RuntimeError: any other shape, dtype or device that does not fit.
        TypeError: an argument of the wrong type.
        NotImplementedError: mask, ignore_index, normalizer or mean_dim with DTensors.

    Source: Ridnik et al. (2021), Asymmetric Loss for Multi-Label Classification, 2.
    """
    if has_torch_function_variadic(input, target, weight, mask):
        return handle_torch_function(
            asymmetric_loss,
            (input, target, weight, mask),
            input,
            target,
            gamma_neg=gamma_neg,
            gamma_pos=gamma_pos,
            clip=clip,
            reduction=reduction,
            weight=weight,
            label_smoothing=label_smoothing,
            mask=mask,
            ignore_index=ignore_index,
            normalizer=normalizer,
            mean_dim=mean_dim,
        )
    loss = "asymmetric_loss"
    check_tensors(loss, {"input": input, "target": target}, {"weight": weight})
    gamma_neg, gamma_pos = as_float(loss, "gamma_neg", gamma_neg), as_float(loss, "gamma_pos", gamma_pos)
    return elementwise(
        loss,
        ASYMMETRIC,
        asymmetric_parameters(gamma_pos, gamma_neg, as_float(loss, "clip", clip)),
        reduction_number(loss, None, None, reduction),
        (input, target, weight, None),
        as_float(loss, "label_smoothing", label_smoothing),
        mask=mask,
        ignore_index=ignore_index,
        normalizer=normalizer,
        mean_dim=mean_dim,
    )


@scripted_as(_script.multilabel_cross_entropy)
def multilabel_cross_entropy(
    input: Tensor,
    labels: Tensor,
    offsets: Tensor | None = None,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    mask: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    mean_dim: int | None = None,
) -> Tensor:
    """Binary cross-entropy of *logits* for each class, the truth given as the list of each sample's labels.

    :func:`binary_cross_entropy_with_logits` of a truth that is 1 at the listed classes and else 0, which is never made:
    logits and their gradient are all the memory that it needs. A class listed twice counts once.

    Args:
        input: logits, shape ``(N, C)``; float64, float32, float16 or bfloat16; any strides, without a copy.
        labels: class indices, an integer dtype: ``(N)``, one a sample; ``(N, K)``, up to K a sample, the others
            ``ignore_index``; or, with offsets, ``(K)``, those of all samples one after another.
        offsets: ``(N + 1)``, int64 or int32, from 0 up to K: ``labels[offsets[i] : offsets[i + 1]]`` are sample i's.
        weight, pos_weight: factors as in :func:`binary_cross_entropy_with_logits`, broadcastable to ``(N, C)``.
        ignore_index: a label that is none.
        reduction: ``'none'``, ``'mean'`` over all elements that are not masked, or ``'sum'``.
        label_smoothing: s in [0, 1], the part of a label that is spread over all classes: the truth counts as
            ``(1 - s) y + s / C``, as in :func:`cross_entropy`.
        mask, normalizer, mean_dim: as in :func:`binary_cross_entropy_with_logits`.

    Returns:
        The loss in nats, float32 (float64 if input or weight is): a scalar, or with ``'none'`` ``(N, C)``.

    Raises:
        IndexError: a label that is no class, by position and value. On CUDA, which is never made to wait, the sample's
            losses and gradients are NaN instead.
        ValueError: shapes that do not belong together, offsets that do not go up from 0 to K (on a CPU), an unknown
            reduction, or options that do not go together.
        RuntimeError: any other shape, dtype or device that does not fit.
        TypeError: an argument of the wrong type.
        NotImplementedError: DTensors.

    Source: as :func:`binary_cross_entropy_with_logits`; smoothing: Wightman et al. (2021), ResNet strikes back, 3.
    """
    if has_torch_function_variadic(input, labels, offsets, weight, pos_weight, mask):
        return handle_torch_function(
            multilabel_cross_entropy,
            (input, labels, offsets, weight, pos_weight, mask),
            input,
            labels,
            offsets=offsets,
            weight=weight,
            pos_weight=pos_weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            mask=mask,
            normalizer=normalizer,
            mean_dim=mean_dim,
        )
    loss = "multilabel_cross_entropy"
    optional: dict[str, object] = {"offsets": offsets, "weight": weight, "pos_weight": pos_weight, "mask": mask}
    check_tensors(loss, {"input": input, "labels": labels}, optional)
    not_for_dtensors(loss, input, labels, offsets, weight, pos_weight, mask)
    return _script.multilabel_cross_entropy(
        input,
        labels,
        offsets,
        weight,
        pos_weight,
        as_integer(loss, "ignore_index", ignore_index),
        reduction,
        as_float(loss, "label_smoothing", label_smoothing),
        mask,
        as_divisor(loss, normalizer),
        None if mean_dim is None else as_integer(loss, "mean_dim", mean_dim),
    )


@scripted_as(_script.pairwise_sigmoid_loss)
def pairwise_sigmoid_loss(
    input: Tensor,
    other: Tensor | None = None,
    scale: Tensor | float | None = None,
    bias: Tensor | float | None = None,
    reduction: str = "mean",
    *,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    """SigLIP's loss of all pairs: ``log(1 + exp(-z (scale x_i . y_j + bias)))``, z = 1 where i = j and -1 elsewhere.

    Differentiable in all its tensors, ``scale`` and ``bias`` among them. No truth is made.

    Args:
        input: embeddings, shape ``(N, D)``, or with ``other`` left out logits, ``(N, M)``; floating point.
        other: embeddings, ``(M, D)``; row i of input and row i of other belong together, so ``M >= N``.
        scale: a factor for the logits: a number, or a tensor of one. SigLIP learns its logarithm, from log 10 on.
        bias: a summand of the logits, likewise. SigLIP's starts at -10.
        reduction: ``'none'``; ``'sum'`` over all pairs; ``'mean'``, which divides that by N, as SigLIP does.
        normalizer: what ``'mean'`` divides by instead.

    Returns:
        The loss in nats, float32 (float64 if the logits are): a scalar, or with ``'none'`` ``(N, M)``.

    Raises:
        ValueError: shapes that do not belong together, or an unknown reduction.
        RuntimeError: a dtype or device that does not fit.
        TypeError: an argument of the wrong type.
        NotImplementedError: DTensors.

    Source: Zhai et al. (2023), Sigmoid Loss for Language Image Pre-Training, 3.2.
    """
    tensors = [t for t in (input, other, scale, bias) if isinstance(t, Tensor) or hasattr(t, "__torch_function__")]
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            pairwise_sigmoid_loss,
            tensors,
            input,
            other,
            scale=scale,
            bias=bias,
            reduction=reduction,
            normalizer=normalizer,
        )
    loss = "pairwise_sigmoid_loss"
    check_tensors(loss, {"input": input}, {"other": other})
    not_for_dtensors(loss, *tensors)
    return _script.pairwise_sigmoid_loss(
        input,
        other,
        _number_or_tensor(loss, "scale", scale),
        _number_or_tensor(loss, "bias", bias),
        reduction,
        as_divisor(loss, normalizer),
    )


@scripted_as(_script.softmax_focal_loss)
def softmax_focal_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    gamma: float = 2.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    poly: float = 0.0,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    """Focal loss of a softmax: cross-entropy of *logits* times ``(1 - p)^gamma``, p the label's probability.

    ``weight_y (1 - p)^gamma (-log p + poly (1 - p))``. With gamma 0 and poly e it is Poly-1 cross-entropy.

    Args:
        input: logits, shape ``(C)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``; float64, float32, float16 or bfloat16.
        target: class indices in ``[0, C)`` or ``ignore_index``, shape ``()``, ``(N)`` or ``(N, d1, ..., dk)``.
        weight: a factor for each class, shape ``(C)``, any floating dtype (the alpha of some codes).
        gamma: at least 0, whole or not.
        ignore_index: samples with this label have loss and gradient 0 and do not count in the mean.
        reduction: ``'none'``; ``'sum'``; ``'mean'``, which divides by the summed weights of the labels.
        poly: e adds ``e (1 - p)`` to the cross-entropy.
        normalizer: what ``'mean'`` divides the sum by instead: a number, or a tensor of one, never waited for.

    Returns:
        The loss in nats, float32 (float64 if input is): a scalar, with ``'none'`` the samples' shape.

    Raises:
        IndexError: a label out of range, as in :func:`cross_entropy`; there too what it is on CUDA.
        ValueError: gamma out of range, target no class indices, batch sizes that differ, or an unknown reduction.
        RuntimeError: any other shape, dtype or device that does not fit.
        TypeError: an argument of the wrong type.
        NotImplementedError: DTensors.

    Source: Lin et al. (2017), Focal Loss for Dense Object Detection, 3; poly: Leng et al. (2022), PolyLoss, 4.
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            softmax_focal_loss,
            (input, target, weight),
            input,
            target,
            weight=weight,
            gamma=gamma,
            ignore_index=ignore_index,
            reduction=reduction,
            poly=poly,
            normalizer=normalizer,
        )
    loss = "softmax_focal_loss"
    check_tensors(loss, {"input": input, "target": target}, {"weight": weight})
    not_for_dtensors(loss, input, target, weight)
    return _script.softmax_focal_loss(
        input,
        target,
        weight,
        as_float(loss, "gamma", gamma),
        as_integer(loss, "ignore_index", ignore_index),
        reduction,
        as_float(loss, "poly", poly),
        as_divisor(loss, normalizer),
    )
