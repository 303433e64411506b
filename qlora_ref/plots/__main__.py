"""python -m qlora_ref.plots DIRECTORY: the pictures that need no measurement, as SVG and PNG."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from qlora_ref.codebooks import nf4_codebook, resolve_codebook
from qlora_ref.packing import unpack_codes
from qlora_ref.plots import (
    plot_codebooks,
    plot_errors,
    plot_fragment,
    plot_nibbles,
    plot_thresholds,
    save,
)
from qlora_ref.plots.canvas import Figure
from qlora_ref.quantized import quantize

SHOWN = ("nf4", "fp4", "fp4_ocp", "int4", "af4", "bof4", "bof4_s")


def figures() -> dict[str, Figure]:
    """Every picture by the name of its file."""
    weights = torch.randn(64 * 4096, generator=torch.Generator().manual_seed(0))
    block = quantize(0.1 * weights[:64])
    codes = unpack_codes(block.packed, 8).tolist()
    errors = {name: (quantize(weights, name).dequantize() - weights).tolist() for name in SHOWN[:4]}
    levels = {name: resolve_codebook(name)[1].unique().tolist() for name in SHOWN}
    return {
        "codebooks": plot_codebooks(levels),
        "thresholds": plot_thresholds("NF4", nf4_codebook()),
        "errors": plot_errors(errors, "in standard deviations of the weights"),
        "nibbles": plot_nibbles((0.1 * weights[:8]).tolist(), codes, block.absmax[0].item()),
        "fragment": plot_fragment(),
    }


def main(directory: str) -> None:
    """Draw all of them into a directory."""
    for name, figure in figures().items():
        save(figure, Path(directory) / name)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m qlora_ref.plots DIRECTORY")
    main(sys.argv[1])
