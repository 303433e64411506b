"""A measurement, and how it is read: JSON and CSV for programs, markdown and tables for people."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich.table import Table

from qlora_ref.benchmark.compare import Change
from qlora_ref.benchmark.run import PASSED, Row

SCHEMA = 1
Changes = dict[tuple[str, ...], Change]  # by Row.key
HEADINGS = ("", "ms", "GB/s, share", "GFLOP/s, share", "/ ours")


@dataclass(frozen=True)
class Measurement:
    """Rows, and the machine and versions that they hold for."""

    machine: dict[str, Any]
    rows: list[Row]

    def render(self, kind: str, changes: Changes | None = None) -> str:
        """As "json", "csv" or "markdown"; only the last one says what changed."""
        return {
            "json": self.to_json,
            "csv": self.to_csv,
            "markdown": lambda: self.to_markdown(changes),
        }[kind]()

    def to_json(self) -> str:
        """Everything; `read_measurement` reads it back."""
        rows = [row.as_dict() for row in self.rows]
        found = {"schema": SCHEMA, "machine": self.machine, "rows": rows}
        return json.dumps(found, indent=1) + "\n"

    def to_csv(self) -> str:
        """A line for each row, without the machine."""
        text = io.StringIO()
        writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.as_dict() for row in self.rows)
        return text.getvalue()

    def to_markdown(self, changes: Changes | None = None) -> str:
        """A list of the machine's facts, and a table for each case."""
        lines = [f"- {name}: {value}" for name, value in self.machine.items()]
        for rows in self.by_case():
            headings = _headings(changes)
            lines += ["", f"### {title(rows[0])}", "", _line(headings)]
            lines.append(_line(["---"] + ["---:"] * (len(headings) - 1)))
            lines += [_line(cells(row, rows, changes)) for row in rows]
        return "\n".join(lines) + "\n"

    def by_case(self) -> Iterator[list[Row]]:
        """The rows of each case."""
        found: dict[Any, list[Row]] = {}
        for row in self.rows:
            found.setdefault((row.case, row.device, row.threads), []).append(row)
        yield from found.values()


def read_measurement(path: Path | str) -> Measurement:
    """Read what `to_json` wrote. Raises ValueError for what is not such a file."""
    try:
        found = json.loads(Path(path).read_text())
        if found["schema"] != SCHEMA:
            raise ValueError(f"its schema is {found['schema']}, not {SCHEMA}")
        return Measurement(found["machine"], [Row(**row) for row in found["rows"]])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is no measurement that `qlora-ref bench --json` wrote: {error}"
        ) from error


def case_table(rows: list[Row], changes: Changes | None = None) -> Table:
    """One case, for a terminal."""
    table = Table(title=title(rows[0]), title_justify="left", title_style="bold")
    for heading in _headings(changes):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=not heading)
    for row in rows:
        style = None if row.status == PASSED else "red"
        table.add_row(*cells(row, rows, changes), style=style)
    return table


def title(row: Row) -> str:
    """What the rows of a case have in common, and the limits beside them."""
    limits = f"memory {row.memory_limit / 1e9:.3g} GB/s"
    if row.arithmetic_limit is not None:
        limits += f", arithmetic {row.arithmetic_limit / 1e9:.4g} GFLOP/s"
    name = " ".join(part for part in row.case if part)
    where = f"{row.device}, {row.threads} thread{'s' * (row.threads != 1)}"
    return f"{name} ({where}; {limits})"


def cells(row: Row, rows: list[Row], changes: Changes | None = None) -> list[str]:
    """A row under the headings; the first row of a case is ours, the preferred backend."""
    if row.seconds is None or row.low is None or row.high is None:
        found = [row.name, f"{row.status}: {row.why}"] + [""] * (len(HEADINGS) - 2)
    else:
        spread = (row.high - row.low) / 2 / row.seconds
        ours = rows[0].seconds
        found = [
            row.name,
            f"{row.seconds * 1e3:.4g} ± {spread:.0%}",
            _rate(row.nbytes / row.seconds, row.memory_limit),
            _rate(row.flops / row.seconds, row.arithmetic_limit),
            f"{row.seconds / ours:.2f}" if ours else "",
        ]
    return found if changes is None else [*found, str(changes.get(row.key, ""))]


def _rate(rate: float, limit: float | None) -> str:
    return "" if limit is None else f"{rate / 1e9:.3g} {rate / limit:4.0%}"


def _headings(changes: object) -> list[str]:
    return [*HEADINGS] if changes is None else [*HEADINGS, "now / before"]


def _line(values: list[str]) -> str:
    return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"
