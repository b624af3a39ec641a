"""The operators under torch's machinery: opcheck, compile, export, fake tensors, autocast, dispatch modes."""

import itertools
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, vmap

import cece
from cece import ops

cece_ops = torch.ops.cece


def test_every_operator_is_checked():
    """A new operator must come into OPERATORS below, or be checked where its like is."""
    registered = {s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith("cece::")}
    here = {op._schema.name.split("::")[1] for op, _ in OPERATORS.values()}
    for file in ("test_token_statistics.py", "test_linear.py", "test_ranks.py", "test_distributed.py"):
        text = (Path(__file__).parent / file).read_text()
        assert "opcheck(" in text
        here |= {name for name in registered if f"torch.ops.cece.{name}.default" in text}
    assert registered == here


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


def divergence_args(shape, dtype, other, masked, symmetric, requires_grad=True):
    x, y = (torch.randn(shape).to(d).requires_grad_(requires_grad) for d in (dtype, other))
    return x, y, torch.rand(shape[:1] + shape[2:]) < 0.7 if masked else None, 1.5, symmetric


def divergence_backward_args(*args, of_other=False):
    x, y, *options = divergence_args(*args, requires_grad=False)
    loss, stats = cece_ops.divergence_forward(x, y, *options)
    return torch.ones_like(loss), x, y, options[0], stats, *options[1:], of_other


PAIRS = [
    ((6, 5), torch.float32, torch.float32, False, False),
    ((2, 5, 3), torch.float64, torch.bfloat16, True, True),
    ((6, 60), torch.bfloat16, torch.float32, True, False),
    ((6, 5), torch.float32, torch.float32, True, True),
]
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
    "divergence_forward": (cece_ops.divergence_forward.default, [lambda c=c: divergence_args(*c) for c in PAIRS]),
    "divergence_merge": (
        cece_ops.divergence_merge.default,
        [lambda c=c: (cece_ops.divergence_forward(*divergence_args(*c))[1][None, :7].detach(), 1.5) for c in PAIRS],
    ),
    "sharded_divergence_forward": (
        cece_ops.sharded_divergence_forward.default,
        [lambda c=c: (*divergence_args(*c)[:-1], 1, "") for c in PAIRS],
    ),
    "divergence_backward": (
        cece_ops.divergence_backward.default,
        [lambda c=c, i=i: divergence_backward_args(*c, of_other=i % 2 > 0) for i, c in enumerate(PAIRS)],
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


def test_fake_strides_where_no_dimensions_merge():
    """13 of them, more than a kernel takes: gradients are laid out like the input all the same."""
    x = torch.randn((2,) * 13).permute(12, 1, 10, 3, 8, 5, 6, 7, 4, 9, 2, 11, 0)
    t, mode = torch.zeros((2,) * 12, dtype=torch.long), FakeTensorMode()
    forward = x, t, None, ops.MEAN, -100, 0.0
    real = cece_ops.cross_entropy_forward(*forward)
    backward = torch.ones(()), x, t, None, *real[1:], ops.MEAN, -100, 0.0
    same_meta(mode, cece_ops.cross_entropy_backward, backward, cece_ops.cross_entropy_backward(*backward))
    backward = torch.ones(()), x, x, None, None, True, ops.MEAN
    same_meta(mode, cece_ops.binary_cross_entropy_backward, backward, cece_ops.binary_cross_entropy_backward(*backward))


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
    frames = []
    for n in (8, 11, 5):
        inputs = step_inputs(n)
        if mark:
            for i in (0, 1, 3):
                torch._dynamo.mark_dynamic(inputs[i], 0)
        check_step(f, inputs)
        frames.append(counter.frame_count)
    # dynamic=True compiles twice before it begins: it takes options' defaults, numbers, for symbols at first
    assert frames in ([1, 1, 1], [1 if mark else 2] * 3)


def test_compile_dynamic_classes_and_pixels():
    def f(x, t):
        return cece.cross_entropy(x, t, label_smoothing=0.1)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 5, 7, 6), (3, 60, 4, 9), (2, 7, 5, 5)):
        x, t = torch.randn(shape).requires_grad_(), torch.randint(shape[1], shape[:1] + shape[2:])
        ours, theirs = compiled(x, t), f(x, t)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(theirs, x))


