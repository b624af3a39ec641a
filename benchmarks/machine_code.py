"""What sm_90 machine code says about a kernel's speed, read from ``cuobjdump -sass``: no GPU is needed for that.

    python -m benchmarks.machine_code [bf16 f32]    compiles them, a quarter of a minute each, and prints the tables

A multiprocessor issues so many instructions for every byte that memory brings; a loop that needs more an element, or
that uses what it has loaded before the other loads are under way, is slower than memory whatever else is right.
"""

import argparse
import heapq
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

# Elements a round of the hot loop on sm_90, instructions an element at most, and loads under way before the first
# result is used. What memory affords, at 90 % of the issue rate: 2 bytes an element 18 on an H100 and 13 on an H200,
# 4 bytes twice that, and so on (tune.h has the bytes). Classes of targets: a label, smoothing, probabilities,
# smoothing with class weights; of a binary loss the target's type: as the input, bool, float32 beside 16 bits.
HOT_LOOPS = {
    ("bf16", "forward_rows", 0): (32, 11, 4),
    ("bf16", "forward_rows", 1): (32, 16, 4),
    ("bf16", "forward_rows", 2): (16, 28, 4),
    ("bf16", "forward_rows", 3): (16, 31, 2),
    ("bf16", "backward_rows", 0): (16, 16, 2),
    ("bf16", "backward_rows", 1): (16, 16, 2),
    ("bf16", "backward_rows", 2): (16, 20, 4),
    ("bf16", "backward_rows shifted", 0): (16, 18, 4),
    ("bf16", "forward_pixels", 0): (8, 19, 7),
    ("bf16", "forward_pixels", 1): (8, 34, 7),
    ("bf16", "backward_pixels", 0): (8, 28, 7),
    ("bf16", "forward_pixels pairs", 0): (16, 16, 7),
    ("bf16", "forward_pixels pairs", 1): (16, 25, 7),
    ("bf16", "backward_pixels pairs", 0): (16, 24, 7),
    ("bf16", "binary_forward", "input"): (16, 28, 4),
    ("bf16", "binary_forward", "bool"): (16, 30, 4),
    ("bf16", "binary_forward", "f32"): (16, 28, 6),
    ("bf16", "binary_backward", "input"): (16, 21, 4),
    ("bf16", "binary_backward", "bool"): (16, 23, 4),
    ("bf16", "binary_backward", "f32"): (16, 21, 6),
    ("f32", "forward_rows", 0): (16, 18, 4),
    ("f32", "forward_rows", 1): (16, 24, 4),
    ("f32", "backward_rows", 0): (8, 28, 2),
    ("f32", "backward_rows shifted", 0): (8, 28, 4),
    ("f32", "forward_pixels", 0): (8, 26, 7),
    ("f32", "binary_forward", "input"): (8, 37, 4),
    ("f32", "binary_forward", "bool"): (8, 40, 4),
    ("f32", "binary_backward", "input"): (8, 29, 4),
}

# Instructions that a warp takes to merge its lanes' states of a row, for the shuffles it takes: the maximum's and as
# many for each sum. A row of 1024 classes in bfloat16 has 340 beside them.
MERGES = {("forward_rows", 0): (10, 60), ("forward_rows", 1): (20, 80)}

WIDE = re.compile(r"\bLDG\.E(?:\.\w+)*\.128\b")
LOAD = re.compile(r"\bLDG\.")
EXPONENTIAL = re.compile(r"\bMUFU\.EX2\b")
SHUFFLE = re.compile(r"\bSHFL\b")
BRANCH = re.compile(r"\bBRA(?:\.\w+)*\s+(?:!?U?P\w+,\s*)*0x([0-9a-f]+)")
NEVER_FALLS_THROUGH = re.compile(r"(?:BRA(?:\.\w+)* 0x|EXIT|BRX|RET)")


