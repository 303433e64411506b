"""The CUDA library on a GPU that is simulated: its operations on CPU tensors.

Every call copies its tensors to the simulated GPU, into allocations of exactly their sizes, runs
the library's own host code and kernels (tests/sim), and copies back what the kernels wrote. The
tensors keep the remainder of their addresses modulo 16, so that kernels take the paths that
alignment decides.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import CDLL, c_void_p
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from native_program import setup_definitions
from sim.runtime import Device, build_stand_in
from torch import Tensor

from qlora_ref import dispatch, native
from qlora_ref.matmul_plan import Gpu
from qlora_ref.native_operations import CudaOperations

MEMORY_BYTES = 1 << 30  # none of it is touched before it is used
VECTOR = 16
GARBAGE = 0xA5  # in what no kernel wrote

# Multiprocessors, clock, bandwidth and shared memory from the data sheets. On the first the rule of
# matmul_plan looks levels up in a table, on the second it permutes bytes.
GPUS = {
    "A100": Gpu(108, 1.41e9, 2.039e12, 163 * 1024),
    "RTX 4090": Gpu(128, 2.52e9, 1.008e12, 99 * 1024),
}


class SimulatedOperations(CudaOperations):
    """The operations of a CUDA library, on CPU tensors, as if on one of GPUS."""

    _place = "simulated GPU"
    _is_here = attrgetter("is_cpu")

    def __init__(self, library: CDLL, device: Device, gpu: Gpu) -> None:
        super().__init__(library)
        self._device, self._simulated = device, gpu
        self._new_ones: set[int] = set()  # addresses of what the call is to write
        self._there: dict[tuple[int, int], tuple[Tensor, int]] = {}  # with its address on the GPU

    def _execution(self, device: torch.device) -> int:
        return 0  # the default stream

    def _gpu(self, device: torch.device) -> Gpu:
        return self._simulated

    def _new(self, shape: Sequence[int], dtype: torch.dtype, like: Tensor) -> Tensor:
        tensor = super()._new(shape, dtype, like)
        self._new_ones.add(tensor.data_ptr())
        return tensor

    def _call(self, name: str, device: torch.device, *arguments: Any) -> None:
        try:
            super(CudaOperations, self)._call(name, device, *arguments)
            for tensor, address in self._there.values():
                self._copy_back(tensor, address)
        finally:
            self._new_ones.clear()
            self._there.clear()
            self._device.memory.free_all()

    def _raise_error(self, name: str, status: int) -> None:
        self._device.raise_error()
        super()._raise_error(name, status)

    def _address(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return super()._address(value)
        host = super()._address(value)
        if value.numel() == 0:
            return None
        size = value.numel() * value.element_size()
        if (host, size) not in self._there:
            address = self._device.memory.allocate(size, host % VECTOR)
            if host not in self._new_ones:
                self._device.memory.write(address, _bytes(value))
            self._there[host, size] = value, address
        return self._there[host, size][1]

    def _addresses(self, tensors: list[Tensor]) -> Any:
        return (c_void_p * len(tensors))(*map(self._address, tensors))

    def _copy_back(self, tensor: Tensor, address: int) -> None:
        content, written = self._device.memory.read(address, len(_bytes(tensor)))
        received = np.where(written, np.frombuffer(content, np.uint8), np.uint8(GARBAGE))
        before = _bytes(tensor)
        if not np.array_equal(received, before):  # it may be read-only otherwise
            before[:] = received


def _bytes(tensor: Tensor) -> Any:
    """A contiguous tensor's memory as a numpy array of bytes."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


@functools.cache
def missing() -> str | None:
    """Why no CUDA library can be simulated here; None if it can."""
    build = setup_definitions()
    if torch.version.cuda is not None:
        return "torch has loaded the CUDA runtime, which the simulated GPU would stand in for"
    try:
        build.find_nvcc()
        build.find_compiler()
    except build.CompileError as error:
        return str(error)
    return None


@functools.cache
def simulated_device() -> Device:
    """The only one of this process: a library takes the first stand-in that was loaded."""
    with tempfile.TemporaryDirectory() as folder:
        return Device(build_stand_in(Path(folder)), MEMORY_BYTES)


@functools.cache
def open_simulated(library: Path) -> tuple[CDLL, Device]:
    """A library that was linked without the CUDA runtime, on the simulated GPU."""
    device = simulated_device()
    return native.open_library(library, native.CUDA_SIGNATURES), device


@contextmanager
def on_simulated_gpu(operations: SimulatedOperations) -> Iterator[None]:
    """Let the forced backend "cuda" be these operations, on CPU tensors."""
    select = dispatch.select

    def select_simulated(operation: str, device: torch.device) -> Any:
        if dispatch.forced_backend() == "cuda":
            return getattr(operations, operation)
        return select(operation, device)

    dispatch.select = select_simulated
    try:
        yield
    finally:
        dispatch.select = select
