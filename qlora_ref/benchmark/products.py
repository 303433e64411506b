"""Cases of matmul_4bit: y = x W^T, and the gradient with respect to x, which is x W.

Results are compared with the product in float64. Weights are those of weights.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlora_ref import ops
from qlora_ref.benchmark.candidates import (
    Case,
    Prepared,
    backends_here,
    forced,
    is_installed,
    relative_error,
)
from qlora_ref.benchmark.peers import products
from qlora_ref.benchmark.weights import CLOSE, Product, Weights

FORWARD, GRADIENT = "forward", "input gradient"


def matmul_4bit(weights: Weights, tokens: int, direction: str = FORWARD) -> Case:
    """One product with a weight (N, K): of (tokens, K), or of (tokens, N) for the gradient."""
    rows, columns = weights.shape
    transposed = direction == GRADIENT
    x = torch.randn(tokens, rows if transposed else columns, device=weights.device)
    x = x.to(weights.dtype)
    exact: list[tuple[Tensor, Tensor]] = []  # of a weight: most candidates have the same one

    def prepare(make: Callable[[], Product]) -> Prepared:
        product = make()
        y = next((y for weight, y in exact if weight is product.weight), None)
        if y is None:
            matrix = product.weight.to(x.device).double()
            y = x.double() @ (matrix if transposed else matrix.t())
            exact.append((product.weight, y))
        error = partial(relative_error, exact=y)
        return Prepared(product.run, error, product.tolerance, product.nbytes + activations)

    found = gradients(x, weights) if transposed else products(x, weights)
    backends = backends_here("matmul_4bit", x.device.type)
    activations = x.nbytes + tokens * (columns if transposed else rows) * x.element_size()
    return Case(
        operation="matmul_4bit",
        detail=f"{direction}, {tokens} token{'s' * (tokens != 1)}",
        shape=f"{rows}x{columns}",
        dtype=str(weights.dtype).removeprefix("torch."),
        nbytes=weights.quantized.nbytes + activations,
        flops=2 * tokens * rows * columns,
        ours={
            name: partial(prepare, partial(ours, x, weights, transposed, name)) for name in backends
        },
        peers={name: partial(prepare, make) for name, make in found.items()},
    )


def ours(x: Tensor, weights: Weights, transposed: bool, backend: str | None = None) -> Product:
    """Our product, on one backend or on the preferred one."""
    q = weights.quantized
    parts = (q.packed, q.scales, q.codebook, q.block_size, q.shape)

    def run() -> Any:
        return ops.matmul_4bit(x, *parts, transposed=transposed)

    run = run if backend is None else forced(backend, run)
    return Product(run, weights.exact, CLOSE[x.dtype], q.nbytes)


def gradients(x: Tensor, weights: Weights) -> dict[str, Callable[[], Product]]:
    """Peers of the input gradient."""
    dense = weights.dense
    found: dict[str, Callable[[], Product]] = {
        "torch dense": lambda: Product(
            lambda: x @ dense, weights.exact, CLOSE[x.dtype], dense.nbytes
        )
    }
    if is_installed("bitsandbytes"):
        found["bnb training"] = lambda: _bitsandbytes_gradient(x, weights)
    return found


def _bitsandbytes_gradient(gradient: Tensor, weights: Weights) -> Product:
    """The backward pass alone of its layer in training."""
    layer = weights.bitsandbytes_training
    x = torch.zeros(len(gradient), weights.shape[1]).to(gradient).requires_grad_()
    with torch.enable_grad():
        y = layer(x)
    return Product(
        lambda: torch.autograd.grad(y, x, gradient, retain_graph=True)[0],
        weights.exact,
        CLOSE[gradient.dtype],
        weights.quantized.nbytes,
    )
