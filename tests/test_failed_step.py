"""A step that raises: what has moved is counted, and nothing else is."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_same_bits, normal
from torch import nn

from qlora_ref import AdamW, force_backend
from qlora_ref.optimizers import RuleOptimizer

LARGE = (700, 601)  # paged


def parameter(*shape: int) -> nn.Parameter:
    param = nn.Parameter(normal(*(shape or (25, 24))))
    param.grad = normal(*param.shape, seed=1)
    return param


@pytest.mark.parametrize(
    "make",
    [AdamW, partial(AdamW, state_bits=8), partial(RuleOptimizer, rule="lamb", state_bits=8)],
    ids=["adamw", "adamw_8bit", "lamb_8bit"],
)
def test_a_step_on_a_backend_for_other_tensors_is_as_if_it_had_not_been(make: Any) -> None:
    params = [parameter(), parameter()]
    optimizers = [make([param], lr=0.1) for param in params]
    with pytest.raises(RuntimeError), force_backend("cuda"):
        optimizers[0].step()
    assert optimizers[0].state[params[0]]["step"] == 0
    for optimizer in optimizers:
        optimizer.step()
    assert_same_bits(*params)


def test_the_first_step_after_a_failed_one_is_a_first_step() -> None:
    """Adam's first step is lr sign(g), for the bias is corrected by 1 - beta^1."""
    param = nn.Parameter(torch.zeros(4))
    param.grad = torch.ones(4)
    optimizer = AdamW([param], lr=1.0, weight_decay=0)
    with pytest.raises(RuntimeError), force_backend("cuda"):
        optimizer.step()
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.full((4,), -1.0))


def test_groups_before_the_one_that_failed_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [parameter() for _ in range(3)]
    optimizer = AdamW([{"params": [param]} for param in params])
    step_alike, moved = optimizer.step_alike, []

    def fail_at_the_second(*arguments: Any) -> None:
        if len(moved) == 1:
            raise KeyboardInterrupt
        moved.append(step_alike(*arguments))

    monkeypatch.setattr(optimizer, "step_alike", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert [optimizer.state[param]["step"] for param in params] == [1, 0, 0]
    assert [torch.equal(param, normal(25, 24)) for param in params] == [False, True, True]


def test_what_was_paged_is_counted_when_the_rest_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, small = parameter(*LARGE), parameter()
    pages: Any = {"paged": "file", "resident_bytes": 1 << 20, "page_directory": tmp_path}
    optimizer = AdamW([large, small], **pages)
    step_alike = optimizer.step_alike

    def fail_in_memory(batch: Any, *options: Any) -> None:
        if batch.owners[0] is small:
            raise KeyboardInterrupt
        step_alike(batch, *options)

    monkeypatch.setattr(optimizer, "step_alike", fail_in_memory)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert [optimizer.state[param]["step"] for param in (large, small)] == [1, 0]
    assert torch.equal(small, normal(25, 24)) and not torch.equal(large, normal(*LARGE))
