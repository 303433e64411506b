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


# A loop that loads what its next pass needs, unless that is the last one, and a loop for the rest.
LOADING = """
  /*0000*/  IADD3 R8, R8, R9, RZ ;
  /*0010*/  HMMA.16816.F32 R0, R4, R8, R0 ;
  /*0020*/  @P0 BRA 0x60 ;
  /*0030*/  @P2 BRA 0x50 ;
  /*0040*/  LDGSTS.E.BYPASS.128 [R9], [R10.64] ;
  /*0048*/  LDG.E.64 R12, [R14.64] ;
  /*0050*/  LDG.E.U8 R16, [R18.64] ;
  /*0060*/  HMMA.16816.F32 R0, R4, R8, R0 ;
  /*0070*/  @P1 BRA 0x10 ;
  /*0080*/  HMMA.16816.F32 R0, R4, R8, R0 ;
  /*0090*/  @P3 BRA 0x80 ;
  /*00a0*/  EXIT ;
"""


def test_the_steady_path_of_a_loop_is_the_one_that_loads_for_the_next() -> None:
    kernel = sass.Kernel("k", 8, 0, 0, sass.parse(LOADING))
    path = sass.main_path(kernel, "HMMA")
    loads = ["LDGSTS", "LDG", "LDG"]
    assert [i.name for i in path] == ["HMMA", "BRA", "BRA", *loads, "HMMA", "BRA"]


def test_what_is_loaded_counts_by_its_bytes() -> None:
    widths = [sass.bytes_loaded(instruction) for instruction in sass.parse(LOADING)]
    assert [bytes_ for bytes_ in widths if bytes_] == [16, 8, 1]


def compiled(build: SimpleNamespace) -> list[Path]:
    """The objects. Skips without nvcc or the disassembler; what does not compile is an error."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton's cuobjdump")
    try:
        build.find_nvcc()
    except build.CompileError as error:
        pytest.skip(str(error))
    if missing := set(static_gpu.ARCHITECTURES) - set(build.cuda_architectures()):
        pytest.skip(f"QLORA_REF_CUDA_ARCHITECTURES leaves out {missing}")
    return build.cuda_objects()


@pytest.fixture(scope="module")
def prices(build: SimpleNamespace) -> list[static_gpu.Price]:
    compiled(build)
    return static_gpu.price_all(static_gpu.HELD)


def test_no_cuda_kernel_spills_registers_on_any_architecture(build: SimpleNamespace) -> None:
    spilled, kernels = [], 0
    for binary in compiled(build):
        for architecture, found in sass.read_resources(binary).items():
            kernels += len(found)
            spilled += [(architecture, name) for name, (_, bytes_, _) in found.items() if bytes_]
    assert kernels > 100
    assert spilled == []


@pytest.mark.parametrize("entry", static_gpu.ENTRIES, ids=lambda entry: entry.name)
@pytest.mark.parametrize("architecture", static_gpu.HELD)
def test_cuda_kernel_stays_below_its_price(
    architecture: str, entry: static_gpu.Entry, prices: list[static_gpu.Price]
) -> None:
    (price,) = (p for p in prices if (p.name, p.architecture) == (entry.name, architecture))
    assert price.instructions <= entry.ceiling
    assert entry.mio_ceiling is None or price.mio <= entry.mio_ceiling
