"""`qlora-ref quantize`, and fine-tunes whose base is no plain conversion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import TEXT, TINY, as_json
from training import qlora

import qlora_ref
from qlora_ref.data import calibration_batches
from qlora_ref.finetune import finetune
from qlora_ref.models import load_model, load_tokenizer
from qlora_ref.module4bit import layers_4bit
from qlora_ref.settings import Settings

PLAYS = Path(__file__).parent / "data" / "shakespeare.txt"


def weights(model: Any) -> dict[str, Any]:
    return {name: layer.quantized_weight for name, layer in layers_4bit(model).items()}


def test_calibration_batches_are_whole_pieces_spread_over_the_text() -> None:
    tokenizer = load_tokenizer(TINY)
    batches = calibration_batches(PLAYS, tokenizer, 100, 20)
    assert [tuple(batch.shape) for batch in batches] == [(8, 100), (8, 100), (4, 100)]
    ids = tokenizer.backend_tokenizer.encode(PLAYS.read_text()).ids
    step = len(ids) // 100 // 20
    found = torch.cat(batches).tolist()
    assert found == [ids[100 * step * i : 100 * step * i + 100] for i in range(20)]


def test_of_a_short_text_all_is_used(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("To be, or not to be.")
    (batch,) = calibration_batches(tmp_path / "a.txt", load_tokenizer(TINY), 512, 4)
    assert batch.shape[0] == 1 and 4 < batch.shape[1] < 30
    with pytest.raises(ValueError, match="at least 1 sequence"):
        calibration_batches(tmp_path / "a.txt", load_tokenizer(TINY), 512, 0)


@pytest.mark.parametrize("codebook", ["nf4", "bof4_s"])
def test_quantize_writes_what_convert_model_makes(codebook: str, tmp_path: Path) -> None:
    options = ["--codebook", codebook, "--scale-search", "--dtype", "float32"]
    report = as_json("quantize", "--model", TINY, "--output", tmp_path / "q", *options)
    model = load_model(TINY)
    qlora_ref.convert_model(model, codebook, scale_search=True)
    loaded = load_model(tmp_path / "q")
    assert weights(loaded) == weights(model) and len(report["converted"]) == 28
    assert load_tokenizer(tmp_path / "q").vocab_size == 512


def test_quantize_refuses_a_directory_that_exists_and_text_that_does_not(tmp_path: Path) -> None:
    done = qlora("quantize", "--model", TINY, "--output", tmp_path)
    assert done.returncode == 1 and "exists already" in done.stderr
    calibration = ["--calibration", tmp_path / "none.txt"]
    done = qlora("quantize", "--model", TINY, "--output", tmp_path / "q", *calibration)
    assert done.returncode == 1 and "none.txt" in done.stderr and not (tmp_path / "q").exists()


@pytest.mark.slow
def test_quantize_with_a_calibration_text_is_near_the_dense_model(tmp_path: Path) -> None:
    for name, options in (("plain", []), ("fed_back", ["--calibration", PLAYS, "--length", 128])):
        qlora(
            "quantize", "--model", TINY, "--output", tmp_path / name, "--codebook", "nf3", *options
        )
    found = [
        as_json("evaluate", "--model", model, "--data", PLAYS, "--length", 128)["loss"]
        for model in (TINY, tmp_path / "fed_back", tmp_path / "plain")
    ]
    assert found[0] < found[1] < found[2]


@pytest.mark.parametrize(
    "options", [{"init": "pissa", "init_iterations": 1}, {"scale_search": True}]
)
def test_a_base_of_its_own_is_written_beside_the_adapter(options: dict, tmp_path: Path) -> None:
    small: dict[str, Any] = {"steps": 1, "length": 32, "evaluation_sequences": 2, "r": 4}
    settings = Settings(TINY, TEXT, compute_dtype="float32", **small, **options)
    result = finetune(settings, tmp_path / "run")
    adapter, base = tmp_path / "run" / "adapter", tmp_path / "run" / "base"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    both = ["--adapter", adapter, "--data", TEXT, "--length", 32, "--sequences", 4]
    assert as_json("evaluate", "--model", base, *both)["tokens"] > 0
    refused = qlora("evaluate", "--model", TINY, "--codebook", "nf4", *both)
    assert (
        refused.returncode == 1 and "another base" in refused.stderr and str(base) in refused.stderr
    )
    resumed = finetune(settings, tmp_path / "run", resume=True)
    assert resumed.after == result.after


def test_a_plain_base_is_not_written(tmp_path: Path) -> None:
    small: dict[str, Any] = {"steps": 1, "length": 32, "evaluation_sequences": 2, "r": 4}
    finetune(Settings(TINY, TEXT, compute_dtype="float32", **small), tmp_path / "run")
    assert not (tmp_path / "run" / "base").exists()


@pytest.mark.parametrize(
    "options,message",
    [
        ({"init": "svd"}, "init must be one of zero, loftq, pissa"),
        ({"init_iterations": 0}, "init_iterations must be at least 1"),
        ({"calibration_sequences": 0}, "calibration_sequences must be at least 1"),
        ({"calibration": "a.txt", "init": "pissa"}, "quantises the base anew"),
        ({"calibration": "a.txt", "init": "loftq"}, "quantises the base anew"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(TINY, TEXT, **options)
    assert not Settings(TINY, TEXT, calibration="a", init="loftq", init_iterations=1).plain_base
