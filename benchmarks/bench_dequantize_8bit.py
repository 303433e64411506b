"""dequantize_8bit with the dynamic map: every backend, bitsandbytes, a copy of as many bytes."""

from __future__ import annotations

import torch
from measure import (
    COPY,
    bitsandbytes_is_installed,
    copy_candidate,
    each_backend,
    medians,
    parse_arguments,
    report,
)

from qlora_ref import codebooks, ops


def main() -> None:
    options = parse_arguments(__doc__ or "")
    x = torch.randn(options.rows, options.columns)
    table = codebooks.dynamic_codebook()
    codes, absmax = ops.quantize_8bit(x, table)
    expected = ops.dequantize_8bit(codes, absmax, table)
    candidates = each_backend("dequantize_8bit", lambda: ops.dequantize_8bit(codes, absmax, table))
    for name, run in candidates.items():
        assert torch.equal(run(), expected), name
    if bitsandbytes_is_installed():
        import bitsandbytes.functional as bnb

        theirs, state = bnb.quantize_blockwise(x, blocksize=256)
        candidates["bitsandbytes"] = lambda: bnb.dequantize_blockwise(theirs, state)
    nbytes = x.numel() * 5 + x.numel() // 64
    candidates[COPY] = copy_candidate(nbytes)
    report(
        f"dequantize_8bit {tuple(x.shape)} float32", medians(candidates, options.repeats), nbytes
    )


if __name__ == "__main__":
    main()
