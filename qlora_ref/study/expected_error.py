"""The expected error of a codebook on normal weights, exactly: no random number is drawn.

A block is B independent values of N(0, 1); M is its largest magnitude. M has the density

    p(m) = 2 B phi(m) (2 Phi(m) - 1)^(B - 1)

and, given M = m, one value is m or -m, each with probability 1/2, and the others are N(0, 1) cut
off at -m and m. So the expected error of a value is an integral over m alone (Gauss-Legendre) of
an integral over each bin of the codebook, which has a closed form.

phi and Phi are density and distribution function of N(0, 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

NODES = 400  # 1,500 agree with it to 5e-7 of the value
TAIL = 1e-18  # probability that M lies outside of the interval that is integrated over


@dataclass(frozen=True)
class ExpectedError:
    """Expected errors of one value of N(0, 1), quantised in blocks.

    mse             E (x - x')^2, with x' the restored value
    mae             E |x - x'|
    normalised_mae  E |x - x'| / M: the error of the value that the codebook sees
    """

    mse: float
    mae: float
    normalised_mae: float


def expected_error(levels: Tensor, block_size: int, signed: bool = False) -> ExpectedError:
    """The expected error of a codebook on N(0, 1), each value going to the nearest level.

    levels      (any,)  in any order
    block_size  B, at least 2
    signed      scale by the value of largest magnitude with its sign, so that this value becomes
                +1 always (BOF4-S, arXiv 2505.06653), rather than by its magnitude
    """
    levels = levels.double().unique()
    maximum, weight = block_maximum(block_size)
    squared, absolute, inside = _errors_in_bins(levels, maximum)
    ends = torch.tensor([1.0] if signed else [-1.0, 1.0], dtype=torch.float64)
    at_end = (ends[:, None] - levels).abs().min(dim=1).values  # of the largest value itself

    def mean(of_others: Tensor, of_largest: Tensor) -> Tensor:
        """Per value, one of B being the largest; then over m."""
        others = of_others.sum(dim=1) / inside.sum(dim=1)
        return (weight * ((block_size - 1) * others + of_largest) / block_size).sum()

    return ExpectedError(
        mse=mean(squared, at_end.square().mean() * maximum**2).item(),
        mae=mean(absolute, at_end.mean() * maximum).item(),
        normalised_mae=mean(absolute / maximum[:, None], at_end.mean().expand_as(maximum)).item(),
    )


def bin_use(levels: Tensor, block_size: int) -> Tensor:
    """The share of N(0, 1) weights that goes to each level, ascending; float64 (distinct,)."""
    levels = levels.double().unique()
    maximum, weight = block_maximum(block_size)
    inside = _errors_in_bins(levels, maximum)[2]
    others = (weight[:, None] * inside / inside.sum(dim=1, keepdim=True)).sum(dim=0)
    largest = torch.zeros_like(levels)
    for end in (-1.0, 1.0):
        largest[(levels - end).abs().argmin()] += 0.5
    return ((block_size - 1) * others + largest) / block_size


def entropy_bits(shares: Tensor) -> float:
    """-sum p log2 p over the shares that are not 0."""
    used = shares[shares > 0]
    return -(used * used.log2()).sum().item()


def block_maximum(block_size: int, nodes: int = NODES) -> tuple[Tensor, Tensor]:
    """Where to evaluate a function of M, and with which weights to add it up: E f(M).

    returns  float64 (nodes,) values of M; float64 (nodes,) weights, which sum to 1
    """
    lowest = math.sqrt(2) * torch.erfinv(torch.tensor(TAIL ** (1 / block_size)).double()).item()
    highest = -torch.special.ndtri(torch.tensor(TAIL / (2 * block_size)).double()).item()
    points, weights = (torch.from_numpy(part) for part in numpy.polynomial.legendre.leggauss(nodes))
    half = (highest - lowest) / 2
    maximum = lowest + half * (1 + points)
    log_inside = (block_size - 1) * torch.erf(maximum / math.sqrt(2)).log()
    return maximum, half * weights * 2 * block_size * normal_density(maximum) * log_inside.exp()


def normal_density(x: Tensor) -> Tensor:
    """phi(x) = exp(-x^2 / 2) / sqrt(2 pi)."""
    return torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)


def _errors_in_bins(levels: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Integrals over each level's bin, from a to b, for values that are scaled by m: c = m * level.

    returns  integral of (x - c)^2 phi, of |x - c| phi, of phi; each float64 (nodes, levels)
    """
    end = torch.ones(1, dtype=torch.float64)
    edges = torch.cat([-end, (levels[:-1] + levels[1:]) / 2, end])
    x = maximum[:, None] * edges
    c = maximum[:, None] * levels
    density, below = normal_density(x), torch.special.ndtr(x)
    mass = below.diff(dim=1)
    first = -density.diff(dim=1)  # integral of x phi
    second = mass - (x * density).diff(dim=1)  # integral of x^2 phi
    squared = second - 2 * c * first + c.square() * mass
    a, b = slice(None, -1), slice(1, None)
    absolute = c * (2 * torch.special.ndtr(c) - below[:, a] - below[:, b])
    absolute = absolute + 2 * normal_density(c) - density[:, a] - density[:, b]
    return squared, absolute, mass


def least_absolute_levels(block_size: int, rounds: int = 1000) -> Tensor:
    """The 16 levels with -1, 0 and 1 of least E |x - x'| / M on N(0, 1); float64 (16,).

    Lloyd's iteration: a level becomes the median of its bin, bins meet half-way between levels.
    That is what AF4 (Yoshida, arXiv 2306.06965) was to be.
    """
    grid = torch.linspace(-1, 1, 4001, dtype=torch.float64)
    maximum, weight = block_maximum(block_size)
    below = torch.special.ndtr(maximum[:, None] * grid)
    inside = (below - below[:, :1]) / (below[:, -1:] - below[:, :1])
    distribution = (weight[:, None] * inside).sum(dim=0)  # of x / M, but for the largest value
    levels = torch.cat([torch.linspace(-1, 0, 8), torch.linspace(0, 1, 9)[1:]]).double()
    free = torch.tensor([*range(1, 7), *range(8, 15)])
    for _ in range(rounds):
        edges = _interpolate((levels[:-1] + levels[1:]) / 2, grid, distribution)
        medians = _interpolate((edges[:-1] + edges[1:]) / 2, distribution, grid)
        levels[free] = medians[free - 1]
    return levels


def _interpolate(x: Tensor, known_x: Tensor, known_y: Tensor) -> Tensor:
    above = torch.searchsorted(known_x, x).clamp(1, len(known_x) - 1)
    part = (x - known_x[above - 1]) / (known_x[above] - known_x[above - 1])
    return known_y[above - 1] + part * (known_y[above] - known_y[above - 1])