class Code:
    """One kernel: its instructions in the order of memory, and where each may go on."""

    def __init__(self, text):
        self.mangled, _, listing = text.partition("\n")
        lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", listing)
        self.instructions = [line.strip() for _, line in lines]
        number = {int(address, 16): i for i, (address, _) in enumerate(lines)}
        stops = [bool(NEVER_FALLS_THROUGH.match(i)) for i in self.instructions]
        behind_stops = [i + 1 for i, stop in enumerate(stops) if stop]  # where a computed branch can lead
        self.next = []
        for i, instruction in enumerate(self.instructions):
            goes_on = [] if stops[i] else [i + 1]
            if target := BRANCH.search(instruction):
                goes_on.append(number[int(target[1], 16)])
            self.next.append(goes_on + (behind_stops if "BRX" in instruction else []))

    def count(self, pattern, first=0, last=None):
        return sum(bool(pattern.search(i)) for i in self.instructions[first : None if last is None else last + 1])

    def loops(self):
        """Its loops as (first, last), instructions inclusive."""
        return [(to, i) for i, goes_on in enumerate(self.next) for to in goes_on if to <= i and BRANCH.search(self[i])]

    def __getitem__(self, i):
        return self.instructions[i]

    def hot_loop(self):
        """The innermost loop with the most loads and exponentials, of which there is one an element and a few."""
        loops = self.loops()
        inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
        return max(inner, key=lambda loop: (min(8, self.count(EXPONENTIAL, *loop)), self.count(LOAD, *loop)))

    def instructions_a_round(self, loop, elements, one=EXPONENTIAL):
        """Of the shortest way through the loop, or any stretch, that meets so many exponentials, or what matches."""
        first, last = loop
        queue, seen = [(0, first, 0)], set()
        while queue:
            cost, at, done = heapq.heappop(queue)
            if (at, done) in seen:
                continue
            seen.add((at, done))
            done = min(elements, done + bool(one.search(self[at])))
            cost += "NOP" not in self[at]
            if at == last:
                if done == elements:
                    return cost
                continue
            for to in self.next[at]:
                if first <= to <= last:
                    heapq.heappush(queue, (cost, to, done))
        raise AssertionError(f"no way there meets {elements} of {one.pattern}: {self.mangled}")

    def instructions_a_merge(self, shuffles):
        """From the first to the last shuffle of a warp that merges what its lanes have."""
        barrier = next(i for i, instruction in enumerate(self.instructions) if instruction.startswith("BAR.SYNC"))
        all_of_them = [i for i in range(barrier) if SHUFFLE.search(self[i])]
        return self.instructions_a_round((all_of_them[0], all_of_them[-1]), shuffles, SHUFFLE)

    def waits_before(self, last):
        """What first reads a register that was loaded, on some way from the start to instruction `last`, or None."""
        todo, seen = [(0, frozenset())], set()
        while todo:
            at, pending = state = todo.pop()
            if state in seen or at >= last:
                continue
            seen.add(state)
            operation, written, read = operands(self[at])
            if pending & read:
                return self[at]
            pending = pending | written if LOAD.search(operation) else pending - written
            todo += [(to, frozenset(pending)) for to in self.next[at]]
        return None

    def loads_before_use(self, first=0, last=None):
        """How many loads are issued, in the order of memory, before a loaded register is read."""
        pending, loads = set(), 0
        for instruction in self.instructions[first : None if last is None else last + 1]:
            operation, written, read = operands(instruction)
            if pending & read:
                break
            pending -= written
            if LOAD.search(operation):
                pending |= written
                loads += 1
        return loads


def operands(instruction):
    """An instruction's name, and the registers it writes and reads, by number."""
    name, _, text = re.sub(r"^@!?U?P\w+\s+", "", instruction).partition(" ")
    parts = [part.strip() for part in text.split(",")]
    stores = name.startswith(("ST", "RED", "BAR", "BRA", "EXIT"))
    width = 4 if ".128" in name else 2 if ".64" in name or ".WIDE" in name else 1

    def registers(parts, width):
        return {int(n) + k for part in parts for n in re.findall(r"\bR(\d+)\b", part) for k in range(width)}

    return (
        name,
        set() if stores else registers(parts[:1], width),
        registers(parts if stores else parts[1:], 1),
    )


def kernels(sass):
    return [Code(text.strip()) for text in sass.split("Function : ")[1:]]


