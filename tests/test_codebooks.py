"""The levels against published tables, and against derivations that share no code with ours.

"Published" values are typed here once more, from bitsandbytes 0.50.2 and arXiv 2306.06965.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from compare import normal
from scipy.optimize import brentq
from scipy.stats import norm
from torch import Tensor

from qlora_ref import codebooks, ops

NF4_BITS = (
    "bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000 "
    "3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000"
)
FP4_BITS = (
    "00000000 3baaaaab 3f2aaaab 3f800000 3eaaaaab 3f000000 3e2aaaab 3e800000 "
    "00000000 bbaaaaab bf2aaaab bf800000 beaaaaab bf000000 be2aaaab be800000"
)
DYNAMIC_SHA256 = {True: "e732639a65f497b4", False: "305f002cc11278fb"}

NF3 = (-1, -0.47862909, -0.21714178, 0, 0.16093014, 0.33791514, 0.56261689, 1)
NF2 = (-1, 0, 0.33791514, 1)
AF4 = tuple(
    float(level)
    for level in (
        "-1 -0.69441008 -0.51243739 -0.3736951 -0.25607552 -0.14982478 -0.04934812 0 "
        "0.04273164 0.12934483 0.21961274 0.31675666 0.42563882 0.55496234 0.72424863 1"
    ).split()
)

# The float32 probability under a quantile is off by up to 2^-25; dQ/dp / Q(offset) is at most 7.5,
# and the divisor Q(offset) is off by as much again. Published digits were computed in float64.
FLOAT32_QUANTILE = 4e-7

# Half a unit of the eighth decimal, and the float32 rounding of a level below 1.
EIGHT_DECIMALS = 0.5e-8 + 2.0**-25

# A float64 construction of the dynamic map and the float32 one differ by the roundings of an
# interval's ends, their mean and its scaling: four of half a unit in the last place each.
DYNAMIC_RELATIVE = 4 * 2.0**-24

# The exact mean square error on N(0, 1) with blocks of 64, by Gauss-Legendre quadrature over the
# block's maximum; 2^20 samples have a standard error of 0.2 %, so that 1 % is five of them.
EXPECTED_MSE = {
    "nf4": 8.46005e-3,
    "af4": 9.15125e-3,
    "fp4_ocp": 1.11738e-2,
    "int4": 1.15776e-2,
    "fp4": 1.48705e-2,
    "nf3": 4.06379e-2,
    "nf2": 3.16423e-1,
    "bof4": 7.9915e-3,
}
MSE_RELATIVE = 0.01


def hex_bits(table: Tensor) -> str:
    return " ".join(struct.pack(">f", level).hex() for level in table.tolist())


# The normal float.


def test_nf4_has_the_published_bits() -> None:
    assert hex_bits(codebooks.nf4_codebook()) == NF4_BITS


def test_nf4_is_what_scipy_quantiles_give() -> None:
    def quantiles(count: int) -> np.ndarray:
        return norm.ppf(torch.linspace(0.9677083, 0.5, count).double().numpy())[:-1]

    levels = np.sort(np.concatenate([-quantiles(8), [0.0], quantiles(9)]).astype(np.float32))
    assert hex_bits(torch.from_numpy(levels / levels.max())) == NF4_BITS


def test_equation_4_of_the_paper_does_not_give_nf4() -> None:
    i = np.arange(17)
    levels = (norm.ppf(i / 17) + norm.ppf((i + 1) / 17)) / 2
    assert np.isinf(levels[[0, -1]]).all()
    assert len(levels[1:-1]) == 15
    assert np.allclose(levels[1:-1], -levels[1:-1][::-1], atol=1e-12)  # symmetric: NF4 is not


def test_offset_is_929_over_960_to_seven_digits() -> None:
    exact = 1 - (Fraction(1, 32) + Fraction(1, 30)) / 2
    assert exact == Fraction(929, 960)
    assert round(float(exact), 7) == codebooks.NORMAL_FLOAT_OFFSET


@pytest.mark.parametrize("bits,expected", [(2, NF2), (3, NF3)])
def test_small_normal_floats_have_the_values_of_loftq(bits: int, expected: tuple) -> None:
    levels = codebooks.normal_float_codebook(bits).tolist()
    assert levels == pytest.approx(expected, rel=0, abs=FLOAT32_QUANTILE)


def test_yoshidas_offset_for_two_bits_gives_his_level() -> None:
    offset = 1 - (1 / 4 + 1 / 3) / 4
    expected = norm.ppf((offset + 0.5) / 2) / norm.ppf(offset)
    level = codebooks.normal_float_codebook(2, offset)[2].item()
    assert level == pytest.approx(expected, rel=0, abs=FLOAT32_QUANTILE)
    assert level == pytest.approx(0.43581816, rel=0, abs=FLOAT32_QUANTILE)


def test_nf8_levels_arenormal_quantiles() -> None:
    def quantiles(count: int) -> list[float]:
        return [norm.ppf(0.9677083 + (0.5 - 0.9677083) * i / (count - 1)) for i in range(count - 1)]

    levels = sorted([*(-q for q in quantiles(128)), 0.0, *quantiles(129)])
    expected = [level / norm.ppf(0.9677083) for level in levels]
    computed = codebooks.normal_float_codebook(8).tolist()
    assert computed == pytest.approx(expected, rel=0, abs=FLOAT32_QUANTILE)


def test_nf8_has_256_ascending_levels_with_128_positive() -> None:
    levels = codebooks.normal_float_codebook(8)
    assert levels.shape == (256,) and levels.dtype == torch.float32
    assert (levels.diff() > 0).all()
    assert int((levels > 0).sum()) == 128 and levels[127] == 0
    assert levels[0] == -1 and levels[-1] == 1


@pytest.mark.parametrize("bits", [1, 9, 2.5, "4"])
def test_normal_float_refuses_other_bits(bits: object) -> None:
    with pytest.raises(ValueError, match="bits must be a whole number from 2 to 8"):
        codebooks.normal_float_codebook(bits)


@pytest.mark.parametrize("offset", [0.5, 1.0, 1.2, float("nan")])
def test_normal_float_refuses_other_offsets(offset: float) -> None:
    with pytest.raises(ValueError, match="offset must lie between"):
        codebooks.normal_float_codebook(4, offset)


# Normal values divided by their block's absmax: the distribution that the levels meet.


class BlockwiseNormal:
    """The cumulative distribution of x / absmax for N(0, 1) in blocks, by quadrature.

    Given the block's maximum m, the other values are N(0, 1) cut to [-m, m]; the maximum itself is
    at -1 or 1, with probability 1 / (2 block_size) each.
    """

    def __init__(self, block_size: int = 64) -> None:
        nodes, weights = np.polynomial.legendre.leggauss(400)
        low, high = 0.3, 9.0  # the density of the maximum outside is below 1e-15
        self.block_size = block_size
        self.m = low + (high - low) * (nodes + 1) / 2
        self.inside = 2 * norm.cdf(self.m) - 1  # the probability of |x| < m
        density = block_size * self.inside ** (block_size - 1) * 2 * norm.pdf(self.m)
        self.weights = density * weights * (high - low) / 2

    def cdf(self, x: float) -> float:
        given_m = (norm.cdf(x * self.m) - norm.cdf(-self.m)) / self.inside
        others = float((self.weights * given_m).sum())
        return 1 / (2 * self.block_size) + (1 - 1 / self.block_size) * others


def test_nf4_bins_are_not_equally_full() -> None:
    distribution = BlockwiseNormal(64)
    levels = codebooks.nf4_codebook().double().numpy()
    inner = [distribution.cdf(t) for t in (levels[1:] + levels[:-1]) / 2]
    shares = np.diff([0.0, *inner, 1.0])
    assert shares.min() == pytest.approx(0.0173, abs=5e-5)  # to the digits in the docstrings
    assert shares.max() == pytest.approx(0.0924, abs=5e-5)
    assert -(shares * np.log2(shares)).sum() == pytest.approx(3.885, abs=5e-4)


def median_levels(distribution: BlockwiseNormal, second: float, count: int) -> tuple[list, float]:
    """Levels from -1 upwards, each the median of its bin; returns also the last bin's upper end."""
    levels, bound = [-1.0, second], (second - 1) / 2
    for _ in range(count - 1):
        probability = 2 * distribution.cdf(levels[-1]) - distribution.cdf(bound)
        if probability >= 1:
            return levels, 1.0
        bound = brentq(lambda x, p=probability: distribution.cdf(x) - p, -1, 1, xtol=1e-14)
        levels.append(2 * bound - levels[-1])
    return levels[:count], bound


