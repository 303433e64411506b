"""The command line: JSON that is JSON, errors that are one line, files that hold what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_ref.dispatch import OPERATIONS

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests" / "data"
TEXT = str(DATA / "devils_dictionary.jsonl")
TINY = str(DATA / "tiny_llama")


def qlora(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qlora_ref.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def as_json(*arguments: object) -> Any:
    done = qlora(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # nothing else on standard output


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    output = tmp_path_factory.mktemp("cli") / "run"
    options = ["--steps", 8, "--batch-size", 2, "--length", 64, "--learning-rate", 3e-3]
    options += ["--evaluation-sequences", 8, "--optimizer", "adamw_8bit", "--plot"]
    options += ["--sample-prompt", "Define: LOVE", "--compute-dtype", "float32"]
    report = as_json("finetune", "--model", TINY, "--data", TEXT, "--output", output, *options)
    return output, report


def test_finetune_reports_and_writes_everything(run: tuple[Path, Any]) -> None:
    output, report = run
    assert report["perplexity_after"] < report["perplexity_before"]
    assert set(report["samples"]) == {"before", "after"}
    assert len((output / "log.jsonl").read_text().splitlines()) == 8
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "adapter" / "adapter_model.safetensors").is_file()


def test_finetune_does_not_write_into_a_full_directory(run: tuple[Path, Any]) -> None:
    output, _ = run
    done = qlora("finetune", "--model", TINY, "--data", TEXT, "--output", output)
    assert done.returncode == 1
    assert "is not empty" in done.stderr and "Traceback" not in done.stderr


def test_evaluate_tells_the_adapter_from_the_base(run: tuple[Path, Any]) -> None:
    output, _ = run
    common = ("evaluate", "--model", TINY, "--data", TEXT, "--codebook", "nf4", "--length", 64)
    base = as_json(*common, "--sequences", 8)
    tuned = as_json(*common, "--sequences", 8, "--adapter", output / "adapter")
    assert tuned["perplexity"] < base["perplexity"]
    assert tuned["tokens"] == base["tokens"]


@pytest.mark.parametrize("to", ["float", "4bit"])
def test_a_merged_model_evaluates_as_base_and_adapter_do(
    run: tuple[Path, Any], tmp_path: Path, to: str
) -> None:
    adapter = run[0] / "adapter"
    merged = as_json(
        "merge", "--model", TINY, "--adapter", adapter, "--output", tmp_path / "m", "--to", to
    )
    assert merged["layers"] == 28
    common = ("--data", TEXT, "--sequences", 8, "--length", 64)
    apart = as_json("evaluate", "--model", TINY, "--codebook", "nf4", "--adapter", adapter, *common)
    together = as_json("evaluate", "--model", tmp_path / "m", *common)
    # Exact but for float32 rounding, or another rounding to 4 bits (a tenth of a nat at most here).
    tolerance = 1e-4 if to == "float" else 0.1
    assert together["loss"] == pytest.approx(apart["loss"], abs=tolerance)
    assert (merged["worst_snr_db"] is None) == (to == "float")


def test_inspect_gives_the_error_against_the_original(
    run: tuple[Path, Any], tmp_path: Path
) -> None:
    adapter = run[0] / "adapter"
    for to in ("float", "4bit"):
        output = tmp_path / to
        as_json("merge", "--model", TINY, "--adapter", adapter, "--output", output, "--to", to)
    rows = as_json("inspect", tmp_path / "4bit", "--original", tmp_path / "float")
    row = next(r for r in rows if r["codebook"] == "nf4")
    original = _tensor(tmp_path / "float", row["name"])
    restored = _restored(tmp_path / "4bit", row["name"])
    noise = (original - restored).square().mean().item()
    assert row["mse"] == pytest.approx(noise, rel=1e-9)
    assert row["shape"] == list(original.shape) and row["block_size"] == 64


def _tensor(directory: Path, name: str) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")[name].double()


def _restored(directory: Path, name: str) -> torch.Tensor:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").functional
    from safetensors.torch import load_file

    tensors = load_file(directory / "model.safetensors")
    parts = {key: value for key, value in tensors.items() if key.startswith(f"{name}.")}
    state = bnb.QuantState.from_dict(parts, device="cpu")
    return bnb.dequantize_4bit(tensors[name], state).double()


def test_doctor_says_which_backend_serves_each_operation() -> None:
    facts = as_json("doctor")
    assert set(facts["operations"]["cpu"]) == set(OPERATIONS)
    for found in facts["operations"]["cpu"].values():
        assert found["backend"] in found["reasons"]
        assert found["reasons"][found["backend"]] == "runs"
    assert facts["packages"]["numpy"]


@pytest.mark.parametrize("command", ["finetune", "evaluate", "merge", "inspect", "doctor"])
def test_every_command_runs_for_people_too(command: str) -> None:
    done = qlora(command, "--help") if command != "doctor" else qlora(command)
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "--model", TINY, "--data", "/nowhere.txt"), "/nowhere.txt"),
        (("evaluate", "--model", "/nowhere", "--data", TEXT), "/nowhere"),
        (("evaluate", "--model", TINY, "--data", TEXT, "--codebook", "nf5"), "nf5"),
        (("evaluate", "--model", "package:no_such_package", "--data", TEXT), "no_such_package"),
        (("inspect", "/nowhere.safetensors"), "/nowhere.safetensors"),
        (("inspect", str(DATA)), "config.json"),
    ],
)
def test_an_error_is_one_line_and_names_the_culprit(arguments: Any, message: str) -> None:
    done = qlora(*arguments)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.strip().startswith("error:")
