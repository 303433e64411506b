"""The levels: the only place they come from.

A codebook is a short table of float32 levels. Quantising divides each block of weights by its
absmax, so that it lies in [-1, 1], and writes down the index (the code) of the nearest level.
Every operation takes the codebook as an argument: a new one is one function here, and reaches
every kernel. What is nearest is settled once by `decision_thresholds`.

Read next: packing.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from qlora_ref.optimal_float import optimal_levels

CODES_4BIT = 16
CODES_8BIT = 256

# Blocks of the 8-bit dynamic map, for nested scales (QLoRA, section 3) and for optimizer states.
DYNAMIC_BLOCK_SIZE = 256

# Where the quantiles of the normal float begin: 929/960 = 1 - (1/32 + 1/30) / 2, the mean of what
# is left after half a bin of a 16-level code and half a bin of a 15-level code. Seven digits, as
# the published table was computed with.
NORMAL_FLOAT_OFFSET = 0.9677083


def normal_float_codebook(bits: int, offset: float = NORMAL_FLOAT_OFFSET) -> Tensor:
    """Levels at quantiles of N(0, 1), with an exact zero and both ends at +-1.

        positive = Q(linspace(offset, 1/2, 2^(bits-1) + 1)),  without Q(1/2) = 0
        negative = -Q(linspace(offset, 1/2, 2^(bits-1))),     without Q(1/2) = 0
        levels   = sort(negative, 0, positive) / Q(offset)

    bits     int, 2 to 8   2^bits levels: one more positive than negative
    offset   float         the largest quantile, in (1/2, 1)
    returns  float32 (2^bits,) ascending, from -1 to 1

    Equation 4 of the paper, q_i = (Q(i/(2^k+1)) + Q((i+1)/(2^k+1))) / 2, does not give the table
    of its Appendix E: its first and last term are infinite, and what is left is symmetric. The
    rule above is what the authors' code computes. Nor are the bins equally full, as section 3
    says they should be: with blocks of 64 they hold from 1.7 % to 9.2 % of the weights.
    The offset is kept for every number of bits, as LoftQ and LQ-LoRA do; Yoshida's rule
    (arXiv 2306.06965) is `offset = 1 - (1/2^k + 1/(2^k - 1)) / 4`, the same number only for k = 4.

    Source: QLoRA (arXiv 2305.14314), section 3 and Appendix E.
    Raises ValueError for other bits or offsets.
    """
    if bits not in range(2, 9):
        raise ValueError(f"bits must be a whole number from 2 to 8, got {bits!r}")
    if not 0.5 < offset < 1.0:
        raise ValueError(f"offset must lie between 0.5 and 1, got {offset!r}")
    half = 2 ** (bits - 1)
    positive = normal_quantiles(offset, half)
    negative = -normal_quantiles(offset, half - 1)
    levels = torch.cat([negative, positive.new_zeros(1), positive]).sort().values
    return levels / levels.max()


def normal_quantiles(offset: float, count: int) -> Tensor:
    """Q(linspace(offset, 1/2, count + 1)) without the last, which is 0; float32 (count,)."""
    # float32 probabilities, float64 quantiles, float32 levels: other mixtures of precision miss
    # the published NF4 table by up to 8 units in the last place.
    probabilities = torch.linspace(offset, 0.5, count + 1, dtype=torch.float32)[:-1]
    return torch.special.ndtri(probabilities.double()).float()


def nf4_codebook() -> Tensor:
    """QLoRA's 4-bit normal float, `normal_float_codebook(4)`: 7 negative levels, 0, 8 positive.

    returns  float32 (16,) ascending; equal bit for bit to the paper's Appendix E and bitsandbytes.
    """
    return normal_float_codebook(4)


def fp4_codebook() -> Tensor:
    """The 4-bit float of bitsandbytes: a sign, two exponent bits e, one mantissa bit m.

        12 * |level| = 2^(4-e) * (1 + m/2)  for e = 1, 2, 3;   m / 16  for e = 0

    The exponent counts downwards, so the codes are not in the order of the levels. Its smallest
    positive level is 1/192. That is not what the E2M1 of the OCP standard has (1/12, see
    `fp4_ocp_codebook`), and not what bitsandbytes' own `create_fp8_map(True, 2, 1, 4)` gives
    (1/48), though its comment says so. Code 8 would be -0: it reads as 0 and is never written.

    returns  float32 (16,) in code order: sign, e, m from the high bit to the low.
    """
    magnitudes = [
        m / 16 if e == 0 else 2.0 ** (4 - e) * (1 + m / 2) for e in range(4) for m in (0, 1)
    ]
    return _signed(magnitudes)


def fp4_ocp_codebook() -> Tensor:
    """E2M1 of the OCP Microscaling Formats specification 1.0, divided by its largest value, 6.

        6 * |level| = 2^(e-1) * (1 + m/2)  for e = 1, 2, 3;   m / 2  for e = 0

    returns  float32 (16,) in code order: sign, e, m from the high bit to the low.
    """
    magnitudes = [
        m / 2 if e == 0 else 2.0 ** (e - 1) * (1 + m / 2) for e in range(4) for m in (0, 1)
    ]
    return _signed(magnitudes)


def _signed(magnitudes: Sequence[float]) -> Tensor:
    positive = torch.tensor(magnitudes, dtype=torch.float32) / max(magnitudes)
    return torch.cat([positive, 0.0 - positive])  # 0 - 0 is +0: a level is never -0


def int4_codebook() -> Tensor:
    """Symmetric 4-bit integers: level = (code - 7) / 7 for codes 0 to 14; code 15 is not used.

    returns  float32 (16,): -7/7 ... 7/7, then one unused 0.
    """
    return as_codebook(torch.arange(-7, 8, dtype=torch.float32) / 7)


def af4_codebook() -> Tensor:
    """Abnormal Float 4 for blocks of 64, to 8 digits as published; kept for compatibility.

    Yoshida's construction: level i is the median of its bin, bins meet half-way between levels,
    -1, 0 and 1 are levels. The search that made the table stopped when the *upper boundary* of the
    last negative bin, not the last level, had probability 1/2, so the spacing is uneven around 0
    and the mean absolute error on N(0, 1) is 3 % above NF4's, which it was to improve on.

    Source: Yoshida, NF4 Isn't Information Theoretically Optimal (arXiv 2306.06965).
    returns  float32 (16,) ascending.
    """
    negative = [-1.0, -0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478, -0.04934812]
    positive = [0.04273164, 0.12934483, 0.21961274, 0.31675666, 0.42563882, 0.55496234, 0.72424863]
    return torch.tensor([*negative, 0.0, *positive, 1.0], dtype=torch.float32)


def optimal_codebook(bits: int = 4, block_size: int = 64, signed: bool = False) -> Tensor:
    """The block-wise optimal float: the least mean square error on N(0, 1) for a block size.

    bits        int, 2 to 4
    block_size  int, even, >= 2
    signed      False: BOF4, with the levels -1, 0 and 1
                True:  BOF4-S, with 0 and 1: blocks are divided by their largest value, sign and all
    returns     float32 (16,) ascending; of fewer bits, filled up with zeros

    Below NF4's error on N(0, 1) by 5.5 % (BOF4) and 13 % (BOF4-S) in blocks of 64, and above it by
    8 % (BOF4) on Student's t with 5 degrees of freedom: it is made for weights without outliers.

    Source: arXiv 2505.06653, section 3.2, equation 5; tables 7 and 8 print its levels.
    Raises ValueError for other bits or block sizes.
    """
    if bits not in range(2, 5):
        raise ValueError(f"bits must be a whole number from 2 to 4, got {bits!r}")
    if block_size < 2:
        raise ValueError(f"block_size must be at least 2, got {block_size!r}")
    return as_codebook(optimal_levels(bits, block_size, signed))


def dynamic_codebook(signed: bool = True) -> Tensor:
    """The 8-bit dynamic map: decades 10^-6 ... 10^0, each with twice the levels of the one before.

    Decade i = 0 ... 6 cuts [0.1, 1] into 2^i equal cells (2^(i+1) when unsigned) and takes their
    centres times 10^(i-6); 0 and 1 are added. Small numbers keep their relative precision over
    seven decades. -1 is not a level: the most negative one is -0.99296874.

    The paper (section 3) calls the numbers that hold its scales FP8; its code uses this map, on
    scales less their mean. bfloat-like E4M3 has twice the error.

    signed   bool     True for scales and first moments, False for second moments
    returns  float32 (256,) ascending; bit-equal to bitsandbytes' create_dynamic_map.
    Source: Dettmers, 8-Bit Approximations for Parallelism (arXiv 1511.04561), and 8-bit Optimizers
    via Block-wise Quantization (arXiv 2110.02861).
    """
    positive = [torch.ones(1, dtype=torch.float32)]
    for decade in range(7):
        cells = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1.0, cells + 1, dtype=torch.float32)
        positive.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6))
    negative = [-centres for centres in positive[1:]] if signed else []
    zero = torch.zeros(1, dtype=torch.float32)
    return torch.cat([*negative, zero, *positive]).sort().values


# name -> bits, and whether blocks are divided by their largest value with its sign: these levels
# are made for a block size.
OPTIMAL_FLOATS = {
    "bof4": (4, False),
    "bof4_s": (4, True),
    "bof3_s": (3, True),
    "bof2_s": (2, True),
}

CODEBOOKS: dict[str, Callable[..., Tensor]] = {
    "nf4": nf4_codebook,
    "fp4": fp4_codebook,
    "fp4_ocp": fp4_ocp_codebook,
    "int4": int4_codebook,
    "af4": af4_codebook,
    "nf3": lambda: as_codebook(normal_float_codebook(3)),
    "nf2": lambda: as_codebook(normal_float_codebook(2)),
    **{
        name: partial(optimal_codebook, bits, signed=signed)
        for name, (bits, signed) in OPTIMAL_FLOATS.items()
    },
}


def has_signed_scales(name: str) -> bool:
    """Whether a block's scale is its largest value with its sign, not the magnitude of it."""
    return OPTIMAL_FLOATS.get(name, (4, False))[1]


