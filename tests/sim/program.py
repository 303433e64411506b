"""A kernel's instructions, ready to be executed: each bound to what it does and to its operands.

Read next: machine.py.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from . import conversions  # noqa: F401  (registers its functions)
from .arithmetic import PURE, Options, Pure, wide
from .operands import Operands, Reader, Threads
from .parser import Instruction, Kernel, Module, PtxError
from .transfers import EFFECTS, Run
from .warps import TOGETHER, Together

if TYPE_CHECKING:
    from .machine import Chunk

BARRIER = re.compile(r"bar(rier)?\.(sync(\.aligned)?|red\.(?P<op>and|or)\.pred)")


@dataclass
class Barrier:
    """A barrier of the block; what becomes of the condition that bar.red asks for."""

    finish: Run


@dataclass
class Step:
    """An instruction, ready to be executed."""

    instruction: Instruction
    action: Run | Together | Barrier | None  # None: a jump, or the end
    condition: Reader | None
    target: int | None  # of a jump
    ends: bool = False


@dataclass
class Program:
    """A kernel, ready to be executed."""

    kernel: Kernel
    module: Module
    steps: list[Step] = field(default_factory=list)
    granules: dict[str, int] = field(default_factory=dict)  # the least bytes moved at once

    def __post_init__(self) -> None:
        self.steps = [self._step(instruction) for instruction in self.kernel.instructions]
        for space in ("shared", "global"):
            sizes = [_bytes_moved(i) for i in self.kernel.instructions if _may_touch(i, space)]
            self.granules[space] = min(sizes, default=4)

    def _step(self, instruction: Instruction) -> Step:
        operands = Operands(self.module, self.kernel, instruction)
        condition = None
        if instruction.predicate is not None:
            text = "!" * instruction.negated + instruction.predicate
            condition = Operands(
                self.module, self.kernel, Instruction(None, False, "", (text,), "")
            ).reader(0, "pred")
        if instruction.mnemonic in ("bra", "bra.uni"):
            return Step(instruction, None, condition, self.kernel.labels[operands.text(0)])
        if instruction.mnemonic in ("ret", "exit"):
            return Step(instruction, None, condition, None, ends=True)
        return Step(instruction, _action(instruction.mnemonic, operands), condition, None)


def _action(mnemonic: str, operands: Operands) -> Run | Together | Barrier:
    is_vector = any(operands.text(i).startswith("{") for i in range(len(operands)))
    if not (mnemonic.startswith("mov") and is_vector) and (found := _pure(mnemonic)):
        return _bind(*found, operands)
    for pattern, builder in (*EFFECTS, *TOGETHER):
        if match := pattern.fullmatch(mnemonic):
            return builder(_options(match), operands)
    if match := re.fullmatch(
        r"(bar|barrier)\.(sync(\.aligned)?|red\.(?P<op>and|or)\.pred)", mnemonic
    ):
        return _barrier(_options(match), operands)
    raise PtxError(f"instruction not known: {mnemonic}")


@functools.cache
def _pure(mnemonic: str) -> tuple[Pure, Options] | None:
    for candidate in PURE:
        if match := candidate.pattern.fullmatch(mnemonic):
            return candidate, _options(match)
    return None


def _options(match: re.Match[str]) -> Options:
    return {name: text or "" for name, text in match.groupdict().items()}


def _bind(pure: Pure, options: Options, operands: Operands) -> Run:
    known = dict(options)
    if "type" in known:
        known["wide"] = wide(known["type"])
    kinds = [known.get(name, name) for name in pure.sources.split()]
    kinds += ["pred"] if options.get("logic") else []
    if len(operands) != 1 + len(kinds):
        raise PtxError(f"expected {1 + len(kinds)} operands, got {len(operands)}")
    readers = [operands.reader(i + 1, kind) for i, kind in enumerate(kinds)]
    write = operands.writer(0, known.get(pure.result, pure.result))

    def run(chunk: Chunk, threads: Threads) -> None:
        write(chunk, threads, pure.function(options, *[r(chunk, threads) for r in readers]))

    return run


def _barrier(options: Options, operands: Operands) -> Barrier:
    reduces = bool(options["op"])
    if operands.text(1 if reduces else 0) != "0" or len(operands) > (3 if reduces else 1):
        raise PtxError("barriers other than 0, or of some threads, are not modelled")
    if not reduces:
        return Barrier(lambda chunk, threads: None)
    write, condition = operands.writer(0, "pred"), operands.reader(2, "pred")
    combine = np.all if options["op"] == "and" else np.any

    def finish(chunk: Chunk, threads: Threads) -> None:
        given = np.broadcast_to(condition(chunk, threads), threads.shape)
        by_block = combine(given.reshape(-1, chunk.block_threads), axis=1)
        write(chunk, threads, np.repeat(by_block, chunk.block_threads))

    return Barrier(finish)


def _may_touch(instruction: Instruction, space: str) -> bool:
    operation, *parts = instruction.mnemonic.split(".")
    if operation not in ("ld", "st", "cp", "ldmatrix") or len(instruction.operands) < 2:
        return False
    spaces = {part.split("::")[0] for part in parts} & {"param", "local", "shared", "global"}
    return space in spaces or not spaces


def _bytes_moved(instruction: Instruction) -> int:
    operation, *parts = instruction.mnemonic.split(".")
    if operation == "cp":
        return int(instruction.operands[2], 0)
    if operation == "ldmatrix":
        return 16
    return int(re.sub(r"\D", "", parts[-1])) // 8
