"""Experts that a model holds in one tensor of three dimensions, in 4 bits."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qlora_ref import add_lora, convert_model, quantize
from qlora_ref.checkpoint import load_model_state, save_model
from qlora_ref.module4bit import layers_4bit
from qlora_ref.parameter4bit import Parameter4bit

transformers = pytest.importorskip("transformers", reason="transformers is missing")

TOKENS = torch.arange(16)[None]
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96, "num_experts_per_tok": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # Files hold each expert by itself; transformers puts them together.
    "mixtral": ("Mixtral", {"intermediate_size": 96, "num_local_experts": 4}),
    "qwen3_moe": ("Qwen3Moe", {"moe_intermediate_size": 96, "num_experts": 4}),
    # Files hold them together, as (experts, K, N), with biases.
    "gpt_oss": ("GptOss", {"intermediate_size": 96, "num_local_experts": 4}),
}
NAMES = {
    f"model.layers.{i}.mlp.experts.{leaf}" for i in (0, 1) for leaf in ("gate_up_proj", "down_proj")
}
# Logits of order 1 after two layers in float32, summed in another order.
FLOAT32_ORDER = 1e-5


@pytest.fixture(autouse=True)
def no_bitsandbytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "bitsandbytes" not in request.function.__name__:
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)


def dense_model(kind: str) -> Any:
    name, options = MODELS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **HEADS, **options})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # those of gpt_oss' experts start without values
            parameter.normal_(std=0.05)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def experts_of(model: nn.Module) -> dict[str, Tensor]:
    """What the modules of a model read, by name."""
    return {
        name: getattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
        for name in NAMES
    }


def restored(dense: nn.Module, model: nn.Module) -> nn.Module:
    """The dense model with the weights that another one has in 4 bits."""
    expected = copy.deepcopy(dense)
    for name, layer in layers_4bit(model).items():
        if not isinstance(layer, Parameter4bit):
            expected.get_submodule(name).weight.data = layer.dequantize()
    for name, value in experts_of(model).items():
        expected.get_parameter(name).data = value.clone()
    return expected


def stored(folder: Path) -> dict[str, Tensor]:
    return {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_converted_model_computes_with_the_restored_experts(
    kind: str, implementation: str
) -> None:
    dense = dense_model(kind)
    model = copy.deepcopy(dense)
    report = convert_model(model, block_size=32)
    assert set(report.converted) > NAMES
    for name, value in experts_of(model).items():
        whole = dense.get_parameter(name)
        assert torch.equal(value, quantize(whole, "nf4", 32, True).dequantize())
        sizes = next(d for d in report.decisions if d.name == name)
        assert sizes.bytes_before == 4 * whole.numel()
        # Half a byte, a byte for 32 values, a float32 for 256 scales, and the offset.
        blocks = whole.numel() // 32
        assert sizes.bytes_after == whole.numel() // 2 + blocks + 4 * (-(-blocks // 256) + 1)
    expected = restored(dense, model)
    for each in (model, expected):
        each.set_experts_implementation(implementation)
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=FLOAT32_ORDER)
    assert model.num_parameters() < dense.num_parameters()


@pytest.mark.parametrize("skip", [["experts"], ["gate_up_proj", "down_proj"], ["layers.*.mlp"]])
def test_experts_can_be_skipped(skip: list[str]) -> None:
    model = dense_model("mixtral")
    report = convert_model(model, skip=skip)
    assert len(report.converted) == 8 and NAMES <= set(report.kept)


def test_only_experts_are_taken_for_such() -> None:
    model = nn.Module()
    model.linear, model.conv = nn.Linear(4, 4), nn.Conv1d(4, 4, 3)
    model.position = nn.Parameter(torch.zeros(1, 4, 4))
    report = convert_model(model)
    assert report.converted == ["linear"]
    assert "3 or more dimensions" in report.kept["conv"]


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_state_dict_goes_into_another_model(double_quant: bool) -> None:
    model, other = dense_model("gpt_oss"), dense_model("gpt_oss")
    convert_model(model, double_quant=double_quant)
    for parameter in other.parameters():
        parameter.data.mul_(2)
    convert_model(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def test_a_dense_state_dict_is_refused_with_the_way_out() -> None:
    model, dense = dense_model("mixtral"), dense_model("mixtral")
    convert_model(model)
    with pytest.raises(RuntimeError, match="gate_up_proj.*convert_model"):
        model.load_state_dict(dense.state_dict())


def test_a_cast_leaves_the_codes_and_changes_what_is_read() -> None:
    model = dense_model("mixtral")
    convert_model(model)
    before = experts_of(model)
    model.to(torch.bfloat16)
    for name, value in experts_of(model).items():
        assert torch.equal(value, before[name].to(torch.bfloat16))
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", MODELS)
def test_save_model_and_load_model_state_keep_the_bits(kind: str, tmp_path: Path) -> None:
    model = dense_model(kind)
    convert_model(model, "int4")
    save_model(model, tmp_path / "saved", max_shard_bytes=30_000)
    again = dense_model(kind)
    load_model_state(again, tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    load_model_state(model, tmp_path / "saved")  # into one that is in 4 bits already
    assert torch.equal(logits(again), logits(model))


def test_gradients_reach_adapters_below_the_experts() -> None:
    model = dense_model("mixtral")
    dense = copy.deepcopy(model)
    convert_model(model)
    expected = restored(dense, model)
    for each in (model, expected):
        torch.manual_seed(1)
        add_lora(each, r=4, targets=["q_proj"])
        each(TOKENS, labels=TOKENS).loss.backward()
    found, wanted = (
        {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
        for m in (model, expected)
    )
    assert len(found) == 4 and found.keys() == wanted.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=FLOAT32_ORDER)


def test_adapters_of_peft_on_experts_in_4_bits_are_refused() -> None:
    peft = pytest.importorskip("peft", reason="peft is missing: pip install peft")
    from qlora_ref.integrations.peft import enable

    enable()
    model = dense_model("mixtral")
    convert_model(model)
    config = peft.LoraConfig(target_modules=["q_proj"], target_parameters=sorted(NAMES))
    with pytest.raises(NotImplementedError, match=r'skip=\["experts"\]'):
        peft.get_peft_model(model, config)


# With transformers.


def load(folder: Path, **options: Any) -> Any:
    from qlora_ref.integrations.transformers import QLoRAConfig

    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=QLoRAConfig(**options), dtype=torch.float32
    ).eval()


@pytest.mark.parametrize("kind", MODELS)
def test_experts_are_quantised_as_they_load_saved_and_loaded_again(
    kind: str, tmp_path: Path
) -> None:
    from qlora_ref.integrations.transformers import from_pretrained

    dense = dense_model(kind)
    dense.save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", double_quant=False)
    report = model.hf_quantizer.report
    assert set(report.converted) > NAMES
    assert model.num_parameters() == dense.num_parameters()
    for name, value in experts_of(model).items():
        whole = dense.get_parameter(name)
        assert torch.equal(value, quantize(whole, "nf4", 64, False).dequantize())
    model.save_pretrained(tmp_path / "first", max_shard_size="30KB")
    again = from_pretrained(tmp_path / "first", dtype=torch.float32)
    assert set(again.hf_quantizer.report.converted) == set(report.converted)
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "second")
    first, second = stored(tmp_path / "first"), stored(tmp_path / "second")
    assert first.keys() == second.keys()
    assert not [key for key in first if not torch.equal(first[key], second[key])]
    expected = logits(restored(dense, model))
    dequantised = model.dequantize()
    assert not layers_4bit(dequantised) and dequantised.num_parameters() == dense.num_parameters()
    torch.testing.assert_close(logits(dequantised), expected, rtol=0, atol=FLOAT32_ORDER)
    dequantised.save_pretrained(tmp_path / "dequantised")
    assert stored(tmp_path / "dequantised").keys() == stored(tmp_path / "dense").keys()
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dequantised")
    assert torch.equal(logits(plain.eval()), logits(dequantised))


def test_skipped_experts_stay_dense_and_are_saved_beside_the_others(tmp_path: Path) -> None:
    from qlora_ref.integrations.transformers import from_pretrained

    dense_model("mixtral").save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", skip=["layers.1.mlp.experts"])
    assert "model.layers.1.mlp.experts.gate_up_proj" in model.hf_quantizer.report.kept
    model.save_pretrained(tmp_path / "saved")
    again = from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(logits(again.eval()), logits(model))


def test_a_converted_model_is_saved_by_transformers_with_its_codes(tmp_path: Path) -> None:
    model = dense_model("mixtral")
    convert_model(model)
    model.save_pretrained(tmp_path)
    tensors, expected = stored(tmp_path), model.state_dict()
    for name in NAMES:
        assert torch.equal(tensors[name], expected[name])


@pytest.mark.parametrize(
    "key", ["gate_up_proj.absmax", "gate_up_proj.quant_state.bitsandbytes__nf4"]
)
def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path: Path, key: str) -> None:
    from qlora_ref.integrations.transformers import from_pretrained

    dense_model("gpt_oss").save_pretrained(tmp_path / "dense")
    load(tmp_path / "dense").save_pretrained(tmp_path / "saved")
    tensors = stored(tmp_path / "saved")
    del tensors[f"model.layers.0.mlp.experts.{key}"]
    save_file(tensors, tmp_path / "saved" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.gate_up_proj"):
        from_pretrained(tmp_path / "saved")


# With bitsandbytes.


@pytest.mark.parametrize("double_quant", [True, False])
def test_bitsandbytes_holds_what_we_saved(double_quant: bool) -> None:
    parametrize = pytest.importorskip(
        "bitsandbytes.nn.parametrize", reason="pip install bitsandbytes==0.50.2"
    )
    functional = pytest.importorskip("bitsandbytes.functional")
    model, theirs = dense_model("mixtral"), dense_model("mixtral")
    convert_model(model, double_quant=double_quant)
    state = model.state_dict()
    for name, value in experts_of(model).items():
        owner, _, leaf = name.rpartition(".")
        module = theirs.get_submodule(owner)
        fields = {
            k.removeprefix(f"{name}."): t for k, t in state.items() if k.startswith(f"{name}.")
        }
        setattr(module, leaf, nn.Parameter(state[name], requires_grad=False))
        parametrize.replace_parameter_4bit_prequantized(
            module, leaf, dict(fields), torch.device("cpu")
        )
        their_state = module.state_dict(prefix=f"{owner}.")
        assert {k for k in their_state if k.startswith(name)} == {
            name,
            *(f"{name}.{k}" for k in fields),
        }
        # Its vector code restores wrong values in rows that do not hold whole blocks.
        if value.shape[-1] % 64 == 0 or not functional.has_avx512bf16():
            torch.testing.assert_close(getattr(module, leaf), value, rtol=2**-22, atol=0)
