"""Write a model with its adapters merged in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from qlora_ref.checkpoint import save_model
from qlora_ref.files import written_aside
from qlora_ref.lora import lora_layers, merge_lora
from qlora_ref.models import load_tokenizer


def merge_to_directory(
    model: nn.Module, source: str, output: Path | str, to: str = "float"
) -> dict[str, Any]:
    """Merge a model's adapters and write it, with its tokenizer, to a new directory.

    model    a transformers model with adapters; it is changed
    source   where it was loaded from: its tokenizer is written too
    to       "float" (exact) or "4bit" (quantised anew, with an error)
    returns  {"layers": how many were merged, "worst_snr_db": of the quantised sums, or None}
    Raises ValueError for another `to`, before anything is changed.
    """
    if to not in ("float", "4bit"):
        raise ValueError(f'to must be "float" or "4bit", got {to!r}')
    layers = len(lora_layers(model))
    tokenizer = load_tokenizer(source)
    errors = merge_lora(model, "4bit" if to == "4bit" else "float")
    if to == "4bit":
        save_model(model, output)
        tokenizer.save_pretrained(output)
    else:
        dense: Any = model
        with written_aside(output) as aside:
            dense.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
    worst = min((error.snr_db for error in errors.values()), default=None)
    return {"layers": layers, "worst_snr_db": worst}
