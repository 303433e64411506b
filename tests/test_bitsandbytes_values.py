"""Restored values against the installed bitsandbytes: bit for bit, but for its three deviations.

Two are bugs of its vector code for one instruction set: their tests hold with and without it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from compare import DTYPES, assert_same_bits, define_dequantize, normal, random_bytes
from torch import Tensor

from qlora_ref import codebooks, ops
from qlora_ref.quantized import quantize

bnb = pytest.importorskip(
    "bitsandbytes", reason="bitsandbytes is missing: pip install bitsandbytes==0.50.2"
)
F = bnb.functional

OPERATION = "dequantize_4bit"

TABLES = {"nf4": codebooks.nf4_codebook(), "fp4": codebooks.fp4_codebook()}
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # all that bitsandbytes takes

# Its vector code is for CPUs with AVX512-BF16.
HAS_VECTOR_CODE = bool(F.has_avx512bf16())


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """bitsandbytes compiles its torch code at each new shape, for seconds."""
    with torch.compiler.set_stance("force_eager"):
        yield


def their_values(
    packed: Tensor, absmax: Tensor, kind: str, block_size: int, shape: tuple, dtype: torch.dtype
) -> Tensor:
    state = F.QuantState(absmax, torch.Size(shape), TABLES[kind], block_size, kind, dtype)
    return F.dequantize_4bit(packed.view(-1, 1), state)


def our_values(
    packed: Tensor,
    absmax: Tensor,
    kind: str,
    block_size: int,
    shape: tuple,
    dtype: torch.dtype,
    device: str,
) -> Tensor:
    parts = [part.to(device) for part in (packed, absmax, TABLES[kind])]
    return ops.dequantize_4bit(*parts, block_size, shape, dtype).cpu()


def any_codes(shape: tuple, block_size: int) -> tuple[Tensor, Tensor]:
    """Every pair of codes, and scales from 2^-14 to 2^17, so that some values overflow float16."""
    n = math.prod(shape)
    blocks = -(-n // block_size)
    exponents = torch.arange(blocks) % 32 - 14
    scales = (1 + normal(blocks, seed=n).abs() / 8) * 2.0**exponents
    return random_bytes(-(-n // 2), seed=block_size), scales


# Shapes that bitsandbytes restores correctly: see the test of its vector code for the others.
RESTORED = {
    "one block": lambda b: (b,),
    "several blocks a row": lambda b: (3, 2 * b),
    "several rows a block": lambda b: (2 * b, 7),
    "short tail": lambda b: (2 * b + b // 2 + 2,),
    "odd count": lambda b: (3, b + 1),
    "one value": lambda b: (1, 1),
    "three dimensions": lambda b: (3, 5, b),
}


@pytest.mark.parametrize("shape", RESTORED.values(), ids=RESTORED.keys())
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", TABLES)
def test_restored_values_are_equal_bit_for_bit(
    kind: str, dtype: torch.dtype, block_size: int, shape, device: str
) -> None:
    parts = any_codes(shape(block_size), block_size)
    options = (kind, block_size, shape(block_size), dtype)
    expected = their_values(*parts, *options).view(shape(block_size))
    if kind == "fp4":
        expected = expected + 0.0  # code 8 is -0 there in places: -0 + 0 is 0
    assert_same_bits(our_values(*parts, *options, device), expected)


# How bitsandbytes deviates when it restores.

CROSSING = [
    ((64, 96), 64),
    ((64, 64), 128),
    ((4, 48), 32),
    ((64, 96), 1024),
    ((2, 3, 80), 64),
]


@pytest.mark.parametrize("shape,block_size", CROSSING, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", TABLES)
def test_blocks_that_cross_rows_are_restored_with_other_scales_by_the_vector_code_there(
    kind: str, dtype: torch.dtype, shape: tuple, block_size: int, device: str
) -> None:
    packed, absmax = any_codes(shape, block_size)
    packed &= 0x77  # codes 0 to 7: FP4's second zero has a test of its own
    options = (kind, block_size, shape, dtype)
    defined = define_dequantize(packed, absmax, TABLES[kind], block_size, shape, dtype)
    assert_same_bits(our_values(packed, absmax, *options, device), defined)
    their_result = their_values(packed, absmax, *options)
    assert torch.equal(their_result, defined) == (not HAS_VECTOR_CODE)


def test_subnormal_bfloat16_becomes_0_in_the_vector_code_there(device: str) -> None:
    packed, absmax = torch.full((32,), 0xFF, dtype=torch.uint8), torch.tensor([1e-39])
    options = ("nf4", 64, (1, 64), torch.bfloat16)
    defined = define_dequantize(packed, absmax, TABLES["nf4"], *options[1:])
    assert (defined > 0).all()
    assert_same_bits(our_values(packed, absmax, *options, device), defined)
    kept = their_values(packed, absmax, *options) > 0
    assert kept.all() if not HAS_VECTOR_CODE else not kept.any()


def test_fp4_code_8_reads_as_minus_zero_there_and_as_zero_here(device: str) -> None:
    packed, absmax = torch.full((30,), 0x88, dtype=torch.uint8), torch.ones(1)
    options = ("fp4", 64, (6, 10), torch.float32)  # rows that its vector code does not take
    assert_same_bits(their_values(packed, absmax, *options), torch.full((6, 10), -0.0))
    assert_same_bits(our_values(packed, absmax, *options, device), torch.zeros(6, 10))


def test_tensor_without_dimensions_cannot_be_restored_there() -> None:
    x = torch.tensor(-3.0)
    packed, state = F.quantize_4bit(x, quant_type="nf4")
    with pytest.raises(IndexError):
        F.dequantize_4bit(packed, state)
    assert_same_bits(quantize(x).dequantize(), x)
