"""A frozen 4-bit weight survives copies, casts and state dicts, bit for bit or with an error."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import DTYPES, assert_same_bits
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qlora_ref.linear import Embedding4bit, Linear4bit
from qlora_ref.module4bit import Module4bit
from qlora_ref.tensor_format import to_tensors

LEVELS = (-1.0, -0.5, 0.0, 0.25, 1.0)
QUANT_STATE = "weight.quant_state.bitsandbytes__nf4"


def linear4bit(seed: int = 0, **options: Any) -> Linear4bit:
    torch.manual_seed(seed)
    return Linear4bit(96, 40, **options)


def embedding4bit(seed: int = 0, **options: Any) -> Embedding4bit:
    torch.manual_seed(seed)
    return Embedding4bit(50, 24, **options)


both_kinds = pytest.mark.parametrize("make", [linear4bit, embedding4bit])
both_scales = pytest.mark.parametrize("double_quant", [False, True])


def cloned(module: nn.Module) -> dict[str, Tensor]:
    return {key: part.clone() for key, part in module.state_dict().items()}


def model_of(seed: int, **options: Any) -> nn.Sequential:
    inner = nn.Sequential(linear4bit(seed + 1, **options), nn.LayerNorm(40))
    return nn.Sequential(embedding4bit(seed, **options), nn.Linear(24, 96), inner)


def torch_saved(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    module: nn.Module = torch.load(file, weights_only=False)
    return module


COPIES: list[Callable[[Any], Any]] = [
    copy.deepcopy,
    lambda layer: pickle.loads(pickle.dumps(layer)),
    torch_saved,
]


@pytest.mark.parametrize("make_copy", COPIES)
@both_kinds
@both_scales
def test_copies_are_equal_and_share_nothing(
    make_copy: Callable[[Any], Any], make: Callable[..., Module4bit], double_quant: bool
) -> None:
    layer = make(codebook=LEVELS, double_quant=double_quant)
    twin, before = make_copy(layer), cloned(layer)
    assert twin.quantized_weight == layer.quantized_weight
    for part in (*twin.parameters(), *twin.buffers()):
        part.data.zero_()
    for key, part in layer.state_dict().items():
        assert_same_bits(part, before[key])


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda layer: layer.half(),
    "bfloat16": lambda layer: layer.to(torch.bfloat16),
    "cpu bfloat16": lambda layer: layer.to("cpu", torch.bfloat16),
    "float": lambda layer: layer.float(),
    "double": lambda layer: layer.double(),
    "type": lambda layer: layer.type(torch.float16),
    "down and up": lambda layer: layer.half().float(),
}


@pytest.mark.parametrize("cast", CASTS)
@both_scales
def test_casts_change_the_bias_and_no_bit_of_the_weight(cast: str, double_quant: bool) -> None:
    model = nn.Sequential(linear4bit(double_quant=double_quant), nn.Linear(40, 2))
    before, bias = copy.deepcopy(model[0].quantized_weight), model[0].bias.detach().clone()
    assert CASTS[cast](model) is model
    assert model[0].quantized_weight == before
    dtype = model[1].bias.dtype
    assert (dtype == torch.float32) == (cast in ("float", "down and up"))
    assert model[0].bias.dtype == dtype
    if cast != "down and up":
        assert torch.equal(model[0].bias, bias.to(dtype))


@both_kinds
def test_a_move_takes_every_part_along(make: Callable[..., Module4bit]) -> None:
    layer = make().to("meta")
    assert {part.device.type for part in (*layer.parameters(), *layer.buffers())} == {"meta"}
    assert layer.quantized_weight.device.type == "meta"
    empty = layer.to_empty(device="cpu")
    assert empty.weight.dtype == torch.uint8 and empty.dequantize().device.type == "cpu"


@both_kinds
@both_scales
def test_the_state_dict_has_the_keys_of_the_format_and_the_bias(
    make: Callable[..., Module4bit], double_quant: bool
) -> None:
    model = nn.Sequential(make(double_quant=double_quant))
    expected = to_tensors(model[0].quantized_weight, "0.weight")
    state = model.state_dict()
    assert set(state) == set(expected) | ({"0.bias"} if make is linear4bit else set())
    for key, part in expected.items():
        assert_same_bits(state[key], part)


@both_kinds
def test_a_meta_layer_has_the_keys_of_a_real_one(make: Callable[..., Module4bit]) -> None:
    assert list(make(device="meta").state_dict()) == list(make().state_dict())


@pytest.mark.parametrize("dtype", DTYPES)
@both_scales
def test_a_strict_load_brings_back_every_bit_whatever_was_there(
    double_quant: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = model_of(1, codebook="fp4", block_size=64, double_quant=double_quant, dtype=dtype)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = model_of(5, codebook="nf4", block_size=32, double_quant=not double_quant)
    result = other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert not result.missing_keys and not result.unexpected_keys
    assert other[0].quantized_weight == model[0].quantized_weight
    assert other[2][0].quantized_weight == model[2][0].quantized_weight
    for key, part in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], part.to(other.state_dict()[key].dtype))
    x = torch.tensor([3, 1, 49])
    assert_same_bits(other[0](x), model[0](x))


def test_a_loaded_layer_does_not_share_the_tensors_of_the_state_dict() -> None:
    # As nn.Module promises: what is loaded is copied, unless assign=True.
    source, target = linear4bit(1), linear4bit(2)
    target.load_state_dict(source.state_dict())
    before = cloned(target)
    for part in (*source.parameters(), *source.buffers()):
        part.data.zero_()
    for key, part in target.state_dict().items():
        assert_same_bits(part, before[key])


@both_kinds
def test_a_meta_layer_takes_over_the_tensors_of_the_file(make: Callable[..., Module4bit]) -> None:
    source, target = make(1), make(device="meta", block_size=32)
    target.load_state_dict(source.state_dict(), assign=True)
    assert target.quantized_weight == source.quantized_weight
    assert {part.device.type for part in (*target.parameters(), *target.buffers())} == {"cpu"}


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_a_file_with_another_storage_dtype_is_loaded(storage: torch.dtype) -> None:
    # bitsandbytes' quant_storage: the same bytes under another dtype, for FSDP.
    source, target = linear4bit(1), linear4bit(2)
    state = source.state_dict()
    state["weight"] = state["weight"].view(-1).view(storage).view(-1, 1)
    target.load_state_dict(state)
    assert target.quantized_weight == source.quantized_weight


def test_a_weight_without_a_column_dimension_is_loaded() -> None:
    source, target = linear4bit(1), linear4bit(2)
    state = source.state_dict()
    target.load_state_dict({**state, "weight": state["weight"].flatten()})
    assert target.quantized_weight == source.quantized_weight


MISTAKES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no weight": (lambda state: state.pop("weight"), 'Missing key.*"weight"'),
    "no bias": (lambda state: state.pop("bias"), 'Missing key.*"bias"'),
    "no absmax": (lambda state: state.pop("weight.absmax"), r"no tensor weight\.absmax"),
    "no quant_state": (lambda state: state.pop(QUANT_STATE), r"weight\.quant_state"),
    "nothing": (lambda state: state.clear(), 'Missing key.*"weight"'),
    "another module": (lambda state: state.update(other=torch.ones(1)), 'Unexpected.*"other"'),
    "a stranger": (
        lambda state: state.update({"weight.other": torch.ones(1)}),
        r'Unexpected.*"weight\.other"',
    ),
    "short bias": (lambda state: state.update(bias=torch.ones(39)), "size mismatch for bias"),
    "float weight": (
        lambda state: (state.clear(), state.update(nn.Linear(96, 40).state_dict())),
        r"weight\.quant_state",
    ),
    "another shape": (
        lambda state: state.update(Linear4bit(40, 96).state_dict()),
        r"weight must have shape \(40, 96\), got \(96, 40\)",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_state_dict_that_does_not_fit_is_refused_and_the_weight_kept(mistake: str) -> None:
    source, target = linear4bit(1), linear4bit(2)
    change, message = MISTAKES[mistake]
    state, before = source.state_dict(), copy.deepcopy(target.quantized_weight)
    change(state)
    with pytest.raises(RuntimeError, match=message):
        target.load_state_dict(state)
    if mistake not in ("no bias", "short bias", "another module", "a stranger"):
        assert target.quantized_weight == before


def test_without_strict_other_keys_are_told_and_a_bad_weight_still_raises() -> None:
    source, target = linear4bit(1), linear4bit(2)
    state = {**source.state_dict(), "other": torch.ones(1)}
    del state["bias"]
    result = target.load_state_dict(state, strict=False)
    assert result.missing_keys == ["bias"] and result.unexpected_keys == ["other"]
    assert target.quantized_weight == source.quantized_weight
    del state["weight.absmax"]  # bitsandbytes would keep its old scales without a word
    with pytest.raises(RuntimeError, match=r"weight\.absmax"):
        target.load_state_dict(state, strict=False)
    assert target.load_state_dict({}, strict=False).missing_keys == ["weight", "bias"]


def test_a_layer_without_bias_refuses_one() -> None:
    without = linear4bit(bias=False)
    with pytest.raises(RuntimeError, match='Unexpected.*"bias"'):
        without.load_state_dict(linear4bit().state_dict())


def test_state_dict_hands_out_no_copy_and_no_gradient() -> None:
    layer = linear4bit()
    state = layer.state_dict()
    assert state["weight"].data_ptr() == layer.weight.data_ptr()
    assert state["weight.absmax"].data_ptr() == layer.weight_scales.data_ptr()
    assert not any(part.requires_grad for part in state.values())
