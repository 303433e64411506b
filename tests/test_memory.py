"""The memory report: what is measured is what is there, and what the formula says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qlora_ref
from qlora_ref.memory import LiveTensors, memory_report, step_bytes
from qlora_ref.models import load_model

MODEL = Path(__file__).parent / "data" / "tiny_llama"
# Besides layer inputs and log-probabilities, rotary angles, masks and the norms' scales are kept.
ACTIVATIONS = 0.10

pytest.importorskip("transformers", reason="transformers is not installed")


def prepared(state_bits: int = 32, double_quant: bool = True) -> tuple[Any, Any, Any]:
    model: Any = load_model(MODEL)
    qlora_ref.convert_model(model, double_quant=double_quant)
    qlora_ref.add_lora(model, r=8)
    model.activation_checkpointing_enable({"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = qlora_ref.AdamW(trained, state_bits=state_bits)
    ids = torch.arange(256).reshape(2, 128) % 500
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    model.train()(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer, batch


def items(state_bits: int = 32, double_quant: bool = True) -> dict[str, Any]:
    return {i.name: i for i in memory_report(*prepared(state_bits, double_quant)).items}


# The tiny model's layers: q and o 128x128, k and v 64x128, gate, up and down 384x128, four times.
VALUES = 4 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 384 * 128)
RANK_SUM = 4 * 8 * (2 * (128 + 128) + 2 * (64 + 128) + 3 * (384 + 128))
LAYERS = 4 * 7


def test_codes_and_adapters_are_what_the_shapes_say() -> None:
    found = items()
    assert found["4-bit codes"].measured == found["4-bit codes"].expected == VALUES // 2
    for name in ("adapters", "gradients"):
        assert found[name].measured == found[name].expected == 4 * RANK_SUM
    # embeddings and head 512x128, nine norms of 128, all float32
    assert found["other weights"].measured == 4 * (2 * 512 * 128 + 9 * 128)


@pytest.mark.parametrize("double_quant", [False, True])
def test_scales_are_what_the_block_size_says(double_quant: bool) -> None:
    scales = items(double_quant=double_quant)["scales"]
    if not double_quant:
        assert scales.measured == scales.expected == 4 * VALUES // 64
        return
    # Blocks of 256 scales are rounded up in each layer: at most one float more each.
    assert 0 <= scales.measured - scales.expected <= 4 * LAYERS


@pytest.mark.parametrize(("bits", "nbytes"), [(32, 8.0), (8, 2 + 8 / 256)])
def test_optimizer_state_is_what_its_bits_say(bits: int, nbytes: float) -> None:
    state = items(bits)["optimizer state"]
    # Blocks of 256 are rounded up in each of two matrices a layer, for two moments.
    slack = 0 if bits == 32 else 2 * 2 * 4 * LAYERS
    assert abs(state.measured - nbytes * RANK_SUM) <= slack
    assert abs(state.expected - nbytes * RANK_SUM) <= 1


def test_activations_with_checkpointing_follow_the_formula() -> None:
    found = items()["activations"]
    tokens, targets = 256, 254
    assert found.expected == 4 * tokens * (4 + 1) * 128 + 4 * targets * 512
    assert found.measured == pytest.approx(found.expected, rel=ACTIVATIONS)


def test_without_checkpointing_no_formula_is_claimed_and_more_is_kept() -> None:
    model, optimizer, batch = prepared()
    kept = step_bytes(model, batch).activations
    model.activation_checkpointing_disable()
    found = {i.name: i for i in memory_report(model, optimizer, batch).items}["activations"]
    assert found.expected is None and found.measured > 2 * kept


def test_live_tensors_counts_what_lives_and_no_view_twice() -> None:
    outside = torch.zeros(1000)
    with LiveTensors() as live:
        first = torch.ones(100)  # 400 bytes
        view = first.view(10, 10)
        second = view * 2  # 400 bytes more
        outside.add_(1)  # in place: nothing new
        assert live.nbytes == 800
        del second
        assert live.nbytes == 400
