"""The command line: JSON that is JSON, errors that are one line, files that hold what they say."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training import qlora

from qlora_ref.cli.finetune import _parse_targets
from qlora_ref.dispatch import OPERATIONS

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests" / "data"
TEXT = str(DATA / "devils_dictionary.jsonl")
TINY = str(DATA / "tiny_llama")


def in_a_process(*arguments: object) -> subprocess.CompletedProcess[str]:
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
    signal = original.square().mean().item()
    assert row["mse"] == pytest.approx(noise, rel=1e-9)
    assert row["snr_db"] == pytest.approx(10 * math.log10(signal / noise), rel=1e-9)
    assert row["max_error"] == (original - restored).abs().max().item()
    assert row["shape"] == list(original.shape) and row["block_size"] == 64


def _tensor(directory: Path, name: str) -> torch.Tensor:
    return load_file(directory / "model.safetensors")[name].double()


def _restored(directory: Path, name: str) -> torch.Tensor:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").functional
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


def test_a_process_of_its_own_does_the_same() -> None:
    done = in_a_process("doctor", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["operations"]
    done = in_a_process("inspect", "/nowhere.safetensors")
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["finetune", "study"])
def test_pictures_without_matplotlib_are_refused_before_the_work(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "qlora_ref.finetune", None)  # what would do the work
    monkeypatch.setitem(sys.modules, "qlora_ref.study.run", None)
    options = {
        "finetune": ["--model", TINY, "--data", TEXT, "--output", tmp_path / "run", "--plot"],
        "study": ["--parts", 1, "--quick", "--plots", tmp_path / "run"],
    }
    done = qlora(command, *options[command])
    assert done.returncode == 1 and "matplotlib" in done.stderr
    assert not (tmp_path / "run").exists()


def test_finetune_away_from_a_terminal_prints_plain_lines(tmp_path: Path) -> None:
    options = ["--steps", 2, "--length", 32, "--evaluation-sequences", 2]
    done = qlora("finetune", "--model", TINY, "--data", TEXT, "--output", tmp_path / "o", *options)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr and "\r" not in done.stderr
    steps = [line for line in done.stderr.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == ["1/2", "2/2"]
    assert "held-out perplexity" in done.stdout and "tokens a second" in done.stdout


def test_brackets_in_names_and_samples_are_no_markup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = qlora("evaluate", "--model", "/no/[red]such[/blue]", "--data", TEXT)
    assert done.returncode == 1 and "/no/[red]such[/blue]" in done.stderr
    monkeypatch.setattr("qlora_ref.finetune.generate", lambda *rest: "wild [/text] [bold]")
    output = tmp_path / "a[/b]"
    options = ["--steps", 1, "--length", 32, "--evaluation-sequences", 2, "--sample-prompt", "x"]
    done = qlora("finetune", "--model", TINY, "--data", TEXT, "--output", output, *options)
    assert done.returncode == 0, done.stderr
    assert "wild [/text] [bold]" in done.stdout


def test_inspect_tells_files_directories_and_models_alike(
    run: tuple[Path, Any], tmp_path: Path
) -> None:
    qlora("merge", "--model", TINY, "--adapter", run[0] / "adapter", "--output", tmp_path / "m")
    adapter = run[0] / "adapter"
    qlora("merge", "--model", TINY, "--adapter", adapter, "--output", tmp_path / "q", "--to=4bit")
    directory = as_json("inspect", tmp_path / "q")
    assert as_json("inspect", tmp_path / "q" / "model.safetensors") == directory
    assert sum(row["codebook"] == "nf4" for row in directory) == 28
    for row in directory:
        if row["codebook"]:  # 4 + 8 / 64 + 32 / (64 * 256) bits, the offset and rounding up
            assert 4.127 <= row["bits_per_parameter"] < 4.14
    dense = as_json("inspect", TINY)
    assert {row["name"] for row in dense} == {row["name"] for row in directory}
    assert {row["bits_per_parameter"] for row in dense} == {16.0}
    assert sum(math.prod(row["shape"]) for row in dense) == 918656
    table = qlora("inspect", tmp_path / "q").stdout
    assert "39 tensors" in table and "nf4" in table


def test_inspect_refuses_an_original_of_other_shapes(tmp_path: Path) -> None:
    from qlora_ref import convert_model
    from qlora_ref.checkpoint import save_model
    from qlora_ref.models import load_model

    model: Any = load_model(TINY)
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(128, 256, bias=False)
    convert_model(model)
    save_model(model, tmp_path / "m")
    done = qlora("inspect", tmp_path / "m", "--original", TINY)
    assert done.returncode == 1 and "must have shape" in done.stderr


def test_merge_refuses_a_directory_that_exists(run: tuple[Path, Any], tmp_path: Path) -> None:
    adapter = run[0] / "adapter"
    done = qlora("merge", "--model", TINY, "--adapter", adapter, "--output", tmp_path)
    assert done.returncode == 1 and "exists already" in done.stderr
    done = qlora("merge", "--model", TINY, "--adapter", tmp_path, "--output", tmp_path / "new")
    assert done.returncode == 1 and "adapter_config.json" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all-linear", "all-linear"),
        ("q_proj", ["q_proj"]),
        ("q_proj,v_proj", ["q_proj", "v_proj"]),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
    ],
)
def test_one_name_is_a_list_of_names_and_not_a_regular_expression(text: str, expected: Any) -> None:
    assert _parse_targets(text) == expected
