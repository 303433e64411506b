"""How many instructions each operation of the C++ backend executes, counted by valgrind.

    python benchmarks/instruction_counts.py           print the counts beside the recorded ones
    python benchmarks/instruction_counts.py --record  write instruction_counts.json
    python benchmarks/instruction_counts.py --check   fail if an operation became slower

A count does not depend on what else the machine does, so that it can fail a build where a time
cannot. `--check` asks: does the same library still give the same counts? Has another library, by
the same compiler, at most 10 % more in each operation? By another compiler the counts are printed
alone. Valgrind knows no AVX-512: `baseline` and `avx2` are counted, on one thread.

An instruction is no time: see bench_<operation>.py for that.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from compare import normal, random_weight  # noqa: E402  (what the tests use)
from native_program import (  # noqa: E402
    DYNAMIC,
    DYNAMIC_UNSIGNED,
    NF4,
    ProgramOperations,
    build_program,
    setup_definitions,
)

from qlora_ref import native  # noqa: E402

# The same library has the same counts; but it calls memcpy and memset, of which the C library
# chooses another one on another processor.
OTHER_PROCESSOR = 0.01

RECORD = Path(__file__).with_suffix(".json")
ISAS = ("baseline", "avx2")
ALLOWED_RATIO = 1.1

N = 2**16
ADAMW = (1e-3, 0.9, 0.999, 1e-8, 0.01, 3)


class CountedOperations(ProgramOperations):
    """The operations under callgrind; `instructions` is what the last call executed."""

    def __init__(self, program: Path, library: Path, folder: Path) -> None:
        self._output = folder / "callgrind.out"
        tool = ("valgrind", "--tool=callgrind", f"--callgrind-out-file={self._output}")
        super().__init__(*tool, program, library, callers=1, threads=1)
        self._tool = self._command
        self.instructions = 0

    def _call(self, name: str, *arguments: Any) -> None:
        # Counts while a function of this name, and what it calls, runs.
        self._command = [*self._tool[:1], f"--toggle-collect={name}", *self._tool[1:]]
        super()._call(name, *arguments)
        totals = re.search(r"^(?:totals|summary): (\d+)$", self._output.read_text(), re.MULTILINE)
        if totals is None or int(totals[1]) == 0:
            raise RuntimeError(f"callgrind counted nothing in {name}")
        self.instructions = int(totals[1])


def count_all(cpu: CountedOperations) -> dict[str, int]:
    """Instructions of each operation on fixed arguments, in float32 and bfloat16."""
    counts = {}
    for dtype in (torch.float32, torch.bfloat16):
        label = str(dtype).removeprefix("torch.")
        x = normal(N, dtype=dtype)
        packed, absmax = cpu.quantize_4bit(x, NF4, 64)
        counts[f"quantize_4bit {label}"] = cpu.instructions
        cpu.dequantize_4bit(packed, absmax, NF4, 64, (N,), dtype)
        counts[f"dequantize_4bit {label}"] = cpu.instructions
        codes, scales = cpu.quantize_8bit(x, DYNAMIC, 256)
        counts[f"quantize_8bit {label}"] = cpu.instructions
        cpu.dequantize_8bit(codes, scales, DYNAMIC, 256, dtype)
        counts[f"dequantize_8bit {label}"] = cpu.instructions
        for tokens in (1, 64):
            weight = random_weight(256, 256, 64)
            layout = (weight.packed, weight.absmax, weight.codebook, 64, weight.shape)
            cpu.matmul_4bit(
                normal(tokens, 256, dtype=dtype), *layout, None, False, None, None, None
            )
            counts[f"matmul_4bit {label} {tokens} tokens"] = cpu.instructions
        counts |= count_adamw(cpu, x, codes, scales, label)
    return counts


def count_adamw(
    cpu: CountedOperations, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, label: str
) -> dict[str, int]:
    """Instructions of a step with 32-bit and with 8-bit moments; these begin as codes of x."""
    m, v = normal(N, seed=1), normal(N, seed=2).square()
    cpu.adamw_step([x.clone()], [x], [m], [v], [], [], None, None, *ADAMW)
    counts = {f"adamw_step {label} 32-bit": cpu.instructions}
    state = [[tensor.clone()] for tensor in (codes, codes, scales, scales)]
    cpu.adamw_step([x.clone()], [x], *state, DYNAMIC, DYNAMIC_UNSIGNED, *ADAMW)
    return counts | {f"adamw_step {label} 8-bit": cpu.instructions}


def measure() -> dict[str, Any]:
    """The compiler, and of each library its hash and its counts."""
    build = setup_definitions()
    compiler = build.find_compiler()
    version = subprocess.check_output([*compiler, "--version"], text=True).splitlines()[0]
    libraries = {}
    with tempfile.TemporaryDirectory() as name:
        program = build_program(build, Path(name))
        for isa, flags in build.isa_flags(compiler).items():
            if isa not in ISAS:
                continue
            library = native.library_path(Path(name), isa)
            build.compile_library(build.cpu_sources(), library, flags)
            digest = hashlib.sha256(library.read_bytes()).hexdigest()
            counts = count_all(CountedOperations(program, library, Path(name)))
            libraries[isa] = {"sha256": digest, "instructions": counts}
    return {"compiler": version, "libraries": libraries}


def compare(measured: dict[str, Any], recorded: dict[str, Any]) -> list[str]:
    """Print the counts and their ratios to the recorded ones; returns what is wrong with them."""
    complaints = []
    is_same_compiler = measured["compiler"] == recorded["compiler"]
    if not is_same_compiler:
        print(f"compared with {recorded['compiler']}: the ratios say little")
    for isa, now in measured["libraries"].items():
        before = recorded["libraries"].get(isa, {"sha256": None, "instructions": {}})
        is_same_library = now["sha256"] == before["sha256"]
        print(f"{isa} ({'the recorded' if is_same_library else 'another'} library)")
        for case, count in now["instructions"].items():
            ratio = count / before["instructions"].get(case, count)
            print(f"  {case:<34} {count:>12,} {ratio:8.3f}")
            if is_same_library and abs(ratio - 1) > OTHER_PROCESSOR:
                complaints.append(
                    f"{isa} {case}: the same library has another count, x {ratio:.6f}"
                )
            if is_same_compiler and ratio > ALLOWED_RATIO:
                complaints.append(f"{isa} {case}: {ratio:.2f} times the recorded instructions")
    return complaints


def main() -> int:
    parser = argparse.ArgumentParser(description="Count the instructions of the C++ kernels.")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if shutil.which("valgrind") is None:
        print("not counted: valgrind is not installed")
        return 0
    measured = measure()
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else measured
    complaints = compare(measured, recorded)
    if options.record:
        RECORD.write_text(json.dumps(measured, indent=2) + "\n")
    for complaint in complaints if options.check else []:
        print(complaint)
    return 1 if options.check and complaints else 0


if __name__ == "__main__":
    sys.exit(main())
