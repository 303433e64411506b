"""dequantize_4bit: every backend, bitsandbytes, and a copy of as many bytes."""

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

import qlora_ref


def main() -> None:
    options = parse_arguments(__doc__ or "")
    x = torch.randn(options.rows, options.columns)
    tensor = qlora_ref.quantize(x)
    for dtype in (torch.float32, torch.bfloat16):
        expected = tensor.dequantize(dtype)
        candidates = each_backend("dequantize_4bit", lambda: tensor.dequantize(dtype))  # noqa: B023
        for name, run in candidates.items():
            assert torch.equal(run(), expected), name
        if bitsandbytes_is_installed():
            import bitsandbytes.functional as bnb

            packed, state = bnb.quantize_4bit(x.to(dtype), quant_type="nf4")
            candidates["bitsandbytes"] = lambda: bnb.dequantize_4bit(packed, state)  # noqa: B023
        nbytes = tensor.nbytes + x.numel() * dtype.itemsize
        candidates[COPY] = copy_candidate(nbytes)
        title = f"dequantize_4bit {tuple(x.shape)} to {dtype}, a fresh output each time"
        report(title, medians(candidates, options.repeats), nbytes)


if __name__ == "__main__":
    main()
