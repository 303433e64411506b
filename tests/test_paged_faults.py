"""Disks that are full or broken, memory that is not there: a step is whole or has not been."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_same_bits
from test_paged import (
    OPTIONS,
    SHAPES,
    assert_same,
    make_params,
    paged_adamw,
    params_of,
    set_gradients,
    take_steps,
)
from torch import Tensor, nn

from qlora_ref import AdamW, torch_library

READS, WRITES = 10_000, 10_000  # more than a step has


def failing(function: Callable[..., Any], code: int, first: int, last: int) -> Callable[..., Any]:
    """The function, whose calls from `first` to `last`, counted from 0, raise this error."""
    calls = iter(range(1 << 30))

    def call(*arguments: Any, **options: Any) -> Any:
        if first <= next(calls) <= last:
            raise OSError(code, os.strerror(code))
        return function(*arguments, **options)

    return call


def snapshot(optimizer: AdamW) -> tuple[list[Tensor], dict[int, dict[str, Any]]]:
    """Parameters and state, without the tensors' storage."""
    state = {
        key: {k: v.clone() if isinstance(v, Tensor) else v for k, v in value.items()}
        for key, value in optimizer.state_dict()["state"].items()
    }
    return [param.detach().clone() for param in params_of(optimizer)], state


def assert_unchanged(optimizer: AdamW, before: Any) -> None:
    params, state = snapshot(optimizer)
    for actual, expected in zip(params, before[0], strict=True):
        assert_same_bits(actual, expected)
    assert state.keys() == before[1].keys()
    for key, values in state.items():
        for name, value in values.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(before[1][key][name]))


@pytest.fixture(params=(32, 8), ids=("32-bit", "8-bit"))
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[AdamW, AdamW]]:
    """A paged optimizer and its unpaged twin, both two steps old."""
    shapes = (*SHAPES, (512, 600))  # in 8 bits too it has more streamed pages than there are slots
    paged = paged_adamw(make_params(shapes), tmp_path, state_bits=request.param)
    plain = AdamW(make_params(shapes), state_bits=request.param, **OPTIONS)
    for optimizer in (paged, plain):
        take_steps(optimizer, range(2))
    paged.state_dict()  # nothing is being written any more
    yield paged, plain


def settle(optimizer: AdamW) -> None:
    optimizer._paged._tier.begin()


# Reading.


