"""Values to 4-bit codes: a block's absmax, then the nearest level of each value, two a byte."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode import count_left, widen
from .launch import LARGE_TILE, OPTIONS, rows_of
from .nearest import (
    code_of_step,
    divide,
    divisors,
    larger,
    largest_magnitude,
    nearest_code,
    nearest_table,
    normalise,
    step_table,
)

# Blocks up to here are rows of a tile, longer ones are gone through by one program each.
LONGEST_ROW = 4096


def quantize_4bit(x: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """See qlora_ref/ops.py."""
    n = x.numel()
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=x.device)
    if n == 0:
        return packed, absmax
    x, table = x.contiguous(), nearest_table(codebook)
    entries, steps = step_table(codebook)
    width = triton.next_power_of_2(block_size)
    if steps > 0 and 4 <= width == block_size <= LONGEST_ROW and n % block_size == 0:
        rows = rows_of(width, len(absmax), LARGE_TILE)
        grid = (triton.cdiv(len(absmax), rows),)
        sizes = {"STEPS": steps, "ROWS": rows, "PAIRS": width // 2}
        _quantize_whole_rows[grid](x, packed, absmax, entries, len(absmax), **sizes, **OPTIONS)
        return packed, absmax
    tensors = (x, packed, absmax, *table.tensors())
    if block_size <= LONGEST_ROW:
        rows = rows_of(width, len(absmax))
        grid = (triton.cdiv(len(absmax), rows),)
        sizes = {"ROWS": rows, "PAIRS": width // 2}
        _quantize_rows[grid](
            *tensors, n, block_size, table.zero, **sizes, **table.constants(), **OPTIONS
        )
    else:
        # No block is longer than the tensor: sizes then fit into 64 bits with room to add.
        size = min(block_size, n + n % 2)
        sizes = {"PAIRS": rows_of(1, size) // 2}
        _quantize_long_block[(len(absmax),)](
            *tensors, n, size, table.zero, **sizes, **table.constants(), **OPTIONS
        )
    return packed, absmax


@triton.jit
def _quantize_whole_rows(
    x_ptr,  # (blocks * 2 * PAIRS,)
    packed_ptr,  # uint8 (blocks * PAIRS,)
    absmax_ptr,  # float32 (blocks,)
    entries_ptr,  # int64 (2 STEPS + 5,): nearest.step_table
    blocks,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """A row of a tile is a block, of a power of two of values, and no block is short.

    A thread has a vector of each half of a row, so that what is to be known of a row is worked out
    by half as many threads.
    """
    first = tl.program_id(0) * ROWS
    row = tl.arange(0, ROWS)
    mask = row < blocks - first
    # Beyond the end the last block is quantised again, and not stored: loads need no mask.
    block = tl.minimum(first + row, blocks - 1).to(tl.int64)[:, None]
    vector_ptr = x_ptr + block * (2 * PAIRS) + tl.arange(0, PAIRS)[None, :]
    left, right = widen(tl.load(vector_ptr)), widen(tl.load(vector_ptr + PAIRS))
    absmax = largest_magnitude(larger(tl.abs(left), tl.abs(right)), 1)
    tl.store(absmax_ptr + first + row, absmax, mask=mask)
    by = divisors(absmax)
    bytes_ptr = packed_ptr + first.to(tl.int64) * PAIRS
    byte_ptr = bytes_ptr + row[:, None] * PAIRS + tl.arange(0, PAIRS // 2)[None, :]
    left = code_of_step(divide(left, by), entries_ptr, STEPS)
    tl.store(byte_ptr, _pack(left, ROWS, PAIRS // 2), mask=mask[:, None])
    right = code_of_step(divide(right, by), entries_ptr, STEPS)
    tl.store(byte_ptr + PAIRS // 2, _pack(right, ROWS, PAIRS // 2), mask=mask[:, None])


@triton.jit
def _pack(code, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """Two codes a byte, the even one high."""
    high, low = tl.split(tl.reshape(code, (ROWS, PAIRS, 2)))
    return (high * 16 + low).to(tl.uint8)


@triton.jit
def _quantize_rows(
    x_ptr,  # (n,)
    packed_ptr,  # uint8 (ceil(n / 2),)
    absmax_ptr,  # float32 (blocks,)
    entries_ptr,  # of a NearestTable, as are the next two
    thresholds_ptr,
    codes_ptr,
    n,
    block_size,
    zero,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    SHIFT: tl.constexpr,
    COMPARES: tl.constexpr,
):
    """A row of a tile is a block, filled up to a power of two of values."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    inside = tl.arange(0, 2 * PAIRS)[None, :]
    position = row[:, None] * block_size + inside  # from the tile's first
    left = count_left(n, first * block_size)
    mask = (inside < block_size) & (position < left)
    x = widen(tl.load(x_ptr + first * block_size + position, mask=mask, other=0.0))
    absmax = largest_magnitude(x, 1)
    tl.store(absmax_ptr + first + row, absmax, mask=row * block_size < left)
    code = nearest_code(
        normalise(x, absmax),
        entries_ptr,
        thresholds_ptr,
        codes_ptr,
        SHIFT,
        COMPARES,
    )
    bytes_ptr = packed_ptr + first * (block_size // 2)
    _store_pairs(bytes_ptr, code, position, mask, zero, ROWS, PAIRS)


@triton.jit
def _store_pairs(packed_ptr, code, position, mask, zero, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """Two codes a byte, the even one high; beyond the last value stands the code of zero."""
    code = tl.where(mask, code, zero)
    high, low = tl.split(tl.reshape(code, (ROWS, PAIRS, 2)))
    even, _ = tl.split(tl.reshape(position, (ROWS, PAIRS, 2)))
    is_there, _ = tl.split(tl.reshape(mask.to(tl.int32), (ROWS, PAIRS, 2)))
    tl.store(packed_ptr + even // 2, (high * 16 + low).to(tl.uint8), mask=is_there > 0)


@triton.jit
def _quantize_long_block(
    x_ptr,  # (n,)
    packed_ptr,  # uint8 (ceil(n / 2),)
    absmax_ptr,  # float32 (blocks,)
    entries_ptr,  # of a NearestTable, as are the next two
    thresholds_ptr,
    codes_ptr,
    n,
    block_size,
    zero,
    PAIRS: tl.constexpr,
    SHIFT: tl.constexpr,
    COMPARES: tl.constexpr,
):
    """A program has a block, and goes through it twice: for its absmax, then for its codes."""
    start = tl.program_id(0).to(tl.int64) * block_size
    end = tl.minimum(start + block_size, n)
    largest = tl.zeros((2 * PAIRS,), tl.int32)
    for first in range(start, end, 2 * PAIRS):
        position = first + tl.arange(0, 2 * PAIRS)
        x = widen(tl.load(x_ptr + position, mask=position < end, other=0.0))
        largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    absmax = tl.max(largest, axis=0).to(tl.float32, bitcast=True)
    tl.store(absmax_ptr + tl.program_id(0), absmax)
    row = tl.full((1,), 0.0, tl.float32) + absmax
    for first in range(start, end, 2 * PAIRS):
        position = (first + tl.arange(0, 2 * PAIRS))[None, :]
        mask = position < end
        x = widen(tl.load(x_ptr + position, mask=mask, other=0.0))
        code = nearest_code(
            normalise(x, row),
            entries_ptr,
            thresholds_ptr,
            codes_ptr,
            SHIFT,
            COMPARES,
        )
        _store_pairs(packed_ptr, code, position, mask, zero, 1, PAIRS)
