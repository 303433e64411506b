"""A run that was killed with kill -9 ends, resumed, with the bits of one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from training import PAIRS, REPOSITORY, TINY, run_cli

pytestmark = pytest.mark.slow  # killed at a named moment: test_training_state.py

STEPS = 8
TIMEOUT = 240  # seconds until a run is taken to hang; one takes 10 to 20 on a busy core


def arguments(output: Path, *more: str) -> list[str]:
    command = ["finetune", "--model", str(TINY), "--data", str(PAIRS), "--output", str(output)]
    command += ["--steps", str(STEPS), "--batch-size", "2", "--length", "64"]
    command += ["--learning-rate", "3e-3", "--evaluation-sequences", "4", "--dropout", "0.1"]
    return [*command, "--compute-dtype", "float32", "--save-every", "2", *more]


def start(output: Path, *more: str) -> subprocess.Popen[str]:
    """A run in a process of its own, which can be killed."""
    command = [sys.executable, "-m", "qlora_ref.cli", *arguments(output, *more)]
    # One thread and one backend: the promise is for the reference on the CPU.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "QLORA_REF_BACKEND": "reference"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, cwd=REPOSITORY, **pipes)


def complete(output: Path, *more: str) -> None:
    """A run in this process, to its end."""
    code, _, err = run_cli(*arguments(output, *more))
    assert code == 0, err


def kill_when(process: subprocess.Popen[str], moment: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT
    while not moment() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    assert process.poll() is None, "the run ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.communicate()


def logged(output: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    unmeasured = ("step", "loss", "learning_rate", "grad_norm", "tokens")
    return [{key: line[key] for key in unmeasured} for line in lines]


def outcome(output: Path) -> tuple[bytes, float, list[dict[str, float]]]:
    report = json.loads((output / "report.json").read_text())
    adapter = (output / "adapter" / "adapter_model.safetensors").read_bytes()
    return adapter, report["perplexity_after"], logged(output)


def steps_logged(output: Path, count: int) -> bool:
    log = output / "log.jsonl"
    return log.exists() and len(log.read_text().splitlines()) >= count


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, float, list[object]]:
    output = tmp_path_factory.mktemp("unbroken") / "run"
    complete(output)
    return outcome(output)  # type: ignore[return-value]


def break_and_resume(output: Path, moment: Callable[[], bool]) -> None:
    kill_when(start(output), moment)
    complete(output, "--resume")


def test_killed_between_checkpoints_it_ends_with_the_same_bits(
    tmp_path: Path, unbroken: object
) -> None:
    output = tmp_path / "run"
    break_and_resume(output, lambda: steps_logged(output, 5))
    assert outcome(output) == unbroken


@pytest.mark.parametrize("count", [1, 3, 7])
def test_killed_after_any_step_it_ends_with_the_same_bits(
    tmp_path: Path, unbroken: object, count: int
) -> None:
    output = tmp_path / "run"
    break_and_resume(output, lambda: steps_logged(output, count))
    assert outcome(output) == unbroken


def test_killed_while_it_writes_a_checkpoint_it_ends_with_the_same_bits(
    tmp_path: Path, unbroken: object
) -> None:
    output = tmp_path / "run"
    break_and_resume(output, lambda: any(output.glob(".checkpoint-000004.*.aside")))
    assert outcome(output) == unbroken
    assert not list(output.glob(".*.aside"))  # what the killed process left is cleaned up


def test_killed_twice_it_ends_with_the_same_bits(tmp_path: Path, unbroken: object) -> None:
    output = tmp_path / "run"
    kill_when(start(output), lambda: steps_logged(output, 3))
    kill_when(start(output, "--resume"), lambda: steps_logged(output, 6))
    complete(output, "--resume")
    assert outcome(output) == unbroken


def test_resuming_a_complete_run_changes_no_bit(tmp_path: Path, unbroken: object) -> None:
    output = tmp_path / "run"
    complete(output)
    complete(output, "--resume")
    assert outcome(output) == unbroken