def kernel_name(mangled):
    """ "forward_rows" and its kind of target, 0 to 4, or 0; of a binary loss on logits the target's type, else None.

    "backward_rows shifted": the kernel for rows whose gradient lies otherwise to 16 bytes than the logits;
    "forward_pixels pairs": two pixels a thread.
    """
    name = re.search(r"4cuda\d+(\w+?)I", mangled)[1]
    if name.startswith("binary"):
        kind = re.search(r"WithLogitsE(\w+?)EE", mangled)
        kinds = {"v": "any", "h": "bool", "f": "input" if re.search(rf"{name}If", mangled) else "f32"}
        return name, kind and kinds.get(kind[1], "input")
    kind = re.search(r"TargetE(\d)(ELb1|ELi2)?", mangled)
    special = {"ELb1": " shifted", "ELi2": " pairs"}
    return name + special.get(kind and kind[2], ""), int(kind[1]) if kind else 0


TARGETS = ["label", "smoothing", "probabilities", "smoothing with class weights"]


class Row(NamedTuple):
    name: str
    instructions: float  # an element, or a merge
    limit: float
    loads: int | None = None
    least_loads: int = 0

    def is_slow(self):
        return self.instructions > self.limit or (self.loads or 0) < self.least_loads

    def __str__(self):
        loads = "" if self.loads is None else f"{self.loads:5d} loads under way (>= {self.least_loads})"
        return f"{self.name:42s}{self.instructions:6.1f} instructions (<= {self.limit}){loads}"


def rows(dtype, sass):
    """The tables' rows of a dtype, as they are in its kernels' machine code."""
    found = {kernel_name(code.mangled): code for code in kernels(sass)}
    out = []

    def title(name, kind):
        return f"{dtype} {name}, {kind if name.startswith('binary') else TARGETS[kind]}"

    for (of, *name), (elements, limit, loads) in HOT_LOOPS.items():
        if of == dtype:
            code = found[tuple(name)]
            loop = code.hot_loop()
            each = code.instructions_a_round(loop, elements) / elements
            out.append(Row(title(*name), each, limit, code.loads_before_use(*loop), loads))
    for name, (shuffles, limit) in MERGES.items():
        merge = found[name].instructions_a_merge(shuffles)
        out.append(Row(f"{title(*name)}: a warp's merge", merge, limit))
    return out


# ---- the tools


def cuda_home():
    nvcc = shutil.which("nvcc")
    for home in (os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"):
        if home and (Path(home) / "bin/nvcc").is_file() and (Path(home) / "include/cuda_runtime.h").is_file():
            return Path(home)
    return None


def tool(name):
    """cuobjdump or nvdisasm: the toolkit's, a pip wheel's (nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm), or on PATH."""
    import torch

    site = Path(torch.__file__).parents[1]
    for folder in (cuda_home() / "bin", *site.glob("nvidia/*/bin"), site / "triton/backends/nvidia/bin"):
        if (folder / name).is_file():
            return folder / name
    return shutil.which(name) and Path(shutil.which(name))


def cuobjdump(file, *args):
    path = os.pathsep.join([*(str(tool(name).parent) for name in ("cuobjdump", "nvdisasm")), os.environ["PATH"]])
    done = subprocess.run(
        [tool("cuobjdump"), *args, file], capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dtypes", nargs="*", default=["bf16", "f32"], help="of the logits: bf16, f32")
    source = Path(__file__).resolve().parents[1] / "csrc/cuda"
    for name in ("cuobjdump", "nvdisasm"):
        if not cuda_home() or not tool(name):
            parser.error(f"needs nvcc and {name}: the CUDA toolkit, or pip install nvidia-cuda-{name}")
    slow = 0
    for dtype in parser.parse_args().dtypes:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "cubin"
            nvcc = [cuda_home() / "bin/nvcc", "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-arch=sm_90"]
            subprocess.run([*nvcc, "-cubin", source / f"{dtype}.cu", "-o", cubin], check=True)
            found = rows(dtype, cuobjdump(cubin, "-sass"))
        print(*found, sep="\n")
        slow += sum(row.is_slow() for row in found)
    return slow


if __name__ == "__main__":
    raise SystemExit(main())
