"""`from_pretrained` with our layers, and checkpoints that bitsandbytes wrote or is to read."""

from __future__ import annotations

import importlib
import pickle
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes_program import ask
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_ref import add_lora, convert_model, merge_lora, quantize
from qlora_ref.integrations import transformers as ours
from qlora_ref.integrations.transformers import QLoRAConfig
from qlora_ref.models import load_model
from qlora_ref.module4bit import layers_4bit

TOKENS = torch.arange(16)[None]
SIZES = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 96}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(autouse=True)
def no_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever runs in this process does so without it; the program beside this file has it."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)


@pytest.fixture
def bitsandbytes_checkpoints() -> Iterator[None]:
    ours.use_for_bitsandbytes_checkpoints()
    yield
    ours.use_for_bitsandbytes_checkpoints(False)


def save_llama(folder: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SIZES, **HEADS, **options})
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("dense"))


def load(folder: Path, config: QLoRAConfig | None = None, **options: Any) -> Any:
    arguments = {"dtype": torch.bfloat16, **options}
    if config is not None:
        arguments["quantization_config"] = config
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **arguments)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def stored(folder: Path) -> dict[str, Tensor]:
    return {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}


def assert_same_files(mine: Path, theirs: Path) -> None:
    first, second = stored(mine), stored(theirs)
    assert first.keys() == second.keys()
    assert not [key for key in first if not torch.equal(first[key], second[key])]


# Quantising as it loads.


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("codebook, block_size", [("nf4", 64), ("fp4", 128), ("int4", 32)])
def test_a_model_is_quantised_as_it_loads(
    dense: Path, codebook: str, block_size: int, double_quant: bool
) -> None:
    model = load(dense, QLoRAConfig(codebook, block_size, double_quant))
    weights = stored(dense)
    assert len(layers_4bit(model)) == 14
    for name, layer in layers_4bit(model).items():
        expected = quantize(weights[f"{name}.weight"], codebook, block_size, double_quant)
        assert layer.quantized_weight == expected


def test_scales_can_be_searched_for_as_it_loads(dense: Path, tmp_path: Path) -> None:
    config = QLoRAConfig("nf4", scale_search=True)
    assert QLoRAConfig.from_dict(config.to_dict()).scale_search
    model = load(dense, config)
    name, layer = next(iter(layers_4bit(model).items()))
    weight = stored(dense)[f"{name}.weight"]
    plain, searched = (quantize(weight, "nf4", 64, True, scale_search=s) for s in (False, True))
    assert layer.quantized_weight == searched
    assert searched.error(weight).mse < plain.error(weight).mse
    model.save_pretrained(tmp_path)
    again = ours.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(logits(again), logits(model))


def test_it_computes_what_a_converted_model_does(dense: Path) -> None:
    converted = load(dense)
    convert_model(converted)
    assert torch.equal(logits(load(dense, QLoRAConfig())), logits(converted))


def test_the_report_says_what_was_left_alone_and_a_skip_list_adds_to_it(dense: Path) -> None:
    report = load(dense, QLoRAConfig(skip=["v_proj"])).hf_quantizer.report
    kept = report.kept
    assert kept["lm_head"] == "output head"
    assert kept["model.layers.1.self_attn.v_proj"] == "skip='v_proj'"
    assert len(report.converted) == 12
    sizes = {d.name: (d.bytes_before, d.bytes_after) for d in report.decisions}
    # 64 x 192 values: 2 bytes each, then half a byte and 192 scales of a byte, and two floats.
    assert sizes["model.layers.0.mlp.up_proj"] == (24576, 6144 + 192 + 4 + 4)


def test_the_weights_of_a_conv1d_are_turned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=96)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", QLoRAConfig(), dtype=torch.float32)
    layer = model.transformer.h[0].attn.c_attn
    weight = stored(tmp_path / "dense")["transformer.h.0.attn.c_attn.weight"]
    assert layer.quantized_weight == quantize(weight.t(), "nf4", 64, True)
    model.save_pretrained(tmp_path / "saved")
    again = ours.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))


def test_biases_are_loaded_beside_their_weights(tmp_path: Path) -> None:
    save_llama(tmp_path, attention_bias=True, mlp_bias=True)
    weights = stored(tmp_path)
    changed = {k: t + 1 if k.endswith(".bias") else t for k, t in weights.items()}
    save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = load(tmp_path, QLoRAConfig())
    for name, layer in layers_4bit(model).items():
        assert torch.equal(layer.bias, changed[f"{name}.bias"])


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    save_llama(tmp_path)
    weights = stored(tmp_path)
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight.*finite"):
        load(tmp_path, QLoRAConfig())


