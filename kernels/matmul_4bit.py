"""x W^T, or x W, for a 4-bit weight that is restored a tile at a time, in two rungs.

The obvious kernel looks every weight up by itself: any shape, any block size. The tiled one loads
whole bytes, two weights each, and a scale once for all the weights of a row that share it; it needs
rows that hold whole chunks of `chunk_of(block_size)` weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode import (
    INTERPRETED,
    OPTIONS,
    chunk_of,
    levels_of_bytes,
    load_scales,
    pair_table,
    round_to,
    widen,
)

FEW_TOKENS = 16


def _tile(tokens: int, dtype: torch.dtype) -> dict[str, int]:
    """Tokens, outputs and inputs of a tile."""
    # Sums of 32 products, then of those: a long float32 sum would lose what the contract promises.
    depth = 32 if dtype == torch.float32 else 64
    if INTERPRETED.value:  # few and large ones
        return {"BLOCK_M": 64, "BLOCK_N": 256, "BLOCK_K": depth}
    return {"BLOCK_M": 16 if tokens <= FEW_TOKENS else 64, "BLOCK_N": 64, "BLOCK_K": depth}


def matmul_4bit(
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
    """See qlora_ref/ops.py."""
    rows, columns = shape
    inputs, outputs = (rows, columns) if transposed else (columns, rows)
    tokens = math.prod(x.shape[:-1])
    y = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
    if tokens == 0 or outputs == 0:
        return y
    is_nested = nested_absmax is not None
    nested = (nested_absmax, nested_codebook, offset) if is_nested else (absmax,) * 3
    tile = _tile(tokens, x.dtype)
    grid = (triton.cdiv(tokens, tile["BLOCK_M"]), triton.cdiv(outputs, tile["BLOCK_N"]))
    constants = {"NESTED": is_nested, "HAS_BIAS": bias is not None, **tile}
    arguments = (x.contiguous(), packed, absmax, *nested)
    sizes = (x if bias is None else bias, y, tokens, rows, columns)
    # A chunk is no longer than a tile is deep, so that a tile holds whole ones.
    chunk = chunk_of(block_size, tile["BLOCK_K"])
    if not transposed and columns % chunk == 0 and chunk >= 16:
        table = pair_table(codebook)
        chunks_per_block = block_size // chunk
        _matmul_tiled[grid](
            *arguments, table, *sizes, chunks_per_block, CHUNK=chunk, **constants, **OPTIONS
        )
    else:
        _matmul[grid](
            *arguments, codebook, *sizes, block_size, TRANSPOSED=transposed, **constants, **OPTIONS
        )
    return y


@triton.jit
def _matmul(
    x_ptr,  # (tokens, inputs)
    packed_ptr,  # uint8 (ceil(rows * columns / 2),)
    absmax_ptr,  # float32 (blocks,), or uint8 when nested
    nested_absmax_ptr,
    nested_codebook_ptr,
    offset_ptr,
    codebook_ptr,  # float32 (16,)
    bias_ptr,  # (outputs,)
    y_ptr,  # (tokens, outputs)
    tokens,
    rows,
    columns,
    block_size,
    TRANSPOSED: tl.constexpr,
    NESTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    inputs = rows if TRANSPOSED else columns
    outputs = columns if TRANSPOSED else rows
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, inputs, BLOCK_K):
        k = (first + tl.arange(0, BLOCK_K)).to(tl.int64)
        across, down = k[None, :], k[:, None]
        x = tl.load(x_ptr + m * inputs + across, mask=(m < tokens) & (across < inputs), other=0.0)
        # W^T of the tile: (BLOCK_K, BLOCK_N)
        mask = (down < inputs) & (n < outputs)
        position = down * columns + n if TRANSPOSED else n * columns + down
        packed = tl.load(packed_ptr + position // 2, mask=mask, other=0).to(tl.int32)
        code = tl.where(position % 2 == 0, packed >> 4, packed & 15)
        scale = load_scales(
            absmax_ptr,
            nested_absmax_ptr,
            nested_codebook_ptr,
            offset_ptr,
            position // block_size,
            mask,
            NESTED,
        )
        weight = tl.where(mask, tl.load(codebook_ptr + code) * scale, 0.0)
        total = _add_product(x, weight, total)
    _store(total, bias_ptr, y_ptr, m, n, tokens, outputs, HAS_BIAS)


@triton.jit
def _matmul_tiled(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_codebook_ptr,
    offset_ptr,
    pairs_ptr,  # int64 (256,)
    bias_ptr,
    y_ptr,
    tokens,
    rows,
    columns,
    chunks_per_block,
    CHUNK: tl.constexpr,
    NESTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, columns, BLOCK_K):
        across = first + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(x_ptr + m * columns + across, mask=(m < tokens) & (across < columns), other=0.0)
        # (BLOCK_N, BLOCK_K / 2) bytes, and (BLOCK_N, BLOCK_K / CHUNK) scales
        byte = first // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
        mask = (n < rows) & (2 * byte < columns)
        packed = tl.load(packed_ptr + n * (columns // 2) + byte, mask=mask, other=0)
        high, low = levels_of_bytes(pairs_ptr, packed)
        chunk = first // CHUNK + tl.arange(0, BLOCK_K // CHUNK)[None, :]
        scale = load_scales(
            absmax_ptr,
            nested_absmax_ptr,
            nested_codebook_ptr,
            offset_ptr,
            (n * (columns // CHUNK) + chunk) // chunks_per_block,
            (n < rows) & (chunk * CHUNK < columns),
            NESTED,
        )
        levels = tl.reshape(tl.join(high, low), (BLOCK_N, BLOCK_K // CHUNK, CHUNK))
        weight = tl.reshape(levels * scale[:, :, None], (BLOCK_N, BLOCK_K))
        weight = tl.where((n < rows) & (across < columns), weight, 0.0)
        total = _add_product(x, tl.trans(weight), total)
    column = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    _store(total, bias_ptr, y_ptr, m, column, tokens, rows, HAS_BIAS)


@triton.jit
def _add_product(x, weight, total):
    """total + x weight, with the weight rounded once to the dtype of x, and float32 sums."""
    weight = round_to(weight, x.dtype)
    if INTERPRETED:  # it takes bfloat16 for integers; their products are exact in float32
        return total + tl.dot(widen(x), widen(weight))
    return total + tl.dot(x, weight, input_precision="ieee")


@triton.jit
def _store(total, bias_ptr, y_ptr, m, n, tokens, outputs, HAS_BIAS: tl.constexpr):
    """One rounding, after the bias."""
    if HAS_BIAS:
        total += widen(tl.load(bias_ptr + n, mask=n < outputs, other=0.0))
    mask = (m < tokens) & (n < outputs)
    tl.store(y_ptr + m * outputs + n, round_to(total, y_ptr.dtype.element_ty), mask=mask)
