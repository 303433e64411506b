"""The compiled libraries: finds them, declares their functions, makes exceptions of error codes.

The C functions are declared, with their contracts, in csrc/kernels.h. Each operation here has the
arguments of the reference function of its name: it allocates the results and passes addresses.
ctypes releases the interpreter lock during a call.

Read next: csrc/cpu/dequantize_4bit.cpp.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from collections.abc import Callable, Sequence
from ctypes import c_double, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parent  # where setup.py puts libqlora_cpu_<isa>.so, one for each of ISAS

# What csrc/cpu is compiled for, in the order of enum Isa in csrc/kernels.h; each includes the last.
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")

INTERFACE_VERSION = 3  # kInterfaceVersion in csrc/kernels.h

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Dtype

_QUANTIZE = (c_void_p, c_int, c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_int)
_DEQUANTIZE = (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int, c_int)
SIGNATURES: dict[str, Sequence[type]] = {
    "interface_version": (),
    "best_isa": (),
    "quantize_4bit": _QUANTIZE,
    "dequantize_4bit": _DEQUANTIZE,
    "quantize_8bit": _QUANTIZE,
    "dequantize_8bit": _DEQUANTIZE,
    "matmul_4bit": (
        *(c_void_p, c_int, c_int64),  # x, tokens
        *(c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),  # packed, scales
        *(c_void_p, c_int64, c_int64, c_int64),  # codebook, block_size, shape
        *(c_void_p, c_int, c_void_p, c_int),  # bias, transposed, y
    ),
    "adamw_step": (
        *(c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),  # counts, params, grads
        *(c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),  # moments, scales, codebooks
        *(c_double, c_double, c_double, c_double, c_double, c_int64, c_int),
    ),
}


class BackendUnavailable(RuntimeError):
    """A backend cannot run an operation; the text says why."""


def load(backend: str, operation: str, isa: str | None = None) -> Callable[..., Any]:
    """The function that runs an operation on a compiled backend, called as the reference is.

    backend    "cpu" or "cuda"
    operation  one of dispatch.OPERATIONS
    isa        one of ISAS, for the CPU; None: the best that this machine has
    Raises BackendUnavailable with the reason.
    """
    if backend == "cuda":
        raise BackendUnavailable("no CUDA library was built")
    if isa is None:
        isa = available_isas(FOLDER)[-1]
    elif isa not in available_isas(FOLDER):
        raise BackendUnavailable(_why_no_isa(isa))
    function: Callable[..., Any] | None = getattr(_open_cpu(FOLDER, isa), operation, None)
    if function is None:
        raise BackendUnavailable(f"the compiled library has no {operation}")
    return function


@functools.cache
def available_isas(folder: Path) -> tuple[str, ...]:
    """The members of ISAS that were built into a folder and that this processor can run.

    Raises BackendUnavailable where nothing was built.
    """
    best = open_library(library_path(folder, ISAS[0])).best_isa()
    return tuple(isa for isa in ISAS[: best + 1] if library_path(folder, isa).exists())


def library_path(folder: Path, isa: str) -> Path:
    """Where setup.py puts the library for an instruction set."""
    return folder / f"libqlora_cpu_{isa}.so"


def _why_no_isa(isa: str) -> str:
    available = ", ".join(available_isas(FOLDER))
    if not library_path(FOLDER, isa).exists():
        return f"the compiler built no library for {isa}; there is: {available}"
    return f"this processor does not have {isa}; it runs: {available}"


@functools.cache
def _open_cpu(folder: Path, isa: str) -> CpuOperations:
    return CpuOperations(open_library(library_path(folder, isa)))


def open_library(path: Path) -> ctypes.CDLL:
    """Load a library that was built from csrc/ and declare its functions.

    Raises BackendUnavailable when it is missing, does not load, or is of another version.
    """
    if not path.exists():
        raise BackendUnavailable("no compiled library: install a C++ compiler and reinstall")
    try:
        # Its GOMP_* symbols find the OpenMP that torch has put into the global scope: see setup.py.
        library = ctypes.CDLL(str(path))
        version = library.interface_version()
    except (OSError, AttributeError) as error:
        raise BackendUnavailable(f"the compiled library does not load: {error}") from error
    if version != INTERFACE_VERSION:
        raise BackendUnavailable(
            f"the compiled library has interface {version}, these Python files have "
            f"{INTERFACE_VERSION}: reinstall, or run `python setup.py build_ext --inplace`"
        )
    for name, arguments in SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    return library


class CpuOperations:
    """The operations on CPU tensors. The contracts stand in ops.py."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def quantize_4bit(self, x: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        packed = torch.empty((x.numel() + 1) // 2, dtype=torch.uint8)
        return packed, self._quantize("quantize_4bit", x, codebook, block_size, packed)

    def quantize_8bit(self, x: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        codes = torch.empty(x.shape, dtype=torch.uint8)
        return codes, self._quantize("quantize_8bit", x, codebook, block_size, codes)

    def _quantize(
        self, name: str, x: Tensor, codebook: Tensor, block_size: int, codes: Tensor
    ) -> Tensor:
        n = x.numel()
        absmax = torch.empty(-(-n // block_size), dtype=torch.float32)
        self._call(
            name,
            x.contiguous(),
            DTYPES[x.dtype],
            n,
            codebook.contiguous(),
            block_size,
            codes,
            absmax,
        )
        return absmax

    def dequantize_4bit(
        self,
        packed: Tensor,
        absmax: Tensor,
        codebook: Tensor,
        block_size: int,
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> Tensor:
        y = torch.empty(tuple(shape), dtype=dtype)
        self._dequantize("dequantize_4bit", packed, absmax, codebook, block_size, y)
        return y

    def dequantize_8bit(
        self, codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int, dtype: torch.dtype
    ) -> Tensor:
        y = torch.empty(codes.shape, dtype=dtype)
        self._dequantize("dequantize_8bit", codes, absmax, codebook, block_size, y)
        return y

    def _dequantize(
        self, name: str, codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int, y: Tensor
    ) -> None:
        inputs = [tensor.contiguous() for tensor in (codes, absmax, codebook)]
        self._call(name, *inputs, block_size, y.numel(), y, DTYPES[y.dtype])

    def matmul_4bit(
        self,
        x: Tensor,
        packed: Tensor,
        absmax: Tensor,
        codebook: Tensor,
        block_size: int,
        shape: Sequence[int],
        bias: Tensor | None,
        transposed: bool,
        nested_absmax: Tensor | None,
        nested_codebook: Tensor | None,
        offset: Tensor | None,
    ) -> Tensor:
        rows, columns = shape
        y = torch.empty((*x.shape[:-1], columns if transposed else rows), dtype=x.dtype)
        tokens = math.prod(x.shape[:-1])
        scales = (absmax, nested_absmax, nested_codebook, offset)
        weight = (packed, *scales, codebook, block_size, rows, columns)
        self._call("matmul_4bit", x, DTYPES[x.dtype], tokens, *weight, bias, int(transposed), y)
        return y

    def adamw_step(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        first_moments: Sequence[Tensor],
        second_moments: Sequence[Tensor],
        first_absmaxes: Sequence[Tensor],
        second_absmaxes: Sequence[Tensor],
        first_codebook: Tensor | None,
        second_codebook: Tensor | None,
        *options: float,  # lr, beta1, beta2, eps, weight_decay, step
    ) -> None:
        grads = [grad.contiguous() for grad in grads]
        tables: list[Any] = [None] * 4
        if first_codebook is not None and second_codebook is not None:
            codebooks = first_codebook.contiguous(), second_codebook.contiguous()
            tables = [list(first_absmaxes), list(second_absmaxes), *codebooks]
        counts = torch.tensor([param.numel() for param in params], dtype=torch.int64)
        typed = (list(params), _dtypes(params), grads, _dtypes(grads))
        moments = (list(first_moments), list(second_moments))
        self._call("adamw_step", len(params), counts, *typed, *moments, *tables, *options)

    def _call(self, name: str, *arguments: Any) -> None:
        """Call a C function: tensors by address, also in lists, the number of threads last."""
        values = [value if type(value) in _PLAIN else _address(value) for value in arguments]
        status = getattr(self._library, name)(*values, _threads())
        if status:
            raise_error(name, status)


def raise_error(name: str, status: int) -> None:
    """The exception that a C function's error code (enum Status in csrc/kernels.h) stands for."""
    if status == 1:
        raise TypeError(f"{name} in the compiled library does not know this dtype")
    if status == 2:
        raise ValueError(f"{name} in the compiled library refuses this size, block_size or step")
    if status == 3:
        raise MemoryError(f"{name} in the compiled library found no memory for its working space")
    raise RuntimeError(f"{name} in the compiled library failed with the unknown code {status}")


_PLAIN = frozenset((int, float, type(None)))  # what ctypes takes as it is


def _address(tensor: Tensor | list[Tensor]) -> Any:
    if isinstance(tensor, list):  # C reads it as an array of pointers
        return (c_void_p * len(tensor))(*map(_address, tensor))
    # What C would follow blindly: an address on another device, elements that are not in a row.
    if not tensor.is_cpu or not tensor.is_contiguous():
        raise ValueError(
            f"expected a contiguous tensor on the CPU, got one on {tensor.device} with strides "
            f"{tensor.stride()}"
        )
    return tensor.data_ptr()


def _dtypes(tensors: Sequence[Tensor]) -> Tensor:
    return torch.tensor([DTYPES[tensor.dtype] for tensor in tensors], dtype=torch.int32)


_is_forked = False


def _threads() -> int:
    # A forked child has none of its parent's OpenMP threads, yet libgomp waits for them: with one
    # thread it asks for no others.
    return 1 if _is_forked else torch.get_num_threads()


def _note_fork() -> None:
    global _is_forked
    _is_forked = True


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_note_fork)
