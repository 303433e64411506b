"""What parameters were before a step, until it is certain that the step will be completed.

A page that cannot be read in the middle of a step would leave some parameters stepped and others
not. The old values lie in a mapped file without a name: memory if there is enough of it, which the
kernel can write out if there is not, and which a failing disk does not take away while it is there.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from qlora_ref.paging.files import mapped_file


class Undo:
    """`reserve`, then `save` before each change; at the end `restore`, or just drop it."""

    def __init__(self, tensors: Iterable[Tensor], directory: Path) -> None:
        """Reserve space for these tensors. Raises OSError: disk full."""
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self._log = mapped_file(nbytes, directory)
        self._used = 0
        self._saved: list[tuple[Tensor, Tensor]] = []

    def save(self, tensors: Iterable[Tensor]) -> None:
        """Note the values of tensors that are about to change."""
        for tensor in tensors:
            nbytes = tensor.numel() * tensor.element_size()
            old = self._log[self._used : self._used + nbytes]
            old.copy_(tensor.view(torch.uint8))
            self._saved.append((tensor, old))
            self._used += nbytes

    def restore(self) -> None:
        """Put every tensor back as it was saved."""
        for tensor, old in reversed(self._saved):
            tensor.view(torch.uint8).copy_(old)
