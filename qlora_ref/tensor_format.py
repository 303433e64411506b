"""How one 4-bit tensor is stored: bitsandbytes' format, so that either library reads the other's.

    <name>                                  uint8 (ceil(n / 2), 1)    packed codes
    <name>.absmax                           float32 (blocks,), or uint8 (blocks,) double-quantised
    <name>.quant_map                        float32 (16,)             the codebook
    <name>.nested_absmax                    float32 (ceil(blocks / 256),)  if double-quantised
    <name>.nested_quant_map                 float32 (256,)                 if double-quantised
    <name>.quant_state.bitsandbytes__nf4    uint8: JSON with block size, dtype, shape, offset

bitsandbytes takes its table from the name of the last key and ignores quant_map. So codebooks that
it does not have are stored as `quant_state.qlora_ref__<codebook>`: it refuses those, where the
other key would make it read them as NF4.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_ref.checks import FLOAT_DTYPES, check_table
from qlora_ref.codebooks import CODEBOOKS, CODES_4BIT, DYNAMIC_BLOCK_SIZE, resolve_codebook
from qlora_ref.files import written_aside
from qlora_ref.quantized import QuantizedTensor

SCALE_KEYS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
SHARED_WITH_BITSANDBYTES = ("nf4", "fp4")
_MOST_JSON = 1 << 16  # bytes; what libraries write has some two hundred
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}


def to_tensors(tensor: QuantizedTensor, name: str = "weight") -> dict[str, Tensor]:
    """The tensors that a file holds for a QuantizedTensor, by key, as in the module's docstring."""
    parts = {"absmax": tensor.scales, "quant_map": tensor.codebook}
    offset = None
    if tensor.nested_absmax is not None:
        assert tensor.nested_codebook is not None and tensor.offset is not None
        parts["nested_absmax"] = tensor.nested_absmax
        parts["nested_quant_map"] = tensor.nested_codebook
        on_meta = tensor.device.type == "meta"  # there are keys there, but no values
        offset = 0.0 if on_meta else tensor.offset.item()
    state = state_json(tensor.codebook_name, tensor.block_size, tensor.dtype, tensor.shape, offset)
    parts[state_key(tensor.codebook_name)] = json_tensor(state, tensor.device)
    named = {f"{name}.{key}": part for key, part in parts.items()}
    return {name: tensor.packed.reshape(-1, 1), **named}


