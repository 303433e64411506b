"""What the benchmarks here share: options, the peer, and how a result is printed.

How candidates are timed, and which backends there are, is in qlora_ref.benchmark: `qlora-ref bench`
is the same for those who have no copy of the sources. The files here look closer: at outputs that
are reused, at one thread and several, at what Python adds.

Candidates run interleaved, in another order each time, and the median counts: other work on the
machine then hits all of them alike. Bytes per second stand beside those that the memory allows,
measured in the same run. What fits the caches can exceed them.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

PEER = "bitsandbytes"
COPY, READ, WRITE = "copy", "read", "write"  # what only moves memory, to compare with
MEMORY_BYTES = 256 << 20  # that each of these moves: several times what caches hold


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


def memory_candidate(kind: str) -> Callable[[], object]:
    """Read MEMORY_BYTES, or write them, or do both with half of them."""
    if kind == COPY:
        source, target = torch.ones(2, MEMORY_BYTES // 2, dtype=torch.uint8)
        return lambda: target.copy_(source)
    memory = torch.ones(MEMORY_BYTES, dtype=torch.uint8)
    if kind == READ:
        return memory.view(torch.int32).max
    pool = ThreadPoolExecutor()
    # The C library writes such lengths past the caches; torch would have them read first.
    return lambda: list(pool.map(_set, memory.chunk(torch.get_num_threads())))


def _set(memory: Tensor) -> None:
    ctypes.memset(memory.data_ptr(), 1, memory.nbytes)


def report(
    title: str,
    found: dict[str, float],
    nbytes: int,
    flops: int = 0,
    peer: str = PEER,
    limit: str = COPY,
    limit_bytes: int = MEMORY_BYTES,
) -> None:
    """Print a table: time, bytes and operations a second, how many times slower than the best.

    nbytes  what each candidate reads and writes
    peer    the candidate whose time is divided by that of each, in the column of that name
    limit   the candidate that only moves memory, `limit_bytes` of it; of its speed the others
            reach a share
    """
    print(f"{title}; {torch.get_num_threads()} thread(s), medians")
    best = min(value for name, value in found.items() if name != limit)
    print(f"{'':<16}{'ms':>10}{'GB/s':>9}{'GFLOP/s':>10}{'x best':>9}{'of ' + limit:>9}  {peer}")
    for name, seconds in found.items():
        rate = f"{flops / seconds / 1e9:.1f}" if flops and name != limit else ""
        ratio = f"{found[peer] / seconds:.2f}" if peer in found and name != limit else ""
        speed = (limit_bytes if name == limit else nbytes) / seconds
        share = f"{speed / (limit_bytes / found[limit]):.0%}" if limit in found else ""
        print(
            f"{name:<16}{seconds * 1e3:>10.3f}{speed / 1e9:>9.2f}{rate:>10}"
            f"{seconds / best:>9.2f}{share:>9}  {ratio}"
        )
