"""A paged AdamW: beside the unpaged with room for all; with a quarter of the room, beside a disk.

With a quarter of the room three run in turn: the file tier; state in mapped files that the kernel
reads and writes as it is touched, in a control group with as little memory; and the disk itself,
as many bytes read and written at once, from one end to the other. The control group needs
permission; without it the mapped files are left out.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from measure import parse_arguments, report

from qlora_ref import AdamW
from qlora_ref.benchmark.timing import medians
from qlora_ref.paging.files import PageFile, default_directory, memory

RESIDENT = 64 << 20
PRESSURE = 4
TENSORS = 32
TRANSFER = 4 << 20
# For what a process that is there already (that is not counted) does besides.
OVERHEAD = 32 << 20
STEPS = 5
ROUNDS = 3
UNPAGED = "unpaged"
PAGED, MAPPED, DISK = "file tier", "mapped files", "disk alone"


def parameters(n: int) -> list[torch.Tensor]:
    params = [torch.zeros(n // TENSORS, dtype=torch.bfloat16) for _ in range(TENSORS)]
    for param in params:
        param.requires_grad_()
        param.grad = torch.randn(param.shape).bfloat16()
    return params


def mapped_adamw(params: list[torch.Tensor], folder: Path) -> AdamW:
    """The unpaged optimizer, its state in files that are mapped and left to the kernel."""
    optimizer = AdamW(params)
    for number, param in enumerate(params):
        file = str(folder / f"state-{number}")
        state = torch.from_file(file, shared=True, size=2 * param.numel(), dtype=torch.float32)
        first, second = state.chunk(2)
        optimizer.state[param] = {"step": 0, "exp_avg": first, "exp_avg_sq": second}
    return optimizer


def seconds_a_step(optimizer: AdamW) -> float:
    """The median, after two steps that do not count: the first has nothing to read."""
    times = []
    for step in range(STEPS + 2):
        began = time.perf_counter()
        optimizer.step()
        if step > 1:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def disk_seconds(nbytes: int, folder: Path) -> float:
    """Time to read as many bytes and write as many, both at once, around the page cache."""
    file = PageFile(folder)
    read_from, write_to = file.grow(nbytes), file.grow(nbytes)
    offsets = range(0, nbytes, TRANSFER)
    buffers = [memoryview(memory(TRANSFER)) for _ in range(4)]

    def move(which: int) -> None:
        for offset in offsets[which // 2 :: 2]:
            if which % 2:
                file.read(buffers[which], read_from + offset)
            else:
                file.write(buffers[which], write_to + offset)

    for offset in offsets:
        file.write(buffers[0], read_from + offset)  # what was never written is not read either
    times = []
    with ThreadPoolExecutor(4) as pool:
        for _ in range(STEPS):
            began = time.perf_counter()
            list(pool.map(move, range(4)))
            times.append(time.perf_counter() - began)
    file.close()
    return statistics.median(times)


def limit_memory(nbytes: int) -> Path:
    """Put this process in a control group of its own. Raises OSError."""
    group = Path(f"/sys/fs/cgroup/memory/bench-{os.getpid()}")
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(nbytes))
    (group / "cgroup.procs").write_text(str(os.getpid()))
    return group


def run_one(kind: str, n: int) -> None:
    """In a process of its own, in a group with room for a quarter of the state."""
    params = parameters(n)
    AdamW(parameters(TENSORS)).step()  # imports what a first step does
    try:
        print(limit_memory(RESIDENT + OVERHEAD))
    except OSError:
        print("none")
        if kind == MAPPED:
            return
    folder = default_directory()
    if kind == PAGED:
        optimizer = AdamW(params, paged="file", resident_bytes=RESIDENT, page_directory=folder)
        print(seconds_a_step(optimizer))
        print(optimizer.paging_report())
    else:
        with tempfile.TemporaryDirectory(dir=folder) as directory:
            print(seconds_a_step(mapped_adamw(params, Path(directory))))


def in_a_process(kind: str, n: int) -> list[str]:
    program = [sys.executable, __file__, kind, str(n)]
    # More threads than there are cores would wait for each other: as many as here.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(program, capture_output=True, text=True, check=True, env=environment)
    lines = done.stdout.splitlines()
    if lines[0] != "none":
        Path(lines[0]).rmdir()
    return lines[1:]


def with_room(n: int, repeats: int) -> None:
    for bits in (32, 8):
        candidates = {UNPAGED: AdamW(parameters(n), state_bits=bits).step}
        room = 4 * n * (8 if bits == 32 else 3)
        candidates["paged"] = AdamW(
            parameters(n), state_bits=bits, paged=True, resident_bytes=room
        ).step
        nbytes = n * (6 + (16 if bits == 32 else 4))
        found = medians(candidates, repeats)
        report(f"AdamW with room for all, {bits}-bit state", found, nbytes, peer=UNPAGED)


def with_a_quarter(n: int) -> None:
    folder, streamed = default_directory(), 8 * n - RESIDENT // 2
    seconds: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        seconds.setdefault(DISK, []).append(disk_seconds(streamed, folder))
        for kind in (PAGED, MAPPED):
            printed = in_a_process(kind, n)
            if printed:
                seconds.setdefault(kind, []).append(float(printed[0]))
                print(*printed[1:], sep="")
    found = {name: statistics.median(values) for name, values in seconds.items()}
    title = f"{8 * n / 1e6:.0f} MB of 32-bit state, {RESIDENT / 1e6:.0f} MB resident, in {folder}"
    report(title, found, 2 * streamed, peer=MAPPED, limit=DISK, limit_bytes=2 * streamed)


def main() -> None:
    if len(sys.argv) == 3 and not sys.argv[1].startswith("-"):
        run_one(sys.argv[1], int(sys.argv[2]))
        return
    options = parse_arguments(__doc__ or "")
    n = PRESSURE * RESIDENT // 8
    with_room(n, options.repeats)
    with_a_quarter(n)


if __name__ == "__main__":
    main()
