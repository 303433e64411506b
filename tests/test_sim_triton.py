"""The PTX that Triton's compiler emits, on the simulated GPU: a check by code that is not ours.

Well-known kernels, with the results that torch has for them; test_triton_compiled.py runs those of
kernels/ in the same way.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from compare import assert_error_at_most_twice_torch, assert_same_bits, normal
from torch import Tensor
from torch.nn import functional

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="what is interpreted is not compiled"
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="needs triton's compiler"
    ),
]

if importlib.util.find_spec("triton") is not None:
    import triton_examples
    from simulated_triton import on_simulated_gpu

# The weights of attention are rounded to float16 once, as in no formula of torch's, where their
# sum is not.
ATTENTION_ERROR = 2.0**-11


def integers(*shape: int, seed: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """From -4 to 4: no sum of products is rounded, whatever its order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vectors_are_added(dtype: torch.dtype) -> None:
    x, y = normal(1000, seed=1, dtype=dtype), normal(1000, seed=2, dtype=dtype)
    total = torch.full_like(x, torch.nan)
    with on_simulated_gpu():
        triton_examples.add[(2,)](x, y, total, 1000, BLOCK=512)
    assert_same_bits(total, x + y)


def test_softmax_of_rows() -> None:
    x = normal(5, 300, seed=1) * 10
    y = torch.full_like(x, torch.nan)
    with on_simulated_gpu():
        triton_examples.softmax[(5,)](x, y, 300, BLOCK=512)
    assert_error_at_most_twice_torch(y, x.softmax(1), x.double().softmax(1))


def test_layer_norm_of_rows() -> None:
    x, weight, bias = normal(4, 200, seed=1) + 3, normal(200, seed=2), normal(200, seed=3)
    y = torch.full_like(x, torch.nan)
    with on_simulated_gpu():
        triton_examples.layer_norm[(4,)](x, weight, bias, y, 200, 1e-5, BLOCK=256)
    by_torch, exact = (
        functional.layer_norm(t[0], (200,), *t[1:], 1e-5)
        for t in ((x, weight, bias), (x.double(), weight.double(), bias.double()))
    )
    assert_error_at_most_twice_torch(y, by_torch, exact)


def test_cumulative_sums() -> None:
    x = integers(1024, seed=1, dtype=torch.float32)
    y = torch.full_like(x, torch.nan)
    with on_simulated_gpu():
        triton_examples.cumulate[(1,)](x, y, BLOCK=1024)
    assert_same_bits(y, x.cumsum(0))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tensor_cores_multiply_as_tritons_compiler_lays_matrices_out(
    dtype: torch.dtype, transposed: bool
) -> None:
    a, b = integers(70, 160, seed=1, dtype=dtype), integers(160, 48, seed=2, dtype=dtype)
    y = torch.full((70, 48), torch.nan)
    given = b.t().contiguous() if transposed else b
    with on_simulated_gpu() as launches:
        triton_examples.multiply[(3, 2)](
            a, given, y, 70, 48, 160, TRANSPOSED=transposed, BLOCK=32, num_stages=3
        )
    (launch,) = launches
    for instruction in ("cp.async.commit_group", "ldmatrix", "mma.sync"):
        assert instruction in launch.kernel.asm["ptx"]
    assert_same_bits(y, a.float() @ b.float())


def test_attention_by_one_rescaled_sum() -> None:
    tokens, width = 100, 32
    q, k, v = (normal(tokens, width, seed=seed, dtype=torch.float16) for seed in range(3))
    y = torch.full((tokens, width), torch.nan)
    with on_simulated_gpu() as launches:
        triton_examples.attend[(4,)](q, k, v, y, tokens, width**-0.5, WIDTH=width, BLOCK=32)
    assert "mma.sync" in launches[0].kernel.asm["ptx"]
    exact = functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=True
    )
    assert (y - exact).abs().max() <= ATTENTION_ERROR * v.abs().max()
