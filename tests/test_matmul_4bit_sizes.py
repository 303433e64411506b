"""matmul_4bit where kernels change their ways: few and many tokens, long rows, blocks, extremes.

The expected values come from the scalar definition of the weight and a product in float64.
"""

from __future__ import annotations

import pytest
import torch
from compare import (
    DTYPES,
    ERROR_RATIO,
    Weight,
    assert_error_at_most_twice_torch,
    assert_same_bits,
    define_matmul,
    normal,
    random_bytes,
    random_weight,
    with_threads,
)
from test_matmul_4bit import error_ratio
from torch import Tensor
from torch.nn.functional import linear

from qlora_ref.ops import dequantize_4bit, matmul_4bit

OPERATION = "matmul_4bit"
LONG_ON_SIMULATED_GPUS = True

# Kernels take one to 16 tokens in registers, 16 to a panel, and up to 512 or 1024 at a time; depths
# in chunks of 256, outputs in blocks of up to 512.
FEW = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17)
MANY_TOKENS = 1030


def large_weight(rows: int, columns: int, block_size: int) -> tuple[Weight, Tensor]:
    """Random codes and scales, and the dense weight by the reference, which other tests check."""
    n = rows * columns
    absmax = normal(-(-n // block_size), seed=2).abs() + 0.1
    layout = (normal(16, seed=1), block_size, (rows, columns))
    weight = Weight(random_bytes((n + 1) // 2), absmax, *layout)
    return weight, dequantize_4bit(weight.packed, absmax, *layout)


def assert_is_accurate(
    x: Tensor,
    weight: Weight,
    dense: Tensor,
    device: str,
    transposed: bool = False,
    ratio: float = ERROR_RATIO,
) -> None:
    y = matmul_4bit(x.to(device), transposed=transposed, **weight.arguments(device))
    by_torch = linear(x, (dense.t() if transposed else dense).to(x.dtype))
    assert_error_at_most_twice_torch(y, by_torch, define_matmul(x, dense, None, transposed), ratio)


@pytest.mark.parametrize("tokens", FEW)
@pytest.mark.parametrize("row", [(64, 32), (96, 32), (416, 32), (320, 64), (384, 64)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_tokens(dtype: torch.dtype, row: tuple[int, int], tokens: int, device: str) -> None:
    columns, block_size = row
    weight = random_weight(37, columns, block_size)
    assert_is_accurate(normal(tokens, columns, seed=3, dtype=dtype), weight, weight.dense(), device)


@pytest.mark.parametrize("block_size", [8, 16, 24, 128, 256, 4096])
@pytest.mark.parametrize("transposed", [False, True])
def test_block_sizes(transposed: bool, block_size: int, device: str) -> None:
    weight = random_weight(48, 256, block_size)
    for tokens in (2, 20):
        x = normal(tokens, 48 if transposed else 256, seed=3)
        assert_is_accurate(x, weight, weight.dense(), device, transposed)


# Rows of whole vectors of codes, of which each half, or each, lies in one block, or blocks cross
# rows: they may be restored in an order of their own.
@pytest.mark.parametrize("size", [(29, 384, 64), (26, 256, 128), (50, 384, 256)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_whole_vectors(
    dtype: torch.dtype, transposed: bool, size: tuple, device: str
) -> None:
    rows, columns, block_size = size
    weight = random_weight(rows, columns, block_size, nested=True)
    for tokens in (3, 17, 40):
        x = normal(tokens, rows if transposed else columns, seed=3, dtype=dtype)
        ratio = error_ratio(dtype, tokens, transposed)
        assert_is_accurate(x, weight, weight.dense(), device, transposed, ratio)


@pytest.mark.parametrize("shape", [(70, 1100), (600, 530), (531, 301)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_chunks_and_blocks(
    dtype: torch.dtype, transposed: bool, shape: tuple, device: str
) -> None:
    weight, dense = large_weight(*shape, 64)
    for tokens in (1, 33):
        x = normal(tokens, shape[0] if transposed else shape[1], seed=3, dtype=dtype)
        assert_is_accurate(x, weight, dense, device, transposed)


@pytest.mark.parametrize("transposed", [False, True])
def test_more_tokens_than_are_worked_on_at_a_time(transposed: bool, device: str) -> None:
    weight, dense = large_weight(40, 64, 64)
    x = normal(MANY_TOKENS, 40 if transposed else 64, seed=3)
    assert_is_accurate(x, weight, dense, device, transposed)


# Roundings of sums of one sign add up: a sum in too many steps, or too long ones, shows here.
@pytest.mark.parametrize("tokens", [4, 20])
@pytest.mark.parametrize("transposed", [False, True])
def test_long_sums_of_one_sign(transposed: bool, tokens: int, device: str) -> None:
    shape = (8192, 16) if transposed else (16, 8192)
    weight, _ = large_weight(*shape, 64)
    weight.codebook.abs_()
    dense = dequantize_4bit(weight.packed, weight.absmax, weight.codebook, 64, shape)
    x = normal(tokens, 8192, seed=3).abs()
    assert_is_accurate(x, weight, dense, device, transposed)


# Kernels that work on whole vectors of codes fill them up where a row ends.
@pytest.mark.parametrize("tokens", [1, 8, 20])
@pytest.mark.parametrize("row", [(192, 64), (72, 8)], ids=str)
def test_an_infinite_level_that_no_code_names(
    row: tuple[int, int], tokens: int, device: str
) -> None:
    columns, block_size = row
    weight = random_weight(5, columns, block_size)
    weight.packed.bitwise_or_(0x11)
    x = normal(tokens, columns, seed=3)
    finite = matmul_4bit(x.to(device), **weight.arguments(device))
    weight.codebook[0] = -torch.inf
    assert_same_bits(matmul_4bit(x.to(device), **weight.arguments(device)), finite)


# Halfway between two bfloat16 numbers, and all of them are rounded down: where levels are rounded
# instead of weights, errors of one sign add up.
@pytest.mark.parametrize("tokens", [1, 5])
def test_levels_far_from_bfloat16(tokens: int, device: str) -> None:
    weight, _ = large_weight(16, 4096, 64)
    weight.codebook.copy_((1 + 2.0**-8) * 2.0 ** -torch.arange(16.0))
    dense = dequantize_4bit(weight.packed, weight.absmax, weight.codebook, 64, (16, 4096))
    x = normal(tokens, 4096, seed=3, dtype=torch.bfloat16).abs()
    assert_is_accurate(x, weight, dense, device)


# In long sums, how many of 300 tokens are worked on at a time depends on the number of threads.
@pytest.mark.threads
@pytest.mark.parametrize(
    "tokens,outputs,depth", [(1, 300, 512), (8, 300, 512), (40, 300, 512), (300, 16, 8192)]
)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(
    dtype: torch.dtype,
    transposed: bool,
    tokens: int,
    outputs: int,
    depth: int,
    backend: str,
    device: str,
) -> None:
    if backend == "reference":
        pytest.skip("the reference multiplies in torch, which splits one token's sums by threads")
    weight, _ = large_weight(*((depth, outputs) if transposed else (outputs, depth)), 64)
    x = normal(tokens, depth, seed=3, dtype=dtype).to(device)
    arguments = weight.arguments(device)
    results = with_threads((1, 2, 3), lambda: matmul_4bit(x, transposed=transposed, **arguments))
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


# The largest: its own remainders overflow where they are rounded without care.
@pytest.mark.parametrize("size", [2.0**-120, 2.0**-70, 2.0**-40, 1.0, 2.0**100])
@pytest.mark.parametrize("transposed", [False, True])
def test_tokens_of_any_size_keep_their_accuracy(transposed: bool, size: float, device: str) -> None:
    weight, dense = large_weight(64, 128, 64)
    x = normal(20, 64 if transposed else 128, seed=3)
    x[::2] *= size  # beside tokens of another size
    assert_is_accurate(x[::2].contiguous(), weight, dense, device, transposed)
    y = matmul_4bit(x.to(device), transposed=transposed, **weight.arguments(device))[::2].cpu()
    exact = define_matmul(x[::2], dense, None, transposed)
    assert_error_at_most_twice_torch(y, linear(x[::2], dense.t() if transposed else dense), exact)


# Tokens that overflow, or lose bits, if they are multiplied by levels before these are scaled.
@pytest.mark.parametrize("size,scale", [(1e38, 1e-3), (1e-42, 1e6)])
@pytest.mark.parametrize("tokens", [1, 20])
def test_scales_that_make_up_for_the_tokens(
    tokens: int, size: float, scale: float, device: str
) -> None:
    weight, _ = large_weight(16, 256, 64)
    weight.absmax.mul_(scale)
    dense = dequantize_4bit(weight.packed, weight.absmax, weight.codebook, 64, (16, 256))
    x = normal(tokens, 256, seed=3).abs() * size
    x.clamp_(max=3e38)
    assert_is_accurate(x, weight, dense, device)


# The same of levels, of a codebook that is not normalised.
@pytest.mark.parametrize("size,power", [(100.0, 126), (2.0**-50, -100)])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scales_that_make_up_for_the_levels(
    dtype: torch.dtype, tokens: int, size: float, power: int, backend: str, device: str
) -> None:
    if backend == "cuda" and dtype == torch.bfloat16:
        pytest.skip("the CUDA kernel scales sums of levels, which are to be of about 1 in size")
    weight, dense = large_weight(16, 256, 64)
    weight.codebook.mul_(2.0**power)
    weight.absmax.mul_(2.0**-power)
    x = normal(tokens, 256, seed=3, dtype=dtype).abs() * size
    assert_is_accurate(x, weight, dense, device)


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("transposed", [False, True])
def test_infinities_and_nan_stay_in_their_token(transposed: bool, tokens: int, device: str) -> None:
    weight, dense = large_weight(64, 128, 64)
    x = normal(tokens, 64 if transposed else 128, seed=3)
    x[0, 5], x[1, 7] = torch.inf, torch.nan
    y = matmul_4bit(x.to(device), transposed=transposed, **weight.arguments(device)).cpu()
    expected = linear(x, dense.t() if transposed else dense)
    assert torch.equal(y[0], expected[0])
    assert y[1].isnan().all()
    assert y[2:].isfinite().all()
