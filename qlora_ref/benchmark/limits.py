"""What the machine can do at best, measured here and now: bytes a second, operations a second."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from qlora_ref.benchmark.timing import Run, Timing, time_in_turn

COPY, READ = "copy", "read"

_LEAST_ON_GPU = 1 << 30  # bytes; fewer would measure launches
_SIDE = {"cpu": 1024, "cuda": 8192}  # of the matrices whose product is timed
_REPEATS = 7


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


@functools.cache
def arithmetic_limit(dtype: torch.dtype, device: torch.device, threads: int) -> float:
    """Floating-point operations a second of torch's product of two square matrices.

    In the dtype or in float32, whichever is faster: a kernel may widen what it multiplies.
    threads  as torch is set to; it is part of the question
    """
    kinds = {dtype, torch.float32}
    return max(_matmul_rate(kind, device, threads) for kind in kinds)


@functools.cache
def _matmul_rate(dtype: torch.dtype, device: torch.device, threads: int) -> float:
    side = _SIDE[device.type]
    # Random numbers: a GPU multiplies ones with less power, and so faster, than it does weights.
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def product() -> Tensor:
        return a @ b

    with torch.no_grad():
        return 2 * side**3 / time_in_turn({"product": product}, _REPEATS, device)["product"].median
