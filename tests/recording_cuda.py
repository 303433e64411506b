"""A stand-in for a GPU's memory and streams, which keeps a record and lets nothing wrong pass.

Memory is the host's. What is put on a side stream is done as late as its waits allow: when the
stream that computes waits for it, or when the device is synchronised. A wait that is missing thus
shows in the bits. Moves of managed memory change no bits: the record says where pages were.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor


class Stream:
    """Work in order; `done` of it has happened."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.work: list[Any] = []
        self.done = 0
        self.follows_compute = False  # it waits for what was computed before its next work

    def run(self, until: int) -> None:
        while self.done < until:
            work = self.work[self.done]
            self.done += 1
            work()


class Event:
    """The point in a stream's work at which it was recorded."""

    def __init__(self, stream: Stream, clock: Clock) -> None:
        self.stream, self.time = stream, None

        def happened() -> None:
            self.time = clock.now

        stream.work.append(happened)
        self.position = len(stream.work)

    def happen(self) -> None:
        self.stream.run(self.position)


class Clock:
    """Time passes when something moves: a second a byte."""

    now = 0.0


class RecordingCuda:
    """Implements CudaCalls; `log` holds what happened, in the order in which it happened."""

    def __init__(self, managed: bool = True, room: int = 1 << 30) -> None:
        self.managed, self.room = managed, room
        self.log: list[tuple[Any, ...]] = []
        self.memory: dict[int, Any] = {}  # address -> buffer of what is allocated
        self.freed: set[int] = set()
        self.on_device_now: dict[int, bool] = {}
        self.most_on_device = 0
        self.compute, self.streams, self.clock = Stream("compute"), [], Clock()

    def has_managed_memory(self) -> bool:
        return self.managed

    def allocate_managed(self, nbytes: int) -> int:
        if nbytes > self.room:
            raise MemoryError("out of memory (2)")
        self.room -= nbytes
        buffer = (ctypes.c_uint8 * nbytes)()
        address = ctypes.addressof(buffer)
        self.memory[address] = buffer
        self.log.append(("allocate", address, nbytes))
        return address

    def free_managed(self, address: int) -> None:
        assert address in self.memory, "freed twice, or never allocated"
        assert all(stream.done == len(stream.work) for stream in self.streams), "freed in use"
        self.room += len(self.memory[address])
        # The buffer is kept, so that no new one gets the same address.
        self.freed.add(address)
        self.log.append(("free", address))
        self.kept = [*getattr(self, "kept", []), self.memory.pop(address)]

    def advise(self, address: int, nbytes: int) -> None:
        assert nbytes == len(self.memory[address])
        self.log.append(("advise", address, nbytes))

    def move(self, address: int, nbytes: int, to_device: bool, stream: Any) -> None:
        assert stream in self.streams, "moves belong on a side stream"
        assert nbytes == len(self.memory[address])
        if not to_device:
            assert stream.follows_compute, "what leaves may still be computed with"
            stream.follows_compute = False

        def moved() -> None:
            self.clock.now += nbytes
            self.log.append(("in" if to_device else "out", address, nbytes, stream.name))
            self.on_device_now[address] = to_device
            there = sum(len(self.memory[a]) for a, here in self.on_device_now.items() if here)
            self.most_on_device = max(self.most_on_device, there)

        stream.work.append(moved)

    def as_tensor(self, address: int, nbytes: int) -> Tensor:
        return torch.frombuffer(self.memory[address], dtype=torch.uint8)[:nbytes]

    def pinned(self, nbytes: int) -> Tensor:
        if nbytes > self.room:
            raise RuntimeError("CUDA error: out of memory")
        self.room -= nbytes
        self.log.append(("pinned", nbytes))
        return torch.full((nbytes,), 0xAA, dtype=torch.uint8)

    def on_device(self, nbytes: int) -> Tensor:
        self.log.append(("on_device", nbytes))
        return torch.full((nbytes,), 0x55, dtype=torch.uint8)

    def copy(self, target: Tensor, source: Tensor, stream: Any) -> None:
        assert stream in self.streams, "copies belong on a side stream"
        assert target.shape == source.shape

        def copied() -> None:
            self.clock.now += target.numel()
            self.log.append(("copy", target.numel(), stream.name))
            target.copy_(source)

        stream.work.append(copied)

    def new_stream(self) -> Stream:
        self.streams.append(Stream(f"side {len(self.streams)}"))
        return self.streams[-1]

    def record(self, stream: Stream | None) -> Event:
        event = Event(stream or self.compute, self.clock)
        if stream is None:  # what computes is the host itself, which is there already
            event.happen()
        return event

    def wait(self, stream: Stream | None, event: Event) -> None:
        if stream is None:
            event.happen()
        else:
            stream.work.append(event.happen)
            stream.follows_compute |= event.stream is self.compute

    def is_done(self, event: Event) -> bool:
        return event.stream.done >= event.position

    def seconds(self, first: Event, second: Event) -> float:
        assert self.is_done(first) and self.is_done(second)
        return second.time - first.time

    def synchronize(self) -> None:
        for stream in reversed(self.streams):  # what leaves first: it waits for what it must
            stream.run(len(stream.work))
        self.log.append(("synchronize",))
