"""One step of AdamW, a launch for each tensor; 8-bit moments are restored and quantised in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .decode import round_to, widen
from .launch import OPTIONS, rows_of
from .nearest import NearestTable, largest_magnitude, nearest_code, nearest_table, normalise

BLOCK_SIZE = 256  # 8-bit values that share a scale


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
    """See qlora_ref/ops.py."""
    step_size = lr / (1 - beta1**step)
    root_correction = (1 - beta2**step) ** -0.5
    rule = (beta1, 1 - beta1, beta2, 1 - beta2, eps, 1 - lr * weight_decay)
    options = (*rule, step_size, root_correction)
    tensors = list(zip(params, grads, first_moments, second_moments))
    if first_codebook is None or second_codebook is None:
        for param, grad, m, v in tensors:
            if (n := param.numel()) > 0:
                width = rows_of(1, n)
                grid = (triton.cdiv(n, width),)
                _step[grid](param, grad.contiguous(), m, v, n, *options, WIDTH=width, **OPTIONS)
        return
    codebooks = (first_codebook, second_codebook)
    for tensor, absmaxes in zip(tensors, zip(first_absmaxes, second_absmaxes)):
        if tensor[0].numel() > 0:
            _step_8bit_tensor(*tensor, absmaxes, codebooks, options)


def _step_8bit_tensor(
    param: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    absmaxes: tuple[Tensor, Tensor],
    codebooks: tuple[Tensor, Tensor],
    options: tuple[float, ...],
) -> None:
    n, blocks = param.numel(), len(absmaxes[0])
    rows = rows_of(BLOCK_SIZE, blocks)
    first, second = (nearest_table(codebook) for codebook in codebooks)
    _step_8bit[(triton.cdiv(blocks, rows),)](
        *(param, grad.contiguous(), m, v, *absmaxes, *codebooks),
        *(*first.tensors(), *second.tensors()),
        *(n, *options),
        ROWS=rows,
        **_constants("FIRST", first),
        **_constants("SECOND", second),
        **OPTIONS,
    )


def _constants(prefix: str, table: NearestTable) -> dict[str, Any]:
    return {f"{prefix}_{name}": value for name, value in table.constants().items()}


@triton.jit
def _update(
    param,
    grad,
    m,
    v,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    decay,
    step_size,
    root_correction,
):
    """The new parameters and moments; every product and sum is rounded by itself.

    m' = m beta1 + grad (1 - beta1)        v' = v beta2 + grad^2 (1 - beta2)
    param' = param (1 - lr weight_decay) - m' / (sqrt(v') root_correction + eps) step_size
    """
    m = m * beta1 + grad * one_minus_beta1
    v = v * beta2 + grad * grad * one_minus_beta2
    denominator = tl.sqrt_rn(v) * root_correction + eps
    return param * decay - tl.div_rn(m, denominator) * step_size, m, v


@triton.jit
def _step(
    param_ptr,  # (n,)
    grad_ptr,  # (n,)
    m_ptr,  # float32 (n,)
    v_ptr,  # float32 (n,)
    n,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    decay,
    step_size,
    root_correction,
    WIDTH: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    mask = position < n
    param, m, v = _update(
        widen(tl.load(param_ptr + position, mask=mask, other=0.0)),
        widen(tl.load(grad_ptr + position, mask=mask, other=0.0)),
        tl.load(m_ptr + position, mask=mask, other=0.0),
        tl.load(v_ptr + position, mask=mask, other=0.0),
        beta1,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        eps,
        decay,
        step_size,
        root_correction,
    )
    tl.store(param_ptr + position, round_to(param, param_ptr.dtype.element_ty), mask=mask)
    tl.store(m_ptr + position, m, mask=mask)
    tl.store(v_ptr + position, v, mask=mask)


@triton.jit
def _step_8bit(
    param_ptr,  # (n,)
    grad_ptr,  # (n,)
    m_ptr,  # uint8 (n,)
    v_ptr,  # uint8 (n,)
    m_absmax_ptr,  # float32 (ceil(n / 256),)
    v_absmax_ptr,  # float32 (ceil(n / 256),)
    first_codebook_ptr,  # float32 (256,)
    second_codebook_ptr,  # float32 (256,)
    first_entries_ptr,  # of a NearestTable, as are the next two
    first_thresholds_ptr,
    first_codes_ptr,
    second_entries_ptr,
    second_thresholds_ptr,
    second_codes_ptr,
    n,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    decay,
    step_size,
    root_correction,
    ROWS: tl.constexpr,
    FIRST_SHIFT: tl.constexpr,
    FIRST_COMPARES: tl.constexpr,
    SECOND_SHIFT: tl.constexpr,
    SECOND_COMPARES: tl.constexpr,
):
    """A row of a tile is a block of 256: what shares a scale is in one program."""
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    position = block[:, None] * 256 + tl.arange(0, 256)[None, :]
    mask = position < n
    is_block = block * 256 < n
    param, m, v = _update(
        widen(tl.load(param_ptr + position, mask=mask, other=0.0)),
        widen(tl.load(grad_ptr + position, mask=mask, other=0.0)),
        _restore(m_ptr, m_absmax_ptr, first_codebook_ptr, position, mask, block, is_block),
        _restore(v_ptr, v_absmax_ptr, second_codebook_ptr, position, mask, block, is_block),
        beta1,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        eps,
        decay,
        step_size,
        root_correction,
    )
    tl.store(param_ptr + position, round_to(param, param_ptr.dtype.element_ty), mask=mask)
    _quantize(
        m, m_ptr, m_absmax_ptr, first_entries_ptr, first_thresholds_ptr, first_codes_ptr,
        position, mask, block, is_block,
        FIRST_SHIFT, FIRST_COMPARES,
    )  # fmt: skip
    _quantize(
        v, v_ptr, v_absmax_ptr, second_entries_ptr, second_thresholds_ptr, second_codes_ptr,
        position, mask, block, is_block,
        SECOND_SHIFT, SECOND_COMPARES,
    )  # fmt: skip


@triton.jit
def _quantize(
    moment,  # float32 (ROWS, 256)
    y_ptr,
    absmax_ptr,
    entries_ptr,
    thresholds_ptr,
    codes_ptr,
    position,
    mask,
    block,
    is_block,
    SHIFT: tl.constexpr,
    COMPARES: tl.constexpr,
):
    """A new moment's scales and codes, stored."""
    moment = tl.where(mask, moment, 0.0)  # what lies beyond the end has no say in a scale
    absmax = largest_magnitude(moment, 1)
    tl.store(absmax_ptr + block, absmax, mask=is_block)
    code = nearest_code(
        normalise(moment, absmax),
        entries_ptr,
        thresholds_ptr,
        codes_ptr,
        SHIFT,
        COMPARES,
    )
    tl.store(y_ptr + position, code.to(tl.uint8), mask=mask)


@triton.jit
def _restore(codes_ptr, absmax_ptr, codebook_ptr, position, mask, block, is_block):
    """The values of a moment: float32 (ROWS, 256)."""
    code = tl.load(codes_ptr + position, mask=mask, other=0).to(tl.int32)
    scale = tl.load(absmax_ptr + block, mask=is_block, other=0.0)
    return tl.load(codebook_ptr + code) * scale[:, None]
