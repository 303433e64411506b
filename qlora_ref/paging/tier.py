"""What holds pages: the interface that the schedule in paged.py works with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from qlora_ref.paging.counters import Counters
from qlora_ref.paging.files import BLOCK

# A transfer this long reaches the bandwidth of a disk or a link; more makes read-ahead coarser.
_LARGEST_PAGE = 4 << 20
# Eight pages stay. Eight are in use, on their way in (two or more of them) or on their way out.
_FEWEST_PAGES = 16
_SMALLEST_PAGE = 64 << 10


def page_size(resident_bytes: int) -> int:
    """The largest size of a page where all together may occupy so much."""
    if not isinstance(resident_bytes, int):
        raise TypeError(f"resident_bytes must be an int, got {type(resident_bytes).__name__}")
    smallest = _FEWEST_PAGES * _SMALLEST_PAGE
    if resident_bytes < smallest:
        raise ValueError(f"resident_bytes must be at least {smallest:,}, got {resident_bytes:,}")
    return min(_LARGEST_PAGE, resident_bytes // _FEWEST_PAGES // BLOCK * BLOCK)


class Tier(ABC):
    """Pages are numbered from 0. A step is begin, touch and evict for each page, commit.

    Some pages stay in the fast memory for good; those that do not are `streamed`.
    """

    mode: str
    page_bytes: int  # no page is larger
    resident_bytes: int  # what all pages together may occupy in the fast memory
    # Where the old values of parameters go, so that a step can be undone; None: it cannot be.
    undo_directory: Path | None = None

    @abstractmethod
    def allocate(self, sizes: Sequence[int]) -> list[int]:
        """Numbers of new pages of so many bytes. Raises OSError or MemoryError: none is new."""

    @abstractmethod
    def is_streamed(self, page: int) -> bool:
        """Whether the page comes and goes."""

    @abstractmethod
    def prefetch(self, pages: Sequence[int]) -> None:
        """Bring in these pages, in this order, as room allows; returns at once.

        It takes the place of what was asked for before and has not begun. Any thread may call it.
        """

    @abstractmethod
    def touch(self, page: int) -> Tensor:
        """The bytes of a page, uint8, once they are there; they stay until it is evicted.

        What a new page holds at first is not defined. Raises OSError when it cannot be read.
        """

    @abstractmethod
    def evict(self, page: int, changed: bool = True) -> None:
        """The step is done with a page: write it back if it has changed; returns at once."""

    def begin(self) -> None:  # noqa: B027
        """A step begins. Raises OSError when what the last one changed cannot be written."""

    def commit(self) -> None:  # noqa: B027
        """All that was evicted since `begin` counts. Raises OSError if some was not written."""

    def rollback(self) -> None:  # noqa: B027
        """Nothing since `begin` counts: streamed pages are as they were then, if the tier can."""

    @abstractmethod
    def count(self) -> Counters:
        """What was moved so far, and how long that took; times of what is under way are missing."""

    @abstractmethod
    def free(self) -> None:
        """Give all memory and files back; a second call does nothing."""
