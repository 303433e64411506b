"""An adapter goes on the layers that it names, on the base that it was trained on, or on none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import randomise_adapters

import qlora_ref
from qlora_ref import Linear4bit
from qlora_ref.adapter import load_adapter, save_adapter


def two_layers(size: int = 32) -> nn.Module:
    """The same weights at every call."""
    torch.manual_seed(1)
    return nn.Sequential(Linear4bit(size, size), Linear4bit(size, size))


def saved(model: nn.Module, folder: Path, **options: Any) -> Path:
    qlora_ref.add_lora(model, r=4, **options)
    randomise_adapters(model)
    save_adapter(model, folder)
    return folder


@torch.no_grad()
def outputs(model: nn.Module, size: int = 32) -> Tensor:
    return model.eval()(torch.linspace(-1, 1, 3 * size).view(3, size))


# ---------------------------------------------------------------- which layers


def test_a_refused_adapter_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    small = saved(two_layers(32), tmp_path / "small")
    large = saved(trained := two_layers(64), tmp_path / "large")
    model = two_layers(64)
    with pytest.raises(ValueError, match=r"small: .* must have shape \(4, 64\), got \(4, 32\)"):
        load_adapter(model, small)
    assert [type(layer) for layer in model] == [Linear4bit, Linear4bit]
    load_adapter(model, large)
    assert torch.equal(outputs(model, 64), outputs(trained, 64))


def test_a_layer_that_cannot_have_an_adapter_is_found_before_anything_is_changed(
    tmp_path: Path,
) -> None:
    class Special(nn.Linear):
        """Its owner may read the weight, past any adapter."""

    folder = saved(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), tmp_path / "adapter")
    model = nn.Sequential(nn.Linear(32, 32), Special(32, 32))
    with pytest.raises(ValueError, match=r"another model: this one has no linear layer \['1'\]"):
        load_adapter(model, folder)
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


def test_a_model_that_has_adapters_is_told_so(tmp_path: Path) -> None:
    folder = saved(two_layers(), tmp_path / "adapter")
    load_adapter(model := two_layers(), folder)
    with pytest.raises(ValueError, match="has adapters already"):
        load_adapter(model, folder)


def test_a_layer_whose_name_ends_as_another_does_is_left_alone(tmp_path: Path) -> None:
    def nested() -> nn.Module:
        torch.manual_seed(1)
        inner = nn.ModuleDict({"proj": Linear4bit(32, 32)})
        return nn.ModuleDict({"proj": Linear4bit(32, 32), "inner": inner})

    folder = saved(nested(), tmp_path / "adapter", targets="proj")
    assert load_adapter(nested(), folder).layers == ["proj"]
