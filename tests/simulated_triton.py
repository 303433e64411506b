"""Triton's kernels, compiled for sm_80, on the simulated GPU: launchers run on CPU tensors.

Every launch copies its tensors to the simulated GPU, into allocations of exactly their sizes, runs
the PTX that Triton's compiler made of the kernel, and copies back what it wrote.
"""

from __future__ import annotations

import functools
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sim.machine import Launch as Execution
from sim.machine import execute
from sim.memory import GlobalMemory
from sim.parser import parse
from sim.program import Program
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from offline_triton import Launch, compiled_for  # noqa: E402

MEMORY_BYTES = 1 << 28
VECTOR = 16
FORMATS = {"i32": "<i", "i64": "<q", "fp32": "<f"}


@contextmanager
def on_simulated_gpu() -> Iterator[list[Launch]]:
    """Inside, the launchers of kernels/ work on CPU tensors; yields what they launched."""
    with compiled_for("80", run_simulated) as launches:
        yield launches


def run_simulated(launch: Launch) -> None:
    """Interpret a kernel's PTX; its tensors are changed as a GPU would change them."""
    program = program_of(launch.kernel.asm["ptx"])
    memory = GlobalMemory(MEMORY_BYTES)
    packed = bytearray()
    placed: dict[tuple[int, int], tuple[Tensor, int]] = {}
    for name, kind in launch.kernel.src.signature.items():
        if kind == "constexpr":
            continue
        value: Any = launch.arguments[name]
        if kind.startswith("*"):
            kind, value = "i64", _place(value, memory, placed)
        size = struct.calcsize(FORMATS[kind])
        packed += bytes(-len(packed) % size) + struct.pack(FORMATS[kind], value)
    size = max(offset + length for offset, length in program.kernel.parameters.values())
    packed += bytes(size - len(packed))  # of Triton's scratch memory, which these do not use
    grid = (*launch.grid, 1, 1)[:3]
    shared = launch.kernel.metadata.shared
    execute(program, Execution(grid, (launch.threads, 1, 1), bytes(packed), shared), memory)
    for tensor, address in placed.values():
        content, _ = memory.read(address, len(_bytes(tensor)))
        received = np.frombuffer(content, np.uint8)
        if not np.array_equal(received, _bytes(tensor)):  # it may be read-only otherwise
            _bytes(tensor)[:] = received


def _place(
    tensor: Tensor, memory: GlobalMemory, placed: dict[tuple[int, int], tuple[Tensor, int]]
) -> int:
    """The tensor's address on the GPU: the same remainder modulo 16 as on the CPU."""
    content = _bytes(tensor)
    key = (tensor.data_ptr(), len(content))
    if key not in placed:
        address = memory.allocate(len(content), tensor.data_ptr() % VECTOR)
        memory.write(address, content.tobytes())
        placed[key] = tensor, address
    return placed[key][1]


def _bytes(tensor: Tensor) -> Any:
    """A contiguous tensor's memory as a numpy array of bytes."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


@functools.cache
def program_of(text: str) -> Program:
    module = parse(text)
    (kernel,) = module.kernels.values()
    return Program(kernel, module)
