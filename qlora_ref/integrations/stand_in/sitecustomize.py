"""Finds our modules where bitsandbytes is imported; only the standard library is used here.

Python imports a module of this name when it starts, if its folder is in PYTHONPATH: that is how
child processes come to it. It then loads the sitecustomize that it hides, if there is one.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

NAME = "bitsandbytes"
OURS = "qlora_ref.integrations.bitsandbytes"
VARIABLE = "QLORA_REF_AS_BITSANDBYTES"
VERSION = "0.50.2"
_TEXTS = {
    "METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n",
    "top_level.txt": NAME,
}


class _Loader(importlib.abc.Loader):
    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        sys.modules[name] = importlib.import_module(OURS + name.removeprefix(NAME))
        if name == NAME:
            # torch.ops.bitsandbytes, too.
            importlib.import_module(f"{OURS}.operators").define(NAME)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != NAME and not name.startswith(f"{NAME}."):
            return None
        ours = OURS + name.removeprefix(NAME)
        if importlib.util.find_spec(ours) is None:
            return None
        return importlib.machinery.ModuleSpec(name, _Loader(), is_package=True)

    def find_distributions(self, context: Any = None) -> Iterable[Any]:
        if context is None or context.name in (None, NAME):
            yield _Distribution()


class _Distribution(importlib.metadata.Distribution):
    def read_text(self, filename: str) -> str | None:
        return _TEXTS.get(filename)

    def locate_file(self, path: Any) -> Path:
        return Path(__file__).parent / path


def install() -> None:
    """Look here before anywhere else, in this process and in those that it starts."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    folder = str(Path(__file__).parent)
    os.environ[VARIABLE] = "1"
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if folder not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, *paths])


def _load_the_hidden_one() -> None:
    folder = str(Path(__file__).parent)
    elsewhere = [path for path in sys.path if path != folder]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


if __name__ == "sitecustomize" and os.environ.get(VARIABLE) == "1":
    install()
    _load_the_hidden_one()
