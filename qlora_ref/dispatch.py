"""Which backend runs an operation, and why the others do not.

Each operation exists up to four times under one contract: `reference` (torch), `cpu` (C++),
`triton` and `cuda`. The first one that is there, and can work where the tensors are, runs. A
backend that was forced runs or raises: it never falls back. This is the only reader of
environment variables.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from qlora_ref import native

OPERATIONS = (
    "quantize_4bit",
    "dequantize_4bit",
    "quantize_8bit",
    "dequantize_8bit",
    "matmul_4bit",
    "adamw_step",
)
BACKENDS = ("cuda", "cpu", "triton", "reference")  # in order of preference

_forced: str | None = None


class force_backend:  # noqa: N801  (used as a function and as a context manager)
    """Run every operation on one backend from now on, or until the end of a `with` block.

        force_backend("reference")            # from now on
        with force_backend("cpu"): ...        # only inside
        force_backend(None)                   # back to the default

    It holds for the whole process, since autograd runs backward passes in threads of its own.
    `QLORA_REF_BACKEND=reference` in the environment does the same from the start.

    name     "reference", "cpu", "triton", "cuda", or None for the default
    Raises ValueError for another name. An operation that the backend cannot run raises
    `native.BackendUnavailable` (a RuntimeError) when it is called.
    """

    def __init__(self, name: str | None) -> None:
        global _forced
        self._before = _forced
        _forced = None if name is None else _check_backend(name)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _forced
        _forced = self._before


@dataclass(frozen=True)
class Explanation:
    """`backend` would run (None: the forced one cannot); `reasons` say why, for each backend."""

    operation: str
    device: str
    backend: str | None
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.operation} on {self.device}: {self.backend or 'raises an error'}"]
        return "\n".join(lines + [f"  {name:<10} {why}" for name, why in self.reasons.items()])


def explain(operation: str, where: Tensor | torch.device | str = "cpu") -> Explanation:
    """Which backend would run an operation, and why each of the others would not.

    operation  one of `OPERATIONS`
    where      a tensor or a device
    returns    Explanation; print it to read it
    Raises ValueError for an unknown operation.
    """
    _check_operation(operation)
    device = where.device if isinstance(where, Tensor) else torch.device(where)
    chosen, forced = None, forced_backend()
    reasons = {}
    for backend in BACKENDS:
        obstacle = _obstacle(backend, operation, device.type)
        if forced not in (None, backend):
            reasons[backend] = f"{forced} is forced" if obstacle is None else obstacle
        elif obstacle is None and chosen is None:
            chosen = backend
            reasons[backend] = "runs"
        else:
            reasons[backend] = obstacle or f"{chosen} comes first"
    return Explanation(operation, str(device), chosen, reasons)


def select(operation: str, device: torch.device) -> Callable[..., Any]:
    """The function that runs an operation on tensors of a device."""
    forced = forced_backend()
    if forced is not None:
        obstacle = _obstacle(forced, operation, device.type)
        if obstacle is not None:
            raise native.BackendUnavailable(
                f"the backend {forced!r} is forced but cannot run {operation} on {device}: "
                f"{obstacle}. Lift it with force_backend(None), or see `qlora-ref doctor`"
            )
        return _load(forced, operation)
    return _load(_preferred(operation, device.type), operation)


def forced_backend() -> str | None:
    """The backend that is forced, by `force_backend` or by QLORA_REF_BACKEND; None if none is."""
    if _forced is None and (name := os.environ.get("QLORA_REF_BACKEND")):
        return _check_backend(name)
    return _forced


def _check_operation(operation: str) -> None:
    if operation not in OPERATIONS:
        raise ValueError(f"no operation is called {operation!r}: expected one of {OPERATIONS}")


def _check_backend(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"no backend is called {name!r}: expected one of {BACKENDS}")
    return name


@functools.cache
def _preferred(operation: str, device_type: str) -> str:
    return next(name for name in BACKENDS if _obstacle(name, operation, device_type) is None)


def _obstacle(backend: str, operation: str, device_type: str) -> str | None:
    """Why a backend cannot run an operation on a device; None if it can."""
    if backend in ("cpu", "cuda") and device_type != backend:
        return f"works on {backend} tensors only"
    if backend == "triton" and device_type != "cuda" and not _triton_is_interpreted():
        return "works on cuda tensors, or on the CPU under TRITON_INTERPRET=1"
    try:
        _load(backend, operation)
    except native.BackendUnavailable as unavailable:
        return str(unavailable)
    return None


def _triton_is_interpreted() -> bool:
    # Interpreted kernels are for tests: they run when forced, and are never preferred.
    return forced_backend() == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _load(backend: str, operation: str) -> Callable[..., Any]:
    if backend in ("cpu", "cuda"):
        return native.load(backend, operation)
    package = "qlora_ref.reference" if backend == "reference" else "qlora_kernels"
    if backend == "triton":
        _require_triton(operation)
    module = importlib.import_module(f"{package}.{operation}")
    function: Callable[..., Any] = getattr(module, operation)
    return function


def _require_triton(operation: str) -> None:
    if importlib.util.find_spec("triton") is None:
        raise native.BackendUnavailable("triton is not installed: pip install triton")
    if importlib.util.find_spec("qlora_kernels") is None:
        raise native.BackendUnavailable("the package qlora_kernels is not installed")
    if importlib.util.find_spec(f"qlora_kernels.{operation}") is None:
        raise native.BackendUnavailable(f"there is no Triton kernel for {operation}")
