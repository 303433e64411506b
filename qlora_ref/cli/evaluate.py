"""`qlora-ref evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from qlora_ref.cli.options import (
    AsJson,
    BlockSize,
    Data,
    DoubleQuant,
    Model,
    console,
    load,
    print_json,
)


def evaluate(
    model: Model,
    data: Data,
    adapter: Annotated[Optional[Path], typer.Option(help="directory of an adapter")] = None,  # noqa: UP045
    codebook: Annotated[str, typer.Option(help="quantise to this first; none: as it is")] = "none",
    block_size: BlockSize = 64,
    double_quant: DoubleQuant = True,
    compute_dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    length: Annotated[int, typer.Option(help="tokens a sequence, at most")] = 512,
    sequences: Annotated[int, typer.Option(help="sequences, at most")] = 64,
    as_json: AsJson = False,
) -> None:
    """Perplexity of a model, quantised or not, with an adapter or without, on a text."""
    from qlora_ref.data import read_examples, tokenize
    from qlora_ref.evaluate import evaluate as run
    from qlora_ref.models import load_tokenizer

    examples = read_examples(data)
    tokenizer = load_tokenizer(model)
    text = tokenize(examples, tokenizer, length)[:sequences]
    loaded = load(model, codebook, block_size, double_quant, compute_dtype)
    if adapter is not None:
        from qlora_ref.adapter import load_adapter

        load_adapter(loaded, adapter)
    found = run(loaded, text, tokenizer.pad_token_id or 0)
    report = {"loss": found.loss, "perplexity": found.perplexity, "tokens": found.tokens}
    if as_json:
        return print_json(report)
    console.print(
        f"perplexity {found.perplexity:.3f} ({found.loss:.4f} nats, {found.tokens} tokens)"
    )
