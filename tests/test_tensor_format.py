"""The file format: what is in it, what reads back, and what is refused by name."""

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_ref import tensor_format
from qlora_ref.codebooks import CODEBOOKS, dynamic_codebook, nf4_codebook
from qlora_ref.quantized import QuantizedTensor, quantize
from qlora_ref.tensor_format import from_tensors, stored_names, to_tensors

NF4_STATE = "weight.quant_state.bitsandbytes__nf4"
Tensors = dict[str, Tensor]


def stored(double_quant: bool = True, codebook: Any = "nf4") -> Tensors:
    """257 blocks, the last one short, and an odd count: two nested scales."""
    x = torch.randn(3, 5477, generator=torch.Generator().manual_seed(0))
    return to_tensors(quantize(x, codebook, double_quant=double_quant))


def state_of(tensors: Tensors, key: str = NF4_STATE) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(bytes(tensors[key].flatten().byte().tolist()))
    return state


def as_bytes(text: str | bytes) -> Tensor:
    text = text.encode() if isinstance(text, str) else text
    return torch.tensor(list(text), dtype=torch.uint8)


def with_state(**changes: Any) -> Tensors:
    tensors = stored()
    tensors[NF4_STATE] = as_bytes(json.dumps({**state_of(tensors), **changes}))
    return tensors


@pytest.mark.parametrize("double_quant", [False, True])
def test_keys_dtypes_and_shapes_are_those_of_bitsandbytes(double_quant: bool) -> None:
    n = 3 * 5477  # 16431 values: 257 blocks of 64, two of 256 of those
    found = {key: (part.dtype, tuple(part.shape)) for key, part in stored(double_quant).items()}
    json_shape = found.pop(NF4_STATE)
    assert json_shape[0] == torch.uint8 and len(json_shape[1]) == 1
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "weight": (torch.uint8, ((n + 1) // 2, 1)),
        "weight.absmax": (torch.uint8 if double_quant else torch.float32, (257,)),
        "weight.quant_map": (torch.float32, (16,)),
    }
    if double_quant:
        expected["weight.nested_absmax"] = (torch.float32, (2,))
        expected["weight.nested_quant_map"] = (torch.float32, (256,))
    assert found == expected


def test_the_json_is_what_bitsandbytes_writes_to_the_letter() -> None:
    # Every scale is float32(0.1), so that is the offset; its double is written in full.
    double = quantize(torch.full((64, 128), 0.1), double_quant=True).to(torch.bfloat16)
    plain = quantize(torch.full((7,), 0.1), "fp4", block_size=32)
    assert bytes(to_tensors(double)[NF4_STATE].tolist()) == (
        b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 128], '
        b'"nested_blocksize": 256, "nested_dtype": "float32", '
        b'"nested_offset": 0.10000000149011612}'
    )
    assert bytes(to_tensors(plain)["weight.quant_state.bitsandbytes__fp4"].tolist()) == (
        b'{"quant_type": "fp4", "blocksize": 32, "dtype": "float32", "shape": [7]}'
    )


@pytest.mark.parametrize("codebook", [*CODEBOOKS, "custom"])
def test_only_codebooks_that_bitsandbytes_has_carry_its_name(codebook: str) -> None:
    levels = [-1.0, 0.0, 1.0] if codebook == "custom" else codebook
    owner = "bitsandbytes" if codebook in ("nf4", "fp4") else "qlora_ref"
    assert f"weight.quant_state.{owner}__{codebook}" in stored(codebook=levels)


def test_a_file_written_by_hand_reads_as_the_definition_says() -> None:
    levels = nf4_codebook()
    tensors = {
        "a.b.quant_state.bitsandbytes__nf4": as_bytes(
            '{"quant_type": "nf4", "blocksize": 2, "dtype": "float16", "shape": [1, 5]}'
        ),
        # Codes 15 0 | 7 15 | 1 and half a byte that is not read.
        "a.b": torch.tensor([[0xF0], [0x7F], [0x1A]], dtype=torch.uint8),
        "a.b.absmax": torch.tensor([2.0, 0.5, 4.0]),
        "another.weight": torch.zeros(3),
    }
    tensor = from_tensors(tensors, "a.b")
    expected = torch.tensor([[2.0, -2.0, 0.0, 0.5, 4 * levels[1].item()]]).half()
    assert torch.equal(tensor.dequantize(), expected)
    assert (tensor.codebook_name, tensor.block_size) == ("nf4", 2)
    assert stored_names(tensors) == ["a.b"]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("codebook", [*CODEBOOKS, "custom"])
