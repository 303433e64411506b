"""Codes and scales against the installed bitsandbytes: bit for bit wherever its arithmetic is ours.

Where it is not, a test of its own shows both results and lets the scalar definition (compare.py)
say which is right. Read next: test_bitsandbytes_values.py, test_bitsandbytes_layers.py.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from compare import (
    DTYPES,
    assert_same_bits,
    define_quantize,
    define_quantize_8bit,
    define_thresholds,
    nibbles,
    normal,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qlora_ref import codebooks, ops
from qlora_ref.quantized import quantize

bnb = pytest.importorskip(
    "bitsandbytes", reason="bitsandbytes is missing: pip install bitsandbytes==0.50.2"
)
F = bnb.functional

OPERATION = "quantize_4bit"

TABLES = {"nf4": codebooks.nf4_codebook(), "fp4": codebooks.fp4_codebook()}
DYNAMIC = codebooks.dynamic_codebook()
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # all that bitsandbytes takes

# bitsandbytes divides by max(absmax, 1e-38).
SMALLEST_DIVISOR = np.float32(1e-38)

# The offset is a mean that torch adds up in float32. It adds by halves and in runs of 16: for the
# 4096 terms here no term takes part in more than 4 * 16 roundings of half a unit.
FLOAT32_MEAN = 64 * 2.0**-24

# A scale is restored with two roundings, each of half a unit in the last place of a sum up to 8.
TWO_ROUNDINGS = 2 * 8 * 2.0**-24

# The 8-bit quantiser of bitsandbytes' CPU library looks up 65536 points of [-1, 1].
GRID_CELLS = 65535


def test_the_installed_version_is_the_one_that_these_tests_describe() -> None:
    assert bnb.__version__ == "0.50.2"


# Quantising.


def theirs(x: Tensor, kind: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Packed codes and scales by bitsandbytes, in the shapes of `ops.quantize_4bit`."""
    packed, state = F.quantize_4bit(x, blocksize=block_size, quant_type=kind)
    return packed.flatten(), state.absmax


def ours(x: Tensor, kind: str, block_size: int, device: str) -> tuple[Tensor, Tensor]:
    packed, absmax = ops.quantize_4bit(x.to(device), TABLES[kind].to(device), block_size)
    return packed.cpu(), absmax.cpu()


def codes_of(packed: Tensor, kind: str, n: int) -> list[int]:
    """The codes, FP4's second zero (code 8, see below) read as its first."""
    return [0 if kind == "fp4" and code == 8 else code for code in nibbles(packed, n)]


def assert_same_codes_and_scales(x: Tensor, kind: str, block_size: int, device: str) -> None:
    packed, absmax = ours(x, kind, block_size, device)
    expected_packed, expected_absmax = theirs(x, kind, block_size)
    assert_same_bits(absmax, expected_absmax)
    if kind == "nf4":
        assert_same_bits(packed, expected_packed)
    else:
        assert nibbles(packed, x.numel()) == codes_of(expected_packed, kind, x.numel())


