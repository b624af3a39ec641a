"""What someone sees whose installation cannot work: one clear sentence, never a symbol error or another build."""

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import types
from importlib.metadata import distribution
from pathlib import Path

import pytest
import setuptools
import torch
import torch.utils.cpp_extension

import cece

ROOT = Path(__file__).resolve().parents[1]


# ---- import cece


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder where cece is installed, for this torch, with a stand-in for its library; `load()` imports it."""
    folder = tmp_path / "site/cece"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "cece/_load.py", folder)
    (folder / "_C.py").write_text("")
    (folder / "_built_for.py").write_text(f'TORCH = "{torch.__version__}"\nSOURCES = ""\n')
    return folder


def load(folder, monkeypatch):
    """ "loaded", or what the import of the cece in `folder` says."""
    with monkeypatch.context() as m:
        for name in [n for n in sys.modules if n.partition(".")[0] == "cece"]:
            m.delitem(sys.modules, name)
        # an editable installation's finder knows another cece
        m.setattr(sys, "meta_path", [finder for finder in sys.meta_path if "editable" not in str(finder).lower()])
        stub = types.ModuleType("cece")  # the package without its __init__, so that _load runs under our conditions
        stub.__path__ = [str(folder)]
        m.setitem(sys.modules, "cece", stub)
        importlib.invalidate_caches()
        try:
            importlib.import_module("cece._load").load()
            return "loaded"
        except ImportError as e:
            return str(e)
        finally:
            for name in [n for n in sys.modules if n.startswith("cece.")]:
                m.delitem(sys.modules, name)


def built_for(folder, version):
    (folder / "_built_for.py").write_text(f'TORCH = "{version}"\nSOURCES = ""\n')


@pytest.mark.parametrize("version", ["2.12.1+cpu", "2.13.0+cu130", "1.9.0", "3.0.0+cpu"])
def test_another_torch(package, monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    built_for(package, version)
    message = load(package, monkeypatch)
    assert message.startswith(f"cece was built for torch {version}, and this is torch 2.13.0+cpu: reinstall")
    assert "pip install --no-build-isolation --no-cache-dir" in message and "\n" not in message


def test_a_patch_release_is_the_same_torch(package, monkeypatch):
    number, _, build = torch.__version__.partition("+")
    built_for(package, ".".join([*number.split(".")[:2], "99"]) + (f"+{build}" if build else ""))
    assert load(package, monkeypatch) == "loaded"


def test_the_torch_it_was_built_for(package, monkeypatch):
    assert load(package, monkeypatch) == "loaded"


def test_not_built(package, monkeypatch):
    (package / "_built_for.py").unlink()
    message = load(package, monkeypatch)
    assert message.startswith("cece is here as source only") and "pip install --no-build-isolation" in message


def test_a_library_that_does_not_load(package, monkeypatch):
    (package / "_C.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    message = load(package, monkeypatch)
    assert "undefined symbol: _ZN3c10" in message and "pip install --no-build-isolation" in message
    assert "\n" not in message


def test_no_torch(package, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    message = load(package, monkeypatch)
    assert message == "cece needs torch >= 2.11, and importing it failed: pip install torch"


@pytest.fixture
def checkout(tmp_path, package):
    """A checkout as `setup.py build_ext --inplace` leaves it, with the same stand-in."""
    root = tmp_path / "checkout"
    (root / "cece").mkdir(parents=True)
    shutil.copy(ROOT / "cece/_load.py", root / "cece")
    shutil.copy(ROOT / "setup.py", root)
    shutil.copytree(ROOT / "csrc", root / "csrc")
    build(root, torch.__version__)
    return root


def build(root, version):
    folder = cece._load.in_tree(root / "build", version)
    folder.mkdir(parents=True)
    (folder / "_C.py").write_text("")
    (folder / "_built_for.py").write_text(f'TORCH = "{version}"\nSOURCES = "{cece._load.fingerprint(root)}"\n')


def test_a_checkout_that_is_built(checkout, monkeypatch):
    assert load(checkout / "cece", monkeypatch) == "loaded"


@pytest.mark.parametrize("edited", ["csrc/numerics.h", "csrc/cuda/new.cuh", "setup.py"])
def test_an_older_library_is_not_taken(checkout, monkeypatch, edited):
    with open(checkout / edited, "a") as file:
        file.write("\n")
    message = load(checkout / "cece", monkeypatch)
    assert message.startswith("cece's compiled part is not of the csrc/ and setup.py that are here now: ")
    assert message.endswith(f"python {checkout / 'setup.py'} build_ext --inplace")


def test_two_environments_share_a_checkout(checkout, monkeypatch):
    for version in ("2.11.0+cu126", "2.12.1"):
        monkeypatch.setattr(torch, "__version__", version)
        message = load(checkout / "cece", monkeypatch)
        assert message.startswith(f"cece is here as source only, without a part compiled for torch {version}: ")
        build(checkout, version)
        assert load(checkout / "cece", monkeypatch) == "loaded"
    monkeypatch.undo()
    assert load(checkout / "cece", monkeypatch) == "loaded"


def test_a_checkout_that_hides_the_installed_cece(checkout, package, monkeypatch):
    shutil.rmtree(checkout / "build")
    monkeypatch.syspath_prepend(str(package.parent))
    message = load(checkout / "cece", monkeypatch)
    assert message.startswith(f"this is cece's own folder, which hides the cece installed in {package.parent}: ")
    assert "another folder" in message and "\n" not in message


# ---- setup.py: everything it needs is looked for before anything is built

TOOLS = ["CXX", "CUDA_HOME", "CUDA_PATH", "CECE_CUDA", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "NVCC_APPEND_FLAGS"]


@pytest.fixture
def setup(monkeypatch):
    """setup(command, **environment): setup.py as a module, up to where setuptools would take over."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", lambda **keywords: None)

    def run(command="build_ext", **environment):
        for name in TOOLS:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(sys, "argv", ["setup.py", command])
        spec = importlib.util.spec_from_file_location("cece_setup", ROOT / "setup.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def stopped(*args, **environment):
        with pytest.raises(SystemExit) as stop:
            run(*args, **environment)
        message = str(stop.value)
        assert message.startswith("cece: ") and "\n" not in message
        return message

    run.stopped = stopped
    return run


@pytest.fixture
def toolkit(tmp_path):
    """A CUDA toolkit of a stand-in for nvcc, which notes in `calls` what it is told to compile."""

    class Toolkit:
        home, calls = tmp_path / "cuda", tmp_path / "calls"

        def nvcc(self, version="13.0", compile='echo "$@" > "$out"; echo "$@" >> {calls}'):
            lines = [
                "#!/bin/sh",
                f'case "$1" in --version) echo "release {version}, V{version}.1"; exit;;',
                "--list-gpu-arch) printf 'compute_%s\\n' 75 80 90 120; exit;; esac",
                'for out in "$@"; do :; done',  # the last one
                compile.format(calls=self.calls),
            ]
            (self.home / "bin/nvcc").write_text("\n".join(lines))
            (self.home / "bin/nvcc").chmod(0o755)

        def compiled(self):
            """How many files since the last question."""
            lines = self.calls.read_text().splitlines() if self.calls.exists() else []
            self.calls.write_text("")
            return len(lines)

    for file in ("bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart_static.a"):
        (Toolkit.home / file).parent.mkdir(parents=True, exist_ok=True)
        (Toolkit.home / file).write_text("")
    kit = Toolkit()
    kit.nvcc()
    return kit


@pytest.mark.parametrize("command", ["build_ext", "dist_info", "bdist_wheel", "editable_wheel"])
def test_a_wheel_names_its_torch(setup, monkeypatch, command):
    tag = {"2.13.0+cpu": "2.13cpu", "2.13.1+cu130": "2.13cu130", "2.14.0": "2.14", "2.15.0a0+git1.nv26": "2.15git1nv26"}
    for version, expected in tag.items():
        monkeypatch.setattr(torch, "__version__", version)
        assert setup(command, CECE_CUDA="0").VERSION_AND_TORCH == f"0.1.0+torch{expected}"


@pytest.mark.parametrize("command", ["sdist", "egg_info", "--version"])
def test_what_compiles_nothing_needs_nothing(setup, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert setup(command, CXX="no-such-compiler", CECE_CUDA="1").VERSION_AND_TORCH == "0.1.0"


def test_setup_without_torch(setup, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr("sysconfig.get_path", lambda *a, **k: "/nowhere")
    monkeypatch.setattr("site.getsitepackages", lambda: [])
    message = setup.stopped()
    assert message.startswith("cece: building needs torch >= 2.11 in this environment, and there is none")
    assert "pip install --no-build-isolation ." in message and "uv pip install --no-build-isolation ." in message


def test_setup_with_an_old_torch(setup, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.4.1")
    assert setup.stopped().startswith("cece: building needs torch >= 2.11, and this environment has 2.4.1")


def test_setup_on_windows(setup, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert setup.stopped(CECE_CUDA="0").startswith("cece: Windows is not supported")


def test_setup_without_a_compiler(setup, monkeypatch):
    message = setup.stopped(CXX="no-such-compiler", CECE_CUDA="0")
    assert message.startswith("cece: building needs a C++20 compiler, and 'no-such-compiler' is not there")
    monkeypatch.setenv("PATH", str(ROOT / "tests"))  # a PATH with no compiler in it
    assert "building needs a C++20 compiler, and 'c++' is not there" in setup.stopped(CECE_CUDA="0")


@pytest.mark.parametrize(
    "compiler, says",
    [
        ("echo '#define __GNUC__ 10'", "is g++ 10, older than 11"),
        ("printf '#define __GNUC__ 4\\n#define __clang_major__ 13\\n'", "is clang 13, older than 14"),
        ("echo 'unrecognized option -std=c++20' >&2; exit 1", "does not compile C++20"),
        ("echo", "does not compile C++20"),
    ],
)
def test_setup_with_a_compiler_that_is_too_old(setup, tmp_path, compiler, says):
    (tmp_path / "cc").write_text(f"#!/bin/sh\n{compiler}\n")
    (tmp_path / "cc").chmod(0o755)
    assert f"{str(tmp_path / 'cc')!r} {says}" in setup.stopped(CXX=tmp_path / "cc", CECE_CUDA="0")


def test_setup_without_pythons_headers(setup, monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda *a, **k: str(tmp_path))
    message = setup.stopped(CECE_CUDA="0")
    assert message.startswith("cece: building needs Python's headers") and "apt-get install python3-dev" in message


@pytest.mark.parametrize("number", ["abc", "0", "-2", "1.5"])
def test_setup_with_max_jobs_that_is_no_number(setup, number):
    assert setup.stopped(MAX_JOBS=number).startswith("cece: MAX_JOBS must be a number of at least 1 or unset, got ")


def test_an_empty_variable_is_not_set(setup, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    module = setup(CXX="", CECE_CUDA="", MAX_JOBS="", TORCH_CUDA_ARCH_LIST="", CUDA_HOME="")
    assert module.compiler() in (["g++"], ["c++"]) and module.cuda()[0] is None and module.jobs() >= 1


def test_cuda_is_asked_for_and_there_is_none(setup, monkeypatch):
    assert setup.stopped(CECE_CUDA="maybe") == "cece: CECE_CUDA must be 0, 1 or unset, got 'maybe'"
    monkeypatch.setattr("pathlib.Path.is_file", lambda self: "cuda" not in str(self) and os.path.isfile(self))
    which = shutil.which
    monkeypatch.setattr("shutil.which", lambda name, *a, **k: None if name == "nvcc" else which(name, *a, **k))
    assert setup.stopped(CECE_CUDA="1").startswith("cece: CECE_CUDA=1 needs nvcc, and there is none")


def test_why_cuda_is_left_out(setup, monkeypatch, tmp_path):
    """Each reason is in the build's output, in `python -m cece` and in what a CUDA tensor is told."""
    monkeypatch.setattr(torch.version, "cuda", None)
    assert setup(CECE_CUDA="0").cuda() == (None, "CECE_CUDA=0 was set")
    assert setup().cuda() == (None, f"torch {torch.__version__}, which it was built for, has none")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with monkeypatch.context() as m:
        m.setattr("shutil.which", lambda name, which=shutil.which: None if name == "nvcc" else which(name))
        m.setattr("pathlib.Path.is_file", lambda self: "local/cuda" not in str(self) and os.path.isfile(self))
        module = setup()
    toolkit, reason = module.cuda()
    assert toolkit is None and reason == "there was no nvcc when it was built"
    told = {unit.source for unit in module.units() if f'-DCECE_CUDA_LEFT_OUT="{reason}"' in unit.command}
    assert told == {"csrc/module.cpp", "csrc/cuda/none.cpp"}
    said = {}
    monkeypatch.setattr(module, "print", lambda text, **k: said.update({text: k["file"]}), raising=False)
    build_with(module, monkeypatch, tmp_path)
    assert said == {f"cece: without CUDA kernels: {reason}": sys.stderr}


def build_with(module, monkeypatch, folder):
    """Runs build_ext, which compiles nothing here; returns it."""
    monkeypatch.setattr(module, "compile_all", lambda units: [])
    monkeypatch.setattr(module, "link", lambda objects, library: library.write_text(""))
    distribution = setuptools.Distribution({"ext_modules": []})
    distribution.get_command_obj("build").build_base = str(folder / "build")
    command = module.Build(distribution)
    command.ensure_finalized()
    command.run()
    return command


def test_a_checkout_that_was_installed_from_can_be_used_itself(setup, monkeypatch, tmp_path):
    """README's `pip install .` and `python -m cece`, both typed in the checkout, whose cece/ comes first there."""
    command = build_with(setup(CECE_CUDA="0"), monkeypatch, tmp_path)
    for folder in (cece._load.in_tree(tmp_path / "build", torch.__version__), Path(command.build_lib) / "cece"):
        assert sorted(file.name for file in folder.iterdir()) == sorted(command.files())
        assert f'SOURCES = "{cece._load.fingerprint(ROOT)}"' in (folder / "_built_for.py").read_text()


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
@pytest.mark.parametrize("missing", ["bin/nvcc", "include/cuda_runtime.h"])
def test_a_named_toolkit_is_that_or_nothing(setup, toolkit, variable, missing):
    assert setup(CECE_CUDA="1", **{variable: toolkit.home}).cuda()[0].home == toolkit.home
    (toolkit.home / missing).unlink()
    message = setup.stopped(CECE_CUDA="1", **{variable: toolkit.home})
    assert message.startswith(f"cece: {variable} is {toolkit.home}, and there is no {missing} in it")


def test_a_broken_toolkit(setup, toolkit):
    environment = {"CECE_CUDA": "1", "CUDA_HOME": toolkit.home}
    (toolkit.home / "lib64/libcudart_static.a").unlink()
    assert "has no libcudart_static.a" in setup.stopped(**environment)
    for folder in ("lib", f"lib/{os.uname().machine}-linux-gnu", f"targets/{os.uname().machine}-linux/lib"):
        file = toolkit.home / folder / "libcudart_static.a"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
        assert setup(**environment).cuda()[0].runtime == file
        file.unlink()
    (toolkit.home / "lib64/libcudart_static.a").write_text("")
    broken = {"exit 1": "--version", "echo": "--version", "echo release 13.0": "--list-gpu-arch"}
    for what, question in broken.items():
        (toolkit.home / "bin/nvcc").write_text(f"#!/bin/sh\n{what}\n")
        assert f"nvcc {question} fails" in setup.stopped(**environment)


def test_a_toolkit_of_another_major_version(setup, toolkit, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    toolkit.nvcc(version="13.0")
    message = setup.stopped(CUDA_HOME=toolkit.home)
    assert "nvcc is of CUDA 13.0 and torch" in message and "of CUDA 12.8" in message and "CECE_CUDA=1" in message
    assert setup(CUDA_HOME=toolkit.home, CECE_CUDA="1").cuda()[0]
    toolkit.nvcc(version="12.4")
    assert setup(CUDA_HOME=toolkit.home).cuda()[0]


def test_sources_without_kernels(setup, toolkit, monkeypatch):
    glob = Path.glob
    monkeypatch.setattr("pathlib.Path.glob", lambda self, p, **k: [] if p.endswith(".cu") else glob(self, p, **k))
    assert "csrc/cuda has no .cu files" in setup.stopped(CECE_CUDA="1", CUDA_HOME=toolkit.home)


ARCHS = {  # TORCH_CUDA_ARCH_LIST -> architectures, and those with PTX
    "": ("7.5 8.0 9.0 12.0", "120"),
    "8.0;9.0": ("8.0 9.0", ""),
    "8.0, 9.0+ptx": ("8.0 9.0", "90"),
    "9.0a 8.0": ("9.0a 8.0", ""),
    "8.0;8.0;8.0+PTX": ("8.0", "80"),
    "Hopper Turing": ("9.0 7.5", "90 75"),
    "native": ("7.5 9.0", ""),
}


@pytest.mark.parametrize("asked", ARCHS)
def test_architectures(setup, toolkit, monkeypatch, asked):
    cards = [(9, 0), (7, 5), (9, 0)]
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(cards))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda i: cards[i])
    found = setup(CECE_CUDA="1", CUDA_HOME=toolkit.home, TORCH_CUDA_ARCH_LIST=asked).cuda()[0]
    archs, ptx = ARCHS[asked]
    assert found.archs == archs.split()
    numbers = archs.replace(".", "").split()
    codes = [f"code=sm_{n}" for n in numbers] + [f"code=compute_{n}" for n in ptx.split()]
    assert sorted(flag.split(",")[1] for flag in found.flags) == sorted(codes)


@pytest.mark.parametrize("asked", ["6.0;8.0", "8.0 Pascal", "8.0+PTXX", "Hoper", "sm_90", "90"])
def test_an_architecture_that_cannot_be_had(setup, toolkit, asked):
    message = setup.stopped(CECE_CUDA="1", CUDA_HOME=toolkit.home, TORCH_CUDA_ARCH_LIST=asked)
    assert "TORCH_CUDA_ARCH_LIST" in message and ("does not know" in message or "is no architecture" in message)


def test_native_without_a_gpu(setup, toolkit, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert "needs a GPU" in setup.stopped(CECE_CUDA="1", CUDA_HOME=toolkit.home, TORCH_CUDA_ARCH_LIST="native")


# ---- no object is taken for another one


def kernels_of(module, monkeypatch, folder):
    """Compiles the .cu files into `folder`."""
    monkeypatch.setattr(module, "OBJECTS", folder)
    return module.compile_all([unit for unit in module.units() if unit.source.endswith(".cu")])


def test_objects_of_other_settings_are_not_taken(setup, toolkit, monkeypatch, tmp_path):
    files = len(list(ROOT.glob("csrc/cuda/*.cu")))

    def compiled(**environment):
        module = setup(**({"CECE_CUDA": "1", "CUDA_HOME": toolkit.home, "TORCH_CUDA_ARCH_LIST": "8.0"} | environment))
        objects = kernels_of(module, monkeypatch, tmp_path / "objects")
        assert all("-gencode=arch=compute_" in Path(file).read_text() for file in objects) and len(objects) == files
        asked = environment.get("TORCH_CUDA_ARCH_LIST", "8.0").replace(".", "")
        assert all(f"sm_{asked}" in Path(file).read_text() for file in objects)
        return toolkit.compiled()

    assert [compiled(), compiled()] == [files, 0]
    assert [compiled(TORCH_CUDA_ARCH_LIST="9.0"), compiled(TORCH_CUDA_ARCH_LIST="9.0"), compiled()] == [files, 0, 0]
    assert [compiled(NVCC_APPEND_FLAGS="-G"), compiled()] == [files, 0]
    toolkit.nvcc(version="13.1")
    assert [compiled(), compiled()] == [files, 0]
    shutil.move(toolkit.home, toolkit.home.with_name("other"))
    toolkit.home = toolkit.home.with_name("other")
    assert [compiled(), compiled()] == [files, 0]
    assert not [f for f in (tmp_path / "objects").iterdir() if f.name[0].isdigit()]  # nothing half done
    for i in range(20):
        compiled(NVCC_APPEND_FLAGS=f"-D{i}")
    assert len(list((tmp_path / "objects").iterdir())) <= 8 * files  # old ones go


def test_a_compiler_that_fails_leaves_no_object(setup, toolkit, monkeypatch, tmp_path, capsys):
    toolkit.nvcc(compile='echo half > "$out"; echo "error: no"; exit 2')
    module = setup(CECE_CUDA="1", CUDA_HOME=toolkit.home)
    with pytest.raises(SystemExit, match="^cece: csrc/cuda/.*.cu does not compile"):
        kernels_of(module, monkeypatch, tmp_path / "objects")
    assert not list((tmp_path / "objects").iterdir()) and "error: no" in capsys.readouterr().out


def names(module):
    return {unit.source: module.object_of(unit).name for unit in module.units()}


CHANGES = {
    "torch": lambda m: m.setattr(torch, "__version__", "2.13.9+cpu"),
    "torch's source": lambda m: m.setattr(torch.version, "git_version", "other"),
    "flags": lambda m: m.setenv("CXXFLAGS", "-O0"),
    "include path": lambda m: m.setenv("CPATH", "/nowhere"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_objects_of_another_torch_or_flags(setup, monkeypatch, change):
    before = names(setup(CECE_CUDA="0"))
    assert before == names(setup(CECE_CUDA="0"))
    CHANGES[change](monkeypatch)
    assert not set(before.values()) & set(names(setup(CECE_CUDA="0")).values())


def test_objects_of_another_compiler(setup, tmp_path):
    (tmp_path / "g++").write_text('#!/bin/sh\n[ "$1" = --version ] && echo other || exec g++ "$@"\n')
    (tmp_path / "g++").chmod(0o755)
    before, after = names(setup(CECE_CUDA="0")), names(setup(CECE_CUDA="0", CXX=tmp_path / "g++"))
    assert not set(before.values()) & set(after.values())


def test_an_edit_compiles_what_includes_it(setup, monkeypatch, checkout):
    module = setup(CECE_CUDA="0")
    monkeypatch.setattr(module, "ROOT", checkout)
    edits = {
        "csrc/cpu/cross_entropy.inl": {"csrc/cpu/isa_avx2.cpp", "csrc/cpu/isa_avx512.cpp", "csrc/cpu/isa_default.cpp"},
        "csrc/cuda/vec.cuh": set(),
        "csrc/meta.cpp": {"csrc/meta.cpp"},
        "csrc/module.h": {"csrc/module.cpp", "csrc/cpu/ops.cpp"},
    }
    for edited, expected in edits.items():
        before = names(module)
        with open(checkout / edited, "a") as file:
            file.write("// edited\n")
        after = names(module)
        assert {source for source in after if before[source] != after[source]} == expected & set(after)


# ---- the whole way


def run(*command, **environment):
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, cwd=environment["PWD"])
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done.stdout + done.stderr


def test_sdist_to_a_fresh_environment(tmp_path):
    """The sdist is made without torch, has every file that is compiled, and what it installs proves itself."""
    if not (ROOT / "Makefile").is_file():
        pytest.skip("no checkout here")
    code = "import sys; sys.modules['torch'] = None; import setuptools.build_meta as b; print(b.build_sdist({!r}))"
    # A copy without the list of files that an earlier setuptools command left, which would be taken as well.
    not_sources = shutil.ignore_patterns("build", "dist", ".*", "*.egg-info", "*.so", "__pycache__")
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=not_sources)
    run(sys.executable, "-c", code.format(str(tmp_path)), PWD=str(source))
    (sdist,) = tmp_path.glob("cece-0.1.0.tar.gz")
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", PWD=str(tmp_path))
    python = tmp_path / "venv/bin/python"
    (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    parents = [Path(torch.__file__).parents[1], *(distribution(name).locate_file("") for name in ("setuptools", "pip"))]
    (site / "parent.pth").write_text("\n".join(dict.fromkeys(map(str, parents))))
    # Objects of equal sources and settings are equal, so nothing is compiled twice.
    here = {"PWD": str(tmp_path), "PYTHONPATH": "", "CECE_CUDA": "0", "CECE_OBJECTS": str(ROOT / "build/objects")}
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--no-build-isolation", "--no-deps"]
    run(*pip, "--force-reinstall", "--no-index", sdist, **here)
    code = "import cece, runpy; print(cece.__file__, cece._C.__file__); runpy.run_module('cece', run_name='__main__')"
    files, *said = run(python, "-c", code, **here).splitlines()
    assert [Path(file).parent for file in files.split()] == [site / "cece"] * 2
    assert any("not built (CECE_CUDA=0 was set)" in line for line in said)
    assert "all checks passed on cpu" in run(python, "-m", "cece", "verify", **here)
    (metadata,) = site.glob(f"cece-0.1.0+{cece._load.abi(torch.__version__)}.dist-info/METADATA")
    text = metadata.read_text()
    assert "](benchmarks/results" not in text and "Classifier: Typing :: Typed" in text
    (library,) = (site / "cece").glob("_C*.so")
    for folder in (ROOT, tmp_path, Path(torch.__file__).parents[1]):
        assert str(folder).encode() not in library.read_bytes()


# ---- sources on other machines


def compiles(source, *flags):
    command = ["-x", "c++", "-std=c++20", "-Wall", "-Werror", "-fsyntax-only", f"-I{ROOT}/csrc", *flags, "-"]
    done = subprocess.run([*COMPILER, *command], input=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


COMPILER = os.environ.get("CXX", "").split() or ["g++" if shutil.which("g++") else "c++"]
MODULE = [f"-DCECE_{name}=" + value for name, value in {"VERSION": '""', "TORCH": '""', "CUDA_LEFT_OUT": '""'}.items()]
MODULE += ["-DCECE_CUDA_ARCHS=nullptr", f"-isystem{torch.utils.cpp_extension.include_paths()[0]}"]  # its pybind11


def test_memory_without_huge_pages():
    """macOS has no MADV_HUGEPAGE."""
    compiles('#include <sys/mman.h>\n#undef MADV_HUGEPAGE\n#include "cpu/pages.h"\n')


PYTHONS = {
    re.search(r"(3\.\d+)$", str(header.parent))[1]: header.parent
    for folder in (Path(sys.base_prefix) / "include", Path(sys.base_prefix).parent / "*/include", Path("/usr/include"))
    for header in Path("/").glob(f"{str(folder)[1:]}/python3.*[0-9]/Python.h")
}


@pytest.mark.parametrize("version", sorted(v for v in PYTHONS if int(v.split(".")[1]) >= 10))
def test_python_headers_that_are_here(version):
    compiles('#include "module.cpp"\n', *MODULE, f"-isystem{PYTHONS[version]}")


@pytest.mark.parametrize("compiler", ["clang", "g++"])
def test_clang_is_named_as_clang(compiler):
    flag = "-D__clang__=1" if compiler == "clang" else "-U__clang__"
    command = [*COMPILER, "-E", "-x", "c++", f"-I{ROOT}/csrc", flag, "-"]
    source = re.sub(r"#include <.*>", "", (ROOT / "csrc/module.h").read_text()) + "CECE_COMPILER\n"
    text = subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout
    assert ('"g++ "' in text) == (compiler == "g++")


# ---- what was built


def test_build_info():
    info = cece.build_info()
    assert info["version"] == cece.__version__ == "0.1.0"
    assert info["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert info["cpu_isa"] in info["cpu_isas"] and isinstance(info["cuda_archs"], list)
    assert re.match("g[+][+] 1|.*(Clang|LLVM) ", info["compiler"])
    assert bool(info["cuda_archs"]) != bool(info["cuda_left_out"])


def test_cuda_tensors_of_a_build_without_kernels():
    """One sentence for each operator; a CUDA tensor's dispatch, without one."""
    if cece.build_info()["cuda_archs"]:
        pytest.skip("built with CUDA kernels")
    x, y, none = torch.rand(2, 3), torch.tensor([0, 1]), None
    calls = {
        "cross_entropy_forward": (x, y, none, 1, -100, 0.0),
        "cross_entropy_backward": (x, x, y, none, x, x, 1, -100, 0.0),
        "cross_entropy_backward_": (x, x, y, none, x, x, 1, -100, 0.0),
        "token_statistics_forward": (x, y, none, -100, 0.0, 1.0, 0.0, False, 1),
        "token_statistics_backward": (y, none, none, none, x, y, none, x, -100, 0.0, 1.0, 0.0, False),
        "token_statistics_backward_": (y, none, none, none, x, y, none, x, -100, 0.0, 1.0, 0.0, False),
        "row_parts": (x, y, none, -100, 0.0, 1.0, 0.0, 0, 3, False),
        "finish_parts": (x, y, -100, 0.0, False, 3, 1),
        "divergence_forward": (x, x, none, 1.0, False),
        "divergence_merge": (x, 1.0),
        "divergence_backward": (y, x, x, none, x, 1.0, False, False),
        "binary_cross_entropy_forward": (x, x, none, none, 1, 1),
        "binary_cross_entropy_backward": (x, x, x, none, none, 1, 1),
    }
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name[:6] == "cece::"}
    made_of_these = re.compile("linear_|sharded_|across_ranks")
    assert set(calls) == {name for name in names if not made_of_these.match(name)}
    for name, arguments in calls.items():
        operator = getattr(torch.ops.cece, name).default
        with pytest.raises(NotImplementedError, match="^cece was built without CUDA kernels .*: reinstall it") as e:
            operator.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *arguments)
        assert cece.build_info()["cuda_left_out"] in str(e.value) and len(str(e.value)) < 400


def test_the_library_does_not_need_the_gil():
    """Where Python can do without it, importing the library does not bring it back."""
    if not hasattr(sys, "_is_gil_enabled") or sys._is_gil_enabled():
        source = (ROOT / "csrc/module.cpp").read_text()
        assert "mod_gil_not_used()" in source
    else:
        assert cece._C and not sys._is_gil_enabled()
