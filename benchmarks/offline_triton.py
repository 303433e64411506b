"""Triton kernels compiled as their launchers launch them, for a GPU that need not be there.

`compiled_for` lets a launcher of kernels/ believe in a GPU: what it would launch on it, with the
tiles it chooses and the constants that Triton makes of the arguments, is compiled and kept.
Read next: static_triton.py.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

WARP = {"cuda": 32, "hip": 64}


def target_of(architecture: str) -> GPUTarget:
    """ "80", "90a", "120" are NVIDIA's, "gfx942" is AMD's."""
    if architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, WARP["hip"])
    return GPUTarget("cuda", int(re.sub(r"\D", "", architecture)), WARP["cuda"])


@dataclass(frozen=True)
class Launch:
    """A launch: the kernel, as it was compiled, the grid, and the arguments by their names."""

    name: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def threads(self) -> int:
        return int(self.kernel.metadata.num_warps * self.kernel.metadata.target.warp_size)


class Driver:
    """What Triton asks the driver of a GPU before it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return str(self._target.arch)  # kernels are kept for each device

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compiled_for(
    architecture: str, run: Callable[[Launch], None] | None = None
) -> Iterator[list[Launch]]:
    """Inside, kernels that are launched are compiled, listed, and handed to `run`, if given."""
    launches: list[Launch] = []
    compile_kernel = JITFunction.run

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = compile_kernel(self, *args, grid=grid, warmup=True, **options)
        names = {name: value for name, value in options.items() if name in self.arg_names}
        bound = inspect.signature(self.fn).bind(*args, **names).arguments
        launch = Launch(self.fn.__name__, kernel, tuple(grid), dict(bound))
        launches.append(launch)
        if run is not None:
            run(launch)
        return kernel

    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(Driver(target_of(architecture)))
    try:
        with mock.patch.object(JITFunction, "run", record):
            yield launches
    finally:
        driver._active = before
