"""Every instruction set that was built, forced on in a process of its own; and nothing of one leaks into another."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import newest_object
from torch.utils.cpp_extension import include_paths

import cece

ROOT = Path(__file__).resolve().parents[1]
ISAS = {"default": "DEFAULT", "avx2": "AVX2", "avx512": "AVX512"}
HERE = {"default": True, "avx2": torch.cpu._is_avx2_supported(), "avx512": torch.cpu._is_avx512_supported()}

GRID = """if True:
    import itertools, torch, cece, torch.nn.functional as F
    print(cece.build_info()["cpu_isa"])
    torch.manual_seed(0)
    for shape, dtype, soft, s in itertools.product(
        [(37, 5), (19, 49), (3, 1030), (2, 70001), (2, 300, 9)], [torch.float64, torch.float32, torch.bfloat16],
        [False, True], [0.0, 0.1],
    ):
        x = (torch.randn(shape) * 3).to(dtype).requires_grad_()
        t = torch.rand(shape).softmax(1) if soft else torch.randint(shape[1], shape[:1] + shape[2:])
        wide = x.detach().double().requires_grad_()
        ours = cece.cross_entropy(x, t, label_smoothing=s)
        truth = F.cross_entropy(wide, t.double() if soft else t, label_smoothing=s)
        torch.testing.assert_close(ours.double(), truth, rtol=2e-6, atol=0)
        slope = torch.autograd.grad(truth, wide)[0].to(dtype)
        rtol = 1e-2 if dtype == torch.bfloat16 else 2e-5
        torch.testing.assert_close(torch.autograd.grad(ours, x)[0], slope, rtol=rtol, atol=1e-8)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x, y = (torch.randn(33, 31) * 3).to(dtype).requires_grad_(), torch.rand(33, 31) > 0.5
        wide = x.detach().double().requires_grad_()
        ours = cece.binary_cross_entropy_with_logits(x, y, pos_weight=torch.ones(31) * 2)
        truth = F.binary_cross_entropy_with_logits(wide, y.double(), pos_weight=torch.ones(31).double() * 2)
        torch.testing.assert_close(ours.double(), truth, rtol=2e-6, atol=0)
        slope = torch.autograd.grad(truth, wide)[0].to(dtype)
        rtol = 1e-2 if dtype == torch.bfloat16 else 2e-5
        torch.testing.assert_close(torch.autograd.grad(ours, x)[0], slope, rtol=rtol, atol=1e-8)
    x = -torch.rand(100_000) * 104
    exp = torch.ops.cece.cross_entropy_backward(
        torch.ones(()), torch.cat([torch.zeros(1), x])[None], torch.tensor([0]), None,
        torch.tensor([[0.0], [0.0], [1.0]]), torch.ones(()), 2, -100, 0.0,
    )[0, 1:]
    unit = torch.maximum(x.double().exp(), torch.tensor(2.0**-126)).log2().floor().exp2() * 2.0**-23
    assert ((exp.double() - x.double().exp()).abs() <= 2 * unit).all()
    print("agrees")
