"""llama.cpp as a peer of `qlora-ref bench`, and the scripts in benchmarks/."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from qlora_ref.benchmark import llama_cpp
from qlora_ref.benchmark.candidates import relative_error

ROOT = Path(__file__).parent.parent


def test_q4_0_blocks_are_read_as_they_are_defined() -> None:
    scale = torch.tensor([0.5, -2.0], dtype=torch.float16)
    packed = torch.arange(32, dtype=torch.uint8).view(2, 16) * 7
    blocks = torch.cat([scale.view(torch.uint8).view(2, 2), packed], dim=1)
    restored = llama_cpp.restore(blocks)
    for block in range(2):
        for i in range(16):
            byte = int(packed[block, i])
            assert restored[block, i] == (byte % 16 - 8) * float(scale[block])
            assert restored[block, i + 16] == (byte // 16 - 8) * float(scale[block])


@pytest.mark.skipif(not llama_cpp.is_installed(), reason="no binding of llama.cpp is installed")
@pytest.mark.parametrize("rows", [64, 60])  # with llama.cpp's order of the weight, and without
def test_llama_cpp_multiplies_by_what_its_blocks_stand_for(rows: int) -> None:
    x, weight = torch.randn(3, 128), torch.randn(rows, 128)
    product = llama_cpp.Product(x, weight, threads=1)
    exact = x.double() @ product.weight.double().t()
    assert relative_error(product.run(), exact) < 0.02  # x is rounded to 8 bits
    assert relative_error(product.weight, weight.double()) < 0.1


SCRIPTS = ["quantize_4bit", "dequantize_4bit", "quantize_8bit", "dequantize_8bit", "adamw_step"]


@pytest.mark.parametrize("operation", SCRIPTS)
def test_every_script_runs(
    operation: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = importlib.import_module(f"bench_{operation}")
    sizes = ["--rows", "64", "--columns", "64", "--repeats", "1", "--threads", "1"]
    with mock.patch.object(sys, "argv", [operation, *sizes]):
        script.main()
    shown = capsys.readouterr().out
    assert f"{operation}" in shown and "bitsandbytes" in shown


def test_the_product_script_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = importlib.import_module("bench_matmul_4bit")
    monkeypatch.setattr(script, "print_overhead", lambda: None)  # thousands of calls
    what = ["--shapes", "64x128", "--tokens", "64", "--dtypes", "float32"]
    with mock.patch.object(sys, "argv", ["bench", *what, "--threads", "1", "--repeats", "1"]):
        script.main()
    shown = capsys.readouterr().out
    assert "forward M=64" in shown and "gradient M=64" in shown and "torch dense" in shown
