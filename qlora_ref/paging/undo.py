"""What parameters were before a step, until it is certain that the step will be completed.

A page that cannot be read in the middle of a step would leave some parameters stepped and others
not. The old values go to a file without a name, through the page cache: memory if there is enough
of it, which the kernel can write out if there is not, and which a failing disk does not take away
while it is there. (Mapped, the file would cost a page fault every 4 KiB: three times as long.)
"""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_ref.paging.files import reserve


class Undo:
    """`save` before each change; at the end `restore`, or just drop it."""

    def __init__(self, tensors: Iterable[Tensor], directory: Path) -> None:
        """Reserve space for these tensors, contiguous and on the CPU. Raises OSError: disk full."""
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self._file = tempfile.TemporaryFile(dir=directory, buffering=0)
        reserve(self._file.fileno(), 0, nbytes, directory)
        self._saved: list[Tensor] = []

    def save(self, tensors: Iterable[Tensor]) -> None:
        """Note the values of tensors that are about to change."""
        for tensor in tensors:
            rest = _bytes_of(tensor)
            while rest:
                rest = rest[self._file.write(rest) :]
            self._saved.append(tensor)

    def restore(self) -> None:
        """Put every tensor back as it was saved."""
        self._file.seek(0)
        for tensor in self._saved:
            rest = _bytes_of(tensor)
            while rest:
                count = self._file.readinto(rest)
                if not count:
                    raise OSError(errno.EIO, "what parameters were before the step is lost")
                rest = rest[count:]


def _bytes_of(tensor: Tensor) -> memoryview:
    values: Any = tensor.view(torch.uint8).numpy()
    return memoryview(values)
