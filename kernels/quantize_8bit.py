"""Values to 8-bit codes: a block's absmax, then the nearest level of each value."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode import count_left, widen
from .launch import LARGE_TILE, OPTIONS, TILE, rows_of
from .nearest import largest_magnitude, nearest_code, nearest_table, normalise

LONGEST_ROW = 4096  # as in quantize_4bit.py


def quantize_8bit(x: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """See qlora_ref/ops.py."""
    n = x.numel()
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=x.device)
    if n == 0:
        return codes, absmax
    table = nearest_table(codebook)
    tensors = (x.contiguous(), codes, absmax, *table.tensors())
    if block_size <= LONGEST_ROW:
        width = triton.next_power_of_2(block_size)
        is_whole = width == block_size and n % block_size == 0
        rows = rows_of(width, len(absmax), LARGE_TILE if is_whole else TILE)
        grid = (triton.cdiv(len(absmax), rows),)
        sizes = {"WHOLE": is_whole, "ROWS": rows, "WIDTH": width}
        _quantize_rows[grid](*tensors, n, block_size, **sizes, **table.constants(), **OPTIONS)
    else:
        size = min(block_size, n)
        sizes = {"WIDTH": rows_of(1, size)}
        _quantize_long_block[(len(absmax),)](
            *tensors, n, size, **sizes, **table.constants(), **OPTIONS
        )
    return codes, absmax


@triton.jit
def _quantize_rows(
    x_ptr,  # (n,)
    y_ptr,  # uint8 (n,)
    absmax_ptr,  # float32 (blocks,)
    entries_ptr,  # of a NearestTable, as are the next two
    thresholds_ptr,
    codes_ptr,
    n,
    block_size,
    WHOLE: tl.constexpr,  # whether every block is a row, and none is short
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    SHIFT: tl.constexpr,
    COMPARES: tl.constexpr,
):
    """A row of a tile is a block."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    inside = tl.arange(0, WIDTH)[None, :]
    position = row[:, None] * block_size + inside  # from the tile's first
    left = count_left(n, first * block_size)
    is_block = row * block_size < left
    start_ptr = x_ptr + first * block_size
    if WHOLE:  # beyond the end the last block is quantised again, and not stored
        mask = is_block[:, None]
        last = left // WIDTH - 1
        x = widen(tl.load(start_ptr + (tl.minimum(row, last)[:, None] * WIDTH + inside)))
    else:
        mask = (inside < block_size) & (position < left)
        x = widen(tl.load(start_ptr + position, mask=mask, other=0.0))
    absmax = largest_magnitude(x, 1)
    tl.store(absmax_ptr + first + row, absmax, mask=is_block)
    code = nearest_code(
        normalise(x, absmax), entries_ptr, thresholds_ptr, codes_ptr, SHIFT, COMPARES
    )
    tl.store(y_ptr + first * block_size + position, code.to(tl.uint8), mask=mask)


@triton.jit
def _quantize_long_block(
    x_ptr,  # (n,)
    y_ptr,  # uint8 (n,)
    absmax_ptr,  # float32 (blocks,)
    entries_ptr,  # of a NearestTable, as are the next two
    thresholds_ptr,
    codes_ptr,
    n,
    block_size,
    WIDTH: tl.constexpr,
    SHIFT: tl.constexpr,
    COMPARES: tl.constexpr,
):
    """A program has a block, and goes through it twice: for its absmax, then for its codes."""
    start = tl.program_id(0).to(tl.int64) * block_size
    end = tl.minimum(start + block_size, n)
    largest = tl.zeros((WIDTH,), tl.int32)
    for first in range(start, end, WIDTH):
        position = first + tl.arange(0, WIDTH)
        x = widen(tl.load(x_ptr + position, mask=position < end, other=0.0))
        largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    absmax = tl.max(largest, axis=0).to(tl.float32, bitcast=True)
    tl.store(absmax_ptr + tl.program_id(0), absmax)
    row = tl.full((1,), 0.0, tl.float32) + absmax
    for first in range(start, end, WIDTH):
        position = (first + tl.arange(0, WIDTH))[None, :]
        x = widen(tl.load(x_ptr + position, mask=position < end, other=0.0))
        code = nearest_code(
            normalise(x, row),
            entries_ptr,
            thresholds_ptr,
            codes_ptr,
            SHIFT,
            COMPARES,
        )
        tl.store(y_ptr + position, code.to(tl.uint8), mask=position < end)
