"""`qlora-ref memory`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.table import Table

from qlora_ref.cli.options import AsJson, BlockSize, Codebook, DoubleQuant, console, print_json
from qlora_ref.settings import OPTIMIZERS, Settings

if TYPE_CHECKING:
    from qlora_ref.memory_model import Prediction

_DEFAULT = Settings(model="", data="")


def memory(
    model: Annotated[
        str, typer.Option(help="a config.json, a directory with one, or a name as llama-7b")
    ],
    codebook: Codebook = _DEFAULT.codebook,
    block_size: BlockSize = _DEFAULT.block_size,
    double_quant: DoubleQuant = _DEFAULT.double_quant,
    compute_dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "bfloat16",
    r: Annotated[int, typer.Option(help="rank of the adapters")] = _DEFAULT.r,
    dropout: Annotated[float, typer.Option(help="on the adapters' inputs")] = _DEFAULT.dropout,
    adapter_dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    batch_size: Annotated[int, typer.Option(help="sequences a micro-batch")] = _DEFAULT.batch_size,
    length: Annotated[int, typer.Option(help="tokens a sequence")] = _DEFAULT.length,
    optimizer: Annotated[str, typer.Option(help=", ".join(OPTIMIZERS))] = _DEFAULT.optimizer,
    resident_bytes: Annotated[
        int, typer.Option(help="that pages of a paged optimizer may occupy; 0: 256 MiB")
    ] = _DEFAULT.resident_bytes,
    gradient_checkpointing: Annotated[
        bool, typer.Option(help="recompute activations in the backward")
    ] = _DEFAULT.gradient_checkpointing,
    reserve: Annotated[float, typer.Option(help="GiB of a GPU for what is not counted")] = 1.0,
    markdown: Annotated[bool, typer.Option("--markdown", help="print markdown")] = False,
    as_json: AsJson = False,
    plot: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="bars beside LoRA and full training in 16 bits, as PLOT.svg and PLOT.png"
        ),
    ] = None,
) -> None:
    """What fine-tuning a model will need, worked out from its configuration alone."""
    given = dict(locals())
    names = [
        *("codebook", "block_size", "double_quant", "compute_dtype", "r", "dropout", "batch_size"),
        *("length", "optimizer", "resident_bytes", "gradient_checkpointing"),
    ]
    settings = Settings(model=model, data="", **{name: given[name] for name in names})
    if adapter_dtype not in ("float32", "bfloat16"):
        raise ValueError(f"adapter_dtype must be float32 or bfloat16, got {adapter_dtype!r}")
    if as_json and markdown:
        raise ValueError("--json and --markdown exclude each other")
    import torch

    from qlora_ref.memory_model import predict_memory
    from qlora_ref.model_sizes import read_config

    found = predict_memory(read_config(model), settings, getattr(torch, adapter_dtype))
    fits = found.fits(round(reserve * 2**30))
    if plot is not None:
        from qlora_ref.plots import plot_memory, save

        save(plot_memory(found.bars()), plot)
    if as_json:
        return print_json({**found.as_dict(), "fits_gib": fits})
    console.print(_markdown(found) if markdown else _table(found), highlight=False)
    for line in _remarks(found, fits, reserve):
        console.print(line, highlight=False, soft_wrap=True)


def _rows(found: Prediction) -> list[tuple[str, str, str]]:
    parts = [(part.name, _gigabytes(part.nbytes), part.formula) for part in found.parts]
    return [*parts, ("together", _gigabytes(found.total), f"{found.total / 2**30:.2f} GiB")]


def _table(found: Prediction) -> Table:
    table = Table("", "GB", "", title=found.model, title_justify="left")
    for row in _rows(found):
        table.add_row(*row)
    table.columns[1].justify = "right"
    return table


def _markdown(found: Prediction) -> str:
    lines = [f"| {found.model} | GB | |", "|---|---:|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in _rows(found)), ""])


def _remarks(found: Prediction, fits: list[int], reserve: float) -> list[str]:
    step = found.step
    lines = [
        f"{found.parameters / 1e9:.3f} billion parameters, {found.quantised / 1e9:.3f} of them in "
        f"4 bits; {found.trainable / 1e6:.1f} million are trained.",
        f"The forward keeps {_gigabytes(step.activations)} GB of activations; the gradients of the "
        f"adapters have {_gigabytes(step.gradients)} GB.",
    ]
    if found.elsewhere:
        lines.append(f"Optimizer state paged out, at most: {_gigabytes(found.elsewhere)} GB.")
    full = found.as_dict()["full_16_bit"]
    lines.append(f"Training all of it in 16 bits, before activations: {_gigabytes(full)} GB.")
    sizes = ", ".join(map(str, fits)) or "none of those known here"
    return [*lines, f"Fits GPUs of (GiB, {reserve:g} left for what is not counted): {sizes}."]


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3f}"