def test_what_is_written_reads_back_equal(codebook: str, double_quant: bool) -> None:
    levels: Any = [0.5, -1.0, 0.0] if codebook == "custom" else codebook
    for shape in ((), (0,), (7,), (0, 4), (5, 64), (2, 3, 11)):
        tensor = quantize(torch.randn(shape), levels, 32, double_quant)
        assert from_tensors(to_tensors(tensor, "layer.0.weight"), "layer.0.weight") == tensor


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32, torch.int8])
def test_other_storage_dtypes_hold_the_same_bytes(storage: torch.dtype) -> None:
    tensors = to_tensors(quantize(torch.randn(8, 64)))
    expected = from_tensors(tensors)
    tensors["weight"] = tensors["weight"].flatten().view(storage).view(-1, 1)
    assert from_tensors(tensors) == expected


def test_quant_map_may_be_missing_for_a_codebook_that_has_a_name() -> None:
    tensors = stored()
    expected = from_tensors(tensors)
    del tensors["weight.quant_map"]
    assert from_tensors(tensors) == expected


def without(key: str) -> Callable[[], Tensors]:
    return lambda: {name: part for name, part in stored().items() if name != key}


def replacing(key: str, part: Tensor) -> Callable[[], Tensors]:
    return lambda: {**stored(), key: part}


def state(**changes: Any) -> Callable[[], Tensors]:
    return lambda: with_state(**changes)


def transposed_scales() -> Tensors:
    # What bitsandbytes saves after an evaluation on the CPU: repacked weights, scales (K/bs, N).
    tensors = to_tensors(quantize(torch.randn(8, 128)))
    scales = tensors["weight.absmax"].view(8, 2).t().contiguous().bfloat16()
    return {**tensors, "weight.absmax": scales}


