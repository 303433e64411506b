"""matmul_4bit: the product that bitsandbytes' layers compute, with its gradient."""

from __future__ import annotations

from torch import Tensor

from qlora_ref.integrations.bitsandbytes import functional as F
from qlora_ref.integrations.bitsandbytes.quant_state import QuantState


def matmul_4bit(
    A: Tensor,
    B: Tensor,
    quant_state: QuantState | None,
    out: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """A W^T + bias for the codes B of W, as they are or transposed; gradients reach A and bias.

    Raises ValueError if `quant_state` is missing; TypeError and ValueError as ops.matmul_4bit does.
    """
    if quant_state is None:
        raise ValueError("quant_state must be given: the scales of B are in it")
    y = F.matmul(A, B, quant_state, bias)
    return y if out is None else out.copy_(y)


class MatMul4Bit:
    """`matmul_4bit` as it is called where it is known as an autograd.Function."""

    @staticmethod
    def apply(
        A: Tensor,
        B: Tensor,
        out: Tensor | None = None,
        bias: Tensor | None = None,
        quant_state: QuantState | None = None,
    ) -> Tensor:
        """See `matmul_4bit`."""
        return matmul_4bit(A, B, quant_state, out, bias)


matmul = F.no_int8("matmul")
MatmulLtState = F.no_int8("MatmulLtState")
MatMul8bitLt = F.no_int8("MatMul8bitLt")
MatMul8bitFp = F.no_int8("MatMul8bitFp")
