"""Builds cece._C: CPU kernels once per instruction set, CUDA kernels where nvcc and a CUDA build of torch are there.

CECE_CUDA=0|1   leave the CUDA kernels out | build them whatever torch is (against a CPU-only torch too)
CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX   as in torch's own extensions
CPPFLAGS, CXXFLAGS, LDFLAGS, NVCC_APPEND_FLAGS   added to the commands
CECE_OBJECTS    where compiled objects are kept, instead of build/objects

An object's name there ends in a hash of all that makes it: the command, the compiler's version, torch's, the source and
the headers of ours that it includes. So no object is ever taken for another one, whatever was built here before, and
every way to build (in place, editable, a wheel, the tests) takes those that are there. Commands that compile nothing,
such as sdist, need no torch and no compiler.
"""

import functools
import hashlib
import importlib.util
import os
import platform
import re
import runpy
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

VERSION = "0.1.0"
ROOT = Path(__file__).parent.resolve()
OBJECTS = Path(os.environ.get("CECE_OBJECTS") or ROOT / "build/objects").resolve()
KEPT = 8  # objects of a source: as many torches, compilers or architectures in turn compile nothing
os.chdir(ROOT)
LOAD = runpy.run_path("cece/_load.py")  # what `import cece` looks for is what is left here


def stop(sentence):
    sys.exit(f"cece: {sentence}")


def variable(name):
    """An environment variable's text; an empty one is not set."""
    return os.environ.get(name, "").strip()


def output(*command):
    """What a tool prints, or None where it fails or cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


# ---- what there is to build with; whatever is missing is one sentence, before anything is compiled


@functools.cache
def import_torch():
    """torch, also from inside pip's isolated build: from the environment that cece is installed into."""
    if not importlib.util.find_spec("torch"):
        for folder in [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]:
            site.addsitedir(folder)  # and what its .pth files name
    try:
        torch = importlib.import_module("torch")
    except ModuleNotFoundError:
        stop(
            "building needs torch >= 2.11 in this environment, and there is none. Install it first"
            " (pip install torch), then run: pip install --no-build-isolation ."
            " (uv pip install --no-build-isolation . | python -m build --no-isolation)"
        )
    except ImportError as e:
        stop(f"building needs torch >= 2.11 in this environment, and importing it failed: {e}")
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 11):
        stop(f"building needs torch >= 2.11, and this environment has {torch.__version__}: pip install --upgrade torch")
    return torch


def jobs():
    text = variable("MAX_JOBS") or str(os.cpu_count() or 1)
    if not text.isdecimal() or int(text) < 1:
        stop(f"MAX_JOBS must be a number of at least 1 or unset, got {text!r}")
    return int(text)


LEAST = {"__clang_major__": ("clang", 14), "__GNUC__": ("g++", 11)}  # clang defines both


@functools.cache
def compiler():
    """The C++ compiler's command, which is new enough and finds Python's headers."""
    name = variable("CXX") or ("g++" if shutil.which("g++") else "c++")
    command = shlex.split(name)
    wish = "install g++ 11 or newer, or set CXX to one (Debian, Ubuntu: apt-get install g++)"
    if not shutil.which(command[0]):
        stop(f"building needs a C++20 compiler, and {name!r} is not there: {wish}")
    macros = output(*command, "-std=c++20", "-dM", "-E", "-x", "c++", os.devnull)
    found = dict(re.findall(r"#define (__clang_major__|__GNUC__) (\d+)", macros or ""))
    kind, least = next((LEAST[macro] for macro in LEAST if macro in found), ("", 0))
    number = next((int(found[macro]) for macro in LEAST if macro in found), None)
    if number is None or number < least:
        what = f"is {kind} {number}, older than {least}" if number else "does not compile C++20"
        stop(f"building needs a C++20 compiler, and {name!r} {what}: {wish}")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        stop(
            f"building needs Python's headers, and {sysconfig.get_path('include')} has no Python.h:"
            f" install them (Debian, Ubuntu: apt-get install python3-dev)"
        )
    return command


class Cuda(NamedTuple):
    home: Path
    runtime: Path  # libcudart_static.a
    version: str  # what nvcc says of itself
    archs: list[str]  # 9.0
    flags: list[str]


# "9.0" and PTX of the last for what comes after; those that this nvcc does not know are left out
ARCHS = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
NAMED_ARCHS = {  # as torch's own extensions name them
    "pascal": "6.0 6.1+PTX",
    "volta+tegra": "7.2",
    "volta": "7.0+PTX",
    "turing": "7.5+PTX",
    "ampere+tegra": "8.7",
    "ampere": "8.0 8.6+PTX",
    "ada": "8.9+PTX",
    "hopper": "9.0+PTX",
    "blackwell+tegra": "11.0",
    "blackwell": "10.0 10.3 12.0 12.1+PTX",
}


