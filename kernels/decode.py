"""4-bit codes to values inside kernels, in two ways: by a look-up, and by permuting bytes.

The look-up takes a byte to its two levels, through a table in memory that is made once for a
codebook: it runs everywhere, under Triton's interpreter too. Permuting bytes takes a word of eight
codes to eight values in registers, where a GPU of NVIDIA's makes 16-bit values; see
`restore_chunks`. Both give the same bits, for any codebook.

Read next: dequantize_4bit.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .launch import INTERPRETED, capability

NESTED_BLOCK = 256  # scales that share a scale, when they are quantised themselves

VECTOR = 32  # codes in the widest load that a thread can do, of 16 bytes


def vectors_of(packed: Tensor, block_size: int, columns: int, dtype: torch.dtype) -> int:
    """How many vectors of 32 codes share a scale, where bytes are to be permuted: 1 or 2.

    0 where levels are to be looked up: on other GPUs than NVIDIA's from Ampere on, in float32, and
    where blocks, rows or addresses are not multiples of a vector.
    """
    is_narrow = dtype in (torch.bfloat16, torch.float16)
    if not is_narrow or capability() < 80 or packed.data_ptr() % 16 != 0:
        return 0
    fitting = (v for v in (2, 1) if block_size % (v * VECTOR) == columns % (v * VECTOR) == 0)
    return next(fitting, 0)


def cached(tables: WeakTensorKeyDictionary, codebook: Tensor, make):
    """What is made of a codebook, once for as long as nobody changes it."""
    version, table = tables.get(codebook, (None, None))
    if table is None or version != codebook._version:
        table = make(codebook)
        tables[codebook] = (codebook._version, table)
    return table


def pair_table(codebook: Tensor) -> Tensor:
    """The two levels of each byte, the high nibble's in the lower half: int64 (256,)."""
    return cached(_pair_tables, codebook, _make_pairs)


def _make_pairs(codebook: Tensor) -> Tensor:
    byte = torch.arange(256, device=codebook.device)
    pairs = torch.stack([codebook[byte >> 4], codebook[byte & 15]], dim=1)
    return pairs.contiguous().view(torch.int64).flatten()


_pair_tables = WeakTensorKeyDictionary()


# Inside kernels.


@triton.jit
def widen(x):
    """float32 of the same value."""
    if INTERPRETED and x.dtype == tl.bfloat16:  # the interpreter takes small numbers for others
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 to dtype, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter cuts off
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        kept = tl.where(x == x, rounded, 0x7FC0)  # adding to the bits of a NaN might end in 0
        return kept.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def count_left(n, start):
    """How many of n values lie from start on, in 32 bits: positions in a tile are below."""
    return tl.minimum(n - start, 1 << 30).to(tl.int32)


@triton.jit
def load_scales(
    absmax_ptr,
    nested_absmax_ptr,
    nested_codebook_ptr,
    offset_ptr,
    block,
    NESTED: tl.constexpr,
):
    """The scales of some blocks, decoded if they are quantised themselves."""
    if NESTED:
        code = tl.load(absmax_ptr + block).to(tl.int32)
        scaled = tl.load(nested_codebook_ptr + code) * tl.load(nested_absmax_ptr + block // 256)
        return scaled + tl.load(offset_ptr)
    else:
        return tl.load(absmax_ptr + block)


@triton.jit
def levels_of_bytes(pairs_ptr, packed):
    """The levels of the high and of the low nibble of each byte."""
    pair = tl.load(pairs_ptr + packed.to(tl.int32))
    high = pair.to(tl.int32).to(tl.float32, bitcast=True)
    low = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return high, low
