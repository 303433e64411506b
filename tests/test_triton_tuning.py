"""Tiles of Triton kernels are tried only when that is asked for, and never in silence."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from types import ModuleType

import pytest

from qlora_ref import dispatch

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1" or importlib.util.find_spec("triton") is None,
    reason="needs triton, and what is interpreted is not tuned",
)

TILES = [{"BLOCK_M": 16}, {"BLOCK_M": 32}, {"BLOCK_M": 64}]
MILLISECONDS = {16: 3.0, 32: 1.0, 64: float("inf")}


@pytest.fixture
def tuning(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    from qlora_kernels import tuning

    monkeypatch.setattr(tuning, "_time", lambda tile, run: MILLISECONDS[tile["BLOCK_M"]])
    monkeypatch.setattr(tuning, "_fastest", {})
    tuning.tune()
    yield tuning
    tuning.tune(False)


def test_the_fastest_tile_is_taken_and_the_log_says_so(
    tuning: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="qlora_kernels"):
        assert tuning.fastest("a product", TILES, print) == TILES[1]
        assert len(caplog.records) == 2 and "a product" in caplog.text
        assert tuning.fastest("a product", TILES, print) == TILES[1]
    assert len(caplog.records) == 2  # remembered


def test_without_being_asked_the_first_tile_is_taken(tuning: ModuleType) -> None:
    tuning.tune(False)
    assert tuning.fastest("a product", TILES, print) == TILES[0]


@pytest.mark.parametrize("value,wanted", [("1", True), ("", False)])
def test_the_environment_asks_for_it(
    value: str, wanted: bool, tuning: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning.tune(False)
    monkeypatch.setenv("QLORA_REF_TRITON_TUNE", value)
    dispatch._load.__wrapped__("triton", "matmul_4bit", None)  # as when it is first called
    assert (tuning.fastest("a product", TILES, print) == TILES[1]) is wanted
