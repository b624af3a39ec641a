"""examples/GROUND.md: every number in it is what its lines print, and its figure shows what it says."""

import doctest
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
GROUND = runpy.run_path(str(EXAMPLES / "ground.py"))


def test_every_number():
    results = doctest.testfile(str(EXAMPLES / "GROUND.md"), module_relative=False, optionflags=doctest.FAIL_FAST)
    assert results.attempted > 25 and results.failed == 0


def test_the_curves():
    """Cross-entropy is entropy and divergence; it is lowest where belief and truth agree. A slope is p - 1."""
    c = GROUND["of_probability"](0.8)
    torch.testing.assert_close(c["cross-entropy"], c["entropy"] + c["divergence"])
    lowest = c["cross-entropy"].argmin()
    assert abs(c["p"][lowest] - 0.8) < 0.005 and c["divergence"][lowest] < 1e-4
    torch.testing.assert_close(c["entropy"][0].item(), 0.5004024, rtol=1e-6, atol=0)
    c = GROUND["of_logit"]()
    torch.testing.assert_close(c["slope"], c["z"].sigmoid() - 1)
    torch.testing.assert_close(c["yes"], c["no"].flip(0))


def test_the_figure_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    GROUND["draw"](tmp_path / "ground.png")
    assert (tmp_path / "ground.png").stat().st_size > 10_000 and (EXAMPLES / "ground.png").stat().st_size < 200_000
