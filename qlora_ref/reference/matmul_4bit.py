"""A product with a 4-bit weight: restore the weight, then multiply.

This reads and writes the whole dense weight for each product. What the kernels add is that they
never do; the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qlora_ref.codebooks import DYNAMIC_BLOCK_SIZE
from qlora_ref.reference.dequantize_4bit import dequantize_4bit
from qlora_ref.reference.dequantize_8bit import dequantize_8bit


def matmul_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    block_size: int,
    shape: Sequence[int],
    bias: Tensor | None,
    transposed: bool,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    """See ops.matmul_4bit."""
    if nested_absmax is not None and nested_codebook is not None and offset is not None:
        decoded = (absmax, nested_absmax, nested_codebook, DYNAMIC_BLOCK_SIZE, torch.float32)
        absmax = dequantize_8bit(*decoded) + offset
    weight = dequantize_4bit(packed, absmax, codebook, block_size, shape, x.dtype)  # (N, K)
    with torch.autocast(x.device.type, enabled=False):  # the dtype of x decides, as in the kernels
        return torch.nn.functional.linear(x, weight.t() if transposed else weight, bias)
