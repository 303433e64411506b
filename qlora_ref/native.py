"""The compiled libraries: which there are, which of them runs here, and what their functions take.

The C functions are declared, with their contracts, in csrc/kernels.h.

Read next: native_operations.py.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
from ctypes import c_char_p, c_double, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

from qlora_ref.native_operations import CpuOperations, CudaOperations

FOLDER = Path(__file__).parent  # where setup.py puts libqlora_cpu_<isa>.so, one for each of ISAS

# What csrc/cpu is compiled for, in the order of enum Isa in csrc/kernels.h; each includes the last.
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")

CUDA_LIBRARY = "libqlora_cuda.so"  # beside them

INTERFACE_VERSION = 5  # kInterfaceVersion in csrc/kernels.h

_QUANTIZE = (c_void_p, c_int, c_int64, c_void_p, c_int64, c_void_p, c_void_p)
_SCALES = (c_void_p, c_void_p, c_void_p, c_void_p)  # absmax, and those of nested scales
_OPERATIONS: dict[str, Sequence[type]] = {  # all but the last argument, Execution
    "quantize_4bit": _QUANTIZE,
    "dequantize_4bit": (
        *(c_void_p, *_SCALES, c_void_p, c_int64),  # packed, scales, codebook, block_size
        *(c_int64, c_void_p, c_int),  # n, y
    ),
    "quantize_8bit": _QUANTIZE,
    "dequantize_8bit": (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int),
    "matmul_4bit": (
        *(c_void_p, c_int, c_int64),  # x, tokens
        *(c_void_p, *_SCALES, c_void_p, c_int64),  # packed, scales, codebook, block_size
        *(c_int64, c_int64),  # shape
        *(c_void_p, c_int, c_void_p),  # bias, transposed, y
    ),
    "adamw_step": (
        *(c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),  # counts, params, grads
        *(c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),  # moments, scales, codebooks
        *(c_double, c_double, c_double, c_double, c_double, c_int64),
    ),
}
CPU_SIGNATURES: dict[str, Sequence[type]] = {
    "interface_version": (),
    "best_isa": (),
    "multiply_in_registers": (c_int, c_int64, c_void_p, c_int),
    **{name: (*arguments, c_int) for name, arguments in _OPERATIONS.items()},
}
CUDA_SIGNATURES: dict[str, Sequence[type]] = {
    "interface_version": (),
    "error_text": (c_int,),
    **{name: (*arguments, c_void_p) for name, arguments in _OPERATIONS.items()},
    "matmul_4bit": (*_OPERATIONS["matmul_4bit"], c_int, c_int, c_void_p, c_void_p),
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
    operations = _open_cuda(FOLDER) if backend == "cuda" else _open_cpu(FOLDER, isa)
    function: Callable[..., Any] | None = getattr(operations, operation, None)
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
def _open_cpu(folder: Path, isa: str | None) -> CpuOperations:
    if isa is None:
        isa = available_isas(folder)[-1]
    elif isa not in available_isas(folder):
        raise BackendUnavailable(_why_no_isa(isa))
    return CpuOperations(open_library(library_path(folder, isa)))


@functools.cache
def _open_cuda(folder: Path) -> CudaOperations:
    path = folder / CUDA_LIBRARY
    if not path.exists():
        raise BackendUnavailable("no CUDA library was built: install nvcc and reinstall")
    return CudaOperations(open_library(path, CUDA_SIGNATURES))


def open_library(
    path: Path, signatures: Mapping[str, Sequence[type]] = CPU_SIGNATURES
) -> ctypes.CDLL:
    """Load a library that was built from csrc/ and declare its functions.

    Raises BackendUnavailable when it is missing, does not load, or is of another version.
    """
    if not path.exists():
        raise BackendUnavailable("no compiled library: install a C++ compiler and reinstall")
    try:
        # Its GOMP_* symbols find the OpenMP that torch has put into the global scope: see setup.py.
        library = ctypes.CDLL(str(path))
        version = library.interface_version()
        for name, arguments in signatures.items():
            getattr(library, name).argtypes = arguments
    except (OSError, AttributeError) as error:
        raise BackendUnavailable(f"the compiled library does not load: {error}") from error
    if version != INTERFACE_VERSION:
        raise BackendUnavailable(
            f"the compiled library has interface {version}, these Python files have "
            f"{INTERFACE_VERSION}: reinstall, or run `python setup.py build_ext --inplace`"
        )
    if "error_text" in signatures:
        library.error_text.restype = c_char_p
    return library
