"""Pictures of what was measured: losses, errors of layers, memory, speed under its roof."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_ref.plots.canvas import (
    BLACK,
    PALE,
    PALETTE,
    Figure,
    ink_on,
    new_figure,
    save,
)

MARKERS = "osD^vP*X"


def plot_loss(logs: Sequence[dict[str, Any]], path: Path | str, title: str) -> None:
    """Draw the loss of every step of a run, and its running mean, to a PNG file.

    logs  lines of log.jsonl: dictionaries with "step" and "loss"
    """
    save(plot_losses({title: [(log["step"], log["loss"]) for log in logs]}), path, ["png"])


def plot_losses(runs: Mapping[str, Sequence[tuple[int, float]]], window: int = 10) -> Figure:
    """The loss of every step, pale, and its running mean, of one or several runs.

    runs    name: (step, loss) for each step, in nats per token
    window  steps that the mean is over
    """
    figure, axes = new_figure(7, 4)
    for (name, points), color in zip(runs.items(), PALETTE):
        steps, losses = zip(*points)
        axes.plot(steps, losses, color=color, alpha=0.3, lw=1)
        axes.plot(steps, running_mean(losses, window), color=color, label=name)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.set_title(f"Each step, and the mean of the last {window}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def running_mean(values: Sequence[float], window: int = 10) -> list[float]:
    """The mean of each value and up to window - 1 before it."""
    means = []
    for end in range(1, len(values) + 1):
        recent = values[max(0, end - window) : end]
        means.append(sum(recent) / len(recent))
    return means


def plot_layer_errors(
    errors: Mapping[str, Sequence[float]], label: str = "mean square error / mean square"
) -> Figure:
    """A heat map: a column for each layer of the model, a row for each kind of weight.

    errors  kind, such as "q_proj": its error in layer 0, 1, ...; NaN where a layer has none
    label   what is measured
    """
    kinds, depth = list(errors), max(len(values) for values in errors.values())
    table = [[*values, *[math.nan] * (depth - len(values))] for values in errors.values()]
    figure, axes = new_figure(min(9, 2.5 + 0.42 * depth), 1.4 + 0.38 * len(kinds))
    image = axes.imshow(table, cmap="cividis", aspect="auto")
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xticks(range(0, depth, max(1, depth // 12)))
    axes.set_xlabel("layer")
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label=label)
    return figure


def plot_memory(bars: Mapping[str, Mapping[str, float]]) -> Figure:
    """A bar for each configuration, stacked of what its memory holds.

    bars  configuration: {part: bytes}; a part has one colour in all bars
    """
    parts = list(dict.fromkeys(part for bar in bars.values() for part in bar))
    largest = max(sum(bar.values()) for bar in bars.values())
    unit, name = next(
        u for u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")) if largest > u[0]
    )
    figure, axes = new_figure(8, 1.5 + 0.5 * len(bars))
    ends = [0.0] * len(bars)
    for part, color in zip(parts, PALETTE):
        widths = [bar.get(part, 0) / unit for bar in bars.values()]
        axes.barh(range(len(bars)), widths, left=ends, height=0.65, color=color, label=part)
        for row, (width, start) in enumerate(zip(widths, ends)):
            if width * unit > 0.06 * largest:
                text = {"ha": "center", "va": "center", "fontsize": 8, "color": ink_on(color)}
                axes.text(start + width / 2, row, f"{width:.3g}", **text)
        ends = [end + width for end, width in zip(ends, widths)]
    for row, end in enumerate(ends):
        axes.text(end, row, f"  {end:.3g} {name}", va="center", fontsize=9, weight="bold")
    axes.set_yticks(range(len(bars)), list(bars))
    axes.set(ylim=(len(bars) - 0.5, -0.5), xlim=(0, 1.14 * largest / unit), xlabel=name)
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.45, 1.0), fontsize=9)
    return figure


@dataclass(frozen=True)
class Kernel:
    """A measured kernel, for a roofline.

    name       str
    intensity  float  operations for each byte that it must move
    speed      float  operations a second, measured
    peak       str    which of the peaks is its roof; "": the highest
    """

    name: str
    intensity: float
    speed: float
    peak: str = ""


def plot_roofline(
    kernels: Sequence[Kernel], bandwidth: float, peaks: Mapping[str, float], title: str = ""
) -> Figure:
    """What kernels reach, under what the machine allows: min(peak, bandwidth * intensity).

    kernels    eight are told apart; the legend has their speeds, and shares of their roofs
    bandwidth  bytes a second, measured (a copy, or a read)
    peaks      dtype or unit: operations a second, measured or by the data sheet
    """
    figure, axes = new_figure(8, 5)
    low = min(kernel.intensity for kernel in kernels) / 8
    roof = max(peaks.values())
    high = 4.0 * max([*(kernel.intensity for kernel in kernels), roof / bandwidth])
    axes.plot([low, roof / bandwidth], [low * bandwidth, roof], color=BLACK, lw=1.5)
    text = f"  memory: {bandwidth / 1e9:.3g} GB/s"
    axes.text(1.3 * low, 1.2 * low * bandwidth, text, va="top", fontsize=9)
    for peak in sorted(set(peaks.values())):
        names = ", ".join(name for name in peaks if peaks[name] == peak)
        axes.plot([peak / bandwidth, high], [peak, peak], color=BLACK, lw=1.5)
        text = f"{names}: {_speed(peak)}"
        axes.text(high, peak * 1.06, text, ha="right", va="bottom", fontsize=9)
    for i, kernel in enumerate(kernels):
        ceiling = min(peaks.get(kernel.peak, roof), bandwidth * kernel.intensity)
        axes.vlines(kernel.intensity, kernel.speed, ceiling, color=PALE, lw=1.2, zorder=0)
        label = f"{kernel.name}: {_speed(kernel.speed)}, {kernel.speed / ceiling:.0%}"
        style = {"color": PALETTE[i % 8], "marker": MARKERS[i % 8], "ls": "none"}
        axes.plot(kernel.intensity, kernel.speed, label=label, ms=8, **style)
    axes.set(xscale="log", yscale="log", xlim=(low, high), title=title)
    axes.set(xlabel="operations for each byte moved", ylabel="operations a second")
    axes.grid(alpha=0.25, which="major")
    axes.legend(frameon=False, fontsize=8.5, loc="lower right")
    return figure


def _speed(operations: float) -> str:
    unit, name = (1e12, "T") if operations >= 1e12 else (1e9, "G")
    return f"{operations / unit:.3g} {name}FLOP/s"
