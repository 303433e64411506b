"""The pictures: what they say is true, and drawing one twice gives the same bytes."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_ref import quantize
from qlora_ref.codebooks import decision_thresholds, nf4_codebook
from qlora_ref.packing import unpack_codes

pytest.importorskip("matplotlib")

from qlora_ref import plots
from qlora_ref.benchmark import pictures
from qlora_ref.benchmark.report import Measurement
from qlora_ref.benchmark.run import Row
from qlora_ref.plots import __main__ as command
from qlora_ref.plots.codebooks import normalised_density, shares

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"


def texts(figure: Any) -> list[str]:
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


@pytest.mark.parametrize("block_size", [32, 64, 256])
def test_the_density_is_that_of_all_weights_but_the_largest_of_a_block(block_size: int) -> None:
    z = torch.linspace(-1, 1, 1001, dtype=torch.float64)
    area = torch.trapezoid(normalised_density(z, block_size), z).item()
    assert area == pytest.approx(1 - 1 / block_size, abs=1e-5)


def test_the_shares_are_how_often_quantising_normal_weights_gives_each_code() -> None:
    thresholds, _ = decision_thresholds(nf4_codebook())
    weights = torch.randn(1 << 20, generator=torch.Generator().manual_seed(1))
    packed = quantize(weights).packed
    counts = torch.bincount(unpack_codes(packed, weights.numel()).int(), minlength=16)
    share = shares(thresholds, 64).tolist()
    assert sum(share) == pytest.approx(1)
    for expected, count in zip(share, counts.tolist()):
        deviation = math.sqrt(expected * (1 - expected) / weights.numel())
        assert abs(count / weights.numel() - expected) < 5 * deviation


def test_every_registers_elements_are_those_of_the_instruction() -> None:
    # PTX ISA, "Matrix Fragments for mma.m16n8k16": of element i of the eight 16-bit numbers that a
    # thread holds of A, row = g, or g + 8 where i is 2, 3, 6 or 7; column = 2 t + i % 2, or 8 more
    # from i = 4 on. Two elements fill a register.
    drawn = [text for text in texts(plots.plot_fragment()) if text.startswith("thread ")]
    cells = [tuple(map(int, re.findall(r"\d+", t))) for t in drawn if "a[" in t]
    expected = {}
    for thread in range(32):
        g, t = divmod(thread, 4)
        for i in range(0, 8, 2):
            row = g + 8 * (i in (2, 3, 6, 7))
            column = 2 * t + 8 * (i >= 4)
            expected[row, column // 2] = (thread, i // 2)
    assert cells == [expected[row, pair] for row in range(16) for pair in range(8)]


def test_the_bytes_of_a_block_are_shown_as_they_are_stored() -> None:
    weights = torch.tensor([0.5, -1.0, 0.0, 0.25])
    block = quantize(weights, block_size=4)
    codes = unpack_codes(block.packed, 4).tolist()
    drawn = texts(plots.plot_nibbles(weights.tolist(), codes, 1.0, block_size=4))
    for i, byte in enumerate(block.packed.tolist()):
        assert f"byte {i}: 0x{byte:02X}" in drawn


def test_a_rooflines_legend_has_speed_and_share_of_the_roof() -> None:
    slow = plots.Kernel("reads", intensity=1.0, speed=5e9)
    fast = plots.Kernel("computes", intensity=1000.0, speed=1e12)
    narrow = plots.Kernel("float32", intensity=1000.0, speed=1e11, peak="float32")
    peaks = {"bfloat16": 4e12, "float32": 2e11}
    drawn = texts(plots.plot_roofline([slow, fast, narrow], bandwidth=1e10, peaks=peaks))
    assert "reads: 5 GFLOP/s, 50%" in drawn
    assert "computes: 1 TFLOP/s, 25%" in drawn
    assert "float32: 100 GFLOP/s, 50%" in drawn


def test_the_roofline_of_a_measurement_has_our_products_and_the_limits_beside_them() -> None:
    shared: dict[str, Any] = {
        **{"shape": "64x64", "dtype": "float32", "device": "cpu", "threads": 1, "name": "cpu"},
        **{"status": "passed", "why": "", "error": 0.0, "low": 1.0, "high": 1.0, "runs": 3},
        **{"nbytes": 10**9, "flops": 4 * 10**9, "memory_limit": 2e9, "arithmetic_limit": 1e10},
    }
    one = Row(operation="matmul_4bit", detail="1 token", ours=True, seconds=1.0, **shared)
    peer = replace(one, ours=False, name="other", seconds=0.5)
    other = replace(one, operation="quantize_4bit", arithmetic_limit=None)
    drawn = texts(pictures.roofline(Measurement({}, [one, peer, other])))
    assert [t for t in drawn if "float32, " in t] == ["float32, 1 token: 4 GFLOP/s, 50%"]
    assert "  memory: 2 GB/s" in drawn and "float32: 10 GFLOP/s" in drawn
    with pytest.raises(ValueError, match="nothing to draw"):
        pictures.roofline(Measurement({}, [other]))
    with pytest.raises(ValueError, match="among --operations"):
        pictures.check_can_draw(("quantize_4bit",))


def test_memory_bars_name_their_parts_once_and_their_totals() -> None:
    bars = {"LoRA": {"weights": 8e9, "state": 2e9}, "QLoRA": {"weights": 2e9, "state": 2e9}}
    drawn = texts(plots.plot_memory(bars))
    assert drawn.count("weights") == 1 and "  10 GB" in drawn and "  4 GB" in drawn


@pytest.mark.parametrize(
    "name",
    ["losses", *(pytest.param(n, marks=pytest.mark.slow) for n in ("layer_errors", "errors"))],
)
def test_a_picture_has_the_same_bytes_each_time(name: str, tmp_path: Path) -> None:
    data: dict[str, Any] = {
        "losses": {"run": [(1, 3.0), (2, 2.5), (3, 2.75)]},
        "layer_errors": {"q_proj": [0.1, 0.2], "down_proj": [0.3]},
        "errors": {"nf4": [0.1, -0.1, 0.0]},
    }
    for folder in ("a", "b"):
        plots.save(getattr(plots, f"plot_{name}")(data[name]), tmp_path / folder / name)
    for kind in ("svg", "png"):
        first, second = ((tmp_path / f / f"{name}.{kind}").read_bytes() for f in "ab")
        assert first == second and len(first) > 1000


def test_the_pictures_in_the_documentation_are_what_the_command_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another processor's logarithms may move a line by some millionths of a point, which also
    # changes the names that matplotlib makes of what it has drawn.
    number, name = re.compile(r"-?\d+\.\d+"), re.compile(r"\b[pm][0-9a-f]{10}\b")
    monkeypatch.setattr(command, "save", functools.partial(plots.save, formats=["svg"]))
    command.main(str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 5
    for path in tmp_path.glob("*.svg"):
        new, old = (name.sub("id", p.read_text()) for p in (path, PICTURES / path.name))
        assert number.sub("", new) == number.sub("", old), f"{path.name}: run make pictures"
        pairs = zip(number.findall(new), number.findall(old))
        assert all(abs(float(a) - float(b)) < 0.01 for a, b in pairs), path.name
