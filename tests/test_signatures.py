"""torch's signatures, and what torch's other machinery asks of a function: __torch_function__, fx, TorchScript."""

import copy
import inspect
import io
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import cece

FUNCTIONS = ["cross_entropy", "binary_cross_entropy_with_logits", "binary_cross_entropy"]
MODULES = {
    "CrossEntropyLoss": FUNCTIONS[0],
    "BCEWithLogitsLoss": FUNCTIONS[1],
    "BCELoss": FUNCTIONS[2],
}
OWN = {  # options torch has not
    *("inplace_backward", "token_weight", "normalizer", "z_loss", "logit_scale", "softcap", "skip_masked_rows"),
    *("label_smoothing", "mask", "ignore_index", "mean_dim", "poly"),
}


# Of their namesakes' arguments cece.distributed's functions lack these; a row of logits is always called logits.
LEFT_OUT = {
    "cross_entropy": {"input", "size_average", "reduce", "inplace_backward"},
    "kl_divergence": {"target_indices", "tail"},
    "linear_cross_entropy": {"options"},
}


def test_functions_of_several_processes():
    """Their namesakes' arguments and defaults, and beside them the processes."""
    for name in cece.distributed.__all__:
        ours, one = (inspect.signature(getattr(module, name)).parameters for module in (cece.distributed, cece))
        assert set(one) - set(ours) == LEFT_OUT.get(name, set()), name
        assert set(ours) - set(one) - {"logits", "dim"} == {"group", "classes"}, name
        assert all(ours[k].default == one[k].default for k in set(ours) & set(one)), name


def inputs(name):
    x = torch.rand(6, 5, dtype=torch.float64)
    if name in ("cross_entropy", "CrossEntropyLoss"):
        return x, torch.tensor([0, 1, 2, 3, 4, 2])
    return x, torch.rand(6, 5, dtype=torch.float64)


