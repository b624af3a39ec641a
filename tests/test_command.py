"""``python -m cece`` as a command: interrupted, piped into one that stops reading, asked for its version."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import cece
from cece import __main__ as command

ROOT = Path(__file__).resolve().parents[1]


def interrupt():
    raise KeyboardInterrupt


def fail():
    raise RuntimeError("not\nwhat it should be")


@pytest.mark.parametrize("checks, failed", [([lambda: None, lambda: None], 0), ([lambda: "wrong", fail], 2)])
def test_verify_sums_up_where_it_is_interrupted(monkeypatch, capsys, checks, failed):
    names = [*checks, interrupt, lambda: pytest.fail("goes on after Ctrl-C")]
    monkeypatch.setattr(command, "_checks", lambda device: ((f"check {i}", f) for i, f in enumerate(names)))
    assert command.verify() == 130
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == f"interrupted after 2 checks: {failed} failed"
    assert [line.split()[2] for line in out[:2]] == ["1/4", "2/4"]
    assert sum("FAILED" in line for line in out) == failed


@pytest.mark.parametrize("arguments", [[], ["--version"], ["verify"]], ids=lambda a: " ".join(a) or "info")
def test_no_traceback_where_nobody_reads(arguments):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as nobody:
        done = subprocess.run(
            [sys.executable, "-m", "cece", *arguments],
            stdout=nobody,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": ""},  # as in a shell: what is printed meets the pipe late
        )
    assert (done.returncode, done.stderr) == (141, "")


def test_version(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cece", "--version"])
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == 0 and capsys.readouterr().out == f"cece {cece.__version__}\n"
