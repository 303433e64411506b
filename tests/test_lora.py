"""LoRA against its formula in float64, dense torch and peft; add_lora and merge_lora on models."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_error_at_most_twice_torch, assert_same_bits, normal
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu, linear

from qlora_ref import Linear4bit, LoRA, add_lora, convert_model, merge_lora, quantize
from qlora_ref.lora import adapters_disabled, count_parameters, lora_layers, set_adapters_enabled

TINY_LLAMA = Path(__file__).parent / "data" / "tiny_llama"

N, K, RANK = 48, 80, 4
BASES = ("4bit", "dense", "Conv1D")

# Means of the same float64 numbers in another order: a few units of 2^-53.
FLOAT64_SUMS = 1e-12


def make_base(kind: str, bias: bool = True) -> nn.Module:
    """A layer from K to N: 4-bit, nn.Linear, or GPT-2's Conv1D, which always has a bias."""
    torch.manual_seed(0)
    if kind == "Conv1D":
        why = "transformers is not installed"
        base = pytest.importorskip("transformers.pytorch_utils", reason=why).Conv1D(N, K)
        nn.init.normal_(base.bias)
        return base
    dense = nn.Linear(K, N, bias)
    return dense if kind == "dense" else Linear4bit.from_linear(dense)


def trained(base: nn.Module, r: int = RANK, alpha: float = 12, **options: Any) -> LoRA:
    """An adapter as it is after some training: B is not 0."""
    torch.manual_seed(1)
    adapter = LoRA(base, r, alpha, **options)
    nn.init.normal_(adapter.lora_B.weight)
    return adapter


def restored(base: nn.Module) -> Tensor:
    """The weight (N, K) in float32."""
    if isinstance(base, Linear4bit):
        return base.dequantize(torch.float32)
    return (base.weight if isinstance(base, nn.Linear) else base.weight.t()).detach()


def formula(adapter: LoRA, x: Tensor, dtype: torch.dtype, dropped: Tensor | None = None) -> Tensor:
    """x W^T + bias + alpha / r (dropped A^T) B^T, everything in one dtype."""
    base, s = adapter.base, adapter.alpha / adapter.r
    a, b = adapter.lora_A.weight.to(dtype), adapter.lora_B.weight.to(dtype)
    y = linear(x.to(dtype), restored(base).to(dtype), base.bias.to(dtype))
    return y + linear(linear((x if dropped is None else dropped).to(dtype), a) * s, b)


def assert_formula(y: Tensor, adapter: LoRA, x: Tensor, dropped: Tensor | None = None) -> None:
    """The error is at most twice that of plain torch in the dtype of y."""
    by_torch = formula(adapter, x, y.dtype, dropped)
    assert_error_at_most_twice_torch(y, by_torch, formula(adapter, x, torch.float64, dropped))


def tiny_llama() -> nn.Module:
    """Four layers of the tiny Llama's kind, narrower and with new weights."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "dtype": "float32"}
    config = transformers.AutoConfig.from_pretrained(TINY_LLAMA, **sizes)
    return transformers.AutoModelForCausalLM.from_config(config)


def small_mlp() -> nn.Module:
    """Two 4-bit layers with trained adapters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N), nn.GELU(), nn.Linear(N, K))
    convert_model(model)
    add_lora(model, RANK)
    for adapter in lora_layers(model).values():
        nn.init.normal_(adapter.lora_B.weight)
    return model


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("kind", BASES)
def test_output_is_the_formula(kind: str, dtype: torch.dtype) -> None:
    adapter, x = trained(make_base(kind).to(dtype)), normal(3, 5, K, dtype=dtype)
    assert adapter(x).dtype == dtype
    assert_formula(adapter(x), adapter, x)


@pytest.mark.parametrize("kind", BASES)
def test_fresh_adapter_gives_the_bits_of_its_base(kind: str) -> None:
    base, x = make_base(kind), normal(7, K)
    assert_same_bits(LoRA(base)(x), base(x))


