"""Pictures of what the study found: errors by block size, and loss by error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qlora_ref.plots.canvas import GREY, PALETTE, Figure, new_figure


def plot_block_sizes(
    errors: Mapping[str, Sequence[float]], block_sizes: Sequence[int], label: str
) -> Figure:
    """The error of codebooks against the block size, both in powers.

    errors  codebook: an error for each block size
    label   what is measured
    """
    figure, axes = new_figure(7, 4.5)
    for (name, values), color in zip(errors.items(), PALETTE):
        axes.plot(block_sizes, values, color=color, marker="o", ms=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(block_sizes, [str(size) for size in block_sizes])
    axes.set(xlabel="values in a block", ylabel=label)
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    return figure


def plot_loss_rises(rises: Mapping[str, Mapping[str, float]]) -> Figure:
    """What rounding costs in loss, against the relative error of the weights; with standard errors.

    rises  rounding: {"relative_error", "mean", "error"}
    """
    figure, axes = new_figure(7, 5)
    shown = {name: rise for name, rise in rises.items() if rise["mean"] > 0}
    for name, rise in shown.items():
        at = (rise["relative_error"], rise["mean"])
        axes.errorbar(*at, yerr=rise["error"], fmt="o", ms=4, color=PALETTE[0], lw=1)
        axes.annotate(name, at, xytext=(5, -3), textcoords="offset points", fontsize=7)
    ends = [pick(rise["relative_error"] for rise in shown.values()) for pick in (min, max)]
    axes.plot(ends, [1.4 * end for end in ends], color=GREY, lw=0.8, ls="--")
    axes.set(xscale="log", yscale="log")
    axes.set(xlabel="squared error / squared weights", ylabel="loss rise (nats per token)")
    axes.set_title("Dashed: 1.4 times the relative error", fontsize=10)
    axes.grid(alpha=0.3)
    return figure
