"""Ways to round a weight matrix to a few bits, by name: what parts 2 and 3 compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qlora_ref.quantized import quantize
from qlora_ref.study.formats import study_formats


@dataclass(frozen=True)
class Rounding:
    """A way to round weights.

    name     of the codebook, options, and the block size where that is not 64
    bits     stored for a weight, scales and all
    restore  a float32 matrix to the one that its rounded form stands for
    """

    name: str
    bits: float
    restore: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Calibrated:
    """A way to round weights that looks at a text: options of `convert_model`."""

    name: str
    bits: float
    options: dict[str, Any]


def calibrated() -> list[Calibrated]:
    """NF4 in blocks of 64 with error feedback (GPTQ)."""
    options = {"codebook": "nf4", "block_size": 64, "double_quant": False}
    return [Calibrated("nf4, fed back", 4.5, options)]


def roundings() -> list[Rounding]:
    """All of them; NF4 in blocks of 64 is what the others are compared with."""
    return [
        _plain("int8"),
        _plain("nf4"),
        _with_options("nf4", "double", double_quant=True),
        _with_options("nf4", "searched", scale_search=True),
        _with_options("nf4", "searched, double", double_quant=True, scale_search=True),
        _plain("nf4", 32),
        _plain("nf4", 128),
        _plain("nf4", 4096),
        _plain("bof4"),
        _plain("bof4_s"),
        _plain("af4"),
        Rounding("int4 affine", 4.5, lambda w: affine_int4(w, 64)),
        _plain("int4"),
        _plain("fp4_ocp"),
        _plain("fp4"),
        _plain("fp4_e3m0"),
        _plain("nf3"),
        _plain("bof3_s"),
        _plain("nf2"),
        _plain("bof2_s"),
    ]


def affine_int4(weight: Tensor, block_size: int) -> Tensor:
    """Integers 0 to 15 from the smallest to the largest value of a block; both kept in float16.

    w' = lowest + step * round((w - lowest) / step),    step = (highest - lowest) / 15
    """
    blocks = weight.float().view(-1, block_size)
    lowest = blocks.amin(dim=1, keepdim=True).half().float()
    step = ((blocks.amax(dim=1, keepdim=True) - lowest) / 15).half().float()
    codes = ((blocks - lowest) / step.clamp(min=1e-30)).round().clamp(0, 15)
    return (lowest + step * codes).view_as(weight)


def _plain(name: str, block_size: int = 64) -> Rounding:
    form = _FORMATS[name]
    shown = name if block_size == 64 else f"{name}, {block_size}"
    return Rounding(shown, form.bits + 32 / block_size, lambda w: form.restored(w, block_size))


def _with_options(codebook: str, says: str, **options: Any) -> Rounding:
    """What `quantize` does with options, in blocks of 64."""
    scale_bits = 8 / 64 + 32 / (64 * 256) if options.get("double_quant") else 32 / 64
    return Rounding(
        f"{codebook}, {says}",
        _FORMATS[codebook].bits + scale_bits,
        lambda w: quantize(w, codebook, 64, **options).dequantize(),
    )


_FORMATS = {form.name: form for form in study_formats()}
