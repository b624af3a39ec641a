"""The float primitives of csrc/cpu/vec.h against their contract, on each instruction set: every 97th float of a range.

CECE_ALL_FLOATS=1: every one, half a minute each.
"""

import math
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from test_isa import HERE
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parents[1]
STRIDE = "1" if os.environ.get("CECE_ALL_FLOATS") == "1" else "97"

UNITS = {"exp_nonpositive": 2, "expm1_nonpositive": 2.5, "log1p_unit": 2, "log1p_of_product": 2.5, "log_": 2}
# What is exact, or no number: (argument, result)
EXACT = {
    "exp_nonpositive": [("-0", 1), ("0", 1), ("-inf", 0), ("-104", 0), ("-3e38", 0), ("nan", math.nan)],
    "expm1_nonpositive": [("0", 0), ("-inf", -1), ("-3e38", -1), ("nan", math.nan)],
    "log1p_unit": [
        ("0", 0),
        ("1e-30", 1e-30),
        ("-1e-30", -1e-30),
        ("1.17549435e-38", 1.17549435e-38),
        ("nan", math.nan),
    ],
    "log1p_of_product": [("0", 0), ("1.17549435e-38", 1.17549435e-38), ("1e-30", 1e-30), ("nan", math.nan)],
    "log_": [("1", 0), ("nan", math.nan)],
}


def flags(isa):
    """The ISA table's row in setup.py."""
    rows = dict(re.findall(r'ISAS\["(\w+)"\] = \[(.*)\]', (ROOT / "setup.py").read_text()))
    return re.findall(r'"(.*?)"', rows.get(isa, ""))


@pytest.fixture(scope="module", params=HERE)
def program(request, tmp_path_factory):
    isa = request.param
    if not shutil.which("g++"):
        pytest.skip("no compiler here")
    if not HERE[isa] or (isa != "default" and platform.machine() not in ("x86_64", "AMD64")):
        pytest.skip(f"this CPU has no {isa}")
    file = tmp_path_factory.mktemp("primitives") / isa
    includes = [*(f"-isystem{path}" for path in include_paths()), f"-I{ROOT / 'csrc'}"]
    capability = [f"-DCPU_CAPABILITY={isa.upper()}", f"-DCPU_CAPABILITY_{isa.upper()}"]
    source = ROOT / "tests/cpu_primitives/main.cpp"
    command = [
        "g++",
        "-std=c++20",
        "-O2",
        "-w",
        "-Wno-psabi",
        "-fno-math-errno",
        *flags(isa),
        *capability,
        *includes,
        source,
        "-o",
        file,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    def run(*words):
        return subprocess.run([file, *words], capture_output=True, text=True, check=True).stdout.split()

    return run


@pytest.mark.parametrize("name", UNITS)
def test_units_of_the_last_place(program, name):
    worst, where = map(float, program(name, STRIDE))
    assert worst <= UNITS[name], f"{name}({where!r}) is off by {worst} units"


@pytest.mark.parametrize("name", EXACT)
def test_exact(program, name):
    arguments, results = zip(*EXACT[name], strict=True)
    ours = torch.tensor([float(word) for word in program(name, "at", *arguments)])
    torch.testing.assert_close(ours, torch.tensor(results, dtype=torch.float32), rtol=0, atol=0, equal_nan=True)


def test_log_of_0(program):
    """Low enough for the clamp at -100; a number or -inf."""
    assert all(float(word) < -104 for word in program("log_", "at", "0", "-0"))
