"""`qlora-ref merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from qlora_ref.cli.options import (
    AsJson,
    BaseBlockSize,
    BaseCodebook,
    BaseDoubleQuant,
    BaseDtype,
    Model,
    OtherBase,
    console,
    load_with_adapter,
    print_json,
)


def merge(
    model: Model,
    adapter: Annotated[Path, typer.Option(help="directory of an adapter")],
    output: Annotated[Path, typer.Option(help="directory to write; must not exist")],
    to: Annotated[str, typer.Option(help="float: exact; 4bit: quantised anew")] = "float",
    codebook: BaseCodebook = None,
    block_size: BaseBlockSize = None,
    double_quant: BaseDoubleQuant = None,
    compute_dtype: BaseDtype = None,
    other_base: OtherBase = False,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into its 4-bit base and write the model, dense or in 4 bits."""
    from qlora_ref.merging import merge_to_directory

    if output.exists():
        raise ValueError(f"{output} exists already: choose another directory")
    given = codebook, block_size, double_quant, compute_dtype
    loaded = load_with_adapter(model, adapter, given, "nf4", other_base)
    report = merge_to_directory(loaded, model, output, to)
    if as_json:
        return print_json(report)
    console.print(f"wrote {escape(str(output))}: {report['layers']} layers merged to {to}")
    if report["worst_snr_db"] is not None:
        console.print(f"signal to quantisation noise at worst: {report['worst_snr_db']:.2f} dB")
