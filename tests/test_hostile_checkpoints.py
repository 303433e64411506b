"""Broken and hostile files: a clear error that names the file, or what the file says; no third way.

Every mutation starts from a valid checkpoint. What a load accepts is held against a decoder of this
file's own (`decoded`).
"""

from __future__ import annotations

import copy
import functools
import json
import pickle
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training import files_below

from qlora_ref import add_lora, convert_model
from qlora_ref.adapter import load_adapter, save_adapter
from qlora_ref.checkpoint import INDEX, SINGLE, load_model_state, save_model
from qlora_ref.codebooks import nf4_codebook
from qlora_ref.module4bit import layers_4bit

CASES = 2000
MEMORY = 8 << 20  # bytes; a checkpoint here has 20 thousand
ODD_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 63, 2**31, 2**62, -(2**62), 2**63, 2**80, 1e308, -0.5),
    *(float("nan"), float("inf"), "", "nf4", "../../etc/passwd", "__import__('os')", "float33"),
    *([], [0], [-1, 4], [2**62, 2**62], [64, 64], [True, 64], ["64", 64], {}, {"a": 1}, [[]]),
]


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 96)
        self.norm = nn.LayerNorm(96)
        self.second = nn.Linear(96, 32, bias=False)


@functools.cache
def first_tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


def tiny() -> Tiny:
    return copy.deepcopy(first_tiny())


def save(folder: Path, double_quant: bool, shards: bool) -> Path:
    model = tiny()
    convert_model(model, double_quant=double_quant)
    save_model(model, folder, max_shard_bytes=4000 if shards else 10**9)
    assert (folder / INDEX).exists() == shards
    return folder


