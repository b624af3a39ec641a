"""The CUDA kernels as a backend without a GPU: ``csrc/cuda`` compiled by a C++ compiler with the emulator.

``install()`` lets cece's operators on CPU tensors run the CUDA kernels, so that the same tests serve every backend.
"""

import contextlib
import hashlib
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
OPERATORS = [
    "cross_entropy_forward",
    "cross_entropy_backward",
    "cross_entropy_backward_",
    "token_statistics_forward",
    "token_statistics_backward",
    "token_statistics_backward_",
    "row_parts",
    "finish_parts",
    "binary_cross_entropy_forward",
    "binary_cross_entropy_backward",
    "divergence_forward",
    "divergence_merge",
    "divergence_backward",
]
# -O1 compiles in half the time of -O2 and runs as fast: the emulator spends its time in switches between stacks.
FLAGS = [
    "-std=c++20",
    "-O1",
    "-g1",
    "-fPIC",
    "-DCECE_EMULATE",
    "-ffp-contract=off",
    "-w",
    f"-I{HERE}",
    f"-I{ROOT}/csrc",
]
# CECE_EMULATOR_MODE: what a GPU's arithmetic may do that this machine's does not. `perturbed`: exp, log and their like
# off by as many units of the last place as CUDA allows them, by the library that is there; `fma`: products and sums
# rounded once.
MODES = {"": [], "perturbed": [], "fma": ["-ffp-contract=fast", "-mfma"]}


def mode():
    return MODES[os.environ.get("CECE_EMULATOR_MODE", "")]


def compiler():
    return os.environ.get("CXX", "g++").split()


def kernel_sources():
    return sorted((ROOT / "csrc/cuda").glob("*.cu"))


def compile_all(jobs):
    """Runs compiler commands, as many at a time as there are processors."""

    def one(command):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr[-6000:]}")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, jobs))


def _fingerprint():
    """Of everything that goes into the library: an unchanged tree is not compiled again."""
    files = [p for p in [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc/cuda").iterdir(), *HERE.iterdir()] if p.is_file()]
    digest = hashlib.sha256(
        f"{torch.__version__} {torch._C._GLIBCXX_USE_CXX11_ABI} {compiler()} {FLAGS} {mode()}".encode()
    )
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _build(library):
    from torch.utils.cpp_extension import include_paths

    folder = library.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{path}" for path in include_paths()]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    sources = [*kernel_sources(), ROOT / "csrc/cuda/ops.cpp", HERE / "library.cpp"]
    objects = [folder / f"{source.stem}.{source.suffix[1:]}.o" for source in sources]
    compile_all(
        [*compiler(), *FLAGS, *mode(), abi, *includes, "-x", "c++", "-c", source, "-o", out]
        for source, out in zip(sources, objects, strict=True)
    )
    torch_lib = Path(torch.__file__).parent / "lib"
    partial = library.with_suffix(f".{os.getpid()}")
    compile_all(
        [[*compiler(), "-shared", *objects, f"-L{torch_lib}", "-lc10", "-ltorch_cpu", "-ltorch", "-o", partial]]
    )
    partial.replace(library)  # whole or not at all, whoever else builds it at the same time


def load():
    """``torch.ops.cece_emulated``, built when its sources have changed."""
    library = ROOT / "build/emulated" / f"{_fingerprint()}.so"
    if not library.exists():
        _build(library)
    torch.ops.load_library(library)
    return torch.ops.cece_emulated


def seed(number):
    """The order of threads: 0 first to last, -1 last to first, else random from this seed."""
    load().seed(number)


@contextlib.contextmanager
def install(order=None):
    """Within it, cece's operators on CPU tensors run the CUDA kernels through the emulator.

    ``order`` is what :func:`seed` takes; by default ``CECE_EMULATOR_SEED``, or 1.
    """
    import cece  # noqa: F401  its operators are what is overridden

    emulated = load()
    seed(int(os.environ.get("CECE_EMULATOR_SEED", "1")) if order is None else order)
    library = torch.library.Library("cece", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in OPERATORS:
                library.impl(name, getattr(emulated, name).default, "CPU", allow_override=True)
        yield emulated
    finally:
        library._destroy()


if __name__ == "__main__":
    load()
    print(sys.argv[0], "built")
