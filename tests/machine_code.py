"""What sm_90 machine code says about a kernel's speed, read from ``cuobjdump -sass``: no GPU is needed for that.

A multiprocessor issues so many instructions for every byte that memory brings; a loop that needs more an element, or
that uses what it has loaded before the other loads are under way, is slower than memory whatever else is right.
"""

import heapq
import re

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
