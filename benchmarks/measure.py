"""What every benchmark here does: check the results, time the candidates in turn, print ratios.

Candidates run interleaved, many times, and the median counts: other work on the machine then hits
all of them alike. Bytes per second stand beside those of a plain copy measured in the same run.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from qlora_ref.dispatch import BACKENDS, explain, force_backend

PEER = "bitsandbytes"
COPY = "copy"  # the memory bandwidth to compare with: as many bytes, copied


def parse_arguments(description: str) -> argparse.Namespace:
    """The options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rows", type=int, default=4096, help="N")
    parser.add_argument("--columns", type=int, default=4096, help="K")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    return options


def each_thread_count() -> Iterator[int]:
    """One thread, then as many as were asked for; torch's number is set to each in turn."""
    most = torch.get_num_threads()
    for threads in sorted({1, most}):
        torch.set_num_threads(threads)
        yield threads


def each_backend(operation: str, call: Callable[[], object]) -> dict[str, Callable[[], object]]:
    """The call under every backend that can run the operation on the CPU, by name."""

    def forced(backend: str) -> Callable[[], object]:
        def run() -> object:
            with force_backend(backend):
                return call()

        return run

    reasons = explain(operation, "cpu").reasons
    there = [name for name in BACKENDS if reasons[name] == "runs" or "comes first" in reasons[name]]
    return {name: forced(name) for name in there}


def bitsandbytes_is_installed() -> bool:
    """Whether the peer can be compared with."""
    return importlib.util.find_spec("bitsandbytes") is not None


def copy_candidate(nbytes: int) -> Callable[[], object]:
    """Read and write `nbytes` in all: half of them into a buffer that is reused."""
    source = torch.zeros(nbytes // 2, dtype=torch.uint8)
    target = torch.ones_like(source)
    return lambda: target.copy_(source)


def medians(
    candidates: dict[str, Callable[[], object]], repeats: int, steady: bool = False
) -> dict[str, float]:
    """Median seconds of each candidate, run in turn; a first round warms up and does not count.

    steady  run each twice and time the second: the caches are then as it leaves them itself
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(repeats + 1):
        for name, run in candidates.items():
            if steady:
                run()
            began = time.perf_counter()
            run()
            if round_ > 0:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def report(
    title: str,
    found: dict[str, float],
    nbytes: int,
    flops: int = 0,
    peer: str = PEER,
    limit: str = COPY,
) -> None:
    """Print a table: time, bytes and operations a second, how many times slower than the best.

    peer   the candidate whose time is divided by that of each, in the column of that name
    limit  the candidate that only moves memory; of its speed the others reach a share
    """
    print(f"{title}; {torch.get_num_threads()} thread(s), medians")
    best = min(value for name, value in found.items() if name != limit)
    print(f"{'':<16}{'ms':>10}{'GB/s':>9}{'GFLOP/s':>10}{'x best':>9}{'of ' + limit:>9}  {peer}")
    for name, seconds in found.items():
        rate = f"{flops / seconds / 1e9:.1f}" if flops and name != limit else ""
        ratio = f"{found[peer] / seconds:.2f}" if peer in found and name != limit else ""
        share = f"{found[limit] / seconds:.0%}" if limit in found else ""
        print(
            f"{name:<16}{seconds * 1e3:>10.3f}{nbytes / seconds / 1e9:>9.2f}{rate:>10}"
            f"{seconds / best:>9.2f}{share:>9}  {ratio}"
        )
