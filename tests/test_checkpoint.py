"""Checkpoints of 4-bit models: round trips, exchange with transformers, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import qlora_ref
from qlora_ref.checkpoint import load_model_state, save_model, stored_tensors
from qlora_ref.dispatch import force_backend
from qlora_ref.models import load_model
from qlora_ref.module4bit import Module4bit

MODEL = Path(__file__).parent / "data" / "tiny_llama"

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from_pretrained = pytest.importorskip(
    "qlora_ref.integrations.transformers", reason="transformers is not installed"
).from_pretrained


def quantised(codebook: str = "nf4", double_quant: bool = True) -> Any:
    model = load_model(MODEL)
    qlora_ref.convert_model(model, codebook, double_quant=double_quant)
    return model


def weights(model: Any) -> dict[str, Any]:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Module4bit)}
    return {name: layer.quantized_weight for name, layer in layers.items()}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():  # in training mode: bitsandbytes repacks its layers in evaluation
        return model.train()(input_ids=torch.arange(40).reshape(2, 20)).logits


@pytest.mark.parametrize("codebook", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 100_000])
def test_a_saved_model_loads_with_every_bit(
    tmp_path: Path, codebook: str, double_quant: bool, shard_bytes: int
) -> None:
    model = quantised(codebook, double_quant)
    save_model(model, tmp_path / "model", shard_bytes)
    loaded = load_model(tmp_path / "model")
    assert weights(loaded) == weights(model)
    assert torch.equal(logits(loaded), logits(model))


# 25,000: the largest weights fit alone (24,576 bytes), but not together with their scales.
@pytest.mark.parametrize("shard_bytes", [25_000, 50_000])
def test_a_weight_and_its_scales_share_a_shard(tmp_path: Path, shard_bytes: int) -> None:
    save_model(quantised(), tmp_path / "model", shard_bytes)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    shards = index["weight_map"]
    assert len(set(shards.values())) > 3
    for key, shard in shards.items():
        if ".weight." in key:
            assert shards[key.split(".weight.")[0] + ".weight"] == shard


@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_transformers_and_bitsandbytes_load_what_is_saved(
    tmp_path: Path, codebook: str, double_quant: bool
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = quantised(codebook, double_quant)
    save_model(model, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(theirs.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")
    with force_backend("reference"):  # theirs restores the weight and multiplies in torch too
        assert torch.equal(logits(theirs), logits(model))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_what_transformers_and_bitsandbytes_save_is_loaded(
    tmp_path: Path, kind: str, double_quant: bool
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double_quant
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        MODEL, quantization_config=config, dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert len(weights(ours)) == 28
    with force_backend("reference"):
        assert torch.equal(logits(ours), logits(theirs))


# As files on the hub have it: sampling is off, yet a temperature is set, which transformers would
# not write.
GENERATION = {"eos_token_id": [1, 7], "repetition_penalty": 1.3, "temperature": 0.6, "top_p": 0.9}


@pytest.mark.parametrize("load", [load_model, from_pretrained])
def test_how_a_model_generates_is_kept(tmp_path: Path, load: Any) -> None:
    model = quantised()
    model.generation_config.update(**GENERATION)
    save_model(model, tmp_path / "model")
    found = load(tmp_path / "model").generation_config.to_dict()
    assert {key: found[key] for key in GENERATION} == GENERATION


def test_a_checkpoint_that_does_not_say_how_to_generate_is_loaded(tmp_path: Path) -> None:
    save_model(quantised(), tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").unlink()
    assert load_model(tmp_path / "model").generation_config.eos_token_id == 1  # of config.json


def test_tied_embeddings_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    qlora_ref.convert_model(model)
    save_model(model, tmp_path / "model")
    assert "lm_head.weight" not in dict(stored_tensors(tmp_path / "model"))
    loaded = load_model(tmp_path / "model")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded), logits(model))


def test_a_layer_with_two_names_is_stored_once_and_loaded_under_both(tmp_path: Path) -> None:
    def used_twice() -> nn.ModuleDict:
        layer = qlora_ref.Linear4bit(64, 32)
        return nn.ModuleDict({"a": layer, "b": layer})

    model, other = used_twice(), used_twice()
    save_model(model, tmp_path / "model")
    assert set(dict(stored_tensors(tmp_path / "model"))) == {"a.weight", "a.bias"}
    load_model_state(other, tmp_path / "model")
    assert other["a"] is other["b"]
    assert weights(other) == weights(model) and torch.equal(other["b"].bias, model["a"].bias)
    dense = nn.Linear(64, 32)
    with pytest.raises(ValueError, match="lacks .*b.weight"):
        load_model_state(nn.ModuleDict({"a": dense, "b": dense}), tmp_path / "model")


class OwnParameter(nn.Parameter):
    """Of a class of its own, as some libraries tell their parameters."""


def small_model() -> Any:
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 8), nn.Linear(64, 8))
    model[1].bias = OwnParameter(model[1].bias.detach(), requires_grad=False)
    model[3].weight = model[2].weight  # tied, hence kept dense
    return model


def test_a_model_on_meta_takes_over_what_the_files_hold(tmp_path: Path) -> None:
    model = small_model()
    model[1](torch.randn(5, 64))  # moves the running mean away from 0
    qlora_ref.convert_model(model)
    save_model(model.double(), tmp_path / "model")
    with torch.device("meta"):
        loaded = small_model()
    load_model_state(loaded, tmp_path / "model")
    assert weights(loaded) == weights(model)
    assert loaded[3].weight is loaded[2].weight
    assert type(loaded[1].bias) is OwnParameter and not loaded[1].bias.requires_grad
    assert loaded[0].bias.requires_grad and loaded[2].weight.requires_grad
    stored = model.float().state_dict()  # in the dtypes of the model, not of the file
    for key, tensor in loaded.state_dict().items():
        assert tensor.dtype == stored[key].dtype and torch.equal(tensor, stored[key]), key


def test_a_model_on_meta_is_not_left_half_filled_in_silence(tmp_path: Path) -> None:
    model = small_model()
    qlora_ref.convert_model(model)
    save_model(model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors["1.bias"], tensors["1.running_mean"]
    save_file(tensors, file)
    with torch.device("meta"):
        loaded = small_model()
    with pytest.raises(ValueError, match=r"lacks \['1.bias', '1.running_mean'\]"):
        load_model_state(loaded, tmp_path / "model")


@pytest.mark.parametrize("stored_double", [False, True])
def test_a_model_in_4_bits_already_takes_over_a_checkpoint(
    tmp_path: Path, stored_double: bool
) -> None:
    stored, model = quantised("fp4", stored_double), quantised("nf4", not stored_double)
    save_model(stored, tmp_path / "model")
    load_model_state(model, tmp_path / "model")
    assert weights(model) == weights(stored)


def test_a_codebook_of_ones_own_is_stored_with_its_levels(tmp_path: Path) -> None:
    model = load_model(MODEL)
    levels = torch.cat([torch.linspace(-1, 0, 9), torch.linspace(0.1, 0.9, 7)])
    qlora_ref.convert_model(model, levels)
    save_model(model, tmp_path / "model", 200_000)
    loaded = load_model(tmp_path / "model")
    assert weights(loaded) == weights(model)
    assert weights(loaded)["model.layers.0.mlp.up_proj"].codebook_name == "custom"


def tiny_gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2, n_positions=32)
    return transformers.GPT2LMHeadModel(config).eval()


def test_layers_that_were_conv1d_load_again(tmp_path: Path) -> None:
    model = tiny_gpt2()
    qlora_ref.convert_model(model)
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert weights(loaded) == weights(model) and len(weights(model)) == 4
    assert torch.equal(loaded.eval()(torch.arange(9)[None]).logits, model(torch.arange(9)[None])[0])


def test_layers_that_were_conv1d_are_exchanged_with_bitsandbytes(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    tiny_gpt2().save_pretrained(tmp_path / "dense")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(tmp_path / "dense", quantization_config=config, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    ids = torch.arange(9)[None]
    ours = load_model(tmp_path / "theirs")
    expected = without_dropout(theirs)(ids).logits
    with force_backend("reference"):
        assert torch.equal(without_dropout(ours)(ids).logits, expected)
    save_model(ours, tmp_path / "ours")
    again = load(tmp_path / "ours")
    assert torch.equal(without_dropout(again)(ids).logits, expected)


def without_dropout(model: Any) -> Any:
    """In training mode, since bitsandbytes repacks its layers in evaluation."""
    model.train().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attn_pdrop"):
            module.attn_pdrop = 0.0
    return model


def test_a_full_disk_keeps_the_checkpoint_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(tensors: Any, path: Path, **options: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    model = quantised()
    save_model(model, tmp_path / "model")
    monkeypatch.setattr("safetensors.torch.save_file", run_out)
    with pytest.raises(OSError, match="no space left"):
        save_model(quantised("fp4"), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert weights(load_model(tmp_path / "model")) == weights(model)


def break_file(path: Path, kind: str) -> str:
    """Spoil a checkpoint; returns what the error must name."""
    tensors = load_file(path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
        return "not a whole safetensors file"
    if kind == "missing":
        del tensors["model.norm.weight"]
        named = "model.norm.weight"
    elif kind == "extra":
        tensors["model.surplus.weight"] = torch.zeros(3)
        named = "model.surplus.weight"
    elif kind == "bias":  # of a layer that has none
        tensors["model.layers.0.mlp.up_proj.bias"] = torch.zeros(384)
        named = "model.layers.0.mlp.up_proj.bias belongs to no module"
    elif kind == "4-bit shape":
        state = tensors.pop("model.layers.0.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4")
        text = bytes(state.tolist()).decode().replace("[128, 128]", "[64, 256]")
        key = "model.layers.0.self_attn.q_proj.weight"
        tensors[f"{key}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text.encode())).byte()
        named = f"{key} must have shape"
    elif kind == "no scales":
        del tensors["model.layers.0.mlp.up_proj.weight.absmax"]
        named = "model.layers.0.mlp.up_proj.weight.absmax"
    else:
        tensors["model.norm.weight"] = torch.zeros(5)
        named = "model.norm.weight must have shape"
    save_file(tensors, path, metadata={"format": "pt"})
    return named


@pytest.mark.parametrize(
    "kind", ["truncated", "missing", "extra", "bias", "no scales", "shape", "4-bit shape"]
)
def test_a_spoilt_checkpoint_is_refused_and_the_key_named(tmp_path: Path, kind: str) -> None:
    save_model(quantised(), tmp_path / "model")
    named = break_file(tmp_path / "model" / "model.safetensors", kind)
    with pytest.raises(ValueError, match=named) as caught:
        load_model_state(load_model(MODEL), tmp_path / "model")
    assert str(tmp_path / "model") in str(caught.value)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_model(quantised(), tmp_path / "model", 200_000)
    next((tmp_path / "model").glob("model-00002-*")).unlink()
    with pytest.raises(ValueError, match="model-00002"):
        load_model_state(load_model(MODEL), tmp_path / "model")


def test_a_model_with_adapters_or_without_4bit_layers_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no 4-bit layer"):
        save_model(load_model(MODEL), tmp_path / "model")
    model = quantised()
    qlora_ref.add_lora(model)
    with pytest.raises(ValueError, match="merge them first"):
        save_model(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
