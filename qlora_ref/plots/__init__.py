"""Pictures. Each function takes plain data and returns a matplotlib figure; `save` writes it.

    save(plot_roofline(...), "pictures/roofline")    # roofline.svg and roofline.png

codebooks.py draws levels, thresholds and errors, layouts.py where codes lie in memory and in
registers, measurements.py what the studies, benchmarks and runs found. Needs matplotlib.

    python -m qlora_ref.plots docs/pictures    # those that need no measurement
"""

from qlora_ref.plots.canvas import save
from qlora_ref.plots.codebooks import plot_codebooks, plot_errors, plot_thresholds
from qlora_ref.plots.layouts import plot_fragment, plot_nibbles
from qlora_ref.plots.measurements import (
    Kernel,
    plot_layer_errors,
    plot_loss,
    plot_losses,
    plot_memory,
    plot_roofline,
)

__all__ = [
    "Kernel",
    "plot_codebooks",
    "plot_errors",
    "plot_fragment",
    "plot_layer_errors",
    "plot_loss",
    "plot_losses",
    "plot_memory",
    "plot_nibbles",
    "plot_roofline",
    "plot_thresholds",
    "save",
]
