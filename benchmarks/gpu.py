"""cece on a GPU against eager torch, torch.compile and the fused libraries that can be imported.

    python -m benchmarks.gpu small                  every kind of launch once, held against float64: for a sanitizer too
    python -m benchmarks.gpu smoke|full [options]   a dozen timed rows, or all

Forward and backward together, as in training: the median of rounds in which the contenders take turns. Inputs are
rotated, so that no round finds its own in the L2. Beside each time stands the byte model: three passes over the logits
(forward reads them, backward reads them and writes the gradient), five over logits and targets for the binary loss and
soft targets; GB/s, and the share of a device copy measured before and after, follow from it.

Every row is written to <out>/gpu-rows.jsonl as soon as it is measured. At the end all rows there, of every call, become
gpu-<device>.json and .txt, which benchmarks.report reads. --rehearse runs the same on the CPU, with small
inputs and the emulator of the tests for the card: its numbers mean nothing.
"""

import argparse
import contextlib
import datetime
import functools
import gc
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import cece

CLASSES = [256, 512, 1024, 4096, 16384, 32768, 65536, 131072, 262144]
PEERS = ["liger-kernel", "quack-kernels", "nvidia-cutlass-dsl", "triton"]
BCE = "BCE", cece.binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits


class Card:
    device, bytes, rounds, warm_up_s, warm_up_calls = "cuda", 1e9, 20, 1.0, 5

    def now(self):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start, end):
        return start.elapsed_time(end)

    def wait(self):
        torch.cuda.synchronize()

    def start_peak(self):
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()

    def peak(self):
        self.wait()
        return torch.cuda.max_memory_allocated() - self.before

    def describe(self):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
        except OSError:
            driver = None
        return {"device": torch.cuda.get_device_properties(0).name, "driver": driver}


class Rehearsal(Card):
    """The emulator in a card's place: every line of this file runs, on inputs of a few KB."""

    device, bytes, rounds, warm_up_s, warm_up_calls = "cpu", 16e3, 2, 0.0, 1

    def now(self):
        return time.perf_counter()

    def milliseconds(self, start, end):
        return 1e3 * (end - start)

    def wait(self):
        pass

    def start_peak(self):
        pass

    def peak(self):
        return 0

    def describe(self):
        return {"device": "rehearsal", "driver": None}


# ---- contenders


def compiled(loss):
    """torch.compile, fresh for each row: an earlier row's sizes would make it compile for any."""
    torch._dynamo.reset()
    return torch.compile(loss, dynamic=False)


def peers():
    """{name: (loss, whether it overwrites the logits)} of those that can be imported; why the others cannot."""
    found, missing = {}, {}
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy

        found["liger"] = liger_cross_entropy, True
    except Exception as e:
        missing["liger"] = f"{type(e).__name__}: {e}"
    try:
        from quack.cross_entropy import cross_entropy as quack_cross_entropy

        found["quack"] = lambda logits, labels: quack_cross_entropy(logits, labels, reduction="mean"), False
    except Exception as e:
        missing["quack"] = f"{type(e).__name__}: {e}"
    return found, missing


# case, its loss here and in torch, passes over memory, class counts (None: all of CLASSES), target, options
CASES = [
    ("CE", cece.cross_entropy, F.cross_entropy, 3, None, "labels", {}),
    ("CE, smoothing", cece.cross_entropy, F.cross_entropy, 3, [1024, 32768], "labels", {"label_smoothing": 0.1}),
    ("CE, probabilities", cece.cross_entropy, F.cross_entropy, 5, [1024, 32768], "soft", {}),
    ("CE, float32 probabilities", cece.cross_entropy, F.cross_entropy, 5, [32768], "soft32", {}),
    ("CE, padded vocabulary", cece.cross_entropy, F.cross_entropy, 3, [50257], "padded", {}),
    ("CE, pixels", cece.cross_entropy, F.cross_entropy, 3, [21, 150], "pixels", {}),
    (*BCE, 5, [1024], "binary", {}),
    ("BCE, bool target", *BCE[1:], 4, [1024], "bool", {}),
    ("BCE, channels and pos_weight", *BCE[1:], 5, [128], "channels", {}),
]
SMOKE = {"CE": [1024, 32768, 131072], "CE, smoothing": [32768], "CE, pixels": [21], "BCE": [1024]}


