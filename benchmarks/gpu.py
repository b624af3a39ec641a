"""Cross-entropy on a GPU against eager torch, torch.compile and the fused libraries that can be imported.

    python benchmarks/gpu.py [--out folder] [--bytes 1e9] [--quick]

Forward and backward together, as in training. Times are CUDA events over several repeats, the median; inputs are
rotated so that no repeat finds its own in the L2. Beside each time stands the byte model: three passes over the logits
(forward reads them, backward reads them and writes the gradient), five over logits and targets for the binary loss and
soft targets; GB/s and the share of a device copy measured in the same run follow from it.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import statistics
import subprocess
from pathlib import Path

import torch
import torch.nn.functional as F

import cece

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


def benchmarks(size, classes_list):
    losses, missing = peers()
    labels = {"cece": cece.cross_entropy, **losses}
    soft = {"cece": cece.cross_entropy, "eager": eager, "torch.compile": torch.compile(eager)}
    bce = F.binary_cross_entropy_with_logits
    binary = {"cece": cece.binary_cross_entropy_with_logits, "eager": bce, "torch.compile": torch.compile(bce)}
    copy = copy_bandwidth(int(size))
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for classes in classes_list:
            for target, candidates, passes in (("labels", labels, 3), ("soft", soft, 5), ("binary", binary, 5)):
                if target != "labels" and classes not in (1024, 32768):
                    continue
                n = rows_of(classes, dtype, size)
                inputs = list(inputs_of(n, classes, dtype, target))
                model = passes * n * classes * dtype.itemsize
                for name, loss in candidates.items():
                    row = {"loss": target, "dtype": str(dtype)[6:], "rows": n, "classes": classes, "name": name}
                    try:
                        ms, peak = measure(training_step(loss), inputs)
                    except Exception as e:  # a peer's limits are its own: the row says so
                        if name == "cece":
                            raise
                        rows.append({**row, "error": f"{type(e).__name__}: {e}"[:200]})
                        continue
                    rate = model / ms / 1e6
                    rows.append(
                        {
                            **row,
                            "ms": ms,
                            "model_bytes": model,
                            "gb_s": rate,
                            "of_copy": rate / copy,
                            "peak_bytes": peak,
                        }
                    )
                    print(line(rows[-1]), flush=True)
                del inputs
                torch.cuda.empty_cache()
    return {"copy_gb_s": copy, "missing": missing, "rows": rows}


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
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
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
    result = {"environment": where, **benchmarks(options.bytes, CLASSES[::4] if options.quick else CLASSES)}
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"gpu-{where['device'].replace(' ', '-').lower()}-{where['date'][:10]}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    head = f"{where['device']}, torch {where['torch']}, copy {result['copy_gb_s']:.0f} GB/s, {where['date']}"
    stem.with_suffix(".txt").write_text("\n".join([head, *map(line, result["rows"])]) + "\n")
    print(f"wrote {stem}.json and .txt")


if __name__ == "__main__":
    main()
