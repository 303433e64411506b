"""The pages of docs/ lead to what exists; `make docs` builds them and runs the notebooks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *ROOT.glob("*/README.md"), *(ROOT / "docs").rglob("*.md")]
EXECUTED = ROOT / "docs" / "notebooks"  # pages that `make docs` writes


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_leads_to_a_file(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
        target = (page.parent / link).resolve()
        executed = target.parent == EXECUTED and target.with_suffix(".py").exists()
        assert target.exists() or executed, f"{page.name} leads to {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_shows_of_a_file_is_there(page: Path) -> None:
    text = page.read_text()
    for path, name in re.findall(r"<!-- code of ([^\s:]+)(?:: (\w+))? -->", text):
        assert not name or f"\ndef {name}(" in (ROOT / path).read_text(), f"{path} has no {name}"
    for path, heading in re.findall(r"<!-- section of (\S+): (.+) -->", text):
        assert f"\n## {heading}\n" in (ROOT / path).read_text(), f"{path} has no {heading}"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    sources = [*(ROOT / "docs").rglob("*.md"), *EXECUTED.glob("*.py")]
    for path in sources:
        page = path.relative_to(ROOT / "docs").with_suffix(".md").as_posix()
        assert f" {page}\n" in navigation, f"add docs/{page} to nav in mkdocs.yml"
