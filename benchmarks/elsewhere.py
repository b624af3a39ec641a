"""cece with another instruction set: a process of its own, for torch and cece choose theirs once and for all.

The process reads a line for each turn from its input, [case, steps], and answers [instruction set, forward, backward],
the times in seconds.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import cece


def isas():
    """The instruction sets that this machine runs cece with, the best first."""
    info = cece.build_info()
    able = info["cpu_isas"][info["cpu_isas"].index(info["cpu_isa"]) :]
    return able[:1] + [isa for isa in able[1:] if isa != "DEFAULT"]


def start(isa, arguments, **more):
    """python -m benchmarks.<arguments> with this instruction set."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": isa.lower()}
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", *arguments]
    return subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, **more)


class Process:
    """Started by its first turn."""

    def __init__(self, isa, threads):
        self.isa, self.threads, self.process = isa, threads, None

    def step(self, case):
        return Step(self, case.name)

    def ask(self, *question):
        if self.process is None:
            self.process = start(self.isa, ["benchmarks.elsewhere", str(self.threads)], stdin=subprocess.PIPE)
        print(json.dumps(question), file=self.process.stdin, flush=True)
        isa, *answer = json.loads(self.process.stdout.readline() or "[null]")
        if isa != self.isa:
            raise RuntimeError(f"a process was to run cece with {self.isa}, it ran with {isa}")
        return answer

    def end(self):
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()


class Step:
    """A contender for the harness: cece's share of a case, in that process."""

    passes = ("forward", "backward", "both")

    def __init__(self, process, name):
        self.process, self.name, self.pool = process, name, process.isa

    def turn(self, steps):
        return self.process.ask(self.name, steps)

    def peak_memory(self):
        return dict.fromkeys(self.passes)  # the same as with any instruction set


def serve(threads):
    import torch

    from .cases import CASES

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who asks; the end of the questions ends this, too
    torch.set_num_threads(threads)
    cases = {case.name: case for case in CASES}
    of, isa = None, cece.build_info()["cpu_isa"]
    for line in sys.stdin:
        name, steps = json.loads(line)
        if name != of:
            step = None  # its memory first
            of, step = name, cases[name].kinds()["cece"](cases[name], *cases[name].tensors())
        step.turn(1)  # untimed: it wakes this process's threads
        print(json.dumps([isa, *step.turn(steps)]), flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
