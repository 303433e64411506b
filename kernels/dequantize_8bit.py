"""8-bit codes to values: look up, scale.

A row of a tile is a chunk of values that share a scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode import count_left, round_to
from .launch import LARGE_TILE, OPTIONS, chunk_of, rows_of


def dequantize_8bit(
    codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int, dtype: torch.dtype
) -> Tensor:
    """See qlora_ref/ops.py."""
    n = codes.numel()
    y = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if n == 0:
        return y
    chunk = chunk_of(block_size)
    chunks = triton.cdiv(n, chunk)
    rows = rows_of(chunk, chunks, 2 * LARGE_TILE)
    _dequantize_8bit[(triton.cdiv(chunks, rows),)](
        *(codes, absmax, codebook, y, n, chunks),
        WHOLE=n % chunk == 0,
        CHUNKS_PER_BLOCK=block_size // chunk,
        ROWS=rows,
        CHUNK=chunk,
        **OPTIONS,
    )
    return y


@triton.jit
def _dequantize_8bit(
    codes_ptr,  # uint8 (n,)
    absmax_ptr,  # float32 (blocks,)
    codebook_ptr,  # float32 (256,)
    y_ptr,  # (n,)
    n,
    chunks,
    WHOLE: tl.constexpr,  # whether no chunk is short
    CHUNKS_PER_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    if CHUNK < 32:  # 2^31 short chunks are not enough for any tensor
        first = first.to(tl.int64)
    row = tl.arange(0, ROWS)
    inside = tl.arange(0, CHUNK)[None, :]
    # Beyond the end the last chunk is restored again, and not stored.
    chunk = tl.minimum(first + row, chunks - 1)
    scale = tl.load(absmax_ptr + chunk // CHUNKS_PER_BLOCK)
    position = chunk[:, None].to(tl.int64) * CHUNK + inside
    start = first.to(tl.int64) * CHUNK
    if WHOLE:  # one mask for a row: its vectors are loaded and stored as such
        code = tl.load(codes_ptr + position)
        mask = row[:, None] < chunks - first
    else:
        code = tl.load(codes_ptr + position, mask=position < n, other=0)
        mask = row[:, None] * CHUNK + inside < count_left(n, start)
    level = tl.load(codebook_ptr + code.to(tl.int32))
    values = round_to(level * scale[:, None], y_ptr.dtype.element_ty)
    tl.store(y_ptr + start + (row[:, None] * CHUNK + inside), values, mask=mask)