@pytest.mark.parametrize("rslora", (False, True))
def test_output_equals_peft(rslora: bool) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    adapter, x = trained(make_base("4bit"), r=9, alpha=12, rslora=rslora), normal(6, K)
    dense = nn.Sequential(nn.Linear(K, N))
    dense[0].weight.data, dense[0].bias.data = restored(adapter.base), adapter.base.bias.data
    config = peft.LoraConfig(r=9, lora_alpha=12, use_rslora=rslora, target_modules=["0"])
    theirs = peft.get_peft_model(dense, config).base_model.model[0]
    theirs.lora_A["default"].weight.data = adapter.lora_A.weight.detach().clone()
    theirs.lora_B["default"].weight.data = adapter.lora_B.weight.detach().clone()
    s = 12 / math.sqrt(9) if rslora else 12 / 9
    exact = formula(adapter, x, torch.float64, dropped=x.double() * (s * 9 / 12))
    assert_error_at_most_twice_torch(adapter(x), theirs(x), exact)
    assert adapter.scaling == s == theirs.scaling["default"]


def test_dropout_acts_in_training_and_on_the_update_alone() -> None:
    adapter, x = trained(make_base("4bit"), dropout=0.5), normal(6, K)
    torch.manual_seed(3)
    y = adapter(x)
    torch.manual_seed(3)
    assert_formula(y, adapter, x, dropout(x, 0.5, training=True))
    assert_formula(adapter.eval()(x), adapter, x)


@pytest.mark.parametrize("kind", BASES)
def test_gradients_equal_float64_autograd(kind: str) -> None:
    adapter, upstream = trained(make_base(kind)), normal(6, N, seed=5)

    def gradients(dtype: torch.dtype, through_formula: bool) -> tuple[Tensor, ...]:
        x = normal(6, K).to(dtype).requires_grad_()
        y = formula(adapter, x, dtype) if through_formula else adapter(x)
        inputs = (adapter.lora_A.weight, adapter.lora_B.weight, x)
        return torch.autograd.grad(y, inputs, upstream.to(dtype))

    # The gradients of A and B are kept in float32: exact up to that last rounding.
    exact, by_torch = gradients(torch.float64, True), gradients(torch.float32, True)
    for actual, theirs, truth in zip(gradients(torch.float32, False), by_torch, exact, strict=True):
        assert_error_at_most_twice_torch(actual, theirs, truth.double())


def test_training_changes_the_adapter_alone() -> None:
    adapter = trained(make_base("4bit", bias=False))
    before = copy.deepcopy(adapter.state_dict())
    optimizer = torch.optim.SGD([p for p in adapter.parameters() if p.requires_grad], lr=0.1)
    adapter(normal(6, K)).square().mean().backward()
    optimizer.step()
    changed = {k for k, v in adapter.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"lora_A.weight", "lora_B.weight"}


def test_bfloat16_adapter_takes_float32_inputs() -> None:
    adapter, x = trained(make_base("4bit"), dtype=torch.bfloat16), normal(6, K)
    assert_formula(adapter(x), adapter, x)  # bfloat16 matrices are exact in float32
    adapter(x).sum().backward()
    assert adapter.lora_A.weight.grad.dtype == adapter.lora_B.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ("4bit", "dense"))
def test_autocast_computes_in_bfloat16_and_trains_in_float32(kind: str) -> None:
    adapter, x = trained(make_base(kind)), normal(6, K)
    with torch.autocast("cpu", torch.bfloat16):
        y = adapter(x)
    assert y.dtype == torch.bfloat16
    assert_formula(y, adapter, x)
    y.float().sum().backward()
    assert adapter.lora_A.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"r": 0}, "r must be a whole number of at least 1, got 0"),
        ({"r": 2.0}, "r must be a whole number of at least 1, got 2.0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"alpha": math.inf}, "alpha must be finite, got inf"),
    ),
)
def test_bad_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRA(make_base("4bit"), **options)


def test_base_of_another_kind_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="expected an nn.Linear or a Conv1D, got LayerNorm"):
        LoRA(nn.LayerNorm(8))


def exact_sum(adapter: LoRA) -> Tensor:
    """W + s B A in float64."""
    a, b = adapter.lora_A.weight.detach().double(), adapter.lora_B.weight.detach().double()
    return restored(adapter.base).double() + (b @ a) * (adapter.alpha / adapter.r)


