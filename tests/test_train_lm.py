"""examples/train_lm.py, small: the same curve with logits and without, and a few steps by rewards."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[1] / "examples/train_lm.py"


def test_a_small_run(tmp_path):
    command = [sys.executable, EXAMPLE, "--rl", "--steps", "2", "--vocabulary", "400", "--characters", "60000"]
    done = subprocess.run([*command, "--out", tmp_path / "out.png"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"no logits +loss \d\.\d+ -> \d\.\d+, \d+ ms a step, \d+ MiB at most", done.stdout)
    assert re.search(r"the curves part by \S+ nats at most", done.stdout)
    assert re.search(r"reward: 0\.\d\d -> 0\.\d\d in 2 rounds", done.stdout)
