"""`qlora-ref quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from qlora_ref.cli.options import (
    AsJson,
    BlockSize,
    Calibration,
    CalibrationSequences,
    Codebook,
    DoubleQuant,
    Model,
    ScaleSearch,
    console,
    print_json,
)


def quantize(
    model: Model,
    output: Annotated[Path, typer.Option(help="directory to write; must not exist")],
    codebook: Codebook = "nf4",
    block_size: BlockSize = 64,
    double_quant: DoubleQuant = True,
    scale_search: ScaleSearch = False,
    calibration: Calibration = "",
    calibration_sequences: CalibrationSequences = 128,
    length: Annotated[int, typer.Option(help="tokens of a piece of the calibration text")] = 512,
    dtype: Annotated[str, typer.Option(help="of what stays dense: bfloat16, float32")] = "bfloat16",
    as_json: AsJson = False,
) -> None:
    """Write a model in 4 bits; bitsandbytes and transformers read it if the codebook is theirs."""
    import torch

    from qlora_ref.checkpoint import save_model
    from qlora_ref.convert import convert_model
    from qlora_ref.data import calibration_batches
    from qlora_ref.models import load_model, load_tokenizer
    from qlora_ref.settings import choose_dtype

    if output.exists():
        raise ValueError(f"{output} exists already: choose another directory")
    tokenizer = load_tokenizer(model)
    options: dict[str, Any] = {"scale_search": scale_search}
    if calibration:
        batches = calibration_batches(calibration, tokenizer, length, calibration_sequences)
        options["calibration"] = batches
    loaded = load_model(model, choose_dtype(dtype, torch.device("cpu")))
    report = convert_model(loaded, codebook, block_size, double_quant, **options)
    save_model(loaded, output)
    tokenizer.save_pretrained(output)
    if as_json:
        return print_json({"converted": report.converted, "kept": report.kept})
    console.print(f"{report}\nwrote {escape(str(output))}", highlight=False, soft_wrap=True)