def native_archs():
    cuda = import_torch().cuda
    found = sorted({cuda.get_device_capability(i) for i in range(cuda.device_count())})
    if not found:
        stop("TORCH_CUDA_ARCH_LIST=native needs a GPU that torch sees, and there is none: name the architectures")
    return " ".join(f"{major}.{minor}" for major, minor in found)


def cuda_archs(nvcc):
    """["9.0", ...] to compile for, and nvcc's flags."""
    known = re.findall(r"compute_(\d+)", output(nvcc, "--list-gpu-arch") or "")
    if not known:
        stop(f"{nvcc} --list-gpu-arch fails: mend the CUDA toolkit, or leave the CUDA kernels out with CECE_CUDA=0")
    text = variable("TORCH_CUDA_ARCH_LIST")
    words = re.split(r"[;,\s]+", text.lower()) if text else []
    words = " ".join(native_archs() if w == "native" else NAMED_ARCHS.get(w, w) for w in words if w).split()
    if not words:
        words = [a for a in ARCHS if a.replace(".", "") in known] or stop(f"{nvcc} knows none of {' '.join(ARCHS)}")
        words[-1] += "+PTX"
    archs, flags = [], []
    for word in words:
        form = re.fullmatch(r"((\d+)\.(\d)[af]?)(\+ptx)?", word.lower())
        if not form:
            stop(f"TORCH_CUDA_ARCH_LIST is {text!r}, and {word!r} in it is no architecture: 9.0, 9.0a, 9.0+PTX, Hopper")
        if form[2] + form[3] not in known:
            knows = " ".join(f"{k[:-1]}.{k[-1]}" for k in known)
            stop(f"TORCH_CUDA_ARCH_LIST asks for {form[1]}, which {nvcc} does not know; it knows {knows}")
        number = form[1].replace(".", "")
        archs.append(form[1])
        for kind in ("sm", "compute") if form[4] else ("sm",):
            flags.append(f"-gencode=arch=compute_{number},code={kind}_{number}")
    return list(dict.fromkeys(archs)), list(dict.fromkeys(flags))


def find_toolkit():
    """The CUDA toolkit's folder or None. Where the user names one it is that or nothing."""
    parts = ["bin/nvcc", "include/cuda_runtime.h"]
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if variable(name):
            home = Path(variable(name))
            missing = [part for part in parts if not (home / part).is_file()]
            if missing:
                stop(
                    f"{name} is {home}, and there is no {missing[0]} in it: set it to the CUDA toolkit's folder, unset"
                    " it, or leave the CUDA kernels out with CECE_CUDA=0"
                )
            return home
    nvcc = shutil.which("nvcc")  # a wrapper script of that name elsewhere does not count
    homes = [*([Path(nvcc).resolve().parents[1]] if nvcc else []), Path("/usr/local/cuda")]
    return next((home for home in homes if all((home / part).is_file() for part in parts)), None)


@functools.cache
def cuda():
    """(Cuda, "") to build the CUDA kernels with, or (None, why they are left out)."""
    wanted = variable("CECE_CUDA") or "auto"
    if wanted not in {"auto", "0", "1"}:
        stop(f"CECE_CUDA must be 0, 1 or unset, got {wanted!r}")
    torch = import_torch()
    if wanted == "0":
        return None, "CECE_CUDA=0 was set"
    if wanted == "auto" and torch.version.cuda is None:
        return None, f"torch {torch.__version__}, which it was built for, has none"
    home = find_toolkit()
    if not home:
        if wanted == "1":
            stop("CECE_CUDA=1 needs nvcc, and there is none: install the CUDA toolkit or set CUDA_HOME to its folder")
        return None, "there was no nvcc when it was built"
    nvcc = home / "bin/nvcc"
    or_else = "or leave the CUDA kernels out with CECE_CUDA=0"
    version = output(nvcc, "--version") or ""
    release = re.search(r"release (\d+)\.\d+", version)
    if not release:
        stop(f"{nvcc} --version fails: mend the CUDA toolkit, set CUDA_HOME to another one, {or_else}")
    if torch.version.cuda and wanted == "auto" and release[1] != torch.version.cuda.split(".")[0]:
        stop(
            f"{nvcc} is of CUDA {release[0][8:]} and torch {torch.__version__} of CUDA {torch.version.cuda}:"
            f" set CUDA_HOME to a toolkit of torch's major version, build with this one all the same with CECE_CUDA=1,"
            f" {or_else}"
        )
    folders = ["lib64", "lib", f"lib/{platform.machine()}-linux-gnu", f"targets/{platform.machine()}-linux/lib"]
    runtime = next((p for p in (home / f / "libcudart_static.a" for f in folders) if p.is_file()), None)
    if not runtime:
        stop(f"{home} has no libcudart_static.a (package cuda-cudart-dev): install it, {or_else}")
    if not any(ROOT.glob("csrc/cuda/*.cu")):
        stop(f"csrc/cuda has no .cu files, so this copy of the sources is incomplete: take another one, {or_else}")
    return Cuda(home, runtime, version, *cuda_archs(nvcc)), ""


