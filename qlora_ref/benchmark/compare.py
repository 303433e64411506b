"""Two measurements beside each other: what is faster, what is slower, what cannot be told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_ref.benchmark.run import Row

FASTER, SLOWER, SAME = "faster", "slower", "same"
LEAST = 0.03  # a smaller change is called none, however narrow the quartiles

# What makes two measurements incomparable in absolute terms when it differs.
_MACHINE = ("processor", "instruction set", "threads", "gpu", "torch")


@dataclass(frozen=True)
class Change:
    """Of one row: its time now divided by its time before, and what that comes to.

    It is called faster or slower only if the quartiles of the two do not overlap and the medians
    are at least 3 % apart.
    """

    ratio: float
    verdict: str

    def __str__(self) -> str:
        return f"{self.ratio:.2f} {self.verdict}"


def compare(now: Sequence[Row], before: Sequence[Row]) -> dict[tuple[str, ...], Change]:
    """The changes of the rows that both have and that were timed in both, by their keys."""
    old = {row.key: row for row in before}
    pairs = ((row, old[row.key]) for row in now if row.key in old)
    return {row.key: _change(row, then) for row, then in pairs if row.seconds and then.seconds}


def differences(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """In what the two machines differ, as lines to read."""
    pairs = ((name, before.get(name), now.get(name)) for name in _MACHINE)
    return [f"{name}: {old} before, {new} now" for name, old, new in pairs if old != new]


def _change(now: Row, before: Row) -> Change:
    assert now.seconds and now.low and now.high and before.seconds and before.low and before.high
    ratio = now.seconds / before.seconds
    if now.high < before.low and ratio < 1 - LEAST:
        return Change(ratio, FASTER)
    if now.low > before.high and ratio > 1 + LEAST:
        return Change(ratio, SLOWER)
    return Change(ratio, SAME)