@pytest.mark.parametrize("kind", BASES)
def test_merge_to_float_is_the_float64_sum_rounded(kind: str) -> None:
    adapter, x = trained(make_base(kind)), normal(6, K)
    merged, in_bfloat16 = adapter.merge("float"), adapter.merge("float", torch.bfloat16)
    assert type(merged) is nn.Linear and not merged.weight.requires_grad
    assert_same_bits(merged.weight, exact_sum(adapter).float())
    assert_same_bits(in_bfloat16.weight, exact_sum(adapter).float().bfloat16())
    assert_same_bits(merged.bias, adapter.base.bias)
    assert_formula(merged(x), adapter, x)


FP4 = {"codebook": "fp4", "block_size": 128, "double_quant": False}
CUSTOM = {"codebook": [-1.0, -0.25, 0.0, 0.25, 1.0], "block_size": 32}


@pytest.mark.parametrize("options", ({}, FP4, CUSTOM), ids=("default", "fp4", "custom"))
def test_merge_to_4bit_quantises_the_sum_as_the_base_is(options: dict[str, Any]) -> None:
    base = Linear4bit.from_linear(make_base("dense"), compute_dtype=torch.bfloat16, **options)
    adapter = trained(base)
    layer, _ = adapter.merge("4bit")
    expected = quantize(exact_sum(adapter).float(), **{"double_quant": True, **options})
    assert layer.quantized_weight == expected
    assert layer.compute_dtype == torch.bfloat16
    assert_same_bits(layer.bias, base.bias)


def test_merge_to_4bit_returns_the_error_it_caused() -> None:
    adapter = trained(make_base("4bit", bias=False))  # and without a bias it stays
    layer, error = adapter.merge("4bit")
    assert layer.bias is None
    total = exact_sum(adapter).float().double()
    difference = layer.dequantize(torch.float32).double() - total
    snr = 10 * math.log10(total.square().sum() / difference.square().sum())
    assert error.mse == pytest.approx(difference.square().mean().item(), rel=FLOAT64_SUMS)
    assert error.snr_db == pytest.approx(snr, rel=FLOAT64_SUMS)
    assert error.max == difference.abs().max().item()


@pytest.mark.parametrize("to", ("float", "4bit"))
def test_merge_leaves_the_adapter_and_keeps_the_mode(to: str) -> None:
    adapter, x = trained(make_base("4bit")).eval(), normal(6, K)
    before, state = adapter(x), copy.deepcopy(adapter.state_dict())
    merged = adapter.merge(to) if to == "float" else adapter.merge(to)[0]
    assert not merged.training
    assert_same_bits(adapter(x), before)
    for name, tensor in adapter.state_dict().items():
        assert_same_bits(tensor, state[name])


def test_merge_says_what_it_takes() -> None:
    with pytest.raises(ValueError, match="got '8bit'"):
        trained(make_base("4bit")).merge("8bit")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="the base is a Linear, not in 4 bits: merge to float"):
        trained(make_base("dense")).merge("4bit")


def test_merging_a_model_replaces_every_adapter() -> None:
    model, x = small_mlp(), normal(6, K)
    first, last = lora_layers(model).values()
    exact = formula(last, gelu(formula(first, x, torch.float64)), torch.float64)
    by_torch = formula(last, gelu(formula(first, x, torch.float32)), torch.float32)
    assert merge_lora(model) == {}
    assert [type(layer) for layer in model] == [nn.Linear, nn.GELU, nn.Linear]
    # A merged weight is rounded once more than what torch multiplies by, here in both layers.
    assert_error_at_most_twice_torch(model(x), by_torch, exact, 3.0, 3.0)


def test_merging_a_model_to_4bit_reports_each_layer() -> None:
    model = small_mlp()
    expected = {name: adapter.merge("4bit")[1] for name, adapter in lora_layers(model).items()}
    assert merge_lora(model, "4bit") == expected
    assert [type(layer) for layer in model] == [Linear4bit, nn.GELU, Linear4bit]
    for without in (model, trained(make_base("4bit"))):
        with pytest.raises(
            ValueError, match="no adapters to merge; of a single LoRA, call its mer"
        ):
            merge_lora(without)


def test_disabled_adapters_give_the_bits_of_the_base() -> None:
    model, x = small_mlp(), normal(6, K)
    base = nn.Sequential(model[0].base, model[1], model[2].base)
    set_adapters_enabled(model, False)
    assert_same_bits(model(x), base(x))


