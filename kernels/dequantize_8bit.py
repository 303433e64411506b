"""8-bit codes to values: look up, scale."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode import OPTIONS, TILE, chunk_of, count_left, round_to


def dequantize_8bit(
    codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int, dtype: torch.dtype
) -> Tensor:
    """See qlora_ref/ops.py."""
    n = codes.numel()
    y = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if n == 0:
        return y
    chunk = chunk_of(block_size)
    rows = max(1, TILE // chunk)
    grid = (triton.cdiv(triton.cdiv(n, chunk), rows),)
    layout = (y, n, block_size // chunk)
    _dequantize_8bit[grid](codes, absmax, codebook, *layout, ROWS=rows, CHUNK=chunk, **OPTIONS)
    return y


@triton.jit
def _dequantize_8bit(
    codes_ptr,  # uint8 (n,)
    absmax_ptr,  # float32 (blocks,)
    codebook_ptr,  # float32 (256,)
    y_ptr,  # (n,)
    n,
    chunks_per_block,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    position = row[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]  # from the tile's first
    left = count_left(n, first * CHUNK)
    mask = position < left
    absmax = absmax_ptr + (first + row) // chunks_per_block
    scale = tl.load(absmax, mask=row * CHUNK < left, other=0.0)
    code = tl.load(codes_ptr + first * CHUNK + position, mask=mask, other=0).to(tl.int32)
    values = round_to(tl.load(codebook_ptr + code) * scale[:, None], y_ptr.dtype.element_ty)
    tl.store(y_ptr + first * CHUNK + position, values, mask=mask)
