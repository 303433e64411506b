"""The compiled libraries: how they are loaded and called. Their results: test_<operation>.py."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compare import (
    DTYPES,
    assert_same_bits,
    normal,
    random_weight,
    round_to,
    with_threads,
)
from native_program import DYNAMIC, NF4, REFERENCE, ROOT, all_products, all_results
from torch import Tensor

from qlora_ref import codebooks, dispatch, native
from qlora_ref.matmul_plan import Kernel
from qlora_ref.native_operations import DTYPES as DTYPE_NUMBERS
from qlora_ref.native_operations import CpuOperations, raise_error

HEADER = (ROOT / "csrc" / "kernels.h").read_text()


@pytest.fixture
def fresh_library(fresh_folder: Path) -> Path:
    return native.library_path(fresh_folder, "baseline")


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


def assert_all_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other)


# The interface.

C_TYPES = {
    "int": ctypes.c_int,
    "int64_t": ctypes.c_int64,
    "double": ctypes.c_double,
}
CONDITIONAL = re.compile(r"#ifdef QLORA_CUDA\n(.*?)(?:#else\n(.*?))?#endif\n", re.DOTALL)


def declared_functions(library: str = "cpu") -> dict[str, list[type]]:
    """The functions that kernels.h declares for a library, and the ctypes of their parameters."""
    is_cuda = library == "cuda"
    text = CONDITIONAL.sub(lambda found: found[1] if is_cuda else found[2] or "", HEADER)
    text = re.sub(r"//.*", "", text)
    types = C_TYPES | {"Execution": ctypes.c_void_p if is_cuda else ctypes.c_int}
    functions = {}
    found = re.findall(r"^(?:int|const char\*) (\w+)\((.*?)\);", text, re.MULTILINE | re.DOTALL)
    for name, parameters in found:
        kinds = [parameter.split()[-2] for parameter in parameters.split(",") if parameter]
        functions[name] = [ctypes.c_void_p if kind[-1] == "*" else types[kind] for kind in kinds]
    return functions


@pytest.mark.parametrize("library", ["cpu", "cuda"])
def test_python_declares_the_functions_of_the_header(library: str) -> None:
    signatures = {"cpu": native.CPU_SIGNATURES, "cuda": native.CUDA_SIGNATURES}[library]
    declared = {name: list(arguments) for name, arguments in signatures.items()}
    assert declared == declared_functions(library)


def test_python_knows_the_kernels_of_the_header() -> None:
    numbers = dict(re.findall(r"^  k(\w+) = (\d+),", HEADER, re.MULTILINE))
    names = {kernel.name.title().replace("_", ""): str(kernel.value) for kernel in Kernel}
    assert names == numbers


def test_python_knows_the_numbers_in_the_header() -> None:
    version = re.search(r"kInterfaceVersion = (\d+)", HEADER)
    assert version is not None and native.INTERFACE_VERSION == int(version[1])
    names = [f"k{str(dtype).removeprefix('torch.').capitalize()}" for dtype in DTYPE_NUMBERS]
    pairs = zip(names, DTYPE_NUMBERS.values(), strict=True)
    assert ", ".join(f"{name} = {number}" for name, number in pairs) in HEADER


def test_instruction_sets_have_one_order_everywhere(build: SimpleNamespace) -> None:
    names = [f"k{''.join(part.capitalize() for part in isa.split('_'))}" for isa in native.ISAS]
    enum = ", ".join(f"{name} = {number}" for number, name in enumerate(names))
    assert f"enum Isa : int {{ {enum} }};" in HEADER
    assert tuple(build.ISA_FLAGS) == native.ISAS


def test_library_exports_every_function_of_the_header(fresh_library: Path) -> None:
    library = ctypes.CDLL(str(fresh_library))
    for name in declared_functions():
        assert hasattr(library, name)


def test_every_operation_has_a_function() -> None:
    for operation in dispatch.OPERATIONS:
        assert callable(getattr(CpuOperations, operation))


# Errors.


@pytest.mark.parametrize(
    "status,error", [(1, TypeError), (2, ValueError), (3, MemoryError), (77, RuntimeError)]
)
def test_error_codes_become_exceptions(status: int, error: type) -> None:
    with pytest.raises(error, match="quantize_4bit"):
        raise_error("quantize_4bit", status)


def test_functions_return_error_codes(fresh_library: Path) -> None:
    library = native.open_library(fresh_library)
    assert library.quantize_4bit(None, 0, 0, NF4.data_ptr(), 64, None, None, 1) == 0
    assert library.quantize_4bit(None, 3, 0, NF4.data_ptr(), 64, None, None, 1) == 1
    for n, block_size, threads in ((-1, 64, 1), (0, 63, 1), (0, 0, 1), (0, 64, 0)):
        bad = (NF4.data_ptr(), block_size, None, None, threads)
        assert library.quantize_4bit(None, 0, n, *bad) == 2
    options = (1e-3, 0.9, 0.99, 1e-8, 0.01)
    for count, dtype, step, status in ((0, 0, 1, 0), (0, 9, 1, 1), (0, 0, 0, 2), (-1, 0, 1, 2)):
        counts, dtypes = (ctypes.c_int64 * 1)(count), (ctypes.c_int * 1)(dtype)
        nulls = (ctypes.c_void_p * 1)()
        lists = (counts, nulls, dtypes, nulls, dtypes, nulls, nulls, *[None] * 4)
        assert library.adamw_step(1, *lists, *options, step, 1) == status
    number = ctypes.c_int64()
    for dtype, rounds, threads, status in ((0, 1, 1, 0), (3, 1, 1, 1), (0, -1, 1, 2), (0, 1, 0, 2)):
        counted = rounds, ctypes.byref(number), threads
        assert library.multiply_in_registers(dtype, *counted) == status


@pytest.mark.parametrize("dtype", DTYPE_NUMBERS)
def test_numbers_in_registers_are_multiplied_for_every_round(
    cpu: CpuOperations, dtype: torch.dtype
) -> None:
    rounds = 1 << 24
    began = time.perf_counter()
    operations = cpu.multiply_in_registers(dtype, rounds)
    seconds = time.perf_counter() - began
    assert operations == rounds * cpu.multiply_in_registers(dtype, 1) > 0
    # A compiler that saw through the loop would leave nothing of it: no core does as many.
    assert operations / seconds / torch.get_num_threads() < 2e13


def test_addresses_that_c_cannot_follow_are_refused(cpu: CpuOperations) -> None:
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
def test_every_narrow_number_is_read_exactly(dtype: torch.dtype, cpu: CpuOperations) -> None:
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    pairs = torch.stack([x, torch.zeros_like(x)], dim=1)  # each number is the absmax of a block
    _, absmax = cpu.quantize_4bit(pairs, NF4, 2)
    assert_same_bits(absmax, x.float().abs())


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_rounds_to_nearest_even_around_every_narrow_number(
    dtype: torch.dtype, cpu: CpuOperations
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


# The same bits everywhere.


def test_every_instruction_set_gives_the_bits_of_the_reference(cpu: CpuOperations) -> None:
    assert_all_same(all_results(cpu), all_results(REFERENCE))


# Threads and processes.


def test_results_do_not_depend_on_the_number_of_threads(cpu: CpuOperations) -> None:
    results = with_threads((1, 2, 3, 7), lambda: all_results(cpu))
    for other in results[1:]:
        assert_all_same(other, results[0])


# Each thread begins with a share of the tokens, of 401 unless there are 7; of 3100 in several
# steps, the last with fewer. On AMX only 2 threads share, and only 4096: 1024 for each, twice.
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [401, 3100, 4096])
def test_shares_of_tokens_change_no_bit(
    tokens: int, dtype: torch.dtype, transposed: bool, cpu: CpuOperations
) -> None:
    weight = random_weight(136, 256, 64)
    layout = (weight.packed, weight.absmax, weight.codebook, weight.block_size, weight.shape)
    x = normal(tokens, 136 if transposed else 256, dtype=dtype)
    arguments = (x, *layout, None, transposed, *[None] * 3)
    results = with_threads((1, 2, 3, 7), lambda: cpu.matmul_4bit(*arguments))
    for other in results[1:]:
        assert_same_bits(other, results[0])


def test_several_python_threads_may_call_at_once(cpu: CpuOperations) -> None:
    def run(_: int = 0) -> list[torch.Tensor]:
        return all_results(cpu) + all_products(cpu)

    expected = run()
    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(run, range(12)):
            assert_all_same(results, expected)


def test_other_python_threads_run_meanwhile(cpu: CpuOperations) -> None:
    packed, table = torch.full((1 << 21,), 0x5A, dtype=torch.uint8), codebooks.nf4_codebook()
    weight = (packed, torch.ones(1 << 16), table, 64, (2048, 2048), None, False, None, None, None)
    x = torch.ones(1024, 2048)

    def rounds_meanwhile() -> int:
        rounds = 0
        with ThreadPoolExecutor(1) as pool:
            product = pool.submit(cpu.matmul_4bit, x, *weight)
            while not product.done():
                rounds += 1
                time.sleep(0.001)
        product.result()
        return rounds

    [rounds] = with_threads([1], rounds_meanwhile)  # takes 20 ms or more
    assert rounds >= 5  # with the interpreter's lock held, one or two before the call


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_a_product_needs_at_most_8_mib_for_each_thread(isa: str) -> None:
    # A whole weight would take 16 MiB or more beyond that in 16 bits.
    script = """
