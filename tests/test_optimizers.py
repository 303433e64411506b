"""The rules of optimizers.py beside torch.optim, the installed bitsandbytes and a definition."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import normal
from torch import Tensor, nn

from qlora_ref import codebooks
from qlora_ref.integrations.bitsandbytes import optim as ours
from qlora_ref.optimizer_rules import RULES
from qlora_ref.optimizers import RuleOptimizer
from qlora_ref.paging.files import PageFile

STEPS = 6
DECAY = {"lr": 1e-2, "weight_decay": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "SGD": {**DECAY, "momentum": 0.9},
    "RMSprop": {**DECAY, "alpha": 0.9},
    "Adagrad": DECAY,
    "Lion": DECAY,
    "AdEMAMix": DECAY,
    "AdEMAMix-warm": {**DECAY, "t_alpha": 4, "t_beta3": 4},
    "LARS": {**DECAY, "momentum": 0.9},
    "LAMB": DECAY,
    "Adam": DECAY,
}
EIGHT_BITS = [name for name in CASES if name not in ("Adam", "AdEMAMix-warm")]
PAGED = ["Lion", "AdEMAMix"]  # by name; others with RuleOptimizer(..., paged=True)
SOURCES_BETAS: dict[str, tuple[float, ...]] = {
    "momentum": (0.9,),
    "rmsprop": (0.9,),
    "adagrad": (),
    "lion": (0.9, 0.99),
    "lars": (0.9,),
    "lamb": (0.9, 0.999),
    "ademamix": (0.9, 0.999, 0.9999),
}
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
    optimizer = name.partition("-")[0]
    expected = run(getattr(bnb.optim, optimizer), **CASES[name])[0]
    found = run(getattr(ours, optimizer), **CASES[name])[0]
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
        for moment, signed in moments_of(eight).items():
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


def moments_of(optimizer: RuleOptimizer) -> dict[str, bool]:
    return RULES[optimizer.defaults["rule"]].signed


def restored(optimizer: RuleOptimizer, param: Tensor) -> dict[str, Any]:
    """The state by name, with moments in float32 as their codes say."""
    state = optimizer.state[param]
    found: dict[str, Any] = {"step": state["step"]}
    for moment, signed in moments_of(optimizer).items():
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
    moment = next(iter(moments_of(optimizer)))
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
    param = nn.Parameter(normal(40, 130, seed=0).bfloat16())
    options: dict[str, Any] = {"lr": 1e-2, "state_bits": bits}
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
    with pytest.raises(ValueError, match="another model"):
        RuleOptimizer([nn.Parameter(normal(3))], rule, **options).load_state_dict(
            copy.deepcopy(optimizer.state_dict())
        )


def test_a_state_of_another_rule_is_refused() -> None:
    lion, other = (RuleOptimizer([nn.Parameter(normal(4))], r, lr=0.1) for r in ("lion", "adagrad"))
    with pytest.raises(ValueError, match=r"of the rule \['adagrad'\].*\['lion'\]"):
        lion.load_state_dict(other.state_dict())


# Paged.


OTHER_STATES = ((8, torch.bfloat16), (32, torch.float32))


def large_parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    """Several pages' worth, with a short last block, and one that is not paged."""
    shapes = ((700, 601), (513, 512), (40, 30))
    return [nn.Parameter(normal(*shape, seed=n).to(dtype)) for n, shape in enumerate(shapes)]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    for number, param in enumerate(params):
        param.grad = normal(*param.shape, seed=10 * step + number).to(param.dtype)


@pytest.mark.parametrize(
    "bits, dtype",
    [
        *((8, torch.float32), (32, torch.bfloat16)),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in OTHER_STATES),
    ],
)
@pytest.mark.parametrize("rule", RULES)
def test_a_paged_state_gives_the_bits_of_one_in_memory(
    tmp_path: Path, rule: str, bits: int, dtype: torch.dtype
) -> None:
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "state_bits": bits}
    options["max_unorm"] = 0.02  # every step of lars and lamb is longer, and cut down
    pages = {"paged": "file", "resident_bytes": 1 << 20, "page_directory": tmp_path}
    plain, paged = (
        RuleOptimizer(large_parameters(dtype), rule, **options, **more) for more in ({}, pages)
    )
    for step in range(3):
        for optimizer in (plain, paged):
            set_gradients(optimizer.param_groups[0]["params"], step)
            optimizer.step()
    report = paged.paging_report()
    assert report is not None and report.streamed_bytes > 0
    for one, other in zip(*(o.param_groups[0]["params"] for o in (plain, paged))):
        assert torch.equal(one, other)
    states = [o.state_dict()["state"] for o in (plain, paged)]
    for key, state in states[0].items():
        assert state.keys() == states[1][key].keys()
        for name, value in state.items():
            same = torch.equal if isinstance(value, Tensor) else lambda a, b: a == b
            assert same(value, states[1][key][name])
    again = RuleOptimizer(large_parameters(dtype), rule, **options, **pages)
    again.load_state_dict(plain.state_dict())
    for one, other in zip(*(o.param_groups[0]["params"] for o in (paged, again))):
        other.data.copy_(one)
    for optimizer in (paged, again):
        set_gradients(optimizer.param_groups[0]["params"], 3)
        optimizer.step()
    for one, other in zip(*(o.param_groups[0]["params"] for o in (paged, again))):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bits", ["", "32bit", "8bit"])
