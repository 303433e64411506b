"""PEFT's LoRA and DoRA on our layers, and adapters that go to a bitsandbytes base and back."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes_program import ask
from safetensors.torch import load_file
from torch import Tensor, nn

from qlora_ref import Linear4bit, convert_model
from qlora_ref.integrations import peft as ours
from qlora_ref.integrations.transformers import QLoRAConfig
from qlora_ref.module4bit import layers_4bit

peft = pytest.importorskip("peft", reason="peft is missing: pip install peft")

TOKENS = torch.arange(16)[None]
# Sums of 64 to 192 products in float32, in another order, through two layers.
FLOAT32_ORDER = 1e-5


@pytest.fixture(autouse=True)
def enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    ours.enable()


def dense_model(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, **options))


def base_model(double_quant: bool = True, **options: Any) -> Any:
    model = dense_model(**options).eval()
    convert_model(model, double_quant=double_quant)
    return model


def with_adapter(model: nn.Module, **options: Any) -> Any:
    """A PeftModel whose adapters do something: B is not zero, nor are DoRA's magnitudes W's."""
    config = peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", **options})
    torch.manual_seed(1)  # A starts at random
    adapted = peft.get_peft_model(model, config)
    randomise(adapted)
    return adapted.eval()


def randomise(model: nn.Module) -> None:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
        if "magnitude" in name:
            parameter.data *= 1.1


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def restored(model: nn.Module) -> nn.Module:
    """The same model with dense layers that hold the restored weights: PEFT's own ground."""
    dense = copy.deepcopy(model)
    for name, layer in layers_4bit(model).items():
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        linear.weight = nn.Parameter(layer.dequantize(), requires_grad=False)
        dense.set_submodule(name, linear)
    return dense


@pytest.mark.parametrize(
    "targets, count",
    [("all-linear", 14), (["q_proj", "v_proj"], 4), (r".*\.1\.mlp\..*_proj", 3)],
)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_it_computes_what_peft_does_on_dense_layers(targets: Any, count: int, dora: bool) -> None:
    base = base_model()
    expected = with_adapter(restored(base), target_modules=targets, use_dora=dora)
    model = with_adapter(base, target_modules=targets, use_dora=dora)
    assert sum(isinstance(m, ours.LoraLinear4bit) for m in model.modules()) == count
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=FLOAT32_ORDER)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_gradients_are_those_on_dense_layers(dora: bool) -> None:
    base = base_model()
    models = [with_adapter(m, use_dora=dora) for m in (restored(base), base)]
    for model in models:
        model(TOKENS, labels=TOKENS).loss.backward()
    expected, found = ({n: p.grad for n, p in m.named_parameters()} for m in models)
    trained = [name for name, grad in expected.items() if grad is not None]
    assert len(trained) == 14 * (3 if dora else 2)
    for name in trained:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=FLOAT32_ORDER)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_merging_gives_dense_layers_that_compute_the_same(dora: bool) -> None:
    model = with_adapter(base_model(), use_dora=dora)
    before = logits(model)
    merged = model.merge_and_unload()
    assert not layers_4bit(merged)
    torch.testing.assert_close(logits(merged), before, rtol=0, atol=FLOAT32_ORDER)


def test_a_merged_weight_is_the_exact_sum_rounded_once() -> None:
    base = base_model().to(torch.bfloat16)
    layer = base.model.layers[0].mlp.up_proj
    layer.set_quantized_weight(layer.quantized_weight.to(torch.bfloat16))
    model = with_adapter(base)
    adapter = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    a, b = (m["default"].weight.double() for m in (adapter.lora_A, adapter.lora_B))
    exact = layer.dequantize(torch.float32).double() + adapter.scaling["default"] * (b @ a)
    adapter.merge()
    weight = adapter.base_layer.weight
    assert weight.dtype == torch.bfloat16
    # Half a unit of bfloat16's 8 bits for the one rounding, and float32's for the sum under it.
    bound = exact.abs() * 2.0**-8 + 2.0**-22
    assert ((weight.double() - exact).abs() <= bound).all()


def test_unmerging_gives_the_4_bit_layer_back_bit_for_bit() -> None:
    model = with_adapter(base_model())
    before, weights = logits(model), [m.quantized_weight for m in layers_4bit(model).values()]
    model.merge_adapter()
    assert not layers_4bit(model)
    model.unmerge_adapter()
    assert [m.quantized_weight for m in layers_4bit(model).values()] == weights
    assert torch.equal(logits(model), before)


def test_an_adapter_that_is_broken_is_not_merged() -> None:
    model = with_adapter(base_model())
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    layer.lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        layer.merge(safe_merge=True)
    assert isinstance(layer.base_layer, Linear4bit) and not layer.merged


def test_several_adapters_are_switched_and_merged_together() -> None:
    base = base_model()
    models = []
    for ground in (restored(base), base):
        model = with_adapter(ground)
        torch.manual_seed(2)
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
        randomise(model)
        models.append(model.eval())
    for adapter in ("second", "default"):
        for model in models:
            model.set_adapter(adapter)
        torch.testing.assert_close(logits(models[1]), logits(models[0]), rtol=0, atol=FLOAT32_ORDER)
    merged = [m.merge_and_unload(adapter_names=["default", "second"]) for m in models]
    torch.testing.assert_close(logits(merged[1]), logits(merged[0]), rtol=0, atol=FLOAT32_ORDER)


