"""PEFT on our 4-bit layers: call `enable()` once, then use PEFT as on any other model.

Without it PEFT takes a Linear4bit for an nn.Linear: it trains, but it cannot merge, and DoRA reads
the packed bytes as weights.
"""

from __future__ import annotations

import warnings
from typing import Any

import peft
import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from qlora_ref.linear import Linear4bit, dense_linear
from qlora_ref.lora import replace_module
from qlora_ref.parameter4bit import parameter_4bit
from qlora_ref.quantized import QuantizationError

# Those that do not look at the base weight. Others start from the dense one.
INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")


def enable() -> None:
    """Let PEFT's LoRA and DoRA know our Linear4bit; for the whole process, harmless if repeated."""
    if not hasattr(Linear4bit, "W_q"):
        # PEFT calls `dequantize()` of a layer that has an attribute of this name.
        Linear4bit.W_q = property(lambda layer: layer.weight)  # type: ignore[attr-defined]
    if LoraModel._create_new_module is not _create_new_module:
        setattr(LoraModel, "_create_new_module", staticmethod(_create_new_module))  # noqa: B010


class LoraLinear4bit(LoraLinear):  # type: ignore[misc]  # no types in PEFT
    """PEFT's LoRA (or DoRA) layer on a Linear4bit.

    `merge` puts a dense layer in the place of the 4-bit one: W + s B A, summed in float32 and
    rounded once to the dtype that W had. `unmerge` puts the 4-bit layer back, bit for bit.
    """

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: Any, **options: Any
    ) -> None:
        """Add an adapter. Raises ValueError for an initialisation that needs the dense weight."""
        how = config.init_lora_weights
        if (how.lower() if isinstance(how, str) else how) not in INITIALISATIONS:
            raise ValueError(
                f"init_lora_weights={how!r} starts from the dense weight, which is in 4 bits here: "
                "initialise the adapter on the dense model, save both, and quantise that base "
                f"as it loads; or use one of {INITIALISATIONS}"
            )
        super().update_layer(adapter_name, r, lora_alpha, config, **options)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into a dense layer, all of the active ones unless they are named."""
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        base, merged_before = self._base_4bit(), list(self.merged_adapters)
        layer = self.base_layer
        try:
            weight, bias = self._merged(safe_merge, [*merged_before, *names])
        except BaseException:
            self.base_layer, self.merged_adapters = layer, merged_before
            raise
        self._unmerged = (base,)  # a tuple, so that it is no submodule
        self.base_layer = dense_linear(weight.to(base.weight_dtype), bias, base.training)

    def unmerge(self) -> None:
        """Put the 4-bit layer back."""
        if not self.merged:
            warnings.warn("no adapter is merged, so there is none to unmerge", stacklevel=2)
            return
        self.base_layer = self._base_4bit()
        self.merged_adapters.clear()

    def merged_4bit(self) -> tuple[Linear4bit, QuantizationError]:
        """The active adapters merged into a layer in 4 bits, and the error of its rounding."""
        layer = self.base_layer, list(self.merged_adapters)
        try:
            weight, bias = self._merged(False, [*layer[1], *check_adapters_to_merge(self)])
        finally:
            self.base_layer, self.merged_adapters = layer
        return self._base_4bit().with_weight(weight, bias, self.training)

    def _base_4bit(self) -> Any:
        return self._unmerged[0] if self.merged else self.base_layer

    def _merged(self, safe_merge: bool, names: list[str]) -> tuple[Tensor, Any]:
        """The float32 sum of the restored weight and the updates; the caller puts layers back."""
        base = self._base_4bit()
        bias = None if base.bias is None else base.bias.detach().clone()
        self.base_layer = dense_linear(base.dequantize(torch.float32), bias, base.training)
        self.merged_adapters = []
        super().merge(safe_merge, names)
        return self.base_layer.weight.detach(), self.base_layer.bias


def merge_to_4bit(model: Any) -> tuple[nn.Module, dict[str, QuantizationError]]:
    """Merge the active LoRA adapters of a PeftModel into 4-bit layers again.

    returns  the base model without PEFT, and by layer the error that quantising each sum caused
    Raises ValueError if the model has no LoRA on a Linear4bit. Exact, and dense, is PEFT's own
    `model.merge_and_unload()`.
    """
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    layers = {name: m for name, m in base.named_modules() if isinstance(m, LoraLinear4bit)}
    if not layers:
        raise ValueError("the model has no LoRA on a Linear4bit: call enable() before PEFT")
    errors = {}
    for name, layer in layers.items():
        merged, errors[name] = layer.merged_4bit()
        replace_module(base, name, merged)
    return (model.unload() if isinstance(model, peft.PeftModel) else base), errors


_peft_create_new_module = LoraModel._create_new_module


def _create_new_module(
    lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any
) -> Any:
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    name = kwargs.get("parameter_name")
    if name is not None and parameter_4bit(base, name) is not None:
        raise NotImplementedError(  # PEFT would add its update to a restored copy, and keep adding
            f"target_parameters: {name} is in 4 bits, and PEFT adapts dense parameters only: keep "
            'it dense with skip=["experts"] when the model is quantised'
        )
    if type(base) is not Linear4bit or isinstance(target, LoraLayer):
        return _peft_create_new_module(lora_config, adapter_name, target, **kwargs)
    lora_config.fan_in_fan_out = False  # true of a Conv1D; a Linear4bit in its place is (N, K)
    return LoraLinear4bit(target, adapter_name, config=lora_config, **kwargs)
