"""A small language model on a fixed text: its loss on each window, with any weights put in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_ref.convert import convert_model
from qlora_ref.lora import is_output_head
from qlora_ref.models import load_model, load_tokenizer
from qlora_ref.module4bit import layers_4bit
from qlora_ref.study.rotation import rotate_residual_stream

WINDOW = 128  # tokens
CHUNK = 4096  # characters; of every ten chunks the last was held out from training
BATCH = 32
CALIBRATION = 128  # windows


class SmallModel:
    """The model in float32, its dense weights as loaded, and windows of its text.

    count       windows of held-out text, at most
    turn        seed of a rotation of the residual stream; None: as stored
    windows     int64 (n, 128), of held-out text
    training    int64 (m, 128), of the text that it was trained on
    weights     float32 (out, in) of every linear layer but the output head, by name
    """

    def __init__(
        self, source: str, text: str, count: int | None = None, turn: int | None = None
    ) -> None:
        if not Path(text).is_file():
            raise FileNotFoundError(f"there is no text {text}; it comes with the source archive")
        self.source = source
        self.model = load_model(source)
        training, held_out = cut(Path(text).read_text(encoding="utf-8"))
        self.training, self.windows = self.split(training), self.split(held_out)[:count]
        if turn is not None:
            rotate_residual_stream(self.model, turn)
        self.layers = {
            name: module
            for name, module in self.model.named_modules()
            if type(module) is nn.Linear and not is_output_head(self.model, name)
        }
        self.weights = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}

    def split(self, text: str) -> Tensor:
        """Whole windows of a text's tokens, int64 (n, 128)."""
        return _windows(self.source, text)

    @torch.no_grad()
    def put(self, change: Callable[[Tensor], Tensor]) -> float:
        """Put change(weight as loaded) into every layer; returns |W' - W|^2 / |W|^2."""
        for name, layer in self.layers.items():
            layer.weight.copy_(change(self.weights[name]))
        return self._relative_error({name: layer.weight for name, layer in self.layers.items()})

    def calibrate(self, **options: Any) -> float:
        """Convert to 4 bits with a calibration text, its own training text; returns as `put`."""
        batches = self.training[:CALIBRATION].split(BATCH)
        convert_model(self.model, calibration=batches, **options)
        layers = layers_4bit(self.model)
        return self._relative_error({name: layers[name].dequantize() for name in self.weights})

    def _relative_error(self, weights: dict[str, Tensor]) -> float:
        noise = signal = 0.0
        for name, weight in weights.items():
            original = self.weights[name].double()
            noise += (weight.detach().double() - original).square().sum().item()
            signal += original.square().sum().item()
        return noise / signal

    def losses(self) -> Tensor:
        """The mean loss of each held-out window in nats a token, float64 (n,)."""
        return window_losses(self.model, self.windows)


@functools.cache  # the same few texts for every model of a process
def _windows(source: str, text: str) -> Tensor:
    ids = torch.tensor(load_tokenizer(source)(text, add_special_tokens=False)["input_ids"])
    return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)


@torch.no_grad()
def window_losses(model: nn.Module, windows: Tensor) -> Tensor:
    """The mean loss of each window in nats a token, float64 (n,), in evaluation mode."""
    training = model.training
    model.eval()
    found = []
    for batch in windows.split(BATCH):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="none"
        )
        found.append(loss.view(len(batch), -1).double().mean(dim=1))
    model.train(training)
    return torch.cat(found)


def cut(text: str) -> tuple[str, str]:
    """Training text and held-out text: of every ten chunks the last is held out."""
    chunks = [text[start : start + CHUNK] for start in range(0, len(text), CHUNK)]
    return "".join(chunk for i, chunk in enumerate(chunks) if i % 10 != 9), "".join(chunks[9::10])
