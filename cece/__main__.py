"""``python -m cece`` prints what was built; ``python -m cece verify`` proves the installation on this machine.

verify runs, on the CPU and on every GPU, torch's gradcheck and gradgradcheck of each loss, and holds each loss and its
gradient in every dtype against float64 (``cece/reference.py``). One line a check; exit status 1 if any fails. Ctrl-C
ends it with what was found so far.

``python -m cece run SCRIPT ARGS...``, or ``run -m MODULE ARGS...``: a program with torch's losses made cece's; _run.py.
"""

import argparse
import os
import sys

import torch

import cece
from cece import reference
from cece._run import run

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# The largest error of a loss, and of a gradient relative to its largest element: a few roundings of what is returned.
LOSS_BOUND = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
GRADIENT_BOUND = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def _generator(device):
    return torch.Generator(device).manual_seed(0)


def _labels(rows, classes, device):
    target = torch.randint(0, classes, rows, generator=_generator(device), device=device)
    target.view(-1)[:1] = -100
    return target


def _logits(shape, device):
    return 4 * torch.randn(shape, generator=_generator(device), device=device, dtype=torch.float64)


def _unit(shape, device):
    return torch.rand(shape, generator=_generator(device), device=device, dtype=torch.float64)


def _cases(device, small):
    """name -> (loss, reference, input, target, keywords); small ones for gradcheck, large ones for accuracy."""
    shapes = [(3, 5), (2, 4, 3)] if small else [(500, 10), (64, 1000), (4, 70001), (3, 21, 33, 17)]
    for shape in shapes:
        classes, rows = shape[1], shape[:1] + shape[2:]
        size = "x".join(map(str, shape))
        logits, labels, weight = _logits(shape, device), _labels(rows, classes, device), _unit((classes,), device)
        ce = (cece.cross_entropy, reference.cross_entropy, logits)
        yield f"cross_entropy {size}", (*ce, labels, {})
        yield f"cross_entropy {size} weight, smoothing", (*ce, labels, {"weight": weight, "label_smoothing": 0.1})
        yield f"cross_entropy {size} probabilities", (*ce, _unit(shape, device).softmax(1), {"label_smoothing": 0.1})
        truth = _unit(shape, device).round() if not small else _unit(shape, device)
        with_logits = (cece.binary_cross_entropy_with_logits, reference.binary_cross_entropy_with_logits, logits)
        yield (
            f"binary_cross_entropy_with_logits {size}",
            (*with_logits, truth, {"pos_weight": _unit(shape[-1:], device)}),
        )
        probabilities = 0.05 + 0.9 * _unit(shape, device).flip(0)
        bce = (cece.binary_cross_entropy, reference.binary_cross_entropy, probabilities)
        yield f"binary_cross_entropy {size}", (*bce, truth, {})


def _derivatives(case):
    """Raises what gradcheck has to say."""
    loss, _, x, target, keywords = case
    x = x.detach().requires_grad_()

    def f(a):
        return loss(a, target, **keywords)

    torch.autograd.gradcheck(f, (x,), check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(f, (x,), check_fwd_over_rev=True)


def _accuracy(case, dtype):
    """(loss error over its bound, gradient error over its bound)."""
    loss, truth, x, target, keywords = case
    x = x.detach().to(dtype, copy=True).requires_grad_()
    x64 = x.detach().to(torch.float64, copy=True).requires_grad_()
    target = target.to(dtype) if target.is_floating_point() else target
    target64 = target.double() if target.is_floating_point() else target
    # Sums, not means: a mean over many elements has gradients that float16 can only hold as subnormals.
    ours, exact = loss(x, target, reduction="sum", **keywords), truth(x64, target64, reduction="sum", **keywords)
    ours.backward()
    exact.backward()
    error = (ours.detach().double() - exact.detach()).abs() / exact.detach().abs()
    gradient_error = (x.grad.double() - x64.grad).abs().max() / x64.grad.abs().max()
    return float(error) / LOSS_BOUND[dtype], float(gradient_error) / GRADIENT_BOUND[dtype]


def _checks(device):
    """(name, function that returns None or what is wrong) for everything there is to verify."""
    for name, case in _cases(device, small=True):
        yield f"gradcheck {name}", lambda case=case: _derivatives(case)
    for name, case in _cases(device, small=False):
        for dtype in DTYPES:

            def accurate(case=case, dtype=dtype):
                loss, gradient = _accuracy(case, dtype)
                if not (loss <= 1 and gradient <= 1):
                    return f"error is {loss:.2f} (loss) and {gradient:.2f} (gradient) times what it may be"

            yield f"accuracy {name} {str(dtype)[6:]}", accurate


def verify() -> int:
    """Runs every check, prints a line each; 1 if any failed, else 0; 130 if it was interrupted."""
    devices = [
        "cpu",
        *(f"cuda:{i}" for i in range(torch.cuda.device_count() if cece.build_info()["cuda_archs"] else 0)),
    ]
    failures = done = 0
    try:
        for device in devices:
            checks = list(_checks(device))
            for i, (name, check) in enumerate(checks, 1):
                filled = 20 * i // len(checks)
                bar = f"{device} [{'#' * filled}{'.' * (20 - filled)}] {i}/{len(checks)}"
                try:
                    wrong = check()
                except Exception as e:  # whatever it is, this installation does not do what it should
                    wrong = f"{type(e).__name__}: {str(e).strip().splitlines()[0]}"
                failures, done = failures + (wrong is not None), done + 1
                print(f"{bar}  {f'ok      {name}' if wrong is None else f'FAILED  {name}: {wrong}'}", flush=True)
    except KeyboardInterrupt:
        print(f"\ninterrupted after {done} checks: {failures} failed")
        return 130
    left_out = torch.cuda.is_available() and len(devices) == 1
    note = "; the GPU was left out, cece was built without CUDA" if left_out else ""
    print(f"{failures} checks failed{note}" if failures else f"all checks passed on {', '.join(devices)}{note}")
    return 1 if failures else 0


def _command() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cece",
        description=(__doc__ or "").split("\n\n")[0],
        epilog="python -m cece run SCRIPT ARGS... (or -m MODULE ARGS...): a program with torch's losses made cece's",
    )
    parser.add_argument("--version", action="version", version=f"cece {cece.__version__}")
    parser.add_argument("command", nargs="?", choices=["info", "verify", "run"], default="info")
    if parser.parse_args().command == "verify":
        return verify()
    info = cece.build_info()
    print(f"cece {info['version']}, built for torch {info['torch']} with {info['compiler']}")
    print(f"CPU: {', '.join(info['cpu_isas'])}; in use: {info['cpu_isa']}")
    cuda = ", ".join(info["cuda_archs"]) or f"not built ({info['cuda_left_out']})"
    print(f"CUDA: {cuda}; GPUs here: {torch.cuda.device_count()}")
    return 0


def main() -> int:
    """The command line: python -m cece."""
    if sys.argv[1:2] == ["run"]:  # what follows is the program's
        return run(sys.argv[2:])
    try:
        try:
            return _command()
        finally:
            sys.stdout.flush()  # also what argparse printed, which leaves by SystemExit
    except BrokenPipeError:  # who reads, as `head` does, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush when Python ends
        return 141


if __name__ == "__main__":
    sys.exit(main())
