"""The PTX that Triton's compiler emits, on the simulated GPU: a check by code that is not ours."""

from __future__ import annotations

import importlib.util
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sim.machine import Launch, execute
from sim.memory import GlobalMemory
from sim.parser import parse
from sim.program import Program

FOLDER = Path(__file__).parent
THREADS = 128  # four warps, as Triton launches by default

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton's compiler"
)


def compiled(program: str) -> str:
    """What a Python program prints; Triton compiles only where it does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program]
    finished = subprocess.run(
        command, cwd=FOLDER, env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def launch(text: str, grid: int, *arguments: np.ndarray | int) -> list[bytes]:
    """Run the only kernel of a module: the arrays' bytes afterwards. Zeros are results."""
    module = parse(text)
    (kernel,) = module.kernels.values()
    memory = GlobalMemory(1 << 22)
    packed, arrays = bytearray(), []
    for argument in arguments:
        if isinstance(argument, int):
            packed += struct.pack("<I", argument)
            continue
        packed += bytes(-len(packed) % 8)
        address = memory.allocate(argument.nbytes)
        if argument.any():
            memory.write(address, argument.tobytes())
        arrays.append((address, argument.nbytes))
        packed += struct.pack("<Q", address)
    size = max(offset + length for offset, length in kernel.parameters.values())
    packed += bytes(size - len(packed))  # of Triton's scratch memory, which these do not use
    shared = 96 * 1024
    execute(
        Program(kernel, module),
        Launch((grid, 1, 1), (THREADS, 1, 1), bytes(packed), shared),
        memory,
    )
    return [memory.read(address, length)[0] for address, length in arrays]


def test_tensor_cores_multiply_as_tritons_compiler_lays_matrices_out() -> None:
    text = compiled("import triton_matmul; print(triton_matmul.compile_multiply())")
    for instruction in ("cp.async", "ldmatrix", "mma.sync"):
        assert instruction in text
    inputs = 160
    rng = np.random.default_rng(0)
    a = rng.integers(-4, 5, (32, inputs)).astype(np.float16)
    b = rng.integers(-4, 5, (inputs, 32)).astype(np.float16)
    *_, y = launch(text, 1, a, b, np.zeros((32, 32), np.float32), inputs)
    # Small integers: no sum is rounded, whatever its order.
    expected = a.astype(np.float32) @ b.astype(np.float32)
    assert np.array_equal(np.frombuffer(y, np.float32).reshape(32, 32), expected)
