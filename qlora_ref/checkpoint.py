"""Checkpoints of 4-bit models in bitsandbytes' format, written a shard and read a tensor at a time.

A directory holds config.json, generation_config.json and model.safetensors, or several shards and
their index, as transformers writes them. Every 4-bit weight is stored as tensor_format.py says.
Adapters have a file of their own: adapter.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_ref import tensor_format
from qlora_ref.files import written_aside
from qlora_ref.linear import is_conv1d
from qlora_ref.lora import lora_layers, replace_module
from qlora_ref.module4bit import layers_4bit
from qlora_ref.parameter4bit import Parameter4bit
from qlora_ref.places import install
from qlora_ref.pretrained import let_transformers_save
from qlora_ref.quantized import QuantizedTensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
GENERATION = "generation_config.json"


def save_model(model: nn.Module, directory: Path | str, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write a model with 4-bit layers to a directory, aside, then renamed.

    bitsandbytes and transformers read it where the codebooks are nf4 and fp4. config.json and
    generation_config.json are written of a model that has them; a tokenizer saves itself.
    Raises ValueError for a model that has adapters (merge them, or save_adapter them) or no 4-bit
    layer, and OSError when the disk is full, with nothing overwritten.
    """
    if lora_layers(model):
        raise ValueError(
            "the model has adapters: merge them first, or write them with save_adapter"
        )
    layers = layers_4bit(model)
    if not layers:
        raise ValueError("the model has no 4-bit layer: convert_model it first")
    shards = _shards(_distinct(model.state_dict()), max_shard_bytes)
    with written_aside(directory) as aside:
        aside.mkdir()
        _write_shards(shards, aside)
        config = getattr(model, "config", None)
        if config is not None:
            text = {**config.to_dict(), "quantization_config": quantization_config(model)}
            (aside / "config.json").write_text(json.dumps(text, indent=2, default=str) + "\n")
        generation = getattr(model, "generation_config", None)
        if generation is not None:  # the tokens that end a chat's turn are often here alone
            # Not save_pretrained, which refuses some settings that models on the hub have.
            generation.to_json_file(aside / GENERATION)


def save_base(model: nn.Module, directory: Path | str) -> None:
    """Write a model that has adapters without them: `save_model` of its base.

    For adapters that fit this base alone (add_lora with init="loftq" or "pissa").
    """
    adapters = lora_layers(model)
    for name, adapter in adapters.items():
        replace_module(model, name, adapter.base)
    try:
        save_model(model, directory)
    finally:
        for name, adapter in adapters.items():
            replace_module(model, name, adapter)


def load_model_state(model: nn.Module, directory: Path | str) -> None:
    """Fill a model from a 4-bit checkpoint: layers stored in 4 bits are replaced, one at a time.

    A model on meta takes over the files' tensors, and is never dense. Buffers that are not in its
    state dict stay on meta: `accelerate.init_empty_weights` makes them with their values.

    Raises ValueError, naming file and key, for what is missing, too much, truncated or misshapen.
    """
    let_transformers_save(model)
    seen = set()
    for file, name, tensor in _tensors_in(checkpoint_files(directory)):
        seen.add(name)
        if isinstance(tensor, QuantizedTensor):
            try:
                install(model, name, tensor)
            except ValueError as error:
                raise ValueError(f"{file}: {error}") from error
        else:
            _copy(model, name, tensor, file)
    # Asked of the model as it is now: of layers that were one before, only the first is replaced.
    filled = _distinct(model.state_dict())
    owners = _owners(filled)  # a layer in 4 bits is missing as a whole
    missing = {owners.get(key, key) for key in filled} - seen
    if missing:
        raise ValueError(f"{directory} lacks {sorted(missing)[:5]}: a checkpoint of another model")


