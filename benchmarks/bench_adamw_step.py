"""AdamW with 32-bit and 8-bit state: every backend, bitsandbytes, torch, and a copy.

The parameters are a model's: many tensors, stepped together.
"""

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

from qlora_ref import AdamW
from qlora_ref.benchmark.adamw import CLOSE, OPTIONS, TENSORS, bytes_of_a_step, parameters
from qlora_ref.benchmark.candidates import each_backend, is_installed
from qlora_ref.benchmark.timing import medians

FUSED = "torch fused"


def main() -> None:
    options = parse_arguments(__doc__ or "")
    n = options.rows * options.columns // 4
    gradients = [torch.randn(n // TENSORS) for _ in range(TENSORS)]
    expected = parameters(gradients)
    torch.optim.AdamW(expected, **OPTIONS).step()
    for bits in (32, 8):
        ours = parameters(gradients)
        optimizer = AdamW(ours, **OPTIONS, state_bits=bits)
        optimizer.step()
        for param, wanted in zip(ours, expected):
            assert torch.allclose(param, wanted, atol=CLOSE)  # the first step starts from no state
        candidates = each_backend("adamw_step", optimizer.step)
        candidates[FUSED] = torch.optim.AdamW(parameters(gradients), **OPTIONS, fused=True).step
        if is_installed(PEER):
            import bitsandbytes as bnb

            kind = bnb.optim.AdamW32bit if bits == 32 else bnb.optim.AdamW8bit
            candidates[PEER] = kind(parameters(gradients), **OPTIONS).step
        nbytes = bytes_of_a_step(bits, n)
        candidates[COPY] = memory_candidate(COPY)
        title = f"adamw_step, {TENSORS} tensors of {n // TENSORS:,}, {bits}-bit state"
        for _ in each_thread_count():
            found = medians(candidates, options.repeats)
            report(title, found, nbytes, peer=FUSED if bits == 32 else PEER)


if __name__ == "__main__":
    main()
