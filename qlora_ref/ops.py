"""The operations and their contracts.

Each function here says what is computed, checks its arguments (checks.py), and calls the operator
of the same name in torch_library.py, which runs the backend that dispatch.py selects. All backends
give the same bits for the same input, but for `matmul_4bit`, whose sums may be ordered freely.
Tensors that are not contiguous are copied first.

Read next: dispatch.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qlora_ref import torch_library as _library
from qlora_ref.checks import (
    check_absmaxes,
    check_bias,
    check_block_size,
    check_dtype,
    check_features,
    check_float,
    check_gradients,
    check_memory,
    check_moments,
    check_nested,
    check_one_device,
    check_output_dtype,
    check_packed,
    check_scales,
    check_shape,
    check_step,
    check_table,
)
from qlora_ref.codebooks import CODES_4BIT, CODES_8BIT, DYNAMIC_BLOCK_SIZE


def quantize_4bit(
    x: Tensor, codebook: Tensor, block_size: int = 64, check_finite: bool = True
) -> tuple[Tensor, Tensor]:
    """Quantise to 4-bit codes: code[i] = nearest level to x[i] / absmax[i // block_size].

    x             float32, bfloat16, float16 (any)   n values, read row by row
    codebook      float32 (16,)                      e.g. nf4_codebook()
    block_size    int, even, >= 2                    values that share a scale; blocks cross rows
    check_finite  bool                               False: NaN and inf give some code, not an error
    returns       packed  uint8 (ceil(n / 2),)             two codes a byte, the even one high
                  absmax  float32 (ceil(n / block_size),)  largest magnitude of each block

    The quotient is x * (1 / absmax) in float32 (x / absmax where 1 / absmax overflows); a tie goes
    to the lower level; a block of zeros takes the code of the level 0, and so does the low nibble
    after an odd n. Of equal levels the lowest code is written.

    Raises TypeError for dtypes, ValueError for sizes and for a value that is not finite.
    Source: QLoRA (arXiv 2305.14314), section 3; equation 1 with 16 quantile levels.
    """
    check_float("x", x)
    check_table("codebook", codebook, CODES_4BIT)
    check_block_size(block_size)
    check_one_device(x, codebook)
    packed, absmax = _library.quantize_4bit(
        x.detach().contiguous(), codebook.contiguous(), block_size, check_finite
    )
    return packed, absmax


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    block_size: int,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    nested_absmax: Tensor | None = None,
    nested_codebook: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """Restore values from 4-bit codes: y[i] = codebook[code[i]] * absmax[i // block_size].

    packed           uint8 (ceil(n / 2),)      two codes a byte, the even one high
    absmax           float32 (blocks,)         scales; or uint8 (blocks,), their codes, when nested
    codebook         float32 (16,)
    block_size       int, even, >= 2           blocks = ceil(n / block_size)
    shape            n = its product
    dtype            float32, bfloat16 or float16
    nested_absmax    float32 (ceil(blocks / 256),)   these three together: scales are
    nested_codebook  float32 (256,)                  nested_codebook[absmax] * nested_absmax
    offset           float32 ()                      + offset, each step rounded to float32
    returns          dtype (shape)             one float32 product, rounded once to dtype

    Raises TypeError for dtypes, ValueError for sizes that do not fit together.
    """
    check_shape(shape)
    n = math.prod(shape)
    check_packed(packed, absmax, codebook, block_size, n)
    check_nested(absmax, nested_absmax, nested_codebook, offset)
    check_output_dtype(dtype)
    check_one_device(packed, absmax, codebook, nested_absmax, nested_codebook, offset)
    return _library.dequantize_4bit(
        packed.contiguous(),
        absmax.contiguous(),
        codebook.contiguous(),
        block_size,
        shape,
        dtype,
        _contiguous(nested_absmax),
        _contiguous(nested_codebook),
        _contiguous(offset),
    )


def quantize_8bit(
    x: Tensor, codebook: Tensor, block_size: int = DYNAMIC_BLOCK_SIZE, check_finite: bool = True
) -> tuple[Tensor, Tensor]:
    """Quantise to 8-bit codes: code[i] = nearest level to x[i] / absmax[i // block_size].

    x             float32, bfloat16, float16 (any)   n values, read row by row
    codebook      float32 (256,)                     e.g. dynamic_codebook()
    block_size    int, even, >= 2
    check_finite  bool                               as in quantize_4bit
    returns       codes   uint8 (shape of x)
                  absmax  float32 (ceil(n / block_size),)

    The rule is that of `quantize_4bit`: the exact nearest level, ties to the lower one.
    Raises TypeError for dtypes, ValueError for sizes and for a value that is not finite.
    """
    check_float("x", x)
    check_table("codebook", codebook, CODES_8BIT)
    check_block_size(block_size)
    check_one_device(x, codebook)
    codes, absmax = _library.quantize_8bit(
        x.detach().contiguous(), codebook.contiguous(), block_size, check_finite
    )
    return codes, absmax


def dequantize_8bit(
    codes: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    block_size: int = DYNAMIC_BLOCK_SIZE,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Restore values from 8-bit codes: y[i] = codebook[codes[i]] * absmax[i // block_size].

    codes       uint8 (any)                      n codes
    absmax      float32 (ceil(n / block_size),)
    codebook    float32 (256,)
    block_size  int, even, >= 2
    dtype       float32, bfloat16 or float16
    returns     dtype (shape of codes)           one float32 product, rounded once to dtype

    Raises TypeError for dtypes, ValueError for sizes that do not fit together.
    """
    check_dtype("codes", codes, torch.uint8)
    check_dtype("absmax", absmax, torch.float32)
    check_table("codebook", codebook, CODES_8BIT)
    check_block_size(block_size)
    check_scales("absmax", absmax, codes.numel(), block_size)
    check_output_dtype(dtype)
    check_one_device(codes, absmax, codebook)
    return _library.dequantize_8bit(
        codes.contiguous(), absmax.contiguous(), codebook.contiguous(), block_size, dtype
    )


def matmul_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    block_size: int,
    shape: Sequence[int],
    bias: Tensor | None = None,
    transposed: bool = False,
    nested_absmax: Tensor | None = None,
    nested_codebook: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """Multiply by a 4-bit weight W (N, K): y = x W^T + bias, or y = x W when transposed.

    x                float32, bfloat16, float16 (..., K)   (..., N) when transposed
    packed           uint8 (ceil(N K / 2),)
    absmax           float32 (blocks,)        scales; or uint8 (blocks,), their codes, when nested
    codebook         float32 (16,)
    block_size       int, even, >= 2          blocks = ceil(N K / block_size)
    shape            (N, K)
    bias             dtype of x (N,) or None  not with transposed
    transposed       bool                     the gradient of the product with respect to its input
    nested_absmax    float32 (ceil(blocks / 256),)   as in dequantize_4bit
    nested_codebook  float32 (256,)
    offset           float32 ()
    returns          dtype of x (..., N)             (..., K) when transposed

    W is restored as by `dequantize_4bit`, in float32 or rounded once to the dtype of x; products
    are summed in float32, the bias is added in float32, the sum is rounded once. The error against
    the float64 product with the float32 W is at most twice that of `torch.matmul` with the W of
    `dequantize_4bit` in the dtype of x; where CUDA's tensor cores multiply many tokens, levels and
    scales are rounded to that dtype as well, levels alone where AVX-512 BF16 multiplies few, and it
    is at most three times that error. AVX-512 BF16 and AMX take bfloat16 numbers below 2^-126 for
    zero; AMX makes float32 weights of three such numbers, the last 2^-16 of the weight. On CUDA
    few tokens in 16 bits are multiplied by levels before these are scaled: of a codebook whose
    levels are far from 1 in size, such as 2^100, the sums overflow or lose bits there.
    Differentiable, any number of times, with respect to x and bias; `torch.func.vmap` works over x.

    Raises TypeError for dtypes, ValueError for sizes that do not fit together.
    Source: QLoRA (arXiv 2305.14314), equations 5 and 6.
    """
    check_float("x", x)
    if len(shape) != 2:
        raise ValueError(f"shape must be (N, K), got {tuple(shape)}")
    check_shape(shape)
    rows, columns = shape
    check_packed(packed, absmax, codebook, block_size, rows * columns)
    check_features(x, rows if transposed else columns, "N" if transposed else "K")
    check_nested(absmax, nested_absmax, nested_codebook, offset)
    if bias is not None:
        check_bias(bias, x, rows, transposed)
    check_one_device(x, packed, absmax, codebook, bias, nested_absmax, nested_codebook, offset)
    return _library.matmul_4bit(
        x.contiguous(),
        packed.contiguous(),
        absmax.contiguous(),
        codebook.contiguous(),
        block_size,
        shape,
        _contiguous(bias),
        transposed,
        _contiguous(nested_absmax),
        _contiguous(nested_codebook),
        _contiguous(offset),
    )


def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    first_absmaxes: Sequence[Tensor] = (),
    second_absmaxes: Sequence[Tensor] = (),
    first_codebook: Tensor | None = None,
    second_codebook: Tensor | None = None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """One step of AdamW on a list of parameters, in place.

        m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
        p = (1 - lr weight_decay) p - m / (sqrt(v) c + eps) s
            where s = lr / (1 - beta1^step),  c = (1 - beta2^step)^(-1/2)

    params           float32, bfloat16, float16     changed in place
    grads            float                          of the params' shapes
    first_moments    float32, or uint8 codes        m, changed in place; shapes of the params
    second_moments   float32, or uint8 codes        v, changed in place
    first_absmaxes   float32 (ceil(n / 256),) each  scales of 8-bit moments, changed in place;
    second_absmaxes                                 none for 32-bit moments
    first_codebook   float32 (256,) or None         dynamic_codebook(signed=True) for 8-bit moments
    second_codebook  float32 (256,) or None         dynamic_codebook(signed=False)
    step             int, >= 1                      number of this step

    A gradient may be its own parameter or a moment of it; otherwise no two tensors share memory.

    Everything is float32, in the order of the formula, without fused multiply-adds; s, c and the
    factors of the betas are worked out in float64 and rounded once, p is rounded once to its
    dtype. 8-bit moments are restored, updated, used, then quantised anew to the nearest level in
    blocks of 256. Where gradient and moments are 0, p only decays, given
    eps > 0 (0 / 0 otherwise).

    Raises TypeError for dtypes, ValueError for sizes, for a parameter that is listed twice, and, on
    the CPU, for memory that is shared or cannot be written.
    Source: Loshchilov and Hutter (arXiv 1711.05101), algorithm 2; 8-bit: Dettmers et al. (arXiv
    2110.02861).
    """
    check_gradients(params, grads)
    eight_bit = check_absmaxes(
        params, first_absmaxes, second_absmaxes, first_codebook, second_codebook
    )
    dtype = torch.uint8 if eight_bit else torch.float32
    shapes = [param.shape for param in params]
    check_moments(shapes, first_moments, "first_moments", dtype)
    check_moments(shapes, second_moments, "second_moments", dtype)
    check_step(step)
    changed = [*params, *first_moments, *second_moments, *first_absmaxes, *second_absmaxes]
    read = (
        (grad, own)
        for grad, *own in zip(grads, params, first_moments, second_moments)
        if _library.has_memory(grad) and grad.is_contiguous()
    )
    check_memory(filter(_library.has_memory, changed), read)
    if params:
        _library.adamw_step(
            params,
            [(grad.detach() if grad.requires_grad else grad).contiguous() for grad in grads],
            first_moments,
            second_moments,
            first_absmaxes,
            second_absmaxes,
            first_codebook,
            second_codebook,
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            step,
        )


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
