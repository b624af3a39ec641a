"""Times losses against each other in one process, and measures the memory they need.

A *round* gives every contender a turn; rounds repeat until the case's time is up, so that whatever disturbs the
machine disturbs all of them. Reported are median and interquartile range over rounds. A turn is a step of training:

    untimed     the logits are written anew (as by the layer before: equally warm caches for everyone)
    forward     loss = f(logits, target)
    backward    loss.backward(), which makes a fresh gradient, and its release (as by zero_grad)

XLA takes part where jax can be imported; loss and gradient are one of its programs, so it has no backward alone. cece
with the next lesser instruction set is a process of its own that takes its turns in the same rounds (elsewhere.py).

The collector is off, the number of threads fixed and recorded; warm-up and compilation come first. The memory limit is
`copy`: the logits copied once into memory that was touched before, two of the byte model's passes.

Peak memory is what the process's resident memory grew by in one untimed step, from inputs to the highest point: real
pages, of whatever allocator. The last freed gradients that cece keeps are dropped first, so its gradient counts too.
"""

import argparse
import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import torch

import cece

from . import elsewhere

RESULTS = Path(__file__).parent / "results"
PASSES = ("forward", "backward", "both")
MIN_TURN = 2e-3  # seconds: a turn repeats its step until the slowest contender takes this long
SPIN = 5e-3  # seconds: torch's threads look for more work for 4 ms after each step, on cores that the next one may need


# ---- what is measured


@dataclass(frozen=True)
class Case:
    """A call of cece's loss of this name, and of torch's: torch.nn.functional's of the same name, or `eager`."""

    name: str
    loss: str | Callable
    shape: tuple
    target: Callable  # (logits) -> tensor
    dtype: torch.dtype = torch.float32
    logits: Callable = torch.randn  # (*shape) -> tensor
    options: dict = field(default_factory=dict)  # keyword arguments; a callable is called with the logits
    eager: Callable | None = None  # (logits, target, **options) -> loss, where torch has no function of this name
    for_torch: Callable = lambda logits, target: target  # the conversion torch needs of a target, part of its time
    must: dict = field(default_factory=dict)  # cece must be this many times faster than a contender; copy: slower

    def tensors(self):
        torch.manual_seed(0)
        logits = self.logits(*self.shape).to(self.dtype)
        options = {k: v(logits) if callable(v) else v for k, v in self.options.items()}
        return logits, self.target(logits), options

    def kinds(self):
        kinds = dict(CONTENDERS)
        if self.loss != "cross_entropy" or self.eager:
            del kinds["cece in place"]
        if jax_version():
            from . import xla

            kinds |= xla.kinds(self)
        return kinds

    def moved(self, logits, target, options):
        return byte_model(logits, target)


def jax_version():
    """None: it is not there, and XLA takes no part."""
    return importlib.metadata.version("jax") if all(map(importlib.util.find_spec, ("jax", "jaxlib"))) else None


def byte_model(logits, target):
    """Bytes that must move: forward reads logits and targets, backward reads both and writes the gradient."""
    n, t = logits.nbytes, target.nbytes
    return {"forward": n + t, "backward": 2 * n + t, "both": 3 * n + 2 * t}


AHEAD = {"eager": 1, "compile": 1, "XLA": 1}  # the goal of every case, where it sets no higher one


def goals(case):
    kinds = case.kinds()
    return {name: goal for name, goal in (AHEAD | case.must).items() if name in kinds}


# ---- who takes part


