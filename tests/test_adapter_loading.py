"""An adapter goes on the layers that it names, on the base that it was trained on, or on none."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import randomise_adapters

import qlora_ref
from qlora_ref import Linear4bit
from qlora_ref.adapter import describe_base, load_adapter, recorded_base, save_adapter


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


# ---------------------------------------------------------------- which base


def dense(dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same weights at every call."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(dtype)


def quantised(*options: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = dense(dtype)
    qlora_ref.convert_model(model, *options)
    return model


def test_an_adapter_records_how_its_base_was_quantised(tmp_path: Path) -> None:
    model = quantised("fp4", 128, False, dtype=torch.bfloat16)
    folder = saved(model, tmp_path / "adapter", targets=["0"])
    recorded = json.loads((folder / "adapter_base.json").read_text())
    assert len(recorded.pop("sha256")) == 64
    weights = (folder / "adapter_model.safetensors").read_bytes()
    assert recorded.pop("adapter_sha256") == hashlib.sha256(weights).hexdigest()
    assert recorded == {
        "codebook": "fp4",
        "block_size": 128,
        "double_quant": False,
        "dtype": "bfloat16",
    }


def test_what_layers_do_not_share_is_not_recorded() -> None:
    base = describe_base(nn.Sequential(Linear4bit(32, 32), Linear4bit(32, 32, codebook="fp4")))
    assert base.keys() == {"block_size", "double_quant", "dtype", "sha256"}
    assert describe_base(dense()) == {}


@pytest.mark.parametrize("other", [("fp4", 64), ("nf4", 128), ("nf4", 64, False), "dense", "tuned"])
def test_another_base_is_refused_unless_it_is_asked_for(tmp_path: Path, other: Any) -> None:
    def another() -> nn.Module:
        if other == "dense":
            return dense()
        if other != "tuned":
            return quantised(*other)
        model = dense()
        with torch.no_grad():
            model[1].weight[3, 5] *= -1  # the weights of another checkpoint, quantised alike
        qlora_ref.convert_model(model)
        return model

    folder = saved(trained := quantised(), tmp_path / "adapter", targets=["0"])
    load_adapter(again := quantised(), folder)
    assert torch.equal(outputs(again, 64), outputs(trained, 64))
    model = another()
    before = outputs(model, 64)
    message = "another base: expected codebook nf4, block_size 64, .* or put .* other_base=True"
    with pytest.raises(ValueError, match=message):
        load_adapter(model, folder)
    assert torch.equal(outputs(model, 64), before)
    assert load_adapter(model, folder, other_base=True).layers == ["0"]


def test_the_dtype_that_a_base_is_used_in_is_no_other_base(tmp_path: Path) -> None:
    folder = saved(quantised(dtype=torch.bfloat16), tmp_path / "adapter")
    model = dense(torch.bfloat16).float()  # the same values
    qlora_ref.convert_model(model)
    assert load_adapter(model, folder).layers == ["0", "1"]


def test_an_adapter_without_a_record_goes_on_any_base(tmp_path: Path) -> None:
    folder = saved(quantised(), tmp_path / "adapter")
    (folder / "adapter_base.json").unlink()
    assert recorded_base(folder) == {}
    for model in (quantised("fp4"), dense()):
        assert load_adapter(model, folder).layers == ["0", "1"]
    again = saved(dense(), tmp_path / "dense")
    assert not (again / "adapter_base.json").exists()


# PEFT replaces the files that it knows, and leaves the others.
def test_a_record_beside_another_adapter_is_not_its_own(tmp_path: Path) -> None:
    folder = saved(quantised(), tmp_path / "adapter")
    other = saved(quantised("fp4"), tmp_path / "other", targets=["0"])
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(other / name, folder / name)
    assert recorded_base(folder) == {}
    assert load_adapter(quantised("fp4"), folder).layers == ["0"]


@pytest.mark.parametrize("content", ["", "{", "7", "null", "[1]"])
def test_a_damaged_record_is_named(tmp_path: Path, content: str) -> None:
    folder = saved(quantised(), tmp_path / "adapter")
    (folder / "adapter_base.json").write_text(content)
    with pytest.raises(ValueError, match=r"cannot read .*adapter_base\.json"):
        load_adapter(quantised(), folder)
