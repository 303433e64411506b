"""The codebooks under study: those of the library, and others that papers compare them with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qlora_ref import ops
from qlora_ref.codebooks import (
    CODEBOOKS,
    CODES_4BIT,
    CODES_8BIT,
    dynamic_codebook,
    has_signed_scales,
    normal_float_codebook,
    resolve_codebook,
)
from qlora_ref.quantized import quantize


@dataclass(frozen=True)
class Format:
    """A codebook with a name, and one line on what it is.

    make    its levels for a block size, float32 (2 to 256,); most are the same for all
    signed  the scale is the value of largest magnitude with its sign, see `expected_error`
    """

    name: str
    make: Callable[[int], Tensor]
    says: str
    signed: bool = False

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return (self.make(64).unique().numel() - 1).bit_length()

    def restored(self, x: Tensor, block_size: int) -> Tensor:
        """The values of x after this library has quantised and restored them; float32."""
        if self.name in CODEBOOKS:
            return quantize(x, self.name, block_size).dequantize(torch.float32)
        levels = self.make(block_size)
        size = CODES_4BIT if levels.numel() <= CODES_4BIT else CODES_8BIT
        # The last level is repeated up to the number of entries that operations take.
        table = torch.cat([levels, levels[-1:].expand(size - levels.numel())])
        if size == CODES_8BIT:
            codes, absmax = ops.quantize_8bit(x, table, block_size)
            return ops.dequantize_8bit(codes, absmax, table, block_size)
        packed, absmax = ops.quantize_4bit(x, table, block_size)
        return ops.dequantize_4bit(packed, absmax, table, block_size, x.shape)


LIBRARY_FORMATS = {
    "nf4": "quantiles of N(0, 1), exact zero, 7 negative and 8 positive levels",
    "fp4": "bitsandbytes' E2M1, smallest level 1/192",
    "fp4_ocp": "E2M1 of the OCP standard, smallest level 1/12",
    "int4": "-7/7 ... 7/7",
    "af4": "Yoshida's table for blocks of 64",
    "nf3": "NF4's rule and offset with 3 bits",
    "nf2": "NF4's rule and offset with 2 bits",
    "bof4": "least squared error for the block size, with -1, 0 and 1 (arXiv 2505.06653)",
    "bof4_s": "the same with signed scales: 0 and 1 are levels, -1 is none",
    "bof3_s": "the same with 3 bits",
    "bof2_s": "the same with 2 bits",
}


def study_formats() -> list[Format]:
    """Every codebook whose error the study works out, those of 4 bits first."""
    own = [
        Format(name, partial(_of_library, name), says, has_signed_scales(name))
        for name, says in LIBRARY_FORMATS.items()
    ]
    others = [
        _fixed("int4_16", torch.linspace(-1, 1, 16), "16 even levels from -1 to 1, none of them 0"),
        _fixed("fp4_e3m0", e3m0_levels(), "a sign and 7 powers of two"),
        _fixed("int3", torch.arange(-3, 4) / 3, "-3/3 ... 3/3"),
        _fixed("int2", torch.arange(-1, 2) / 1, "-1, 0, 1"),
        _fixed("nf3_yoshida", _yoshida(3), "the rule with the offset that 3 bits call for"),
        _fixed("nf2_yoshida", _yoshida(2), "the rule with the offset that 2 bits call for"),
        _fixed("nf8", normal_float_codebook(8), "NF4's rule and offset with 8 bits"),
        _fixed("nf8_yoshida", _yoshida(8), "the rule with the offset that 8 bits call for"),
        _fixed("int8", torch.arange(-127, 128) / 127, "-127/127 ... 127/127"),
        _fixed("dynamic8", dynamic_codebook(), "the 8-bit map of nested scales; -1 is no level"),
    ]
    return sorted(own + others, key=lambda form: {4: 0, 3: 1, 2: 2, 8: 3}[form.bits])


def _of_library(name: str, block_size: int) -> Tensor:
    return resolve_codebook(name, block_size)[1]


def _fixed(name: str, levels: Tensor, says: str) -> Format:
    return Format(name, lambda block_size: levels, says)


def e3m0_levels() -> Tensor:
    """A sign and three exponent bits, no mantissa: 0 and +-2^-6 ... 2^0; float32 (15,)."""
    powers = 2.0 ** torch.arange(-6, 1)
    return torch.cat([-powers.flip(0), torch.zeros(1), powers])


def _yoshida(bits: int) -> Tensor:
    # 1 - the mean of half a bin's mass of a code of 2^k levels and of one of 2^k - 1.
    count = 2**bits
    return normal_float_codebook(bits, 1 - (1 / (2 * count) + 1 / (2 * (count - 1))) / 2)
