"""What only a GPU can show. Values are tested with every backend's tests (`backend="cuda"`); this is the behaviour."""

import pytest
import torch

import cece

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def no_memory_kept():
    yield
    torch.cuda.empty_cache()


def step(logits, labels, **options):
    """Loss and gradient."""
    x = logits.detach().requires_grad_()
    loss = cece.cross_entropy(x, labels, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


def binary_step(logits, truth):
    x = logits.detach().requires_grad_()
    loss = cece.binary_cross_entropy_with_logits(x, truth)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


# a lane, four lanes, a warp, a block, a cluster or parts of a row, many parts
SHAPES = [(1000, 3), (1000, 100), (300, 1001), (200, 5000), (60, 128256), (2, 1 << 20)]


def test_built_for_this_gpu():
    major, minor = torch.cuda.get_device_capability()
    archs = cece.build_info()["cuda_archs"]
    assert archs, "cece was built without CUDA"
    assert any(int(a.split(".")[0]) <= major for a in archs), f"{archs} do not run on {major}.{minor}"


@pytest.mark.parametrize("rows, classes", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_float64(rows, classes, dtype):
    """Every launch path, the cluster of blocks included, which no emulator runs."""
    logits, labels = (
        (torch.randn(rows, classes, device="cuda") * 4).to(dtype),
        torch.randint(classes, (rows,), device="cuda"),
    )
    for target in (labels, torch.rand(rows, classes, device="cuda").softmax(1).to(dtype)):
        loss, grad = step(logits, target)
        x = logits.double().requires_grad_()
        true = torch.nn.functional.cross_entropy(x, target if target is labels else target.double())
        (true_grad,) = torch.autograd.grad(true, x)
        torch.testing.assert_close(loss.double(), true.detach(), rtol=1e-6, atol=0)
        eps = torch.finfo(dtype).eps
        error = (grad.double() - true_grad).abs()
        assert (error <= 4 * eps * true_grad.abs() + 1e-6 * true_grad.abs().max()).all(), error.max()


@pytest.mark.parametrize("rows, classes", SHAPES)
def test_repeats_are_bit_identical(rows, classes):
    logits, labels = torch.randn(rows, classes, device="cuda"), torch.randint(classes, (rows,), device="cuda")
    truth = torch.rand_like(logits)
    first = [*step(logits, labels, label_smoothing=0.1), *binary_step(logits, truth)]
    for _ in range(5):
        again = [*step(logits, labels, label_smoothing=0.1), *binary_step(logits, truth)]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_never_waits_for_the_gpu():
    logits, labels = torch.randn(500, 1000, device="cuda"), torch.randint(1000, (500,), device="cuda")
    weight, truth = torch.rand(1000, device="cuda"), torch.rand(500, 1000, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for options in ({}, {"weight": weight}, {"label_smoothing": 0.1}, {"reduction": "none"}):
            step(logits, labels, **options)
        step(logits, truth)
        binary_step(logits, truth)
        cece.binary_cross_entropy(truth, truth)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rows, classes", SHAPES)
def test_graph_capture_and_replay(rows, classes):
    logits = torch.randn(rows, classes, device="cuda", requires_grad=True)
    labels = torch.randint(classes, (rows,), device="cuda")

    def work():
        loss = cece.cross_entropy(logits, labels)
        return loss, *torch.autograd.grad(loss, logits)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grad = work()
    for _ in range(3):
        with torch.no_grad():
            logits.normal_()
            labels.random_(classes)
        graph.replay()
        expected_loss, expected_grad = step(logits, labels)
        assert torch.equal(loss, expected_loss) and torch.equal(grad, expected_grad)


def test_runs_on_the_current_stream():
    """Behind the work already on that stream, beside the other's: a long sleep on one must not be overtaken."""
    logits, labels = torch.zeros(100, 1000, device="cuda"), torch.randint(1000, (100,), device="cuda")
    values = [torch.randn(100, 1000, device="cuda") for _ in range(2)]
    expected = [step(v, labels) for v in values]
    torch.cuda.synchronize()
    streams, got = [torch.cuda.Stream() for _ in range(2)], []
    for stream, value in zip(streams, values, strict=True):
        with torch.cuda.stream(stream):
            own = logits.clone()
            torch.cuda._sleep(50_000_000)
            own.copy_(value)
            got.append(step(own, labels))
    torch.cuda.synchronize()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    logits, labels = torch.randn(100, 1000), torch.randint(1000, (100,))
    here = step(logits.cuda(0), labels.cuda(0))
    there = step(logits.cuda(1), labels.cuda(1))  # while the current device is 0
    assert there[1].device.index == 1 and torch.cuda.current_device() == 0
    assert torch.equal(here[1].cpu(), there[1].cpu())
    with pytest.raises(RuntimeError, match="device"):
        cece.cross_entropy(logits.cuda(0), labels.cuda(1))


def test_bad_label_is_nan_and_the_context_lives():
    for rows, classes in SHAPES[:-1]:
        logits, labels = torch.randn(rows, classes, device="cuda"), torch.randint(classes, (rows,), device="cuda")
        labels[7] = classes
        loss, grad = step(logits, labels, reduction="none")
        torch.cuda.synchronize()
        bad = torch.zeros(rows, dtype=torch.bool, device="cuda")
        bad[7] = True
        assert torch.equal(loss.isnan(), bad)
        assert torch.equal(grad.isnan().all(1), bad) and torch.equal(grad.isnan().any(1), bad)
        with pytest.raises(IndexError, match=rf"Target {classes} .*\[7\]"):
            cece.check_targets(labels, classes)
    assert torch.ones(3, device="cuda").sum() == 3


def test_impossible_probability_is_nan():
    loss = cece.binary_cross_entropy(
        torch.tensor([0.5, 1.5], device="cuda"), torch.ones(2, device="cuda"), reduction="none"
    )
    assert loss.isnan().tolist() == [False, True]


@pytest.mark.parametrize("elements", [2**31 + 4096, 2**32 + 4096])
def test_more_elements_than_an_int_counts(elements):
    """The rows at the far end of a tensor, against the same rows alone; 32-bit offsets would fault or alias."""
    classes = 4096
    rows = elements // classes
    if torch.cuda.mem_get_info()[0] < 2 * elements * 2 + (4 << 30):
        pytest.skip("not enough GPU memory")
    logits = torch.empty(rows, classes, dtype=torch.bfloat16, device="cuda").normal_()
    labels = torch.randint(classes, (rows,), device="cuda")
    loss, grad = step(logits, labels, reduction="none")
    for part in (slice(0, 64), slice(rows // 2, rows // 2 + 64), slice(rows - 64, rows)):
        expected_loss, expected_grad = step(logits[part], labels[part], reduction="none")
        assert torch.equal(loss[part], expected_loss) and torch.equal(grad[part], expected_grad)
    del grad
    truth = logits.new_zeros(1, classes).expand(rows, classes)
    part = cece.binary_cross_entropy_with_logits(logits[-64:], truth[-64:], reduction="sum")
    logits[:-64] = -torch.inf  # their loss is 0
    assert abs(cece.binary_cross_entropy_with_logits(logits, truth, reduction="sum") - part) <= 1e-5 * part


def test_one_row_of_more_than_an_int():
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("not enough GPU memory")
    logits = torch.zeros(1, 2**31 + 8, dtype=torch.bfloat16, device="cuda")
    loss, grad = step(logits, torch.tensor([2**31 + 3], device="cuda"))
    assert abs(loss - torch.tensor(2.0**31 + 8).log()) < 1e-4
    assert grad[0, 2**31 + 3] == -1 and grad[0, 2**31 + 2] >= 0


@pytest.mark.parametrize("offset", range(1, 8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_misaligned(offset, dtype):
    memory = torch.randn(64 * 1003 + 8, device="cuda").to(dtype)
    logits = memory[offset : offset + 64 * 1003].view(64, 1003)
    labels = torch.randint(1003, (64,), device="cuda")
    for a, b in zip(step(logits, labels), step(logits.clone(), labels), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2 if a.dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_out_of_memory_leaves_nothing_behind():
    """Backward without room for its gradient: an error, the logits as they were, and the next call right."""
    free = torch.cuda.mem_get_info()[0]
    logits = torch.randn(1 << 14, 4096, device="cuda")
    labels = torch.randint(4096, (1 << 14,), device="cuda")
    expected = step(logits, labels)[1].cpu()
    before = logits.clone().cpu()
    x = logits.requires_grad_()
    loss = cece.cross_entropy(x, labels)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + (16 << 20)) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.autograd.grad(loss, x, retain_graph=True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(x.detach().cpu(), before)
    assert torch.equal(torch.autograd.grad(loss, x)[0].cpu(), expected)
    assert free > 0


def test_compiled():
    @torch.compile(fullgraph=True)
    def work(hidden, matrix, labels):
        return cece.cross_entropy(hidden @ matrix, labels, label_smoothing=0.1)

    hidden = torch.randn(64, 32, device="cuda", requires_grad=True)
    matrix, labels = torch.randn(32, 1000, device="cuda"), torch.randint(1000, (64,), device="cuda")
    loss = work(hidden, matrix, labels)
    eager = cece.cross_entropy(hidden @ matrix, labels, label_smoothing=0.1)
    torch.testing.assert_close(loss, eager)
    torch.testing.assert_close(*(torch.autograd.grad(v, hidden)[0] for v in (loss, eager)), rtol=1e-4, atol=1e-5)


def test_autocast():
    layer = torch.nn.Linear(32, 1000, device="cuda")
    hidden, labels = torch.randn(64, 32, device="cuda"), torch.randint(1000, (64,), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        logits = layer(hidden)
        loss = cece.cross_entropy(logits, labels)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.isfinite().all()
