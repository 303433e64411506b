"""Every barrier, wait and bound check of the CUDA kernels is needed: without it a test would fail.

One statement at a time is taken out of a copy of csrc/cuda; what uses it is compiled and run on the
simulated GPU, on a few shapes that reach every path. A mutant that nothing notices means that the
statement is useless, or that the instrument is blind to it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compare import assert_same_bits, normal, random_weight
from sim.parser import PtxError
from simulated import GPUS, SimulatedOperations, missing, open_simulated

from qlora_ref import codebooks, native
from qlora_ref.reference.adamw_step import adamw_step
from qlora_ref.reference.dequantize_4bit import dequantize_4bit
from qlora_ref.reference.matmul_4bit import matmul_4bit
from qlora_ref.reference.quantize_4bit import quantize_4bit
from qlora_ref.reference.quantize_8bit import quantize_8bit

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
NF4 = codebooks.nf4_codebook()
DYNAMIC = codebooks.dynamic_codebook()


def quantise(run: SimulatedOperations) -> None:
    for block_size, n in ((64, 64 * 130 + 7), (2048, 20 * 2048), (100, 1003)):
        for dtype in (torch.float32, torch.bfloat16):
            x = normal(n, seed=1, dtype=dtype)
            for ours, ref, table in (
                (run.quantize_4bit, quantize_4bit, NF4),
                (run.quantize_8bit, quantize_8bit, DYNAMIC),
            ):
                for actual, expected in zip(
                    ours(x, table, block_size), ref(x, table, block_size), strict=True
                ):
                    assert_same_bits(actual, expected)


def dequantise(run: SimulatedOperations) -> None:
    for n in (64 * 130 + 7, 5):
        packed, absmax = quantize_4bit(normal(n, seed=2), NF4, 64)
        expected = dequantize_4bit(packed, absmax, NF4, 64, (n,), torch.float32)
        assert_same_bits(
            run.dequantize_4bit(packed, absmax, NF4, 64, (n,), torch.float32), expected
        )


def multiply(run: SimulatedOperations) -> None:
    for tokens, rows, columns, dtype, transposed in (
        (3, 70, 1120, torch.bfloat16, False),
        (20, 33, 96, torch.bfloat16, False),
        (135, 40, 352, torch.bfloat16, False),
        (40, 200, 288, torch.bfloat16, True),
        (67, 70, 90, torch.float32, False),
        (3, 70, 1090, torch.float32, True),
    ):
        weight = random_weight(rows, columns, 32, nested=True)
        arguments = {**weight.arguments("cpu")}
        x = normal(tokens, rows if transposed else columns, seed=3, dtype=dtype)
        given = (arguments["packed"], arguments["absmax"], arguments["codebook"], 32)
        nested = [arguments[k] for k in ("nested_absmax", "nested_codebook", "offset")]
        rest = ((rows, columns), None, transposed, *nested)
        actual = run.matmul_4bit(x, *given, *rest).double()
        expected = matmul_4bit(x.double().float(), *given, *rest).double()
        # bfloat16: a mutant's error is of the size of the result, a rounding is not.
        assert (actual - expected).abs().max() <= 0.03 * expected.abs().max()


def step(run: SimulatedOperations) -> None:
    for eight_bit in (False, True):
        results = []
        for function in (run.adamw_step, adamw_step):
            params = [normal(n, seed=4) for n in (256 * 20 + 3, 7)]
            grads = [normal(len(p), seed=5) for p in params]
            kind = torch.uint8 if eight_bit else torch.float32
            moments = [[torch.zeros(len(p), dtype=kind) for p in params] for _ in range(2)]
            scales = [[torch.zeros(-(-len(p) // 256)) for p in params] if eight_bit else []
                      for _ in range(2)]  # fmt: skip
            tables = (
                (DYNAMIC, codebooks.dynamic_codebook(signed=False)) if eight_bit else (None,) * 2
            )
            for number in (1, 2):
                options = (1e-2, 0.9, 0.99, 1e-8, 0.1, number)
                function(params, grads, *moments, *scales, *tables, *options)
            results.append([*params, *moments[0], *moments[1], *scales[0], *scales[1]])
        for actual, expected in zip(*results, strict=True):
            assert_same_bits(actual, expected)


USES: dict[str, Callable[[SimulatedOperations], None]] = {
    "quantize": quantise,
    "dequantize": dequantise,
    "matmul": multiply,
    "adamw": step,
}
# Which of them runs what is in a header.
HEADERS = {
    "blockwise.cuh": "quantize",
    "nearest.cuh": "quantize",
    "quantize.cuh": "quantize",
    "dequantize.cuh": "dequantize",
    "weight_tiles.cuh": "matmul",
    "split_sum.cuh": "matmul",
    "adamw_8bit.cuh": "adamw",
}
STATEMENT = re.compile(
    r"__syncthreads\(\);|__syncwarp\(\);|wait_for_copy_groups<[^;]*;|end_copy_group\(\);"
    r"|if \([^;{]*>= ?[\w.]*(?:parts|count|rows|tokens|outputs)\) (?:continue|return|break);"
)


@dataclass(frozen=True)
class Mutant:
    """A statement that is taken out."""

    file: str
    start: int
    text: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.text}"

    @property
    def use(self) -> str:
        return HEADERS.get(self.file) or self.file.split("_")[0]


def mutants() -> list[Mutant]:
    found = []
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu*")):
        text = path.read_text()
        for match in STATEMENT.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            comment = text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
            if "//" not in comment and "inline void" not in comment:
                found.append(Mutant(path.name, match.start(), match[0], line))
    return found


def build_mutant(build: SimpleNamespace, mutant: Mutant, folder: Path) -> Path:
    """The library without the statement, for one architecture."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    grid = folder / "csrc" / "cuda" / "grid.cuh"
    few, many = "kMostThreadBlocks = 2;", "kMostThreadBlocks = 1024;"
    assert many in grid.read_text()
    grid.write_text(grid.read_text().replace(many, few))  # so that they loop over small tensors
    path = folder / "csrc" / "cuda" / mutant.file
    text = path.read_text()
    path.write_text(text[: mutant.start] + ";" + text[mutant.start + len(mutant.text) :])
    flags = [*build.CUDA_FLAGS, "-gencode=arch=compute_80,code=[sm_80,compute_80]"]
    unchanged = {path.stem: path for path in build.cuda_objects()}
    objects = []
    for source in sorted((folder / "csrc" / "cuda").glob("*.cu")):
        # What the mutant cannot change is taken from the objects that are there.
        if not source.stem.startswith(mutant.use) and source.name != mutant.file:
            objects.append(unchanged[source.stem])
            continue
        objects.append(folder / f"{source.stem}.o")
        command = [*build.find_nvcc(), *flags, "-c", str(source), "-o", str(objects[-1])]
        build.execute(command)
    build.link_cuda(objects, folder / native.CUDA_LIBRARY, runtime="none")
    return folder / native.CUDA_LIBRARY


@pytest.mark.parametrize("mutant", mutants(), ids=str)
def test_without_it_something_fails(mutant: Mutant, build: SimpleNamespace, tmp_path: Path) -> None:
    if (why := missing()) is not None:
        pytest.skip(why)
    library = build_mutant(build, mutant, tmp_path)
    operations = SimulatedOperations(*open_simulated(library), GPUS["A100"])
    with pytest.raises((PtxError, AssertionError)):
        USES[mutant.use](operations)


@pytest.mark.parametrize("use", USES)
def test_with_all_statements_nothing_fails(use: str, cuda_library: Path) -> None:
    USES[use](SimulatedOperations(*open_simulated(cuda_library), GPUS["A100"]))
