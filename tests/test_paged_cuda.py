"""Managed and pinned memory: the whole sequence of calls, against a recording stand-in.

On a real device: test_paged_on_gpu.py.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_same_bits
from recording_cuda import RecordingCuda
from test_paged import (
    OPTIONS,
    SMALLEST,
    assert_same,
    make_params,
    params_of,
    set_gradients,
    small_model,
    take_steps,
    train,
)
from torch import nn

from qlora_ref import AdamW, paged
from qlora_ref.paging.cuda_tiers import PinnedTier, UnifiedTier

TIERS = {"unified": UnifiedTier, "pinned": PinnedTier}
Make = Callable[..., AdamW]


@pytest.fixture
def cuda() -> RecordingCuda:
    return RecordingCuda()


@pytest.fixture(params=TIERS)
def make(
    request: pytest.FixtureRequest, cuda: RecordingCuda, monkeypatch: pytest.MonkeyPatch
) -> Make:
    """AdamW whose pages are in a tier that works on the stand-in."""
    monkeypatch.setattr(
        paged, "make_tier", lambda mode, nbytes, directory, device: TIERS[mode](cuda, nbytes)
    )
    options = {**OPTIONS, "paged": request.param, "resident_bytes": SMALLEST}
    return lambda params, **more: AdamW(params, **{**options, **more})


@pytest.mark.parametrize("state_bits", (32, 8))
def test_fifty_steps_have_the_bits_of_the_unpaged(make: Make, state_bits: int) -> None:
    ours = make(make_params(), state_bits=state_bits)
    plain = AdamW(make_params(), state_bits=state_bits, **OPTIONS)
    for step in range(50):
        take_steps(ours, range(step, step + 1))
        take_steps(plain, range(step, step + 1))
        for p, q in zip(params_of(ours), params_of(plain)):
            assert_same_bits(p, q)
    assert_same(ours, plain)


def test_parameters_that_are_left_out_in_turn(make: Make) -> None:
    both = []
    for kind in (make, lambda p: AdamW(p, **OPTIONS)):
        params = make_params()
        optimizer = kind(params)
        for step in range(9):
            set_gradients(params, step)
            params[step % 3].grad = None
            optimizer.step()
        both.append(optimizer)
    assert_same(*both)


@pytest.mark.parametrize("micro_batches", (1, 2))
def test_hooks_bring_pages_in_before_the_step(make: Make, micro_batches: int) -> None:
    model, twin = small_model(), small_model()
    ours, plain = make(model.parameters()), AdamW(twin.parameters(), **OPTIONS)
    train(model, ours, micro_batches)
    train(twin, plain, micro_batches)
    assert_same(ours, plain)
    for micro in range(micro_batches):  # only the last one brings pages in
        model(torch.ones(1, 300)).sum().backward()
        ahead = [page for page in ours._paged._tier._pages if page.slot is not None]
        assert len(ahead) == (8 if micro == micro_batches - 1 else 0)
    ours.step()
    assert ours.paging_report().counters.misses == 0


def test_state_moves_between_modes(make: Make, tmp_path: Path) -> None:
    first = make(make_params(), state_bits=8)
    take_steps(first, range(2))
    for options in ({"paged": False}, {}):
        second = make([nn.Parameter(p.detach().clone()) for p in params_of(first)], **options)
        second.load_state_dict(first.state_dict())
        assert_same(first, second)
        take_steps(first, range(2, 4))
        take_steps(second, range(2, 4))
        assert_same(first, second)


@pytest.mark.parametrize("order", ((0, 1, 2), (2, 1, 0)))
def test_pages_that_came_too_early_make_room_and_are_not_brought_in_twice(
    make: Make, cuda: RecordingCuda, order: tuple[int, ...]
) -> None:
    # The hook brings in what the last step used, the pages of one parameter; all are stepped.
    both = []
    for kind in (make, lambda p: AdamW(p, **OPTIONS)):
        params = make_params()
        optimizer = kind(params)
        for step, last in enumerate(order):
            take_steps(optimizer, range(10 * step, 10 * step + 1))
            for number, param in enumerate(params):
                param.grad = param.grad if number == last else None
            optimizer.step()
            if kind is make:
                tier = optimizer._paged._tier
                tier.prefetch(optimizer._paged._order)
            take_steps(optimizer, range(10 * step + 1, 10 * step + 2))
            if kind is make:
                assert len(tier._slots) == 8 and not tier._queue  # all of them are free again
        both.append(optimizer)
    assert_same(*both)


@pytest.mark.parametrize("make", ["unified"], indirect=True)
def test_managed_pages_that_came_and_were_not_needed_go_home(
    make: Make, cuda: RecordingCuda
) -> None:
    stays, streams = make_params(((100, 100), (700, 257)))
    optimizer = make([stays, streams])
    take_steps(optimizer, range(2))
    optimizer._paged._tier.prefetch(optimizer._paged._order)
    streams.grad = None
    optimizer.step()
    cuda.synchronize()
    assert not any(cuda.on_device_now.values())


# The calls.


@pytest.mark.parametrize("make", ["unified"], indirect=True)
def test_managed_pages_move_in_and_out_once_a_step(make: Make, cuda: RecordingCuda) -> None:
    optimizer = make(make_params())
    steps = 3
    take_steps(optimizer, range(steps))
    cuda.synchronize()
    sizes = {entry[1]: entry[2] for entry in cuda.log if entry[0] == "allocate"}
    advised = [entry[1] for entry in cuda.log if entry[0] == "advise"]
    assert len(sizes) - len(advised) == SMALLEST // 2 // (64 << 10)  # these stay
    for way in ("in", "out"):
        moved = [entry for entry in cuda.log if entry[0] == way]
        assert Counter(entry[1] for entry in moved) == dict.fromkeys(advised, steps)
        assert all(entry[2] == sizes[entry[1]] for entry in moved)
        assert len({entry[3] for entry in moved}) == 1  # a stream for each direction
    for address in advised:
        ways = [entry[0] for entry in cuda.log if entry[0] in ("in", "out") and entry[1] == address]
        assert ways == ["in", "out"] * steps
    assert cuda.most_on_device <= SMALLEST // 2


@pytest.mark.parametrize("make", ["unified"], indirect=True)
def test_managed_memory_is_freed_once_when_the_optimizer_is_dropped(
    make: Make, cuda: RecordingCuda
) -> None:
    optimizer = make(make_params())
    take_steps(optimizer, range(2))
    allocated = set(cuda.memory)
    optimizer._paged.free()
    optimizer._paged.free()
    assert cuda.freed == allocated and not cuda.memory
    another = make(make_params())
    take_steps(another, range(2))
    assert cuda.memory
    del another
    gc.collect()
    assert not cuda.memory and cuda.log[-1][0] == "free"


@pytest.mark.parametrize("make", ["unified"], indirect=True)
def test_loading_frees_the_pages_that_it_replaces(make: Make, cuda: RecordingCuda) -> None:
    optimizer = make(make_params())
    take_steps(optimizer, range(2))
    before = len(cuda.memory)
    optimizer.load_state_dict(optimizer.state_dict())
    assert len(cuda.memory) == before == len(cuda.freed)


@pytest.mark.parametrize("room", (100_000, 1_000_000))
def test_memory_that_is_not_there_leaves_everything_as_it_was(
    make: Make, cuda: RecordingCuda, room: int
) -> None:
    cuda.room = room
    optimizer = make(make_params())
    before = [param.detach().clone() for param in params_of(optimizer)]
    with pytest.raises(MemoryError, match="out of memory.*nothing has changed"):
        take_steps(optimizer, range(1))
    for param, value in zip(params_of(optimizer), before):
        assert_same_bits(param, value)
    assert not cuda.memory and not optimizer.state
    cuda.room = 1 << 30
    take_steps(optimizer, range(2))
    plain = AdamW(make_params(), **OPTIONS)
    take_steps(plain, range(2))
    assert_same(optimizer, plain)


def test_times_are_those_between_the_events(make: Make, cuda: RecordingCuda) -> None:
    optimizer = make(make_params())
    take_steps(optimizer, range(3))
    waited = optimizer.paging_report().counters.stalled_seconds
    cuda.synchronize()
    counters = optimizer.paging_report().counters
    # A byte takes the stand-in a second, and nothing moves before somebody waits for it.
    moved = sum(entry[2 if entry[0] != "copy" else 1] for entry in cuda.log if _moves(entry))
    assert counters.busy_seconds == moved > 0
    assert counters.stalled_seconds == waited > 0
    assert counters.hidden_seconds == moved - waited > 0  # what left after the last wait


def _moves(entry: tuple[Any, ...]) -> bool:
    return entry[0] in ("in", "out", "copy")


def test_device_without_managed_memory_is_told_what_to_use() -> None:
    with pytest.raises(ValueError, match='operation not supported.*use paged="pinned"'):
        UnifiedTier(RecordingCuda(managed=False), SMALLEST)


@pytest.mark.parametrize("make", ["pinned"], indirect=True)
@pytest.mark.parametrize("lost", range(2))
def test_stand_in_notices_a_wait_that_is_missing(
    make: Make, cuda: RecordingCuda, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    # 0: compute does not wait for what comes in; 1: what comes in does not wait for the slot.
    real: Any = cuda.wait

    def forgetful(stream: Any, event: Any) -> None:
        if (stream is None) != (lost == 0) and (stream is None or stream is not cuda.streams[0]):
            real(stream, event)
        elif lost == 1 and stream is None:
            real(stream, event)

    monkeypatch.setattr(cuda, "wait", forgetful)
    ours, plain = make(make_params()), AdamW(make_params(), **OPTIONS)
    take_steps(ours, range(4))
    take_steps(plain, range(4))
    assert any(not torch.equal(p, q) for p, q in zip(params_of(ours), params_of(plain)))
