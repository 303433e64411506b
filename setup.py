"""Builds csrc/ into shared libraries beside the Python files. Everything else: pyproject.toml.

The libraries have a plain C interface and are loaded with ctypes, so that building them takes a
C++ compiler and nothing of torch or Python. Without a compiler the package installs all the same,
and runs on its reference backend.

    QLORA_REF_BUILD_CPU=0   do not compile csrc/cpu
    CXX=clang++             compile with this instead of c++, g++ or clang++
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
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
# includes those before it.
ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
    "avx512_bf16": ["-mavx512bf16"],
    "amx": ["-mamx-tile", "-mamx-bf16"],
}


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


def compile_objects(sources: list[Path], folder: Path, flags: list[str]) -> list[Path]:
    """Compile C++ sources, several at a time, to object files in a folder.

    Raises CompileError with what the compiler says.
    """
    compiler = find_compiler()
    flags = [*CPU_FLAGS, *openmp_flags(compiler), *flags]
    objects = [folder / f"{source.stem}.o" for source in sources]
    commands = [
        [*compiler, *flags, "-c", str(source), "-o", str(target)]
        for source, target in zip(sources, objects)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(execute, commands))
    return objects


def compile_library(sources: list[Path], library: Path, flags: list[str]) -> None:
    """Compile C++ sources and link them to one shared library. Raises as compile_objects does."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        objects = compile_objects(sources, Path(folder), flags)
        # Linked aside and moved: a process that has mapped the old library keeps the old file.
        linked = Path(folder, library.name)
        undefined = ["-Wl,-undefined,dynamic_lookup"] if sys.platform == "darwin" else []
        execute([*find_compiler(), "-shared", *undefined, *map(str, objects), "-o", str(linked)])
        beside = library.with_name(library.name + ".new")
        shutil.copy(linked, beside)
        os.replace(beside, library)


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
        try:
            compile_library(
                [ROOT / source for source in extension.sources],
                Path(self.get_ext_fullpath(extension.name)),
                extension.extra_compile_args,
            )
        except CompileError:
            self.warn(
                f"{extension.name} is not built: qlora_ref will run on its slow reference backend. "
                "Install a C++ compiler and reinstall to change that"
            )
            raise  # the extension is optional: setuptools prints the reason and goes on


class PlatformWheel(bdist_wheel):
    """The wheel serves every Python 3, since the libraries know nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def extensions() -> list[Extension]:
    if os.environ.get("QLORA_REF_BUILD_CPU") == "0":
        return []
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
