"""Bytes that know which of them may be touched, and which were ever written.

Four spaces: global (allocations of one device), shared (of each thread block of a chunk), local
(of each thread) and the parameters of a launch. A space has its own addresses, from 0; as generic
ones they lie in a window of their own, below all addresses of the host, which are those of global
memory.
"""

from __future__ import annotations

import bisect

import numpy as np

from .formats import Array
from .parser import PtxError

WINDOWS = {"param": 0x8_0000_0000, "shared": 0x10_0000_0000, "local": 0x18_0000_0000}
WINDOW_SIZE = 0x8_0000_0000


class Fault(PtxError):
    """What a thread may not do; `place` is its number among those that act (Chunk.acting)."""

    def __init__(self, message: str, bad: Array) -> None:
        super().__init__(message)
        self.place = int(np.flatnonzero(bad)[0])


class Space:
    """Bytes, each written or not; offsets into them are 64-bit arrays, one for each thread."""

    def __init__(self, name: str, data: Array) -> None:
        self.name = name
        self.data = data
        self.written = np.zeros(len(data), np.bool_)

    def load(self, offsets: Array, size: int) -> Array:
        """uint8 (threads, size). All bytes must have been written."""
        cells = offsets[:, None] + np.arange(size)
        unwritten = ~self.written[cells].all(axis=1)
        if unwritten.any():
            raise Fault(f"{self.name} memory is read that nobody has written yet", unwritten)
        return self.data[cells]

    def store(self, offsets: Array, values: Array) -> None:
        """values: uint8 (threads, size). Where addresses are equal, values must be."""
        cells = offsets[:, None] + np.arange(values.shape[1])
        self.data[cells] = values
        self.written[cells] = True
        lost = (self.data[cells] != values).any(axis=1)
        if lost.any():
            raise Fault("race: threads store different values to one address at once", lost)


def check_alignment(addresses: Array, size: int) -> None:
    """An access of 2^k bytes lies at a multiple of them."""
    wrong = addresses % size != 0
    if wrong.any():
        address = int(addresses[wrong][0])
        raise Fault(f"{size} bytes at the address {address:#x}, which is misaligned", wrong)


def check_range(name: str, offsets: Array, size: int, length: int) -> None:
    """An access within a space of one block or thread."""
    outside = (offsets < 0) | (offsets + size > length)
    if outside.any():
        offset = int(offsets[outside][0])
        raise Fault(
            f"{size} bytes at {offset} of {length} bytes of {name} memory: out of bounds", outside
        )


class GlobalMemory(Space):
    """Allocations of exact sizes, at addresses that the host can use as well."""

    _GAP = 256  # between allocations, so that none is next to another

    def __init__(self, size: int) -> None:
        super().__init__("global", np.empty(size, np.uint8))
        self.base = self.data.ctypes.data
        self._starts: list[int] = []
        self._ends: list[int] = []

    @property
    def used(self) -> int:
        """Bytes up to the end of the last allocation."""
        return self._ends[-1] if self._ends else 0

    def allocate(self, size: int, misalignment: int = 0) -> int:
        """The address of so many bytes that hold nothing; 256 divides it, but for a remainder."""
        first = self.used + self._GAP
        start = first + -(self.base + first) % 256 + misalignment
        if start + size > len(self.data):
            raise MemoryError(f"the simulated GPU has {len(self.data)} bytes")
        self._starts.append(start)
        self._ends.append(start + size)
        self.written[start : start + size] = False
        return self.base + start

    def free_all(self) -> None:
        """Forget every allocation."""
        self._starts, self._ends = [], []

    def write(self, address: int, values: bytes | Array) -> None:
        """As the host copies to the device."""
        start = address - self.base
        self.data[start : start + len(values)] = np.frombuffer(values, np.uint8)
        self.written[start : start + len(values)] = True

    def read(self, address: int, size: int) -> tuple[bytes, Array]:
        """As the host copies from the device: the bytes, and which of them were written."""
        start = address - self.base
        return self.data[start : start + size].tobytes(), self.written[start : start + size].copy()

    def check(self, offsets: Array, size: int) -> None:
        """Each access lies in one allocation."""
        if not self._starts:
            raise Fault("global memory is used that was never allocated", np.ones(len(offsets)))
        starts, ends = np.array(self._starts), np.array(self._ends)
        found = np.maximum(np.searchsorted(starts, offsets, "right") - 1, 0)
        outside = (offsets < starts[found]) | (offsets + size > ends[found])
        if outside.any():
            offset = int(offsets[outside][0])
            at = max(0, bisect.bisect_right(self._starts, offset) - 1)
            start, length = self._starts[at], self._ends[at] - self._starts[at]
            raise Fault(
                f"{size} bytes at {offset - start} of an allocation of {length} bytes of global "
                "memory: out of bounds",
                outside,
            )
