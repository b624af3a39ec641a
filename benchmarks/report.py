"""Tables and plots from the JSON files under benchmarks/results: python -m benchmarks.report [--readme README.md]

The tables of the files cpu-*.json go between README's markers ``<!-- cpu-table:begin -->`` and
``<!-- cpu-table:end -->``, those of gpu-*.json between ``gpu-table``'s; the plot of a file goes beside it, as .png.
Run it again and nothing changes.
The table is plain Python; the plots need matplotlib.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
COLOURS = {
    "cece": "#1f5fa8",
    "cece in place": "#5bb0d9",
    "eager": "#e8a33d",
    "compile": "#7a9a4b",
    "liger": "#b03a6b",
    "quack": "#6a4fa3",
    "limit": "#9a9a9a",
}


# ---- both


def load(results, kind):
    """[(file, its content)], by name."""
    return [(file, json.loads(file.read_text())) for file in sorted(results.glob(f"{kind}-*.json"))]


def by_case(rows, which="both"):
    """{case: {contender: row}} of one pass, in the file's order."""
    cases = {}
    for row in rows:
        if row["pass"] == which:
            cases.setdefault(row["case"], {})[row["contender"]] = row
    return cases


def table(header, rows):
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(ms):
    return f"{ms:.3g}" if ms < 100 else f"{ms:.0f}"


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


def cpu_table(data):
    rows, goals, reached = [], 0, 0
    for case, of in by_case(data["rows"]).items():
        cece, must = of["cece"], data["must"].get(case, {})
        ratios = {c: ratio(c, of.get(c), cece) for c in ("eager", "compile", "copy")}
        goals += len(must)
        reached += sum(met(c, ratios[c], goal) for c, goal in must.items())
        times = [number(of[c]["median_ms"]) if c in of else "" for c in ("cece", "cece in place", "eager", "compile")]
        peaks = [megabytes(of.get(c)) for c in ("cece", "eager", "compile")]
        rows.append([case, *times, *(judged(c, r, must.get(c)) for c, r in ratios.items()), " / ".join(peaks)])
    header = "case, cece ms, in place ms, eager ms, compile ms, eager / cece, compile / cece, cece / copy, peak MiB"
    return "\n\n".join(
        [
            f"{data['cpu']} ({data['isa']}), {data['threads']} threads of {data['cores']} cores, torch {data['torch']},"
            f" cece {data['cece']}, {data['date']}. {reached} of {goals} goals met.",
            table(header.split(", "), rows),
            "Forward + backward (the gradient's release included) of one step, medians of alternating rounds."
            " copy: one warm copy of the logits. peak: resident memory beyond the inputs, of cece / eager / compile;"
            " in place it is what forward needs.",
        ]
    )


def plot_cpu(data, path):
    """Bars: time against cece's, and the least time that the byte model allows at the copy's bandwidth."""
    cases, widest = by_case(data["rows"]), 20  # longer bars are cut, their number stays
    figure, grid = new_figure(10, 1.5 + 0.62 * len(cases))
    axes = grid[0, 0]
    for place, of in enumerate(cases.values()):
        cece, copy = of["cece"], of.get("copy")
        bars = {name: of[name]["median_ms"] for name in ("eager", "compile") if name in of} | {
            "cece": cece["median_ms"]
        }
        if copy:
            bars["limit"] = copy["median_ms"] * cece["bytes"] / copy["bytes"]
        for i, (name, ms) in enumerate(bars.items()):
            value, y = ms / cece["median_ms"], place + 0.2 * (i - 1.5)
            axes.barh(y, min(value, widest), height=0.19, color=COLOURS[name], label=name if place == 0 else None)
            axes.text(min(value, widest), y, f" {value:.2f}x, {number(ms)} ms", va="center", fontsize=6.5)
    axes.set_yticks(range(len(cases)), list(cases), fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.14, y=0.01)
    axes.set_xlabel("time / cece's time, forward + backward   (limit: the byte model at the bandwidth of a warm copy)")
    axes.set_title(f"{data['cpu']}, {data['threads']} threads, torch {data['torch']}", fontsize=10)
    axes.legend(loc="lower right", fontsize=8)
    save(figure, path)


# ---- GPU


def gpu_table(data):
    rows = []
    for case, of in by_case(data["rows"]).items():
        for contender, row in of.items():
            measured = [
                number(row["median_ms"]),
                f"{row['gbs']:.0f}",
                f"{row['percent_of_copy']:.0f} %",
                megabytes(row),
            ]
            rows.append([case, str(row["classes"]), row["dtype"], contender, *measured])
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    return "\n\n".join(
        [
            f"{data['device']}, driver {data['driver']}, {versions}, {data['date']}."
            f" A copy reaches {data['copy_gbs']:.0f} GB/s.",
            table("case, classes, dtype, contender, ms, GB/s, of copy, peak MiB".split(", "), rows),
            "Forward + backward of one step, medians of alternating rounds. GB/s: of the byte model.",
        ]
    )


def without_sizes(case):
    """'CE 4096 x 32000, smoothing' -> 'CE, smoothing'"""
    return re.sub(r"\s*\b\d+(\s*x\s*\d+)*\b", "", case)


def plot_gpu(data, path):
    """GB/s of the byte model against the number of classes: a panel for each loss and dtype, a line a contender."""
    panels = {}
    for row in data["rows"]:
        if row["pass"] == "both":
            lines = panels.setdefault(f"{without_sizes(row['case'])}, {row['dtype']}", {})
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


KINDS = {"cpu": (cpu_table, plot_cpu), "gpu": (gpu_table, plot_gpu)}


def section(kind, files, readme):
    """What stands between the markers."""
    if not files:
        return "Not yet measured."
    make_table, _ = KINDS[kind]
    parts = []
    for file, data in files:
        picture = Path(os.path.relpath(file.with_suffix(".png"), readme.parent)).as_posix()
        parts.append(f"{make_table(data)}\n\n![{file.stem}]({picture})")
    return "\n\n".join(parts)


def replace_section(text, kind, content):
    begin, end = f"<!-- {kind}-table:begin -->", f"<!-- {kind}-table:end -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"report: the README lacks {begin} ... {end}")
    return pattern.sub(lambda _: f"{begin}\n{content}\n{end}", text)


def report(results=RESULTS, readme=README, plots=True):
    """Rewrites the README's sections and the plots; True if the README changed."""
    before = text = readme.read_text()
    for kind, (_, plot) in KINDS.items():
        files = load(results, kind)
        text = replace_section(text, kind, section(kind, files, readme))
        for file, data in files if plots else []:
            plot(data, file.with_suffix(".png"))
    if text != before:
        readme.write_text(text)
    return text != before


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--no-plots", action="store_true", help="tables only: needs no matplotlib")
    args = parser.parse_args()
    changed = report(args.results, args.readme, not args.no_plots)
    print(args.readme.name, "rewritten" if changed else "was up to date", file=sys.stderr)
