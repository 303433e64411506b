"""Optimizers under bitsandbytes' names."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from compare import normal
from torch import nn

from qlora_ref.integrations import bitsandbytes as ours

bnb = pytest.importorskip(
    "bitsandbytes", reason="bitsandbytes is missing: pip install bitsandbytes==0.50.2"
)

ADAMS = [
    f"{paged}{name}{bits}"
    for paged in ("", "Paged")
    for name in ("AdamW", "Adam")
    for bits in ("", "32bit", "8bit")
]
ALL = [name for name, value in vars(bnb.optim).items() if hasattr(value, "step")]


def arguments(function: Any) -> list[tuple[str, Any]]:
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


def test_every_optimizer_is_there() -> None:
    assert len(ALL) == 40
    assert not [name for name in ALL if not hasattr(ours.optim, name)]


@pytest.mark.parametrize("name", ALL)
def test_optimizers_take_the_same_arguments(name: str) -> None:
    mine, theirs = (arguments(getattr(optim, name)) for optim in (ours.optim, bnb.optim))
    if name == "PytorchLARS":  # its arguments are refused, whatever they are
        with pytest.raises(NotImplementedError, match="LARS is"):
            ours.optim.PytorchLARS([nn.Parameter(normal(4))])
        return
    if name == "Adagrad8bit":  # whose optim_bits is 8, and without effect
        theirs = [(key, 32 if key == "optim_bits" else value) for key, value in theirs]
    assert mine == theirs


@pytest.mark.parametrize("name", ADAMS)
def test_optimizers_step_as_their_name_says(name: str) -> None:
    param = nn.Parameter(normal(128, 512))
    small = nn.Parameter(normal(16))
    original = [p.detach().clone() for p in (param, small)]
    optimizer = getattr(ours.optim, name)([param, small], lr=1e-2)
    param.grad, small.grad = normal(128, 512), normal(16)
    optimizer.step()
    bits = {group["state_bits"] for group in optimizer.param_groups}
    assert bits == ({8, 32} if "8bit" in name else {32})
    assert (optimizer.paging_report() is not None) == name.startswith("Paged")
    for p, before in zip((param, small), original):
        # The first step of Adam is lr times the sign, that of AdamW after a decay by 1 - lr / 100.
        # Eight bits leave a moment within 2 % of itself.
        step = (before * (1 - 1e-4 * ("AdamW" in name)) - p) / 1e-2
        large = p.grad.abs() > 0.1 * p.grad.abs().max()
        torch.testing.assert_close(step[large], p.grad.sign()[large], rtol=0, atol=0.05)


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "Lion8bit", "AdEMAMix8bit"])
def test_single_parameters_can_keep_32_bits(name: str) -> None:
    manager = ours.optim.GlobalOptimManager.get_instance()
    assert manager is ours.optim.GlobalOptimManager.get_instance()
    early, late, plain = (nn.Embedding(100, 64) for _ in range(3))
    manager.register_module_override(early, "weight", {"optim_bits": 32})
    params = [early.weight, late.weight, plain.weight]
    optimizer = getattr(ours.optim, name)(params, lr=1e-3)
    manager.override_config(late.weight, "optim_bits", 32)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    moment = optimizer.fields(optimizer.param_groups[0])[0].name
    dtypes = [optimizer.state[param][moment].dtype for param in params]
    assert dtypes == [torch.float32, torch.float32, torch.uint8]
    members = [id(param) for group in optimizer.param_groups for param in group["params"]]
    assert sorted(members) == sorted(map(id, params))
    with pytest.raises(NotImplementedError, match="param group"):
        manager.override_config(plain.weight, "lr", 1.0)
