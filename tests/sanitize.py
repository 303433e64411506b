"""Run the C++ kernels under sanitizers: `make sanitize`.

    python tests/sanitize.py address [--isas all] [pytest arguments]
    python tests/sanitize.py thread [--isas all]

address: the libraries are built with -fsanitize=address,undefined and the tests of the operations
run on them, with the sanitizers' runtimes loaded before Python. What it does not see: accesses by
masked, gathering and tile instructions, which gcc leaves without checks. Those end at the guard
pages of test_native_program.py.

thread: the libraries are built with -fsanitize=thread and called by tests/native/call_kernels.cpp,
with three OpenMP threads in each of two callers. In Python the sanitizer would see neither how
libgomp's threads wait for one another nor those of torch; here OpenMP is openmp_on_threads.cpp,
which is compiled with it. It reports two accesses that nothing orders whether or not they collide
in this run, but only of code that runs, and with the same gap for masked and tile instructions.

Each first makes sure that its sanitizer reports a mistake of the caller.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

from compare import normal
from native_program import (
    DYNAMIC,
    ROOT,
    TSAN_FLAGS,
    ProgramOperations,
    assert_as_the_reference,
    build_program,
    setup_definitions,
)

from qlora_ref import native

# -O1 and -g for reports that name lines. The first undefined operation ends the run.
ADDRESS_FLAGS = (
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    *("-fno-omit-frame-pointer", "-O1", "-g"),
)

# Two values are asked for where there is one: the second is read and written outside.
READ_OUTSIDE = """
import sys, torch
from pathlib import Path
from qlora_ref import codebooks, native
library = native.open_library(Path(sys.argv[1]))
code, scale = torch.zeros(1, dtype=torch.uint8), torch.ones(1)
table, y = codebooks.dynamic_codebook(), torch.zeros(1)
pointers = [tensor.data_ptr() for tensor in (code, scale, table)]
library.dequantize_8bit(*pointers, 1024, 1024, y.data_ptr(), 0, 1)
"""


def build_libraries(
    build: SimpleNamespace, folder: Path, isas: list[str], flags: tuple[str, ...]
) -> list[Path]:
    """The libraries with a sanitizer; `baseline` is always among them, it is needed to load any."""
    flags_of = build.isa_flags(build.find_compiler())
    libraries = []
    for isa in dict.fromkeys(["baseline", *isas]):
        print(f"building {isa}", flush=True)
        library = native.library_path(folder, isa)
        build.compile_library(build.cpu_sources(), library, [*flags_of[isa], *flags])
        libraries.append(library)
    return libraries


def sanitizer_environment(build: SimpleNamespace) -> dict[str, str]:
    """For a Python that runs libraries built with ADDRESS_FLAGS."""
    runtimes = []
    for name in ("libasan.so", "libubsan.so"):
        command = [*build.find_compiler(), f"-print-file-name={name}"]
        runtimes.append(subprocess.check_output(command, text=True).strip())
    return os.environ | {
        "LD_PRELOAD": ":".join(runtimes),
        # Python frees nothing at its end. Torch's own errors are not ours to catch.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "2",
    }


def check_addresses(
    build: SimpleNamespace, folder: Path, isas: list[str], arguments: list[str]
) -> int:
    libraries = build_libraries(build, folder, isas, ADDRESS_FLAGS)
    environment = sanitizer_environment(build)
    command = [sys.executable, "-c", READ_OUTSIDE, str(libraries[0])]
    seen = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "AddressSanitizer: heap-buffer-overflow" not in seen.stderr:
        print(f"the address sanitizer reports nothing, though it should:\n{seen.stderr}")
        return 1
    # The report is written past Python, by a process that ends with it.
    command = [sys.executable, "-m", "pytest", "--capture=sys", f"--libraries={folder}"]
    return subprocess.run([*command, *arguments], env=environment, cwd=ROOT).returncode


def check_threads(build: SimpleNamespace, folder: Path, isas: list[str]) -> int:
    program = build_program(build, folder, tsan=True)
    for library in build_libraries(build, folder, isas, TSAN_FLAGS):
        try:
            racing = ProgramOperations(program, library, threads=1, shared=True)
            racing.quantize_8bit(normal(1000), DYNAMIC, 64)
            print("the thread sanitizer reports nothing, though it should")
            return 1
        except RuntimeError as error:
            assert "ThreadSanitizer: data race" in str(error), error
        assert_as_the_reference(ProgramOperations(program, library, threads=3))
        print(f"{library.name}: no race", flush=True)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the C++ kernels under sanitizers.")
    parser.add_argument("sanitizer", choices=["address", "thread"])
    parser.add_argument("--isas", default="best", help="best (and baseline), all, or avx2,amx")
    options, arguments = parser.parse_known_args()
    available = native.available_isas(native.FOLDER)
    named = {"best": available[-1:], "all": available}
    isas = list(named.get(options.isas, options.isas.split(",")))
    build = setup_definitions()
    with tempfile.TemporaryDirectory() as name:
        if options.sanitizer == "address":
            return check_addresses(build, Path(name), isas, arguments)
        return check_threads(build, Path(name), isas)


if __name__ == "__main__":
    sys.exit(main())
