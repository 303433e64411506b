"""Which library of the C++ backend runs: the best by itself, a forced one or none."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from native_program import NF4, ROOT

from qlora_ref import dispatch, doctor, native, ops
from qlora_ref.dispatch import explain, force_backend, force_isa

QUANTIZE = ("quantize_4bit", torch.device("cpu"))


@pytest.fixture(autouse=True)
def nothing_is_forced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """dispatch.py, having looked at nothing yet; what it finds is forgotten after the test."""
    for name in ("_load", "_preferred"):
        cached = functools.cache(getattr(dispatch, name).__wrapped__)
        monkeypatch.setattr(dispatch, name, cached)
    for variable in ("QLORA_REF_BACKEND", "QLORA_REF_ISA"):
        monkeypatch.delenv(variable, raising=False)
    with force_backend(None), force_isa(None):
        yield


@pytest.fixture
def folder(fresh_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The libraries compiled from the sources as they are now, taken for the installed ones."""
    monkeypatch.setattr(native, "FOLDER", fresh_folder)
    return fresh_folder


def library_of(function: object) -> str:
    """The file that the function which dispatch.py selected calls into."""
    return Path(function.__self__._library._name).name


def copy_libraries(source: Path, target: Path, isas: tuple[str, ...]) -> None:
    for isa in isas:
        shutil.copy(native.library_path(source, isa), native.library_path(target, isa))


# The choice.


def test_the_best_library_runs(folder: Path) -> None:
    best = native.available_isas(folder)[-1]
    for operation in dispatch.OPERATIONS:
        assert explain(operation).backend == "cpu"
    assert library_of(dispatch.select(*QUANTIZE)) == f"libqlora_cpu_{best}.so"


def test_function_forces_a_library_until_it_is_lifted(isa: str, folder: Path) -> None:
    usual = library_of(dispatch.select(*QUANTIZE))
    force_isa(isa)
    assert library_of(dispatch.select(*QUANTIZE)) == f"libqlora_cpu_{isa}.so"
    force_isa(None)
    assert library_of(dispatch.select(*QUANTIZE)) == usual


def test_context_manager_forces_a_library_inside_only(isa: str, folder: Path) -> None:
    usual = library_of(dispatch.select(*QUANTIZE))
    with force_isa(isa):
        assert library_of(dispatch.select(*QUANTIZE)) == f"libqlora_cpu_{isa}.so"
    assert library_of(dispatch.select(*QUANTIZE)) == usual