OTHER_STATE = "weight.quant_state.bitsandbytes__fp4"
MALFORMED: dict[str, tuple[Callable[[], Tensors], str]] = {
    "no state": (without(NF4_STATE), r"weight\.quant_state"),
    "two states": (replacing(OTHER_STATE, as_bytes("{}")), r"quant_state.*nf4.*fp4"),
    "no codes": (without("weight"), "no tensor weight"),
    "no absmax": (without("weight.absmax"), r"weight\.absmax"),
    "no nested map": (without("weight.nested_quant_map"), "nested_quant_map"),
    "no nested absmax": (without("weight.nested_absmax"), "absmax"),
    "not JSON": (replacing(NF4_STATE, as_bytes('{"quant_type": ')), "quant_state.*not JSON"),
    "not UTF-8": (replacing(NF4_STATE, as_bytes(b'{"\xff\xfe": 1}')), "quant_state.*not JSON"),
    "empty JSON": (replacing(NF4_STATE, as_bytes("")), "quant_state.*not JSON"),
    "JSON list": (replacing(NF4_STATE, as_bytes("[1, 2]")), "quant_state.*object"),
    "JSON of lists": (replacing(NF4_STATE, as_bytes("[" * 99_999)), "quant_state"),
    "2-D JSON": (replacing(NF4_STATE, as_bytes("{}").view(1, 2)), "quant_state"),
    "other type": (state(quant_type="fp4"), "quant_type 'fp4'"),
    "list as type": (state(quant_type=["nf4"]), "quant_type"),
    "negative shape": (state(shape=[-3, -5477]), r"shape.*\[-3, -5477\]"),
    "fractional shape": (state(shape=[3.0, 5477]), "shape"),
    "shape as text": (state(shape="3"), "shape"),
    "no shape": (state(shape=None), "shape"),
    "other shape": (state(shape=[3, 5479]), "16437 values need 8219 bytes, got 8216"),
    "huge shape": (state(shape=[10**9, 10**9]), "values need"),
    "endless shape": (state(shape=[10**30]), "shape"),
    "empty endless shape": (state(shape=[0, 10**30]), "shape"),
    "endless blocks": (state(blocksize=2**63), "blocksize"),
    "bad dtype": (state(dtype="float64"), "dtype.*float64"),
    "no dtype": (state(dtype=None), "dtype"),
    "odd blocks": (state(blocksize=63), "block_size must be even"),
    "no blocks": (state(blocksize=0), "blocksize"),
    "negative blocks": (state(blocksize=-64), "blocksize"),
    "blocks as text": (state(blocksize="64"), "blocksize"),
    "smaller blocks": (state(blocksize=32), "absmax must hold one scale per block"),
    "nested 128": (state(nested_blocksize=128), "nested.* 128"),
    "nested bf16": (state(nested_dtype="bfloat16"), "nested.*bfloat16"),
    "NaN offset": (state(nested_offset=math.nan), "nested_offset.*nan"),
    "infinite offset": (state(nested_offset=math.inf), "nested_offset.*inf"),
    "float64 offset": (state(nested_offset=1e300), "nested_offset"),
    "endless offset": (state(nested_offset=10**400), "nested_offset"),
    "offset as text": (state(nested_offset="0.1"), "nested_offset"),
    "no offset": (state(nested_offset=None), "nested_offset"),
    "other levels": (replacing("weight.quant_map", CODEBOOKS["fp4"]()), "quant_map.*nf4"),
    "8 levels": (replacing("weight.quant_map", torch.zeros(8)), "quant_map"),
    "NaN levels": (replacing("weight.quant_map", torch.full((16,), math.nan)), "quant_map"),
    "float64 levels": (replacing("weight.quant_map", torch.zeros(16).double()), "quant_map"),
    "float16 nested": (replacing("weight.nested_absmax", torch.zeros(2).half()), "nested_absmax"),
    "nested shape": (replacing("weight.nested_absmax", torch.zeros(3)), "nested_absmax"),
    "float codes of scales": (replacing("weight.absmax", torch.zeros(257)), "absmax.*uint8"),
    "transposed scales": (transposed_scales, "absmax"),
    "short codes": (replacing("weight", torch.zeros(99, 1, dtype=torch.uint8)), "got 99"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_tensor_is_refused_and_the_culprit_named(case: str) -> None:
    make, message = MALFORMED[case]
    with pytest.raises(ValueError, match=message) as raised:
        from_tensors(make())
    assert "weight" in str(raised.value)


def test_an_unknown_codebook_without_levels_is_refused() -> None:
    tensors = stored(codebook=[-1.0, 0.0, 1.0])
    del tensors["weight.quant_map"]
    with pytest.raises(ValueError, match="quant_type 'custom' is unknown"):
        from_tensors(tensors)


def test_a_block_size_beyond_the_tensor_costs_no_memory() -> None:
    # 2^40 values, if a short block were filled up: 4 TiB.
    tensors = to_tensors(quantize(torch.tensor([1.0, 0.0, -1.0])))
    state = {**state_of(tensors), "blocksize": 2**40}
    tensors[NF4_STATE] = as_bytes(json.dumps(state))
    try:
        tensor = from_tensors(tensors)
    except ValueError:
        return
    assert tensor.dequantize().tolist() == [1.0, 0.0, -1.0]


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -1])
def test_a_truncated_file_is_refused(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "weight.safetensors"
    quantize(torch.randn(8, 64)).save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"weight\.safetensors is not a whole safetensors file"):
        QuantizedTensor.load(path)


@pytest.mark.parametrize(
    "content",
    [b"PK\x03\x04 a zip, as torch.save writes", b"\xff" * 64, struct.pack("<Q", 2) + b"[]"],
)
def test_a_file_that_is_not_safetensors_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "weight.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        QuantizedTensor.load(path)


def test_a_file_must_hold_one_tensor_in_4_bits(tmp_path: Path) -> None:
    path = tmp_path / "weight.safetensors"
    two = {**stored(), **{key.replace("weight", "b"): part for key, part in stored().items()}}
    for tensors in ({"weight": torch.ones(3)}, two):
        save_file(tensors, path)
        with pytest.raises(ValueError, match="must hold one 4-bit tensor"):
            tensor_format.load(path)
    with pytest.raises(FileNotFoundError):
        tensor_format.load(tmp_path / "elsewhere")


