"""`qlora-ref inspect`."""

from __future__ import annotations

from typing import Annotated, Optional

import typer
from rich.table import Column, Table

from qlora_ref.cli.options import AsJson, console, print_json


def inspect(
    source: Annotated[str, typer.Argument(help="checkpoint directory, safetensors file, or model")],
    original: Annotated[
        Optional[str], typer.Option(help="the unquantised model, to compare with")  # noqa: UP045
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What a checkpoint holds: shape, codebook, block size, bytes, bits per parameter, error."""
    from qlora_ref.inspection import inspect_source

    rows = inspect_source(source, original)
    if as_json:
        return print_json([row.as_dict() for row in rows])
    table = Table(
        Column("tensor", overflow="fold"), "shape", "codebook", "block", "bytes", "bits", "SNR dB"
    )
    for row in rows:
        table.add_row(
            row.name,
            "x".join(map(str, row.shape)),
            row.codebook or row.dtype,
            str(row.block_size or ""),
            f"{row.nbytes:,}",
            f"{row.bits_per_parameter:.3f}",
            "" if row.snr_db is None else f"{row.snr_db:.2f}",
        )
    console.print(table)
    console.print(f"{len(rows)} tensors, {sum(row.nbytes for row in rows):,} bytes")
