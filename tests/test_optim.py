"""AdamW as an optimizer: torch's numbers, the definition's bits, its state, and its errors."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from compare import assert_same_bits, define_adamw, define_adamw_8bit, normal
from torch import Tensor, nn

from qlora_ref import AdamW
from qlora_ref.codebooks import dynamic_codebook

# A step moves a parameter by about lr. Both optimizers round it in float32 in another order, a few
# units of 2^-24 of it a step, and of the parameter (order 1) once a step: 50 steps, with room.
FIFTY_STEPS = 50 * 2.0**-23

# 600 values: two blocks of 256 and a short one of 88.
SHAPE = (25, 24)

OPTIONS = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(normal(*(shape or SHAPE), seed=seed, dtype=dtype))


def gradient(step: int, param: Tensor) -> Tensor:
    """Different at each step, over four decades within a block."""
    sizes = torch.logspace(-4, 0, param.numel()).reshape(param.shape)
    return (normal(*param.shape, seed=100 + step) * sizes).to(param.dtype)


def take_steps(optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = gradient(step, param)
        optimizer.step()


def tensors_of(optimizer: AdamW, param: Tensor) -> dict[str, Tensor]:
    return {k: v for k, v in optimizer.state[param].items() if isinstance(v, Tensor)}


def assert_same_state(one: AdamW, other: AdamW) -> None:
    """The same parameters, moments and counts, bit for bit."""
    for mine, theirs in zip(one.param_groups, other.param_groups):
        for p, q in zip(mine["params"], theirs["params"]):
            assert_same_bits(p, q)
            assert one.state[p]["step"] == other.state[q]["step"]
            assert one.state[p].keys() == other.state[q].keys()
            for name, tensor in tensors_of(one, p).items():
                assert_same_bits(tensor, other.state[q][name])


# The numbers.


@pytest.mark.parametrize("weight_decay", (0.0, 0.1))
def test_32bit_follows_torch_for_fifty_steps(weight_decay: float) -> None:
    ours, theirs, options = parameter(), parameter(), {**OPTIONS, "weight_decay": weight_decay}
    take_steps(AdamW([ours], **options), range(50))
    take_steps(torch.optim.AdamW([theirs], **options), range(50))
    torch.testing.assert_close(ours, theirs, rtol=FIFTY_STEPS, atol=FIFTY_STEPS)


def test_32bit_follows_the_float64_formula() -> None:
    param = parameter()
    p, m, v = param.detach().double().clone(), 0.0, 0.0
    (beta1, beta2), lr = OPTIONS["betas"], OPTIONS["lr"]
    optimizer = AdamW([param], **OPTIONS)
    for t in range(1, 51):
        take_steps(optimizer, range(t, t + 1))
        g = param.grad.double()
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        p = p - lr * (m_hat / (v_hat.sqrt() + OPTIONS["eps"]) + OPTIONS["weight_decay"] * p)
    torch.testing.assert_close(param.double(), p, rtol=FIFTY_STEPS, atol=FIFTY_STEPS)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_32bit_has_the_bits_of_the_definition(dtype: torch.dtype) -> None:
    param = parameter(dtype=dtype)
    optimizer = AdamW([param], **OPTIONS)
    p, m, v = param.detach().clone(), torch.zeros(SHAPE), torch.zeros(SHAPE)
    for step in range(1, 6):
        take_steps(optimizer, range(step, step + 1))
        p, m, v = define_adamw(p, param.grad, m, v, step=step, **definition_options())
        assert_same_bits(param, p)
        assert_same_bits(optimizer.state[param]["exp_avg"], m)
        assert_same_bits(optimizer.state[param]["exp_avg_sq"], v)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_8bit_has_the_bits_of_the_definition(dtype: torch.dtype) -> None:
    param = parameter(dtype=dtype)
    optimizer = AdamW([param], state_bits=8, **OPTIONS)
    codebooks = [dynamic_codebook(signed=True), dynamic_codebook(signed=False)]
    zeros = [codebook.tolist().index(0.0) for codebook in codebooks]
    codes = [torch.full(SHAPE, zero, dtype=torch.uint8) for zero in zeros]
    p, scales = param.detach().clone(), [torch.zeros(3), torch.zeros(3)]
    for step in range(1, 6):
        take_steps(optimizer, range(step, step + 1))
        options = {"step": step, **definition_options()}
        p, codes, scales = define_adamw_8bit(p, param.grad, codes, scales, codebooks, **options)
        assert_same_bits(param, p)
        for actual, expected in zip(tensors_of(optimizer, param).values(), (*codes, *scales)):
            assert_same_bits(actual, expected)


def definition_options() -> dict[str, float]:
    options = {name: OPTIONS[name] for name in ("lr", "eps", "weight_decay")}
    return {**options, "beta1": OPTIONS["betas"][0], "beta2": OPTIONS["betas"][1]}


@pytest.mark.parametrize("state_bits", (32, 8))
def test_zero_gradient_moves_nothing(state_bits: int) -> None:
    param = parameter()
    before, optimizer = (
        param.detach().clone(),
        AdamW([param], weight_decay=0, state_bits=state_bits),
    )
    for _ in range(3):
        param.grad = torch.zeros(SHAPE)
        optimizer.step()
    assert_same_bits(param, before)


@pytest.mark.parametrize("state_bits", (32, 8))
@pytest.mark.parametrize("shape", ((), (0,), (1,), (256,), (257,)), ids=str)
def test_first_step_is_the_sign_of_the_gradient(shape: tuple[int, ...], state_bits: int) -> None:
    # With eps = 0 and no decay: m / (1 - beta1) = g and v / (1 - beta2) = g^2.
    param = nn.Parameter(torch.zeros(shape))
    param.grad = normal(*shape, seed=1)
    AdamW([param], lr=0.25, eps=0, weight_decay=0, state_bits=state_bits).step()
    expected = -0.25 * param.grad.sign()
    torch.testing.assert_close(param.detach(), expected, rtol=2.0**-21, atol=0)  # a few roundings


# Groups, parameters without gradient, closures, schedulers.


def test_groups_have_options_of_their_own() -> None:
    settings = ({"lr": 0.01}, {"weight_decay": 0.5}, {"state_bits": 8}, {"betas": (0.5, 0.5)})
    together = [parameter(seed=i) for i in range(4)]
    groups = [{"params": [p], **options} for p, options in zip(together, settings)]
    optimizer = AdamW(groups, **OPTIONS)
    take_steps(optimizer, range(3))
    for i, options in enumerate(settings):
        alone = AdamW([parameter(seed=i)], **{**OPTIONS, **options})
        take_steps(alone, range(3))
        assert_same_bits(together[i], alone.param_groups[0]["params"][0])


def test_added_group_starts_at_its_own_first_step() -> None:
    first, late, alone = parameter(), parameter(seed=1), parameter(seed=1)
    optimizer = AdamW([first], **OPTIONS)
    take_steps(optimizer, range(2))
    optimizer.add_param_group({"params": [late], "state_bits": 8})
    take_steps(optimizer, range(2, 4))
    take_steps(AdamW([alone], state_bits=8, **OPTIONS), range(2, 4))
    assert_same_bits(late, alone)
    assert [optimizer.state[p]["step"] for p in (first, late)] == [4, 2]


def test_parameter_without_gradient_is_left_alone_and_not_counted() -> None:
    one, other = parameter(), parameter(seed=1)
    before, optimizer = other.detach().clone(), AdamW([one, other], **OPTIONS)
    for step in range(3):
        one.grad, other.grad = gradient(step, one), None
        optimizer.step()
    assert_same_bits(other, before)
    assert optimizer.state[one]["step"] == 3 and other not in optimizer.state
    other.grad = gradient(3, other)
    optimizer.step()  # now at steps 4 and 1
    alone = parameter(seed=1)
    take_steps(AdamW([alone], **OPTIONS), range(3, 4))
    assert_same_bits(other, alone)


def test_closure_is_called_once_with_gradients_on() -> None:
    param, calls = parameter(3), []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        loss = param.square().sum()
        loss.backward()
        return loss

    expected = param.detach().square().sum()
    assert_same_bits(AdamW([param]).step(closure), expected)
    assert calls == [True]


def test_scheduler_sets_the_learning_rate() -> None:
    param, alone = parameter(), parameter()
    optimizer, by_hand = AdamW([param], **OPTIONS), AdamW([alone], **OPTIONS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(3):
        by_hand.param_groups[0]["lr"] = OPTIONS["lr"] * (1 / (1 + step))
        take_steps(optimizer, range(step, step + 1))
        take_steps(by_hand, range(step, step + 1))
        scheduler.step()
    assert_same_bits(param, alone)


# The state.


@pytest.mark.parametrize("n", (1, 256, 600))
def test_bytes_of_the_state_are_the_closed_form(n: int) -> None:
    for state_bits, expected in ((32, 8 * n), (8, 2 * n + 8 * -(-n // 256))):
        param = parameter(n)
        optimizer = AdamW([param], state_bits=state_bits)
        take_steps(optimizer, range(1))
        assert (
            sum(t.numel() * t.itemsize for t in tensors_of(optimizer, param).values()) == expected
        )


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("state_bits", (32, 8))
def test_saved_state_continues_bit_for_bit(state_bits: int, dtype: torch.dtype) -> None:
    optimizer = AdamW([parameter(dtype=dtype)], state_bits=state_bits, **OPTIONS)
    take_steps(optimizer, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = AdamW([nn.Parameter(p.detach().clone()) for p in optimizer.param_groups[0]["params"]])
    twin.load_state_dict(torch.load(file))  # weights_only: nothing but tensors and numbers
    assert_same_state(twin, optimizer)
    take_steps(optimizer, range(3, 6))
    take_steps(twin, range(3, 6))
    assert_same_state(twin, optimizer)


def test_loaded_state_shares_no_storage_with_the_dictionary() -> None:
    optimizer = AdamW([parameter()], state_bits=8)
    take_steps(optimizer, range(1))
    twin, saved = AdamW([parameter()], state_bits=8), optimizer.state_dict()
    twin.load_state_dict(saved)
    before = copy.deepcopy(saved["state"][0])
    take_steps(twin, range(1, 3))
    for name, value in saved["state"][0].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(before[name]))


@pytest.mark.parametrize(("saved_bits", "new_bits"), ((8, 32), (32, 8)))
def test_saved_group_brings_its_state_bits_along(saved_bits: int, new_bits: int) -> None:
    optimizer = AdamW([parameter()], state_bits=saved_bits, **OPTIONS)
    take_steps(optimizer, range(2))
    twin = AdamW([copy.deepcopy(optimizer.param_groups[0]["params"][0])], state_bits=new_bits)
    twin.load_state_dict(optimizer.state_dict())  # as lr and all other options of a group do
    assert twin.param_groups[0]["state_bits"] == saved_bits
    take_steps(optimizer, range(2, 4))
    take_steps(twin, range(2, 4))
    assert_same_state(twin, optimizer)


@pytest.mark.parametrize("state_bits", (32, 8))
def test_state_of_another_model_is_an_error(state_bits: int) -> None:
    optimizer = AdamW([parameter(4, 6)], state_bits=state_bits)
    take_steps(optimizer, range(1))
    twin = AdamW([parameter(6, 4)], state_bits=state_bits)
    with pytest.raises(ValueError, match=r"of another model: .*\(6, 4\) meets a state of \(4, 6\)"):
        twin.load_state_dict(optimizer.state_dict())
    assert not twin.state
    with pytest.raises(ValueError):  # torch's own: another number of parameters
        AdamW([parameter(4, 6), parameter(2)]).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("state_bits", (32, 8))
def test_deepcopy_goes_its_own_way_with_the_same_bits(state_bits: int) -> None:
    optimizer = AdamW([parameter()], state_bits=state_bits, **OPTIONS)
    take_steps(optimizer, range(2))
    twin, untouched = copy.deepcopy(optimizer), copy.deepcopy(optimizer)
    take_steps(optimizer, range(2, 4))
    assert_same_state(twin, untouched)
    take_steps(twin, range(2, 4))
    assert_same_state(twin, optimizer)


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"lr": -1e-3}, "lr must be at least 0, got -0.001"),
        ({"lr": float("nan")}, "lr must be at least 0, got nan"),
        ({"eps": -1e-8}, "eps must be at least 0, got -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
        ({"betas": (0.9, 1.0)}, r"betas must be at least 0 and below 1, got \(0.9, 1.0\)"),
        ({"betas": (0.9,)}, r"betas must hold 2 numbers, got \(0.9,\)"),
        ({"betas": (-0.1, 0.9)}, "betas must be at least 0"),
        ({"state_bits": 16}, "state_bits must be 32 or 8, got 16"),
    ),
)
def test_bad_option_is_named_for_all_and_for_a_group(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW([parameter()], **options)
    with pytest.raises(ValueError, match=message):
        AdamW([{"params": [parameter()], **options}])
    optimizer = AdamW([parameter()])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [parameter()], **options})
    assert len(optimizer.param_groups) == 1


# A parameter that cannot be stepped, and its gradient.


def float64_parameter() -> tuple[nn.Parameter, Tensor]:
    return nn.Parameter(torch.ones(4, dtype=torch.float64)), torch.ones(4, dtype=torch.float64)


def transposed_parameter() -> tuple[nn.Parameter, Tensor]:
    return nn.Parameter(torch.ones(4, 6).t()), torch.ones(6, 4)


def sparse_gradient() -> tuple[nn.Parameter, Tensor]:
    return nn.Parameter(torch.ones(4)), torch.ones(4).to_sparse()


BAD = (
    (float64_parameter, TypeError, "a parameter must be float32, bfloat16 or float16, got .*64"),
    (transposed_parameter, ValueError, "parameters are changed in place and must be contiguous"),
    (sparse_gradient, ValueError, "dense gradients; use torch.optim.SparseAdam for sparse"),
)


@pytest.mark.parametrize(("make", "error", "message"), BAD)
def test_bad_parameter_is_refused_unchanged(
    make: Any, error: type[Exception], message: str
) -> None:
    bad, grad = make()
    bad.grad = grad
    before = bad.detach().clone()
    with pytest.raises(error, match=message):
        AdamW([bad]).step()
    assert torch.equal(bad, before)


@pytest.mark.parametrize(("make", "error", "message"), BAD)
@pytest.mark.parametrize("own_group", (False, True))
def test_bad_parameter_stops_the_step_before_any_other_moves(
    make: Any, error: type[Exception], message: str, own_group: bool
) -> None:
    good, (bad, grad) = parameter(), make()
    optimizer = AdamW([{"params": [good]}, {"params": [bad]}] if own_group else [good, bad])
    before = good.detach().clone()
    good.grad, bad.grad = gradient(0, good), grad
    with pytest.raises(error, match=message):
        optimizer.step()
    assert_same_bits(good, before)
    assert all(not state or state["step"] == 0 for state in optimizer.state.values())


# A state that was replaced, by its name, and what is said of it.
BAD_STATES = (
    (32, "exp_avg", Tensor.half, TypeError, "exp_avg must be torch.float32, got torch.float16"),
    (32, "exp_avg_sq", Tensor.t, ValueError, "exp_avg_sq must have the shapes of params"),
    (8, "exp_avg", Tensor.float, TypeError, "exp_avg must be torch.uint8, got torch.float32"),
    (8, "exp_avg_absmax", Tensor.half, TypeError, "exp_avg_absmax must be torch.float32"),
    (8, "exp_avg_sq_absmax", lambda x: x[:-1], ValueError, "600 values in blocks of 256 need 3"),
    (8, "exp_avg_absmax", lambda x: x.repeat(2)[::2], ValueError, "must be contiguous"),
    (8, "exp_avg_absmax", lambda x: None, TypeError, "must be a tensor, got NoneType"),
)


@pytest.mark.parametrize(("state_bits", "name", "replace", "error", "message"), BAD_STATES)
def test_bad_state_stops_the_step_before_any_parameter_moves(
    state_bits: int, name: str, replace: Any, error: type[Exception], message: str
) -> None:
    good, bad = parameter(seed=1), parameter(seed=2)
    optimizer = AdamW([{"params": [good]}, {"params": [bad]}], state_bits=state_bits)
    take_steps(optimizer, range(1))
    before = good.detach().clone()
    optimizer.state[bad][name] = replace(optimizer.state[bad][name])
    with pytest.raises(error, match=message):
        take_steps(optimizer, range(1, 2))
    assert_same_bits(good, before)
    assert [optimizer.state[param]["step"] for param in (good, bad)] == [1, 1]


@pytest.mark.parametrize("count", (torch.tensor(1.0), 1.0))
def test_a_count_of_steps_that_is_no_int_is_refused(count: Any) -> None:
    good, bad = parameter(seed=1), parameter(seed=2)
    optimizer = AdamW([{"params": [good]}, {"params": [bad]}])
    take_steps(optimizer, range(1))
    before = good.detach().clone()
    optimizer.state[bad]["step"] = count
    with pytest.raises(TypeError, match="step must be an int"):
        take_steps(optimizer, range(1, 2))
    assert_same_bits(good, before)
    assert optimizer.state[good]["step"] == 1 and optimizer.state[bad]["step"] == 1
