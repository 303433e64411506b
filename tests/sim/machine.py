"""Executes a kernel: all threads of some thread blocks at once, as numpy arrays.

Threads that stand at the same instruction execute it together. Those that are farthest behind go
first, until they have caught up with the next ones; a thread that waits for others lets them pass.
So every order of the program is kept, and only one of those that hardware may choose is run: what
depends on the choice is found by the shadows of `races`, not by trying.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .formats import Array, unsigned
from .memory import Fault, GlobalMemory, Space
from .operands import Threads
from .parser import PtxError
from .program import Barrier, Program, Step
from .races import THREAD_BITS, Access, Shadow
from .transfers import Copies
from .warps import WARP, Together

ALL = slice(None)
_ALL_LANES = np.int64((1 << WARP) - 1)
CHUNK_THREADS = 32768
RUNS, AT_BARRIER, AT_WARP, DONE = range(4)


@dataclass
class Launch:
    """What <<<grid, block, dynamic_shared>>> and the arguments say."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    parameters: bytes
    dynamic_shared: int


class Failure(PtxError):
    """What went wrong, with the kernel, the source line, the thread and the instruction."""


def execute(program: Program, launch: Launch, memory: GlobalMemory) -> None:
    """Run a kernel to its end."""
    threads = int(np.prod(launch.block))
    if threads % WARP or not 0 < threads <= 1024:
        raise PtxError(f"expected whole warps, 32 to 1024 threads in a block, got {launch.block}")
    blocks = int(np.prod(launch.grid))
    shadow = Shadow("global", memory.used, program.granules["global"])
    step = max(1, CHUNK_THREADS // threads)
    with np.errstate(all="ignore"):
        for first in range(0, blocks, step):
            Chunk(program, launch, memory, range(first, min(first + step, blocks)), shadow).run()


class Chunk:
    """Some blocks of a launch; threads are numbered through, block by block."""

    def __init__(
        self,
        program: Program,
        launch: Launch,
        memory: GlobalMemory,
        blocks: range,
        shadow: Shadow,
    ) -> None:
        self._program = program
        self.memory = memory
        self.block_threads = int(np.prod(launch.block))
        self.blocks = blocks
        self.count = len(blocks) * self.block_threads
        self._everyone = np.arange(self.count)
        self.block = self._everyone // self.block_threads  # of the chunk
        thread = self._everyone % self.block_threads
        self._who = ((self.block + blocks.start) << THREAD_BITS | thread) + 1
        self._set_up_registers(launch)
        self._set_up_memory(launch, shadow)
        self._position = np.zeros(self.count, np.int64)
        self._state = np.zeros(self.count, np.int8)
        self._block_barriers = np.zeros(len(blocks), np.int32)
        self.warp_barriers = np.zeros(self.count // WARP, np.int32)
        self.copy_groups = np.zeros(self.count, np.int64)
        self.copies: list[Copies] = []
        self.acting = self._everyone  # the threads that a Fault counts

    def _set_up_registers(self, launch: Launch) -> None:
        kernel = self._program.kernel
        self.registers: dict[str, Array] = {
            name: np.zeros(self.count, unsigned(kind)) for name, kind in kernel.registers.items()
        }
        thread = self._everyone % self.block_threads
        block = self.block + self.blocks.start
        for axis, name in enumerate("xyz"):
            sizes = ((thread, launch.block, "tid"), (block, launch.grid, "ctaid"))
            for number, size, what in sizes:
                before = int(np.prod(size[:axis]))
                place = number // before % size[axis]
                self.registers[f"%{what}.{name}"] = place.astype(np.uint32)
                self.registers[f"%n{what}.{name}"] = np.full(self.count, size[axis], np.uint32)
        self.registers["%laneid"] = (thread % WARP).astype(np.uint32)
        self.registers["%warpid"] = (thread // WARP).astype(np.uint32)

    def _set_up_memory(self, launch: Launch, shadow: Shadow) -> None:
        kernel = self._program.kernel

        def end_of(arrays: dict[str, tuple[int, int]]) -> int:
            return -(-max((o + size for o, size in arrays.values()), default=0) // 16) * 16

        self.dynamic_shared = end_of(kernel.shared)
        self.lengths = {
            "param": len(launch.parameters),
            "shared": self.dynamic_shared + -(-launch.dynamic_shared // 16) * 16,
            "local": end_of(kernel.local),
        }
        owners = {"param": 1, "shared": len(self.blocks), "local": self.count}
        self.spaces = {
            name: Space(name, np.zeros(owners[name] * length, np.uint8))
            for name, length in self.lengths.items()
        }
        self.spaces["param"].data[:] = np.frombuffer(launch.parameters, np.uint8)
        self.spaces["param"].written[:] = True
        size = len(self.spaces["shared"].data)
        granule = self._program.granules["shared"]
        self.shadows = {"global": shadow, "shared": Shadow("shared", size, granule)}

    def numbers(self, threads: Threads) -> Array:
        """The numbers of the threads that execute."""
        return self._everyone if isinstance(threads, slice) else threads

    def access(self, numbers: Array) -> Access:
        """Who accesses memory now."""
        return Access(
            self._who[numbers],
            self._block_barriers[self.block[numbers]],
            self.warp_barriers[numbers // WARP],
        )

    def run(self) -> None:
        """Until all threads are done."""
        while (self._state != DONE).any():
            runs = self._state == RUNS
            if not runs.any():
                if not self._pass_barriers():
                    self._fail_at(int(np.flatnonzero(self._state != DONE)[0]), "deadlock")
                continue
            positions = self._position[runs]
            start = int(positions.min())
            ahead = positions[positions > start]
            stop = int(ahead.min()) if len(ahead) else len(self._program.steps)
            group = np.flatnonzero(runs & (self._position == start))
            self._run_group(ALL if len(group) == self.count else group, start, stop)

    def _run_group(self, group: Threads, position: int, stop: int) -> None:
        """In a straight line: until the group splits, waits or meets the next one."""
        while position < stop:
            step = self._program.steps[position]
            try:
                following = self._execute(step, group, position)
            except Fault as fault:
                self._fail_at(int(self.acting[fault.place]), str(fault), step)
            except (PtxError, NotImplementedError) as error:
                self._fail_at(int(self.numbers(group)[0]), str(error), step)
            if following is None:
                return
            position = following
            if step.target is not None:
                break
        self._position[group] = position

    def _acting(self, step: Step, group: Threads) -> Threads:
        """Those whose predicate is true."""
        if step.condition is None:
            return group
        numbers = self.numbers(group)
        holds = np.broadcast_to(step.condition(self, group), numbers.shape)
        return group if holds.all() else numbers[holds]

    def _execute(self, step: Step, group: Threads, position: int) -> int | None:
        """The group's next position; None if its threads part, wait or are done."""
        acting = self._acting(step, group)
        self.acting = numbers = self.numbers(acting)
        if step.ends or step.target is not None:
            return self._go(step, group, numbers, position)
        if isinstance(step.action, Barrier | Together):
            if acting is not group:
                raise PtxError("threads do together what a predicate lets only some do")
            return self._meet(step.action, group, numbers, position)
        assert step.action is not None
        if len(numbers):
            step.action(self, acting)
        return position + 1

    def _go(self, step: Step, group: Threads, numbers: Array, position: int) -> int | None:
        if not len(numbers):
            return position + 1
        is_whole = len(numbers) == len(self.numbers(group))
        if step.target is not None and is_whole:
            return step.target
        self._position[group] = position + 1
        if step.ends:
            self._state[numbers] = DONE
        else:
            assert step.target is not None
            self._position[numbers] = step.target
        return None

    def _meet(
        self, action: Barrier | Together, group: Threads, numbers: Array, position: int
    ) -> int | None:
        if isinstance(action, Together) and _is_complete(self, action, group, numbers):
            action.run(self, numbers)
            return position + 1
        self._position[group] = position
        if isinstance(action, Barrier):
            self._state[group] = AT_BARRIER
            return None
        self._state[group] = AT_WARP
        self._pass_warp(action, position)
        return None

    def _pass_warp(self, action: Together, position: int) -> None:
        """Let those go on whose masks name only threads that have come."""
        here = (self._state == AT_WARP) & (self._position == position)
        numbers = np.flatnonzero(here)
        lanes = (here.reshape(-1, WARP).astype(np.int64) << np.arange(WARP)).sum(1)
        left = ((self._state == DONE).reshape(-1, WARP).astype(np.int64) << np.arange(WARP)).sum(1)
        wanted = _mask(self, action, numbers)
        self.acting = numbers
        if (wanted & left[numbers // WARP]).any():
            raise Fault("waits for a thread that has returned", wanted & left[numbers // WARP])
        ready = numbers[(wanted & ~lanes[numbers // WARP]) == 0]
        if len(ready):
            self.acting = ready
            action.run(self, ready)
            self._state[ready] = RUNS
            self._position[ready] += 1

    def _pass_barriers(self) -> bool:
        """Let the blocks go on whose threads all wait at their barrier."""
        by_block = self._state.reshape(len(self.blocks), -1)
        there = (by_block == AT_BARRIER).any(axis=1)
        complete = (by_block == AT_BARRIER).all(axis=1)
        passed = False
        for position in np.unique(self._position[self._state == AT_BARRIER]):
            at = (self._position == position).reshape(len(self.blocks), -1).all(axis=1) & complete
            threads = np.flatnonzero(np.repeat(at, self.block_threads))
            if not len(threads):
                continue
            action = self._program.steps[position].action
            assert isinstance(action, Barrier)
            action.finish(self, threads)
            self._state[threads] = RUNS
            self._position[threads] += 1
            self._block_barriers[at] += 1
            self.warp_barriers[np.unique(threads // WARP)] += 1
            passed = True
        if not passed and there.any():
            waits = int(np.flatnonzero(self._state == AT_BARRIER)[0])
            self._fail_at(waits, "a barrier that other threads of the block do not reach")
        return passed

    def _fail_at(self, number: int, message: str, step: Step | None = None) -> None:
        step = step or self._program.steps[self._position[number]]
        block, thread = divmod(number, self.block_threads)
        raise Failure(
            f"{message}\n  kernel {self._program.kernel.name}\n  line {step.instruction.line}\n"
            f"  block {block + self.blocks.start}, thread {thread}\n  {step.instruction}"
        )


def _is_complete(chunk: Chunk, action: Together, group: Threads, numbers: Array) -> bool:
    """Whether all that the masks may name are here: whole warps."""
    if len(numbers) % WARP:
        return False
    rows = numbers.reshape(-1, WARP)
    whole = (rows[:, 0] % WARP == 0) & (rows[:, -1] == rows[:, 0] + WARP - 1)
    return bool(whole.all() and (_mask(chunk, action, group) == _ALL_LANES).all())


def _mask(chunk: Chunk, action: Together, threads: Threads) -> Array:
    mask = _ALL_LANES if action.mask is None else action.mask(chunk, threads)
    return np.broadcast_to(mask, chunk.numbers(threads).shape).astype(np.int64)
