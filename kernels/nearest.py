"""Values to codes inside kernels: the scale of a block, and the nearest level of each value.

The nearest level is found through a table that is made once for a codebook. Values fall into
buckets, and the entry of a bucket says what is left to ask.

Read next: quantize_4bit.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .decode import cached
from .launch import INTERPRETED


@dataclass(frozen=True)
class NearestTable:
    """How `nearest_code` finds a level; what each table holds is said there."""

    entries: Tensor  # int64 (2 ** (32 - shift),)
    thresholds: Tensor  # float32 (distinct + compares,)
    codes: Tensor  # uint8 (distinct,)
    shift: int
    compares: int
    zero: int  # the code of the level 0

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.entries, self.thresholds, self.codes

    def constants(self) -> dict[str, int]:
        """What `nearest_code` takes as constants of compilation."""
        return {"SHIFT": self.shift, "COMPARES": self.compares}


# A bucket is all numbers of one sign and exponent that share so many upper bits of the mantissa: as
# few as keep thresholds apart, if any of these do. NF4 needs 4, the dynamic codebooks 6 and 7.
MANTISSA_BITS = (4, 5, 6, 7)


def nearest_table(codebook: Tensor) -> NearestTable:
    """The table with which kernels find the nearest of 16 or 256 levels."""
    return cached(_nearest_tables, codebook, _make_nearest)


def _make_nearest(codebook: Tensor) -> NearestTable:
    # On the CPU: these are small, and how many compares there are is needed here.
    levels = codebook.cpu()
    thresholds, codes = _thresholds(levels)
    shift, below, inside = _buckets(thresholds)
    compares = max(1, int(inside.max()))
    padded = torch.cat([thresholds, thresholds.new_full((compares,), math.inf)])
    if compares == 1:
        threshold = torch.where(inside > 0, padded[below], math.inf)
        entries = _entries(threshold, codes[below], codes[below + inside])
    else:
        entries = below << 32
    tables = (entries, padded, codes)
    return NearestTable(
        *(table.to(codebook.device) for table in tables),
        shift,
        compares,
        int((levels == 0).to(torch.uint8).argmax()),
    )


def _buckets(thresholds: Tensor) -> tuple[int, Tensor, Tensor]:
    """SHIFT; for each bucket, how many thresholds lie below it, and how many in it."""
    for bits in MANTISSA_BITS:
        shift = 23 - bits
        half = 1 << (31 - shift)  # buckets of one sign; those of the other sign follow
        bucket = torch.arange(2 * half)
        rank = torch.where(bucket < half, half + bucket, 2 * half - 1 - bucket)  # as values rise
        of_threshold = rank[_bits(thresholds).long() >> shift & 2 * half - 1]
        counts = torch.bincount(of_threshold, minlength=2 * half)
        if counts.max() <= 1:
            break
    below = (counts.cumsum(0) - counts)[rank]
    below[bucket % half >= _bits(thresholds.new_tensor(math.inf)) >> shift] = 0  # where NaN goes
    return shift, below, counts[rank]


def _entries(threshold: Tensor, below: Tensor, above: Tensor) -> Tensor:
    """What `_choose` takes: thresholds, the codes below them << 32, the codes above them << 48."""
    return _bits(threshold).long() & 0xFFFFFFFF | below.long() << 32 | above.long() << 48


def _thresholds(levels: Tensor) -> tuple[Tensor, Tensor]:
    """What lies half-way between distinct levels, and the lowest code of each of these."""
    distinct = levels.unique()
    codes = (levels == distinct[:, None]).to(torch.uint8).argmax(dim=1).to(torch.uint8)
    return (distinct[:-1] + distinct[1:]) / 2 + 0.0, codes  # -0 + 0 is 0: a zero has one bucket


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


_nearest_tables = WeakTensorKeyDictionary()

# Buckets of equal width, at most so many to each side of 0; NF4 needs 16.
MOST_STEPS = 1024


def step_table(codebook: Tensor) -> tuple[Tensor, int]:
    """The entries of `code_of_step`, and its STEPS; 0 if MOST_STEPS were too few."""
    return cached(_step_tables, codebook, _make_steps)


def _make_steps(codebook: Tensor) -> tuple[Tensor, int]:
    thresholds, codes = _thresholds(codebook.cpu())
    steps = 16
    while not _are_apart(of_threshold := _step(thresholds, steps), steps):
        steps *= 2
        if steps > MOST_STEPS:
            return torch.empty(0, dtype=torch.int64, device=codebook.device), 0
    step = torch.arange(-steps - 2, steps + 3)
    below = (of_threshold < step[:, None]).sum(1)
    below[0] = 0  # where NaN goes
    has_one = (of_threshold == step[:, None]).any(1)
    threshold = torch.where(has_one, thresholds[below.clamp(max=len(thresholds) - 1)], math.inf)
    entries = _entries(threshold, codes[below], codes[below + has_one.long()])
    return entries.to(codebook.device), steps


def _step(x: Tensor, steps: int) -> Tensor:
    """What `code_of_step` computes: never smaller for a larger x. Beyond 2 all are alike."""
    return (x.clamp(-2, 2) * steps).round().long()


def _are_apart(of_threshold: Tensor, steps: int) -> bool:
    """Whether no step that values may fall into has two thresholds."""
    used = of_threshold[of_threshold.abs() <= steps + 2]
    return len(used.unique()) == len(used)


_step_tables = WeakTensorKeyDictionary()


# Inside kernels.


@triton.jit
def largest_magnitude(x, axis: tl.constexpr):
    """The largest |x| along an axis; NaN if there is one."""
    if INTERPRETED:  # fast with functions that it knows; as integers NaN lies above infinity
        magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        return tl.max(magnitude, axis=axis).to(tl.float32, bitcast=True)
    else:
        return tl.reduce(tl.abs(x), axis, larger)


@triton.jit
def larger(a, b):
    """The larger one; NaN if one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


