"""One parameter of a module in 4 bits: the experts of a mixture, held in one tensor.

transformers keeps the experts of a layer in tensors of three dimensions, (experts, N, K), which no
linear layer covers. The module goes on reading `self.gate_up_proj`; torch's parametrisations give
it the tensor, restored at that moment. Its state dict has bitsandbytes' keys: `gate_up_proj`,
`gate_up_proj.absmax` and so on, as `replace_parameter_4bit` writes them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qlora_ref.checks import FLOAT_DTYPES
from qlora_ref.module4bit import Module4bit
from qlora_ref.quantized import QuantizedTensor


class Parameter4bit(Module4bit):
    """The tensor in 4 bits, of any shape; calling it restores the values, without a gradient.

    `.to(dtype)` leaves codes and scales alone and decides the dtype of the restored values.
    """

    def forward(self, _: Tensor) -> Tensor:
        """What the module reads."""
        with torch.no_grad():
            return self.dequantize()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        return self


def is_expert_tensor(module: nn.Module, name: str) -> bool:
    """Whether a module's parameter holds the weights of several experts: (experts, ., .)."""
    parameter = module._parameters.get(name)
    if parameter is None or parameter.dim() != 3 or parameter.dtype not in FLOAT_DTYPES:
        return False
    return "expert" in type(module).__name__.lower()  # others of three dimensions are no weights


def hold_in_4bit(module: nn.Module, name: str, weight: QuantizedTensor) -> Parameter4bit:
    """Put a 4-bit tensor in the place of a module's parameter, dense or in 4 bits already.

    returns  what holds it
    """
    holder = parameter_4bit(module, name)
    if holder is not None:
        holder.set_quantized_weight(weight)
        return holder
    holder = Parameter4bit()
    holder.set_quantized_weight(weight)
    delattr(module, name)
    # A parametrisation computes from an `original`; ours has all it needs, and saves itself.
    module.register_buffer(name, torch.empty(0), persistent=False)
    parametrize.register_parametrization(module, name, holder.train(module.training), unsafe=True)
    slot = _slot(module, name)
    slot.register_buffer("original", torch.empty(0), persistent=False)
    module.register_state_dict_post_hook(functools.partial(_name_as_files_do, name))
    module.register_load_state_dict_pre_hook(functools.partial(_name_as_modules_do, name))
    return holder


def parameter_4bit(module: nn.Module, name: str) -> Parameter4bit | None:
    """What holds a module's parameter in 4 bits; None if nothing does."""
    if not parametrize.is_parametrized(module, name):
        return None
    holder = _slot(module, name)[0]
    return holder if isinstance(holder, Parameter4bit) else None


def restore_parameter(module: nn.Module, name: str, dtype: torch.dtype | None = None) -> None:
    """Make a parameter that is held in 4 bits a dense one again, frozen."""
    holder = parameter_4bit(module, name)
    assert holder is not None
    parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    delattr(module, name)
    module.register_parameter(name, nn.Parameter(holder.dequantize(dtype), requires_grad=False))


def _slot(module: nn.Module, name: str) -> Any:
    parametrizations: Any = module.parametrizations
    return parametrizations[name]


def _name_as_files_do(
    name: str, module: nn.Module, state_dict: Any, prefix: str, local_metadata: Any
) -> None:
    _rename(state_dict, f"{prefix}parametrizations.{name}.0.weight", f"{prefix}{name}")


def _name_as_modules_do(
    name: str, module: nn.Module, state_dict: Any, prefix: str, *rest: Any
) -> None:
    _rename(state_dict, f"{prefix}{name}", f"{prefix}parametrizations.{name}.0.weight")


def _rename(state_dict: Any, old: str, new: str) -> None:
    for key in [key for key in state_dict if key == old or key.startswith(f"{old}.")]:
        state_dict[new + key.removeprefix(old)] = state_dict.pop(key)
