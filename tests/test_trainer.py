"""The Trainer's optimizer names, with our AdamW behind them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from qlora_ref import AdamW, add_lora, convert_model
from qlora_ref.integrations.trainer import use_for_optimizer_names
from qlora_ref.optimizers import RuleOptimizer

TOKENS = torch.arange(16)


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    use_for_optimizer_names()
    yield
    use_for_optimizer_names(False)


CONFIG = transformers.LlamaConfig(
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=1,
    num_attention_heads=4,
    vocab_size=96,
)


def converted_with_adapters() -> Any:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(CONFIG)
    convert_model(model)
    add_lora(model, r=64)
    return model


@functools.cache
def untrained() -> Any:
    """For those that look at the optimizer alone."""
    return converted_with_adapters()


def trainer(folder: Path, model: Any = None, **options: Any) -> transformers.Trainer:
    model = untrained() if model is None else model
    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    rows = [{"input_ids": TOKENS, "labels": TOKENS} for _ in range(8)]
    return transformers.Trainer(model, arguments, train_dataset=rows)


def trained(folder: Path, **options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    run = trainer(folder, converted_with_adapters(), **options)
    run.train()
    return run, {n: p.detach() for n, p in run.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "name, bits, paged",
    [
        ("adamw_bnb_8bit", 8, False),
        ("adamw_8bit", 8, False),
        ("paged_adamw_32bit", 32, True),
        ("paged_adamw_8bit", 8, True),
    ],
)
def test_a_name_gives_the_optimizer_that_it_says(
    tmp_path: Path, name: str, bits: int, paged: bool
) -> None:
    run = trainer(tmp_path, optim=name, weight_decay=0.25, adam_beta2=0.5, max_steps=1)
    optimizer = run.create_optimizer()
    assert type(optimizer) is AdamW
    assert {group["state_bits"] for group in optimizer.param_groups} == {bits}
    assert (optimizer.paging_report() is not None) == paged
    defaults = optimizer.defaults
    assert (defaults["lr"], defaults["betas"]) == (1e-2, (0.9, 0.5))
    # transformers puts the decay into the groups of parameters that are to decay.
    assert {group["weight_decay"] for group in optimizer.param_groups} <= {0.25, 0.0}


def test_paged_training_gives_the_bits_of_training_in_memory(tmp_path: Path) -> None:
    results = []
    for name in ("adamw_8bit", "paged_adamw_8bit"):
        run, weights = trained(tmp_path / name, optim=name, max_steps=4, save_strategy="no")
        losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0]
        results.append(weights)
    for name, weight in results[0].items():
        assert torch.equal(weight, results[1][name])


@pytest.mark.parametrize(
    "name, rule, bits, betas",
    [
        ("lion_8bit", "lion", 8, (0.9, 0.999)),
        ("paged_lion_32bit", "lion", 32, (0.9, 0.999)),
        ("rmsprop_bnb", "rmsprop", 32, (0.5,)),
        ("rmsprop_bnb_8bit", "rmsprop", 8, (0.5,)),
        ("ademamix", "ademamix", 32, (0.9, 0.999, 0.7)),
        ("paged_ademamix_8bit", "ademamix", 8, (0.9, 0.999, 0.7)),
    ],
)
def test_other_names_give_the_other_rules(
    tmp_path: Path, name: str, rule: str, bits: int, betas: tuple[float, ...]
) -> None:
    arguments = {"rmsprop": "alpha=0.5", "ademamix": "beta3=0.7,t_alpha=3"}.get(rule)
    optimizer = trainer(tmp_path, optim=name, optim_args=arguments, max_steps=1).create_optimizer()
    assert isinstance(optimizer, RuleOptimizer)
    found = optimizer.defaults
    assert (found["rule"], found["state_bits"], found["betas"]) == (rule, bits, betas)
    assert (optimizer.paging_report() is not None) == name.startswith("paged")
    assert found["t_alpha"] == (3 if rule == "ademamix" else None)


def test_every_name_of_bitsandbytes_trains(tmp_path: Path) -> None:
    from transformers.trainer_optimizer import _BITSANDBYTES_OPTIMIZERS

    model = torch.nn.Linear(4, 4)
    for name in _BITSANDBYTES_OPTIMIZERS:
        run = trainer(tmp_path, optim=name.value, max_steps=1)
        cls, options = run.get_optimizer_cls_and_kwargs(run.args, run.model)
        before = model.weight.detach().clone()
        model(torch.ones(1, 4)).sum().backward()
        cls(model.parameters(), **options).step()
        assert not torch.equal(model.weight, before)


def quantised_with_adapters(folder: Path, **options: Any) -> Any:
    from qlora_ref.integrations.transformers import QLoRAConfig

    torch.manual_seed(0)
    if not folder.exists():
        transformers.LlamaForCausalLM(CONFIG).save_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=QLoRAConfig(), dtype=torch.float32, **options
    )
    torch.manual_seed(0)
    add_lora(model, r=8)
    return model


def test_adapters_of_ours_train_on_a_model_that_transformers_quantised(tmp_path: Path) -> None:
    from qlora_ref.integrations.transformers import from_pretrained

    dense = tmp_path / "dense"
    options = {"optim": "paged_adamw_8bit", "max_steps": 4, "save_steps": 2}
    run = trainer(tmp_path / "run", model=quantised_with_adapters(dense), **options)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    expected = {n: p for n, p in run.model.named_parameters() if p.requires_grad}
    again = trainer(tmp_path / "run", model=quantised_with_adapters(dense), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, parameter in again.model.named_parameters():
        if parameter.requires_grad:  # two steps from the same state: the same bits
            assert torch.equal(parameter, expected[name])
    with pytest.raises(ValueError, match="load the base, add_lora, and resume"):
        from_pretrained(tmp_path / "run" / "checkpoint-2")


@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
def test_accelerate_prepares_a_model_and_a_paged_optimizer(
    tmp_path: Path, device_map: str | None
) -> None:
    import accelerate

    model = quantised_with_adapters(tmp_path / "dense", device_map=device_map)
    params = [p for p in model.parameters() if p.requires_grad]
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared = accelerator.prepare(model, AdamW(params, lr=1e-2, state_bits=8, paged=True))
    losses = []
    for _ in range(6):
        with accelerator.accumulate(prepared[0]):
            loss = prepared[0](input_ids=TOKENS[None], labels=TOKENS[None]).loss
            accelerator.backward(loss)
            prepared[1].step()
            prepared[1].zero_grad()
        losses.append(loss.item())
    assert losses[0] == losses[1] > losses[2] == losses[3] > losses[4]  # a step every other time


def test_the_switch_can_be_undone(tmp_path: Path) -> None:
    use_for_optimizer_names(False)
    with pytest.raises(ImportError, match="bitsandbytes"):
        trainer(tmp_path, optim="adamw_8bit", max_steps=1).create_optimizer()
