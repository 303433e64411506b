"""The Triton kernels as their compiler makes them for sm_80, on the simulated GPU.

What Triton's interpreter cannot show is shown here: permuted bytes (inline PTX), asynchronous
copies, tensor-core products, bfloat16, and that no access is out of bounds or raced for.
"""

from __future__ import annotations

import importlib.util
import math
import os

import pytest
import torch
from compare import (
    Weight,
    assert_error_at_most_twice_torch,
    assert_same_bits,
    define_adamw,
    define_adamw_8bit,
    define_matmul,
    define_quantize,
    define_quantize_8bit,
    normal,
    random_bytes,
    random_weight,
)
from torch.nn.functional import linear

from qlora_ref import codebooks
from qlora_ref.reference.dequantize_8bit import dequantize_8bit as restore_8bit

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="what is interpreted is not compiled"
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="needs triton's compiler"
    ),
]

if importlib.util.find_spec("triton") is not None:
    from qlora_kernels.adamw_step import adamw_step
    from qlora_kernels.dequantize_4bit import dequantize_4bit
    from qlora_kernels.dequantize_8bit import dequantize_8bit
    from qlora_kernels.matmul_4bit import matmul_4bit
    from qlora_kernels.quantize_4bit import quantize_4bit
    from qlora_kernels.quantize_8bit import quantize_8bit
    from simulated_triton import on_simulated_gpu

SLOW = pytest.mark.slow  # compiling a kernel takes seconds: one of each kind is in every run
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32


def hard_values(n: int, dtype: torch.dtype) -> torch.Tensor:
    """Ordinary blocks of 64, and blocks of zeros, of subnormal, large and non-finite values."""
    x = normal(n, seed=1)
    x[:64] = 0
    x[64:128] *= 1e-38
    x[128:192] *= 2.0**-140
    x[192:256] *= 1e38
    x[256], x[320] = math.nan, math.inf
    return x.to(dtype)


@pytest.mark.parametrize(
    ("name", "block_size", "n", "dtype"),
    [
        ("nf4", 64, 4160, BFLOAT16),
        pytest.param("nf4", 64, 4160, FLOAT32, marks=SLOW),
        pytest.param("fp4", 64, 4160, BFLOAT16, marks=SLOW),
        pytest.param("fp4", 100, 1001, FLOAT16, marks=SLOW),
    ],
)
def test_quantize_4bit(name: str, block_size: int, n: int, dtype: torch.dtype) -> None:
    x, codebook = hard_values(n, dtype), codebooks.CODEBOOKS[name]()
    with on_simulated_gpu():
        packed, absmax = quantize_4bit(x, codebook, block_size)
    expected = define_quantize(x, codebook, block_size)
    assert_same_bits(absmax, expected[1])
    assert_same_bits(packed, expected[0])


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("dtype", "block_size", "kernel"),
    [
        (BFLOAT16, 64, "_dequantize_4bit_permuted"),
        pytest.param(FLOAT16, 96, "_dequantize_4bit_permuted", marks=SLOW),
        pytest.param(BFLOAT16, 2048, "_dequantize_4bit_permuted", marks=SLOW),
        pytest.param(FLOAT32, 64, "_dequantize_4bit", marks=SLOW),
        pytest.param(BFLOAT16, 16, "_dequantize_4bit", marks=SLOW),
    ],
    ids=str,
)
def test_dequantize_4bit(dtype: torch.dtype, block_size: int, kernel: str, nested: bool) -> None:
    weight = random_weight(37, 192, block_size, nested)
    arguments = (weight.packed, weight.absmax, weight.codebook, block_size, weight.shape, dtype)
    with on_simulated_gpu() as launches:
        y = dequantize_4bit(*arguments, *weight.nested.values())
    assert [launch.name for launch in launches] == [kernel]
    assert_same_bits(y, weight.dense(dtype))


def test_dequantize_4bit_permutes_every_code_of_every_byte() -> None:
    packed = torch.arange(256, dtype=torch.uint8)
    weight = Weight(packed, torch.linspace(0.1, 3, 8), normal(16, seed=1), 64, (8, 64))
    with on_simulated_gpu():
        y = dequantize_4bit(packed, weight.absmax, weight.codebook, 64, weight.shape, BFLOAT16)
    assert_same_bits(y, weight.dense(BFLOAT16))


@SLOW
def test_8bit_codes_there_and_back() -> None:
    x, codebook = hard_values(4001, BFLOAT16)[384:], codebooks.dynamic_codebook()
    with on_simulated_gpu():
        codes, absmax = quantize_8bit(x, codebook, 256)
        y = dequantize_8bit(codes, absmax, codebook, 256, FLOAT16)
    expected = define_quantize_8bit(x, codebook, 256)
    assert_same_bits(codes, expected[0])
    assert_same_bits(absmax, expected[1])
    assert_same_bits(y, restore_8bit(codes, absmax, codebook, 256, FLOAT16))


