"""What Triton kernels cost by their machine code, as they are launched: nothing is run."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="what is interpreted is not compiled"
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="needs triton: pip install triton"
    ),
]

if importlib.util.find_spec("triton") is not None:
    import static_triton
    import triton
    from static_triton import ENTRIES, Entry

    pytestmark.append(
        pytest.mark.skipif(
            triton.__version__ != static_triton.PRICED_WITH,
            reason=f"prices are those of triton {static_triton.PRICED_WITH}'s machine code, "
            f"this is {triton.__version__}",
        )
    )

    # Compiling takes seconds: by default each kernel is compiled once, for one architecture. FP4's
    # differs from NF4's by the size of a table.
    HELD = [
        pytest.param(
            entry, a, marks=[pytest.mark.slow] if a != "90a" or "fp4" in entry.name else []
        )
        for entry in ENTRIES
        for a in entry.ceilings
    ]
    OTHERS = [(e, a) for e in ENTRIES for a in static_triton.ARCHITECTURES if a not in e.ceilings]
else:
    HELD, OTHERS = [], []


@functools.cache
def price_of(name: str, architecture: str) -> static_triton.TritonPrice:
    (entry,) = (entry for entry in ENTRIES if entry.name == name)
    return static_triton.price(entry, architecture)


NAMES = {"ids": lambda value: getattr(value, "name", value)}


@pytest.mark.parametrize(("entry", "architecture"), HELD, **NAMES)
def test_a_kernel_stays_below_its_price(entry: Entry, architecture: str) -> None:
    assert static_triton.broken(price_of(entry.name, architecture)) == []


@pytest.mark.slow
@pytest.mark.parametrize(("entry", "architecture"), OTHERS, **NAMES)
def test_a_kernel_without_a_price_spills_no_register(entry: Entry, architecture: str) -> None:
    assert static_triton.broken(price_of(entry.name, architecture)) == []


@pytest.mark.slow
def test_every_kernel_compiles_for_amd() -> None:
    assert len(static_triton.compile_all("gfx942")) == len(ENTRIES)


# What must be noticed. A limit that nothing can exceed would be none.


def test_a_price_above_the_ceiling_is_a_complaint() -> None:
    price = price_of("matmul_4bit, large M", "90a")
    worse = {"instructions": 9.8, "spilled": 4, "narrow_copies": 1, "weight_in_registers": False}
    for name, value in worse.items():
        changed = static_triton.TritonPrice(**(vars(price) | {name: value}))
        assert len(static_triton.broken(changed)) == 1, name