"""

# exp and expm1 of every 97th float of [-104, -0], or of all of them, through the operator whose slopes they are: with
# the statistics (0, 0, 1), that of a class in a row of max 0 and the label's.
EXPONENTIALS = """if True:
    import sys, numpy as np, torch, cece
    start, stop = (int(np.float32(x).view(np.uint32)) for x in (-0.0, -104.0))
    step, one = 97, torch.ones(())
    backward = torch.ops.cece.cross_entropy_backward
    def check(name, ours, truth, most):
        unit = np.spacing(np.maximum(np.abs(truth), 2.0**-126).astype(np.float32)).astype(np.float64)
        off = np.abs(ours.numpy().astype(np.float64) - truth) / unit
        worst = np.argmax(off)
        assert off[worst] <= most, (name, x[worst].item(), ours[worst].item(), truth[worst], off[worst])
    for first in range(step) if sys.argv[1:] == ["all"] else [0]:
        for part in np.array_split(np.arange(start + first, stop + 1, step, dtype=np.uint32), 4):
            x = torch.from_numpy(part.view(np.float32))
            wide, n, stats = x.numpy().astype(np.float64), len(x), torch.tensor([0.0, 0.0, 1.0])
            row = torch.cat([torch.zeros(1), x])[None]
            exp = backward(one, row, torch.tensor([0]), None, stats.view(3, 1), one, 2, -100, 0.0)[0, 1:]
            check("exp", exp, np.exp(wide), 2)
            pair = torch.stack([x, torch.zeros(n)])[None]
            stats = stats.view(3, 1, 1).expand(3, 1, n).contiguous()
            label = torch.zeros(1, n, dtype=torch.int64)
            expm1 = backward(one, pair, label, None, stats, one, 2, -100, 0.0)[0, 0]
            check("expm1", expm1, np.expm1(wide), 2.5)
    print("agrees")
"""


def forced(isa, *command):
    """What a script prints under an instruction set."""
    if not HERE[isa]:
        pytest.skip(f"this CPU has no {isa}")
    if ISAS[isa] not in {name.upper() for name in cece.build_info()["cpu_isas"]}:
        pytest.skip(f"{isa} was not built on this architecture")
    environment = os.environ | {"ATEN_CPU_CAPABILITY": isa}
    done = subprocess.run([sys.executable, "-c", *command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.upper() for line in done.stdout.split()]


@pytest.mark.parametrize("isa", ISAS)
def test_exponentials(isa):
    """At most 2 and 2.5 ULP; CECE_ALL_FLOATS=1: of every float, which takes minutes."""
    assert forced(isa, EXPONENTIALS, *(["all"] if os.environ.get("CECE_ALL_FLOATS") == "1" else [])) == ["AGREES"]


@pytest.mark.parametrize("isa", ISAS)
def test_forced(isa):
    """build_info() says it, the losses agree with float64, exp stays within 2 ULP."""
    assert forced(isa, GRID) == [ISAS[isa], "AGREES"]


def test_unforced_is_what_torch_uses():
    assert cece.build_info()["cpu_isa"].upper() == torch.backends.cpu.get_cpu_capability().upper()


@pytest.mark.parametrize("isa", [name.lower() for name in cece.build_info()["cpu_isas"] if name != "DEFAULT"])
def test_no_weak_symbols(isa):
    """A weak (inline, template) function compiled for AVX2 could be the one the linker keeps for everybody: SIGILL on
    older machines, other bits on newer ones. The table of kernels is all that an object shows."""
    file = newest_object(f"cpu-isa_{isa}")
    if file is None or not shutil.which("nm"):
        pytest.skip("no nm here, or cece is not of this checkout")
    symbols = subprocess.run(["nm", "-C", file], capture_output=True, text=True, check=True).stdout
    defined = re.findall(r"^[0-9a-f]* +([A-Za-z]) (.*)$", symbols, re.M)
    weak = [name for kind, name in defined if kind in "WwVvu"]
    assert not [n for n in weak if not n.startswith("DW.ref.")], weak[:10]
    shown = [name for kind, name in defined if kind in "TDBR"]
    assert shown == [f"cece::cpu::k{isa.capitalize()}"], shown


@pytest.mark.skipif(not shutil.which("aarch64-linux-gnu-g++"), reason="no cross compiler for aarch64 here")
def test_aarch64_compiles():
    """The default kernels, which are all that aarch64 has; only the headers of torch are needed."""
    includes = [f"-isystem{path}" for path in include_paths()]
    command = ["aarch64-linux-gnu-g++", "-std=c++20", "-fsyntax-only", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"]
    done = subprocess.run([*command, *includes, ROOT / "csrc/cpu/isa_default.cpp"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
