"""The command `study`: what it writes, what it refuses."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
import torch

from qlora_ref.cli import main
from qlora_ref.study.options import Options
from qlora_ref.study.paired import difference, mean_of
from qlora_ref.study.report import Claim, Part, Table, verdict
from qlora_ref.study.run import run


def study(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`qlora-ref study` in this process, which has torch loaded already."""
    command = ["qlora-ref", "study", *arguments]
    out, err, code = io.StringIO(), io.StringIO(), None
    with mock.patch.object(sys, "argv", command), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as leaving:
            code = leaving.code
    return subprocess.CompletedProcess(command, int(code or 0), out.getvalue(), err.getvalue())


def test_the_command_writes_a_page_and_its_figures_and_repeats_them(tmp_path: Path) -> None:
    done = study("--parts", "1", "--quick", "--json", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "study.json").read_text())
    assert figures == json.loads(done.stdout)
    page = (tmp_path / "study.md").read_text()
    assert "qlora-ref study --parts 1 --quick" in page
    nf4 = figures["parts"][0]["data"]["mse"]["nf4"]
    assert f"{nf4['exact'][1]:.4e}" in page  # a figure of the page is one of the file
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    assert run(Options(parts=(1,), quick=True)).markdown() == page
    assert torch.get_num_threads() == 2  # put back
    torch.set_num_threads(threads)


@pytest.mark.parametrize("parts", ["7", "one", "1;2", ""])
def test_unknown_parts_are_refused_in_one_line(parts: str) -> None:
    done = study("--parts", parts)
    assert done.returncode == 1 and done.stdout == ""
    assert "parts must be" in done.stderr and "Traceback" not in done.stderr


def test_a_paired_difference_forgets_what_both_share() -> None:
    shared = torch.randn(1000, generator=torch.Generator().manual_seed(0)).double() * 100
    noise = torch.tensor([0.5, 1.5]).repeat(500).double()
    found = difference(shared + noise, shared)
    assert found.mean == pytest.approx(1.0)
    # s / sqrt(n), with s^2 = n / (n - 1) * 0.25
    assert found.error == pytest.approx((0.25 * 1000 / 999) ** 0.5 / 1000**0.5)
    assert mean_of(shared).error > 2
    assert (verdict(3.1), verdict(-3.1), verdict(2.9)) == ("holds", "does not hold", "not settled")


def test_a_table_is_markdown_that_no_cell_can_break() -> None:
    table = Table("Title", {"name": "", "x": ".2f"}, [("a | b", 1.234), ("c", None)])
    assert table.markdown().splitlines() == [
        "**Title**",
        "",
        "| name | x |",
        "| --- | ---: |",
        "| a \\| b | 1.23 |",
        "| c |  |",
    ]
    claim = Claim("it is so", "paper", "it is", "holds", 4.0)
    part = Part(1, "Part", ["Text.", table], [claim], {}, ["what is missing"])
    assert "*Not run here: what is missing*" in part.markdown()
    assert part.as_dict()["tables"][0]["rows"][0] == {"name": "a | b", "x": 1.234}


@pytest.mark.parametrize("missing", ["model", "text"])
def test_what_is_not_there_is_skipped_and_said(missing: str) -> None:
    data = Path(__file__).parent / "data"
    places = {"model": str(data / "tiny_llama"), "text": str(data / "shakespeare.txt")}
    places[missing] = "/no/such/place"
    told: list[str] = []
    found = run(Options(parts=(3, 4), quick=True, **places), told.append)
    assert "*Not run here: there is no" in found.markdown()
    assert [line[:15] for line in told] == ["part 3: skipped", "part 4: skipped"]