def test_adapters_disabled_restores_each_after_an_exception() -> None:
    model = small_mlp()
    model[2].enabled = False
    with pytest.raises(RuntimeError, match="in the block"), adapters_disabled(model):
        assert not model[0].enabled and not model[2].enabled
        raise RuntimeError("in the block")
    assert model[0].enabled and not model[2].enabled


ATTENTION, MLP = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("in_4bit", (True, False))
@pytest.mark.parametrize(
    ("targets", "last_names", "count"),
    (
        ("all-linear", ATTENTION | MLP, 28),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}, 8),
        (["model.layers.0.mlp.up_proj"], {"up_proj"}, 1),
        (r".*\.mlp\.(up|down)_proj", {"up_proj", "down_proj"}, 8),
    ),
)
def test_targets_pick_layers(targets: Any, last_names: set, count: int, in_4bit: bool) -> None:
    model = tiny_llama()
    if in_4bit:
        convert_model(model)
    layers = add_lora(model, targets=targets).layers
    assert layers == list(lora_layers(model))
    assert len(layers) == count
    assert {name.rpartition(".")[2] for name in layers} == last_names


def test_targets_that_match_nothing_list_what_there_is() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"matches the targets 'q_proj'; its linear .* \['0'\]"):
        add_lora(model, targets="q_proj")
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


def test_adapters_cannot_be_added_twice() -> None:
    with pytest.raises(ValueError, match="has adapters already: merge or remove them first"):
        add_lora(small_mlp())


@pytest.mark.parametrize("in_4bit", (True, False))
def test_report_counts_the_dense_parameters_and_the_adapters(in_4bit: bool) -> None:
    model, r = tiny_llama(), 3
    dense = sum(p.numel() for p in model.parameters())
    shapes = {name: m.weight.shape for name, m in model.named_modules() if type(m) is nn.Linear}
    adapters = sum(r * sum(shape) for name, shape in shapes.items() if name != "lm_head")
    if in_4bit:
        convert_model(model)
        assert count_parameters(model) == dense
    report = add_lora(model, r)
    assert (report.trainable, report.total) == (adapters, dense + adapters)
    assert str(report).startswith(f"28 adapters: {adapters:,} of {dense + adapters:,} parameters")


def test_adapters_alone_require_gradients() -> None:
    model = tiny_llama()
    convert_model(model)
    add_lora(model)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {f"{name}.lora_{m}.weight" for name in lora_layers(model) for m in "AB"}


def test_gpt2_keeps_its_output_bits_with_fresh_adapters() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    before = model(ids := torch.arange(8)[None]).logits
    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert add_lora(model).layers == [f"transformer.h.0.{name}" for name in names]
    assert_same_bits(model(ids).logits, before)


def test_projection_whose_owner_reads_its_weight_gets_no_adapter() -> None:
    model = nn.Sequential(nn.MultiheadAttention(16, 2), nn.Linear(16, 16))
    assert add_lora(model).layers == ["1"]  # out_proj.forward is never called


@pytest.mark.parametrize("use_reentrant", (False, True))
def test_checkpointing_gives_the_same_gradient_bits(use_reentrant: bool) -> None:
    model, ids = tiny_llama().train(), torch.arange(3, 43).reshape(2, 20)
    convert_model(model)
    add_lora(model, dropout=0.1)  # dropout must fall the same way when a layer is run again

    def gradients() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    for actual, expected in zip(gradients(), plain, strict=True):
        assert_same_bits(actual, expected)


def test_compiles_to_one_graph() -> None:
    model, x = small_mlp(), normal(6, K)
    # aot_eager traces forward and backward through our operators, and needs no C++ compiler.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    weights = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(x).square().sum(), weights)
    for weight, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient)  # float32 sums in another order


@pytest.mark.parametrize("copier", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))))
def test_copies_give_the_same_bits_and_share_nothing(copier: Any) -> None:
    model, x = small_mlp(), normal(6, K)
    before, twin = model(x), copier(model)
    assert_same_bits(twin(x), before)
    torch._foreach_zero_([parameter.data for parameter in twin.parameters()])
    assert_same_bits(model(x), before)
