"""Turns ```math blocks into MathML, which browsers draw themselves: no script, no fonts."""

from __future__ import annotations

from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    options = config.mdx_configs.setdefault("pymdownx.superfences", {})
    options["custom_fences"] = [{"name": "math", "class": "formula", "format": formula}]
    return config


def formula(source: str, *_: Any, **__: Any) -> str:
    """One formula a line; an empty line is a space between."""
    lines = [convert(line, display="block") for line in source.splitlines() if line.strip()]
    return f'<div class="formula">{"".join(lines)}</div>'
