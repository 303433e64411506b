"""python docs/tools/notebooks.py NOTEBOOK.py ...: run notebooks, write each as a page beside it.

A notebook is a Python file with `# %%` between its cells. It runs in the root of the repository. A
cell that raises ends this with its traceback, and no page is written.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jupytext
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[2]


def render(source: Path) -> None:
    """Run a notebook; write NAME.md and its pictures, NAME_files/."""
    notebook = jupytext.read(source)
    where = {"metadata": {"path": str(ROOT)}}
    client = NotebookClient(notebook, timeout=1200, coalesce_streams=True, resources=where)
    client.create_kernel_manager().transport = "ipc"  # no ports
    client.execute()
    folder = f"{source.stem}_files"
    resources = {"unique_key": source.stem, "output_files_dir": folder}
    text, resources = MarkdownExporter().from_notebook_node(notebook, resources)
    (source.parent / folder).mkdir(exist_ok=True)
    for name, content in resources["outputs"].items():
        (source.parent / name).write_bytes(content)
    source.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress"  # tqdm's: there is no widget to draw
    for argument in sys.argv[1:]:
        render(Path(argument))