def decoded(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, 4-bit ones restored value by value as the format says."""
    tensors = {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}
    found = {}
    for key, tensor in tensors.items():
        states = [k for k in tensors if k.startswith(f"{key}.quant_state.")]
        if not states and not any(key.startswith(f"{name}.") for name in tensors):
            found[key] = tensor
        for state_key in states:
            state = json.loads(bytes(tensors[state_key].flatten().tolist()))
            scales = tensors[f"{key}.absmax"]
            if f"{key}.nested_absmax" in tensors:
                nested = tensors[f"{key}.nested_absmax"].repeat_interleave(256)
                fractions = tensors[f"{key}.nested_quant_map"][scales.int()]
                scales = fractions * nested[: scales.numel()] + state["nested_offset"]
            packed = tensor.contiguous().flatten().view(torch.uint8).int()
            codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()
            count = torch.Size(state["shape"]).numel()
            levels = tensors.get(f"{key}.quant_map", nf4_codebook())  # it may be left out
            values = levels[codes[:count]]
            factors = scales.repeat_interleave(state["blocksize"])[:count]
            found[key] = (values * factors).reshape(state["shape"])
    return found


def check_load(folder: Path, case: str) -> bool:
    """Load; False for a refusal that names a file. Whatever is accepted is what the files say."""
    model = tiny()
    try:
        load_model_state(model, folder)
    except ValueError as error:
        assert str(folder) in str(error), f"{case}: {error}"
        return False
    restored = {f"{n}.weight": m.dequantize().float() for n, m in layers_4bit(model).items()}
    own = {**dict(model.named_parameters()), **restored}
    for key, value in decoded(folder).items():
        assert own[key].shape == value.shape, case
        # A double-quantised scale is restored with two roundings, perhaps fused into one.
        torch.testing.assert_close(
            own[key].float(), value.float(), rtol=1e-5, atol=1e-6, equal_nan=True, msg=case
        )
    return True


def put_back(folder: Path, valid: dict[str, bytes]) -> None:
    """Give a folder the files that it had before the last case."""
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        if file.name not in valid:
            file.unlink()
    for name, content in valid.items():
        (folder / name).write_bytes(content)


# Mutations: each changes one thing in a folder and says what.


def some_file(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.glob("*.safetensors")))


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], Any]) -> str:
    tensors = load_file(file)
    said = change(tensors)
    save_file({k: t.contiguous() for k, t in tensors.items()}, file)
    return str(said)


def flip_a_byte_of_the_header(folder: Path, rng: random.Random) -> str:
    file = some_file(folder, rng)
    data = bytearray(file.read_bytes())
    length = struct.unpack("<Q", data[:8])[0]
    at = rng.randrange(8 + length)
    data[at] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return f"bit of byte {at}"


def flip_a_byte_of_the_data(folder: Path, rng: random.Random) -> str:
    file = some_file(folder, rng)
    data = bytearray(file.read_bytes())
    length = struct.unpack("<Q", data[:8])[0]
    at = rng.randrange(8 + length, len(data))
    data[at] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return f"bit of byte {at}"


def cut(folder: Path, rng: random.Random) -> str:
    file = some_file(folder, rng)
    data = file.read_bytes()
    at = rng.randrange(len(data))
    file.write_bytes(data[:at])
    return f"cut at {at}"


def lengthen(folder: Path, rng: random.Random) -> str:
    file = some_file(folder, rng)
    file.write_bytes(file.read_bytes() + bytes(rng.randrange(1, 100)))
    return "bytes behind the end"


def claim_a_long_header(folder: Path, rng: random.Random) -> str:
    file = some_file(folder, rng)
    length = rng.choice([2**63, 2**62, 2**40, 2**31, 0])
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    return f"header of {length}"


def change_the_state(folder: Path, rng: random.Random) -> str:
    def change(tensors: dict[str, Tensor]) -> str:
        keys = [key for key in tensors if ".quant_state." in key]
        if not keys:
            return "no state here"
        key = rng.choice(keys)
        state = json.loads(bytes(tensors[key].tolist()))
        field = rng.choice([*state, "extra"])
        value = rng.choice(ODD_VALUES)
        if rng.random() < 0.15:
            state.pop(field, None)
        else:
            state[field] = value
        tensors[key] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
        return f"{key}: {field}={value!r}"

    return rewrite(some_file(folder, rng), change)


def replace_the_state(folder: Path, rng: random.Random) -> str:
    texts = [b"", b"{", b"[]", b"null", b"[" * 3000, b'"nf4"', b"\xff\xfe", b"{}", b" " * 10**5]
    text = rng.choice(texts)

    def change(tensors: dict[str, Tensor]) -> str:
        for key in [key for key in tensors if ".quant_state." in key][:1]:
            tensors[key] = torch.frombuffer(bytearray(text or b" "), dtype=torch.uint8)
        return repr(text[:20])

    return rewrite(some_file(folder, rng), change)


def drop_a_key(folder: Path, rng: random.Random) -> str:
    return rewrite(some_file(folder, rng), lambda t: f"no {t.pop(rng.choice(sorted(t))) is None}")


def rename_a_key(folder: Path, rng: random.Random) -> str:
    def change(tensors: dict[str, Tensor]) -> str:
        key = rng.choice(sorted(tensors))
        to = rng.choice([key + "x", key.upper(), f"a.{key}", "", ".", "..", key.split(".")[-1]])
        tensors[to] = tensors.pop(key)
        return f"{key} to {to!r}"

    return rewrite(some_file(folder, rng), change)


def add_a_key(folder: Path, rng: random.Random) -> str:
    def change(tensors: dict[str, Tensor]) -> str:
        names = ["extra", "first.extra", "first.weight.extra", "second.bias", "__class__", "first"]
        key = rng.choice([*names, "first.weight.nested_absmax", "first.weight.quant_state.nf4"])
        tensors.setdefault(key, torch.zeros(rng.choice([1, 4, 96])))
        return f"with {key}"

    return rewrite(some_file(folder, rng), change)


def change_a_tensor(folder: Path, rng: random.Random) -> str:
    def change(tensors: dict[str, Tensor]) -> str:
        key = rng.choice(sorted(tensors))
        tensor = tensors[key]
        ways: dict[str, Callable[[Tensor], Tensor]] = {
            "shorter": lambda t: t.flatten()[:-1],
            "longer": lambda t: torch.cat([t.flatten(), t.flatten()[:1]]),
            "flat": lambda t: t.flatten(),
            "turned": lambda t: t.reshape(1, -1),
            "deep": lambda t: t.reshape(1, 1, -1, 1),
            "half": lambda t: t.half(),
            "bfloat16": lambda t: t.bfloat16(),
            "float64": lambda t: t.double(),
            "int64": lambda t: t.nan_to_num().long(),
            "bool": lambda t: t.bool(),
            "empty": lambda t: t.flatten()[:0],
            "nan": lambda t: torch.full_like(t.float(), torch.nan),
            "inf": lambda t: torch.full_like(t.float(), torch.inf),
            "zero": torch.zeros_like,
        }
        way = rng.choice(sorted(ways))
        tensors[key] = ways[way](tensor)
        return f"{key} {way}"

    return rewrite(some_file(folder, rng), change)


def put_a_pickle(folder: Path, rng: random.Random) -> str:
    file = some_file(folder, rng)
    file.write_bytes(pickle.dumps(Marker(folder / "executed"), rng.randrange(6)))
    return "a pickle"


def leave_only_a_pickle(folder: Path, rng: random.Random) -> str:
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Marker(folder / "executed")))
    return "only a pickle"


def change_the_index(folder: Path, rng: random.Random) -> str:
    if not (folder / INDEX).exists():
        return drop_a_key(folder, rng)
    index = json.loads((folder / INDEX).read_text())
    where = rng.choice(["", "weight_map", "entry", "escape"])
    value = rng.choice(ODD_VALUES)
    if where == "":
        index = value
    elif where == "weight_map":
        index["weight_map"] = value
    else:
        outside = [f"../{folder.name}/{SINGLE}", str(folder / SINGLE), "/dev/zero", "."]
        chosen = value if where == "entry" else rng.choice(outside)
        index["weight_map"][rng.choice(sorted(index["weight_map"]))] = chosen
    (folder / INDEX).write_text(json.dumps(index))
    return f"index {where} {value!r}"


class Marker:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


MUTATIONS = [
    flip_a_byte_of_the_header,
    flip_a_byte_of_the_data,
    cut,
    lengthen,
    claim_a_long_header,
    change_the_state,
    change_the_state,
    replace_the_state,
    drop_a_key,
    rename_a_key,
    add_a_key,
    change_a_tensor,
    change_a_tensor,
    put_a_pickle,
    leave_only_a_pickle,
    change_the_index,
]


@pytest.mark.parametrize("shards", [False, True], ids=["one-file", "shards"])
@pytest.mark.parametrize("double_quant", [False, True], ids=["float32-scales", "double-quant"])
def test_a_changed_checkpoint_is_refused_or_read_as_it_says(
    tmp_path: Path, double_quant: bool, shards: bool
) -> None:
    assert check_load(save(tmp_path / "valid", double_quant, shards), "unchanged")
    valid = files_below(tmp_path / "valid")
    folder, accepted = tmp_path / "changed", 0
    tracemalloc.start()
    for seed in range(CASES // 4):
        rng = random.Random(seed)
        put_back(folder, valid)
        case = f"{seed}: {rng.choice(MUTATIONS)(folder, rng)}"
        tracemalloc.reset_peak()
        accepted += check_load(folder, case)
        assert tracemalloc.get_traced_memory()[1] < MEMORY, case
        assert not (folder / "executed").exists(), case
    tracemalloc.stop()
    # Flipped data, empty scales set to zero and added JSON fields are harmless, the rest is not.
    assert CASES // 4 * 0.02 < accepted < CASES // 4 * 0.4


def adapter(folder: Path) -> Path:
    model = tiny()
    convert_model(model)
    add_lora(model, r=2)
    save_adapter(model, folder)
    return folder


def test_a_changed_adapter_is_refused_or_read_as_it_says(tmp_path: Path) -> None:
    valid, folder = files_below(adapter(tmp_path / "valid")), tmp_path / "changed"
    mutations = [flip_a_byte_of_the_header, flip_a_byte_of_the_data, cut, claim_a_long_header]
    mutations += [drop_a_key, rename_a_key, add_a_key, change_a_tensor, put_a_pickle]
    accepted = 0
    for seed in range(200):
        rng = random.Random(seed)
        put_back(folder, valid)
        if seed % 2:
            config = json.loads((folder / "adapter_config.json").read_text())
            field = rng.choice(sorted(config))
            config[field] = rng.choice(ODD_VALUES)
            (folder / "adapter_config.json").write_text(json.dumps(config))
            case = f"{seed}: {field}={config[field]!r}"
        else:
            case = f"{seed}: {rng.choice(mutations)(folder, rng)}"
        model = tiny()
        convert_model(model)
        try:
            load_adapter(model, folder)
        except ValueError as error:
            assert str(folder) in str(error), f"{case}: {error}"
        else:
            accepted += 1
            stored = load_file(folder / "adapter_model.safetensors")
            own = {k: t for k, t in model.state_dict().items() if "lora" in k.lower()}
            assert len(stored) == 4 and sum(t.numel() for t in own.values()) >= sum(
                t.numel() for t in stored.values()
            ), case
        assert not (folder / "executed").exists(), case
    assert 10 < accepted < 150
