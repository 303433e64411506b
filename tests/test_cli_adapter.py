"""`merge` and `evaluate` put an adapter on the base that it was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training import few_pairs, qlora, save_changed_model

import qlora_ref
from qlora_ref.models import load_model
from qlora_ref.module4bit import layers_4bit

pytest.importorskip("transformers", reason="transformers is not installed")

BASE = ("fp4", 128, False)
SAID = "codebook fp4, block_size 128, double_quant False, dtype bfloat16"


def no_bfloat16(model: Any) -> None:
    """Weights that bfloat16 rounds, so that it matters which dtype they are quantised from."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.01 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A float32 model, and an adapter trained on it in fp4, quantised from bfloat16."""
    folder = tmp_path_factory.mktemp("tuned")
    model = save_changed_model(folder / "model", no_bfloat16)
    options = ["--codebook", "fp4", "--block-size", 128, "--no-double-quant"]
    options += ["--compute-dtype", "bfloat16", "--steps", 2, "--length", 32, "--r", 4]
    options += ["--evaluation-sequences", 2, "--learning-rate", 1e-2]
    run = ("finetune", "--model", model, "--data", few_pairs(), "--output", folder / "run")
    done = qlora(*run, *options)
    assert done.returncode == 0, done.stderr
    return model, folder / "run" / "adapter"


def test_merge_adds_to_the_base_that_was_trained_on(
    tuned: tuple[Path, Path], tmp_path: Path
) -> None:
    model, adapter = tuned
    done = qlora("merge", "--model", model, "--adapter", adapter, "--output", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    assert SAID in done.stderr and str(adapter) in done.stderr
    base = load_model(model, torch.bfloat16)
    qlora_ref.convert_model(base, *BASE)
    update = load_file(adapter / "adapter_model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, layer in layers_4bit(base).items():
        a, b = (update[f"base_model.model.{name}.lora_{m}.weight"].double() for m in "AB")
        expected = layer.dequantize(torch.float32).double() + 32 / 4 * (b @ a)
        assert torch.equal(merged[f"{name}.weight"], expected.float())
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}


def test_evaluate_quantises_as_the_adapter_records(tuned: tuple[Path, Path]) -> None:
    model, adapter = tuned
    common = ["evaluate", "--model", model, "--adapter", adapter, "--data", few_pairs()]
    common += ["--length", 32, "--sequences", 4, "--json"]
    options = ["--codebook", "fp4", "--block-size", 128, "--no-double-quant"]
    explicit = qlora(*common, *options, "--compute-dtype", "bfloat16")
    recorded = qlora(*common)
    assert explicit.returncode == 0 and explicit.stderr == ""
    assert SAID in recorded.stderr
    assert json.loads(recorded.stdout) == json.loads(explicit.stdout)


@pytest.mark.parametrize("option", ["--codebook=nf4", "--codebook=none", "--compute-dtype=float32"])
def test_evaluate_puts_an_adapter_on_another_base_only_if_told(
    tuned: tuple[Path, Path], option: str
) -> None:
    model, adapter = tuned
    command = ["evaluate", "--model", model, "--adapter", adapter, "--data", few_pairs(), option]
    command += ["--length", 32, "--sequences", 2]
    refused = qlora(*command)
    assert refused.returncode == 1
    assert "another base" in refused.stderr and "--other-base" in refused.stderr
    assert qlora(*command, "--other-base").returncode == 0
