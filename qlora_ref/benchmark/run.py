"""Measure cases: every candidate is checked first, those that pass are timed in turn."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from qlora_ref.benchmark.candidates import Case, Prepared, WrongResult
from qlora_ref.benchmark.limits import ArithmeticLimit, MemoryLimit
from qlora_ref.benchmark.timing import Timing, time_in_turn

PASSED, REFUSED, FAILED = "passed", "refused", "failed"


@dataclass(frozen=True)
class Row:
    """One candidate of one case.

    ours              whether it is a backend of this package; the first of a case is the preferred
    status            passed; refused: its result is wrong; failed: it could not run
    why               of what did not pass
    error             of its result, which the module of the case defines
    seconds           median of `runs` runs, low and high are their quartiles; None if not timed
    nbytes, flops     what it has to move and to compute
    memory_limit      bytes a second that a copy or a read of as many bytes reached in turn with it
    arithmetic_limit  operations a second that numbers in registers reached in turn with it (on a
                      GPU: torch's product in that dtype); None without flops
    """

    operation: str
    detail: str
    shape: str
    dtype: str
    device: str
    threads: int
    name: str
    ours: bool
    status: str
    why: str
    error: float | None
    seconds: float | None
    low: float | None
    high: float | None
    runs: int
    nbytes: int
    flops: int
    memory_limit: float
    arithmetic_limit: float | None

    @property
    def case(self) -> tuple[str, str, str, str]:
        """What the candidates of a case have in common."""
        return self.operation, self.shape, self.dtype, self.detail

    @property
    def key(self) -> tuple[str, ...]:
        """What tells a row from all others of a measurement, and finds it in another one."""
        return (*self.case, self.device, str(self.threads), self.name)

    def as_dict(self) -> dict[str, object]:
        """For JSON and CSV."""
        return asdict(self)


@torch.no_grad()
def measure_case(
    case: Case, device: torch.device, repeats: int, budget: float = math.inf
) -> list[Row]:
    """Check each candidate, then time those that passed."""
    candidates = {**case.ours, **case.peers}
    outcomes = {name: _try(prepare) for name, prepare in candidates.items()}
    memory = MemoryLimit(case.nbytes, device)
    runs = {name: o.prepared.run for name, o in outcomes.items() if o.prepared is not None}
    arithmetic = ArithmeticLimit(getattr(torch, case.dtype), device) if case.flops else None
    runs |= memory.runs | (arithmetic.runs if arithmetic else {})
    timings = time_in_turn(runs, repeats, device, steady=device.type == "cpu", budget=budget)
    return [
        Row(
            operation=case.operation,
            detail=case.detail,
            shape=case.shape,
            dtype=case.dtype,
            device=device.type,
            threads=torch.get_num_threads(),
            name=name,
            ours=name in case.ours,
            status=outcome.status,
            why=outcome.why,
            error=outcome.error,
            **_times(timings.get(name)),
            nbytes=outcome.nbytes or case.nbytes,
            flops=case.flops,
            memory_limit=memory.bytes_per_second(timings),
            arithmetic_limit=arithmetic.flops_per_second(timings) if arithmetic else None,
        )
        for name, outcome in outcomes.items()
    ]


def broken_case(operation: str, detail: str, device: str, error: Exception) -> Row:
    """In place of the rows of a case that could not be made."""
    return Row(
        operation=operation,
        detail=detail,
        shape="",
        dtype="",
        device=device,
        threads=torch.get_num_threads(),
        name="case",
        ours=True,
        status=FAILED,
        why=_first_line(error),
        error=None,
        **_times(None),
        nbytes=0,
        flops=0,
        memory_limit=0.0,
        arithmetic_limit=None,
    )


@dataclass(frozen=True)
class _Outcome:
    """Of trying a candidate: `prepared` if it may be timed."""

    status: str
    why: str = ""
    error: float | None = None
    prepared: Prepared | None = None

    @property
    def nbytes(self) -> int | None:
        return self.prepared.nbytes if self.prepared else None


def _try(prepare: Callable[[], Prepared]) -> _Outcome:
    try:
        prepared = prepare()
        return _Outcome(PASSED, error=prepared.check(), prepared=prepared)
    except WrongResult as wrong:
        return _Outcome(REFUSED, str(wrong))
    except Exception as error:  # whatever a library raises: its row says so, the others go on
        return _Outcome(FAILED, _first_line(error))


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}"


def _times(timing: Timing | None) -> dict[str, Any]:
    if timing is None:
        return {"seconds": None, "low": None, "high": None, "runs": 0}
    return {
        "seconds": timing.median,
        "low": timing.low,
        "high": timing.high,
        "runs": timing.runs,
    }
