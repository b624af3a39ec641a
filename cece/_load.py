"""Loads the compiled library, or says in one sentence why it cannot be."""

import importlib
from typing import Any

REBUILD = (
    "reinstall it where this torch is: pip install --no-build-isolation --force-reinstall --no-deps <cece's folder>"
)


def _abi(version: str) -> tuple[str, str]:
    """What a compiled extension depends on: (major.minor, cu130 or cpu)."""
    number, _, build = version.partition("+")
    return ".".join(number.split(".")[:2]), build or "unmarked"


def load() -> None:
    try:
        import torch
    except ImportError as e:
        raise ImportError("cece needs torch >= 2.11, and importing it failed: pip install torch") from e
    try:
        from ._built_for import TORCH
    except ImportError:
        raise ImportError(
            "cece is here as source only, without its compiled part: pip install --no-build-isolation <cece's folder>"
        ) from None
    if _abi(TORCH) != _abi(torch.__version__):
        raise ImportError(f"cece was built for torch {TORCH}, and this is torch {torch.__version__}: {REBUILD}")
    try:
        importlib.import_module("cece._C")
    except ImportError as e:
        raise ImportError(f"cece's compiled part, built for torch {TORCH}, does not load here ({e}): {REBUILD}") from e


def build_info() -> dict[str, Any]:
    """What was built and what is in use, as a dict.

    ``version``, ``torch`` (the one built with), ``cpu_isas`` (instruction sets built in), ``cpu_isa`` (the one in use;
    ``ATEN_CPU_CAPABILITY`` chooses another), ``cuda_archs`` (empty when built without CUDA), ``compiler``.
    """
    from . import _C

    return _C.build_info()


def empty_cache() -> None:
    """Gives back to the system the CPU memory that is kept for the next large gradients, at most two blocks of it.

    It is given back by itself where an allocation fails; under memory pressure the system takes its pages unasked.
    """
    from . import _C

    _C.empty_cache()
