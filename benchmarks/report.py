"""Tables and plots from the JSON files under benchmarks/results: python -m benchmarks.report

Each page has some of SECTIONS, between markers such as ``<!-- cpu-table:begin -->`` and ``<!-- cpu-table:end -->``:
README.md a few rows and a plot in text of the newest file of its kind, benchmarks/README.md everything of every file,
whose plot goes beside it, as .png. Run it again and nothing changes.
The sections are plain Python; the plots need matplotlib.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PAGES = Path(__file__).parent.parent / "README.md", Path(__file__).parent / "README.md"
COLOURS = {
    "cece": "#1f5fa8",
    "cece in place": "#5bb0d9",
    "eager": "#e8a33d",
    "compile": "#7a9a4b",
    "torch.compile": "#7a9a4b",
    "XLA": "#b03a6b",
    "liger": "#b03a6b",
    "quack": "#6a4fa3",
    "limit": "#9a9a9a",
}


# What README shows: a case's name in the JSON file, and in words.
FEW = {
    "cpu": {
        "CE 128 x 10": "cross_entropy, 128 x 10",
        "CE 8192 x 1000": "cross_entropy, 8192 x 1000",
        "CE 1024 x 32000": "cross_entropy, 1024 x 32000",
        "CE 8 x 21 x 256 x 256": "cross_entropy, 8 x 21 x 256 x 256",
        "BCE 8192 x 1000": "binary_cross_entropy_with_logits, 8192 x 1000",
    },
    "gpu": {
        "CE, float32, 1024": "cross_entropy, 1024 classes",
        "CE, bfloat16, 32768": "cross_entropy, 32768 classes, bfloat16",
        "CE, bfloat16, 131072": "cross_entropy, 131072 classes, bfloat16",
        "CE, probabilities, bfloat16, 32768": "cross_entropy, probabilities of 32768 classes, bfloat16",
        "BCE, float32, 1024": "binary_cross_entropy_with_logits, 1024 classes",
    },
}
PLOTTED = "CE 8192 x 1000", "CE 1024 x 32000", "BCE 8192 x 1000"
OURS = {"cece": "cece", "limit": "memory alone"}
OTHERS = {"eager": "torch", "compile": "torch.compile", "XLA": "XLA"}


# ---- both


def load(results, kind):
    """[(file, its content)], by name."""
    return [(file, json.loads(file.read_text())) for file in sorted(results.glob(f"{kind}-*.json"))]


def newest(files):
    return max(files, key=lambda file: date(file[1]))[1]


def date(data):
    return data["date"]


def whole(data):
    """What to add where the run was interrupted."""
    return f" Interrupted: {data['left_out']} cases were not measured." if data.get("left_out") else ""


def by_case(rows, which="both"):
    """{case: {contender: row}} of one pass, in the file's order."""
    cases = {}
    for row in rows:
        if row["pass"] == which:
            cases.setdefault(row["case"], {})[row["contender"]] = row
    return cases


