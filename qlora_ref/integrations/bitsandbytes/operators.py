"""The operators of bitsandbytes' torch.library namespace, over ours.

`define("bitsandbytes")` makes `torch.ops.bitsandbytes.*` these; on import they are defined under
`torch.ops.qlora_ref_bitsandbytes.*`, so that they are there beside an installed bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_ref import ops
from qlora_ref.codebooks import DYNAMIC_BLOCK_SIZE
from qlora_ref.integrations.bitsandbytes import functional as F
from qlora_ref.integrations.bitsandbytes.quant_state import QuantState

NAMESPACE = "qlora_ref_bitsandbytes"

_SCHEMAS = {
    "quantize_4bit": (
        "(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)"
    ),
    "dequantize_4bit": (
        "(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype) "
        "-> Tensor"
    ),
    "quantize_blockwise": "(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)",
    "dequantize_blockwise": (
        "(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype) -> Tensor"
    ),
    "gemv_4bit": (
        "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize) -> Tensor"
    ),
    "gemm_4bit": (
        "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, "
        "Tensor? bias=None, Tensor? absmax_8bit=None, Tensor? absmax_code=None, "
        "Tensor? absmax_offset=None) -> Tensor"
    ),
    "optimizer_update_32bit": (
        "(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, "
        "Tensor(a3!)? state2, Tensor(a4!)? unorm_vec, float max_unorm, float param_norm, "
        "float beta1, float beta2, float beta3, float alpha, float eps, float weight_decay, "
        "int step, float lr, float gnorm_scale, bool skip_zeros=False) -> ()"
    ),
    "optimizer_update_8bit_blockwise": (
        "(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, "
        "Tensor(a3!)? state2, float beta1, float beta2, float beta3, float alpha, float eps, "
        "int step, float lr, Tensor(a4!) qmap1, Tensor(a5!)? qmap2, Tensor(a6!) absmax1, "
        "Tensor(a7!)? absmax2, float weight_decay, float gnorm_scale, bool skip_zeros=False) -> ()"
    ),
}
# These have a second form, name.out, which writes into its last argument.
_WITH_OUT = ("dequantize_4bit", "dequantize_blockwise", "gemv_4bit")
# They are there, and raise NotImplementedError.
_INT8_SCHEMAS = {
    "int8_linear_matmul": "(Tensor A, Tensor B) -> Tensor",
    "int8_linear_matmul.out": "(Tensor A, Tensor B, Tensor! out) -> ()",
    "int8_vectorwise_quant": "(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor?)",
    "int8_vectorwise_dequant": "(Tensor A, Tensor stats) -> Tensor",
    "int8_double_quant": (
        "(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor, Tensor, Tensor?)"
    ),
    "int8_mm_dequant": (
        "(Tensor A, Tensor row_stats, Tensor col_stats, ScalarType? dtype=None, "
        "Tensor? bias=None) -> Tensor"
    ),
    "int8_scaled_mm": (
        "(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None, "
        "ScalarType? dtype=None) -> Tensor"
    ),
    "int8_mixed_scaled_mm": (
        "(Tensor A, Tensor CA, Tensor CB, Tensor SCA, Tensor SCB, Tensor? outlier_cols=None, "
        "Tensor? bias=None) -> (Tensor, Tensor?)"
    ),
}
_libraries: dict[str, torch.library.Library] = {}


def define(namespace: str) -> None:
    """Define the operators under a namespace, once. Raises RuntimeError if another owns one."""
    if namespace in _libraries:
        return
    library = torch.library.Library(namespace, "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        _add(library, name, schema, *_OPERATORS[name])
    for name in _WITH_OUT:
        schema = _SCHEMAS[name].replace(") -> Tensor", ", Tensor! out) -> ()")
        _add(library, f"{name}.out", schema, _into(_OPERATORS[name][0]), _fake_update)
    for name, schema in _INT8_SCHEMAS.items():
        refuse = F.no_int8(name)
        _add(library, name, schema, refuse, refuse)
    _libraries[namespace] = library


def _add(
    library: torch.library.Library,
    name: str,
    schema: str,
    operator: Callable[..., Any],
    fake: Callable[..., Any],
) -> None:
    library.define(name + schema)
    library.impl(name, operator, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)


def _into(operator: Callable[..., Tensor]) -> Callable[..., None]:
    """The operator, whose result goes into one more argument."""

    def run(*arguments: Any) -> None:
        *given, out = arguments
        result = operator(*given)
        if (out.shape, out.dtype) != (result.shape, result.dtype):
            raise ValueError(
                f"out must be {result.dtype} of shape {tuple(result.shape)}, got {out.dtype} of "
                f"{tuple(out.shape)}"
            )
        out.copy_(result)

    return run


def _quantize_4bit(
    A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[Tensor, Tensor]:
    options: Any = {"quant_type": quant_type, "quant_storage": quant_storage}
    packed, state = F.quantize_4bit(A, blocksize=blocksize, **options)
    return packed, state.absmax


def _dequantize_4bit(
    A: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    state = QuantState(absmax, shape, None, blocksize, quant_type, dtype)
    return state.with_codes(A).dequantize()


def _quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    codes, state = F.quantize_blockwise(A, code, blocksize=blocksize)
    return codes, state.absmax


def _dequantize_blockwise(
    A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype
) -> Tensor:
    return F.dequantize_blockwise(A, QuantState(absmax, None, code, blocksize, dtype=dtype))


def _gemv_4bit(
    A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int
) -> Tensor:
    packed = B.contiguous().flatten().view(torch.uint8)
    return ops.matmul_4bit(A, packed, absmax, code, blocksize, torch.Size(shapeB))


def _gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    scales, offset, state2 = absmax, None, None
    if absmax_8bit is not None:  # absmax is then that of the scales
        scales, offset = absmax_8bit, absmax_offset
        state2 = QuantState(absmax, code=absmax_code, blocksize=DYNAMIC_BLOCK_SIZE)
    state = QuantState(scales, shapeB, None, blocksize, quant_type, A.dtype, offset, state2)
    return F.matmul(A, B, state, bias)


def _optimizer_update_32bit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    unorm_vec: Tensor | None,
    max_unorm: float,
    param_norm: float,  # which the rules work out
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    step: int,
    lr: float,
    gnorm_scale: float,
    skip_zeros: bool = False,
) -> None:
    numbers = (beta2, beta3, alpha, weight_decay, gnorm_scale, unorm_vec, max_unorm, skip_zeros)
    F.optimizer_update_32bit(optimizer_name, g, p, state1, beta1, eps, step, lr, state2, *numbers)


def _fake_update(*arguments: Any, **options: Any) -> None:
    return None


def _fake_quantize_4bit(
    A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[Tensor, Tensor]:
    count = A.numel()
    rows = (count + 1) // (2 * quant_storage.itemsize)
    scales = A.new_empty((-(count // -blocksize),), dtype=torch.float32)
    return A.new_empty((rows, 1), dtype=quant_storage), scales


def _fake_quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    scales = A.new_empty((-(A.numel() // -blocksize),), dtype=torch.float32)
    return torch.empty_like(A, dtype=torch.uint8), scales


def _fake_matmul(A: Tensor, B: Tensor, shapeB: Sequence[int], *rest: Any, **more: Any) -> Tensor:
    return A.new_empty((*A.shape[:-1], shapeB[0]))


_OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "quantize_4bit": (_quantize_4bit, _fake_quantize_4bit),
    "dequantize_4bit": (
        _dequantize_4bit,
        lambda A, absmax, blocksize, quant_type, shape, dtype: A.new_empty(shape, dtype=dtype),
    ),
    "quantize_blockwise": (_quantize_blockwise, _fake_quantize_blockwise),
    "dequantize_blockwise": (
        _dequantize_blockwise,
        lambda A, absmax, code, blocksize, dtype: torch.empty_like(A, dtype=dtype),
    ),
    "gemv_4bit": (_gemv_4bit, _fake_matmul),
    "gemm_4bit": (_gemm_4bit, _fake_matmul),
    "optimizer_update_32bit": (_optimizer_update_32bit, _fake_update),
    "optimizer_update_8bit_blockwise": (F.optimizer_update_8bit_blockwise, _fake_update),
}

define(NAMESPACE)
