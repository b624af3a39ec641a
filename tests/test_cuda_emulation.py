"""The CUDA kernels without a GPU: the emulator's own test, sanitizers, and the launch paths against the truth.

What the losses must do on every backend is in the other test files (`backend="emulated"`). Here is what only the CUDA
kernels have: a path for each shape, any alignment, any order of threads.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_emulation.backend import FLAGS, HERE, ROOT, compile_all, compiler, install, seed

import cece

SANITIZERS = {
    "plain": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
ENVIRONMENT = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}

pytestmark = pytest.mark.skipif(
    not shutil.which(compiler()[0]), reason="the emulator needs a C++ compiler, and there is none"
)


def build(folder, name, sanitizer, sources):
    """The program from its sources, one compiler a source; skips where this compiler lacks the sanitizer."""
    flags = [*compiler(), *FLAGS, *SANITIZERS[sanitizer]]
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}\n")
    if subprocess.run([*flags, probe, "-o", folder / "probe"], capture_output=True).returncode:
        pytest.skip(f"{compiler()[0]} has no {sanitizer} sanitizer")
    objects = [folder / f"{Path(source).stem}.o" for source in sources]
    compile_all([*flags, "-x", "c++", "-c", s, "-o", o] for s, o in zip(sources, objects, strict=True))
    compile_all([[*flags, *objects, "-o", folder / name]])
    return folder / name


def run(program, *args):
    return subprocess.run([program, *map(str, args)], capture_output=True, text=True, env=ENVIRONMENT, timeout=600)


# ---- the emulator itself

# What each seeded bug of self_test.cpp must end in: 1 a wrong result, 2 the emulator's own words, a
# string the sanitizer's.
CAUGHT = {
    "plain": {0: 0, 1: 1, 2: 1, 3: 2, 4: 1, 5: 2, 6: 1, 7: 2, 8: 2, 9: 2, 10: 2},
    "address": {0: 0, 1: "heap-buffer-overflow", 2: "out of bounds", 3: 2, 4: 1, 5: 2, 6: 1, 7: 2, 8: 2, 9: 2, 10: 2},
    "thread": {0: 0, 4: "data race"},
}


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_emulator_catches_seeded_bugs(sanitizer, tmp_path):
    program = build(tmp_path, "self_test", sanitizer, [HERE / "self_test.cpp"])
    for bug, expected in CAUGHT[sanitizer].items():
        done = run(program, bug)
        said = done.stdout + done.stderr
        if isinstance(expected, int):
            assert done.returncode == expected, f"bug {bug}: exit {done.returncode}\n{said[-2000:]}"
        else:
            assert done.returncode not in (0, 2) and expected in said, f"bug {bug}: {said[-2000:]}"
        if expected == 2:
            assert "cece's CUDA emulator" in said and "self_test.cpp" in said


def test_missing_barrier_in_every_order(tmp_path):
    program = build(tmp_path, "self_test", "plain", [HERE / "self_test.cpp"])
    for order in (0, *range(1, 6)):  # in reverse order the reader comes last and sees nothing wrong
        assert run(program, 4, order).returncode == 1
    assert run(program, 0, -1).returncode == 0


# ---- the kernels under sanitizers


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_kernels_under_sanitizer(sanitizer, tmp_path):
    cuda = ROOT / "csrc/cuda"
    program = build(tmp_path, "sanitize", sanitizer, [cuda / "f32.cu", cuda / "bf16.cu", HERE / "sanitize.cpp"])
    for number in (1, 2) if sanitizer == "address" else (1,):
        done = run(program, number)
        assert done.returncode == 0, f"seed {number}\n{(done.stdout + done.stderr)[-4000:]}"
        assert "0 failures" in done.stdout


# ---- every launch path against float64


@pytest.fixture
def emulated():
    with install() as operators:
        yield operators


# rows, classes and layout for every row of the launch table (csrc/cuda/tune.h) and its edges, in float32
PATHS = [
    *[(300, c, "rows") for c in (1, 2, 3, 4, 5, 7)],  # a lane a row, four lanes a row
    *[(70, c, "rows") for c in (10, 16, 17, 33, 64, 65, 100)],  # 4 and 8 lanes
    *[(9, c, "rows") for c in (128, 129, 256, 257, 1000, 1001, 2048)],  # 16 lanes, a warp
    *[(3, c, "rows") for c in (2049, 5000, 8193)],  # a block
    *[(2, c, "rows") for c in (16385, 40001, 70000)],  # parts of a row, merged by a second kernel
    *[(37, c, "pixels") for c in (2, 3, 10, 33, 300)],
    (5000, 3, "pixels"),
    (37, 100, "strided"),
    (37, 100, "misaligned"),
]


def make(rows, classes, layout, dtype):
    if layout == "pixels":
        return (torch.randn(classes, rows) * 4).to(dtype).t()
    if layout == "strided":
        return (torch.randn(rows, classes * 2) * 4).to(dtype)[:, ::2]
    if layout == "misaligned":
        return (torch.randn(rows * classes + 3) * 4).to(dtype)[3:].view(rows, classes)
    return (torch.randn(rows, classes) * 4).to(dtype)


def check(logits, target, weight, smoothing, reduction="mean"):
    """Loss and gradient against float64, each within a few roundings of what the formula can give."""
    x = logits.detach().requires_grad_()
    loss = cece.cross_entropy(x, target, weight, label_smoothing=smoothing, reduction=reduction)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    true_x = logits.double().requires_grad_()
    true_target = target.double() if target.is_floating_point() else target
    true = cece.reference.cross_entropy(
        true_x, true_target, None if weight is None else weight.double(), label_smoothing=smoothing, reduction=reduction
    )
    (true_grad,) = torch.autograd.grad(true.sum(), true_x)
    torch.testing.assert_close(loss.double(), true, rtol=2e-6, atol=1e-6 if logits.shape[1] == 1 else 2e-7)
    eps = torch.finfo(logits.dtype).eps
    assert ((grad.double() - true_grad).abs() <= 4 * eps * true_grad.abs() + 1e-6 * true_grad.abs().max() + 6e-8).all()


@pytest.mark.parametrize("rows, classes, layout", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_paths(emulated, rows, classes, layout, dtype):
    logits = make(rows, classes, layout, dtype)
    labels = torch.randint(0, classes, (rows,))
    labels[rows // 2] = -100
    check(logits, labels, None, 0.0)
    if classes <= 20000:
        check(logits, labels.int(), torch.rand(classes) + 0.5, 0.1, "sum")
        check(logits, torch.rand(rows, classes).to(dtype), None, 0.0, "none")
        check(logits, torch.rand(rows, classes).softmax(1), torch.rand(classes) + 0.5, 0.1)


@pytest.mark.parametrize("offset", range(8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [5, 129, 1003])
def test_any_alignment(emulated, offset, dtype, classes):
    """Rows that start anywhere, and a soft target that starts elsewhere than the logits."""
    memory = (torch.randn(3 * classes + 8) * 4).to(dtype)
    logits = memory[offset : offset + 3 * classes].view(3, classes)
    target = torch.rand(3 * classes + 8).to(dtype)[(offset * 3) % 8 :][: 3 * classes].view(3, classes)
    check(logits, torch.tensor([0, classes - 1, classes // 2]), None, 0.0)
    check(logits, target, None, 0.0)


@pytest.mark.parametrize("order", [0, -1, 1, 2, 3])
def test_bit_identical_in_any_order(emulated, order):
    """The order in which threads run changes no bit of a result."""
    logits, labels = torch.randn(3, 40001), torch.tensor([5, -100, 40000])
    pixels, map_ = torch.randn(2, 300, 40), torch.randint(0, 300, (2, 40))

    def everything(number):
        seed(number)
        out = []
        for x, y in ((logits, labels), (pixels, map_)):
            x = x.clone().requires_grad_()
            loss = cece.cross_entropy(x, y, label_smoothing=0.1)
            out += [loss.detach(), *torch.autograd.grad(loss, x)]
        return [*out, cece.binary_cross_entropy_with_logits(pixels, (pixels > 0).float())]

    for a, b in zip(everything(7), everything(order), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "classes, layout", [(7, "rows"), (129, "rows"), (2500, "rows"), (70000, "rows"), (40, "pixels")]
)
def test_tiny_losses(emulated, dtype, classes, layout):
    """A confident row's loss keeps its last bits: 1e-20 to 4 ULP."""
    gap = 46.0 if dtype != torch.float16 else 47.0
    logits = make(3, classes, layout, dtype).zero_()
    logits[:, classes // 2] = gap
    logits[1, 0] = gap / 2
    labels = torch.full((3,), classes // 2)
    loss = cece.cross_entropy(logits, labels, reduction="none").double()
    rest = torch.cat([logits[:, : classes // 2], logits[:, classes // 2 + 1 :]], 1).double()
    true = (rest - gap).exp().sum(1).log1p()
    assert ((loss - true).abs() <= 4 * torch.finfo(torch.float32).eps * true).all(), (loss / true - 1) / 2**-23


@pytest.mark.parametrize("major, compiled_for", [(8, 80), (9, 80), (12, 89), (8, 90)])
def test_wide_rows_of_code_without_clusters(emulated, major, compiled_for):
    """A new card that runs an older one's PTX has no cluster merge in its code: the parts go through memory.

    Here merge_cluster is empty, as it is in such code: were it relied on, all parts but the first would be lost.
    """
    emulated.card(major, compiled_for)
    try:
        for rows, classes in ((2, 40_001), (3, 70_000), (20, 20_001)):  # 2 to 8 parts a row
            check(torch.randn(rows, classes), torch.arange(rows), None, 0.1)
    finally:
        emulated.card(8, 80)


@pytest.mark.parametrize("order", [0, -1, 1])
def test_clusters(emulated, order):
    """Wide rows by 2 to 8 blocks, merged through each other's shared memory; more parts go through memory."""
    seed(order)
    emulated.card(9, 90)
    try:
        for rows, classes in ((2, 33_000), (2, 52_000), (3, 70_001), (60, 40_001)):
            logits, labels = torch.randn(rows, classes) * 4, torch.arange(rows) * 16_000 % classes
            labels[rows - 1] = -100
            before = emulated.clusters()
            check(logits, labels, None, 0.1)
            check(logits[:, : classes // 2 * 2].bfloat16()[:2], torch.rand(2, classes // 2 * 2) / 1000, None, 0.0)
            assert emulated.clusters() > before
    finally:
        emulated.card(8, 80)
        seed(1)


def test_backward_fills_the_gpu(tmp_path):
    """However many wide rows there are, few multiprocessors wait for the last blocks, 4 of which run on each."""
    (tmp_path / "tune.cpp").write_text("""#include <cstdio>
#include "cuda/tune.h"
int main() {
  for (int rows = 1; rows <= 6000; rows++) {
    std::printf("%d ", cece::cuda::row_parts(rows, 2 * 128256, cece::cuda::kBackwardBlocks * 132));
  }
}""")
    compile_all([[*compiler(), "-std=c++17", f"-I{ROOT}/csrc", tmp_path / "tune.cpp", "-o", tmp_path / "tune"]])
    parts = run(tmp_path / "tune").stdout.split()
    blocks = torch.arange(1, 6001) * torch.tensor([int(p) for p in parts])
    used = blocks / 528 / (blocks / 528).ceil()
    assert used[199:].min() > 0.75 and used[199:1100].mean() > 0.92  # 0.38 and 0.72 where parts are the forward's
    assert parts[-1] == "1" and int(parts[0]) >= 7


def test_bad_labels(emulated):
    """NaN in its row, which is how CUDA says it, and in no other."""
    for logits in (torch.randn(4, 6), torch.randn(6, 4).t(), torch.randn(4, 3000), torch.randn(4, 40001)):
        x = logits.requires_grad_()
        labels = torch.tensor([1, logits.shape[1], -5, -100])
        loss = cece.cross_entropy(x, labels, reduction="none")
        (grad,) = torch.autograd.grad(loss, x, torch.ones(4))
        assert loss.isnan().tolist() == [False, True, True, False] and loss[3] == 0
        assert grad.isnan().all(1).tolist() == [False, True, True, False] and not grad.isnan().any(1)[[0, 3]].any()
        assert (grad[3] == 0).all()


def test_masked_and_infinite_rows(emulated):
    for dtype in (torch.float32, torch.bfloat16):
        low = torch.finfo(dtype).min  # what a masked logit usually is
        rows = torch.tensor(
            [[low] * 4, [low, 0.0, low, low], [-torch.inf, 1.0, 1.0, -torch.inf], [0.0, torch.inf, 1.0, 2.0]],
            dtype=dtype,
        )
        for logits in (rows, rows.t().contiguous().t()):
            loss = cece.cross_entropy(logits, torch.ones(4, dtype=torch.long), reduction="none")
            torch.testing.assert_close(loss, torch.tensor([4.0, 1.0, 2.0, 1.0]).log())
    two = cece.cross_entropy(torch.tensor([[torch.inf, torch.inf, 0.0]]), torch.tensor([0]))
    assert two.isnan()
    assert cece.cross_entropy(torch.tensor([[torch.nan, 0.0, 0.0]]), torch.tensor([1])).isnan()


def test_impossible_probabilities(emulated):
    loss = cece.binary_cross_entropy(
        torch.tensor([0.5, 1.5, -0.1, 0.5, torch.nan]), torch.tensor([1.0, 1.0, 1.0, 2.0, 1.0]), reduction="none"
    )
    assert loss.isnan().tolist() == [False, True, True, True, True]


def test_overwriting_backward(emulated):
    """The gradient may take the logits' memory, on every path."""
    for logits in (torch.randn(5, 7), torch.randn(5, 1001), torch.randn(2, 40001), torch.randn(40, 9).t()):
        labels = torch.randint(0, logits.shape[1], logits.shape[:1])
        x = logits.clone().requires_grad_()
        (expected,) = torch.autograd.grad(cece.cross_entropy(x, labels), x)
        x = logits.clone().requires_grad_()
        y = x * 1
        (got,) = torch.autograd.grad(cece.cross_entropy(y, labels, inplace_backward=True), x)
        assert torch.equal(got, expected)


BINARY_SHAPES = [(3, 5, 4, 4), (2, 24, 3, 5), (2, 3, 8, 41)]  # factors change within a pack, from pack to pack


@pytest.mark.parametrize("shape", BINARY_SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "misaligned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_binary_layouts(emulated, shape, layout, dtype):
    """Elements in the order of memory, factors along any dimension, targets of any type beside them."""
    n = torch.Size(shape).numel()
    x = (torch.randn(n + 1) * 4).to(dtype)[layout == "misaligned" :][:n].view(shape)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "permuted":
        x = x.permute(1, 3, 0, 2)
    hard = torch.rand(x.shape) > 0.5
    channels, last = torch.rand(x.shape[1], 1, 1) + 0.5, torch.rand(x.shape[-1]) + 0.5
    factors = [(None, None), (None, channels), (channels, last), (torch.rand(x.shape) + 0.5, None)]
    as_input = torch.empty_like(x, dtype=torch.float32).copy_(torch.rand(x.shape))
    targets = [as_input, as_input > 0.5, hard.long(), torch.rand(x.shape).to(dtype)]
    targets += [as_input > 0.5, as_input.to(dtype), as_input, torch.rand(n + 1)[1:].view_as(x)]  # other factors
    for i, target in enumerate(targets):
        weight, pos_weight = factors[i % len(factors)]
        reduction = "none" if i % 2 else "sum"
        u, true_u = x.detach().requires_grad_(), x.double().requires_grad_()
        loss = cece.binary_cross_entropy_with_logits(u, target, weight, reduction=reduction, pos_weight=pos_weight)
        true = cece.reference.binary_cross_entropy_with_logits(
            true_u, target.double(), weight, reduction=reduction, pos_weight=pos_weight
        )
        g = torch.rand_like(true)
        (grad,) = torch.autograd.grad(loss, u, g.to(loss.dtype))
        (true_grad,) = torch.autograd.grad(true, true_u, g)
        assert grad.stride() == torch.empty_like(x).stride()
        torch.testing.assert_close(loss.double(), true, rtol=3e-6, atol=1e-7)
        torch.testing.assert_close(grad.double(), true_grad, rtol=4 * max(torch.finfo(dtype).eps, 1e-7), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_padded_vocabulary(emulated, dtype):
    """Rows of a wider tensor: a dense gradient lies otherwise to 16 bytes than the logits, in each row otherwise."""
    labels = torch.tensor([0, -1, -100, 7, 3, 5, 8, 9, 100])
    wide = (torch.randn(9, 36_016) * 4).to(dtype)
    for classes, rows in (
        (1041, 9),
        (1047, 9),
        (13, 9),
        (37, 9),
        (130, 9),
        (4101, 2),
        (36_001, 3),
    ):  # the last in parts
        y = labels[:rows].clone()
        y[1] = classes - 1
        y[y >= classes] = classes // 2
        for start in (0, 3):
            logits = wide[:rows, start : start + 16 * -(-classes // 16)][:, :classes]
            check(logits, y, None, 0.0)
            if rows == 9:  # a label at every place of a pack
                check(logits, torch.arange(9) + classes // 4, None, 0.0)
                check(logits, y, torch.rand(classes) if start else None, 0.1)
    dense = torch.randn(2 * 1040 + 1).to(dtype)[1:].view(2, 1040)  # all rows lie apart in the same way
    check(dense, torch.tensor([1039, -100]), None, 0.0)


@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padded_probabilities(emulated, dtype, target):
    """The same with probabilities of another type, padded too."""
    logits = (torch.randn(4, 1048) * 4).to(dtype)[:, :1041]
    check(logits, (torch.rand(4, 1056) / 500).to(target)[:, :1041], None, 0.0)


def test_smoothing_beside_infinities(emulated):
    """Gaps are summed without asking which logits are infinite, until the sum says that one is."""
    for classes in (40, 3000):
        x = torch.randn(5, classes)
        x[0, 3], x[1, 5], x[2, 7] = torch.inf, -torch.inf, torch.nan
        x[3, ::2] = -torch.inf
        for logits in (x, x.t().contiguous().t()):
            u = logits.clone().requires_grad_()
            loss = cece.cross_entropy(u, torch.full((5,), 1), label_smoothing=0.1, reduction="none")
            assert loss.isposinf().tolist() == [True, True, False, True, False] and loss[2].isnan()
            check(logits[4:], torch.tensor([1]), None, 0.1)


@pytest.mark.parametrize("mode", ["perturbed", "fma"])
def test_arithmetic_of_a_gpu(mode):
    """The numerics contract where functions are as far off as a GPU's may be, and where products are not rounded."""
    if mode == "fma" and "fma" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no fused multiply-add")
    chosen = "emulated and (offset or prefix or binary_loss or binary_slope)"
    files = ["test_extremes.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen, *files],
        cwd=Path(__file__).parent,
        env={**os.environ, "CECE_EMULATOR_MODE": mode},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
