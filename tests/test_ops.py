"""The operators under torch's machinery: opcheck, compile, export, fake tensors, autocast, dispatch modes."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, vmap

import cece
from cece import ops

cece_ops = torch.ops.cece


def test_every_operator_is_checked():
    """A new operator must come into OPERATORS below."""
    registered = {s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith("cece::")}
    assert registered == {op._schema.name.split("::")[1] for op, _ in OPERATORS.values()}


def forward_args(shape, dtype, soft, weight, reduction, smoothing, requires_grad=True):
    x = torch.randn(shape).to(dtype).requires_grad_(requires_grad)
    t = torch.rand(shape).to(dtype) if soft else torch.randint(shape[1], shape[:1] + shape[2:])
    return x, t, torch.rand(shape[1]) if weight else None, reduction, -100, smoothing


def backward_args(*args):
    x, t, w, *options = forward_args(*args, requires_grad=False)
    loss, stats, total = cece_ops.cross_entropy_forward(x, t, w, *options)
    return torch.ones_like(loss), x, t, w, stats, total, *options


def binary_args(shape, dtype, target, reduction, logits=True, requires_grad=True):
    x = torch.rand(shape).to(dtype).requires_grad_(requires_grad)
    return x, torch.rand(shape).round().to(target), torch.rand(shape[-1:]), None, logits, reduction


def binary_backward_args(*args):
    x, *rest = binary_args(*args, requires_grad=False)
    return torch.ones_like(cece_ops.binary_cross_entropy_forward(x, *rest)), x, *rest


CLASSES = [
    ((6, 5), torch.float32, False, False, ops.MEAN, 0.0),
    ((6, 60), torch.bfloat16, False, True, ops.NONE, 0.1),
    ((2, 5, 4), torch.float64, True, True, ops.SUM, 0.1),
    ((2, 5, 3, 4), torch.float32, True, False, ops.NONE, 0.0),
]
ELEMENTS = [
    ((6, 5), torch.float32, torch.float32, ops.MEAN),
    ((6, 5), torch.bfloat16, torch.bool, ops.NONE),
    ((2, 3, 4), torch.float64, torch.int64, ops.SUM, False),
]
OPERATORS = {
    "cross_entropy_forward": (cece_ops.cross_entropy_forward.default, [lambda c=c: forward_args(*c) for c in CLASSES]),
    "cross_entropy_backward": (
        cece_ops.cross_entropy_backward.default,
        [lambda c=c: backward_args(*c) for c in CLASSES],
    ),
    "cross_entropy_backward_": (
        cece_ops.cross_entropy_backward_.default,
        [lambda c=c: backward_args(*c) for c in CLASSES],
    ),
    "binary_cross_entropy_forward": (
        cece_ops.binary_cross_entropy_forward.default,
        [lambda c=c: binary_args(*c) for c in ELEMENTS],
    ),
    "binary_cross_entropy_backward": (
        cece_ops.binary_cross_entropy_backward.default,
        [lambda c=c: binary_backward_args(*c) for c in ELEMENTS],
    ),
}


@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name, case):
    op, makers = OPERATORS[name]
    torch.library.opcheck(op, makers[case % len(makers)]())


LAYOUTS = {
    "contiguous": lambda *s: torch.randn(s),
    "transposed": lambda *s: torch.randn(*s[::-1]).permute(*range(len(s) - 1, -1, -1)),
    "sliced": lambda *s: torch.randn(*s[:-1], 2 * s[-1])[..., ::2],
    "expanded": lambda *s: torch.randn(1, *s[1:]).expand(s),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", [ops.NONE, ops.MEAN, ops.SUM])
def test_fake_kernels_say_what_the_real_ones_do(layout, reduction):
    """Shape, dtype and strides of every output, also of gradients of strided inputs."""
    mode = FakeTensorMode()
    for dtype, soft in itertools.product((torch.float64, torch.float32, torch.bfloat16), (False, True)):
        x = LAYOUTS[layout](4, 6, 5).to(dtype) if dtype != torch.float32 else LAYOUTS[layout](4, 6, 5)
        t = torch.rand(4, 6, 5) if soft else torch.randint(6, (4, 5))
        forward = x, t, torch.rand(6, dtype=torch.float64), reduction, -100, 0.1
        real = cece_ops.cross_entropy_forward(*forward)
        same_meta(mode, cece_ops.cross_entropy_forward, forward, real)
        backward = torch.ones_like(real[0]), x, t, forward[2], *real[1:], reduction, -100, 0.1
        same_meta(mode, cece_ops.cross_entropy_backward, backward, cece_ops.cross_entropy_backward(*backward))
        for target in (torch.float64, torch.bfloat16, torch.bool):
            binary = x, torch.rand(4, 6, 5).round().to(target), torch.rand(6, 1), torch.rand(5), True, reduction
            real = cece_ops.binary_cross_entropy_forward(*binary)
            same_meta(mode, cece_ops.binary_cross_entropy_forward, binary, real)
            backward = torch.ones_like(real), *binary
            real = cece_ops.binary_cross_entropy_backward(*backward)
            same_meta(mode, cece_ops.binary_cross_entropy_backward, backward, real)


def same_meta(mode, op, args, real):
    with mode:
        fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
    pairs = zip(fake, real, strict=True) if isinstance(real, tuple) else [(fake, real)]
    for f, r in pairs:
        assert (f.shape, f.dtype, f.stride(), f.device) == (r.shape, r.dtype, r.stride(), r.device)


def test_meta_tensors():
    x = torch.randn(4, 5, device="meta").requires_grad_()
    loss = cece.cross_entropy(x, torch.zeros(4, dtype=torch.long, device="meta"), reduction="none")
    assert loss.shape == (4,) and loss.device.type == "meta"
    assert torch.autograd.grad(loss.sum(), x)[0].shape == (4, 5)
    assert cece.binary_cross_entropy_with_logits(x, x.detach()).shape == ()


# ---- torch.compile


def step(x, t, w, y):
    h = x * 2
    return (
        cece.cross_entropy(h, t, w, label_smoothing=0.1)
        + cece.binary_cross_entropy_with_logits(h, y, pos_weight=w, reduction="sum") / 7
        + cece.binary_cross_entropy(h.sigmoid(), y, reduction="none").mean()
    )


def torch_step(x, t, w, y):
    h = x * 2
    return (
        F.cross_entropy(h, t, w, label_smoothing=0.1)
        + F.binary_cross_entropy_with_logits(h, y, pos_weight=w, reduction="sum") / 7
        + F.binary_cross_entropy(h.sigmoid(), y, reduction="none").mean()
    )


def step_inputs(n, c=50):
    return torch.randn(n, c).requires_grad_(), torch.randint(c, (n,)), torch.rand(c), torch.rand(n, c).round()


def check_step(f, inputs):
    ours, theirs = f(*inputs), torch_step(*inputs)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, inputs[0]), torch.autograd.grad(theirs, inputs[0]))


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend):
    f = torch.compile(step, fullgraph=True, backend=backend)
    check_step(f, step_inputs(8))
    check_step(f, step_inputs(8))


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_compile_reductions(reduction, soft):
    def f(x, t):
        return cece.cross_entropy(x, t, reduction=reduction)

    x = torch.randn(4, 5, 3, dtype=torch.float64).requires_grad_()
    t = torch.rand(4, 5, 3, dtype=torch.float64).requires_grad_() if soft else torch.randint(5, (4, 3))
    wanted = [x, t] if soft else [x]
    results = []
    for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        out = g(x, t)
        results.append([out, *torch.autograd.grad(out.sum(), wanted)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mark", [False, True], ids=["dynamic=True", "mark_dynamic"])
def test_compile_dynamic_shapes(mark):
    """One graph for all batch sizes."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    f = torch.compile(step, fullgraph=True, backend=counter, dynamic=None if mark else True)
    for n in (8, 11, 5):
        inputs = step_inputs(n)
        if mark:
            for i in (0, 1, 3):
                torch._dynamo.mark_dynamic(inputs[i], 0)
        check_step(f, inputs)
    assert counter.frame_count == 1


