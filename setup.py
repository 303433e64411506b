"""Builds csrc/ into shared libraries beside the Python files. Everything else: pyproject.toml.

The libraries have a plain C interface and are loaded with ctypes, so that building them takes a
C++ compiler and nothing of torch or Python; csrc/cuda is built where nvcc is. Without a compiler
the package installs all the same, and runs on its reference backend.

    QLORA_REF_BUILD_CPU=0              do not compile csrc/cpu
    QLORA_REF_BUILD_CUDA=0             do not compile csrc/cuda
    QLORA_REF_CUDA_ARCHITECTURES=80    compile csrc/cuda for these only, as "80 90a"
    CXX=clang++                        compile with this instead of c++, g++ or clang++
    NVCC=/usr/local/cuda/bin/nvcc      compile with this instead of the nvcc that is found
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent

# Contraction would fuse products and sums into fewer roundings where the processor can: other bits
# than the reference. Without errno, sqrt is one instruction. gcc 12 takes the undefined upper
# halves in its own AVX-512 headers for uninitialised variables.
CPU_FLAGS = [
    *("-O3", "-std=c++17", "-fPIC", "-ffp-contract=off", "-fno-math-errno"),
    *("-Wall", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
]

# Every source is compiled once for each of these, into a library each (libraries share no inline
# functions, which a linker would merge into those of one instruction set). native.py loads the best
# one that the processor has, so that a wheel runs on every machine of its architecture. Each set
# includes those before it. Of the processors with BF16 one family has no VBMI (Cooper Lake): it
# takes the set before.
ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
    "avx512_bf16": ["-mavx512bf16", "-mavx512vbmi"],
    "amx": ["-mamx-tile", "-mamx-bf16"],
}


# As on the CPU, products and sums are fused only where the source says so.
CUDA_FLAGS = [
    *("-O3", "-std=c++17", "-fmad=false", "-lineinfo", "-DQLORA_CUDA"),
    *("-Xcompiler", "-fPIC,-Wall", "-Xfatbin", "--compress=false"),
]
PACKAGED_NVCC = "nvidia/cu*/bin/nvcc"  # in site-packages
# The first is also kept as PTX, which the driver of any later GPU compiles when it loads it.
CUDA_ARCHITECTURES = ("80", "86", "89", "90a", "120")


def cpu_sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))


def find_compiler() -> list[str]:
    """The C++ compiler's command: from CXX, else the first that is installed."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    missing = f"CXX names {named[0]}, which is not there" if named else "no C++ compiler"
    raise CompileError(f"{missing}: install g++ or clang++, or name another in CXX")


def isa_flags(compiler: list[str]) -> dict[str, list[str]]:
    """The flags for each instruction set that the compiler can compile for, from ISA_FLAGS."""
    flags: list[str] = []
    known = {}
    for isa, added in ISA_FLAGS.items():
        flags = [*flags, *added]
        command = [*compiler, *flags, "-x", "c++", "-fsyntax-only", "-"]
        tried = subprocess.run(command, input="", text=True, capture_output=True, check=False)
        if tried.returncode != 0:
            break  # another architecture, or a compiler older than the instruction set
        known[isa] = flags
    return known


def openmp_flags(compiler: list[str]) -> list[str]:
    """-fopenmp where the code it makes can run on torch's own OpenMP, else nothing.

    Two OpenMP runtimes in one process compete for the same cores. The library is therefore linked
    to none: its GOMP_* symbols are found in the libgomp that torch has loaded. Only gcc calls
    GOMP_*; what clang calls is not in there. Without OpenMP the loops run on one thread.
    """
    probe = "#if defined(__clang__) || !defined(__linux__) || !defined(_OPENMP)\n#error\n#endif\n"
    command = [*compiler, "-fopenmp", "-x", "c++", "-fsyntax-only", "-"]
    tried = subprocess.run(command, input=probe, text=True, capture_output=True, check=False)
    return ["-fopenmp"] if tried.returncode == 0 else []


def compile_objects(sources: list[Path], flags: list[str]) -> list[Path]:
    """C++ sources as object files, kept under build/. Raises as kept_objects does."""
    compiler = find_compiler()
    command = [*compiler, *CPU_FLAGS, *openmp_flags(compiler), *flags]
    return kept_objects("cpu", command, sources, [*ROOT.glob("csrc/**/*.h")])


def kept_objects(
    folder: str, command: list[str], sources: list[Path], headers: list[Path]
) -> list[Path]:
    """Compile sources, several at a time, unless build/FOLDER has them: same content, same command.

    Raises CompileError with what the compiler says.
    """
    content = b"".join(path.read_bytes() for path in sorted([*headers, *sources]))
    key = hashlib.sha256(content + shlex.join(command).encode()).hexdigest()[:16]
    kept = ROOT / "build" / folder / key
    kept.mkdir(parents=True, exist_ok=True)
    targets = [kept / f"{source.stem}.o" for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda pair: _compile(command, *pair), zip(sources, targets)))
    return targets


def _compile(command: list[str], source: Path, target: Path) -> None:
    if not target.exists():
        aside = target.with_suffix(f".{os.getpid()}.o")
        execute([*command, "-c", str(source), "-o", str(aside)])
        os.replace(aside, target)


def compile_library(sources: list[Path], library: Path, flags: list[str]) -> None:
    """Compile C++ sources and link them to one shared library. Raises as compile_objects does."""
    library.parent.mkdir(parents=True, exist_ok=True)
    objects = compile_objects(sources, flags)
    undefined = ["-Wl,-undefined,dynamic_lookup"] if sys.platform == "darwin" else []
    # Linked aside and moved: a process that has mapped the old library keeps the old file.
    beside = library.with_name(library.name + ".new")
    execute([*find_compiler(), "-shared", *undefined, *map(str, objects), "-o", str(beside)])
    os.replace(beside, library)