def parameters(f):
    """(name, kind, default) of each; annotations differ where torch has none."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]


# ---- torch's signatures


@pytest.mark.parametrize(
    "ours, theirs",
    [(getattr(cece, n), getattr(F, n)) for n in FUNCTIONS]
    + [(getattr(cece, n).__init__, getattr(nn, n).__init__) for n in MODULES]
    + [(getattr(cece, n).forward, getattr(nn, n).forward) for n in MODULES],
    ids=lambda f: f"{f.__module__}.{f.__qualname__}",
)
def test_signatures_are_torchs(ours, theirs):
    known = {name for name, _, _ in parameters(theirs)}
    own = [p for p in parameters(ours) if p[0] in OWN - known]
    assert [p for p in parameters(ours) if p not in own] == parameters(theirs)
    last = parameters(ours)[len(known) :]  # TorchScript compiles a module's forward, and knows no keyword-only argument
    assert all(kind is inspect.Parameter.KEYWORD_ONLY for _, kind, _ in own) or (own == last and "forward" in str(ours))


NEW = [  # which torch has not
    *("asymmetric_loss", "multilabel_cross_entropy", "pairwise_sigmoid_loss", "sigmoid_focal_loss"),
    "softmax_focal_loss",
]


@pytest.mark.parametrize("name", [*FUNCTIONS, *NEW, "check_targets"])
def test_torchscript_compiles_the_same_signature(name):
    ours = inspect.signature(getattr(cece, name))
    twin = inspect.signature(getattr(cece, name).__prepare_scriptable__())
    assert [(p.name, p.default, p.annotation) for p in ours.parameters.values()] == [
        (p.name, p.default, p.annotation) for p in twin.parameters.values()
    ]


def caught(call):
    with warnings.catch_warnings(record=True) as log:
        warnings.simplefilter("always")
        return call(), [(w.category, str(w.message)) for w in log]


LEGACY = [(a, r) for a in (None, True, False) for r in (None, True, False)]


@pytest.mark.parametrize("size_average, reduce", LEGACY)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_size_average_and_reduce(name, size_average, reduce):
    """By position and by name; torch's result and torch's warning."""
    x, t = inputs(name)
    middle = (-100,) if name == "cross_entropy" else ()
    for args, options in (
        ((size_average, *middle, reduce, "sum"), {}),
        ((), {"size_average": size_average, "reduce": reduce, "reduction": "sum"}),
    ):
        ours, theirs = (caught(lambda m=m: getattr(m, name)(x, t, None, *args, **options)) for m in (cece, F))  # noqa: B023
        torch.testing.assert_close(ours[0], theirs[0])
        assert ours[1] == theirs[1] and bool(ours[1]) == (size_average is not None or reduce is not None)


@pytest.mark.parametrize("size_average, reduce", LEGACY)
@pytest.mark.parametrize("name", MODULES)
def test_size_average_and_reduce_of_modules(name, size_average, reduce):
    middle = (-100,) if name == "CrossEntropyLoss" else ()
    options = None, size_average, *middle, reduce, "none"
    ours, theirs = (caught(lambda m=m: getattr(m, name)(*options)) for m in (cece, nn))
    assert ours[1] == theirs[1] and ours[0].reduction == theirs[0].reduction
    args = inputs(name)
    torch.testing.assert_close(ours[0](*args), theirs[0](*args))


@pytest.mark.parametrize("name", [*FUNCTIONS, *MODULES])
def test_elementwise_mean(name):
    def call(module):
        f = getattr(module, name)
        return f(reduction="elementwise_mean")(*args) if name in MODULES else f(*args, reduction="elementwise_mean")

    args = inputs(name)
    ours, theirs = caught(lambda: call(cece)), caught(lambda: call(nn if name in MODULES else F))
    torch.testing.assert_close(ours[0], theirs[0])
    assert ours[1] == theirs[1] and len(ours[1]) == 1


def test_every_argument_by_position():
    x, t = inputs("cross_entropy")
    w = torch.rand(5, dtype=torch.float64)
    args = x, t, w, None, 2, None, "none", 0.1
    torch.testing.assert_close(cece.cross_entropy(*args), F.cross_entropy(*args))
    module = w, None, 2, None, "none", 0.1
    torch.testing.assert_close(cece.CrossEntropyLoss(*module)(x, t), nn.CrossEntropyLoss(*module)(x, t))
    x, y = inputs("binary_cross_entropy")
    args = x, y, w, None, None, "none", 2 * w
    torch.testing.assert_close(cece.binary_cross_entropy_with_logits(*args), F.binary_cross_entropy_with_logits(*args))
    torch.testing.assert_close(cece.BCEWithLogitsLoss(*args[2:])(x, y), nn.BCEWithLogitsLoss(*args[2:])(x, y))
    with pytest.raises(TypeError, match="positional argument"):
        cece.cross_entropy(x, t, w, None, 2, None, "none", 0.1, True)  # inplace_backward is by name only


# ---- __torch_function__


class Handled:
    """No tensor. Keeps a table of handlers keyed by function, as libraries do."""

    table = {}

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return cls.table[func](*args, **(kwargs or {}))


for _name in FUNCTIONS:
    Handled.table[getattr(cece, _name)] = lambda *args, _name=_name, **kwargs: (_name, args, kwargs)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_objects_with_torch_function(name):
    """For any of the tensors; the handler gets what torch's function would give it."""
    x, t = inputs(name)
    f, handled = getattr(cece, name), Handled()
    for args in ((handled, t), (x, handled), (x, t, handled)):
        got, positional, keywords = f(*args, reduction="sum")
        assert got == name and positional == args[:2]
        assert keywords.pop("weight") is (handled if len(args) == 3 else None)
        expected = {p[0]: p[2] for p in parameters(getattr(F, name))[3:]}
        assert keywords == {**expected, "reduction": "sum"}  # and no option that torch has not
    if "logits" in name:
        assert f(x, t, pos_weight=handled)[2]["pos_weight"] is handled
    if name == "cross_entropy":
        assert f(handled, t, inplace_backward=True)[2]["inplace_backward"] is True


@pytest.mark.parametrize("name", FUNCTIONS)
def test_subclasses_see_the_public_function(name):
    seen = []

    class Mine(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    x, t = inputs(name)
    loss = getattr(cece, name)(x.as_subclass(Mine), t)
    assert seen[0] is getattr(cece, name)
    assert type(loss) is Mine
    torch.testing.assert_close(loss.as_subclass(torch.Tensor), getattr(cece, name)(x, t))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_modes_see_the_public_function(name):
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    args = inputs(name)
    with Mode():
        loss = getattr(cece, name)(*args)
    assert seen == [getattr(cece, name)] and type(loss) is torch.Tensor


# ---- torch.fx


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5, dtype=torch.float64)
        weight = torch.rand(5, dtype=torch.float64)
        self.ce = cece.CrossEntropyLoss(weight, label_smoothing=0.1, inplace_backward=True)
        self.bce, self.probabilities = cece.BCEWithLogitsLoss(pos_weight=weight), cece.BCELoss(reduction="sum")

    def forward(self, x, t):
        h = self.layer(x)
        y = torch.ones_like(h)
        return self.bce(h, y) + self.probabilities(h.sigmoid(), y) + self.ce(self.layer(2 * x), t)


def same_loss_and_gradient(model, other, *args):
    losses = model(*args), other(*args)
    torch.testing.assert_close(*losses)
    for m, loss in zip((model, other), losses, strict=True):
        m.zero_grad()
        loss.backward()
    torch.testing.assert_close(*([p.grad for p in m.parameters()] for m in (model, other)))