# ---- what is compiled: a Unit an object

FLAGS = [
    "-std=c++20",
    "-O3",
    "-DNDEBUG",
    "-fPIC",
    "-fwrapv",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
    "-g0",
]
CUDA_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]

# A row an instruction set: csrc/cpu/isa_<name>.cpp is compiled with these flags on top.
X86 = platform.machine().lower() in {"x86_64", "amd64"}
ISAS = {"default": []}
if X86:
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]

# What compilers read beside their command line.
SURROUNDINGS = ["CPATH", "CPLUS_INCLUDE_PATH", "NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"]


class Unit(NamedTuple):
    source: str
    command: list[str]
    tools: str  # versions


def text_of(file, seen):
    """A source and the headers of ours that it includes, each once."""
    if file in seen or not file.is_file():
        return b""
    seen.add(file)
    text = file.read_bytes()
    included = re.findall(rb'^\s*#\s*include "(.+?)"', text, re.M)
    return text + b"".join(text_of((file.parent / name.decode()).resolve(), seen) for name in included)


def object_of(unit):
    surroundings = [f"{name}={os.environ.get(name)}" for name in SURROUNDINGS]
    digest = hashlib.sha256("\0".join([*unit.command, unit.tools, *surroundings]).encode())
    digest.update(text_of(ROOT / unit.source, set()))
    return OBJECTS / f"{stem(unit)}-{digest.hexdigest()[:20]}.o"


def stem(unit):
    return "-".join(Path(unit.source).relative_to("csrc").with_suffix("").parts)


def units():
    """All that goes into the library, what takes longest first."""
    from torch.utils.cpp_extension import include_paths

    torch, (toolkit, left_out) = import_torch(), cuda()
    above_torch = Path(torch.__file__).resolve().parents[1]
    command = [
        *compiler(),
        *FLAGS,
        f"-ffile-prefix-map={above_torch}=.",  # torch's headers name themselves in messages
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-isystem{path}" for path in include_paths()),
        f"-I{sysconfig.get_path('include')}",
        *shlex.split(variable("CPPFLAGS")),
        *shlex.split(variable("CXXFLAGS")),
    ]
    tools = f"{output(*compiler(), '--version')} {torch.__version__} {torch.version.git_version}"
    own = {  # flags of one source
        **{
            # the intrinsics' own "undefined" vectors
            f"csrc/cpu/isa_{name}.cpp": ["-Wno-uninitialized", "-Wno-maybe-uninitialized", *flags]
            for name, flags in ISAS.items()
        },
        **{p.relative_to(ROOT).as_posix(): [] for p in sorted(ROOT.glob("csrc/autograd/*.cpp"))},
        "csrc/cpu/ops.cpp": ["-DCECE_X86"] if X86 else [],
        "csrc/cuda/ops.cpp" if toolkit else "csrc/cuda/none.cpp": [
            f"-I{toolkit.home / 'include'}" if toolkit else f'-DCECE_CUDA_LEFT_OUT="{left_out}"'
        ],
        "csrc/linear.cpp": [],
        "csrc/meta.cpp": [],
        "csrc/ops.cpp": [],
        "csrc/ranks.cpp": [],
        "csrc/shards.cpp": [],
        "csrc/module.cpp": [
            f'-DCECE_VERSION="{VERSION}"',
            f'-DCECE_TORCH="{torch.__version__}"',
            f'-DCECE_CUDA_LEFT_OUT="{left_out}"',
            "-DCECE_CUDA_ARCHS=" + (",".join(f'"{a}"' for a in toolkit.archs) if toolkit else "nullptr"),
        ],
    }
    cpp = [Unit(source, [*command, *flags], tools) for source, flags in own.items()]
    if not toolkit:
        return cpp
    nvcc = [str(toolkit.home / "bin/nvcc"), *CUDA_FLAGS, *toolkit.flags]
    sources = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("csrc/cuda/*.cu"))
    return [*(Unit(source, nvcc, f"{toolkit.version} {output('g++', '--version')}") for source in sources), *cpp]


