"""The operations of the compiled libraries: they allocate results and call the C functions.

The C functions are declared, with their contracts, in csrc/kernels.h. Each operation here has the
arguments of the reference function of its name. ctypes releases the interpreter lock during a call.

Read next: csrc/cpu/dequantize_4bit.cpp.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from array import array
from collections.abc import Iterable, Sequence
from ctypes import c_int, c_int64, c_void_p
from operator import attrgetter
from typing import Any, NoReturn

import torch
from torch import Tensor

from qlora_ref import matmul_plan

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Dtype

_dtype = attrgetter("dtype")


class Operations:
    """The operations of one library. The contracts stand in ops.py."""

    _place: str
    _is_here: attrgetter[bool]

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def quantize_4bit(self, x: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        packed = self._new(((x.numel() + 1) // 2,), torch.uint8, x)
        absmax = self._new((-(-x.numel() // block_size),), torch.float32, x)
        self.quantize_into(packed, absmax, "quantize_4bit", x, codebook, block_size)
        return packed, absmax

    def quantize_8bit(self, x: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        codes = self._new(x.shape, torch.uint8, x)
        absmax = self._new((-(-x.numel() // block_size),), torch.float32, x)
        self.quantize_into(codes, absmax, "quantize_8bit", x, codebook, block_size)
        return codes, absmax

    def quantize_into(
        self,
        codes: Tensor,
        absmax: Tensor,
        name: str,
        x: Tensor,
        codebook: Tensor,
        block_size: int,
    ) -> None:
        """quantize_4bit or quantize_8bit into tensors that are there already."""
        inputs = (x.contiguous(), DTYPES[x.dtype], x.numel(), codebook.contiguous(), block_size)
        self._call(name, x.device, *inputs, codes, absmax)

    def dequantize_4bit(
        self,
        packed: Tensor,
        absmax: Tensor,
        codebook: Tensor,
        block_size: int,
        shape: Sequence[int],
        dtype: torch.dtype,
        *nested: Tensor | None,  # nested_absmax, nested_codebook, offset
    ) -> Tensor:
        y = self._new(shape, dtype, packed)
        self.dequantize_4bit_into(y, packed, absmax, codebook, block_size, *nested)
        return y

    def dequantize_4bit_into(
        self,
        y: Tensor,
        packed: Tensor,
        absmax: Tensor,
        codebook: Tensor,
        block_size: int,
        *nested: Tensor | None,
    ) -> None:
        """dequantize_4bit into a tensor that is there already."""
        scales = (absmax.contiguous(), *(nested or (None,) * 3))
        inputs = (packed.contiguous(), *scales, codebook.contiguous(), block_size)
        self._call("dequantize_4bit", y.device, *inputs, y.numel(), y, DTYPES[y.dtype])

    def dequantize_8bit(
        self, codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int, dtype: torch.dtype
    ) -> Tensor:
        y = self._new(codes.shape, dtype, codes)
        inputs = [tensor.contiguous() for tensor in (codes, absmax, codebook)]
        layout = (block_size, y.numel(), y, DTYPES[dtype])
        self._call("dequantize_8bit", y.device, *inputs, *layout)
        return y

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
        leading = x.shape[:-1]
        tokens = math.prod(leading)
        y = self._new((*leading, columns if transposed else rows), x.dtype, x)
        scales = (absmax, nested_absmax, nested_codebook, offset)
        weight = (packed, *scales, codebook, block_size, rows, columns)
        typed = (x.contiguous(), DTYPES[x.dtype], tokens)
        plan = self._matmul_plan(x, tokens, packed, block_size, rows, columns, transposed)
        self._call("matmul_4bit", x.device, *typed, *weight, bias, int(transposed), y, *plan)
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
        if not all(map(Tensor.is_contiguous, grads)):
            grads = [grad.contiguous() for grad in grads]
        tables: list[Any] = [None] * 4
        if first_codebook is not None and second_codebook is not None:
            codebooks = first_codebook.contiguous(), second_codebook.contiguous()
            tables = [list(first_absmaxes), list(second_absmaxes), *codebooks]
        counts = _on_host(map(Tensor.numel, params), c_int64)
        typed = (list(params), _dtypes(params), list(grads), _dtypes(grads))
        moments = (list(first_moments), list(second_moments))
        device = params[0].device
        self._call("adamw_step", device, len(params), counts, *typed, *moments, *tables, *options)

    def _new(self, shape: Sequence[int], dtype: torch.dtype, like: Tensor) -> Tensor:
        # One size an argument: torch takes them in two thirds of the time of a tuple. But for (),
        # which would be no argument.
        sizes: Sequence[Any] = shape or [()]
        return like.new_empty(*sizes, dtype=dtype)

    def _matmul_plan(self, x: Tensor, *sizes: Any) -> tuple[Any, ...]:
        """What the library wants to know of a product beyond its contract."""
        return ()

    def _call(self, name: str, device: torch.device, *arguments: Any) -> None:
        """Call a C function: tensors by address, also in lists, how to run last."""
        values = [value if type(value) in _PLAIN else self._address(value) for value in arguments]
        status = getattr(self._library, name)(*values, self._execution(device))
        if status:
            self._raise_error(name, status)

    def _address(self, value: Tensor | list[Tensor] | ctypes.Array[Any]) -> Any:
        if isinstance(value, Tensor):
            # What C would follow blindly: an address elsewhere, elements that are not in a row.
            if not self._is_here(value) or not value.is_contiguous():
                raise ValueError(
                    f"expected a contiguous tensor on the {self._place}, got one on "
                    f"{value.device} with strides {value.stride()}"
                )
            if value.is_neg() or value._is_zerotensor():
                raise ValueError(
                    "expected a tensor that holds its values, got one that negates or makes them "
                    "when they are read; call .resolve_neg() or .clone() on it"
                )
            return value.data_ptr()
        return self._addresses(value) if isinstance(value, list) else value

    def _addresses(self, tensors: list[Tensor]) -> ctypes.Array[Any]:
        """As `_address` of each, for C to read as an array of pointers."""
        if all(map(self._is_here, tensors)) and all(map(Tensor.is_contiguous, tensors)):
            return _on_host(map(Tensor.data_ptr, tensors), c_void_p)
        return _on_host(map(self._address, tensors), c_void_p)

    def _execution(self, device: torch.device) -> int:
        """How a function is to run: Execution in csrc/kernels.h."""
        raise NotImplementedError

    def _raise_error(self, name: str, status: int) -> NoReturn:
        raise_error(name, status)


class CpuOperations(Operations):
    """The operations on CPU tensors."""

    _place = "CPU"
    _is_here = attrgetter("is_cpu")

    def _execution(self, device: torch.device) -> int:
        return _threads()

    def multiply_in_registers(self, dtype: torch.dtype, rounds: int) -> int:
        """No operation, but a measure for them; returns how many multiplications and additions."""
        operations = (c_int64 * 1)()
        name, device = "multiply_in_registers", torch.device("cpu")
        self._call(name, device, DTYPES[dtype], rounds, operations)
        return operations[0]


class CudaOperations(Operations):
    """The operations on CUDA tensors: on torch's current stream, without waiting."""

    _place = "GPU"
    _is_here = attrgetter("is_cuda")

    def _execution(self, device: torch.device) -> int:
        stream: int = torch.cuda.current_stream(device).cuda_stream
        return stream

    def _call(self, name: str, device: torch.device, *arguments: Any) -> None:
        with torch.cuda.device(device):
            super()._call(name, device, *arguments)

    def _matmul_plan(
        self,
        x: Tensor,
        tokens: int,
        packed: Tensor,
        block_size: int,
        rows: int,
        columns: int,
        transposed: bool,
    ) -> tuple[Any, ...]:
        is_narrow = x.dtype != torch.float32
        layout = (tokens, rows, columns, block_size, is_narrow, transposed)
        product = matmul_plan.Product(*layout, _are_aligned(x, packed))
        plan = matmul_plan.choose(product, self._gpu(x.device))
        workspace = None
        if plan.splits > 1:
            outputs = columns if transposed else rows
            workspace = self._new((plan.splits, tokens, outputs), torch.float32, x)
        return int(plan.kernel), plan.splits, workspace

    def _gpu(self, device: torch.device) -> matmul_plan.Gpu:
        return describe_gpu(device)

    def _raise_error(self, name: str, status: int) -> NoReturn:
        if status >= 1000:  # kCudaError
            text = self._library.error_text(status).decode()
            raise RuntimeError(f"{name} in the CUDA library failed: {text}")
        raise_error(name, status)


