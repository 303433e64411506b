"""Square roots and quotients of csrc/cuda/rounded.cuh: the nearest float, without a branch each."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from compare import assert_same_bits, normal
from sim import arithmetic
from sim.machine import Launch, execute
from sim.memory import GlobalMemory
from sim.parser import Module, parse
from sim.program import Program
from simulated import GPUS, SimulatedOperations, missing, open_simulated

from qlora_ref import codebooks
from qlora_ref.reference.adamw_step import adamw_step

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import sass  # noqa: E402

SOURCE = ROOT / "tests" / "native" / "rounded.cu"
THREADS = 256

# The only quotients that a reciprocal which is off by one unit spoils, with how it is off: what
# divides_exactly in rounded.cuh asks the GPU about.
SPOILED = [
    ("3f800000", "3fffffff", "-1"),
    ("3fd55553", "3ffffffd", "1"),
    ("3f800000", "3fffffff", "1"),
]


@pytest.fixture(scope="module")
def kernels(build: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Module:
    """rounded.cu, compiled."""
    if (why := missing()) is not None:
        pytest.skip(why)
    path = tmp_path_factory.mktemp("rounded") / "rounded.ptx"
    flags = [*build.CUDA_FLAGS, "-arch=compute_80", "-ptx"]
    build.execute([*build.find_nvcc(), *flags, str(SOURCE), "-o", str(path)])
    return parse(path.read_text())


@pytest.fixture(params=[-1, 0, 1], ids=["low", "nearest", "high"])
def off(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """By how many units in the last place the simulated approximations are off."""
    monkeypatch.setattr(arithmetic, "approximations_off", request.param)
    return int(request.param)


def run(module: Module, name: str, *arrays: np.ndarray) -> np.ndarray:
    """A kernel's result, of as many values as its arguments have."""
    n = len(arrays[0])
    memory = GlobalMemory(1 << 26)
    addresses = [memory.allocate(4 * n) for _ in range(len(arrays) + 1)]
    for address, array in zip(addresses, arrays, strict=False):
        memory.write(address, array.astype(np.float32).tobytes())
    parameters = np.array(addresses, np.uint64).tobytes()
    grid, block = (n // THREADS, 1, 1), (THREADS, 1, 1)
    execute(Program(module.kernels[name], module), Launch(grid, block, parameters, 0), memory)
    return np.frombuffer(memory.read(addresses[-1], 4 * n)[0], np.float32)


def mantissas(count: int, seed: int) -> np.ndarray:
    bits = np.random.default_rng(seed).integers(0x3F800000, 0x40000000, count)
    return bits.astype(np.uint32).view(np.float32)


def beside_a_middle(divisors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a and b whose quotients come as close to the middle of two floats as there are any.

    With odd b and a of 24 bits, (2 q + 1) b = 2^25 a + c is solved for the least c there is.
    """
    b = [int(bits) & 0x7FFFFF | 0x800001 for bits in divisors.view(np.uint32)]
    found = []
    for divisor in b:
        for rest in (-1, 1):
            middle = rest * pow(divisor, -1, 1 << 25) % (1 << 25)
            a, left = divmod(middle * divisor - rest, 1 << 25)
            if left == 0 and a >= 1 << 22 and middle >= 1 << 24:
                found.append((a * 2.0**-23 * (2 if a < 1 << 23 else 1), divisor * 2.0**-23))
    pairs = np.array(found, np.float32)[: len(found) // THREADS * THREADS]
    return pairs[:, 0].copy(), pairs[:, 1].copy()


def test_quotients_are_the_nearest_floats(kernels: Module, off: int) -> None:
    for a, b in (
        beside_a_middle(mantissas(1 << 14, 1)),
        (mantissas(1 << 16, 2), mantissas(1 << 16, 3)),
    ):
        scale = np.resize(np.ldexp(np.float32(1), np.arange(-30, 30)), len(a))
        assert len(a) >= 1 << 12
        assert np.array_equal(run(kernels, "quotients", a * scale, -b), a * scale / -b)
        assert np.array_equal(run(kernels, "quotients", a, b * scale), a / (b * scale))


def test_no_other_quotient_is_spoiled_by_a_reciprocal_that_is_off(
    build: SimpleNamespace, tmp_path: Path
) -> None:
    program = tmp_path / "quotients"
    source = SOURCE.parent / "quotients.cpp"
    flags = ["-O3", "-std=c++17", "-ffp-contract=off", "-march=native"]
    build.execute([*build.find_compiler(), *flags, str(source), "-o", str(program)])
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    assert [tuple(line.split()) for line in printed.splitlines()] == SPOILED


def test_roots_are_the_nearest_floats(kernels: Module) -> None:
    powers = [np.ldexp(np.float32(1), k) for k in (-100, -2, 0, 2, 120)]
    x = np.concatenate([mantissas(1 << 16, 4) * power for power in powers])
    for values in (x, x * 2):
        assert np.array_equal(run(kernels, "roots", values), np.sqrt(values))


@pytest.mark.parametrize("value", [0.0, np.inf, np.nan, -1.0])
def test_roots_out_of_range_are_nan(kernels: Module, value: float) -> None:
    assert np.isnan(run(kernels, "roots", np.full(THREADS, value, np.float32))).all()


@pytest.mark.parametrize(
    "architecture", ["80", *(pytest.param(a, marks=pytest.mark.slow) for a in ("90a", "120"))]
)
def test_roots_are_what_the_compiler_makes_of_sqrtf(
    build: SimpleNamespace, architecture: str, tmp_path: Path
) -> None:
    pytest.importorskip("triton", reason="needs its disassembler")
    if (why := missing()) is not None:
        pytest.skip(why)
    target = tmp_path / "rounded.cubin"
    flags = [*build.CUDA_FLAGS, f"-arch=sm_{architecture}", "-cubin"]
    build.execute([*build.find_nvcc(), *flags, str(SOURCE), "-o", str(target)])
    found = {k.symbol: k.instructions for k in sass.read_kernels(target, architecture)}
    (guard,) = (
        i for i in found["compiled_roots"] if i.name == "IADD3" and "0xd000000" in i.operands
    )
    assert np.uint32(0x0D000000).view(np.float32) == 2.0**-101  # what it leaves to the short way
    assert guard.address < 0x100
    assert root_of(found["roots"]) == root_of(found["compiled_roots"])


def root_of(instructions: list[sass.Instruction]) -> str:
    """What is computed from the approximate root and the next products and sums, as one term."""
    start = next(i for i, found in enumerate(instructions) if found.name == "MUFU")
    terms: dict[str, str] = {}
    for i in [i for i in instructions[start:] if i.name in ("MUFU", "FMUL", "FFMA")][:5]:
        target, *sources = i.operands.replace(".reuse", "").split(", ")
        known = [re.sub(r"R\d+", lambda found: terms.get(found[0], "x"), s) for s in sources]
        terms[target] = f"{i.name}({', '.join(known)})"
    return terms[target]


def adamw(run_step: SimulatedOperations | None, bits: int) -> list[torch.Tensor]:
    """Parameters and moments after two steps of a simulated GPU, or else the reference."""
    n = 256 * 33  # more than what a thread block steps at once
    params, grads = [normal(n, seed=1).bfloat16()], [normal(n, seed=2).bfloat16()]
    kind = torch.float32 if bits == 32 else torch.uint8
    moments = [[torch.zeros(n, dtype=kind)] for _ in range(2)]
    scales: list[list[torch.Tensor]] = [[], []]
    tables: tuple = (None, None)
    if bits == 8:
        tables = tuple(codebooks.dynamic_codebook(signed=signed) for signed in (True, False))
        scales = [[torch.zeros(n // 256)] for _ in range(2)]
    for number in (1, 2):
        options = (1e-2, 0.9, 0.99, 1e-8, 0.1, number)
        (adamw_step if run_step is None else run_step.adamw_step)(
            params, grads, *moments, *scales, *tables, *options
        )
    return [*params, *moments[0], *moments[1], *scales[0], *scales[1]]


@pytest.mark.parametrize("bits", [32, 8])
def test_a_step_is_the_same_where_reciprocals_are_off(
    cuda_library: Path, off: int, bits: int
) -> None:
    # Two reciprocals say that this GPU's do not serve: all goes the plain way then.
    operations = SimulatedOperations(*open_simulated(cuda_library), GPUS["A100"])
    for actual, expected in zip(adamw(operations, bits), adamw(None, bits), strict=True):
        assert_same_bits(actual, expected)
