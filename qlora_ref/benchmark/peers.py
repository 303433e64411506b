"""Other implementations of y = x W^T with W in 4 bits, and the dense product.

Each is a `Product`: what to run, the weight that it multiplies by, and how far off it may be.
A peer that is not installed is left out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qlora_ref.benchmark.candidates import is_installed
from qlora_ref.benchmark.codecs import torchao_nf4
from qlora_ref.benchmark.cpu_peers import cpu_products
from qlora_ref.benchmark.weights import BLOCK_SIZE, CLOSE, Product, Weights


def products(x: Tensor, weights: Weights) -> dict[str, Callable[[], Product]]:
    """Every peer's x W^T by name, to be made when its turn comes."""
    found: dict[str, Callable[[], Product]] = {
        "torch dense": lambda: _torch_dense(x, weights),
        "dequantise, torch": lambda: _dequantised(x, weights),
    }
    if is_installed("bitsandbytes"):
        found["bnb training"] = lambda: _bitsandbytes_training(x, weights)
        found["bnb evaluation"] = lambda: _bitsandbytes_evaluation(x, weights)
    if is_installed("torchao"):
        found["torchao nf4"] = lambda: _torchao(x, weights)
    if x.device.type == "cpu":
        found |= cpu_products(x, weights)
    return found


def _torch_dense(x: Tensor, weights: Weights) -> Product:
    dense = weights.dense
    run = lambda: nn.functional.linear(x, dense)  # noqa: E731
    return Product(run, weights.exact, CLOSE[x.dtype], dense.nbytes)


def _dequantised(x: Tensor, weights: Weights) -> Product:
    """Our dequantize_4bit, then torch: what a fused product saves is to write and read W."""
    q = weights.quantized
    run = lambda: nn.functional.linear(x, q.dequantize(x.dtype))  # noqa: E731
    return Product(run, weights.exact, CLOSE[x.dtype], q.nbytes + 2 * weights.dense.nbytes)


def _bitsandbytes_training(x: Tensor, weights: Weights) -> Product:
    layer, x = weights.bitsandbytes_training, x.clone().requires_grad_()

    def run() -> Tensor:
        with torch.enable_grad():
            return layer(x).detach()

    return Product(run, weights.exact, CLOSE[x.dtype], weights.quantized.nbytes)


def _bitsandbytes_evaluation(x: Tensor, weights: Weights) -> Product:
    layer = weights.bitsandbytes_evaluation
    # On the CPU it may compute in bfloat16 whatever the dtype.
    tolerance = CLOSE[torch.bfloat16 if x.device.type == "cpu" else x.dtype]
    return Product(lambda: layer(x), weights.exact, tolerance, weights.quantized.nbytes)


def _torchao(x: Tensor, weights: Weights) -> Product:
    """Restores W at each call; its scales are quantised to 8 bits."""
    nf4 = torchao_nf4()
    held = nf4.to_nf4(weights.original, BLOCK_SIZE, 256)
    weight = held.get_original_weight().float()
    run = lambda: nf4.linear_nf4(x, held)  # noqa: E731
    return Product(run, weight, CLOSE[x.dtype], weights.quantized.nbytes)
