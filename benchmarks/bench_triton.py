"""The Triton kernels on a GPU, beside CUDA, bitsandbytes and dequantise + cuBLAS.

    python benchmarks/bench_triton.py --operations matmul_4bit --shapes 4096x4096 --tokens 1,16
    QLORA_REF_TRITON_TUNE=1 python benchmarks/bench_triton.py

Cases, peers and checks are those of `qlora-ref bench --device cuda`, which times candidates in
turn; here each is timed by itself with `triton.testing.do_bench`, as Triton's own tutorials do.
Each line: milliseconds, and the time divided by that of Triton (above 1 Triton is faster).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton.testing

from qlora_ref.benchmark.candidates import Case, WrongResult
from qlora_ref.benchmark.plan import make_plan
from qlora_ref.dispatch import OPERATIONS


def time_case(
    case: Case, do_bench: Callable[..., Any] = triton.testing.do_bench
) -> Iterator[tuple[str, float | str]]:
    """For each candidate its milliseconds, or what is wrong with it. Results are checked first."""
    for name, prepare in (case.ours | case.peers).items():
        try:
            candidate = prepare()
            candidate.check()
            yield name, float(do_bench(candidate.run, return_mode="median"))
        except WrongResult as error:
            yield name, f"refused: {error}"
        except Exception as error:  # of a peer, or out of memory: the others go on
            yield name, f"failed: {type(error).__name__}: {error}"


def lines_of(case: Case, times: list[tuple[str, float | str]]) -> Iterator[str]:
    yield str(case)
    ours = dict(times).get("triton")
    for name, time in times:
        if isinstance(time, str):
            yield f"  {name:<18} {time}"
        elif isinstance(ours, float):
            yield f"  {name:<18} {time:9.4f} ms {time / ours:7.2f}"
        else:
            yield f"  {name:<18} {time:9.4f} ms"


def main() -> int:
    parser = argparse.ArgumentParser(description="Time the Triton kernels on a GPU.")
    parser.add_argument("--operations", default=",".join(OPERATIONS))
    for name in ("shapes", "tokens", "dtypes"):
        parser.add_argument(f"--{name}")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("not timed: there is no GPU. Prices: benchmarks/static_gpu.py --backend triton")
        return 0
    plan = make_plan(options.operations, options.shapes, options.tokens, options.dtypes, "cuda")
    is_wrong = False
    for make in plan.cases():
        case = make()
        times = list(time_case(case))
        print("\n".join(lines_of(case, times)), flush=True)
        is_wrong |= any(name in case.ours and isinstance(time, str) for name, time in times)
    return 1 if is_wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
