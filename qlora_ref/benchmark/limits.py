"""What the machine can do at best, measured here and now: bytes a second, operations a second."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from qlora_ref import dispatch, native
from qlora_ref.benchmark.timing import Run, Timing

COPY, READ = "copy", "read"

_LEAST_ON_GPU = 1 << 30  # bytes; fewer would measure launches
_SIDE = {"cpu": 1024, "cuda": 8192}  # of the matrices whose product is timed
_ROUNDS = 1 << 20  # on a processor: some milliseconds


class MemoryLimit:
    """A copy and a read of as many bytes as a case moves, to be timed in turn with it.

    On the CPU the buffers are as large as what the case works on, since caches count there; on a
    GPU, whose cache is flushed before each run, they are large.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        n = max(nbytes, _LEAST_ON_GPU if device.type == "cuda" else 0) // 16 * 16
        source = torch.zeros(n // 4, dtype=torch.int32, device=device)
        half = source[: n // 8]
        target = torch.ones_like(half)
        self._nbytes = n
        self.runs: dict[str, Run] = {COPY: lambda: target.copy_(half), READ: source.max}

    def bytes_per_second(self, found: dict[str, Timing]) -> float:
        """The better of the two."""
        return self._nbytes / min(found[COPY].median, found[READ].median)


class ArithmeticLimit:
    """Multiplications and additions as fast as they go, to be timed in turn with a product.

    On the CPU of numbers that stay in registers; on a GPU, and where the library was not compiled,
    torch's product of two square matrices. In float32 and in bfloat16 (the dtype itself, for
    torch): a kernel may widen what it multiplies, and may take a float32 for the sum of three
    bfloat16, a product for six of theirs (csrc/README.md).
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.runs: dict[str, Run] = {}
        self._flops: dict[str, float] = {}
        multiply = _multiply_in_registers() if device.type == "cpu" else None
        if multiply is None:
            for kind in {dtype, torch.float32}:
                self._add(f"product {kind}", _product(kind, device), 2 * _SIDE[device.type] ** 3)
            return
        parts = {torch.float32: 1, torch.bfloat16: 1 if dtype == torch.bfloat16 else 6}
        for kind, needed in parts.items():
            run = functools.partial(multiply, kind, _ROUNDS)
            self._add(f"registers {kind}", run, _ROUNDS * multiply(kind, 1) / needed)

    def _add(self, name: str, run: Run, flops: float) -> None:
        self.runs[name] = run
        self._flops[name] = flops

    def flops_per_second(self, found: dict[str, Timing]) -> float:
        """The best of them."""
        return max(flops / found[name].median for name, flops in self._flops.items())


def _multiply_in_registers() -> Callable[[torch.dtype, int], int] | None:
    try:
        return native.load("cpu", "multiply_in_registers", dispatch.forced_isa())
    except native.BackendUnavailable:
        return None


def _product(dtype: torch.dtype, device: torch.device) -> Run:
    # Random numbers: a GPU multiplies ones with less power, and so faster, than it does weights.
    side = _SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b
