"""What torch.optim.AdamW saved goes on here, and the other way round."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from compare import assert_same_bits, normal
from test_optim import FIFTY_STEPS, OPTIONS, parameter, take_steps
from torch import nn

from qlora_ref import AdamW


@pytest.mark.parametrize(
    ("other", "options", "message"),
    (
        (torch.optim.SGD, {"momentum": 0.9}, "state_bits"),
        (torch.optim.AdamW, {"amsgrad": True}, "an optimizer with amsgrad"),
        (torch.optim.AdamW, {"maximize": True}, "an optimizer with maximize"),
        (torch.optim.Adam, {"weight_decay": 0.1}, "the weight decay of torch.optim.Adam"),
    ),
)
def test_state_of_another_optimizer_is_an_error(
    other: Any, options: dict[str, Any], message: str
) -> None:
    if other is torch.optim.Adam and not issubclass(torch.optim.AdamW, torch.optim.Adam):
        pytest.skip("this torch does not tell Adam's state from AdamW's")
    param = parameter()
    theirs = other([param], lr=0.1, **options)
    take_steps(theirs, range(1))
    with pytest.raises(ValueError, match=message):
        AdamW([param]).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("state_bits", (32, 8))
@pytest.mark.parametrize("paged", (False, True))
def test_state_of_torch_is_continued(state_bits: int, paged: bool) -> None:
    # A second group with options of its own; one state is large enough for pages.
    shapes = ((100, 90), (30, 7))
    theirs = [parameter(*shape) for shape in shapes]
    groups = [{"params": [theirs[0]]}, {"params": [theirs[1]], "lr": 0.003, "weight_decay": 0.3}]
    torchs = torch.optim.AdamW(groups, **OPTIONS)
    take_steps(torchs, range(5))
    ours = [nn.Parameter(p.detach().clone()) for p in theirs]
    groups = [{"params": [param]} for param in ours]
    optimizer = AdamW(groups, lr=7.0, state_bits=state_bits, paged=paged)
    optimizer.load_state_dict(copy.deepcopy(torchs.state_dict()))
    assert [optimizer.state[param]["step"] for param in ours] == [5, 5]
    take_steps(optimizer, range(5, 50))
    take_steps(torchs, range(5, 50))
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=FIFTY_STEPS, atol=FIFTY_STEPS)


@pytest.mark.parametrize("paged", (False, True))
def test_torch_continues_a_state_of_32_bits(paged: bool) -> None:
    ours = parameter(100, 90)
    optimizer = AdamW([ours], paged=paged, **OPTIONS)
    take_steps(optimizer, range(5))
    theirs = nn.Parameter(ours.detach().clone())
    torchs = torch.optim.AdamW([theirs], lr=7.0)
    torchs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    take_steps(optimizer, range(5, 50))
    take_steps(torchs, range(5, 50))
    torch.testing.assert_close(ours, theirs, rtol=FIFTY_STEPS, atol=FIFTY_STEPS)


def test_moments_that_torch_kept_in_bfloat16_are_taken_as_they_are() -> None:
    param = nn.Parameter(normal(40, 30).bfloat16())
    torchs = torch.optim.AdamW([param], **OPTIONS)
    param.grad = normal(40, 30, seed=1).bfloat16()
    torchs.step()
    optimizer = AdamW([param])
    optimizer.load_state_dict(torchs.state_dict())
    assert_same_bits(optimizer.state[param]["exp_avg"], torchs.state[param]["exp_avg"].float())
