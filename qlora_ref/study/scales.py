"""Ways to hold the scales of blocks in fewer than 32 bits, and how well they keep them."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_ref import ops
from qlora_ref.codebooks import dynamic_codebook

GROUP = 256  # scales that share one of their own
_E4M3_MAX = 448.0  # the largest number of float8_e4m3fn


def scale_errors(absmax: Tensor) -> list[tuple[str, float, float, float]]:
    """Each way of holding scales: its name, bits a weight, rms and largest relative error.

    absmax  float32 (blocks,)   of blocks of 64; a multiple of 256 of them
    """
    groups = absmax.double().view(-1, GROUP)
    ways = {
        "float32": (32.0, groups),
        "bfloat16": (16.0, absmax.bfloat16().double().view_as(groups)),
        "8-bit dynamic map of scale - mean (bitsandbytes, here)": (_grouped(32), _dynamic(absmax)),
        "8-bit integers of scale - mean": (_grouped(32), _integers(groups)),
        "8-bit unsigned from smallest to largest": (_grouped(64), _between_ends(groups)),
        "E4M3 of scale - mean": (_grouped(32), _e4m3(groups - groups.mean()) + groups.mean()),
        "E4M3 of the scale": (_grouped(32), _e4m3(groups)),
    }
    found = []
    for name, (bits, restored) in ways.items():
        relative = (restored.view_as(groups) / groups - 1).abs()
        rms = relative.square().mean().sqrt().item()
        found.append((name, bits / 64, rms, relative.max().item()))
    return found


def _grouped(bits_a_group: int) -> float:
    return 8 + bits_a_group / GROUP


def _dynamic(absmax: Tensor) -> Tensor:
    offset = absmax.double().mean().float()
    table = dynamic_codebook()
    codes, scales = ops.quantize_8bit(absmax - offset, table, GROUP)
    return (ops.dequantize_8bit(codes, scales, table, GROUP) + offset).double()


def _integers(groups: Tensor) -> Tensor:
    centred = groups - groups.mean()
    step = centred.abs().amax(dim=1, keepdim=True) / 127
    return torch.round(centred / step) * step + groups.mean()


def _between_ends(groups: Tensor) -> Tensor:
    lowest, highest = groups.amin(dim=1, keepdim=True), groups.amax(dim=1, keepdim=True)
    step = (highest - lowest) / 255
    return torch.round((groups - lowest) / step) * step + lowest


def _e4m3(groups: Tensor) -> Tensor:
    scale = groups.abs().amax(dim=1, keepdim=True) / _E4M3_MAX
    return (groups / scale).to(torch.float8_e4m3fn).double() * scale
