"""PTX text to instructions. Of the language it knows what compilers emit for kernels.

Source: Parallel Thread Execution ISA, NVIDIA, sections 4 (syntax) and 11 (directives).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from .formats import size_of


class PtxError(Exception):
    """What is wrong with a kernel, or not known about it."""


@dataclass
class Instruction:
    """@predicate mnemonic operands; the source line that -lineinfo names."""

    predicate: str | None
    negated: bool
    mnemonic: str
    operands: tuple[str, ...]
    line: str

    def __str__(self) -> str:
        return f"{self.mnemonic} {', '.join(self.operands)}"


@dataclass
class Kernel:
    """An entry point."""

    name: str
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)  # offset, size
    registers: dict[str, str] = field(default_factory=dict)  # type
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)  # offset, size
    local: dict[str, tuple[int, int]] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


@dataclass
class Module:
    """A translation unit."""

    kernels: dict[str, Kernel]
    dynamic_shared: set[str]  # arrays whose size is given at the launch


def parse(text: str) -> Module:
    """Read a translation unit."""
    files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', text))
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
    dynamic = set(re.findall(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.\w+\s+([\w$]+)\[\]", text))
    kernels = {}
    outside = []
    end = 0
    for entry in re.finditer(r"\.entry\s+([\w$]+)\s*\(", text):
        outside.append(text[end : entry.start()])
        close = text.index(")", entry.end())
        start = text.index("{", close) + 1
        end = _closing_brace(text, start)
        kernel = Kernel(entry[1])
        _add_parameters(kernel, text[entry.end() : close])
        _Body(kernel, files).read(text[start:end])
        kernels[kernel.name] = kernel
    _add_module_shared("".join(outside), kernels)
    return Module(kernels, dynamic)


def split_operands(text: str) -> tuple[str, ...]:
    """Operands between commas, vectors and addresses kept whole."""
    parts = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]])+", text)
    return tuple("".join(part.split()) for part in parts if part.strip())


def _closing_brace(text: str, position: int) -> int:
    depth = 1
    for brace in re.finditer(r"[{}]", text[position:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return position + brace.start()
    raise PtxError("a kernel's body has no end")


_ARRAY = re.compile(r"(?:\.align\s+(\d+)\s+)?\.([bsuf]\d+)\s+([\w$]+)(?:\[(\d+)\])?")


def _add_array(arrays: dict[str, tuple[int, int]], text: str) -> None:
    """Place an array behind those that are there."""
    match = _ARRAY.fullmatch(text.strip())
    if match is None:
        raise PtxError(f"declaration not understood: {text}")
    alignment, kind, name, count = match.groups()
    size = size_of(kind) * int(count or 1)
    step = int(alignment or size_of(kind))
    end = max((offset + length for offset, length in arrays.values()), default=0)
    arrays[name] = (-(-end // step) * step, size)


def _add_parameters(kernel: Kernel, text: str) -> None:
    for declaration in text.split(","):
        if declaration.strip():
            plain = re.sub(r"\.ptr(\s+\.\w+)?(\s+\.align\s+\d+)?", "", declaration)
            _add_array(kernel.parameters, plain.replace(".param", ""))


def _add_module_shared(text: str, kernels: dict[str, Kernel]) -> None:
    array = r"\.shared\s+(\.align\s+\d+\s+\.\w+\s+[\w$]+\[\d+\])\s*;"
    found = re.findall(array, text)
    for kernel in kernels.values():
        used = {name for i in kernel.instructions for o in i.operands for name in _names(o)}
        for declaration in found:
            if set(_names(declaration)) & used:
                _add_array(kernel.shared, declaration)


def _names(text: str) -> list[str]:
    return re.findall(r"[%\w$]+", text)


class _Body:
    """Reads the statements of one kernel.

    Registers that are declared between braces are known only there; they get a name of their own.
    """

    def __init__(self, kernel: Kernel, files: dict[str, str]) -> None:
        self._kernel = kernel
        self._files = files
        self._scopes: list[dict[str, str]] = []
        self._opened = 0
        self._line = "?"

    def read(self, text: str) -> None:
        for statement in _statements(text):
            if statement == "{":
                self._opened += 1
                self._scopes.append({})
            elif statement == "}":
                self._scopes.pop()
            elif statement.endswith(":"):
                self._kernel.labels[statement[:-1]] = len(self._kernel.instructions)
            elif statement.startswith(".loc"):
                _, number, line, *_ = statement.split()
                self._line = f"{self._files.get(number, '?')}:{line}"
            elif statement.startswith("."):
                self._declare(statement)
            else:
                self._add_instruction(statement)

    def _declare(self, text: str) -> None:
        kind, _, rest = text.partition(" ")
        if kind == ".reg":
            self._declare_registers(rest)
        elif kind == ".shared":
            _add_array(self._kernel.shared, rest)
        elif kind == ".local":
            _add_array(self._kernel.local, rest)
        elif kind not in (".pragma", ".file"):
            raise PtxError(f"directive not understood: {text}")

    def _declare_registers(self, text: str) -> None:
        kind, _, names = text.strip().removeprefix(".").partition(" ")
        for name in split_operands(names):
            several = re.fullmatch(r"(.+)<(\d+)>", name)
            if several is not None:
                for i in range(int(several[2])):
                    self._kernel.registers[f"{several[1]}{i}"] = kind
            elif self._scopes:
                self._scopes[-1][name] = f"{name}@{self._opened}"
                self._kernel.registers[self._scopes[-1][name]] = kind
            else:
                self._kernel.registers[name] = kind

    def _add_instruction(self, text: str) -> None:
        for scope in self._scopes:
            text = re.sub(r"[%\w$@]+", lambda found, scope=scope: _renamed(found[0], scope), text)
        match = re.fullmatch(r"(?:@(!?)([%\w$@]+)\s+)?([\w.:]+)\s*(.*)", text, re.S)
        if match is None:
            raise PtxError(f"statement not understood: {text}")
        negation, predicate, mnemonic, operands = match.groups()
        self._kernel.instructions.append(
            Instruction(predicate, bool(negation), mnemonic, split_operands(operands), self._line)
        )


def _renamed(name: str, scope: dict[str, str]) -> str:
    guard = "@" if name.startswith("@") else ""  # of a predicate before an instruction
    bare = name.removeprefix("@")
    return guard + scope.get(bare, bare)


def _statements(text: str) -> Iterator[str]:
    """Labels with their colon, braces of scopes, directives, instructions without a semicolon."""
    pattern = re.compile(r"\s*(?:([{}])|([$\w]+:)(?!:)|(\.(?:loc|file)\b[^\n]*)|([^;]+);)")
    position = 0
    while match := pattern.match(text, position):
        position = match.end()
        yield " ".join(next(filter(None, match.groups())).split())
    if text[position:].strip():
        raise PtxError(f"statement not understood: {text[position:][:80]}")
