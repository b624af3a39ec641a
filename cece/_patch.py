"""``cece.patch()``: torch.nn.functional's three losses, and with them every nn module, computed by cece.

What a patched function returns is what torch's returns, dtype included. A call that cece does not take, or that torch
would refuse, goes to torch's own function.
"""

import functools
import threading
import types
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack, _get_overloaded_args, has_torch_function_variadic
from torch.utils._device import DeviceContext

from . import functional
from ._load import build_info
from ._script import constant_when_compiled

_DEVICES = ("cpu", "meta", "cuda") if build_info()["cuda_archs"] else ("cpu", "meta")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HALVES = (torch.bfloat16, torch.float16)

# ---- what torch's functions return. A plan is called as torch's function is and tells its result's dtype, or in a few
# words why the call is torch's to take or to refuse. tests/test_patch.py compares them with torch over all dtypes.


def _why_torch(input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None = None) -> str | None:
    if has_torch_function_variadic(input, target, weight, pos_weight) and (
        torch.compiler.is_dynamo_compiling() or _overridden(input, target, weight, pos_weight)
    ):
        return "__torch_function__ of a subclass, an object or a mode"
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    if input.device.type not in _DEVICES:
        return f"device {input.device.type}"
    for name, t in (("input", input), ("target", target), ("weight", weight), ("pos_weight", pos_weight)):
        if t is not None and (t.layout is not torch.strided or t.is_nested):
            return f"{name} is not strided"
        if t is not None and name != "target" and t.dtype not in _FLOATS:
            return f"{name} is {t.dtype}"
        if t is not None and name.endswith("weight") and t.requires_grad:
            return f"{name} requires grad"  # which torch refuses, but for probability targets
    return None


def _overridden(*tensors: Tensor | None) -> bool:
    """Whether anybody has something to say here; the mode that torch.set_default_device installs has not."""
    modes = _get_current_function_mode_stack()
    return any(type(mode) is not DeviceContext for mode in modes) or any(
        type(t) is not Tensor for t in _get_overloaded_args(tensors)
    )


def _seen(t: Tensor) -> torch.dtype:
    """t's dtype as torch's losses see it: autocast makes them take halves as float32."""
    return torch.float32 if t.dtype in _HALVES and torch.is_autocast_enabled(t.device.type) else t.dtype


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.dtype | str:
    why = _why_torch(input, target, weight)
    if why is not None:
        return why
    if not 0 <= label_smoothing <= 1:
        return "label_smoothing outside [0, 1]"
    dtype = _seen(input)
    if target.dtype in _FLOATS:
        dtype = torch.promote_types(dtype, _seen(target))
        return dtype if weight is None else torch.promote_types(dtype, _seen(weight))
    if target.dtype is not torch.int64:
        return f"target is {target.dtype}"
    return dtype if weight is None or _seen(weight) is dtype else "weight has another dtype than input"


def _binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> torch.dtype | str:
    why = _why_torch(input, target, weight, pos_weight)
    if why is not None:
        return why
    return _seen(target) if target.dtype in _FLOATS else f"target is {target.dtype}"


def _binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> torch.dtype | str:
    why = _why_torch(input, target, weight)
    if why is not None:
        return why
    if input.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        return "autocast on CUDA"  # where torch refuses it
    return _seen(input) if _seen(target) is _seen(input) else "target has another dtype than input"


_PLANS: dict[str, Callable[..., torch.dtype | str]] = {
    "cross_entropy": _cross_entropy,
    "binary_cross_entropy": _binary_cross_entropy,
    "binary_cross_entropy_with_logits": _binary_cross_entropy_with_logits,
}

# ---- the functions put in torch's place

_NAMES = dict(vars(F))
_THEIRS: dict[str, Any] = {name: _NAMES[name] for name in _PLANS}

_lock = threading.RLock()
_patches = 0  # how many are in force
_calls: dict[str, Counter[str]] = {name: Counter() for name in _PLANS}


