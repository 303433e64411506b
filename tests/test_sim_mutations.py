"""Every barrier, wait and bound check of the CUDA kernels is needed: without it something fails.

All of them are made optional in one copy of csrc/cuda, each by a number that the kernels ask for,
and the copy is compiled once. Then one after the other is taken out, on a few shapes that reach
every path. What nothing notices would be useless, or the instrument would be blind to it.
"""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compare import assert_same_bits, normal, random_weight
from sim.operands import Operands
from sim.parser import PtxError
from simulated import GPUS, SimulatedOperations, missing, open_simulated

from qlora_ref import codebooks, native
from qlora_ref.reference.adamw_step import adamw_step
from qlora_ref.reference.dequantize_4bit import dequantize_4bit
from qlora_ref.reference.matmul_4bit import matmul_4bit
from qlora_ref.reference.quantize_4bit import quantize_4bit
from qlora_ref.reference.quantize_8bit import quantize_8bit

SOURCES = Path(__file__).parent.parent / "csrc"
NF4, FP4 = codebooks.nf4_codebook(), codebooks.fp4_codebook()
DYNAMIC = codebooks.dynamic_codebook()

Case = Callable[[SimulatedOperations], None]


def quantise(block_size: int, n: int, dtype: torch.dtype, table: torch.Tensor) -> Case:
    def check(run: SimulatedOperations) -> None:
        x = normal(n, seed=1, dtype=dtype)
        ours, reference = (
            (run.quantize_8bit, quantize_8bit) if table is DYNAMIC else
            (run.quantize_4bit, quantize_4bit)
        )  # fmt: skip
        results = ours(x, table, block_size), reference(x, table, block_size)
        for actual, expected in zip(*results, strict=True):
            assert_same_bits(actual, expected)

    return check


def dequantise(n: int) -> Case:
    def check(run: SimulatedOperations) -> None:
        packed, absmax = quantize_4bit(normal(n, seed=2), NF4, 64)
        given = (packed, absmax, NF4, 64, (n,), torch.float32)
        assert_same_bits(run.dequantize_4bit(*given), dequantize_4bit(*given))

    return check


def multiply(
    tokens: int, rows: int, columns: int, dtype: torch.dtype, transposed: bool = False
) -> Case:
    def check(run: SimulatedOperations) -> None:
        weight = random_weight(rows, columns, 32, nested=True).arguments("cpu")
        x = normal(tokens, rows if transposed else columns, seed=3, dtype=dtype)
        given = (weight["packed"], weight["absmax"], weight["codebook"], 32)
        nested = [weight[k] for k in ("nested_absmax", "nested_codebook", "offset")]
        rest = ((rows, columns), None, transposed, *nested)
        actual = run.matmul_4bit(x, *given, *rest).double()
        expected = matmul_4bit(x.double().float(), *given, *rest).double()
        # bfloat16: a mutant's error is of the size of the result, a rounding is not.
        assert (actual - expected).abs().max() <= 0.03 * expected.abs().max()

    return check


