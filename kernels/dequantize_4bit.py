"""4-bit codes to values: two levels a byte, times the scale of their block.

A tile has a row for each chunk of values that share a scale: the scale is loaded once a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode import (
    OPTIONS,
    TILE,
    chunk_of,
    count_left,
    levels_of_bytes,
    load_scales,
    pair_table,
    round_to,
)


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
    chunk = chunk_of(block_size)
    chunks = triton.cdiv(n, chunk)
    rows = max(1, TILE // chunk)
    is_nested = nested_absmax is not None
    _dequantize_4bit[(triton.cdiv(chunks, rows),)](
        packed,
        absmax,
        *((nested_absmax, nested_codebook, offset) if is_nested else (absmax,) * 3),
        pair_table(codebook),
        y,
        n,
        block_size // chunk,
        NESTED=is_nested,
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
    chunks_per_block,
    NESTED: tl.constexpr,
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
        (first + row) // chunks_per_block,
        row * (2 * BYTES) < left,
        NESTED,
    )
    packed = tl.load(packed_ptr + first * BYTES + byte, mask=2 * byte < left, other=0)
    high, low = levels_of_bytes(pairs_ptr, packed)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    values = tl.join(round_to(high * scale[:, None], dtype), round_to(low * scale[:, None], dtype))
    values = tl.reshape(values, (ROWS, 2 * BYTES))
    position = row[:, None] * (2 * BYTES) + tl.arange(0, 2 * BYTES)[None, :]
    tl.store(y_ptr + first * (2 * BYTES) + position, values, mask=position < left)
