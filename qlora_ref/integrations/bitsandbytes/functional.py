"""bitsandbytes.functional: its names and arguments on our operations.

4 bits: quantized.quantize and QuantizedTensor. 8 bits: ops.quantize_8bit, exact nearest levels.
What is not here, LLM.int8 above all, raises NotImplementedError.
"""

from __future__ import annotations

import ctypes
from typing import Any, NoReturn

import torch
from torch import Tensor

from qlora_ref import ops
from qlora_ref.checks import FLOAT_DTYPES
from qlora_ref.codebooks import CODEBOOKS, dynamic_codebook
from qlora_ref.integrations.bitsandbytes.codebook_makers import (
    create_dynamic_map,
    create_fp8_map,
    create_linear_map,
    create_normal_map,
)
from qlora_ref.integrations.bitsandbytes.optimizer_updates import (
    optimizer_update_8bit_blockwise,
    optimizer_update_32bit,
)
from qlora_ref.integrations.bitsandbytes.quant_state import QuantState
from qlora_ref.integrations.bitsandbytes.utils import pack_dict_to_tensor, unpack_tensor_to_dict
from qlora_ref.quantized import quantize

__all__ = [
    "QuantState",
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "gemv_4bit",
    "get_4bit_type",
    "optimizer_update_32bit",
    "optimizer_update_8bit_blockwise",
    "pack_dict_to_tensor",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
    "unpack_tensor_to_dict",
]

_BLOCK_SIZE = 64


