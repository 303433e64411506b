"""What paging has moved, and how long somebody waited for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from qlora_ref.paging.cuda_calls import CudaCalls


@dataclass
class Counters:
    """Totals since the optimizer was made.

    bytes_in, bytes_out  brought in and written back
    hits                 pages that were there when they were needed
    stalls               pages that were on their way and had to be waited for
    misses               pages that nobody had asked for before they were needed
    busy_seconds         during which at least one transfer was under way
    stalled_seconds      during which the step waited for a transfer
    """

    bytes_in: int = 0
    bytes_out: int = 0
    hits: int = 0
    stalls: int = 0
    misses: int = 0
    busy_seconds: float = 0.0
    stalled_seconds: float = 0.0

    @property
    def hidden_seconds(self) -> float:
        """Time of transfers that passed while something else was done."""
        return max(0.0, self.busy_seconds - self.stalled_seconds)


class Clock:
    """Adds the time during which at least one transfer is under way to counters."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._lock = threading.Lock()
        self._running = 0
        self._began = 0.0

    @contextmanager
    def transfer(self) -> Iterator[None]:
        """Around each transfer, in whatever thread."""
        with self._lock:
            if self._running == 0:
                self._began = time.perf_counter()
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
                if self._running == 0:
                    self._counters.busy_seconds += time.perf_counter() - self._began

    @contextmanager
    def stall(self) -> Iterator[None]:
        """Around a wait of the step."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._counters.stalled_seconds += time.perf_counter() - began


class StreamClock:
    """As Clock, for what a device does: between events, read when the device has come past them."""

    def __init__(self, calls: CudaCalls, counters: Counters) -> None:
        self._calls, self._counters = calls, counters
        self._transfers: list[tuple[Any, Any]] = []
        self._stalls: list[tuple[Any, Any]] = []

    def transfer(self, begin: Any, end: Any) -> None:
        """One transfer lies between these events."""
        self._transfers.append((begin, end))

    def stall(self, begin: Any, end: Any) -> None:
        """The stream that computes may wait between these events."""
        self._stalls.append((begin, end))

    def settle(self) -> None:
        """Add what has happened to the counters."""
        waits = _take_done(self._calls, self._stalls)
        self._counters.stalled_seconds += sum(self._calls.seconds(*wait) for wait in waits)
        transfers = _take_done(self._calls, self._transfers)
        if transfers:
            zero = transfers[0][0]
            times = [[self._calls.seconds(zero, event) for event in both] for both in transfers]
            self._counters.busy_seconds += _covered(times)


def _take_done(calls: CudaCalls, pairs: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    done: list[tuple[Any, Any]] = []
    rest: list[tuple[Any, Any]] = []
    for pair in pairs:
        (done if calls.is_done(pair[1]) else rest).append(pair)
    pairs[:] = rest
    return done


def _covered(intervals: list[list[float]]) -> float:
    """The length of the union of intervals."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


@dataclass(frozen=True)
class PagingReport:
    """Where paged state is and what moving it has cost; print it."""

    mode: str
    pages: int
    state_bytes: int  # of all pages
    streamed_bytes: int  # of the pages that come and go; the others stay
    resident_bytes: int  # what pages may occupy at once
    counters: Counters

    def __str__(self) -> str:
        c = self.counters
        return (
            f"paged state ({self.mode}): {self.state_bytes / 1e6:.2f} MB in {self.pages} pages, "
            f"{self.streamed_bytes / 1e6:.2f} MB of it streamed through at most "
            f"{self.resident_bytes / 1e6:.2f} MB; "
            f"{c.bytes_in / 1e6:.2f} MB in, {c.bytes_out / 1e6:.2f} MB out; "
            f"{c.hits} hits, {c.stalls} stalls, {c.misses} misses; "
            f"{c.stalled_seconds:.3f} s waited, {c.hidden_seconds:.3f} s hidden"
        )
