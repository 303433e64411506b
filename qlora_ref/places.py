"""Where the weights of a model are: find one, measure it, put a 4-bit one in its place.

Read next: convert.py and checkpoint.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qlora_ref.linear import (
    PLACEHOLDER,
    Embedding4bit,
    Linear4bit,
    dense_parameters,
    is_conv1d,
)
from qlora_ref.lora import replace_module
from qlora_ref.module4bit import Module4bit
from qlora_ref.parameter4bit import (
    hold_in_4bit,
    is_expert_tensor,
    parameter_4bit,
    restore_parameter,
)
from qlora_ref.quantized import QuantizedTensor


def find(model: nn.Module, name: str) -> nn.Module | Tensor:
    """The module, or the tensor of experts, of that name; of one in 4 bits, what holds it."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf and is_expert_tensor(module, leaf):
        return module.get_parameter(leaf)
    return parameter_4bit(module, leaf) or model.get_submodule(name)


def described(model: nn.Module, name: str) -> tuple[str, tuple[int, ...], int]:
    """The kind, the shape of the weight and the bytes of what has that name."""
    found = find(model, name)
    owner = found if isinstance(found, nn.Module) else model.get_submodule(name.rpartition(".")[0])
    return type(owner).__name__, weight_shape(found), own_bytes(found)


def weight_shape(found: nn.Module | Tensor) -> tuple[int, ...]:
    """The shape of a tensor, or of a module's weight or, without one, of its first parameter."""
    if isinstance(found, Tensor):
        return tuple(found.shape)
    weight = getattr(found, "weight", None)
    tensor = weight if isinstance(weight, Tensor) else next(found.parameters(recurse=False))
    return tuple(tensor.shape)


def own_bytes(found: nn.Module | Tensor) -> int:
    """Bytes of a tensor or of a module's own parameters; of a weight in 4 bits, codes and scales.

    Tensors of experts are not counted with their module.
    """
    if isinstance(found, Tensor):
        return _bytes(found)
    if isinstance(found, Module4bit):
        bias = getattr(found, "bias", None)
        return found.quantized_weight.nbytes + (0 if bias is None else _bytes(bias))
    own = found.named_parameters(recurse=False)
    return sum(_bytes(parameter) for leaf, parameter in own if not is_expert_tensor(found, leaf))


def install(model: nn.Module, key: str, weight: QuantizedTensor) -> Module4bit:
    """Put a 4-bit weight in the place of the tensor of that name, dense or in 4 bits already.

    returns  the layer, or what holds the tensor of experts
    Raises ValueError, naming the key, if there is no place for it or one of another shape.
    """
    name, _, leaf = key.rpartition(".")
    try:
        owner = model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"{key} belongs to no module of the model") from error
    is_expert = is_expert_tensor(owner, leaf) or parameter_4bit(owner, leaf) is not None
    place: Any = find(model, key) if is_expert else layer_for(owner) if leaf == "weight" else None
    if place is None:
        raise ValueError(f"{key} is in 4 bits, but the model has a {type(owner).__name__} there")
    shape = place.shape if isinstance(place, Tensor) else place.weight_shape
    if shape != weight.shape:
        raise ValueError(f"{key} must have shape {tuple(shape)}, got {tuple(weight.shape)}")
    old: Any = place if isinstance(place, Tensor) else place.weight if is_expert else owner.weight
    weight = weight if old.is_meta else weight.to(old.device)
    if is_expert:
        # transformers would take the codes apart into experts when it saves: they stay as they are.
        model._weight_conversions = []  # type: ignore[assignment]
        return hold_in_4bit(owner, leaf, weight)
    place.set_quantized_weight(weight)
    if place is not owner:
        replace_module(model, name, place.train(owner.training))
    return place


def layer_for(old: nn.Module) -> Module4bit | None:
    """A 4-bit layer without a weight yet for the place of this one; None if there is no such."""
    if isinstance(old, Module4bit):
        return old
    if isinstance(old, nn.Linear) or is_conv1d(old):  # a Conv1D's is stored as (N, K), too
        weight, bias = dense_parameters(old)
        layer = Linear4bit(weight.shape[1], weight.shape[0], **PLACEHOLDER)
        layer.bias = bias  # type: ignore[assignment]
        return layer
    if isinstance(old, nn.Embedding):
        return Embedding4bit.without_weight(old)
    return None


def restore_experts(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Make all tensors of experts dense again."""
    for module in list(model.modules()):
        for leaf in list(getattr(module, "parametrizations", ())):
            if parameter_4bit(module, leaf) is not None:
                restore_parameter(module, leaf, dtype)
                model.__dict__.pop("_weight_conversions", None)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
