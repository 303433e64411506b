"""1 GiB of state under a limit of 300 MB, and kill -9 in the middle: in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import paged_program
import pytest
from paged_program import LIMIT, RESIDENT_BYTES, STATE_BYTES
from training import (
    adapter_bytes,
    log_lines,
    one_thread,  # noqa: F401
    options_of,
    run_cli,
    start_cli,
    tiny_settings,
)

from qlora_ref.paging.files import default_directory

REPOSITORY = Path(__file__).parents[1]
# For what the first step imports, and the stacks of threads.
OVERHEAD = 64 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """On a disk, which the temporary files of the tests need not be; empty at the end."""
    path = default_directory() / f"qlora_ref-test-{os.getpid()}"
    path.mkdir()
    yield path
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


def start(folder: Path, paged: str, limit: str, steps: int = 2) -> subprocess.Popen[str]:
    program = [sys.executable, paged_program.__file__, str(folder), paged, limit, str(steps)]
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        program,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def assert_finished_as_promised(out: str) -> None:
    facts = json.loads(out.splitlines()[-1])
    assert facts["anonymous"] < RESIDENT_BYTES + OVERHEAD
    # Half of the resident bytes stays; the rest is written in both steps, and read in the second.
    streamed = STATE_BYTES - RESIDENT_BYTES // 2
    assert facts["streamed_bytes"] == facts["bytes_in"] == streamed
    assert streamed < facts["bytes_out"] <= 2 * streamed  # the last pages may be on their way
    # All parameters and gradients are alike, so that all steps are.
    assert len(set(facts["values"])) == 1 and facts["values"][0] != 0


def test_paged_finishes_where_data_is_limited_and_unpaged_does_not(folder: Path) -> None:
    code, out, err = finish(start(folder, "paged", "data"))
    assert code == 0, err
    assert_finished_as_promised(out)
    code, out, err = finish(start(folder, "unpaged", "data"))
    assert code == 1 and "step" not in out and "memory" in err


def test_paged_finishes_in_a_control_group_that_kills_the_unpaged(folder: Path) -> None:
    group = None
    try:
        code, out, err = finish(start(folder, "paged", "cgroup"))
        if code != 0 and "cgroup" in err:
            pytest.skip("this process may not make a control group that limits memory")
        assert code == 0, err
        group = Path(out.splitlines()[0])
        assert_finished_as_promised(out)
        most = group / "memory.max_usage_in_bytes"  # version 1 alone has it
        assert not most.exists() or int(most.read_text()) <= LIMIT
        group.rmdir()
        code, out, err = finish(start(folder, "unpaged", "cgroup"))
        group = Path(out.splitlines()[0])
        assert code == -9 and "step" not in out  # by the kernel
    finally:
        if group is not None and group.exists():
            group.rmdir()


def test_killed_in_the_middle_of_a_step_it_leaves_no_file(folder: Path) -> None:
    process = start(folder, "paged", "none", steps=1000)
    assert process.stdout is not None and process.stdout.readline() == "step 1\n"
    free = os.statvfs(folder).f_bavail
    time.sleep(0.3)  # half a second or more is a step
    process.kill()
    process.communicate(timeout=60)
    names = {file.name for file in folder.iterdir()}
    assert names == {f"parameters-{number}" for number in range(paged_program.TENSORS)}
    given_back = (os.statvfs(folder).f_bavail - free) * os.statvfs(folder).f_frsize
    assert given_back > STATE_BYTES  # both places of each page, less what others took meanwhile


def test_finetune_killed_in_a_paged_step_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    # 5 MB of state in 32 bits: more than may be resident, so that pages come and go.
    settings = tiny_settings(steps=4, r=64, optimizer="paged_adamw_32bit", resident_bytes=1 << 20)

    def command(output: Path, *more: str) -> list[str]:
        options = [*options_of(settings), "--save-every", "2"]
        return ["finetune", "--output", str(output), *options, *more]

    code, _, err = run_cli(*command(tmp_path / "whole"))
    assert code == 0, err
    broken = tmp_path / "broken"
    process = start_cli(*command(broken), kill_in="qlora_ref.paging.undo.Undo.save", kill_at=200)
    process.communicate(timeout=120)
    assert process.returncode == -9 and len(log_lines(broken)) in (2, 3)
    code, _, err = run_cli(*command(broken, "--resume"))
    assert code == 0, err
    assert log_lines(broken) == log_lines(tmp_path / "whole")
    assert adapter_bytes(broken) == adapter_bytes(tmp_path / "whole")