def every_input(n):
    return [torch.randn(n, 5), torch.rand(n, 5), torch.rand(5), torch.rand(5)]


ALL_GRADIENTS = {  # a loss of inputs that all require a gradient, and how many of every_input's it takes
    "probabilities": (2, lambda m, x, t: m.cross_entropy(x, t)),
    "probabilities, weight, smoothing": (3, lambda m, x, t, w: m.cross_entropy(x, t, w, label_smoothing=0.1)),
    "probabilities, none": (3, lambda m, x, t, w: m.cross_entropy(x, t, w, reduction="none").square().sum()),
    "labels": (1, lambda m, x: m.cross_entropy(x, torch.arange(len(x)) % 5, label_smoothing=0.1)),
    "BCE": (2, lambda m, x, t: m.binary_cross_entropy_with_logits(x, t)),
    "BCE, weights": (4, lambda m, x, t, w, p: m.binary_cross_entropy_with_logits(x, t, w, pos_weight=p)),
    "BCE, a weight a row": (
        3,
        lambda m, x, t, w: m.binary_cross_entropy_with_logits(x, t, w.sum() * t.detach()[:, :1], reduction="sum"),
    ),
    "on probabilities": (3, lambda m, x, t, w: m.binary_cross_entropy(x.sigmoid(), t, w)),
}
DERIVATIVES = {
    "gradients": lambda f, args: torch.func.grad(f, tuple(range(len(args))))(*args),
    "forward mode": lambda f, args: torch.func.jvp(f, args, tuple(torch.ones_like(a) for a in args))[1],
    "second order": lambda f, args: torch.func.grad(
        lambda *a: sum(g.square().sum() for g in torch.func.grad(f, tuple(range(len(a))))(*a)), tuple(range(len(args)))
    )(*args),
    "forward over reverse": lambda f, args: torch.func.jvp(
        torch.func.grad(f), args, tuple(torch.ones_like(a) for a in args)
    )[1],
}


SECOND = ("probabilities, weight, smoothing", "labels", "BCE, weights", "on probabilities")


@pytest.mark.parametrize(
    "derivative, case",
    [("gradients", c) for c in ALL_GRADIENTS] + [(d, c) for d in DERIVATIVES if d != "gradients" for c in SECOND],
)
def test_compile_dynamic_shapes_of_every_derivative(case, derivative):
    """At most one recompilation: the first batch size is taken for a constant, the second for a symbol."""
    count, loss = ALL_GRADIENTS[case]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def run(*args):
        return DERIVATIVES[derivative](lambda *a: loss(cece, *a), args)

    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for n in (10, 11, 12, 15):
        args = tuple(every_input(n)[:count])
        torch.testing.assert_close(compiled(*args), run(*args))
    assert counter.frame_count <= 2


def test_compile_dynamic_classes_of_every_derivative():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    loss = ALL_GRADIENTS["probabilities, weight, smoothing"][1]

    def run(*args):
        return torch.func.grad(lambda *a: loss(cece, *a), (0, 1, 2))(*args)

    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for c in (5, 6, 9, 60, 7):
        args = torch.randn(4, c), torch.rand(4, c), torch.rand(c)
        torch.testing.assert_close(compiled(*args), run(*args))
    assert counter.frame_count <= 2


# ---- compiled autograd: the backward graph is captured and compiled as a whole


@pytest.mark.parametrize("case", ALL_GRADIENTS)
def test_compiled_autograd(case):
    """One graph for all batch sizes but the first, every gradient as without."""
    count, loss = ALL_GRADIENTS[case]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiler = torch.compile(backend=counter, fullgraph=True, dynamic=True)
    for n in (6, 7, 9, 12):
        leaves = [v.requires_grad_() for v in every_input(n)[:count]]
        expected = torch.autograd.grad(loss(cece, *leaves), leaves)
        value = loss(cece, *(v * 1 for v in leaves))
        with torch._dynamo.compiled_autograd._enable(compiler):
            value.backward()
        torch.testing.assert_close([v.grad for v in leaves], list(expected))
    assert 1 <= counter.frame_count <= 2


