"""Programs that import bitsandbytes run unchanged on this library."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes_program import ask
from safetensors.torch import load_file

from qlora_ref.stand_in import as_bitsandbytes

HERE = Path(__file__).parent


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment}
    arguments = [sys.executable, *command]
    return subprocess.run(arguments, capture_output=True, text=True, env=variables)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    folder = tmp_path_factory.mktemp("dense")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def seen(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("saved")
    program = str(HERE / "alias_program.py")
    done = run("-m", "qlora_ref.as_bitsandbytes", program, str(dense), str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return {**json.loads(done.stdout.splitlines()[-1]), "folder": folder}


def test_the_program_and_its_children_get_ours(seen: dict[str, Any]) -> None:
    assert all("qlora_ref" in file for file in seen["files"])
    assert seen["version"] == ["0.50.2", "0.50.2"] and seen["found"]
    assert seen["operators"] == "bitsandbytes::gemm_4bit"


def test_transformers_quantises_saves_and_loads(seen: dict[str, Any], dense: Path) -> None:
    assert (seen["layers"], seen["params"], seen["reloaded"]) == (14, True, True)
    model = transformers.AutoModelForCausalLM.from_pretrained(dense)
    assert seen["parameters"] == model.num_parameters()


def test_the_trainer_trains_with_a_paged_optimizer_of_ours(seen: dict[str, Any]) -> None:
    assert seen["optimizer"].startswith("qlora_ref.")
    assert seen["losses"][-1] < seen["losses"][0] - 0.3


def test_peft_merges_into_4_bits(seen: dict[str, Any]) -> None:
    assert seen["merged"] == 14


def test_what_is_saved_is_what_bitsandbytes_saves(
    seen: dict[str, Any], dense: Path, tmp_path: Path
) -> None:
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    ask("quantize", dense, tmp_path, options)
    mine = load_file(seen["folder"] / "model.safetensors")
    theirs = load_file(tmp_path / "model.safetensors")
    assert mine.keys() == theirs.keys()
    # The mean of the scales is summed in another order; its JSON and what is left of the scales
    # follow. bitsandbytes' CPU looks scales up at 65536 points: a level off, or 2 / 65535.
    exact = [k for k in mine if not k.endswith(("nf4", "nested_absmax", "weight.absmax"))]
    assert not [key for key in exact if not torch.equal(mine[key], theirs[key])]
    for key in (key for key in mine if key.endswith("weight.absmax")):
        levels = mine[key.replace("absmax", "nested_quant_map")]
        gaps = torch.nn.functional.pad(levels.diff(), (1, 1)).unfold(0, 2, 1).amax(1)
        first, second = mine[key].int(), theirs[key].int()
        off = (levels[first] - levels[second]).abs()
        assert (off <= gaps[first] + 2 / 65535).all()


def test_it_must_come_before_bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes==0.50.2")
    with pytest.raises(RuntimeError, match="very start"):
        as_bitsandbytes()


def test_children_import_what_they_need_and_the_sitecustomize_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os; os.environ['SEEN'] = 'yes'\n")
    child = "import os, sys; print(os.environ.get('SEEN'), {'torch', 'qlora_ref'} & {*sys.modules})"
    script = (
        "import os, subprocess, sys; from qlora_ref import as_bitsandbytes; del os.environ['SEEN'];"
        "as_bitsandbytes(); as_bitsandbytes();"  # twice is once
        f"print(subprocess.check_output([sys.executable, '-c', {child!r}], text=True));"
        "import bitsandbytes; as_bitsandbytes(); print(bitsandbytes.__name__)"
    )
    paths = os.pathsep.join([str(tmp_path), str(HERE.parent)])
    done = run("-c", script, PYTHONPATH=paths)
    assert done.stdout.split() == ["yes", "set()", "qlora_ref.integrations.bitsandbytes"], done


def run_here(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """The command in this process, where nothing may take the place of bitsandbytes."""
    monkeypatch.setattr("qlora_ref.stand_in.as_bitsandbytes", lambda: None)
    monkeypatch.setattr(sys, "argv", ["as_bitsandbytes", *arguments])
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    runpy.run_module("qlora_ref.as_bitsandbytes", run_name="__main__")


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_without_a_program_it_says_how_to_call_it(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=r"script\.py"):
        run_here(monkeypatch, *arguments)


def test_a_module_is_run_as_a_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_here(monkeypatch, "-m", "json.tool", "--help")
    assert "json.tool" in capsys.readouterr().out


def test_a_program_gets_its_arguments_and_its_folder(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("NAME = 'neighbour'\n")
    script = "import sys, neighbour; print(sys.argv[1:], neighbour.NAME, __name__)"
    (tmp_path / "script.py").write_text(script)
    program = str(tmp_path / "script.py")
    done = run("-W", "error", "-m", "qlora_ref.as_bitsandbytes", program, "-m", "x")
    assert done.stdout.strip() == "['-m', 'x'] neighbour __main__", done.stderr