def test_saving_replaces_the_file_only_when_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_a_little(tensors: Tensors, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    path = tmp_path / "weight.safetensors"
    tensor = quantize(torch.randn(8, 64), double_quant=True)
    tensor.save(path)
    assert set(load_file(path)) == set(to_tensors(tensor))
    monkeypatch.setattr("safetensors.torch.save_file", write_a_little)
    with pytest.raises(OSError, match="no space left"):
        quantize(torch.randn(3)).save(path)
    assert tensor_format.load(path) == tensor
    assert list(tmp_path.iterdir()) == [path]


STATE_FIELDS = (
    *("quant_type", "blocksize", "dtype", "shape"),
    *("nested_blocksize", "nested_dtype", "nested_offset"),
)
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, 2, 64, 10**30, -(10**400), True])
JSON_VALUES = st.recursive(
    NUMBERS
    | st.none()
    | st.text(max_size=5)
    | st.sampled_from(["nf4", "fp4", "custom", "float16"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
DTYPES = (torch.uint8, torch.int8, torch.bool, torch.int64, torch.bfloat16, torch.float64)
STRANGERS = st.builds(
    lambda shape, dtype: torch.ones(shape, dtype=dtype),
    st.lists(st.sampled_from([0, 1, 2, 3, 16, 256]), max_size=3),
    st.sampled_from([*DTYPES, torch.float32, torch.float8_e4m3fn]),
)


def mutate(data: st.DataObject, tensors: Tensors) -> None:
    """Change one thing: a field or a byte of the JSON, or a whole tensor, its name or dtype."""
    key = data.draw(st.sampled_from(sorted(tensors)))
    kind = data.draw(
        st.sampled_from(["field", "byte", "drop", "rename", "dtype", "cut", "replace"])
    )
    state_key = next((name for name in tensors if name.startswith("weight.quant_state.")), key)
    part = tensors[state_key if kind in ("field", "byte") else key]
    if kind == "field":
        try:
            state = json.loads(bytes(part.tolist()))
            state[data.draw(st.sampled_from(STATE_FIELDS))] = data.draw(JSON_VALUES)
        except (ValueError, TypeError):  # an earlier change left no JSON object
            return
        tensors[state_key] = as_bytes(json.dumps(state))
    elif kind == "byte" and part.numel():
        part.view(-1)[data.draw(st.integers(0, part.numel() - 1))] = data.draw(st.integers(0, 127))
    elif kind in ("drop", "rename"):
        part = tensors.pop(key)
        if kind == "rename":
            tensors[data.draw(st.sampled_from(["weight", "weight.x", OTHER_STATE]))] = part
    elif kind == "dtype":
        tensors[key] = part.to(data.draw(st.sampled_from(DTYPES)))
    elif kind == "cut":
        tensors[key] = part.flatten()[: data.draw(st.integers(0, part.numel()))]
    else:
        tensors[key] = data.draw(STRANGERS)


@settings(max_examples=400, deadline=None)
@given(data=st.data(), double_quant=st.booleans(), custom=st.booleans())
def test_a_mutated_tensor_loads_in_its_shape_or_raises_a_value_error(
    data: st.DataObject, double_quant: bool, custom: bool
) -> None:
    codebook = (-1.0, 0.0, 0.5) if custom else "nf4"
    tensors = to_tensors(quantize(torch.ones(13, 5), codebook, 2, double_quant))
    for _ in range(data.draw(st.integers(1, 3))):
        mutate(data, tensors) if tensors else None
    try:
        loaded = from_tensors(tensors)
    except ValueError:
        return
    key = next(name for name in tensors if name.startswith("weight.quant_state."))
    assert list(loaded.shape) == state_of(tensors, key)["shape"]
    if loaded.block_size <= 2**20:  # larger ones have a test of their own
        restored = loaded.dequantize()
        assert (restored.shape, restored.dtype) == (loaded.shape, loaded.dtype)


def test_nested_scales_read_with_the_map_of_the_file() -> None:
    # The map is data here, not a constant: halved levels halve the distance from the offset.
    tensors = stored()
    offset = state_of(tensors)["nested_offset"]
    expected = from_tensors(tensors).absmax.double() - offset
    tensors["weight.nested_quant_map"] = dynamic_codebook() / 2
    halved = from_tensors(tensors).absmax.double() - offset
    # Adding an offset of about 2.6 rounds to steps of 2^-22, each of the two by half a step.
    torch.testing.assert_close(2 * halved, expected, rtol=0, atol=1.5 * 2**-22)