def test_compiled_autograd_tells_options_apart():
    """The same shapes with another option are another graph, not the one that is there already."""
    x, y = torch.randn(6, 5).requires_grad_(), torch.tensor([0, 1, 2, 3, 4, -100])
    compiler = torch.compile(backend="aot_eager", fullgraph=True)
    for options in ({}, {"label_smoothing": 0.1}, {"label_smoothing": 0.3}, {"reduction": "sum"}, {}):
        loss = cece.cross_entropy(x * 1, y, **options)
        expected = torch.autograd.grad(loss, x, retain_graph=True)[0]
        x.grad = None
        with torch._dynamo.compiled_autograd._enable(compiler):
            loss.backward()
        torch.testing.assert_close(x.grad, expected)


def test_compiled_autograd_with_hooks_and_in_place():
    """Saved through hooks, and where the gradient would overwrite what another node saved."""
    x, y = torch.randn(6, 5).requires_grad_(), torch.randint(5, (6,))

    def hooked(h):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 1, lambda t: t * 1):
            return cece.cross_entropy(h, y)

    def in_place(h):
        return cece.cross_entropy(h, y, inplace_backward=True)

    def two_users(h):
        return cece.cross_entropy(h, y, inplace_backward=True) + h.logsumexp(1).sum()

    for f in (hooked, in_place, two_users):
        plain = x * 1
        rest = plain.logsumexp(1).sum() if f is two_users else 0
        expected = torch.autograd.grad(cece.cross_entropy(plain, y) + rest, x)[0]
        x.grad = None
        value = f(x * 1)
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
            value.backward()
        torch.testing.assert_close(x.grad, expected)


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


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_exported_program_can_end_in_core_aten(dynamic):
    """For who wants none of our operators in it; without the table they stay."""
    model = Loss()
    n = torch.export.Dim("n", min=2, max=100)
    shapes = {"x": {0: n}, "y": {0: n}, "z": {0: n}} if dynamic else None
    args = torch.randn(9, 7), torch.randint(60, (9,)), torch.rand(9, 60)
    program = torch.export.export(model, args, dynamic_shapes=shapes)
    assert any("cece" in str(node.target) for node in program.run_decompositions().graph.nodes)
    core = program.run_decompositions(cece.decompositions())
    operators = [node.target for node in core.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert len(operators) > 5
    assert not [op for op in operators if op.namespace != "aten" or torch.Tag.core not in op.tags]
    for m in (9, 13) if dynamic else (9,):
        args = torch.randn(m, 7), torch.randint(60, (m,)), torch.rand(m, 60)
        args[1][0] = -100
        torch.testing.assert_close(core.module()(*args), model(*args))


# Several processes' operators stay as they are; so does what they need.
DECOMPOSED = [n for n in OPERATORS if not n.endswith("_") and not n.startswith("sharded") and n != "divergence_merge"]


@pytest.mark.parametrize("name", DECOMPOSED)
def test_decompositions_are_the_operators(name):
    """Values, shapes and dtypes of every output, over the cases of opcheck and more."""
    op, makers = OPERATORS[name]
    rule = cece.decompositions()[op]
    shapes, dtypes = [(6, 5), (6, 60), (2, 5, 4)], [torch.float64, torch.float32, torch.bfloat16]
    if name.startswith("cross"):
        make = forward_args if name.endswith("forward") else backward_args
        options = itertools.product(shapes, dtypes, [False, True], [False, True], [0, 1, 2], [0.0, 0.1])
    elif name.startswith("divergence"):
        make = divergence_args if name.endswith("forward") else divergence_backward_args
        options = itertools.product(shapes, dtypes, [torch.float64, torch.bfloat16], [False, True], [False, True])
    else:
        make = binary_args if name.endswith("forward") else binary_backward_args
        options = itertools.product(shapes, dtypes, [torch.bool, torch.float32], [0, 1, 2], [True, False])
    for option in options:
        args = [a.detach() if isinstance(a, torch.Tensor) else a for a in make(*option)]
        labels = next((a for a in args if isinstance(a, torch.Tensor) and a.dtype == torch.long), None)
        if labels is not None and name == "cross_entropy_forward":
            labels.view(-1)[0] = -100
        ours, theirs = op(*args), rule(*args)
        ours, theirs = (r if isinstance(r, tuple) else (r,) for r in (ours, theirs))
        for a, b in zip(ours, theirs, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            torch.testing.assert_close(a, b)


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