def inputs_of(case, rows, classes, dtype, device):
    """Two sets of (logits, target, options), each far larger than the L2."""
    for _ in range(2):
        shape = {"pixels": (1, classes, rows), "channels": (-(-rows // 256), classes, 16, 16)}.get(
            case, (rows, classes)
        )
        width = 64 * -(-classes // 64) if case == "padded" else classes
        logits = torch.randn(*shape[:1], width, *shape[2:], device=device, dtype=dtype)[:, :classes].detach()
        options = {}
        if case in ("labels", "padded", "pixels"):
            target = torch.randint(classes, shape[:1] + shape[2:], device=device)
        elif case.startswith("soft"):
            target = torch.rand(shape, device=device).softmax(1).to(torch.float32 if case == "soft32" else dtype)
        else:
            target = torch.rand(shape, device=device) > 0.9
            target = target if case == "bool" else target.to(dtype)
            if case == "channels":
                options["pos_weight"] = torch.rand(classes, 1, 1, device=device)
        yield logits.requires_grad_(), target, options


# ---- measuring


def step(loss, options, item):
    logits, target, own = item
    logits.grad = None
    loss(logits, target, **options, **own).backward()


def measure(card, contenders, inputs):
    """{name: (median ms, peak bytes, None) or (None, None, error)}: contenders (a step, whether it overwrites)."""
    pristine = [logits.detach().clone() for logits, *_ in inputs] if any(c[1] for c in contenders.values()) else None
    times, peaks, errors = {name: [] for name in contenders}, {}, {}

    def prepare(item, i, overwrites):
        if overwrites:
            item[0].detach().copy_(pristine[i])
        item[0].grad = None  # else the last gradient would count as memory that was there before

    for name, (work, overwrites) in contenders.items():
        try:
            for i in range(card.warm_up_calls):
                prepare(inputs[i % 2], i % 2, overwrites)
                work(inputs[i % 2])
            prepare(inputs[0], 0, overwrites)
            card.start_peak()
            work(inputs[0])
            peaks[name] = card.peak()
        except Exception as e:
            errors[name] = f"{type(e).__name__}: {e}"[:300]
        inputs[0][0].grad = inputs[1][0].grad = None
    for r in range(card.rounds):
        for name, (work, overwrites) in contenders.items():
            if name in errors:
                continue
            prepare(inputs[r % 2], r % 2, overwrites)
            start = card.now()
            work(inputs[r % 2])
            times[name].append((start, card.now()))
    card.wait()
    return {
        name: (None, None, errors[name])
        if name in errors
        else (statistics.median(card.milliseconds(*t) for t in times[name]), peaks[name], None)
        for name in contenders
    }


def bandwidths(card):
    """GB/s of a device copy of random numbers, and of a sum that only reads them, at a clock that is up."""
    source = torch.randn(int(card.bytes) // 4, device=card.device)
    target = torch.empty_like(source)
    until = time.perf_counter() + card.warm_up_s
    while time.perf_counter() < until:
        target.copy_(source)
        card.wait()
    rates = []
    for work, passes in ((lambda: target.copy_(source), 2), (lambda: source.sum(), 1)):
        times = []
        for _ in range(card.rounds):
            start = card.now()
            work()
            times.append((start, card.now()))
        card.wait()
        rates.append(passes * source.nbytes / statistics.median(card.milliseconds(*t) for t in times) / 1e6)
    return {"copy_gbs": rates[0], "read_gbs": rates[1]}


def line(row):
    place = f"{row['case']:44s} {row['dtype']:9s} {row['contender']:8s}"
    if row["error"]:
        return f"{place} {row['error']}"
    return (
        f"{place} {row['median_ms']:9.3f} ms {row['gbs']:7.0f} GB/s {row['percent_of_copy']:5.1f} % of copy"
        f" {row['peak_bytes'] / 2**20:8.0f} MiB"
    )


def benchmarks(card, wanted, budget_s, write):
    """Calls write(row) for each contender of each case; stops where the time is up, between two cases."""
    start, others = time.perf_counter(), peers()
    write({"copy": bandwidths(card), "missing": others[1]})
    for dtype in (torch.bfloat16, torch.float32):
        for case, ours, torchs, passes, class_counts, kind, options in CASES:
            counts = wanted.get(case, []) if wanted else class_counts or CLASSES
            for classes in [min(c, 1000) for c in counts[:1]] if card.device == "cpu" else counts:
                if time.perf_counter() - start > budget_s:
                    write({"stopped": f"before {case}, {classes} classes, {dtype}: the time was up"})
                    return
                rows = max(1, int(card.bytes / classes / dtype.itemsize))
                inputs = list(inputs_of(kind, rows, classes, dtype, card.device))
                rows = inputs[0][0].numel() // classes
                losses = {"cece": (ours, False), "eager": (torchs, False), "compile": (compiled(torchs), False)}
                if kind == "labels" and not options:
                    losses.update(others[0])
                steps = {
                    name: (functools.partial(step, loss, options), overwrites)
                    for name, (loss, overwrites) in losses.items()
                }
                model = passes * rows * classes * dtype.itemsize
                for name, (ms, peak, error) in measure(card, steps, inputs).items():
                    row = {"case": f"{case} {rows} x {classes}", "classes": classes, "dtype": str(dtype)[6:]}
                    row |= {"contender": name, "pass": "both", "model_bytes": model, "error": error}
                    write(row | {"median_ms": ms, "peak_bytes": peak, "gbs": None if error else model / ms / 1e6})
                del inputs
                gc.collect()
                if card.device == "cuda":
                    torch.cuda.empty_cache()
    write({"copy": bandwidths(card)})


# ---- what is written


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def collect(out, card):
    """All rows of the folder's calls as one JSON file and a text table."""
    entries = [json.loads(text) for text in (out / "gpu-rows.jsonl").read_text().splitlines()]
    copies = [e["copy"] for e in entries if "copy" in e]
    copy = max(c["copy_gbs"] for c in copies)
    rows = {(e["case"], e["dtype"], e["contender"]): e for e in entries if "case" in e}  # the latest of each
    failed = [line(row) for row in rows.values() if row["error"]]
    measured = [row | {"percent_of_copy": 100 * row["gbs"] / copy} for row in rows.values() if not row["error"]]
    versions = {"torch": torch.__version__, "CUDA": torch.version.cuda, "cece": cece.__version__}
    versions |= {name: version(name) for name in PEERS if version(name)}
    data = card.describe() | {
        "date": datetime.date.today().isoformat(),
        "versions": versions,
        "build": cece.build_info(),
        "copy_gbs": copy,
        "copies": copies,
        "missing": {k: v for e in entries for k, v in e.get("missing", {}).items()},
        "stopped": [e["stopped"] for e in entries if "stopped" in e],
        "failed": failed,
        "rows": measured,
    }
    stem = out / f"gpu-{data['device'].replace(' ', '-').lower()}"
    stem.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
    head = f"{data['device']}, {versions}, copy {copy:.0f} GB/s, {data['date']}"
    stem.with_suffix(".txt").write_text("\n".join([head, *map(line, measured), *failed, *data["stopped"]]) + "\n")
    print(f"wrote {stem}.json and .txt")


# ---- every kind of launch, small


def small(device):
    """Loss and gradient against float64 on each path: lanes, warps, blocks, clusters of 2 to 8 and parts of rows."""
    torch.manual_seed(1)
    shapes = [(70, 3), (70, 100), (9, 1001), (3, 5000), (60, 17000), (2, 30, 50)]
    shapes += [(100, n * 8192) for n in (5, 9)] if device == "cuda" else []
    shapes += [(2, n * 4096 * 4) for n in range(2, 9)] + [(2, 200_000)]
    for dtype in (torch.float32, torch.bfloat16):
        for shape in shapes if device == "cuda" else shapes[:8]:
            x = torch.randn(shape, device=device).to(dtype)[:, 1:].detach()
            classes, rows = x.shape[1], x.numel() // x.shape[1]
            labels = torch.randint(classes, (shape[0], *shape[2:]), device=device)
            soft, hard = torch.rand(x.shape, device=device) / classes, torch.rand(x.shape, device=device) > 0.5
            for name, loss, true, target in (
                ("CE", cece.cross_entropy, F.cross_entropy, labels),
                ("CE, probabilities", cece.cross_entropy, F.cross_entropy, soft),
                (*BCE, hard),
            ):
                options = {"label_smoothing": 0.1} if name == "CE" else {}
                u, v = x.clone().requires_grad_(), x.double().requires_grad_()
                got, want = loss(u, target, **options), true(v, target if name == "CE" else target.double(), **options)
                torch.testing.assert_close(got.double(), want, rtol=3e-6, atol=1e-6)
                got.backward()
                want.backward()
                tolerance = 8 * torch.finfo(dtype).eps
                torch.testing.assert_close(u.grad.double(), v.grad, rtol=tolerance, atol=tolerance / classes / rows)
    print(f"small: {len(shapes)} shapes are right")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["small", "smoke", "full"])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or Path(__file__).parent / "results"))
    parser.add_argument("--bytes", type=float, help="of logits, 0.5e9 to 4e9")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no further case begins")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        card = Rehearsal() if options.rehearse else Card()
        if options.rehearse:
            sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
            from cuda_emulation.backend import install

            stack.enter_context(install()).card(9, 90)
        elif not torch.cuda.is_available():
            parser.exit(1, "benchmarks/gpu.py: no GPU here, so there is nothing to measure\n")
        elif not cece.build_info()["cuda_archs"]:
            parser.exit(1, "benchmarks/gpu.py: this cece was built without CUDA\n")
        if options.what == "small":
            return small(card.device)
        card.bytes = options.bytes or card.bytes
        options.out.mkdir(parents=True, exist_ok=True)
        with open(options.out / "gpu-rows.jsonl", "a", buffering=1) as file:

            def write(entry):
                file.write(json.dumps(entry) + "\n")
                shown = line(entry | {"percent_of_copy": float("nan")}) if "case" in entry else json.dumps(entry)
                print(shown, flush=True)

            benchmarks(card, SMOKE if options.what == "smoke" else None, options.budget, write)
        collect(options.out, card)


if __name__ == "__main__":
    main()
