"""Pictures of codebooks: their levels, where one level gives way to the next, their errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from qlora_ref.codebooks import decision_thresholds
from qlora_ref.optimal_float import block_maxima, normal_density
from qlora_ref.plots.canvas import BLUE, GREY, ORANGE, PALE, PALETTE, Figure, new_figure

POINTS = 401  # of a curve


def normalised_density(z: Tensor, block_size: int) -> Tensor:
    """The density, at z in (-1, 1), of a normal weight divided by the absmax of its block.

        f(z) = (1 - 1/B) E[M phi(M z) / (2 Phi(M) - 1)],    M the largest of B magnitudes

    One weight in B is that largest one; these lie at -1 and 1 and are left out.

    z, returns  float64 (any,)
    """
    m, weight = block_maxima(block_size)
    return (1 - 1 / block_size) * (weight * m * normal_density(m * z)).sum(dim=0)


def shares(thresholds: Tensor, block_size: int) -> Tensor:
    """The share of normal weights below, between and above thresholds in (-1, 1), ascending.

    thresholds  float (n,)
    returns     float64 (n + 1,)
    """
    m, weight = block_maxima(block_size)
    ends = torch.ones(1, dtype=torch.float64)
    edges = torch.cat([-ends, thresholds.double(), ends])
    others = (weight * torch.special.ndtr(m * edges).diff(dim=1)).sum(dim=0)
    largest = torch.zeros_like(others)
    largest[[0, -1]] = 0.5
    return ((block_size - 1) * others + largest) / block_size


def plot_codebooks(codebooks: Mapping[str, Sequence[float]], block_size: int = 64) -> Figure:
    """The levels of some codebooks, in rows, below the density of what they stand for.

    codebooks   name: levels in [-1, 1]
    """
    figure, (above, below) = new_figure(
        8, 2.6 + 0.32 * len(codebooks), rows=2, sharex=True, height_ratios=[5, 1 + len(codebooks)]
    )
    z = torch.linspace(-1, 1, POINTS, dtype=torch.float64)
    density = normalised_density(z, block_size)
    above.fill_between(z, density, color=PALE)
    above.plot(z, density, color=GREY)
    above.set(ylabel="density", ylim=(0, None))
    above.set_title(f"Normal weights divided by the absmax of their block of {block_size}")
    for row, (levels, color) in enumerate(zip(codebooks.values(), PALETTE)):
        below.vlines(levels, row - 0.38, row + 0.38, color=color, lw=2)
    below.set_yticks(range(len(codebooks)), list(codebooks))
    below.set(ylim=(len(codebooks) - 0.4, -0.6), xlim=(-1.03, 1.03), xlabel="level")
    below.spines["left"].set_visible(False)
    below.tick_params(axis="y", length=0)
    return figure


def plot_thresholds(name: str, codebook: Tensor, block_size: int = 64) -> Figure:
    """Which values take which code of a codebook of 16 levels, and how many normal weights do.

    codebook  float32 (16,)
    """
    thresholds, codes = decision_thresholds(codebook)
    edges = [-1.0, *thresholds.tolist(), 1.0]
    figure, axes = new_figure(9, 4)
    z = torch.linspace(-1, 1, POINTS, dtype=torch.float64)
    density = normalised_density(z, block_size)
    top = density.max().item()
    axes.plot(z, density, color=GREY)
    for i, share in enumerate(shares(thresholds, block_size).tolist()):
        low, high = edges[i], edges[i + 1]
        inside = (z >= low) & (z <= high)
        axes.fill_between(z, density, where=inside, color=(BLUE, ORANGE)[i % 2], alpha=0.45, lw=0)
        middle, lift = (low + high) / 2, 0.06 * (i % 2)
        axes.text(middle, top * (1.12 + lift), f"{100 * share:.1f} %", ha="center", fontsize=8)
        level = codebook[int(codes[i])].item()
        axes.plot(level, 0, "v", color="black", ms=5, clip_on=False, zorder=3)
        axes.text(level, -0.1 * top, str(int(codes[i])), ha="center", fontsize=9)
    axes.vlines(thresholds.tolist(), 0, top * 1.08, color=GREY, lw=0.8, ls=":")
    axes.set(xlim=(-1.02, 1.02), ylim=(-0.14 * top, top * 1.25), yticks=[])
    axes.spines["left"].set_visible(False)
    axes.set(xlabel=f"weight / absmax;  triangles: the levels of {name}, with their codes")
    axes.set_title("Dotted: thresholds.  Above: the share of normal weights that takes each code")
    return figure


def plot_errors(errors: Mapping[str, Sequence[float]], unit: str = "") -> Figure:
    """A histogram of errors (restored - original) for each codebook, below one another.

    errors   name: one error for each value
    unit     what they are measured in, for the label
    """
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in errors.items()}
    limit = max(np.quantile(np.abs(values), 0.995) for values in arrays.values())
    bins = np.linspace(-limit, limit, 121)
    height = 0.7 + 1.05 * len(arrays)
    figure, rows = new_figure(8, height, rows=len(arrays), sharex=True, sharey=True)
    rows = rows if len(arrays) > 1 else [rows]
    for axes, (name, values), color in zip(rows, arrays.items(), PALETTE):
        axes.hist(values, bins, color=color, density=True, histtype="stepfilled")
        mse = np.mean(values**2)
        axes.text(0.01, 0.75, name, transform=axes.transAxes, weight="bold")
        axes.text(0.99, 0.75, f"mean square {mse:.3g}", transform=axes.transAxes, ha="right")
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
    rows[-1].set_xlabel(f"restored - original{f' ({unit})' if unit else ''}")
    return figure
