"""quantize_4bit: every backend, bitsandbytes, and a copy of as many bytes."""

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
    nf4 = codebooks.nf4_codebook()
    expected = ops.quantize_4bit(x, nf4, 64)
    candidates = each_backend("quantize_4bit", lambda: ops.quantize_4bit(x, nf4, 64))
    if bitsandbytes_is_installed():
        import bitsandbytes.functional as bnb

        candidates["bitsandbytes"] = lambda: bnb.quantize_4bit(x, quant_type="nf4")
        assert torch.equal(bnb.quantize_4bit(x, quant_type="nf4")[0].flatten(), expected[0])
    for name, run in candidates.items():
        assert name == "bitsandbytes" or torch.equal(run()[0], expected[0]), name
    nbytes = x.numel() * 4 + x.numel() // 2 + x.numel() // 16
    candidates[COPY] = copy_candidate(nbytes)
    report(f"quantize_4bit {tuple(x.shape)} float32", medians(candidates, options.repeats), nbytes)


if __name__ == "__main__":
    main()
