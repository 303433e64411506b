"""Layers under bitsandbytes' names, beside those of the installed bitsandbytes."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from compare import normal
from torch import nn

from qlora_ref.integrations import bitsandbytes as ours
from qlora_ref.integrations.bitsandbytes import functional as F

bnb = pytest.importorskip(
    "bitsandbytes", reason="bitsandbytes is missing: pip install bitsandbytes==0.50.2"
)


def layer(cls: Any = ours.nn.LinearNF4, **options: Any) -> Any:
    torch.manual_seed(0)
    return cls(64, 48, **options)


def test_a_layer_is_quantised_when_it_is_moved_as_the_other_is() -> None:
    mine, theirs = layer(), layer(bnb.nn.LinearNF4)
    with pytest.raises(RuntimeError, match=r"\.to\(device\)"):
        mine(normal(2, 64))
    mine, theirs = mine.to("cpu"), theirs.to("cpu")
    assert isinstance(mine.weight, ours.nn.Params4bit) and mine.weight.bnb_quantized
    first, second = mine.state_dict(), theirs.state_dict()
    assert first.keys() == second.keys()
    assert torch.equal(first["weight"], second["weight"])
    x = normal(5, 64)
    # Training mode: in evaluation the other library rearranges its weight.
    torch.testing.assert_close(mine(x), theirs.train()(x), rtol=0, atol=1e-5)


def test_a_state_dict_goes_into_another_layer() -> None:
    source = layer().to("cpu")
    empty = layer(device="meta")
    empty.bias = nn.Parameter(torch.zeros(48))
    for target in (layer(bias=True), layer().to("cpu"), empty):
        nn.init.zeros_(target.bias)
        target.load_state_dict(source.state_dict())
        assert torch.equal(target(normal(2, 64)), source(normal(2, 64)))
    truncated = {k: v[:10] if k.endswith("absmax") else v for k, v in source.state_dict().items()}
    with pytest.raises(RuntimeError, match="weight"):
        layer().load_state_dict(truncated)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_casts_and_copies_keep_the_codes(storage: torch.dtype) -> None:
    source = layer(quant_storage=storage).to("cpu")
    x, before = normal(3, 64), source.weight.data.clone()
    y = source(x)
    saved = io.BytesIO()
    torch.save(source, saved)
    saved.seek(0)
    copies = [
        copy.deepcopy(source),
        pickle.loads(pickle.dumps(source)),
        torch.load(saved, weights_only=False),
        copy.deepcopy(source).to(torch.bfloat16).float(),
        copy.deepcopy(source).to("cpu"),
    ]
    for other in copies[:3] + copies[4:]:
        assert torch.equal(other(x), y)
    for other in copies:
        assert torch.equal(other.weight.data.view(torch.uint8), before.view(torch.uint8))
        assert other.weight.quant_state == source.weight.quant_state


def test_a_copy_takes_the_attributes_of_another_as_arguments() -> None:
    weight = layer().weight
    made = ours.nn.Params4bit(weight.data, requires_grad=False, **weight.__dict__).to("cpu")
    assert made.bnb_quantized and made.quant_state.quant_type == "nf4"
    assert made.absmax is made.quant_state.absmax and made.quant_map is made.quant_state.code
    assert made.nested_absmax is made.quant_state.state2.absmax


def test_the_input_decides_the_dtype_unless_the_layer_does() -> None:
    x = normal(3, 64)
    for compute in (None, torch.float32, torch.bfloat16):
        moved = layer(compute_dtype=compute).to("cpu")
        bias = moved.bias.clone()
        assert moved(x.bfloat16()).dtype == torch.bfloat16 and moved(x).dtype == torch.float32
        assert moved.compute_dtype is compute and torch.equal(moved.bias, bias)


def test_an_embedding_gives_rows_of_the_restored_table() -> None:
    torch.manual_seed(0)
    table = ours.nn.EmbeddingNF4(20, 64).to("cpu")
    dense = F.dequantize_4bit(table.weight.data, table.weight.quant_state)
    ids = torch.tensor([[3, 19], [0, 3]])
    assert torch.equal(table(ids), dense[ids])
    again = ours.nn.EmbeddingNF4(20, 64)
    again.load_state_dict(table.state_dict())
    assert torch.equal(again(ids), dense[ids])


def test_any_parameter_can_be_held_in_4_bits() -> None:
    experts = nn.Module()
    original = normal(3, 8, 64)
    experts.gate = nn.Parameter(original.clone())
    ours.nn.parametrize.replace_parameter_4bit(experts, "gate", compress_statistics=True)
    packed, state = F.quantize_nf4(original, compress_statistics=True)
    assert torch.equal(experts.gate, F.dequantize_4bit(packed, state))
    stored = experts.state_dict()
    keys = {"gate", *(f"gate.{key}" for key in state.as_dict(packed=True))}
    assert stored.keys() == keys and torch.equal(stored["gate"], packed)
    again = nn.Module()
    again.gate = nn.Parameter(packed, requires_grad=False)
    parts = {k.removeprefix("gate."): v for k, v in stored.items() if k != "gate"}
    ours.nn.parametrize.replace_parameter_4bit_prequantized(
        again, "gate", parts, torch.device("cpu")
    )
    assert torch.equal(again.gate, experts.gate)
    with pytest.raises(TypeError, match="Parameter"):
        ours.nn.parametrize.replace_parameter_4bit(nn.ReLU(), "inplace")
