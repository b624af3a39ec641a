"""The whole CUDA library, built as users build it, on any machine that has nvcc: no GPU, no CUDA build of torch."""

import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import newest_object
from cuda_emulation.backend import OPERATORS

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.machine_code import WIDE, cuda_home, cuobjdump, kernel_name, kernels, rows, tool  # noqa: E402

BUILD = ROOT / "build/cuda"  # the objects are build/objects, where all builds keep theirs
# That whose machine code has limits here. Each more takes 80 s; before a release: CECE_TEST_ARCHS="8.0 9.0 10.0".
ARCHS = os.environ.get("CECE_TEST_ARCHS", "9.0").split()
SM = [f"sm_{arch.replace('.', '')}" for arch in ARCHS]
DTYPES = ["f64", "f32", "f16", "bf16"]

# Registers a thread, at most, of each kernel on sm_90: with a label, with smoothing, with probabilities, with smoothing
# and class weights, with probabilities of another type; all statistics with labels or none, and with probabilities. Of
# float16 where it takes more than float32 and bfloat16, and of float64. 64 let 4 blocks of 256 run on a multiprocessor,
# 80 three, 128 two.
REGISTERS = {
    "forward_rows": {
        "32": (64, 80, 96, 80, 128, 128, 128),
        "f16": (80, 80, 96, 80, 128, 128, 128),
        "f64": (128, 168, 128, 128, 0, 128, 160),
    },
    "backward_rows": {
        "32": (64, 80, 96, 80, 128, 80, 128),
        "f16": (72, 80, 96, 80, 128, 80, 128),
        "f64": (80, 96, 128, 96, 0, 104, 112),
    },
    "backward_rows shifted": {"32": (80, 80, 0, 96), "f16": (80, 80, 0, 112), "f64": (96, 96, 0, 96)},
    "forward_pixels": {"32": (72, 80, 104, 80, 104, 104, 104), "f64": (168, 216, 216, 184, 0, 184, 184)},
    "backward_pixels": {"32": (64, 64, 88, 64, 104, 64, 88), "f64": (128, 128, 176, 128, 0, 96, 104)},
    "forward_pixels pairs": {"32": (72, 112)},
    "backward_pixels pairs": {"32": (64, 80), "f16": (80, 80)},
    "finish_parts": {"32": (72,), "f64": (80,)},
    "finish_rows": {"32": (48, 48, 48, 48, 48, 48, 48), "f64": (64, 64, 64, 64, 0, 64, 64)},
    "forward_pairs": {"32": (64,), "f64": (128,)},
    "merge_pairs": {"32": (64,), "f64": (64,)},
    "backward_pairs": {"32": (56,), "f64": (64,)},
    "binary_forward": {"32": (80,), "f16": (96,), "f64": (88,)},
    "binary_backward": {"32": (80,), "f16": (96,), "f64": (88,)},
    "reduce_rows": {"32": (40,), "f64": (40,)},
    "reduce_partial": {"32": (40,), "f64": (40,)},
    "reduce_elements": {"32": (40,), "f64": (40,)},
}

pytestmark = pytest.mark.skipif(cuda_home() is None, reason="no nvcc here: the CUDA library is not built in this run")


@pytest.fixture(scope="module")
def built():
    """Where the library is, built for those architectures; spills stop the build."""
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


@pytest.fixture(scope="module")
def dump(built):
    if not tool("cuobjdump") or not tool("nvdisasm"):
        pytest.skip("no cuobjdump and nvdisasm here: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    wanted = [("-res-usage",), *(("-sass", "-arch", sm) for sm in SM)]
    with ThreadPoolExecutor(2) as pool:  # each takes ten seconds, and several tests read it
        texts = {
            (dtype, *args): pool.submit(cuobjdump, newest_object(f"cuda-{dtype}"), *args)
            for dtype in DTYPES
            for args in wanted
        }
        yield lambda *key: texts[key].result()


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
    halves = dtype in ("f16", "bf16")  # two pixels a thread; rows are finished in the type that sums are formed in
    wanted = {name for name in REGISTERS if halves or not name.endswith(" pairs")}
    assert seen == wanted - ({"finish_parts"} if halves else set())


@pytest.mark.parametrize("arch", SM)
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
    for kind in (0, 1, 3):  # two of the logits for each of the gradient, of which float64's need half
        wide = 2 if dtype == "f64" else 4
        assert loads["backward_rows shifted", kind] >= wide and stores["backward_rows shifted", kind] >= 2, kind
    packs = 1 if dtype == "f64" else 2
    assert loads["binary_forward", "input"] >= 2 * packs and loads["binary_backward", "input"] >= 2 * packs
    assert stores["binary_forward", "input"] >= packs and stores["binary_backward", "input"] >= packs


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_hot_loops(dump, dtype):
    """Few enough instructions to keep up with memory, enough loads under way before one is waited for."""
    found = rows(dtype, dump(dtype, "-sass", "-arch", "sm_90"))
    print(*found, sep="\n")
    assert not [row for row in found if row.is_slow()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_waited_for_before_the_first_pack(dump, dtype):
    """A row's label and statistics may be loaded before its logits, but are read behind the first 16-byte load."""
    for code in kernels(dump(dtype, "-sass", "-arch", "sm_90")):
        name, kind = kernel_name(code.mangled)
        if name.startswith(("forward_rows", "backward_rows")) and kind < 5:  # what plain cross-entropy runs
            first = next(i for i, instruction in enumerate(code.instructions) if WIDE.search(instruction))
            assert code.waits_before(first) is None, (name, kind, code.waits_before(first))
