"""adamw_step against its definition, bit for bit, with 32-bit and with 8-bit moments."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from compare import (
    DTYPES,
    assert_same_bits,
    define_adamw,
    define_adamw_8bit,
    normal,
    random_bytes,
    with_threads,
)
from torch import Tensor

from qlora_ref import codebooks
from qlora_ref.ops import adamw_step

OPERATION = "adamw_step"

BOTH = (codebooks.dynamic_codebook(signed=True), codebooks.dynamic_codebook(signed=False))
ANY_ORDER = random_bytes(256).argsort(stable=True)
ZERO_CODES = (127, 0)  # of the signed and of the unsigned map

OPTIONS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
OTHER_OPTIONS = {"lr": 0.3, "beta1": 0.0, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.5}

SHAPES = ((), (0,), (1,), (255,), (256,), (257,), (3, 201))
STEPS = 4

# A step rounds a parameter below 8 twice (decay, update), by at most 2^-22 each, in our formula and
# in torch's; the update itself, lr in size, is rounded a thousand times finer.
TORCH_STEPS = 50
TORCH_ABSOLUTE = TORCH_STEPS * 2 * 2 * 2.0**-22


class State8bit:
    """Zero 8-bit moments of one parameter, as the arguments of adamw_step."""

    def __init__(self, param: Tensor) -> None:
        blocks = -(-param.numel() // 256)
        self.moments = [torch.full(param.shape, zero).to(torch.uint8) for zero in ZERO_CODES]
        self.absmaxes = [torch.zeros(blocks), torch.zeros(blocks)]

    def to(self, device: str) -> State8bit:
        self.moments = [moment.to(device, copy=True) for moment in self.moments]
        self.absmaxes = [absmax.to(device, copy=True) for absmax in self.absmaxes]
        return self

    def arguments(self) -> tuple:
        lists = [[tensor] for tensor in (*self.moments, *self.absmaxes)]
        return *lists, *(table.to(self.moments[0].device) for table in BOTH)


def zero_moments(param: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros(param.shape), torch.zeros(param.shape)


def gradients(shape: tuple, dtype: torch.dtype, steps: int = STEPS) -> list[Tensor]:
    return [normal(*shape, seed=10 + step, dtype=dtype) for step in range(steps)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [OPTIONS, OTHER_OPTIONS], ids=["usual", "other"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_definition_bit_for_bit(
    dtype: torch.dtype, options: dict, shape: tuple, device: str
) -> None:
    expected = [normal(*shape, dtype=dtype), *zero_moments(torch.empty(shape))]
    actual = [tensor.to(device, copy=True) for tensor in expected]
    for step, grad in enumerate(gradients(shape, dtype), start=1):
        param, m, v = ([tensor] for tensor in actual)
        adamw_step(param, [grad.to(device)], m, v, **options, step=step)
        expected = define_adamw(expected[0], grad, *expected[1:], **options, step=step)
        for changed, wanted in zip(actual, expected, strict=True):
            assert_same_bits(changed, wanted)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [OPTIONS, OTHER_OPTIONS], ids=["usual", "other"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_8bit_moments_match_the_definition_bit_for_bit(
    dtype: torch.dtype, options: dict, shape: tuple, device: str
) -> None:
    wanted = normal(*shape, dtype=dtype)
    param, state = wanted.to(device, copy=True), State8bit(wanted).to(device)
    moments, absmaxes = State8bit(wanted).moments, State8bit(wanted).absmaxes
    for step, grad in enumerate(gradients(shape, dtype), start=1):
        adamw_step([param], [grad.to(device)], *state.arguments(), **options, step=step)
        wanted, moments, absmaxes = define_adamw_8bit(
            wanted, grad, moments, absmaxes, BOTH, **options, step=step
        )
        assert_same_bits(param, wanted)
        pairs = zip(state.moments + state.absmaxes, moments + absmaxes, strict=True)
        for changed, defined in pairs:
            assert_same_bits(changed, defined)


# Of 300 values the last block has 44, which fill no vector: codes beyond them stand for nothing,
# not for the levels of code 0, which are large here.
@pytest.mark.parametrize("places", [torch.arange(256).flip(0), ANY_ORDER], ids=["falling", "any"])
def test_8bit_moments_in_any_codebooks_match_the_definition(places: Tensor, device: str) -> None:
    tables = [table[places].clone() for table in BOTH]
    before, grad = normal(300), normal(300, seed=1)
    moments = [random_bytes(300, seed=seed) for seed in (2, 3)]
    absmaxes = [normal(2, seed=seed).abs() for seed in (4, 5)]
    lists = [[t.to(device, copy=True)] for t in (before, grad, *moments, *absmaxes)]
    adamw_step(*lists, *(table.to(device) for table in tables), **OPTIONS, step=2)
    wanted = define_adamw_8bit(before, grad, moments, absmaxes, tables, **OPTIONS, step=2)
    actual = [tensor for i, [tensor] in enumerate(lists) if i != 1]
    for changed, defined in zip(actual, (wanted[0], *wanted[1], *wanted[2]), strict=True):
        assert_same_bits(changed, defined)


@pytest.mark.parametrize("step", [1, 2, 1000, 10**6])
def test_any_state_at_any_step_matches_the_definition(step: int, device: str) -> None:
    before = [normal(300, seed=1), normal(300, seed=2), normal(300, seed=3).square()]
    grad = normal(300, seed=4) * 100
    param, m, v = ([tensor.to(device, copy=True)] for tensor in before)
    adamw_step(param, [grad.to(device)], m, v, **OPTIONS, step=step)
    wanted = define_adamw(before[0], grad, *before[1:], **OPTIONS, step=step)
    for changed, defined in zip((*param, *m, *v), wanted, strict=True):
        assert_same_bits(changed, defined)


@pytest.mark.parametrize("value", [1e-30, 1e-42, 3e19, 3e38, math.inf, math.nan])
def test_extreme_gradients_match_the_definition(value: float, device: str) -> None:
    grad, before = torch.tensor([value, -value, 1.0, 0.0]), normal(4)
    param, m, v = ([t.to(device, copy=True)] for t in (before, *zero_moments(before)))
    adamw_step(param, [grad.to(device)], m, v, **OPTIONS, step=1)
    wanted = define_adamw(before, grad, *zero_moments(before), **OPTIONS, step=1)
    for changed, defined in zip((*param, *m, *v), wanted, strict=True):
        assert_same_bits(changed, defined)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_may_have_another_dtype_than_its_parameter(
    dtype: torch.dtype, device: str
) -> None:
    before, grad = normal(70, dtype=torch.bfloat16), normal(70, seed=1, dtype=dtype)
    param, m, v = ([t.to(device, copy=True)] for t in (before, *zero_moments(before)))
    adamw_step(param, [grad.to(device)], m, v, **OPTIONS, step=1)
    wanted, *_ = define_adamw(before, grad, *zero_moments(before), **OPTIONS, step=1)
    assert_same_bits(param[0], wanted)


def test_fifty_steps_stay_beside_those_of_torch(device: str) -> None:
    ours, theirs = normal(500).to(device), normal(500).requires_grad_()
    optimizer = torch.optim.AdamW(
        [theirs], OPTIONS["lr"], (OPTIONS["beta1"], OPTIONS["beta2"]), weight_decay=0.01
    )
    m, v = (tensor.to(device) for tensor in zero_moments(theirs))
    for step, grad in enumerate(gradients((500,), torch.float32, TORCH_STEPS), start=1):
        adamw_step([ours], [grad.to(device)], [m], [v], **OPTIONS, step=step)
        theirs.grad = grad
        optimizer.step()
    assert theirs.abs().max() < 8
    assert (ours.cpu() - theirs).abs().max() <= TORCH_ABSOLUTE
    assert (ours.cpu() - normal(500)).abs().mean() > OPTIONS["lr"]  # they have moved


# Zeros.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 32])
def test_zero_gradients_move_nothing(bits: int, dtype: torch.dtype, device: str) -> None:
    before = torch.cat([normal(300, dtype=dtype), torch.tensor([0.0, -0.0]).to(dtype)])
    param, grad = before.to(device, copy=True), torch.zeros(302, dtype=dtype, device=device)
    state = State8bit(before).to(device).arguments()
    if bits == 32:
        state = [[moment.to(device)] for moment in zero_moments(before)]
    for step in range(1, STEPS):
        adamw_step([param], [grad], *state, **(OPTIONS | {"weight_decay": 0.0}), step=step)
    assert_same_bits(param, before)


def test_without_gradient_a_parameter_only_decays(device: str) -> None:
    before = normal(100)
    param, zero = before.to(device, copy=True), torch.zeros(100, device=device)
    adamw_step([param], [zero], [zero.clone()], [zero.clone()], **OPTIONS, step=1)
    assert_same_bits(param, before * (1 - 1e-3 * 0.01))


def test_8bit_moments_of_weights_without_gradient_stay_zero(device: str) -> None:
    before = normal(600)
    param, state = before.to(device, copy=True), State8bit(before).to(device)
    still = torch.arange(600) % 3 == 0  # in blocks whose other gradients are large
    for step in range(1, STEPS):
        grad = normal(600, seed=step).masked_fill(still, 0.0).to(device)
        options = OPTIONS | {"weight_decay": 0.0, "step": step}
        adamw_step([param], [grad], *state.arguments(), **options)
    for moment, zero in zip(state.moments, ZERO_CODES, strict=True):
        assert moment.cpu()[still].unique().tolist() == [zero]
    assert_same_bits(param.cpu()[still], before[still])
    assert (param.cpu()[~still] != before[~still]).all()


# Lists, views, threads.


@pytest.mark.parametrize("bits", [8, 32])
def test_a_list_is_updated_as_each_alone(bits: int, device: str) -> None:
    befores = [normal(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    grads = [normal(*shape, seed=i + 50).to(device) for i, shape in enumerate(SHAPES)]

    def arguments(before: Tensor) -> tuple:
        if bits == 8:
            return State8bit(before).to(device).arguments()
        return tuple([moment.to(device)] for moment in zero_moments(before))

    alone = [before.to(device, copy=True) for before in befores]
    for param, grad in zip(alone, grads, strict=True):
        adamw_step([param], [grad], *arguments(param), **OPTIONS, step=1)
    together = [before.to(device, copy=True) for before in befores]
    lists = zip(*(arguments(before)[: 4 if bits == 8 else 2] for before in befores), strict=True)
    merged = [[tensor for (tensor,) in tensors] for tensors in lists]
    tables = [table.to(device) for table in BOTH] if bits == 8 else []
    adamw_step(together, grads, *merged, *tables, **OPTIONS, step=1)
    for one, other in zip(together, alone, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize(
    "threads", [1, *(pytest.param(count, marks=pytest.mark.threads) for count in (2, 3))]
)
def test_a_list_of_several_dtypes_is_updated_as_each_alone(
    threads: int, bits: int, device: str
) -> None:
    sizes = (70_000, 0, 1, 256, 5_000, 255)
    # Over the sizes each type of parameter meets each type of gradient.
    kinds = [
        (n, DTYPES[j], DTYPES[(i + j) % len(DTYPES)])
        for i, n in enumerate(sizes)
        for j in range(len(DTYPES))
    ]
    lists: list[list] = [[], [], [], [], [], []]  # as adamw_step takes them
    tables = [table.to(device) for table in BOTH] if bits == 8 else []
    for seed, (n, dtype, grad_dtype) in enumerate(kinds):
        param = normal(n, seed=seed, dtype=dtype).to(device)
        grad = normal(n, seed=seed + 100, dtype=grad_dtype).to(device)
        state = State8bit(param).to(device)
        moments = [moment.to(device) for moment in zero_moments(param)]
        tensors = [*state.moments, *state.absmaxes] if bits == 8 else moments
        for collected, tensor in zip(lists, (param, grad, *tensors), strict=False):
            collected.append(tensor)
    together = [[tensor.clone() for tensor in tensors] for tensors in lists]
    with_threads([threads], lambda: adamw_step(*together, *tables, **OPTIONS, step=1))
    for i in range(len(kinds)):
        adamw_step(*([t[i]] if t else [] for t in lists), *tables, **OPTIONS, step=1)
    for one, other in zip(itertools.chain(*together), itertools.chain(*lists), strict=True):
        assert_same_bits(one, other)


def test_a_parameter_listed_twice_is_refused() -> None:
    param, other = normal(10), normal(10)
    lists = [[normal(10, seed=i), normal(10, seed=i + 3)] for i in range(2)]
    with pytest.raises(ValueError, match="a parameter is listed twice"):
        adamw_step([param, param], [other, other], *lists, **OPTIONS, step=1)


def test_an_empty_list_is_nothing_to_do() -> None:
    adamw_step([], [], [], [], **OPTIONS, step=1)


def test_gradient_may_be_a_view_and_is_left_alone(device: str) -> None:
    before, grad = normal(30, 20), normal(20, 30, seed=1).t()
    param, m, v = ([t.to(device, copy=True)] for t in (before, *zero_moments(before)))
    on_device = grad.to(device)
    adamw_step(param, [on_device], m, v, **OPTIONS, step=1)
    wanted, *_ = define_adamw(before, grad, *zero_moments(before), **OPTIONS, step=1)
    assert_same_bits(param[0], wanted)
    assert_same_bits(on_device, grad)


def test_a_parameter_that_requires_grad_is_changed_in_place(device: str) -> None:
    param = normal(10).to(device).requires_grad_()
    version, address = param._version, param.data_ptr()
    m, v = (tensor.to(device) for tensor in zero_moments(param))
    with torch.no_grad():
        adamw_step([param], [torch.ones(10, device=device)], [m], [v], **OPTIONS, step=1)
    assert param.requires_grad and param.data_ptr() == address
    assert param._version > version  # autograd must know that what it saved is stale


@pytest.mark.threads
def test_does_not_depend_on_the_number_of_threads(device: str) -> None:
    before, grad = normal(400_001), normal(400_001, seed=1).to(device)

    def stepped() -> tuple[Tensor, ...]:
        param, state = before.to(device, copy=True), State8bit(before).to(device)
        adamw_step([param], [grad], *state.arguments(), **OPTIONS, step=1)
        return param, *state.moments, *state.absmaxes

    for one, two in zip(*with_threads((1, 2), stepped), strict=True):
        assert_same_bits(one, two)


@pytest.mark.parametrize("bits", [8, 32])
def test_operator_passes_opcheck(bits: int, device: str) -> None:
    params = [normal(300).to(device), normal(2, 3).to(device)]
    grads, options = [torch.ones_like(param) for param in params], tuple(OPTIONS.values())
    lists: list[list] = [[], [], [], []]
    for param in params:
        state = State8bit(param).to(device)
        tensors = [*state.moments, *state.absmaxes]
        if bits == 32:
            tensors = [torch.zeros_like(param), torch.zeros_like(param)]
        for collected, tensor in zip(lists, tensors, strict=False):
            collected.append(tensor)
    tables = [table.to(device) for table in BOTH] if bits == 8 else [None, None]
    operator = torch.ops.qlora_ref.adamw_step.default
    torch.library.opcheck(operator, (params, grads, *lists, *tables, *options, 1))


# Errors.

FLOATS = [torch.zeros(300)]
CODES = [random_bytes(300)]
EIGHT_BIT = {
    "first_moments": CODES,
    "second_moments": CODES,
    "first_absmaxes": [torch.ones(2)],
    "second_absmaxes": [torch.ones(2)],
    "first_codebook": BOTH[0],
    "second_codebook": BOTH[1],
}
STRIDED = [torch.zeros(600)[::2]]


@pytest.mark.parametrize(
    "changes,error,message",
    [
        (
            {"grads": []},
            ValueError,
            r"grads must have the shapes of params, \[\(300,\)\], got \[\]",
        ),
        ({"grads": [torch.ones(3)]}, ValueError, r"grads must have the shapes .* got \[\(3,\)\]"),
        ({"first_moments": [torch.ones(3)]}, ValueError, "first_moments must have the shapes"),
        ({"second_moments": FLOATS * 2}, ValueError, "second_moments must have the shapes"),
        ({"params": [FLOATS[0].double()]}, TypeError, "a parameter must be float32.*float64"),
        ({"grads": [FLOATS[0].double()]}, TypeError, "a gradient must be float32.*float64"),
        ({"params": STRIDED}, ValueError, "parameters are changed in place and must be contig"),
        ({"first_moments": STRIDED}, ValueError, "first_moments are changed in place"),
        ({"second_moments": STRIDED}, ValueError, "second_moments are changed in place"),
        (
            {"first_moments": CODES},
            TypeError,
            "first_moments must be torch.float32, got torch.uint8",
        ),
        ({"second_moments": [FLOATS[0].half()]}, TypeError, "second_moments must be torch.float32"),
        ({"step": 0}, ValueError, "step counts from 1, got 0"),
        ({"first_absmaxes": FLOATS}, ValueError, "scales without codebooks"),
        ({"second_absmaxes": FLOATS}, ValueError, "scales without codebooks"),
        ({"first_codebook": BOTH[0]}, ValueError, "8-bit moments need both codebooks, or none"),
        (EIGHT_BIT | {"first_codebook": None}, ValueError, "need both codebooks, or none"),
        (EIGHT_BIT | {"first_codebook": torch.ones(16)}, ValueError, r"first_codebook .* \(256,\)"),
        (EIGHT_BIT | {"second_codebook": torch.ones(16)}, ValueError, "second_codebook must have"),
        (EIGHT_BIT | {"first_moments": FLOATS}, TypeError, "first_moments must be torch.uint8"),
        (
            EIGHT_BIT | {"first_absmaxes": []},
            ValueError,
            "first_absmaxes must hold 1 tensors, got 0",
        ),
        (
            EIGHT_BIT | {"second_absmaxes": FLOATS},
            ValueError,
            "second_absmaxes must hold one scale",
        ),
        (EIGHT_BIT | {"first_absmaxes": CODES}, TypeError, "first_absmaxes must be torch.float32"),
    ],
)
def test_bad_arguments_are_refused(changes: dict, error: type, message: str) -> None:
    names = ("params", "grads", "first_moments", "second_moments")
    arguments = dict.fromkeys(names, FLOATS) | OPTIONS | {"step": 1}
    with pytest.raises(error, match=message):
        adamw_step(**(arguments | changes))
