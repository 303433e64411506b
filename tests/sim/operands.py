"""Operands of an instruction, resolved once: how to read them and how to write them.

A reader takes a chunk of thread blocks and the threads that execute, and returns an array with one
element for each of them, or one number for all. A writer takes the values as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from .formats import SIGNED, TYPES, UNSIGNED, Array, immediate, unsigned
from .parser import Instruction, Kernel, Module, PtxError

if TYPE_CHECKING:
    from .machine import Chunk

Threads = Any  # numbers of the threads within a chunk, or slice(None) for all
Reader = Callable[["Chunk", Threads], Array]
Writer = Callable[["Chunk", Threads, Array], None]

Builder = TypeVar("Builder")  # of an instruction, from its options and its operands


def register_in(
    table: list[tuple[re.Pattern[str], Builder]],
) -> Callable[[str], Callable[[Builder], Builder]]:
    """A decorator that puts what builds instructions into a table, with a pattern of mnemonics."""

    def decorate(pattern: str) -> Callable[[Builder], Builder]:
        def register(builder: Builder) -> Builder:
            table.append((re.compile(pattern), builder))
            return builder

        return register

    return decorate


SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid)\.[xyz]|%laneid|%warpid")


class Operands:
    """The operands of one instruction of a kernel."""

    def __init__(self, module: Module, kernel: Kernel, instruction: Instruction) -> None:
        self._module, self._kernel = module, kernel
        self._texts = instruction.operands

    def __len__(self) -> int:
        return len(self._texts)

    def text(self, i: int) -> str:
        return self._texts[i]

    def reader(self, i: int, kind: str) -> Reader:
        return self._reader(self._texts[i], kind)

    def readers(self, i: int, kind: str) -> list[Reader]:
        """Of a vector, or of one operand as a vector of one."""
        return [self._reader(element, kind) for element in _elements(self._texts[i])]

    def writer(self, i: int, kind: str) -> Writer:
        return self._writer(self._texts[i], kind)

    def writers(self, i: int, kind: str) -> list[Writer]:
        return [self._writer(element, kind) for element in _elements(self._texts[i])]

    def address(self, i: int) -> Reader:
        """[register + offset], [symbol + offset] or [symbol]: int64, one for each thread."""
        match = re.fullmatch(r"\[([%\w$@]+)(?:\+(-?\w+))?\]", self._texts[i])
        if match is None:
            raise PtxError(f"address not understood: {self._texts[i]}")
        name, offset = match[1], int(match[2] or "0", 0)
        is_wide = self._kernel.registers.get(name, "b64").endswith("64")
        base = self._reader(name, "b64" if is_wide else "b32")

        def read(chunk: Chunk, threads: Threads) -> Array:
            count = len(chunk.numbers(threads))
            return np.broadcast_to(base(chunk, threads), (count,)).astype(np.int64) + offset

        return read

    def _reader(self, text: str, kind: str) -> Reader:
        if text.startswith("!"):
            positive = self._reader(text[1:], kind)
            return lambda chunk, threads: ~positive(chunk, threads)
        if text in self._kernel.registers or SPECIAL.fullmatch(text):
            return lambda chunk, threads: _as(chunk.registers[text][threads], kind)
        if text in self._module.dynamic_shared:
            return lambda chunk, threads: TYPES[kind](chunk.dynamic_shared)
        for symbols in (self._kernel.shared, self._kernel.local, self._kernel.parameters):
            if text in symbols:
                offset = TYPES[kind](symbols[text][0])
                return lambda chunk, threads: offset
        if not re.match(r"-?\d", text):
            raise PtxError(f"name not known: {text}")
        constant = immediate(text, kind)
        return lambda chunk, threads: constant

    def _writer(self, text: str, kind: str) -> Writer:
        if text == "_":
            return lambda chunk, threads, values: None
        first, _, complement = text.partition("|")
        if complement:
            writers = self._writer(first, kind), self._writer(complement, kind)

            def write_both(chunk: Chunk, threads: Threads, values: Array) -> None:
                writers[0](chunk, threads, values)
                writers[1](chunk, threads, ~values)

            return write_both
        if text not in self._kernel.registers:
            raise PtxError(f"register not known: {text}")
        dtype = unsigned(self._kernel.registers[text])

        def write(chunk: Chunk, threads: Threads, values: Array) -> None:
            chunk.registers[text][threads] = _as_register(np.asarray(values), kind, dtype)

        return write


def _elements(text: str) -> tuple[str, ...]:
    return tuple(text[1:-1].split(",")) if text.startswith("{") else (text,)


def _as(values: Array, kind: str) -> Array:
    """A register's bits as a type: those of a wider register are cut off."""
    dtype = np.dtype(TYPES[kind])
    if values.dtype.itemsize != dtype.itemsize:
        values = values.astype(UNSIGNED[dtype.itemsize])
    return values.view(dtype)


def _as_register(values: Array, kind: str, dtype: Any) -> Array:
    """What is computed, cut to the instruction's type and extended to the register's size."""
    wanted = np.dtype(TYPES[kind])
    if values.dtype.itemsize != wanted.itemsize:
        values = values.astype(UNSIGNED[wanted.itemsize]).view(wanted)
    size = np.dtype(dtype).itemsize
    if values.dtype.itemsize != size:
        is_signed = kind.startswith("s")
        values = values.view(wanted).astype((SIGNED if is_signed else UNSIGNED)[size])
    return values.view(dtype)
