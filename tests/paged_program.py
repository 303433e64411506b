"""Steps an optimizer with 1 GiB of state, under a limit; test_paged_memory.py runs it.

    python tests/paged_program.py FOLDER {paged,unpaged} {none,data,cgroup} [STEPS]

The parameters are mapped from a file, as the weights of a model can be, and the gradients are one
number seen often: neither needs memory, so that the state decides. Prints JSON.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from qlora_ref import AdamW

STATE_BYTES = 1 << 30
LIMIT = 300_000_000
# Python with torch takes 270 MB of the limit by itself once an optimizer is made.
RESIDENT_BYTES = 8 << 20
TENSORS = 16


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def limit_data() -> None:
    """Private memory that can be written; mapped files do not count."""
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))


def limit_group() -> Path:
    """A new control group with this process in it: version 2 first, then 1. Raises OSError."""
    two = Path("/sys/fs/cgroup/cgroup.controllers")
    is_two = two.exists() and "memory" in two.read_text().split()
    root = Path("/sys/fs/cgroup" if is_two else "/sys/fs/cgroup/memory")
    group = root / f"qlora_ref-{os.getpid()}"
    group.mkdir()
    (group / ("memory.max" if is_two else "memory.limit_in_bytes")).write_text(str(LIMIT))
    (group / "cgroup.procs").write_text(str(os.getpid()))
    return group


@contextmanager
def highest_anonymous():
    """The most anonymous memory that was resident, looked at every few milliseconds."""
    most, done = [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            most[0] = max(most[0], status("RssAnon"))
            time.sleep(0.005)

    threading.stack_size(256 << 10)  # 8 MiB otherwise, of what is limited
    thread = threading.Thread(target=watch)
    thread.start()
    threading.stack_size(0)
    try:
        yield most
    finally:
        done.set()
        thread.join()


def parameters(folder: Path) -> list[nn.Parameter]:
    each = STATE_BYTES // 8 // TENSORS
    gradient = torch.full((1,), 0.01, dtype=torch.bfloat16)
    params = []
    for number in range(TENSORS):
        file = str(folder / f"parameters-{number}")
        values = torch.from_file(file, shared=True, size=each, dtype=torch.bfloat16)
        params.append(nn.Parameter(values))
        params[-1].grad = gradient.expand(each)
    return params


def main() -> None:
    folder, paged, limit = Path(sys.argv[1]), sys.argv[2] == "paged", sys.argv[3]
    steps = int(sys.argv[4]) if len(sys.argv) > 4 else 2
    params = parameters(folder)
    if limit == "data":
        limit_data()
    elif limit == "cgroup":
        print(limit_group(), flush=True)
    optimizer = AdamW(params, paged=paged, resident_bytes=RESIDENT_BYTES, page_directory=folder)
    before = status("RssAnon")
    with highest_anonymous() as most:
        for step in range(steps):
            optimizer.step()
            print(f"step {step + 1}", flush=True)
    report = optimizer.paging_report()
    facts = {
        "anonymous": most[0] - before,
        "bytes_in": report.counters.bytes_in if report else 0,
        "bytes_out": report.counters.bytes_out if report else 0,
        "streamed_bytes": report.streamed_bytes if report else 0,
        "values": [float(param.detach()[-1]) for param in params],
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
