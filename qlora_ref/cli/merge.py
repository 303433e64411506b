"""`qlora-ref merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from qlora_ref.cli.options import AsJson, BlockSize, DoubleQuant, Model, console, load, print_json


def merge(
    model: Model,
    adapter: Annotated[Path, typer.Option(help="directory of an adapter")],
    output: Annotated[Path, typer.Option(help="directory to write; must not exist")],
    to: Annotated[str, typer.Option(help="float: exact; 4bit: quantised anew")] = "float",
    codebook: Annotated[str, typer.Option(help="of the base it was trained on")] = "nf4",
    block_size: BlockSize = 64,
    double_quant: DoubleQuant = True,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into its 4-bit base and write the model, dense or in 4 bits."""
    from qlora_ref.adapter import load_adapter
    from qlora_ref.merging import merge_to_directory

    if output.exists():
        raise ValueError(f"{output} exists already: choose another directory")
    loaded = load(model, codebook, block_size, double_quant, "float32")
    load_adapter(loaded, adapter)
    report = merge_to_directory(loaded, model, output, to)
    if as_json:
        return print_json(report)
    console.print(f"wrote {escape(str(output))}: {report['layers']} layers merged to {to}")
    if report["worst_snr_db"] is not None:
        console.print(f"signal to quantisation noise at worst: {report['worst_snr_db']:.2f} dB")