@constant_when_compiled
def _count(name: str, where: str) -> None:
    with _lock:
        _calls[name][where] += 1


def _route(name: str, plan: Callable[..., torch.dtype | str]) -> Callable[..., Tensor]:
    theirs, ours = _THEIRS[name], getattr(functional, name)
    # torch's function names itself to __torch_function__ by its module's global, which is ours while patched. This copy
    # keeps the names as they were.
    overridable = types.FunctionType(theirs.__code__, _NAMES, name, theirs.__defaults__)

    def cece(dtype: torch.dtype, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = ours(*args, **kwargs)
        return loss if loss.dtype is dtype else loss.to(dtype)

    @functools.wraps(theirs)
    def loss(*args: Any, **kwargs: Any) -> Tensor:
        if not _patches:  # somebody kept this function
            return theirs(*args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            planned = plan(*args, **kwargs)
            if isinstance(planned, str):
                _count(name, f"torch, compiled: {planned}")
                return theirs(*args, **kwargs)
            _count(name, "cece, compiled")
            return cece(planned, *args, **kwargs)
        try:
            why = plan(*args, **kwargs)
            if not isinstance(why, str):
                result = cece(why, *args, **kwargs)
                _count(name, "cece")
                return result
        except Exception as e:  # torch may take it, or has its own words for what is wrong
            why = f"refused, {type(e).__name__}: {e}".partition("\n")[0]
        _count(name, f"torch: {why}")
        return overridable(*args, **kwargs)

    loss.__module__ = __name__  # where pickle finds it
    setattr(loss, "__prepare_scriptable__", lambda: theirs)  # noqa: B010, a function has no such attribute
    return loss


_OURS = {name: _route(name, plan) for name, plan in _PLANS.items()}
globals().update(_OURS)


class patch:
    """Makes ``torch.nn.functional``'s cross_entropy, binary_cross_entropy and binary_cross_entropy_with_logits cece's.

    And with them every module that calls them, ``torch.nn``'s first. In force from the call on, until :meth:`unpatch`
    or the end of a ``with`` block::

        with cece.patch():
            train()

    It is in force for the whole process, for all its threads; when several are, until the last one is undone. A
    function that was imported by name before (``from torch.nn.functional import cross_entropy``) stays torch's.

    What is returned has torch's dtype: bfloat16 for bfloat16 logits. Calls that cece does not take, and calls that
    torch would refuse, go to torch's own function, as does all that torch.jit and torch.fx see. :attr:`calls` says how
    many went where, and why.
    """

    def __init__(self) -> None:
        self._in_force = False
        self._entered = 0
        self._patch()

    def _patch(self) -> None:
        global _patches
        with _lock:
            if self._in_force:
                return
            self._in_force = True
            _patches += 1
            if _patches == 1:
                # torch.compile lists torch's functions, which it does not look into, when it is first used: now, so
                # that the list has torch's own.
                from torch._dynamo.trace_rules import get_torch_obj_rule_map  # a second to import

                get_torch_obj_rule_map()
                for name, function in _OURS.items():
                    if getattr(F, name) is _THEIRS[name]:
                        setattr(F, name, function)

    def unpatch(self) -> None:
        """Undoes it. A second time there is nothing to undo."""
        global _patches
        with _lock:
            if not self._in_force:
                return
            self._in_force = False
            _patches -= 1
            if not _patches:
                for name, function in _OURS.items():
                    if getattr(F, name) is function:  # else somebody has put a function of theirs over it
                        setattr(F, name, _THEIRS[name])

    def __enter__(self) -> "patch":
        with _lock:
            self._patch()
            self._entered += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with _lock:
            self._entered -= 1
            if not self._entered:
                self.unpatch()

    @property
    def calls(self) -> dict[str, dict[str, int]]:
        """For each function, how many calls went where since the process began, torch's with the reason.

        What torch.compile has compiled is counted where it is compiled, not where it runs.
        """
        with _lock:
            return {name: dict(counts) for name, counts in _calls.items()}
