"""quantize_4bit to NF4: every backend, bitsandbytes, and a read."""

from __future__ import annotations

import torch
from measure import (
    PEER,
    READ,
    each_thread_count,
    memory_candidate,
    parse_arguments,
    report,
)
from torch import Tensor

from qlora_ref import codebooks, dispatch, native, ops
from qlora_ref.benchmark.candidates import each_backend, is_installed
from qlora_ref.benchmark.timing import medians


def measure(x: Tensor, repeats: int) -> None:
    nf4 = codebooks.nf4_codebook()
    packed, absmax = ops.quantize_4bit(x, nf4)
    candidates = each_backend("quantize_4bit", lambda: ops.quantize_4bit(x, nf4))
    for name, run in candidates.items():
        assert all(map(torch.equal, run(), (packed, absmax))), name
    if is_installed(PEER):
        import bitsandbytes.functional as bnb

        candidates[PEER] = lambda: bnb.quantize_4bit(x, quant_type="nf4")
        assert torch.equal(bnb.quantize_4bit(x, quant_type="nf4")[0].flatten(), packed)
    candidates[READ] = memory_candidate(READ)
    operations = native.load("cpu", "quantize_4bit", dispatch.forced_isa()).__self__
    for _ in each_thread_count():
        title = f"quantize_4bit {tuple(x.shape)} {x.dtype}, a fresh output each time"
        report(title, medians(candidates, repeats), x.nbytes, limit=READ)
        used = {
            "cpu": lambda: operations.quantize_into(packed, absmax, "quantize_4bit", x, nf4, 64),
            READ: candidates[READ],
        }
        title = f"quantize_4bit {tuple(x.shape)} {x.dtype}, the same output each time"
        report(title, medians(used, repeats), x.nbytes, limit=READ)


def main() -> None:
    options = parse_arguments(__doc__ or "")
    x = torch.randn(options.rows, options.columns)
    for dtype in (torch.float32, torch.bfloat16):
        measure(x.to(dtype), options.repeats)


if __name__ == "__main__":
    main()
