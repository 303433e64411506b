"""4-bit codes to values, times the scale of their block.

A tile has a row for each chunk of values that share a scale: the scale is loaded once a row. The
first kernel looks levels up, the second one permutes bytes (permute.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode import (
    VECTOR,
    count_left,
    levels_of_bytes,
    load_scales,
    pair_table,
    round_to,
    vectors_of,
)
from .launch import LARGE_TILE, OPTIONS, chunk_of, rows_of
from .permute import fetch_scales, restore_chunks


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    block_size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    nested_absmax: Tensor | None = None,
    nested_codebook: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """See qlora_ref/ops.py."""
    n = math.prod(shape)
    y = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    if n == 0:
        return y
    is_nested = nested_absmax is not None
    nested = (nested_absmax, nested_codebook, offset) if is_nested else (absmax,) * 3
    scales = (absmax, *nested)
    if vectors := vectors_of(packed, block_size, n, dtype):
        chunk = vectors * VECTOR
        chunks, rows = n // chunk, LARGE_TILE // chunk
        _dequantize_4bit_permuted[(triton.cdiv(chunks, rows),)](
            *(packed, *scales, codebook, y, chunks),
            NESTED=is_nested,
            CHUNKS_PER_BLOCK=block_size // chunk,
            ROWS=rows,
            VECTORS=vectors,
            **OPTIONS,
        )
    else:
        chunk = chunk_of(block_size)
        chunks = triton.cdiv(n, chunk)
        rows = rows_of(chunk, chunks)
        _dequantize_4bit[(triton.cdiv(chunks, rows),)](
            *(packed, *scales, pair_table(codebook), y, n),
            NESTED=is_nested,
            CHUNKS_PER_BLOCK=block_size // chunk,
            ROWS=rows,
            BYTES=chunk // 2,
            **OPTIONS,
        )
    return y


@triton.jit
def _dequantize_4bit(
    packed_ptr,  # uint8 (ceil(n / 2),)
    absmax_ptr,  # float32 (blocks,), or uint8 when nested
    nested_absmax_ptr,
    nested_codebook_ptr,
    offset_ptr,
    pairs_ptr,  # int64 (256,)
    y_ptr,  # (n,)
    n,
    NESTED: tl.constexpr,
    CHUNKS_PER_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    byte = row[:, None] * BYTES + tl.arange(0, BYTES)[None, :]  # from the tile's first
    left = count_left(n, first * (2 * BYTES))
    scale = load_scales(
        absmax_ptr,
        nested_absmax_ptr,
        nested_codebook_ptr,
        offset_ptr,
        tl.where(row * (2 * BYTES) < left, first + row, 0) // CHUNKS_PER_BLOCK,
        NESTED,
    )
    packed = tl.load(packed_ptr + first * BYTES + byte, mask=2 * byte < left, other=0)
    high, low = levels_of_bytes(pairs_ptr, packed)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    values = tl.join(round_to(high * scale[:, None], dtype), round_to(low * scale[:, None], dtype))
    values = tl.reshape(values, (ROWS, 2 * BYTES))
    position = row[:, None] * (2 * BYTES) + tl.arange(0, 2 * BYTES)[None, :]
    tl.store(y_ptr + first * (2 * BYTES) + position, values, mask=position < left)


@triton.jit
def _dequantize_4bit_permuted(
    packed_ptr,  # uint8 (n / 2,), at a multiple of 16 bytes
    absmax_ptr,
    nested_absmax_ptr,
    nested_codebook_ptr,
    offset_ptr,
    codebook_ptr,  # float32 (16,)
    y_ptr,  # bfloat16 or float16 (n,)
    chunks,  # n / (32 VECTORS)
    NESTED: tl.constexpr,
    CHUNKS_PER_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    VECTORS: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    # Beyond the end the last chunk is restored again, and not stored: loads need no mask.
    chunk = tl.minimum(first + tl.arange(0, ROWS), chunks - 1)
    scale = fetch_scales(
        absmax_ptr,
        nested_absmax_ptr,
        nested_codebook_ptr,
        offset_ptr,
        chunk // CHUNKS_PER_BLOCK,
        NESTED,
    )
    word = chunk[:, None, None].to(tl.int64) * (4 * VECTORS) + tl.arange(0, 4)[None, None, :]
    words_ptr = packed_ptr.to(tl.pointer_type(tl.int32)) + word
    values = restore_chunks(
        words_ptr, scale[:, None], codebook_ptr, y_ptr.dtype.element_ty, VECTORS
    )
    row = tl.arange(0, ROWS)[:, None]
    position = row * (32 * VECTORS) + tl.arange(0, 32 * VECTORS)[None, :]
    start = first.to(tl.int64) * (32 * VECTORS)
    tl.store(y_ptr + start + position, values, mask=row < chunks - first)
