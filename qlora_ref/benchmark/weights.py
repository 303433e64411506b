"""One random weight in every format that a product here is made with.

Peers of NF4 hold the codes and scales that we do. Others know evenly spaced levels only, so that
they get a random weight of their own: their speed can be compared, their accuracy cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from qlora_ref import dispatch
from qlora_ref.quantized import QuantizedTensor, quantize

BLOCK_SIZE = 64  # of every format here

# Relative errors of the whole result, against float64: x and W rounded to float32, to bfloat16
# (8 bits), to float16 (11 bits), and x rounded to 8 bits with a scale for each block.
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.int8: 2e-2}


@dataclass(frozen=True)
class Product:
    """A candidate: `run` returns y, `weight` (N, K) is what it stands for.

    nbytes  of the weight as it is held, and as often as it is moved
    """

    run: Callable[[], Tensor]
    weight: Tensor
    tolerance: float
    nbytes: int


class Weights:
    """One random weight (N, K) in every format; each is made when it is first asked for."""

    def __init__(
        self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.shape, self.dtype, self.device = shape, dtype, torch.device(device)
        self.original = torch.randn(shape, device=device).to(dtype)

    def __str__(self) -> str:
        return f"weight {self.shape[0]}x{self.shape[1]} {self.dtype} {self.device}"

    @cached_property
    def quantized(self) -> QuantizedTensor:
        """The weight in NF4 with float32 scales."""
        return quantize(self.original, block_size=BLOCK_SIZE)

    @cached_property
    def exact(self) -> Tensor:
        """What the codes and scales stand for, float32, by the reference."""
        with dispatch.force_backend("reference"):
            return self.quantized.dequantize(torch.float32)

    @cached_property
    def dense(self) -> Tensor:
        """The same, rounded once to the dtype of x."""
        return self.exact.to(self.dtype)

    @cached_property
    def bitsandbytes_training(self) -> nn.Module:
        return self._bitsandbytes().train()

    @cached_property
    def bitsandbytes_evaluation(self) -> nn.Module:
        # A layer of its own: the first forward in evaluation repacks the weight for good.
        return self._bitsandbytes().eval()

    def _bitsandbytes(self) -> nn.Module:
        import bitsandbytes as bnb

        rows, columns = self.shape
        layer = bnb.nn.Linear4bit(
            columns, rows, bias=False, compute_dtype=self.dtype, quant_type="nf4", device="meta"
        )
        layer.weight = bnb.nn.Params4bit(
            self.original.clone(),
            requires_grad=False,
            quant_type="nf4",
            blocksize=BLOCK_SIZE,
            compress_statistics=False,  # our scales are not quantised here either
        )
        if not may_use_bfloat16_instructions():
            layer.support_avx512bf16_for_cpu = False
        return layer.to(self.device)  # quantises

    @cached_property
    def int4_codes(self) -> Tensor:
        return torch.randint(0, 16, self.shape, dtype=torch.int32)

    @cached_property
    def int4_scales(self) -> Tensor:
        rows, columns = self.shape
        return (torch.rand(rows, columns // BLOCK_SIZE) + 0.1).to(self.dtype)

    @cached_property
    def int4(self) -> Tensor:
        """What the int4 codes and scales stand for, float32."""
        blocks = (self.int4_codes - 8).float().view(*self.int4_scales.shape, BLOCK_SIZE)
        return (blocks * self.int4_scales.float().unsqueeze(-1)).view(self.shape)

    @cached_property
    def int4_packed(self) -> Tensor:
        return torch._convert_weight_to_int4pack_for_cpu(self.int4_codes, 1)


def may_use_bfloat16_instructions() -> bool:
    """Not where ours are kept from it: the peers then have no more than we do."""
    return dispatch.forced_isa() not in ("baseline", "avx2", "avx512")
