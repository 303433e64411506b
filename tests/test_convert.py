"""convert_model: what it turns into 4 bits, what it leaves, and what it says about each."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_same_bits, normal
from torch import Tensor, nn

import qlora_ref
from qlora_ref import Linear4bit, convert_model, quantize
from qlora_ref import linear as linear_module
from qlora_ref.module4bit import Module4bit

TINY_LLAMA = Path(__file__).parent / "data" / "tiny_llama"

# Logits of two models with the same weights, whose float32 sums run in another order: each layer
# adds a few roundings of 2^-24 to activations of order 1; a wrong weight changes the first digit.
LOGITS = {"rtol": 1e-4, "atol": 1e-4}


def load_transformers() -> Any:
    return pytest.importorskip("transformers", reason="transformers is not installed")


def tiny_llama() -> nn.Module:
    """Four layers of the tiny Llama's kind, narrower and with new weights."""
    transformers = load_transformers()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "dtype": "float32"}
    config = transformers.AutoConfig.from_pretrained(TINY_LLAMA, **sizes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def two_layers(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 40, **options), nn.ReLU(), nn.Linear(40, 8, **options))


def bytes_in_4bit(n: int, block_size: int, double_quant: bool) -> int:
    """Half a byte a value, and for each block a float32, or a byte and its share of the nesting."""
    blocks = -(-n // block_size)
    scales = blocks + 4 * -(-blocks // 256) + 4 if double_quant else 4 * blocks
    return -(-n // 2) + scales


def with_restored_weights(dense: nn.Module, converted: nn.Module) -> nn.Module:
    """The dense model with the weights that the 4-bit layers of the other one stand for."""
    for name, layer in converted.named_modules():
        if isinstance(layer, Linear4bit):
            weight = layer.dequantize(torch.float32)
            target = dense.get_submodule(name)
            is_linear = isinstance(target, nn.Linear)
            target.weight.data = weight if is_linear else weight.t().contiguous()
    return dense


def test_llama_is_converted_but_for_its_output_head() -> None:
    model = tiny_llama()
    names = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    report = convert_model(model)
    assert set(report.converted) == names - {"lm_head"} and len(report.converted) == 28
    assert report.kept["lm_head"] == "output head"
    in_4bit = {name for name, module in model.named_modules() if type(module) is Linear4bit}
    assert in_4bit == names - {"lm_head"}
    others = {name: why for name, why in report.kept.items() if name != "lm_head"}
    assert set(others.values()) == {"not a linear layer"} and len(others) == 1 + 2 * 4 + 1


def test_report_has_one_decision_for_each_module_with_parameters() -> None:
    model = tiny_llama()
    owners = [n for n, m in model.named_modules() if list(m.parameters(recurse=False))]
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in owners}
    kinds = {name: type(model.get_submodule(name)).__name__ for name in owners}
    decisions = convert_model(model).decisions
    assert [decision.name for decision in decisions] == owners
    assert {decision.name: decision.shape for decision in decisions} == shapes
    assert {decision.name: decision.kind for decision in decisions} == kinds


def test_converted_llama_computes_with_the_restored_weights() -> None:
    load = load_transformers().AutoModelForCausalLM.from_pretrained
    dense = load(TINY_LLAMA, dtype=torch.float32).eval()
    model, ids = copy.deepcopy(dense), torch.arange(3, 43).reshape(2, 20)
    convert_model(model)
    expected = with_restored_weights(dense, model)(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, **LOGITS)


def test_converted_gpt2_computes_with_the_restored_weights() -> None:
    transformers = load_transformers()
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=64, n_layer=2, n_head=2)
    dense = transformers.GPT2LMHeadModel(config).eval()
    model, ids = copy.deepcopy(dense), torch.arange(16)[None]
    report = convert_model(model)
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert report.converted == [f"transformer.h.{i}.{name}" for i in (0, 1) for name in layers]
    assert report.kept["lm_head"] == "output head"  # and tied to the embedding
    expected = with_restored_weights(dense, model)(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, **LOGITS)


@pytest.mark.parametrize("training", (True, False))
def test_options_reach_every_layer(training: bool) -> None:
    dense = two_layers().train(training)
    model = copy.deepcopy(dense)
    levels = [-1.0, -0.25, 0.0, 0.25, 1.0]
    convert_model(model, levels, block_size=32, double_quant=False, compute_dtype=torch.bfloat16)
    for name in ("0", "2"):
        layer, before = model.get_submodule(name), dense.get_submodule(name)
        assert layer.quantized_weight == quantize(before.weight.detach(), levels, 32)
        assert layer.compute_dtype == torch.bfloat16 and layer.training == training
        assert_same_bits(layer.bias, before.bias)


@pytest.mark.parametrize("double_quant", (True, False))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_bytes_are_the_closed_form(dtype: torch.dtype, double_quant: bool) -> None:
    model, size = nn.Sequential(nn.Linear(301, 77), nn.LayerNorm(77)).to(dtype), dtype.itemsize
    report = convert_model(model, double_quant=double_quant)
    linear, norm = report.decisions
    assert linear.bytes_before == size * (301 * 77 + 77)
    assert linear.bytes_after == bytes_in_4bit(301 * 77, 64, double_quant) + size * 77
    assert norm.bytes_before == norm.bytes_after == size * 2 * 77


def test_report_reads_as_a_summary() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.LayerNorm(64), nn.LayerNorm(64))
    after = 64 * 64 // 2 + 64 + 4 + 4
    assert str(convert_model(model)).splitlines() == [
        f"1 layers to 4 bits: 16,384 to {after:,} bytes",
        "kept 2 LayerNorm: not a linear layer",
    ]


