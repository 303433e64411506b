"""Candidates timed in turn: what else the machine does then hits all of them alike."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Run = Callable[[], object]

FEWEST_ROUNDS = 3  # that a budget leaves
_SECONDS_TO_STEADY = 0.01  # longer than GNU OpenMP's threads spin before they sleep
_FLUSH_BYTES = 512 << 20  # written before each run on a GPU; several times any L2 cache


@dataclass(frozen=True)
class Timing:
    """Seconds of one candidate: the median of its runs, and their quartiles."""

    median: float
    low: float
    high: float
    runs: int

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, as a share of the median."""
        return (self.high - self.low) / 2 / self.median


def time_in_turn(
    runs: Mapping[str, Run],
    repeats: int,
    device: torch.device | str = "cpu",
    steady: bool = False,
    budget: float = math.inf,
) -> dict[str, Timing]:
    """Time each candidate once a round, for `repeats` rounds; a first round warms up.

    The order is another one each round: none always finds the caches as the same other one leaves
    them.

    steady  on the CPU: time each after it has run for 10 ms. The caches are then as it leaves them
            itself, and the threads of the others, which wait for work on the same cores, asleep
    budget  seconds after which no further round begins, once there are three
    """
    stopwatch = _on_gpu(torch.device(device)) if torch.device(device).type == "cuda" else _on_cpu
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    shuffle = random.Random(0)
    began = time.perf_counter()
    for round_ in range(repeats + 1):
        if round_ > FEWEST_ROUNDS and time.perf_counter() - began > budget:
            break
        readings = {}
        for name in shuffle.sample(list(runs), len(runs)):
            if steady:
                _run_for(_SECONDS_TO_STEADY, runs[name])
            readings[name] = stopwatch(runs[name])
        for name, read in readings.items():
            if round_ > 0:
                seconds[name].append(read())
    return {name: _summary(values) for name, values in seconds.items()}


def medians(runs: Mapping[str, Run], repeats: int, steady: bool = True) -> dict[str, float]:
    """The median seconds alone, of candidates that run on the CPU. See `time_in_turn`."""
    return {
        name: timing.median for name, timing in time_in_turn(runs, repeats, steady=steady).items()
    }


def _run_for(seconds: float, run: Run) -> None:
    began = time.perf_counter()
    run()
    while time.perf_counter() - began < seconds:
        run()


def _on_cpu(run: Run) -> Callable[[], float]:
    began = time.perf_counter()
    run()
    seconds = time.perf_counter() - began
    return lambda: seconds


def _on_gpu(device: torch.device) -> Callable[[Run], Callable[[], float]]:
    """Times between two events in the stream, with a cold L2 cache.

    The host goes on while the cache is flushed, so that what Python needs to launch the run is
    hidden unless it takes longer than that. Nothing waits before the end of a round.
    """
    trash = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def stopwatch(run: Run) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        trash.zero_()
        start.record()
        run()
        end.record()

        def read() -> float:
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        return read

    return stopwatch


def _summary(values: list[float]) -> Timing:
    low, high = values[0], values[0]
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(statistics.median(values), low, high, len(values))
