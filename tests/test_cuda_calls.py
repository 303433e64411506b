"""The driver's functions are called in the form, and with the constants, of NVIDIA's header."""

from __future__ import annotations

import contextlib
import ctypes
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_ref.paging import cuda_calls
from qlora_ref.paging.cuda_calls import TorchCuda

triton = pytest.importorskip("triton", reason="triton, which brings cuda.h, is not installed")
HEADER = (Path(triton.__file__).parent / "backends/nvidia/include/cuda.h").read_text()

TYPES = {
    "CUdevice": ctypes.c_int,
    "CUdevice_attribute": ctypes.c_int,
    "CUmem_advise": ctypes.c_int,
    "CUresult": ctypes.c_int,
    "unsigned int": ctypes.c_uint,
    "size_t": ctypes.c_size_t,
    "CUdeviceptr": ctypes.c_uint64,
    "CUcontext": ctypes.c_void_p,
    "CUstream": ctypes.c_void_p,
    "int *": ctypes.POINTER(ctypes.c_int),
    "CUcontext *": ctypes.POINTER(ctypes.c_void_p),
    "CUdeviceptr *": ctypes.POINTER(ctypes.c_uint64),
    "const char **": ctypes.POINTER(ctypes.c_char_p),
}


def exported_form(name: str) -> list[Any]:
    """The parameters of what the library exports by this name.

    Where the header renames a function to NAME_v2, it declares that form first under the plain
    name; the form that the library exports by the plain name comes last.
    """
    plain = name.removesuffix("_v2")
    found = re.findall(rf"CUresult CUDAAPI {plain}\(([^)]*)\);", HEADER)
    assert found, f"{name} is not in cuda.h"
    assert name == plain or re.search(rf"#define {plain}\s+{name}\n", HEADER)
    types = []
    for parameter in found[-1 if name == plain else 0].split(","):
        of_type = re.match(r"(.*?)(\w+)$", " ".join(parameter.split())).group(1)
        types.append(TYPES[of_type.strip()])
    return types


@pytest.mark.parametrize("name", cuda_calls._PROTOTYPES)
def test_parameters_are_those_of_the_header(name: str) -> None:
    assert list(cuda_calls._PROTOTYPES[name]) == exported_form(name)


@pytest.mark.parametrize(
    ("constant", "value"),
    (
        ("CU_MEM_ATTACH_GLOBAL", cuda_calls._ATTACH_GLOBAL),
        ("CU_MEM_ADVISE_SET_PREFERRED_LOCATION", cuda_calls._PREFER_LOCATION),
        ("CU_MEM_ADVISE_SET_ACCESSED_BY", cuda_calls._ACCESSED_BY),
        ("CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS", cuda_calls._CONCURRENT_MANAGED_ACCESS),
    ),
)
def test_constants_are_those_of_the_header(constant: str, value: int) -> None:
    found = re.search(rf"\b{constant}\s*=\s*(\w+)", HEADER)
    assert found is not None and int(found.group(1), 0) == value


class Driver:
    """Functions of the form that is declared; `calls` holds what came through it."""

    def __init__(self, status: int = 0) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.kept = {name: self.function(name, status) for name in cuda_calls._PROTOTYPES}

    def function(self, name: str, status: int) -> Any:
        def called(*arguments: Any) -> int:
            if name == "cuDevicePrimaryCtxRetain":
                arguments[0][0] = 0xC0
            elif name == "cuMemAllocManaged":
                arguments[0][0] = 2**40 + 5  # more than 32 bits
            elif name == "cuDeviceGetAttribute":
                arguments[0][0] = 1
            elif name == "cuGetErrorString":
                arguments[1][0] = b"operation not supported"
            self.calls.append((name, *arguments))
            return status if name.startswith("cuMem") else 0

        return ctypes.CFUNCTYPE(ctypes.c_int, *cuda_calls._PROTOTYPES[name])(called)

    def __getattr__(self, name: str) -> Any:
        return self.kept[name]


class Stream:
    cuda_stream = 2**33 + 7


def table(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> TorchCuda:
    """The table for the second device, with this driver."""
    monkeypatch.setattr(cuda_calls, "_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    cuda_calls._context.cache_clear()
    return TorchCuda(torch.device("cuda", 1))


def test_arguments_arrive_in_the_context_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    calls = table(monkeypatch, driver)
    address = calls.allocate_managed(2**35)
    assert address == 2**40 + 5 and calls.has_managed_memory()
    calls.advise(address, 2**35)
    calls.move(address, 2**35, True, Stream())
    calls.move(address, 2**35, False, Stream())
    calls.free_managed(address)
    cuda_calls._context.cache_clear()
    names = [name for name, *_ in driver.calls]
    assert names[0] == "cuDevicePrimaryCtxRetain" and driver.calls[0][2] == 1
    assert driver.calls[1::2] == [("cuCtxSetCurrent", 0xC0)] * 7
    done = {index: call for index, call in enumerate(driver.calls[2::2])}
    assert done[0][0] == "cuMemAllocManaged" and done[0][2:] == (2**35, 1)
    assert done[1][0] == "cuDeviceGetAttribute" and done[1][2:] == (89, 1)
    assert done[2] == ("cuMemAdvise", address, 2**35, 3, -1)  # prefer the host
    assert done[3] == ("cuMemAdvise", address, 2**35, 5, 1)  # mapped for the device
    assert done[4] == ("cuMemPrefetchAsync", address, 2**35, 1, 2**33 + 7)
    assert done[5] == ("cuMemPrefetchAsync", address, 2**35, -1, 2**33 + 7)
    assert done[6] == ("cuMemFree_v2", address)


def test_errors_tell_the_call_and_what_the_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = table(monkeypatch, Driver(status=801))
    with pytest.raises(MemoryError, match=r"cuMemAllocManaged: operation not supported \(801\)"):
        calls.allocate_managed(4096)
    with pytest.raises(RuntimeError, match=r"cuMemPrefetchAsync: .* \(801\)"):
        calls.move(4096, 4096, True, Stream())
    cuda_calls._context.cache_clear()
