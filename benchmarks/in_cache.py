"""What the arithmetic costs where memory costs nothing: python -m benchmarks.in_cache [--quick] [--out FILE.json]

One thread, tensors that fit the second-level cache, operators called directly: no autograd, and of Python only the
call. Reported is the least time of thousands of short samples, in ns an element. Each instruction set is a process of
its own; the processes take turns, and the least time of all rounds counts. So others' load costs patience, not truth.

A call's fixed cost (arguments, checks, allocation) is in its time as in a training step, and is measured beside it with
no element at all. `copy` is one tensor copied to another: what reading and writing cost without arithmetic.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import elsewhere
from .harness import default_output, environment, say_if_busy, write_json

MEAN, IGNORE = 1, -100
OPS = torch.ops.cece
F32, BF16 = torch.float32, torch.bfloat16


# ---- calls: (logits) -> the calls of forward and backward


def cross_entropy(logits):
    target = torch.randint(logits.shape[1], logits.shape[:1] + logits.shape[2:])
    options = MEAN, IGNORE, 0.0
    forward, backward = OPS.cross_entropy_forward.default, OPS.cross_entropy_backward.default
    loss, stats, total = forward(logits, target, None, *options)
    grad = torch.ones_like(loss)
    return {
        "forward": lambda: forward(logits, target, None, *options),
        "backward": lambda: backward(grad, logits, target, None, stats, total, *options),
    }


def binary(kind, dtype=None):
    def calls(x):
        x, target = (x.sigmoid(), x) if kind == PROBABILITIES else (x, x)
        target = torch.randint(2, target.shape).to(dtype or x.dtype)
        forward, backward = OPS.binary_cross_entropy_forward.default, OPS.binary_cross_entropy_backward.default
        grad = torch.ones_like(forward(x, target, None, None, kind, MEAN))
        return {
            "forward": lambda: forward(x, target, None, None, kind, MEAN),
            "backward": lambda: backward(grad, x, target, None, None, kind, MEAN),
        }

    return calls


def copy(x):
    to = torch.empty_like(x)
    return {"forward": lambda: to.copy_(x)}


PROBABILITIES, LOGITS = 0, 1


@dataclass(frozen=True)
class Case:
    name: str
    calls: Callable
    shape: tuple
    dtype: torch.dtype = F32
    must: dict = field(default_factory=dict)  # ns an element of a pass, "both": their sum; or so many times another's


def like(name):
    return {"of": name, "times": 1.2}


# 128,000 elements: 500 KiB of float32 logits and as much of gradient. The elementwise losses read a target, too.
CASES = [
    Case("CE 4 x 32000", cross_entropy, (4, 32000), must={"forward": 0.20, "backward": 0.18}),
    Case("CE 4 x 32000, bf16", cross_entropy, (4, 32000), BF16),
    Case("CE 128 x 1000", cross_entropy, (128, 1000), must={"forward": 0.24, "backward": 0.20}),
    Case("CE 128 x 1000, bf16", cross_entropy, (128, 1000), BF16),
    Case("CE 12800 x 10", cross_entropy, (12800, 10), must={"forward": 0.5, "backward": 0.5}),
    Case("CE 12800 x 10, bf16", cross_entropy, (12800, 10), BF16, like("CE 12800 x 10")),
    Case("CE 6000 x 21", cross_entropy, (6000, 21), must={"forward": 0.45, "backward": 0.35}),
    Case("CE 6000 x 21, bf16", cross_entropy, (6000, 21), BF16, like("CE 6000 x 21")),
    Case("CE 1 x 21 x 6000", cross_entropy, (1, 21, 6000), must={"forward": 0.40, "backward": 0.40}),
    Case("CE 1 x 21 x 6000, bf16", cross_entropy, (1, 21, 6000), BF16),
    Case("BCE 64 x 1000", binary(LOGITS), (64, 1000), must={"forward": 0.38, "backward": 0.30}),
    Case("BCE 64 x 1000, bf16", binary(LOGITS), (64, 1000), BF16),
    Case("BCE 64 x 1000, bool truths", binary(LOGITS, torch.bool), (64, 1000)),
    Case("BCE 64 x 1000, probabilities", binary(PROBABILITIES), (64, 1000), must={"both": 0.6}),
    Case("BCE 64 x 1000, probabilities, bf16", binary(PROBABILITIES), (64, 1000), BF16),
    Case("copy, f32", copy, (128, 1000)),
    Case("copy, bf16", copy, (128, 1000), BF16),
]
# What a call costs where there is nothing to do, in ns a call.
EMPTY = [
    Case("CE 0 x 1000", cross_entropy, (0, 1000)),
    Case("BCE 0 x 1000", binary(LOGITS), (0, 1000)),
    Case("copy 0 x 1000", copy, (0, 1000)),
]


def least(call, seconds, calls=1):
    """The least time of a call in ns; a sample is so many of them."""
    clock, best, end = time.perf_counter_ns, float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        for _ in range(20):
            start = clock()
            for _ in range(calls):
                call()
            best = min(best, clock() - start)
    return best / calls


def measure(seconds):
    """{case: {pass: ns an element, or a call of none}} with this process's instruction set."""
    torch.set_num_threads(1)
    times = {}
    with torch.inference_mode():
        for case in CASES + EMPTY:
            torch.manual_seed(0)
            calls = case.calls(torch.randn(case.shape).to(case.dtype))
            elements = max(1, torch.Size(case.shape).numel())
            repeat = 1 if case in CASES else 100
            times[case.name] = {which: least(call, seconds, repeat) / elements for which, call in calls.items()}
    return times


