"""4-bit codes to values: unpack, look up, scale."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qlora_ref.packing import unpack_levels
from qlora_ref.reference.blockwise import scale_blocks


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    block_size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """See ops.dequantize_4bit."""
    levels = unpack_levels(packed, codebook, math.prod(shape))
    return scale_blocks(levels, absmax, block_size).to(dtype).view(shape)
