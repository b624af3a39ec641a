"""Builds cece._C: CPU kernels once per instruction set, CUDA kernels where nvcc and a CUDA build of torch are there.

CECE_CUDA=0|1   leave the CUDA kernels out | build them whatever torch is (against a CPU-only torch too)
CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX   as in torch's own extensions
"""

import importlib
import os
import platform
import shutil
import site
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup
from setuptools.command.build_clib import build_clib

VERSION = "0.1.0"
ROOT = Path(__file__).parent.resolve()
os.chdir(ROOT)


def stop(sentence):
    sys.exit(f"cece: {sentence}")


def import_torch():
    """torch, also from inside pip's isolated build: from the environment that cece is installed into."""
    try:
        return importlib.import_module("torch")
    except ImportError:
        pass
    places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    for place in places:
        if (Path(place) / "torch" / "version.py").is_file() and place not in sys.path:
            sys.path.append(place)
            return importlib.import_module("torch")
    stop(
        "building needs torch >= 2.11 in this environment, and there is none. Install it first"
        " (pip install torch), then run: pip install --no-build-isolation ."
    )


torch = import_torch()
if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 11):
    stop(f"building needs torch >= 2.11, and this environment has {torch.__version__}: pip install --upgrade torch")
CXX = os.environ.get("CXX", "g++" if shutil.which("g++") else "c++")
if not shutil.which(CXX.split()[0]):
    stop(
        f"building needs a C++20 compiler, and {CXX!r} is not there: install g++ 11 or newer, or set CXX to one"
        " (Debian, Ubuntu: apt-get install g++)"
    )
os.environ["CXX"] = CXX
os.environ.setdefault("CC", CXX)  # build_clib compiles with CC

from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths  # noqa: E402

JOBS = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
HEADERS = [str(p) for p in ROOT.glob("csrc/**/*") if p.suffix in {".h", ".inl", ".cuh"}]
FLAGS = [
    "-std=c++20",
    "-O3",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
    "-g0",
]

# ---- CPU: a row an instruction set. csrc/cpu/isa_<name>.cpp is compiled with these flags on top.
ISAS = {"default": []}
X86 = platform.machine().lower() in {"x86_64", "amd64"}
if X86:
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
LIBRARIES = [
    (
        f"cece_{name}",
        {
            "sources": [f"csrc/cpu/isa_{name}.cpp"],
            "include_dirs": include_paths(),
            "cflags": [*FLAGS, "-fPIC", "-Wno-maybe-uninitialized", *flags],
            "obj_deps": {"": HEADERS},
        },
    )
    for name, flags in ISAS.items()
]

# ---- CUDA: torch-free .cu files through nvcc, linked with the static runtime
ARCHS = ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]  # and PTX of the last for what comes after


def find_cuda_home():
    """The toolkit's folder, or None. A wrapper script named nvcc elsewhere does not count."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and Path(nvcc).resolve().parents[1]]
    for home in [*candidates, "/usr/local/cuda"]:
        if home and (Path(home) / "include/cuda_runtime.h").is_file() and (Path(home) / "bin/nvcc").is_file():
            return Path(home)
    return None


def cuda_home():
    """Where to build CUDA kernels from, or None to leave them out."""
    wanted = os.environ.get("CECE_CUDA", "auto")
    if wanted not in {"auto", "0", "1"}:
        stop(f"CECE_CUDA must be 0, 1 or unset, got {wanted!r}")
    home = find_cuda_home()
    sources = sorted(ROOT.glob("csrc/cuda/*.cu"))
    if wanted == "1" and not home:
        stop("CECE_CUDA=1 needs nvcc, and there is none: install the CUDA toolkit or set CUDA_HOME to its folder")
    if wanted == "0" or not home or not sources or (wanted == "auto" and torch.version.cuda is None):
        return None
    return home


def cuda_archs(nvcc):
    """("9.0", ...) to compile for, and the flags: what the list names and this nvcc knows."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    archs = [a for a in asked or ARCHS if f"compute_{a.split('+')[0].replace('.', '')}" in known]
    if not archs:
        stop(f"nvcc knows none of the architectures asked for: {' '.join(asked or ARCHS)}")
    flags = []
    for arch in archs:
        number = arch.split("+")[0].replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX") or (not asked and arch == archs[-1]):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return [a.split("+")[0] for a in archs], flags


