"""Adapters in PEFT's file format, so that either library reads the other's.

A directory with adapter_config.json and adapter_model.safetensors, whose keys are
`base_model.model.<layer>.lora_A.weight` and `... .lora_B.weight`. Beside them, if the base is in
4 bits, adapter_base.json: which base that is. PEFT does not look at it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_ref.files import written_aside
from qlora_ref.linear import is_conv1d
from qlora_ref.lora import (
    LoRA,
    LoraReport,
    add_lora,
    check_without_adapters,
    dense_shape,
    linear_layers,
    lora_layers,
)
from qlora_ref.module4bit import layers_4bit

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# Not in the metadata of WEIGHTS: safetensors writes several entries in any order, and the same
# adapter is to be the same bytes.
BASE = "adapter_base.json"
_PREFIX = "base_model.model."
# What PEFT can say that a LoRA here cannot do: loading such an adapter would compute other numbers.
_UNSUPPORTED = (
    "use_dora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# Other ways to start (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) take something off the base as well.
_STARTS_ON_THE_SAME_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' matrices under PEFT's keys; they share the model's storage."""
    tensors = {}
    for name, adapter in lora_layers(model).items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = adapter.lora_A.weight.detach()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = adapter.lora_B.weight.detach()
    return tensors


def save_adapter(
    model: nn.Module,
    directory: Path | str,
    base_model: str = "",
    base: dict[str, Any] | None = None,
) -> None:
    """Write a model's adapters to a directory, aside, then renamed.

    base_model  what PEFT calls base_model_name_or_path: where the base can be had again
    base        `describe_base` of the model, if it is known: seconds of work for a large one
    Raises ValueError if the model has no adapters or they differ in r, alpha, dropout or scaling.
    """
    with written_aside(directory) as aside:
        aside.mkdir()
        write_adapter(model, aside, base_model, base)


def write_adapter(
    model: nn.Module, directory: Path, base_model: str = "", base: dict[str, Any] | None = None
) -> None:
    """Write the files of an adapter into an existing directory. See `save_adapter`."""
    from safetensors.torch import save_file

    config = _peft_config(model, base_model)
    tensors = {key: value.cpu().contiguous() for key, value in adapter_tensors(model).items()}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    base = describe_base(model) if base is None else base
    if base:
        record = {**base, "adapter_sha256": _sha256_of(directory / WEIGHTS)}
        (directory / BASE).write_text(json.dumps(record, indent=2) + "\n")


def load_adapter(model: nn.Module, directory: Path | str, other_base: bool = False) -> LoraReport:
    """Put the adapters of a directory, PEFT's or ours, on a model that has none.

    other_base  also on 4-bit weights that the adapter was not trained on, or on dense ones

    Everything is checked before the model is changed. Raises ValueError for files that are missing
    or broken, for another model's adapter, for another base than the adapter records, and for what
    PEFT has and this library has not (DoRA, ranks that differ by layer, ...).
    """
    config, tensors = _read(Path(directory))
    check_without_adapters(model)
    names = sorted({key.removeprefix(_PREFIX).rsplit(".", 2)[0] for key in tensors})
    _check_shapes(_shapes_for(model, names, config["r"], str(directory)), tensors, str(directory))
    if not other_base:
        _check_base(model, Path(directory), config)
    try:
        report = add_lora(
            model,
            r=config["r"],
            alpha=config["lora_alpha"],
            dropout=config.get("lora_dropout", 0.0),
            # A list would match the ends of other layers' names, too.
            targets="|".join(map(re.escape, names)),
            rslora=config.get("use_rslora", False),
            dtype=next(iter(tensors.values())).dtype,
        )
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"cannot use the adapter in {directory}: {error}") from error
    load_adapter_tensors(model, tensors, str(directory))
    return report


def describe_base(model: nn.Module) -> dict[str, Any]:
    """Which 4-bit weights a model has, with adapters on them or without.

    returns  {"codebook": name, "block_size": int, "double_quant": bool, "dtype": the dense one,
             "sha256": of all codes, scales and codebooks}; of the first four those that all
             weights share; {} if there are none
    """
    adapters = {f"{name}.base": name for name in lora_layers(model)}
    layers = layers_4bit(model)
    weights = {adapters.get(name, name): layers[name].quantized_weight for name in layers}
    if not weights:
        return {}
    each: dict[str, set[Any]] = {
        "codebook": {weight.codebook_name for weight in weights.values()},
        "block_size": {weight.block_size for weight in weights.values()},
        "double_quant": {weight.double_quant for weight in weights.values()},
        "dtype": {str(weight.dtype).removeprefix("torch.") for weight in weights.values()},
    }
    shared = {name: found.pop() for name, found in each.items() if len(found) == 1}
    parts = (
        (f"{name}.{field}", part)
        for name, weight in sorted(weights.items())
        for field, part in vars(weight).items()
        if isinstance(part, Tensor)
    )
    return {**shared, "sha256": fingerprint_tensors(parts)}