def test_compile_dynamic_classes_and_pixels():
    def f(x, t):
        return cece.cross_entropy(x, t, label_smoothing=0.1)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 5, 7, 6), (3, 60, 4, 9), (2, 7, 5, 5)):
        x, t = torch.randn(shape).requires_grad_(), torch.randint(shape[1], shape[:1] + shape[2:])
        ours, theirs = compiled(x, t), f(x, t)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(theirs, x))


def test_compile_vmap_of_grad():
    def f(x, t):
        return vmap(grad(lambda a, b: cece.cross_entropy(a, b, label_smoothing=0.1)))(x, t)

    def b(x, t):
        return vmap(grad(cece.binary_cross_entropy_with_logits))(x, t)

    x, t = torch.randn(6, 4, 5), torch.randint(5, (6, 4))
    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(x, t), f(x, t))
    y = torch.rand(6, 4, 5)
    torch.testing.assert_close(torch.compile(b, fullgraph=True, backend="aot_eager")(x, y), b(x, y))


def test_compile_modules_and_inplace_backward():
    """Compiled, inplace_backward is ignored: the gradient is right and the logits stay."""
    model = torch.nn.Sequential(torch.nn.Linear(7, 60))
    loss = cece.CrossEntropyLoss(torch.rand(60), inplace_backward=True)
    x, y = torch.randn(9, 7), torch.randint(60, (9,))

    def f(x, y):
        return loss(model(x), y)

    expected = torch.autograd.grad(f(x, y), model[0].weight)
    ours = torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(x, y), model[0].weight)
    torch.testing.assert_close(ours, expected)


