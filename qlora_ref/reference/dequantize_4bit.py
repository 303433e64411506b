"""4-bit codes to values: unpack, look up, scale."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qlora_ref.codebooks import DYNAMIC_BLOCK_SIZE
from qlora_ref.packing import unpack_levels
from qlora_ref.reference.blockwise import scale_blocks
from qlora_ref.reference.dequantize_8bit import dequantize_8bit


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    block_size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    nested_absmax: Tensor | None = None,
    nested_codebook: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """See ops.dequantize_4bit."""
    if nested_absmax is not None and nested_codebook is not None and offset is not None:
        decoded = (absmax, nested_absmax, nested_codebook, DYNAMIC_BLOCK_SIZE, torch.float32)
        absmax = dequantize_8bit(*decoded) + offset
    levels = unpack_levels(packed, codebook, math.prod(shape))
    return scale_blocks(levels, absmax, block_size).to(dtype).view(shape)