import sys
from itertools import product
import torch
from qlora_ref import codebooks, ops
sys.path.insert(0, "tests")
from test_memory_model import grown

torch.set_num_threads(2)
nf4, most = codebooks.nf4_codebook(), 0
packed, absmax = torch.full((1 << 23,), 0x5A, dtype=torch.uint8), torch.ones(1 << 18)
dtypes = torch.float32, torch.bfloat16, torch.float16
for tokens, dtype, transposed in product((1, 16, 64, 1024), dtypes, (False, True)):
    x = torch.ones(tokens, 4096, dtype=dtype)
    arguments = (packed, absmax, nf4, 64, (4096, 4096))
    growth = grown(lambda: ops.matmul_4bit(x, *arguments, transposed=transposed))
    most = max(most, growth - x.nbytes)  # y is as large
print(most)
"""
    assert int(run_python(script, QLORA_REF_ISA=isa)) <= 2 * (8 << 20)


def test_fewer_threads_than_were_asked_for_do_all_of_the_work(isa: str) -> None:
    script = """
import sys
import torch
sys.path.insert(0, "tests")
from compare import assert_same_bits, normal, random_weight
from qlora_ref import ops

weight = random_weight(136, 256, 64)
for tokens in (8, 40, 601):
    x, results = normal(tokens, 256), []
    for threads in (4, 1):
        torch.set_num_threads(threads)
        results.append(ops.matmul_4bit(x, **weight.arguments("cpu")))
    assert_same_bits(*results)
