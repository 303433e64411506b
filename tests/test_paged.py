"""A paged AdamW is the unpaged one, bit for bit, whatever its users do to it."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_same_bits, normal
from torch import Tensor, nn

from qlora_ref import AdamW
from qlora_ref.optim import adamw_fields
from qlora_ref.paging.layout import state_bytes

OPTIONS: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}

# The least that is allowed: pages of 64 KiB, eight that stay and eight that the rest streams
# through. These shapes have 11 pages or more; the last one is too small to be paged.
SMALLEST = 1 << 20
SHAPES = ((700, 257), (128, 1024), (400, 401), (10,))


def make_params(shapes: Any = SHAPES, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [
        nn.Parameter(normal(*shape, seed=seed, dtype=dtype)) for seed, shape in enumerate(shapes)
    ]


def paged_adamw(params: Any, folder: Path, **options: Any) -> AdamW:
    defaults = {"paged": True, "resident_bytes": SMALLEST, "page_directory": folder}
    return AdamW(params, **{**OPTIONS, **defaults, **options})


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    for seed, param in enumerate(params):
        sizes = torch.logspace(-4, 0, param.numel()).reshape(param.shape)
        param.grad = (normal(*param.shape, seed=100 * step + seed) * sizes).to(param.dtype)


def take_steps(optimizer: AdamW, steps: range) -> None:
    for step in steps:
        set_gradients([p for group in optimizer.param_groups for p in group["params"]], step)
        optimizer.step()


def params_of(optimizer: AdamW) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def assert_same(one: AdamW, other: AdamW) -> None:
    """The same parameters, moments and counts, bit for bit."""
    for p, q in zip(params_of(one), params_of(other), strict=True):
        assert_same_bits(p, q)
    mine, theirs = one.state_dict()["state"], other.state_dict()["state"]
    assert mine.keys() == theirs.keys()
    for key in mine:
        assert mine[key].keys() == theirs[key].keys()
        for name, value in mine[key].items():
            if isinstance(value, Tensor):
                assert_same_bits(value, theirs[key][name])
            else:
                assert value == theirs[key][name]


# The numbers.


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("state_bits", (32, 8))
def test_fifty_steps_have_the_bits_of_the_unpaged(
    tmp_path: Path, state_bits: int, dtype: torch.dtype
) -> None:
    paged = paged_adamw(make_params(dtype=dtype), tmp_path, state_bits=state_bits)
    plain = AdamW(make_params(dtype=dtype), state_bits=state_bits, **OPTIONS)
    for step in range(50):
        take_steps(paged, range(step, step + 1))
        take_steps(plain, range(step, step + 1))
        for p, q in zip(params_of(paged), params_of(plain)):
            assert_same_bits(p, q)
    assert_same(paged, plain)
    report = paged.paging_report()
    assert report is not None and report.streamed_bytes > 0 and report.counters.bytes_in > 0


@pytest.mark.parametrize("state_bits", (32, 8))
def test_with_room_for_all_nothing_is_moved(tmp_path: Path, state_bits: int) -> None:
    room = {"resident_bytes": 64 << 20, "state_bits": state_bits}
    paged = paged_adamw(make_params(), tmp_path, **room)
    plain = AdamW(make_params(), state_bits=state_bits, **OPTIONS)
    take_steps(paged, range(3))
    take_steps(plain, range(3))
    assert_same(paged, plain)
    counters = paged.paging_report().counters
    assert counters.bytes_in == counters.bytes_out == counters.misses == 0


@pytest.mark.parametrize("state_bits", (32, 8))
def test_bytes_moved_are_those_of_the_streamed_pages(tmp_path: Path, state_bits: int) -> None:
    n = 1 << 20  # in 32 bits it fills its pages exactly
    paged = paged_adamw([nn.Parameter(torch.zeros(n))], tmp_path, state_bits=state_bits)
    take_steps(paged, range(5))
    paged._paged._tier.begin()  # what was evicted is written now
    report = paged.paging_report()
    moved = report.streamed_bytes
    # A tensor begins at a multiple of 64 bytes, a transfer is whole blocks of a disk.
    alignment, slack = (0, 0) if state_bits == 32 else (4 * 64, 4096 * report.pages)
    exact = state_bytes(n, adamw_fields(state_bits))
    assert 0 <= report.state_bytes - exact <= alignment * report.pages
    assert 0 <= report.counters.bytes_in - 4 * moved <= 4 * slack  # the first step reads nothing
    assert 0 <= report.counters.bytes_out - 5 * moved <= 5 * slack
    if state_bits == 32:
        assert report.streamed_bytes == 8 * n - SMALLEST // 2


def test_small_states_are_not_paged(tmp_path: Path) -> None:
    large, small = nn.Parameter(torch.zeros(8192)), nn.Parameter(torch.zeros(8191))
    paged = paged_adamw([large, small], tmp_path)
    take_steps(paged, range(1))
    assert paged.paging_report().state_bytes == 65536
    assert set(paged.state[small]) == {"step", "exp_avg", "exp_avg_sq"}
    assert set(paged.state[large]) == {"step"}


# Groups, parameters without gradient, closures, accumulation, compiled models.


def test_groups_with_options_of_their_own_share_pages(tmp_path: Path) -> None:
    settings = ({"lr": 0.01}, {"weight_decay": 0.5}, {"state_bits": 8}, {"betas": (0.5, 0.5)})

    def groups() -> list[dict[str, Any]]:
        return [{"params": [p], **options} for p, options in zip(make_params(), settings)]

    paged, plain = paged_adamw(groups(), tmp_path), AdamW(groups(), **OPTIONS)
    take_steps(paged, range(3))
    take_steps(plain, range(3))
    assert_same(paged, plain)


def test_added_group_gets_pages_of_its_own(tmp_path: Path) -> None:
    both = []
    for make in (lambda p: paged_adamw(p, tmp_path), lambda p: AdamW(p, **OPTIONS)):
        first, second, *_ = make_params()
        optimizer = make([first])
        take_steps(optimizer, range(2))
        optimizer.add_param_group({"params": [second], "state_bits": 8})
        take_steps(optimizer, range(2, 4))
        both.append(optimizer)
    assert_same(*both)
    assert [both[0].state[p]["step"] for p in params_of(both[0])] == [4, 2]


def test_parameter_without_gradient_is_left_alone(tmp_path: Path) -> None:
    both = []
    for make in (lambda p: paged_adamw(p, tmp_path), lambda p: AdamW(p, **OPTIONS)):
        params = make_params()
        optimizer = make(params)
        for step in range(6):
            set_gradients(params, step)
            params[step % 3].grad = None  # each has pages, and is left out in turn
            optimizer.step()
        both.append(optimizer)
    assert_same(*both)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(300, 500), nn.Tanh(), nn.Linear(500, 400), nn.Linear(400, 300))


def train(model: nn.Module, optimizer: AdamW, micro_batches: int = 1, steps: int = 4) -> None:
    for step in range(steps):
        for micro in range(micro_batches):
            model(normal(4, 300, seed=10 * step + micro)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("compiled", (False, True))
@pytest.mark.parametrize("micro_batches", (1, 3))
def test_training_a_model_has_the_bits_of_the_unpaged(
    tmp_path: Path, micro_batches: int, compiled: bool
) -> None:
    both = []
    for make in (lambda p: paged_adamw(p, tmp_path), lambda p: AdamW(p, **OPTIONS)):
        model = small_model()
        optimizer = make(model.parameters())
        run = torch.compile(model, backend="aot_eager") if compiled else model
        train(run, optimizer, micro_batches)
        both.append(optimizer)
    assert_same(*both)


def test_closure_is_called_once_and_its_loss_returned(tmp_path: Path) -> None:
    params, calls = make_params(), []
    optimizer = paged_adamw(params, tmp_path)

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        set_gradients(params, 0)
        return 1.5

    assert optimizer.step(closure) == 1.5 and calls == [True]


def test_several_optimizers_page_side_by_side(tmp_path: Path) -> None:
    paged = [paged_adamw(make_params(), tmp_path, state_bits=bits) for bits in (32, 8, 32)]
    plain = [AdamW(make_params(), state_bits=bits, **OPTIONS) for bits in (32, 8, 32)]
    for step in range(3):
        for optimizer in (*paged, *plain):
            take_steps(optimizer, range(step, step + 1))
    for one, other in zip(paged, plain):
        assert_same(one, other)


def test_gradient_that_is_not_contiguous_is_taken(tmp_path: Path) -> None:
    gradients = (
        lambda seed: normal(600, 512, seed=seed).t(),
        lambda seed: normal(1, 600, seed=seed).expand(512, 600),
        lambda seed: normal(512, 1200, seed=seed)[:, ::2],
        lambda seed: normal(3, seed=seed)[0].expand(512, 600),
    )
    both = []
    for make in (lambda p: paged_adamw(p, tmp_path), lambda p: AdamW(p, **OPTIONS)):
        params = [nn.Parameter(normal(512, 600)), nn.Parameter(normal(1, 64, 3, 70, 1, 9))]
        optimizer = make(params)
        for step, gradient in enumerate(gradients):
            params[0].grad = gradient(step)
            params[1].grad = normal(1, 3, 64, 9, 1, 70, seed=step).permute(0, 2, 1, 5, 4, 3)
            optimizer.step()
        both.append(optimizer)
    assert_same(*both)


# Saving and loading.


@pytest.mark.parametrize("state_bits", (32, 8))
@pytest.mark.parametrize("from_paged", (False, True))
@pytest.mark.parametrize("to_paged", (False, True))
def test_saved_state_moves_between_paged_and_unpaged(
    tmp_path: Path, state_bits: int, from_paged: bool, to_paged: bool
) -> None:
    def make(params: Any, paged: bool) -> AdamW:
        return paged_adamw(params, tmp_path, paged=paged, state_bits=state_bits)

    first = make(make_params(), from_paged)
    take_steps(first, range(3))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make([nn.Parameter(p.detach().clone()) for p in params_of(first)], to_paged)
    second.load_state_dict(torch.load(file))  # weights_only: nothing but tensors and numbers
    assert_same(first, second)
    take_steps(first, range(3, 6))
    take_steps(second, range(3, 6))
    assert_same(first, second)


def test_loading_replaces_pages_and_brings_the_bits_along(tmp_path: Path) -> None:
    first = paged_adamw(make_params(), tmp_path, state_bits=8)
    second = paged_adamw(make_params(), tmp_path, state_bits=32)
    take_steps(first, range(2))
    take_steps(second, range(5))
    for p, q in zip(params_of(first), params_of(second)):
        q.data.copy_(p)
    second.load_state_dict(first.state_dict())
    take_steps(first, range(2, 4))
    take_steps(second, range(2, 4))
    assert_same(first, second)


def test_state_that_does_not_fit_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    optimizer = paged_adamw(make_params(), tmp_path)
    take_steps(optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    wrong_dtype, wrong_shape = copy.deepcopy(before), copy.deepcopy(before)
    wrong_dtype["state"][0]["exp_avg"] = wrong_dtype["state"][0]["exp_avg"].half()
    wrong_shape["state"][1]["exp_avg"] = torch.zeros(3, 3)
    fewer = {**before, "param_groups": [{**before["param_groups"][0], "params": [0, 1]}]}
    for bad in (wrong_dtype, wrong_shape, fewer):
        with pytest.raises(ValueError):
            optimizer.load_state_dict(bad)
    after = optimizer.state_dict()
    for key, state in before["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            assert_same_bits(after["state"][key][name], state[name])


def test_state_dict_is_a_copy_of_the_moment(tmp_path: Path) -> None:
    optimizer = paged_adamw(make_params(), tmp_path)
    take_steps(optimizer, range(1))
    saved = optimizer.state_dict()["state"][0]["exp_avg"]
    before = saved.clone()
    take_steps(optimizer, range(1, 3))
    assert_same_bits(saved, before)


def test_state_dict_opens_one_file_however_many_parameters_there_are(tmp_path: Path) -> None:
    params = [nn.Parameter(torch.zeros(8192)) for _ in range(40)]
    optimizer = paged_adamw(params, tmp_path)
    take_steps(optimizer, range(1))
    before = len(os.listdir("/proc/self/fd"))
    saved = optimizer.state_dict()
    assert len(os.listdir("/proc/self/fd")) == before + 1
    torch.save(saved, io.BytesIO())  # refuses tensors of two dtypes that share a storage
    del saved
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("duplicate", (copy.deepcopy, pickle.dumps), ids=("deepcopy", "pickle"))
def test_copying_is_refused_with_a_way_out(tmp_path: Path, duplicate: Any) -> None:
    optimizer = paged_adamw(make_params(), tmp_path)
    take_steps(optimizer, range(1))
    with pytest.raises(TypeError, match=r"load_state_dict\(optimizer.state_dict\(\)\)"):
        duplicate(optimizer)


# Options.


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"paged": "disk"}, "paged must be False, True or one of file, unified, pinned, got disk"),
        ({"paged": "unified"}, 'for parameters on a GPU: use "file"'),
        ({"paged": "pinned"}, 'for parameters on a GPU: use "file"'),
        ({"resident_bytes": SMALLEST - 1}, "resident_bytes must be at least 1,048,576, got"),
        ({"resident_bytes": 3e6}, "resident_bytes must be an int, got float"),
        ({"page_directory": "/no/folder"}, "page_directory must be a folder .* got /no/folder"),
        ({"page_directory": __file__}, r"page_directory must be a folder .* \(Not a directory\)"),
    ),
)
def test_bad_option_is_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    params = make_params()
    before = [param.detach().clone() for param in params]
    with pytest.raises((ValueError, TypeError), match=message):
        take_steps(paged_adamw(params, tmp_path, **options), range(1))
    for param, value in zip(params, before):
        assert_same_bits(param, value)


def test_fork_is_refused_where_it_would_share_the_pages(tmp_path: Path) -> None:
    optimizer = paged_adamw(make_params(), tmp_path)
    take_steps(optimizer, range(2))
    set_gradients(params_of(optimizer), 2)
    for use in (optimizer.step, optimizer.state_dict):
        child = os.fork()
        if child == 0:
            try:
                use()
            except RuntimeError as error:
                os._exit(7 if "a fork" in str(error) else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    plain = AdamW(make_params(), **OPTIONS)
    take_steps(plain, range(3))
    optimizer.step()
    assert_same(optimizer, plain)


def test_unpaged_has_no_paging_report() -> None:
    assert AdamW(make_params()).paging_report() is None


def test_dropped_while_pages_are_written_it_ends_quietly_and_closes_its_file(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    def open_files() -> int:
        """Files without a name that this process has open."""
        links = []
        for descriptor in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # the one of this listing
                links.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        return sum(link.startswith(str(tmp_path)) for link in links)

    before = open_files()
    for _ in range(20):
        take_steps(paged_adamw(make_params(), tmp_path), range(1))
    gc.collect()
    deadline = time.monotonic() + 10
    while open_files() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert open_files() <= before
    assert not [warning for warning in recwarn if "join" in str(warning.message)]
