"""What a part of the study found, as markdown and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Cell = str | int | float | None

# Beyond so many standard errors a sign is called settled: by chance alone 1 in 370.
SETTLED = 3.0


@dataclass(frozen=True)
class Table:
    """columns: name to format specification ("" for text); rows: a value a column, None if none."""

    title: str
    columns: Mapping[str, str]
    rows: Sequence[Sequence[Cell]]

    def markdown(self) -> str:
        """A heading line and a pipe table."""
        specs = list(self.columns.values())
        aligned = ["---:" if spec else "---" for spec in specs]
        lines = [_row(list(self.columns)), _row(aligned)]
        lines += [_row([_text(cell, spec) for cell, spec in zip(row, specs)]) for row in self.rows]
        return f"**{self.title}**\n\n" + "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The title, and a dictionary a row."""
        return {"title": self.title, "rows": [dict(zip(self.columns, row)) for row in self.rows]}


@dataclass(frozen=True)
class Claim:
    """A statement of the paper or of articles, and what was found here.

    verdict  "holds", "does not hold" or "not settled"
    t        the finding in its standard errors; None where nothing is random
    """

    statement: str
    source: str
    found: str
    verdict: str
    t: float | None = None


@dataclass
class Part:
    """One part: paragraphs and tables in reading order, claims, and data for pictures."""

    number: int
    title: str
    content: list[str | Table] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """The part as a section of the page."""
        blocks = [f"## {self.number}. {self.title}"]
        blocks += [item if isinstance(item, str) else item.markdown() for item in self.content]
        blocks += [f"*Not run here: {reason}*" for reason in self.skipped]
        if self.claims:
            blocks.append(claims_table(self.claims).markdown())
        return "\n\n".join(blocks)

    def as_dict(self) -> dict[str, Any]:
        """The part as JSON: tables with unrounded figures."""
        tables = [item.as_dict() for item in self.content if isinstance(item, Table)]
        claims = [asdict(claim) for claim in self.claims]
        return {
            "number": self.number,
            "title": self.title,
            "tables": tables,
            "claims": claims,
            "data": self.data,
            "skipped": self.skipped,
        }


def claims_table(claims: Sequence[Claim]) -> Table:
    """What is claimed, what was found, and how strongly."""
    columns = {"claim": "", "source": "", "found here": "", "t": ".1f", "verdict": ""}
    rows = [(c.statement, c.source, c.found, c.t, f"**{c.verdict}**") for c in claims]
    return Table("Claims", columns, rows)


def verdict(t: float) -> str:
    """Of a difference that a claim says is positive, in its standard errors."""
    if abs(t) <= SETTLED:
        return "not settled"
    return "holds" if t > 0 else "does not hold"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _text(cell: Cell, spec: str) -> str:
    if cell is None:
        return ""
    text = format(cell, spec) if spec and not isinstance(cell, str) else str(cell)
    return text.replace("|", "\\|")
