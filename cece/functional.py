"""The losses as functions, with ``torch.nn.functional``'s names and meanings. DTensors go to ``cece/_dtensor.py``.

Arguments are checked in the compiled operators (``csrc/check.h``), once for every backend.
"""

import torch

from .ops import BCE, CROSS_ENTROPY

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def _reduction(loss, reduction):
    try:
        return _REDUCTIONS[reduction]
    except (KeyError, TypeError):
        raise ValueError(f"cece.{loss}: reduction must be 'none', 'mean' or 'sum', got {reduction!r}") from None


def _check_tensors(loss, **arguments):
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"cece.{loss}: {name} must be a torch.Tensor, got {type(value).__name__}")


def _dtensor_among(*tensors):
    """The module for DTensors if one of these is one: it imports torch.distributed, so nothing else should."""
    for t in tensors:
        if type(t) is not torch.Tensor and hasattr(t, "device_mesh"):
            from . import _dtensor

            return _dtensor


def cross_entropy(
    input,
    target,
    weight=None,
    *,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    inplace_backward=False,
):
    """Softmax cross-entropy of logits: ``log(sum_j exp(x_j)) - x_y`` for one label y a sample.

    A drop-in for :func:`torch.nn.functional.cross_entropy`. With the smoothed and weighted target masses
    ``q_j = weight_j ((1 - label_smoothing) t_j + label_smoothing / C)``, t one-hot for class indices, the loss of a
    sample is ``-sum_j q_j log softmax(x)_j``.

    Args:
        input: logits, shape ``(C)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``; float64, float32, float16 or bfloat16; any
            strides, without a copy.
        target: class indices in ``[0, C)`` or ``ignore_index``, shape ``()``, ``(N)`` or ``(N, d1, ..., dk)``; uint8,
            int32 or int64. Or probabilities of input's shape, floating point.
        weight: a factor for each class, shape ``(C)``, any floating dtype.
        ignore_index: samples with this label have loss and gradient 0 and do not count in the mean. Class indices only.
        reduction: ``'none'``; ``'sum'``; ``'mean'``, which divides by the summed weights of the labels, and with
            probabilities by the number of samples.
        label_smoothing: in [0, 1], the part of the target that is spread over all classes.
        inplace_backward: backward writes the gradient over input's values and so needs no memory of its own. Only for
            logits nobody reads afterwards; autograd raises if some other operation still needs them. Ignored where a
            gradient must itself be differentiable, under torch.func, under torch.compile, and for DTensors.

    Returns:
        The loss in nats, float32 (float64 if input or probabilities are): a scalar, with ``'none'`` the samples' shape.

    Raises:
        IndexError: a label out of range, by position and value. On CUDA, which is never made to wait, such a sample's
            loss and gradient are NaN instead; :func:`check_targets` names it.
        ValueError: batch sizes that differ, or an unknown reduction.
        RuntimeError: any other shape, dtype or device that does not fit, or label_smoothing outside [0, 1].

    Source: Goodfellow, Bengio, Courville, Deep Learning (2016), 6.2.2.3; label smoothing: Szegedy et al. (2016), 7.
    """
    if type(input) is not torch.Tensor or type(target) is not torch.Tensor:
        _check_tensors("cross_entropy", input=input, target=target)
    if inplace_backward and (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()):
        inplace_backward = False
    number = _reduction("cross_entropy", reduction)
    if dtensor := _dtensor_among(input, target, weight):
        return dtensor.cross_entropy(input, target, weight, number, ignore_index, label_smoothing)
    return CROSS_ENTROPY(input, target, weight, number, ignore_index, label_smoothing, inplace_backward)[0]


def binary_cross_entropy_with_logits(input, target, weight=None, *, reduction="mean", pos_weight=None):
    """Sigmoid and binary cross-entropy of *logits*, one loss an element: a yes or no each, or several labels a sample.

    A drop-in for :func:`torch.nn.functional.binary_cross_entropy_with_logits`:
    ``(1 - y) softplus(x) + pos_weight y softplus(-x)``, times weight; ``softplus(x) = log(1 + exp(x))``.

    Args:
        input: logits, any shape; float64, float32, float16 or bfloat16; any strides, without a copy.
        target: the truth, input's shape: floating point (in [0, 1], not checked), bool or integer, without a copy.
        weight: a factor for each element, any floating dtype, broadcastable to input's shape.
        reduction: ``'none'``, ``'mean'`` over all elements, or ``'sum'``.
        pos_weight: a factor for the positive term, typically (C); broadcastable to input's shape.

    Returns:
        The loss in nats, float32 (float64 if input, target or weight is): a scalar, or with ``'none'`` input's shape.

    Raises:
        ValueError: target's shape is not input's, or an unknown reduction.
        RuntimeError: any other shape, dtype or device that does not fit.

    Source: Goodfellow, Bengio, Courville, Deep Learning (2016), 6.2.2.2.
    """
    _check_tensors("binary_cross_entropy_with_logits", input=input, target=target)
    number = _reduction("binary_cross_entropy_with_logits", reduction)
    if dtensor := _dtensor_among(input, target, weight, pos_weight):
        return dtensor.binary_cross_entropy(input, target, weight, pos_weight, True, number)
    return BCE(input, target, weight, pos_weight, True, number)


def binary_cross_entropy(input, target, weight=None, *, reduction="mean"):
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
    _check_tensors("binary_cross_entropy", input=input, target=target)
    number = _reduction("binary_cross_entropy", reduction)
    if dtensor := _dtensor_among(input, target, weight):
        return dtensor.binary_cross_entropy(input, target, weight, None, False, number)
    return BCE(input, target, weight, None, False, number)


def check_targets(target, num_classes, *, ignore_index=-100):
    """Raises IndexError naming the first class index outside ``[0, num_classes)`` that is not ``ignore_index``.

    What to call when a loss on CUDA is NaN: the losses never wait for the GPU to look at a label, this does.

    Args:
        target: class indices, any shape, an integer dtype.
        num_classes: how many classes there are, C.
        ignore_index: the label that is allowed beside them.
    """
    _check_tensors("check_targets", target=target)
    if _dtensor_among(target):
        target = target.full_tensor()  # positions are those of the whole, and every rank raises
    bad = ((target < 0) | (target >= num_classes)) & (target != ignore_index)
    if bad.any():
        where = bad.nonzero()[0].tolist()
        value = target[tuple(where)].item()
        raise IndexError(
            f"cece.check_targets: Target {value} is out of bounds: target{where} must be in [0, {num_classes}) or equal"
            f" ignore_index ({ignore_index}), got {value}; {int(bad.sum())} of {target.numel()} targets are"
        )