print("the same")
"""
    assert run_python(script, QLORA_REF_ISA=isa, OMP_THREAD_LIMIT="2") == "the same"


SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
from qlora_ref import codebooks, native
native.FOLDER = Path(sys.argv[1])
torch.set_num_threads(2)
quantize, multiply = (native.load("cpu", f"{name}_4bit") for name in ("quantize", "matmul"))
table, x = codebooks.nf4_codebook(), torch.ones(10**6)
packed, absmax = quantize(x, table, 64)  # wakes the OpenMP threads
weight = (packed, absmax, table, 64, (1000, 1000), None, False, None, None, None)
y = multiply(x[:8000].view(8, 1000), *weight)
x.exp()                             # and torch's, were they others
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_works_after_a_fork(fresh_folder: Path) -> None:
    fork = """
child = os.fork()
if child == 0:
    signal.alarm(20)  # libgomp would wait for ever for the threads that stayed with the parent
    again, _ = quantize(x, table, 64)
    pairs = (packed, again), (y, multiply(x[:8000].view(8, 1000), *weight))
    os._exit(0 if all(bytes(a.numpy()) == bytes(b.numpy()) for a, b in pairs) else 1)
print(os.waitpid(child, 0)[1])
"""
    assert run_python(SCRIPT + fork, str(fresh_folder)) == "0"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_one_openmp_runtime_serves_torch_and_the_library(fresh_folder: Path) -> None:
    names = """
paths = {line.split(maxsplit=5)[-1].strip() for line in open("/proc/self/maps") if "/" in line}
names = [Path(path).name for path in paths]
print(len([name for name in names if name.startswith(("libgomp", "libomp", "libiomp"))]))
print(native.library_path(native.FOLDER, native.available_isas(native.FOLDER)[-1]).name in names)
"""
    assert run_python(SCRIPT + names, str(fresh_folder)).split() == ["1", "True"]


# With and without a library.


def test_installed_libraries_serve_every_operation(isa: str) -> None:
    for operation in dispatch.OPERATIONS:
        assert callable(native.load("cpu", operation, isa))


def test_installed_libraries_are_up_to_date(isa: str, cpu: CpuOperations) -> None:
    path = native.library_path(native.FOLDER, isa)
    assert_all_same(all_results(CpuOperations(native.open_library(path))), all_results(cpu))


def test_what_is_no_library_is_unavailable(tmp_path: Path) -> None:
    path = native.library_path(tmp_path, "baseline")
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
    fresh_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "FOLDER", fresh_folder)
    with pytest.raises(native.BackendUnavailable, match="has no sort_4bit"):
        native.load("cpu", "sort_4bit")


def test_cuda_is_unavailable_where_no_library_was_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    with pytest.raises(native.BackendUnavailable, match="no CUDA library was built"):
        native.load("cuda", "quantize_4bit")
