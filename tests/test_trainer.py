"""The Trainer's optimizer names, with our AdamW behind them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from qlora_ref import AdamW, add_lora, convert_model
from qlora_ref.integrations.trainer import use_for_optimizer_names

TOKENS = torch.arange(16)


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    use_for_optimizer_names()
    yield
    use_for_optimizer_names(False)


def trainer(folder: Path, **options: Any) -> transformers.Trainer:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=96,
    )
    model = transformers.LlamaForCausalLM(config)
    convert_model(model)
    add_lora(model, r=64)
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
    run = trainer(folder, **options)
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


@pytest.mark.parametrize("name", ["lion_8bit", "rmsprop_bnb", "ademamix"])
def test_other_optimizers_are_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(NotImplementedError, match=name):
        trainer(tmp_path, optim=name, max_steps=1).create_optimizer()


def test_the_switch_can_be_undone(tmp_path: Path) -> None:
    use_for_optimizer_names(False)
    with pytest.raises(ImportError, match="bitsandbytes"):
        trainer(tmp_path, optim="adamw_8bit", max_steps=1).create_optimizer()
