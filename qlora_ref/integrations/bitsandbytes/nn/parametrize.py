"""bitsandbytes.nn.parametrize: any parameter of any module in 4 bits, restored when it is read.

For what no layer covers, such as the experts of a mixture in one tensor of three dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qlora_ref.integrations.bitsandbytes.functional import quantize_4bit
from qlora_ref.integrations.bitsandbytes.quant_state import QuantState


class Bnb4bitParametrization(nn.Module):
    """Codes to the restored tensor."""

    def __init__(self, quant_state: QuantState) -> None:
        super().__init__()
        self.quant_state = quant_state

    @torch.no_grad()
    def forward(self, quantized_param: Tensor) -> Tensor:
        """Packed codes to the tensor, in the dtype that it had."""
        if self.quant_state.absmax.device != quantized_param.device:
            self.quant_state.to(quantized_param.device)
        return self.quant_state.with_codes(quantized_param).dequantize()


def replace_parameter_4bit(
    module: nn.Module,
    param_name: str,
    compress_statistics: bool = False,
    quant_type: str = "nf4",
    blocksize: int | None = None,
) -> None:
    """Quantise a parameter of a module, of any shape, in place.

    Raises AttributeError if there is no parameter of that name, TypeError if it is something else.
    """
    original = getattr(module, param_name)
    if not isinstance(original, nn.Parameter):
        raise TypeError(f"{param_name} must be a Parameter, got {type(original).__name__}")
    packed, state = quantize_4bit(
        original.data,
        blocksize=blocksize,
        compress_statistics=compress_statistics,
        quant_type=quant_type,
    )
    _hold(module, param_name, packed, state)


def replace_parameter_4bit_prequantized(
    module: nn.Module, param_name: str, qs_dict: dict[str, Any], device: torch.device
) -> None:
    """Hold codes that are there already; the state comes as QuantState.as_dict has it."""
    original = getattr(module, param_name)
    if not isinstance(original, nn.Parameter):
        raise TypeError(f"{param_name} must be a Parameter, got {type(original).__name__}")
    state = QuantState.from_dict(qs_dict, device)
    state.with_codes(original.data.to(device))  # raises where they do not fit together
    _hold(module, param_name, original.data.to(device), state)


def _hold(module: nn.Module, name: str, packed: Tensor, state: QuantState) -> None:
    setattr(module, name, nn.Parameter(packed, requires_grad=False))
    # "unsafe": codes and the restored tensor differ in shape and dtype.
    transform = Bnb4bitParametrization(state)
    parametrize.register_parametrization(module, name, transform, unsafe=True)

    def rename(_: nn.Module, state_dict: dict[str, Any], prefix: str, __: Any) -> None:
        packed = state_dict.pop(f"{prefix}parametrizations.{name}.original", None)
        if packed is not None:
            state_dict[f"{prefix}{name}"] = packed
            for key, value in state.as_dict(packed=True).items():
                state_dict[f"{prefix}{name}.{key}"] = value

    module.register_state_dict_post_hook(rename)
