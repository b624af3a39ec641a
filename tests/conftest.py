"""What the tests share: the backends, one table of tolerances, and the comparison with torch and the truth."""

import os
import sys
from pathlib import Path
from typing import NamedTuple

# Before torch reads it: of two test processes on two cores, threads that spin where they wait take the other's time,
# which made one test of a second take 14.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from hypothesis import settings  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import cece  # noqa: E402

settings.register_profile("cece", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("cece")


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    config.hook.pytest_deselected(items=[i for i in items if i.get_closest_marker("cuda")])
    items[:] = [i for i in items if not i.get_closest_marker("cuda")]


def newest_object(stem):
    """The object of a source ("cuda-f32") that the last build took; None where cece is not this checkout's."""
    folder = Path(os.environ.get("CECE_OBJECTS") or HERE.parent / "build/objects")
    found = max(folder.glob(f"{stem}-*.o"), key=lambda file: file.stat().st_mtime, default=None)
    in_tree = Path(cece._C.__file__).is_relative_to(HERE.parent / "build")
    assert found or not in_tree, f"the build left no object of {stem}"
    return found


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# ---- backends: every test that takes `backend` runs on each. The emulator runs the CUDA kernels on the CPU, some
# 10 M elements a second, so what it shares has at most a few hundred thousand.


class Backend(NamedTuple):
    name: str
    device: str


@pytest.fixture(params=["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.cuda)])
def backend(request):
    if request.param != "emulated":
        yield Backend(request.param, request.param)
        return
    if not (HERE / "cuda_emulation" / "backend.py").is_file():
        pytest.skip("tests/cuda_emulation/backend.py, which runs the CUDA kernels without a GPU, is not there")
    from cuda_emulation.backend import install

    with install():
        yield Backend("emulated", "cpu")


# ---- shapes by regime of the CPU kernels (csrc/cpu/kernels.h); the CUDA ones change over at powers of two and 32
SHAPES = [
    (7,),  # no batch
    (1, 1),  # one class: the loss is 0
    (37, 5),  # side by side (classes <= 48), a tail of lanes
    (300, 10),  # side by side, more rows than the 256 of one task
    (19, 48),  # the last side by side
    (19, 49),  # the first row by row, a tail of one lane
    (5, 1024),  # one block of a row
    (3, 1025),  # a block and one class
    (3, 2503),  # blocks and a tail
    (2, 65537),  # a segment and one class
    (2, 140001),  # three segments
    (2, 5, 7),  # channels first: classes far apart, pixels side by side
    (2, 21, 16, 17),  # more pixels than one task's 256
    (2, 300, 9),  # side by side for the class stride's sake, more than one group of 256 classes
    (2, 3, 4, 5, 2),  # 3 spatial dimensions
]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


# ---- tolerances


class Tolerance(NamedTuple):
    relative: float  # to the true value
    parts: float  # to what the value is the difference of: `scale`
    least: float  # where the dtype's own numbers end


def _eps(dtype):
    return torch.finfo(dtype).eps


# By the dtype of the result. Sums of float16 and bfloat16 are formed in float32 and rounded once, by half a unit.
# float64 allows for the errors of its truth, which is float64 too and off by 1.5e-12 at 140001 classes;
# test_extremes.py holds it to 8 units against an 80-bit truth.
TOLERANCE = {
    torch.float64: Tolerance(1e-11, 1e-11, 0),
    torch.float32: Tolerance(8 * _eps(torch.float32), 4 * _eps(torch.float32), 2**-149),
    torch.float16: Tolerance(0.5 * _eps(torch.float16), 4 * _eps(torch.float32), 2**-25),
    torch.bfloat16: Tolerance(0.5 * _eps(torch.bfloat16), 4 * _eps(torch.float32), 2**-134),
}


def assert_as_good_as_torch(ours, truth, torchs=None, *, scale=0.0, what="", tolerance=None):
    """|ours - truth| <= max(|torchs - truth|, the table's bound), element by element; shows the worst one.

    truth: float64. scale: what the parts measure that truth is the difference of (a gradient p - q: up to 1), for a
    loss 0. Where truth is infinite or NaN, ours must be the same.
    """
    t = tolerance or TOLERANCE[ours.dtype]
    assert ours.shape == truth.shape, f"{what}: shape {tuple(ours.shape)}, must be {tuple(truth.shape)}"
    assert truth.dtype == torch.float64
    if ours.numel() == 0:
        return
    o, y = ours.detach().cpu().double(), truth.detach().cpu()
    finite = y.isfinite()
    error = torch.where(finite, (o - y).abs(), torch.where((o == y) | (o.isnan() & y.isnan()), 0.0, torch.inf))
    bound = t.relative * y.abs() + t.parts * torch.as_tensor(scale, dtype=torch.float64) + t.least
    allowed, theirs = torch.where(finite, bound, 0), None
    if torchs is not None:
        theirs = torchs.detach().cpu().double()
        allowed = torch.where(finite, torch.fmax((theirs - y).abs(), bound), 0)
    excess = (error / allowed).nan_to_num(nan=0.0, posinf=torch.inf).masked_fill(error.isnan(), torch.inf)
    if (excess > 1).any():
        i = int(excess.argmax())
        at = [int(k) for k in torch.unravel_index(torch.tensor(i), y.shape)]
        value = "not computed" if theirs is None else f"{theirs.flatten()[i].item():.17g}"
        raise AssertionError(
            f"{what}: {int((excess > 1).sum())} of {y.numel()} elements; the worst is {at}:"
            f" ours {o.flatten()[i].item():.17g}, truth {y.flatten()[i].item():.17g}, torch's {value};"
            f" error {error.flatten()[i].item():.3g}, allowed {allowed.flatten()[i].item():.3g}"
        )


def derive(loss, tensors, grad):
    """{"loss": loss(**tensors), name: its gradient} for the tensors that require one."""
    t = {k: None if v is None else v.detach().requires_grad_(v.requires_grad) for k, v in tensors.items()}
    wanted = [k for k, v in t.items() if v is not None and v.requires_grad]
    value = loss(**t)
    grad = grad(value) if callable(grad) else grad
    grads = torch.autograd.grad(value, [t[k] for k in wanted], grad.to(value)) if wanted else ()
    return {"loss": value.detach(), **dict(zip(wanted, grads, strict=True))}


def _to(tensors, dtype):
    return {k: v.to(dtype) if v is not None and v.is_floating_point() else v for k, v in tensors.items()}


def compute_dtype(tensors):
    wide = any(v is not None and v.dtype == torch.float64 for v in tensors.values())
    return torch.float64 if wide else torch.float32


def check_against_truth(name, tensors, *, device="cpu", what="", **options):
    """cece's loss and gradients against the reference in float64, and torch in the dtype sums are formed in.

    tensors: by argument name, on the CPU. The incoming gradient is random.
    """
    truth_in = _to(tensors, torch.float64)
    if name != "cross_entropy" and not tensors["target"].is_floating_point():
        truth_in["target"] = tensors["target"].double()
    g = {}

    def grad(value):
        if "g" not in g:
            g["g"] = torch.randn(value.shape, dtype=torch.float32)
        return g["g"].to(value.device)

    def bind(module):
        return lambda **t: getattr(module, name)(**t, **options)

    truth = derive(bind(cece.reference), truth_in, grad)
    torch_in = _to(truth_in, compute_dtype(tensors))
    plain = all(
        v is None or not v.requires_grad for k, v in tensors.items() if name != "cross_entropy" and "weight" in k
    )
    torchs = derive(bind(F if plain else cece.reference), torch_in, grad)  # F's have no gradients of weights
    on_device = {k: v if v is None else v.to(device) for k, v in tensors.items()}
    ours = derive(bind(cece), on_device, grad)
    assert ours.keys() == truth.keys()
    for k, y in truth.items():
        if k == "loss":
            scale = truth_in["input"].detach().abs().max() if ours[k].dtype == torch.float64 and y.numel() else 0.0
        elif k == "input":
            slope = class_scale if name == "cross_entropy" else elementwise_scale
            scale = slope(truth_in, name, g["g"], options)
        else:
            scale = y.abs().max() if y.numel() else 0.0
        assert_as_good_as_torch(ours[k], y, torchs[k], scale=scale, what=f"{name} {what} {options}: {k}")
    return ours


def class_scale(tensors, name, g, options):
    """Of the gradient p m - q of cross-entropy: p m (1 - log p) + q. log p is rounded before p = exp(log p) is."""
    x, t, w = (None if v is None else v.detach() for v in tensors.values())
    dim, s, mean = min(x.dim() - 1, 1), options.get("label_smoothing", 0.0), options.get("reduction", "mean") == "mean"
    soft = t.shape == x.shape
    used = torch.ones_like(x.select(dim, 0), dtype=torch.bool) if soft else t != options.get("ignore_index", -100)
    one = t if soft else F.one_hot(torch.where(used, t, 0), x.shape[dim]).movedim(-1, dim).double()
    w = torch.ones(x.shape[dim], dtype=x.dtype) if w is None else w
    w = w.reshape(-1, *(1,) * (x.dim() - 1 - dim))
    q = used.unsqueeze(dim) * w * ((1 - s) * one + s / x.shape[dim])
    total = used.numel() if soft else (used.unsqueeze(dim) * w * one).sum()
    g = g.abs().unsqueeze(dim) if g.dim() else g.abs()
    p, log_p = x.softmax(dim), x.log_softmax(dim)
    return g * (p * q.sum(dim, keepdim=True) * (1 - log_p) + q) / (total if mean else 1)


def elementwise_scale(tensors, name, g, options):
    """Of a binary loss's slope: the size of the two terms it is the difference of."""
    x, y, w = tensors["input"].detach(), tensors["target"].detach(), tensors.get("weight")
    if name == "binary_cross_entropy":
        slope = (x + y) / ((1 - x) * x).clamp_min(1e-12)
    else:
        p = tensors.get("pos_weight")
        slope = (1 - y) * x.sigmoid() + (1 if p is None else p.detach()) * y * (-x).sigmoid()
    slope = slope * (1 if w is None else w.detach().abs()) * g.abs()
    return (slope / x.numel() if options.get("reduction", "mean") == "mean" else slope).detach()
