"""The fine-tune: it learns, its gradients are those of its definition, its errors harm nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training import (
    PAIRS,
    PLAYS,
    TINY,
    files_below,
    log_lines,
    one_thread,  # noqa: F401
    restored_weights,
    save_changed_model,
    tiny_settings,
)

from qlora_ref.data import BatchOrder
from qlora_ref.dispatch import force_backend
from qlora_ref.evaluate import evaluate
from qlora_ref.finetune import _prepare, _Run, _step, finetune
from qlora_ref.lora import adapters_disabled, lora_layers
from qlora_ref.settings import Settings

# Gradients are float32 sums of some hundred terms, here in another order, relative to the norm.
FLOAT32_SUMS = 3e-6
# bfloat16 keeps 8 bits: four layers of it move a mean loss by far less than 1 part in 2^6.
BFLOAT16_LOSS = 2**-6


def prepare(**options: Any) -> _Run:
    return _prepare(tiny_settings(**options), lambda text: None)


def order_of(run: _Run) -> BatchOrder:
    settings = run.settings
    lengths = [len(sequence.ids) for sequence in run.train]
    return BatchOrder(lengths, settings.batch_size, settings.seed, settings.group_by_length)


def step_without_update(run: _Run, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[Tensor]]:
    """The log of the first step and the gradients that the optimizer was to use."""
    seen: list[Tensor] = []
    params = [p for p in run.model.parameters() if p.requires_grad]
    monkeypatch.setattr(run.optimizer, "step", lambda: seen.extend(p.grad.clone() for p in params))
    return _step(run, order_of(run), 0), seen


def move_adapters(run: _Run) -> None:
    """Off the start, where B = 0 leaves A without a gradient."""
    for adapter in lora_layers(run.model).values():
        torch.nn.init.normal_(adapter.lora_B.weight, std=0.05)


def norm(gradients: list[Tensor]) -> float:
    return math.sqrt(sum(g.double().square().sum().item() for g in gradients))


def test_thirty_steps_lower_the_held_out_perplexity_by_a_third(tmp_path: Path) -> None:
    settings = Settings(
        model=str(TINY),
        data=str(PAIRS),
        compute_dtype="float32",
        steps=30,
        batch_size=4,
        length=64,
        learning_rate=3e-3,
        evaluation_sequences=16,
    )
    result = finetune(settings, tmp_path / "run", sample_prompt="Define: LOVE")
    assert result.after.perplexity < 0.7 * result.before.perplexity
    assert result.before.tokens == result.after.tokens > 0
    assert set(result.samples) == {"before", "after"}
    losses = [line["loss"] for line in log_lines(tmp_path / "run")]
    assert sum(losses[-5:]) < sum(losses[:5])


def test_the_gradient_is_that_of_the_mean_over_the_tokens_of_the_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = prepare(dropout=0.0, batch_size=4, length=96, group_by_length=False, max_grad_norm=1e9)
    move_adapters(run)
    log, found = step_without_update(run, monkeypatch)
    sequences = [run.train[i] for i in order_of(run).batch(0)]
    assert len({len(s.ids) for s in sequences}) > 1  # padding, and tokens of unequal weight
    targets = sum(s.count_targets() for s in sequences)
    params: Any = [p for p in run.model.parameters() if p.requires_grad]
    total: Any = 0.0
    for s in sequences:  # one at a time: no padding, transformers' own loss, a mean
        model: Any = run.model
        mean = model(input_ids=torch.tensor([s.ids]), labels=torch.tensor([s.labels])).loss
        total = total + mean * s.count_targets() / targets
    expected = torch.autograd.grad(total, params)
    assert log.loss == pytest.approx(total.item(), rel=FLOAT32_SUMS)
    assert norm([a - b for a, b in zip(found, expected)]) < FLOAT32_SUMS * norm(list(expected))
    assert log.tokens == sum(len(s.ids) for s in sequences)


def test_two_micro_batches_of_two_are_one_batch_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        run = prepare(
            dropout=0.0,
            batch_size=batch_size,
            accumulation=accumulation,
            length=96,
            group_by_length=False,
            max_grad_norm=1e9,
        )
        move_adapters(run)
        steps.append(step_without_update(run, monkeypatch))
    (whole, expected), *others = steps
    for log, found in others:
        assert log.tokens == whole.tokens
        assert log.loss == pytest.approx(whole.loss, rel=FLOAT32_SUMS)
        assert norm([a - b for a, b in zip(found, expected)]) < FLOAT32_SUMS * norm(expected)


def test_clipping_scales_the_gradient_to_the_largest_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    free, gradients = step_without_update(prepare(max_grad_norm=1e9), monkeypatch)
    assert free.grad_norm == pytest.approx(norm(gradients), rel=FLOAT32_SUMS)
    limit = free.grad_norm / 10
    log, clipped = step_without_update(prepare(max_grad_norm=limit), monkeypatch)
    assert log.grad_norm == free.grad_norm  # the log says the norm from before
    # clip_grad_norm_ adds 1e-6 to the norm that it divides by.
    assert norm(clipped) == pytest.approx(limit, rel=1e-4)
    scaled = [g * (limit / free.grad_norm) for g in gradients]
    assert norm([a - b for a, b in zip(clipped, scaled)]) < 1e-4 * limit


def test_checkpointing_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    with force_backend("reference"):
        for checkpointing in (False, True):
            run = prepare(gradient_checkpointing=checkpointing, dropout=0.2)
            on = [m for m in run.model.modules() if getattr(m, "gradient_checkpointing", False)]
            assert bool(on) == checkpointing
            move_adapters(run)
            steps.append(step_without_update(run, monkeypatch))
    (log_off, off), (log_on, on_) = steps
    assert log_off.loss == log_on.loss
    assert all(torch.equal(a, b) for a, b in zip(off, on_))


def test_training_changes_the_adapters_alone() -> None:
    run = prepare()
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    weights = restored_weights(run.model)
    _step(run, order_of(run), 0)
    changed = {n for n, p in run.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if ".lora_B." in n}  # with B = 0, A has no gradient yet
    after = restored_weights(run.model)
    assert weights and all(torch.equal(weights[name], after[name]) for name in weights)


def test_a_bfloat16_step_agrees_with_a_float32_one(monkeypatch: pytest.MonkeyPatch) -> None:
    logs = {}
    for dtype in ("float32", "bfloat16"):
        run = prepare(compute_dtype=dtype, dropout=0.0)
        assert next(run.model.parameters()).dtype == getattr(torch, dtype)
        assert all(p.dtype == torch.float32 for p in run.model.parameters() if p.requires_grad)
        logs[dtype] = step_without_update(run, monkeypatch)[0]
    assert logs["bfloat16"].loss == pytest.approx(logs["float32"].loss, rel=BFLOAT16_LOSS)
    assert logs["bfloat16"].loss != logs["float32"].loss


def test_the_log_has_a_line_a_step_with_the_rate_of_the_schedule(tmp_path: Path) -> None:
    finetune(tiny_settings(steps=4, schedule="cosine", warmup=0.5), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    rates = [line["learning_rate"] for line in lines]  # half, all; cosine at 0 and 1/2 of its way
    assert rates == pytest.approx([1.5e-3, 3e-3, 3e-3, 1.5e-3], rel=1e-12)
    for line in lines:
        assert line["loss"] > 0 and line["grad_norm"] > 0 and line["tokens"] > 0
        assert line["tokens_per_second"] > 0 and line["resident_bytes"] > 10**7


@pytest.mark.parametrize("group_by_length", [True, False])
def test_batches_are_those_of_the_order(group_by_length: bool) -> None:
    run = prepare(group_by_length=group_by_length, batch_size=3, accumulation=2, length=64)
    order = order_of(run)
    for step in (0, 1):
        indices = order.batch(2 * step) + order.batch(2 * step + 1)
        assert _step(run, order, step).tokens == sum(len(run.train[i].ids) for i in indices)


def test_packing_fills_every_sequence() -> None:
    run = prepare(packing=True, length=48)
    lengths = [len(sequence.ids) for sequence in run.train]
    assert set(lengths[:-1]) == {48} and lengths[-1] <= 48
    assert _step(run, order_of(run), 1).tokens == 2 * 48


@pytest.mark.parametrize("kind", ["file", "directory", "jsonl"])
def test_text_comes_from_a_file_a_directory_or_pairs(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "play.txt").write_text(PLAYS.read_text()[:4000])
    (folder / "pairs.jsonl").write_text("".join(PAIRS.open().readlines()[:20]))
    data = {"file": folder / "play.txt", "directory": folder, "jsonl": folder / "pairs.jsonl"}
    result = finetune(tiny_settings(data=str(data[kind]), steps=1), tmp_path / "run")
    assert math.isfinite(result.final_loss) and result.after.tokens > 0


def test_before_is_the_base_without_the_adapter(tmp_path: Path) -> None:
    with force_backend("reference"):
        result = finetune(tiny_settings(), tmp_path / "run")
        run = prepare()
        move_adapters(run)
        with adapters_disabled(run.model):
            base = evaluate(run.model, run.held_out, pad_id=2)
    assert base == result.before != result.after


def test_the_report_holds_what_the_result_says(tmp_path: Path) -> None:
    settings = tiny_settings(optimizer="adamw_8bit")
    result = finetune(settings, tmp_path / "run")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["perplexity_before"] == result.before.perplexity
    assert report["perplexity_after"] == result.after.perplexity
    assert report["final_loss"] == result.final_loss == log_lines(tmp_path / "run")[-1]["loss"]
    assert Settings(**report["settings"]) == settings
    assert report["trainable_parameters"] == 4 * 4 * (256 + 192 + 192 + 256 + 3 * 512)
    assert {item["name"] for item in report["memory"]} >= {"4-bit codes", "scales", "activations"}


def test_the_two_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    finetune(tiny_settings(steps=5), tmp_path / "run", save_every=2)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"checkpoint-000004", "checkpoint-000005", "adapter", "log.jsonl"} | {
        "report.json"
    }


def test_an_output_that_is_not_empty_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    before = files_below(tmp_path)
    with pytest.raises(ValueError, match="not empty"):
        finetune(tiny_settings(), tmp_path)
    assert files_below(tmp_path) == before


def test_undecodable_text_is_found_before_a_model_is_loaded(tmp_path: Path) -> None:
    text = tmp_path / "latin.txt"
    text.write_bytes(b"caf\xe9 " * 100)
    with pytest.raises(ValueError, match="latin.txt must be a readable file of UTF-8"):
        finetune(tiny_settings(data=str(text), model="/no/such/model"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no directory or file /no/such/model"):
        finetune(tiny_settings(model="/no/such/model"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    def strip(model: Any) -> None:
        del model.model.layers[:]
        model.config.num_hidden_layers = 0

    source = save_changed_model(tmp_path / "model", strip)
    with pytest.raises(ValueError, match="nothing to convert.*LlamaForCausalLM"):
        finetune(tiny_settings(model=str(source)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    def break_one(model: Any) -> None:
        model.model.layers[2].mlp.up_proj.weight.data[3, 4] = math.nan

    source = save_changed_model(tmp_path / "model", break_one)
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.up_proj\.weight .* not finite"):
        finetune(tiny_settings(model=str(source)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    settings = tiny_settings(learning_rate=1e30, warmup=0.0)
    with pytest.raises(ValueError, match="step 2 .*nan.*lower the learning rate"):
        finetune(settings, tmp_path / "run", save_every=1)
    assert [line["step"] for line in log_lines(tmp_path / "run")] == [1]
    assert [path.name for path in (tmp_path / "run").glob("check*")] == ["checkpoint-000001"]


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_update() -> None:
    run = prepare()
    params = [p for p in run.model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in params]
    params[1].register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(ValueError, match="step 1 .*gradient"):
        _step(run, order_of(run), 0)
    assert all(torch.equal(p, old) for p, old in zip(params, before))
