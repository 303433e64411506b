"""Files and folders written aside and renamed: a reader finds the old one or the new one, whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(path: Path | str) -> Iterator[Path]:
    """A path beside `path` to write a file or a folder to; it takes the place of `path` at the end.

        with written_aside("model.safetensors") as aside:
            save_file(tensors, aside)

    If the block raises (a full disk, an interrupt), what was written aside is removed and `path`
    stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.aside")
    _remove(aside)
    try:
        yield aside
        _sync(aside)
        _replace(aside, path)
    except BaseException:
        _remove(aside)
        raise


def _sync(path: Path) -> None:
    # Renaming is atomic, but only data that has reached the disk survives a crash of the machine.
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    for file in files:
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())


def _replace(aside: Path, path: Path) -> None:
    if path.is_dir():  # a folder cannot be renamed over one that is not empty
        old = path.with_name(f".{path.name}.{os.getpid()}.old")
        _remove(old)
        path.rename(old)
        try:
            aside.rename(path)
        except OSError:
            old.rename(path)
            raise
        _remove(old)
    else:
        os.replace(aside, path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