FULL_BLOCKS = {
    "one block": lambda b: (b,),
    "several blocks a row": lambda b: (2, 3 * b),
    "several rows a block": lambda b: (32, b // 8),
    "odd rows across blocks": lambda b: (2 * b, 3),
    "three dimensions": lambda b: (3, b // 16, 16),
}


@pytest.mark.parametrize("shape", FULL_BLOCKS.values(), ids=FULL_BLOCKS.keys())
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", TABLES)
def test_codes_and_scales_of_full_blocks_are_equal_bit_for_bit(
    kind: str, dtype: torch.dtype, block_size: int, shape, device: str
) -> None:
    x = normal(*shape(block_size), seed=block_size, dtype=dtype)
    assert_same_codes_and_scales(x, kind, block_size, device)


def around_thresholds(kind: str) -> list[float]:
    """Each midpoint of two levels and its float32 neighbours, in a block whose absmax is 1."""
    _, thresholds = define_thresholds(list(TABLES[kind].numpy()))
    sides = (-np.inf, np.inf)
    near = [np.nextafter(t, np.float32(side)) for t in thresholds for side in sides]
    return [1.0, *map(float, [*near, *thresholds])]


SPECIAL_VALUES = {
    "zeros": [0.0],
    "minus zeros": [-0.0],
    "constant": [0.7],
    "constant and negative": [-0.7],
    "one value and zeros": [0.0, 0.0, -5.0, 0.0],
    "subnormals beside a value": [1e-40, -3e-42, 1e-3, -2e-39],
    "near the largest float32": [3e38, -2e38, 1e38, 3.4028234e38, -1e37],
    "reciprocal is subnormal": [2.0**127, -(2.0**126), 1e30],
    "tiny beside huge": [3e38, 1e-45, -1e-30, -0.0],
    "just above the smallest divisor": [1.1e-38, -5e-39, 3e-39],
    "ties of nf4": around_thresholds("nf4"),
    "ties of fp4": around_thresholds("fp4"),
}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("values", SPECIAL_VALUES.values(), ids=SPECIAL_VALUES.keys())
def test_codes_and_scales_of_special_values_are_equal_bit_for_bit(
    values: list[float], kind: str, device: str
) -> None:
    x = torch.tensor((values * 128)[:128])
    assert_same_codes_and_scales(x, kind, 64, device)


def nearest_codes(normalised: list[np.float32], kind: str) -> list[int]:
    """The code of the level nearest to each value, the lower one on a tie."""
    levels = list(TABLES[kind].numpy())
    ordered, thresholds = define_thresholds(levels)
    return [levels.index(ordered[sum(value > t for t in thresholds)]) for value in normalised]


def codes_by_quotient(tail: Tensor, kind: str) -> list[int]:
    """A short last block as bitsandbytes computes it: x / max(absmax, 1e-38)."""
    values = tail.float().numpy()
    absmax = max(np.abs(values).max(), SMALLEST_DIVISOR)
    return nearest_codes([value / absmax for value in values], kind)


@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    block_size=st.sampled_from(BLOCK_SIZES),
    kind=st.sampled_from(sorted(TABLES)),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-8, 8),
    seed=st.integers(0, 1000),
)
def test_any_shape_differs_only_in_a_short_tail_which_is_divided_there(
    shape: list,
    block_size: int,
    kind: str,
    dtype: torch.dtype,
    exponent: int,
    seed: int,
    device: str,
) -> None:
    x = normal(*shape, seed=seed).mul(2.0**exponent).to(dtype).flatten()[:3000]
    packed, absmax = ours(x, kind, block_size, device)
    expected_packed, expected_absmax = theirs(x, kind, block_size)
    assert_same_bits(absmax, expected_absmax)
    n, tail = x.numel(), x[x.numel() // block_size * block_size :]
    full = n - len(tail)
    expected = codes_of(expected_packed, kind, n)
    assert nibbles(packed, n)[:full] == expected[:full]
    if len(tail):
        defined, _ = define_quantize(tail, TABLES[kind], block_size)
        assert nibbles(packed, n)[full:] == nibbles(defined, len(tail))
        assert expected[full:] == codes_by_quotient(tail, kind)
    assert packed.numel() == expected_packed.numel()  # ceil(n / 2)
    if n % 2:
        assert packed[-1] % 16 == TABLES[kind].tolist().index(0.0) == expected_packed[-1] % 16


# How bitsandbytes deviates when it quantises.

# absmax and x: x / absmax and x * (1 / absmax) round to different sides of a threshold, bfloat16.
SPLIT_BY_DIVIDING = (1.640625, -1.3671875)


def test_short_tail_is_divided_there_so_its_codes_depend_on_where_a_block_ends(
    device: str,
) -> None:
    tail = torch.tensor(SPLIT_BY_DIVIDING, dtype=torch.bfloat16)
    full = tail.repeat(32)
    code, _ = define_quantize(tail, TABLES["fp4"], 64)
    for x in (tail, full):
        packed, _ = ours(x, "fp4", 64, device)
        assert packed.tolist() == code.tolist() * (len(x) // 2)
    assert theirs(full, "fp4", 64)[0].tolist() == code.tolist() * 32
    assert theirs(tail, "fp4", 64)[0].tolist() != code.tolist()


@pytest.mark.parametrize("value", [0.0, -1e-40, 5e-39])
@pytest.mark.parametrize("kind", TABLES)
def test_zero_or_tiny_tail_is_stored_with_the_scale_1e_38_there(
    kind: str, value: float, device: str
) -> None:
    x = torch.cat([torch.ones(64), torch.zeros(64), torch.full((6,), value)])
    packed, absmax = ours(x, kind, 64, device)
    expected_packed, expected_absmax = define_quantize(x, TABLES[kind], 64)
    assert_same_bits(packed, expected_packed)
    assert_same_bits(absmax, expected_absmax)
    assert absmax.tolist() == [1.0, 0.0, x[-1].abs().item()]
    assert theirs(x, kind, 64)[1].tolist() == [1.0, 0.0, float(SMALLEST_DIVISOR)]


@pytest.mark.parametrize("scale", [9e-39, 1e-39, 1e-40, 1e-43])
@pytest.mark.parametrize("kind", TABLES)
def test_blocks_below_1e_38_lose_their_shape_there(kind: str, scale: float, device: str) -> None:
    x = torch.linspace(-scale, scale, 64)
    packed, absmax = ours(x, kind, 64, device)
    expected_packed, expected_absmax = define_quantize(x, TABLES[kind], 64)
    assert_same_bits(packed, expected_packed)
    assert_same_bits(absmax, expected_absmax)
    largest_level = TABLES[kind].argmax()
    assert nibbles(packed, 64)[-1] == largest_level  # x / absmax is 1
    collapsed = nearest_codes([value * (1 / SMALLEST_DIVISOR) for value in x.numpy()], kind)
    assert codes_of(theirs(x, kind, 64)[0], kind, 64) == collapsed != nibbles(packed, 64)


def test_fp4_has_two_zeros_there_and_tiny_positives_take_the_negative_one(device: str) -> None:
    x = torch.tensor([1.0, 1e-4, -1e-4, 0.0] * 16)
    assert nibbles(theirs(x, "fp4", 64)[0], 4) == [3, 8, 0, 0]
    assert nibbles(ours(x, "fp4", 64, device)[0], 4) == [3, 0, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp4_codes_differ_by_the_second_zero_and_no_value_differs(
    dtype: torch.dtype, device: str
) -> None:
    x = normal(1 << 14, seed=7, dtype=dtype)
    mine, other = (
        nibbles(p, len(x)) for p in (ours(x, "fp4", 64, device)[0], theirs(x, "fp4", 64)[0])
    )
    assert {pair for pair in zip(mine, other) if pair[0] != pair[1]} == {(0, 8)}
    assert sum(TABLES["fp4"][a] != TABLES["fp4"][b] for a, b in zip(mine, other)) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_spoils_its_block_there_and_is_refused_here(
    bad: float, device: str
) -> None:
    x = normal(128)
    x[70] = bad
    packed, state = F.quantize_4bit(x, quant_type="nf4")
    restored = F.dequantize_4bit(packed, state).flatten()
    assert restored[:64].isfinite().all() and not restored[64:].isfinite().any()
    with pytest.raises(ValueError, match="70"):
        ours(x, "nf4", 64, device)


# 8-bit codes and double quantisation.


def their_8bit(x: Tensor, block_size: int) -> Tensor:
    return F.quantize_blockwise(x, code=DYNAMIC, blocksize=block_size)[0]


def codes_on_their_grid(x: Tensor) -> Tensor:
    """The nearest level not to x, in [-1, 1], but to the nearest of 65536 points."""
    position = (((x + 1) * 0.5) * GRID_CELLS + 0.5).int()
    points = torch.arange(GRID_CELLS + 1) * 2.0 / GRID_CELLS - 1
    nearest = (points[:, None] - DYNAMIC).abs().argmin(dim=1)
    return nearest[position].to(torch.uint8)


def test_8bit_codes_are_exact_here_and_those_of_a_grid_on_the_cpu_there() -> None:
    x = torch.arange(-65536, 65537) / 65536
    n = len(x) + 1  # one block, of an even size
    codes, _ = ops.quantize_8bit(x, DYNAMIC, n)
    distance = (x.double()[:, None] - DYNAMIC.double()).abs()
    excess = distance.gather(1, codes.long()[:, None]).flatten() - distance.amin(dim=1)
    assert excess.max() <= 2.0**-24  # a tie, by float32 midpoints
    grid_codes = their_8bit(x, n)
    assert torch.equal(grid_codes, codes_on_their_grid(x))
    assert int((grid_codes != codes).sum()) == 123  # of 131,073
    excess = distance.gather(1, grid_codes.long()[:, None]).flatten() - distance.amin(dim=1)
    assert 1e-5 < excess.max() <= 2 / GRID_CELLS


def test_8bit_zero_is_2e_5_there_and_zero_here() -> None:
    x = torch.tensor([1.0, 0.0, 1e-6, -1e-6] * 64)
    restored = F.dequantize_blockwise(*F.quantize_blockwise(x, code=DYNAMIC, blocksize=256))[:4]
    assert restored.tolist() == pytest.approx([1, 2.125e-5, 2.125e-5, -2.125e-5], rel=1e-6)
    codes, absmax = ops.quantize_8bit(x, DYNAMIC, 256)
    assert_same_bits(codes, define_quantize_8bit(x, DYNAMIC, 256)[0])
    assert ops.dequantize_8bit(codes, absmax, DYNAMIC, 256)[1] == 0


def test_8bit_zero_block_takes_code_0_there_and_the_code_of_zero_here() -> None:
    codes, absmax = ops.quantize_8bit(torch.zeros(256), DYNAMIC, 256)
    assert DYNAMIC[codes.long()].eq(0).all() and absmax == 0
    assert their_8bit(torch.zeros(256), 256).eq(0).all() and DYNAMIC[0] < -0.99


def double_quantised(x: Tensor, block_size: int) -> tuple:
    """Ours, theirs, and their scales restored."""
    _, state = F.quantize_4bit(x, blocksize=block_size, quant_type="nf4", compress_statistics=True)
    restored = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return quantize(x, "nf4", block_size, double_quant=True), state, restored


def test_double_quantised_scales_are_equal_but_for_the_grid_where_the_mean_is_exact() -> None:
    # Multiples of 1/64 add up exactly in float32, in any order, and 512 divides the sum exactly.
    scales = (normal(512, seed=3).abs() * 64 + 1).round() / 64
    x = (scales[:, None] * torch.tensor([1.0, -0.5] * 32)).flatten()
    mine, state, _ = double_quantised(x, 64)
    centred = scales - scales.mean()
    assert mine.offset == state.offset == scales.double().mean()
    assert_same_bits(mine.nested_absmax, state.state2.absmax)
    assert_same_bits(mine.nested_codebook, state.state2.code)
    assert_same_bits(mine.scales, define_quantize_8bit(centred, DYNAMIC, 256)[0])
    normalised = (centred.view(2, 256) / state.state2.absmax[:, None]).flatten()
    on_grid = (mine.scales != state.absmax).flatten()
    assert torch.equal(state.absmax[on_grid], codes_on_their_grid(normalised)[on_grid])


@pytest.mark.parametrize("blocks", [2, 255, 256, 257, 1000, 4096])
@pytest.mark.parametrize("block_size", [32, 64])
def test_double_quantised_scales_differ_by_at_most_one_step_of_the_map(
    block_size: int, blocks: int
) -> None:
    x = normal(blocks * block_size, seed=blocks)
    mine, state, restored = double_quantised(x, block_size)
    absmax = theirs(x, "nf4", block_size)[1]
    centred = absmax - mine.offset
    codes, nested_absmax = define_quantize_8bit(centred, DYNAMIC, 256)
    assert_same_bits(mine.scales, codes)
    assert_same_bits(mine.nested_absmax, nested_absmax)
    step = DYNAMIC.diff().max() * state.state2.absmax.max()
    assert (mine.absmax - restored).abs().max() <= step + TWO_ROUNDINGS
    # Where the codes differ, theirs is at most the width of a grid cell farther away.
    exact, shift = centred.double(), (state.offset - mine.offset).abs()
    unit = state.state2.absmax.repeat_interleave(256)[:blocks].double()
    farther = (exact - DYNAMIC[state.absmax.long()] * unit).abs()
    farther -= (exact - DYNAMIC[codes.long()] * unit).abs()
    assert (farther <= unit * 2 / GRID_CELLS + 2 * shift + TWO_ROUNDINGS).all()


@pytest.mark.parametrize("blocks", [1, 100, 1000, 4096])
def test_offset_is_the_exact_mean_rounded_once_here_and_a_float32_sum_there(blocks: int) -> None:
    mine, state, _ = double_quantised(normal(blocks * 32, seed=blocks), 32)
    absmax = theirs(normal(blocks * 32, seed=blocks), "nf4", 32)[1]
    exact = math.fsum(absmax.tolist()) / blocks
    assert mine.offset.item() == float(np.float32(exact))
    assert state.offset.item() == pytest.approx(exact, rel=FLOAT32_MEAN)


def test_double_quantised_scales_of_theirs_are_restored_to_the_same_bits() -> None:
    _, state, restored = double_quantised(normal(1000 * 64, seed=5), 64)
    nested = ops.dequantize_8bit(state.absmax, state.state2.absmax, state.state2.code, 256)
    assert_same_bits(nested + state.offset, restored)
