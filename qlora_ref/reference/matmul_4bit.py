"""A product with a 4-bit weight: restore the weight, then multiply.

This reads and writes the whole dense weight for each product. What the kernels add is that they
never do; the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qlora_ref.reference.dequantize_4bit import dequantize_4bit


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
    scales = (nested_absmax, nested_codebook, offset)
    weight = dequantize_4bit(packed, absmax, codebook, block_size, shape, x.dtype, *scales)
    with torch.autocast(x.device.type, enabled=False):  # the dtype of x decides, as in the kernels
        return torch.nn.functional.linear(x, weight.t() if transposed else weight, bias)
