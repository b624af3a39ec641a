"""``cece.patch()`` and ``python -m cece run``: torch's functions, computed by cece, as torch would return them."""

import contextlib
import inspect
import itertools
import json
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cece

TORCHS = {name: getattr(F, name) for name in cece._patch._PLANS}  # before anything is patched
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LABELS = [torch.int64, torch.uint8, torch.int32, torch.int8]


@pytest.fixture(autouse=True)
def _left_as_it_was():
    yield
    assert {name: getattr(F, name) for name in TORCHS} == TORCHS


@pytest.fixture
def patched():
    with cece.patch() as p:
        yield p


def went(p, before, name):
    """Where the calls since `before` went."""
    return {k: n - before[name].get(k, 0) for k, n in p.calls[name].items() if n != before[name].get(k, 0)}


def outcome(call):
    try:
        return call()
    except Exception as e:
        return e


# ---- the same results, dtypes and errors


def cross_entropies():
    weights = [None, *FLOATS, torch.int64]
    for dtype, weight, smoothing in itertools.product(FLOATS, weights, [0.0, 0.1]):
        for target in [*FLOATS, *LABELS]:
            t = torch.rand(6, 5) if target.is_floating_point else torch.randint(5, (6,))
            args = torch.randn(6, 5).to(dtype), t.to(target), None if weight is None else torch.ones(5).to(weight)
            yield "cross_entropy", args, {"label_smoothing": smoothing}


def binary_cross_entropies():
    weights = [None, *FLOATS, torch.int64]
    for dtype, target, weight in itertools.product(FLOATS, [*FLOATS, torch.bool, torch.int64], weights):
        x, t = torch.rand(6, 5).to(dtype), torch.rand(6, 5).round().to(target)
        w = None if weight is None else torch.ones(5).to(weight)
        yield "binary_cross_entropy", (x, t, w), {}
        for pos_weight in weights:
            p = None if pos_weight is None else torch.ones(5).to(pos_weight)
            yield "binary_cross_entropy_with_logits", (x, t, w), {"pos_weight": p}


@pytest.mark.parametrize(
    "autocast, reduction", [(None, "none"), (None, "mean"), (torch.bfloat16, "mean"), (torch.float16, "none")], ids=str
)
@pytest.mark.parametrize("calls, count", [(cross_entropies, 384), (binary_cross_entropies, 1008)])
def test_every_combination_of_dtypes(calls, count, autocast, reduction, patched):
    """torch's dtype where torch has a result, torch's error where it has one."""
    n, before, where = 0, patched.calls, torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext()
    for name, args, options in calls():
        with where:
            theirs = outcome(lambda: TORCHS[name](*args, **options, reduction=reduction))  # noqa: B023
            ours = outcome(lambda: getattr(F, name)(*args, **options, reduction=reduction))  # noqa: B023
        what = name, [getattr(a, "dtype", None) for a in args], options, theirs, ours
        if isinstance(theirs, Exception):
            assert type(ours) is type(theirs) and str(ours) == str(theirs), what
        else:
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, what
            torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05, msg=lambda m: f"{m}\n{what}")  # noqa: B023
        n += 1
    assert n == count
    for name in {name for name, *_ in calls()}:
        assert went(patched, before, name)["cece"] > 5


@pytest.mark.parametrize("name", TORCHS)
def test_gradients(name, patched):
    x = torch.randn(6, 5).requires_grad_()
    t = torch.randint(5, (6,)) if name == "cross_entropy" else torch.rand(6, 5)
    before = patched.calls
    for dtype in FLOATS:
        h = (x if "logits" in name or name == "cross_entropy" else x.sigmoid()).to(dtype)
        y = t if name == "cross_entropy" else t.to(dtype)
        ours, theirs = (torch.autograd.grad(f(h, y), x, retain_graph=True)[0] for f in (getattr(F, name), TORCHS[name]))
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.01 if dtype.itemsize == 2 else 1e-6)
    assert went(patched, before, name) == {"cece": 4}


