"""The compiled library: how it is built, loaded and called. Its results: test_<operation>.py."""

from __future__ import annotations

import ctypes
import os
import re
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compare import DTYPES, assert_same_bits, normal, random_bytes, round_to
from torch import Tensor

from qlora_ref import codebooks, dispatch, native

ROOT = Path(__file__).resolve().parent.parent
HEADER = (ROOT / "csrc" / "kernels.h").read_text()

NF4, DYNAMIC = codebooks.nf4_codebook(), codebooks.dynamic_codebook()

# More than the library's kParallelMinimum, and no multiple of a block.
MANY = 100_001


@pytest.fixture(scope="module")
def build() -> SimpleNamespace:
    """What setup.py defines; skips where there is no compiler."""
    definitions = SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py"), run_name="setup"))
    try:
        definitions.find_compiler()
    except definitions.CompileError as error:
        pytest.skip(str(error))
    return definitions


@pytest.fixture(scope="module")
def fresh_folder(build: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The libraries compiled from the sources as they are now."""
    folder = tmp_path_factory.mktemp("libraries")
    for isa, flags in build.isa_flags(build.find_compiler()).items():
        build.compile_library(build.cpu_sources(), native.library_path(folder, isa), flags)
    return folder


@pytest.fixture(scope="module")
def fresh_library(fresh_folder: Path) -> Path:
    return native.library_path(fresh_folder, "baseline")


@pytest.fixture(params=native.ISAS)
def cpu(request: pytest.FixtureRequest, fresh_folder: Path) -> native.CpuOperations:
    """The operations in each library that this machine can run."""
    if request.param not in native.available_isas(fresh_folder):
        pytest.skip(f"this machine cannot run {request.param}")
    return native.CpuOperations(
        native.open_library(native.library_path(fresh_folder, request.param))
    )


def run_python(script: str, *arguments: str, **environment: str) -> str:
    """The output of a script in a process of its own."""
    finished = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def all_results(cpu: native.CpuOperations) -> list[Tensor]:
    """What every function of the library makes of seeded arguments."""
    x = normal(MANY)
    packed, absmax = cpu.quantize_4bit(x, NF4, 64)
    codes, absmax8 = cpu.quantize_8bit(x, DYNAMIC, 256)
    results = [packed, absmax, codes, absmax8]
    results.append(cpu.dequantize_4bit(packed, absmax, NF4, 64, (MANY,), torch.bfloat16))
    results.append(cpu.dequantize_8bit(codes, absmax8, DYNAMIC, 256, torch.float16))
    options = (1e-3, 0.9, 0.99, 1e-8, 0.01, 3)
    param, m, v = x.clone(), normal(MANY, seed=1), normal(MANY, seed=2).square()
    cpu.adamw_step([param], [x], [m], [v], [], [], None, None, *options)
    coded = [random_bytes(MANY, seed=3), random_bytes(MANY, seed=4)]
    scales = [normal(len(absmax8), seed=5).abs(), normal(len(absmax8), seed=6).abs()]
    tables = (DYNAMIC, codebooks.dynamic_codebook(signed=False))
    param8 = x.clone()
    state = ([tensor] for tensor in (param8, x, *coded, *scales))
    cpu.adamw_step(*state, *tables, *options)
    return [*results, param, m, v, param8, *coded, *scales]


def assert_all_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other)


# The interface.

C_TYPES = {
    "int": ctypes.c_int,
    "int64_t": ctypes.c_int64,
    "double": ctypes.c_double,
}


def declared_functions() -> dict[str, list[type]]:
    """The functions in kernels.h and the ctypes of their parameters."""
    functions = {}
    for name, parameters in re.findall(r"^int (\w+)\((.*?)\);", HEADER, re.MULTILINE | re.DOTALL):
        types = [parameter.split()[-2] for parameter in parameters.split(",") if parameter]
        pointer = ctypes.c_void_p
        functions[name] = [pointer if kind[-1] == "*" else C_TYPES[kind] for kind in types]
    return functions


def test_python_declares_the_functions_of_the_header() -> None:
    declared = {name: list(arguments) for name, arguments in native.SIGNATURES.items()}
    assert declared == declared_functions()


def test_python_knows_the_numbers_in_the_header() -> None:
    version = re.search(r"kInterfaceVersion = (\d+)", HEADER)
    assert version is not None and native.INTERFACE_VERSION == int(version[1])
    names = [f"k{str(dtype).removeprefix('torch.').capitalize()}" for dtype in native.DTYPES]
    pairs = zip(names, native.DTYPES.values(), strict=True)
    assert ", ".join(f"{name} = {number}" for name, number in pairs) in HEADER


def test_library_exports_every_function_of_the_header(fresh_library: Path) -> None:
    library = ctypes.CDLL(str(fresh_library))
    for name in declared_functions():
        assert hasattr(library, name)


def test_every_operation_has_a_function() -> None:
    for operation in dispatch.OPERATIONS:
        assert callable(getattr(native.CpuOperations, operation))


# Errors.


@pytest.mark.parametrize("status,error", [(1, TypeError), (2, ValueError), (77, RuntimeError)])
def test_error_codes_become_exceptions(status: int, error: type) -> None:
    with pytest.raises(error, match="quantize_4bit"):
        native.raise_error("quantize_4bit", status)


def test_functions_return_error_codes(fresh_library: Path) -> None:
    library = native.open_library(fresh_library)
    assert library.quantize_4bit(None, 0, 0, NF4.data_ptr(), 64, None, None, 1) == 0
    assert library.quantize_4bit(None, 3, 0, NF4.data_ptr(), 64, None, None, 1) == 1
    for n, block_size, threads in ((-1, 64, 1), (0, 63, 1), (0, 0, 1), (0, 64, 0)):
        bad = (NF4.data_ptr(), block_size, None, None, threads)
        assert library.quantize_4bit(None, 0, n, *bad) == 2
    no_state, options = [None] * 6, (1e-3, 0.9, 0.99, 1e-8, 0.01)
    assert library.adamw_step(None, 0, None, 0, *no_state, 0, *options, 1, 1) == 0
    assert library.adamw_step(None, 0, None, 9, *no_state, 0, *options, 1, 1) == 1
    assert library.adamw_step(None, 0, None, 0, *no_state, 0, *options, 0, 1) == 2


def test_addresses_that_c_cannot_follow_are_refused(cpu: native.CpuOperations) -> None:
    with pytest.raises(ValueError, match="contiguous tensor on the CPU, got one on meta"):
        cpu.quantize_4bit(torch.empty(64, device="meta"), NF4, 64)
    every_second = normal(128)[::2]
    moments = [torch.zeros(64)], [torch.zeros(64)]
    with pytest.raises(ValueError, match=r"got one on cpu with strides \(2,\)"):
        cpu.adamw_step(
            [every_second], [normal(64)], *moments, [], [], None, None, 1e-3, 0.9, 0.9, 1e-8, 0.0, 1
        )


# bfloat16 and float16 in software.


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_narrow_number_is_read_exactly(dtype: torch.dtype, cpu: native.CpuOperations) -> None:
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    pairs = torch.stack([x, torch.zeros_like(x)], dim=1)  # each number is the absmax of a block
    _, absmax = cpu.quantize_4bit(pairs, NF4, 2)
    assert_same_bits(absmax, x.float().abs())


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_rounds_to_nearest_even_around_every_narrow_number(
    dtype: torch.dtype, cpu: native.CpuOperations
) -> None:
    exact = torch.arange(2**15).to(torch.int16).view(dtype).float()
    exact = exact[torch.isfinite(exact)]
    halfway = ((exact[1:].double() + exact[:-1].double()) / 2).float()
    overflow = torch.tensor([65503.0, 65504.0, 65519.0, 65520.0, 65536.0, 1e30, 3.4028235e38])
    x = torch.cat([exact, halfway, overflow, torch.tensor([torch.inf, torch.nan])])
    infinity = torch.tensor(torch.inf)
    x = torch.cat([x, torch.nextafter(x, infinity), torch.nextafter(x, -infinity)])
    x = torch.cat([x, -x])
    one = int((DYNAMIC == 1).nonzero())
    codes = torch.full((len(x), 2), one, dtype=torch.uint8)  # each number is the scale of a block
    y = cpu.dequantize_8bit(codes, x, DYNAMIC, 2, dtype)
    assert_same_bits(y[:, 0], round_to(x.numpy(), dtype))


# Threads and processes.


def test_results_do_not_depend_on_the_number_of_threads(cpu: native.CpuOperations) -> None:
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(all_results(cpu))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_all_same(other, results[0])


def test_several_python_threads_may_call_at_once(cpu: native.CpuOperations) -> None:
    expected = all_results(cpu)
    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(lambda _: all_results(cpu), range(12)):
            assert_all_same(results, expected)


SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
from qlora_ref import codebooks, native
native.CPU_LIBRARY = Path(sys.argv[1])
torch.set_num_threads(2)
quantize = native.load("cpu", "quantize_4bit")
table, x = codebooks.nf4_codebook(), torch.ones(10**6)
packed, _ = quantize(x, table, 64)  # wakes the OpenMP threads
x.exp()                             # and torch's, were they others
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_works_after_a_fork(fresh_library: Path) -> None:
    fork = """
child = os.fork()
if child == 0:
    signal.alarm(20)  # libgomp would wait for ever for the threads that stayed with the parent
    again, _ = quantize(x, table, 64)
    os._exit(0 if bytes(packed.numpy()) == bytes(again.numpy()) else 1)
print(os.waitpid(child, 0)[1])
"""
    assert run_python(SCRIPT + fork, str(fresh_library)) == "0"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_one_openmp_runtime_serves_torch_and_the_library(fresh_library: Path) -> None:
    names = """
paths = {line.split(maxsplit=5)[-1].strip() for line in open("/proc/self/maps") if "/" in line}
names = [Path(path).name for path in paths]
print(len([name for name in names if name.startswith(("libgomp", "libomp", "libiomp"))]))
print("libqlora_cpu.so" in names)
"""
    assert run_python(SCRIPT + names, str(fresh_library)).split() == ["1", "True"]


# With and without a library.


def test_installed_library_serves_every_operation() -> None:
    if not native.CPU_LIBRARY.exists():
        pytest.skip(f"{native.CPU_LIBRARY} is not built")
    for operation in dispatch.OPERATIONS:
        assert callable(native.load("cpu", operation))


def test_installed_library_is_up_to_date(cpu: native.CpuOperations) -> None:
    if not native.CPU_LIBRARY.exists():
        pytest.skip(f"{native.CPU_LIBRARY} is not built")
    installed = native.CpuOperations(native.open_library(native.CPU_LIBRARY))
    assert_all_same(all_results(installed), all_results(cpu))


@pytest.fixture
def fresh_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """dispatch.py, having looked at no backend yet; what it finds is forgotten after the test."""
    monkeypatch.setattr(dispatch, "_load", dispatch.functools.cache(dispatch._load.__wrapped__))
    preferred = dispatch.functools.cache(dispatch._preferred.__wrapped__)
    monkeypatch.setattr(dispatch, "_preferred", preferred)
    monkeypatch.setattr(dispatch, "_forced", None)
    monkeypatch.delenv("QLORA_REF_BACKEND", raising=False)


def test_without_a_library_the_reference_runs_and_the_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_dispatch: None
) -> None:
    monkeypatch.setattr(native, "CPU_LIBRARY", tmp_path / "libqlora_cpu.so")
    with pytest.raises(native.BackendUnavailable, match="no compiled library: install a C\\+\\+"):
        native.load("cpu", "quantize_4bit")
    explanation = dispatch.explain("quantize_4bit")
    assert explanation.backend == "reference"
    assert "install a C++ compiler and reinstall" in explanation.reasons["cpu"]
    function = dispatch.select("quantize_4bit", torch.device("cpu"))
    assert function.__module__ == "qlora_ref.reference.quantize_4bit"


def test_a_library_is_preferred_to_the_reference(
    fresh_library: Path, monkeypatch: pytest.MonkeyPatch, fresh_dispatch: None
) -> None:
    monkeypatch.setattr(native, "CPU_LIBRARY", fresh_library)
    for operation in dispatch.OPERATIONS:
        assert dispatch.explain(operation).backend == "cpu"


def test_what_is_no_library_is_unavailable(tmp_path: Path) -> None:
    path = tmp_path / "libqlora_cpu.so"
    path.write_text("no library")
    with pytest.raises(native.BackendUnavailable, match="does not load"):
        native.open_library(path)


def test_a_library_of_another_version_is_unavailable(
    fresh_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "INTERFACE_VERSION", native.INTERFACE_VERSION + 1)
    with pytest.raises(native.BackendUnavailable, match="reinstall"):
        native.open_library(fresh_library)


def test_an_operation_that_the_library_lacks_is_unavailable(
    fresh_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "CPU_LIBRARY", fresh_library)
    with pytest.raises(native.BackendUnavailable, match="has no sort_4bit"):
        native.load("cpu", "sort_4bit")


def test_cuda_is_unavailable() -> None:
    with pytest.raises(native.BackendUnavailable, match="no CUDA library was built"):
        native.load("cuda", "quantize_4bit")


# Building.


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
        build.compile_library(build.cpu_sources(), tmp_path / "library.so")
    assert not (tmp_path / "library.so").exists()


def test_without_openmp_the_results_are_the_same(
    build: SimpleNamespace,
    cpu: native.CpuOperations,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(build.compile_library.__globals__, "openmp_flags", lambda compiler: [])
    path = tmp_path / "libqlora_cpu.so"
    build.compile_library(build.cpu_sources(), path)
    serial = native.CpuOperations(native.open_library(path))
    assert_all_same(all_results(serial), all_results(cpu))


def test_sources_compile_without_warnings(build: SimpleNamespace) -> None:
    flags = build.openmp_flags(build.find_compiler())
    strict = [*flags, "-Wno-unknown-pragmas", "-Wextra", "-Werror", "-fsyntax-only"]
    for source in build.cpu_sources():
        command = [*build.find_compiler(), *build.CPU_FLAGS, *strict, str(source)]
        finished = subprocess.run(command, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr


def test_each_source_is_named_after_the_function_it_exports(build: SimpleNamespace) -> None:
    assert {source.stem for source in build.cpu_sources()} == set(declared_functions())
