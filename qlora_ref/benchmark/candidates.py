"""What is timed: a case, its candidates, and the check that each passes before it is timed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qlora_ref.dispatch import BACKENDS, explain, force_backend

EXACT = 0.0  # a tolerance


class WrongResult(RuntimeError):
    """A candidate's result is further off than it may be."""


@dataclass(frozen=True)
class Prepared:
    """A candidate that can run: `error(run())` must not exceed `tolerance`.

    nbytes  that it has to move; None: as many as the case says
    """

    run: Callable[[], Any]
    error: Callable[[Any], float]
    tolerance: float
    nbytes: int | None = None

    def check(self) -> float:
        """Run once and return the error. Raises WrongResult if it is too large, or no number."""
        error = self.error(self.run())
        if not error <= self.tolerance:
            raise WrongResult(f"off by {error:.2g}, more than {self.tolerance:.2g}")
        return error


@dataclass(frozen=True)
class Case:
    """One operation on one shape and dtype.

    detail      what else tells it from others, as "16 tokens"
    nbytes      that it has to read and write at least
    flops       multiplications and additions, 0 where they do not count
    ours        the backends that can run it here, each to be prepared when its turn comes
    peers       others that do the same
    """

    operation: str
    detail: str
    shape: str
    dtype: str
    nbytes: int
    flops: int
    ours: dict[str, Callable[[], Prepared]]
    peers: dict[str, Callable[[], Prepared]] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = (self.operation, self.shape, self.dtype, self.detail)
        return " ".join(part for part in parts if part)


def backends_here(operation: str, device: str) -> list[str]:
    """The backends that can run an operation on a device, the preferred one first."""
    reasons = explain(operation, device).reasons
    return [name for name in BACKENDS if reasons[name] == "runs" or "comes first" in reasons[name]]


def forced(backend: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call under one backend."""

    def run() -> Any:
        with force_backend(backend):
            return call()

    return run


def each_backend(
    operation: str, call: Callable[[], Any], device: str = "cpu"
) -> dict[str, Callable[[], Any]]:
    """The call under every backend that can run the operation on a device, by name."""
    return {name: forced(name, call) for name in backends_here(operation, device)}


def is_installed(*modules: str) -> bool:
    """Whether all these can be imported."""
    return all(importlib.util.find_spec(module) is not None for module in modules)


def share_that_differs(found: Tensor, expected: Tensor) -> float:
    """The share of elements that are not the same bits; 1 where shape or dtype differ."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return 1.0
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[found.element_size()]
    return (found.view(bits) != expected.view(bits)).double().mean().item()


def relative_error(found: Tensor, exact: Tensor) -> float:
    """|found - exact| / |exact|, in float64."""
    return ((found.double() - exact).norm() / exact.norm()).item()
