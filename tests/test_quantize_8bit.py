"""quantize_8bit against its definition, bit for bit: the exact nearest of 256 levels."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from compare import (
    DTYPES,
    assert_same_bits,
    define_quantize_8bit,
    define_thresholds,
    normal,
    normalise,
    values_on_the_edge,
    with_threads,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from qlora_ref import codebooks
from qlora_ref.ops import dequantize_8bit, quantize_8bit

OPERATION = "quantize_8bit"

SIGNED = codebooks.dynamic_codebook(signed=True)
TABLES = {
    "signed": SIGNED,
    "unsigned": codebooks.dynamic_codebook(signed=False),
    "nf8": codebooks.normal_float_codebook(8),
    "unsorted, 16 levels": codebooks.nf4_codebook().flip(0).repeat(16),
}
# Levels that lie evenly, crowd together, are unsorted, are all but zero, or not finite.
OTHER_TABLES = {
    "int8": torch.cat([torch.linspace(-127, 127, 255), torch.zeros(1)]) / 127,
    "even": torch.linspace(-1, 1, 256),
    "random": normal(256, seed=21),
    "crowded": 0.5 + torch.arange(256) * 2.0**-24,
    "subnormal": torch.arange(-128, 128) * 2.0**-149,
    "infinite": torch.cat([normal(253, seed=22), torch.tensor([math.inf, -math.inf, 3e38])]),
    "one level": torch.ones(256),
}
NEIGHBOURS = 64  # floats on either side of a threshold

BLOCK_SIZES = (2, 64, 100, 256, 4096)
SHAPES = ((), (0,), (1,), (255,), (256,), (257,), (7, 12), (3, 401), (2, 3, 50), (2, 2101))

TINIEST = 2.0**-149


def quantize(x: Tensor, table: Tensor, block_size: int, device: str, **options: bool) -> tuple:
    return quantize_8bit(x.to(device), table.to(device), block_size, **options)


def assert_is_defined(x: Tensor, table: Tensor, block_size: int, device: str, **options: bool):
    codes, absmax = quantize(x, table, block_size, device, **options)
    expected_codes, expected_absmax = define_quantize_8bit(x, table, block_size)
    assert_same_bits(absmax, expected_absmax)
    assert_same_bits(codes, expected_codes)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_matches_the_definition_bit_for_bit(block_size: int, shape: tuple, device: str) -> None:
    assert_is_defined(normal(*shape, seed=block_size), SIGNED, block_size, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TABLES)
def test_every_codebook_matches_the_definition(name: str, dtype: torch.dtype, device: str) -> None:
    x = normal(1001, seed=2, dtype=dtype)
    assert_is_defined(x.square() if name == "unsigned" else x, TABLES[name], 256, device)


SPECIAL_VALUES = {
    "zeros of both signs": [0.0, -0.0],
    "zeros beside a value": [0.0, -0.0, 3.0, -0.0],
    "subnormals": [TINIEST * k for k in (1, -2, 300, 77777, -8388607, 0)],
    "reciprocal overflows": [2.0**-128, -(2.0**-129), 2.0**-131],
    "near the largest float32": [3e38, -2e38, 1e38, 3.4028234e38, -1e37],
    "seven decades": [1.0, 1e-1, -1e-2, 1e-3, -1e-4, 1e-5, -1e-6, 1e-7, -1e-8],
    "constant and negative": [-0.7] * 6,
}


@pytest.mark.parametrize("name", ["signed", "unsigned"])
@pytest.mark.parametrize("values", SPECIAL_VALUES.values(), ids=SPECIAL_VALUES.keys())
def test_special_values_match_the_definition(values: list, name: str, device: str) -> None:
    assert_is_defined(torch.tensor(values * 9), TABLES[name], 32, device)


@pytest.mark.parametrize("name,zero", [("signed", 127), ("unsigned", 0)])
def test_zero_keeps_its_exact_code(name: str, zero: int, device: str) -> None:
    # bitsandbytes' CPU library makes 2e-5 * absmax of it.
    x = torch.tensor([0.0, 1.0, -0.0])
    codes, _ = quantize(x, TABLES[name], 256, device)
    assert codes.tolist() == [zero, 255, zero]
    codes, absmax = quantize(torch.zeros(300), TABLES[name], 256, device)
    assert codes.unique().tolist() == [zero]
    assert_same_bits(absmax, torch.zeros(2))


@pytest.mark.parametrize("name", TABLES)
def test_exact_ties_go_to_the_lower_level(name: str, device: str) -> None:
    table = TABLES[name]
    ordered, thresholds = define_thresholds(list(table.numpy()))
    above = [np.nextafter(t, np.float32(2)) for t in thresholds]
    x = torch.tensor(np.array([1.0, *thresholds, *above], dtype=np.float32))
    codes, _ = quantize(x, table, 512, device)
    levels = table[codes.cpu().int()].tolist()[1:]
    assert levels[: len(thresholds)] == ordered[:-1]
    assert levels[len(thresholds) :] == ordered[1:]


def around_thresholds(table: Tensor) -> Tensor:
    """Every threshold in [-1, 1] with its nearest floats on both sides, and both zeros."""
    _, thresholds = define_thresholds(list(table.numpy()))
    near = np.array([t for t in thresholds if abs(t) <= 1], dtype=np.float32)
    bits = near.view(np.int32).astype(np.int64)
    ranks = np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)  # consecutive for neighbouring floats
    ranks = (ranks[:, None] + np.arange(-NEIGHBOURS, NEIGHBOURS + 1)).flatten()
    magnitudes = np.abs(ranks).astype(np.uint32).view(np.float32)
    return torch.from_numpy(np.append(np.copysign(magnitudes, ranks), [0.0, -0.0])).float()


@pytest.mark.parametrize("block_size", [64, 100])  # kernels treat powers of two apart
@pytest.mark.parametrize("name", [*TABLES, *OTHER_TABLES])
def test_every_float_around_a_threshold_takes_the_defined_code(
    name: str, block_size: int, device: str
) -> None:
    table = (TABLES | OTHER_TABLES)[name]
    x = around_thresholds(table).clamp(-1, 1)
    rows = functional.pad(x, (0, -len(x) % (block_size - 1))).reshape(-1, block_size - 1)
    blocks = functional.pad(rows, (1, 0), value=1.0)  # a 1 in each block: nothing is rescaled
    codes, _ = quantize(blocks, table, block_size, device)
    _, thresholds = define_thresholds(list(table.numpy()))
    levels, lowest_code = np.unique(table.numpy(), return_index=True)
    positions = np.searchsorted(np.array(thresholds), x.numpy(), side="left")  # thresholds below x
    assert len(levels) == len(thresholds) + 1
    assert codes[:, 1:].flatten()[: len(x)].tolist() == lowest_code[positions].tolist()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", ["signed", "unsigned"])
def test_every_narrow_number_matches_the_definition(
    name: str, dtype: torch.dtype, device: str
) -> None:
    x = torch.arange(-(2**15), 2**15, 5).to(torch.int16).view(dtype)
    x = x[torch.isfinite(x)].sort().values  # blocks of like magnitudes, subnormals among them
    assert_is_defined(x, TABLES[name], 64, device)


@pytest.mark.parametrize("name", TABLES)
def test_one_reciprocal_a_block_decides_on_the_edge(name: str, device: str) -> None:
    absmaxes = normal(8, seed=11).abs().tolist()
    x = values_on_the_edge(TABLES[name], absmaxes, 1024)
    assert_is_defined(x, TABLES[name], 1024, device)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_first_value_that_is_not_finite_is_named(bad: float, device: str) -> None:
    x = normal(3, 300)
    x[1, 299], x[2, 0] = bad, math.nan
    with pytest.raises(ValueError, match=rf"x\[1, 299\] is {bad}; .* check_finite=False"):
        quantize(x, SIGNED, 256, device)


def test_without_the_check_every_comparison_with_nan_is_false(device: str) -> None:
    x = normal(3, 256, seed=4)
    x[0, 3], x[1, 4] = math.nan, -math.inf
    assert_is_defined(x, SIGNED, 256, device, check_finite=False)


def test_reads_views_row_by_row(device: str) -> None:
    x = normal(20, 37, seed=6).t()
    assert not x.is_contiguous()
    assert_is_defined(x, SIGNED, 64, device)


@pytest.mark.threads
def test_does_not_depend_on_the_number_of_threads(device: str) -> None:
    x = normal(300, 1001, seed=8)
    results = with_threads((1, 2), lambda: quantize(x, SIGNED, 256, device))
    for one, two in zip(*results, strict=True):
        assert_same_bits(one, two)


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(values=st.lists(FLOATS, min_size=1, max_size=12), name=st.sampled_from(sorted(TABLES)))
def test_chosen_level_is_nearest_in_exact_arithmetic(values: list, name: str, device: str) -> None:
    x, table = torch.tensor(values), TABLES[name]
    codes, absmax = quantize(x, table, 256, device)
    levels = [Fraction(level) for level in table.tolist()]
    _, midpoints = define_thresholds(list(table.numpy()))
    for value, code in zip(x.numpy(), codes.tolist(), strict=True):
        normalised = normalise(value, absmax.cpu().numpy()[0])
        distances = [abs(Fraction(float(normalised)) - level) for level in levels]
        assert distances[code] == min(distances) or normalised in midpoints


@given(values=st.lists(st.floats(2.0**-90, 2.0**90, width=32), min_size=1, max_size=40))
def test_quantising_restored_values_changes_nothing(values: list, device: str) -> None:
    # Positive ones: the most negative level is not -1, so that a negative block's absmax shrinks.
    codes, absmax = quantize(torch.tensor(values), SIGNED, 256, device)
    restored = dequantize_8bit(codes, absmax, SIGNED.to(device), 256)
    again, again_absmax = quantize(restored, SIGNED, 256, device)
    assert_same_bits(again, codes)
    assert_same_bits(again_absmax, absmax)


@pytest.mark.parametrize("shape", [(257,), (0,), (3, 64)], ids=str)
def test_operator_passes_opcheck(shape: tuple, device: str) -> None:
    arguments = (normal(*shape).to(device), SIGNED.to(device), 256, True)
    torch.library.opcheck(torch.ops.qlora_ref.quantize_8bit.default, arguments)


@pytest.mark.parametrize(
    "changes,error,message",
    [
        ({"x": 1.0}, TypeError, "x must be a tensor, got float"),
        ({"x": torch.ones(4).double()}, TypeError, "x must be float32.*got torch.float64"),
        ({"codebook": SIGNED[:16]}, ValueError, r"codebook must have shape \(256,\), got \(16,\)"),
        ({"codebook": SIGNED.bfloat16()}, TypeError, "codebook must be torch.float32"),
        ({"block_size": 5}, ValueError, "block_size must be even and at least 2, got 5"),
        ({"block_size": None}, TypeError, "block_size must be an int, got NoneType"),
    ],
)
def test_bad_arguments_are_refused(changes: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        quantize_8bit(**({"x": torch.ones(4), "codebook": SIGNED} | changes))