def resolve_codebook(
    codebook: str | Tensor | Sequence[float], block_size: int = 64
) -> tuple[str, Tensor]:
    """A codebook's name and its 16 levels: from a name in `CODEBOOKS`, or from a user's levels.

    block_size  for the codebooks that are made for one, `OPTIMAL_FLOATS`
    returns     (str, float32 (16,)); the name of a user's levels is "custom"
    Raises ValueError for an unknown name, and what `as_codebook` raises.
    """
    if isinstance(codebook, str):
        if codebook not in CODEBOOKS:
            raise ValueError(
                f"no codebook is called {codebook!r}: expected one of {', '.join(CODEBOOKS)}, "
                "or a tensor of up to 16 levels"
            )
        options = {"block_size": block_size} if codebook in OPTIMAL_FLOATS else {}
        return codebook, CODEBOOKS[codebook](**options)
    return "custom", as_codebook(codebook)


def as_codebook(levels: Tensor | Sequence[float]) -> Tensor:
    """Check a user's levels and fill them up to 16; unused codes read as 0 and are never written.

    levels   2 to 16 numbers in [-1, 1], in any order; position = code. One must be 0 (zero weights
             and zero blocks stay zero) and one must be -1 or 1 (a block's largest weight, divided
             by absmax, is there: levels that end elsewhere are levels that nobody normalised).
    returns  float32 (16,)
    Raises TypeError for what is not numbers, ValueError for the rest, naming the level.
    """
    try:
        table = torch.as_tensor(levels, dtype=torch.float32, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"a codebook must be a name or a sequence of numbers, got {type(levels).__name__}"
        ) from error
    if table.dim() != 1 or not 2 <= table.numel() <= CODES_4BIT:
        raise ValueError(
            f"a codebook must be 1-D with 2 to 16 levels, got shape {tuple(table.shape)}"
        )
    if not torch.isfinite(table).all():
        bad = int((~torch.isfinite(table)).nonzero()[0])
        raise ValueError(f"the levels of a codebook must be finite, level {bad} is {table[bad]}")
    if not (table == 0).any():
        raise ValueError(f"a codebook must contain the level 0, got {table.tolist()}")
    if table.abs().max() != 1:
        raise ValueError(
            "the largest magnitude in a codebook must be 1, as a block is divided by its absmax: "
            f"got {table.abs().max():.9g}; divide the levels by it"
        )
    return torch.cat([table + 0.0, table.new_zeros(CODES_4BIT - table.numel())])  # -0 + 0 is +0


def decision_thresholds(codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Where the nearest level changes: a value x has the code `codes[number of thresholds < x]`.

    codebook    float32 (any,)       levels in code order, repeats allowed
    returns     thresholds  float32 (distinct - 1,)  float32 midpoints of neighbouring levels
                codes       uint8 (distinct,)        codes by ascending level; the lowest of equals

    `x > threshold` decides, so that a tie goes to the lower level. For FP4 these are the midpoints;
    bitsandbytes' CUDA code compares with rounded decimals up to 3.3e-7 away from them.
    """
    levels = codebook.unique()
    thresholds = (levels[:-1] + levels[1:]) / 2
    codes = (codebook == levels[:, None]).to(torch.uint8).argmax(dim=1)
    return thresholds, codes.to(torch.uint8)
