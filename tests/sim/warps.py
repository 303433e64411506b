"""What the threads of a warp do together (PTX ISA 9.7.9.8, 9.7.13 to 9.7.15).

Each function below is called when all threads that the instruction's mask names have come.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import Options
from .formats import TYPES, Array, from_bfloat16
from .memory import Fault
from .operands import Operands, Reader, register_in
from .transfers import locate, watch

if TYPE_CHECKING:
    from .machine import Chunk

WARP = 32


@dataclass
class Together:
    """An instruction of a warp: the mask of threads that it waits for (None: all), its effect."""

    mask: Reader | None
    run: Callable[[Chunk, Array], None]  # on the numbers of threads, all that the masks name


Builder = Callable[[Options, Operands], Together]

TOGETHER: list[tuple[re.Pattern[str], Builder]] = []


together = register_in(TOGETHER)


@together(r"bar\.warp\.sync")
def warp_barrier(o: Options, operands: Operands) -> Together:
    def run(chunk: Chunk, threads: Array) -> None:
        chunk.warp_barriers[np.unique(threads // WARP)] += 1

    return Together(operands.reader(0, "u32"), run)


@together(r"shfl\.sync\.(?P<mode>up|down|bfly|idx)\.b32")
def shuffle(o: Options, operands: Operands) -> Together:
    """Each thread's number is that of another lane of its segment, or its own outside of it."""
    write = operands.writer(0, "b32") if "|" not in operands.text(0) else None
    both = operands.text(0).split("|")
    value, lanes, limits = (operands.reader(i, k) for i, k in ((1, "b32"), (2, "u32"), (3, "u32")))

    def run(chunk: Chunk, threads: Array) -> None:
        def given(read: Reader) -> Array:
            return np.broadcast_to(read(chunk, threads), threads.shape).astype(np.int64)

        lane, by, limit = threads % WARP, given(lanes) & 31, given(limits)
        segment, clamp = limit >> 8 & 31, limit & 31
        least = lane & segment
        most = least | (clamp & ~segment)
        source = {
            "up": lane - by,
            "down": lane + by,
            "bfly": lane ^ by,
            "idx": least | (by & ~segment),
        }[o["mode"]]
        inside = source >= most if o["mode"] == "up" else source <= most
        origin = threads - lane + np.where(inside, source, lane)
        result = _of_others(chunk, threads, given(value), origin)
        if write is not None:
            write(chunk, threads, result)
        else:
            chunk.registers[both[0]][threads] = result
            chunk.registers[both[1]][threads] = inside

    return Together(operands.reader(4, "u32"), run)


def _of_others(chunk: Chunk, threads: Array, values: Array, origin: Array) -> Array:
    everyone = np.full(chunk.count, -1, np.int64)
    everyone[threads] = values
    result = everyone[origin]
    if (result < 0).any():
        raise Fault("a shuffle reads from a lane that takes no part in it", result < 0)
    return result.astype(np.uint32)