def checkpoint_files(path: Path | str) -> list[Path]:
    """The safetensors files of a checkpoint: of a directory, or the one file itself.

    Raises ValueError if there is none, or if the index names a shard that is not there.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if (path / INDEX).is_file():
        shards = _shard_names(path / INDEX)
        missing = [shard for shard in shards if not (path / shard).is_file()]
        if missing:
            raise ValueError(f"{path} lacks the shards {missing} that its index names")
        return [path / shard for shard in shards]
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    pickles = [file.name for file in path.glob("*.bin")]
    hint = (
        f"; {pickles} are pickles, which can run any code: save as safetensors" if pickles else ""
    )
    raise ValueError(f"{path} holds neither {SINGLE} nor {INDEX}{hint}")


def _shard_names(index: Path) -> list[str]:
    try:
        shards = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is not an index of shards: {error!r}") from error
    # A shard lies beside its index: a path of any other kind may lead anywhere.
    odd = [s for s in shards if not isinstance(s, str) or s in ("", ".", "..") or Path(s).name != s]
    if odd or not shards:
        raise ValueError(f"{index} must name files beside it in weight_map, got {odd[:3]}")
    return sorted(shards)


def stored_tensors(path: Path | str) -> Iterator[tuple[str, QuantizedTensor | Tensor]]:
    """Every tensor of a checkpoint by name, one at a time; 4-bit ones as QuantizedTensor."""
    for _, name, tensor in _tensors_in(checkpoint_files(path)):
        yield name, tensor


def is_quantized_checkpoint(directory: Path | str) -> bool:
    """Whether a directory's config.json says that its linear layers are in 4 bits.

    Raises ValueError, naming the file, for a config.json that is not JSON or of another form.
    """
    file = Path(directory) / "config.json"
    if not file.is_file():  # a hub name, or a directory that others will say more about
        return False
    try:
        quantization = json.loads(file.read_text()).get("quantization_config") or {}
        method, in_4bit = quantization.get("quant_method"), quantization.get("load_in_4bit")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is not a model's configuration: {error!r}") from error
    return bool(in_4bit or method == "qlora_ref")


def _tensors_in(files: list[Path]) -> Iterator[tuple[Path, str, QuantizedTensor | Tensor]]:
    """Every tensor with its name and its file. transformers may part codes from their scales."""
    with ExitStack() as stack:
        opened = {file: stack.enter_context(_opened(file)) for file in files}
        where: dict[str, Path] = {}
        for file, tensors in opened.items():
            for key in tensors.keys():
                if key in where:
                    raise ValueError(f"{file}: {key} is in {where[key]}, too")
                where[key] = file
        owners = _owners(where)
        groups: dict[str, list[str]] = {}
        for key in where:
            groups.setdefault(owners.get(key, key), []).append(key)
        for name, keys in groups.items():
            stored = {key: _get(opened[where[key]], key, where[key]) for key in keys}
            file = where[keys[0]]
            try:
                in_4bit = keys[0] in owners
                tensor = tensor_format.from_tensors(stored, name) if in_4bit else stored[name]
            except ValueError as error:
                raise ValueError(f"{file}: {error}") from error
            yield file, name, tensor


def _get(tensors: Any, key: str, file: Path) -> Tensor:
    from safetensors import SafetensorError

    try:
        tensor: Tensor = tensors.get_tensor(key)
    except (SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{file}: cannot read {key}: {error}") from error
    return tensor


def _opened(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from error


def _copy(model: nn.Module, key: str, value: Tensor, file: Path) -> None:
    module_name, _, leaf = key.rpartition(".")
    try:
        target = getattr(model.get_submodule(module_name), leaf)
    except AttributeError as error:
        raise ValueError(f"{file}: {key} belongs to no module of the model") from error
    if not isinstance(target, Tensor):  # a layer without a bias has None there
        raise ValueError(f"{file}: {key} belongs to no module of the model")
    if target.shape != value.shape:
        raise ValueError(
            f"{file}: {key} must have shape {tuple(target.shape)}, got {tuple(value.shape)}"
        )
    if target.is_meta:  # which copy_ would leave as it is
        filled: Any = value.to(target.dtype)
        if isinstance(target, nn.Parameter):
            filled = type(target)(filled, requires_grad=target.requires_grad)
        torch.utils.swap_tensors(target, filled)  # in all modules that it is tied to
        return
    with torch.no_grad():
        target.copy_(value)


def _owners(keys: Iterable[str]) -> dict[str, str]:
    """For every key of a weight in 4 bits, codes and scales, the name of that weight."""
    keys = list(keys)
    names = set(tensor_format.stored_names(keys))
    beginnings = {key: accumulate(key.split("."), "{}.{}".format) for key in keys}
    return {key: name for key in keys for name in beginnings[key] if name in names}


def _distinct(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with what has several names under its first only, as files hold it."""
    owners = _owners(state)
    seen: set[tuple[int, torch.Size]] = set()
    again = set()
    for key, tensor in state.items():
        identity = (tensor.data_ptr(), tensor.shape)
        if identity in seen and tensor.numel() and not tensor.is_meta:  # all there have address 0
            again.add(key)
        seen.add(identity)
    # Scales go with their codes, by whose address alone it is told: their JSON is made anew.
    return {key: tensor for key, tensor in state.items() if owners.get(key, key) not in again}


def _shards(state: dict[str, Tensor], max_shard_bytes: int) -> list[dict[str, Tensor]]:
    """Cut a state dict into shards of at most max_shard_bytes; no 4-bit weight is torn apart."""
    owner = _owners(state)
    shards: list[dict[str, Tensor]] = [{}]
    size, last_owner = 0, ""
    for key, tensor in sorted(state.items(), key=lambda item: owner.get(item[0], item[0])):
        size += tensor.numel() * tensor.element_size()
        if size > max_shard_bytes and shards[-1] and owner.get(key) != last_owner:
            shards.append({})
            size = tensor.numel() * tensor.element_size()
        shards[-1][key] = tensor.detach().cpu().contiguous()
        last_owner = owner.get(key, key)
    return shards


def _write_shards(shards: list[dict[str, Tensor]], directory: Path) -> None:
    from safetensors.torch import save_file

    if len(shards) == 1:
        save_file(shards[0], directory / SINGLE, metadata={"format": "pt"})
        return
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        total += sum(tensor.numel() * tensor.element_size() for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def quantization_config(
    model: nn.Module, compute_dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """What config.json says of a model's 4-bit layers, in the words of BitsAndBytesConfig.

    The linear layers that are not in 4 bits are named, else bitsandbytes would expect them to be.
    """
    layers = layers_4bit(model)
    first = next(iter(layers.values()))
    names = {layer.codebook_name for layer in layers.values()}
    # What bitsandbytes' quantiser for transformers does not read must not be taken for its own.
    experts = any(isinstance(layer, Parameter4bit) for layer in layers.values())
    if experts or not names <= set(tensor_format.SHARED_WITH_BITSANDBYTES):
        ours: dict[str, Any] = {"quant_method": "qlora_ref", "codebooks": sorted(names)}
        return ours if compute_dtype is None else {**ours, "compute_dtype": _name(compute_dtype)}
    dense = [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or is_conv1d(module)) and name not in layers
    ]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "llm_int8_skip_modules": dense or None,
        "bnb_4bit_quant_type": first.codebook_name,
        "bnb_4bit_use_double_quant": first.weight_nested_absmax is not None,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": _name(compute_dtype or first.weight_dtype),
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
