"""torch's own test inputs for these losses, with cece swapped in: OpInfo samples, error inputs, module inputs.

The counts are asserted, so that an empty generator is a failure and not a pass.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

import cece

SAMPLES = {"cross_entropy": 20, "binary_cross_entropy": 11, "binary_cross_entropy_with_logits": 26}  # at least
if hasattr(F, "linear_cross_entropy"):  # torch 2.13
    SAMPLES["linear_cross_entropy"] = 30
LOSSES = list(SAMPLES)
OPS = {name: next(op for op in op_db if op.name == f"nn.functional.{name}") for name in LOSSES}
# Half precision is compared with torch in float64: torch's own results round at every step.
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 2e-6},
    torch.bfloat16: {"rtol": 2**-8, "atol": 1e-5},
    torch.float16: {"rtol": 2**-11, "atol": 1e-5},
}


def assert_agrees(ours, theirs, dtype, what=""):
    assert ours.shape == theirs.shape
    torch.testing.assert_close(
        ours.double(), theirs.double(), **TOLERANCE[dtype], equal_nan=True, msg=lambda m: f"{m}\n{what}"
    )


def wide(x):
    """Half precision as float64, also inside of tuples and dicts."""
    if isinstance(x, torch.Tensor) and x.dtype in (torch.float16, torch.bfloat16):
        return x.detach().double().requires_grad_(x.requires_grad)
    if isinstance(x, dict):
        return {k: wide(v) for k, v in x.items()}
    return tuple(wide(v) for v in x) if isinstance(x, (tuple, list)) else x


def outcome(loss, x, args, kwargs):
    """The loss and the gradients of all that require one."""
    x = x.detach().requires_grad_()
    args = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in args]
    value = loss(x, *args, **kwargs)
    wanted = [x, *(a for a in args if isinstance(a, torch.Tensor) and a.requires_grad)]
    return [value, *torch.autograd.grad(value.sum(), wanted)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_opinfo_samples(name, dtype):
    op, count = OPS[name], 0
    assert dtype in op.dtypes
    for requires_grad in (False, True):
        for sample in op.sample_inputs("cpu", dtype, requires_grad=requires_grad):
            given = sample.input, sample.args, sample.kwargs
            ours, theirs = outcome(getattr(cece, name), *given), outcome(getattr(F, name), *wide(given))
            assert len(ours) == len(theirs)
            for a, b in zip(ours, theirs, strict=True):
                assert_agrees(a, b, dtype, sample)
            assert ours[1].dtype == dtype
            count += 1
    assert count >= 2 * SAMPLES[name], count


@pytest.mark.parametrize("name", LOSSES)
def test_opinfo_samples_second_order_and_forward_mode(name):
    count = 0
    for sample in OPS[name].sample_inputs("cpu", torch.float64, requires_grad=False):
        x, v = sample.input.detach(), torch.randn_like(sample.input)
        if x.numel() == 0:
            continue
        results = []
        for module in (cece, F):

            def loss(x, module=module, sample=sample):
                return getattr(module, name)(x, *sample.args, **sample.kwargs).sum()

            results.append(torch.func.jvp(torch.func.grad(loss), (x,), (v,)))
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9, equal_nan=True)
        count += 1
    assert count >= SAMPLES[name] // 2, count


def test_opinfo_error_inputs():
    """Whatever torch's suites hold of these losses must raise here too."""
    for name in LOSSES:
        op = OPS[name]
        for error in op.error_inputs("cpu") if op.error_inputs_func is not None else ():
            sample = error.sample_input
            if "dimensionality 1 or 2, got 3" in error.error_regex:  # which cece takes
                continue
            with pytest.raises(error.error_type, match=error.error_regex):
                getattr(cece, name)(sample.input, *sample.args, **sample.kwargs)


MODULES = {"CrossEntropyLoss": 30, "BCELoss": 5, "BCEWithLogitsLoss": 5}  # inputs, at least
MODULE_INFOS = {name: next(m for m in module_db if m.module_cls is getattr(torch.nn, name)) for name in MODULES}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_module_inputs(name, dtype):
    info, count = MODULE_INFOS[name], 0
    for m in info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=True):
        built, given = m.constructor_input, m.forward_input
        loss = getattr(cece, name)(*built.args, **built.kwargs)
        truth = getattr(torch.nn, name)(*wide(built.args), **wide(built.kwargs))
        tensors = given.args[0], given.args[1:], given.kwargs
        ours, theirs = outcome(loss, *tensors), outcome(truth, *wide(tensors))
        for a, b in zip(ours, theirs, strict=True):
            assert_agrees(a, b, dtype, m.desc)
        if m.reference_fn is not None and dtype.itemsize >= 4:
            plain = [a.detach() for a in given.args]  # it copies them deeply
            assert_agrees(ours[0], m.reference_fn(loss, *plain, **given.kwargs), dtype, m.desc)
        count += 1
    assert count >= MODULES[name], count


def test_module_error_inputs():
    info, count = MODULE_INFOS["CrossEntropyLoss"], 0
    inputs = info.module_error_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=True, training=True)
    for error in inputs:
        built, given = error.module_error_input.constructor_input, error.module_error_input.forward_input
        assert error.error_on == ModuleErrorEnum.FORWARD_ERROR
        loss = cece.CrossEntropyLoss(*built.args, **built.kwargs)
        with pytest.raises(error.error_type, match=error.error_regex):
            loss(*given.args, **given.kwargs)
        count += 1
    assert count >= 7, count
