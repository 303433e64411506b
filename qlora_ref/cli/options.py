"""What commands share: options, the two consoles, a model loaded as options say, JSON."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console

from qlora_ref.codebooks import CODEBOOKS

console = Console()
messages = Console(stderr=True)

Model = Annotated[
    str, typer.Option(help="directory, hub name, GGUF file, or package:NAME that carries a GGUF")
]
Data = Annotated[str, typer.Option(help="text file, .jsonl of prompts and answers, or directory")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON on standard output, nothing else")]
Codebook = Annotated[str, typer.Option(help=", ".join(CODEBOOKS))]
BlockSize = Annotated[int, typer.Option(help="values per scale")]
DoubleQuant = Annotated[bool, typer.Option(help="quantise the scales to 8 bits")]
ScaleSearch = Annotated[bool, typer.Option(help="scales with the least squared error, not absmax")]
Calibration = Annotated[str, typer.Option(help="text for error feedback (GPTQ); a path as of data")]
CalibrationSequences = Annotated[int, typer.Option(help="pieces of that text, at most")]


def load(
    source: str, codebook: str, block_size: int, double_quant: bool, compute_dtype: str
) -> Any:
    """The model in 4 bits, unless codebook is none or it is in 4 bits already."""
    import torch

    from qlora_ref.convert import convert_model
    from qlora_ref.models import load_model
    from qlora_ref.module4bit import layers_4bit
    from qlora_ref.settings import choose_dtype

    model = load_model(source, choose_dtype(compute_dtype, torch.device("cpu")))
    if codebook != "none" and not layers_4bit(model):
        convert_model(model, codebook, block_size, double_quant)
    return model


def print_json(value: Any) -> None:
    """Print the value as JSON on standard output."""
    print(json.dumps(value, indent=2, default=str))
