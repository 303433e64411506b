"""A merged model on the disk computes what base and adapter did in memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from training import (
    TINY,
    one_thread,  # noqa: F401
    randomise_adapters,
    tiny_model,
)

import qlora_ref
from qlora_ref import Linear4bit
from qlora_ref.merging import merge_to_directory
from qlora_ref.models import load_model, load_tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from qlora_ref.integrations.transformers import QLoRAConfig  # noqa: E402

# Of the logits' norm: float32 sums in another order, amplified by four layers with large adapters.
FLOAT32_LOGITS = 1e-4


def tiny_gpt2() -> Any:
    """Its linear layers are Conv1D, which hold the weight transposed; c_proj is square."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=512, n_embd=64, n_layer=2, n_head=2, n_positions=64, bos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and ".h." in name:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def tuned(model: Any, targets: Any = "all-linear") -> Any:
    qlora_ref.convert_model(model)
    qlora_ref.add_lora(model, r=4, targets=targets)
    randomise_adapters(model)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(40).reshape(2, 20)).logits


@pytest.mark.parametrize("make", [tiny_model, tiny_gpt2])
@pytest.mark.parametrize("targets", ["all-linear", r".*\.0\..*"])
def test_a_float_merge_computes_what_base_and_adapter_did(
    tmp_path: Path, make: Any, targets: str
) -> None:
    model = tuned(make(), targets)
    expected = logits(model)
    report = merge_to_directory(model, str(TINY), tmp_path / "merged")
    assert report["worst_snr_db"] is None
    # Plain transformers reads it: there is nothing of this library in it.
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not any(isinstance(module, Linear4bit) for module in merged.modules())
    assert (logits(merged) - expected).norm() < FLOAT32_LOGITS * expected.norm()


@pytest.mark.parametrize("make", [tiny_model, tiny_gpt2])
@pytest.mark.parametrize("targets", ["all-linear", r".*\.0\..*"])
def test_a_4bit_merge_loads_with_the_bits_that_it_had(
    tmp_path: Path, make: Any, targets: str
) -> None:
    model = tuned(make(), targets)
    by_hand = copy.deepcopy(model)
    qlora_ref.merge_lora(by_hand, "4bit")
    report = merge_to_directory(model, str(TINY), tmp_path / "merged", "4bit")
    assert torch.equal(logits(load_model(tmp_path / "merged")), logits(by_hand))
    assert 10 < report["worst_snr_db"] < 40  # NF4 of Gaussian weights: about 20.7 dB


def test_a_model_that_transformers_quantised_merges_too(tmp_path: Path) -> None:
    options = {"quantization_config": QLoRAConfig(), "dtype": torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, **options)
    qlora_ref.add_lora(model, r=4)
    randomise_adapters(model)
    expected = logits(model)
    merge_to_directory(model, str(TINY), tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not any(isinstance(module, Linear4bit) for module in merged.modules())
    assert (logits(merged) - expected).norm() < FLOAT32_LOGITS * expected.norm()


def test_the_tokenizer_is_written_too(tmp_path: Path) -> None:
    merge_to_directory(tuned(tiny_model()), str(TINY), tmp_path / "merged")
    text = "To be, or not to be"
    assert load_tokenizer(tmp_path / "merged")(text) == load_tokenizer(TINY)(text)


def test_another_target_is_refused_before_anything_is_changed(tmp_path: Path) -> None:
    model = tuned(tiny_model())
    expected = logits(model)
    with pytest.raises(ValueError, match='to must be "float" or "4bit", got \'int8\''):
        merge_to_directory(model, str(TINY), tmp_path / "merged", "int8")
    assert torch.equal(logits(model), expected) and not (tmp_path / "merged").exists()


def test_a_model_without_adapters_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    qlora_ref.convert_model(model)
    with pytest.raises(ValueError, match="no adapters to merge"):
        merge_to_directory(model, str(TINY), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
