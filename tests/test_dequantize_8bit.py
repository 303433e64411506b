"""dequantize_8bit against its definition, bit for bit: one float32 product, one rounding."""

from __future__ import annotations

import math

import pytest
import torch
from compare import (
    DTYPES,
    assert_same_bits,
    define_dequantize_8bit,
    normal,
    random_bytes,
    with_threads,
)
from torch import Tensor

from qlora_ref import codebooks
from qlora_ref.ops import dequantize_8bit

OPERATION = "dequantize_8bit"

SIGNED = codebooks.dynamic_codebook(signed=True)
TABLES = {
    "signed": SIGNED,
    "unsigned": codebooks.dynamic_codebook(signed=False),
    "any numbers": normal(256, seed=9),
}

BLOCK_SIZES = (2, 64, 100, 256, 4096)
SHAPES = ((), (0,), (0, 5), (1,), (255,), (256,), (257,), (7, 12), (3, 401), (2, 3, 50), (2, 2101))


def quantised(shape: tuple, block_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    absmax = normal(-(-math.prod(shape) // block_size), seed=seed + 1).abs()
    return random_bytes(*shape, seed=seed), absmax


def assert_is_defined(
    codes: Tensor, absmax: Tensor, table: Tensor, block_size: int, dtype: torch.dtype, device: str
) -> None:
    on_device = [tensor.to(device) for tensor in (codes, absmax, table)]
    restored = dequantize_8bit(*on_device, block_size, dtype)
    assert restored.device == on_device[0].device
    assert_same_bits(restored, define_dequantize_8bit(codes, absmax, table, block_size, dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_definition_bit_for_bit(
    dtype: torch.dtype, block_size: int, shape: tuple, device: str
) -> None:
    assert_is_defined(*quantised(shape, block_size), SIGNED, block_size, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TABLES)
def test_every_codebook_matches_the_definition(name: str, dtype: torch.dtype, device: str) -> None:
    assert_is_defined(*quantised((1001,), 256, seed=3), TABLES[name], 256, dtype, device)


def test_all_256_codes_are_looked_up(device: str) -> None:
    codes = torch.arange(256).to(torch.uint8).to(device)
    restored = dequantize_8bit(codes, torch.ones(1, device=device), SIGNED.to(device))
    assert_same_bits(restored, SIGNED)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "scale", [0.0, 2.0**-149, 1e-40, 3e-39, 6e-8, 65504.0, 65520.0, 3.4e38, math.inf, math.nan]
)
def test_extreme_scales_match_the_definition(scale: float, dtype: torch.dtype, device: str) -> None:
    codes = torch.arange(256).to(torch.uint8)
    assert_is_defined(codes, torch.tensor([scale]), SIGNED, 256, dtype, device)


def test_fp16_overflows_to_infinity(device: str) -> None:
    codes = torch.tensor([255, 127]).to(torch.uint8).to(device)
    absmax = torch.tensor([65520.0], device=device)
    restored = dequantize_8bit(codes, absmax, SIGNED.to(device), 256, torch.float16)
    assert restored.tolist() == [math.inf, 0.0]


def test_bf16_subnormals_are_kept(device: str) -> None:
    codes = torch.tensor([255]).to(torch.uint8).to(device)
    absmax = torch.tensor([2.0**-130], device=device)
    restored = dequantize_8bit(codes, absmax, SIGNED.to(device), 256, torch.bfloat16)
    assert restored.tolist() == [2.0**-130]


def test_reads_tensors_that_are_not_contiguous(device: str) -> None:
    codes, absmax = random_bytes(8, 40, seed=7).t(), normal(10, seed=8)[::2]
    assert not codes.is_contiguous() and not absmax.is_contiguous()
    assert_is_defined(codes, absmax, SIGNED, 64, torch.float32, device)


@pytest.mark.threads
def test_does_not_depend_on_the_number_of_threads(device: str) -> None:
    tensors = [tensor.to(device) for tensor in (*quantised((300, 1001), 256), SIGNED)]
    assert_same_bits(*with_threads((1, 2), lambda: dequantize_8bit(*tensors, 256, torch.bfloat16)))


@pytest.mark.parametrize("shape", [(257,), (0,), (3, 64)], ids=str)
def test_operator_passes_opcheck(shape: tuple, device: str) -> None:
    tensors = [tensor.to(device) for tensor in (*quantised(shape, 256), SIGNED)]
    operator = torch.ops.qlora_ref.dequantize_8bit.default
    torch.library.opcheck(operator, (*tensors, 256, torch.float16))


@pytest.mark.parametrize(
    "changes,error,message",
    [
        ({"codes": [1]}, TypeError, "codes must be a tensor, got list"),
        ({"codes": torch.zeros(300)}, TypeError, "codes must be torch.uint8, got torch.float32"),
        ({"absmax": torch.ones(2).half()}, TypeError, "absmax must be torch.float32"),
        ({"absmax": torch.ones(3)}, ValueError, r"300 values in blocks of 256 need 2.*\(3,\)"),
        ({"block_size": 64}, ValueError, r"300 values in blocks of 64 need 5.*\(2,\)"),
        ({"codebook": SIGNED[1:]}, ValueError, r"codebook must have shape \(256,\), got \(255,\)"),
        ({"block_size": 257}, ValueError, "block_size must be even and at least 2, got 257"),
        ({"block_size": 256.0}, TypeError, "block_size must be an int, got float"),
        ({"dtype": torch.float64}, TypeError, "dtype must be float32.*got torch.float64"),
    ],
)
def test_bad_arguments_are_refused(changes: dict, error: type, message: str) -> None:
    arguments = {"codes": random_bytes(300), "absmax": torch.ones(2), "codebook": SIGNED}
    with pytest.raises(error, match=message):
        dequantize_8bit(**(arguments | changes))
