"""The block-wise optimal float against the tables of its paper and against numpy's quadrature.

"Published" levels are those of arXiv 2505.06653, appendix C: table 8, "theoretical solution", for
BOF4; table 7, which its authors drew by Monte Carlo, for BOF4-S.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from qlora_ref import codebooks
from qlora_ref.optimal_float import optimal_levels

BOF4 = (
    *(-1.0, -0.7535689203869577, -0.5792681492535123, -0.4386720084478466, -0.3168191039791481),
    *(-0.2060291109696586, -0.1015640796456471, 0.0, 0.0887646748673216, 0.1794535266886747),
    *(0.274249773841407, 0.375951029286045, 0.4885925268369112, 0.6187715546288008),
    *(0.7790828367844242, 1.0),
)
BOF4_S = {
    32: (
        *(-0.8732797503471375, -0.6907446384429932, -0.5437039136886597, -0.4173701703548431),
        *(-0.3038933575153351, -0.1986017823219299, -0.0981557220220566, 0.0, 0.0925938412547112),
        *(0.187048003077507, 0.2855197489261627, 0.3907126188278198, 0.506283164024353),
        *(0.6379748582839966, 0.7956376671791077, 1.0),
    ),
    64: (
        *(-0.8568463921546936, -0.6692874431610107, -0.5235266089439392, -0.4004882574081421),
        *(-0.2910638153553009, -0.1900092959403992, -0.0938529595732689, 0.0, 0.0887671709060669),
        *(0.1794802695512772, 0.2743096053600311, 0.3760197460651398, 0.4886530041694641),
        *(0.6188603639602661, 0.7791395783424377, 1.0),
    ),
    128: (
        *(-0.83739173412323, -0.6462452411651611, -0.5028634667396545, -0.3836247622966766),
        *(-0.2783779501914978, -0.1815713942050934, -0.0896477326750755, 0.0, 0.0850915610790253),
        *(0.1720834821462631, 0.2632072865962982, 0.3613293170928955, 0.4707452654838562),
        *(0.5988966822624207, 0.761027991771698, 1.0),
    ),
    256: (
        *(-0.8146829009056091, -0.6221838593482971, -0.4820548790044403, -0.3669650852680206),
        *(-0.2659871876239777, -0.1733742356300354, -0.0855776593089104, 0.0, 0.0815095230937004),
        *(0.1649149656295776, 0.2524392008781433, 0.3470274209976196, 0.4531534314155579),
        *(0.578848659992218, 0.7418596744537354, 1.0),
    ),
}

# Their quadrature is off by as much: two of ours, with other nodes, agree to 1e-10.
PUBLISHED_QUADRATURE = 2e-6
# They find 4e-5 to 1.3e-4 between their sampled levels and exact ones, in table 8; more with fewer
# samples in a bin, as in larger or smaller blocks.
PUBLISHED_SAMPLING = 3e-4


def test_bof4_has_the_published_levels() -> None:
    assert optimal_levels(4, 64, False) == pytest.approx(BOF4, rel=0, abs=PUBLISHED_QUADRATURE)


@pytest.mark.parametrize("block_size", BOF4_S)
def test_bof4_s_has_the_published_levels(block_size: int) -> None:
    levels = optimal_levels(4, block_size, True)
    assert levels == pytest.approx(BOF4_S[block_size], rel=0, abs=PUBLISHED_SAMPLING)


NODES, WEIGHTS = np.polynomial.legendre.leggauss(400)
NODES, WEIGHTS = 6 * (NODES[:, None] + 1), 6 * WEIGHTS  # from 0 to 12


def mean_square_error(levels: tuple[float, ...], block_size: int) -> float:
    """The error on N(0, 1), by Gauss-Legendre quadrature over the largest magnitude m of a block.

    The largest value itself costs nothing: it is at a level.
    """
    bounds = np.concatenate([[-1], (np.array(levels[1:]) + levels[:-1]) / 2, [1]])
    inside = 2 * norm.cdf(NODES) - 1
    a, b, c = bounds[:-1] * NODES, bounds[1:] * NODES, np.array(levels) * NODES
    mass, first = norm.cdf(b) - norm.cdf(a), norm.pdf(a) - norm.pdf(b)
    second = mass + a * norm.pdf(a) - b * norm.pdf(b)
    density = block_size * inside ** (block_size - 2) * 2 * norm.pdf(NODES)
    errors = (second - 2 * c * first + c**2 * mass).sum(axis=1, keepdims=True)
    return float(WEIGHTS @ (density * errors)[:, 0]) * (block_size - 1) / block_size


@pytest.mark.parametrize("bits,signed", [(2, True), (3, False), (3, True), (4, False), (4, True)])
@pytest.mark.parametrize("block_size", [2, 64, 4096])
def test_no_level_can_move_without_more_error(bits: int, signed: bool, block_size: int) -> None:
    levels = optimal_levels(bits, block_size, signed)
    least = mean_square_error(levels, block_size)
    half, step = 2 ** (bits - 1), 1e-3
    for i, level in enumerate(levels):
        if i in (half - 1, 2 * half - 1) or (i == 0 and not signed):
            assert level in (-1.0, 0.0, 1.0)
            continue
        errors = [
            mean_square_error((*levels[:i], level + d, *levels[i + 1 :]), block_size)
            for d in (-step, step)
        ]
        assert min(errors) > least
        # The slope at the levels, beside the rise: a minimum lies here and not a little beside.
        assert abs(errors[1] - errors[0]) < 0.01 * (errors[0] + errors[1] - 2 * least)


@pytest.mark.parametrize(
    "bits,signed,expected", [(4, False, 7.9915e-3), (4, True, 7.3517e-3), (3, True, 3.116e-2)]
)
def test_error_is_the_exact_one_to_four_digits(bits: int, signed: bool, expected: float) -> None:
    # Worked out by Gauss-Legendre quadrature over the block's maximum, outside this repository.
    error = mean_square_error(optimal_levels(bits, 64, signed), 64)
    assert error == pytest.approx(expected, rel=1e-4)
    assert error < mean_square_error(tuple(codebooks.nf4_codebook().tolist()), 64) or bits < 4


@pytest.mark.parametrize("block_size", [2, 2**31, 2**62])
def test_levels_of_any_block_size_ascend_from_minus_one_to_one(block_size: int) -> None:
    levels = optimal_levels(4, block_size, False)
    assert levels[0] == -1 and levels[7] == 0 and levels[15] == 1
    assert all(np.diff(levels) > 0)


@pytest.mark.parametrize("bits", [1, 5, 8, 2.5])
def test_other_bits_are_refused(bits: object) -> None:
    with pytest.raises(ValueError, match="bits must be a whole number from 2 to 4"):
        codebooks.optimal_codebook(bits)


def test_blocks_of_one_value_are_refused() -> None:
    with pytest.raises(ValueError, match="block_size must be at least 2, got 1"):
        codebooks.optimal_codebook(4, 1)