CUDA_HOME = cuda_home()
CUDA_ARCHS, CUDA_ARCH_FLAGS = cuda_archs(CUDA_HOME / "bin/nvcc") if CUDA_HOME else ([], [])
CUDA_FLAGS = [
    "-std=c++17",
    "-O3",
    "--expt-relaxed-constexpr",
    "-Xptxas=-warn-spills,-warn-lmem-usage,-Werror",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
]


class BuildLibraries(build_clib):
    def build_libraries(self, libraries):
        with ThreadPoolExecutor(JOBS) as pool:
            list(pool.map(lambda library: build_clib.build_libraries(self, [library]), libraries))


class Build(BuildExtension):
    def build_extensions(self):
        if CUDA_HOME:
            self.extensions[0].extra_objects += self.compile_cuda()
        super().build_extensions()
        self.write_built_for()

    def compile_cuda(self):
        folder = Path(self.build_temp).resolve() / "cuda"
        folder.mkdir(parents=True, exist_ok=True)

        def compile_one(source):
            out = folder / f"{source.stem}.o"
            newest = max(Path(f).stat().st_mtime for f in [source, __file__, *HEADERS])
            if not out.exists() or out.stat().st_mtime < newest:
                command = [CUDA_HOME / "bin/nvcc", *CUDA_FLAGS, *CUDA_ARCH_FLAGS, "-c", source, "-o", out]
                print(" ".join(map(str, command)), flush=True)
                subprocess.run(command, check=True)
            return str(out)

        with ThreadPoolExecutor(JOBS) as pool:
            return list(pool.map(compile_one, sorted(ROOT.glob("csrc/cuda/*.cu"))))

    def write_built_for(self):
        """What `import cece` checks before it loads _C, which another torch could not even resolve."""
        in_tree = self.inplace or getattr(self, "editable_mode", False)
        folder = ROOT / "cece" if in_tree else Path(self.build_lib) / "cece"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_built_for.py").write_text(f'TORCH = "{torch.__version__}"\n')


def extension():
    sources = ["csrc/ops.cpp", "csrc/meta.cpp", "csrc/autograd.cpp", "csrc/module.cpp", "csrc/cpu/ops.cpp"]
    include_dirs, link = [], []
    if CUDA_HOME:
        sources.append("csrc/cuda/ops.cpp")
        include_dirs.append(str(CUDA_HOME / "include"))
        lib = next(d for d in ("lib64", "lib") if (CUDA_HOME / d / "libcudart_static.a").is_file())
        link += [str(CUDA_HOME / lib / "libcudart_static.a"), "-ldl", "-lrt", "-lpthread"]
    archs = ", ".join(f'"{a}"' for a in CUDA_ARCHS) or "nullptr"
    macros = [
        ("CECE_VERSION", f'"{VERSION}"'),
        ("CECE_TORCH", f'"{torch.__version__}"'),
        ("CECE_CUDA_ARCHS", archs),
        *([("CECE_X86", None)] if X86 else []),
    ]
    return CppExtension(
        "cece._C",
        sources,
        include_dirs=include_dirs,
        depends=HEADERS,
        define_macros=macros,
        extra_compile_args=FLAGS,
        extra_link_args=link,
    )


setup(
    version=VERSION,
    libraries=LIBRARIES,
    ext_modules=[extension()],
    cmdclass={"build_ext": Build.with_options(no_python_abi_suffix=False), "build_clib": BuildLibraries},
)
