"""What the Triton kernels share: 4-bit codes to levels, scales, and the nearest level.

Look-ups go through small tables in memory that are made once for a codebook, so that any codebook
works and every kernel is the same code under Triton's interpreter and compiled.

Read next: dequantize_4bit.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

NESTED_BLOCK = 256  # scales that share a scale, when they are quantised themselves

# Values of a tile. Interpreted, an operation on a tile takes about 0.2 ms whatever its size.
TILE = 65536 if INTERPRETED.value else 2048

# The results must have the bits of separately rounded products and sums.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def chunk_of(block_size: int, most: int = 4096) -> int:
    """The largest power of two that divides a block: so many values in a row share a scale."""
    return min(block_size & -block_size, most)


# Tables of a codebook. Each is made on the codebook's device when it is first asked for.


def pair_table(codebook: Tensor) -> Tensor:
    """The two levels of each byte, the high nibble's in the lower half: int64 (256,)."""
    return _cached(_pair_tables, codebook, _make_pairs)


def _make_pairs(codebook: Tensor) -> Tensor:
    byte = torch.arange(256, device=codebook.device)
    pairs = torch.stack([codebook[byte >> 4], codebook[byte & 15]], dim=1)
    return pairs.contiguous().view(torch.int64).flatten()


@dataclass(frozen=True)
class NearestTable:
    """How `nearest_code` finds a level; what each table holds is said there."""

    entries: Tensor  # int64 (buckets,)
    thresholds: Tensor  # float32 (distinct + compares,)
    codes: Tensor  # uint8 (distinct,)
    lowest: int
    half: int
    shift: int
    compares: int
    ordered: bool
    zero: int  # the code of the level 0

    def constants(self) -> dict[str, int | bool]:
        """What `nearest_code` takes as constants of compilation."""
        return {
            "LOWEST": self.lowest,
            "HALF": self.half,
            "SHIFT": self.shift,
            "COMPARES": self.compares,
            "ORDERED": self.ordered,
        }


# Buckets are as wide as the smallest step between thresholds asks for: this many bits of mantissa.
SHIFTS = {16: 23 - 4, 256: 23 - 6}
SMALLEST = 2.0**-24  # magnitudes below share one bucket


def nearest_table(codebook: Tensor) -> NearestTable:
    """The table with which kernels find the nearest of 16 or 256 levels."""
    return _cached(_nearest_tables, codebook, _make_nearest)


def _make_nearest(codebook: Tensor) -> NearestTable:
    # On the CPU: these are small, and how many compares there are is needed here.
    levels = codebook.cpu()
    distinct = levels.unique()
    thresholds = (distinct[:-1] + distinct[1:]) / 2
    codes = (levels == distinct[:, None]).to(torch.uint8).argmax(dim=1).to(torch.uint8)
    shift = SHIFTS[len(levels)]
    lowest = _bits(torch.tensor(SMALLEST)) >> shift
    half = int((_bits(torch.tensor(1.0)) >> shift) - lowest)
    buckets = _bucket(thresholds, shift, int(lowest), half)
    counts = torch.bincount(buckets, minlength=2 * half + 1)
    below = counts.cumsum(0) - counts  # thresholds in lower buckets: all below what falls in here
    compares = max(1, int(counts.max()))
    padded = torch.cat([thresholds, torch.full((compares,), math.inf)])
    entries = torch.stack([_bits(padded[below]), below.int()], dim=1).contiguous()
    return NearestTable(
        entries.view(torch.int64).flatten().to(codebook.device),
        padded.to(codebook.device),
        codes.to(codebook.device),
        int(lowest),
        half,
        shift,
        compares,
        codes.tolist() == list(range(len(codes))),
        int((levels == 0).to(torch.uint8).argmax()),
    )


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


