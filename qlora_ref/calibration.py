"""What the linear layers of a model see: the second moments of their inputs, H = mean(x x^T).

The blocks of a transformer are gone through one after the other. Each is run on the calibration
text as the blocks before it, already in 4 bits, leave it: errors made so far are in the inputs, and
are made up for. What else a block is called with, such as its mask and its rotary embedding, is
as in a run of the dense model: it may differ from block to block, but mostly they share it. Held
are that, the outputs of one block and the moments of its own layers.

Source: Frantar et al., GPTQ (arXiv 2210.17323), section 4, "Setup". Read next: convert.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Batch = Tensor | Mapping[str, Tensor]
Others = tuple[tuple[Any, ...], dict[str, Any]]  # a block's arguments but for the hidden states


class _Stop(Exception):
    """The model has come to its last block: what each is called with is known."""


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
    Raises ValueError where there is no batch, for a layer that none of them reaches, and for a
    block that is not called once in each run.
    """
    if not batches:
        raise ValueError("calibration needs at least one batch of text")
    with _evaluating(model):
        prefix, blocks = _blocks(model, names)
        left = list(names)
        if blocks is not None:
            hidden, others = _calls(model, blocks, batches)
            for index in range(len(blocks)):
                below = [name for name in left if name.startswith(f"{prefix}.{index}.")]
                left = [name for name in left if name not in below]
                if below:
                    with _watched(model, below) as moments:
                        _run_block(blocks[index], hidden, others[index])
                    yield moments
                hidden = _run_block(blocks[index], hidden, others[index])
        if left:
            with _watched(model, left) as moments:
                for batch in batches:
                    _run(model, batch)
            yield moments


def _run_block(block: nn.Module, hidden: list[Any], others: list[Others]) -> list[Any]:
    """The hidden states that a block makes of those before it, batch by batch."""
    outputs = [block(x, *rest, **keywords) for x, (rest, keywords) in zip(hidden, others)]
    return [output[0] if isinstance(output, tuple) else output for output in outputs]


def _calls(
    model: nn.Module, blocks: nn.ModuleList, batches: Sequence[Batch]
) -> tuple[list[Any], list[list[Others]]]:
    """The hidden states that the first block gets, and block by block what each gets beside them.

    Both batch by batch. The later blocks' hidden states are let go of: they are of dense blocks.
    """
    hidden: list[Any] = []
    others: list[list[Others]] = [[] for _ in blocks]

    def catch(
        index: int, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        keywords = dict(keywords)
        x = arguments[0] if arguments else keywords.pop("hidden_states")
        if index == 0:
            hidden.append(x)
        others[index].append((arguments[1:], keywords))
        if index == len(blocks) - 1:
            raise _Stop

    handles = [
        block.register_forward_pre_hook(partial(catch, index), with_kwargs=True)
        for index, block in enumerate(blocks)
    ]
    try:
        for batch in batches:
            with suppress(_Stop):
                _run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for index, (block, caught) in enumerate(zip(blocks, others)):
        if len(caught) != len(batches):
            raise ValueError(
                f"each run must call block {index}, a {type(block).__name__}, once, "
                f"got {len(caught)} calls in {len(batches)} runs"
            )
    return hidden, others


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
    training = model.training
    # An encoder and a decoder, or a part that reads text, have configurations of their own.
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    caching = [config for config in configs if getattr(config, "use_cache", False)]
    model.eval()
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        model.train(training)
        for config in caching:
            config.use_cache = True