def test_compiled_errors_are_the_eager_ones():
    f = torch.compile(lambda x, t: cece.cross_entropy(x, t), backend="aot_eager")
    with pytest.raises(Exception, match="out of bounds"):
        f(torch.randn(4, 5), torch.full((4,), 7))


# ---- torch.export


class Loss(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(7, 60)
        self.ce, self.bce = cece.CrossEntropyLoss(torch.rand(60)), cece.BCEWithLogitsLoss(pos_weight=torch.rand(60))

    def forward(self, x, y, z):
        h = self.layer(x)
        return self.ce(h, y) + self.bce(h, z)


@pytest.mark.parametrize("dynamic", [False, True])
def test_export(dynamic, tmp_path):
    """Saved, loaded and run: on another batch size too."""
    model = Loss()
    n = torch.export.Dim("n", min=2, max=100)
    shapes = {"x": {0: n}, "y": {0: n}, "z": {0: n}} if dynamic else None
    args = torch.randn(9, 7), torch.randint(60, (9,)), torch.rand(9, 60)
    program = torch.export.export(model, args, dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "loss.pt2")
    loaded = torch.export.load(tmp_path / "loss.pt2").module()
    torch.testing.assert_close(loaded(*args), model(*args))
    if dynamic:
        args = torch.randn(13, 7), torch.randint(60, (13,)), torch.rand(13, 60)
        torch.testing.assert_close(loaded(*args), model(*args))
    assert any("cece" in str(node.target) for node in program.graph.nodes)


# ---- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """bfloat16 logits out of a layer, float32 weights and targets: a float32 loss, no more off than the logits are."""
    layer, x = torch.nn.Linear(7, 60), torch.randn(9, 7)
    y, z, w = torch.randint(60, (9,)), torch.rand(9, 60), torch.rand(60)
    with torch.autocast("cpu", dtype):
        h = layer(x)
        assert h.dtype == dtype
        ce = cece.cross_entropy(h, y, w, label_smoothing=0.1)
        bce = cece.binary_cross_entropy_with_logits(h, z, w, pos_weight=w)
    assert ce.dtype == bce.dtype == torch.float32
    h64 = h.detach().double()
    torch.testing.assert_close(ce, F.cross_entropy(h64, y, w.double(), label_smoothing=0.1).float())
    truth = F.binary_cross_entropy_with_logits(h64, z.double(), w.double(), pos_weight=w.double())
    torch.testing.assert_close(bce, truth.float())
    (ce + bce).backward()
    assert layer.weight.grad.dtype == torch.float32


def test_inference_mode_and_no_grad():
    x, y = torch.randn(4, 5), torch.randint(5, (4,))
    expected = cece.cross_entropy(x, y)
    with torch.inference_mode():
        assert torch.equal(cece.cross_entropy(x, y), expected)
        torch.testing.assert_close(cece.binary_cross_entropy_with_logits(x, x.sigmoid()).shape, torch.Size([]))


def test_tensor_subclasses_and_parameters():
    """A Parameter is a leaf like any other; a __torch_function__ subclass is taken."""
    p, y = torch.nn.Parameter(torch.randn(4, 5)), torch.randint(5, (4,))
    cece.cross_entropy(p, y).backward()
    torch.testing.assert_close(p.grad, torch.autograd.grad(F.cross_entropy(p, y), p)[0])

    class Mine(torch.Tensor):
        pass

    mine = p.detach().as_subclass(Mine)
    torch.testing.assert_close(cece.cross_entropy(mine, y).as_subclass(torch.Tensor), F.cross_entropy(p, y).detach())