# What is kept, and why.


def test_tied_weight_is_kept() -> None:
    model = two_layers()
    model.embedding = nn.Embedding(8, 40)
    model[2].weight = model.embedding.weight
    report = convert_model(model)
    assert report.converted == ["0"]
    assert report.kept == {"2": "tied to another module", "embedding": "not a linear layer"}
    assert model[2].weight is model.embedding.weight


def test_module_with_two_names_is_kept() -> None:
    model = two_layers()
    model.again = model[2]
    report = convert_model(model)
    assert report.converted == ["0"] and report.kept["2"] == "tied to another module"
    assert model.again is model[2]


def test_projection_of_multihead_attention_is_kept() -> None:
    model = nn.Sequential(nn.MultiheadAttention(16, 2), nn.Linear(16, 16))
    report, x = convert_model(model), normal(3, 2, 16)
    assert report.converted == ["1"]
    assert report.kept["0.out_proj"] == "a subclass of nn.Linear"
    model[0](x, x, x)  # it reads out_proj.weight


def test_modules_that_transformers_keeps_in_float32_are_kept() -> None:
    transformers = load_transformers()
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=50, decoder_start_token_id=0, **sizes)
    model = transformers.T5ForConditionalGeneration(config).eval()
    report = convert_model(model)
    float32 = {n for n, why in report.kept.items() if why == "the model keeps it in float32"}
    assert float32 == {n for n, _ in model.named_modules() if n.endswith(".wo")}
    assert len(float32) == 2 and len(report.converted) == 3 * 4 + 2
    model(input_ids=torch.arange(8)[None], labels=torch.arange(4)[None]).loss.backward()


def test_experts_of_three_dimensions_are_reported() -> None:
    model = two_layers()
    model.experts = nn.Module()
    model.experts.gate_up_proj = nn.Parameter(normal(4, 16, 8))
    decision = next(d for d in convert_model(model).decisions if d.name == "experts")
    assert decision.reason == "not a linear layer: a parameter of 3 or more dimensions"
    assert decision.shape == (4, 16, 8) and decision.bytes_before == decision.bytes_after == 2048


def test_float64_weight_is_kept() -> None:
    model = two_layers()
    model[0].double()
    assert convert_model(model).kept == {"0": "weight is torch.float64"}


def test_converted_transformer_encoder_runs_in_evaluation() -> None:
    model = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval()
    dense, x = copy.deepcopy(model), normal(2, 5, 32)
    convert_model(model)
    with torch.no_grad():
        expected = with_restored_weights(dense, model)(x)
        torch.testing.assert_close(model(x), expected, **LOGITS)


