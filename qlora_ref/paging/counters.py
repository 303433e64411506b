"""What paging has moved, and how long somebody waited for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


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
