"""Files and folders written aside and renamed: a reader finds the old one or the new one, whole.

A folder is exchanged with the new one, which Linux can do at one stroke. Where the system or the
file system cannot, the folder is away between two renames; if the process is killed there, the next
one that writes to this path puts the old folder back first.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NEARLY_NOTHING = 1 << 20  # bytes that a full disk may still have
# For renameat2, from linux/fcntl.h and linux/fs.h: paths start in the working directory; exchange.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


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
    _clear(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.aside")
    try:
        yield aside
        _sync(aside)
        _replace(aside, path)
    except BaseException as error:
        full = _is_disk_full(error, path.parent)
        _clear(path)
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
    if not path.is_dir():
        os.replace(aside, path)
    elif _exchange(aside, path):  # a folder cannot be renamed over one that is not empty
        _remove(aside)
    else:
        old = path.with_name(f".{path.name}.{os.getpid()}.old")
        path.rename(old)
        aside.rename(path)
        _remove(old)


def _exchange(first: Path, second: Path) -> bool:
    """Let two paths change places at one stroke; False where that cannot be done."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:  # an old C library
        return False
    one, other = os.fsencode(first), os.fsencode(second)
    return renameat2(_AT_FDCWD, one, _AT_FDCWD, other, _RENAME_EXCHANGE) == 0


def _clear(path: Path) -> None:
    """Put right what killed processes have left beside a path; never what one is writing."""
    leftover = re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.(aside|old)")
    for beside in list(path.parent.iterdir()):
        match = leftover.fullmatch(beside.name)
        if match is None or (match[1] != str(os.getpid()) and _is_running(match[1])):
            continue
        if match[2] == "old" and not os.path.lexists(path):
            beside.rename(path)
        else:
            _remove(beside)


def _is_running(process: str) -> bool:
    try:
        os.kill(int(process), 0)  # signal 0 only asks
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
