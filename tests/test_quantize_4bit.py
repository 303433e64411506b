"""quantize_4bit against its definition, bit for bit, and the properties that the rule implies."""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from compare import (
    DTYPES,
    assert_same_bits,
    define_codes,
    define_quantize,
    define_thresholds,
    nibbles,
    normal,
    normalise,
    values_on_the_edge,
    with_threads,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qlora_ref import codebooks
from qlora_ref.ops import dequantize_4bit, quantize_4bit

OPERATION = "quantize_4bit"

NF4 = codebooks.nf4_codebook()
CUSTOM = codebooks.as_codebook([0.3, -1.0, 0.0, 1.0, -0.2, 0.7, 0.3])  # unsorted, one level twice
TABLES = {name: make() for name, make in codebooks.CODEBOOKS.items()} | {"custom": CUSTOM}

BLOCK_SIZES = (2, 32, 64, 100, 4096)
# One value, a short block, one block, a block and a bit, odd counts, several rows a block,
# several blocks a row, nothing, and no dimensions.
SHAPES = ((), (0,), (1,), (63,), (64,), (65,), (7, 12), (3, 257), (2, 3, 50), (2, 2101))

TINIEST = 2.0**-149  # the smallest positive float32


def quantize(x: Tensor, table: Tensor, block_size: int, device: str, **options: bool) -> tuple:
    return quantize_4bit(x.to(device), table.to(device), block_size, **options)


def assert_is_defined(x: Tensor, table: Tensor, block_size: int, device: str, **options: bool):
    packed, absmax = quantize(x, table, block_size, device, **options)
    expected_packed, expected_absmax = define_quantize(x, table, block_size)
    assert_same_bits(absmax, expected_absmax)
    assert_same_bits(packed, expected_packed)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_definition_bit_for_bit(
    dtype: torch.dtype, block_size: int, shape: tuple, device: str
) -> None:
    assert_is_defined(normal(*shape, seed=block_size, dtype=dtype), NF4, block_size, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TABLES)
def test_every_codebook_matches_the_definition(name: str, dtype: torch.dtype, device: str) -> None:
    assert_is_defined(normal(1001, seed=2, dtype=dtype), TABLES[name], 64, device)


SPECIAL_VALUES = {
    "zeros": [0.0] * 8,
    "minus zeros": [-0.0] * 8,
    "zeros of both signs beside a value": [0.0, -0.0, 3.0, -0.0],
    "subnormals": [TINIEST * k for k in (1, -2, 300, 77777, -8388607, 0)],
    "one tiniest value": [0.0, -TINIEST, 0.0, TINIEST],
    "reciprocal just overflows": [2.0**-128, -(2.0**-129), 2.0**-131],
    "reciprocal just does not overflow": [2.0**-128 + 2.0**-149, -(2.0**-129), 2.0**-131],
    "smallest normal": [2.0**-126, -(2.0**-127), 2.0**-128],
    "reciprocal is subnormal": [2.0**127, -(2.0**126), 1e30, -3e37],
    "near the largest float32": [3e38, -2e38, 1e38, 3.4028234e38, -1e37],
    "tiny beside huge": [3e38, TINIEST, -TINIEST, 1e-30, -0.0],
    "constant": [0.7] * 6,
    "constant and negative": [-0.7] * 6,
    "one value and zeros": [0.0, 0.0, -5.0, 0.0, 0.0, 0.0],
}


@pytest.mark.parametrize("table", ["nf4", "fp4", "int4", "custom"])
@pytest.mark.parametrize("values", SPECIAL_VALUES.values(), ids=SPECIAL_VALUES.keys())
def test_special_values_match_the_definition(values: list, table: str, device: str) -> None:
    x = torch.tensor(values * 9)  # several blocks of 32, the last one short
    assert_is_defined(x, TABLES[table], 32, device)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_subnormals_of_narrow_dtypes_match_the_definition(dtype: torch.dtype, device: str) -> None:
    patterns = torch.tensor([1, 2, 77, -32767, 0, 127], dtype=torch.int16)  # -32767 is 0x8001
    assert_is_defined(patterns.view(dtype).repeat(7), NF4, 32, device)


@pytest.mark.parametrize("name,zero", [("nf4", 0x77), ("fp4", 0x00), ("int4", 0x77)])
@pytest.mark.parametrize("value", [0.0, -0.0])
def test_zero_block_takes_the_code_of_zero(name: str, zero: int, value: float, device: str) -> None:
    packed, absmax = quantize(torch.full((71,), value), TABLES[name], 32, device)
    assert packed.tolist() == [zero] * 36  # the last low nibble, which fills up, among them
    assert_same_bits(absmax, torch.zeros(3))


@pytest.mark.parametrize("name,zero", [("nf4", 7), ("fp4", 0), ("int4", 7), ("custom", 2)])
def test_odd_count_fills_the_last_nibble_with_the_code_of_zero(
    name: str, zero: int, device: str
) -> None:
    packed, _ = quantize(torch.tensor([1.0, -0.5, 1.0]), TABLES[name], 64, device)
    assert packed[-1].item() & 15 == zero


def test_fp4_never_writes_code_8(device: str) -> None:
    x = torch.tensor([1.0, -1e-9, 1e-9, -0.0, -0.002, 0.002] * 10)
    packed, _ = quantize(x, TABLES["fp4"], 64, device)
    assert 8 not in nibbles(packed, x.numel())


@pytest.mark.parametrize("value,byte", [(0.7, 0xFF), (-0.7, 0x00), (3e38, 0xFF), (TINIEST, 0xFF)])
def test_constant_block_takes_the_end_of_nf4(value: float, byte: int, device: str) -> None:
    packed, absmax = quantize(torch.full((64,), value), NF4, 64, device)
    assert packed.tolist() == [byte] * 32
    assert absmax.item() == np.float32(abs(value))


@pytest.mark.parametrize("scale", [1.0, 2.0**100, 2.0**-100, 2.0**-115])
@pytest.mark.parametrize("name", TABLES)
def test_exact_ties_go_to_the_lower_level(name: str, scale: float, device: str) -> None:
    table = TABLES[name]
    ordered, thresholds = define_thresholds(list(table.numpy()))
    above = [np.nextafter(t, np.float32(2)) for t in thresholds]
    x = torch.tensor(np.array([1.0, *thresholds, *above], dtype=np.float32)) * scale
    packed, _ = quantize(x, table, 64, device)
    levels = table[torch.tensor(nibbles(packed, x.numel()))].tolist()[1:]
    assert levels[: len(thresholds)] == ordered[:-1]
    assert levels[len(thresholds) :] == ordered[1:]


@pytest.mark.parametrize("name", TABLES)
def test_one_reciprocal_a_block_decides_on_the_edge(name: str, device: str) -> None:
    absmaxes = normal(40, seed=11).abs().tolist()
    x = values_on_the_edge(TABLES[name], absmaxes, 64)
    assert_is_defined(x, TABLES[name], 64, device)


# Thresholds too close together, or levels too large, for a division of -1 to 1 into equal cells.
UNEVEN = {
    "crowded": (torch.arange(16) - 7) / 100,
    "wide": (torch.arange(16) - 7) / 3,
    "three in an eighth": torch.tensor([-1.0, -0.5, 0.0, 0.5, 0.53, 0.56, 0.59] + [1.0] * 9),
    "infinite": torch.cat(
        [torch.tensor([-math.inf]), torch.linspace(-1, 1, 14), torch.tensor([math.inf])]
    ),
    "two in a 128th": torch.tensor([-1.0, -0.5, 0.0, 0.5, 0.502, 0.504] + [1.0] * 10),
}


@pytest.mark.parametrize("name", [*TABLES, *UNEVEN])
def test_every_neighbour_of_a_threshold_is_on_its_side(name: str, device: str) -> None:
    table = (TABLES | UNEVEN)[name]
    thresholds = np.array(define_thresholds(list(table.numpy()))[1], dtype=np.float32)
    ulps = np.arange(-64, 65, dtype=np.int32)
    near = (thresholds.view(np.int32)[:, None] + ulps).view(np.float32).flatten()
    near = near[np.abs(near) <= 1]
    # The absmax of each block is 1: its values are compared as they are.
    blocks = np.ones((len(near) // 31 + 1, 32), dtype=np.float32)
    blocks[:, :31].flat[: len(near)] = near
    assert_is_defined(torch.from_numpy(blocks), table, 32, device)


@functools.cache
def every_value(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """All 65536 numbers of 16 bits, NaN and infinities among them; their codes and scales."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    return x, *define_quantize(x, NF4, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_value_of_16_bits_matches_the_definition(dtype: torch.dtype, device: str) -> None:
    x, expected_packed, expected_absmax = every_value(dtype)
    packed, absmax = quantize(x, NF4, 64, device, check_finite=False)
    assert_same_bits(absmax, expected_absmax)
    assert_same_bits(packed, expected_packed)


def test_tiny_blocks_keep_their_shape(device: str) -> None:
    x = normal(64, seed=3) * 1e-40  # the reciprocal of its absmax overflows
    packed, absmax = quantize(x, NF4, 64, device)
    restored = define_codes(x, NF4, 64)[0]
    assert nibbles(packed, 64) == restored
    assert len(set(restored)) > 10  # bitsandbytes makes zeros of such a block


# Values that are not finite.


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_first_value_that_is_not_finite_is_named(
    bad: float, dtype: torch.dtype, device: str
) -> None:
    x = normal(5, 40, dtype=dtype)
    x[3, 7], x[4, 0], x[2, 39] = bad, math.nan, bad
    with pytest.raises(ValueError, match=rf"x\[2, 39\] is {bad}; .* check_finite=False"):
        quantize(x, NF4, 64, device)


def test_a_single_value_that_is_not_finite_is_named(device: str) -> None:
    with pytest.raises(ValueError, match=r"x must be finite, but x\[\] is nan"):
        quantize(torch.tensor(math.nan), NF4, 64, device)


@pytest.mark.parametrize("name", ["nf4", "fp4", "custom"])
def test_without_the_check_every_comparison_with_nan_is_false(name: str, device: str) -> None:
    x = normal(5, 64, seed=4)
    x[0, 3], x[1, 4], x[2, 5] = math.nan, math.inf, -math.inf
    x[3] = math.nan
    assert_is_defined(x, TABLES[name], 64, device, check_finite=False)


def test_a_nan_stays_in_its_block(device: str) -> None:
    x = normal(3, 64, seed=5)
    clean, clean_absmax = quantize(x, NF4, 64, device)
    x[1, 9] = math.nan
    packed, absmax = quantize(x, NF4, 64, device, check_finite=False)
    others = torch.tensor([0, 2])
    assert_same_bits(packed.view(3, 32)[others], clean.view(3, 32)[others])
    assert_same_bits(absmax[others], clean_absmax[others])


# Where the values lie, and on how many threads.


@pytest.mark.parametrize(
    "view",
    [lambda x: x.t(), lambda x: x[::2], lambda x: x[:, 3:-2], lambda x: x[0].expand(9, -1)],
    ids=["transposed", "every second row", "middle columns", "expanded"],
)
def test_reads_views_row_by_row(view, device: str) -> None:
    x = view(normal(20, 37, seed=6))
    assert not x.is_contiguous()
    assert_is_defined(x, NF4, 64, device)


def test_leaves_its_input_alone_and_gives_no_gradient(device: str) -> None:
    x = normal(130, seed=7).to(device).requires_grad_()
    before = x.detach().clone()
    packed, absmax = quantize_4bit(x, NF4.to(device))
    assert_same_bits(x, before)
    assert not packed.requires_grad and not absmax.requires_grad


@pytest.mark.threads
def test_does_not_depend_on_the_number_of_threads(device: str) -> None:
    x = normal(300, 1001, seed=8)
    results = with_threads((1, 2), lambda: quantize(x, NF4, 64, device))
    for one, two in zip(*results, strict=True):
        assert_same_bits(one, two)


# Properties.

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
BLOCKS = st.lists(FLOATS, min_size=1, max_size=40)
NORMAL_RANGE = st.floats(2.0**-20, 2.0**20, width=32) | st.floats(-(2.0**20), -(2.0**-20), width=32)


@given(values=BLOCKS, name=st.sampled_from(sorted(TABLES)))
def test_chosen_level_is_nearest_in_exact_arithmetic(values: list, name: str, device: str) -> None:
    x, table = torch.tensor(values), TABLES[name]
    packed, absmax = quantize(x, table, 64, device)
    levels = [Fraction(level) for level in table.tolist()]
    _, midpoints = define_thresholds(list(table.numpy()))
    for value, code in zip(x.numpy(), nibbles(packed, x.numel()), strict=True):
        normalised = normalise(value, absmax.cpu().numpy()[0])
        distances = [abs(Fraction(float(normalised)) - level) for level in levels]
        # No float32 number lies between a midpoint and its rounding: only the latter itself can
        # be on the wrong side.
        assert distances[code] == min(distances) or normalised in midpoints


@given(
    values=st.lists(NORMAL_RANGE | st.just(0.0), min_size=1, max_size=40), k=st.integers(-60, 60)
)
def test_a_power_of_two_scales_absmax_and_changes_no_code(
    values: list, k: int, device: str
) -> None:
    x = torch.tensor(values)
    packed, absmax = quantize(x, NF4, 32, device)
    scaled_packed, scaled_absmax = quantize(x * 2.0**k, NF4, 32, device)
    assert_same_bits(scaled_packed, packed)
    assert_same_bits(scaled_absmax, absmax * 2.0**k)


@given(values=BLOCKS, name=st.sampled_from(["nf4", "fp4", "fp4_ocp", "int4", "af4", "nf3"]))
def test_quantising_restored_values_changes_nothing(values: list, name: str, device: str) -> None:
    # Values above 2^-100, so that a restored value has all its bits; subnormal scales have not.
    x = torch.tensor([value if abs(value) > 2.0**-100 else 0.0 for value in values])
    table = TABLES[name]
    packed, absmax = quantize(x, table, 32, device)
    restored = dequantize_4bit(packed, absmax, table.to(device), 32, x.shape)
    again, again_absmax = quantize(restored, table, 32, device)
    assert_same_bits(again, packed)
    assert_same_bits(again_absmax, absmax)


@pytest.mark.parametrize("shape", [(65,), (0,), (3, 64)], ids=str)
def test_operator_passes_opcheck(shape: tuple, device: str) -> None:
    arguments = (normal(*shape).to(device), NF4.to(device), 64, True)
    torch.library.opcheck(torch.ops.qlora_ref.quantize_4bit.default, arguments)


@pytest.mark.parametrize(
    "changes,error,message",
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.ones(4, dtype=torch.float64)}, TypeError, "x must be float32.*float64.*float"),
        ({"x": torch.ones(4, dtype=torch.int64)}, TypeError, "x must be float32.*int64"),
        ({"codebook": NF4.tolist()}, TypeError, "codebook must be a tensor, got list"),
        (
            {"codebook": NF4.double()},
            TypeError,
            "codebook must be torch.float32, got torch.float64",
        ),
        ({"codebook": NF4[:8]}, ValueError, r"codebook must have shape \(16,\), got \(8,\)"),
        ({"codebook": NF4.view(4, 4)}, ValueError, r"shape \(16,\), got \(4, 4\).*as_codebook"),
        ({"block_size": 64.0}, TypeError, "block_size must be an int, got float"),
        ({"block_size": True}, TypeError, "block_size must be an int, got bool"),
        ({"block_size": 0}, ValueError, "even and at least 2, got 0; 64 is usual"),
        ({"block_size": 63}, ValueError, "even and at least 2, got 63"),
        ({"block_size": -64}, ValueError, "even and at least 2, got -64"),
    ],
)
def test_bad_arguments_are_refused(changes: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        quantize_4bit(**({"x": torch.ones(4), "codebook": NF4} | changes))
