"""The sizes of well-known models, so that they can be reckoned with when they are not at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_LLAMA: dict[str, Any] = {"model_type": "llama", "tie_word_embeddings": False}


def _llama(
    hidden: int, between: int, layers: int, heads: int, vocabulary: int = 32000, kv_heads: int = 0
) -> dict[str, Any]:
    return {
        **_LLAMA,
        "hidden_size": hidden,
        "intermediate_size": between,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        "vocab_size": vocabulary,
    }


# As config.json would say it. Sources: LLaMA (arXiv 2302.13971), table 2; Llama 2 (arXiv
# 2307.09288), table 1; Llama 3 (arXiv 2407.21783), table 3; Mistral (arXiv 2310.06825), table 1.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-7b": _llama(4096, 11008, 32, 32),
    "llama-13b": _llama(5120, 13824, 40, 40),
    "llama-33b": _llama(6656, 17920, 60, 52),
    "llama-65b": _llama(8192, 22016, 80, 64),
    "llama-2-7b": _llama(4096, 11008, 32, 32),
    "llama-2-13b": _llama(5120, 13824, 40, 40),
    "llama-2-70b": _llama(8192, 28672, 80, 64, kv_heads=8),
    "llama-3-8b": _llama(4096, 14336, 32, 32, 128256, 8),
    "llama-3-70b": _llama(8192, 28672, 80, 64, 128256, 8),
    "mistral-7b": _llama(4096, 14336, 32, 32, kv_heads=8),
}


def read_config(source: str | Path) -> dict[str, Any]:
    """The configuration of a name of `CONFIGS`, of a config.json, or of a directory that holds one.

    Raises ValueError for another name and for a file that is none.
    """
    if str(source) in CONFIGS:
        return CONFIGS[str(source)]
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"{source} is no file, no directory with a config.json and no known model: "
            f"expected one of these or of {', '.join(CONFIGS)}"
        )
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict) or "model_type" not in found:
        raise ValueError(f"{path} is no configuration of a model: it has no model_type")
    return found
