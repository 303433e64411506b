"""8-bit codes to values: look up, scale."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_ref.reference.blockwise import scale_blocks


def dequantize_8bit(
    codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int, dtype: torch.dtype
) -> Tensor:
    """See ops.dequantize_8bit."""
    levels = codebook[codes.flatten().int()]
    return scale_blocks(levels, absmax, block_size).to(dtype).view(codes.shape)
