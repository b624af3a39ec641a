"""Types of the functions' arguments, each with what a caller is told.

The usual type of a number leaves as it is; what torch takes in its place (numpy's numbers, tensors of one number) as
the usual type, a symbolic number of torch.compile as it is.
"""

import operator
from typing import Any

import torch
from torch import Tensor

INT64 = -(2**63), 2**63 - 1


def refuse(loss: str, name: str, wanted: str, value: object) -> TypeError:
    return TypeError(f"cece.{loss}: {name} must be {wanted}, got {type(value).__name__}")


def check_tensors(loss: str, required: dict[str, object], optional: dict[str, object]) -> None:
    for name, value in required.items():
        if not isinstance(value, Tensor):
            raise refuse(loss, name, "a torch.Tensor", value)
    for name, value in optional.items():
        if value is not None and not isinstance(value, Tensor):
            raise refuse(loss, name, "a torch.Tensor or None", value)


def as_integer(loss: str, name: str, value: Any) -> int:
    if type(value) is int and INT64[0] <= value <= INT64[1]:
        return value
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    dtype = str(getattr(value, "dtype", type(value).__name__))
    if dtype.endswith("bool") or not hasattr(value, "__index__"):
        raise refuse(loss, name, "an int", value)
    try:
        number = operator.index(value)
    except TypeError:  # an array or tensor, but not of one integer
        raise refuse(loss, name, "an int", value) from None
    if not INT64[0] <= number <= INT64[1]:
        raise ValueError(f"cece.{loss}: {name} must fit into 64 bits, got {number}")
    return number


def as_float(loss: str, name: str, value: Any) -> float:
    if isinstance(value, (float, int, torch.SymFloat, torch.SymInt)):
        return value  # type: ignore[return-value]
    if not hasattr(value, "__float__") or getattr(value, "ndim", 0) or getattr(value, "requires_grad", False):
        raise refuse(loss, name, "a float", value)
    return float(value)


def as_bool(loss: str, name: str, value: Any) -> bool:
    if type(value) is bool:
        return value
    if str(getattr(value, "dtype", "")) != "bool":  # numpy's
        raise refuse(loss, name, "a bool", value)
    return bool(value)


def dtensor_among(*tensors: Tensor | None) -> Any:
    """The module for DTensors if one of these is one: it imports torch.distributed, so nothing else should."""
    for t in tensors:
        if type(t) is not torch.Tensor and hasattr(t, "device_mesh"):
            from . import _dtensor

            return _dtensor


def not_for_dtensors(loss: str, *tensors: Tensor | None) -> None:
    if dtensor_among(*tensors):
        raise NotImplementedError(f"cece.{loss}: DTensors are not supported yet: pass each rank's part (to_local())")


def check_dim(loss: str, logits: Tensor, dim: Any) -> int:
    """The dimension of the classes: 1, or 0 of a single row, unless the caller says otherwise."""
    dim = as_integer(loss, "dim", dim)
    if logits.dim() == 0 or (logits.dim() == 1 and dim == 1):
        return 0  # the operators say what is wrong with no dimension
    if not -logits.dim() <= dim < logits.dim():
        raise IndexError(f"cece.{loss}: dim must be a dimension of logits of shape {tuple(logits.shape)}, got {dim}")
    return dim


def as_divisor(loss: str, normalizer: Tensor | float | None) -> Tensor | float | None:
    """What a mean divides by: a number, or a tensor of one that nobody looks at."""
    if normalizer is None:
        return None
    if not isinstance(normalizer, Tensor):
        return as_float(loss, "normalizer", normalizer)
    if normalizer.numel() != 1:
        raise ValueError(
            f"cece.{loss}: normalizer must be a number or a tensor of one, got shape {tuple(normalizer.shape)}"
        )
    return normalizer


def as_positive(loss: str, name: str, value: float | None) -> float | None:
    if value is None:
        return None
    number = as_float(loss, name, value)
    if not number > 0:
        raise ValueError(f"cece.{loss}: {name} must be a positive number or None, got {number}")
    return number


# What cross-entropy takes beyond torch's arguments, and the values that ask for nothing.
_USUAL = {
    "inplace_backward": False,
    "token_weight": None,
    "normalizer": None,
    "z_loss": 0.0,
    "logit_scale": 1.0,
    "softcap": None,
    "skip_masked_rows": False,
    "chunk_size": None,
}


def asked_for(**options: Any) -> dict[str, Any]:
    """The options that ask for something: a handler written for torch's function does not know them."""
    return {name: value for name, value in options.items() if value is not _USUAL[name] and value != _USUAL[name]}
