"""Shows docstrings as they are written: paragraphs as text, tables and formulas as they stand.

The docstrings of this project list arguments in columns, `name  dtype (shape)  meaning`. Markdown
would run them together, so each paragraph that has columns or an indented line becomes a block.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

COLUMNS = re.compile(r"\S {2,}\S")


class Columns(griffe.Extension):
    """Fences paragraphs with columns in every docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(docstring: str) -> str:
    return "\n\n".join(fenced(part) for part in re.split(r"\n\s*\n", docstring))


def fenced(paragraph: str) -> str:
    lines = paragraph.splitlines()
    is_plain = not any(COLUMNS.search(line) or line.startswith("  ") for line in lines)
    if is_plain or paragraph.lstrip().startswith(("* ", "- ", "```")):
        return paragraph
    return "```text\n" + paragraph.strip("\n") + "\n```"
