"""examples/train_lm.py, small: the same curve with logits and without, and a few steps by rewards."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[1] / "examples/train_lm.py"


def test_a_small_run(tmp_path):
    command = [sys.executable, EXAMPLE, "--rl", "--steps", "2", "--vocabulary", "400", "--characters", "60000"]
    done = subprocess.run([*command, "--out", tmp_path / "out.png"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"no logits +loss \d\.\d+ -> \d\.\d+, \d+ ms a step, \d+ MiB at most", done.stdout)
    assert re.search(r"the curves part by \S+ nats at most", done.stdout)
    assert re.search(r"reward: 0\.\d\d -> 0\.\d\d in 2 rounds", done.stdout)


@pytest.mark.parametrize("options", [["2"], ["4", "--data-parallel", "fsdp"]], ids=str)
def test_over_processes(options):
    """The vocabulary cut over processes, beside FSDP over others: the curve of one process."""
    ranks, *data_parallel = options
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, EXAMPLE]
    command += ["--vocabulary-parallel", "--steps", "2", "--vocabulary", "401", "--characters", "60000", *data_parallel]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("loss ") == 2
    assert float(re.search(r"the curves of one process part by (\S+) nats at most", done.stdout)[1]) < 1e-5