class Step:
    """One contender's share of a training step."""

    passes = PASSES  # those that its rows are written of
    pool = "torch"  # whose threads work for it

    def __init__(self, case, logits, target, options):
        self.source, self.target, self.options = logits, target, options
        self.logits = logits.clone(memory_format=torch.preserve_format).requires_grad_()
        self.loss = self.make_loss(case)

    def prepare(self):
        self.logits.data.copy_(self.source)

    def forward(self):
        return self.loss(self.logits, self.target, **self.options)

    def backward(self, loss):
        loss.backward()
        self.logits.grad = None

    def turn(self, steps):
        """Seconds of one step's (forward, backward), the mean of so many."""
        forward = backward = 0.0
        clock = time.perf_counter
        for _ in range(steps):
            self.prepare()
            start = clock()
            loss = self.forward()
            middle = clock()
            self.backward(loss)
            backward += clock() - middle
            forward += middle - start
        return forward / steps, backward / steps

    def peak_memory(self):
        """{pass: bytes}: by how much resident memory grew at most. None where the system does not tell."""
        self.prepare()
        try:
            drop_free_memory()
            before = resident()
            reset_peak()
            loss = self.forward()
            forward = resident("VmHWM") - before
            reset_peak()
            self.backward(loss)
            backward = resident("VmHWM") - before
        except (OSError, AttributeError):  # no /proc that may be written to, or no malloc_trim
            return dict.fromkeys(PASSES)
        return {"forward": max(0, forward), "backward": max(0, backward), "both": max(0, forward, backward)}


class Cece(Step):
    def make_loss(self, case):
        return case.loss if callable(case.loss) else getattr(cece, case.loss)


class CeceInPlace(Cece):
    def prepare(self):
        super().prepare()
        self.not_a_leaf = self.logits.clone(memory_format=torch.preserve_format)  # as a layer leaves them

    def forward(self):
        return self.loss(self.not_a_leaf, self.target, inplace_backward=True, **self.options)


class Eager(Step):
    def make_loss(self, case):
        loss, convert = case.eager or getattr(torch.nn.functional, case.loss), case.for_torch
        return lambda logits, target, **options: loss(logits, convert(logits, target), **options)


class Compiled(Eager):
    def make_loss(self, case):
        torch._dynamo.reset()
        return torch.compile(super().make_loss(case), fullgraph=True, dynamic=False)


class Copy(Step):
    passes = ("both",)

    def make_loss(self, case):
        self.copy = self.source.clone(memory_format=torch.preserve_format)
        return None

    def forward(self):
        self.copy.copy_(self.logits.data)

    def backward(self, loss):
        pass


CONTENDERS = {"cece": Cece, "cece in place": CeceInPlace, "eager": Eager, "compile": Compiled, "copy": Copy}


def contenders(case):
    tensors = case.tensors()
    return {name: kind(case, *tensors) for name, kind in case.kinds().items()}, case.moved(*tensors)


# ---- time


def alternate(steps, seconds, least=5, most=200):
    """{contender: [(forward, backward) of every round]}, the contenders taking turns."""
    for step in steps.values():
        step.turn(2)  # warm-up, compilation
    slowest = max(min(sum(step.turn(1)) for _ in range(3)) for step in steps.values())
    repeat = max(1, round(MIN_TURN / slowest))
    rounds, pool = {name: [] for name in steps}, None
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        while (done := min(map(len, rounds.values()))) < least or (done < most and time.perf_counter() < end):
            for name, step in steps.items():
                if step.pool != pool:
                    time.sleep(SPIN)
                    step.turn(1)  # untimed: it wakes this pool's threads, which the next contender finds awake
                pool = step.pool
                rounds[name].append(step.turn(repeat))
    finally:
        gc.enable()
    return rounds


def summarize(samples):
    """Median and interquartile range of seconds, in milliseconds."""
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median_ms": 1e3 * middle, "iqr_ms": 1e3 * (high - low), "rounds": len(samples)}


# ---- memory


def resident(line="VmRSS"):
    with open("/proc/self/status") as status:
        return next(1024 * int(row.split()[1]) for row in status if row.startswith(line + ":"))


def drop_free_memory():
    """Back to the system: what malloc holds, and the gradients that cece keeps, which two others push out."""
    for rows in (1, 2):  # 4 and 8 MiB, kept in their place and never asked for by a case
        x = torch.zeros(rows, 1 << 20, requires_grad=True)
        cece.cross_entropy(x, torch.zeros(rows, dtype=torch.long)).backward()
    del x
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def reset_peak():
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")


