"""`qlora-ref evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from qlora_ref.cli.options import (
    AsJson,
    BaseBlockSize,
    BaseCodebook,
    BaseDoubleQuant,
    BaseDtype,
    Data,
    Model,
    OtherBase,
    console,
    load_with_adapter,
    print_json,
)


def evaluate(
    model: Model,
    data: Data,
    adapter: Annotated[Optional[Path], typer.Option(help="directory of an adapter")] = None,  # noqa: UP045
    codebook: BaseCodebook = None,
    block_size: BaseBlockSize = None,
    double_quant: BaseDoubleQuant = None,
    compute_dtype: BaseDtype = None,
    other_base: OtherBase = False,
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
    given = codebook, block_size, double_quant, compute_dtype
    loaded = load_with_adapter(model, adapter, given, "none", other_base)
    found = run(loaded, text, tokenizer.pad_token_id or 0)
    report = {"loss": found.loss, "perplexity": found.perplexity, "tokens": found.tokens}
    if as_json:
        return print_json(report)
    console.print(
        f"perplexity {found.perplexity:.3f} ({found.loss:.4f} nats, {found.tokens} tokens)"
    )
