"""The calls that paging on a GPU makes, in one table: tests put a recording stand-in in its place.

Managed memory comes from the driver's library, by the names that every driver since CUDA 8 has;
everything else is torch.cuda.
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

    def synchronize(self) -> None:
        """Wait until the device has done everything."""


class TorchCuda:
    """The table for a real device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._index = torch.cuda.current_device() if device.index is None else device.index
        torch.empty(1, device=device)  # makes the context that the driver's calls work in

    def has_managed_memory(self) -> bool:
        """See CudaCalls."""
        found = ctypes.c_int()
        attribute = ctypes.c_int(_CONCURRENT_MANAGED_ACCESS)
        device = ctypes.c_int(self._index)
        self._call("cuDeviceGetAttribute", ctypes.byref(found), attribute, device)
        return bool(found.value)

    def allocate_managed(self, nbytes: int) -> int:
        """See CudaCalls."""
        address = ctypes.c_uint64()
        size = ctypes.c_size_t(nbytes)
        self._call("cuMemAllocManaged", ctypes.byref(address), size, ctypes.c_uint(_ATTACH_GLOBAL))
        return address.value

    def free_managed(self, address: int) -> None:
        """See CudaCalls."""
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def advise(self, address: int, nbytes: int) -> None:
        """See CudaCalls."""
        for advice, place in ((_PREFER_LOCATION, _HOST), (_ACCESSED_BY, self._index)):
            region = ctypes.c_uint64(address), ctypes.c_size_t(nbytes)
            self._call("cuMemAdvise", *region, ctypes.c_int(advice), ctypes.c_int(place))

    def move(self, address: int, nbytes: int, to_device: bool, stream: Any) -> None:
        """See CudaCalls."""
        place = ctypes.c_int(self._index if to_device else _HOST)
        region = ctypes.c_uint64(address), ctypes.c_size_t(nbytes)
        self._call("cuMemPrefetchAsync", *region, place, ctypes.c_void_p(stream.cuda_stream))

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
        return (stream or torch.cuda.current_stream(self._device)).record_event()

    def wait(self, stream: Any, event: Any) -> None:
        """See CudaCalls."""
        (stream or torch.cuda.current_stream(self._device)).wait_event(event)

    def is_done(self, event: Any) -> bool:
        """See CudaCalls."""
        return bool(event.query())

    def synchronize(self) -> None:
        """See CudaCalls."""
        torch.cuda.synchronize(self._device)

    def _call(self, name: str, *arguments: Any) -> None:
        with torch.cuda.device(self._index):
            status = getattr(_driver(), name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            _driver().cuGetErrorString(status, ctypes.byref(text))
            what = f"{name}: {(text.value or b'unknown error').decode()} ({status})"
            raise (MemoryError if name == "cuMemAllocManaged" else RuntimeError)(what)


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
    return ctypes.CDLL("libcuda.so.1")
