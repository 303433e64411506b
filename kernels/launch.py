"""Where kernels run, and what is chosen by that: interpreted or compiled, for which GPU.

Read next: decode.py.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

# Triton decides when it is imported whether it interprets: TRITON_INTERPRET=1.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# Values of a tile. Interpreted, an operation on a tile takes 0.1 ms and little more for its size.
TILE = 65536 if INTERPRETED.value else 2048
LARGE_TILE = TILE if INTERPRETED.value else 4 * TILE  # where a thread's work has much in common

# The results must have the bits of separately rounded products and sums.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def capability() -> int:
    """The compute capability of the NVIDIA GPU that compiles and runs, as 90; 0 for any other."""
    if INTERPRETED.value:
        return 0
    target = triton.runtime.driver.active.get_current_target()
    return int(target.arch) if target.backend == "cuda" else 0


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many parts of a GPU want work at the same time; 1 elsewhere."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def rows_of(width: int, rows: int, tile: int = TILE) -> int:
    """Rows of a tile of about `tile` values, `width` in a row; `rows` is how many there are.

    Interpreted, a tile is no larger than the tensor. Compiled, each number is a kernel of its own.
    """
    most = max(1, tile // width)
    return min(most, triton.next_power_of_2(rows)) if INTERPRETED.value else most


def chunk_of(block_size: int, most: int = 4096) -> int:
    """The largest power of two that divides a block: so many values in a row share a scale."""
    return min(block_size & -block_size, most)
