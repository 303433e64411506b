"""The picture of a measurement: what our products reach, under what the machine allows."""

from __future__ import annotations

from collections.abc import Collection

from qlora_ref.benchmark.report import Measurement
from qlora_ref.benchmark.run import Row
from qlora_ref.plots import Kernel, plot_roofline
from qlora_ref.plots.canvas import Figure

OPERATION = "matmul_4bit"
MOST = 8  # that a roofline tells apart


def check_can_draw(operations: Collection[str]) -> None:
    """Raise before anything is measured: ValueError without a product, ImportError likewise."""
    import matplotlib  # noqa: F401

    if OPERATION not in operations:
        raise ValueError(f"a roofline needs {OPERATION} among --operations, got {operations}")


def roofline(measurement: Measurement) -> Figure:
    """A roofline of `matmul_4bit`, of the preferred backend, at the first shape that was measured.

    The roof is the highest of the memory limits, and of the arithmetic limits of each dtype.
    Raises ValueError if no product of ours was timed, ImportError without matplotlib.
    """
    products = [row for row in _preferred(measurement) if row.operation == OPERATION]
    if not products:
        raise ValueError(f"no {OPERATION} of ours was timed: there is nothing to draw")
    shown = [row for row in products if row.shape == products[0].shape][:MOST]
    peaks: dict[str, float] = {}
    for row in shown:
        peaks[row.dtype] = max(peaks.get(row.dtype, 0.0), row.arithmetic_limit or 0.0)
    first = shown[0]
    return plot_roofline(
        [_kernel(row) for row in shown],
        max(row.memory_limit for row in shown),
        peaks,
        f"{OPERATION} {first.shape}, {_where(first)}",
    )


def _where(row: Row) -> str:
    if row.device != "cpu":
        return f"{row.name} on {row.device}"
    return f"{row.threads} thread{'s' * (row.threads != 1)} of a CPU"


def _preferred(measurement: Measurement) -> list[Row]:
    """The first row of each case, if it is ours and was timed."""
    first = [rows[0] for rows in measurement.by_case()]
    return [row for row in first if row.ours and row.seconds is not None]


def _kernel(row: Row) -> Kernel:
    assert row.seconds is not None
    name = f"{row.dtype}, {row.detail}"
    return Kernel(name, row.flops / row.nbytes, row.flops / row.seconds, row.dtype)
