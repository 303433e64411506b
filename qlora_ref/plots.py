"""Pictures for the reports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_ref.files import written_aside


def plot_loss(logs: Sequence[dict[str, Any]], path: Path | str, title: str) -> None:
    """Draw the loss of every step, and its running mean, to a PNG file.

    logs  lines of log.jsonl: dictionaries with "step" and "loss"
    Raises ImportError without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [log["step"] for log in logs]
    losses = [log["loss"] for log in logs]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="0.75", label="each step")
    axes.plot(steps, running_mean(losses), color="C0", label="mean of the last 10")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=120)


def running_mean(values: Sequence[float], window: int = 10) -> list[float]:
    """The mean of each value and up to window - 1 before it."""
    means = []
    for end in range(1, len(values) + 1):
        recent = values[max(0, end - window) : end]
        means.append(sum(recent) / len(recent))
    return means
