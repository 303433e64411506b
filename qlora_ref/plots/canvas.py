"""What all pictures share: sizes, colours, and files with the same bytes each time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_ref.files import written_aside

# Okabe and Ito's colours, which people of any colour vision tell apart.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK, YELLOW = "#CC79A7", "#56B4E9", "#000000", "#F0E442"
PALETTE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK, YELLOW)
GREY, PALE = "#666666", "#E8E8E8"

Figure = Any  # of matplotlib, which is imported when a picture is drawn
Axes = Any


def new_figure(width: float, height: float, rows: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of that size in inches, and its axes: one, or a list of `rows`, one above another.

    Raises ImportError without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, 1, squeeze=False, **options).flat)
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes if rows > 1 else axes[0]


def without_frame(axes: Axes, width: float, height: float) -> None:
    """Axes to draw on as on paper: a unit is a cell, y goes down, no ticks and no frame."""
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
    axes.axis("off")


def cell(
    axes: Axes, x: float, y: float, text: str = "", color: str = "white", **options: Any
) -> None:
    """A labelled rectangle of 1 x 1, or of width=, height=, with its upper left corner at x, y."""
    from matplotlib.patches import Rectangle

    width, height = options.pop("width", 1), options.pop("height", 1)
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="white", lw=1.5))
    options = {"ha": "center", "va": "center", "fontsize": 8, "color": ink_on(color), **options}
    axes.text(x + width / 2, y + height / 2, text, **options)


def ink_on(color: str) -> str:
    """Black or white, whichever is read more easily on a colour."""
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(color)
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def save(figure: Figure, path: Path | str, formats: Sequence[str] = ("svg", "png")) -> None:
    """Write path.svg and path.png, or other formats; the same figure gives the same bytes."""
    from matplotlib import rc_context

    for kind in formats:
        metadata = {"svg": {"Date": None}, "png": {"Software": None}}.get(kind)
        with (
            rc_context({"svg.hashsalt": "qlora_ref"}),
            written_aside(Path(path).with_suffix(f".{kind}")) as aside,
        ):
            figure.savefig(aside, format=kind, dpi=150, metadata=metadata)