def step(bits: int, *counts: int) -> Case:
    def check(run: SimulatedOperations) -> None:
        results = []
        for function in (run.adamw_step, adamw_step):
            params = [normal(n, seed=4) for n in counts]
            grads = [normal(n, seed=5) for n in counts]
            kind = torch.float32 if bits == 32 else torch.uint8
            moments = [[torch.zeros(n, dtype=kind) for n in counts] for _ in range(2)]
            scales = [[torch.zeros(-(-n // 256)) for n in counts if bits == 8] for _ in range(2)]
            tables = (DYNAMIC, codebooks.dynamic_codebook(signed=False))
            options = (1e-2, 0.9, 0.99, 1e-8, 0.1, 1)
            function(params, grads, *moments, *scales, *(tables if bits == 8 else (None, None)),
                     *options)  # fmt: skip
            results.append([*params, *moments[0], *moments[1], *scales[0], *scales[1]])
        for actual, expected in zip(*results, strict=True):
            assert_same_bits(actual, expected)

    return check


BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
# What runs the code of a file, the shortest first.
FEW = [multiply(3, 33, 96, BFLOAT16), multiply(20, 34, 1120, BFLOAT16)]
MANY = [multiply(35, 40, 32, BFLOAT16), multiply(135, 40, 352, BFLOAT16)]
GRADIENT = [multiply(35, 72, 288, BFLOAT16, transposed=True)]
GENERAL = [multiply(67, 70, 90, FLOAT32), multiply(3, 70, 1090, FLOAT32, transposed=True)]
QUANTISE = [
    quantise(100, 503, FLOAT32, NF4),
    quantise(64, 64 * 130 + 6, BFLOAT16, NF4),
    quantise(64, 64 * 130 + 7, FLOAT32, FP4),  # not in ascending order
    quantise(2048, 20 * 2048, BFLOAT16, DYNAMIC),
    quantise(2048, 20 * 2048, FLOAT32, NF4),
]
STEP_32, STEP_8 = [step(32, 7, 9000, 9000)], [step(8, 256 * 33, 519, 7)]
CASES: dict[str, list[Case]] = {
    "adamw.cuh": STEP_32,
    "adamw_8bit.cuh": STEP_8,
    "adamw_step.cu": STEP_32,
    "blockwise.cuh": QUANTISE,
    "dequantize.cuh": [dequantise(5), dequantise(64 * 530 + 7)],
    "matmul_few_tokens.cu": FEW,
    "matmul_general.cu": GENERAL,
    "matmul_many_tokens.cu": [*MANY, *GRADIENT],
    "nearest.cuh": QUANTISE,
    "quantize.cuh": QUANTISE,
    "split_sum.cu": FEW,
    "split_sum.cuh": [*GENERAL, *FEW],
    "weight_tiles.cuh": [*MANY, *GRADIENT],
}

STATEMENT = re.compile(
    r"__syncthreads\(\);|__syncwarp\(\);|wait_for_copy_groups<[^;]*>\(\);|end_copy_group\(\);"
)
# Bounds, in brackets where they stand, and what stands there without them.
BOUNDS: dict[str, list[tuple[str, str]]] = {
    "adamw.cuh": [("for (; [[first < piece.count]];", "first < piece.count + stride")],
    "adamw_8bit.cuh": [
        ("if ([[of_warp >= piece.count]]) return", "false"),
        ("if ([[block * kCodedBlock >= piece.count]]) return", "false"),
        ("if ([[i >= piece.count]]) continue;\n      const float grad", "false"),
        ("if ([[i >= piece.count]]) continue;\n      first_codes", "false"),
    ],
    "adamw_step.cu": [
        ("if ([[first + kRows * kApart <= piece.count]])", "true"),
        ("i = row; [[i < rows]];", "i < rows + kThreads"),
        ("if ([[i >= piece.count]]) return", "false"),
    ],
    "blockwise.cuh": [
        ("if ([[code < kLevels]]) levels", "true"),
        ("if ([[code < kLevels]]) place", "true"),
        ("if ([[code < kLevels - 1]]) next", "true"),
        (
            "[[__syncthreads_and(code >= kLevels - 1 || levels[code] < levels[code + 1])]]",
            "(code >= kLevels - 1 || levels[code] < levels[code + 1])",
        ),
    ],
    "dequantize.cuh": [
        ("if ([[threadIdx.x < kLevels]]) levels", "true"),
        ("for (; [[i + (kTurns - 1) * stride < chunks]];", "i < chunks"),
        ("for (; [[i < chunks]]; i += stride)", "i < chunks + stride"),
        ("threadIdx.x; [[i < n]];", "i < n + stride"),
    ],
    "matmul_few_tokens.cu": [
        ("return [[min(first_row + lane_.g + 8 * run, weight.rows - 1)]]",
         "(first_row + lane_.g + 8 * run)"),
        ("[[min(int64_t{8 * tile + lane_.g}, matmul.tokens - 1)]]", "int64_t{8 * tile + lane_.g}"),
        ("if ([[!has_group()]]) return", "false"),
        ("move([[has_group()]] ?", "true"),
        ("if ([[own_step() >= steps]]) return", "false"),
        ("if ([[row >= matmul.weight.rows]] ||", "false"),
        ("|| [[token >= matmul.tokens]]) continue", "false"),
    ],
    "matmul_general.cu": [
        ("inside = [[token < matmul.tokens]] &&", "true"),
        ("matmul.tokens && [[input < part.last]];", "true"),
        ("if ([[output < outputs]] && input", "true"),
        ("outputs && [[input < part.last]]) {", "true"),
        ("if ([[token < matmul.tokens]] && output", "true"),
        ("matmul.tokens && [[output < outputs]]) {", "true"),
    ],
    "matmul_many_tokens.cu": [
        ("[[min(int64_t{row() + i * kApart}, last_token)]]", "int64_t{row() + i * kApart}"),
        ("rows_[i], [[left_ > 0]]);", "true"),
        ("if ([[output >= outputs]]) continue", "false"),
        ("if ([[token >= matmul.tokens]]) break", "false"),
    ],
    "nearest.cuh": [
        ("if ([[threadIdx.x < kLevels]]) {", "true"),
        ("slot = threadIdx.x; [[slot < Bucket::kNumber]];",
         "slot < Bucket::kNumber + kThreads"),
        ("return [[__syncthreads_and(is_right)]];", "is_right"),
    ],
    "quantize.cuh": [
        ("[[i < n]] ? decisions", "true"),
        ("if ([[part < parts]]) load_words", "true"),
        ("if ([[part >= parts]]) continue", "false"),
        ("warp; [[block < blocks]];", "block < blocks + warps"),
        ("end = [[n - start < block_size]] ?", "false"),
        ("i = start + lane; [[i < end]];", "i < end + 32"),
        ("i = start + lane * kPerByte; [[i < end]];", "i < end + 32 * kPerByte"),
    ],
    "split_sum.cu": [("threadIdx.x; [[i < n]];", "i < n + stride")],
    "split_sum.cuh": [("last = [[min(first + length, inputs)]]", "first + length")],
    "weight_tiles.cuh": [
        ("own = [[left_ > 0]] ? t()", "true"),
        ("return [[min(row, weight.rows - 1)]]", "row"),
        ("moved = [[left_ > 0]] ?", "true"),
        ("left_ = [[output < weight.columns]] ?", "true"),
        ("[[min(static_cast<uint32_t>(first_output / 32 + warp), row_vectors_ - 1)]]",
         "static_cast<uint32_t>(first_output / 32 + warp)"),
        ("next_, [[left_ > i * kApart]]);", "true"),
        ("[[min(row_end_ + i, last_)]]", "(row_end_ + i)"),
    ],
}  # fmt: skip
# Left out, as taking them out changes nothing that is read or written:
# - matmul_few_tokens.cu, `if (steps <= 0) return`: no loop behind it has a pass; it saves work.
# - quantize.cuh, `first < parts`: it ends the loop; behind it every part is asked for anew.
# - split_sum.cuh, `first = min(length * split, inputs)`: a part from beyond the inputs on, to their
#   end, is as empty as one that begins there.


@dataclass(frozen=True)
class Mutant:
    """What is taken out of a file, and what stands there instead."""

    file: str
    start: int
    text: str
    instead: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.text}"

    def optional(self, number: int) -> str:
        if self.text.endswith(";"):
            return f"if (mutant() != {number}) {self.text}"
        return f"(mutant() == {number} ? ({self.instead}) : ({self.text}))"


def mutants() -> list[Mutant]:
    found = []
    for path in sorted((SOURCES / "cuda").glob("*.cu*")):
        text = path.read_text()
        places = [(match.start(), match[0], "") for match in STATEMENT.finditer(text)]
        for bound, instead in BOUNDS.get(path.name, []):
            before, taken, after = re.split(r"\[\[|\]\]", bound)
            assert text.count(before + taken + after) == 1, f"{path.name}: {bound}"
            places.append((text.index(before + taken + after) + len(before), taken, instead))
        for start, taken, instead in sorted(places):
            before = text[text.rfind("\n", 0, start) + 1 : start]
            if "//" not in before:
                line = text.count("\n", 0, start) + 1
                found.append(Mutant(path.name, start, taken, instead, line))
    return found


MUTANTS = mutants()
MUTANT = """
// The number of what is taken out.
__device__ inline unsigned mutant() {
  unsigned number;
  asm volatile("mov.u32 %0, %%envreg0;" : "=r"(number));
  return number;
}
"""


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{path.name} has no {old}"
    path.write_text(text.replace(old, new))


def add_mutants(folder: Path) -> None:
    """Makes all that can be taken out of a copy of csrc optional."""
    for path in (folder / "cuda").iterdir():
        text = path.read_text()
        for number, mutant in reversed(list(enumerate(MUTANTS))):
            if mutant.file == path.name:
                end = mutant.start + len(mutant.text)
                text = text[: mutant.start] + mutant.optional(number) + text[end:]
        path.write_text(text)
    header = folder / "kernels.h"
    header.write_text(header.read_text() + MUTANT)
    # Few thread blocks loop over small tensors; fewer kernels are compiled in less time.
    replace(folder / "cuda" / "grid.cuh", "kMostThreadBlocks = 1024;", "kMostThreadBlocks = 2;")
    replace(folder / "cuda" / "launch.cuh", "return function(__half{});", "return function(0.0f);")


@pytest.fixture(scope="module")
def library_with(
    build: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The library with the mutants of the sources whose names begin so, in PTX alone."""
    if (why := missing()) is not None:
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("mutants")
    shutil.copytree(SOURCES, folder / "csrc")
    add_mutants(folder / "csrc")
    flags = [*build.CUDA_FLAGS, "-gencode=arch=compute_80,code=compute_80"]

    @functools.cache
    def link(start: str) -> Path:
        objects = {path.stem: path for path in build.cuda_objects()} if start else {}
        for source in (folder / "csrc" / "cuda").glob(f"{start}*.cu"):
            objects[source.stem] = folder / f"{source.stem}.o"
            built = ["-c", str(source), "-o", str(objects[source.stem])]
            build.execute([*build.find_nvcc(), *flags, *built])
        library = folder / start / native.CUDA_LIBRARY
        build.link_cuda(list(objects.values()), library, runtime="none")
        return library

    return link


@pytest.fixture
def take_out(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Chooses the mutant that the kernels of the library are."""
    read = Operands._reader

    def read_number(self: Operands, text: str, kind: str) -> object:
        return (lambda *_: CHOSEN[0]) if text == "%envreg0" else read(self, text, kind)

    monkeypatch.setattr(Operands, "_reader", read_number)
    return lambda number: CHOSEN.__setitem__(0, number)


NOTHING = len(MUTANTS)
CHOSEN = [NOTHING]
ALWAYS = "dequantize.cuh"  # one file's; the others are slow, since they are many


def slow_but_one(values: list[Any], file_of: Callable[[Any], str]) -> list[Any]:
    def marks(value: Any) -> Any:
        return () if file_of(value) == ALWAYS else pytest.mark.slow

    return [pytest.param(value, id=str(value), marks=marks(value)) for value in values]


@pytest.mark.parametrize("mutant", slow_but_one(MUTANTS, lambda mutant: mutant.file))
def test_without_it_something_fails(
    mutant: Mutant, library_with: Callable[[str], Path], take_out: Callable[[int], None]
) -> None:
    library = library_with("dequantize" if mutant.file == ALWAYS else "")
    operations = SimulatedOperations(*open_simulated(library), GPUS["A100"])
    take_out(MUTANTS.index(mutant))
    with pytest.raises((PtxError, AssertionError)):
        for case in CASES[mutant.file]:
            case(operations)


@pytest.mark.parametrize("file", slow_but_one(list(CASES), str))
def test_with_all_of_them_nothing_fails(
    file: str, library_with: Callable[[str], Path], take_out: Callable[[int], None]
) -> None:
    library = library_with("dequantize" if file == ALWAYS else "")
    take_out(NOTHING)
    for case in CASES[file]:
        case(SimulatedOperations(*open_simulated(library), GPUS["A100"]))
