"""Optimizer state that is larger than the fast memory: when each page comes and when it goes.

A step walks the pages in one fixed order: while it works on one, the next ones are on their way in
and the last ones on their way out. Hooks start that walk's first pages during the last backward
before the step, so that they are there when it begins. Where pages are: paging/.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_ref.paging.counters import Counters, PagingReport
from qlora_ref.paging.cuda_calls import TorchCuda
from qlora_ref.paging.cuda_tiers import PinnedTier, UnifiedTier
from qlora_ref.paging.file_tier import FileTier
from qlora_ref.paging.files import check_directory, default_directory, mapped_file
from qlora_ref.paging.layout import Fields, Piece, aligned, cut_pages, state_bytes
from qlora_ref.paging.tier import Tier, page_size
from qlora_ref.paging.undo import Undo

MODES = ("file", "unified", "pinned")
DEFAULT_RESIDENT_BYTES = 256 << 20
# Smaller states stay in memory: a page's worth of them costs more bookkeeping than it saves room.
SMALLEST_PAGED_STATE = 64 << 10  # bytes


class Slice(NamedTuple):
    """A parameter or a part of it that a step updates, with the state of just that part."""

    owner: Tensor  # the parameter
    param: Tensor
    grad: Tensor
    state: Mapping[str, Tensor]


Update = Callable[[list[Slice]], None]


def is_large(param: Tensor, fields: Fields) -> bool:
    """Whether the state of a parameter is paged: from SMALLEST_PAGED_STATE bytes on."""
    return state_bytes(param.numel(), fields) >= SMALLEST_PAGED_STATE


class PagedState:
    """The state of the parameters of one optimizer, in pages of one tier.

    The states of parameters on the CPU go to a file, those of parameters on a GPU to managed or
    pinned memory.
    """

    def __init__(
        self,
        mode: str | bool,
        resident_bytes: int = DEFAULT_RESIDENT_BYTES,
        directory: Path | str | None = None,
    ) -> None:
        if mode is not True and mode not in MODES:
            raise ValueError(f"paged must be False, True or one of {', '.join(MODES)}, got {mode}")
        page_size(resident_bytes)
        if directory is not None:
            check_directory(Path(directory))
        self._options = (mode, resident_bytes, directory)
        self._tier: Tier | None = None
        self._process = 0  # which made the tier
        self._pages: list[list[Piece]] = []  # by the tier's number of the page
        self._fresh: set[int] = set()  # pages of which no step has been completed
        self._pages_of: dict[Tensor, list[int]] = {}
        self._order: list[int] = []  # the streamed pages of the last step
        self._hooks: dict[Tensor, Any] = {}
        self._arrivals: dict[Tensor, int] = {}  # gradients of each parameter since the last step
        self._expected: dict[Tensor, int] = {}  # and how many there were before the last step
        self._ahead = False
        weakref.finalize(self, _remove_hooks, self._hooks)

    def __contains__(self, param: Tensor) -> bool:
        return param in self._pages_of

    def add(self, params: list[tuple[Tensor, Fields]]) -> None:
        """Make pages for parameters, given with the tensors of their state.

        For all of them or, where an error is raised, for none.
        """
        if not params:
            return
        self._check_process()
        tier = self._tier_for({param.device for param, _ in params})
        pages = cut_pages(params, tier.page_bytes)
        sizes = [pieces[-1].offset + pieces[-1].nbytes for pieces in pages]
        numbers = tier.allocate(sizes)
        self._pages += pages
        self._fresh |= set(numbers)
        for number, pieces in zip(numbers, pages):
            for piece in pieces:
                self._pages_of.setdefault(piece.param, []).append(number)
        for param, _ in params:
            self._watch(param)

    def step(self, trained: Iterable[Tensor], update: Update) -> None:
        """Update the paged parameters among these: all of them or, if an error is raised, none."""
        chosen = {param for param in trained if param in self}
        self._expected, self._arrivals, self._ahead = self._arrivals, {}, False
        if self._tier is None or not chosen:
            return
        self._check_process()
        numbers = sorted({page for param in chosen for page in self._pages_of[param]})
        staying = [page for page in numbers if not self._tier.is_streamed(page)]
        streamed = [page for page in numbers if self._tier.is_streamed(page)]
        # What these need is there before the first page streams: they cannot fail once it is done.
        parts = [part for page in staying for part in self._slices(self._tier, page, chosen)]
        self._step_streamed(self._tier, streamed, chosen, update)
        if parts:
            update(parts)
        self._fresh -= set(numbers)

    def parts(self, params: Iterable[Tensor]) -> Iterator[Slice]:
        """Every part of paged parameters in its order, to look at: nothing is written back."""
        for piece, views in self._walk(set(params), changed=False):
            yield _slice(piece, views)

    def read(self, params: Iterable[Tensor]) -> dict[Tensor, dict[str, Tensor]]:
        """The state of parameters as whole tensors, mapped from a file: they need no memory."""
        chosen = [param for param in params if param in self]
        if not chosen:
            return {}
        found = self._mapped_states(chosen)
        for piece, views in self._walk(set(chosen), changed=False):
            for name, value in views.items():
                piece.part_of_state(name, found[piece.param][name]).copy_(value)
        return found

    def write(self, states: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        """Set the state of parameters whose pages no step has used yet."""
        if self._tier is None or not states:
            return
        self._tier.begin()
        for piece, views in self._walk(set(states), changed=True):
            for name, value in views.items():
                value.copy_(piece.part_of_state(name, states[piece.param][name].contiguous()))
        self._tier.commit()
        self._fresh.clear()

    def report(self) -> PagingReport:
        """What is paged, and what moving it has cost so far."""
        tier = self._tier
        if tier is None:
            return PagingReport("nothing yet", 0, 0, 0, self._options[1], Counters())
        sizes = [sum(piece.nbytes for piece in pieces) for pieces in self._pages]
        streamed = sum(size for page, size in enumerate(sizes) if tier.is_streamed(page))
        return PagingReport(
            tier.mode,
            len(sizes),
            sum(sizes),
            streamed,
            tier.resident_bytes,
            tier.count(),
        )

    def free(self) -> None:
        """Give all pages back."""
        _remove_hooks(self._hooks)
        self._pages_of, self._pages, self._order = {}, [], []
        if self._tier is not None and self._is_ours():
            self._tier.free()

    def twin(self) -> PagedState:
        """An empty one with the same options."""
        return PagedState(*self._options)

    def _is_ours(self) -> bool:
        """Whether this is the process that has the threads of the tier, and no fork of it."""
        return self._process == os.getpid()

    def _check_process(self) -> None:
        if self._tier is not None and not self._is_ours():
            raise RuntimeError(
                "the pages belong to the process that made this optimizer, of which this one is a "
                "fork: make another optimizer here and load a state_dict that was saved there"
            )

    def _tier_for(self, devices: set[torch.device]) -> Tier:
        if len(devices) > 1:
            raise ValueError(
                "the state of one optimizer is paged on one device: use an optimizer for each of "
                f"{', '.join(sorted(map(str, devices)))}"
            )
        if self._tier is None:
            self._tier = make_tier(*self._options, next(iter(devices)))
            self._process = os.getpid()
        return self._tier

    def _step_streamed(
        self, tier: Tier, pages: list[int], chosen: set[Tensor], update: Update
    ) -> None:
        for page in set(self._order) - set(pages):  # brought in by a hook, and not needed
            tier.evict(page, changed=False)
        self._order = pages
        if not pages:
            return
        undo = None
        tier.prefetch(pages)
        tier.begin()
        try:
            undo = self._undo(tier, pages, chosen)
            for page in pages:
                parts = self._slices(tier, page, chosen)
                if undo is not None:
                    undo.save(part.param for part in parts)
                update(parts)
                tier.evict(page)
            tier.commit()
        except BaseException:
            tier.rollback()
            if undo is not None:
                undo.restore()
            raise

    def _undo(self, tier: Tier, pages: list[int], chosen: set[Tensor]) -> Undo | None:
        if tier.undo_directory is None:
            return None
        pieces = [piece for page in pages for piece in self._pages[page] if piece.param in chosen]
        return Undo((piece.part(piece.param) for piece in pieces), tier.undo_directory)

    def _slices(self, tier: Tier, page: int, chosen: set[Tensor]) -> list[Slice]:
        """The parts of the chosen parameters whose state is in a page, which is brought in."""
        data = self._open(tier, page)
        pieces = [piece for piece in self._pages[page] if piece.param in chosen]
        return [_slice(piece, piece.views(data)) for piece in pieces]

    def _open(self, tier: Tier, page: int) -> Tensor:
        data = tier.touch(page)
        if page in self._fresh:
            for piece in self._pages[page]:
                piece.fill(data)
        return data

    def _walk(
        self, chosen: set[Tensor], changed: bool
    ) -> Iterator[tuple[Piece, dict[str, Tensor]]]:
        """Each piece of the chosen parameters with the tensors of its state."""
        tier = self._tier
        if tier is None or not chosen:
            return
        self._check_process()
        numbers = sorted({page for param in chosen for page in self._pages_of[param]})
        tier.prefetch(numbers)
        for page in numbers:
            data = self._open(tier, page)
            for piece in self._pages[page]:
                if piece.param in chosen:
                    yield piece, piece.views(data)
            tier.evict(page, changed)

    def _mapped_states(self, params: list[Tensor]) -> dict[Tensor, dict[str, Tensor]]:
        """Tensors for the state of parameters, in one mapped file: each mapping keeps one open."""
        wanted = [(param, field) for param in params for field in self._fields_of(param)]
        sizes = [aligned(field.nbytes(param.numel())) for param, field in wanted]
        file = mapped_file(sum(sizes), Path(self._options[2] or default_directory()))
        found: dict[Tensor, dict[str, Tensor]] = {param: {} for param in params}
        offset = 0
        for (param, field), size in zip(wanted, sizes):
            count = field.count(param.numel())
            data = torch.frombuffer(file, dtype=field.dtype, count=count, offset=offset)
            found[param][field.name] = data.view(field.shape(param))
            offset += size
        return found

    def _fields_of(self, param: Tensor) -> Fields:
        pieces = self._pages[self._pages_of[param][0]]
        return next(piece.fields for piece in pieces if piece.param is param)

    def _watch(self, param: Tensor) -> None:
        """Have the first pages brought in by the last backward before a step."""
        if param in self._hooks or not (param.is_leaf and param.requires_grad):
            return
        this = weakref.ref(self)

        def arrived(param: Tensor) -> None:
            state = this()
            if state is not None:
                state._arrived(param)

        self._hooks[param] = param.register_post_accumulate_grad_hook(arrived)

    def _arrived(self, param: Tensor) -> None:
        """A gradient is there: if as many came before the last step, this backward is the last."""
        self._arrivals[param] = self._arrivals.get(param, 0) + 1
        last = self._arrivals[param] >= self._expected.get(param, 1)
        if last and not self._ahead and self._tier is not None and self._is_ours():
            self._ahead = True
            self._tier.prefetch(self._order)


def _slice(piece: Piece, state: Mapping[str, Tensor]) -> Slice:
    assert piece.param.grad is not None
    grad = piece.part(piece.param.grad).contiguous()
    return Slice(piece.param, piece.part(piece.param), grad, state)


def make_tier(
    mode: str | bool, resident_bytes: int, directory: Path | str | None, device: torch.device
) -> Tier:
    """The tier of a mode for parameters on a device; True is what suits the device best."""
    if device.type == "cpu":
        if mode not in (True, "file"):
            raise ValueError(f'paged="{mode}" is for parameters on a GPU: use "file" on the CPU')
        return FileTier(Path(directory or default_directory()), resident_bytes)
    if device.type != "cuda":
        raise ValueError(f"optimizer state cannot be paged on {device}: use paged=False")
    if mode == "file":
        raise ValueError(f'paged="file" is for parameters on the CPU: use True on {device}')
    calls = TorchCuda(device)
    managed = mode == "unified" or (mode is True and calls.has_managed_memory())
    return (UnifiedTier if managed else PinnedTier)(calls, resident_bytes)


def _remove_hooks(hooks: dict[Tensor, Any]) -> None:
    for handle in hooks.values():
        handle.remove()
    hooks.clear()
