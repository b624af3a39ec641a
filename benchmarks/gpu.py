"""Cross-entropy on a GPU against eager torch, torch.compile and the fused libraries that can be imported.

    python -m benchmarks.gpu [--out folder] [--bytes 1e9] [--quick]

Forward and backward together, as in training. Times are CUDA events over several repeats, the median; inputs are
rotated so that no repeat finds its own in the L2. Beside each time stands the byte model: three passes over the logits
(forward reads them, backward reads them and writes the gradient), five over logits and targets for the binary loss and
soft targets; GB/s and the share of a device copy measured in the same run follow from it. Files are written after each
case; Ctrl-C keeps what there is.
"""

import argparse
import datetime
import importlib.metadata
import os
import statistics
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import cece

from .harness import each, write_json, write_whole

CLASSES = [256, 512, 1024, 4096, 16384, 32768, 65536, 131072, 262144]
PEERS = ["liger-kernel", "quack-kernels", "cut-cross-entropy", "triton"]


def eager(logits, labels):
    return F.cross_entropy(logits, labels)


def peers():
    """The losses that can be imported here, by name; why the others cannot."""
    found, missing = {"eager": eager, "torch.compile": torch.compile(eager)}, {}
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy

        # its forward writes the gradient over the logits, so from its second repeat on it reads small numbers
        found["liger"] = lambda logits, labels: liger_cross_entropy(logits, labels)
    except ImportError as e:
        missing["liger"] = str(e)
    try:
        from quack.cross_entropy import cross_entropy as quack_cross_entropy

        found["quack"] = lambda logits, labels: quack_cross_entropy(logits, labels, reduction="mean")
    except ImportError as e:
        missing["quack"] = str(e)
    try:
        import cut_cross_entropy  # noqa: F401

        missing["cut-cross-entropy"] = "importable, but takes hidden states and not logits: see linear_cross_entropy"
    except ImportError as e:
        missing["cut-cross-entropy"] = str(e)
    return found, missing


def measure(work, inputs, repeats=20):
    """Median milliseconds of work(input), which takes turns with the inputs, and the peak memory above them."""
    for item in inputs[:2]:
        work(item)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = []
    for i in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work(inputs[i % len(inputs)])
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(s.elapsed_time(e) for s, e in times), torch.cuda.max_memory_allocated() - before


def copy_bandwidth(size):
    """GB/s of a device copy of this many bytes: one read, one write."""
    source = [torch.empty(size // 4, device="cuda") for _ in range(2)]
    target = torch.empty_like(source[0])
    ms, _ = measure(target.copy_, source)
    return 2 * size / ms / 1e6


def training_step(loss):
    def work(item):
        logits, target = item
        logits.grad = None
        loss(logits, target).backward()

    return work


def rows_of(classes, dtype, size):
    return max(1, int(size / classes / dtype.itemsize))


def inputs_of(rows, classes, dtype, target):
    """Two sets, each far larger than the L2."""
    for _ in range(2):
        logits = torch.randn(rows, classes, device="cuda", dtype=dtype, requires_grad=True)
        if target == "labels":
            yield logits, torch.randint(classes, (rows,), device="cuda")
        elif target == "soft":
            yield logits, torch.rand(rows, classes, device="cuda").softmax(1).to(dtype)
        else:
            yield logits, (torch.rand(rows, classes, device="cuda") > 0.9).to(dtype)


@dataclass(frozen=True)
class Case:
    """Logits of one dtype and shape with targets of one kind, and the losses that take them."""

    target: str
    dtype: torch.dtype
    rows: int
    classes: int
    losses: dict
    passes: int

    @property
    def name(self):
        return f"{self.target:7s} {str(self.dtype)[6:]:9s} {self.rows:>8d} x {self.classes:<7d}"


def cases(size, classes_list, peers):
    labels = {"cece": cece.cross_entropy, **peers}
    soft = {"cece": cece.cross_entropy, "eager": eager, "torch.compile": torch.compile(eager)}
    bce = F.binary_cross_entropy_with_logits
    binary = {"cece": cece.binary_cross_entropy_with_logits, "eager": bce, "torch.compile": torch.compile(bce)}
    return [
        Case(target, dtype, rows_of(classes, dtype, size), classes, losses, passes)
        for dtype in (torch.float32, torch.bfloat16)
        for classes in classes_list
        for target, losses, passes in (("labels", labels, 3), ("soft", soft, 5), ("binary", binary, 5))
        if target == "labels" or classes in (1024, 32768)
    ]


def run(case, copy):
    """A row for each loss."""
    inputs = list(inputs_of(case.rows, case.classes, case.dtype, case.target))
    model = case.passes * case.rows * case.classes * case.dtype.itemsize
    rows = []
    print()
    for name, loss in case.losses.items():
        row = {"loss": case.target, "dtype": str(case.dtype)[6:], "rows": case.rows, "classes": case.classes}
        row["name"] = name
        try:
            ms, peak = measure(training_step(loss), inputs)
        except Exception as e:  # a peer's limits are its own: the row says so
            if name == "cece":
                raise
            row["error"] = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        else:
            rate = model / ms / 1e6
            row |= {"ms": ms, "model_bytes": model, "gb_s": rate, "of_copy": rate / copy, "peak_bytes": peak}
        rows.append(row)
        print(line(row), flush=True)
    del inputs
    torch.cuda.empty_cache()
    return rows


def line(row):
    place = f"{row['loss']:7s} {row['dtype']:9s} {row['rows']:>8d} x {row['classes']:<7d} {row['name']:14s}"
    if "error" in row:
        return f"{place} {row['error']}"
    return (
        f"{place} {row['ms']:9.3f} ms {row['gb_s']:7.0f} GB/s {100 * row['of_copy']:5.1f} % of copy"
        f" {row['peak_bytes'] / 2**20:8.0f} MiB"
    )


def environment():
    def version(package):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    except OSError:
        driver = None
    properties = torch.cuda.get_device_properties(0)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "driver": driver,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "cece": cece.build_info(),
        "packages": {name: version(name) for name in PEERS},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("OUT") or Path(__file__).resolve().parent / "results"
    parser.add_argument("--out", type=Path, default=Path(default))
    parser.add_argument("--bytes", type=float, default=1e9, help="of logits, 0.5e9 to 4e9")
    parser.add_argument("--quick", action="store_true", help="three class counts")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "benchmarks/gpu.py: no GPU here, so there is nothing to measure\n")
    if not cece.build_info()["cuda_archs"]:
        parser.exit(1, "benchmarks/gpu.py: this cece was built without CUDA\n")
    where = environment()
    found, missing = peers()
    copy = copy_bandwidth(int(options.bytes))
    content = {"environment": where, "copy_gb_s": copy, "missing": missing}
    stem = options.out / f"gpu-{where['device'].replace(' ', '-').lower()}-{where['date'][:10]}"
    head = f"{where['device']}, torch {where['torch']}, copy {copy:.0f} GB/s, {where['date']}"

    def keep(rows, left_out):
        write_json(stem.with_name(stem.name + ".json"), content, rows, left_out)
        write_whole(stem.with_name(stem.name + ".txt"), "\n".join([head, *map(line, rows)]) + "\n")

    print(f"{head}\nwritten after each case: {stem}.json and .txt")
    each(cases(options.bytes, CLASSES[::4] if options.quick else CLASSES, found), lambda case: run(case, copy), keep)


if __name__ == "__main__":
    main()