def quantize_4bit(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """Quantise to 4 bits; codes as `quant_storage` (bytes, 1), scales in the state.

    absmax and out receive the result if they are given. Any even block size.
    Raises NotImplementedError for another quant_type, ValueError for values that are not finite.
    """
    _check_type(quant_type)
    tensor = quantize(A, quant_type, blocksize or _BLOCK_SIZE, compress_statistics)
    state = QuantState.of(tensor)
    packed = tensor.packed.view(quant_storage).reshape(-1, 1)
    if absmax is not None:
        state.absmax = absmax.copy_(state.absmax)
    return packed if out is None else out.copy_(packed.reshape(out.shape)), state


def quantize_nf4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """`quantize_4bit` to NF4."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "nf4", quant_storage)


def quantize_fp4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """`quantize_4bit` to FP4."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "fp4", quant_storage)


def dequantize_4bit(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> Tensor:
    """Restore a tensor from its codes and its state, or from absmax into `out`.

    Codes whose first dimension is 1 (a transposed weight) give the transposed tensor.
    """
    if quant_state is None:
        if absmax is None or out is None:
            raise ValueError("without quant_state, both absmax and out must be given")
        _check_type(quant_type)
        size = blocksize or _BLOCK_SIZE
        quant_state = QuantState(absmax, out.shape, None, size, quant_type, out.dtype)
    restored = quant_state.with_codes(A).dequantize()
    if out is not None:
        restored = out.copy_(restored)
    return restored.t() if A.dim() > 1 and A.shape[0] == 1 else restored


def dequantize_nf4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """`dequantize_4bit` from NF4."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")


def dequantize_fp4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """`dequantize_4bit` from FP4."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


def quantize_blockwise(
    A: Tensor,
    code: Tensor | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> tuple[Tensor, QuantState]:
    """Quantise to 8 bits, each value to the nearest of up to 256 levels.

    code  float32 (at most 256,), ascending; the signed dynamic map unless it is given
    """
    levels = dynamic_codebook().to(A.device) if code is None else code.to(A.device)
    codes, scales = ops.quantize_8bit(A, _whole_table(levels), blocksize)
    state = QuantState(scales, code=levels, blocksize=blocksize, dtype=A.dtype)
    if nested:
        state.offset = scales.mean()
        codes2, state.state2 = quantize_blockwise(scales - state.offset, blocksize=blocksize)
        state.absmax, state.nested = codes2, True
    if absmax is not None:
        state.absmax = absmax.copy_(state.absmax)
    codes = codes.reshape(A.shape)
    return codes if out is None else out.copy_(codes), state


def dequantize_blockwise(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> Tensor:
    """Restore what `quantize_blockwise` gave, in its dtype; from absmax alone in float32."""
    if quant_state is None:
        if absmax is None:
            raise ValueError("quant_state or absmax must be given")
        dtype = torch.float32 if out is None else out.dtype
        quant_state = QuantState(absmax, code=code, blocksize=blocksize, dtype=dtype)
    scales = quant_state.absmax
    if quant_state.state2 is not None and quant_state.offset is not None:
        scales = dequantize_blockwise(scales, quant_state.state2).float() + quant_state.offset
    levels = dynamic_codebook() if quant_state.code is None else quant_state.code
    restored = ops.dequantize_8bit(
        A.contiguous(),
        scales.float(),
        _whole_table(levels.to(A.device)),
        quant_state.blocksize or blocksize,
        quant_state.dtype if quant_state.dtype in FLOAT_DTYPES else torch.float32,
    )
    return restored.reshape(A.shape) if out is None else out.copy_(restored.reshape(out.shape))


def gemv_4bit(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | None = None,
) -> Tensor:
    """A dequantised(B)^T for the codes B of a state; see ops.matmul_4bit."""
    if state is None:
        raise ValueError("state must be given: the scales of B are in it")
    if transposed_A:
        raise NotImplementedError("gemv_4bit multiplies A as it is: pass A.t() instead")
    y = matmul(A, B, state, None)
    return y if out is None else out.copy_(y)


def matmul(A: Tensor, B: Tensor, state: QuantState, bias: Tensor | None) -> Tensor:
    """A W^T + bias for W (N, K) in 4 bits; A W for one that was quantised as (K, N)."""
    weight = state.with_codes(B)
    rows, columns = weight.shape
    return ops.matmul_4bit(
        A,
        weight.packed,
        weight.scales,
        weight.codebook,
        weight.block_size,
        weight.shape,
        None if bias is None else bias.to(A.dtype),
        A.shape[-1] == rows != columns,
        weight.nested_absmax,
        weight.nested_codebook,
        weight.offset,
    )


def get_4bit_type(
    typename: str, device: torch.device | str | None = None, blocksize: int = 64
) -> Tensor:
    """The 16 levels of nf4, fp4, int4 or af4, float32, on the CPU unless `device` is given.

    Those of af4 descend, as in bitsandbytes.
    """
    if typename not in ("nf4", "fp4", "int4", "af4"):
        raise NotImplementedError(f"there is no 4-bit type {typename!r}: nf4, fp4, int4, af4")
    if typename == "af4" and blocksize != _BLOCK_SIZE:
        raise NotImplementedError("the levels of af4 are known for blocks of 64 only")
    levels = CODEBOOKS[typename]().to(device or "cpu")
    return levels.flip(0) if typename == "af4" else levels


def _check_type(quant_type: str) -> None:
    if quant_type not in QuantState.valid_quant_types:
        raise NotImplementedError(f"quant_type must be nf4 or fp4, got {quant_type!r}")


def _whole_table(levels: Tensor) -> Tensor:
    # Of equal levels the lowest is taken, so that those repeated at the end stand for nothing.
    missing = 256 - levels.numel()
    return torch.cat([levels.float(), levels[-1:].float().expand(max(0, missing))])


def has_avx512bf16() -> bool:
    """False: programs ask it in order to repack weights, and no weight here is ever repacked."""
    return False


def get_ptr(A: Tensor | None) -> ctypes.c_void_p | None:
    """The address of a tensor's values."""
    return None if A is None else ctypes.c_void_p(A.data_ptr())


def absent(name: str, why: str) -> Any:
    """A function that says of a name that it is not available, and why."""

    def missing(*arguments: Any, **options: Any) -> NoReturn:
        raise NotImplementedError(f"{name} {why}")

    missing.__name__ = name
    missing.apply = missing  # type: ignore[attr-defined]  # how an autograd.Function is called
    return missing


def no_int8(name: str) -> Any:
    """The same of a name that belongs to LLM.int8."""
    return absent(
        name,
        "belongs to LLM.int8, which qlora_ref does not have; its 4-bit layers do not need it",
    )


int8_vectorwise_quant = no_int8("int8_vectorwise_quant")
int8_vectorwise_dequant = no_int8("int8_vectorwise_dequant")
int8_linear_matmul = no_int8("int8_linear_matmul")
int8_mm_dequant = no_int8("int8_mm_dequant")
int8_double_quant = no_int8("int8_double_quant")
igemm = no_int8("igemm")
batched_igemm = no_int8("batched_igemm")
check_matmul = no_int8("check_matmul")

_PAGES = "moves CUDA's managed memory by hand; here optimizers page by themselves (is_paged=True)"
get_paged = absent("get_paged", _PAGES)
prefetch_tensor = absent("prefetch_tensor", _PAGES)
fill = absent("fill", _PAGES)
elementwise_func = absent("elementwise_func", _PAGES)