def test_symbolic_trace():
    model = Model()
    traced = torch.fx.symbolic_trace(model)
    targets = [node.target for node in traced.graph.nodes]
    assert [f for f in targets if f in {getattr(cece, n) for n in FUNCTIONS}] == [
        cece.binary_cross_entropy_with_logits,
        cece.binary_cross_entropy,
        cece.cross_entropy,
    ]
    same_loss_and_gradient(copy.deepcopy(model), traced, *inputs("cross_entropy"))


# ---- TorchScript


def user(x, t, y, w):
    cece.check_targets(t, 5, ignore_index=2)
    h = x * 2
    return (
        cece.cross_entropy(h, t, w, ignore_index=2, reduction="sum", label_smoothing=0.1, inplace_backward=True)
        + cece.cross_entropy(x, t, w, None, -100, None, "mean", 0.1)
        + cece.cross_entropy(input=x, target=t, size_average=False)
        + cece.binary_cross_entropy_with_logits(x, y, w, pos_weight=w, reduction="none").sum()
        + cece.binary_cross_entropy(x, y, None, None, None, "sum")
    )


def user_inputs():
    x, t = inputs("cross_entropy")
    return x.requires_grad_(), t, torch.rand_like(x), torch.rand(5, dtype=torch.float64)


pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:size_average")


def test_script_of_a_function_that_calls_them():
    args = user_inputs()
    scripted = torch.jit.script(user)
    for _ in range(3):  # as it comes, profiled, optimized
        ours, theirs = scripted(*args), user(*args)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(*(torch.autograd.grad(v, args[0])[0] for v in (ours, theirs)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_script_of_the_functions(name):
    scripted, args = torch.jit.script(getattr(cece, name)), inputs(name)
    for reduction in ("none", "mean", "sum"):
        torch.testing.assert_close(scripted(*args, reduction=reduction), getattr(F, name)(*args, reduction=reduction))
    with pytest.raises(torch.jit.Error, match=f"cece.{name}: reduction must be 'none', 'mean' or 'sum', got 'all'"):
        scripted(*args, reduction="all")


def test_script_of_check_targets():
    scripted = torch.jit.script(cece.check_targets)
    t = torch.tensor([[0, 1], [9, 7]])
    scripted(t, 10)
    for f, error in ((scripted, torch.jit.Error), (cece.check_targets, IndexError)):
        with pytest.raises(error, match=r"Target 9 .*target\[1, 0\] must be in \[0, 5\).*\(7\), got 9; 1 of 4 targets"):
            f(t, 5, ignore_index=7)


@pytest.mark.parametrize("options", ["plain", "all"])
@pytest.mark.parametrize("name", MODULES)
def test_script_of_the_modules(name, options):
    weight = torch.rand(5, dtype=torch.float64)
    given = {
        "CrossEntropyLoss": {"ignore_index": 2, "label_smoothing": 0.1, "inplace_backward": True},
        "BCEWithLogitsLoss": {"pos_weight": weight},
        "BCELoss": {},
    }[name]
    loss = getattr(cece, name)(**({"weight": weight, "reduction": "sum", **given} if options == "all" else {}))
    args = inputs(name)
    torch.testing.assert_close(torch.jit.script(loss)(*args), loss(*args))


@pytest.mark.parametrize("compile", [torch.jit.script, lambda m: torch.jit.trace(m, inputs("cross_entropy"))])
def test_a_model_compiled_saved_and_loaded(compile, tmp_path):
    """Loaded in a process that has only imported cece."""
    torch.manual_seed(1)
    model, args = Model(), inputs("cross_entropy")
    compiled = compile(copy.deepcopy(model))
    same_loss_and_gradient(model, compiled, *args)
    compiled.save(tmp_path / "model.pt")
    torch.save(args, tmp_path / "args.pt")
    loaded = torch.jit.load(io.BytesIO((tmp_path / "model.pt").read_bytes()))
    same_loss_and_gradient(model, loaded, *args)
    program = """
import cece, torch
loss = torch.jit.load("model.pt")(*torch.load("args.pt"))
loss.backward()
print(repr(loss.item()))
"""
    env = {**os.environ, "PYTHONPATH": str(Path(cece.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(model(*args).item(), rel=1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_trace_of_the_functions(name):
    args = inputs(name)
    traced = torch.jit.trace(getattr(cece, name), args)
    assert "cece" in str(traced.graph)
    torch.testing.assert_close(traced(*args), getattr(cece, name)(*args))


# ---- torch.compile, through all of the signature


def test_compile_takes_every_argument():
    def f(x, t, w):
        return cece.cross_entropy(x, t, w, None, 2, None, "sum", 0.1) + cece.cross_entropy(x, t, size_average=False)

    x, t = inputs("cross_entropy")
    w = torch.rand(5, dtype=torch.float64)
    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(x, t, w), f(x, t, w))
