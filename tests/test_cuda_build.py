"""The whole CUDA library, built as users build it, on any machine that has nvcc: no GPU, no CUDA build of torch."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import newest_object
from cuda_emulation.backend import OPERATORS

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build/cuda"  # the objects are build/objects, where all builds keep theirs
ARCHS = ["8.0", "9.0", "10.0"]
DTYPES = ["f64", "f32", "f16", "bf16"]

# Registers a thread, at most, of each kernel on sm_90: with a label, with smoothing, with probabilities; 16 and 32 bit
# and float64. 80 let 3 blocks of 256 run on a multiprocessor, 128 two; 24 KB a block are in flight with each.
REGISTERS = {
    "forward_rows": {"32": (72, 80, 96), "64": (128, 128, 128)},
    "backward_rows": {"32": (64, 80, 96), "64": (80, 96, 128)},
    "forward_pixels": {"32": (64, 80, 80), "64": (128, 168, 168)},
    "backward_pixels": {"32": (64, 64, 80), "64": (96, 96, 128)},
    "finish_rows": {"32": (48, 48, 48), "64": (64, 64, 64)},
    "binary_forward": {"32": (64, 64, 64), "64": (80, 80, 80)},
    "binary_backward": {"32": (64, 64, 64), "64": (80, 80, 80)},
    "reduce_rows": {"32": (40, 40, 40), "64": (40, 40, 40)},
    "reduce_partial": {"32": (40, 40, 40), "64": (40, 40, 40)},
    "reduce_elements": {"32": (40, 40, 40), "64": (40, 40, 40)},
}


def cuda_home():
    nvcc = shutil.which("nvcc")
    for home in (os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"):
        if home and (Path(home) / "bin/nvcc").is_file() and (Path(home) / "include/cuda_runtime.h").is_file():
            return Path(home)
    return None


pytestmark = pytest.mark.skipif(cuda_home() is None, reason="no nvcc here: the CUDA library is not built in this run")


@pytest.fixture(scope="module")
def built():
    """Where the library is, built for three architectures; spills stop the build."""
    environment = {
        **os.environ,
        "CECE_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": " ".join(ARCHS),
        "CUDA_HOME": str(cuda_home()),
        "NVCC_APPEND_FLAGS": "-Xptxas=-warn-spills,-warn-lmem-usage,-Werror",
    }
    start = time.time()
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-base", BUILD],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    print(f"built in {time.time() - start:.0f} s")
    (library,) = BUILD.glob("lib*/cece/_C*.so")
    return library


def test_library_loads_and_registers_every_operator(built):
    """Loading resolves every symbol; what CUDA would run is there, and says so by itself."""
    script = f"""
import ctypes, json, os, sys
sys.path.insert(0, {str(built.parents[1])!r})
sys.setdlopenflags(os.RTLD_NOW)
import torch, cece
has = torch._C._dispatch_has_kernel_for_dispatch_key
info = cece.build_info()
print(json.dumps({{"file": cece.__file__, "archs": info["cuda_archs"],
    "missing": [op for op in {OPERATORS!r} if not has("cece::" + op, "CUDA")],
    "works": cece.cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3])).item()}}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=built.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert Path(said["file"]).parent == built.parent
    assert said["archs"] == ARCHS and said["missing"] == []
    assert abs(said["works"] - 1.3862944) < 1e-6


def test_no_symbol_is_left_open(built):
    """Needs nothing of CUDA at run time but the driver: the runtime is linked in."""
    listing = subprocess.run(["readelf", "-d", built], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", listing)
    assert not [n for n in needed if "cuda" in n], needed


def test_formulas_compile_for_older_cards(tmp_path):
    """sm_75 (T4) has no min.NaN; the oldest architecture that is built by default."""
    (tmp_path / "old.cu").write_text("""#include "numerics.h"
__global__ void kernel(cece::Tournament<float>* t, const float (&x)[4]) { t->push(x); }
""")
    command = [cuda_home() / "bin/nvcc", "-std=c++17", "-arch=sm_75", "--expt-relaxed-constexpr", f"-I{ROOT}/csrc"]
    done = subprocess.run(
        [*command, "-cubin", tmp_path / "old.cu", "-o", tmp_path / "old.cubin"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# ---- what is in the machine code


def tool(name):
    """cuobjdump or nvdisasm: the toolkit's, a pip wheel's (nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm), or on PATH."""
    site = Path(torch.__file__).parents[1]
    for folder in (cuda_home() / "bin", *site.glob("nvidia/*/bin"), site / "triton/backends/nvidia/bin"):
        if (folder / name).is_file():
            return folder / name
    return shutil.which(name) and Path(shutil.which(name))


@pytest.fixture(scope="module")
def dump(built):
    cuobjdump, nvdisasm = tool("cuobjdump"), tool("nvdisasm")
    if not cuobjdump or not nvdisasm:
        pytest.skip("no cuobjdump and nvdisasm here: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    path = os.pathsep.join([str(cuobjdump.parent), str(nvdisasm.parent), os.environ["PATH"]])

    def run(dtype, *args):
        file = newest_object(f"cuda-{dtype}")
        done = subprocess.run(
            [cuobjdump, *args, file], capture_output=True, text=True, env={**os.environ, "PATH": path}
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def kernel_name(mangled):
    """ "forward_rows" and its kind of target, 0 to 2, or 0."""
    name = next(k for k in REGISTERS if re.search(rf"\d{k}I", mangled))
    kind = re.search(r"TargetE(\d)", mangled)
    return name, int(kind[1]) if kind else 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_registers_and_no_spills(dump, dtype):
    """Every kernel on every architecture within its registers, none with a byte of local memory."""
    seen = set()
    for text in dump(dtype, "-res-usage").split("Fatbin elf code")[1:] or [dump(dtype, "-res-usage")]:
        for mangled, registers, stack, local in re.findall(
            r"Function (\S+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text, re.S
        ):
            name, kind = kernel_name(mangled)
            seen.add(name)
            assert (int(stack), int(local)) == (0, 0), f"{mangled} uses local memory"
            if "sm_90" in text or "compute_90" in text:
                limit = REGISTERS[name]["64" if dtype == "f64" else "32"][kind]
                assert int(registers) <= limit, f"{mangled}: {registers} registers, {limit} expected"
    assert seen == set(REGISTERS)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sixteen_byte_accesses(dump, dtype, arch):
    """The row and elementwise kernels read 16 bytes at a time, as many times as tune.h says, and write 16."""
    loads, stores, local = {}, {}, []
    for text in dump(dtype, "-sass", "-arch", arch).split("Function : ")[1:]:
        name = kernel_name(text.split("\n", 1)[0])
        loads[name] = len(re.findall(r"LDG\.E(?:\.\w+)*\.128", text))
        stores[name] = len(re.findall(r"STG\.E(?:\.\w+)*\.128", text))
        local += re.findall(r"\b(?:STL|LDL)\b", text)
    assert not local
    for kind, packs in enumerate([4, 2, 4]):  # with probabilities 2 of them, 2 of the logits
        assert loads["forward_rows", kind] >= packs, kind
    for kind, packs in enumerate([2, 2, 4]):
        assert loads["backward_rows", kind] >= packs and stores["backward_rows", kind] >= 2, kind
    assert loads["binary_forward", 0] >= 2 and loads["binary_backward", 0] >= 2 and stores["binary_backward", 0] >= 1
