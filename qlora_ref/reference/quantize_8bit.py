"""Values to 8-bit codes: divide by absmax, take the nearest of 256 levels."""

from __future__ import annotations

from torch import Tensor

from qlora_ref.reference.blockwise import nearest_codes


def quantize_8bit(x: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """See ops.quantize_8bit."""
    codes, absmax = nearest_codes(x, codebook, block_size)
    return codes.view(x.shape), absmax
