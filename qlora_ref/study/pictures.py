"""The pictures of a study, from its figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_ref.plots import plot_layer_errors, plot_losses
from qlora_ref.plots.canvas import Figure
from qlora_ref.plots.study import plot_block_sizes, plot_loss_rises
from qlora_ref.study.codebook_errors import BLOCK_SIZES

# name of the file: part that it belongs to, what it shows
CAPTIONS = {
    "block_sizes": (1, "The expected squared error of codebooks against the block size"),
    "layers": (2, "The relative error of NF4 in each linear layer of MiniLM"),
    "loss_rises": (3, "Loss rise of each rounding against its relative error"),
    "fine_tuning": (4, "The loss of each step of four fine-tunes"),
}
CODEBOOKS = ("nf4", "bof4_s", "af4", "int4", "fp4_ocp", "fp4", "nf3")
SETUPS = 4


def figures(data: Mapping[int, Mapping[str, Any]]) -> dict[str, Figure]:
    """A picture for each part that has figures for one, by the name of its file.

    data  of each part by its number; see the parts
    Raises ImportError without matplotlib.
    """
    drawn: dict[str, Figure] = {}
    if "mse" in data.get(1, {}):
        errors = {name: data[1]["mse"][name]["exact"] for name in CODEBOOKS}
        label = "expected squared error on N(0, 1)"
        drawn["block_sizes"] = plot_block_sizes(errors, BLOCK_SIZES, label)
    if "minilm_layers" in data.get(2, {}):
        drawn["layers"] = plot_layer_errors(data[2]["minilm_layers"])
    if "rises" in data.get(3, {}):
        drawn["loss_rises"] = plot_loss_rises(data[3]["rises"])
    if "steps" in data.get(4, {}):
        runs = list(data[4]["steps"].items())[:SETUPS]
        drawn["fine_tuning"] = plot_losses({name: list(enumerate(run)) for name, run in runs})
    return drawn
