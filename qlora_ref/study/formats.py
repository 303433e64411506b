"""The codebooks under study: those of the library, and others that papers compare them with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_ref import ops
from qlora_ref.codebooks import (
    CODEBOOKS,
    CODES_4BIT,
    CODES_8BIT,
    dynamic_codebook,
    normal_float_codebook,
)


@dataclass(frozen=True)
class Format:
    """A codebook with a name, and one line on what it is.

    levels  float32 (2 to 256,)
    signed  the scale is the value of largest magnitude with its sign, see `expected_error`
    """

    name: str
    levels: Tensor
    says: str
    signed: bool = False

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return max(2, (self.levels.unique().numel() - 1).bit_length())

    def restored(self, x: Tensor, block_size: int) -> Tensor:
        """The values of x after this library has quantised and restored them; float32."""
        table = self._filled()
        if table.numel() == CODES_8BIT:
            codes, absmax = ops.quantize_8bit(x, table, block_size)
            return ops.dequantize_8bit(codes, absmax, table, block_size)
        packed, absmax = ops.quantize_4bit(x, table, block_size)
        return ops.dequantize_4bit(packed, absmax, table, block_size, x.shape)

    def _filled(self) -> Tensor:
        """The levels, the last one repeated up to the 16 or 256 entries that operations take."""
        size = CODES_4BIT if self.levels.numel() <= CODES_4BIT else CODES_8BIT
        return torch.cat([self.levels, self.levels[-1:].expand(size - self.levels.numel())])


LIBRARY_FORMATS = {
    "nf4": "quantiles of N(0, 1), exact zero, 7 negative and 8 positive levels",
    "fp4": "bitsandbytes' E2M1, smallest level 1/192",
    "fp4_ocp": "E2M1 of the OCP standard, smallest level 1/12",
    "int4": "-7/7 ... 7/7",
    "af4": "Yoshida's table for blocks of 64",
    "nf3": "NF4's rule and offset with 3 bits",
    "nf2": "NF4's rule and offset with 2 bits",
}


def study_formats() -> list[Format]:
    """Every codebook whose error the study works out, those of 4 bits first."""
    own = [Format(name, CODEBOOKS[name](), says) for name, says in LIBRARY_FORMATS.items()]
    others = [
        Format("int4_16", torch.linspace(-1, 1, 16), "16 even levels from -1 to 1, none of them 0"),
        Format("fp4_e3m0", e3m0_levels(), "a sign and 7 powers of two"),
        Format("int3", torch.arange(-3, 4) / 3, "-3/3 ... 3/3"),
        Format("int2", torch.arange(-1, 2) / 1, "-1, 0, 1"),
        Format("nf3_yoshida", _yoshida(3), "the rule with the offset that 3 bits call for"),
        Format("nf2_yoshida", _yoshida(2), "the rule with the offset that 2 bits call for"),
        Format("nf8", normal_float_codebook(8), "NF4's rule and offset with 8 bits"),
        Format("nf8_yoshida", _yoshida(8), "the rule with the offset that 8 bits call for"),
        Format("int8", torch.arange(-127, 128) / 127, "-127/127 ... 127/127"),
        Format("dynamic8", dynamic_codebook(), "the 8-bit map of nested scales; -1 is no level"),
    ]
    return sorted(own + others, key=lambda form: {4: 0, 3: 1, 2: 2, 8: 3}[form.bits])


def e3m0_levels() -> Tensor:
    """A sign and three exponent bits, no mantissa: 0 and +-2^-6 ... 2^0; float32 (15,)."""
    powers = 2.0 ** torch.arange(-6, 1)
    return torch.cat([-powers.flip(0), torch.zeros(1), powers])


def _yoshida(bits: int) -> Tensor:
    # 1 - the mean of half a bin's mass of a code of 2^k levels and of one of 2^k - 1.
    count = 2**bits
    return normal_float_codebook(bits, 1 - (1 / (2 * count) + 1 / (2 * (count - 1))) / 2)
