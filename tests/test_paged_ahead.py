"""Pages come before they are needed and leave behind the step: when, in what order, how many."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_paged import SMALLEST, make_params, paged_adamw, params_of, set_gradients, small_model
from torch import nn

from qlora_ref import AdamW, torch_library
from qlora_ref.paging.file_tier import FileTier
from qlora_ref.paging.files import PageFile

SLOTS = 8  # with the least resident bytes
PAGE = 64 << 10


@pytest.fixture
def tier(tmp_path: Path) -> FileTier:
    """Pages that stay, then 12 that stream, each filled with its number."""
    tier = FileTier(tmp_path, SMALLEST)
    numbers = tier.allocate([PAGE] * (SLOTS + 12))
    tier.begin()
    for number in numbers:
        tier.touch(number).fill_(number)
        tier.evict(number)
    tier.commit()
    tier.begin()
    return tier


def recorded(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """Offsets of the transfers of this kind, in the order in which they began."""
    real: Callable[..., None] = getattr(PageFile, name)
    offsets: list[int] = []

    def move(file: PageFile, buffer: memoryview, offset: int) -> None:
        offsets.append(offset)
        real(file, buffer, offset)

    monkeypatch.setattr(PageFile, name, move)
    return offsets


def test_pages_are_read_in_the_order_in_which_they_are_asked_for(
    tier: FileTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = [19, 8, 17, 10, 15, 12, 13, 14, 11, 16, 9, 18]
    places = [tier._pages[number].places[tier._pages[number].current] for number in order]
    misses = tier.count().misses
    offsets = recorded(monkeypatch, "read")
    tier.prefetch(order)
    tier._settle()
    # Four threads begin four at once; nobody has touched a page.
    assert len(offsets) == SLOTS and set(offsets) == set(places[:SLOTS])
    assert all(places.index(offset) < position + 4 for position, offset in enumerate(offsets))
    for number in order:
        assert set(tier.touch(number).tolist()) == {number}
        tier.evict(number, changed=False)
    tier._settle()
    assert len(offsets) == len(order) and tier.count().misses == misses


def test_what_is_asked_for_takes_the_place_of_what_has_not_begun(tier: FileTier) -> None:
    tier.prefetch(list(range(8, 20)))
    tier.prefetch([19, 18])
    tier._settle()
    assert [page for page in tier._queue] == [tier._pages[19], tier._pages[18]]
    assert set(tier.touch(19).tolist()) == {19}  # one that came too early makes room


def test_page_leaves_while_the_step_goes_on(
    tier: FileTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, writing, may_write = PageFile.write, threading.Event(), threading.Event()

    def slow(*arguments: Any) -> None:
        writing.set()
        assert may_write.wait(30)
        real(*arguments)

    monkeypatch.setattr(PageFile, "write", slow)
    tier.prefetch([8, 9, 10])
    tier.touch(8).fill_(108)
    tier.evict(8)
    assert writing.wait(30)
    assert set(tier.touch(9).tolist()) == {9}  # not waiting for the disk
    before = tier.count().bytes_out
    may_write.set()
    tier._settle()
    assert tier.count().bytes_out == before + PAGE
    tier.commit()
    assert set(tier.touch(8).tolist()) == {108}


def test_next_pages_are_on_their_way_while_one_is_stepped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = paged_adamw(make_params(), tmp_path)
    set_gradients(params_of(optimizer), 0)
    optimizer.step()
    tier, ahead, real = optimizer._paged._tier, [], torch_library.adamw_step

    def counted(*arguments: Any, **options: Any) -> None:
        # Also what is being written takes a slot: at least two pages more are read or there.
        ahead.append(sum(p.slot is not None and not p.writing for p in tier._pages if p.places))
        real(*arguments, **options)

    monkeypatch.setattr(torch_library, "adamw_step", counted)
    tier.begin()
    optimizer.step()
    streamed = sum(page.places is not None for page in tier._pages)
    assert len(ahead) >= streamed > 3 * SLOTS
    assert sum(count >= 3 for count in ahead[: streamed - SLOTS]) > (streamed - SLOTS) // 2


@pytest.mark.parametrize("micro_batches", (1, 3))
def test_first_pages_are_read_in_the_last_backward_before_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batches: int
) -> None:
    model = small_model()
    optimizer = paged_adamw(model.parameters(), tmp_path)
    offsets = recorded(monkeypatch, "read")
    for step in range(3):
        read = []
        for _ in range(micro_batches):
            offsets.clear()
            model(torch.ones(1, 300)).sum().backward()
            if optimizer._paged._tier is not None:
                optimizer._paged._tier._settle()
            read.append(len(offsets))
        # Before the first step nothing is paged; before the second, none was counted to the last.
        expected = ([0], [SLOTS], [0] * (micro_batches - 1) + [SLOTS])[step]
        assert read == expected + [0] * (micro_batches - len(expected))
        optimizer.step()
        optimizer._paged._tier.begin()
        optimizer.zero_grad()
    assert optimizer.paging_report().counters.misses == 0


def test_large_parameter_needs_no_more_than_is_resident(tmp_path: Path) -> None:
    # 16 MiB of state in one tensor through 1 MiB.
    optimizer: AdamW = paged_adamw([nn.Parameter(torch.zeros(2 << 20))], tmp_path)
    set_gradients(params_of(optimizer), 0)
    optimizer.step()
    tier = optimizer._paged._tier
    held = [page.slot for page in tier._pages if page.slot is not None] + tier._free_slots
    assert sum(len(slot) for slot in {id(slot): slot for slot in held}.values()) <= SMALLEST
