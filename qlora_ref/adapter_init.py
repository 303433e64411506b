"""Where an adapter starts: not at zero, but at what quantising took from the weight.

    W = Q + s B A + (what is left)       Q in 4 bits, B A of rank r

LoftQ starts with Q = quantised W and lets B A be what fits W - Q best; PiSSA starts with B A = the
largest singular directions of W, so that they are trained, and quantises the rest. Both then go on
in turn: a new Q for the rest, a new B A for what that leaves. Read next: lora.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qlora_ref.linear import Linear4bit, dense_parameters, is_conv1d
from qlora_ref.quantized import QuantizedTensor
from qlora_ref.settings import INITS

# The random subspace is wider than the rank, and is turned towards the largest singular directions
# so often: on noise, the hardest case, it then holds 99 % of what r exact ones would.
_TURNS = 8


def dense_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights (N, K) of a model's linear layers by name, to be kept beside `convert_model`.

    They are views: what they need in memory is what the dense model does.
    """
    layers = {name: m for name, m in model.named_modules() if type(m) is nn.Linear or is_conv1d(m)}
    return {name: dense_parameters(layer)[0].detach() for name, layer in layers.items()}


def loftq(
    weight: Tensor,
    quantized: QuantizedTensor,
    requantize: Callable[[Tensor], QuantizedTensor],
    r: int,
    iterations: int,
) -> tuple[QuantizedTensor, Tensor, Tensor]:
    """Q, A (r, K), B (N, r) with a small W - Q - B A:  B A = svd_r(W - Q), Q = quantised(W - B A).

    The nearest of all iterations is returned.

    weight      float (N, K)
    quantized   the first Q, quantised W; with one iteration it stays
    requantize  what turns a float32 (N, K) into a Q
    Source: Li et al., LoftQ (arXiv 2310.08659), section 3, algorithm 1.
    """
    weight = weight.float()
    tried = []
    for _ in range(iterations):
        rest = weight - quantized.dequantize(torch.float32)
        a, b = low_rank(rest, r)
        tried.append(((rest - b @ a).square().sum().item(), quantized, a, b))
        if len(tried) < iterations:
            quantized = requantize(weight - b @ a)
    # A coarse codebook may take a step back: the blocks of the rest have other scales.
    return min(tried, key=lambda found: found[0])[1:]


def pissa(
    weight: Tensor,
    requantize: Callable[[Tensor], QuantizedTensor],
    r: int,
    iterations: int,
) -> tuple[QuantizedTensor, Tensor, Tensor]:
    """Q, A (r, K), B (N, r) with B A = svd_r(W), Q = quantised(W - B A), and then as `loftq`.

    With one iteration B A are the r largest singular directions of W, untouched.
    Source: Meng et al., PiSSA (arXiv 2404.02948), section 3, equations 2 to 4; in 4 bits section 4,
    equation 8 (QPiSSA), and appendix E, algorithm 1 (in several iterations).
    """
    weight = weight.float()
    a, b = low_rank(weight, r)
    quantized = requantize(weight - b @ a)
    if iterations == 1:
        return quantized, a, b
    return loftq(weight, quantized, requantize, r, iterations - 1)


def low_rank(matrix: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A (r, K) and B (N, r) with B A = U S V^T, the largest r singular values of a matrix (N, K).

    Each gets the root of the singular values. Found by turning a random subspace of 2 r + 16
    dimensions (Halko et al., arXiv 0909.4061, algorithm 4.4), the same one every time; exact where
    that is the whole space.
    """
    rows, columns = matrix.shape
    if not 1 <= r <= min(rows, columns):
        raise ValueError(f"r must be from 1 to {min(rows, columns)} for {rows} x {columns}: {r}")
    generator = torch.Generator("cpu").manual_seed(0)
    width = min(2 * r + 16, rows, columns)
    start = torch.randn(columns, width, generator=generator, device="cpu").to(matrix)
    basis = torch.linalg.qr(matrix @ start)[0]
    for _ in range(_TURNS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ basis)[0])[0]
    u, s, vt = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
    root = s[:r].sqrt()
    return root[:, None] * vt[:r], (basis @ u[:, :r]) * root


def check_init(
    init: str, iterations: int, bases: dict[str, nn.Module], originals: dict[str, Tensor] | None
) -> None:
    """Raises ValueError unless every base is in 4 bits and its dense weight is at hand."""
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
    if iterations < 1:
        raise ValueError(f"init_iterations must be at least 1, got {iterations}")
    if init == "zero":
        return
    for name, base in bases.items():
        if not isinstance(base, Linear4bit):
            raise ValueError(f"init={init!r} is for layers in 4 bits: {name} is not; convert it")
        if originals is None or name not in originals:
            raise ValueError(
                f"init={init!r} needs the dense weight of {name}: pass originals="
                "dense_weights(model), taken before convert_model"
            )
        if originals[name].shape != base.weight_shape:
            shapes = tuple(base.weight_shape), tuple(originals[name].shape)
            raise ValueError(f"originals[{name!r}] must have shape {shapes[0]}, got {shapes[1]}")