def table(header, rows):
    rows = [[" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in rows]
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(ms):
    return f"{ms:.3g}" if ms < 100 else f"{ms:.0f}"


def factor(ratio):
    return f"{ratio:.2g}x" if ratio < 100 else f"{ratio:.0f}x"


def megabytes(row):
    return "" if row is None or row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"


# ---- CPU


def ratio(contender, row, cece):
    """How many times faster cece is; against the copy, how many times slower."""
    if row is None:
        return None
    return cece["median_ms"] / row["median_ms"] if contender == "copy" else row["median_ms"] / cece["median_ms"]


def met(contender, value, goal):
    return value is not None and (value <= goal if contender == "copy" else value >= goal)


def judged(contender, value, goal):
    """The ratio and, where there is a goal, whether it is met."""
    if value is None:
        return "not measured" if goal else ""
    if goal is None:
        return f"{value:.3g}x"
    sign = "≤" if contender == "copy" else "≥"
    return f"{value:.3g}x ({sign} {goal:g} {'met' if met(contender, value, goal) else '**missed**'})"


def cpu_head(data):
    return (
        f"{data['cpu']} ({data['isa']}), {data['threads']} threads of {data['cores']} cores, torch {data['torch']},"
        f"{' jax ' + data['jax'] + ',' if data.get('jax') else ''} cece {data['cece']}, {data['date']}."
    )


def cpu_times(data):
    """{case: {contender: ms}}; neither the copy nor another instruction set is a contender."""
    cases = by_case(data["rows"]).items()
    names = ("cece", "cece in place", *OTHERS)
    return {case: {c: of[c]["median_ms"] for c in names if c in of} for case, of in cases}


def cpu_report(data):
    rows, goals, reached = [], 0, 0
    for case, of in by_case(data["rows"]).items():
        cece, must = of["cece"], data["must"].get(case, {})
        ratios = {c: ratio(c, of.get(c), cece) for c in (*OTHERS, "copy")}
        goals += len(must)
        reached += sum(met(c, ratios[c], goal) for c, goal in must.items())
        times = [number(of[c]["median_ms"]) if c in of else "-" for c in ("cece", "cece in place", *OTHERS)]
        peaks = [megabytes(of.get(c)) for c in ("cece", "eager", "compile")]
        rows.append([case, *times, *(judged(c, r, must.get(c)) for c, r in ratios.items()), " / ".join(peaks)])
    header = "case, cece ms, in place ms, eager ms, compile ms, XLA ms, eager / cece, compile / cece, XLA / cece"
    header += ", cece / copy, peak MiB"
    return f"{cpu_head(data)} {reached} of {goals} goals met.{whole(data)}\n\n{table(header.split(', '), rows)}"


def cpu_isas(data):
    """cece's time with each instruction set that was measured."""
    cases = by_case(data["rows"])
    lesser = sorted({c for of in cases.values() for c in of if c.startswith("cece ")} - {"cece in place"})
    rows = []
    for case, of in cases.items():
        ms = of["cece"]["median_ms"]
        cells = ((number(of[c]["median_ms"]), f"{of[c]['median_ms'] / ms:.3g}x") if c in of else "--" for c in lesser)
        rows.append([case, number(ms), *(text for pair in cells for text in pair)])
    names = (c.removeprefix("cece ") for c in lesser)
    header = ["case", f"{data['isa']} ms", *(text for n in names for text in (f"{n} ms", f"{n} / {data['isa']}"))]
    return f"{cpu_head(data)}\n\n{table(header, rows)}" if lesser else "Not yet measured."


def limit(of):
    """The least milliseconds that the byte model allows at the copy's bandwidth."""
    return of["copy"]["median_ms"] * of["cece"]["bytes"] / of["copy"]["bytes"]


def cpu_light(data):
    """How near to that limit each case is that moves more than a megabyte."""
    lines = []
    for case, of in by_case(data["rows"]).items():
        if "copy" in of and of["cece"]["bytes"] > 2**20:
            part = limit(of) / of["cece"]["median_ms"]
            lines.append(f"{case:42} {bar(min(part, 1), 32):32} {100 * part:3.0f} %  of {number(limit(of))} ms")
    return "\n".join([f"{cpu_head(data)}\n\n```text", *lines, "```"])


def plot_cpu(data, path):
    """Bars: time against cece's, and the least time that the byte model allows at the copy's bandwidth."""
    cases, widest = by_case(data["rows"]), 20  # longer bars are cut, their number stays
    figure, grid = new_figure(10, 1.5 + 0.75 * len(cases))
    axes = grid[0, 0]
    for place, of in enumerate(cases.values()):
        cece = of["cece"]
        bars = {name: of[name]["median_ms"] for name in OTHERS if name in of} | {"cece": cece["median_ms"]}
        if "copy" in of:
            bars["limit"] = limit(of)
        for i, (name, ms) in enumerate(bars.items()):
            value, y = ms / cece["median_ms"], place + 0.17 * (i - 2)
            axes.barh(y, min(value, widest), height=0.16, color=COLOURS[name], label=name if place == 0 else None)
            axes.text(min(value, widest), y, f" {value:.2f}x, {number(ms)} ms", va="center", fontsize=6.5)
    axes.set_yticks(range(len(cases)), list(cases), fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.14, y=0.01)
    axes.set_xlabel("time / cece's time, forward + backward   (limit: the byte model at the bandwidth of a warm copy)")
    axes.set_title(f"{data['cpu']}, {data['threads']} threads, torch {data['torch']}", fontsize=10)
    axes.legend(loc="lower right", fontsize=8)
    save(figure, path)


# ---- from one thread to all cores


def threads_table(data):
    """cece's time with each number of threads, and how many times faster than eager's with as many it is."""
    counts = data["threads"]
    cells, missed = {}, 0
    for row in data["rows"]:
        cells.setdefault(row["case"], {})[row["contender"], row["threads"]] = row["median_ms"]
    rows = []
    for case, of in cells.items():
        ratios = [of["eager", n] / of["cece", n] for n in counts]
        missed += sum(r < 1 for r in ratios)
        behind = ["" if r >= 1 else ", **eager is ahead**" for r in ratios]
        times = (f"{number(of['cece', n])} ms, {factor(r)}{b}" for n, r, b in zip(counts, ratios, behind, strict=True))
        rows.append([case, *times])
    header = ["case", *(f"{n} thread{'s' * (n > 1)}" for n in counts)]
    goals = len(rows) * len(counts)
    cores = f"{data['cores']} cores, torch {data['torch']}, cece {data['cece']}, {data['date']}"
    return (
        f"{table(header, rows)}\n\n{data['cpu']} ({data['isa']}), {cores}. Goal: eager is nowhere ahead,"
        f" {goals - missed} of {goals} met.{whole(data)}"
    )


# ---- in cache


def in_copies(ns, copy, goal):
    if ns is None:
        return "-"
    verdict = "" if goal is None else f" (≤ {goal:.2f} {'met' if ns <= goal else '**missed**'})"
    return f"{ns:.3f}{verdict}, {ns / copy:.1f}x"


def cache_table(data):
    """ns an element, each beside its goal and in copies; the goals are of the best instruction set."""
    of, passes, rows = {}, ("forward", "backward"), []
    for row in data["rows"]:
        of.setdefault(row["case"], {})[row["isa"], row["pass"]] = row["ns"]
    best, *lesser = data["isas"]
    for case, times in of.items():
        if case in data["empty"]:
            continue
        must, copy = data["must"].get(case, {}), of[data["copies"][case]][best, "forward"]
        measured = {p: times[best, p] for p in passes if (best, p) in times}
        measured["both"] = sum(measured.values())
        rows.append([case, *(in_copies(measured.get(p), copy, must.get(p)) for p in (*passes, "both"))])
        rows[-1] += [" / ".join(f"{times[isa, p]:.3f}" for p in passes if (isa, p) in times) for isa in lesser]
    goals, missed = sum(map(len, data["must"].values())), str(rows).count("**missed**")
    header = ["case", *(f"{best} {p}, / copy" for p in (*passes, "both")), *(f"{isa} fwd / bwd" for isa in lesser)]
    fixed = "; ".join(
        f"{case} {' + '.join(f'{of[case][best, p] / 1e3:.1f}' for p in passes if (best, p) in of[case])} µs"
        for case in data["empty"]
    )
    head = f"{data['cpu']}, one thread, torch {data['torch']}, cece {data['cece']}, {data['date']}."
    fixed = f"The fixed cost of a call, part of every time above, is that of one without elements: {fixed}."
    return f"{table(header, rows)}\n\n{head} {goals - missed} of {goals} goals met. {fixed}"


# ---- GPU


def gpu_head(data):
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    where = f"{data['device']}, driver {data['driver']}, {versions}, {date(data)}"
    return f"{where}. A copy reaches {data['copy_gbs']:.0f} GB/s."


def gpu_case(row):
    """A row's case without its size: "CE, smoothing" of "CE, smoothing 488281 x 1024"."""
    return row["case"].rsplit(" ", 3)[0]


def gpu_times(data):
    """{case: {contender: ms}}"""
    cases = {}
    for row in data["rows"]:
        key = f"{gpu_case(row)}, {row['dtype']}, {row['classes']}"
        cases.setdefault(key, {})[row["contender"]] = row["median_ms"]
    return cases


def gpu_report(data):
    rows = [
        [row["case"], row["dtype"], row["contender"], number(row["median_ms"]), f"{row['gbs']:.0f}"]
        + [f"{row['percent_of_copy']:.0f} %", megabytes(row)]
        for row in data["rows"]
    ]
    missing = "".join(f" Not there: {name} ({why})." for name, why in data["missing"].items())
    failed = "".join(f"\n- failed: {' '.join(line.split())}" for line in [*data["failed"], *data["stopped"]])
    header = "case, dtype, contender, ms, GB/s, of copy, peak MiB"
    return f"{gpu_head(data)}{missing}\n\n{table(header.split(', '), rows)}" + (f"\n{failed}" if failed else "")


def plot_gpu(data, path):
    """GB/s of the byte model against the number of classes: a panel for each loss and dtype, a line a contender."""
    panels = {}
    for row in data["rows"]:
        lines = panels.setdefault(f"{gpu_case(row)}, {row['dtype']}", {})
        lines.setdefault(row["contender"], {})[row["classes"]] = row["gbs"]
    panels = {title: lines for title, lines in panels.items() if max(map(len, lines.values())) > 1}
    if not panels:
        return
    columns = min(2, len(panels))
    figure, grid = new_figure(6.5 * columns, 4.2 * -(-len(panels) // columns), -(-len(panels) // columns), columns)
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    for axes, (title, lines) in zip(grid.flat, panels.items(), strict=False):
        for contender, points in lines.items():
            colour = {"color": COLOURS[contender]} if contender in COLOURS else {}
            axes.plot(*zip(*sorted(points.items()), strict=True), marker="o", markersize=4, label=contender, **colour)
        axes.axhline(data["copy_gbs"], color="#555555", linestyle="--", linewidth=1, label="copy")
        classes = sorted({c for points in lines.values() for c in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(classes, [str(c) for c in classes], fontsize=8, rotation=30)
        axes.set_ylim(0, 1.08 * max(data["copy_gbs"], *(gbs for points in lines.values() for gbs in points.values())))
        axes.set(title=f"{data['device']}: {title}", xlabel="classes", ylabel="GB/s, forward + backward")
    named = {name: line for axes in grid.flat for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=len(named), fontsize=9)
    save(figure, path)


# ---- where it goes


def new_figure(width, height, rows=1, columns=1):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)


def save(figure, path):
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=110, metadata={"Software": None})  # the same picture is the same file
    plt.close(figure)


# ---- README's few rows


def few(times, cases):
    """A row for each case that was measured, a column for whoever took part. Who is faster than cece is named."""
    took_part = {c: name for c, name in OTHERS.items() if any(c in of for of in times.values())}
    rows = []
    for case, words in cases.items():
        if "cece" in (of := times.get(case, {})):
            ratios = {c: ms / of["cece"] for c, ms in of.items() if c not in ("cece", "cece in place")}
            ahead = [f"{OTHERS.get(c, c)} is ahead" for c, r in ratios.items() if r < 1]
            faster = " / ".join(factor(ratios[c]) if c in ratios else "-" for c in took_part)
            cells = (number(of[c]) if c in of else "-" for c in (*took_part, "cece"))
            rows.append([words, *cells, ", ".join([faster, *ahead])])
    names = " / ".join(took_part.values()).replace("torch.", "")
    header = ["case", *(f"{name} ms" for name in (*took_part.values(), "cece")), f"times as fast as {names}"]
    return table(header, rows)


def bar(part, width):
    eighths = max(1, round(8 * width * part))
    return "\u2588" * (eighths // 8) + " \u258f\u258e\u258d\u258c\u258b\u258a\u2589"[eighths % 8].strip()


def bars(times, cases, words, width=40):
    """The cases' times as a plot in text, which shows wherever text does."""
    lines = []
    for case in (c for c in cases if c in times):
        of = {name: times[case][c] for c, name in {**OTHERS, **OURS}.items() if c in times[case]}
        lines += [words[case]] if not lines else ["", words[case]]
        lines += [f"  {name:13} {bar(ms / max(of.values()), width)} {number(ms)} ms" for name, ms in of.items()]
    return "\n".join(["```text", *lines, "```"])


# ---- where it goes. A section is made from the files of its kind.


def newest_of(make):
    return lambda files, page: make(newest(files))


def all_of(make):
    """Each file's report, and its plot."""

    def section(files, page):
        parts = []
        for file, data in files:
            picture = Path(os.path.relpath(file.with_suffix(".png"), page.parent)).as_posix()
            parts.append(f"{make(data)}\n\n![{file.stem}]({picture})")
        return "\n\n".join(parts)

    return section


def cpu_few(data):
    return f"{few(cpu_times(data), FEW['cpu'])}\n\n{cpu_head(data)}"


def gpu_few(data):
    return f"{few(gpu_times(data), FEW['gpu'])}\n\n{gpu_head(data)}"


def cpu_bars(data):
    """With them the limit: what the memory alone would take."""
    rows = by_case(data["rows"])
    times = {
        case: of | ({"limit": limit(rows[case])} if "copy" in rows[case] else {})
        for case, of in cpu_times(data).items()
    }
    return bars(times, PLOTTED, FEW["cpu"])


# ---- ranks that share the classes (vocabulary_parallel.py)


def ranks_table(data):
    def bytes_(n):
        return f"{n:,.0f}" if n < 1e4 else f"{n / 1024:,.0f} Ki"

    rows = []
    for r in data["rows"]:
        errors = f"{r['error']:.1e} / {r['error_alone']:.1e}"
        rows.append([f"{r['loss']}, {r['ranks']} ranks", *(bytes_(r[k]) for k in SENT), errors])
    header = ["loss", "leaves", "all-gather sends", "two all-reduces", "bfloat16 logits", "float32 logits"]
    head = f"{data['classes']} classes, float32, {data['date']}."
    return f"{head}\n\n{table([*header, 'error / of one process'], rows)}"


SENT = "leaves", "sends", "reduces", "logits_bf16", "logits_f32"
PLOTS = {"cpu": plot_cpu, "gpu": plot_gpu, "ranks": None}
SECTIONS = {
    "cpu-plot": newest_of(cpu_bars),
    "cpu-table": newest_of(cpu_few),
    "threads-table": newest_of(threads_table),
    "cache-table": newest_of(cache_table),
    "gpu-table": newest_of(gpu_few),
    "cpu-report": all_of(cpu_report),
    "cpu-light": newest_of(cpu_light),
    "cpu-isas": newest_of(cpu_isas),
    "gpu-report": all_of(gpu_report),
    "ranks-table": newest_of(ranks_table),
}
KINDS = {section.split("-")[0] for section in SECTIONS}
MARKED = re.compile(rf"(<!-- ({'|'.join(SECTIONS)}):begin -->)(.*?)(<!-- \2:end -->)", re.DOTALL)


def rewritten(files, pages=PAGES):
    """{page: its text with every section made anew}"""
    missing, texts = set(SECTIONS), {}
    for page in pages:

        def section(match, page=page):
            begin, name, _, end = match.groups()
            missing.discard(name)
            of_kind = files[name.split("-")[0]]
            return f"{begin}\n{SECTIONS[name](of_kind, page) if of_kind else 'Not yet measured.'}\n{end}"

        texts[page] = MARKED.sub(section, page.read_text())
    if missing:
        raise SystemExit(f"report: no page has the markers of {', '.join(sorted(missing))}")
    return texts


def report(results=RESULTS, pages=PAGES, plots=True):
    """Rewrites the pages' sections and the plots; the pages that changed."""
    files = {kind: load(results, kind) for kind in KINDS}
    for kind, plot in PLOTS.items() if plots else ():
        for file, data in files[kind] if plot else ():
            plot(data, file.with_suffix(".png"))
    changed = {page: text for page, text in rewritten(files, pages).items() if text != page.read_text()}
    for page, text in changed.items():
        page.write_text(text)
    return list(changed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--no-plots", action="store_true", help="sections only: needs no matplotlib")
    args = parser.parse_args()
    changed = report(args.results, plots=not args.no_plots)
    print("rewritten:", ", ".join(map(str, changed)) or "nothing, all was up to date", file=sys.stderr)
