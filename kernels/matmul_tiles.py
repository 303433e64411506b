"""How large the tiles of a product are, and into how many parts its sums are cut."""

from __future__ import annotations

from typing import Any

import torch
import triton

from .launch import INTERPRETED, capability, multiprocessors

FEW_TOKENS = 16
LEAST_STEPS = 4  # of a part of a sum: a shorter one takes longer to begin than to add


def tiles_of(
    tokens: int, inputs: int, outputs: int, transposed: bool, vectors: int, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Tokens, outputs and inputs of a tile, its warps and the steps that are loaded ahead.

    The first is taken, the others are tried where tiles are tuned (tuning.py): with fewer
    outputs, so that a small weight is spread over more multiprocessors, or with fewer inputs, so
    that more programs share one.
    """
    if INTERPRETED.value:  # few and large ones
        depth = 32 if dtype == torch.float32 else 128  # float32 as below
        return [_tile(_most(64, tokens), _most(256, outputs), _most(depth, inputs), 4, 1)]
    if vectors == 0:
        # Loaded ahead, every level would be an asynchronous copy. Sums of 32 products, and then of
        # those: a long float32 sum would lose what the contract promises.
        return [_tile(16 if tokens <= FEW_TOKENS else 64, 64, 32, 4, 1)]
    m = 64 if tokens <= 64 else 128
    if transposed:
        return [_tile(m, 128, 64, 8, 3), _tile(m, 64, 64, 4, 3), _tile(m, 128, 64, 4, 3)]
    if tokens <= FEW_TOKENS:
        return [_tile(16, 64, 256, 4, 3), _tile(16, 64, 128, 4, 4), _tile(16, 128, 64, 4, 4)]
    stages = 2 if capability() >= 100 else 3  # of sm_120 a program has 99 KiB of shared memory
    return [_tile(m, 128, 128, 8, stages), _tile(m, 64, 128, 4, 2), _tile(m, 128, 64, 8, 3)]


def _most(size: int, needed: int) -> int:
    """No more than are needed; no tile of a product is narrower than 16."""
    return min(size, max(16, triton.next_power_of_2(needed)))


def _tile(m: int, n: int, k: int, warps: int, stages: int) -> dict[str, Any]:
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}


def splits_of(programs: int, steps: int, device: torch.device) -> int:
    """Parts of a sum: as many as keep the GPU's multiprocessors at work, twice over."""
    wanted = 2 * multiprocessors(device) // programs
    return max(1, min(wanted, steps // LEAST_STEPS))