TINY = tl.constexpr(2.0**-128)  # of this and of anything smaller the reciprocal overflows
LIFT = tl.constexpr(2.0**64)


@triton.jit
def normalise(x, absmax):
    """x (ROWS, WIDTH) / absmax (ROWS,); 0 in rows of zeros."""
    return divide(x, divisors(absmax))


@triton.jit
def divisors(absmax):
    """What `divide` takes for rows with these scales."""
    is_tiny = absmax <= TINY
    lifted = tl.where(is_tiny, absmax * LIFT, absmax)
    divisor = tl.where(absmax == 0.0, 1.0, lifted)[:, None]
    lift = tl.where(is_tiny, LIFT, 1.0)[:, None]
    return is_tiny[:, None], lift, divisor, _reciprocal(divisor)


@triton.jit
def divide(x, by):
    """x (ROWS, WIDTH) times one reciprocal a row.

    In rows so small that the reciprocal would overflow it is the quotient, rounded correctly: x and
    absmax are lifted by a power of two, which is exact. Both are subnormal then, of 21 bits: their
    quotient keeps at least 2^-46 of itself away from any number half-way between two floats. The
    product with the reciprocal is wrong by less than 1.5 units in the last place, and what one
    correction makes of it, before it is rounded, by 0.75 of that distance.
    """
    is_tiny, lift, divisor, reciprocal = by
    x = x * lift
    product = x * reciprocal
    if INTERPRETED:  # it has no fused multiply-add
        quotient = tl.div_rn(x, tl.broadcast_to(divisor, x.shape))
    else:
        quotient = tl.fma(tl.fma(-product, divisor, x), reciprocal, product)
    return tl.where(is_tiny, quotient, product)


@triton.jit
def _reciprocal(x):
    """1 / x, rounded correctly. On NVIDIA's GPUs it is half as long as a quotient."""
    if tl.target_info.is_cuda():
        reciprocal: tl.constexpr = "rcp.rn.f32 $0, $1;"
        return tl.inline_asm_elementwise(reciprocal, "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.div_rn(1.0, x)


@triton.jit
def nearest_code(
    x,  # normalised: |x| <= 1, or NaN
    entries_ptr,  # int64 (2 ** (32 - SHIFT),), one for each bucket
    thresholds_ptr,  # float32, ascending, then infinities
    codes_ptr,  # uint8: codes by ascending level
    SHIFT: tl.constexpr,
    COMPARES: tl.constexpr,  # the most thresholds that lie in one bucket, 1 at least
):
    """The code of the nearest level, in the lowest 8 bits of what is returned.

    That is `codes[number of thresholds < x]`; NaN is above none. The bits of a float, but the last
    ones, say in which bucket it falls; of a few thresholds alone it is then not known on which side
    they are. Where no bucket has more than one, entries hold it and the codes, as `_entries` says;
    else they hold the number of thresholds below << 32.
    """
    bucket = (x.to(tl.uint32, bitcast=True) >> SHIFT).to(tl.int32)
    entry = tl.load(entries_ptr + bucket)
    if COMPARES == 1:
        code = _choose(x, entry)
    else:
        first = (entry >> 32).to(tl.int32)
        count = first
        for j in tl.static_range(COMPARES):
            count += (x > tl.load(thresholds_ptr + first + j)).to(tl.int32)
        code = tl.load(codes_ptr + count).to(tl.int32)
    return code


@triton.jit
def code_of_step(
    x,  # normalised: |x| <= 1 (or a little more, by roundings), or NaN
    entries_ptr,  # int64 (2 STEPS + 5,), of `_entries`
    STEPS: tl.constexpr,
):
    """The code of the nearest level, in the lowest 8 bits of what is returned.

    Buckets are steps of 1 / STEPS, so narrow that none has two thresholds. Adding a number so large
    that beside it only integers are left rounds x STEPS; the bits of the sum count these, and are
    the index. NaN goes where no number does, and is above no threshold.
    """
    large: tl.constexpr = 12582912.0  # 1.5 * 2^23, whose bits are 0x4B400000
    x = tl.maximum(x, -(STEPS + 2.0) / STEPS)
    index = tl.fma(x, STEPS * 1.0, large).to(tl.int32, bitcast=True)
    return _choose(x, tl.load((entries_ptr - (0x4B400000 - STEPS - 2)) + index))


@triton.jit
def _choose(x, entry):
    """Of an entry's codes that of the side of its threshold where x lies, in the lowest 8 bits."""
    threshold = entry.to(tl.int32).to(tl.float32, bitcast=True)
    codes = (entry >> 32).to(tl.int32)
    return codes >> tl.where(x > threshold, 16, 0)
