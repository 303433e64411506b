"""quantize_8bit with the dynamic map: every backend, bitsandbytes, and a copy."""

from __future__ import annotations

import torch
from measure import (
    COPY,
    PEER,
    each_thread_count,
    memory_candidate,
    parse_arguments,
    report,
)

from qlora_ref import codebooks, ops
from qlora_ref.benchmark.candidates import each_backend, is_installed
from qlora_ref.benchmark.timing import medians


def main() -> None:
    options = parse_arguments(__doc__ or "")
    x = torch.randn(options.rows, options.columns)
    table = codebooks.dynamic_codebook()
    expected = ops.quantize_8bit(x, table)
    candidates = each_backend("quantize_8bit", lambda: ops.quantize_8bit(x, table))
    for name, run in candidates.items():
        assert torch.equal(run()[0], expected[0]), name
    if is_installed(PEER):
        import bitsandbytes.functional as bnb

        # Not checked for equality: its CPU code rounds to a grid first and is not exact.
        candidates["bitsandbytes"] = lambda: bnb.quantize_blockwise(x, blocksize=256)
    nbytes = x.numel() * 5 + x.numel() // 64  # values, codes, scales
    candidates[COPY] = memory_candidate(COPY)
    for _ in each_thread_count():
        found = medians(candidates, options.repeats)
        report(f"quantize_8bit {tuple(x.shape)} float32", found, nbytes)


if __name__ == "__main__":
    main()
