"""Write a model with its adapters merged in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_ref.checkpoint import save_model
from qlora_ref.files import written_aside
from qlora_ref.linear import Linear4bit, dense_linear, is_conv1d
from qlora_ref.lora import lora_layers, merge_lora, replace_module
from qlora_ref.models import load_tokenizer
from qlora_ref.module4bit import layers_4bit
from qlora_ref.places import restore_experts


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
        dense = _as_transformers_keeps_it(model)
        with written_aside(output) as aside:
            dense.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
    worst = min((error.snr_db for error in errors.values()), default=None)
    return {"layers": layers, "worst_snr_db": worst}


def _as_transformers_keeps_it(model: Any) -> Any:
    """Restore what is in 4 bits without an adapter, and lay out weights as the model's class does.

    GPT-2's Conv1D holds (K, N), where a merged layer is an nn.Linear with (N, K).
    """
    for name, layer in layers_4bit(model).items():
        if isinstance(layer, Linear4bit):
            weight = layer.dequantize(torch.float32)
            replace_module(model, name, dense_linear(weight, layer.bias, layer.training))
    restore_experts(model, torch.float32)
    with torch.device("meta"):
        original = type(model)(model.config)
    for name, layer in original.named_modules():
        if is_conv1d(layer):
            merged = model.get_submodule(name)
            if isinstance(merged, nn.Linear):
                merged.weight.data = merged.weight.data.t().contiguous()
    # What was never in 4 bits may be in bfloat16, which does not multiply with float32. Not
    # model.float(), which transformers refuses until it is told, on saving, that none is left.
    return nn.Module.float(model)
