"""Pages for parameters on a GPU: in managed memory, or in pinned host memory with copies.

Everything is put on streams in an order that makes it right, and the host never waits. Pages come
in on one stream and leave on another, since a link works in both directions at once:

    inward   | wait until the slot's last page has left | page comes in  | record `arrived`
    compute  | wait for `arrived` | update                               | record `used`
    outward  | wait for `used`    | page leaves                          | record `left`
"""

from __future__ import annotations

import threading
import weakref
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from qlora_ref.paging.counters import Counters, StreamClock
from qlora_ref.paging.cuda_calls import CudaCalls
from qlora_ref.paging.tier import Tier, page_size


@dataclass(eq=False)
class _Slot:
    """Room for a page on the device; `left` is when its last page has made room."""

    left: Any = None
    data: Tensor | None = None


@dataclass(eq=False)
class _Page:
    nbytes: int
    home: Any  # where it is when it is not on the device; what that is, the tier knows
    data: Tensor | None = None  # its bytes for the device, when they are there
    stays: bool = False
    written: bool = False
    slot: _Slot | None = None
    arrived: Any = None
    left: Any = None


class _StreamTier(Tier):
    """What both tiers share: the slots, the queue and the order of the streams."""

    def __init__(self, calls: CudaCalls, resident_bytes: int) -> None:
        self._calls = calls
        self.counters = Counters()
        self._clock = StreamClock(calls, self.counters)
        self.resident_bytes = resident_bytes
        self.page_bytes = page_size(resident_bytes)
        slots = resident_bytes // self.page_bytes
        self._room_to_stay = slots - slots // 2
        self._room_to_stream = slots // 2
        self._inward, self._outward = calls.new_stream(), calls.new_stream()
        self._pages: list[_Page] = []
        self._queue: list[_Page] = []
        self._slots: list[_Slot] = []  # those that are free, the longest first
        self._lock = threading.RLock()  # hooks run in the threads of autograd

    @abstractmethod
    def _bring_in(self, page: _Page, slot: _Slot) -> None:
        """Put the page's way to the device on the stream `inward`, and set its data."""

    @abstractmethod
    def _take_out(self, page: _Page, changed: bool) -> None:
        """Put the page's way back on the stream `outward`, and count it."""

    def is_streamed(self, page: int) -> bool:
        """See Tier."""
        return not self._pages[page].stays

    def prefetch(self, pages: Sequence[int]) -> None:
        """See Tier."""
        with self._lock:
            asked = [self._pages[page] for page in pages]
            self._queue = [page for page in asked if page.slot is None and not page.stays]
            self._pump()

    def touch(self, page: int) -> Tensor:
        """See Tier: what is computed from now on begins when the page is there."""
        entry = self._pages[page]
        if not entry.stays:
            with self._lock:
                self._bring(entry)
                before = self._calls.record(None)
                self._calls.wait(None, entry.arrived)
                self._clock.stall(before, self._calls.record(None))
        assert entry.data is not None
        return entry.data[: entry.nbytes]

    def evict(self, page: int, changed: bool = True) -> None:
        """See Tier."""
        entry = self._pages[page]
        if entry.stays or entry.slot is None:
            return
        with self._lock:
            self._calls.wait(self._outward, self._calls.record(None))
            self._calls.wait(self._outward, entry.arrived)  # which a step that skips it does not
            entry.written |= changed
            begin = self._calls.record(self._outward)
            self._take_out(entry, changed)
            entry.left = entry.slot.left = self._calls.record(self._outward)
            self._clock.transfer(begin, entry.left)
            self._slots.append(entry.slot)
            entry.slot = None
            self._pump()

    def begin(self) -> None:
        """See Tier."""
        with self._lock:
            self._clock.settle()

    def count(self) -> Counters:
        """See Tier."""
        self.begin()
        return replace(self.counters)

    def _has_slots(self) -> bool:
        return bool(self._slots) or any(page.slot is not None for page in self._pages)

    def _bring(self, page: _Page) -> None:
        started = page.slot is not None
        if not started:
            self._queue = [page, *(other for other in self._queue if other is not page)]
            if not self._slots:
                self._make_room()
            self._pump()
            self.counters.misses += 1
        elif self._calls.is_done(page.arrived):
            self.counters.hits += 1
        else:
            self.counters.stalls += 1

    def _make_room(self) -> None:
        """Send a page back that came too early: the last one."""
        numbers = [number for number, page in enumerate(self._pages) if page.slot is not None]
        queue, self._queue = self._queue, []  # what becomes free is for the page in need
        self.evict(numbers[-1], changed=False)
        self._queue = queue

    def _pump(self) -> None:
        while self._queue and self._slots:
            page, slot = self._queue.pop(0), self._slots.pop(0)
            page.slot = slot
            for event in (slot.left, page.left):
                if event is not None:
                    self._calls.wait(self._inward, event)
            begin = self._calls.record(self._inward)
            self._bring_in(page, slot)
            self.counters.bytes_in += page.nbytes if page.written else 0
            page.arrived = self._calls.record(self._inward)
            self._clock.transfer(begin, page.arrived)


