"""matmul_4bit, forward and input gradient, beside every other implementation that is installed.

    python benchmarks/bench_matmul_4bit.py
    python benchmarks/bench_matmul_4bit.py --shapes 11008x4096 --tokens 1 4 --dtypes bfloat16

As on a processor with AVX2 and no more, for ours and for the peers that can be told so:

    QLORA_REF_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 \\
      MKL_ENABLE_INSTRUCTIONS=AVX2 python benchmarks/bench_matmul_4bit.py

Each row is one product: milliseconds of ours, GFLOP/s, and for each peer its time divided by ours
(above 1 we are faster). `read` is the time that reading the codes and scales alone takes, divided
by ours: the share of that limit which few tokens reach.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

import qlora_ref
from qlora_ref import dispatch, native, ops
from qlora_ref.benchmark.products import FORWARD, GRADIENT, matmul_4bit
from qlora_ref.benchmark.timing import medians
from qlora_ref.benchmark.weights import Weights

SHAPES = ("4096x4096", "11008x4096", "4096x11008", "1024x1024")
MANY = 64  # tokens from which a product is bound by arithmetic, and a gradient is of interest


def main() -> None:
    options = _parse_arguments()
    torch.manual_seed(0)
    for threads in options.threads:
        torch.set_num_threads(threads)
        print_overhead()
        for shape in options.shapes:
            rows, columns = (int(size) for size in shape.split("x"))
            for name in options.dtypes:
                weights = Weights((rows, columns), getattr(torch, name))
                for tokens in options.tokens:
                    _compare(weights, tokens, False, options.repeats)
                    if tokens >= MANY:
                        _compare(weights, tokens, True, options.repeats)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="NxK")
    parser.add_argument("--tokens", nargs="+", type=int, default=(1, 4, 8, 16, 64, 512), help="M")
    parser.add_argument("--dtypes", nargs="+", default=("bfloat16", "float32"))
    parser.add_argument("--threads", nargs="+", type=int, default=(1, 2))
    parser.add_argument("--repeats", type=int, default=11)
    return parser.parse_args()


def _compare(weights: Weights, tokens: int, transposed: bool, repeats: int) -> None:
    rows, columns = weights.shape
    case = matmul_4bit(weights, tokens, GRADIENT if transposed else FORWARD)
    runs: dict[str, Callable[[], object]] = {}
    with torch.no_grad():
        for name, prepare in {"ours": case.ours["cpu"], **case.peers}.items():
            prepared = prepare()
            prepared.check()
            runs[name] = prepared.run
    codes, scales = weights.quantized.packed.view(torch.int32), weights.quantized.scales
    runs["read"] = lambda: (codes.max(), scales.max())
    with torch.no_grad():
        found = medians(runs, repeats)
    ours = found.pop("ours")
    gigaflops = 2 * tokens * rows * columns / ours / 1e9
    ratios = "  ".join(f"{name} {seconds / ours:.2f}" for name, seconds in found.items())
    direction = "gradient" if transposed else "forward"
    kind = str(weights.dtype).removeprefix("torch.")
    print(
        f"{rows}x{columns} {kind} {direction} M={tokens} threads={torch.get_num_threads()}: "
        f"{ours * 1e3:.3f} ms, {gigaflops:.0f} GFLOP/s | {ratios}",
        flush=True,
    )


def print_overhead() -> None:
    """What Python adds to the C function on a small product, in microseconds."""
    weight, x = torch.randn(64, 64), torch.randn(1, 64)
    layer, with_bias = (
        qlora_ref.Linear4bit.from_linear(torch.nn.Linear(64, 64, bias=bias), double_quant=False)
        for bias in (False, True)
    )
    q = qlora_ref.quantize(weight)
    parts = (q.packed, q.scales, q.codebook, q.block_size, q.shape)
    isa = dispatch.forced_isa() or native.available_isas(native.FOLDER)[-1]
    library = native.open_library(native.library_path(native.FOLDER, isa))
    y = torch.empty(1, 64)
    tensors = (x, q.packed, q.scales, q.codebook, y)
    x_, packed, scales, codebook, y_ = (tensor.data_ptr() for tensor in tensors)
    threads = torch.get_num_threads()

    def c() -> object:
        return library.matmul_4bit(
            *(x_, 0, 1, packed, scales, None, None, None, codebook, 64, 64, 64, None, 0, y_),
            threads,
        )

    with torch.no_grad():
        bare = _microseconds(c)
        operation = _microseconds(lambda: ops.matmul_4bit(x, *parts)) - bare
        module = _microseconds(lambda: layer(x)) - bare
        biased = _microseconds(lambda: with_bias(x)) - bare
    print(
        f"Python adds to the C function ({bare:.1f} us for 1 x 64 x 64): "
        f"matmul_4bit {operation:.1f} us, Linear4bit {module:.1f} us, with a bias {biased:.1f} us; "
        f"{threads} thread(s)"
    )


def _microseconds(run: Callable[[], object], calls: int = 2000) -> float:
    best = float("inf")
    for _ in range(7):
        began = time.perf_counter()
        for _ in range(calls):
            run()
        best = min(best, (time.perf_counter() - began) / calls * 1e6)
    return best


if __name__ == "__main__":
    main()
