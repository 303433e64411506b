"""The benchmark of Triton kernels without a GPU: what it checks, times and says."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

pytest.importorskip("triton")
if importlib.util.find_spec("triton") is not None:
    from bench_triton import lines_of, time_case

from qlora_ref.benchmark.candidates import Case, Prepared  # noqa: E402


def prepared(error: float, milliseconds: float) -> Callable[[], Prepared]:
    return lambda: Prepared(lambda: milliseconds, lambda result: error, tolerance=0.1)


def do_bench(run: Callable[[], float], return_mode: str) -> float:
    assert return_mode == "median"
    return run()


def test_wrong_results_are_refused_and_others_timed_beside_triton() -> None:
    def broken() -> Prepared:
        raise RuntimeError("no such peer")

    case = Case(
        *("matmul_4bit", "1 token", "64x64", "bfloat16", 1, 1),
        ours={"cuda": prepared(0.0, 4.0), "triton": prepared(0.0, 2.0)},
        peers={"wrong": prepared(0.2, 1.0), "broken": broken, "NaN": prepared(torch.nan, 1.0)},
    )
    times: list[Any] = list(time_case(case, do_bench))
    assert times[:2] == [("cuda", 4.0), ("triton", 2.0)]
    assert times[2][1].startswith("refused") and times[4][1].startswith("refused")
    assert times[3] == ("broken", "failed: RuntimeError: no such peer")
    title, cuda, triton, *_ = lines_of(case, times)
    assert "matmul_4bit 64x64" in title
    assert cuda.split() == ["cuda", "4.0000", "ms", "2.00"]
    assert triton.split() == ["triton", "2.0000", "ms", "1.00"]
