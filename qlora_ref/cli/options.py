"""What commands share: options, the two consoles, a model loaded as options say, JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.markup import escape

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


# Of commands that take an adapter; None: not said.
BaseCodebook = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="of the base (none: as it is); else as the adapter records"),
]
BaseBlockSize = Annotated[
    Optional[int], typer.Option(help="values per scale; else as recorded")  # noqa: UP045
]
BaseDoubleQuant = Annotated[
    Optional[bool], typer.Option(help="scales in 8 bits; else as recorded")  # noqa: UP045
]
BaseDtype = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="float32, bfloat16 or float16, of the weights before; else as recorded"),
]
OtherBase = Annotated[
    bool, typer.Option("--other-base", help="put the adapter on a base that it was not trained on")
]


def load_with_adapter(
    source: str, adapter: Path | None, given: tuple[Any, ...], codebook: str, other_base: bool
) -> Any:
    """The model and, on it, the adapter: the base as options say, else as the adapter records.

    given     codebook, block size, double quantisation, dtype: options, None where not said
    codebook  where neither says one
    """
    import torch

    from qlora_ref.adapter import load_adapter, recorded_base
    from qlora_ref.checkpoint import is_quantized_checkpoint
    from qlora_ref.convert import convert_model
    from qlora_ref.models import load_model
    from qlora_ref.module4bit import layers_4bit
    from qlora_ref.settings import choose_dtype

    default = {"codebook": codebook, "block_size": 64, "double_quant": True, "dtype": "float32"}
    said = {name: value for name, value in zip(default, given) if value is not None}
    recorded = {}
    as_it_is = said.get("codebook") == "none" or is_quantized_checkpoint(source)
    if adapter is not None and not as_it_is:
        known = recorded_base(adapter)
        recorded = {name: known[name] for name in default if name in known and name not in said}
    if recorded:
        words = ", ".join(f"{name} {value}" for name, value in recorded.items())
        text = f"the base as {adapter} records it: {words}"
        messages.print(escape(text), highlight=False, soft_wrap=True)
    options: dict[str, Any] = {**default, **recorded, **said}
    model = load_model(source, choose_dtype(options.pop("dtype"), torch.device("cpu")))
    if options["codebook"] != "none" and not layers_4bit(model):
        convert_model(model, **options)
    if adapter is not None:
        load_adapter(model, adapter, other_base)
    return model


def print_json(value: Any) -> None:
    """Print the value as JSON on standard output."""
    print(json.dumps(value, indent=2, default=str))
