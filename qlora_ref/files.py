"""Files and folders written aside and renamed: a reader finds the old one or the new one, whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NEARLY_NOTHING = 1 << 20  # bytes that a full disk may still have


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
    _remove_leftovers(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.aside")
    try:
        yield aside
        _sync(aside)
        _replace(aside, path)
    except BaseException as error:
        full = _is_disk_full(error, path.parent)
        _remove(aside)
        if full:
            text = "no space left on the disk; nothing that was there has changed"
            raise OSError(errno.ENOSPC, text, str(path)) from error
        raise


def _is_disk_full(error: BaseException, folder: Path) -> bool:
    # safetensors says so in words alone, torch.save not at all.
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    nearly_full = shutil.disk_usage(folder).free < _NEARLY_NOTHING
    return "No space left" in str(error) or (isinstance(error, RuntimeError) and nearly_full)


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


def _remove_leftovers(path: Path) -> None:
    """Remove what processes that were killed have left beside a path; never what one is writing."""
    for leftover in path.parent.glob(f".{path.name}.*.aside"):
        writer = leftover.name.split(".")[-2]
        if writer == str(os.getpid()) or not _is_running(writer):
            _remove(leftover)


def _is_running(process: str) -> bool:
    try:
        os.kill(int(process), 0)  # signal 0 only asks
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
