"""Pictures of layouts: codes in bytes, and bytes in the registers of a tensor-core product."""

from __future__ import annotations

from qlora_ref.plots.canvas import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PALE,
    PURPLE,
    SKY,
    Axes,
    Figure,
    cell,
    new_figure,
    without_frame,
)

THREADS = (BLUE, ORANGE, GREEN, PURPLE)  # of the four that share a row
STEP = 64  # inputs that a warp decodes at a time


def plot_nibbles(
    values: list[float], codes: list[int], absmax: float, block_size: int = 64
) -> Figure:
    """How the first values of a block lie in bytes: the even code in the upper four bits.

    values, codes   of the first few weights of a block, an even number
    absmax          of the block
    """
    figure, axes = new_figure(9.2, 3.5)
    without_frame(axes, len(values) + 2.6, 5.1)
    rows = {0.5: "weight", 2.0: f"code, of weight / {absmax:.2f}", 3.5: "byte"}
    for y, label in rows.items():
        axes.text(2.3, y + 0.4, label, ha="right", va="center", fontsize=9)
    for i, (value, code) in enumerate(zip(values, codes)):
        x, color = 2.5 + i, (BLUE, SKY)[i % 2]
        cell(axes, x, 0.5, f"{value:+.2f}", PALE, height=0.8)
        cell(axes, x, 2.0, f"{code}\n{code:04b}", color, height=0.8)
        axes.text(x + 0.5, 0.3, f"$w_{{{i}}}$", ha="center", fontsize=9)
        axes.annotate("", (x + 0.5, 1.95), (x + 0.5, 1.35), arrowprops={"arrowstyle": "->"})
    for byte in range(len(codes) // 2):
        high, low = codes[2 * byte], codes[2 * byte + 1]
        x = 2.5 + 2 * byte
        cell(axes, x, 3.5, f"{high:04b}", BLUE, height=0.8)
        cell(axes, x + 1, 3.5, f"{low:04b}", SKY, height=0.8)
        axes.text(x + 1, 4.6, f"byte {byte}: 0x{high:X}{low:X}", ha="center", fontsize=9)
        axes.annotate("", (x + 1, 3.45), (x + 1, 2.85), arrowprops={"arrowstyle": "->"})
    axes.set_title(
        f"The first {len(values)} of a block of {block_size}: absmax is kept beside the bytes",
        fontsize=10,
    )
    return figure


def plot_fragment() -> Figure:
    """Which thread holds what of a tensor-core operand, and which bytes of a weight's row it is.

    The operand is A of mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"); the bytes are
    those of one row of the weight, in a step of 64 inputs (csrc/cuda/weight_tiles.cuh).
    """
    figure, (operand, row) = new_figure(9.2, 7.6, rows=2, height_ratios=[18.2, 6.4])
    without_frame(operand, 33, 18.2)
    without_frame(row, 33, 6.4)
    _draw_operand(operand)
    _draw_row(row)
    return figure


def _draw_operand(axes: Axes) -> None:
    axes.text(17, 0.3, "A, 16 x 16: columns are inputs, rows are outputs", ha="center", fontsize=10)
    for pair in range(8):
        label = f"{2 * pair}, {2 * pair + 1}"
        axes.text(3 + 3.5 * pair + 1.7, 1.5, label, ha="center", va="center", fontsize=8)
    for output in range(16):
        axes.text(2.7, 2.5 + output, str(output), ha="right", va="center", fontsize=8)
        for pair in range(8):
            g, t = output % 8, pair % 4
            register = output // 8 + 2 * (pair // 4)
            text = f"thread {4 * g + t}  a[{register}]"
            color = THREADS[t]
            cell(axes, 3 + 3.5 * pair, 2 + output, text, color, width=3.4, fontsize=7)


def _draw_row(axes: Axes) -> None:
    axes.text(
        17,
        0.3,
        f"Output g's row of W in memory: a step of {STEP} inputs, 32 bytes",
        ha="center",
        fontsize=10,
    )
    width = 28 / 32
    for byte in range(STEP // 2):
        t, own = byte // 8, byte % 8
        x = 3 + width * byte
        cell(axes, x, 2, f"{byte}", THREADS[t], width=width, fontsize=6.5)
        product, register = own // 2 + 1, 2 * (own % 2)
        cell(axes, x, 3.1, f"a[{register}]", PALE, width=width, height=0.9, fontsize=6)
        if own % 2 == 0:
            cell(axes, x, 4.1, f"{product}.", PALE, width=2 * width, height=0.9, fontsize=6.5)
    for t in range(4):
        x = 3 + 8 * width * (t + 0.5)
        axes.text(x, 1.5, f"thread 4 g + {t}", ha="center", va="center", fontsize=8)
    for y, label in ((2.5, "byte"), (3.55, "register"), (4.55, "product")):
        axes.text(2.7, y, label, ha="right", va="center", fontsize=8)
    axes.text(
        17,
        5.8,
        "One load of 8 bytes gives a thread its weights for four products. "
        "x is read in the same order, so no sum changes.",
        ha="center",
        fontsize=8.5,
        color=GREY,
    )
