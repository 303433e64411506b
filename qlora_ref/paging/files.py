"""Files without a name: whole transfers, space that is there before it is needed.

A file is unlinked when it is opened, so that nothing is left of it however the process ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# O_DIRECT moves multiples of this, between addresses that are multiples of this.
BLOCK = 4096


def default_directory() -> Path:
    """$TMPDIR, else /var/tmp: /tmp is often memory, which paging should save."""
    for folder in filter(None, (os.environ.get("TMPDIR"), "/var/tmp")):
        if os.access(folder, os.W_OK):
            return Path(folder)
    return Path(tempfile.gettempdir())  # raises FileNotFoundError if there is none at all


def check_directory(directory: Path) -> None:
    """Raises ValueError unless files can be made there."""
    try:
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise ValueError(
            "page_directory must be a folder in which files can be made, got "
            f"{directory} ({error.strerror})"
        ) from error


class PageFile:
    """A file of pages. Transfers are whole, or raise OSError; they leave no page in the cache."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.nbytes = 0
        self._file = tempfile.TemporaryFile(dir=directory, buffering=0)
        self._direct = _bypass_cache(self._file.fileno())

    def grow(self, nbytes: int) -> int:
        """Reserve so many bytes more, and return where they begin. Raises OSError: disk full."""
        start = self.nbytes
        reserve(self._file.fileno(), start, nbytes, self.directory)
        self.nbytes += nbytes
        return start

    def read(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer."""
        done = 0
        while done < len(buffer):
            moved = os.preadv(self._file.fileno(), [buffer[done:]], offset + done)
            done += self._moved(moved, "read")
        self._drop(offset, len(buffer))

    def write(self, buffer: memoryview, offset: int) -> None:
        """Write the whole buffer."""
        done = 0
        while done < len(buffer):
            moved = os.pwritev(self._file.fileno(), [buffer[done:]], offset + done)
            done += self._moved(moved, "written")
        if not self._direct:
            os.fdatasync(self._file.fileno())  # only what is on the disk can be dropped
        self._drop(offset, len(buffer))

    def close(self) -> None:
        """Give the space back."""
        self._file.close()

    def _moved(self, nbytes: int, what: str) -> int:
        if nbytes <= 0:
            raise OSError(errno.EIO, f"a page could be {what} only in part", str(self.directory))
        if self._direct and nbytes % BLOCK:
            # The rest no longer begins at a multiple of a block: it has to go through the cache.
            flags = fcntl.fcntl(self._file.fileno(), fcntl.F_GETFL)
            fcntl.fcntl(self._file.fileno(), fcntl.F_SETFL, flags & ~os.O_DIRECT)
            self._direct = False
        return nbytes

    def _drop(self, offset: int, nbytes: int) -> None:
        if not self._direct:
            os.posix_fadvise(self._file.fileno(), offset, nbytes, os.POSIX_FADV_DONTNEED)


def reserve(descriptor: int, start: int, nbytes: int, directory: Path) -> None:
    """Claim disk space now, so that no later write can find the disk full."""
    try:
        os.posix_fallocate(descriptor, start, nbytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        text = (
            f"no space for {nbytes:,} bytes of optimizer state in {directory}; nothing has "
            "changed. Make space, or choose another page_directory"
        )
        raise OSError(error.errno, text) from error


def memory(nbytes: int) -> mmap.mmap:
    """Anonymous memory that begins at a page. Raises MemoryError."""
    try:
        found = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(
            f"no memory for {nbytes:,} bytes of optimizer state; nothing has changed: lower "
            "resident_bytes"
        ) from error
    # In pages of 2 MiB a disk finds it in a few pieces, not in a thousand.
    with contextlib.suppress(OSError):  # a kernel without them
        found.madvise(mmap.MADV_HUGEPAGE)
    return found


def mapped_file(nbytes: int, directory: Path) -> mmap.mmap:
    """Zeros in a file of their own, which stays open; the kernel writes it out under pressure."""
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        reserve(file.fileno(), 0, nbytes, directory)
        return mmap.mmap(file.fileno(), nbytes)


def as_tensor(buffer: Any) -> Tensor:
    """The bytes of a buffer, which the tensor keeps alive."""
    return torch.frombuffer(buffer, dtype=torch.uint8)


def _bypass_cache(descriptor: int) -> bool:
    """Whether transfers can go around the page cache, which would fill with pages used once."""
    try:
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
    except OSError:
        return False
    return True
