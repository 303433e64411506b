"""x W^T, or x W, for a 4-bit weight that is restored a tile at a time, in two rungs.

The obvious kernel looks every weight up by itself: any shape, any block size. The tiled one loads
whole vectors of codes, and a scale once for all the weights of a row that share it; rows must hold
whole chunks of such weights. docs/triton_tutorial.md walks through the first and compares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode import (
    VECTOR,
    levels_of_bytes,
    load_scales,
    pair_table,
    round_to,
    vectors_of,
    widen,
)
from .launch import INTERPRETED, OPTIONS, chunk_of
from .matmul_tiles import splits_of, tiles_of
from .permute import fetch_scales, restore_chunks
from .tuning import Tile, fastest


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
    vectors = vectors_of(packed, block_size, columns, x.dtype)
    weight = (packed, absmax, *nested, codebook)
    options = {"NESTED": is_nested, "TRANSPOSED": transposed, "VECTORS": vectors}

    def run(tile: Tile) -> None:
        _multiply(
            x.contiguous(), weight, block_size, (tokens, rows, columns), bias, y, tile | options
        )

    tiles = tiles_of(tokens, inputs, outputs, transposed, vectors, x.dtype)
    tokens_or_so = triton.next_power_of_2(tokens)
    key = ("matmul_4bit", x.device, x.dtype, tokens_or_so, rows, columns, block_size, transposed)
    run(fastest(key, tiles, run))
    return y


def _multiply(
    x: Tensor,
    weight: tuple[Tensor, ...],
    block_size: int,
    sizes: tuple[int, int, int],
    bias: Tensor | None,
    y: Tensor,
    options: dict[str, Any],
) -> None:
    tokens, rows, columns = sizes
    transposed, vectors = options["TRANSPOSED"], options.pop("VECTORS")
    inputs, outputs = (rows, columns) if transposed else (columns, rows)
    # A chunk is no longer than a tile is wide, so that a tile holds whole ones.
    across = options["BLOCK_N" if transposed else "BLOCK_K"]
    chunk = vectors * VECTOR or chunk_of(block_size, across)
    grid = (triton.cdiv(tokens, options["BLOCK_M"]), triton.cdiv(outputs, options["BLOCK_N"]))
    options = OPTIONS | options
    if columns % chunk == 0 and chunk >= 16:
        *scales, codebook = weight
        table = codebook if vectors else pair_table(codebook)
        chunks = {"VECTORS": vectors, "CHUNK": chunk, "CHUNKS_PER_BLOCK": block_size // chunk}
        whole = {"WHOLE": inputs % options["BLOCK_K"] == 0}
        splits = splits_of(math.prod(grid), triton.cdiv(inputs, options["BLOCK_K"]), x.device)
        tensors = (x, *scales, table)
        _launch_tiled((*grid, splits), tensors, bias, y, sizes, options | chunks | whole)
    else:
        arguments = (x, *weight, x if bias is None else bias, y, *sizes, block_size)
        # Loads ahead would be asynchronous copies of single levels.
        _matmul[grid](*arguments, HAS_BIAS=bias is not None, **options | {"num_stages": 1})


def _launch_tiled(
    grid: tuple[int, int, int],
    tensors: tuple[Tensor, ...],
    bias: Tensor | None,
    y: Tensor,
    sizes: tuple[int, int, int],
    options: dict[str, Any],
) -> None:
    has_bias, bias_or_any = bias is not None, y if bias is None else bias
    splits = grid[2]
    if splits == 1:
        _matmul_tiled[grid](*tensors, bias_or_any, y, *sizes, HAS_BIAS=has_bias, **options)
        return
    # Parts of a sum are added up in order by a kernel of their own: the same bits every time.
    parts = torch.empty((splits, *y.shape), dtype=torch.float32, device=y.device)
    _matmul_tiled[grid](*tensors, bias_or_any, parts, *sizes, HAS_BIAS=False, **options)
    tokens, outputs = sizes[0], y.shape[-1]
    blocks = (triton.cdiv(tokens, 16), triton.cdiv(outputs, 256))
    tile = {"BLOCK_M": 16, "BLOCK_N": 256, **OPTIONS}
    _add_parts[blocks](parts, bias_or_any, y, tokens, outputs, splits, HAS_BIAS=has_bias, **tile)


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
    """The obvious one: x (BLOCK_M, BLOCK_K) times W^T (BLOCK_K, BLOCK_N), restored on the way."""
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
            tl.where(mask, position // block_size, 0),
            NESTED,
        )
        weight = tl.where(mask, tl.load(codebook_ptr + code) * scale, 0.0)
        total = _add_product(x, round_to(weight, x.dtype), total)
    _store(total, bias_ptr, y_ptr, m, n, tokens, outputs, HAS_BIAS)


@triton.jit
def _add_product(a, b, total):
    """total + a b, with float32 sums."""
    if INTERPRETED:  # it takes bfloat16 for integers; their products are exact in float32
        return total + tl.dot(widen(a), widen(b))
    elif a.dtype == tl.float32:  # sums of BLOCK_K products, then of these: short ones lose less
        return total + tl.dot(a, b, input_precision="ieee")
    else:
        return tl.dot(a, b, total)


@triton.jit
def _matmul_tiled(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_codebook_ptr,
    offset_ptr,
    table_ptr,  # the codebook, or int64 (256,): its levels for each byte
    bias_ptr,
    y_ptr,  # (tokens, outputs), or float32 (splits, tokens, outputs)
    tokens,
    rows,
    columns,
    TRANSPOSED: tl.constexpr,
    VECTORS: tl.constexpr,  # of a chunk; 0: levels are looked up
    CHUNK: tl.constexpr,
    CHUNKS_PER_BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,  # whether BLOCK_K divides the inputs
    NESTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The product is y^T = W x^T: tensor cores take their first operand from registers, where the
    weights are restored. x W would take W^T there, so that x comes first when TRANSPOSED.

    What lies beyond an end is the last row, or the last chunk, once more: loads of the weight need
    no mask. Beyond the last input x is 0, and what lies beyond the last output is not stored.
    """
    inputs = rows if TRANSPOSED else columns
    outputs = columns if TRANSPOSED else rows
    chunks = columns // CHUNK  # of a row
    scales = (absmax_ptr, nested_absmax_ptr, nested_codebook_ptr, offset_ptr)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_rows_ptr = x_ptr + tl.minimum(m, tokens - 1).to(tl.int64) * inputs
    if TRANSPOSED:
        first_chunk = tl.program_id(1) * (BLOCK_N // CHUNK)
        chunk = tl.minimum(first_chunk + tl.arange(0, BLOCK_N // CHUNK), chunks - 1)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    else:
        row = tl.minimum(n, rows - 1)
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    steps = tl.cdiv(tl.cdiv(inputs, BLOCK_K), tl.num_programs(2))
    start = tl.program_id(2) * steps * BLOCK_K
    end = tl.minimum(start + steps * BLOCK_K, inputs)
    for first in range(start, end, BLOCK_K):
        if TRANSPOSED:
            x = _load_inputs(x_rows_ptr[:, None], first + k[None, :], inputs, WHOLE)
            row = tl.minimum(first + k, rows - 1)
        else:
            x = _load_inputs(x_rows_ptr[None, :], first + k[:, None], inputs, WHOLE)
            chunk = tl.minimum(first // CHUNK + tl.arange(0, BLOCK_K // CHUNK), chunks - 1)
        weight = _restore(
            packed_ptr, scales, table_ptr, row, chunk, chunks,
            NESTED, VECTORS, CHUNK, CHUNKS_PER_BLOCK, x.dtype,
        )  # fmt: skip
        total = _add_product(x, weight, total) if TRANSPOSED else _add_product(weight, x, total)
    if not TRANSPOSED:
        total = tl.trans(total)
    y_part_ptr = y_ptr + tl.program_id(2).to(tl.int64) * tokens * outputs
    _store(
        total, bias_ptr, y_part_ptr, m.to(tl.int64)[:, None], n[None, :], tokens, outputs, HAS_BIAS
    )


@triton.jit
def _load_inputs(x_rows_ptr, column, inputs, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(x_rows_ptr + column)
    else:
        return tl.load(x_rows_ptr + column, mask=column < inputs, other=0.0)


@triton.jit
def _store(total, bias_ptr, y_ptr, m, n, tokens, outputs, HAS_BIAS: tl.constexpr):
    """One rounding, after the bias."""
    if HAS_BIAS:
        total += widen(tl.load(bias_ptr + n, mask=n < outputs, other=0.0))
    mask = (m < tokens) & (n < outputs)
    tl.store(y_ptr + m * outputs + n, round_to(total, y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _restore(
    packed_ptr,
    scales,  # pointers: absmax and what it takes to decode it
    table_ptr,
    row,  # (R,)
    chunk,  # (G,)
    chunks,  # of a row
    NESTED: tl.constexpr,
    VECTORS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS_PER_BLOCK: tl.constexpr,
    dtype: tl.constexpr,
):
    """The weights of some chunks of some rows, rounded once: (R, G CHUNK)."""
    absmax_ptr, nested_absmax_ptr, nested_codebook_ptr, offset_ptr = scales
    block = (row[:, None] * chunks + chunk[None, :]) // CHUNKS_PER_BLOCK
    start = row[:, None].to(tl.int64) * chunks + chunk[None, :]
    if VECTORS > 0:
        scale = fetch_scales(
            absmax_ptr, nested_absmax_ptr, nested_codebook_ptr, offset_ptr, block, NESTED
        )
        words_ptr = packed_ptr.to(tl.pointer_type(tl.int32)) + start[:, :, None] * (4 * VECTORS)
        words_ptr += tl.arange(0, 4)[None, None, :]
        return restore_chunks(words_ptr, scale, table_ptr, dtype, VECTORS)
    else:
        scale = load_scales(
            absmax_ptr, nested_absmax_ptr, nested_codebook_ptr, offset_ptr, block, NESTED
        )
        byte = start[:, :, None] * (CHUNK // 2) + tl.arange(0, CHUNK // 2)[None, None, :]
        high, low = levels_of_bytes(table_ptr, tl.load(packed_ptr + byte))
        weight = tl.join(high, low) * scale[:, :, None, None]
        return tl.reshape(round_to(weight, dtype), (row.shape[0], chunk.shape[0] * CHUNK))


@triton.jit
def _add_parts(
    parts_ptr,  # float32 (splits, tokens, outputs)
    bias_ptr,
    y_ptr,
    tokens,
    outputs,
    splits,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y = the sum of the parts, in order, and of the bias."""
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (m < tokens) & (n < outputs)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(splits):
        total += tl.load(parts_ptr + m * outputs + n, mask=mask, other=0.0)
        parts_ptr += tokens.to(tl.int64) * outputs
    _store(total, bias_ptr, y_ptr, m, n, tokens, outputs, HAS_BIAS)
