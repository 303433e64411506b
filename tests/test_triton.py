"""The Triton kernels run by Triton's interpreter pass the tests of their operations.

Triton decides when it is imported whether it interprets: these tests have processes of their own.
Compiled kernels have theirs in test_triton_compiled.py and test_static_triton.py.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_ref.dispatch import OPERATIONS

ROOT = Path(__file__).parent.parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="these tests start the interpreter"),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="needs triton: pip install triton"
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("qlora_kernels") is None,
        reason="needs the package installed: pip install -e .",
    ),
]


FILES = (*OPERATIONS, "matmul_4bit_sizes")  # tests/test_<name>.py


def test_interpreted_kernels_pass_the_tests_of_every_operation() -> None:
    # numpy warns of what the tests do on purpose: overflow, 0 / 0.
    quiet = ("-W", "ignore::RuntimeWarning", "-p", "no:cacheprovider")
    tests = [f"tests/test_{operation}.py" for operation in FILES]
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-vv", "-k", "triton", *quiet, *tests],
        cwd=ROOT,
        # Threads of torch would wait for cores that other tests use.
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout[-5000:] + finished.stderr[-5000:]
    tested = re.findall(r"tests/test_(\w+)\.py::.*\[triton.*PASSED", finished.stdout)
    assert set(tested) == set(FILES)
