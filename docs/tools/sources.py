"""Gives the site a page for each file of the repository that a page links to.

On the disk and in a repository's browser `[ops.py](../qlora_ref/ops.py)` works as it is. The site
has no such file; there the link leads to a page that shows it. A link to a file that does not exist
stays as it is, and `mkdocs build --strict` fails.

Nothing is written twice: `<!-- section of README.md: Reading order -->` stands for that section of
that file, `<!-- code of F -->` for the code in a file, `<!-- code of F.py: name -->` for one
function.
"""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#\s]+)(?=[)#])")
SECTION = re.compile(r"<!-- section of (\S+): (.+) -->")
CODE = re.compile(r"^( *)<!-- code of ([^\s:]+)(?:: (\w+))? -->$", re.MULTILINE)
LANGUAGES = {".py": "python", ".cpp": "cpp", ".h": "cpp", ".cu": "cuda", ".cuh": "cuda"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each linked file, and for what those pages link to in turn."""
    waiting = [f"docs/{file.src_uri}" for file in files if file.src_uri.endswith(".md")]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        for target in linked_files(path, with_sections(path, read(path))) - seen:
            seen.add(target)
            files.append(File.generated(config, page_of(target), content=page_text(target)))
            if target.endswith(".md"):
                waiting.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to files outside docs/ lead to their pages."""
    here = page.file.src_uri
    path = here[len("source/") : -len(".md")] if here.startswith("source/") else f"docs/{here}"

    def lead(match: re.Match[str]) -> str:
        target = resolved(path, match[0])
        if not (ROOT / target).is_file():
            return match[0]
        there = target[len("docs/") :] if target.startswith("docs/") else page_of(target)
        return relpath(there, PurePosixPath(here).parent.as_posix())

    if not path.endswith(".md"):
        return markdown
    return CODE.sub(code, LINK.sub(lead, with_sections(path, markdown)))


def linked_files(path: str, text: str) -> set[str]:
    """Files of the repository, outside docs/, that a Markdown file links to."""
    targets = {resolved(path, link) for link in LINK.findall(text)}
    return {t for t in targets if not t.startswith(("docs/", "../")) and (ROOT / t).is_file()}


def with_sections(path: str, text: str) -> str:
    """A Markdown file's text, with the sections that it asks for in their places."""

    def section(match: re.Match[str]) -> str:
        source, heading = match.groups()
        parts = re.split(r"^## (.+)$", read(source), flags=re.MULTILINE)
        if heading not in parts:
            raise ValueError(f"{path} asks for a section {heading!r}, which {source} has not")
        text = parts[parts.index(heading) + 1].strip()
        folder = PurePosixPath(path).parent.as_posix()
        return LINK.sub(lambda link: relpath(resolved(source, link[0]), folder), text)

    return SECTION.sub(section, text)


def code(match: re.Match[str]) -> str:
    """A file, or one function of a Python file, as a block of code."""
    indent, path, name = match.groups()
    text = read(path) if name is None else function(read(path), name)
    fence = f'```{language(path)} title="{path}"\n{text.strip()}\n```'
    return textwrap.indent(fence, indent)


def function(text: str, name: str) -> str:
    """The lines of a function with its decorators. Raises StopIteration for an unknown name."""
    tree = ast.parse(text)
    found = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    first = min([found.lineno, *(decorator.lineno for decorator in found.decorator_list)])
    return "\n".join(text.splitlines()[first - 1 : found.end_lineno])


def language(path: str) -> str:
    return LANGUAGES.get(PurePosixPath(path).suffix, "text")


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def resolved(path: str, link: str) -> str:
    return normpath(PurePosixPath(path).parent / link)


def page_of(path: str) -> str:
    return f"source/{path}.md"


def page_text(path: str) -> str:
    """Markdown as it is; anything else as one block of code with line numbers."""
    text = read(path)
    hidden = "---\nsearch:\n  exclude: true\n---\n"
    if path.endswith(".md"):
        return hidden + text
    return f'{hidden}# {path}\n\n``````{{ .{language(path)} linenums="1" }}\n{text}\n``````\n'
