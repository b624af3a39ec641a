"""Tensors of the size of real work: what changes over at 4 MiB, 8 MiB, 256 pixels, 65536 or 2^24 classes.

A large result must be, bit for bit, that of its rows a few at a time: gradients that small are neither streamed nor in
kept pages, and other tests hold them to float64. Against float64 directly: samples of the rows, the first and the last
among them, with every class and so the label.
"""

from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import assert_as_good_as_torch, class_scale, derive, elementwise_scale

import cece

FEW = 500  # rows of a piece: no multiple of the 256 pixels of a task, or of the 64 of a tile
LEAST = 2**22  # elements of every case: 8 MiB in bfloat16, so 16 MiB in float32 and 32 MiB in float64


def labels_like(x):
    """Classes, some of them the first or the last, and in each image some ignored samples."""
    y = torch.randint(x.shape[1], x.shape[:1] + x.shape[2:])
    flat = y.view(-1)
    flat[::7], flat[1::7] = 0, x.shape[1] - 1
    flat[3::11] = -100
    return y


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def bits_equal(ours, theirs):
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    if ours.dim() == 2 and ours.stride(1) != 1:  # torch.equal is quick along memory
        ours, theirs = ours.t(), theirs.t()
    if not torch.equal(ours, theirs):
        wrong = (ours != theirs).nonzero().tolist()
        pytest.fail(
            f"{len(wrong)} of {ours.numel()} elements differ, the first and the last at {wrong[0]}, {wrong[-1]}"
        )


# ---- cross-entropy

LAYOUTS = {
    "rows of 1000": lambda: torch.randn(4211, 1000),  # 62.5 lines of 64 bytes
    "rows of 999": lambda: torch.randn(4211, 999),
    "rows of 1027": lambda: torch.randn(4099, 1027),  # blocks of 1024 and of 3: fewer than come before a whole vector
    "rows of 49": lambda: torch.randn(85_607, 49),
    "padded rows": lambda: torch.randn(4211, 1017)[:, 5:1006],
    "tokens": lambda: torch.randn(33, 128_257),
    "tokens, transposed": lambda: torch.randn(5, 843, 1000).transpose(1, 2),
    "long rows": lambda: torch.randn(3, 1_400_003),
    "7 classes": lambda: torch.randn(600_011, 7),
    "17 classes": lambda: torch.randn(247_111, 17),
    "48 classes": lambda: torch.randn(87_509, 48),
    "channels first": lambda: torch.randn(2, 21, 317, 331),
    "channels first, 1499 pixels apart": lambda: torch.randn(2, 21, 71, 1500)[..., :1499],
    "channels first, 300 classes": lambda: torch.randn(3, 300, 4703),
    "channels last": lambda: torch.randn(2, 21, 317, 331).to(memory_format=torch.channels_last),
    "channels last, 61 classes": lambda: torch.randn(2, 61, 193, 179).to(memory_format=torch.channels_last),
    "classes outermost": lambda: torch.randn(1000, 4211).t(),
}
TARGETS = {  # probabilities' dtype, or None for labels; class weights; smoothing
    "weighted labels": (None, True, 0.0),
    "weighted, smoothed labels": (None, True, 0.1),
    "probabilities": (torch.float32, True, 0.1),
    "float64 probabilities": (torch.float64, False, 0.0),
}
PLAIN_TARGETS = {"labels": (None, False, 0.0), "smoothed labels": (None, False, 0.1)}
DTYPES = [torch.float32, torch.bfloat16, torch.float32, torch.float64]


def matrices(x):
    """x as matrices of rows and classes whose neighbours in memory are x's: classes or pixels."""
    if x.dim() == 2:
        return [x]
    if x.stride(1) == 1:
        return [x.movedim(1, -1).reshape(-1, x.shape[1])]
    return [image.flatten(1).t() for image in x]