# ---- one case, all cases


def measure(case, seconds, others=()):
    """The case's rows of the table; `others` are processes that run cece's share of it, too."""
    steps, bytes_ = contenders(case)
    steps |= {f"cece {other.isa}": other.step(case) for other in others}
    rounds = alternate(steps, seconds)
    rows = []
    for name, samples in rounds.items():
        peak = steps[name].peak_memory()
        times = {
            "forward": [f for f, _ in samples],
            "backward": [b for _, b in samples],
            "both": [sum(s) for s in samples],
        }
        for which in steps[name].passes:
            what = {
                "case": case.name,
                "dtype": str(case.dtype).removeprefix("torch."),
                "pass": which,
                "contender": name,
            }
            moved = bytes_[which] if name != "copy" else 2 * steps[name].source.nbytes
            rows.append(what | summarize(times[which]) | {"bytes": moved, "peak_bytes": peak[which]})
    return rows


def print_case(rows):
    both = {row["contender"]: row["median_ms"] for row in rows if row["pass"] == "both"}
    print("".join(f"{name} {ms:9.3f}   " for name, ms in both.items()), flush=True)


def each(cases, rows_of, keep, show=lambda rows: None):
    """The rows of all cases, counted as they come; what there is is kept after each, so Ctrl-C loses one case."""
    rows, done = [], 0
    try:
        for case in cases:
            print(f"{done + 1:{len(str(len(cases)))}}/{len(cases)}  {case.name:42}", end="", flush=True)
            new = rows_of(case)
            keep(rows + new, len(cases) - done - 1)
            rows, done = rows + new, done + 1
            show(new)
    except KeyboardInterrupt:
        print(f"\ninterrupted after {done} of {len(cases)} cases")
        raise SystemExit(130) from None
    return rows


def write_whole(path, text):
    """Never half a file, whenever the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text)
    unfinished.replace(path)


def write_json(path, content, rows, left_out):
    """The rows so far; in a run that is not through yet, or never will be, also how many cases are left out."""
    write_whole(
        path, json.dumps({**content, **({"left_out": left_out} if left_out else {}), "rows": rows}, indent=1) + "\n"
    )


def environment():
    info = cece.build_info()
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system() + " " + platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cece": cece.__version__,
        "isa": info["cpu_isa"],
        "date": date.today().isoformat(),
    }


def cpu_name():
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def default_output(kind="cpu"):
    name = "-".join(cpu_name().lower().replace("(r)", "").replace("(tm)", "").split())
    return RESULTS / f"{kind}-{name}-torch{torch.__version__.split('+')[0]}.json"


def say_if_busy():
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5:
        print(f"the machine is busy (load {os.getloadavg()[0]:.1f}): these times are not worth keeping")


def main(cases, arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="see that it works: few rounds; writes only with --out")
    parser.add_argument("--only", metavar="TEXT", help="the cases whose name contains this; writes only with --out")
    parser.add_argument("--seconds", type=float, default=6, help="of rounds for each case (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help=f"JSON file (default: {default_output().name} in {RESULTS.name}/)")
    args = parser.parse_args(arguments)
    cases = [case for case in cases if args.only is None or args.only in case.name]
    if not cases:
        parser.error(f"no case's name contains {args.only!r}")
    torch.set_num_threads(args.threads)
    os.environ["NPROC"] = str(args.threads)  # XLA's number of threads, read when jax is first imported
    say_if_busy()

    out = args.out or (None if args.quick or args.only else default_output())
    content = environment() | {"jax": jax_version(), "must": {case.name: goals(case) for case in cases}}

    def keep(rows, left_out):
        if out:
            write_json(out, content, rows, left_out)

    if out:
        print(f"written after each case: {out}", flush=True)
    others = [elsewhere.Process(isa, args.threads) for isa in elsewhere.isas()[1:]]
    try:
        return each(cases, lambda case: measure(case, 0 if args.quick else args.seconds, others), keep, print_case)
    finally:
        for other in others:
            other.end()
