"""What the Triton kernels cost, read off their machine code: no GPU is needed.

    python benchmarks/static_gpu.py --backend triton

Each entry is a launch as a model makes it, in bfloat16, with NF4 in blocks of 64 and double
quantisation. Costs are those of static_gpu.py; read that first.
"""

from __future__ import annotations

import math
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import sass
import torch
from offline_triton import Launch, compiled_for
from static_gpu import NF4_BYTES, Price, cycles, roof_of
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from qlora_ref import codebooks  # noqa: E402

ARCHITECTURES = ("80", "90a", "120")
PRICED_WITH = "3.9.0"  # the version of triton whose machine code the ceilings are for
COMPILED_ONLY = "gfx942"  # AMD's: no disassembler, no prices

ROWS, COLUMNS, BLOCK_SIZE = 4096, 4096, 64
N = ROWS * COLUMNS
DTYPE = torch.bfloat16
PRODUCT = r"HG?MMA"


@dataclass(frozen=True)
class Entry:
    """A launch, and the most instructions that it may take for each value on an architecture."""

    name: str
    operation: str
    arguments: Callable[[], tuple[Any, ...]]
    bytes_per_value: float | None  # read and written; None where memory is not what bounds it
    ceilings: dict[str, float] = field(default_factory=dict)

    def launch(self, architecture: str) -> Launch:
        """What the launcher launches; its last kernel, if there are several."""
        function = getattr(import_module(f"qlora_kernels.{self.operation}"), self.operation)
        with compiled_for(architecture) as launches:
            function(*self.arguments())
        return launches[-1]


