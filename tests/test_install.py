"""What someone sees whose installation cannot work: one clear sentence, never a symbol error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def python(code, *args, **environment):
    done = subprocess.run(
        [sys.executable, *(["-c", code] if code else []), *args],
        capture_output=True, text=True, env=os.environ | environment, cwd=ROOT,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


LOAD = """
import importlib.util, sys, types, torch
cece = types.ModuleType("cece")  # the package without its __init__, so that _load runs under our conditions
cece.__path__ = [{folder!r}]
sys.modules["cece"] = cece
from cece import _load
{prepare}
try:
    _load.load()
    print("loaded")
except ImportError as e:
    print(e)
"""


def load(prepare):
    code, out, err = python(LOAD.format(folder=str(ROOT / "cece"), prepare=prepare))
    assert code == 0, err
    return out.strip()


def built_for(version):
    return f"m = types.ModuleType('cece._built_for'); m.TORCH = {version!r}; sys.modules['cece._built_for'] = m"


@pytest.mark.parametrize("version", ["2.12.1+cpu", "2.13.0+cu130", "1.9.0", "3.0.0+cpu"])
def test_another_torch(version):
    import torch

    message = load(built_for(version))
    assert message.startswith(f"cece was built for torch {version}, and this is torch {torch.__version__}: reinstall")
    assert "pip install --no-build-isolation" in message and "\n" not in message


def test_a_patch_release_is_the_same_torch():
    import torch

    number, _, build = torch.__version__.partition("+")
    patch = ".".join([*number.split(".")[:2], "99"]) + (f"+{build}" if build else "")
    assert load(built_for(patch)) == "loaded"


def test_the_torch_it_was_built_for():
    assert load("") == "loaded"


def test_not_built():
    message = load("sys.modules['cece._built_for'] = None")
    assert message.startswith("cece is here as source only") and "pip install --no-build-isolation" in message


def test_no_compiled_part():
    message = load("sys.modules['cece._C'] = None")
    assert "compiled part" in message and "does not load here" in message
    assert "pip install --no-build-isolation" in message and "\n" not in message


def test_no_torch():
    message = load("sys.modules['torch'] = None")
    assert message == "cece needs torch >= 2.11, and importing it failed: pip install torch"


def setup(*, prepare="", **environment):
    """setup.py --version in a crippled process: everything it needs is looked for before anything is built."""
    code = f"import runpy, sys; sys.argv = ['setup.py', '--version']; {prepare or 'pass'}; runpy.run_path('setup.py')"
    code, out, err = python(code, **environment)
    return code, out, err.strip().splitlines()[-1] if err.strip() else ""


def test_setup_runs_here():
    code, out, err = setup(CECE_CUDA="0")
    assert code == 0 and out.strip().endswith("0.1.0"), err


def test_setup_without_torch():
    hide = "import site, sysconfig; sys.modules['torch'] = None; site.getsitepackages = lambda: []"
    hide += "; sysconfig.get_path = lambda *a, **k: '/nowhere'"
    code, _, message = setup(prepare=hide)
    assert code == 1
    assert message.startswith("cece: building needs torch >= 2.11 in this environment, and there is none")
    assert "pip install --no-build-isolation ." in message


def test_setup_with_an_old_torch():
    code, _, message = setup(prepare="import torch; torch.__version__ = '2.4.1'")
    assert code == 1
    assert message.startswith("cece: building needs torch >= 2.11, and this environment has 2.4.1")


def test_setup_without_a_compiler():
    code, _, message = setup(CXX="no-such-compiler")
    assert code == 1
    assert message.startswith("cece: building needs a C++20 compiler, and 'no-such-compiler' is not there")
    empty = str(ROOT / "tests")  # a PATH with no compiler in it
    code, _, message = setup(prepare="import os; os.environ.pop('CXX', None)", PATH=empty)
    assert code == 1 and "building needs a C++20 compiler" in message


def test_setup_with_cuda_asked_for_where_there_is_none():
    nowhere = {"CUDA_HOME": "/nowhere", "CUDA_PATH": "/nowhere"}
    code, _, message = setup(CECE_CUDA="maybe")
    assert code == 1 and message == "cece: CECE_CUDA must be 0, 1 or unset, got 'maybe'"
    if Path("/usr/local/cuda/bin/nvcc").exists():
        return
    hide = "import shutil; which = shutil.which; shutil.which = lambda n, *a, **k: None if n == 'nvcc' else which(n)"
    code, _, message = setup(prepare=hide, CECE_CUDA="1", **nowhere)
    assert code == 1 and message.startswith("cece: CECE_CUDA=1 needs nvcc, and there is none")


def test_build_info():
    import torch

    import cece

    info = cece.build_info()
    assert info["version"] == cece.__version__ and info["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert info["cpu_isa"] in info["cpu_isas"] and isinstance(info["cuda_archs"], list) and info["compiler"]
