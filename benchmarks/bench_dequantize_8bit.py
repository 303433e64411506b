"""dequantize_8bit with the dynamic map: every backend, bitsandbytes, and a copy.

A fresh output costs page faults, several times the work itself; so both libraries are also called
with an output that is reused.
"""

from __future__ import annotations

from ctypes import c_longlong, c_void_p

import torch
from measure import (
    COPY,
    PEER,
    each_thread_count,
    memory_candidate,
    parse_arguments,
    report,
)

from qlora_ref import codebooks, native, ops
from qlora_ref.benchmark.candidates import each_backend, is_installed
from qlora_ref.benchmark.timing import medians
from qlora_ref.native_operations import DTYPES, CpuOperations

REUSED_PEER = "bnb, reused"


def main() -> None:
    options = parse_arguments(__doc__ or "")
    x = torch.randn(options.rows, options.columns)
    table = codebooks.dynamic_codebook()
    codes, absmax = ops.quantize_8bit(x, table)
    expected = ops.dequantize_8bit(codes, absmax, table)
    candidates = each_backend("dequantize_8bit", lambda: ops.dequantize_8bit(codes, absmax, table))
    for name, run in candidates.items():
        assert torch.equal(run(), expected), name
    y = torch.empty_like(x)
    isa = native.available_isas(native.FOLDER)[-1]
    operations = CpuOperations(native.open_library(native.library_path(native.FOLDER, isa)))
    reused = (codes, absmax, table, 256, y.numel(), y, DTYPES[y.dtype])
    candidates["cpu, reused"] = lambda: operations._call("dequantize_8bit", y.device, *reused)
    candidates["cpu, reused"]()
    assert torch.equal(y, expected)
    if is_installed(PEER):
        import bitsandbytes.functional as bnb
        from bitsandbytes.cextension import lib

        theirs, state = bnb.quantize_blockwise(x, blocksize=256)
        candidates["bitsandbytes"] = lambda: bnb.dequantize_blockwise(theirs, state)
        pointers = [c_void_p(tensor.data_ptr()) for tensor in (table, codes, absmax, y)]
        sizes = (c_longlong(256), c_longlong(x.numel()))
        candidates[REUSED_PEER] = lambda: lib.cdequantize_blockwise_cpu_fp32(*pointers, *sizes)
    nbytes = x.numel() * 5 + x.numel() // 64
    candidates[COPY] = memory_candidate(COPY)
    for _ in each_thread_count():
        found = medians(candidates, options.repeats)
        report(f"dequantize_8bit {tuple(x.shape)} float32", found, nbytes, peer=REUSED_PEER)


if __name__ == "__main__":
    main()