def empty(n: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(n, dtype=dtype)


def nested() -> tuple[Tensor, ...]:
    blocks = N // BLOCK_SIZE
    return empty(blocks // 256, torch.float32), codebooks.dynamic_codebook(), torch.zeros(())


def quantize_4bit(codebook: str) -> tuple[Any, ...]:
    return empty(N, DTYPE), codebooks.CODEBOOKS[codebook](), BLOCK_SIZE


def weight() -> tuple[Any, ...]:
    codes = empty(N // 2, torch.uint8), empty(N // BLOCK_SIZE, torch.uint8)
    return (*codes, codebooks.nf4_codebook(), BLOCK_SIZE, (ROWS, COLUMNS))


def dequantize_4bit(dtype: torch.dtype) -> tuple[Any, ...]:
    return (*weight(), dtype, *nested())


def matmul_4bit(tokens: int, transposed: bool) -> tuple[Any, ...]:
    x = empty(tokens * COLUMNS, DTYPE).view(tokens, COLUMNS)
    return (x, *weight(), None, transposed, *nested())


def quantize_8bit() -> tuple[Any, ...]:
    return empty(N, DTYPE), codebooks.dynamic_codebook(), 256


def dequantize_8bit() -> tuple[Any, ...]:
    codes = empty(N, torch.uint8), empty(N // 256, torch.float32)
    return (*codes, codebooks.dynamic_codebook(), 256, DTYPE)


def adamw_step(bits: int) -> tuple[Any, ...]:
    param, grad = [empty(N, DTYPE)], [empty(N, DTYPE)]
    options = (1e-3, 0.9, 0.999, 1e-8, 0.01, 3)
    if bits == 32:
        moments = [empty(N, torch.float32)], [empty(N, torch.float32)]
        return (param, grad, *moments, [], [], None, None, *options)
    moments = [empty(N, torch.uint8)], [empty(N, torch.uint8)]
    scales = [empty(N // 256, torch.float32)], [empty(N // 256, torch.float32)]
    tables = codebooks.dynamic_codebook(), codebooks.dynamic_codebook(signed=False)
    return (param, grad, *moments, *scales, *tables, *options)


ENTRIES = [
    Entry("quantize_4bit, nf4", "quantize_4bit", lambda: quantize_4bit("nf4"), 2.5625,
          {"80": 21, "90a": 21, "120": 21}),
    Entry("quantize_4bit, fp4", "quantize_4bit", lambda: quantize_4bit("fp4"), 2.5625,
          {"80": 21, "90a": 21, "120": 21}),
    Entry("dequantize_4bit", "dequantize_4bit", lambda: dequantize_4bit(DTYPE), 2 + NF4_BYTES,
          {"80": 7.5, "90a": 7.5}),
    Entry("dequantize_4bit, float32", "dequantize_4bit", lambda: dequantize_4bit(torch.float32),
          4 + NF4_BYTES),
    Entry("quantize_8bit", "quantize_8bit", quantize_8bit, 3.016, {"80": 20, "90a": 20}),
    Entry("dequantize_8bit", "dequantize_8bit", dequantize_8bit, 3.016, {"80": 7.5, "90a": 7.5}),
    Entry("matmul_4bit, M <= 16", "matmul_4bit", lambda: matmul_4bit(1, False), NF4_BYTES,
          {"80": 6.5, "90a": 6}),
    Entry("matmul_4bit, large M", "matmul_4bit", lambda: matmul_4bit(512, False), None,
          {"80": 17, "90a": 9.7}),
    Entry("matmul_4bit, gradient", "matmul_4bit", lambda: matmul_4bit(512, True), None,
          {"80": 16, "90a": 12.5}),
    Entry("adamw_step, 32-bit", "adamw_step", lambda: adamw_step(32), 22),
    Entry("adamw_step, 8-bit", "adamw_step", lambda: adamw_step(8), 10.06,
          {"80": 110, "90a": 110}),
]  # fmt: skip


@dataclass(frozen=True)
class TritonPrice(Price):
    narrow_copies: int  # asynchronous ones of four bytes: of look-ups or scales, one by one
    weight_in_registers: bool | None  # whether tensor cores take it from there; None: no product


def price(entry: Entry, architecture: str) -> TritonPrice:
    launch = entry.launch(architecture)
    (kernel,) = _read(launch, architecture)
    # A product's price is that of a step of its main loop; other kernels have no loop.
    path = sass.main_path(kernel, PRODUCT)
    is_product = sass.count(path, PRODUCT) > 0
    per_block = _weights_of_step(launch) if is_product else N / math.prod(launch.grid)
    values = per_block / launch.threads
    spent = {pipe: time / values for pipe, time in cycles(path, architecture).items()}
    shared = launch.kernel.metadata.shared
    return TritonPrice(
        *(entry.name, architecture, kernel.registers, kernel.spilled, shared),
        *(spent["issue"], spent["alu"], spent["mio"], spent["tensor"]),
        roof_of(architecture, entry.bytes_per_value, max(spent.values())),
        dict(Counter(instruction.name for instruction in path).most_common()),
        sum(i.name == "LDGSTS" and not re.search(r"\.(64|128)", i.operation) for i in path),
        _is_from_registers(path) if is_product else None,
    )


def _weights_of_step(launch: Launch) -> int:
    return int(launch.arguments["BLOCK_N"] * launch.arguments["BLOCK_K"])


def _is_from_registers(path: list[sass.Instruction]) -> bool:
    """Operands of a product: the result, A, B, what is added. Shared memory has a descriptor."""
    products = [i for i in path if re.match(PRODUCT, i.name)]
    return all(re.match(r"R\d+", i.operands.split(", ")[1]) is not None for i in products)


def _read(launch: Launch, architecture: str) -> list[sass.Kernel]:
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(launch.kernel.asm["cubin"])
        return sass.read_kernels(binary, architecture)


def price_all(architectures: tuple[str, ...] = ARCHITECTURES) -> list[TritonPrice]:
    """Compiles every entry for every architecture."""
    return [price(entry, a) for entry in ENTRIES for a in architectures]


def compile_all(architecture: str = COMPILED_ONLY) -> list[str]:
    """The kernels of all entries, compiled for a GPU without a price."""
    return [entry.launch(architecture).name for entry in ENTRIES]


def broken(price: TritonPrice) -> list[str]:
    """Which of its limits a kernel exceeds."""
    (entry,) = (entry for entry in ENTRIES if entry.name == price.name)
    ceiling = entry.ceilings.get(price.architecture, math.inf)
    # The gradient multiplies by W, not W^T: its weight is the second operand, in shared memory.
    is_first = entry.name in ("matmul_4bit, M <= 16", "matmul_4bit, large M")
    complaints = {
        f"spills {price.spilled} bytes": price.spilled > 0,
        f"{price.instructions:.2f} instructions, at most {ceiling}": price.instructions > ceiling,
        f"{price.narrow_copies} asynchronous copies of 4 bytes": price.narrow_copies > 0,
        "tensor cores do not take W from registers": is_first and not price.weight_in_registers,
    }
    where = f"{price.name} on sm_{price.architecture}"
    return [f"{where}: {complaint}" for complaint, is_so in complaints.items() if is_so]