def compile_all(units):
    """The objects' files; the missing ones are compiled, each under another name until it is whole."""
    OBJECTS.mkdir(parents=True, exist_ok=True)
    objects = {object_of(unit): unit for unit in units}
    missing = {file: unit for file, unit in objects.items() if not file.is_file()}

    def compile_one(file, unit):
        partial, start = file.with_name(f"{os.getpid()}.{file.name}"), time.time()
        command = [*unit.command, "-c", unit.source, "-o", str(partial)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            partial.unlink(missing_ok=True)
            return unit, f"{shlex.join(command)}\n{done.stdout}"
        partial.replace(file)
        print(f"{done.stdout}cece: {unit.source} compiled in {time.time() - start:.0f} s", flush=True)
        return unit, None

    pool = ThreadPoolExecutor(jobs())
    for done in as_completed([pool.submit(compile_one, file, unit) for file, unit in missing.items()]):
        unit, wrong = done.result()
        if wrong:
            pool.shutdown(cancel_futures=True)
            print(wrong, flush=True)
            stop(f"{unit.source} does not compile: the compiler's message is above")
    for file, unit in objects.items():
        os.utime(file)  # in use
        siblings = sorted(OBJECTS.glob(f"{stem(unit)}-*.o"), key=lambda f: f.stat().st_mtime)
        for old in siblings[:-KEPT]:
            old.unlink(missing_ok=True)
    return [str(file) for file in objects]


def link(objects, library):
    from torch.utils.cpp_extension import library_paths

    toolkit, _ = cuda()
    # -s: nvcc's temporary files name themselves in the symbols, other ones each time
    kind = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared", "-s"]
    runtime = [str(toolkit.runtime), "-ldl", "-lrt", "-lpthread"] if toolkit else []
    torchs = [*(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch_cpu", "-ltorch"]
    command = [*compiler(), *kind, *objects, *runtime, *torchs, *shlex.split(variable("LDFLAGS"))]
    partial = library.with_name(f"{os.getpid()}.{library.name}")
    done = subprocess.run([*command, "-o", str(partial)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        partial.unlink(missing_ok=True)
        print(shlex.join(command), done.stdout, sep="\n", flush=True)
        stop("the library does not link: the linker's message is above")
    partial.replace(library)


class Build(build_ext):
    """Leaves the library in the checkout, where `import cece` finds it in place, and copies it for a wheel."""

    def folders(self):
        base = Path(self.get_finalized_command("build").build_base)
        in_tree = LOAD["in_tree"](base, import_torch().__version__)
        return [in_tree] if self.inplace or self.editable_mode else [in_tree, Path(self.build_lib) / "cece"]

    def files(self):
        return [Path(self.get_ext_filename("cece._C")).name, "_built_for.py"]

    def run(self):
        left_out = cuda()[1]
        if left_out:
            print(f"cece: without CUDA kernels: {left_out}", file=sys.stderr, flush=True)
        here, *elsewhere = self.folders()
        here.mkdir(parents=True, exist_ok=True)
        library, built_for = (here / name for name in self.files())
        sources = LOAD["fingerprint"](ROOT)
        link(compile_all(units()), library)
        # What `import cece` checks before it loads _C, which another torch could not even resolve.
        built_for.write_text(f'TORCH = "{import_torch().__version__}"\nSOURCES = "{sources}"\n')
        for folder in elsewhere:
            folder.mkdir(parents=True, exist_ok=True)
            for file in (library, built_for):
                shutil.copy(file, folder)

    def get_outputs(self):
        return [str(folder / name) for folder in self.folders()[1:] for name in self.files()]

    def get_output_mapping(self):
        return {}


class BuildPython(build_py):
    def run(self):
        if not self.editable_mode:  # a module that is no more would go into the wheel
            shutil.rmtree(Path(self.build_lib) / "cece", ignore_errors=True)
        super().run()


COMPILING = {"bdist_wheel", "build", "build_ext", "develop", "dist_info", "editable_wheel", "install"}
if COMPILING & set(sys.argv):
    if sys.platform == "win32":
        stop("Windows is not supported: use WSL 2 (wsl --install), which runs Linux's build")
    if sys.platform == "darwin":  # what the wheel's tag will say
        os.environ.setdefault("MACOSX_DEPLOYMENT_TARGET", str(sysconfig.get_config_var("MACOSX_DEPLOYMENT_TARGET")))
    import_torch(), jobs(), compiler(), cuda()
    VERSION_AND_TORCH = f"{VERSION}+{LOAD['abi'](import_torch().__version__)}"  # pip then tells such wheels apart
else:
    VERSION_AND_TORCH = VERSION

setup(
    version=VERSION_AND_TORCH,
    # a package index shows no pictures of the checkout
    long_description=re.sub(r"!\[(.*?)\]\((?!http).*?\)", r"*(picture: \1)*", Path("README.md").read_text("utf-8")),
    long_description_content_type="text/markdown",
    ext_modules=[Extension("cece._C", sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("csrc/**/*.cpp")))],
    cmdclass={"build_ext": Build, "build_py": BuildPython},
)
