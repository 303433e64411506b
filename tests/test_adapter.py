"""Adapters go to PEFT and come from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import qlora_ref
from qlora_ref.adapter import load_adapter, save_adapter
from qlora_ref.models import load_model

MODEL = Path(__file__).parent / "data" / "tiny_llama"
# Both libraries add the same two products in float32; PEFT scales after B, this library before.
SAME_FORMULA = 1e-4

peft = pytest.importorskip("peft", reason="peft is not installed")


def base() -> Any:
    model = load_model(MODEL)
    qlora_ref.convert_model(model)
    return model


def trained() -> Any:
    torch.manual_seed(3)
    model = base()
    qlora_ref.add_lora(model, r=4, alpha=8, targets=["q_proj", "down_proj"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def test_peft_reads_an_adapter_and_computes_the_same(tmp_path: Path) -> None:
    model = trained()
    save_adapter(model, tmp_path / "adapter", "tiny")
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter")
    assert torch.allclose(logits(theirs), logits(model), atol=SAME_FORMULA)
    assert not torch.allclose(logits(base()), logits(model), atol=0.1)  # the adapter does something


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_an_adapter_of_peft_is_read_and_computes_the_same(
    tmp_path: Path, targets: Any, rslora: bool
) -> None:
    torch.manual_seed(4)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, use_rslora=rslora, init_lora_weights=False
    )
    theirs = peft.get_peft_model(base(), config)
    theirs.save_pretrained(tmp_path)
    ours = base()
    load_adapter(ours, tmp_path)
    assert torch.allclose(logits(ours), logits(theirs), atol=SAME_FORMULA)


def test_a_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    model, copy = trained(), base()
    save_adapter(model, tmp_path / "adapter")
    report = load_adapter(copy, tmp_path / "adapter")
    assert len(report.layers) == 8
    assert torch.equal(logits(copy), logits(model))


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q": 2}},
        {"alpha_pattern": {"q": 2}},
        {"bias": "all"},
        {"peft_type": "LOHA"},
        {"alora_invocation_tokens": [1, 2]},  # acts on some tokens only
        {"init_lora_weights": "pissa"},  # starts by taking A and B off the base
    ],
)
def test_what_this_library_cannot_compute_is_refused(tmp_path: Path, change: Any) -> None:
    save_adapter(trained(), tmp_path / "adapter")
    edit_config(tmp_path / "adapter", **change)
    with pytest.raises(ValueError, match="only plain LoRA"):
        load_adapter(base(), tmp_path / "adapter")


def save_theirs(directory: Path, **options: Any) -> None:
    dense = load_model(MODEL)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], **options)
    peft.get_peft_model(dense, config).save_pretrained(directory)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"layers.0.self_attn.q_proj": 2}},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
    ],
)
def test_what_peft_writes_of_other_kinds_is_refused(tmp_path: Path, options: Any) -> None:
    save_theirs(tmp_path, **options)
    model = base()
    with pytest.raises(ValueError, match="only plain LoRA is read"):
        load_adapter(model, tmp_path)
    assert torch.equal(logits(model), logits(base()))


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal"])
def test_every_plain_start_of_peft_is_read(tmp_path: Path, start: Any) -> None:
    save_theirs(tmp_path, init_lora_weights=start)
    assert len(load_adapter(base(), tmp_path).layers) == 4


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    save_adapter(trained(), tmp_path / "adapter")
    with pytest.raises(ValueError, match="adapter of another model"):
        load_adapter(torch.nn.Sequential(qlora_ref.Linear4bit(64, 64)), tmp_path / "adapter")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    save_adapter(trained(), tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot read the adapter"):
        load_adapter(base(), tmp_path / "adapter")


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"r": 4'])
def test_a_damaged_configuration_is_named(tmp_path: Path, content: str | None) -> None:
    save_adapter(trained(), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match="cannot read the adapter's .*adapter_config.json"):
        load_adapter(base(), tmp_path / "adapter")


def test_matrices_of_another_rank_are_named(tmp_path: Path) -> None:
    save_adapter(trained(), tmp_path / "adapter")
    edit_config(tmp_path / "adapter", r=8)
    with pytest.raises(ValueError, match=r"lora_.\.weight must have shape .*, got"):
        load_adapter(base(), tmp_path / "adapter")


def test_a_full_disk_keeps_the_adapter_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(tensors: Any, path: Path, **options: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    save_adapter(trained(), tmp_path / "adapter")
    monkeypatch.setattr("safetensors.torch.save_file", run_out)
    with pytest.raises(OSError, match="no space left"):
        save_adapter(trained(), tmp_path / "adapter")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    load_adapter(base(), tmp_path / "adapter")


def test_a_model_without_adapters_has_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adapters"):
        save_adapter(base(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
