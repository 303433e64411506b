"""matmul_4bit, forward and input gradient: every backend, bitsandbytes in training, dense torch."""

from __future__ import annotations

import torch
from measure import bitsandbytes_is_installed, each_backend, medians, parse_arguments, report

import qlora_ref
from qlora_ref import ops

# Sums of 4096 float32 products in another order; a wrong weight would be off by 0.1.
RELATIVE_ERROR = 1e-4


def main() -> None:
    options = parse_arguments(__doc__ or "")
    weight = torch.randn(options.rows, options.columns)
    tensor = qlora_ref.quantize(weight)
    dense = tensor.dequantize()
    parts = (tensor.packed, tensor.scales, tensor.codebook, tensor.block_size, tensor.shape)
    for transposed in (False, True):
        x = torch.randn(options.tokens, options.rows if transposed else options.columns)
        matrix = dense if transposed else dense.t()
        candidates = each_backend(
            "matmul_4bit",
            lambda: ops.matmul_4bit(x, *parts, transposed=transposed),  # noqa: B023
        )
        candidates["dense torch"] = lambda: x @ matrix  # noqa: B023
        if bitsandbytes_is_installed() and not transposed:
            candidates["bitsandbytes"] = _bitsandbytes(weight, x)
        for name, run in candidates.items():
            error = (run() - x @ matrix).norm() / (x @ matrix).norm()
            assert error < RELATIVE_ERROR, (name, error)
        flops = 2 * options.tokens * weight.numel()
        direction = "input gradient" if transposed else "forward"
        title = f"matmul_4bit {direction}, M = {options.tokens}, W {tuple(weight.shape)} float32"
        report(title, medians(candidates, options.repeats), tensor.nbytes, flops)


def _bitsandbytes(weight: torch.Tensor, x: torch.Tensor):  # type: ignore[no-untyped-def]
    import bitsandbytes as bnb

    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4")
    wants_gradient = x.clone().requires_grad_()
    return lambda: bnb.matmul_4bit(wants_gradient, packed.t(), quant_state=state).detach()


if __name__ == "__main__":
    main()
