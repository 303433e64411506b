"""Levels with the least mean square error on normal weights: the block-wise optimal float (BOF).

NF4's levels are quantiles. These are where Lloyd's iteration ends: each level is the centroid of
the weights that are nearest to it, weighed as they were before the division by the largest
magnitude of their block. The integrals are exact but for rounding; nothing is sampled.

Source: Blumenberg, Graave, Fingscheidt, Improving Block-Wise LLM Quantization by 4-bit Block-Wise
Optimal Float (arXiv 2505.06653), sections 3.1 and 3.2. Read next: codebooks.py.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

# 128 nodes give the levels of 800 to 1e-10 for every block size.
_NODES = 128
# How improbable a block maximum beyond the nodes is, on either side.
_NEGLIGIBLE = 1e-20
# The iteration gains a digit in about 50 rounds. When no level moves by more than this, the levels
# are right to 3e-10, far below a float32's last place.
_CONVERGED = 1e-11


@lru_cache(maxsize=64)
def optimal_levels(bits: int, block_size: int, signed: bool) -> tuple[float, ...]:
    """The 2^bits levels with the least mean square error on N(0, 1) weights in blocks.

    bits        int, at least 2
    block_size  int, at least 2
    signed      False: a block is divided by its largest magnitude; -1, 0 and 1 are levels
                True:  by the value that has it, sign and all, so that 1 is taken in every block and
                       -1 in none; 0 and 1 are levels
    returns     2^bits floats, ascending

    With w = m x in a block whose largest magnitude is M = m, the level c of the x from a to b
    minimises E[M^2 (x - c)^2; a < x < b]: c = E[M^2 x; a < x < b] / E[M^2; a < x < b], the paper's
    equation 5. The bounds a and b lie half-way to the neighbouring levels. Of a block's values the
    largest costs nothing; the others are N(0, 1) cut to [-m, m].
    """
    m, weight = block_maxima(block_size)
    half = 2 ** (bits - 1)
    steps = torch.arange(1, half + 1, dtype=torch.float64, device=m.device) / half
    negative = steps if not signed else steps - 1 / (2 * half)
    levels = torch.cat([-negative[-half + 1 :].flip(0), steps.new_zeros(1), steps])
    ends = [half - 1, 2 * half - 1] if signed else [0, half - 1, 2 * half - 1]
    fixed = torch.tensor(ends, device=m.device)
    moved = math.inf
    while moved > _CONVERGED:
        bounds = torch.cat([-steps[-1:], (levels[1:] + levels[:-1]) / 2, steps[-1:]]) * m
        first = (weight * m * -normal_density(bounds).diff(dim=1)).sum(dim=0)
        mass = (weight * m**2 * torch.special.ndtr(bounds).diff(dim=1)).sum(dim=0)
        centroids = (first / mass).index_copy(0, fixed, levels[fixed])
        moved = (centroids - levels).abs().max().item()
        levels = centroids
    return tuple(levels.tolist())


def block_maxima(block_size: int) -> tuple[Tensor, Tensor]:
    """Quadrature over the largest magnitude M of a block: nodes and weights, float64 (nodes, 1).

    P(M < m) = p^B with p = P(|w| < m) = erf(m / sqrt 2). The weights hold the density of M and,
    for the cut normal distribution given M, the factor 1 / p.
    """
    outside = (-math.expm1(math.log(_NEGLIGIBLE) / block_size), _NEGLIGIBLE / block_size)
    # P(w > m) at the first and the last node; on the CPU, whatever the default device is.
    tails = torch.tensor(outside, dtype=torch.float64, device="cpu") / 2
    low, high = (-torch.special.ndtri(tails)).log()
    # A trapezoidal rule in log m: the density and all its derivatives vanish at both ends, so its
    # error falls exponentially with the number of nodes.
    fractions = torch.linspace(0, 1, _NODES, dtype=torch.float64, device="cpu").unsqueeze(1)
    m = (low + (high - low) * fractions).exp()
    power = ((block_size - 2) * torch.log1p(-torch.special.erfc(m / math.sqrt(2)))).exp()
    density = block_size * power * 2 * normal_density(m)  # of M, divided by p
    return m, density * m * (high - low) / (_NODES - 1)


def normal_density(x: Tensor) -> Tensor:
    """phi(x) = exp(-x^2 / 2) / sqrt(2 pi)."""
    return (-(x**2) / 2).exp() / math.sqrt(2 * math.pi)