def rows_of(x):
    """As matrices of a few rows each."""
    few = min(FEW, max(1, 2**18 // x.shape[1]))
    return [piece for matrix in matrices(x) for piece in matrix.split(few)]


def along(pieces, rows):
    """What belongs to the rows of each piece."""
    return rows.flatten().split([len(piece) for piece in pieces])


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cross_entropy(layout, kind):
    dtype = DTYPES[(list(LAYOUTS).index(layout) + list(TARGETS).index(kind)) % len(DTYPES)]
    x, (soft, weighted, smoothing) = LAYOUTS[layout]().mul_(3).to(dtype), TARGETS[kind]
    assert x.numel() >= LEAST
    target = torch.rand_like(x, dtype=soft) if soft else labels_like(x)
    weight = torch.rand(x.shape[1]) + 0.5 if weighted else None
    if not soft:
        x.movedim(1, -1)[target == -100] = torch.nan
    acc = torch.promote_types(x.dtype, torch.float64 if soft == torch.float64 else torch.float32)
    g = torch.randn(x.shape[:1] + x.shape[2:]).to(acc)
    total = torch.tensor(g.numel(), dtype=acc)  # what a mean divides by
    if not soft:
        total = (torch.ones(x.shape[1]) if weight is None else weight)[target[target != -100]].double().sum().to(acc)
    loss_of = partial(cece.cross_entropy, weight=weight, label_smoothing=smoothing)

    u = x.detach().requires_grad_()
    losses = loss_of(u, target, reduction="none")
    (grad,) = torch.autograd.grad(losses, u, g)
    losses, logits = losses.detach(), u * 1
    (over,) = torch.autograd.grad(loss_of(logits, target, reduction="none", inplace_backward=True), logits, g)
    mean = loss_of(u, target)
    (mean_grad,) = torch.autograd.grad(mean, u)
    assert losses.dtype == mean.dtype == acc
    assert grad.stride() == torch.empty_like(x).stride() and over.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(mean.double(), losses.sum(dtype=torch.float64) / total.double(), rtol=2e-7, atol=0)
    if not soft:
        assert not any(v.movedim(1, -1)[target == -100].any() for v in (grad, over, mean_grad))

    large = [rows_of(v) for v in (x, grad, over, mean_grad)]
    targets = rows_of(target) if soft else along(large[0], target)
    g, losses = along(large[0], g), along(large[0], losses)
    torch.set_num_threads(1)  # a piece is too small to share
    for i, (rows, grad, over, mean_grad) in enumerate(zip(*large, strict=True)):
        u = rows.detach().requires_grad_()
        loss = loss_of(u, targets[i], reduction="none")
        bits_equal(loss.detach(), losses[i])
        (slope,) = torch.autograd.grad(loss, u, g[i], retain_graph=True)
        bits_equal(grad, slope)
        bits_equal(over, slope)
        bits_equal(mean_grad, torch.autograd.grad(loss, u, (1 / total).expand(len(rows)))[0])

    how = {"label_smoothing": smoothing, "reduction": "none"}
    for i in {0, len(g) // 2, len(g) - 1}:
        some = {"input": large[0][i].double().nan_to_num(nan=0.0).requires_grad_()}  # NaN: of ignored samples
        some |= {"target": targets[i].double() if soft else targets[i]}
        some |= {"weight": None if weight is None else weight.double()}
        truth = derive(partial(cece.reference.cross_entropy, **how), some, g[i].double())
        scale = some["input"].detach().abs().max() if acc == torch.float64 else 0.0
        assert_as_good_as_torch(losses[i], truth["loss"], scale=scale)
        scale = class_scale(some, "cross_entropy", g[i].double(), how)
        assert_as_good_as_torch(large[1][i], truth["input"], scale=scale)


def with_gradient(tensors):
    return {k: v.detach().requires_grad_(k == "input") if v is not None else v for k, v in tensors.items()}


# of blocks of 1024 and segments of 65536 classes, of tiles of 64 and tasks of 256 pixels, of vectors, of sums of 16384
# rows
EDGES = {
    "rows": [(4, c) for c in (1023, 1024, 1025, 2048, 16_385, 65_535, 65_536, 65_537, 131_073)],
    "pixels": [(2, 17, p) for p in (63, 64, 65, 255, 256, 257, 511, 513, 1023, 1024, 1025, 1537, 2049)],
    "short rows": [(129, c) for c in (*range(15, 34), 47, 48)],
    "many rows": [(r, 3) for r in (16_383, 16_384, 16_385, 49_153)] + [(16_385, 49)],
}


@pytest.mark.parametrize("kind", TARGETS | PLAIN_TARGETS)
@pytest.mark.parametrize("shapes", EDGES)
def test_edges(shapes, kind):
    """Every element against float64, labels at the edges; in place the same bits; a mean over all of the rows."""
    soft, weighted, smoothing = (TARGETS | PLAIN_TARGETS)[kind]
    for shape in EDGES[shapes]:
        x, classes, rows = torch.randn(shape) * 3, shape[1], shape[:1] + shape[2:]
        target = torch.rand(shape, dtype=soft) if soft else labels_like(x)
        if shapes == "rows" and not soft:
            last = classes - 1
            target[:] = torch.tensor([last // 1024 * 1024, max(0, last // 65_536 * 65_536 - 1), last, -100])
        tensors = {"input": x, "target": target, "weight": torch.rand(classes) + 0.5 if weighted else None}
        wide = {k: v.double() if v is not None and v.is_floating_point() else v for k, v in tensors.items()}
        g, how = torch.randn(rows), {"label_smoothing": smoothing, "reduction": "none"}

        def loss(module, options, **t):
            return module.cross_entropy(t.pop("input") * 1, **t, **options)

        truth = derive(partial(loss, cece.reference, how), with_gradient(wide), g)
        ours = derive(partial(loss, cece, how), with_gradient(tensors), g)
        assert_as_good_as_torch(ours["loss"], truth["loss"], scale=30.0 if soft == torch.float64 else 0.0, what=shape)
        scale = class_scale(wide, "cross_entropy", g.double(), how)
        assert_as_good_as_torch(ours["input"], truth["input"], scale=scale, what=shape)
        over = derive(partial(loss, cece, how | {"inplace_backward": True}), with_gradient(tensors), g)
        bits_equal(over["input"], ours["input"])
        how["reduction"] = "mean"
        mean, truth = (cece.cross_entropy(**tensors, **how), cece.reference.cross_entropy(**wide, **how))
        torch.testing.assert_close(mean.double(), truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "dtype, shape, at", [(torch.float32, (1, 2**24 + 3), 0), (torch.bfloat16, (1, 2**24 + 3, 2), 1)]
)
def test_more_classes_than_float32_can_number(dtype, shape, at):
    """From 2^24 + 1 on a float32 is not every integer: a label must not stand for its neighbour."""
    x = torch.randn(shape[1:]).to(dtype)[None]
    for label in (2**24 + 1, 2**24 - 1):
        target = torch.full(shape[:1] + shape[2:], label)
        u = x.detach().requires_grad_()
        loss = cece.cross_entropy(u, target, reduction="none")
        (grad,) = torch.autograd.grad(loss.sum(), u)
        row, slope = (v.detach().view(shape[1], -1)[:, at and 1] for v in (x, grad))
        log_sum = row.double().logsumexp(0)
        truth = log_sum - row[label].double()
        assert_as_good_as_torch(loss.detach().flatten()[at : at + 1], truth[None])
        some = torch.cat([torch.arange(0, 1000), torch.arange(label - 1000, shape[1])])
        p = (row[some].double() - log_sum).exp()
        q = (some == label).double()
        assert_as_good_as_torch(slope[some], p - q, scale=p * (1 + log_sum - row[some].double()) + q)
        assert int(slope.argmin()) == label and slope.double().sum().abs() < 1e-3


def test_two_large_gradients_at_once_have_memory_of_their_own():
    """A freed gradient's block is used again, by one at a time."""
    x, y = torch.randn(4211, 1000).requires_grad_(), torch.randint(1000, (4211,))

    def grad(scale):
        return torch.autograd.grad(cece.cross_entropy(x, y, reduction="sum") * scale, x)[0]

    one = grad(1.0).clone()
    for _ in range(2):
        grads = [grad(s) for s in (1.0, 2.0, 4.0, 8.0)]
        assert len({g.data_ptr() for g in grads}) == 4
        for g, s in zip(grads, (1.0, 2.0, 4.0, 8.0), strict=True):
            bits_equal(g, one * s)
        del g, grads  # which fills what is kept


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc to read the size of the process from")
def test_no_more_than_two_freed_gradients_are_kept():
    def mib():
        text = Path("/proc/self/status").read_text()
        return int(text.split("VmSize:")[1].split()[0]) / 1024

    def step(rows):
        x = torch.randn(rows, 1000).requires_grad_()
        torch.autograd.grad(cece.cross_entropy(x, torch.zeros(rows, dtype=torch.long)), x)

    step(5000)
    before = mib()
    for rows in range(5000, 25_000, 2500):  # 19 to 86 MiB, 420 in all
        step(rows)
    assert mib() - before < 86 + 77 + 40


@pytest.mark.parametrize("dims", [12, 13, 14])
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
def test_more_dimensions_than_a_kernel_takes(dims, soft):
    """In memory the last one first, so that no two can be taken for one; all losses, forward, backward and in place."""
    x = torch.randn((2,) * dims).permute(*reversed(range(dims)))
    y = torch.rand_like(x) if soft else labels_like(x)
    rows = torch.randn(x.shape[:1] + x.shape[2:])
    weight, expected = torch.rand(2), None
    for logits, target in ((x.contiguous(), y.contiguous()), (x, y), (x, y.contiguous()), (x.contiguous(), y)):
        u = logits.detach().requires_grad_()
        v = u * 1
        assert v.stride() == logits.stride()
        loss = cece.cross_entropy(u, target, weight, reduction="none")
        over = cece.cross_entropy(v, target, weight, reduction="none", inplace_backward=True)
        results = [loss.detach(), torch.autograd.grad(loss, u, rows)[0], torch.autograd.grad(over, v, rows)[0]]
        assert results[2].data_ptr() == v.data_ptr()
        for binary in (
            cece.binary_cross_entropy_with_logits,
            lambda u, *t, **r: cece.binary_cross_entropy(u.sigmoid(), *t, **r),
        ):
            for other in (x.sigmoid(), x.sigmoid().contiguous()):
                loss = binary(u, other, weight, reduction="none")
                results += [loss.detach(), torch.autograd.grad(loss, u, other)[0]]
        expected = expected or results
        for ours, contiguous in zip(results, expected, strict=True):
            bits_equal(ours, contiguous)


def test_large_gradient_of_many_dimensions():
    """4 MiB, for which there are kept pages."""
    x = torch.randn((2,) * 20).permute(*reversed(range(20)))
    y = labels_like(x)
    slopes = []
    for logits in (x.contiguous(), x):
        u = logits.detach().requires_grad_()
        slopes += torch.autograd.grad(cece.cross_entropy(u, y), u)
    bits_equal(slopes[1], slopes[0])


@pytest.mark.parametrize("dims", [13, 14])
def test_strides_of_the_gradient_of_many_dimensions(dims):
    """What a compiled graph is told they are: those of empty_like."""
    x = torch.randn((2,) * dims).permute(*reversed(range(dims))).requires_grad_()
    for loss in (cece.cross_entropy(x, x.detach()), cece.binary_cross_entropy_with_logits(x, x.detach())):
        assert torch.autograd.grad(loss, x)[0].stride() == torch.empty_like(x).stride()


# ---- binary cross-entropy

BINARY_LAYOUTS = {
    "rows of 1000": lambda: torch.rand(4211, 1000),
    "one dimension, misaligned": lambda: torch.rand(4_200_002)[1:],
    "padded rows": lambda: torch.rand(4211, 1017)[:, 5:1006],
    "rows of 7, transposed": lambda: torch.rand(317, 1907, 7).transpose(0, 1),
    "channels last": lambda: torch.rand(2, 21, 317, 331).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.rand(1000, 4211).t(),
}
OPERANDS = {  # what stands beside input: target's dtype, the shapes of weight and pos_weight: x.shape's last dimensions
    "weight": (torch.float32, 9, None),
    "row of weights": (torch.bfloat16, 1, 1),
    "pos_weight, bool": (torch.bool, None, 9),
    "float64 target": (torch.float64, 1, None),
}


@pytest.mark.parametrize("operands", OPERANDS)
@pytest.mark.parametrize("layout", BINARY_LAYOUTS)
@pytest.mark.parametrize("name", ["binary_cross_entropy_with_logits", "binary_cross_entropy"])
def test_binary_cross_entropy(name, layout, operands):
    dtype = DTYPES[(list(BINARY_LAYOUTS).index(layout) + list(OPERANDS).index(operands)) % len(DTYPES)]
    loss_of, logits = getattr(cece, name), name.endswith("logits")
    x = BINARY_LAYOUTS[layout]()
    x = (x.sub_(0.5).mul_(20) if logits else x.mul_(0.98).add_(0.01)).to(dtype)
    assert x.numel() >= LEAST
    kind, *dims = OPERANDS[operands]
    y = torch.rand(x.shape)
    y = y > 0.5 if kind == torch.bool else y.to(kind)
    weights = [None if d is None else torch.rand(x.shape[max(0, x.dim() - d) :]) + 0.5 for d in dims]
    named = {k: v for k, v in zip(["weight", "pos_weight"], weights, strict=True) if v is not None}
    if not logits:
        named.pop("pos_weight", None)
    acc = torch.promote_types(torch.promote_types(x.dtype, torch.float32), kind)
    g = torch.randn(x.shape).to(acc)

    u = x.detach().requires_grad_()
    losses = loss_of(u, y, **named, reduction="none")
    (grad,) = torch.autograd.grad(losses, u, g)
    losses, mean = losses.detach(), loss_of(u, y, **named)
    (mean_grad,) = torch.autograd.grad(mean, u)
    assert losses.dtype == mean.dtype == acc
    assert grad.stride() == torch.empty_like(x).stride()
    torch.testing.assert_close(mean.double(), losses.mean(dtype=torch.float64), rtol=2e-7, atol=0)

    def pieces(t):
        return t.reshape(-1).split(15_013)

    tensors = {"input": x, "target": y} | {k: v.expand(x.shape) for k, v in named.items()}
    tensors = [dict(zip(tensors, t, strict=True)) for t in zip(*map(pieces, tensors.values()), strict=True)]
    large = [pieces(v) for v in (losses, g, grad, mean_grad)]
    common = 1 / torch.tensor(x.numel(), dtype=acc)
    torch.set_num_threads(1)  # a piece is too small to share
    for some, losses, g, grad, mean_grad in zip(tensors, *large, strict=True):
        u = some["input"].detach().requires_grad_()
        loss = loss_of(**some | {"input": u}, reduction="none")
        bits_equal(loss.detach(), losses)
        bits_equal(grad, torch.autograd.grad(loss, u, g, retain_graph=True)[0])
        bits_equal(mean_grad, torch.autograd.grad(loss, u, common.expand(len(u)))[0])

    how = {"reduction": "none"}
    for i in {0, len(tensors) // 2, len(tensors) - 1}:
        losses, g, grad, _ = (v[i] for v in large)
        some = {k: v.double().requires_grad_(k == "input") for k, v in tensors[i].items()}
        truth = derive(partial(getattr(cece.reference, name), **how), some, g.double())
        assert_as_good_as_torch(losses, truth["loss"], scale=30.0 if acc == torch.float64 else 0.0)
        assert_as_good_as_torch(grad, truth["input"], scale=elementwise_scale(some, name, g.double(), how))


@pytest.mark.parametrize("count", [16_383, 16_384, 16_385, 49_153, 163_841])
def test_every_element_counts_once(count):
    """Losses of exactly 100: a sum of them is exact, whatever the chunk, the block and the lane."""
    for x in (torch.zeros(count), torch.zeros(count, dtype=torch.bfloat16), torch.zeros(count, 2)[:, 0]):
        assert cece.binary_cross_entropy(x, torch.ones(count), reduction="sum") == 100 * count
        assert cece.binary_cross_entropy(x, torch.ones(count)) == 100