def test_af4_is_the_published_table() -> None:
    assert codebooks.af4_codebook().tolist() == np.array(AF4, dtype=np.float32).tolist()


def test_af4_follows_from_medians_of_bins_that_end_at_zero() -> None:
    distribution = BlockwiseNormal(64)
    sides = []
    for count in (7, 8):
        second = brentq(
            lambda s, n=count: median_levels(distribution, s, n)[1], -0.9, -0.5, xtol=1e-13
        )
        sides.append(median_levels(distribution, second, count)[0])
    derived = [*sides[0], 0.0, *(-level for level in reversed(sides[1]))]
    assert codebooks.af4_codebook().tolist() == pytest.approx(derived, rel=0, abs=EIGHT_DECIMALS)


# 4-bit floats and integers.


def test_fp4_has_the_published_bits_in_code_order() -> None:
    assert hex_bits(codebooks.fp4_codebook()) == FP4_BITS


def test_smallest_positive_fp4_level_is_1_over_192() -> None:
    levels = codebooks.fp4_codebook()
    assert levels[levels > 0].min().item() == np.float32(1) / np.float32(192)


def test_ocp_levels_are_those_of_e2m1_over_6() -> None:
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32) / np.float32(6)
    expected = [*magnitudes.tolist(), *(0.0 - magnitudes).tolist()]
    assert codebooks.fp4_ocp_codebook().tolist() == expected