@functools.cache
def describe_gpu(device: torch.device) -> matmul_plan.Gpu:
    """What the choice of a kernel looks at."""
    found = torch.cuda.get_device_properties(device)
    return matmul_plan.Gpu(
        found.multi_processor_count,
        found.clock_rate * 1e3,
        # Both edges of the clock carry bits.
        2 * found.memory_clock_rate * 1e3 * found.memory_bus_width / 8,
        # What a kernel gets when it asks; without asking, less.
        getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block),
    )


def _are_aligned(*tensors: Tensor) -> bool:
    """Whether kernels may read vectors of 16 bytes."""
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


def raise_error(name: str, status: int) -> NoReturn:
    """The exception that a C function's error code (enum Status in csrc/kernels.h) stands for."""
    if status == 1:
        raise TypeError(f"{name} in the compiled library does not know this dtype")
    if status == 2:
        raise ValueError(f"{name} in the compiled library refuses this size, block_size or step")
    if status == 3:
        raise MemoryError(f"{name} in the compiled library found no memory for its working space")
    raise RuntimeError(f"{name} in the compiled library failed with the unknown code {status}")


_PLAIN = frozenset((int, float, type(None)))  # what ctypes takes as it is


_TYPE_CODES = {c_int: "i", c_int64: "q", c_void_p: "Q"}  # of array


def _on_host(values: Iterable[int], kind: Any) -> ctypes.Array[Any]:
    """An array for C: Python's own takes a list in half of the time that one of ctypes takes."""
    listed = array(_TYPE_CODES[kind], list(values))
    return (kind * len(listed)).from_buffer(listed)


def _dtypes(tensors: Sequence[Tensor]) -> ctypes.Array[Any]:
    return _on_host(map(DTYPES.__getitem__, map(_dtype, tensors)), c_int)


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
