"""What the CUDA and Triton kernels cost, read off their machine code: no GPU is needed.

    python benchmarks/static_gpu.py [--backend triton] [--json FILE] [--markdown FILE]

A cost is in cycles of one of the four parts of a multiprocessor for each value and lane: a part
issues one instruction for 32 lanes in a cycle. What a GPU's memory leaves time for stands beside.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import sass

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from setup import cuda_objects, cuda_sources  # noqa: E402

HELD = ("80", "90a")  # to the ceilings below, without spills
ARCHITECTURES = (*HELD, "120")

# Pipes, by the names of operations. Taken for granted, not measured: 64 results a cycle and
# multiprocessor for logic, shifts, comparisons and byte permutations, so that a part is busy for
# two cycles; on sm_120, where integers share the pipe of floats, 128.
ALU = re.compile(
    r"(LOP3|PLOP3|IADD3?|SHF|SEL|FSEL|ISETP|FSETP|FMNMX3?|I?MNMX|VIMNMX|VIADD\w*|PRMT|LEA|BMSK|SGXT"
    r"|IABS|F2FP|P2R|R2P|VOTE|MOV|I2IP|HMNMX2|HSETP2|CS2R|S2R)$"
)
ALU_CYCLES = {"80": 2, "90a": 2, "120": 1}
# Shared by the four parts: 32 lanes of 4 bytes a cycle, hence four cycles of each part.
MIO = re.compile(r"(LDS|STS|LDSM|LDG|STG|LD|ST|LDL|STL|LDGSTS|SHFL|ATOM\w*|RED\w*)$")
# Of a product of 16 x 8 x 16 of 16-bit values: what the datasheets' tensor throughput comes to.
TENSOR_CYCLES = {"80": 8, "90a": 4, "120": 32}


@dataclass(frozen=True)
class Gpu:
    """From the datasheets: multiprocessors, cycles and bytes of memory a second."""

    architecture: str
    multiprocessors: int
    clock: float
    bandwidth: float

    def cycles(self, bytes_per_value: float) -> float:
        """How long memory takes for a value of each lane, in cycles of one part."""
        lanes = self.multiprocessors * 4 * 32
        return lanes * self.clock * bytes_per_value / self.bandwidth


GPUS = {
    "A100": Gpu("80", 108, 1.41e9, 2.039e12),
    "H100": Gpu("90a", 132, 1.83e9, 3.35e12),
}


@dataclass(frozen=True)
class Entry:
    """A kernel of csrc/cuda, which operation counts its work, and what may be spent on it."""

    name: str
    source: str  # the stem of its file
    symbol: str  # a regular expression
    unit: str  # operations that match this are counted
    values: float  # that one of them stands for
    bytes_per_value: float | None  # read and written; None where memory is not what bounds it
    ceiling: float  # instructions for each value
    mio_ceiling: float | None = None  # cycles


BFLOAT16 = "13__nv_bfloat16"
STORE = r"STG\S*\.128"
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # in blocks of 64, double-quantised


def few_tokens(tokens: int, decoder: str, ceiling: float, mio: float | None = None) -> Entry:
    """A tensor-core product takes 8 weights of each lane, as often as there are 8 tokens."""
    symbol = rf"multiply_few\S*ShapeILi2ELi{tokens // 8}E\S*{BFLOAT16}\S*{decoder}Decoder"
    name = f"matmul_4bit, {decoder.lower()}, M <= {tokens}"
    unit = (r"HMMA", 64 / tokens)
    return Entry(name, "matmul_few_tokens", symbol, *unit, NF4_BYTES, ceiling, mio)


def many_tokens(kind: str, decoder: str, ceiling: float, mio: float | None = None) -> Entry:
    """A tile has 128 tokens."""
    symbol = rf"multiply_many\S*{BFLOAT16}\S*{decoder}Decoder\S*{kind}Source"
    what = {"Row": "large M", "Column": "gradient"}[kind]
    name = f"matmul_4bit, {decoder.lower()}, {what}"
    return Entry(name, "matmul_many_tokens", symbol, r"HMMA", 64 / 128, None, ceiling, mio)


def blockwise(name: str, symbol: str, values: int, bytes_per_value: float, ceiling: float) -> Entry:
    return Entry(name, name, symbol + BFLOAT16, STORE, values, bytes_per_value, ceiling)


def adamw(bits: int, symbol: str, stores: int, values: int, ceiling: float) -> Entry:
    """Parameters and gradients in bfloat16; 11 instructions are a root and a quotient, both rounded
    correctly."""
    traffic = {32: 2 + 2 + 2 + 16, 8: 2 + 2 + 2 + 4 + 16 / 256}[bits]
    return Entry(f"adamw_step, {bits}-bit", "adamw_step", symbol, STORE, values / stores, traffic,
                 ceiling)  # fmt: skip


ENTRIES = [
    blockwise("quantize_4bit", r"quantize_whole_blocksILi16ELb0E", 32, 2.5625, 17),
    blockwise("dequantize_4bit", r"dequantize_chunksILi16ELb1E", 8, 2.516, 8.5),
    blockwise("quantize_8bit", r"quantize_whole_blocksILi256ELb0E", 16, 3.016, 13),
    blockwise("dequantize_8bit", r"dequantize_chunksILi256ELb0E", 8, 3.016, 6),
    few_tokens(8, "Table", 2.4, 5),
    few_tokens(16, "Table", 3.2, 5),
    few_tokens(32, "Table", 3.2, 5),
    few_tokens(8, "Permute", 3.6),
    few_tokens(32, "Permute", 4.5),
    many_tokens("Row", "Table", 5.5, 16),
    many_tokens("Row", "Permute", 7.5, 16),
    many_tokens("Column", "Table", 6),
    many_tokens("Column", "Permute", 7.5),
    adamw(32, rf"step_vectorsI{BFLOAT16}S", stores=5, values=8, ceiling=30),
    adamw(8, rf"step_coded_vectorsI{BFLOAT16}S", stores=4, values=16, ceiling=60),
]


@dataclass(frozen=True)
class Price:
    name: str
    architecture: str
    registers: int
    spilled: int
    shared: int
    instructions: float  # for each value and lane: also the cycles of issuing them
    alu: float
    mio: float
    tensor: float
    roof: dict[str, float]  # of each GPU's memory bandwidth, the part that the pipes leave
    mix: dict[str, int]


def cycles(path: list[sass.Instruction], architecture: str) -> dict[str, float]:
    """For how long each pipe is busy with a path."""
    spent = {"issue": float(len(path)), "alu": 0.0, "mio": 0.0, "tensor": 0.0}
    for instruction in path:
        if ALU.match(instruction.name):
            spent["alu"] += ALU_CYCLES[architecture]
        elif MIO.match(instruction.name):
            spent["mio"] += 4 * accesses(instruction)
        elif instruction.name == "HMMA":
            half = 0.5 if "1688" in instruction.operation else 1.0
            spent["tensor"] += half * TENSOR_CYCLES[architecture]
        elif shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", instruction.operation):
            of_a_warp = math.prod(map(int, shape.groups())) / (16 * 8 * 16) / 4  # of the four
            spent["tensor"] += of_a_warp * TENSOR_CYCLES[architecture]
    return spent


def accesses(instruction: sass.Instruction) -> int:
    """Rounds of 32 x 4 bytes, if no two lanes want the same bank."""
    found = re.search(r"\.(128|64|[24])\b", instruction.operation)
    return {"128": 4, "64": 2, "4": 4, "2": 2}[found[1]] if found else 1


def price(entry: Entry, kernel: sass.Kernel, architecture: str) -> Price:
    path = sass.main_path(kernel, entry.unit)
    values = entry.values * sass.count(path, entry.unit)
    if values == 0:
        raise ValueError(f"{kernel.symbol} has no {entry.unit}: what counts its work?")
    spent = {pipe: time / values for pipe, time in cycles(path, architecture).items()}
    roof = roof_of(architecture, entry.bytes_per_value, max(spent.values()))
    mix = dict(Counter(instruction.name for instruction in path).most_common())
    return Price(
        *(entry.name, architecture, kernel.registers, kernel.spilled, kernel.shared),
        *(spent["issue"], spent["alu"], spent["mio"], spent["tensor"], roof, mix),
    )


def roof_of(architecture: str, bytes_per_value: float | None, spent: float) -> dict[str, float]:
    """The part of each GPU's memory bandwidth that its busiest pipe leaves."""
    return {
        name: min(1.0, gpu.cycles(bytes_per_value) / spent)
        for name, gpu in GPUS.items()
        if gpu.architecture == architecture and bytes_per_value is not None
    }


