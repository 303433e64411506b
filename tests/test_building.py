"""Building the compiled libraries: with a poor compiler, without one, into a wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from compare import assert_same_bits
from native_program import REFERENCE, ROOT, all_results
from test_native import declared_functions

from qlora_ref import native
from qlora_ref.native_operations import CpuOperations


def test_no_compiler_is_said(build: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(build.CompileError, match="no C\\+\\+ compiler"):
        build.find_compiler()


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_a_compiler_that_fails_is_said(
    compiler: str, build: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(build.CompileError, match=compiler):
        build.compile_library(build.cpu_sources(), tmp_path / "library.so", [])
    assert not (tmp_path / "library.so").exists()


def test_flags_of_an_instruction_set_include_those_before_it(build: SimpleNamespace) -> None:
    flags = list(build.isa_flags(build.find_compiler()).values())
    assert flags[0] == []
    for fewer, more in zip(flags, flags[1:]):
        assert more[: len(fewer)] == fewer and len(more) > len(fewer)


@pytest.mark.parametrize("unknown", native.ISAS[1:])
def test_a_compiler_builds_up_to_the_first_instruction_set_that_it_does_not_know(
    unknown: str, build: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = tuple(build.isa_flags(build.find_compiler()))
    if unknown not in known:
        pytest.skip(f"this compiler does not know {unknown} anyway")
    monkeypatch.setenv("QLORA_REF_BUILD_CUDA", "0")
    monkeypatch.setitem(build.ISA_FLAGS, unknown, ["-mno-such-instructions"])
    assert tuple(build.isa_flags(build.find_compiler())) == known[: known.index(unknown)]
    modules = [f"qlora_ref.libqlora_cpu_{isa}" for isa in known[: known.index(unknown)]]
    assert [extension.name for extension in build.extensions()] == modules


@pytest.mark.slow
def test_without_openmp_the_results_are_the_same(
    build: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(build.compile_objects.__globals__, "openmp_flags", lambda compiler: [])
    path = native.library_path(tmp_path, "baseline")
    build.compile_library(build.cpu_sources(), path, [])
    serial = CpuOperations(native.open_library(path))
    for actual, expected in zip(all_results(serial), all_results(REFERENCE), strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.slow
def test_sources_compile_without_warnings(build: SimpleNamespace) -> None:
    compiler = build.find_compiler()
    strict = ["-Wno-unknown-pragmas", "-Wextra", "-Werror", "-fsyntax-only"]
    for flags in build.isa_flags(compiler).values():
        command = [*compiler, *build.CPU_FLAGS, *flags, *build.openmp_flags(compiler), *strict]
        for source in build.cpu_sources():
            finished = subprocess.run([*command, str(source)], capture_output=True, text=True)
            assert finished.returncode == 0, finished.stderr


def test_each_source_is_named_after_the_function_it_exports(build: SimpleNamespace) -> None:
    assert {source.stem for source in build.cpu_sources()} == set(declared_functions())


# What an installation holds.


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What setup.py reads, without what was built from it."""
    folder = tmp_path / "checkout"
    without = shutil.ignore_patterns("*.so", "*.new", "__pycache__")
    for name in ("csrc", "qlora_ref", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=without)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def installed_files(checkout: Path, tmp_path: Path, **environment: str) -> set[str]:
    """The files in the wheel, which is what pip installs."""
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(tmp_path)]
    finished = subprocess.run(
        command,
        cwd=checkout,
        env=os.environ | {"QLORA_REF_BUILD_CUDA": "0"} | environment,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.parametrize("environment", [{"CXX": "false"}, {"QLORA_REF_BUILD_CPU": "0"}], ids=str)
def test_installs_without_a_compiler(
    environment: dict[str, str], checkout: Path, tmp_path: Path
) -> None:
    files = installed_files(checkout, tmp_path, **environment)
    assert "qlora_ref/native.py" in files
    assert not [name for name in files if name.endswith(".so")]


@pytest.mark.slow
def test_the_wheel_holds_a_library_for_each_instruction_set(
    build: SimpleNamespace, checkout: Path, tmp_path: Path
) -> None:
    known = build.isa_flags(build.find_compiler())
    files = installed_files(checkout, tmp_path)
    libraries = {name for name in files if name.endswith(".so")}
    assert libraries == {f"qlora_ref/libqlora_cpu_{isa}.so" for isa in known}


def test_the_cuda_library_needs_no_runtime_but_the_one_inside(
    build: SimpleNamespace, tmp_path: Path
) -> None:
    try:
        build.find_nvcc()
    except build.CompileError as error:
        pytest.skip(str(error))
    library = tmp_path / native.CUDA_LIBRARY
    build.link_cuda(build.cuda_objects(), library)
    needed = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True)
    assert "NEEDED" in needed.stdout and "libcudart" not in needed.stdout
    native.open_library(library, native.CUDA_SIGNATURES)  # without a driver as well


def test_without_nvcc_there_is_no_cuda_library_and_that_is_said(
    build: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVCC", "no-such-compiler")
    with pytest.raises(build.CompileError, match="no nvcc"):
        build.find_nvcc()
    assert build.cuda_extensions() == []