def from_tensors(tensors: Mapping[str, Tensor], name: str = "weight") -> QuantizedTensor:
    """The QuantizedTensor that is stored under a name, by this library or by bitsandbytes.

    Raises ValueError, naming the key, for what is missing, malformed or does not fit together.
    """
    state_key, state = _read_state(tensors, name)
    packed = _take(tensors, name)
    parts = {key: tensors[f"{name}.{key}"] for key in SCALE_KEYS if f"{name}.{key}" in tensors}
    if "absmax" not in parts:
        raise ValueError(f"no tensor {name}.absmax beside {state_key}")
    try:
        codebook_name, codebook = _read_codebook(state, parts.get("quant_map"))
        return QuantizedTensor(
            packed=packed.contiguous().flatten().view(torch.uint8),
            scales=parts["absmax"],
            codebook=codebook.to(packed.device),
            codebook_name=codebook_name,
            block_size=_positive_int(state, "blocksize"),
            shape=_read_shape(state),
            dtype=_read_dtype(state),
            **_read_nested(state, parts),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


def stored_names(keys: Mapping[str, Any] | list[str]) -> list[str]:
    """The names under which 4-bit tensors are stored, found by their quant_state keys."""
    return sorted({key.split(".quant_state.")[0] for key in keys if ".quant_state." in key})


def state_keys() -> list[str]:
    """The keys, of all codebooks, under which the JSON of a tensor may be stored."""
    return [state_key(name) for name in (*CODEBOOKS, "custom")]


def save(tensor: QuantizedTensor, path: Path | str) -> None:
    """Write one tensor to a safetensors file, under the name "weight"."""
    from safetensors.torch import save_file

    tensors = {key: part.contiguous() for key, part in to_tensors(tensor).items()}
    with written_aside(path) as aside:
        save_file(tensors, aside)


def load(path: Path | str) -> QuantizedTensor:
    """Read the one 4-bit tensor of a safetensors file; ValueError if there is not just one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    names = stored_names(tensors)
    if len(names) != 1:
        raise ValueError(f"{path} must hold one 4-bit tensor, got {names}")
    return from_tensors(tensors, names[0])


def state_json(
    codebook_name: str,
    block_size: int,
    dtype: torch.dtype,
    shape: Sequence[int],
    offset: float | None,
) -> dict[str, Any]:
    """What the JSON of a 4-bit tensor says; `offset` only of one that is double-quantised."""
    state: dict[str, Any] = {
        "quant_type": codebook_name,
        "blocksize": block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    if offset is not None:
        state["nested_blocksize"] = DYNAMIC_BLOCK_SIZE
        state["nested_dtype"] = "float32"
        state["nested_offset"] = offset
    return state


def state_key(codebook_name: str) -> str:
    """The key of that JSON: it tells bitsandbytes which codebook to use, or to stay away."""
    owner = "bitsandbytes" if codebook_name in SHARED_WITH_BITSANDBYTES else "qlora_ref"
    return f"quant_state.{owner}__{codebook_name}"


def json_tensor(state: dict[str, Any], device: torch.device) -> Tensor:
    """JSON as the bytes of a tensor, uint8 (length,)."""
    text = json.dumps(state).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)


def _read_state(tensors: Mapping[str, Tensor], name: str) -> tuple[str, dict[str, Any]]:
    keys = [key for key in tensors if key.startswith(f"{name}.quant_state.")]
    if len(keys) != 1:
        raise ValueError(
            f"expected one key {name}.quant_state.*, got {keys or 'none'}; dense weights are "
            "quantised with convert_model or Linear4bit.from_linear"
        )
    state = read_json(keys[0], tensors[keys[0]])
    if keys[0] != f"{name}.{state_key(str(state.get('quant_type')))}":
        raise ValueError(f"{keys[0]} says quant_type {state.get('quant_type')!r}")
    return keys[0], state


def read_json(key: str, tensor: Tensor) -> dict[str, Any]:
    """The JSON object in the bytes of a tensor. Raises ValueError, naming the key, for others."""
    if tensor.dtype != torch.uint8 or tensor.numel() > _MOST_JSON:
        raise ValueError(
            f"{key} must hold at most {_MOST_JSON} bytes as uint8, got {tensor.numel()} of "
            f"{tensor.dtype}"
        )
    try:
        state = json.loads(bytes(tensor.flatten().cpu().tolist()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key} is not JSON: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{key} must hold a JSON object, got {type(state).__name__}")
    return state


def _take(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"no tensor {name} beside {name}.quant_state.*")
    return tensors[name]


def _read_codebook(state: dict[str, Any], levels: Tensor | None) -> tuple[str, Tensor]:
    name = str(state["quant_type"])
    if levels is not None:
        check_table("quant_map", levels, CODES_4BIT)
    if name in CODEBOOKS:
        codebook = resolve_codebook(name, _positive_int(state, "blocksize"))[1]
        # 1e-6 admits tables that another library computed or rounded a little differently.
        if levels is not None and not torch.allclose(levels.cpu(), codebook, rtol=0, atol=1e-6):
            raise ValueError(f"quant_map does not hold the levels of {name}")
        return name, codebook
    if levels is None:
        raise ValueError(f"quant_type {name!r} is unknown and no quant_map gives its levels")
    return resolve_codebook(levels)


def _read_nested(state: dict[str, Any], parts: dict[str, Tensor]) -> dict[str, Tensor]:
    if "nested_absmax" not in parts:
        return {}
    if "nested_quant_map" not in parts:
        raise ValueError("nested_absmax without nested_quant_map")
    block_size, dtype = state.get("nested_blocksize"), state.get("nested_dtype")
    if block_size != DYNAMIC_BLOCK_SIZE or dtype != "float32":
        raise ValueError(
            f"nested scales must be float32 in blocks of 256, got {dtype}, {block_size}"
        )
    offset: Any = state.get("nested_offset")
    if type(offset) not in (int, float) or not abs(offset) <= torch.finfo(torch.float32).max:
        raise ValueError(f"nested_offset must be a finite float32, got {offset!r}")
    nested_absmax = parts["nested_absmax"]
    return {
        "nested_absmax": nested_absmax,
        "nested_codebook": parts["nested_quant_map"],
        "offset": torch.tensor(offset, dtype=torch.float32, device=nested_absmax.device),
    }


def _positive_int(state: dict[str, Any], key: str) -> int:
    value = state.get(key)
    if type(value) is not int or not 1 <= value < 2**63:
        raise ValueError(f"{key} must be a positive whole number, got {value!r}")
    return value


def _read_shape(state: dict[str, Any]) -> torch.Size:
    shape = state.get("shape")
    if not isinstance(shape, list) or not all(
        type(size) is int and 0 <= size < 2**63 for size in shape
    ):
        raise ValueError(f"shape must be a list of whole numbers, got {shape!r}")
    return torch.Size(shape)


def _read_dtype(state: dict[str, Any]) -> torch.dtype:
    dtype = str(state.get("dtype"))
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {sorted(_DTYPES)}, got {dtype!r}")
    return _DTYPES[dtype]
