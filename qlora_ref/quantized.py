"""QuantizedTensor: packed codes, their scales, and what is needed to read them.

Read next: ops.py for what quantising means; tensor_format.py for how one is stored in a file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_ref import gptq, ops
from qlora_ref.checks import (
    check_block_size,
    check_float,
    check_nested,
    check_one_device,
    check_output_dtype,
    check_packed,
)
from qlora_ref.codebooks import (
    DYNAMIC_BLOCK_SIZE,
    dynamic_codebook,
    has_signed_scales,
    resolve_codebook,
)
from qlora_ref.packing import gather_codes, pack_codes
from qlora_ref.reference.blockwise import codes_under_scales, scale_blocks
from qlora_ref.scales import block_signs, search_scales

# The share of the mean second moment of a layer's inputs that is added to each: GPTQ's.
GPTQ_DAMPING = 0.01
# How often scales and codes are fitted to one another after error feedback.
GPTQ_ROUNDS = 2


@dataclass(frozen=True)
class QuantizationError:
    """How far a restored tensor is from the original.

    mse     float  mean of the squared differences
    max     float  largest difference
    snr_db  float  10 log10(sum x^2 / sum difference^2), in decibels; inf without a difference
    """

    mse: float
    max: float
    snr_db: float


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedTensor:
    """A tensor in 4-bit codes: y[i] = codebook[code[i]] * absmax[i // block_size].

    packed           uint8 (ceil(n / 2),)    two codes a byte, the even one in the high nibble
    scales           float32 (blocks,)       absmax itself, or, double-quantised, uint8 (blocks,);
                                             negative for some codebooks (BOF4-S)
    codebook         float32 (16,)
    codebook_name    str                     a name of codebooks.CODEBOOKS, or "custom"
    block_size       int                     blocks = ceil(n / block_size)
    shape, dtype                             of the tensor that was quantised; n values
    nested_absmax    float32 (ceil(blocks / 256),) or None    these three when double-quantised:
    nested_codebook  float32 (256,) or None                   absmax = nested_codebook[scales]
    offset           float32 () or None                                * nested_absmax + offset

    Made by `quantize`. Raises TypeError and ValueError when the parts do not fit together.
    """

    packed: Tensor
    scales: Tensor
    codebook: Tensor
    codebook_name: str
    block_size: int
    shape: torch.Size
    dtype: torch.dtype
    nested_absmax: Tensor | None = None
    nested_codebook: Tensor | None = None
    offset: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", torch.Size(self.shape))
        check_output_dtype(self.dtype)
        check_packed(self.packed, self.scales, self.codebook, self.block_size, self.numel())
        check_nested(self.scales, self.nested_absmax, self.nested_codebook, self.offset)

    def numel(self) -> int:
        """The number of values, n."""
        return math.prod(self.shape)

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.packed.device

    @property
    def double_quant(self) -> bool:
        """Whether the scales are themselves quantised to 8 bits."""
        return self.nested_absmax is not None

    @property
    def absmax(self) -> Tensor:
        """The scale of each block, float32 (blocks,), decoded if it is double-quantised."""
        if self.nested_absmax is None or self.nested_codebook is None or self.offset is None:
            return self.scales
        scales = ops.dequantize_8bit(self.scales, self.nested_absmax, self.nested_codebook)
        return scales + self.offset

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The restored tensor, in `dtype` or in that of the original. See ops.dequantize_4bit."""
        return ops.dequantize_4bit(
            self.packed,
            self.scales,
            self.codebook,
            self.block_size,
            self.shape,
            dtype or self.dtype,
            self.nested_absmax,
            self.nested_codebook,
            self.offset,
        )

    def rows(self, indices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Some rows of a restored matrix, without restoring the others: dequantize()[indices].

        indices  int64 or int32 (any)   each from 0 to shape[0] - 1, else IndexError
        returns  dtype (*indices.shape, shape[1])
        """
        height, width = self.shape
        starts = torch.arange(0, height * width, width, device=self.device).unsqueeze(1)
        first = torch.nn.functional.embedding(indices, starts)  # checks the indices, too
        positions = first + torch.arange(width, device=self.device)
        levels = self.codebook[gather_codes(self.packed, positions).int()]
        return (levels * self._scales_at(positions // self.block_size)).to(dtype or self.dtype)

    def _scales_at(self, blocks: Tensor) -> Tensor:
        if self.nested_absmax is None or self.nested_codebook is None or self.offset is None:
            return self.scales[blocks]
        levels = self.nested_codebook[self.scales[blocks].int()]
        return levels * self.nested_absmax[blocks // DYNAMIC_BLOCK_SIZE] + self.offset

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and all their scales (codebooks are constants that tensors share)."""
        parts = (self.packed, self.scales, self.nested_absmax, self.offset)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    @property
    def bits_per_parameter(self) -> float:
        """8 nbytes / n. In blocks of 64: 4.5, double-quantised 4 + 8/64 + 32/(64 * 256) = 4.127."""
        return 8 * self.nbytes / self.numel() if self.numel() else 0.0

    def with_codes(self, codes: Tensor) -> QuantizedTensor:
        """The same scales with other codes, uint8 (n,), each below 16."""
        zero = (self.codebook == 0).byte().argmax().to(codes.dtype)  # what fills an odd last byte
        return replace(self, packed=pack_codes(codes, filler=zero))

    def with_scales(self, scales: Tensor, double_quant: bool = False) -> QuantizedTensor:
        """The same codes under other scales, float32 (blocks,), kept as they are or in 8 bits."""
        nested: dict[str, Any] = {"nested_absmax": None, "nested_codebook": None, "offset": None}
        if double_quant:
            scales, nested = _double_quantize(scales)
        return replace(self, scales=scales, **nested)

    def error(self, x: Tensor) -> QuantizationError:
        """How far this is from the original x, of the same shape, worked out in float64."""
        if x.shape != self.shape:
            raise ValueError(f"x must have shape {tuple(self.shape)}, got {tuple(x.shape)}")
        difference = self.dequantize(torch.float32).double() - x.double()
        noise, signal = difference.square().sum().item(), x.double().square().sum().item()
        return QuantizationError(
            mse=noise / max(1, self.numel()),
            max=difference.abs().max().item() if self.numel() else 0.0,
            snr_db=10 * math.log10(signal / noise) if signal and noise else math.inf,
        )

    def to(self, target: torch.device | torch.dtype | str | int) -> QuantizedTensor:
        """The same on another device; given a dtype, restored in that one. Codes never change."""
        if isinstance(target, torch.dtype):
            return replace(self, dtype=target)
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, part in moved.items():
            if isinstance(part, Tensor):
                moved[name] = part.to(target)
        return QuantizedTensor(**moved)

    def save(self, path: Path | str) -> None:
        """Write a safetensors file in bitsandbytes' format, aside, then renamed."""
        from qlora_ref import tensor_format

        tensor_format.save(self, path)

    @staticmethod
    def load(path: Path | str) -> QuantizedTensor:
        """Read what `save` or bitsandbytes wrote. Raises ValueError for what is not such a file."""
        from qlora_ref import tensor_format

        return tensor_format.load(path)

    def __eq__(self, other: object) -> bool:
        """Equal in every part, codes and scales bit for bit."""
        if not isinstance(other, QuantizedTensor):
            return NotImplemented
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return all(_same(mine, theirs) for mine, theirs in pairs)

    __hash__ = None  # type: ignore[assignment]  # equal by value, and holds tensors

    def __repr__(self) -> str:
        scales = "double-quantised scales" if self.double_quant else "float32 scales"
        return (
            f"QuantizedTensor(shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"codebook={self.codebook_name!r}, block_size={self.block_size}, {scales}, "
            f"{self.nbytes:,} bytes, {self.bits_per_parameter:.3f} bits per parameter, "
            f"device={self.device})"
        )


def quantize(
    x: Tensor,
    codebook: str | Tensor | Sequence[float] = "nf4",
    block_size: int = 64,
    double_quant: bool = False,
    check_finite: bool = True,
    scale_search: bool = False,
    hessian: Tensor | None = None,
) -> QuantizedTensor:
    """Quantise a tensor to 4 bits: each value becomes the level nearest to x / absmax of its block.

    x             float32, bfloat16, float16 (any)
    codebook      a name of codebooks.CODEBOOKS, or up to 16 levels (codebooks.as_codebook)
    block_size    int, even, >= 2
    double_quant  bool              quantise the scales too, to 8 bits
    scale_search  bool              in place of absmax, the scale with the least squared error
                                    (scales.search_scales): 15 % less error in the same format
    hessian       float (K, K)      mean(x x^T) of the inputs of a layer whose weight (N, K) this
                                    is: codes and scales with a small error of its outputs
                                    (gptq.py), half of what nearest levels give; searched scales
                                    are where it starts
    returns       QuantizedTensor

        quantize(weight, double_quant=True).bits_per_parameter    # 4.127

    A codebook with signed scales (`codebooks.has_signed_scales`) has each block divided by its
    largest value, sign and all. Searched scales that are double-quantised are restored before the
    nearest levels are looked for.

    Raises TypeError and ValueError as `ops.quantize_4bit` and `codebooks.resolve_codebook` do.
    Source: QLoRA (arXiv 2305.14314), section 3.
    """
    check_float("x", x)
    check_block_size(block_size)
    name, levels = resolve_codebook(codebook, block_size)
    levels, signed = levels.to(x.device), has_signed_scales(name)
    packed, scales = _quantize_nearest(x, levels, block_size, check_finite, signed)
    tensor = QuantizedTensor(packed, scales, levels, name, block_size, x.shape, x.dtype)
    if hessian is not None:
        return _quantize_for_inputs(tensor, x, _damped(hessian, x), double_quant)
    if scale_search:
        tensor = tensor.with_scales(search_scales(x, levels, block_size, signed), double_quant)
        return tensor.with_codes(codes_under_scales(x, tensor.absmax, levels, block_size))
    return tensor.with_scales(scales, double_quant)


def _quantize_for_inputs(
    tensor: QuantizedTensor, x: Tensor, hessian: Tensor, double_quant: bool
) -> QuantizedTensor:
    """Codes by error feedback, then scales and codes in turn, each the best for the other."""
    table = tensor.codebook, tensor.block_size
    scales = search_scales(x, *table, has_signed_scales(tensor.codebook_name))
    tensor = tensor.with_scales(scales, double_quant)
    codes = gptq.feed_back_errors(x, hessian, tensor.absmax, *table)
    for _ in range(GPTQ_ROUNDS):
        scales = gptq.fit_scales(x, hessian, codes, tensor.absmax, *table)
        tensor = tensor.with_scales(scales, double_quant)
        codes = gptq.descend(x, hessian, codes, tensor.absmax, *table)
    return tensor.with_codes(codes)


def _damped(hessian: Tensor, x: Tensor) -> Tensor:
    if x.dim() != 2 or hessian.shape != (x.shape[1], x.shape[1]):
        raise ValueError(
            "hessian must be mean(x x^T) of a layer's inputs, of shape (K, K) for a weight (N, K): "
            f"got {tuple(hessian.shape)} for {tuple(x.shape)}"
        )
    check_one_device(x, hessian)
    return gptq.damped(hessian, GPTQ_DAMPING)


def _quantize_nearest(
    x: Tensor, levels: Tensor, block_size: int, check_finite: bool, signed: bool
) -> tuple[Tensor, Tensor]:
    if not signed:
        return ops.quantize_4bit(x, levels, block_size, check_finite)
    signs = block_signs(x, block_size)
    turned = scale_blocks(x.flatten().float(), signs, block_size).view(x.shape)
    packed, absmax = ops.quantize_4bit(turned, levels, block_size, check_finite)
    return packed, absmax * signs


def _double_quantize(absmax: Tensor) -> tuple[Tensor, dict[str, Any]]:
    # Scales are positive and alike; less their mean, they use the signed map on both sides of 0.
    offset = _mean(absmax)
    codebook = dynamic_codebook().to(absmax.device)
    codes, nested_absmax = ops.quantize_8bit(
        absmax - offset, codebook, DYNAMIC_BLOCK_SIZE, check_finite=False
    )
    nested = {"nested_absmax": nested_absmax, "nested_codebook": codebook, "offset": offset}
    return codes, nested


def _mean(values: Tensor) -> Tensor:
    """The mean in float64, summed by halves: one fixed order on every device and thread count.

    values   float32 (n,)
    returns  float32 ()     0 for no values
    """
    if values.is_meta:
        return values.new_empty(())
    count = values.numel()
    size = 1 << max(0, count - 1).bit_length()  # the next power of two, filled with zeros
    total = torch.nn.functional.pad(values.double(), (0, size - count))
    while total.numel() > 1:
        half = total.numel() // 2
        total = total[:half] + total[half:]
    return (total[0] / max(1, count)).float()


def _same(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
        same_kind = mine.dtype == theirs.dtype and mine.shape == theirs.shape
        bits = (mine.flatten().view(torch.uint8), theirs.flatten().view(torch.uint8))
        return same_kind and mine.device == theirs.device and torch.equal(*bits)
    return bool(mine == theirs)