def test_int4_levels_are_sevenths_and_one_unused_zero() -> None:
    sevenths = [float(np.float32(i) / np.float32(7)) for i in range(-7, 8)]
    assert codebooks.int4_codebook().tolist() == [*sevenths, 0.0]


@pytest.mark.parametrize("name", codebooks.CODEBOOKS)
def test_no_level_is_minus_zero(name: str) -> None:
    levels = codebooks.CODEBOOKS[name]()
    assert levels.shape == (16,) and levels.dtype == torch.float32
    assert not torch.signbit(levels[levels == 0]).any()


def test_each_call_returns_a_new_table() -> None:
    codebooks.nf4_codebook().zero_()
    assert hex_bits(codebooks.nf4_codebook()) == NF4_BITS


# The 8-bit dynamic map.


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_has_the_published_bits(signed: bool) -> None:
    table = codebooks.dynamic_codebook(signed)
    assert table.shape == (256,) and table.dtype == torch.float32
    digest = hashlib.sha256(table.numpy().astype("<f4").tobytes()).hexdigest()
    assert digest[:16] == DYNAMIC_SHA256[signed]


def dynamic_levels(signed: bool) -> list[float]:
    """The map in exact fractions: centres of 2^i cells of [1/10, 1], times 10^(i - 6)."""
    levels = [Fraction(0), Fraction(1)]
    for decade in range(7):
        cells = 2**decade * (1 if signed else 2)
        for cell in range(cells):
            centre = Fraction(1, 10) + Fraction(9, 10) * Fraction(2 * cell + 1, 2 * cells)
            level = centre * Fraction(10) ** (decade - 6)
            levels += [level, -level] if signed else [level]
    return [float(level) for level in sorted(levels)]


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_is_cell_centres_by_decades(signed: bool) -> None:
    expected = dynamic_levels(signed)
    table = codebooks.dynamic_codebook(signed).tolist()
    assert table == pytest.approx(expected, rel=DYNAMIC_RELATIVE, abs=0)


def test_dynamic_map_has_zero_at_127_and_no_minus_one() -> None:
    table = codebooks.dynamic_codebook(signed=True)
    assert table[127] == 0 and table[-1] == 1
    assert table[0].item() == pytest.approx(-0.99296874, abs=1e-8)
    assert codebooks.dynamic_codebook(signed=False)[0] == 0


# Decision thresholds.


@pytest.mark.parametrize("name", codebooks.CODEBOOKS)
def test_thresholds_are_midpoints_of_neighbouring_levels(name: str) -> None:
    table = codebooks.CODEBOOKS[name]()
    thresholds, codes = codebooks.decision_thresholds(table)
    ordered = sorted(set(table.tolist()))
    pairs = itertools.pairwise(ordered)
    # Two float32 values add exactly in float64: one rounding to float32, as the rule says.
    assert thresholds.tolist() == [float(np.float32((a + b) / 2)) for a, b in pairs]
    assert codes.dtype == torch.uint8
    assert codes.tolist() == [table.tolist().index(level) for level in ordered]


def test_a_value_takes_the_code_after_the_thresholds_below_it() -> None:
    thresholds, codes = codebooks.decision_thresholds(torch.tensor([0.0, 1.0, -1.0, 0.0]))
    assert thresholds.tolist() == [-0.5, 0.5]
    assert codes.tolist() == [2, 0, 1]  # the lowest of the two codes of 0


