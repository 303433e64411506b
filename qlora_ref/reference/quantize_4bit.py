"""Values to 4-bit codes: divide by absmax, take the nearest level, pack two a byte."""

from __future__ import annotations

from torch import Tensor

from qlora_ref.packing import pack_codes
from qlora_ref.reference.blockwise import nearest_codes


def quantize_4bit(x: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """See ops.quantize_4bit."""
    codes, absmax = nearest_codes(x, codebook, block_size)
    zero = (codebook == 0).byte().argmax().to(codes.dtype)  # what an odd last byte is filled with
    return pack_codes(codes, filler=zero), absmax
