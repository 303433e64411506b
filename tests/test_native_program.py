"""The kernels without Python: no access outside an array; another processor gives the same bits."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compare import normal
from native_program import (
    DYNAMIC,
    ProgramOperations,
    assert_as_the_reference,
    build_program,
    setup_definitions,
)

from qlora_ref import native

AARCH64_COMPILERS = ("aarch64-linux-gnu-g++", "aarch64-linux-gnu-g++-12")
AARCH64_LIBRARIES = Path("/usr/aarch64-linux-gnu")


@pytest.fixture(scope="module")
def program(build: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not sys.platform.startswith("linux"):
        pytest.skip("the program is written for Linux")
    return build_program(build, tmp_path_factory.mktemp("program"))


def test_no_access_outside_the_arrays_by_any_instruction(
    isa: str, program: Path, fresh_folder: Path
) -> None:
    # Each array lies between pages that may not be touched; what is only read cannot be written.
    library = native.library_path(fresh_folder, isa)
    assert_as_the_reference(ProgramOperations(program, library))


def test_an_access_outside_an_array_ends_the_program(program: Path, fresh_folder: Path) -> None:
    library = native.library_path(fresh_folder, "baseline")
    cpu = ProgramOperations(program, library, callers=1)
    with pytest.raises(RuntimeError, match="exit -11"):
        tensors = (*[normal(1).byte()] * 2, DYNAMIC, 256, 10**4, normal(1), 0)
        cpu._call("dequantize_8bit", torch.device("cpu"), *tensors)


@pytest.fixture
def cross_build(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """setup.py with a compiler for aarch64 in the place of this machine's."""
    compiler = next(filter(shutil.which, AARCH64_COMPILERS), None)
    if compiler is None:
        pytest.skip("needs a compiler for aarch64: apt-get install g++-12-aarch64-linux-gnu")
    monkeypatch.setenv("CXX", compiler)
    return setup_definitions()


@pytest.mark.slow
def test_aarch64_gives_the_same_bits(cross_build: SimpleNamespace, tmp_path: Path) -> None:
    assert list(cross_build.isa_flags(cross_build.find_compiler())) == ["baseline"]
    library = native.library_path(tmp_path, "baseline")
    cross_build.compile_library(cross_build.cpu_sources(), library, [])
    if shutil.which("qemu-aarch64-static") is None:
        pytest.skip("compiled; to run it: apt-get install qemu-user-static")
    program = build_program(cross_build, tmp_path)
    emulator = ("qemu-aarch64-static", "-L", str(AARCH64_LIBRARIES))
    assert_as_the_reference(ProgramOperations(*emulator, program, library))
