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
from machine_code import WIDE, kernels

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build/cuda"  # the objects are build/objects, where all builds keep theirs
ARCHS = ["8.0", "9.0", "10.0"]
DTYPES = ["f64", "f32", "f16", "bf16"]

# Registers a thread, at most, of each kernel on sm_90: with a label, with smoothing, with probabilities, with smoothing
# and class weights, with probabilities of another type; of float16 where it takes more than float32 and bfloat16, and
# of float64. 64 let 4 blocks of 256 run on a multiprocessor, 80 three, 128 two.
REGISTERS = {
    "forward_rows": {"32": (64, 80, 96, 80, 128), "f16": (80, 80, 96, 80, 128), "f64": (128, 168, 128, 128)},
    "backward_rows": {"32": (64, 80, 96, 80, 128), "f16": (72, 80, 96, 80, 128), "f64": (80, 96, 128, 96)},
    "forward_pixels": {"32": (72, 80, 104, 80, 104), "f64": (168, 216, 216, 184)},
    "backward_pixels": {"32": (64, 64, 88, 64, 104), "f64": (128, 128, 176, 128)},
    "finish_rows": {"32": (48, 48, 48, 48, 48), "f64": (64, 64, 64, 64)},
    "binary_forward": {"32": (64,), "f16": (80,), "f64": (88,)},
    "binary_backward": {"32": (64,), "f16": (80,), "f64": (88,)},
    "reduce_rows": {"32": (40,), "f64": (40,)},
    "reduce_partial": {"32": (40,), "f64": (40,)},
    "reduce_elements": {"32": (40,), "f64": (40,)},
}

# Elements a round of the hot loop on sm_90, instructions an element at most, and loads under way before the first
# result is used. What memory affords, at 90 % of the issue rate: 2 bytes an element 18 on an H100 and 13 on an H200,
# 4 bytes twice that, and so on (tune.h has the bytes). Classes of targets: a label, smoothing, probabilities,
# smoothing with class weights; of a binary loss the target's type: as the input, bool, float32 beside 16 bits.
HOT_LOOPS = {
    ("bf16", "forward_rows", 0): (32, 11, 4),
    ("bf16", "forward_rows", 1): (32, 16, 4),
    ("bf16", "forward_rows", 2): (16, 28, 4),
    ("bf16", "forward_rows", 3): (16, 31, 2),
    ("bf16", "backward_rows", 0): (16, 16, 2),
    ("bf16", "backward_rows", 1): (16, 16, 2),
    ("bf16", "backward_rows", 2): (16, 20, 4),
    ("bf16", "forward_pixels", 0): (8, 19, 7),
    ("bf16", "forward_pixels", 1): (8, 34, 7),
    ("bf16", "backward_pixels", 0): (8, 28, 7),
    ("bf16", "binary_forward", "input"): (16, 28, 4),
    ("bf16", "binary_forward", "bool"): (16, 30, 4),
    ("bf16", "binary_forward", "f32"): (16, 28, 6),
    ("bf16", "binary_backward", "input"): (16, 21, 4),
    ("bf16", "binary_backward", "bool"): (16, 23, 4),
    ("bf16", "binary_backward", "f32"): (16, 21, 6),
    ("f32", "forward_rows", 0): (16, 18, 4),
    ("f32", "forward_rows", 1): (16, 24, 4),
    ("f32", "backward_rows", 0): (8, 28, 2),
    ("f32", "forward_pixels", 0): (8, 26, 7),
    ("f32", "binary_forward", "input"): (8, 37, 4),
    ("f32", "binary_forward", "bool"): (8, 40, 4),
    ("f32", "binary_backward", "input"): (8, 29, 4),
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
    """ "forward_rows" and its kind of target, 0 to 4, or 0; of a binary loss on logits the target's type, else None."""
    name = next(k for k in REGISTERS if re.search(rf"\d{k}I", mangled))
    if name.startswith("binary"):
        kind = re.search(r"WithLogitsE(\w+?)EE", mangled)
        kinds = {"v": "any", "h": "bool", "f": "input" if re.search(rf"{name}If", mangled) else "f32"}
        return name, kind and kinds.get(kind[1], "input")
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
                limits = REGISTERS[name].get(dtype, REGISTERS[name]["32"])
                limit = limits[0 if name.startswith("binary") else kind]
                limit = 128 if re.search("SigmoidFocal|Asymmetric", mangled) else limit
                assert int(registers) <= limit, f"{mangled}: {registers} registers, {limit} expected"
    assert seen == set(REGISTERS)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sixteen_byte_accesses(dump, dtype, arch):
    """The row and elementwise kernels read 16 bytes at a time, as many times as tune.h says, and write 16."""
    loads, stores, local = {}, {}, []
    for code in kernels(dump(dtype, "-sass", "-arch", arch)):
        name = kernel_name(code.mangled)
        loads[name] = code.count(WIDE)
        stores[name] = code.count(re.compile(r"STG\.E(?:\.\w+)*\.128"))
        local += [i for i in code.instructions if re.search(r"\b(?:STL|LDL)\b", i)]
    assert not local
    for kind, packs in enumerate([4, 4, 4, 2]):  # with probabilities 2 of them, 2 of the logits
        assert loads["forward_rows", kind] >= packs, kind
    for kind, packs in enumerate([2, 2, 4, 2]):
        assert loads["backward_rows", kind] >= packs and stores["backward_rows", kind] >= 2, kind
    packs = 1 if dtype == "f64" else 2
    assert loads["binary_forward", "input"] >= 2 * packs and loads["binary_backward", "input"] >= 2 * packs
    assert stores["binary_forward", "input"] >= packs and stores["binary_backward", "input"] >= packs


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_hot_loops(dump, dtype):
    """Few enough instructions an element to keep up with memory, enough loads under way before one is waited for."""
    found = {kernel_name(code.mangled): code for code in kernels(dump(dtype, "-sass", "-arch", "sm_90"))}
    wrong = []
    for (of, *name), (elements, limit, loads) in HOT_LOOPS.items():
        if of != dtype:
            continue
        code = found[tuple(name)]
        loop = code.hot_loop()
        each, before_use = code.instructions_a_round(loop, elements) / elements, code.loads_before_use(*loop)
        print(f"{dtype:5s}{name[0]:16s} {name[1]!s:6s} {each:5.1f} instructions, {before_use} loads under way")
        if each > limit or before_use < loads:
            wrong.append(f"{name}: {each:.1f} instructions for {limit}, {before_use} loads for {loads}")
    assert not wrong, wrong


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_waited_for_before_the_first_pack(dump, dtype):
    """A row's label and statistics may be loaded before its logits, but are read behind the first 16-byte load."""
    for code in kernels(dump(dtype, "-sass", "-arch", "sm_90")):
        name, kind = kernel_name(code.mangled)
        if name in ("forward_rows", "backward_rows"):
            first = next(i for i, instruction in enumerate(code.instructions) if WIDE.search(instruction))
            assert code.waits_before(first) is None, (name, kind, code.waits_before(first))
