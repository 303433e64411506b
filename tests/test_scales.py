"""Signed and searched scales: against scalar loops, a brute-force search, and bitsandbytes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from compare import (
    DTYPES,
    assert_same_bits,
    define_dequantize,
    define_quantize,
    nibbles,
    normal,
    with_threads,
)
from torch import Tensor

from qlora_ref import codebooks
from qlora_ref.quantized import QuantizedTensor, quantize
from qlora_ref.scales import search_scales

SIGNED = tuple(name for name in codebooks.CODEBOOKS if codebooks.has_signed_scales(name))
SHAPES = ((0,), (1,), (64,), (65,), (3, 100), (7, 33), (4, 64))

# A scale is rounded to float32, and so is what is divided by it: both shift a squared error by
# less than this part.
ROUNDING = 1e-5


def block_errors(tensor: QuantizedTensor, x: Tensor) -> Tensor:
    """The squared error of each block, float64; x must fill whole blocks."""
    difference = tensor.dequantize(torch.float32).double() - x.double()
    return difference.square().view(-1, tensor.block_size).sum(dim=1)


# Signed scales.


def define_signed(x: Tensor, codebook: Tensor, block_size: int) -> tuple[list[int], list[float]]:
    """Each block divided by its value of the largest magnitude, one block at a time."""
    codes, scales = [], []
    for block in x.float().flatten().split(block_size) if x.numel() else ():
        values = block.tolist()
        largest = max(values, key=abs)
        sign = -1.0 if largest < 0 and abs(largest) not in values else 1.0
        packed, absmax = define_quantize(block * sign, codebook, block_size)
        codes += nibbles(packed, len(values))
        scales.append(sign * absmax.item())
    return codes, scales


def test_only_the_s_of_bof_has_signed_scales() -> None:
    assert SIGNED == ("bof4_s", "bof3_s", "bof2_s")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SIGNED)
def test_signed_scales_match_the_definition(name: str, dtype: torch.dtype, shape: tuple) -> None:
    x, block_size = normal(*shape, seed=sum(shape), dtype=dtype), 32
    tensor = quantize(x, name, block_size)
    codes, scales = define_signed(x, tensor.codebook, block_size)
    assert nibbles(tensor.packed, x.numel()) == codes
    assert tensor.scales.tolist() == scales
    defined = define_dequantize(
        tensor.packed, tensor.scales, tensor.codebook, block_size, shape, dtype
    )
    assert_same_bits(tensor.dequantize(), defined)


def test_the_largest_value_of_a_block_is_restored_exactly() -> None:
    x = normal(50, 64)
    restored, largest = quantize(x, "bof4_s").dequantize(), x.abs().argmax(dim=1, keepdim=True)
    assert torch.equal(restored.gather(1, largest), x.gather(1, largest))
    assert (quantize(x, "bof4_s").scales < 0).sum() in range(10, 40)


def test_of_two_largest_values_the_positive_one_gives_the_sign() -> None:
    x = torch.tensor([[-2.0, 2.0] * 32, [2.0, -2.0] * 32, [-2.0, 1.0] * 32, [0.0] * 64])
    assert quantize(x, "bof4_s").scales.tolist() == [2, 2, -2, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{"codebook": "bof4_s"}, {"scale_search": True}])
def test_a_value_that_is_not_finite_is_named(options: dict, bad: float) -> None:
    x = normal(3, 100)
    x[1, 30] = bad
    with pytest.raises(ValueError, match=r"x\[1, 30\] is"):
        quantize(x, **options)


# The exact errors are those of test_optimal_float.py; 2^20 samples have a standard error of 0.2 %.
@pytest.mark.parametrize(
    "name,expected", [("bof4_s", 7.3517e-3), ("bof3_s", 3.116e-2), ("bof2_s", 1.386e-1)]
)
@pytest.mark.parametrize("double_quant", [False, True])
def test_error_on_normal_values_is_the_integral(
    name: str, expected: float, double_quant: bool
) -> None:
    x = normal(2**20, seed=64)
    error = quantize(x, name, double_quant=double_quant).error(x).mse
    assert error == pytest.approx(expected, rel=0.01)


# Searched scales.


def least_errors(x: np.ndarray, levels: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """The least squared error of each row of x among scales factor * absmax, in float64."""
    scales = np.abs(x).max(axis=1) * factors[:, None]  # (factors, rows)
    least = np.full(len(x), np.inf)
    for scale in scales:
        restored = levels * scale[:, None]
        distances = np.abs(x[:, :, None] - restored[:, None, :])
        least = np.minimum(least, np.square(distances.min(axis=2)).sum(axis=1))
    return least


@pytest.mark.parametrize("name", ["nf4", "fp4", "int4", "nf3", "nf2", "bof4_s"])
def test_search_comes_within_one_percent_of_a_search_through_everything(name: str) -> None:
    x = normal(60, 64, seed=5)
    tensor = quantize(x, name, scale_search=True)
    everything = np.linspace(0.2, 1.6, 701)
    if name in SIGNED:
        everything = np.concatenate([everything, -everything])
    least = least_errors(x.double().numpy(), tensor.codebook.double().numpy(), everything)
    assert block_errors(tensor, x).sum() <= 1.01 * least.sum()


@pytest.mark.parametrize("name", codebooks.CODEBOOKS)
def test_no_block_is_worse_than_with_absmax(name: str) -> None:
    x = normal(500, 64, seed=6) * normal(500, 1, seed=7).exp()
    x = torch.where(normal(500, 64, seed=8) > 2.5, 8 * x, x)  # outliers, too
    searched, plain = quantize(x, name, scale_search=True), quantize(x, name)
    assert (block_errors(searched, x) <= (1 + ROUNDING) * block_errors(plain, x)).all()
    assert block_errors(searched, x).sum() < 0.95 * block_errors(plain, x).sum()


@pytest.mark.parametrize("double_quant", [False, True])
def test_search_lowers_the_error_of_nf4_on_normal_values_by_a_seventh(double_quant: bool) -> None:
    x = normal(2**18, seed=9)
    tensor = quantize(x, scale_search=True, double_quant=double_quant)
    assert tensor.error(x).mse < 8.46005e-3 * (1 - 0.14)  # the exact error with absmax: 8.46005e-3
    assert tensor.bits_per_parameter == quantize(x, double_quant=double_quant).bits_per_parameter


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["nf4", "fp4", "bof4_s"])
def test_each_code_is_nearest_under_the_scale_that_is_stored(
    name: str, shape: tuple, double_quant: bool
) -> None:
    x = normal(*shape, seed=11)
    tensor = quantize(x, name, 32, double_quant, scale_search=True)
    scales = tensor.absmax.double().repeat_interleave(32)[: x.numel()]
    distances = (x.double().flatten()[:, None] - scales[:, None] * tensor.codebook.double()).abs()
    chosen = distances.gather(1, torch.tensor(nibbles(tensor.packed, x.numel()))[:, None].long())
    assert (chosen <= distances.amin(dim=1, keepdim=True) + 1e-6).all()  # a tie, rounded
    assert tensor.packed.numel() == (x.numel() + 1) // 2


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1e30, 3.4e38])
def test_blocks_of_every_size_keep_their_shape(size: float) -> None:
    shape = torch.linspace(-1, 1, 64)
    tensor = quantize(shape * size, scale_search=True)
    assert tensor.scales.isfinite().all()
    expected = quantize(shape, scale_search=True)
    if 1e-37 < size < 2e38:  # below, the values themselves are rounded; above, so is the scale
        assert tensor.scales.item() / size == pytest.approx(expected.scales.item(), rel=1e-6)
        assert torch.equal(tensor.packed, expected.packed)
    assert tensor.error(shape * size).snr_db > 15


def test_a_block_of_zeros_stays_one() -> None:
    x = torch.cat([torch.zeros(64), normal(64), torch.zeros(10)])
    tensor = quantize(x, scale_search=True)
    assert tensor.scales[[0, 2]].tolist() == [0, 0]
    assert torch.equal(tensor.dequantize()[:64], torch.zeros(64))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_narrow_dtypes_are_searched_as_the_float32_they_are(dtype: torch.dtype) -> None:
    x = normal(5, 100, dtype=dtype)
    mine, wide = quantize(x, scale_search=True), quantize(x.float(), scale_search=True)
    assert torch.equal(mine.packed, wide.packed) and torch.equal(mine.scales, wide.scales)


def test_scales_depend_neither_on_neighbours_nor_on_threads() -> None:
    x, nf4 = normal(5000, 64), codebooks.nf4_codebook()
    alone = torch.cat([search_scales(part, nf4, 64) for part in x.split(999)])
    for together in with_threads((1, 3), lambda: search_scales(x, nf4, 64)):
        assert torch.equal(together, alone)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_restores_the_same_bits(kind: str) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    tensor = quantize(normal(8, 128), kind, scale_search=True)
    state = bnb.functional.QuantState(
        absmax=tensor.scales,
        shape=tensor.shape,
        code=tensor.codebook,
        blocksize=64,
        quant_type=kind,
        dtype=torch.float32,
    )
    theirs = bnb.functional.dequantize_4bit(tensor.packed.view(-1, 1), state)
    assert torch.equal(theirs, tensor.dequantize())