class UnifiedTier(_StreamTier):
    """Managed memory: pages live in the host's and move to the device ahead of the step."""

    mode = "unified"

    def __init__(self, calls: CudaCalls, resident_bytes: int) -> None:
        if not calls.has_managed_memory():
            raise ValueError(
                "this device has no managed memory that moves while it works (CUDA: operation not "
                'supported): use paged="pinned"'
            )
        super().__init__(calls, resident_bytes)
        self._addresses: list[int] = []
        self._finalizer = weakref.finalize(self, _free_managed, calls, self._addresses)
        self._finalizer.atexit = False  # the driver does it, and may be gone by then

    def allocate(self, sizes: Sequence[int]) -> list[int]:
        """See Tier."""
        first = len(self._pages)
        room = self._room_to_stay - sum(page.stays for page in self._pages)
        new: list[_Page] = []
        addresses: list[int] = []
        try:
            for number, size in enumerate(sizes):
                addresses.append(self._calls.allocate_managed(size))
                data = self._calls.as_tensor(addresses[-1], size)
                new.append(_Page(size, addresses[-1], data, stays=number < room))
                if number >= room:
                    self._calls.advise(addresses[-1], size)
        except (MemoryError, RuntimeError) as error:
            _free_managed(self._calls, addresses)
            text = f"no managed memory for {sum(sizes):,} bytes of optimizer state"
            raise MemoryError(f"{text} ({error}); nothing has changed") from error
        if len(new) > room and not self._has_slots():
            self._slots = [_Slot() for _ in range(self._room_to_stream)]
        self._addresses += addresses
        self._pages += new
        return list(range(first, len(self._pages)))

    def free(self) -> None:
        """See Tier."""
        self._pages, self._queue, self._slots = [], [], []
        self._finalizer()

    def _bring_in(self, page: _Page, slot: _Slot) -> None:
        self._calls.move(page.home, page.nbytes, True, self._inward)

    def _take_out(self, page: _Page, changed: bool) -> None:
        self._calls.move(page.home, page.nbytes, False, self._outward)
        self.counters.bytes_out += page.nbytes


class PinnedTier(_StreamTier):
    """Pinned host memory, for devices without managed memory: pages are copied in and out."""

    mode = "pinned"

    def __init__(self, calls: CudaCalls, resident_bytes: int) -> None:
        super().__init__(calls, resident_bytes)
        # Copies may be on their way to what is given back.
        self._finalizer = weakref.finalize(self, calls.synchronize)
        self._finalizer.atexit = False

    def allocate(self, sizes: Sequence[int]) -> list[int]:
        """See Tier."""
        first = len(self._pages)
        room = self._room_to_stay - sum(page.stays for page in self._pages)
        streamed = sizes[room:]
        try:
            staying = [
                _Page(size, None, self._calls.on_device(size), stays=True) for size in sizes[:room]
            ]
            new = [_Page(size, self._calls.pinned(size)) for size in streamed]
            slots = [
                _Slot(data=self._calls.on_device(self.page_bytes))
                for _ in range(self._room_to_stream if new and not self._has_slots() else 0)
            ]
        except (MemoryError, RuntimeError) as error:
            text = f"no memory for {sum(sizes):,} bytes of optimizer state"
            raise MemoryError(f"{text} ({error}); nothing has changed") from error
        self._slots += slots
        self._pages += [*staying, *new]
        return list(range(first, len(self._pages)))

    def free(self) -> None:
        """See Tier."""
        self._finalizer()
        self._pages, self._queue, self._slots = [], [], []

    def _bring_in(self, page: _Page, slot: _Slot) -> None:
        page.data = slot.data
        if page.written:
            assert slot.data is not None
            self._calls.copy(slot.data[: page.nbytes], page.home, self._inward)

    def _take_out(self, page: _Page, changed: bool) -> None:
        if changed:
            assert page.data is not None
            self._calls.copy(page.home, page.data[: page.nbytes], self._outward)
            self.counters.bytes_out += page.nbytes


def _free_managed(calls: CudaCalls, addresses: list[int]) -> None:
    """Each once, when the device no longer works on any."""
    if addresses:
        calls.synchronize()
    while addresses:
        calls.free_managed(addresses.pop())