def test_merging_to_4_bits_says_how_far_each_layer_is_off() -> None:
    model = with_adapter(base_model())
    exact = {
        name.removeprefix("base_model.model."): m.base_layer.dequantize().double()
        + m.scaling["default"] * (m.lora_B["default"].weight @ m.lora_A["default"].weight).double()
        for name, m in model.named_modules()
        if isinstance(m, ours.LoraLinear4bit)
    }
    merged, errors = ours.merge_to_4bit(model)
    assert len(layers_4bit(merged)) == len(errors) == 14
    for name, weight in exact.items():
        difference = merged.get_submodule(name).dequantize().double() - weight
        assert errors[name].mse == pytest.approx(difference.square().mean().item(), rel=1e-4)
    with pytest.raises(ValueError, match="no LoRA on a Linear4bit"):
        ours.merge_to_4bit(merged)


@pytest.mark.parametrize("how", ["pissa", "olora", "loftq", "corda"])
def test_initialisations_that_need_the_dense_weight_are_refused(how: str) -> None:
    base, options = base_model(), {}
    if how == "loftq":
        options = {"loftq_config": peft.LoftQConfig(loftq_bits=4)}
    with pytest.raises((ValueError, ImportError), match="dense weight|scipy|CorDA|cov"):
        peft.get_peft_model(
            base,
            peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=how, **options),
        )


def test_an_adapter_is_saved_and_loaded(tmp_path: Path) -> None:
    model = with_adapter(base_model())
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base_model(), tmp_path)
    assert any(isinstance(m, ours.LoraLinear4bit) for m in again.modules())
    assert torch.equal(logits(again.eval()), logits(model))
    dense = peft.PeftModel.from_pretrained(restored(base_model()), tmp_path).eval()
    torch.testing.assert_close(logits(again), logits(dense), rtol=0, atol=FLOAT32_ORDER)


def test_an_adapter_goes_to_a_base_of_bitsandbytes_and_back(tmp_path: Path) -> None:
    dense, mine, theirs, output = (tmp_path / name for name in ("dense", "mine", "theirs", "out"))
    dense_model().save_pretrained(dense)
    model = with_adapter(base_model(double_quant=False))
    model.save_pretrained(mine)
    ask("adapt", dense, mine, theirs, output)
    found = load_file(output)["logits"]
    torch.testing.assert_close(found, logits(model), rtol=0, atol=FLOAT32_ORDER)
    again = peft.PeftModel.from_pretrained(base_model(double_quant=False), theirs).eval()
    assert torch.equal(logits(again), logits(model))


def test_a_conv1d_in_4_bits_takes_an_adapter() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=96)
    base = transformers.GPT2LMHeadModel(config).eval()
    convert_model(base)
    options = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    model = with_adapter(base, **options)
    before = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), before, rtol=0, atol=FLOAT32_ORDER)


def load_4bit(folder: Path) -> Any:
    dense_model().to(torch.bfloat16).save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=QLoRAConfig(), dtype=torch.bfloat16
    )


def test_preparing_for_training_freezes_and_leaves_the_codes(tmp_path: Path) -> None:
    model = load_4bit(tmp_path)
    weights = [m.quantized_weight for m in layers_4bit(model).values()]
    prepared = peft.prepare_model_for_kbit_training(model)
    assert not any(p.requires_grad for p in prepared.parameters())
    assert prepared.model.norm.weight.dtype == torch.float32
    assert prepared.is_gradient_checkpointing
    assert [m.quantized_weight for m in layers_4bit(prepared).values()] == weights


def test_parameters_are_counted_as_those_of_the_dense_model(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    counts = [
        peft.get_peft_model(model, config).get_nb_trainable_parameters()
        for model in (dense_model(), load_4bit(tmp_path))
    ]
    assert counts[0] == counts[1]


def test_a_merged_model_is_saved_as_a_dense_one(tmp_path: Path) -> None:
    model = with_adapter(load_4bit(tmp_path / "dense"))
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again), logits(merged))


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_trainer_trains_an_adapter(tmp_path: Path, reentrant: bool) -> None:
    from qlora_ref import AdamW

    model = peft.prepare_model_for_kbit_training(
        load_4bit(tmp_path), gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    rows = [{"input_ids": TOKENS[0], "labels": TOKENS[0]} for _ in range(8)]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"),
        max_steps=8,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        logging_steps=1,
        save_steps=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    options = {"optimizer_cls_and_kwargs": (AdamW, {"lr": 1e-2})}
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3
    assert isinstance(trainer.optimizer.optimizer, AdamW)
    adapters = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    again = transformers.Trainer(model, arguments, train_dataset=rows, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    for name, parameter in model.named_parameters():
        if name in adapters:  # four steps from the same state: the same bits
            assert torch.equal(parameter, adapters[name])
