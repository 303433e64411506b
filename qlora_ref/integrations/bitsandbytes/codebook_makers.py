"""The tables that bitsandbytes makes: 256 levels, ascending, filled up with zeros."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_ref.codebooks import NORMAL_FLOAT_OFFSET, normal_quantiles

_LEVELS = 256


def create_dynamic_map(
    signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8
) -> Tensor:
    """Dynamic tree quantisation: a decade of 10 for each exponent bit, linear cells in each.

    Source: Dettmers et al. (arXiv 2110.02861), section 1.3; codebooks.dynamic_codebook.
    """
    bits = total_bits - 1
    positive = [torch.ones(1, dtype=torch.float32)]
    for decade in range(max_exponent_bits):
        cells = 2 ** (decade + bits - max_exponent_bits + (0 if signed else 1))
        edges = torch.linspace(0.1, 1.0, int(cells) + 1, dtype=torch.float32)
        scale = 10.0 ** (decade - (max_exponent_bits - 1))
        positive.append((edges[:-1] + edges[1:]) / 2 * scale)
    negative = [-centres for centres in positive[1:]] if signed else []
    zero = torch.zeros(1, dtype=torch.float32)
    return _filled(torch.cat([*negative, zero, *positive]))


def create_fp8_map(
    signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = 8
) -> Tensor:
    """The values of a small floating-point format with subnormals, over the largest of them.

    The subnormals are a quarter of what IEEE 754 would make them, as in bitsandbytes: codes that
    were stored with its table mean the same here.
    """
    if exponent_bits + precision_bits + signed != total_bits:
        raise ValueError(
            f"{exponent_bits} + {precision_bits} bits and a sign ({signed}) are not {total_bits}"
        )
    bias = 2 ** (exponent_bits - 1)
    fractions = torch.arange(2**precision_bits, dtype=torch.float64) / 2**precision_bits
    values = [fractions * 2.0 ** -(bias + 2)]
    values += [(1 + fractions) * 2.0 ** (e - bias - 1) for e in range(1, 2**exponent_bits)]
    positive = torch.cat(values)
    table = torch.cat([positive, -positive]) if signed else positive
    return _filled((table / table.max()).float())


def create_linear_map(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> Tensor:
    """Levels in equal steps from -1 (or 0, unsigned) to 1."""
    with_zero = signed and (add_zero or total_bits < 8)  # an odd number of steps meets 0
    count = 2**total_bits - with_zero
    return _filled(torch.linspace(-1.0 if signed else 0.0, 1.0, count, dtype=torch.float32))


def create_normal_map(offset: float = NORMAL_FLOAT_OFFSET, use_extra_value: bool = True) -> Tensor:
    """Quantiles of the normal distribution, as NF4 has them, over the largest."""
    negative = -normal_quantiles(offset, 7)
    positive = normal_quantiles(offset, 8 if use_extra_value else 7)
    table = _filled(torch.cat([positive, negative]))
    return table / table.max()


def _filled(levels: Tensor) -> Tensor:
    zeros = levels.new_zeros(max(0, _LEVELS - levels.numel()))
    return torch.cat([levels, zeros]).sort().values
