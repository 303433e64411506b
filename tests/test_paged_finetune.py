"""`--optimizer paged_adamw_8bit` and its relatives: the run of the unpaged, and a report of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from training import adapter_bytes, log_lines, one_thread, tiny_settings  # noqa: F401
from typer.testing import CliRunner

from qlora_ref.cli import app
from qlora_ref.finetune import finetune
from qlora_ref.settings import OPTIMIZERS

pytest.importorskip("transformers", reason="transformers is not installed")

# At r = 512 every adapter's state is 64 KiB or more, in 8 bits too.
RANK = 512
SMALLEST = 1 << 20


@pytest.mark.parametrize("bits", (pytest.param("", marks=pytest.mark.slow), "_8bit", "_32bit"))
def test_paged_run_is_the_unpaged_one(tmp_path: Path, bits: str) -> None:
    for name in ("adamw", "paged_adamw"):
        settings = tiny_settings(r=RANK, optimizer=name + bits, resident_bytes=SMALLEST)
        result = finetune(settings, tmp_path / name)
        assert (result.paging is not None) == (name == "paged_adamw")
    assert adapter_bytes(tmp_path / "adamw") == adapter_bytes(tmp_path / "paged_adamw")
    assert log_lines(tmp_path / "adamw") == log_lines(tmp_path / "paged_adamw")
    counters = result.paging.counters
    assert result.paging.streamed_bytes > 0 and counters.bytes_in > 0
    # Hooks have brought the first pages in before each step.
    assert counters.hits > 0 and counters.misses == 0
    state = next(i for i in result.memory.items if i.name == "optimizer state")
    assert state.measured == pytest.approx(state.expected, rel=0.01)  # alignment, last blocks


def test_command_line_prints_what_was_paged(tmp_path: Path) -> None:
    settings = tiny_settings()
    options = ["--model", settings.model, "--data", settings.data, "--steps", "2", "--r", "64"]
    options += ["--length", "32", "--evaluation-sequences", "2", "--page-directory", str(tmp_path)]
    output = tmp_path / "run"
    command = ["finetune", *options, "--optimizer", "paged_adamw", "--output", str(output)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "paged state (file): " in done.output and " hidden" in done.output
    assert json.loads((output / "report.json").read_text())["paging"]["mode"] == "file"


def test_every_name_says_its_bits_and_whether_it_is_paged() -> None:
    for name, (bits, paged) in OPTIMIZERS.items():
        assert bits == (8 if name.endswith("_8bit") else 32)
        assert paged == name.startswith("paged_")