# skip.

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.mark.parametrize(
    ("pattern", "skipped"),
    (
        ("model.layers.1.mlp.up_proj", ["model.layers.1.mlp.up_proj"]),
        ("up_proj", [f"model.layers.{i}.mlp.up_proj" for i in range(4)]),
        ("mlp.up_proj", [f"model.layers.{i}.mlp.up_proj" for i in range(4)]),
        ("*.3.*.?_proj", [f"model.layers.3.self_attn.{name}" for name in ATTENTION]),
        ("layers.0.self_attn", [f"model.layers.0.self_attn.{name}" for name in ATTENTION]),
    ),
    ids=("full name", "end", "longer end", "wildcards", "subtree"),
)
def test_skip_keeps_what_it_names(pattern: str, skipped: list[str]) -> None:
    report = convert_model(tiny_llama(), skip=[pattern])
    reason = f"skip={pattern!r}"
    assert [name for name, why in report.kept.items() if why == reason] == skipped
    assert len(report.converted) == 28 - len(skipped)
    assert report.kept["lm_head"] == "output head"  # skip adds to what is kept anyway


def test_skip_does_not_match_within_a_word() -> None:
    model = nn.ModuleDict({"proj": nn.Linear(8, 8), "up_proj": nn.Linear(8, 8)})
    assert convert_model(model, skip=["proj"]).converted == ["up_proj"]


def test_skip_that_matches_nothing_is_an_error() -> None:
    model = two_layers()
    with pytest.raises(ValueError, match="skip='q_prj' matches no module of the model"):
        convert_model(model, skip=["0", "q_prj"])
    assert not any(isinstance(module, Module4bit) for module in model)


def test_skip_as_one_string_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"skip must be a list .* write \['lm_head'\]"):
        convert_model(two_layers(), skip="lm_head")


# Errors leave the model as it was.


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_weight_that_is_not_finite_is_named_and_nothing_converted(value: float) -> None:
    model = two_layers()
    model[2].weight.data[1, 2] = value
    with pytest.raises(ValueError, match=r"2\.weight holds .* not finite; nothing .* skip=\['2'\]"):
        convert_model(model)
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert convert_model(model, skip=["2"]).converted == ["0"]


@pytest.mark.parametrize(
    "options",
    ({"codebook": "nf5"}, {"codebook": [0.0, 0.5]}, {"block_size": 63}, {"block_size": 0}),
)
def test_bad_option_is_found_before_the_first_layer(options: dict[str, Any]) -> None:
    model = two_layers()
    with pytest.raises(ValueError):
        convert_model(model, **options)
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]


def test_nothing_to_convert_is_an_error_with_the_reasons() -> None:
    with pytest.raises(ValueError, match="nothing to convert in a Sequential: .*it has no param"):
        convert_model(nn.Sequential(nn.ReLU()))
    model = nn.Sequential(nn.LayerNorm(8))
    model.lm_head = nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"\(0: not a linear layer; lm_head: output head\)"):
        convert_model(model)


def test_a_linear_layer_alone_is_an_error_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"the model itself; use Linear4bit\.from_linear"):
        convert_model(nn.Linear(8, 8))


def test_converting_twice_is_an_error() -> None:
    model = two_layers()
    convert_model(model)
    layers = list(model)
    with pytest.raises(ValueError, match="0: in 4 bits already; 2: in 4 bits already"):
        convert_model(model)
    assert all(now is before for now, before in zip(model, layers))


# Memory.


def test_dense_weights_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    names = [name for name, m in model.named_modules() if type(m) is nn.Linear]
    references = [weakref.ref(model.get_submodule(name).weight) for name in names[:-1]]  # no head
    alive: list[int] = []

    def counting(weight: Tensor, *arguments: Any) -> Any:
        if weight.device.type != "meta":  # not the weight that a new layer starts with
            alive.append(sum(reference() is not None for reference in references))
        return quantize(weight, *arguments)

    monkeypatch.setattr(linear_module, "quantize", counting)
    convert_model(model)
    assert alive == list(range(28, 0, -1))
    assert not any(reference() is not None for reference in references)


@pytest.mark.parametrize("change", [convert_model, qlora_ref.add_lora])
def test_a_transformer_encoder_takes_padding_in_evaluation(change: Any) -> None:
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2)).eval()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    change(model)
    plain = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    plain.layers = model[0].layers
    x = normal(2, 5, 32)
    with torch.no_grad():
        actual, expected = (e(x, src_key_padding_mask=padding) for e in (model[0], plain))
    assert_same_bits(actual[~padding], expected[~padding])


def test_adapters_in_a_transformer_encoder_work_in_evaluation() -> None:
    model = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval()
    x = normal(2, 5, 32)
    before = model(x)
    qlora_ref.add_lora(model, targets=["linear1"])
    nn.init.ones_(model.linear1.lora_B.weight)
    assert not torch.allclose(model(x), before)
