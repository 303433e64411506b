"""Where the memory of a fine-tune goes: measured, beside what arithmetic says it should be."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_ref.codebooks import DYNAMIC_BLOCK_SIZE
from qlora_ref.evaluate import count_targets, summed_loss
from qlora_ref.lora import lora_layers
from qlora_ref.module4bit import Module4bit, layers_4bit
from qlora_ref.state_optimizer import StateOptimizer


@dataclass(frozen=True)
class Item:
    """Bytes of one kind, measured and by the formula; None where no formula is claimed."""

    name: str
    measured: int
    expected: int | None
    formula: str


@dataclass(frozen=True)
class MemoryReport:
    """The items of `memory_report`; print it as a table."""

    items: list[Item]

    @property
    def total(self) -> int:
        """Measured bytes of all items."""
        return sum(item.measured for item in self.items)

    def as_dict(self) -> list[dict[str, Any]]:
        """For JSON."""
        return [asdict(item) for item in self.items]

    def __str__(self) -> str:
        lines = [f"{'':<20}{'measured':>12}{'formula':>12}"]
        for item in self.items:
            expected = "" if item.expected is None else f"{item.expected / 1e6:.2f} MB"
            measured = f"{item.measured / 1e6:.2f} MB"
            lines.append(f"{item.name:<20}{measured:>12}{expected:>12}  {item.formula}")
        return "\n".join([*lines, f"{'together':<20}{f'{self.total / 1e6:.2f} MB':>12}"])


def memory_report(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]
) -> MemoryReport:
    """Count what a training step on this batch holds.

    Codes, scales, the parameters outside them, adapters and the optimizer's state are counted from
    the tensors; activations are all tensors that a forward made and that are alive at its end, when
    the backward begins. One forward and one backward are run; `.grad` stays as it is.
    """
    layers = list(layers_4bit(model).values())
    adapters = lora_layers(model).values()
    values = sum(layer.weight_shape.numel() for layer in layers)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rank_sum = sum(a.r * (a.in_features + a.out_features) for a in adapters)
    width = trained[0].element_size() if trained else 4
    bits = optimizer.param_groups[0].get("state_bits", 32)
    state_bytes = rank_sum * 8 if bits == 32 else rank_sum * 2 + rank_sum * 8 // DYNAMIC_BLOCK_SIZE
    state_formula = "8 r (N + K)" if bits == 32 else "(2 + 8 / 256) r (N + K)"
    dense = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    step = step_bytes(model, batch)
    states = (tensor for state in optimizer.state.values() for tensor in state.values())
    paging = optimizer.paging_report() if isinstance(optimizer, StateOptimizer) else None
    state_size = _size(states) + (paging.state_bytes if paging else 0)
    return MemoryReport(
        [
            Item("4-bit codes", _size(layer.weight for layer in layers), values // 2, "n / 2"),
            _scales_item(layers),
            Item("other weights", _size(dense), None, "embeddings, norms, output head"),
            Item("adapters", _size(trained), rank_sum * width, f"{width} r (N + K)"),
            Item("gradients", step.gradients, rank_sum * width, f"{width} r (N + K)"),
            Item("optimizer state", state_size, state_bytes, state_formula),
            _activations_item(model, batch, step.activations),
        ]
    )


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of living tensors that operations inside a `with` block made.

    nbytes  alive now
    peak    the most that were alive at once
    """

    def __init__(self) -> None:
        super().__init__()
        self._alive: set[int] = set()
        self.nbytes = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {id(tensor.untyped_storage()) for tensor in _tensors((args, kwargs))}
        outputs = func(*args, **(kwargs or {}))
        for tensor in _tensors(outputs):
            storage = tensor.untyped_storage()
            # A view or an in-place result shares the storage of what went in.
            if id(storage) not in inputs and id(storage) not in self._alive:
                self._alive.add(id(storage))
                self.nbytes += storage.nbytes()
                weakref.finalize(storage, self._forget, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.nbytes)
        return outputs

    def _forget(self, identity: int, nbytes: int) -> None:
        self._alive.remove(identity)
        self.nbytes -= nbytes


@dataclass(frozen=True)
class StepBytes:
    """What a forward and a backward hold beside the model.

    activations  alive at the end of the forward, for the backward
    gradients    of the trained parameters, at the end
    peak         the most that is alive at once: activations go as gradients come
    """

    activations: int
    gradients: int
    peak: int


def step_bytes(
    model: nn.Module, batch: dict[str, Tensor], live: LiveTensors | None = None
) -> StepBytes:
    """Run a forward in training mode and its backward; `.grad` stays as it is."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = model.training
    model.train()
    with live or LiveTensors() as counted:
        loss, _ = summed_loss(model, batch)
        alive = counted.nbytes
        gradients = torch.autograd.grad(loss, trained) if trained else ()
    model.train(training)
    return StepBytes(alive, _size(gradients), counted.peak)


def resident_bytes() -> int:
    """Bytes of this process that are in memory now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _scales_item(layers: list[Module4bit]) -> Item:
    measured = sum(m.quantized_weight.nbytes - m.weight.numel() for m in layers)
    expected = 0
    for layer in layers:
        blocks = layer.weight_shape.numel() / layer.block_size
        nested = layer.weight_nested_absmax is not None
        expected += round(blocks * (1 + 4 / DYNAMIC_BLOCK_SIZE) + 4 if nested else blocks * 4)
    double_quantised = any(layer.weight_nested_absmax is not None for layer in layers)
    formula = "n / 64 (1 + 4 / 256) + 4 a layer" if double_quantised else "4 n / 64"
    if layers:
        formula = formula.replace("64", str(layers[0].block_size))
    return Item("scales", measured, expected, formula)


def _activations_item(model: nn.Module, batch: dict[str, Tensor], measured: int) -> Item:
    config = getattr(model, "config", None)
    checkpointed = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    if config is None or not checkpointed:
        return Item("activations", measured, None, "without checkpointing: every layer's own")
    # Checkpointing keeps the input of each layer and of the final norm; the loss keeps the float32
    # log-probabilities of the rows that have a target.
    tokens = batch["input_ids"].numel()
    targets = count_targets(batch)
    width = next(p for p in model.parameters() if p.is_floating_point()).element_size()
    hidden = tokens * (config.num_hidden_layers + 1) * config.hidden_size * width
    formula = f"{width} tokens (layers + 1) d + 4 targets V"
    return Item("activations", measured, hidden + 4 * targets * config.vocab_size, formula)


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _size(tensors: Iterable[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
