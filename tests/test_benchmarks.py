"""The benchmarks' arithmetic: what they report is what was measured. No test here looks at a clock."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

import cece

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import (  # noqa: E402
    bench_cross_entropy,
    cases,
    elsewhere,
    gpu,
    harness,
    in_cache,
    threads,
    vocabulary_parallel,
)
from benchmarks import report as reports  # noqa: E402

CASES = [case for case in cases.CASES if isinstance(case, harness.Case)]  # losses of logits alone
PAGE = "".join(f"a\n<!-- {name}:begin -->old<!-- {name}:end -->\n" for name in reports.SECTIONS) + "c\n"


def row(contender, ms, case="CE 8 x 4", which="both", **more):
    bytes_ = {"copy": 200}.get(contender, 300)
    measured = {"median_ms": ms, "iqr_ms": 0.0, "rounds": 5, "bytes": bytes_, "peak_bytes": 2**20}
    return {"case": case, "dtype": "float32", "pass": which, "contender": contender} | measured | more


CPU = {
    "cpu": "A CPU",
    "cores": 2,
    "threads": 2,
    "isa": "AVX2",
    "torch": "2",
    "jax": "1",
    "cece": "0",
    "date": "2000-01-01",
} | {
    "must": {"CE 8 x 4": {"eager": 5, "compile": 3, "XLA": 1, "copy": 2.5}},
    "rows": [
        row("cece", 2.0),
        row("cece AVX2", 3.0),
        row("XLA", 1.5),
        row("eager", 10.0),
        row("compile", 5.9),
        row("copy", 0.8),
        row("cece", 9, which="forward"),
    ],
}

SIMULATED = {"classes": 9, "date": "2000-01-01", "rows": []}


CACHE = CPU | {
    "isas": ["AVX512", "AVX2"],
    "must": {"A": {"forward": 0.25, "backward": 0.2}, "B": {"both": 0.6}},
    "copies": {"A": "copy", "B": "copy", "copy": "copy"},
    "empty": ["none"],
    "rows": [
        {"case": case, "isa": isa, "pass": which, "ns": ns * (1 + (isa == "AVX2"))}
        for case, passes in {"A": (0.25, 0.3), "B": (0.4, 0.3), "copy": (0.1,), "none": (2500, 1500)}.items()
        for isa in ("AVX512", "AVX2")
        for which, ns in zip(("forward", "backward"), passes, strict=False)
    ],
}
THREADS = CPU | {
    "threads": [1, 2],
    "rows": [
        {"case": "A", "pass": "both", "contender": contender, "threads": n, "median_ms": ms}
        for contender, times in {"cece": (4.0, 2.0), "eager": (6.0, 1.5)}.items()
        for n, ms in zip((1, 2), times, strict=True)
    ],
}


class StandIn:
    """A card for what writes a file about it."""

    def describe(self):
        return {"device": "A GPU", "driver": "1"}


@pytest.fixture
def gpu_results(tmp_path):
    """What benchmarks/gpu.py makes of the rows that its calls left: a peer is ahead, another one fails."""
    copy = {"copy_gbs": 4000.0, "read_gbs": 2000.0}
    entries = [{"copy": copy, "missing": {"liger": "No module"}}]
    for classes, (name, ms) in itertools.product(
        [1024, 4096], {"cece": 1.0, "eager": 1.0, "compile": 1.0, "fast": 0.5, "slow": None}.items()
    ):
        row = {"case": f"CE {250_000 // classes} x {classes}", "classes": classes, "dtype": "float32", "pass": "both"}
        row |= {"contender": name, "median_ms": ms, "peak_bytes": 2**20, "gbs": ms and 3.0 / ms}
        entries.append(row | {"error": None if ms else "ValueError: at most\n65536 | classes"})
    entries += [dict(entries[1], median_ms=9.0), entries[1], {"stopped": "before BCE: the time was up"}, {"copy": copy}]
    (tmp_path / "gpu-rows.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    gpu.collect(tmp_path, StandIn())
    (tmp_path / "gpu-rows.jsonl").unlink()
    assert "A GPU" in (tmp_path / "gpu-a-gpu.txt").read_text()
    return json.loads((tmp_path / "gpu-a-gpu.json").read_text())


def test_medians_and_quartiles():
    assert harness.summarize([5e-3, 1e-3, 2e-3, 3e-3, 4e-3]) == {"median_ms": 3.0, "iqr_ms": 2.0, "rounds": 5}


def test_contenders_take_turns_on_logits_written_anew():
    calls = []

    class Recorder(harness.Step):
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


def test_other_threads_come_to_rest_between_two_pools(monkeypatch):
    log = []

    class Recorder(harness.Step):
        def __init__(self, pool):
            self.pool = pool

        def turn(self, steps):
            log.append(self.pool)
            return 1.0, 1.0

    monkeypatch.setattr(harness.time, "sleep", lambda seconds: log.append("rest") or (seconds == harness.SPIN or 1 / 0))
    harness.alternate({name: Recorder(name[0]) for name in ("a1", "a2", "b1")}, seconds=0, least=2)
    assert log[-14:] == ["rest", "a", "a", "a", "rest", "b", "b"] * 2  # the first of each is not timed


def test_byte_model():
    logits, target = torch.zeros(8, 4), torch.zeros(8, dtype=torch.int64)
    assert harness.byte_model(logits, target) == {"forward": 192, "backward": 320, "both": 512}


def small(case):
    return harness.Case(**{**vars(case), "shape": (4, 6, 2, 3) if len(case.shape) == 4 else (8, 6)})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_contenders_compute_the_same(case):
    case = small(case)
    tensors = case.tensors()
    outcomes = {}
    for name in ("cece", "cece in place", "eager"):
        if name not in case.kinds():
            continue
        step = case.kinds()[name](case, *tensors)
        for _ in range(2):  # the second step must see the same logits again
            step.prepare()
            loss = step.forward()
            loss.backward()
            logits = step.not_a_leaf if name == "cece in place" else step.logits
            assert (step.logits.grad.data_ptr() == logits.data_ptr()) == (name == "cece in place")
            gradient, step.logits.grad = step.logits.grad.clone(), None
        outcomes[name] = loss.float(), gradient.float()
    close = {"rtol": 2e-2, "atol": 2e-3} if case.dtype == torch.bfloat16 else {}
    if "XLA" in case.kinds():
        outcomes["XLA"] = of_xla(case, tensors)
        assert abs(outcomes["XLA"][0] / outcomes["cece"][0] - 1) < 1e-4  # 16-bit logits in float32, too
    for loss, gradient in outcomes.values():
        torch.testing.assert_close(loss, outcomes["eager"][0], **close)
        torch.testing.assert_close(gradient, outcomes["eager"][1], **close)


def of_xla(case, tensors):
    """Its loss and gradient; where it compiles the loss alone, that is the same."""
    import numpy as np

    both, forward = (case.kinds()[name](case, *tensors) for name in ("XLA", "XLA forward"))
    for step in both, forward:
        step.prepare()
        step.forward()
    loss, gradient = both.result
    assert abs(loss - forward.result) <= 1e-6 * abs(loss)
    assert gradient.dtype.name == str(case.dtype).removeprefix("torch.")
    gradient = torch.from_numpy(np.array(gradient, dtype=np.float32))
    both.backward(None)
    assert both.result is None
    return torch.tensor(float(loss)), gradient if tensors[0].is_contiguous() else gradient.movedim(-1, 1)


def test_every_loss_of_logits_has_a_spelling_in_xla():
    pytest.importorskip("jax")
    assert [case.name for case in CASES if not {"XLA", "XLA forward"} <= case.kinds().keys()] == []


def test_ahead_of_all_is_a_goal_of_every_case():
    for case in cases.CASES:
        goals = harness.goals(case)
        assert goals["eager"] >= case.must.get("eager", 1) and goals["compile"] >= 1
        assert ("XLA" in goals) == ("XLA" in case.kinds())


def test_rows_of_a_case(monkeypatch):
    """Another instruction set takes its turns with the rest; who has one program for both passes has no backward."""
    monkeypatch.delitem(harness.CONTENDERS, "compile")
    monkeypatch.setattr(harness, "drop_free_memory", lambda: None)
    other, wrong = (elsewhere.Process(isa, threads=1) for isa in ("DEFAULT", "another"))
    try:
        rows = harness.measure(CASES[0], 0, [other])
        with pytest.raises(RuntimeError, match="run cece with another, it ran with DEFAULT"):
            monkeypatch.setattr(wrong, "process", other.process)
            wrong.step(CASES[0]).turn(1)
    finally:
        other.end()
    assert other.process.returncode == 0
    passes = {}
    for of in rows:
        passes.setdefault(of["contender"], []).append(of["pass"])
        assert 0 < of["median_ms"] < 6e4 and of["rounds"] == 5
        assert of["bytes"] == (
            10240 if of["contender"] == "copy" else {"forward": 6144, "both": 17408}.get(of["pass"], 11264)
        )
    all_three = {"cece", "cece in place", "eager", "cece DEFAULT"}
    assert {name for name, of in passes.items() if of == list(harness.PASSES)} == all_three
    others = {"copy": ["both"], "XLA": ["both"], "XLA forward": ["forward"]}
    assert all(of == others[name] for name, of in passes.items() if name not in all_three)


def test_instruction_sets_are_this_one_and_lesser_ones(monkeypatch):
    for isa, expected in {"AVX512": ["AVX512", "AVX2"], "AVX2": ["AVX2"], "DEFAULT": ["DEFAULT"]}.items():
        info = {"cpu_isas": ["AVX512", "AVX2", "DEFAULT"], "cpu_isa": isa}
        monkeypatch.setattr(cece, "build_info", lambda info=info: info)
        assert elsewhere.isas() == expected


def test_in_cache(monkeypatch, tmp_path):
    """Every case, in a process of its own."""
    monkeypatch.setattr(elsewhere, "isas", lambda: ["DEFAULT"])
    out = tmp_path / "cache-x.json"
    in_cache.main(["--quick", "--out", str(out)])
    data = json.loads(out.read_text())
    names = [case.name for case in in_cache.CASES + in_cache.EMPTY]
    of = {}
    for row in data["rows"]:
        of.setdefault(row["case"], {})[row["isa"], row["pass"]] = row["ns"]
    assert list(of) == names
    assert {len(passes) for name, passes in of.items() if "copy" not in name} == {2}
    assert all(0 < ns < 1e9 for passes in of.values() for ns in passes.values())
    short, wide = "CE 6000 x 21, bf16", "CE 6000 x 21"
    assert data["must"][short]["backward"] == 1.2 * of[wide]["DEFAULT", "backward"]
    assert reports.cache_table(data).count("\n| ") == len(in_cache.CASES) + 1


def test_the_least_time_counts(monkeypatch):
    times = [{"A": {"forward": 3, "backward": 1}}, {"A": {"forward": 2, "backward": 4}}]
    assert in_cache.least_of(times) == {"A": {"forward": 2, "backward": 1}}
    calls = []
    ticks = itertools.accumulate(itertools.cycle([1, 27, 1, 30]))
    monkeypatch.setattr(in_cache.time, "perf_counter_ns", lambda: next(ticks))
    assert in_cache.least(lambda: calls.append(1), seconds=0, calls=3) == 9 and len(calls) == 60


def test_in_cache_times_are_of_an_element_or_of_an_empty_call(monkeypatch):
    used = torch.get_num_threads()
    monkeypatch.setattr(in_cache, "least", lambda call, seconds, calls: 128000.0 * calls)
    try:
        times = in_cache.measure(seconds=0)
    finally:
        torch.set_num_threads(used)
    assert times["CE 4 x 32000"] == {"forward": 1, "backward": 1} and times["copy, f32"] == {"forward": 1}
    assert times["BCE 0 x 1000"] == {"forward": 12.8e6, "backward": 12.8e6}


def test_threads(tmp_path):
    used = torch.get_num_threads()
    out = tmp_path / "threads-x.json"
    try:
        rows = threads.main(["--quick", "--only", "128 x 10", "--out", str(out)])
    finally:
        torch.set_num_threads(used)
    data = json.loads(out.read_text())
    assert data["threads"][-1] == used and data["rows"] == rows
    assert {(row["contender"], row["threads"]) for row in rows} == set(
        itertools.product(("cece", "eager"), data["threads"])
    )
    assert "CE 128 x 10" in reports.threads_table(data)

    class Recorder(harness.Step):
        def __init__(self):
            self.seen = []

        def prepare(self):
            self.seen.append(torch.get_num_threads())

        forward, backward = (lambda self: None), (lambda self, loss: None)

    step = threads.on(used + 1, Recorder)()
    try:
        step.turn(3)
    finally:
        torch.set_num_threads(used)
    assert step.seen == [used + 1] * 4  # the first is not timed
    assert [threads.numbers(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]
    assert threads.NAMES.keys() <= {case.name for case in CASES}


def test_peak_memory_sees_a_gradient_and_what_is_kept_of_it():
    case = harness.Case("a", "cross_entropy", (512, 8192), bench_cross_entropy.labels)  # 16 MiB
    step = harness.CONTENDERS["cece"](case, *case.tensors())
    step.turn(2)  # cece now keeps a block of this size
    peak = step.peak_memory()
    if peak["both"] is None:
        pytest.skip("no /proc/self/clear_refs")
    assert peak["forward"] < 4 * 2**20 and 15 * 2**20 < peak["both"] < 24 * 2**20


def run_interrupted(monkeypatch, out, at):
    """The benchmarks with Ctrl-C in case number `at`; what was in the file before each case."""
    seen = []

    def measure(case, seconds, others):
        seen.append(json.loads(out.read_text()) if out.exists() else None)
        if len(seen) == at:
            raise KeyboardInterrupt
        return [row("cece", 1.0, case.name), row("eager", 2.0, case.name)]

    monkeypatch.setattr(harness, "measure", measure)
    if at > len(CASES):
        harness.main(CASES, ["--out", str(out)])
    else:
        with pytest.raises(SystemExit) as end:
            harness.main(CASES, ["--out", str(out)])
        assert end.value.code == 130
    return seen


def test_results_are_written_after_each_case_and_kept_on_ctrl_c(monkeypatch, tmp_path, capsys):
    out = tmp_path / "a" / "cpu-x.json"
    seen = run_interrupted(monkeypatch, out, at=3)
    assert seen[0] is None and [len(content["rows"]) for content in seen[1:]] == [2, 4]
    content = json.loads(out.read_text())
    assert len(content["rows"]) == 4 and content["left_out"] == len(CASES) - 2 and content["isa"]
    printed = capsys.readouterr().out
    assert [f"{i}/{len(CASES)}  {CASES[i - 1].name}" in printed for i in (1, 2, 3, 4)] == [True, True, True, False]
    assert printed.endswith(f"interrupted after 2 of {len(CASES)} cases\n")
    assert f"Interrupted: {len(CASES) - 2} cases were not measured." in reports.cpu_report(content)
    assert [f.name for f in out.parent.iterdir()] == ["cpu-x.json"]


def test_a_whole_run_leaves_nothing_out(monkeypatch, tmp_path):
    out = tmp_path / "cpu-x.json"
    run_interrupted(monkeypatch, out, at=len(CASES) + 1)
    content = json.loads(out.read_text())
    assert "left_out" not in content and len(content["rows"]) == 2 * len(CASES)
    assert "Interrupted" not in reports.cpu_report(content)


def test_report_judges_and_is_idempotent(tmp_path, gpu_results):
    results, page = tmp_path / "results", tmp_path / "README.md"
    results.mkdir()
    page.write_text(PAGE)
    assert reports.report(results, [page], plots=False) == [page]
    assert page.read_text().count("Not yet measured.") == len(reports.SECTIONS)

    (results / "cpu-a.json").write_text(json.dumps(CPU))
    (results / "cache-a.json").write_text(json.dumps(CACHE))
    (results / "threads-a.json").write_text(json.dumps(THREADS))
    (results / "gpu-b.json").write_text(json.dumps(gpu_results))
    (results / "ranks-c.json").write_text(json.dumps(SIMULATED))
    assert reports.report(results, [page], plots=False) == [page]
    assert reports.report(results, [page], plots=False) == []
    text = page.read_text()
    assert "Not yet measured." not in text and text.startswith("a\n") and text.endswith("\nc\n")
    assert "5x (\u2265 5 met)" in text and "2.95x (\u2265 3 **missed**)" in text and "2.5x (\u2264 2.5 met)" in text
    assert "0.75x (\u2265 1 **missed**)" in text and "| CE 8 x 4 | 2 | 3 | 1.5x |" in text  # XLA, AVX2
    assert "torch 2, jax 1, cece 0" in text and "2 of 4 goals met" in text and "(results/cpu-a.png)" in text
    assert "| A | 4 ms, 1.5x | 2 ms, 0.75x, **eager is ahead** |" in text and "1 of 2 met" in text
    in_copies = "0.250 (\u2264 0.25 met), 2.5x | 0.300 (\u2264 0.20 **missed**), 3.0x | 0.550, 5.5x"
    assert f"| A | {in_copies} | 0.500 / 0.600 |" in text and "1 of 3 goals met" in text
    assert "0.700 (\u2264 0.60 **missed**)" in text and "none 2.5 + 1.5 \u00b5s" in text
    assert "| CE 61 x 4096 | float32 | fast | 0.5 | 6 | 0 % | 1 |" in text
    assert "slow ValueError: at most 65536 | classes" in text and "Not there: liger (No module)" in text
    assert "before BCE: the time was up" in text

    page.write_text(PAGE.replace("cpu-report", "other"))
    with pytest.raises(SystemExit, match="no page has the markers of cpu-report"):
        reports.report(results, [page], plots=False)
    assert "old" in page.read_text()


def test_few_rows_name_who_is_ahead(gpu_results):
    times = {"A": {"cece": 2.0, "cece in place": 1.0, "eager": 9.0, "compile": 3.0}, "B": {"cece": 4.0, "compile": 3.0}}
    words = {"A": "first", "B": "second", "C": "not measured"}
    assert reports.few(times, words).splitlines()[2:] == [
        "| first | 9 | 3 | 2 | 4.5x / 1.5x |",
        "| second | - | 3 | 4 | - / 0.75x, torch.compile is ahead |",
    ]
    times["B"]["XLA"] = 1.0
    assert reports.few(times, words).splitlines()[3] == (
        "| second | - | 3 | 1 | 4 | - / 0.75x / 0.25x, torch.compile is ahead, XLA is ahead |"
    )
    of_gpu = reports.gpu_few(gpu_results)
    assert "| cross_entropy, 1024 classes | 1 | 1 | 1 | 1x / 1x, fast is ahead |" in of_gpu and "slow" not in of_gpu


def test_bars_are_as_long_as_times():
    plot = reports.bars({"A": {"cece": 1.0, "eager": 8.0, "compile": 5.0}}, ["A", "B"], {"A": "first"}, width=10)
    full = "\u2588"
    assert plot.splitlines() == [
        "```text",
        "first",
        f"  torch         {full * 10} 8 ms",
        f"  torch.compile {full * 6}\u258e 5 ms",
        f"  cece          {full}\u258e 1 ms",
        "```",
    ]


def test_the_memorys_limit_is_drawn():
    """A copy moves 200 bytes in 0.8 ms, so 300 take 1.2."""
    rows = [row("cece", 2.0), row("copy", 0.8), row("cece", 4.0, "large"), row("copy", 0.8, "large")]
    for of in rows[2:]:
        of["bytes"] *= 2**20
    data = CPU | {"rows": rows}
    assert reports.limit(reports.by_case(rows)["CE 8 x 4"]) == pytest.approx(1.2)
    lines = [line for line in reports.cpu_light(data).splitlines() if line.endswith(" ms")]
    assert len(lines) == 1 and lines[0].startswith("large") and lines[0].endswith(" 30 %  of 1.2 ms")
    assert lines[0].count("\u2588") == 9  # of 32
    plot = reports.bars({"A": {"cece": 2.0, "limit": 1.0}}, ["A"], {"A": "first"}, width=4)
    assert plot.splitlines()[2:4] == [
        "  cece          \u2588\u2588\u2588\u2588 2 ms",
        "  memory alone  \u2588\u2588 1 ms",
    ]


def test_pages_show_what_was_measured():
    """No figure in README or the benchmark page is by hand: made anew from the JSON files, they are the same."""
    files = {kind: reports.load(reports.RESULTS, kind) for kind in reports.KINDS}
    assert reports.rewritten(files) == {page: page.read_text() for page in reports.PAGES}


def test_readme_shows_the_newest_file():
    files = [(name, CPU | {"date": date, "cpu": name}) for name, date in (("a", "2001-01-01"), ("b", "2000-01-01"))]
    for order in files, files[::-1]:
        assert "a (AVX2)" in reports.SECTIONS["cpu-table"](order, None)


def test_report_draws(tmp_path, gpu_results):
    pytest.importorskip("matplotlib")
    for name, data, plot in ("cpu", CPU, reports.plot_cpu), ("gpu", gpu_results, reports.plot_gpu):
        pictures = []
        for i in range(2):
            plot(data, tmp_path / f"{name}{i}.png")
            pictures.append((tmp_path / f"{name}{i}.png").read_bytes())
        assert pictures[0] == pictures[1] and len(pictures[0]) > 1000


def test_ranks_are_simulated():
    """Bytes are those of the tensors, errors no greater than of one process; 10 shards of 9 classes: one is empty."""
    rows = list(vocabulary_parallel.measure(classes=9, tokens=4, ranks=(10,)))
    assert [r["leaves"] for r in rows] == [16, 20, 32, 28]
    assert [r["sends"] for r in rows] == [9 * n for n in (16, 20, 32, 28)]
    assert [r["logits_f32"] for r in rows] == [4 * 9, 4 * 9, 4 * 9, 8 * 9]
    assert all(r["error"] < 1e-6 for r in rows)
    table = reports.ranks_table(SIMULATED | {"rows": rows})
    assert table.splitlines()[4].startswith("| cross_entropy, 10 ranks | 16 | 144 | 22 | 18 | 36 |")


def test_environment_names_the_kernels():
    assert harness.environment()["isa"] == cece.build_info()["cpu_isa"]
