"""From one thread to all cores, cece beside eager torch: python -m benchmarks.threads [--quick] [--out FILE.json]

Every number of threads of every contender is a contender of the harness: they take turns in the same rounds.
"""

import argparse
from pathlib import Path

import torch

from . import harness
from .cases import CASES

NAMES = {
    "CE 128 x 10": "tiny",
    "CE 65536 x 10": "short rows",
    "CE 1024 x 32000": "long rows",
    "CE 1 x 4000000": "one row",
    "CE 8 x 21 x 256 x 256": "pixels",
    "BCE 8192 x 1000": "elementwise",
}


def numbers(cores):
    """1, 2, 4, ... and all cores."""
    return [n for n in (2**i for i in range(cores.bit_length())) if n < cores] + [cores]


def on(threads, kind):
    """The contender with so many threads, which an untimed step starts."""

    class OnThreads(kind):
        pool = threads

        def turn(self, steps):
            torch.set_num_threads(threads)
            super().turn(1)
            return super().turn(steps)

    return OnThreads


def measure(case, counts, seconds):
    tensors = case.tensors()
    kinds = [("cece", harness.Cece), ("eager", harness.Eager)]
    steps = {(n, name): on(n, kind)(case, *tensors) for n in counts for name, kind in kinds}
    rounds = harness.alternate(steps, seconds)
    return [
        {"case": case.name, "pass": "both", "contender": name, "threads": n}
        | harness.summarize([sum(s) for s in samples])
        for (n, name), samples in rounds.items()
    ]


def show(rows):
    print("".join(f"{row['contender']} {row['threads']}: {row['median_ms']:.3f}   " for row in rows), flush=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="see that it works: few rounds; writes only with --out")
    parser.add_argument("--only", metavar="TEXT", help="the cases whose name contains this; writes only with --out")
    parser.add_argument("--seconds", type=float, default=10, help="of rounds for each case (default: %(default)s)")
    parser.add_argument("--out", type=Path, help=f"JSON file (default: {harness.default_output('threads').name})")
    args = parser.parse_args(arguments)
    harness.say_if_busy()
    counts = numbers(torch.get_num_threads())  # torch's own choice is a thread for each core
    out = args.out or (None if args.quick or args.only else harness.default_output("threads"))
    content = harness.environment() | {"threads": counts}
    cases = [case for case in CASES if case.name in NAMES and (args.only is None or args.only in case.name)]

    def keep(rows, left_out):
        if out:
            harness.write_json(out, content, rows, left_out)

    return harness.each(cases, lambda case: measure(case, counts, 0 if args.quick else args.seconds), keep, show)


if __name__ == "__main__":
    main()
