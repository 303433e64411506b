"""What CUDA kernels cost by their machine code: no GPU is needed, and nothing is timed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import sass  # noqa: E402
import static_gpu  # noqa: E402

# A loop of two products and a store, with a rare way out of line that has one more product.
LISTING = """
  /*0000*/  S2R R0, SR_TID.X ;
  /*0010*/  FFMA R1, R1, R2, R3 ;
  /*0020*/  @P0 BRA 0x60 ;
  /*0030*/  FFMA R1, R1, R2, R3 ;
  /*0040*/  STG.E.128 [R4], R1 ;
  /*0050*/  @P1 BRA 0x10 ;
  /*0058*/  EXIT ;
  /*0060*/  FFMA R1, R1, R2, R3 ;
  /*0070*/  BRA 0x30 ;
  /*0080*/  NOP ;
"""


def test_the_path_of_a_loop_leaves_out_what_is_before_behind_and_rare() -> None:
    kernel = sass.Kernel("k", 8, 0, 0, sass.parse(LISTING))
    path = sass.main_path(kernel, r"STG\S*\.128")
    assert [i.name for i in path] == ["FFMA", "BRA", "FFMA", "STG", "BRA"]


@pytest.fixture(scope="module")
def prices(build: SimpleNamespace) -> list[static_gpu.Price]:
    """Skips without nvcc or the disassembler; a kernel that does not compile is an error."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton's cuobjdump")
    try:
        build.find_nvcc()
    except build.CompileError as error:
        pytest.skip(str(error))
    if missing := set(static_gpu.ARCHITECTURES) - set(build.cuda_architectures()):
        pytest.skip(f"QLORA_REF_CUDA_ARCHITECTURES leaves out {missing}")
    return static_gpu.price_all()


def test_no_cuda_kernel_that_is_priced_spills_registers(prices: list[static_gpu.Price]) -> None:
    held = [price for price in prices if price.architecture in static_gpu.HELD]
    assert {price.name: price.spilled for price in held if price.spilled} == {}


@pytest.mark.parametrize("entry", static_gpu.ENTRIES, ids=lambda entry: entry.name)
@pytest.mark.parametrize("architecture", static_gpu.HELD)
def test_cuda_kernel_stays_below_its_price(
    architecture: str, entry: static_gpu.Entry, prices: list[static_gpu.Price]
) -> None:
    (price,) = (p for p in prices if (p.name, p.architecture) == (entry.name, architecture))
    assert price.instructions <= entry.ceiling
    assert entry.mio_ceiling is None or price.mio <= entry.mio_ceiling