def least_of(rounds):
    """The least of every time over rounds of measure()."""
    return {
        case: {which: min(times[case][which] for times in rounds) for which in passes}
        for case, passes in rounds[0].items()
    }


def goals(times):
    """{case: {pass: ns an element}}, those relative to another case made absolute."""
    of = {}
    for case in CASES:
        other = times.get(case.must.get("of"))
        goal = {p: case.must["times"] * ns for p, ns in other.items()} if other else case.must
        if goal:
            of[case.name] = goal
    return of


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="see that it works; writes only with --out")
    parser.add_argument("--rounds", type=int, default=4, help="of every instruction set (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.4, help="for a call and round (default: %(default)s)")
    parser.add_argument("--out", type=Path, help=f"JSON file (default: {default_output('cache').name} in results/)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.quick:
        args.rounds, args.seconds = 1, 0.0
    if args.child:
        print(json.dumps(measure(args.seconds)))
        return None
    say_if_busy()
    isas = elsewhere.isas()
    rounds = {isa: [] for isa in isas}
    for i in range(args.rounds):
        for isa in isas:
            print(f"round {i + 1}/{args.rounds}  {isa}", flush=True)
            child = elsewhere.start(isa, ["benchmarks.in_cache", "--child", "--seconds", str(args.seconds)])
            answer = child.communicate()[0]
            if child.returncode:
                raise SystemExit(child.returncode)
            rounds[isa].append(json.loads(answer))
    times = {isa: least_of(of) for isa, of in rounds.items()}
    rows = [
        {"case": case, "isa": isa, "pass": which, "ns": ns}
        for isa, of in times.items()
        for case, passes in of.items()
        for which, ns in passes.items()
    ]
    content = environment() | {
        "threads": 1,
        "isas": isas,
        "must": goals(times[isas[0]]),
        "copies": {case.name: f"copy, {'bf16' if case.dtype == BF16 else 'f32'}" for case in CASES},
        "empty": [case.name for case in EMPTY],
    }
    if out := args.out or (None if args.quick else default_output("cache")):
        write_json(out, content, rows, 0)
        print(f"written: {out}")
    return content | {"rows": rows}


if __name__ == "__main__":
    main()
