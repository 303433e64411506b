"""Pages in a file, for parameters on the CPU.

Half of the resident memory holds pages that never leave; the other half is slots through which the
rest streams. Threads read pages into free slots in the order in which they were asked for, and
write back what was evicted while the step works on the next ones.

A streamed page has two places in the file. A step reads the one and writes the other, and `commit`
swaps them: until then the state before the step is there, whatever fails.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from qlora_ref.paging.counters import Clock, Counters
from qlora_ref.paging.files import BLOCK, PageFile, as_tensor, memory
from qlora_ref.paging.tier import Tier, page_size

# A disk reads and writes at once, and is the faster for having the next request at hand.
_THREADS = 4
_STACK = 256 << 10
_ATTEMPTS = 2  # to read a page: what a disk cannot read twice, it cannot read
_UNDONE = "parameters and optimizer state are as they were before the step"


@dataclass(eq=False)
class _Page:
    nbytes: int
    places: tuple[int, int] | None  # offsets in the file; None for a page that stays
    current: int = 0  # which place holds the state of the last commit
    written: bool = False  # nothing can be read before the first commit
    slot: mmap.mmap | None = None
    moving: bool = False  # a thread reads into the slot or writes from it
    writing: bool = False  # it is the latter
    wanted: bool = False  # keep it in its slot after that
    error: Exception | None = None  # of that; if it was a write, only the slot holds the page

    def buffer(self) -> memoryview:
        assert self.slot is not None
        return memoryview(self.slot)[: self.nbytes]

    @property
    def is_unwritten(self) -> bool:
        return self.error is not None and self.slot is not None


class FileTier(Tier):
    """Streams pages through `resident_bytes` of anonymous memory from a file in `directory`."""

    mode = "file"

    def __init__(self, directory: Path, resident_bytes: int) -> None:
        self.directory = self.undo_directory = directory
        self.counters = Counters()
        self.page_bytes = page_size(resident_bytes)
        self.resident_bytes = resident_bytes
        slots = resident_bytes // self.page_bytes
        self._room_to_stay = slots - slots // 2
        self._room_to_stream = slots // 2
        self._clock = Clock(self.counters)
        self._pages: list[_Page] = []
        self._free_slots: list[mmap.mmap] = []
        self._queue: list[_Page] = []  # asked for, and not begun
        self._in_step: set[_Page] = set()  # touched or evicted since `begin`
        self._changed = threading.Condition()
        self._file: PageFile | None = None
        self._pool = ThreadPoolExecutor(_THREADS, "qlora_ref-paging")
        self._finalizer = weakref.finalize(self, _shut_down, self._pool, lambda: None)

    def allocate(self, sizes: Sequence[int]) -> list[int]:
        """See Tier. Pages that stay come first, as long as there is room for them."""
        padded = [-(-size // BLOCK) * BLOCK for size in sizes]
        room = self._room_to_stay - sum(page.places is None for page in self._pages)
        staying = [_Page(size, None, slot=memory(size)) for size in padded[:room]]
        streamed = padded[room:]
        offset = 0
        if streamed:
            self._reserve_slots()
            offset = self._open().grow(2 * sum(streamed))
        first = len(self._pages)
        self._pages += staying
        for size in streamed:
            self._pages.append(_Page(size, (offset, offset + size)))
            offset += 2 * size
        return list(range(first, len(self._pages)))

    def is_streamed(self, page: int) -> bool:
        """See Tier."""
        return self._pages[page].places is not None

    def prefetch(self, pages: Sequence[int]) -> None:
        """See Tier."""
        with self._changed:
            asked = [self._pages[page] for page in pages if self.is_streamed(page)]
            for page in asked:
                page.wanted = page.slot is not None
            self._queue = [page for page in asked if page.slot is None]
            self._pump()

    def touch(self, page: int) -> Tensor:
        """See Tier."""
        entry = self._pages[page]
        if entry.places is not None:
            self._bring(entry)
            self._in_step.add(entry)
        return as_tensor(entry.slot)[: entry.nbytes]

    def evict(self, page: int, changed: bool = True) -> None:
        """See Tier. A page that stays does so."""
        entry = self._pages[page]
        if entry.places is None:
            return
        with self._changed:
            entry.wanted = False
            if changed:
                self._start(entry, self._write, entry.places[1 - entry.current])
                return
            self._in_step.discard(entry)
            if not entry.moving and not entry.is_unwritten:
                self._release(entry)

    def begin(self) -> None:
        """See Tier. What could not be written is tried once more."""
        with self._changed:
            self._wait_for_writes()
            for page in self._pages:
                if page.is_unwritten and page.places is not None:
                    self._start(page, self._write, page.places[page.current])
            self._wait_for_writes()
            self._raise_unwritten()
        self._in_step.clear()

    def commit(self) -> None:
        """See Tier. Pages that are still being written count: their slots hold them until then."""
        with self._changed:
            self._raise_unwritten()
            for page in self._in_step:
                page.current, page.written = 1 - page.current, True
            self._in_step.clear()

    def rollback(self) -> None:
        """See Tier."""
        with self._changed:
            self._queue = []
        self._settle()
        with self._changed:
            for page in self._in_step:
                self._release(page)
            self._in_step.clear()

    def count(self) -> Counters:
        """See Tier."""
        return replace(self.counters)

    def free(self) -> None:
        """See Tier."""
        with self._changed:
            self._queue = []
        self._settle()
        self._finalizer()
        self._pages, self._free_slots, self._file = [], [], None

    def _open(self) -> PageFile:
        if self._file is None:
            self._file = PageFile(self.directory)
            self._finalizer.detach()
            self._finalizer = weakref.finalize(self, _shut_down, self._pool, self._file.close)
        return self._file

    def _reserve_slots(self) -> None:
        """Have slots and threads before the first step: it must not run out of memory half-way."""
        if not self._free_slots and not any(page.places for page in self._pages):
            slots = [memory(self.page_bytes) for _ in range(self._room_to_stream)]
            _start_threads(self._pool)
            self._free_slots = slots

    def _bring(self, page: _Page) -> None:
        """Wait until a page is in its slot and no thread works on it; a failed read is repeated."""
        with self._changed:
            page.wanted = True
            asked = page.slot is not None or page in self._queue
            self._count(asked, ready=page.slot is not None and not page.moving)
            with self._clock.stall():
                for _ in range(_ATTEMPTS):
                    self._ask(page)
                    while page.moving or page in self._queue:
                        if not self._make_room():
                            self._changed.wait()
                    if page.slot is not None:
                        return
            assert page.error is not None
            raise page.error

    def _ask(self, page: _Page) -> None:
        if page.slot is None and page not in self._queue:
            self._queue.insert(0, page)
            self._pump()

    def _count(self, asked: bool, ready: bool) -> None:
        if not asked:
            self.counters.misses += 1
        elif ready:
            self.counters.hits += 1
        else:
            self.counters.stalls += 1

    def _make_room(self) -> bool:
        """If no slot will become free by itself, take one from a page that came too early."""
        if any(page.moving for page in self._pages):
            return False
        self._raise_unwritten()
        idle = [p for p in self._pages if p.places and p.slot and p not in self._in_step]
        if not idle:
            raise RuntimeError("every slot holds a page that is still in use")
        self._release(idle[-1])
        return True

    def _raise_unwritten(self) -> None:
        for page in self._pages:
            if page.error is not None and page.slot is not None:
                raise page.error

    # Everything below changes pages with the lock held.

    def _pump(self) -> None:
        """Begin to read what was asked for, while there are slots."""
        while self._queue and self._free_slots:
            page = self._queue.pop(0)
            if page.slot is None:
                page.slot, page.wanted = self._free_slots.pop(), True
                if page.written and page.places is not None:
                    self._start(page, self._read, page.places[page.current])
        self._changed.notify_all()

    def _start(self, page: _Page, move: Callable[[_Page, int], None], place: int) -> None:
        self._pool.submit(move, page, place)
        page.moving, page.writing, page.error = True, move == self._write, None

    def _read(self, page: _Page, place: int) -> None:
        error = self._move(page, PageFile.read, place, "read from")
        with self._changed:
            page.moving, page.error = False, error
            self.counters.bytes_in += page.nbytes if error is None else 0
            if error is not None or not page.wanted:
                self._release(page)
            self._changed.notify_all()

    def _write(self, page: _Page, place: int) -> None:
        error = self._move(page, PageFile.write, place, "written to")
        with self._changed:
            page.moving, page.writing, page.error = False, False, error
            self.counters.bytes_out += page.nbytes if error is None else 0
            if error is None and not page.wanted:
                self._release(page)
            self._changed.notify_all()

    def _move(self, page: _Page, move: Any, place: int, what: str) -> Exception | None:
        """One transfer, outside the lock; an error is kept for the thread that steps."""
        try:
            with self._clock.transfer():
                move(self._open(), page.buffer(), place)
        except OSError as error:
            where = f"{what} {self.directory} ({error.strerror})"
            return OSError(error.errno, f"optimizer state could not be {where}; {_UNDONE}")
        except Exception as error:  # whatever it is, the step must not wait for this page for ever
            return error
        return None

    def _release(self, page: _Page) -> None:
        """Give the slot to the next page that was asked for."""
        if page.slot is not None:
            self._free_slots.append(page.slot)
            page.slot, page.wanted = None, False
        self._pump()

    def _wait_for_writes(self) -> None:
        self._changed.wait_for(lambda: not any(page.writing for page in self._pages))

    def _settle(self) -> None:
        """Wait until nothing moves."""
        with self._changed:
            self._changed.wait_for(lambda: not any(page.moving for page in self._pages))


def _start_threads(pool: ThreadPoolExecutor) -> None:
    """The pool would start them one by one, with stacks of 8 MiB each."""
    all_there = threading.Barrier(_THREADS)
    before = threading.stack_size(_STACK)
    try:
        for _ in range(_THREADS):
            pool.submit(all_there.wait)
    except RuntimeError as error:
        all_there.abort()
        raise MemoryError("no memory for the threads of the pages; nothing has changed") from error
    finally:
        threading.stack_size(before)


def _shut_down(pool: ThreadPoolExecutor, close: Callable[[], None]) -> None:
    # Nothing is under way: a thread that moves a page keeps its tier alive, and `free` waits. The
    # last to do so may be the one that ends here, so that nobody can wait for the threads.
    pool.shutdown(wait=False)
    close()
