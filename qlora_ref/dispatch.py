"""Which backend runs an operation, and why the others do not.

Each operation exists up to four times under one contract: `reference` (torch), `cpu` (C++),
`triton` and `cuda`. The first one that is there, and can work where the tensors are, runs. A
backend that was forced runs or raises: it never falls back. This is the only reader of the
environment variables that force one.
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

from qlora_ref import matmul_plan, native
from qlora_ref.matmul_plan import Gpu, Plan, Product
from qlora_ref.native_operations import describe_gpu

OPERATIONS = (
    "quantize_4bit",
    "dequantize_4bit",
    "quantize_8bit",
    "dequantize_8bit",
    "matmul_4bit",
    "adamw_step",
)
BACKENDS = ("cuda", "cpu", "triton", "reference")  # in order of preference

_NAMES = {"backend": BACKENDS, "isa": native.ISAS}  # what can be forced

_forced: dict[str, str | None] = {"backend": None, "isa": None}

# The dictionary in os.environ. For a variable that is not set os.environ itself raises and catches
# an exception, which takes about as long as all checks of an operation's arguments.
_environment: dict[Any, Any] = vars(os.environ)["_data"]
_VARIABLES = {kind: os.environ.encodekey(f"QLORA_REF_{kind.upper()}") for kind in _NAMES}


class _Force:
    """Sets an entry of `_forced` from now on, or until the end of a `with` block."""

    _kind: str

    def __init__(self, name: str | None) -> None:
        self._before = _forced[self._kind]
        _forced[self._kind] = None if name is None else _check(self._kind, name)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _forced[self._kind] = self._before


class force_backend(_Force):  # noqa: N801  (used as a function and as a context manager)
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

    _kind = "backend"


class force_isa(_Force):  # noqa: N801
    """Run the C++ kernels that were compiled for one instruction set, used as `force_backend` is.

    CPU tensors then take the backend `cpu`, or raise where it cannot run them.
    `QLORA_REF_ISA=avx2` in the environment does the same from the start.

    name     "baseline", "avx2", "avx512", "avx512_bf16", "amx", or None for the best there is
    Raises as `force_backend` does.
    """

    _kind = "isa"


@dataclass(frozen=True)
class Explanation:
    """`backend` would run (None: the forced one cannot); `reasons` say why, for each backend."""

    operation: str
    device: str
    backend: str | None
    reasons: dict[str, str]
    plan: Plan | None = None  # which CUDA kernel a product would take

    def __str__(self) -> str:
        lines = [f"{self.operation} on {self.device}: {self.backend or 'raises an error'}"]
        lines += [f"  {name:<10} {why}" for name, why in self.reasons.items()]
        return "\n".join(lines + [f"  in CUDA    {self.plan}"] * (self.plan is not None))


def explain(
    operation: str,
    where: Tensor | torch.device | str = "cpu",
    product: Product | None = None,
    gpu: Gpu | None = None,
) -> Explanation:
    """Which backend would run an operation, and why each of the others would not.

    operation  one of `OPERATIONS`
    where      a tensor or a device
    product    the sizes of a `matmul_4bit`, to be told also which CUDA kernel it would take,
    gpu        and on which GPU: it need not be there (None: that of `where`)
    returns    Explanation; print it to read it
    Raises ValueError for an unknown operation.
    """
    _check_operation(operation)
    device = where.device if isinstance(where, Tensor) else torch.device(where)
    chosen, forced = None, _forced_on(device.type)
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
    plan = None
    if product is not None:
        plan = matmul_plan.choose(product, gpu or describe_gpu(device))
    return Explanation(operation, str(device), chosen, reasons, plan)


def select(operation: str, device: torch.device) -> Callable[..., Any]:
    """The function that runs an operation on tensors of a device."""
    device_type = _type_of(device)
    forced = _forced_on(device_type)
    if forced is not None:
        obstacle = _obstacle(forced, operation, device_type)
        if obstacle is not None:
            raise native.BackendUnavailable(
                f"the backend {forced!r} is forced but cannot run {operation} on {device}: "
                f"{obstacle}. Lift it with force_backend(None), or see `qlora-ref doctor`"
            )
        return _load(forced, operation, forced_isa())
    return _load(_preferred(operation, device_type), operation, None)


def forced_backend() -> str | None:
    """The backend that is forced, by `force_backend` or by QLORA_REF_BACKEND; None if none is."""
    return _forced["backend"] or _from_environment("backend")


def forced_isa() -> str | None:
    """The instruction set that is forced, by `force_isa` or by QLORA_REF_ISA; None if none is."""
    return _forced["isa"] or _from_environment("isa")


def _from_environment(kind: str) -> str | None:
    name = _environment.get(_VARIABLES[kind])
    return _check(kind, os.environ.decodevalue(name)) if name else None


def _forced_on(device_type: str) -> str | None:
    """The backend that is forced on a device: forcing an instruction set forces the C++ kernels."""
    forced = forced_backend()
    return "cpu" if forced is None and device_type == "cpu" and forced_isa() else forced


def _check_operation(operation: str) -> None:
    if operation not in OPERATIONS:
        raise ValueError(f"no operation is called {operation!r}: expected one of {OPERATIONS}")


def _check(kind: str, name: str) -> str:
    if name not in _NAMES[kind]:
        raise ValueError(f"no {kind} is called {name!r}: expected one of {_NAMES[kind]}")
    return name


@functools.cache
def _type_of(device: torch.device) -> str:
    return device.type  # a new string each time, which takes longer than this look-up


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
        _load(backend, operation, forced_isa())
    except native.BackendUnavailable as unavailable:
        return str(unavailable)
    return None


def _triton_is_interpreted() -> bool:
    # Interpreted kernels are for tests: they run when forced, and are never preferred.
    return forced_backend() == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _load(backend: str, operation: str, isa: str | None) -> Callable[..., Any]:
    if backend in ("cpu", "cuda"):
        return native.load(backend, operation, isa)
    package = "qlora_ref.reference" if backend == "reference" else "qlora_kernels"
    if backend == "triton":
        _require_triton(operation)
        if os.environ.get("QLORA_REF_TRITON_TUNE") == "1":
            importlib.import_module(f"{package}.tuning").tune()
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
