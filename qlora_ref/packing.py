"""Two codes a byte: the only place where their order is defined.

    byte i = code[2i] * 16 + code[2i + 1]

The even element sits in the high nibble, as in bitsandbytes' files.
Read next: reference/dequantize_4bit.py.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_codes(codes: Tensor, filler: Tensor) -> Tensor:
    """Pack 4-bit codes in pairs.

    codes    uint8 (n,)            each below 16
    filler   uint8 ()              the low nibble of the last byte when n is odd
    returns  uint8 (ceil(n / 2),)
    """
    if codes.numel() % 2:
        codes = torch.cat([codes, filler.reshape(1)])
    return codes[0::2] << 4 | codes[1::2]


def unpack_codes(packed: Tensor, n: int) -> Tensor:
    """The inverse of `pack_codes`.

    packed   uint8 (ceil(n / 2),)
    returns  uint8 (n,)
    """
    return torch.stack([packed >> 4, packed & 15], dim=1).flatten()[:n]


def unpack_levels(packed: Tensor, codebook: Tensor, n: int) -> Tensor:
    """The levels of packed codes, `codebook[unpack_codes(packed, n)]`, with one look-up a byte.

    packed    uint8 (ceil(n / 2),)
    codebook  float32 (16,)
    returns   float32 (n,)
    """
    pairs = torch.cartesian_prod(codebook, codebook)  # (256, 2): row = byte
    return torch.nn.functional.embedding(packed.int(), pairs).flatten()[:n]


def gather_codes(packed: Tensor, positions: Tensor) -> Tensor:
    """The codes at some positions, without unpacking the others.

    packed     uint8 (ceil(n / 2),)
    positions  int64 (any shape)     each below n
    returns    uint8, the shape of positions
    """
    pairs = packed[positions // 2]
    return torch.where(positions % 2 == 0, pairs >> 4, pairs & 15)
