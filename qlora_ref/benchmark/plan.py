"""Which cases a command line asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from qlora_ref.benchmark import blockwise
from qlora_ref.benchmark.adamw import adamw_step
from qlora_ref.benchmark.candidates import Case
from qlora_ref.benchmark.products import FORWARD, GRADIENT, matmul_4bit
from qlora_ref.benchmark.run import Row, broken_case, measure_case
from qlora_ref.benchmark.weights import BLOCK_SIZE, Weights
from qlora_ref.dispatch import OPERATIONS

BLOCKWISE = {
    "quantize_4bit": blockwise.quantize_4bit,
    "dequantize_4bit": blockwise.dequantize_4bit,
    "quantize_8bit": blockwise.quantize_8bit,
    "dequantize_8bit": blockwise.dequantize_8bit,
}
DTYPES = ("float32", "bfloat16", "float16")

# What is measured unless it is said: a GPU has time for more.
SHAPES = {"cpu": "4096x4096", "cuda": "4096x4096,11008x4096,4096x11008"}
TOKENS = {"cpu": "1,16,512", "cuda": "1,4,16,64,512,4096"}
USUAL_DTYPES = {"cpu": "float32,bfloat16", "cuda": "bfloat16,float16"}
GRADIENT_FROM = 64  # tokens: a training step has no fewer


@dataclass(frozen=True)
class Plan:
    """What to measure. Raises ValueError for what cannot be.

    operations  names of dispatch.OPERATIONS
    shapes      (N, K) of the weights; K a multiple of 64
    tokens      rows of x in a product
    dtypes      names, of DTYPES
    device      cpu or cuda
    peers       whether others are measured as well
    repeats     rounds of each case, after one that warms up
    seconds     after which a case begins no further round, once it has three
    """

    operations: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    dtypes: tuple[str, ...]
    device: str = "cpu"
    peers: bool = True
    repeats: int = 11
    seconds: float = 10.0

    def __post_init__(self) -> None:
        _check_names("operation", self.operations, OPERATIONS)
        _check_names("dtype", self.dtypes, DTYPES)
        _check_names("device", (self.device,), tuple(SHAPES))
        for rows, columns in self.shapes:
            if rows < 1 or columns < 1 or columns % BLOCK_SIZE:
                raise ValueError(
                    f"a shape is NxK with K a multiple of {BLOCK_SIZE}, got {rows}x{columns}"
                )
        if any(count < 1 for count in (*self.tokens, self.repeats)):
            raise ValueError(
                f"tokens and repeats must be at least 1, got {self.tokens} and {self.repeats}"
            )
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("there is no CUDA device here: use --device cpu, see qlora-ref doctor")

    def cases(self) -> Iterator[partial[Case]]:
        """Each case, to be made when its turn comes."""
        dtypes = [getattr(torch, name) for name in self.dtypes]
        for name in self.operations:
            if name in BLOCKWISE:
                for shape in self.shapes:
                    for dtype in dtypes:
                        yield partial(BLOCKWISE[name], shape, dtype, self.device)
            elif name == "matmul_4bit":
                for shape in self.shapes:
                    for dtype in dtypes:
                        yield from self._products(Weights(shape, dtype, self.device))
            else:
                for n in sorted({math.prod(shape) // 4 for shape in self.shapes}):
                    for bits in (32, 8):
                        yield partial(adamw_step, bits, n, self.device)

    def measure(self, tell: Callable[[str], None] = lambda text: None) -> Iterator[list[Row]]:
        """The rows of each case when it is done; `tell` hears of a case when it begins."""
        for make in self.cases():
            try:
                case = make()
            except Exception as error:  # out of memory, say: the others go on
                arguments = ", ".join(map(str, make.args))
                yield [broken_case(make.func.__name__, arguments, self.device, error)]
                continue
            tell(str(case))
            if not self.peers:
                case = replace(case, peers={})
            yield measure_case(case, torch.device(self.device), self.repeats, self.seconds)

    def _products(self, weights: Weights) -> Iterator[partial[Case]]:
        for tokens in self.tokens:
            yield partial(matmul_4bit, weights, tokens, FORWARD)
            if tokens >= GRADIENT_FROM:
                yield partial(matmul_4bit, weights, tokens, GRADIENT)


def _check_names(kind: str, names: tuple[str, ...], known: tuple[str, ...]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"no {kind} is called {name!r}: expected one of {', '.join(known)}")


def make_plan(
    operations: str,
    shapes: str | None,
    tokens: str | None,
    dtypes: str | None,
    device: str,
    **others: Any,
) -> Plan:
    """A plan from what a command line says, lists separated by commas; None: what is usual."""
    _check_names("device", (device,), tuple(SHAPES))
    return Plan(
        split(operations),
        parse_shapes(shapes or SHAPES[device]),
        parse_numbers(tokens or TOKENS[device]),
        split(dtypes or USUAL_DTYPES[device]),
        device,
        **others,
    )


def split(text: str) -> tuple[str, ...]:
    """Names separated by commas. Raises ValueError if there are none."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise ValueError("expected one or more names separated by commas, got none")
    return names


def parse_numbers(text: str) -> tuple[int, ...]:
    """'1,16' as (1, 16). Raises ValueError for what is no number."""
    numbers = split(text)
    if not all(number.isdecimal() for number in numbers):
        raise ValueError(f"expected whole numbers separated by commas, got {text!r}")
    return tuple(map(int, numbers))


def parse_shapes(text: str) -> tuple[tuple[int, int], ...]:
    """'4096x4096,1024x512' as pairs. Raises ValueError for what is no shape."""
    shapes = []
    for shape in split(text):
        sizes = shape.lower().split("x")
        if len(sizes) != 2 or not all(size.isdecimal() for size in sizes):
            raise ValueError(f"a shape is NxK as 4096x4096, got {shape!r}")
        shapes.append((int(sizes[0]), int(sizes[1])))
    return tuple(shapes)