@pytest.mark.parametrize(
    "options, match",
    [
        ({"codebook": "nf5"}, "codebook must be one of .*'nf4'.*got 'nf5'"),
        ({"codebook": torch.linspace(-1, 1, 16)}, "levels of your own are for convert_model"),
        ({"block_size": 63}, "block_size"),
        ({"compute_dtype": "int8"}, "compute_dtype must be a floating-point"),
        ({"compute_dtype": "no_dtype"}, "compute_dtype must be a floating-point"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        QLoRAConfig(**options)


def test_a_skip_list_that_is_a_string_is_refused() -> None:
    with pytest.raises(TypeError, match="list of names"):
        QLoRAConfig(skip="lm_head")


def test_a_skip_list_that_matches_nothing_is_refused(dense: Path) -> None:
    with pytest.raises(ValueError, match="matches no module"):
        load(dense, QLoRAConfig(skip=["no_such_layer"]))


def test_a_request_for_8_bits_is_refused() -> None:
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(NotImplementedError, match="8"):
        QLoRAConfig.from_bitsandbytes(config)


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_loading_holds_no_more_than_two_dense_weights_beside_the_model(tmp_path: Path) -> None:
    # 30 layers of 4 MB each: were they kept until the end, it would be 120 MB instead of 8.
    save_llama(tmp_path, hidden_size=1024, intermediate_size=2048, num_hidden_layers=4)
    largest = 2 * 1024 * 2048
    load(tmp_path, QLoRAConfig())  # so that code and caches are there
    seen, done = [0], threading.Event()
    before = anonymous_bytes()

    def watch() -> None:
        while not done.wait(0.0005):
            seen[0] = max(seen[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load(tmp_path, QLoRAConfig())
    done.set()
    watcher.join()
    final = sum(d.bytes_after for d in model.hf_quantizer.report.decisions)
    # 4 MB: what malloc keeps of freed blocks, and Python's own.
    assert seen[0] - before <= final + 2 * largest + 4 * 2**20


# Saving and loading.


@pytest.mark.parametrize("codebook", ["nf4", "int4"])
def test_a_saved_model_is_loaded_as_it_was(dense: Path, tmp_path: Path, codebook: str) -> None:
    model = load(dense, QLoRAConfig(codebook, compute_dtype=torch.float32))
    model.save_pretrained(tmp_path / "first", max_shard_size="20KB")
    assert len(list((tmp_path / "first").glob("*.safetensors"))) > 2
    again = ours.from_pretrained(tmp_path / "first", dtype=torch.bfloat16)
    again.save_pretrained(tmp_path / "second")
    assert_same_files(tmp_path / "first", tmp_path / "second")
    assert torch.equal(logits(again), logits(model))


LEVELS = torch.cat([torch.linspace(-1, 0, 9), torch.linspace(0.1, 0.9, 7)])


@pytest.mark.parametrize("codebook", ["nf4", "int4", LEVELS], ids=["nf4", "int4", "levels"])
def test_a_converted_model_is_saved_as_one_that_was_loaded_in_4_bits(
    dense: Path, tmp_path: Path, codebook: Any
) -> None:
    model = load(dense)
    convert_model(model, codebook, compute_dtype=torch.float32)
    model = pickle.loads(pickle.dumps(model))  # what lets it be saved goes along
    model.save_pretrained(tmp_path / "first", max_shard_size="20KB")  # codes without their scales
    again = ours.from_pretrained(tmp_path / "first", dtype=torch.bfloat16)
    assert len(layers_4bit(again)) == 14
    assert torch.equal(logits(again), logits(model))
    load_model(tmp_path / "first", torch.bfloat16).save_pretrained(tmp_path / "second")
    assert_same_files(tmp_path / "first", tmp_path / "second")


def test_a_converted_model_that_was_merged_is_saved_dense(dense: Path, tmp_path: Path) -> None:
    model = load(dense, dtype=torch.float32)
    convert_model(model)
    add_lora(model)
    model.save_pretrained(tmp_path / "training")
    with pytest.raises(ValueError, match="adapters of add_lora in it"):
        ours.from_pretrained(tmp_path / "training")
    merge_lora(model)
    model.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged", dtype=torch.float32)
    assert not layers_4bit(again) and torch.equal(logits(again), logits(model))


def test_tied_weights_stay_tied_and_dense(tmp_path: Path) -> None:
    save_llama(tmp_path / "dense", tie_word_embeddings=True)
    model = load(tmp_path / "dense", QLoRAConfig())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "saved")
    assert "lm_head.weight" not in stored(tmp_path / "saved")
    again = ours.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert torch.equal(logits(again), logits(model))


def test_a_dense_checkpoint_is_not_taken_for_one_in_4_bits(dense: Path) -> None:
    with pytest.raises(ValueError, match="not in 4 bits: pass quantization_config"):
        ours.from_pretrained(dense)


@pytest.mark.parametrize("key", ["absmax", "quant_state.bitsandbytes__nf4"])
def test_a_checkpoint_that_lacks_a_tensor_is_refused(dense: Path, tmp_path: Path, key: str) -> None:
    load(dense, QLoRAConfig()).save_pretrained(tmp_path)
    tensors = stored(tmp_path)
    del tensors[f"model.layers.0.mlp.up_proj.weight.{key}"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight"):
        ours.from_pretrained(tmp_path)


# What users and other libraries do with a model.


def test_parameters_are_counted_as_those_of_the_dense_model(dense: Path) -> None:
    model, original = load(dense, QLoRAConfig()), load(dense)
    assert model.num_parameters() == original.num_parameters()
    without = original.num_parameters(exclude_embeddings=True)
    assert model.num_parameters(exclude_embeddings=True) == without
    assert model.num_parameters(only_trainable=True) == 2 * 96 * 64 + 5 * 64


def test_a_model_is_restored_to_dense_weights(dense: Path) -> None:
    model = load(dense, QLoRAConfig())
    expected = {n: layer.dequantize() for n, layer in layers_4bit(model).items()}
    restored = model.dequantize()
    for name, weight in expected.items():
        layer = restored.get_submodule(name)
        assert type(layer) is torch.nn.Linear and torch.equal(layer.weight, weight)
    assert restored.num_parameters() == load(dense).num_parameters()
    assert not hasattr(restored.config, "quantization_config")


def test_generation_continues_with_the_likeliest_token(dense: Path) -> None:
    model = load(dense, QLoRAConfig())
    options = {"attention_mask": torch.ones_like(TOKENS)}
    generated = model.generate(TOKENS, **options, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert generated[0, 16] == logits(model)[0, -1].argmax()


# Where layers are.


def parts(last: str) -> dict[str, str]:
    names = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    return {**dict.fromkeys(names, "cpu"), "model.layers.1": last}


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, parts("cpu")])
def test_a_device_map_on_the_cpu_changes_nothing(dense: Path, device_map: Any) -> None:
    model, expected = load(dense, QLoRAConfig(), device_map=device_map), load(dense, QLoRAConfig())
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize("device_map", [parts("disk"), {"": "disk"}])
def test_layers_of_a_4_bit_checkpoint_may_stay_on_disk(
    dense: Path, tmp_path: Path, device_map: dict[str, str]
) -> None:
    places = {"device_map": device_map, "offload_folder": tmp_path / "offload"}
    with pytest.raises(ValueError, match="save_pretrained, and load that"):
        load(dense, QLoRAConfig(), **places)
    model = load(dense, QLoRAConfig())
    model.save_pretrained(tmp_path / "saved")
    again = ours.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16, **places)
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(NotImplementedError, match="without disk"):
        again.save_pretrained(tmp_path / "again")


def test_a_device_without_values_is_refused(dense: Path) -> None:
    with pytest.raises(ValueError, match="no values"):
        load(dense, QLoRAConfig(), device_map={"": "meta"})


# Interchange with bitsandbytes.


OPTIONS: dict[str, dict[str, Any]] = {
    "nf4-double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "nf4-bfloat16-storage": {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": "bfloat16",
    },
}


def test_checkpoints_of_bitsandbytes_go_to_us_and_back(
    dense: Path, tmp_path: Path, bitsandbytes_checkpoints: None
) -> None:
    theirs, mine = tmp_path / "theirs", tmp_path / "mine"
    for name, options in OPTIONS.items():
        ask("quantize", dense, theirs / name, options)
        model = load(theirs / name)
        assert len(layers_4bit(model)) == 14
        again = ours.from_pretrained(theirs / name, dtype=torch.bfloat16)
        assert torch.equal(logits(again), logits(model))
        model.save_pretrained(mine / name)
        if "bnb_4bit_quant_storage" not in options:  # we store bytes as bytes
            assert_same_files(mine / name, theirs / name)
        for folder in (theirs / name, mine / name):
            ask("logits", folder, folder / "logits.out")
        first, second = (load_file(f / name / "logits.out")["logits"] for f in (theirs, mine))
        assert torch.equal(first, second)


def test_a_skip_list_is_understood_by_bitsandbytes(dense: Path, tmp_path: Path) -> None:
    model = load(dense, QLoRAConfig(skip=["v_proj"], compute_dtype=torch.float32))
    model.save_pretrained(tmp_path)
    ask("logits", tmp_path, tmp_path / "logits.out")
    theirs = load_file(tmp_path / "logits.out")["logits"].float().flatten()
    # Both round each layer's output to bfloat16, from sums in float32 in another order.
    near = torch.nn.functional.cosine_similarity(theirs, logits(model).float().flatten(), dim=0)
    assert near > 1 - 2.0**-8


def test_importing_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "qlora_ref.integrations.transformers")
    with pytest.raises(ImportError, match="transformers"):
        importlib.import_module("qlora_ref.integrations.transformers")