def test_an_amp_step(patched):
    """bfloat16 in, float32 out under autocast; scatter_add_ into a tensor of torch's dtype outside of it."""
    layer, x, y = nn.Linear(7, 5), torch.randn(6, 7), torch.randint(5, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = nn.CrossEntropyLoss()(layer(x), y)
    assert loss.dtype == torch.float32
    loss.backward()
    h = torch.randn(6, 5).bfloat16()
    rows = F.cross_entropy(h, y, reduction="none")
    assert torch.zeros(5).bfloat16().scatter_add_(0, y, rows).dtype == torch.bfloat16
    assert torch.dot(rows, h[:, 0].exp()).dtype == torch.bfloat16


# ---- what goes to torch


class Handler:
    """No tensor, but speaks __torch_function__."""

    seen = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return "handled"


X, Y = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
TO_TORCH = {  # call, and what the report says of it
    "negative smoothing": (lambda: F.cross_entropy(X, Y, label_smoothing=-0.1), "label_smoothing outside"),
    "smoothing of 2": (lambda: F.cross_entropy(X, Y, label_smoothing=2.0), "label_smoothing outside"),
    "no tensor": (lambda: F.cross_entropy([1.0], Y), "refused, AttributeError"),
    "label out of bounds": (lambda: F.cross_entropy(X, Y + 1), "refused, IndexError"),
    "shapes": (lambda: F.cross_entropy(X, Y[:5]), "refused, ValueError"),
    "reduction": (lambda: F.cross_entropy(X, Y, reduction="average"), "refused, ValueError"),
    "arguments": (lambda: F.cross_entropy(X, Y, inplace_backward=True), "refused, TypeError"),
    "complex": (lambda: F.cross_entropy(X.cfloat(), Y), "input is torch.complex64"),
    "integers": (lambda: F.cross_entropy(X.long(), Y), "input is torch.int64"),
    "sparse": (lambda: F.cross_entropy(X.to_sparse(), Y), "input is not strided"),
    "mkldnn": (lambda: F.cross_entropy(X.to_mkldnn(), Y), "input is not strided"),
    "quantized": (
        lambda: F.cross_entropy(torch.quantize_per_tensor(X, 0.1, 0, torch.qint8), Y),
        "input is torch.qint8",
    ),
    "int32 labels": (lambda: F.cross_entropy(X, Y.int()), "target is torch.int32"),
    "weight with gradient": (lambda: F.cross_entropy(X, Y, torch.rand(5).requires_grad_()), "weight requires grad"),
    "BCE: pos_weight with gradient": (
        lambda: F.binary_cross_entropy_with_logits(X, X.sigmoid(), pos_weight=torch.rand(5).requires_grad_()),
        "pos_weight requires grad",
    ),
    "BCE: probabilities out of bounds": (lambda: F.binary_cross_entropy(X * 9, X.sigmoid()), "refused, RuntimeError"),
    "BCE: bool truth": (lambda: F.binary_cross_entropy_with_logits(X, X > 0), "target is torch.bool"),
    "BCE: shapes": (lambda: F.binary_cross_entropy(X.sigmoid(), X[0].sigmoid()), "refused, ValueError"),
    "weight of another dtype": (lambda: F.cross_entropy(X, Y, torch.rand(5).double()), "weight has another dtype"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", TO_TORCH)
def test_what_cece_does_not_take_is_torchs(case, patched):
    call, why = TO_TORCH[case]
    before = patched.calls
    ours = outcome(call)
    (where,) = (where for name in TORCHS for where in went(patched, before, name))
    assert where.startswith(f"torch: {why}")
    patched.unpatch()
    theirs = outcome(call)
    assert type(ours) is type(theirs)
    if isinstance(theirs, Exception):
        assert str(ours) == str(theirs) and ours.__context__ is theirs.__context__ is None
    else:
        assert torch.equal(ours, theirs)


def test_torch_function_sees_torchs_own_function(patched):
    Handler.seen.clear()
    for name, f in TORCHS.items():
        assert getattr(F, name)(Handler(), Y) == getattr(F, name)(X, Handler()) == "handled"
        assert getattr(F, name)(X, Y, weight=Handler()) == "handled"
        assert Handler.seen[-3:] == [f] * 3

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            Handler.seen.append(func)
            return func(*args, **(kwargs or {}))

    Handler.seen.clear()
    with Mode():
        loss = nn.CrossEntropyLoss()(X, Y)
    assert Handler.seen == [TORCHS["cross_entropy"]]
    torch.testing.assert_close(loss, TORCHS["cross_entropy"](X, Y))


def test_another_device_is_torchs(patched, monkeypatch):
    monkeypatch.setattr(cece._patch, "_DEVICES", ("cuda",))  # as if this one were MPS, say
    before = patched.calls
    torch.testing.assert_close(F.cross_entropy(X, Y), TORCHS["cross_entropy"](X, Y), rtol=0, atol=0)
    assert went(patched, before, "cross_entropy") == {"torch: device cpu": 1}


def test_a_default_device_is_no_obstacle(patched):
    before = patched.calls
    with torch.device("cpu"):
        F.cross_entropy(X, Y)
    assert went(patched, before, "cross_entropy") == {"cece": 1}


def test_fx_records_torchs_function(patched):
    class Model(nn.Module):
        def forward(self, x, y):
            return F.cross_entropy(x, y, label_smoothing=0.1)

    graph = torch.fx.symbolic_trace(Model()).graph
    assert [n.target for n in graph.nodes if n.op == "call_function"] == [TORCHS["cross_entropy"]]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_compiles_torchs_function(patched):
    def f(x, y):
        return F.cross_entropy(x, y, reduction="sum")

    scripted, traced = torch.jit.script(f), torch.jit.trace(f, (X, Y))
    module = torch.jit.script(nn.CrossEntropyLoss(label_smoothing=0.1))
    for function in (scripted, traced, module):
        assert "cece" not in str(function.inlined_graph)
    torch.testing.assert_close(scripted(X, Y), f(X, Y))
    torch.testing.assert_close(traced(X, Y), f(X, Y))
    torch.testing.assert_close(module(X, Y), F.cross_entropy(X, Y, label_smoothing=0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compile(dtype, patched):
    """One graph, cece's operator in it, torch's dtype out of it."""
    torch._dynamo.reset()
    model, loss = nn.Linear(7, 5).to(dtype), nn.CrossEntropyLoss(label_smoothing=0.1)
    seen = []

    def backend(graph, inputs):
        seen.append(str(graph.graph))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def step(x, y):
        return loss(model(x), y)

    x, before = torch.randn(6, 7).to(dtype), patched.calls
    ours = torch.compile(step, fullgraph=True, backend=backend)(x, Y)
    assert went(patched, before, "cross_entropy") == {"cece, compiled": 1}
    assert len(seen) == 1 and "cece.cross_entropy_forward" in seen[0]
    theirs = TORCHS["cross_entropy"](model(x), Y, label_smoothing=0.1)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=1e-5)
    grads = (torch.autograd.grad(v, model.weight)[0] for v in (ours, theirs))
    torch.testing.assert_close(*grads, rtol=0.02, atol=1e-2 if dtype.itemsize == 2 else 1e-6)


def test_what_cece_does_not_take_is_torchs_when_compiled_too(patched):
    torch._dynamo.reset()
    f = torch.compile(lambda x, y: F.cross_entropy(x, y, label_smoothing=-0.1), fullgraph=True, backend="eager")
    torch.testing.assert_close(f(X, Y), TORCHS["cross_entropy"](X, Y, label_smoothing=-0.1))


def test_the_deprecated_arguments_warn_once(patched):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = F.cross_entropy(X, Y, None, False)
    assert [w.category for w in caught] == [UserWarning]
    torch.testing.assert_close(loss, TORCHS["cross_entropy"](X, Y, reduction="sum"))


def test_it_looks_like_torchs_function(patched):
    for name, theirs in TORCHS.items():
        ours = getattr(F, name)
        assert inspect.signature(ours) == inspect.signature(theirs)
        assert (ours.__name__, ours.__doc__) == (theirs.__name__, theirs.__doc__)
        assert pickle.loads(pickle.dumps(ours)) is ours


# ---- in force and undone


def in_force():
    return all(getattr(F, name) is cece._patch._OURS[name] for name in TORCHS)


def test_patch_and_unpatch():
    p = cece.patch()
    assert in_force()
    p.unpatch()
    assert F.cross_entropy is TORCHS["cross_entropy"]
    p.unpatch()  # nothing to undo
    with p:
        assert in_force()
    assert not in_force()
    with pytest.raises(KeyError), cece.patch():
        raise KeyError
    assert not in_force()


def test_nested_and_reentered():
    with cece.patch() as outer:
        inner = cece.patch()
        with outer:
            assert in_force()
        assert in_force()
        with inner:
            assert in_force()
        assert in_force()
        with cece.patch():
            outer.unpatch()
            assert in_force()
        assert not in_force()
    assert not in_force()


def test_another_patch_on_top_is_left_alone():
    p = cece.patch()
    ours = F.cross_entropy

    def another(*args, **kwargs):
        return ours(*args, **kwargs)

    F.cross_entropy, before = another, p.calls
    try:
        another(X, Y)
        assert went(p, before, "cross_entropy") == {"cece": 1}
        p.unpatch()
        assert F.cross_entropy is another
        assert torch.equal(another(X, Y), TORCHS["cross_entropy"](X, Y))  # torch's again, through what was kept of ours
        assert went(p, before, "cross_entropy") == {"cece": 1}
    finally:
        F.cross_entropy = TORCHS["cross_entropy"]


def test_calls_of_several_threads_are_all_counted(patched):
    before = patched.calls

    def work():
        for _ in range(200):
            F.cross_entropy(X, Y)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert went(patched, before, "cross_entropy") == {"cece": 800}


# ---- python -m cece run

PROGRAM = """
    "A program."
    import json, pickle, sys
    import helper
    from torch.nn.functional import cross_entropy
    import torch

    class Mine: pass

    pickle.loads(pickle.dumps(Mine()))
    x = torch.randn(3, 5)
    cross_entropy(x, torch.tensor([1, 2, 3]))
    torch.nn.CrossEntropyLoss(label_smoothing=-0.1)(x, torch.tensor([1, 2, 3]))
    spec = None if __spec__ is None else __spec__.name
    here = sys.modules["__main__"].__dict__ is globals()
    print(json.dumps([sys.argv, sys.path, __name__, __file__, __doc__, spec, __package__, here, sorted(globals())]))

    def fail():
        {end}

    fail()
"""
ENDS = {
    "by itself": "pass",
    "exit code": "sys.exit(7)",
    "exit message": "sys.exit('over')",
    "exception": "raise KeyError('mine')",
    "interrupt": "raise KeyboardInterrupt",
    "hook": "sys.excepthook = lambda k, v, tb: print('hook', k, tb.tb_frame.f_code.co_name); 1 / 0",
}
REPORT = "cece run: "


def python(folder, *args):
    env = {**os.environ, "PYTHONPATH": str(Path(cece.__file__).parents[1])}
    done = subprocess.run([sys.executable, *args], cwd=folder, env=env, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    report = [line for line in lines if line.startswith(REPORT)]
    return (done.returncode, done.stdout, [line for line in lines if line not in report]), report


def write(folder, end):
    for place in ("script.py", "package/__main__.py"):
        path = folder / place
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(PROGRAM.format(end=end)))
        (path.parent / "helper.py").write_text("")
    (folder / "package" / "__init__.py").write_text("")


@pytest.mark.parametrize("end", ENDS)
def test_run_is_python(end, tmp_path):
    write(tmp_path, ENDS[end])
    program = ("script.py", "a", "-m", "--b=1")
    theirs, none = python(tmp_path, *program)
    ours, report = python(tmp_path, "-m", "cece", "run", *program)
    assert ours == theirs and not none
    assert report == [
        "cece run: cross_entropy: 2 calls",
        "cece run:         1 by cece",
        "cece run:         1 by torch: label_smoothing outside [0, 1]",
    ]
    assert json.loads(ours[1].splitlines()[0])[0] == list(program)


@pytest.mark.parametrize(
    "program", [("-m", "package", "a", "-x"), ("package", "a"), ("-m", "nowhere"), ("nowhere.py",)]
)
def test_run_of_modules_folders_and_nothing(program, tmp_path):
    write(tmp_path, ENDS["exception"])
    theirs, _ = python(tmp_path, *program)
    ours, report = python(tmp_path, "-m", "cece", "run", *program)
    assert ours == theirs
    assert report[0] == REPORT + (
        "none of torch's losses was called" if "nowhere" in program[-1] else "cross_entropy: 2 calls"
    )


def test_run_of_a_compiled_model(tmp_path):
    """In a process that has compiled nothing before: torch.compile must not take the patched function for torch's."""
    (tmp_path / "script.py").write_text(
        textwrap.dedent("""
        import torch
        model, loss = torch.nn.Linear(7, 5), torch.nn.CrossEntropyLoss()
        step = torch.compile(lambda x, y: loss(model(x), y), fullgraph=True, backend="aot_eager")
        for _ in range(3):
            step(torch.randn(6, 7), torch.arange(6) % 5).backward()
        """)
    )
    (code, _, errors), report = python(tmp_path, "-m", "cece", "run", "script.py")
    assert code == 0, errors
    assert report == ["cece run: cross_entropy: 1 call", "cece run:         1 by cece, compiled"]


def test_a_syntax_error(tmp_path):
    (tmp_path / "bad.py").write_text("def (:\n")
    theirs, _ = python(tmp_path, "bad.py")
    assert python(tmp_path, "-m", "cece", "run", "bad.py")[0] == theirs


def test_usage(tmp_path):
    (code, _, errors), _ = python(tmp_path, "-m", "cece", "run")
    assert code == 2 and errors[0].startswith("usage: python -m cece run SCRIPT")
    (code, out, _), _ = python(tmp_path, "-m", "cece", "--version")
    assert (code, out) == (0, f"cece {cece.__version__}\n")
    (code, out, _), _ = python(tmp_path, "-m", "cece")
    assert code == 0 and out.startswith("cece ")
