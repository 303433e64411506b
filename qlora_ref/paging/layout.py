"""What the state of a parameter consists of, and how it is cut into pages.

A page is bytes that come and go together. It holds the state of several small parameters, or of a
part of a large one: AdamW works on each value, and on each block of 256, by itself, so that a part
can be stepped without the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_ref.codebooks import DYNAMIC_BLOCK_SIZE, dynamic_codebook

STATE_BITS = (32, 8)
# A tensor in a page starts where a vector load is aligned and a cache line begins.
_ALIGNMENT = 64


@dataclass(frozen=True)
class Field:
    """One tensor of the state: one value for `group` values of the parameter, at first `fill`."""

    name: str
    dtype: torch.dtype
    group: int = 1
    fill: int = 0

    def count(self, values: int) -> int:
        """How many values it has for so many values of the parameter."""
        return -(-values // self.group)

    def shape(self, param: Tensor) -> torch.Size:
        """That of the parameter, for what has one value for each of its values."""
        return param.shape if self.group == 1 else torch.Size([self.count(param.numel())])

    def nbytes(self, values: int) -> int:
        """Bytes for so many values of the parameter, without alignment."""
        return self.count(values) * self.dtype.itemsize


@functools.cache
def fields(state_bits: int) -> tuple[Field, ...]:
    """The tensors of a state: two moments, and with 8 bits the scales of their codes."""
    if state_bits == 32:
        return (Field("exp_avg", torch.float32), Field("exp_avg_sq", torch.float32))
    zeros = [int((dynamic_codebook(signed) == 0).nonzero()) for signed in (True, False)]
    return (
        Field("exp_avg", torch.uint8, fill=zeros[0]),
        Field("exp_avg_sq", torch.uint8, fill=zeros[1]),
        Field("exp_avg_absmax", torch.float32, group=DYNAMIC_BLOCK_SIZE),
        Field("exp_avg_sq_absmax", torch.float32, group=DYNAMIC_BLOCK_SIZE),
    )


def state_bytes(values: int, state_bits: int) -> int:
    """Bytes of the state of so many values: 8 a value, or 2 and 8 a block of 256."""
    return sum(field.nbytes(values) for field in fields(state_bits))


@dataclass(frozen=True, eq=False)
class Piece:
    """The state of `param.flatten()[start:stop]`, at `offset` in its page."""

    param: Tensor
    state_bits: int
    start: int
    stop: int
    offset: int

    def part(self, tensor: Tensor) -> Tensor:
        """This piece of the parameter or of its gradient, as a view where that is possible.

        Otherwise the rows that it touches are copied, not the whole tensor for each of its pages.
        """
        tensor = tensor.detach().squeeze()
        if tensor.is_contiguous() or tensor.dim() < 2:
            return tensor.reshape(-1)[self.start : self.stop]
        row = tensor[0].numel()
        first, last = self.start // row, -(-self.stop // row)
        return tensor[first:last].reshape(-1)[self.start - first * row : self.stop - first * row]

    def views(self, page: Tensor) -> dict[str, Tensor]:
        """The tensors of the state in the bytes of a page."""
        found, offset = {}, self.offset
        for field in fields(self.state_bits):
            nbytes = field.nbytes(self.stop - self.start)
            found[field.name] = page[offset : offset + nbytes].view(field.dtype)
            offset += aligned(nbytes)
        return found

    def part_of_state(self, name: str, tensor: Tensor) -> Tensor:
        """This piece of a whole tensor of the state, as a view."""
        group = next(field.group for field in fields(self.state_bits) if field.name == name)
        return tensor.view(-1)[self.start // group : -(-self.stop // group)]

    def fill(self, page: Tensor) -> None:
        """Write the state before the first step."""
        views = self.views(page)
        for field in fields(self.state_bits):
            views[field.name].fill_(field.fill)

    @property
    def nbytes(self) -> int:
        """Bytes in the page."""
        return _piece_bytes(self.stop - self.start, self.state_bits)


def cut_pages(params: Iterable[tuple[Tensor, int]], page_bytes: int) -> list[list[Piece]]:
    """The pieces of each page for parameters and the bits of their state, in this order."""
    pages: list[list[Piece]] = [[]]
    used = 0
    for param, state_bits in params:
        start = 0
        while start < param.numel():
            rest = param.numel() - start
            count = min(rest, _values_that_fit(page_bytes - used, state_bits))
            if count == 0:
                pages.append([])
                used = 0
                continue
            piece = Piece(param, state_bits, start, start + count, used)
            pages[-1].append(piece)
            used += piece.nbytes
            start += count
    return [pieces for pieces in pages if pieces]


def _values_that_fit(nbytes: int, state_bits: int) -> int:
    """Whole blocks of 256 values whose state fits."""
    blocks = nbytes // state_bytes(DYNAMIC_BLOCK_SIZE, state_bits)
    while blocks and _piece_bytes(blocks * DYNAMIC_BLOCK_SIZE, state_bits) > nbytes:
        blocks -= 1  # alignment takes a few bytes more
    return blocks * DYNAMIC_BLOCK_SIZE


def _piece_bytes(values: int, state_bits: int) -> int:
    return sum(aligned(field.nbytes(values)) for field in fields(state_bits))


def aligned(nbytes: int) -> int:
    """As many bytes, up to where the next tensor can begin."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
