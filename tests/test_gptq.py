"""Error feedback against its definition with explicit inverses, least squares, and brute force."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from compare import DTYPES, nibbles, normal
from torch import Tensor

from qlora_ref import codebooks, gptq
from qlora_ref.quantized import QuantizedTensor, quantize
from qlora_ref.tensor_format import to_tensors

NF4 = codebooks.nf4_codebook()


def correlated(width: int, seed: int = 0, samples: int = 1000) -> Tensor:
    """Second moments of inputs that share a few directions, as those of real layers do."""
    shared = normal(samples, 4, seed=seed) @ normal(4, width, seed=seed + 1)
    x = normal(samples, width, seed=seed + 2) + 2 * shared
    return x.t() @ x / samples


def error(tensor: QuantizedTensor, weight: Tensor, hessian: Tensor) -> float:
    return gptq.output_error(weight, hessian, tensor.dequantize(torch.float32))


def define_feedback(
    weight: np.ndarray, hessian: np.ndarray, scales: np.ndarray, levels: np.ndarray, block: int
) -> np.ndarray:
    """Optimal brain surgery, column by column: what is left of H is inverted anew each time."""
    weight, width = weight.copy(), weight.shape[1]
    codes = np.zeros(weight.shape, dtype=int)
    order = sorted(range(width), key=lambda k: -hessian[k, k])
    for position, j in enumerate(order):
        rest = order[position:]
        inverse = np.linalg.inv(hessian[np.ix_(rest, rest)])
        for row in range(len(weight)):
            scale = scales[(row * width + j) // block]
            codes[row, j] = np.abs(levels * scale - weight[row, j]).argmin()
            e = weight[row, j] - levels[codes[row, j]] * scale
            weight[row, rest] -= e / inverse[0, 0] * inverse[0]
    return codes


# 150 columns are more than one batch; 64 values a scale cross rows of 150 and of 24.
@pytest.mark.parametrize("shape,block_size", [((5, 24), 8), ((5, 24), 64), ((3, 150), 64)])
def test_feedback_is_optimal_brain_surgery(shape: tuple[int, int], block_size: int) -> None:
    weight, hessian = normal(*shape, seed=3), correlated(shape[1]).double()
    scales = normal(math.ceil(weight.numel() / block_size), seed=4).abs() + 2
    codes = gptq.feed_back_errors(weight, hessian, scales, NF4, block_size)
    arrays = [t.double().numpy() for t in (weight, hessian, scales, NF4)]
    assert codes.tolist() == define_feedback(*arrays, block_size).flatten().tolist()


def test_without_correlation_feedback_takes_the_nearest_levels() -> None:
    weight = normal(10, 64, seed=3)
    nearest = quantize(weight)
    identity = torch.eye(64, dtype=torch.float64)
    codes = gptq.feed_back_errors(weight, identity, nearest.scales, NF4, 64)
    assert codes.tolist() == nibbles(nearest.packed, weight.numel())


def test_sweeps_end_where_no_code_can_change_without_more_error() -> None:
    weight, hessian = normal(4, 24, seed=5), correlated(24).double()
    tensor = quantize(weight, block_size=8)
    codes = torch.tensor(nibbles(tensor.packed, weight.numel())).to(torch.uint8)
    errors = [gptq.output_error(weight, hessian, tensor.dequantize())]
    for _ in range(20):
        codes = gptq.descend(weight, hessian, codes, tensor.scales, NF4, 8)
        restored = gptq.restore(codes.view(4, 24), tensor.scales, NF4, 8)
        errors.append(gptq.output_error(weight, hessian, restored))
    assert all(np.diff(errors) <= 1e-9 * errors[0]) and errors[-1] < 0.6 * errors[0]
    for row in range(4):
        for column in range(24):
            scale = tensor.scales[(row * 24 + column) // 8].double()
            for level in NF4.double():
                changed = restored.clone()
                changed[row, column] = level * scale
                other = gptq.output_error(weight, hessian, changed)
                assert other >= errors[-1] * (1 - 1e-6)  # restored values are rounded to float32


def test_fitted_scales_are_those_of_least_squares() -> None:
    x, weight = normal(200, 48, seed=6) @ normal(48, 48, seed=7), normal(20, 48, seed=8)
    tensor = quantize(weight, block_size=16)
    codes = torch.tensor(nibbles(tensor.packed, weight.numel())).to(torch.uint8)
    hessian = x.double().t() @ x.double()
    fitted = gptq.fit_scales(weight, hessian, codes, tensor.scales, NF4, 16).view(20, 3)
    levels = NF4[codes.int()].double().view(20, 3, 16)
    for row in range(20):
        parts = [x[:, 16 * b : 16 * b + 16].double() @ levels[row, b] for b in range(3)]
        target = (x.double() @ weight[row].double())[:, None]
        expected = torch.linalg.lstsq(torch.stack(parts, dim=1), target).solution.flatten()
        # The ridge of 1e-6 draws each scale to the one before, times what is ill-conditioned here.
        assert fitted[row].tolist() == pytest.approx(expected.tolist(), rel=1e-3)


def test_a_block_of_zeros_keeps_its_scale_and_no_scale_changes_its_sign() -> None:
    weight = torch.cat([torch.zeros(4, 16), normal(4, 16)], dim=1)
    tensor = quantize(weight, block_size=16)
    codes = torch.tensor(nibbles(tensor.packed, weight.numel())).to(torch.uint8)
    fitted = gptq.fit_scales(weight, correlated(32).double(), codes, tensor.scales, NF4, 16)
    assert (fitted.view(4, 2)[:, 0] == 0).all() and (fitted.view(4, 2)[:, 1] > 0).all()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", ["nf4", "fp4", "int4", "bof4_s", "nf2"])
def test_outputs_are_off_by_less_than_two_thirds_of_searched_scales(
    name: str, double_quant: bool
) -> None:
    weight, hessian = normal(32, 192, seed=9), correlated(192)
    options: dict[str, Any] = {"codebook": name, "double_quant": double_quant}
    searched = quantize(weight, scale_search=True, **options)
    fed_back = quantize(weight, hessian=hessian, **options)
    assert error(fed_back, weight, hessian) < 0.66 * error(searched, weight, hessian)
    assert fed_back.bits_per_parameter == searched.bits_per_parameter
    assert to_tensors(fed_back).keys() == to_tensors(searched).keys()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 100), (2, 64), (64, 32)], ids=str)
def test_every_shape_is_no_worse_than_nearest(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, hessian = normal(*shape, seed=10, dtype=dtype), correlated(shape[1])
    fed_back = quantize(weight, hessian=hessian)
    assert fed_back.shape == weight.shape and fed_back.dtype == dtype
    # The damped error is what is minimised.
    least = gptq.damped(hessian, 0.01)
    assert error(fed_back, weight, least) <= error(quantize(weight), weight, least) * (1 + 1e-6)


def test_inputs_that_are_always_zero_are_no_obstacle() -> None:
    weight, hessian = normal(8, 64), correlated(64)
    hessian[5], hessian[:, 5] = 0, 0
    assert error(quantize(weight, hessian=hessian), weight, hessian) < error(
        quantize(weight), weight, hessian
    )
    nothing = quantize(weight, hessian=torch.zeros(64, 64))
    assert nothing.error(weight).mse <= quantize(weight, scale_search=True).error(weight).mse * 1.01


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_restores_the_same_bits(kind: str) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    tensor = quantize(normal(8, 128), kind, hessian=correlated(128))
    stored = {key.removeprefix("weight."): value for key, value in to_tensors(tensor).items()}
    packed = stored.pop("weight")
    state = bnb.functional.QuantState.from_dict(stored, device=torch.device("cpu"))
    assert torch.equal(bnb.functional.dequantize_4bit(packed, state), tensor.dequantize())


@pytest.mark.parametrize(
    "weight,hessian,message",
    [
        (normal(4, 64), torch.eye(32), r"shape \(K, K\)"),
        (normal(2, 4, 64), torch.eye(64), r"shape \(K, K\)"),
        (normal(4, 64), torch.full((64, 64), math.nan), "finite and symmetric"),
        (normal(4, 64), normal(64, 64), "finite and symmetric"),
    ],
)
def test_bad_moments_are_refused(weight: Tensor, hessian: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(weight, hessian=hessian)
