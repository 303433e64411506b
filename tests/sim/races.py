"""Finds accesses to one address that nothing puts in an order.

Two accesses by different threads, one of them a store, need between them a barrier of the block or
of the warp. The shadow of each cell (the smallest number of bytes that a kernel moves at once)
keeps who stored and who loaded last, and at which count of barriers: whoever comes later checks
that a barrier lies between. This finds what a lucky order of execution hides.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .formats import Array
from .memory import Fault

# Who: 0 for nobody, or 1 + (a block's number << 10 | a thread's number in it). When several threads
# have read a cell: the first one of their warp or block, and a flag that says whether all of it
# count as readers, or all threads there are.
THREAD_BITS, LANE_BITS = 10, 5
_WARP, _BLOCK, _EVERYBODY = 1 << 60, 1 << 61, 1 << 62
_FLAGS = _WARP | _BLOCK | _EVERYBODY


@dataclass
class Access:
    """The threads that access memory at once, and the barriers they have passed."""

    who: Array  # int64
    block_barriers: Array
    warp_barriers: Array

    def __getitem__(self, chosen: Array) -> Access:
        return Access(self.who[chosen], self.block_barriers[chosen], self.warp_barriers[chosen])


class _Last:
    """Who accessed each cell last. Zero-filled memory costs nothing until it is used."""

    def __init__(self, cells: int) -> None:
        self.who = np.zeros(cells, np.int64)
        self._block_barriers = np.zeros(cells, np.int32)
        self._warp_barriers = np.zeros(cells, np.int32)

    def get(self, cells: Array) -> Access:
        return Access(self.who[cells], self._block_barriers[cells], self._warp_barriers[cells])

    def barriers(self, cells: Array) -> Array:
        return self._block_barriers[cells]

    def set(self, cells: Array, now: Access) -> None:
        self.who[cells] = now.who
        self._block_barriers[cells] = now.block_barriers
        self._warp_barriers[cells] = now.warp_barriers


class Shadow:
    """Of one space of memory, during one launch."""

    def __init__(self, name: str, size: int, granule: int) -> None:
        self._name = name
        self._granule = granule
        cells = -(-size // granule)
        self._store, self._load = _Last(cells), _Last(cells)

    def access(self, offsets: Array, size: int, stores: bool, now: Access) -> None:
        """Check and note an access of `size` bytes by each thread."""
        count = max(1, size // self._granule)
        cells = (offsets[:, None] // self._granule + np.arange(count)).reshape(-1)
        if count > 1:
            now = now[np.repeat(np.arange(len(offsets)), count)]
        self._check(cells, "write" if stores else "read", "write", self._store, now, count)
        if stores:
            self._check(cells, "write", "read", self._load, now, count)
            self._store.set(cells, now)
            self._load.who[cells] = 0
        else:
            self._add_readers(cells, now)

    def _check(
        self, cells: Array, what: str, after: str, last: _Last, now: Access, count: int
    ) -> None:
        before = last.who[cells]
        others = np.flatnonzero((before != 0) & (before != now.who))
        if not len(others):
            return
        bad = others[~_in_order(last.get(cells[others]), now[others])]
        if len(bad):
            who = _name(int(before[bad[0]]))
            threads = np.zeros(len(cells) // count, np.bool_)
            threads[bad // count] = True
            raise Fault(
                f"race in {self._name} memory: {what} after {after} by {who}, with no barrier "
                "between",
                threads,
            )

    def _add_readers(self, cells: Array, now: Access) -> None:
        """Note readers. Those that are there already still count, unless a barrier lies between."""
        new = np.flatnonzero(~self._are_known(cells, now))  # few: tables are read by many, often
        cells, now = cells[new], now[new]
        before = self._load.get(cells)
        keeps = (before.who != 0) & ~_in_order(before, now)
        who = np.where(keeps, _both(before.who, now.who), now.who)
        self._load.set(cells, Access(who, now.block_barriers, now.warp_barriers))
        # Several threads may have come to a cell with this one instruction.
        while len(lost := np.flatnonzero(self._load.who[cells] != who)):
            cells, who = cells[lost], _both(self._load.who[cells[lost]], who[lost])
            self._load.who[cells] = who

    def _are_known(self, cells: Array, now: Access) -> Array:
        """Whether all of a reader's block count as readers already, or everybody."""
        before = self._load.who[cells]
        known = before == _EVERYBODY
        blocks = np.flatnonzero(before & _BLOCK)
        same = _block_of(before[blocks]) == _block_of(now.who[blocks])
        known[blocks] = same & (self._load.barriers(cells[blocks]) == now.block_barriers[blocks])
        return known


def _block_of(who: Array) -> Array:
    return ((who & ~_FLAGS) - 1) >> THREAD_BITS


def _warp_of(who: Array) -> Array:
    return ((who & ~_FLAGS) - 1) >> LANE_BITS


def _both(one: Array, other: Array) -> Array:
    """The smallest group that has both."""
    flags = (one | other) & _FLAGS
    in_block = (_block_of(one) == _block_of(other)) & (flags < _EVERYBODY)
    in_warp = in_block & (_warp_of(one) == _warp_of(other)) & (flags < _BLOCK)
    block = (_block_of(one) << THREAD_BITS) + 1 | _BLOCK
    warp = (_warp_of(one) << LANE_BITS) + 1 | _WARP
    group = np.where(in_warp, warp, np.where(in_block, block, _EVERYBODY))
    return np.where(one == other, one, group)


def _in_order(before: Access, now: Access) -> Array:
    """Whether a barrier, or the order of one thread's own instructions, lies between."""
    in_block = (_block_of(before.who) == _block_of(now.who)) & (before.who < _EVERYBODY)
    by_block = in_block & (before.block_barriers < now.block_barriers)
    in_warp = (_warp_of(before.who) == _warp_of(now.who)) & (before.who < _BLOCK)
    by_warp = in_warp & (before.warp_barriers < now.warp_barriers)
    return (before.who == now.who) | by_block | by_warp


def _name(who: int) -> str:
    if who & _FLAGS:
        return "several threads"
    block, thread = divmod(who - 1, 1 << THREAD_BITS)
    return f"thread {thread} of block {block}"
