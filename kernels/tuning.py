"""Which of a few tiles is fastest on this GPU, by trying: only when it is asked for.

A first call takes seconds then, since each tile is compiled and timed; a line of the log says so.
Without it the first tile runs, which was chosen by its machine code (benchmarks/static_triton.py).
`QLORA_REF_TRITON_TUNE=1` asks for it, or `tune()`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import triton
import triton.testing

from .launch import INTERPRETED

logger = logging.getLogger("qlora_kernels")

Tile = dict[str, Any]
_is_wanted = False
_fastest: dict[Hashable, Tile] = {}


def tune(wanted: bool = True) -> None:
    """Try tiles from now on, once for each kind of product; False: take the default ones again."""
    global _is_wanted
    _is_wanted = wanted


def fastest(key: Hashable, tiles: Sequence[Tile], run: Callable[[Tile], object]) -> Tile:
    """The fastest of some tiles, remembered by the key; the first one where nothing is tuned."""
    if not _is_wanted or INTERPRETED.value or len(tiles) == 1:
        return tiles[0]
    if key not in _fastest:
        logger.warning("tuning %s: compiling and timing %d tiles", key, len(tiles))
        times = [_time(tile, run) for tile in tiles]
        _fastest[key] = tiles[times.index(min(times))]
        logger.warning("tuned %s: %s, %.3f ms", key, _fastest[key], min(times))
    return _fastest[key]


def _time(tile: Tile, run: Callable[[Tile], object]) -> float:
    """Milliseconds; infinite where the GPU has not enough shared memory or registers."""
    try:
        return float(triton.testing.do_bench(lambda: run(tile), warmup=5, rep=20))
    except triton.runtime.errors.OutOfResources:
        return float("inf")
