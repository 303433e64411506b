"""Opens a library built by nvcc with the stand-in for its CUDA runtime.

The host code of the library, its geometry, its arguments and its kernels are those of users; only
the CUDA runtime is ours (cudart.cpp), which puts its functions into the process before the library
looks for them, and what it is asked to launch is interpreted.
"""

from __future__ import annotations

import ctypes
import struct
import subprocess
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int, c_size_t, c_uint, c_void_p
from pathlib import Path
from typing import Any

from .machine import Launch, execute
from .memory import GlobalMemory
from .parser import Module, PtxError, parse
from .program import Program

FOLDER = Path(__file__).parent
LAUNCH_FAILED = 719  # cudaErrorLaunchFailure
FAT_BINARY_MAGIC = 0xBA55ED50
PTX = 1  # the kind of an entry of a fat binary

LaunchFunction = CFUNCTYPE(
    c_int,
    *(c_char_p, c_int, POINTER(c_uint), POINTER(c_uint), POINTER(c_void_p), c_size_t, c_void_p),
)


def build_stand_in(folder: Path) -> Path:
    """Compile cudart.cpp."""
    library = folder / "libcudart.so"
    options = ["-std=c++17", "-O1", "-Wall", "-Werror", "-shared", "-fPIC"]
    source = str(FOLDER / "cudart.cpp")
    subprocess.run(["g++", *options, source, "-o", str(library)], check=True)
    return library


class Device:
    """A GPU in this process: its memory, and the kernels of the libraries that are opened on it."""

    def __init__(self, stand_in: Path, memory_bytes: int) -> None:
        self.memory = GlobalMemory(memory_bytes)
        self.error: PtxError | None = None  # what went wrong in a launch
        self.streams: set[int] = set()  # of all launches; 0 is the default one
        self._runtime = ctypes.CDLL(str(stand_in), mode=ctypes.RTLD_GLOBAL)
        self._runtime.sim_module.restype = c_void_p
        self._function = LaunchFunction(self._launch)  # kept: C has its address
        self._runtime.sim_on_launch(self._function)
        self._modules: dict[int, Module] = {}
        self._programs: dict[tuple[int, str], Program] = {}

    def raise_error(self) -> None:
        """Raise what went wrong since the last call, if anything."""
        error, self.error = self.error, None
        if error is not None:
            raise error

    def _launch(
        self,
        name: bytes,
        module: int,
        grid: Any,
        block: Any,
        arguments: Any,
        dynamic_shared: int,
        stream: int | None,
    ) -> int:
        self.streams.add(stream or 0)
        try:
            program = self._program(module, name.decode())
            parameters = _pack(program, arguments)
            launch = Launch(tuple(grid[:3]), tuple(block[:3]), parameters, dynamic_shared)
            execute(program, launch, self.memory)
        except Exception as error:  # none may pass through C
            self.error = error if isinstance(error, PtxError) else PtxError(repr(error))
            return LAUNCH_FAILED
        return 0

    def _program(self, module: int, name: str) -> Program:
        if (module, name) not in self._programs:
            if module not in self._modules:
                self._modules[module] = parse(_ptx(self._runtime.sim_module(module)))
            code = self._modules[module]
            self._programs[module, name] = Program(code.kernels[name], code)
        return self._programs[module, name]


def _pack(program: Program, arguments: Any) -> bytes:
    """The arguments as they lie behind one another in a kernel's parameter space."""
    sizes = program.kernel.parameters.values()
    packed = bytearray(max((offset + size for offset, size in sizes), default=0))
    for i, (offset, size) in enumerate(sizes):
        packed[offset : offset + size] = ctypes.string_at(arguments[i], size)
    return bytes(packed)


def _ptx(fat_binary: int) -> str:
    """The PTX in a fat binary that was not compressed."""
    magic, _, header, size = struct.unpack("<IHHQ", ctypes.string_at(fat_binary, 16))
    if magic != FAT_BINARY_MAGIC:
        raise PtxError(f"not a fat binary: it begins with {magic:#x}")
    position, end = fat_binary + header, fat_binary + header + size
    while position < end:
        kind, _, header, size = struct.unpack("<HHIQ", ctypes.string_at(position, 16))
        if kind == PTX:
            text = ctypes.string_at(position + header, size)
            if b".version" in text:
                return text[: text.index(b"\0")].decode()
        position += header + size
    raise PtxError("no PTX in the library: it was compressed, or left out")
