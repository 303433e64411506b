"""AdamW with 32-bit and 8-bit state: every backend, bitsandbytes, torch, a copy of as many bytes.

The parameters are a model's: many tensors, stepped together.
"""

from __future__ import annotations

import torch
from measure import (
    COPY,
    PEER,
    bitsandbytes_is_installed,
    copy_candidate,
    each_backend,
    each_thread_count,
    medians,
    parse_arguments,
    report,
)

from qlora_ref import AdamW

TENSORS = 100

# float32 rounding of a few operations, relative to the size of one step; 8-bit moments differ more.
CLOSE = 1e-5
OPTIONS = {"lr": 1e-3, "weight_decay": 0.01}
FUSED = "torch fused"


def parameters(gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    params = [torch.zeros_like(gradient).requires_grad_() for gradient in gradients]
    for param, gradient in zip(params, gradients):
        param.grad = gradient
    return params


def bytes_of_a_step(bits: int, n: int) -> int:
    """Parameters and moments are read and written, gradients read, all float32 but 8-bit codes."""
    return n * (12 + (16 if bits == 32 else 4)) + (0 if bits == 32 else n // 256 * 16)


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
        if bitsandbytes_is_installed():
            import bitsandbytes as bnb

            kind = bnb.optim.AdamW32bit if bits == 32 else bnb.optim.AdamW8bit
            candidates[PEER] = kind(parameters(gradients), **OPTIONS).step
        nbytes = bytes_of_a_step(bits, n)
        candidates[COPY] = copy_candidate(nbytes)
        title = f"adamw_step, {TENSORS} tensors of {n // TENSORS:,}, {bits}-bit state"
        for _ in each_thread_count():
            found = medians(candidates, options.repeats)
            report(title, found, nbytes, peer=FUSED if bits == 32 else PEER)


if __name__ == "__main__":
    main()