def _bucket(x: Tensor, shift: int, lowest: int, half: int) -> Tensor:
    """What `nearest_code` computes: never smaller for a larger x, so that it keeps the order."""
    magnitude = (((_bits(x) & 0x7FFFFFFF) >> shift) - lowest).clamp(0, half)
    return torch.where(x < 0, -magnitude, magnitude) + half


_pair_tables = WeakTensorKeyDictionary()
_nearest_tables = WeakTensorKeyDictionary()


def _cached(tables, codebook, make):
    version, table = tables.get(codebook, (None, None))
    if table is None or version != codebook._version:
        table = make(codebook)
        tables[codebook] = (codebook._version, table)
    return table


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
def levels_of_bytes(pairs_ptr, packed):
    """The levels of the high and of the low nibble of each byte."""
    pair = tl.load(pairs_ptr + packed.to(tl.int32))
    high = pair.to(tl.int32).to(tl.float32, bitcast=True)
    low = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return high, low


@triton.jit
def load_scales(
    absmax_ptr,
    nested_absmax_ptr,
    nested_codebook_ptr,
    offset_ptr,
    block,
    mask,
    NESTED: tl.constexpr,
):
    """The scales of some blocks, decoded if they are quantised themselves."""
    if not NESTED:
        return tl.load(absmax_ptr + block, mask=mask, other=0.0)
    code = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)
    scale = tl.load(nested_absmax_ptr + block // 256, mask=mask, other=0.0)
    return tl.load(nested_codebook_ptr + code) * scale + tl.load(offset_ptr)


@triton.jit
def largest_magnitude(x, axis: tl.constexpr):
    """The largest |x| along an axis. As integers: NaN lies above infinity, and gets through."""
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(magnitude, axis=axis).to(tl.float32, bitcast=True)


@triton.jit
def normalise(x, absmax):
    """x (ROWS, WIDTH) / absmax (ROWS,), by one reciprocal a row; 0 in rows of zeros."""
    reciprocal = tl.div_rn(1.0, absmax)
    overflows = reciprocal == float("inf")
    normalised = x * reciprocal[:, None]
    if tl.max(overflows.to(tl.int32), axis=0) > 0:  # rare, and dear: quotients keep a row's shape
        divisor = tl.where(absmax == 0.0, 1.0, absmax)
        normalised = tl.where(overflows[:, None], tl.div_rn(x, divisor[:, None]), normalised)
    return normalised


@triton.jit
def count_left(n, start):
    """How many of n values lie from start on, in 32 bits: positions in a tile are below."""
    return tl.minimum(n - start, 1 << 30).to(tl.int32)


@triton.jit
def nearest_code(
    x,  # normalised: |x| <= 1, or NaN
    entries_ptr,  # int64 (buckets,): threshold 0 of the bucket, thresholds below it << 32
    thresholds_ptr,  # float32, ascending, then infinities
    codes_ptr,  # uint8: codes by ascending level
    LOWEST: tl.constexpr,
    HALF: tl.constexpr,
    SHIFT: tl.constexpr,
    COMPARES: tl.constexpr,  # the most thresholds that lie in one bucket
    ORDERED: tl.constexpr,  # whether a code is the number of thresholds below
):
    """The code of the nearest level: `codes[number of thresholds < x]`; NaN is above none.

    The bits of a float, but the last ones, say in which bucket it falls; of a few thresholds alone
    it is then not known on which side they are.
    """
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(tl.maximum(((bits & 0x7FFFFFFF) >> SHIFT) - LOWEST, 0), HALF)
    bucket = tl.where(x < 0, -magnitude, magnitude) + HALF
    entry = tl.load(entries_ptr + tl.where(x == x, bucket, 0))
    first = (entry >> 32).to(tl.int32)
    count = first + (x > entry.to(tl.int32).to(tl.float32, bitcast=True)).to(tl.int32)
    for j in tl.static_range(1, COMPARES):
        count += (x > tl.load(thresholds_ptr + first + j)).to(tl.int32)
    if ORDERED:
        return count
    return tl.load(codes_ptr + count).to(tl.int32)
