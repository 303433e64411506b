"""Reads GPU machine code: the instructions of each kernel, and the path that its main loop takes.

The disassembler comes with Triton's wheel; no GPU is needed. Read next: static_gpu.py.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

REGISTERS = re.compile(r"REG:(\d+).*?STACK:(\d+).*?SHARED:(\d+).*?LOCAL:(\d+)")
LINE = re.compile(r"\s*/\*([0-9a-f]{4,6})\*/\s+(?:(@!?U?P\w+)\s+)?(\S+)\s*(.*?)\s*;")


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str  # "@P0" if only some lanes may do it, else ""
    operation: str  # with its suffixes: "LDG.E.128"
    operands: str

    @property
    def name(self) -> str:
        return self.operation.split(".")[0]

    @property
    def target(self) -> int | None:
        """Where a branch leads."""
        found = re.search(r"0x([0-9a-f]+)\)?$", self.operands) if self.name == "BRA" else None
        return int(found[1], 16) if found else None

    @property
    def always_branches(self) -> bool:
        """Whether what follows is reached only from elsewhere."""
        is_plain = not self.predicate and "P" not in self.operands.split("0x")[0]
        return is_plain and (self.name in ("EXIT", "RET") or self.name == "BRA")


@dataclass(frozen=True)
class Kernel:
    symbol: str
    registers: int
    spilled: int  # bytes of a thread's registers that are kept in memory
    shared: int  # bytes of shared memory whose size is known to the compiler
    instructions: list[Instruction]


def find_cuobjdump() -> str:
    """The disassembler in Triton's wheel. Raises FileNotFoundError without one."""
    package = importlib.util.find_spec("triton")
    if package is None or package.origin is None:
        raise FileNotFoundError("cuobjdump comes with Triton: pip install triton")
    return str(Path(package.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def read_kernels(binary: Path, architecture: str, pattern: str = "") -> list[Kernel]:
    """The kernels of an object file or cubin for an architecture, as "80" or "90a".

    pattern: only those in whose symbols this regular expression is found.
    """
    selected = ["-arch", f"sm_{architecture}", str(binary)]
    used = _parse_resources(_run(find_cuobjdump(), "-res-usage", *selected))
    wanted = [symbol for symbol in used if re.search(pattern, symbol)]
    listing = _run(find_cuobjdump(), "-sass", "-fun", ",".join(wanted), *selected)
    return [
        Kernel(symbol, *used[symbol], parse(text))
        for symbol, text in parse_functions(listing).items()
    ]


def read_resources(binary: Path) -> dict[str, dict[str, tuple[int, int, int]]]:
    """For each architecture and kernel in an object file: registers, bytes spilled and shared."""
    listing = _run(find_cuobjdump(), "-res-usage", str(binary))
    _, *parts = re.split(r"\narch = sm_(\w+)\n", listing)
    return {name: _parse_resources(text) for name, text in zip(parts[::2], parts[1::2])}


def _parse_resources(listing: str) -> dict[str, tuple[int, int, int]]:
    used = {}
    for symbol, line in re.findall(r"Function (\S+):\n(.*)", listing):
        found = REGISTERS.search(line)
        if found is None:
            raise ValueError(f"cuobjdump says nothing of the registers of {symbol}")
        registers, stack, shared, local = map(int, found.groups())
        used[symbol] = registers, stack + local, shared
    return used


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parse_functions(listing: str) -> dict[str, str]:
    """The lines of each function of a disassembly."""
    _, *parts = re.split(r"Function : (\S+)\n", listing)
    return dict(zip(parts[::2], parts[1::2]))


def parse(listing: str) -> list[Instruction]:
    """The instructions of one function, without the padding at its end."""
    found = (LINE.match(line) for line in listing.splitlines())
    instructions = [
        Instruction(int(m[1], 16), m[2] or "", m[3], m[4]) for m in found if m is not None
    ]
    while instructions and instructions[-1].name == "NOP":
        instructions.pop()
    return instructions


def loops(instructions: list[Instruction]) -> list[tuple[int, int]]:
    """The first and last index of each loop: of what lies between a branch back and its target."""
    index = {instruction.address: i for i, instruction in enumerate(instructions)}
    last: dict[int, int] = {}
    for i, instruction in enumerate(instructions):
        head = index.get(instruction.target) if instruction.target is not None else None
        if head is not None and head < i:
            last[head] = i
    return [
        (head, end)
        for head, end in last.items()
        # Code for rare cases lies behind the end of the kernel and branches back into it.
        if not any(i.name == "EXIT" and not i.predicate for i in instructions[head : end + 1])
    ]


def count(instructions: list[Instruction], pattern: str) -> int:
    """How many operations match a regular expression."""
    return sum(re.match(pattern, instruction.operation) is not None for instruction in instructions)


def bytes_loaded(instruction: Instruction) -> int:
    """What a lane reads from global memory, into registers or shared memory."""
    if instruction.name not in ("LDG", "LDGSTS"):
        return 0
    width = re.search(r"\.(128|64|U16|S16|U8|S8)\b", instruction.operation)
    return int(width[1].strip("US")) // 8 if width else 4


def hot_path(
    instructions: list[Instruction], loop: tuple[int, int], unit: str
) -> list[Instruction]:
    """One pass of a loop in its steady state, from its head to a branch back.

    Of all ways through, the one that does most units of work, then loads most from global memory,
    then is shortest: all passes but the last few fetch what a later one needs, and what makes a way
    longer than that is a rare case or a loop within. Predicated instructions are counted.
    """
    head, end = loop
    index = {instruction.address: i for i, instruction in enumerate(instructions)}
    best: dict[int, tuple[int, int, int]] = {}
    following: dict[int, int | None] = {}
    for i in range(end, head - 1, -1):
        here = instructions[i]
        target = index.get(here.target, -1) if here.target is not None else -1
        ways: list[int | None] = [target] if target > i and target in best else []
        if target == head:
            ways.append(None)
        if not here.always_branches and i + 1 in best:
            ways.append(i + 1)
        if not ways:
            continue
        following[i] = max(ways, key=lambda way: (0, 0, 0) if way is None else best[way])
        rest = (0, 0, 0) if following[i] is None else best[following[i]]
        best[i] = (rest[0] + count([here], unit), rest[1] + bytes_loaded(here), rest[2] - 1)
    path, at = [], head if head in best else None
    while at is not None:
        path.append(instructions[at])
        at = following[at]
    return path


def main_path(kernel: Kernel, unit: str) -> list[Instruction]:
    """The pass of the loop that does most units of work; without any, the whole kernel."""
    paths = [hot_path(kernel.instructions, loop, unit) for loop in loops(kernel.instructions)]
    working = [path for path in paths if count(path, unit) > 0]
    return max(
        working, key=lambda path: (count(path, unit), -len(path)), default=kernel.instructions
    )