def price_all(architectures: Sequence[str] = ARCHITECTURES) -> list[Price]:
    """Compiles csrc/cuda, or takes what is compiled. Raises CompileError without nvcc."""
    objects = {s.stem: target for s, target in zip(cuda_sources(), cuda_objects())}
    prices = []
    for entry in ENTRIES:
        for architecture in architectures:
            found = sass.read_kernels(objects[entry.source], architecture, entry.symbol)
            if len(found) != 1:
                names = [kernel.symbol for kernel in found]
                raise ValueError(f"{entry.symbol} must name one kernel, and names {names}")
            prices.append(price(entry, found[0], architecture))
    return prices


def markdown(prices: Sequence[Price]) -> str:
    lines = [
        "| kernel | sm | registers | spilled | shared "
        "| instructions | ALU | MIO | tensor | roof | mix |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for p in prices:
        roof = " ".join(f"{name} {100 * part:.0f} %" for name, part in p.roof.items())
        mix = " ".join(f"{name} {number}" for name, number in list(p.mix.items())[:8])
        costs = " | ".join(f"{c:.2f}" for c in (p.instructions, p.alu, p.mio, p.tensor))
        sizes = f"{p.registers} | {p.spilled} | {p.shared}"
        lines.append(f"| {p.name} | {p.architecture} | {sizes} | {costs} | {roof} | {mix} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Price kernels by their machine code.")
    parser.add_argument("--backend", choices=["cuda", "triton"], default="cuda")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    complaints: list[str] = []
    if options.backend == "cuda":
        prices: Sequence[Price] = price_all()
    else:
        import static_triton

        prices = static_triton.price_all()
        complaints = [complaint for p in prices for complaint in static_triton.broken(p)]
        compiled = static_triton.compile_all()
        print(f"compiled for {static_triton.COMPILED_ONLY} too: {', '.join(compiled)}\n")
    print(markdown(prices))
    if options.json:
        options.json.write_text(json.dumps([asdict(p) for p in prices], indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(prices) + "\n")
    for complaint in complaints:
        print(complaint)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
