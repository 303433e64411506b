"""The kernels without Python: a program that calls one function on arguments from a file.

`build_program` compiles tests/native/call_kernels.cpp, for this processor or another one, with or
without a sanitizer. `ProgramOperations` are the operations of native_operations.py, but each call
is a run of that program, so that what is written for CpuOperations works on it.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
import runpy
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from compare import (
    DTYPES,
    Weight,
    assert_error_at_most_twice_torch,
    assert_same_bits,
    define_matmul,
    normal,
    random_bytes,
    random_weight,
)
from torch import Tensor

from qlora_ref import codebooks, native
from qlora_ref.dispatch import OPERATIONS
from qlora_ref.native_operations import CpuOperations, raise_error

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "tests" / "native"

REFERENCE = SimpleNamespace(
    **{
        name: getattr(importlib.import_module(f"qlora_ref.reference.{name}"), name)
        for name in OPERATIONS
    }
)

NF4, DYNAMIC = codebooks.nf4_codebook(), codebooks.dynamic_codebook()
DYNAMIC_UNSIGNED = codebooks.dynamic_codebook(signed=False)

# Inlined, a memcpy of more than a register would not be looked at; called, it is.
TSAN_FLAGS = ("-fsanitize=thread", "-O1", "-g", "-fno-builtin")

# More than the library's kParallelMinimum, and no multiple of a block.
MANY = 100_001


def setup_definitions() -> SimpleNamespace:
    """What setup.py defines."""
    return SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py"), run_name="setup"))


def build_program(build: SimpleNamespace, folder: Path, *flags: str, tsan: bool = False) -> Path:
    """Compile the program that calls a library; `tsan`: under the thread sanitizer.

    build  setup_definitions()
    Raises CompileError (of setup.py) where that fails.
    """
    sources = [SOURCES / "call_kernels.cpp"]
    # A library finds its GOMP_* symbols in the program that loads it.
    link = [*build.openmp_flags(build.find_compiler()), "-Wl,--no-as-needed"]
    if tsan:
        sources, link = [*sources, SOURCES / "openmp_on_threads.cpp"], ["-rdynamic"]
        flags = (*flags, *TSAN_FLAGS)
    folder.mkdir(parents=True, exist_ok=True)
    objects = build.compile_objects(sources, list(flags))
    program = folder / "call_kernels"
    command = [*build.find_compiler(), *flags, *map(str, objects), *link, "-pthread", "-ldl"]
    build.execute([*command, "-o", str(program)])
    return program


class ProgramOperations(CpuOperations):
    """The operations, each call in a process of its own.

    command  the program, behind an emulator or a measuring tool if need be, and a library
    callers  how many threads make the same call at once, every second with its arrays at the start
             of a page, the others at the end of one
    threads  OpenMP threads of each call
    shared   the callers write the same arrays, which is a race
    """

    def __init__(
        self, *command: str | Path, callers: int = 2, threads: int = 2, shared: bool = False
    ) -> None:
        self._command = [str(part) for part in command]
        self._callers, self._threads = callers, threads
        self._arrays = "shared" if shared else "own"

    def _call(self, name: str, device: torch.device, *values: Any) -> None:
        arguments = [_as_tensor(value) for value in values]
        tensors = list(_tensors(arguments))
        with tempfile.TemporaryDirectory() as folder:
            call, results = Path(folder, "arguments"), Path(folder, "results")
            call.write_bytes(b"".join(_encode(name, (*arguments, self._threads))))
            words = [name, str(call), str(results), str(self._callers), self._arrays]
            finished = subprocess.run([*self._command, *words], capture_output=True, text=True)
            if finished.returncode != 0:
                raise RuntimeError(f"{name}: exit {finished.returncode}\n{finished.stderr}")
            status, arrays = results.read_bytes()[:8], results.read_bytes()[8:]
        if code := struct.unpack("<q", status)[0]:
            raise_error(name, code)
        for tensor in tensors:
            _bytes_of(tensor)[:], arrays = (
                _as_array(arrays[: tensor.nbytes]),
                arrays[tensor.nbytes :],
            )


def _as_tensor(value: Any) -> Any:
    """A ctypes array as the bytes in it; anything else as it is."""
    is_array = isinstance(value, ctypes.Array)
    return torch.frombuffer(value, dtype=torch.uint8) if is_array else value


def _tensors(arguments: Sequence[Any]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, list):
            yield from argument


def _encode(name: str, arguments: Sequence[Any]) -> Iterator[bytes]:
    for kind, value in zip(native.CPU_SIGNATURES[name], arguments, strict=True):
        if kind is ctypes.c_double:
            yield struct.pack("<d", value)
        elif kind is not ctypes.c_void_p:
            yield struct.pack("<q", value)
        elif value is None:
            yield struct.pack("<q", -1)
        elif isinstance(value, list):
            yield struct.pack("<q", len(value))
            yield from map(_encode_array, value)
        else:
            yield _encode_array(value)


def _encode_array(tensor: Tensor) -> bytes:
    return struct.pack("<q", tensor.nbytes) + _bytes_of(tensor).tobytes()


def _bytes_of(tensor: Tensor) -> np.ndarray:
    """The memory of a contiguous tensor."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def _as_array(content: bytes) -> np.ndarray:
    return np.frombuffer(content, dtype=np.uint8)


