"""One step of AdamW, with 32-bit or 8-bit moments.

Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization (arXiv 1711.05101), algorithm
2; 8-bit moments: Dettmers et al., 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qlora_ref.codebooks import DYNAMIC_BLOCK_SIZE
from qlora_ref.reference.dequantize_8bit import dequantize_8bit
from qlora_ref.reference.quantize_8bit import quantize_8bit


def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    first_absmaxes: Sequence[Tensor],
    second_absmaxes: Sequence[Tensor],
    first_codebook: Tensor | None,
    second_codebook: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """See ops.adamw_step."""
    options = (lr, beta1, beta2, eps, weight_decay, step)
    if first_codebook is None or second_codebook is None:
        for param, grad, m, v in zip(params, grads, first_moments, second_moments):
            _update(param, grad, m, v, *options)
        return
    for param, grad, m, v, m_absmax, v_absmax in zip(
        params, grads, first_moments, second_moments, first_absmaxes, second_absmaxes
    ):
        m32 = dequantize_8bit(m, m_absmax, first_codebook, DYNAMIC_BLOCK_SIZE, torch.float32)
        v32 = dequantize_8bit(v, v_absmax, second_codebook, DYNAMIC_BLOCK_SIZE, torch.float32)
        _update(param, grad, m32, v32, *options)  # with the moments as they are before rounding
        for codes, scales, moment, codebook in (
            (m, m_absmax, m32, first_codebook),
            (v, v_absmax, v32, second_codebook),
        ):
            new_codes, new_scales = quantize_8bit(moment, codebook, DYNAMIC_BLOCK_SIZE)
            codes.copy_(new_codes)
            scales.copy_(new_scales)


def _update(
    param: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    # Each product and sum is a float32 rounding of its own: a fused multiply-add here would give
    # other bits than the kernels. The scalars are worked out in double, then rounded once.
    step_size = lr / (1 - beta1**step)
    root_correction = (1 - beta2**step) ** -0.5
    gradient = grad.float()
    m.copy_(m * beta1 + gradient * (1 - beta1))
    v.copy_(v * beta2 + gradient * gradient * (1 - beta2))
    # MKL's float32 square root is off by a bit in one case in 140; rounded from double it never is.
    root = v.double().sqrt().float()
    denominator = root * root_correction + eps
    decayed = param.float() * (1 - lr * weight_decay)
    param.copy_(decayed - m / denominator * step_size)
