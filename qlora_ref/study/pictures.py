"""The pictures of a study, from its figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_ref.plots import plot_layer_errors, plot_losses, save
from qlora_ref.plots.canvas import Figure
from qlora_ref.plots.study import plot_block_sizes, plot_loss_rises
from qlora_ref.study.codebook_errors import BLOCK_SIZES

CODEBOOKS = ("nf4", "bof4_s", "af4", "int4", "fp4_ocp", "fp4", "nf3")
SETUPS = 4


def draw(data: Mapping[int, Mapping[str, Any]], directory: Path) -> list[str]:
    """Write a picture for each part that has figures for one; returns their names.

    data  of each part by its number; see the parts
    Raises ImportError without matplotlib.
    """
    figures = _figures(data)
    for name, figure in figures.items():
        save(figure, directory / name)
    return list(figures)


def _figures(data: Mapping[int, Mapping[str, Any]]) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    if "mse" in data.get(1, {}):
        errors = {name: data[1]["mse"][name]["exact"] for name in CODEBOOKS}
        label = "expected squared error on N(0, 1)"
        figures["block_sizes"] = plot_block_sizes(errors, BLOCK_SIZES, label)
    if "minilm_layers" in data.get(2, {}):
        figures["layers"] = plot_layer_errors(data[2]["minilm_layers"])
    if "rises" in data.get(3, {}):
        figures["loss_rises"] = plot_loss_rises(data[3]["rises"])
    if "steps" in data.get(4, {}):
        runs = list(data[4]["steps"].items())[:SETUPS]
        figures["fine_tuning"] = plot_losses({name: list(enumerate(run)) for name, run in runs})
    return figures
