"""What the linear layers of a model see: the second moments of their inputs, H = mean(x x^T).

The blocks of a transformer are gone through one after the other. Each is run on the calibration
text as the blocks before it, already in 4 bits, leave it: errors made so far are in the inputs, and
are made up for. Only the outputs of one block and the moments of its own layers are held.

Source: Frantar et al., GPTQ (arXiv 2210.17323), section 4, "Setup". Read next: convert.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Batch = Tensor | Mapping[str, Tensor]


class _Stop(Exception):
    """The model has come to its first block: what goes in there is known."""


@torch.no_grad()
def input_moments(
    model: nn.Module, names: Sequence[str], batches: Sequence[Batch]
) -> Iterator[dict[str, Tensor]]:
    """The second moments of the inputs of some layers, a block of the model at a time.

    names    of the layers, each called with one tensor (..., K)
    batches  what the model is called with: a tensor of token ids, or keyword arguments
    yields   {name: float32 (K, K)} for the layers of one block. Before asking for the next, put
             the quantised layers in place: the next block sees what they give. Last come the
             layers that lie in no block, found by running the whole model.

    A block is a member of the nn.ModuleList that has most of the layers below it.
    Raises ValueError where there is no batch, or for a layer that none of them reaches.
    """
    if not batches:
        raise ValueError("calibration needs at least one batch of text")
    with _evaluating(model):
        prefix, blocks = _blocks(model, names)
        left = list(names)
        if blocks is not None:
            calls = [_first_call(model, blocks[0], batch) for batch in batches]
            for index in range(len(blocks)):
                below = [name for name in left if name.startswith(f"{prefix}.{index}.")]
                left = [name for name in left if name not in below]
                if below:
                    with _watched(model, below) as moments:
                        _run_block(blocks[index], calls)
                    yield moments
                calls = _run_block(blocks[index], calls)
        if left:
            with _watched(model, left) as moments:
                for batch in batches:
                    _run(model, batch)
            yield moments


Call = tuple[Any, tuple[Any, ...], dict[str, Any]]  # hidden states, other arguments, keywords


def _run_block(block: nn.Module, calls: list[Call]) -> list[Call]:
    """Each call with the block's output in place of its hidden states."""
    outputs = [block(hidden, *rest, **keywords) for hidden, rest, keywords in calls]
    hidden = [output[0] if isinstance(output, tuple) else output for output in outputs]
    return [(new, rest, keywords) for new, (_, rest, keywords) in zip(hidden, calls)]


def _first_call(model: nn.Module, block: nn.Module, batch: Batch) -> Call:
    caught: list[Call] = []

    def catch(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        keywords = dict(keywords)
        hidden = arguments[0] if arguments else keywords.pop("hidden_states")
        caught.append((hidden, arguments[1:], keywords))
        raise _Stop

    handle = block.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        _run(model, batch)
    except _Stop:
        return caught[0]
    finally:
        handle.remove()
    raise ValueError(f"the model runs without its first {type(block).__name__}")


@contextmanager
def _watched(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The second moments of the layers' inputs; they are complete when the `with` block ends."""
    moments: dict[str, Tensor] = {}
    counts = dict.fromkeys(names, 0)

    def add(name: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        x = arguments[0].detach().flatten(0, -2).float()
        product = x.t() @ x
        moments[name] = moments[name].add_(product) if name in moments else product
        counts[name] += len(x)

    handles = [
        model.get_submodule(name).register_forward_pre_hook(partial(add, name)) for name in names
    ]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()
    unseen = [name for name in names if not counts[name]]
    if unseen:
        raise ValueError(
            f"no input of {unseen[:3]} comes from the calibration text: use more of it, or keep "
            "these layers with skip"
        )
    for name, moment in moments.items():
        moment /= counts[name]


def _blocks(model: nn.Module, names: Sequence[str]) -> tuple[str, nn.ModuleList | None]:
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    below = {prefix: sum(name.startswith(f"{prefix}.") for name in names) for prefix in lists}
    prefix = max(below, key=below.__getitem__, default="")  # of equals the first, the outermost
    return (prefix, lists[prefix]) if below.get(prefix) else ("", None)


def _run(model: nn.Module, batch: Batch) -> None:
    device = next(model.parameters()).device
    if isinstance(batch, Mapping):
        model(**{name: tensor.to(device) for name, tensor in batch.items()})
    else:
        model(batch.to(device))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no cache of keys and values, which a second run would add to."""
    training, config = model.training, getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    model.eval()
    if use_cache is not None:
        setattr(config, "use_cache", False)  # noqa: B010
    try:
        yield
    finally:
        model.train(training)
        if use_cache is not None:
            setattr(config, "use_cache", use_cache)  # noqa: B010