@pytest.mark.parametrize("first", (0, 1, 5, 9))
def test_read_that_fails_once_is_repeated(
    pair: tuple[AdamW, AdamW], monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    monkeypatch.setattr(os, "preadv", failing(os.preadv, errno.EIO, first, first))
    for optimizer in pair:
        take_steps(optimizer, range(2, 5))
    assert_same(*pair)


def test_read_that_fails_while_the_step_waits_for_it_is_repeated(
    pair: tuple[AdamW, AdamW], monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(pair[0])
    real, calls = os.preadv, iter(range(1 << 30))

    def slow_once(*arguments: Any) -> int:
        if next(calls) == 0:
            time.sleep(0.5)
            raise OSError(errno.EIO, "a disk that had to think")
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", slow_once)
    for optimizer in pair:
        take_steps(optimizer, range(2, 4))
    assert_same(*pair)


@pytest.mark.parametrize("first", (0, 1, 5, 9))
def test_page_that_cannot_be_read_leaves_everything_as_it_was(
    pair: tuple[AdamW, AdamW], monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    paged, _ = pair
    settle(paged)
    before = snapshot(paged)
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing(os.preadv, errno.EIO, first, READS))
        with pytest.raises(OSError, match="could not be read from .* as they were") as caught:
            take_steps(paged, range(2, 3))
    assert caught.value.errno == errno.EIO
    assert_unchanged(paged, before)
    for optimizer in pair:
        take_steps(optimizer, range(2, 5))
    assert_same(*pair)


def test_page_that_a_hook_could_not_read_is_read_again(
    pair: tuple[AdamW, AdamW], monkeypatch: pytest.MonkeyPatch
) -> None:
    paged, _ = pair
    settle(paged)
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing(os.preadv, errno.EIO, 0, 2))
        paged._paged._tier.prefetch(paged._paged._order)
        paged._paged._tier._settle()
    for optimizer in pair:
        take_steps(optimizer, range(2, 4))
    assert_same(*pair)


@pytest.mark.parametrize("most", (4096, 5000))
def test_short_reads_and_writes_are_gone_on_with(
    pair: tuple[AdamW, AdamW], monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    def shortened(move: Callable[..., int]) -> Callable[..., int]:
        blocks = -(-most // 4096) * 4096  # the kernel takes nothing else; what it says is `most`
        return lambda file, buffers, at: min(most, move(file, [buffers[0][:blocks]], at))

    monkeypatch.setattr(os, "preadv", shortened(os.preadv))
    monkeypatch.setattr(os, "pwritev", shortened(os.pwritev))
    for optimizer in pair:
        take_steps(optimizer, range(2, 4))
    assert_same(*pair)


def test_file_that_ends_too_early_is_an_error(
    pair: tuple[AdamW, AdamW], monkeypatch: pytest.MonkeyPatch
) -> None:
    paged, _ = pair
    settle(paged)
    before = snapshot(paged)
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", lambda *arguments: 0)
        with pytest.raises(OSError, match="only in part"):
            take_steps(paged, range(2, 3))
    assert_unchanged(paged, before)


# Writing.


@pytest.mark.parametrize("code", (errno.ENOSPC, errno.EIO))
@pytest.mark.parametrize("first", (0, 1, 5, 9, 12))
@pytest.mark.parametrize("for_good", (False, True))
def test_page_that_cannot_be_written_is_kept_or_the_step_undone(
    pair: tuple[AdamW, AdamW],
    monkeypatch: pytest.MonkeyPatch,
    first: int,
    code: int,
    for_good: bool,
) -> None:
    paged, plain = pair
    settle(paged)
    before = snapshot(paged)
    with monkeypatch.context() as patch:
        last = WRITES if for_good else first
        patch.setattr(os, "pwritev", failing(os.pwritev, code, first, last))
        try:
            take_steps(paged, range(2, 3))
        except OSError as error:
            assert error.errno == code
            assert_unchanged(paged, before)
            take = range(2, 5)
        else:  # the step is done: what is not written is in its slots until the disk is well
            take_steps(plain, range(2, 3))
            take = range(3, 5)
    for optimizer in pair:
        take_steps(optimizer, take)
    assert_same(*pair)


def test_pages_that_stay_unwritten_stop_the_next_step_before_it_begins(
    pair: tuple[AdamW, AdamW], monkeypatch: pytest.MonkeyPatch
) -> None:
    paged, plain = pair
    settle(paged)
    tier = paged._paged._tier
    with monkeypatch.context() as patch:
        # The step is done when its last pages are yet to be written.
        commit = tier.commit

        def break_disk_after_commit() -> None:
            tier._settle()
            commit()
            page = next(p for p in tier._pages if p.places and p.slot is None)
            page.slot, page.error = tier._free_slots.pop(), OSError(errno.EIO, "broken")
            tier._open().read(page.buffer(), page.places[page.current])

        patch.setattr(tier, "commit", break_disk_after_commit)
        patch.setattr(os, "pwritev", failing(os.pwritev, errno.EIO, 1 << 20, 1 << 20))
        for optimizer in pair:
            take_steps(optimizer, range(2, 3))
        patch.setattr(tier, "commit", commit)
        patch.setattr(os, "pwritev", failing(os.pwritev, errno.EIO, 0, WRITES))
        assert_same(*pair)
        before = snapshot(paged)
        with pytest.raises(OSError, match="could not be written"):
            take_steps(paged, range(3, 4))
        assert_unchanged(paged, before)
    for optimizer in pair:
        take_steps(optimizer, range(3, 5))
    assert_same(*pair)


# Space and memory.


@pytest.mark.parametrize("call", (0, 1))
def test_full_disk_is_found_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    # The first call reserves the file of pages, the second what the step needs to be undone.
    paged, plain = paged_adamw(make_params(), tmp_path), AdamW(make_params(), **OPTIONS)
    before = [param.detach().clone() for param in params_of(paged)]
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", failing(os.posix_fallocate, errno.ENOSPC, call, call))
        with pytest.raises(OSError, match=r"no space for [\d,]+ bytes .* page_directory"):
            take_steps(paged, range(1))
    for param, value in zip(params_of(paged), before):
        assert_same_bits(param, value)
    assert all(state["step"] == 0 for state in paged.state.values())
    for optimizer in (paged, plain):
        take_steps(optimizer, range(3))
    assert_same(paged, plain)


def test_disk_that_is_really_full(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this process may not mount a small file system")
    try:
        optimizer = paged_adamw(make_params(), small)
        before = [param.detach().clone() for param in params_of(optimizer)]
        with pytest.raises(OSError, match="no space") as caught:
            take_steps(optimizer, range(1))
        assert caught.value.errno == errno.ENOSPC
        for param, value in zip(params_of(optimizer), before):
            assert_same_bits(param, value)
        optimizer._paged.free()
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("call", (0, 3, 8, 12))
def test_memory_that_is_not_there_is_found_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    paged, plain = paged_adamw(make_params(), tmp_path), AdamW(make_params(), **OPTIONS)
    before = [param.detach().clone() for param in params_of(paged)]
    with monkeypatch.context() as patch:
        patch.setattr(mmap, "mmap", failing(mmap.mmap, errno.ENOMEM, call, call))
        with pytest.raises(MemoryError, match="lower resident_bytes"):
            take_steps(paged, range(1))
    for param, value in zip(params_of(paged), before):
        assert_same_bits(param, value)
    for optimizer in (paged, plain):
        take_steps(optimizer, range(3))
    assert_same(paged, plain)


@pytest.mark.parametrize("call", (0, 1, 5, 40, 60))
def test_gradient_that_there_is_no_memory_to_copy_leaves_everything_as_it_was(
    pair: tuple[AdamW, AdamW], monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    # A gradient that is not contiguous is copied, a page of it at a time, whether its state comes
    # and goes, stays, or is too small for a page: the last one is.
    paged, plain = pair
    before = snapshot(paged)
    for optimizer in pair:
        set_gradients(params_of(optimizer), 2)
        for param in params_of(optimizer):
            param.grad = torch.stack((param.grad, param.grad), -1)[..., 0]
    real, calls = Tensor.contiguous, iter(range(1000))

    def no_memory(tensor: Tensor) -> Tensor:
        if not tensor.is_contiguous() and next(calls) == call:
            raise RuntimeError("not enough memory: you tried to allocate 4096 bytes")
        return real(tensor)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "contiguous", no_memory)
        try:
            paged.step()
        except RuntimeError:
            assert_unchanged(paged, before)
            paged.step()
    plain.step()
    assert_same(*pair)


@pytest.mark.parametrize("call", (0, 1, 7))
def test_interrupt_in_a_step_undoes_it(
    pair: tuple[AdamW, AdamW], monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    paged, plain = pair
    settle(paged)
    before, calls, real = snapshot(paged), iter(range(100)), torch_library.adamw_step

    def interrupted(*arguments: Any, **options: Any) -> None:
        real(*arguments, **options)
        if next(calls) == call:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch_library, "adamw_step", interrupted)
        set_gradients(params_of(paged), 2)
        with pytest.raises(KeyboardInterrupt):
            paged.step()
    assert_unchanged(paged, before)
    for optimizer in pair:
        take_steps(optimizer, range(2, 5))
    assert_same(*pair)


@pytest.mark.parametrize("state_bits", (32, 8))
def test_parameter_that_was_replaced_by_a_smaller_one_is_refused(
    tmp_path: Path, state_bits: int
) -> None:
    param = nn.Parameter(torch.ones(1 << 20))
    optimizer = paged_adamw([param], tmp_path, state_bits=state_bits)
    take_steps(optimizer, range(1))
    param.grad, param.data = None, torch.ones(1 << 19)
    with pytest.raises(ValueError, match="must have the shapes of params"):
        take_steps(optimizer, range(1, 2))
    assert torch.equal(param, torch.ones(1 << 19))
