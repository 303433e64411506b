"""Loads, stores and asynchronous copies (PTX ISA 9.7.9): checked, then done."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import Options
from .formats import TYPES, Array, size_of, unsigned
from .memory import WINDOW_SIZE, WINDOWS, Fault, Space, check_alignment, check_range
from .operands import Operands, Threads, register_in

if TYPE_CHECKING:
    from .machine import Chunk

Run = Callable[["Chunk", Threads], None]
Builder = Callable[[Options, Operands], Run]

EFFECTS: list[tuple[re.Pattern[str], Builder]] = []


effect = register_in(EFFECTS)


SPACE = r"(\.(?P<space>param|global|shared|local)(::cta)?)?"
HINTS = r"(\.nc)?(\.L1::(no_allocate|evict_first|evict_last))?(\.L2::(64|128|256)B)?"
VECTOR = r"(\.v(?P<count>[24]))?"
TYPE = r"\.(?P<type>[bus](8|16|32|64)|f32|f64)"


def locate(
    chunk: Chunk, threads: Threads, space: str, addresses: Array, size: int
) -> tuple[Space, Array]:
    """Where an access of each thread goes: checked for alignment and bounds."""
    chunk.acting = numbers = chunk.numbers(threads)
    check_alignment(addresses, size)
    space, addresses = _specific(space, addresses)
    if space == "global":
        offsets = addresses - chunk.memory.base
        chunk.memory.check(offsets, size)
        return chunk.memory, offsets
    length = chunk.lengths[space]
    check_range(space, addresses, size, length)
    owner = {"param": 0, "shared": chunk.block[numbers], "local": numbers}[space]
    return chunk.spaces[space], addresses + owner * length


def _specific(space: str, addresses: Array) -> tuple[str, Array]:
    """The space of generic addresses, and theirs in it."""
    if space:
        return space, addresses
    for name, start in WINDOWS.items():
        inside = (addresses >= start) & (addresses < start + WINDOW_SIZE)
        if inside.all():
            return name, addresses - start
        if inside.any():
            raise Fault("generic addresses of several spaces in one access", ~inside)
    return "global", addresses


def watch(
    chunk: Chunk, threads: Threads, space: Space, offsets: Array, size: int, stores: bool
) -> None:
    """Look for races."""
    if space.name in chunk.shadows:
        chunk.acting = chunk.numbers(threads)
        now = chunk.access(chunk.acting)
        chunk.shadows[space.name].access(offsets, size, stores, now)


@effect(rf"ld(\.volatile)?{SPACE}{HINTS}{VECTOR}{TYPE}")
def load(o: Options, operands: Operands) -> Run:
    kind = o["type"]
    count = int(o["count"] or 1)
    size = size_of(kind)
    writers = operands.writers(0, kind)
    address = operands.address(1)

    def run(chunk: Chunk, threads: Threads) -> None:
        space, offsets = locate(chunk, threads, o["space"], address(chunk, threads), size * count)
        watch(chunk, threads, space, offsets, size * count, stores=False)
        values = space.load(offsets, size * count).reshape(-1, count, size)
        for i, write in enumerate(writers):
            write(chunk, threads, np.ascontiguousarray(values[:, i]).view(TYPES[kind])[:, 0])

    return run


@effect(rf"st(\.volatile)?{SPACE}(\.wb)?{HINTS}{VECTOR}{TYPE}")
def store(o: Options, operands: Operands) -> Run:
    kind = o["type"]
    count = int(o["count"] or 1)
    size = size_of(kind)
    address = operands.address(0)
    readers = operands.readers(1, kind)

    def run(chunk: Chunk, threads: Threads) -> None:
        space, offsets = locate(chunk, threads, o["space"], address(chunk, threads), size * count)
        watch(chunk, threads, space, offsets, size * count, stores=True)
        shape = (len(offsets),)
        values = [np.broadcast_to(read(chunk, threads), shape) for read in readers]
        data = np.stack(values, -1).astype(TYPES[kind], copy=False).view(np.uint8)
        space.store(offsets, data.reshape(len(offsets), -1))

    return run


@effect(r"mov\.(?P<type>b32|b64)")
def pack_or_unpack(o: Options, operands: Operands) -> Run:
    """mov between one register and a vector of narrower ones."""
    into_vector = operands.text(0).startswith("{")
    texts = operands.text(0 if into_vector else 1)
    kind = f"b{8 * size_of(o['type']) // len(texts.split(','))}"
    wide, narrow = unsigned(o["type"]), unsigned(kind)
    if into_vector:
        writers, whole = operands.writers(0, kind), operands.reader(1, o["type"])

        def unpack(chunk: Chunk, threads: Threads) -> None:
            value = np.asarray(whole(chunk, threads))
            for i, write in enumerate(writers):
                part = value >> wide(8 * np.dtype(narrow).itemsize * i)
                write(chunk, threads, part.astype(narrow))

        return unpack
    write, readers = operands.writer(0, o["type"]), operands.readers(1, kind)

    def pack(chunk: Chunk, threads: Threads) -> None:
        value = wide(0)
        for i, read in enumerate(readers):
            part = np.asarray(read(chunk, threads)).astype(wide)
            value = value | part << wide(8 * np.dtype(narrow).itemsize * i)
        write(chunk, threads, value)

    return pack


@dataclass
class Copies:
    """Asynchronous copies of one instruction, until a thread has waited for them."""

    threads: Array
    groups: Array  # the number of the group that each thread's copy will be in
    target: Array
    source: Array
    reads: Array  # whether the source is read; zeros otherwise
    size: int


@effect(r"cp\.async\.(ca|cg)\.shared(::cta)?\.global(\.L2::(64|128|256)B)?")
def start_copy(o: Options, operands: Operands) -> Run:
    target, source = operands.address(0), operands.address(1)
    size = int(operands.text(2), 0)
    read = operands.reader(3, "u32") if len(operands) > 3 else lambda chunk, threads: size

    def run(chunk: Chunk, threads: Threads) -> None:
        numbers = chunk.numbers(threads)
        shared, to = locate(chunk, threads, "shared", target(chunk, threads), size)
        origin = source(chunk, threads)
        wanted = np.broadcast_to(read(chunk, threads), (len(numbers),))
        if ((wanted != 0) & (wanted != size)).any():
            raise NotImplementedError("an asynchronous copy of a part, with zeros behind it")
        some = wanted == size
        if some.any():
            locate(chunk, numbers[some], "global", origin[some], size)
        start = origin - chunk.memory.base
        watch(chunk, numbers[some], chunk.memory, start[some], size, stores=False)
        watch(chunk, threads, shared, to, size, stores=True)
        shared.written[to[:, None] + np.arange(size)] = False  # until it is waited for
        groups = chunk.copy_groups[numbers]
        chunk.copies.append(Copies(numbers, groups, to, start, some, size))

    return run


@effect(r"cp\.async\.commit_group")
def end_copy_group(o: Options, operands: Operands) -> Run:
    def run(chunk: Chunk, threads: Threads) -> None:
        chunk.copy_groups[threads] += 1

    return run


@effect(r"cp\.async\.(?P<what>wait_group|wait_all)")
def wait_for_copies(o: Options, operands: Operands) -> Run:
    pending = int(operands.text(0), 0) if o["what"] == "wait_group" else -1

    def run(chunk: Chunk, threads: Threads) -> None:
        waits = np.zeros(len(chunk.copy_groups), np.bool_)
        waits[threads] = True
        done = []
        for copies in chunk.copies:
            ready = waits[copies.threads] & (
                copies.groups < chunk.copy_groups[copies.threads] - pending
            )
            _finish(chunk, copies, ready)
            if not ready.all():
                done.append(_some(copies, ~ready))
        chunk.copies = done

    return run


def _some(copies: Copies, chosen: Array) -> Copies:
    parts = (copies.threads, copies.groups, copies.target, copies.source, copies.reads)
    return Copies(*(part[chosen] for part in parts), copies.size)


def _finish(chunk: Chunk, copies: Copies, ready: Array) -> None:
    """Only now are the bytes there: for the thread that waited, until a barrier makes them so for
    others."""
    if not ready.any():
        return
    done = _some(copies, ready)
    values = np.zeros((len(done.threads), done.size), np.uint8)
    chunk.acting = done.threads[done.reads]
    values[done.reads] = chunk.memory.load(done.source[done.reads], done.size)
    shared = chunk.spaces["shared"]
    watch(chunk, done.threads, shared, done.target, done.size, stores=True)
    shared.store(done.target, values)