def cuda_sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def find_nvcc() -> list[str]:
    """nvcc's command: from NVCC, CUDA_HOME, the path, or the package nvidia-cuda-nvcc."""
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    packaged = [str(path) for folder in sys.path for path in Path(folder).glob(PACKAGED_NVCC)]
    named = [os.environ["NVCC"]] if "NVCC" in os.environ else []
    for command in named or [f"{toolkit}/bin/nvcc", "nvcc", *packaged]:
        if shutil.which(command):
            return [command]
    raise CompileError("no nvcc: install the CUDA toolkit, or name nvcc in NVCC")


def cuda_architectures() -> list[str]:
    return os.environ.get("QLORA_REF_CUDA_ARCHITECTURES", " ".join(CUDA_ARCHITECTURES)).split()


def cuda_objects() -> list[Path]:
    """csrc/cuda as object files for cuda_architectures(), as compile_objects does it with nvcc."""
    first, *others = cuda_architectures()
    codes = [f"arch=compute_{first},code=[sm_{first},compute_{first}]"]
    codes += [f"arch=compute_{other},code=sm_{other}" for other in others]
    command = [*find_nvcc(), *CUDA_FLAGS, *(f"-gencode={code}" for code in codes)]
    headers = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.cuh")]
    return kept_objects("cuda", command, cuda_sources(), headers)


def link_cuda(objects: list[Path], library: Path, runtime: str = "static") -> None:
    """Link objects to a library, with a CUDA runtime inside (static), or without one (none).

    With it inside, the library needs nothing but a driver, whichever CUDA torch was built with.
    Without, it takes what the process that loads it has.
    """
    library.parent.mkdir(parents=True, exist_ok=True)
    aside = library.with_name(library.name + ".new")
    (nvcc,) = find_nvcc()
    # Where the packages of NVIDIA have it; a toolkit's nvcc knows by itself.
    packaged = [f"-L{Path(str(shutil.which(nvcc))).resolve().parent.parent / 'lib'}"]
    # The runtime inside must not be mistaken for the one that torch has loaded, nor the other way.
    hidden = ["-Xlinker", "--exclude-libs=ALL"]
    linked = [nvcc, "-shared", "--cudart", runtime, *packaged, *hidden, *map(str, objects)]
    execute([*linked, "-o", str(aside)])
    os.replace(aside, library)


def execute(command: list[str]) -> None:
    """Run a compiler or linker. Raises CompileError with what it says."""
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise CompileError(f"{shlex.join(command)}\n{finished.stderr}")


class BuildLibraries(build_ext):
    """Builds plain shared libraries: no Python in their file names, or in the files."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, extension: Extension) -> None:
        library = Path(self.get_ext_fullpath(extension.name))
        is_cuda = extension.name.endswith("cuda")
        try:
            if is_cuda:
                link_cuda(cuda_objects(), library)
            else:
                sources = [ROOT / source for source in extension.sources]
                compile_library(sources, library, extension.extra_compile_args)
        except CompileError:
            tool, where = ("nvcc", "GPUs") if is_cuda else ("a C++ compiler", "the CPU")
            self.warn(
                f"{extension.name} is not built: qlora_ref will run on its slow reference backend "
                f"on {where}. Install {tool} and reinstall to change that"
            )
            raise  # the extension is optional: setuptools prints the reason and goes on


class PlatformWheel(bdist_wheel):
    """The wheel serves every Python 3, since the libraries know nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def extensions() -> list[Extension]:
    cpu = [] if os.environ.get("QLORA_REF_BUILD_CPU") == "0" else cpu_extensions()
    cuda = [] if os.environ.get("QLORA_REF_BUILD_CUDA") == "0" else cuda_extensions()
    return cpu + cuda


def cuda_extensions() -> list[Extension]:
    if not cuda_sources():
        return []
    try:
        find_nvcc()
    except CompileError:
        return []  # most machines: `qlora-ref doctor` says how to change that
    sources = [str(path.relative_to(ROOT)) for path in cuda_sources()]
    paths = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc").glob("cuda/*.cuh")]
    headers = [str(path.relative_to(ROOT)) for path in paths]
    return [Extension("qlora_ref.libqlora_cuda", sources, depends=headers, optional=True)]


def cpu_extensions() -> list[Extension]:
    try:
        flags_of = isa_flags(find_compiler())
    except CompileError:
        flags_of = {"baseline": []}  # building it says what is missing
    sources = [str(path.relative_to(ROOT)) for path in cpu_sources()]
    headers = [str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.h")]
    return [
        Extension(
            f"qlora_ref.libqlora_cpu_{isa}",
            sources,
            depends=headers,
            extra_compile_args=flags,
            optional=True,
        )
        for isa, flags in flags_of.items()
    ]


def packages() -> list[str]:
    # kernels/ has no __init__.py (a folder of that name on the path must not shadow Hugging Face's
    # package `kernels`), so that find_packages passes over it; it is a package once it holds files.
    has_kernels = any((ROOT / "kernels").glob("*.py"))
    return find_packages(include=["qlora_ref*"]) + ["qlora_kernels"] * has_kernels


if __name__ == "__main__":
    setup(
        packages=packages(),
        package_dir={"qlora_kernels": "kernels"},
        package_data={"qlora_ref": ["py.typed"]},
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel},
    )
