"""dequantize_4bit from NF4, into fresh outputs and into a used one, beside bitsandbytes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from measure import (
    PEER,
    WRITE,
    each_thread_count,
    memory_candidate,
    parse_arguments,
    report,
)
from torch import Tensor

import qlora_ref
from qlora_ref import QuantizedTensor, dispatch, native
from qlora_ref.benchmark.candidates import each_backend, is_installed
from qlora_ref.benchmark.timing import medians


def kernel(tensor: QuantizedTensor, y: Tensor) -> Callable[[], object]:
    """The C++ kernel on an output that is there already."""
    operations = native.load("cpu", "dequantize_4bit", dispatch.forced_isa()).__self__
    inputs = (tensor.packed, tensor.absmax, tensor.codebook, tensor.block_size)
    return lambda: operations.dequantize_4bit_into(y, *inputs)


def peer_kernel(tensor: QuantizedTensor, y: Tensor) -> Callable[[], object]:
    """The same of bitsandbytes."""
    from bitsandbytes.cextension import lib

    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[y.dtype]
    function = getattr(lib, f"cdequantize_blockwise_cpu_nf4_{name}")
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (tensor.packed, tensor.absmax, y)]
    sizes = [ctypes.c_longlong(size) for size in (tensor.block_size, *y.shape)]
    return lambda: function(*pointers, *sizes)


def measure_fresh(tensor: QuantizedTensor, x: Tensor, repeats: int) -> None:
    dtype = x.dtype
    expected = tensor.dequantize(dtype)
    candidates = each_backend("dequantize_4bit", lambda: tensor.dequantize(dtype))
    if is_installed(PEER):
        import bitsandbytes.functional as bnb

        packed, state = bnb.quantize_4bit(x, quant_type="nf4")
        state.absmax = tensor.absmax
        packed.copy_(tensor.packed.view(packed.shape))
        candidates[PEER] = lambda: bnb.dequantize_4bit(packed, state)
    for name, run in candidates.items():
        assert torch.equal(run(), expected), name
    candidates[WRITE] = memory_candidate(WRITE)
    title = f"dequantize_4bit {tuple(x.shape)} to {dtype}, a fresh output each time"
    report(title, medians(candidates, repeats), expected.nbytes, limit=WRITE)


def measure_used(tensor: QuantizedTensor, dtype: torch.dtype, repeats: int) -> None:
    expected = tensor.dequantize(dtype)
    y = torch.zeros_like(expected)
    candidates = {"cpu": kernel(tensor, y)}
    if is_installed(PEER):
        candidates[PEER] = peer_kernel(tensor, y)
    for name, run in candidates.items():
        y.zero_()
        run()
        assert torch.equal(y, expected), name
    candidates[WRITE] = memory_candidate(WRITE)
    title = f"dequantize_4bit {tuple(y.shape)} to {dtype}, the same output each time"
    report(title, medians(candidates, repeats), y.nbytes, limit=WRITE)


def main() -> None:
    options = parse_arguments(__doc__ or "")
    x = torch.randn(options.rows, options.columns)
    tensor = qlora_ref.quantize(x)
    for dtype in (torch.float32, torch.bfloat16):
        for _ in each_thread_count():
            measure_fresh(tensor, x.to(dtype), options.repeats)
            measure_used(tensor, dtype, options.repeats)


if __name__ == "__main__":
    main()
