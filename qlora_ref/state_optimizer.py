"""What all our optimizers share: a state in 32 or 8 bits, in memory or paged, saved and loaded.

Read next: optim.py (AdamW, on a kernel) and optimizers.py (other rules, in plain torch).
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_ref.checks import (
    check_gradients,
    check_memory,
    check_moment_scales,
    check_moments,
    check_step,
)
from qlora_ref.paged import DEFAULT_RESIDENT_BYTES, PagedState, Slice, is_large
from qlora_ref.paging.counters import PagingReport
from qlora_ref.paging.layout import Fields
from qlora_ref.torch_library import has_memory

STATE_BITS = (32, 8)
Options = dict[str, Any]
Parts = Callable[[list[Tensor]], Iterator[Slice]]

_device, _is_sparse, _shape = map(attrgetter, ("device", "is_sparse", "shape"))


class Batch(NamedTuple):
    """Many of `Slice`, by columns: what a kernel takes, and quicker to make for many parameters."""

    owners: Sequence[Tensor]
    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    states: Sequence[Mapping[str, Tensor]]


class StateOptimizer(torch.optim.Optimizer, ABC):
    """An optimizer that steps each value, or each block of 256, by itself.

    defaults        options of groups, "state_bits" among them
    paged           False; "file", "unified" or "pinned"; True: what suits the parameters' device
    resident_bytes  int; what the pages of a paged state may occupy at once
    page_directory  where "file" keeps them: $TMPDIR or /var/tmp unless it is given

    A parameter without a gradient is left alone. Paged or not, the bits are the same; the state of
    small parameters is never paged (see paged.py), that of others is in `state_dict()` and not in
    `optimizer.state`. A step of a paged state raises OSError for a disk that is full or fails;
    parameters and state are then as they were before it.
    """

    # For an optimizer that comes from a pickle or a deepcopy: those are never paged.
    _paged: PagedState | None = None

    def __init__(
        self,
        params: Iterable[Any],
        defaults: Options,
        paged: bool | str = False,
        resident_bytes: int = DEFAULT_RESIDENT_BYTES,
        page_directory: Path | str | None = None,
    ) -> None:
        if paged is not False:
            self._paged = PagedState(paged, resident_bytes, page_directory)
        super().__init__(params, defaults)

    @abstractmethod
    def fields(self, group: Options) -> Fields:
        """The tensors of the state of each parameter of a group."""

    @abstractmethod
    def count_betas(self, group: Options) -> int:
        """How many betas a step of a group has."""

    @abstractmethod
    def step_alike(self, batch: Batch, group: Options, step: int) -> None:
        """Update parameters, or parts of them, of one group and device; `step` counts from 1."""

    def survey(self, trained: list[Tensor], parts: Parts) -> None:  # noqa: B027
        """For a step that depends on all of a paged parameter: before it changes the first part.

        trained  the paged parameters of this step
        parts    of such parameters, with their state as it is before the step; nothing is changed
        """

    def add_param_group(self, param_group: Options) -> None:
        """Add parameters with options of their own. Raises ValueError for options out of range."""
        options = {**self.defaults, **param_group}
        _check_options(options, self.count_betas(options))
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        trained = [
            [param for param in group["params"] if param.grad is not None]
            for group in self.param_groups
        ]
        # All that can be wrong, of all of them, before the first one moves or is counted.
        for params in trained:
            _check_gradients(params)
        states = self._states(trained)
        # With copies of gradients, where they need them: once pages were stepped nothing may fail.
        whole = [self._whole(*members) for members in zip(trained, states, self.param_groups)]
        _count(states, 1)
        if self._paged is not None:
            paged = [p for params in trained for p in params if self._is_paged(p)]
            numbers = {p: i for i, params in enumerate(trained) for p in params}
            update = functools.partial(self._step_pages, numbers)
            try:
                self.survey(paged, self._paged.parts)
                self._paged.step(paged, update)
            except BaseException:
                _count(states, -1)  # nothing else has changed
                raise
        left = [
            (alike, group, step)
            for group, batch in zip(self.param_groups, whole)
            for alike, step in self._alike(batch)
        ]
        while left:
            try:
                self.step_alike(*left[0])
            except BaseException:
                _count([alike.states for alike, _, _ in left], -1)  # these have not moved
                raise
            del left[0]
        return loss

    def paging_report(self) -> PagingReport | None:
        """What is paged, bytes moved, waits; None if the state is not paged."""
        return None if self._paged is None else self._paged.report()

    def _is_paged(self, param: Tensor) -> bool:
        return self._paged is not None and param in self._paged

    def _states(self, trained: list[list[Tensor]]) -> list[list[Options]]:
        """The state of each parameter."""
        states: list[list[Any]] = [
            [self.state.get(param) for param in params] for params in trained
        ]
        if not all(map(all, states)):
            self._make_states(trained)
            states = [[self.state[param] for param in params] for params in trained]
        return states

    def _make_states(self, trained: list[list[Tensor]]) -> None:
        """A state of zeros for each parameter that has none: all of them or, on an error, none."""
        new = [
            (param, self.fields(group))
            for group, params in zip(self.param_groups, trained)
            for param in params
            if not self.state.get(param)
        ]
        check_memory(p for params in trained for p in params if has_memory(p))
        large = {param for param, fields in new if self._paged and is_large(param, fields)}
        zeros = {param: _zero_state(param, fields) for param, fields in new if param not in large}
        if self._paged is not None:
            self._paged.add([(param, fields) for param, fields in new if param in large])
        for param, _ in new:
            self.state[param] = {"step": 0, **zeros.get(param, {})}

    def _whole(self, params: list[Tensor], states: list[Options], group: Options) -> Batch:
        """The parameters whose state is in memory. It is checked, and the count of all steps."""
        for step in {state["step"] for state in states}:
            check_step(step + 1)
        if self._paged is not None:
            params = [param for param in params if param not in self._paged]
            states = [self.state[param] for param in params]
        _check_states(params, self.fields(group), states)
        grads = [param.grad for param in params if param.grad is not None]
        if not all(map(Tensor.is_contiguous, grads)):
            grads = [grad.contiguous() for grad in grads]
        return Batch(params, params, grads, states)

    def _step_pages(self, numbers: dict[Tensor, int], slices: list[Slice]) -> None:
        """Update parts of parameters; the numbers are those of their groups."""
        found: dict[int, list[Slice]] = {}
        for part in slices:
            found.setdefault(numbers[part.owner], []).append(part)
        for number, members in found.items():
            batch, group = Batch(*zip(*members)), self.param_groups[number]
            _check_states(batch.params, self.fields(group), batch.states)
            for alike, step in self._alike(batch):
                self.step_alike(alike, group, step)

    def _alike(self, batch: Batch) -> list[tuple[Batch, int]]:
        """What belongs to a group, by step and device: all together, if these are the same."""
        steps = [self.state[owner]["step"] for owner in batch.owners]
        if len(set(steps)) == len(set(map(_device, batch.params))) == 1:
            return [(batch, steps[0])]
        kinds: dict[Any, list[Slice]] = {}
        for step, part in zip(steps, map(Slice, *batch)):
            kinds.setdefault((step, part.param.device), []).append(part)
        return [(Batch(*zip(*alike)), step) for (step, _), alike in kinds.items()]

    def state_dict(self) -> dict[str, Any]:
        """As of torch; a paged state comes as tensors mapped from a file, as it is now."""
        found = super().state_dict()
        if self._paged is not None:
            params = [param for group in self.param_groups for param in group["params"]]
            keys = [key for group in found["param_groups"] for key in group["params"]]
            tensors = self._paged.read(params)
            for param, key in zip(params, keys):
                if param in tensors:
                    found["state"][key] = {**found["state"][key], **tensors[param]}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state. Raises ValueError if it does not fit these parameters."""
        if not all("state_bits" in group for group in state_dict["param_groups"]):
            raise ValueError("the saved state is of another optimizer: its groups lack state_bits")
        groups = zip(self.param_groups, state_dict["param_groups"])
        saved = {
            param: (key, self.fields(theirs))
            for mine, theirs in groups
            for param, key in zip(mine["params"], theirs["params"])
            if key in state_dict["state"]
        }
        for param, (key, fields) in saved.items():
            _check_state(param, fields, state_dict["state"][key])
        tensors = {
            param: _tensors_of(state_dict["state"][key]) for param, (key, _) in saved.items()
        }
        pages = self._new_pages({param: fields for param, (_, fields) in saved.items()}, tensors)
        # PyTorch would cast the tensors to the dtype of the parameter: it gets the rest only.
        counts = {key: _without_tensors(state) for key, state in state_dict["state"].items()}
        try:
            super().load_state_dict({**state_dict, "state": counts})
        except BaseException:
            if pages is not None:
                pages.free()
            raise
        if self._paged is not None and pages is not None:
            self._paged.free()
            self._paged = pages
        for param, found in tensors.items():
            if not self._is_paged(param):
                copies = {n: t.to(param.device, copy=True).contiguous() for n, t in found.items()}
                self.state[param].update(copies)

    def _new_pages(
        self, fields: dict[Tensor, Fields], tensors: dict[Tensor, dict[str, Tensor]]
    ) -> PagedState | None:
        """Pages that hold these states, beside those that are there; None if nothing is paged."""
        if self._paged is None:
            return None
        pages = self._paged.twin()
        try:
            large = [(param, f) for param, f in fields.items() if is_large(param, f)]
            pages.add(large)
            pages.write({param: tensors[param] for param, _ in large})
        except BaseException:
            pages.free()
            raise
        return pages

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy."""
        if self._paged is not None:
            raise TypeError(
                "a paged optimizer cannot be copied or pickled, its state is in pages: make "
                "another one and load_state_dict(optimizer.state_dict())"
            )
        return super().__getstate__()


def _check_options(options: Options, betas: int) -> None:
    for name in ("lr", "eps", "weight_decay", "alpha", "max_unorm"):
        if not 0 <= options.get(name, 0):
            raise ValueError(f"{name} must be at least 0, got {options[name]}")
    if len(options["betas"]) != betas:
        raise ValueError(f"betas must hold {betas} numbers, got {options['betas']}")
    if not all(0 <= beta < 1 for beta in options["betas"]):
        raise ValueError(f"betas must be at least 0 and below 1, got {options['betas']}")
    if options["state_bits"] not in STATE_BITS:
        raise ValueError(f"state_bits must be 32 or 8, got {options['state_bits']}")


def _count(states: Iterable[Sequence[Any]], steps: int) -> None:
    for members in states:
        for state in members:
            state["step"] += steps


def _check_gradients(params: list[Tensor]) -> None:
    grads = [param.grad for param in params if param.grad is not None]
    if any(map(_is_sparse, grads)):
        raise ValueError("these are for dense gradients; use torch.optim.SparseAdam for sparse")
    check_gradients(params, grads)


def _check_states(
    params: Sequence[Tensor], fields: Fields, states: Sequence[Mapping[str, Any]]
) -> None:
    """What a step will change: other tensors may have been put there, or into the parameters."""
    shapes = list(map(_shape, params))
    for field in fields:
        tensors: list[Any] = [state.get(field.name) for state in states]
        if field.group == 1:
            check_moments(shapes, tensors, field.name, field.dtype)
        else:
            check_moment_scales(params, tensors, field.name)


def _zero_state(param: Tensor, fields: Fields) -> dict[str, Tensor]:
    return {
        field.name: torch.full(
            field.shape(param), field.fill, dtype=field.dtype, device=param.device
        )
        for field in fields
    }


def _tensors_of(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _without_tensors(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if not isinstance(value, Tensor)}


def _check_state(param: Tensor, fields: Fields, state: dict[str, Any]) -> None:
    moment = state.get(fields[0].name)
    if not isinstance(moment, Tensor) or moment.shape != param.shape:
        found = tuple(moment.shape) if isinstance(moment, Tensor) else sorted(state)
        raise ValueError(
            f"the saved state is of another model: a parameter of shape {tuple(param.shape)} "
            f"meets a state of {found}"
        )
    for field in fields:
        value = state.get(field.name)
        if not isinstance(value, Tensor) or (value.shape, value.dtype) != (
            field.shape(param),
            field.dtype,
        ):
            raise ValueError(
                f"the saved state has no {field.name} of {field.dtype} in shape "
                f"{tuple(field.shape(param))}, which its state_bits ask for"
            )