def _by_warp(threads: Array) -> tuple[Array, Array]:
    """The warps, and for each thread the position of its own among them."""
    return np.unique(threads // WARP, return_inverse=True)


@together(r"vote\.sync\.(?P<mode>ballot|any|all)\.(b32|pred)")
def vote(o: Options, operands: Operands) -> Together:
    kind = "b32" if o["mode"] == "ballot" else "pred"
    write, condition = operands.writer(0, kind), operands.reader(1, "pred")

    def run(chunk: Chunk, threads: Array) -> None:
        given = np.broadcast_to(condition(chunk, threads), threads.shape)
        warps, own = _by_warp(threads)
        ayes = np.zeros(len(warps), np.int64)
        np.add.at(ayes, own, given.astype(np.int64) << threads % WARP)
        if o["mode"] == "ballot":
            write(chunk, threads, ayes[own].astype(np.uint32))
            return
        present = np.zeros(len(warps), np.int64)
        np.add.at(present, own, np.int64(1) << threads % WARP)
        result = ayes != 0 if o["mode"] == "any" else ayes == present
        write(chunk, threads, result[own])

    return Together(operands.reader(2, "u32"), run)


REDUCE = {
    **{"add": np.add, "min": np.minimum, "max": np.maximum},
    **{"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor},
}


@together(r"redux\.sync\.(?P<op>add|min|max|and|or|xor)\.(?P<type>[usb]32)")
def reduce(o: Options, operands: Operands) -> Together:
    write, value = operands.writer(0, o["type"]), operands.reader(1, o["type"])

    def run(chunk: Chunk, threads: Array) -> None:
        given = np.broadcast_to(value(chunk, threads), threads.shape)
        order = np.argsort(threads // WARP, kind="stable")
        warps, own = _by_warp(threads)
        starts = np.searchsorted(threads[order] // WARP, warps)
        write(chunk, threads, REDUCE[o["op"]].reduceat(given[order], starts)[own])

    return Together(operands.reader(2, "u32"), run)


@together(r"ldmatrix\.sync\.aligned\.m8n8\.x(?P<count>[124])(?P<trans>\.trans)?\.shared\.b16")
def load_matrices(o: Options, operands: Operands) -> Together:
    """Thread 8 i + j of a warp says where row j of the 8 x 8 matrix i lies, of two bytes each.

    Register i of thread 4 g + t gets the elements (g, 2t) and (g, 2t + 1), transposed (2t, g) and
    (2t + 1, g).
    """
    count = int(o["count"])
    writers, address = operands.writers(0, "b32"), operands.address(1)

    def run(chunk: Chunk, threads: Array) -> None:
        speakers = threads.reshape(-1, WARP)[:, : 8 * count].reshape(-1)
        space, offsets = locate(chunk, speakers, "shared", address(chunk, speakers), 16)
        watch(chunk, speakers, space, offsets, 16, stores=False)
        rows = space.load(offsets, 16).view(np.uint16)
        matrices = rows.reshape(-1, count, 8, 8)
        if o["trans"]:
            matrices = matrices.swapaxes(2, 3)
        pairs = np.ascontiguousarray(matrices).view(np.uint32)  # (warps, count, 8, 4)
        for i, write in enumerate(writers):
            write(chunk, threads, pairs[:, i].reshape(-1))

    return Together(None, run)


@together(
    r"mma\.sync\.aligned\.m16n8k(?P<depth>8|16)\.row\.col\.f32\.(?P<type>f16|bf16)\.(f16|bf16)\.f32"
)
def multiply_matrices(o: Options, operands: Operands) -> Together:
    """d (16, 8) = a (16, depth) b (depth, 8) + c (16, 8), summed in float32.

    Registers hold pairs of neighbours in the depth; of thread 4 g + t (PTX ISA, "Matrix Fragments
    for mma.m16n8k16"): a at row g + 8 (i % 2), depth 2 t + 8 (i // 2); b at depth 2 t + 8 i, column
    g; c and d at row g + 8 (i // 2), column 2 t + i % 2. Hardware adds in an order of its own.
    """
    depth = int(o["depth"])
    writers = operands.writers(0, "f32")
    a, b = operands.readers(1, "b32"), operands.readers(2, "b32")
    c = operands.readers(3, "f32")
    lane = np.arange(WARP)
    g, t = lane // 4, lane % 4

    def pairs(chunk: Chunk, threads: Array, readers: list[Reader]) -> Array:
        """float32 (registers, warps, 32, 2)."""
        words = [np.broadcast_to(read(chunk, threads), threads.shape) for read in readers]
        bits = np.ascontiguousarray(np.stack(words))[..., None].view(np.uint16)
        numbers = from_bfloat16(bits) if o["type"] == "bf16" else bits.view(np.float16)
        return numbers.astype(np.float32).reshape(len(readers), -1, WARP, 2)

    def run(chunk: Chunk, threads: Array) -> None:
        warps = len(threads) // WARP
        left = np.zeros((warps, 16, depth), np.float32)
        right = np.zeros((warps, depth, 8), np.float32)
        for i, pair in enumerate(pairs(chunk, threads, a)):
            for half in range(2):
                left[:, g + 8 * (i % 2), 2 * t + half + 8 * (i // 2)] = pair[..., half]
        for i, pair in enumerate(pairs(chunk, threads, b)):
            for half in range(2):
                right[:, 2 * t + half + 8 * i, g] = pair[..., half]
        product = left @ right
        for i, (write, read) in enumerate(zip(writers, c, strict=True)):
            start = np.broadcast_to(read(chunk, threads), threads.shape)
            place = product[:, g + 8 * (i // 2), 2 * t + i % 2].reshape(-1)
            write(chunk, threads, (place + start).astype(TYPES["f32"]))

    return Together(None, run)
