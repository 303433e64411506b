"""Perplexity and the settings of a run, against definitions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_ref.data import IGNORED_LABEL, TokenSequence
from qlora_ref.evaluate import evaluate, generate, summed_loss
from qlora_ref.models import load_model, load_tokenizer
from qlora_ref.settings import Settings, learning_rate

MODEL = Path(__file__).parent / "data" / "tiny_llama"
ROUNDING = 1e-5  # relative: float32 sums of a few hundred terms in another order

pytest.importorskip("transformers", reason="transformers is not installed")


def sequences() -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(5)
    lengths = (9, 30, 17)
    ids = [torch.randint(10, 500, (n,), generator=generator).tolist() for n in lengths]
    return [TokenSequence(row, [IGNORED_LABEL] * 4 + row[4:]) for row in ids]


def define_loss(model: Any) -> tuple[float, int]:
    """-log p(token t | tokens before) over targets, one sequence and one token at a time."""
    total, count = 0.0, 0
    for sequence in sequences():
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([sequence.ids])).logits[0].double()
        for position in range(1, len(sequence.ids)):
            if sequence.labels[position] != IGNORED_LABEL:
                row = logits[position - 1]
                total += float(row.logsumexp(0) - row[sequence.labels[position]])
                count += 1
    return total, count


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_perplexity_is_the_exponential_of_the_mean_loss_of_a_target(batch_size: int) -> None:
    model = load_model(MODEL)
    total, count = define_loss(model)
    found = evaluate(model, sequences(), pad_id=0, batch_size=batch_size)
    assert found.tokens == count
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=ROUNDING * 100)
    assert found.loss == pytest.approx(total / count, rel=ROUNDING)


def test_evaluation_leaves_the_mode_as_it_was() -> None:
    model = load_model(MODEL)
    for training in (True, False):
        evaluate(model.train(training), sequences(), pad_id=0)
        assert model.training == training


def test_text_without_a_target_is_an_error() -> None:
    nothing = [TokenSequence([1, 2, 3], [IGNORED_LABEL] * 3)]
    with pytest.raises(ValueError, match="no token to predict"):
        evaluate(load_model(MODEL), nothing, pad_id=0)


def test_the_summed_loss_has_the_gradient_of_the_sum() -> None:
    model = load_model(MODEL)
    ids = torch.tensor([[5, 6, 7, 8]])
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    loss, count = summed_loss(model, batch)
    theirs = model(input_ids=ids, labels=ids).loss  # transformers' mean over the same targets
    assert count == 3
    assert loss.item() / count == pytest.approx(theirs.item(), rel=ROUNDING)


def test_a_sample_is_what_greedy_decoding_token_by_token_gives() -> None:
    model, tokenizer = load_model(MODEL), load_tokenizer(MODEL)
    ids = tokenizer("HAMLET:", return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(12):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    expected = tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()
    assert generate(model, tokenizer, "HAMLET:", tokens=12) == expected


def test_the_rate_rises_over_the_warm_up_and_then_is_constant_or_half_a_cosine() -> None:
    constant = Settings("m", "d", steps=100, learning_rate=1.0, warmup=0.1)
    cosine = Settings("m", "d", steps=100, learning_rate=1.0, warmup=0.1, schedule="cosine")
    for settings in (constant, cosine):
        assert [learning_rate(settings, s) for s in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert learning_rate(constant, 99) == 1.0
    assert learning_rate(cosine, 55) == pytest.approx(0.5)  # half-way from step 10 to step 100
    assert learning_rate(cosine, 99) == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, .*, got 'sgd'"),
        ({"schedule": "step"}, "schedule must be one of"),
        ({"compute_dtype": "int8"}, "compute_dtype must be one of auto"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0"),
        ({"warmup": 1.5}, "warmup is a share"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings("model", "data", **change)