def test_environment_variable_forces_a_library(
    isa: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_REF_ISA", isa)
    assert dispatch.forced_isa() == isa
    assert library_of(dispatch.select(*QUANTIZE)) == f"libqlora_cpu_{isa}.so"
    with force_isa("baseline"):
        assert library_of(dispatch.select(*QUANTIZE)) == "libqlora_cpu_baseline.so"


def test_environment_holds_from_the_start_of_a_process(isa: str) -> None:
    script = (
        "import torch; from qlora_ref import dispatch\n"
        "select = dispatch.select('quantize_4bit', torch.device('cpu'))\n"
        "print(select.__self__._library._name)"
    )
    environment = os.environ | {"QLORA_REF_ISA": isa, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert Path(output.stdout.strip()).name == f"libqlora_cpu_{isa}.so"


# What cannot be had.


@pytest.mark.parametrize("name", ["", "sse", "AVX2", "avx-512", "best"])
def test_unknown_names_are_refused_with_the_known_ones(name: str) -> None:
    force_isa("avx2")
    with pytest.raises(ValueError, match=f"no isa is called '{name}'.*baseline.*amx"):
        force_isa(name)
    assert dispatch.forced_isa() == "avx2"  # as before


def test_unknown_name_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_REF_ISA", "sse")
    with pytest.raises(ValueError, match="no isa is called 'sse'"):
        ops.quantize_4bit(torch.zeros(64), NF4)


def test_what_the_build_lacks_raises_and_never_falls_back(
    fresh_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_libraries(fresh_folder, tmp_path, ("baseline",))
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    reason = "the compiler built no library for avx2; there is: baseline"
    with force_isa("avx2"):
        with pytest.raises(native.BackendUnavailable, match=reason):
            ops.quantize_4bit(torch.zeros(64), NF4)
        assert explain("quantize_4bit").backend is None
        assert explain("quantize_4bit").reasons["cpu"] == reason
        facts = doctor.diagnose()
        assert (
            facts["machine"]["c++ kernels"] == "avx2 is forced and does not run here, of baseline"
        )
        assert "avx2 does not run here; unset QLORA_REF_ISA for baseline" in facts["advice"]
    assert library_of(dispatch.select(*QUANTIZE)) == "libqlora_cpu_baseline.so"


def test_what_the_processor_lacks_raises_and_never_falls_back(
    fresh_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_libraries(fresh_folder, tmp_path, ("baseline",))
    native.library_path(tmp_path, "amx").write_text("built, and never opened")
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    monkeypatch.setattr(native, "available_isas", lambda folder: ("baseline",))
    reason = "this processor does not have amx; it runs: baseline"
    with force_isa("amx"), pytest.raises(native.BackendUnavailable, match=reason):
        ops.quantize_4bit(torch.zeros(64), NF4)


def test_a_forced_library_forces_the_cpp_backend(folder: Path) -> None:
    with force_isa("baseline"):
        explanation = explain("quantize_4bit")
        assert explanation.backend == "cpu"
        assert explanation.reasons["reference"] == "cpu is forced"
        assert explain("quantize_4bit", "cuda").reasons["reference"] != "cpu is forced"


def test_a_forced_backend_comes_before_a_forced_library(folder: Path) -> None:
    with force_isa("baseline"), force_backend("reference"):
        assert explain("quantize_4bit").backend == "reference"


def test_without_a_library_the_reference_runs_and_the_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    with pytest.raises(native.BackendUnavailable, match="no compiled library: install a C\\+\\+"):
        native.load("cpu", "quantize_4bit")
    explanation = explain("quantize_4bit")
    assert explanation.backend == "reference"
    assert "install a C++ compiler and reinstall" in explanation.reasons["cpu"]
    facts = doctor.diagnose()
    assert facts["machine"]["c++ kernels"].startswith("none: no compiled library")
    assert facts["operations"]["cpu"]["quantize_4bit"]["backend"] == "reference"
    assert facts["advice"][0].startswith("the C++ kernels are not there: ")
    assert dispatch.select(*QUANTIZE).__module__ == "qlora_ref.reference.quantize_4bit"
    with force_isa("baseline"), pytest.raises(native.BackendUnavailable, match="is forced but"):
        dispatch.select(*QUANTIZE)


# What the processor can run.


def best_isa(folder: Path) -> str:
    library = native.open_library(native.library_path(folder, "baseline"))
    return native.ISAS[library.best_isa()]


def test_the_processor_is_asked_right_according_to_linux(fresh_folder: Path) -> None:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = next((line for line in text.splitlines() if line.startswith("flags")), None)
    if found is None:
        pytest.skip("needs the flags of an x86 processor in /proc/cpuinfo")
    needed = [  # by each member of ISAS, beyond those before it
        set(),
        {"avx", "avx2", "fma", "f16c"},
        {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
        {"avx512_bf16", "avx512vbmi"},
        {"amx_tile", "amx_bf16"},
    ]
    flags, best = set(found.split()), -1
    while best + 1 < len(needed) and needed[best + 1] <= flags:
        best += 1
    assert best_isa(fresh_folder) == native.ISAS[best]


def test_the_processor_is_asked_right_according_to_torch(fresh_folder: Path) -> None:
    known = {"DEFAULT": {"baseline"}, "AVX2": {"avx2"}, "AVX512": set(native.ISAS[2:])}
    capability = torch.backends.cpu.get_cpu_capability()
    if "ATEN_CPU_CAPABILITY" in os.environ or capability not in known:
        pytest.skip(f"torch says {capability}, which need not be the processor's best")
    assert best_isa(fresh_folder) in known[capability]


def test_every_library_that_was_built_up_to_the_best_is_available(
    build: SimpleNamespace, fresh_folder: Path
) -> None:
    up_to = native.ISAS.index(best_isa(fresh_folder)) + 1
    built = build.isa_flags(build.find_compiler())
    expected = tuple(isa for isa in native.ISAS[:up_to] if isa in built)
    assert native.available_isas(fresh_folder) == expected