# (tokens, N, K, block size, dtype, kernel): few and many tokens, tails of all dimensions, blocks
# of one vector and of several rows, and what only the obvious kernel can do.
PRODUCTS = [
    (1, 70, 256, 64, BFLOAT16, "_matmul_tiled"),
    *(
        pytest.param(product, marks=SLOW, id=str(product))
        for product in (
            (3, 64, 192, 64, FLOAT16, "_matmul_tiled"),
            (70, 130, 320, 64, BFLOAT16, "_matmul_tiled"),
            (20, 40, 96, 32, BFLOAT16, "_matmul_tiled"),
            (5, 16, 128, 4096, BFLOAT16, "_matmul_tiled"),
            (7, 20, 96, 16, FLOAT32, "_matmul_tiled"),
            (3, 9, 50, 64, BFLOAT16, "_matmul"),
        )
    ),
]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_matmul_4bit(product: tuple, transposed: bool) -> None:
    tokens, rows, columns, block_size, dtype, kernel = product
    weight = random_weight(rows, columns, block_size, nested=block_size == 64)
    x = normal(tokens, rows if transposed else columns, seed=5, dtype=dtype)
    bias = None if transposed else normal(rows, seed=6, dtype=dtype)
    nested = weight.nested.values() or (None, None, None)
    layout = (weight.packed, weight.absmax, weight.codebook, block_size, weight.shape)
    with on_simulated_gpu() as launches:
        y = matmul_4bit(x, *layout, bias, transposed, *nested)
    assert [launch.name for launch in launches] == [kernel]
    dense = weight.dense(dtype)
    by_torch = linear(x, dense.t() if transposed else dense, bias)
    exact = define_matmul(x, weight.dense(), bias, transposed)
    assert_error_at_most_twice_torch(y, by_torch, exact)


@SLOW
def test_matmul_4bit_restores_the_weight_bit_for_bit() -> None:
    weight = random_weight(64, 128, 64, nested=True)
    layout = (weight.packed, weight.absmax, weight.codebook, 64, weight.shape)
    with on_simulated_gpu():
        y = matmul_4bit(
            torch.eye(128, dtype=BFLOAT16), *layout, None, False, *weight.nested.values()
        )
    assert torch.equal(y, weight.dense(BFLOAT16).t())


@SLOW
def test_matmul_4bit_adds_the_parts_of_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_kernels.matmul_tiles.multiprocessors", lambda device: 4)
    weight, x = random_weight(64, 2112, 64), normal(2, 2112, seed=5, dtype=BFLOAT16)
    bias = normal(64, seed=6, dtype=BFLOAT16)
    layout = (weight.packed, weight.absmax, weight.codebook, 64, weight.shape)
    with on_simulated_gpu() as launches:
        y = matmul_4bit(x, *layout, bias, False, None, None, None)
    assert [launch.name for launch in launches] == ["_matmul_tiled", "_add_parts"]
    by_torch = linear(x, weight.dense(BFLOAT16), bias)
    assert_error_at_most_twice_torch(y, by_torch, define_matmul(x, weight.dense(), bias, False))


OPTIONS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}


@SLOW
def test_adamw_step() -> None:
    param, grad = normal(1000, seed=1, dtype=BFLOAT16), normal(1000, seed=2, dtype=BFLOAT16)
    m, v = normal(1000, seed=3), normal(1000, seed=4).square()
    expected = define_adamw(param, grad, m, v, **OPTIONS, step=3)
    with on_simulated_gpu():
        adamw_step([param], [grad], [m], [v], [], [], None, None, *OPTIONS.values(), 3)
    for actual, wanted in zip((param, m, v), expected, strict=True):
        assert_same_bits(actual, wanted)


@SLOW
def test_adamw_step_with_8bit_moments() -> None:
    param, grad = normal(1000, seed=1, dtype=BFLOAT16), normal(1000, seed=2, dtype=BFLOAT16)
    codes = [random_bytes(1000, seed=seed) for seed in (3, 4)]
    absmaxes = [normal(4, seed=seed).abs() for seed in (5, 6)]
    tables = codebooks.dynamic_codebook(), codebooks.dynamic_codebook(signed=False)
    expected = define_adamw_8bit(param, grad, codes, absmaxes, tables, **OPTIONS, step=3)
    with on_simulated_gpu():
        lists = ([tensor] for tensor in (param, grad, *codes, *absmaxes))
        adamw_step(*lists, *tables, *OPTIONS.values(), 3)
    assert_same_bits(param, expected[0])
    for actual, wanted in zip(codes + absmaxes, expected[1] + expected[2], strict=True):
        assert_same_bits(actual, wanted)
