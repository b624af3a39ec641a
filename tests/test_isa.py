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

# Rows side by side, at the very end of memory that may be touched: a read or write beyond it ends the process.
SHORT_ROWS = """if True:
    import ctypes, mmap, torch, cece
    print(cece.build_info()["cpu_isa"])
    torch.manual_seed(0)
    SIZE = 1 << 20
    memory = mmap.mmap(-1, SIZE + mmap.PAGESIZE)
    guard = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + SIZE
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(guard), mmap.PAGESIZE, 0) == 0
    UNIT = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

    def at_the_end(shape, strides, dtype):
        span = 1 + sum((n - 1) * s for n, s in zip(shape, strides))
        free = SIZE // dtype.itemsize - span
        whole = torch.frombuffer(memory, dtype=dtype, count=SIZE // dtype.itemsize)
        whole[-2 * span :] = 7
        return whole[-2 * span :], whole.as_strided(shape, strides, free)

    def check(dtype, rows, classes, pad, pixels, kind):
        strides = (1, rows + pad) if pixels else (classes + pad, 1)
        whole, x = at_the_end((rows, classes), strides, dtype)
        x.copy_(torch.randn(rows, classes) * 3)
        y, smoothing = torch.randint(classes, (rows,)), 0.1 * (kind in (1, 2, 3))
        w = torch.rand(classes).to(torch.promote_types(dtype, torch.float32)) if kind in (2, 3) else None
        g, same = torch.randn(rows).to(torch.promote_types(dtype, torch.float32)), torch.arange(rows) % 5
        x[same == 1, 0] = -torch.inf if classes > 1 else 0
        x[same == 2, classes - 1] = torch.inf  # a certainty
        x[same == 3] = 0.5  # all of them maximal
        out = same == 4  # left out, and no NaN comes from there
        wide = x.double()
        wide[same == 2] = torch.nn.functional.one_hot(torch.tensor(classes - 1), classes).double().log()
        y[same == 2], y[(same == 1) & (y == 0)] = classes - 1, classes - 1
        if kind > 2:  # of probabilities
            t = torch.rand(rows, classes).softmax(1)
            t[same == 1, 0], t[same == 2], t[same == 2, classes - 1], out = 0, 0, 1, out & False
        else:
            t, y[out] = torch.nn.functional.one_hot(y, classes), -100
            x[out] = torch.nan
        if smoothing and classes > 1:  # a mass on what is impossible costs infinitely much
            x[(same == 1) | (same == 2)] = wide[(same == 1) | (same == 2)] = 0.25
        q = (t.double() * (1 - smoothing) + smoothing / classes) * (1 if w is None else w.double())
        p, log_p = wide.softmax(1), wide.log_softmax(1)
        if classes == 1:
            p, log_p = torch.ones_like(p), torch.zeros_like(p)
        loss = -torch.where(q == 0, 0, q * log_p).sum(1).masked_fill(out, 0)
        grad = ((p * q.sum(1, True) - q) * g[:, None].double()).masked_fill(out[:, None], 0)
        options = (t if kind > 2 else y, w)
        ours, stats, total = torch.ops.cece.cross_entropy_forward(x, *options, 0, -100, smoothing)
        what = f"{dtype} {rows} x {classes} + {pad}, {pixels=}, {kind=}"
        where = lambda a, b: what + f", worst at {(a.double() - b).abs().nan_to_num(9e9).argmax()}: "
        apart = torch.ops.cece.cross_entropy_backward(g, x, *options, stats, total, 0, -100, smoothing)
        torch.ops.cece.cross_entropy_backward_(g, x, *options, stats, total, 0, -100, smoothing)
        close = lambda a, b, **at: torch.testing.assert_close(a.double(), b, msg=lambda m: where(a, b) + m, **at)
        close(ours, loss, rtol=max(UNIT[dtype] if dtype.itemsize > 2 else 0, 3e-6 * (dtype.itemsize < 8)), atol=1e-7)
        close(x, grad, rtol=UNIT[dtype], atol=UNIT[dtype] / 4)
        assert torch.equal(x, apart), what
        x.fill_(7)
        assert (whole == 7).all(), what  # padding and what lies before are left alone

    for classes in range(1, 51):
        for i, rows in enumerate((1, 4, 7, 8, 15, 16, 17, 33, 64, 65, 130, 300)):
            for j, dtype in enumerate(UNIT):
                if (classes + i + j) % 8 == 0 or classes in (9, 21):
                    pad, kind = (0, 0, 3)[(classes + i) % 3], (classes // 2 + i) % 5
                    check(dtype, rows, classes, pad, False, kind)
                    check(dtype, rows, classes, pad, True, kind)
    for classes in (95, 96, 97, 99, 200):  # a tile's classes
        for dtype in UNIT:
            for kind in range(5):
                check(dtype, 70 - kind, classes, kind % 3, True, kind)
    print("agrees")
"""


def run_on(isa, program):
    if not HERE[isa]:
        pytest.skip(f"this CPU has no {isa}")
    if ISAS[isa] not in {name.upper() for name in cece.build_info()["cpu_isas"]}:
        pytest.skip(f"{isa} was not built on this architecture")
    environment = os.environ | {"ATEN_CPU_CAPABILITY": isa}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, (done.returncode, done.stderr[-3000:])
    assert [line.upper() for line in done.stdout.split()] == [ISAS[isa], "AGREES"]


# Tests of other files that depend on lanes: tails, what goes into a vector together, bits of a NaN
OF_LANES = {
    "test_binary_cross_entropy.py": "lengths or of_the_same or many_outcomes or beside_probabilities or of_any_size",
    "test_divergence.py": "values_and_gradients or certain_rows or many_rows or infinite_logits",
    "test_extremes.py": "equal_terms or nan_of_any_bits",
    "test_multilabel.py": "of_any_length",
}


@pytest.mark.parametrize("isa", list(ISAS)[:-1])
def test_of_lanes(isa):
    """By the kernels that this machine would not choose."""
    if not HERE[isa]:
        pytest.skip(f"this CPU has no {isa}")
    chosen = f"({' or '.join(OF_LANES.values())}) and not emulated"
    files = [Path(__file__).with_name(name) for name in OF_LANES]
    program = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", chosen]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": isa, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:]


@pytest.mark.parametrize("isa", ISAS)
def test_forced(isa):
    """build_info() says it, the losses agree with float64, exp stays within 2 ULP."""
    run_on(isa, GRID)


@pytest.mark.parametrize("isa", ISAS)
def test_short_rows(isa):
    """Every number of classes, row counts around the lanes' and the tiles', padded or not, by rows and by pixels: as
    float64 says, the gradient in place, nothing beside them touched."""
    run_on(isa, SHORT_ROWS)


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
