"""What the state of a parameter consists of, and how it is cut into pages.

A page is bytes that come and go together. It holds the state of several small parameters, or of a
part of a large one: an optimizer works on each value, and on each block of 256, by itself, so that
a part can be stepped without the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_ref.codebooks import DYNAMIC_BLOCK_SIZE, dynamic_codebook

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


Fields = tuple[Field, ...]


def state_fields(moments: Mapping[str, bool], state_bits: int) -> Fields:
    """The tensors of a state: its moments, and with 8 bits the scales of their codes.

    moments  by name: whether its values can be negative, which decides the 8-bit levels
    """
    if state_bits == 32:
        return tuple(Field(name, torch.float32) for name in moments)
    zeros = {name: int((dynamic_codebook(s) == 0).nonzero()) for name, s in moments.items()}
    codes = [Field(name, torch.uint8, fill=zero) for name, zero in zeros.items()]
    scales = [Field(f"{name}_absmax", torch.float32, DYNAMIC_BLOCK_SIZE) for name in moments]
    return (*codes, *scales)


def state_bytes(values: int, fields: Fields) -> int:
    """Bytes of the state of so many values; of AdamW 8 a value, or 2 and 8 a block of 256."""
    return sum(field.nbytes(values) for field in fields)


@dataclass(frozen=True, eq=False)
class Piece:
    """The state of `param.flatten()[start:stop]`, at `offset` in its page."""

    param: Tensor
    fields: Fields
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
        for field in self.fields:
            nbytes = field.nbytes(self.stop - self.start)
            found[field.name] = page[offset : offset + nbytes].view(field.dtype)
            offset += aligned(nbytes)
        return found

    def part_of_state(self, name: str, tensor: Tensor) -> Tensor:
        """This piece of a whole tensor of the state, as a view."""
        group = next(field.group for field in self.fields if field.name == name)
        return tensor.view(-1)[self.start // group : -(-self.stop // group)]

    def fill(self, page: Tensor) -> None:
        """Write the state before the first step."""
        views = self.views(page)
        for field in self.fields:
            views[field.name].fill_(field.fill)

    @property
    def nbytes(self) -> int:
        """Bytes in the page."""
        return _piece_bytes(self.stop - self.start, self.fields)


def cut_pages(params: Iterable[tuple[Tensor, Fields]], page_bytes: int) -> list[list[Piece]]:
    """The pieces of each page for parameters and the tensors of their state, in this order."""
    pages: list[list[Piece]] = [[]]
    used = 0
    for param, fields in params:
        start = 0
        while start < param.numel():
            rest = param.numel() - start
            count = min(rest, _values_that_fit(page_bytes - used, fields))
            if count == 0:
                pages.append([])
                used = 0
                continue
            piece = Piece(param, fields, start, start + count, used)
            pages[-1].append(piece)
            used += piece.nbytes
            start += count
    return [pieces for pieces in pages if pieces]


def _values_that_fit(nbytes: int, fields: Fields) -> int:
    """Whole blocks of 256 values whose state fits."""
    blocks = nbytes // state_bytes(DYNAMIC_BLOCK_SIZE, fields)
    while blocks and _piece_bytes(blocks * DYNAMIC_BLOCK_SIZE, fields) > nbytes:
        blocks -= 1  # alignment takes a few bytes more
    return blocks * DYNAMIC_BLOCK_SIZE


def _piece_bytes(values: int, fields: Fields) -> int:
    return sum(aligned(field.nbytes(values)) for field in fields)


def aligned(nbytes: int) -> int:
    """As many bytes, up to where the next tensor can begin."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
