"""The calls that paging on a GPU makes, in one table: tests put a recording stand-in in its place.

Managed memory comes from the driver's library, by the names that every driver since CUDA 8 has, in
the form that they had then: CUDA 13 gave cuMemAdvise and cuMemPrefetchAsync another form in its
header, but under the names cuMemAdvise_v2 and cuMemPrefetchAsync_v2. Everything else is torch.cuda.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Protocol

import torch
from torch import Tensor

_ATTACH_GLOBAL = 1  # CU_MEM_ATTACH_GLOBAL
_PREFER_LOCATION = 3  # CU_MEM_ADVISE_SET_PREFERRED_LOCATION
_ACCESSED_BY = 5  # CU_MEM_ADVISE_SET_ACCESSED_BY
_HOST = -1  # CU_DEVICE_CPU
_CONCURRENT_MANAGED_ACCESS = 89  # CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS

# The driver's functions, all of which return a CUresult; a CUdeviceptr is 64 bits wide.
_int, _size, _address = ctypes.c_int, ctypes.c_size_t, ctypes.c_uint64
_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cuDevicePrimaryCtxRetain": (ctypes.POINTER(ctypes.c_void_p), _int),
    "cuCtxSetCurrent": (ctypes.c_void_p,),
    "cuDeviceGetAttribute": (ctypes.POINTER(_int), _int, _int),
    "cuGetErrorString": (_int, ctypes.POINTER(ctypes.c_char_p)),
    "cuMemAllocManaged": (ctypes.POINTER(_address), _size, ctypes.c_uint),
    "cuMemFree_v2": (_address,),
    "cuMemAdvise": (_address, _size, _int, _int),
    "cuMemPrefetchAsync": (_address, _size, _int, ctypes.c_void_p),
}


class CudaCalls(Protocol):
    """What a tier needs of a device. Streams and events are whatever `new_stream` makes."""

    def has_managed_memory(self) -> bool:
        """Whether managed memory can move by itself while the device works."""

    def allocate_managed(self, nbytes: int) -> int:
        """The address of managed memory. Raises MemoryError."""

    def free_managed(self, address: int) -> None:
        """Give it back; nothing may work on it any more."""

    def advise(self, address: int, nbytes: int) -> None:
        """Let the memory live in the host's, and be mapped for the device."""

    def move(self, address: int, nbytes: int, to_device: bool, stream: Any) -> None:
        """Start to move pages to the device or to the host, in the order of the stream."""

    def as_tensor(self, address: int, nbytes: int) -> Tensor:
        """Managed memory as a uint8 tensor on the device."""

    def pinned(self, nbytes: int) -> Tensor:
        """A uint8 tensor in host memory that the device copies from by itself."""

    def on_device(self, nbytes: int) -> Tensor:
        """A uint8 tensor on the device."""

    def copy(self, target: Tensor, source: Tensor, stream: Any) -> None:
        """Start to copy, in the order of the stream."""

    def new_stream(self) -> Any:
        """A side stream."""

    def record(self, stream: Any) -> Any:
        """An event: all that is on the stream now is done. None is the stream that computes."""

    def wait(self, stream: Any, event: Any) -> None:
        """What is put on the stream from now on begins after the event."""

    def is_done(self, event: Any) -> bool:
        """Whether the event has happened."""

    def seconds(self, first: Any, second: Any) -> float:
        """The time between two events that have happened; negative if the second came first."""

    def synchronize(self) -> None:
        """Wait until the device has done everything."""


class TorchCuda:
    """The table for a real device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.init()

    def has_managed_memory(self) -> bool:
        """See CudaCalls."""
        found = ctypes.c_int()
        attribute = _CONCURRENT_MANAGED_ACCESS
        self._call("cuDeviceGetAttribute", ctypes.byref(found), attribute, self._index)
        return bool(found.value)

    def allocate_managed(self, nbytes: int) -> int:
        """See CudaCalls."""
        address = _address()
        self._call("cuMemAllocManaged", ctypes.byref(address), nbytes, _ATTACH_GLOBAL)
        return address.value

    def free_managed(self, address: int) -> None:
        """See CudaCalls."""
        self._call("cuMemFree_v2", address)

    def advise(self, address: int, nbytes: int) -> None:
        """See CudaCalls."""
        self._call("cuMemAdvise", address, nbytes, _PREFER_LOCATION, _HOST)
        self._call("cuMemAdvise", address, nbytes, _ACCESSED_BY, self._index)

    def move(self, address: int, nbytes: int, to_device: bool, stream: Any) -> None:
        """See CudaCalls."""
        place = self._index if to_device else _HOST
        self._call("cuMemPrefetchAsync", address, nbytes, place, stream.cuda_stream)

    def as_tensor(self, address: int, nbytes: int) -> Tensor:
        """See CudaCalls."""
        return torch.as_tensor(_DeviceArray(address, nbytes), device=self._device)

    def pinned(self, nbytes: int) -> Tensor:
        """See CudaCalls."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def on_device(self, nbytes: int) -> Tensor:
        """See CudaCalls."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def copy(self, target: Tensor, source: Tensor, stream: Any) -> None:
        """See CudaCalls."""
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)

    def new_stream(self) -> Any:
        """See CudaCalls."""
        return torch.cuda.Stream(self._device)

    def record(self, stream: Any) -> Any:
        """See CudaCalls."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream or torch.cuda.current_stream(self._device))
        return event

    def wait(self, stream: Any, event: Any) -> None:
        """See CudaCalls."""
        (stream or torch.cuda.current_stream(self._device)).wait_event(event)

    def is_done(self, event: Any) -> bool:
        """See CudaCalls."""
        return bool(event.query())

    def seconds(self, first: Any, second: Any) -> float:
        """See CudaCalls."""
        return 1e-3 * float(first.elapsed_time(second))

    def synchronize(self) -> None:
        """See CudaCalls."""
        torch.cuda.synchronize(self._device)

    def _call(self, name: str, *arguments: Any) -> None:
        """Call the driver, whatever thread this is: a new one has no context yet."""
        with torch.cuda.device(self._index):
            _call("cuCtxSetCurrent", _context(self._index))
            _call(name, *arguments)


class _DeviceArray:
    """Memory that torch.as_tensor takes as it is, by the CUDA array interface."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


@functools.cache
def _driver() -> Any:
    library = ctypes.CDLL("libcuda.so.1")
    for name, types in _PROTOTYPES.items():
        getattr(library, name).argtypes = types
    return library


@functools.cache
def _context(index: int) -> ctypes.c_void_p:
    """The context of a device that torch works in too; kept until the process ends."""
    context = ctypes.c_void_p()
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), index)
    return context


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_driver(), name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        what = f"{name}: {(text.value or b'unknown error').decode()} ({status})"
        raise (MemoryError if name == "cuMemAllocManaged" else RuntimeError)(what)
