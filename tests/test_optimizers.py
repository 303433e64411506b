"""The rules of optimizers.py beside torch.optim, the installed bitsandbytes and a definition."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from compare import normal
from torch import Tensor, nn

from qlora_ref import codebooks
from qlora_ref.integrations.bitsandbytes import optim as ours
from qlora_ref.optimizers import RULES, RuleOptimizer

STEPS = 6
DECAY = {"lr": 1e-2, "weight_decay": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "SGD": {**DECAY, "momentum": 0.9},
    "RMSprop": {**DECAY, "alpha": 0.9},
    "Adagrad": DECAY,
    "Lion": DECAY,
    "AdEMAMix": DECAY,
    "LARS": {**DECAY, "momentum": 0.9},
    "LAMB": DECAY,
    "Adam": DECAY,
}
EIGHT_BITS = [name for name in CASES if name != "Adam"]
# Each step rounds the parameter, about 1, and a step of about 0.01 a few times.
ROUNDINGS = STEPS * 4 * 2.0**-24


def gradients() -> list[Tensor]:
    return [normal(40, 130, seed=seed) for seed in range(1, STEPS + 1)]


def run(cls: Any, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Tensor, Any]:
    param = nn.Parameter(normal(40, 130, seed=0).to(dtype))
    optimizer = cls([param], **options)
    for grad in gradients():
        param.grad = grad.to(dtype)
        optimizer.step()
    return param.detach(), optimizer


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_bitsandbytes(name: str) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes==0.50.2")
    expected = run(getattr(bnb.optim, name), **CASES[name])[0]
    found = run(getattr(ours, name), **CASES[name])[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=8 * ROUNDINGS)


@pytest.mark.parametrize("name", ["LARS", "LAMB"])
@pytest.mark.parametrize("bound", [0.005, 100.0])
def test_long_steps_are_cut_down_as_in_bitsandbytes(name: str, bound: float) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes==0.50.2")
    options = {**CASES[name], "max_unorm": bound}
    expected = run(getattr(bnb.optim, name), **options)[0]
    found = run(getattr(ours, name), **options)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=8 * ROUNDINGS)
    free = run(getattr(ours, name), **{**options, "max_unorm": 1e9})[0]
    assert torch.equal(found, free) == (bound == 100.0)


def test_a_direction_of_zeros_moves_nothing() -> None:
    for optimizer in (ours.LAMB, ours.LARS):
        param = nn.Parameter(normal(64))
        before = param.detach().clone()
        param.grad = torch.zeros_like(param)
        optimizer([param], lr=0.1, **({"momentum": 0.9} if optimizer is ours.LARS else {})).step()
        assert torch.equal(param, before)


@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adagrad"])
def test_steps_are_those_of_torch(name: str) -> None:
    expected = run(getattr(torch.optim, name), **CASES[name])[0]
    found = run(getattr(ours, name), **CASES[name])[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=8 * ROUNDINGS)


def by_definition(rule: str, options: dict[str, Any]) -> Tensor:
    """The same steps on numbers in float64, as the papers write them."""
    p, grads = normal(40, 130, seed=0).double(), [g.double() for g in gradients()]
    lr, decay = options["lr"], options["weight_decay"]
    m, s, v = (torch.zeros_like(p) for _ in range(3))
    for t, g in enumerate(grads, start=1):
        if rule == "lion":
            p = p * (1 - lr * decay) - lr * torch.sign(0.9 * m + 0.1 * g)
            m = 0.99 * m + 0.01 * g
        else:
            m, s, v = 0.9 * m + 0.1 * g, 0.9999 * s + 0.0001 * g, 0.999 * v + 0.001 * g * g
            root = (v / (1 - 0.999**t)).sqrt() + 1e-8
            p = p * (1 - lr * decay) - lr * (m / (1 - 0.9**t) + 5 * s) / root
    return p


@pytest.mark.parametrize("name", ["Lion", "AdEMAMix"])
def test_steps_are_those_of_the_papers(name: str) -> None:
    expected = by_definition(name.lower(), CASES[name])
    found = run(getattr(ours, name), **CASES[name])[0]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=8 * ROUNDINGS)


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_8_bit_moments_are_the_nearest_levels_after_each_step(name: str) -> None:
    param = nn.Parameter(normal(40, 130, seed=0))
    eight = getattr(ours, f"{name}8bit")([param], **CASES[name])
    for grad in gradients():
        twin = nn.Parameter(param.detach().clone())
        exact = getattr(ours, f"{name}32bit")([twin], **CASES[name])
        if eight.state[param]:
            exact.state[twin] = restored(eight, param)
        param.grad, twin.grad = grad, grad.clone()
        eight.step()
        exact.step()
        assert torch.equal(param, twin)  # the step itself is in float32
        for moment, signed in eight.rule.signed.items():
            levels = codebooks.dynamic_codebook(signed)
            expected = exact.state[twin][moment].flatten()
            blocks = nn.functional.pad(expected, (0, -expected.numel() % 256)).view(-1, 256)
            absmax = blocks.abs().amax(1)
            assert torch.equal(eight.state[param][f"{moment}_absmax"], absmax)
            scaled = (blocks / absmax.unsqueeze(1)).flatten()[: expected.numel()].double()
            codes = eight.state[param][moment].flatten().int()
            nearest = (scaled.unsqueeze(1) - levels.double()).abs().amin(1)
            # The quantiser multiplies by a rounded reciprocal: 1.5 units off, on either side.
            assert ((levels[codes].double() - scaled).abs() <= nearest + 3 * 2.0**-24).all()


def restored(optimizer: RuleOptimizer, param: Tensor) -> dict[str, Any]:
    """The state by name, with moments in float32 as their codes say."""
    state = optimizer.state[param]
    found: dict[str, Any] = {"step": state["step"]}
    for moment, signed in optimizer.rule.signed.items():
        levels = codebooks.dynamic_codebook(signed)[state[moment].flatten().int()]
        scales = state[f"{moment}_absmax"].repeat_interleave(256)[: levels.numel()]
        found[moment] = (levels * scales).reshape(param.shape)
    return found


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_small_parameters_keep_32_bits(name: str) -> None:
    param = nn.Parameter(normal(64, 63))
    optimizer = getattr(ours, f"{name}8bit")([param], **CASES[name])
    param.grad = torch.ones_like(param)
    optimizer.step()
    moment = next(iter(optimizer.rule.signed))
    assert optimizer.state[param][moment].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_16_bits_are_rounded_once_a_step(dtype: torch.dtype) -> None:
    param = nn.Parameter(normal(40, 130, seed=0).to(dtype))
    wide = nn.Parameter(param.detach().float())
    options = CASES["Lion"]
    narrow, exact = ours.Lion([param], **options), ours.Lion([wide], **options)
    for grad in gradients():
        param.grad, wide.grad = grad.to(dtype), grad.to(dtype).float()
        narrow.step()
        exact.step()
        assert torch.equal(param, wide.to(dtype))
        wide.data.copy_(param)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("rule", RULES)
def test_training_goes_on_from_a_saved_state(rule: str, bits: int) -> None:
    betas = (0.9, 0.99, 0.999)[: 2 if rule in ("lion", "lamb") else 3]
    param = nn.Parameter(normal(40, 130, seed=0).bfloat16())
    options: dict[str, Any] = {"lr": 1e-2, "betas": betas, "state_bits": bits}
    optimizer = RuleOptimizer([param], rule, **options)
    other, saved = None, io.BytesIO()
    for number, grad in enumerate(gradients()):
        if number == 3:
            twin = nn.Parameter(param.detach().clone())
            torch.save(optimizer.state_dict(), saved)
            saved.seek(0)
            other = RuleOptimizer([twin], rule, **options)
            other.load_state_dict(torch.load(saved))
        param.grad = grad.bfloat16()
        optimizer.step()
        if other is not None:
            twin.grad = grad.bfloat16()
            other.step()
    assert torch.equal(param, twin)
    with pytest.raises(ValueError, match="another model or rule"):
        RuleOptimizer([nn.Parameter(normal(3))], rule, **options).load_state_dict(
            copy.deepcopy(optimizer.state_dict())
        )


@pytest.mark.parametrize(
    "options, match",
    [
        ({"rule": "adam"}, "rule must be one of"),
        ({"lr": -1.0}, "lr must be at least 0, got -1.0"),
        ({"lr": float("nan")}, "lr must be at least 0, got nan"),
        ({"betas": (1.0,)}, "betas must be"),
        ({"state_bits": 16}, "state_bits must be 32 or 8, got 16"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        RuleOptimizer([nn.Parameter(normal(4))], **{"rule": "lion", "lr": 1e-2, **options})


@pytest.mark.parametrize(
    "name, options",
    [
        ("SGD", {"lr": 0.1}),
        ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        ("RMSprop", {"centered": True}),
        ("Adagrad", {"lr_decay": 0.1}),
        ("AdEMAMix", {"t_alpha": 100}),
        ("Lion", {"is_paged": True}),
        ("LAMB", {"bias_correction": False}),
        ("LARS", {"lr": 0.1}),
        ("PagedLion", {}),
    ],
)
def test_what_is_not_available_says_so(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match="available|use torch.optim.SGD"):
        getattr(ours, name)([nn.Parameter(normal(4))], **options)
