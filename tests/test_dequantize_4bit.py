"""dequantize_4bit against its definition, bit for bit: one float32 product, one rounding."""

from __future__ import annotations

import math

import pytest
import torch
from compare import (
    DTYPES,
    assert_same_bits,
    define_dequantize,
    normal,
    random_bytes,
    random_weight,
    with_threads,
)
from torch import Tensor

from qlora_ref import codebooks, native
from qlora_ref.dispatch import force_backend
from qlora_ref.ops import dequantize_4bit

OPERATION = "dequantize_4bit"

NF4 = codebooks.nf4_codebook()
TABLES = {name: make() for name, make in codebooks.CODEBOOKS.items()}
TABLES["any numbers"] = normal(16, seed=9)

BLOCK_SIZES = (2, 32, 64, 100, 4096)
# As in test_quantize_4bit.py: odd counts, several rows a block and several blocks a row.
SHAPES = ((), (0,), (0, 5), (1,), (63,), (64,), (65,), (7, 12), (3, 257), (2, 3, 50), (2, 2101))


def quantised(shape: tuple, block_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random packed codes, and random scales of either sign: no quantiser is involved."""
    n = math.prod(shape)
    absmax = normal(-(-n // block_size), seed=seed + 1)
    return random_bytes((n + 1) // 2, seed=seed), absmax


def assert_is_defined(
    packed: Tensor, absmax: Tensor, table: Tensor, block_size: int, shape: tuple, dtype, device
) -> None:
    on_device = [tensor.to(device) for tensor in (packed, absmax, table)]
    restored = dequantize_4bit(*on_device, block_size, shape, dtype)
    assert restored.device == on_device[0].device
    assert_same_bits(restored, define_dequantize(packed, absmax, table, block_size, shape, dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_definition_bit_for_bit(
    dtype: torch.dtype, block_size: int, shape: tuple, device: str
) -> None:
    packed, absmax = quantised(shape, block_size)
    assert_is_defined(packed, absmax, NF4, block_size, shape, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TABLES)
def test_every_codebook_matches_the_definition(name: str, dtype: torch.dtype, device: str) -> None:
    packed, absmax = quantised((1001,), 64, seed=3)
    assert_is_defined(packed, absmax, TABLES[name], 64, (1001,), dtype, device)


@pytest.mark.parametrize("n", [0, 1, 65, 32 * 300 + 7])  # more than 256 blocks: two nested ones
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nested_scales_are_decoded_bit_for_bit(dtype: torch.dtype, n: int, device: str) -> None:
    weight = random_weight(1, n, 32, nested=True)
    restored = dequantize_4bit(**weight.arguments(device), dtype=dtype)
    assert_same_bits(restored, weight.dense(dtype))


def test_every_code_of_either_nibble_is_looked_up(device: str) -> None:
    table, packed = torch.arange(16.0), torch.arange(256).to(torch.uint8)
    restored = dequantize_4bit(
        packed.to(device), torch.ones(8, device=device), table.to(device), 64, (256, 2)
    )
    assert restored.tolist() == [list(map(float, divmod(byte, 16))) for byte in range(256)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "scale",
    [0.0, 1e-45, 2.0**-149, 1e-40, 3e-39, 1e-38, 6e-8, 6e-5, 65504.0, 65520.0, 1e5, 3.4e38]
    + [math.inf, math.nan],
)
def test_extreme_scales_match_the_definition(scale: float, dtype: torch.dtype, device: str) -> None:
    packed = random_bytes(32, seed=4)
    assert_is_defined(packed, torch.tensor([scale]), NF4, 64, (64,), dtype, device)


def test_fp16_overflows_to_infinity(device: str) -> None:
    packed, absmax = torch.tensor([0x0F, 0x77]).to(torch.uint8), torch.tensor([65520.0])
    restored = dequantize_4bit(
        packed.to(device), absmax.to(device), NF4.to(device), 64, (4,), torch.float16
    )
    assert restored.tolist() == [-math.inf, math.inf, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_subnormals_are_kept(dtype: torch.dtype, device: str) -> None:
    absmax = torch.tensor([2.0**-130])
    restored = dequantize_4bit(
        torch.tensor([0x0F]).to(torch.uint8).to(device),
        absmax.to(device),
        NF4.to(device),
        64,
        (2,),
        dtype,
    )
    assert restored.tolist() == [-(2.0**-130), 2.0**-130]


def test_fp4_code_8_reads_as_plus_zero(device: str) -> None:
    fp4 = codebooks.fp4_codebook()
    packed = torch.tensor([0x08]).to(torch.uint8).to(device)  # code 0, and code 8, which reads as 0
    restored = dequantize_4bit(packed, torch.ones(1, device=device), fp4.to(device), 64, (2,))
    assert_same_bits(restored, torch.zeros(2))


def test_low_nibble_after_an_odd_count_is_not_read(device: str) -> None:
    packed, absmax = quantised((65,), 64, seed=5)
    results = []
    for last in (0x30, 0x3F):
        packed[-1] = last
        tensors = [tensor.to(device) for tensor in (packed, absmax, NF4)]
        results.append(dequantize_4bit(*tensors, 64, (65,)))
    assert_same_bits(*results)


def test_packed_may_have_any_shape(device: str) -> None:
    packed, absmax = quantised((128,), 64, seed=6)
    tensors = [absmax.to(device), NF4.to(device)]
    flat = dequantize_4bit(packed.to(device), *tensors, 64, (128,))
    assert_same_bits(dequantize_4bit(packed.view(64, 1).to(device), *tensors, 64, (128,)), flat)


def test_reads_tensors_that_are_not_contiguous(device: str) -> None:
    packed, absmax = random_bytes(8, 20, seed=7).t(), normal(10, seed=8)[::2]
    assert not packed.is_contiguous() and not absmax.is_contiguous()
    assert_is_defined(packed, absmax, NF4, 64, (320,), torch.float32, device)


def test_result_is_a_new_tensor(device: str) -> None:
    packed, absmax = quantised((64,), 64)
    tensors = [tensor.to(device) for tensor in (packed, absmax, NF4)]
    first = dequantize_4bit(*tensors, 64, (64,))
    before = first.clone()
    dequantize_4bit(*tensors, 64, (64,)).zero_()
    assert_same_bits(first, before)


# Past the caches where it can: beyond 8 MiB with one thread, beyond 32 with several.
@pytest.mark.parametrize("threads,mebibytes", [(1, 8), (3, 32)])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("block_size", [64, 100, 2**62])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_large_used_buffer_is_written_in_full_and_not_beyond(
    isa: str, dtype: torch.dtype, block_size: int, offset: int, threads: int, mebibytes: int
) -> None:
    n = mebibytes * 2**20 // dtype.itemsize + 2**15 + 35
    packed, absmax = quantised((n,), block_size)
    buffer = torch.full((n + 3,), 7.0, dtype=dtype)
    y = buffer[offset : offset + n]
    operations = native.load("cpu", OPERATION, isa).__self__
    with_threads(
        [threads], lambda: operations.dequantize_4bit_into(y, packed, absmax, NF4, block_size)
    )
    with force_backend("reference"):
        expected = dequantize_4bit(packed, absmax, NF4, block_size, (n,), dtype)
    assert_same_bits(y, expected)
    assert (buffer[:offset] == 7).all() and (buffer[offset + n :] == 7).all()


@pytest.mark.threads
def test_does_not_depend_on_the_number_of_threads(device: str) -> None:
    packed, absmax = quantised((300, 1001), 64)
    arguments = (*(t.to(device) for t in (packed, absmax, NF4)), 64, (300, 1001), torch.bfloat16)
    assert_same_bits(*with_threads((1, 2), lambda: dequantize_4bit(*arguments)))


@pytest.mark.parametrize("shape", [(65,), (0,), (3, 64)], ids=str)
def test_operator_passes_opcheck(shape: tuple, device: str) -> None:
    tensors = [tensor.to(device) for tensor in (*quantised(shape, 64), NF4)]
    operator = torch.ops.qlora_ref.dequantize_4bit.default
    torch.library.opcheck(operator, (*tensors, 64, shape, torch.bfloat16))


@pytest.mark.parametrize(
    "changes,error,message",
    [
        ({"packed": [1]}, TypeError, "packed must be a tensor, got list"),
        ({"packed": torch.zeros(50)}, TypeError, "packed must be torch.uint8, got torch.float32"),
        ({"packed": random_bytes(49)}, ValueError, "99 values need 50 bytes, got 49"),
        ({"shape": (5, 21)}, ValueError, "105 values need 53 bytes, got 50"),
        ({"absmax": torch.ones(3)}, ValueError, r"99 values in blocks of 32 need 4.*\(3,\)"),
        ({"absmax": torch.ones(4, 1)}, ValueError, r"one scale per block.*got shape \(4, 1\)"),
        ({"block_size": 64}, ValueError, r"blocks of 64 need 2, got shape \(4,\)"),
        ({"absmax": torch.ones(4).double()}, TypeError, "absmax must be torch.float32"),
        ({"codebook": NF4[:15]}, ValueError, r"codebook must have shape \(16,\)"),
        ({"codebook": NF4.half()}, TypeError, "codebook must be torch.float32, got torch.float16"),
        ({"block_size": 33}, ValueError, "block_size must be even"),
        ({"block_size": "64"}, TypeError, "block_size must be an int, got str"),
        ({"dtype": torch.float64}, TypeError, "dtype must be float32.*got torch.float64"),
        ({"dtype": torch.uint8}, TypeError, "dtype must be float32.*got torch.uint8"),
    ],
)
def test_bad_arguments_are_refused(changes: dict, error: type, message: str) -> None:
    arguments = {
        "packed": random_bytes(50),
        "absmax": torch.ones(4),
        "codebook": NF4,
        "block_size": 32,
        "shape": (9, 11),
    }
    with pytest.raises(error, match=message):
        dequantize_4bit(**(arguments | changes))