def fingerprint_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over tensors and their names, in this order."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(name.encode())
        data: Any = tensor.flatten().view(torch.uint8).cpu().numpy()
        digest.update(data)
    return digest.hexdigest()


def recorded_base(directory: Path | str) -> dict[str, Any]:
    """What an adapter was trained on, as `describe_base` says it; {} if PEFT wrote the adapter.

    Raises ValueError, naming the file, if it is broken.
    """
    file = Path(directory) / BASE
    if not file.exists():
        return {}
    try:
        record = dict(json.loads(file.read_text()))
        # PEFT leaves our record where it writes another adapter into a directory of ours.
        is_of_this = record.pop("adapter_sha256", None) == _sha256_of(Path(directory) / WEIGHTS)
        return record if is_of_this else {}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"cannot read what the adapter was trained on, {file}: {error}") from error


def _sha256_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _check_base(model: nn.Module, directory: Path, config: dict[str, Any]) -> None:
    recorded = recorded_base(directory)
    if not recorded:
        return
    found = describe_base(model)
    if found.get("sha256") != recorded.get("sha256"):
        name = config.get("base_model_name_or_path") or "a model that it does not name"
        raise ValueError(
            f"{directory} was trained on another base: expected {_words(recorded)}; "
            f"got {_words(found)}. Use that one, made from {name}, or put the adapter on this one "
            "all the same with other_base=True (--other-base)"
        )


def _words(base: dict[str, Any]) -> str:
    # Twelve digits tell one SHA-256 from another.
    return ", ".join(f"{key} {value!s:.12}" for key, value in base.items()) or "no 4-bit weights"


def _shapes_for(
    model: nn.Module, names: list[str], r: int, source: str
) -> dict[str, tuple[int, ...]]:
    """The shapes of matrices A (r, K) and B (N, r) for these layers of a model, by PEFT's keys."""
    layers = linear_layers(model)
    missing = [name for name in names if name not in layers]
    if missing or not names:
        raise ValueError(
            f"{source} is an adapter of another model: this one has no linear layer {missing[:3]}"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        rows, columns = dense_shape(layers[name])
        shapes[f"{_PREFIX}{name}.lora_A.weight"] = (r, columns)
        shapes[f"{_PREFIX}{name}.lora_B.weight"] = (rows, r)
    return shapes


def _check_shapes(
    expected: dict[str, tuple[int, ...]], tensors: dict[str, Tensor], source: str
) -> None:
    if expected.keys() != tensors.keys():
        odd = sorted(expected.keys() ^ tensors.keys())
        raise ValueError(f"{source} is an adapter of another model: {odd[:3]} on one side only")
    for key, value in tensors.items():
        if expected[key] != tuple(value.shape):
            raise ValueError(
                f"{source}: {key} must have shape {expected[key]}, got {tuple(value.shape)}"
            )


def load_adapter_tensors(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy matrices under PEFT's keys into a model's adapters; all of them, or ValueError."""
    own = adapter_tensors(model)
    _check_shapes({key: tuple(matrix.shape) for key, matrix in own.items()}, tensors, source)
    with torch.no_grad():
        for key, value in tensors.items():
            own[key].copy_(value)


def read_adapter_tensors(directory: Path) -> dict[str, Tensor]:
    """The matrices in an adapter's file. Raises ValueError if it is missing or broken."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(directory / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot read the adapter {directory / WEIGHTS}: {error}") from error


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        config = json.loads((directory / CONFIG).read_text())
        kind = config.get("peft_type", "LORA")
        config["r"], config["lora_alpha"]
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise ValueError(f"cannot read the adapter's {directory / CONFIG}: {error}") from error
    unsupported = [key for key in _UNSUPPORTED if config.get(key)]
    if config.get("init_lora_weights") not in _STARTS_ON_THE_SAME_BASE:
        unsupported.append(f"init_lora_weights={config['init_lora_weights']!r}")
    if kind != "LORA" or unsupported or config.get("bias", "none") != "none":
        raise ValueError(
            f"{directory} is a {kind} adapter with {unsupported}: only plain LoRA is read"
        )
    return config, read_adapter_tensors(directory)


def _peft_config(model: nn.Module, base_model: str) -> dict[str, Any]:
    adapters = lora_layers(model)
    if not adapters:
        raise ValueError("the model has no adapters to save: add_lora it first")
    settings = {(a.r, a.alpha, a.dropout.p, a.rslora) for a in adapters.values()}
    if len(settings) > 1:
        raise ValueError(
            f"PEFT's format wants one r, alpha, dropout for all adapters, got {settings}"
        )
    first: LoRA = next(iter(adapters.values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": first.r,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout.p,
        "use_rslora": first.rslora,
        "target_modules": sorted(adapters),
        "bias": "none",
        "fan_in_fan_out": any(is_conv1d(adapter.base) for adapter in adapters.values()),
        "inference_mode": True,
    }
