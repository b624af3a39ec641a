"""The benchmarks' arithmetic: what they report is what was measured. No test here looks at a clock."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

import cece

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import bench_binary_cross_entropy, bench_cross_entropy, harness  # noqa: E402
from benchmarks import report as reports  # noqa: E402

CASES = bench_cross_entropy.CASES + bench_binary_cross_entropy.CASES
README = (
    "a\n<!-- cpu-table:begin -->old<!-- cpu-table:end -->\nb\n<!-- gpu-table:begin -->\n<!-- gpu-table:end -->\nc\n"
)


def row(contender, ms, case="CE 8 x 4", which="both", **more):
    bytes_ = {"copy": 200}.get(contender, 300)
    measured = {"median_ms": ms, "iqr_ms": 0.0, "rounds": 5, "bytes": bytes_, "peak_bytes": 2**20}
    return {"case": case, "dtype": "float32", "pass": which, "contender": contender} | measured | more


CPU = {"cpu": "A CPU", "cores": 2, "threads": 2, "isa": "AVX2", "torch": "2", "cece": "0", "date": "2000-01-01"} | {
    "must": {"CE 8 x 4": {"eager": 5, "compile": 3, "copy": 2.5}},
    "rows": [
        row("cece", 2.0),
        row("eager", 10.0),
        row("compile", 5.9),
        row("copy", 0.8),
        row("cece", 9, which="forward"),
    ],
}
GPU = {"device": "A GPU", "driver": "1", "versions": {"torch": "2"}, "date": "2000-01-01", "copy_gbs": 4000.0} | {
    "rows": [row(name, 1.0, f"CE {c}", classes=c, gbs=9.0, percent_of_copy=50.0) for c in (256, 512) for name in "ab"]
}


def test_medians_and_quartiles():
    assert harness.summarize([5e-3, 1e-3, 2e-3, 3e-3, 4e-3]) == {"median_ms": 3.0, "iqr_ms": 2.0, "rounds": 5}


def test_contenders_take_turns_on_logits_written_anew():
    calls = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def prepare(self):
            calls.append((self.name, "prepare"))

        def forward(self):
            calls.append((self.name, "forward"))
            return self.name

        def backward(self, loss):
            assert loss == self.name
            calls.append((self.name, "backward"))

    rounds = harness.alternate({"cece": Recorder("cece"), "other": Recorder("other")}, seconds=0, least=4)
    assert {name: len(samples) for name, samples in rounds.items()} == {"cece": 4, "other": 4}
    assert {what for _, what in calls[0::3]} == {"prepare"} and {what for _, what in calls[2::3]} == {"backward"}
    turns = [name for name, _ in itertools.groupby(name for name, _ in calls)]
    assert turns == ["cece", "other"] * (len(turns) // 2)


def test_byte_model():
    logits, target = torch.zeros(8, 4), torch.zeros(8, dtype=torch.int64)
    assert harness.byte_model(logits, target) == {"forward": 192, "backward": 320, "both": 512}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_contenders_compute_the_same(case):
    small = harness.Case(**{**vars(case), "shape": (4, 6, 2, 3) if len(case.shape) == 4 else (8, 6)})
    tensors = small.tensors()
    outcomes = {}
    for name in ("cece", "cece in place", "eager"):
        if name == "cece in place" and case.loss != "cross_entropy":
            continue
        step = harness.CONTENDERS[name](small, *tensors)
        for _ in range(2):  # the second step must see the same logits again
            step.prepare()
            loss = step.forward()
            loss.backward()
            gradient, step.logits.grad = step.logits.grad.clone(), None
        outcomes[name] = loss.float(), gradient.float()
    close = {"rtol": 2e-2, "atol": 2e-3} if case.dtype == torch.bfloat16 else {}
    for loss, gradient in outcomes.values():
        torch.testing.assert_close(loss, outcomes["eager"][0], **close)
        torch.testing.assert_close(gradient, outcomes["eager"][1], **close)


def test_peak_memory_sees_a_gradient_and_what_is_kept_of_it():
    case = harness.Case("a", "cross_entropy", (512, 8192), bench_cross_entropy.labels)  # 16 MiB
    step = harness.CONTENDERS["cece"](case, *case.tensors())
    harness.turn(step, 2)  # cece now keeps a block of this size
    peak = harness.peak_memory(step)
    if peak["both"] is None:
        pytest.skip("no /proc/self/clear_refs")
    assert peak["forward"] < 4 * 2**20 and 15 * 2**20 < peak["both"] < 24 * 2**20


def test_report_judges_and_is_idempotent(tmp_path):
    results, readme = tmp_path / "results", tmp_path / "README.md"
    results.mkdir()
    readme.write_text(README)
    assert reports.report(results, readme, plots=False)
    assert readme.read_text().count("Not yet measured.") == 2

    (results / "cpu-a.json").write_text(json.dumps(CPU))
    (results / "gpu-b.json").write_text(json.dumps(GPU))
    assert reports.report(results, readme, plots=False)
    assert not reports.report(results, readme, plots=False)
    text = readme.read_text()
    assert "Not yet measured." not in text and text.startswith("a\n") and text.endswith("\nc\n")
    assert "5x (≥ 5 met)" in text and "2.95x (≥ 3 **missed**)" in text and "2.5x (≤ 2.5 met)" in text
    assert "2 of 3 goals met" in text and "(results/cpu-a.png)" in text and "| CE 512 | 512 | float32 | b |" in text


def test_report_draws(tmp_path):
    pytest.importorskip("matplotlib")
    for name, data, plot in ("cpu", CPU, reports.plot_cpu), ("gpu", GPU, reports.plot_gpu):
        pictures = []
        for i in range(2):
            plot(data, tmp_path / f"{name}{i}.png")
            pictures.append((tmp_path / f"{name}{i}.png").read_bytes())
        assert pictures[0] == pictures[1] and len(pictures[0]) > 1000


def test_environment_names_the_kernels():
    assert harness.environment()["isa"] == cece.build_info()["cpu_isa"]
