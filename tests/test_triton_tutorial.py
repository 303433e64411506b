"""docs/triton_tutorial.md quotes the kernels as they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TUTORIAL = (ROOT / "docs" / "triton_tutorial.md").read_text()
QUOTED = re.findall(r"^```python\n(.*?)^```$", TUTORIAL, flags=re.MULTILINE | re.DOTALL)
SOURCES = [path.read_text() for path in sorted((ROOT / "kernels").glob("*.py"))]


@pytest.mark.parametrize("piece", QUOTED, ids=lambda piece: piece.split("\n")[0].strip())
def test_a_quoted_piece_stands_in_a_kernel_with_its_lines_together(piece: str) -> None:
    assert any(piece in source for source in SOURCES)


def test_the_obvious_kernel_is_quoted_from_its_first_tile_to_its_store() -> None:
    assert len(QUOTED) >= 9
    matmul = (ROOT / "kernels" / "matmul_4bit.py").read_text()
    kernel = matmul[matmul.index("def _matmul(") : matmul.index("def _add_product(")]
    assert sum(piece in kernel for piece in QUOTED) >= 7