# Error on normal values.


@pytest.mark.parametrize("name", EXPECTED_MSE)
def test_error_on_normal_values_is_the_integral(name: str) -> None:
    x, table = normal(2**20, seed=64), codebooks.CODEBOOKS[name]()
    packed, absmax = ops.quantize_4bit(x, table, 64)
    restored = ops.dequantize_4bit(packed, absmax, table, 64, x.shape)
    error = (restored - x).double().square().mean().item()
    assert error == pytest.approx(EXPECTED_MSE[name], rel=MSE_RELATIVE)


# A user's own levels.


def test_user_codebook_is_filled_up_with_zeros() -> None:
    table = codebooks.as_codebook([-1, -0.0, 0.5])
    assert table.tolist() == [-1, 0, 0.5] + [0] * 13
    assert not torch.signbit(table[1])


@pytest.mark.parametrize("levels", [[0.0, 1.0], [0.0, -1.0], list(np.linspace(-1, 0, 16))])
def test_user_codebook_may_have_2_to_16_levels_and_one_unit(levels: list[float]) -> None:
    table = codebooks.as_codebook(levels)
    assert table.shape == (16,)
    assert table[: len(levels)].tolist() == np.array(levels, dtype=np.float32).tolist()


@pytest.mark.parametrize(
    "levels,error,message",
    [
        ([-1, 0, math.nan, 1], ValueError, "must be finite, level 2 is nan"),
        ([-1, 0, 1, math.inf], ValueError, "must be finite, level 3 is inf"),
        ([-1, 0.5, 1], ValueError, "must contain the level 0"),
        ([-0.5, 0, 0.5], ValueError, "largest magnitude in a codebook must be 1"),
        ([-2, 0, 1], ValueError, "largest magnitude in a codebook must be 1"),
        ([0.0, *[1.0] * 16], ValueError, "2 to 16 levels, got shape \\(17,\\)"),
        ([0.0], ValueError, "2 to 16 levels, got shape \\(1,\\)"),
        ([], ValueError, "2 to 16 levels, got shape \\(0,\\)"),
        ([[0.0, 1.0]], ValueError, "must be 1-D"),
        (0.0, ValueError, "must be 1-D"),
        ("nf4", TypeError, "a name or a sequence of numbers, got str"),
        (["a", "b"], TypeError, "a name or a sequence of numbers, got list"),
        ([0, [1, 2]], TypeError, "a name or a sequence of numbers, got list"),
        (None, TypeError, "a name or a sequence of numbers, got NoneType"),
    ],
)
def test_bad_user_codebooks_are_refused(levels: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        codebooks.as_codebook(levels)


def test_order_of_a_user_codebook_changes_codes_but_no_value() -> None:
    levels = [0.3, -1.0, 0.0, 1.0, -0.2, 0.7]
    x, restored = normal(500, seed=1), []
    for ordered in (levels, sorted(levels)):
        table = codebooks.as_codebook(ordered)
        packed, absmax = ops.quantize_4bit(x, table, 64)
        restored.append(ops.dequantize_4bit(packed, absmax, table, 64, x.shape))
    assert torch.equal(*restored)


@pytest.mark.parametrize("name", codebooks.OPTIMAL_FLOATS)
def test_levels_made_for_a_block_size_are_those_of_the_one_in_use(name: str) -> None:
    bits, signed = codebooks.OPTIMAL_FLOATS[name]
    for block_size in (64, 128):
        expected = codebooks.optimal_codebook(bits, block_size, signed)
        assert torch.equal(codebooks.resolve_codebook(name, block_size)[1], expected)
    assert not torch.equal(expected, codebooks.CODEBOOKS[name]())


@pytest.mark.parametrize("name", codebooks.CODEBOOKS)
def test_names_resolve_to_their_tables(name: str) -> None:
    resolved, table = codebooks.resolve_codebook(name)
    assert resolved == name
    assert torch.equal(table, codebooks.CODEBOOKS[name]())


def test_own_levels_resolve_to_custom() -> None:
    name, table = codebooks.resolve_codebook([0.0, 1.0, -1.0])
    assert name == "custom"
    assert table[:3].tolist() == [0, 1, -1]


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no codebook is called 'nf5'.*nf4, fp4"):
        codebooks.resolve_codebook("nf5")
