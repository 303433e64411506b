"""What `Linear4bit` and `Embedding4bit` share: a frozen weight in 4 bits that survives everything.

The packed codes are the parameter `weight`, uint8 (ceil(n / 2), 1); scales and codebooks are
buffers beside it. So `.to()`, deepcopy and pickle carry them along, `.half()` cannot harm them,
and `state_dict` has bitsandbytes' keys (tensor_format.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qlora_ref import tensor_format
from qlora_ref.quantized import QuantizedTensor

# Buffer -> field of QuantizedTensor. Not saved as such: the state dict has the format's own keys.
_BUFFERS = {
    "weight_scales": "scales",
    "weight_codebook": "codebook",
    "weight_nested_absmax": "nested_absmax",
    "weight_nested_codebook": "nested_codebook",
    "weight_offset": "offset",
}


def layers_4bit(model: nn.Module) -> dict[str, Module4bit]:
    """The modules of a model whose weight is in 4 bits, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Module4bit)}


class Params4bit(nn.Parameter):
    """A parameter that holds codes. PEFT and accelerate know one by the name of its class."""


class Module4bit(nn.Module):
    """A module whose `weight` is held in 4 bits. Subclasses call `set_quantized_weight`."""

    weight: Tensor
    weight_scales: Tensor
    weight_codebook: Tensor
    weight_nested_absmax: Tensor | None
    weight_nested_codebook: Tensor | None
    weight_offset: Tensor | None

    codebook_name: str
    block_size: int
    weight_shape: torch.Size
    weight_dtype: torch.dtype

    def set_quantized_weight(self, weight: QuantizedTensor) -> None:
        """Hold this weight from now on; the module shares its storage."""
        self.weight = Params4bit(weight.packed.reshape(-1, 1), requires_grad=False)
        for buffer, field in _BUFFERS.items():
            self.register_buffer(buffer, getattr(weight, field), persistent=False)
        self.codebook_name, self.block_size = weight.codebook_name, weight.block_size
        self.weight_shape, self.weight_dtype = weight.shape, weight.dtype

    @property
    def quantized_weight(self) -> QuantizedTensor:
        """The weight; it shares the module's storage."""
        parts = {field: getattr(self, buffer) for buffer, field in _BUFFERS.items()}
        return QuantizedTensor(
            packed=self.weight.detach().flatten(),
            codebook_name=self.codebook_name,
            block_size=self.block_size,
            shape=self.weight_shape,
            dtype=self.weight_dtype,
            **parts,
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The restored dense weight, in `dtype` or in the dtype it had."""
        return self.quantized_weight.dequantize(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # `.half()`, `.to(torch.bfloat16)` and the like are meant for the bias: codes and scales
        # follow to the device and keep their dtypes.
        ours = {id(getattr(self, name)) for name in ("weight", *_BUFFERS)}

        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in ours and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        return super()._apply(move_only, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        tensors = tensor_format.to_tensors(self.quantized_weight, f"{prefix}weight")
        destination.update(tensors)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name = f"{prefix}weight"
        if name in state_dict:
            try:
                stored = tensor_format.from_tensors(state_dict, name)
                if stored.shape != self.weight_shape:
                    shapes = f"{tuple(self.weight_shape)}, got {tuple(stored.shape)}"
                    raise ValueError(f"{name} must have shape {shapes}")
            except ValueError as error:
                error_msgs.append(str(error))
                return
            device = self.weight.device
            if device.type != "meta":  # a layer without storage takes over the file's
                assign = local_metadata.get("assign_to_params_buffers", False)
                stored = stored.to(device) if assign else copy.deepcopy(stored.to(device))
            self.set_quantized_weight(stored)
            # bitsandbytes may store the bytes as another dtype (`quant_storage`); nn.Module
            # compares what it is given with the parameter, which is uint8 by now.
            state_dict = {**state_dict, name: self.weight.detach()}
        unexpected: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected, error_msgs
        )
        # To PyTorch, the keys weight.* belong to a submodule that is not there.
        known = tensor_format.to_tensors(self.quantized_weight, name)
        unexpected_keys += [key for key in unexpected if key not in known]
