"""What every blockwise quantiser does: divide each block by its absmax, take the nearest level."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_ref.codebooks import decision_thresholds


def nearest_codes(x: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """The code of each value: the level nearest to x / absmax of its block.

    x           float (any shape)
    codebook    float32 (16,) or (256,)
    returns     codes   uint8 (n,)
                absmax  float32 (ceil(n / block_size),)
    """
    blocks = split_blocks(x.flatten().float(), block_size)
    absmax = blocks.abs().amax(dim=1) if len(blocks) else blocks.new_empty(0)
    return codes_under_scales(x, absmax, codebook, block_size), absmax


def codes_under_scales(x: Tensor, scales: Tensor, codebook: Tensor, block_size: int) -> Tensor:
    """The code of each value under given scales: the level nearest to x / scale of its block.

    x           float (any shape)
    scales      float32 (ceil(n / block_size),)    of any sign
    codebook    float32 (16,) or (256,)
    returns     uint8 (n,)
    """
    blocks = split_blocks(x.flatten().float(), block_size)
    thresholds, codes = decision_thresholds(codebook)
    # bucketize counts the thresholds below a value, but puts a NaN above all of them. `x > t`
    # holds for no threshold then, here as in every kernel.
    normalised = normalise(blocks, scales[:, None]).nan_to_num_(nan=-torch.inf)
    positions = torch.bucketize(normalised.flatten()[: x.numel()], thresholds, out_int32=True)
    return codes[positions]


def scale_blocks(levels: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    """levels[i] * absmax[i // block_size], one float32 product.

    levels   float32 (n,)
    absmax   float32 (ceil(n / block_size),)
    returns  float32 (n,)
    """
    return (split_blocks(levels, block_size) * absmax[:, None]).flatten()[: levels.numel()]


def split_blocks(x: Tensor, block_size: int) -> Tensor:
    """The blocks of x (n,) as rows; a short last one is filled up with zeros."""
    # Zeros that fill up a short last block change no absmax and are cut off again. A lone block is
    # not filled up: its size may be anything.
    block_size = min(block_size, max(1, x.numel()))
    missing = -x.numel() % block_size
    if missing:
        x = torch.nn.functional.pad(x, (0, missing))
    return x.view(-1, block_size)


def normalise(blocks: Tensor, absmax: Tensor) -> Tensor:
    """The blocks, each divided by its scale: blocks (blocks, size) / absmax (blocks, 1)."""
    # One reciprocal a block and one product a value is what bitsandbytes does, and rounds
    # differently from a quotient. It overflows for absmax < 2^-128: there the quotient keeps the
    # block's shape. A zero block stays zero.
    reciprocal = 1.0 / absmax
    normalised = blocks * reciprocal
    overflowed = torch.isinf(reciprocal)
    if overflowed.any():
        quotient = torch.where(absmax == 0, 0.0, blocks / absmax)
        normalised = torch.where(overflowed, quotient, normalised)
    return normalised
