"""Finds and loads the compiled library, or says in one sentence why it cannot be.

An installed cece has it beside this file. A checkout has it in ``build/``, in a folder for each torch and Python, so
that environments which share the checkout (``pip install --editable``) do not take each other's. setup.py runs this
file for the names.
"""

import hashlib
import importlib
import re
import sys
import sysconfig
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REBUILD = (
    "reinstall it where this torch is: pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps"
    " <cece's folder>"
)


def abi(torch: str) -> str:
    """What a compiled extension depends on, 'torch2.13cpu' of 2.13.0+cpu; a wheel's version ends in it."""
    number, _, build = torch.partition("+")
    return f"torch{'.'.join(number.split('.')[:2])}{re.sub('[^a-z0-9]', '', build.lower())}"


def in_tree(base: Path, torch: str) -> Path:
    """Where a build of a checkout leaves the compiled library; ``base`` is its build folder."""
    return base / f"{abi(torch)}-{sysconfig.get_config_var('SOABI')}" / "cece"


def fingerprint(root: Path) -> str:
    """Of all that is compiled, to know a library that is older than its sources."""
    digest = hashlib.sha256()
    sources = (p for p in (root / "csrc").rglob("*") if p.suffix in {".h", ".inl", ".cpp", ".cuh", ".cu"})
    for file in [root / "setup.py", *sorted(sources)]:
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _installed_elsewhere() -> Path | None:
    """The site-packages whose cece a checkout's own folder hides, if there is one."""
    folders = (Path(p).resolve() for p in sys.path)
    return next((f for f in folders if f != HERE.parent and (f / "cece/_built_for.py").is_file()), None)


def _prefer_tree(root: Path, torch: str) -> None:
    """Makes cece._C and cece._built_for those of the checkout's own build."""
    folder = in_tree(root / "build", torch)
    build = f"python {root / 'setup.py'} build_ext --inplace"
    if not (folder / "_built_for.py").is_file():
        elsewhere = _installed_elsewhere()
        raise ImportError(
            f"this is cece's own folder, which hides the cece installed in {elsewhere}: run python in another folder,"
            f" or build this one too: {build}"
            if elsewhere
            else f"cece is here as source only, without a part compiled for torch {torch}: {build}"
        )
    sys.modules[__package__].__path__.insert(0, str(folder))
    if importlib.import_module("cece._built_for").SOURCES != fingerprint(root):
        raise ImportError(f"cece's compiled part is not of the csrc/ and setup.py that are here now: {build}")


def load() -> None:
    try:
        import torch
    except ImportError as e:
        raise ImportError("cece needs torch >= 2.11, and importing it failed: pip install torch") from e
    root = HERE.parent
    if (root / "setup.py").is_file() and (root / "csrc").is_dir():
        _prefer_tree(root, torch.__version__)
    try:
        built_for = importlib.import_module("cece._built_for").TORCH
    except ImportError:
        raise ImportError(
            "cece is here as source only, without its compiled part: pip install --no-build-isolation <cece's folder>"
        ) from None
    if abi(built_for) != abi(torch.__version__):
        raise ImportError(f"cece was built for torch {built_for}, and this is torch {torch.__version__}: {REBUILD}")
    try:
        importlib.import_module("cece._C")
    except ImportError as e:
        raise ImportError(
            f"cece's compiled part, built for torch {built_for}, does not load here ({e}): {REBUILD}"
        ) from e


def build_info() -> dict[str, Any]:
    """What was built and what is in use, as a dict.

    ``version``, ``torch`` (the one built with), ``cpu_isas`` (instruction sets built in), ``cpu_isa`` (the one in use;
    ``ATEN_CPU_CAPABILITY`` chooses another), ``cuda_archs`` (empty when built without CUDA), ``cuda_left_out`` (why,
    else ``''``), ``compiler``.
    """
    from . import _C

    return _C.build_info()


def empty_cache() -> None:
    """Gives back to the system the CPU memory that is kept for the next large gradients, at most two blocks of it.

    It is given back by itself where an allocation fails; under memory pressure the system takes its pages unasked.
    """
    from . import _C

    _C.empty_cache()
