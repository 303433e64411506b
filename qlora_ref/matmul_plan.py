"""Which CUDA kernel multiplies by a 4-bit weight, and into how many parts its sum is cut.

A rule of a few lines, from what a GPU can read and compute in a second. It decides nothing about
the results but the order of their sums: every kernel keeps the contract of ops.matmul_4bit.

Read next: csrc/cuda/matmul.cuh.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Kernel(enum.IntEnum):
    """The kernels, with the numbers of enum MatmulKernel in csrc/kernels.h."""

    GENERAL = 0
    FEW_TOKENS_TABLE = 1
    FEW_TOKENS_PERMUTE = 2
    MANY_TOKENS_TABLE = 3
    MANY_TOKENS_PERMUTE = 4


@dataclass(frozen=True)
class Gpu:
    """What the rule looks at."""

    multiprocessors: int
    clock: float  # cycles a second
    bandwidth: float  # bytes a second
    shared_bytes: int  # the most that a block of threads can have of shared memory

    @property
    def slots_per_weight(self) -> float:
        """Instructions that each lane of the GPU can issue while memory delivers one weight."""
        lanes = self.multiprocessors * SCHEDULERS * WARP
        return lanes * self.clock / (self.bandwidth / BYTES_PER_WEIGHT)


@dataclass(frozen=True)
class Product:
    """A product with a weight (rows, columns)."""

    tokens: int
    rows: int
    columns: int
    block_size: int
    is_narrow: bool  # bfloat16 or float16
    transposed: bool
    is_aligned: bool  # x and the codes start at multiples of 16 bytes


@dataclass(frozen=True)
class Plan:
    """The choice; `reason` says why."""

    kernel: Kernel
    splits: int
    reason: str

    def __str__(self) -> str:
        name = self.kernel.name.lower().replace("_", " ")
        parts = "one sum" if self.splits == 1 else f"the sum in {self.splits} parts"
        return f"{name}, {parts}: {self.reason}"


WARP = 32
SCHEDULERS = 4  # of a multiprocessor; each issues one instruction of one warp a cycle
BYTES_PER_WEIGHT = 0.5 + 1 / 64 + 4 / (64 * 256)  # NF4 in blocks of 64, double-quantised

# Looking levels up in shared memory takes 2.3 instructions a weight, by byte permutations 3.9, of
# which most keep their pipe for two cycles: 5.7 (benchmarks/static_gpu.py). But the table takes 64
# KiB, so that fewer blocks run on a multiprocessor at a time. Where memory leaves time for the
# permutations they are the better choice.
PERMUTE_SLOTS = 5.7

FEW_TOKENS = 32  # the most that the kernel for few tokens holds in registers
STEP = 32  # tensor-core kernels read this many weights of a row at a time, within a block
MOST_COUNTED = 1 << 28  # rows or columns, so that they count in 32 bits
MOST_STEPS = 1 << 32  # in a weight, for the same reason
MANY_TABLE_BYTES = 143 * 1024  # of shared memory: the table, x and codes on their way
TRANSPOSED_STEP = 8  # and this many rows of a transposed weight

# Outputs of a block of threads: a kernel for few tokens, for many (tokens, weights' side), general.
FEW_TILE = 32
MANY_TILE = (128, 256)
GENERAL_TILE = (64, 64)
BLOCKS_PER_MULTIPROCESSOR = 2  # that hide one another's latency
LEAST_PART = 512  # of a sum: below, adding the parts up costs more than idle multiprocessors


def choose(product: Product, gpu: Gpu) -> Plan:
    """The kernel for a product on a GPU."""
    if (obstacle := _tensor_core_obstacle(product)) is not None:
        splits = _splits(product, gpu, *GENERAL_TILE)
        return Plan(Kernel.GENERAL, splits, f"float arithmetic: {obstacle}")
    slots = gpu.slots_per_weight
    by_table = slots < PERMUTE_SLOTS
    decode = "a table in shared memory" if by_table else "byte permutations"
    why = f"{slots:.1f} instructions fit into the time that memory takes for a weight: {decode}"
    if product.tokens <= FEW_TOKENS and not product.transposed:
        kernel = Kernel.FEW_TOKENS_TABLE if by_table else Kernel.FEW_TOKENS_PERMUTE
        return Plan(kernel, _splits(product, gpu, FEW_TOKENS, FEW_TILE), f"few tokens; {why}")
    if by_table and gpu.shared_bytes < MANY_TABLE_BYTES:
        by_table, why = False, "too little shared memory for a table: byte permutations"
    kernel = Kernel.MANY_TOKENS_TABLE if by_table else Kernel.MANY_TOKENS_PERMUTE
    return Plan(kernel, _splits(product, gpu, *MANY_TILE), f"many tokens; {why}")


def _tensor_core_obstacle(product: Product) -> str | None:
    if not product.is_narrow:
        return "x is float32"
    if product.block_size < STEP or product.block_size & (product.block_size - 1):
        return f"block_size is not a power of two from {STEP} on"
    if product.columns % STEP:
        return f"K is not a multiple of {STEP}"
    if product.transposed and product.rows % TRANSPOSED_STEP:
        return f"N is not a multiple of {TRANSPOSED_STEP}"
    steps = product.rows * (product.columns // STEP)
    if max(product.rows, product.columns) > MOST_COUNTED or steps >= MOST_STEPS:
        return "the weight has more rows, columns or steps than are counted in 32 bits"
    if not product.is_aligned:
        return "x or the codes do not start at a multiple of 16 bytes"
    return None


def _splits(product: Product, gpu: Gpu, token_tile: int, output_tile: int) -> int:
    """Parts of the sum, so that every multiprocessor has its blocks."""
    inputs, outputs = product.columns, product.rows
    if product.transposed:
        inputs, outputs = outputs, inputs
    tiles = max(1, -(-product.tokens // token_tile) * -(-outputs // output_tile))
    wanted = gpu.multiprocessors * BLOCKS_PER_MULTIPROCESSOR // tiles
    return max(1, min(wanted, inputs // LEAST_PART, 8))
