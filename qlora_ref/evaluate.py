"""How good a model is: perplexity on held-out text, and what it says to a prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_ref.data import IGNORED_LABEL, TokenSequence, collate

# Batches of a few widths only: see data.collate.
WIDTH_MULTIPLE = 32


@dataclass(frozen=True)
class Evaluation:
    """loss: mean negative log-likelihood of a target token, in nats; perplexity: e^loss."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


@torch.no_grad()
def evaluate(
    model: nn.Module, sequences: Sequence[TokenSequence], pad_id: int, batch_size: int = 4
) -> Evaluation:
    """Mean loss per target token over sequences, in evaluation mode; the mode is put back after.

    Raises ValueError if there is no target token.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total, targets = 0.0, 0
    by_length = sorted(sequences, key=lambda sequence: len(sequence.ids))  # less padding
    for start in range(0, len(by_length), batch_size):
        batch = collate(by_length[start : start + batch_size], pad_id, WIDTH_MULTIPLE)
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        loss, count = summed_loss(model, batch)
        total, targets = total + loss.item(), targets + count
    model.train(training)
    if targets == 0:
        raise ValueError("no token to predict in the text: nothing to evaluate on")
    return Evaluation(total / targets, targets)


def count_targets(batch: dict[str, Tensor]) -> int:
    """Over how many tokens `summed_loss` sums: those whose label is not -100, but for the first."""
    return int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())


def summed_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """The summed loss of a batch, and over how many target tokens it sums.

    loss = -sum log p(token t | tokens before t), over the tokens t whose label is not -100.
    """
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits
    targets = batch["labels"][:, 1:].flatten()
    chosen = targets != IGNORED_LABEL
    # Rows without a target are dropped before the softmax, which is as wide as the vocabulary.
    predicted = logits[:, :-1].flatten(0, 1)[chosen].float()
    loss = nn.functional.cross_entropy(predicted, targets[chosen], reduction="sum")
    return loss, count_targets(batch)


def generate(model: nn.Module, tokenizer: Any, prompt: str, tokens: int = 40) -> str:
    """Continue a prompt greedily, through the chat template where the tokenizer has one."""
    text, special = prompt, True
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        special = False
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=special)
    device = next(model.parameters()).device
    ids, mask = inputs["input_ids"].to(device), inputs["attention_mask"].to(device)
    training = model.training
    generator: Any = model.eval()
    with torch.no_grad():
        new = generator.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    model.train(training)
    continuation: str = tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
    return continuation.strip()
