"""Cases of adamw_step: a model's parameters, many tensors that are stepped together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlora_ref.benchmark.candidates import Case, Prepared, backends_here, forced, is_installed
from qlora_ref.optim import AdamW

TENSORS = 100
OPTIONS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01}

# float32 rounding of a few operations, beside a step of lr; 8-bit moments come after the first.
CLOSE = 1e-5


def adamw_step(bits: int, n: int, device: str) -> Case:
    """A step over n parameters in 100 tensors, float32, with moments of 32 or 8 bits."""
    gradients = [torch.randn(n // TENSORS, device=device) for _ in range(TENSORS)]
    expected = parameters(gradients)
    torch.optim.AdamW(expected, **OPTIONS).step()

    def prepared(make: Callable[[list[Tensor]], Any], backend: str | None = None) -> Prepared:
        params = parameters(gradients)
        optimizer = make(params)
        step = optimizer.step if backend is None else forced(backend, optimizer.step)
        return Prepared(step, lambda _: _largest_difference(params, expected), CLOSE)

    def ours(params: list[Tensor]) -> AdamW:
        return AdamW(params, **OPTIONS, state_bits=bits)

    def fused(params: list[Tensor]) -> torch.optim.AdamW:
        return torch.optim.AdamW(params, **OPTIONS, fused=True)

    def bitsandbytes(params: list[Tensor]) -> Any:
        import bitsandbytes as bnb

        kind = bnb.optim.AdamW32bit if bits == 32 else bnb.optim.AdamW8bit
        return kind(params, **OPTIONS)

    peers: dict[str, Callable[[], Prepared]] = {
        "torch fused": partial(prepared, fused)
    }  # of 32 bits beside 8-bit state, too
    if is_installed("bitsandbytes"):
        peers["bitsandbytes"] = partial(prepared, bitsandbytes)
    return Case(
        operation="adamw_step",
        detail=f"{bits}-bit state",
        shape=f"{TENSORS}x{n // TENSORS}",
        dtype="float32",
        nbytes=bytes_of_a_step(bits, n),
        flops=0,
        ours={
            name: partial(prepared, ours, name)
            for name in backends_here("adamw_step", torch.device(device).type)
        },
        peers=peers,
    )


def parameters(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Zeros that have these gradients."""
    params = [torch.zeros_like(gradient).requires_grad_() for gradient in gradients]
    for param, gradient in zip(params, gradients):
        param.grad = gradient
    return params


def bytes_of_a_step(bits: int, n: int) -> int:
    """Parameters and moments are read and written, gradients read, all float32 but 8-bit codes."""
    return n * (12 + (16 if bits == 32 else 4)) + (0 if bits == 32 else n // 256 * 16)


def _largest_difference(params: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(params, expected))
