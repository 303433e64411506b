"""AdamW with 32-bit and 8-bit state: every backend, bitsandbytes, torch."""

from __future__ import annotations

import torch
from measure import bitsandbytes_is_installed, each_backend, medians, parse_arguments, report

from qlora_ref import AdamW

# float32 rounding of a few operations, relative to the size of one step; 8-bit moments differ more.
CLOSE = 1e-5
OPTIONS = {"lr": 1e-3, "weight_decay": 0.01}


def parameter(gradient: torch.Tensor) -> torch.Tensor:
    x = torch.zeros_like(gradient).requires_grad_()
    x.grad = gradient
    return x


def main() -> None:
    options = parse_arguments(__doc__ or "")
    gradient = torch.randn(options.rows, options.columns // 4)
    expected = parameter(gradient)
    torch.optim.AdamW([expected], **OPTIONS).step()
    for bits in (32, 8):
        ours = parameter(gradient)
        optimizer = AdamW([ours], **OPTIONS, state_bits=bits)
        optimizer.step()
        assert torch.allclose(ours, expected, atol=CLOSE)  # the first step starts from no state
        candidates = each_backend("adamw_step", optimizer.step)
        dense = parameter(gradient)
        fused = torch.optim.AdamW([dense], **OPTIONS, fused=True)
        candidates["torch fused"] = fused.step
        if bitsandbytes_is_installed():
            import bitsandbytes as bnb

            kind = bnb.optim.AdamW32bit if bits == 32 else bnb.optim.AdamW8bit
            candidates["bitsandbytes"] = kind([parameter(gradient)], **OPTIONS).step
        nbytes = gradient.numel() * (12 + (16 if bits == 32 else 4))
        title = f"adamw_step, {gradient.numel():,} parameters, {bits}-bit state"
        report(title, medians(candidates, options.repeats), nbytes)


if __name__ == "__main__":
    main()