def all_products(cpu: Any) -> list[Tensor]:
    """Products with few tokens and with many, forward and transposed, of one seeded weight."""
    weight = random_weight(300, 320, 64)
    layout = (weight.packed, weight.absmax, weight.codebook, weight.block_size, weight.shape)
    return [
        cpu.matmul_4bit(
            normal(tokens, 300 if transposed else 320), *layout, None, transposed, *[None] * 3
        )
        for tokens, transposed in itertools.product((1, 40), (False, True))
    ]


def all_results(cpu: Any, n: int = MANY) -> list[Tensor]:
    """What the bit-exact operations make of seeded arguments of n values; all but matmul_4bit."""
    x = normal(n)
    packed, absmax = cpu.quantize_4bit(x, NF4, 64)
    codes, absmax8 = cpu.quantize_8bit(x, DYNAMIC, 256)
    results = [packed, absmax, codes, absmax8]
    results.append(cpu.dequantize_4bit(packed, absmax, NF4, 64, (n,), torch.bfloat16))
    results.append(cpu.dequantize_8bit(codes, absmax8, DYNAMIC, 256, torch.float16))
    options = (1e-3, 0.9, 0.99, 1e-8, 0.01, 3)
    param, m, v = x.clone(), normal(n, seed=1), normal(n, seed=2).square()
    cpu.adamw_step([param], [x], [m], [v], [], [], None, None, *options)
    coded = [random_bytes(n, seed=3), random_bytes(n, seed=4)]
    scales = [normal(len(absmax8), seed=5).abs(), normal(len(absmax8), seed=6).abs()]
    param8 = x.clone()
    state = ([tensor] for tensor in (param8, x, *coded, *scales))
    cpu.adamw_step(*state, DYNAMIC, DYNAMIC_UNSIGNED, *options)
    return [*results, param, m, v, param8, *coded, *scales]


def assert_as_the_reference(cpu: Any) -> None:
    """Every operation, on one value, on odd numbers of them, and on enough to take turns."""
    for n in (1, 65, 257, MANY):
        for actual, expected in zip(all_results(cpu, n), all_results(REFERENCE, n), strict=True):
            assert_same_bits(actual, expected)
    shapes = [(5, 3, 1), (300, 129, 1), (300, 640, 70), (64, 192, 9)]
    for (rows, columns, tokens), dtype, transposed, nested in itertools.product(
        shapes, DTYPES, (False, True), (False, True)
    ):
        weight = random_weight(rows, columns, 64, nested)
        x = normal(tokens, rows if transposed else columns, dtype=dtype)
        assert_multiplies(cpu, x, weight, transposed)


def assert_multiplies(cpu: Any, x: Tensor, weight: Weight, transposed: bool) -> None:
    bias = None if transposed else normal(weight.shape[0], seed=6, dtype=x.dtype)
    layout = (weight.packed, weight.absmax, weight.codebook, weight.block_size, weight.shape)
    nested = weight.nested.values() or (None, None, None)
    actual = cpu.matmul_4bit(x, *layout, bias, transposed, *nested)
    dense = weight.dense(x.dtype)
    by_torch = torch.nn.functional.linear(x, dense.t() if transposed else dense, bias)
    exact = define_matmul(x, dense, bias, transposed)
    assert_error_at_most_twice_torch(actual, by_torch, exact)


def available_isas() -> tuple[str, ...]:
    """The instruction sets to test: none where nothing was built, so that nothing is collected."""
    try:
        return native.available_isas(native.FOLDER)
    except native.BackendUnavailable:
        return ()