@pytest.mark.parametrize("name", PAGED)
def test_the_paged_ones_under_bitsandbytes_names_page(name: str, bits: str) -> None:
    params = large_parameters(torch.float32)
    optimizer = getattr(ours, f"Paged{name}{bits}")(params)
    set_gradients(params, 0)
    optimizer.step()
    report = optimizer.paging_report()
    count = {"Lion": 1, "AdEMAMix": 3}[name]
    values = params[0].numel() + params[1].numel()
    width = 1 + 4 / 256 if bits == "8bit" else 4
    assert report.state_bytes == pytest.approx(count * width * values, rel=0.01)


@pytest.mark.parametrize("rule", ["lars", "lamb"])
def test_a_paged_step_is_cut_down_by_the_norms_of_whole_parameters(
    tmp_path: Path, rule: str
) -> None:
    param = nn.Parameter(normal(700, 601, seed=0))
    betas = (0.0,) if rule == "lars" else (0.0, 0.0)
    pages = {"paged": "file", "resident_bytes": 1 << 20, "page_directory": tmp_path}
    optimizer = RuleOptimizer([param], rule, 0.5, betas, max_unorm=0.02, **pages)
    # Larger in each row than in the one before: no part is like the whole.
    param.grad = normal(700, 601, seed=1) * torch.arange(1, 701)[:, None]
    before = param.detach().double()
    # Without momentum lars goes along the gradient, and lamb along its signs.
    direction = param.grad.double() if rule == "lars" else param.grad.double().sign()
    optimizer.step()
    expected = before - 0.5 * 0.02 * before.norm() * direction / direction.norm()
    # eps beside gradients of 1e-4 and more, and float32's rounding of values of at most 5.
    torch.testing.assert_close(param.double(), expected, rtol=0, atol=1e-4 * 0.02 + 5 * 2.0**-23)


@pytest.mark.parametrize("rule", ["lars", "lamb"])
def test_a_disk_that_fails_while_norms_are_taken_changes_nothing(
    tmp_path: Path, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = {"paged": "file", "resident_bytes": 1 << 20, "page_directory": tmp_path}
    params, plain = large_parameters(torch.float32), large_parameters(torch.float32)
    paged = RuleOptimizer(params, rule, 1e-2, **pages)
    expected = RuleOptimizer(plain, rule, 1e-2)
    for step in range(3):
        set_gradients(params, step)
        set_gradients(plain, step)
        if step == 1:
            with monkeypatch.context() as broken:
                broken.setattr(PageFile, "read", fail)
                with pytest.raises(OSError, match="as they were before the step"):
                    paged.step()
        paged.step()
        expected.step()
    assert all(torch.equal(one, other) for one, other in zip(params, plain))


def fail(*arguments: Any) -> None:
    raise OSError(5, "no such sector")


@pytest.mark.parametrize(
    "options, match",
    [
        ({"rule": "adam"}, "rule must be one of"),
        ({"lr": -1.0}, "lr must be at least 0, got -1.0"),
        ({"lr": float("nan")}, "lr must be at least 0, got nan"),
        ({"betas": (0.9, 1.0)}, "betas must be at least 0 and below 1, got"),
        ({"betas": (0.9,)}, "betas must hold 2 numbers, got"),
        ({"rule": "ademamix", "betas": (0.9, 0.999)}, "betas must hold 3 numbers, got"),
        ({"rule": "adagrad", "betas": (0.9,)}, "betas must hold 0 numbers, got"),
        ({"state_bits": 16}, "state_bits must be 32 or 8, got 16"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        RuleOptimizer([nn.Parameter(normal(4))], **{"rule": "lion", "lr": 1e-2, **options})


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("rule", RULES)
def test_without_betas_a_rule_has_its_own(rule: str, bits: int) -> None:
    params = [nn.Parameter(normal(40, 130)) for _ in range(2)]
    for param, given in zip(params, ({}, {"betas": SOURCES_BETAS[rule]})):
        param.grad = normal(40, 130, seed=1)
        RuleOptimizer([param], rule, lr=1e-2, state_bits=bits, **given).step()
    assert not torch.equal(params[0], normal(40, 130))
    assert torch.equal(*params)


@pytest.mark.parametrize(
    "name, options",
    [
        ("SGD", {"lr": 0.1}),
        ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        ("RMSprop", {"centered": True}),
        ("Adagrad", {"lr_decay": 0.1}),
        ("LAMB", {"bias_correction": False}),
        ("LARS", {"lr": 0.1}),
        ("PytorchLARS", {}),
    ],
)
def test_what_is_not_available_says_so(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match="available|use torch.optim.SGD"):
        getattr(ours, name)([nn.Parameter(normal(4))], **options)
