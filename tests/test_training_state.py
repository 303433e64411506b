"""A run that was broken, at any named moment, ends as one that was never broken.

Killed from outside, at a moment that chance has a part in: test_resume.py.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training import (
    DATA,
    PAIRS,
    adapter_bytes,
    files_below,
    kill_when,
    log_lines,
    one_thread,  # noqa: F401
    options_of,
    run_cli,
    save_changed_model,
    start_cli,
    tiny_settings,
)

from qlora_ref import AdamW, add_lora, training_state
from qlora_ref.dispatch import force_backend
from qlora_ref.finetune import Result, StepLog, finetune
from qlora_ref.settings import Settings

LONG_RUN = {"steps": 8, "dropout": 0.1, "accumulation": 2}


class Broken(Exception):
    """Stands for whatever ends a run in the middle."""


@pytest.fixture(autouse=True)
def reference() -> Iterator[None]:
    with force_backend("reference"):
        yield


def break_run(settings: Settings, output: Path, after: int, save_every: int = 2) -> None:
    def stop(log: StepLog) -> None:
        if log.step == after:
            raise Broken

    with pytest.raises(Broken):
        finetune(settings, output, save_every=save_every, on_step=stop)


def facts(output: Path) -> tuple[list[dict[str, Any]], bytes, dict[str, Any]]:
    """What must be equal bit for bit: the log, the adapter, and the report but for the machine."""
    report = json.loads((output / "report.json").read_text())
    return (
        log_lines(output),
        adapter_bytes(output),
        {key: value for key, value in report.items() if key not in ("tokens_per_second", "memory")},
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("unbroken") / "run"
    code, _, err = run_cli(*command(output))
    assert code == 0, err
    return output


def command(output: Path, *more: str) -> list[str]:
    options = options_of(tiny_settings(**LONG_RUN))
    return ["finetune", "--output", str(output), "--save-every", "2", *options, *more]


def resume(output: Path) -> None:
    code, _, err = run_cli(*command(output, "--resume"))
    assert code == 0, err


def logged(output: Path) -> int:
    log = output / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def test_killed_while_it_writes_a_checkpoint_it_ends_with_the_same_bits(
    tmp_path: Path, unbroken: Path
) -> None:
    output = tmp_path / "run"
    # The second checkpoint's adapter is written, its training.pt is not.
    process = start_cli(*command(output), kill_in="torch.save", kill_at=2)
    process.communicate(timeout=120)
    assert process.returncode == -9
    assert list(output.glob(".checkpoint-000004.*.aside"))
    resume(output)
    assert not list(output.glob(".*"))  # the next one written cleans up
    assert facts(output) == facts(unbroken)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kill_in", "kill_at"),
    [
        ("safetensors.torch.save_file", 1),  # nothing of the first checkpoint is written
        ("os.fsync", 3),  # the first checkpoint is written, but not renamed
        ("os.replace", 4),  # the last of four checkpoints is whole, but not renamed
        ("shutil.rmtree", 1),  # the oldest checkpoint is to be removed
    ],
)
def test_killed_at_a_named_moment_it_ends_with_the_same_bits(
    tmp_path: Path, unbroken: Path, kill_in: str, kill_at: int
) -> None:
    output = tmp_path / "run"
    process = start_cli(*command(output), kill_in=kill_in, kill_at=kill_at)
    process.communicate(timeout=120)
    assert process.returncode == -9
    resume(output)
    assert facts(output) == facts(unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_again_and_again_it_ends_with_the_same_bits(
    tmp_path: Path, unbroken: Path, seed: int
) -> None:
    output, draw = tmp_path / "run", random.Random(seed)
    for _ in range(3):
        seen, delay = logged(output), draw.uniform(0.0, 0.6)
        process = start_cli(*command(output, "--resume"))
        kill_when(process, after_growth(output, seen, delay))
    resume(output)
    assert facts(output) == facts(unbroken)


def after_growth(output: Path, lines: int, delay: float) -> Callable[[], bool]:
    """True some seconds after the log has changed: training is under way then."""
    since: list[float] = []

    def moment() -> bool:
        if not since and logged(output) not in (0, lines):
            since.append(time.monotonic())
        return bool(since) and time.monotonic() - since[0] > delay

    return moment


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": "adamw_8bit", "schedule": "cosine", "group_by_length": False},
        {"packing": True, "gradient_checkpointing": False, "accumulation": 2},
        {"compute_dtype": "bfloat16", "rslora": True, "targets": ["q_proj", "v_proj"]},
    ],
)
def test_broken_and_resumed_it_ends_with_the_same_bits(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    settings = tiny_settings(steps=5, **options)
    finetune(settings, tmp_path / "unbroken", save_every=2)
    break_run(settings, tmp_path / "broken", after=3)
    finetune(settings, tmp_path / "broken", resume=True, save_every=2)
    assert facts(tmp_path / "broken") == facts(tmp_path / "unbroken")


def test_broken_in_a_later_epoch_it_goes_on_with_the_same_batches(tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(PAIRS.open().readlines()[:9]))  # 8 to train on: 4 steps an epoch
    settings = tiny_settings(steps=7, data=str(few))
    finetune(settings, tmp_path / "unbroken")
    break_run(settings, tmp_path / "broken", after=6, save_every=5)
    finetune(settings, tmp_path / "broken", resume=True, save_every=5)
    assert facts(tmp_path / "broken") == facts(tmp_path / "unbroken")


def test_resuming_without_a_checkpoint_starts_from_the_beginning(tmp_path: Path) -> None:
    settings, output = tiny_settings(), tmp_path / "broken"
    finetune(settings, tmp_path / "unbroken")
    break_run(settings, output, after=2, save_every=0)
    with open(output / "log.jsonl", "a") as file:
        file.write('{"step": 3, "lo')  # the line that was being written
    finetune(settings, output, resume=True)
    assert facts(output) == facts(tmp_path / "unbroken")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "run"
    finetune(tiny_settings(), output)
    return output


def test_resuming_a_finished_run_changes_no_bit(tmp_path: Path) -> None:
    first = finetune(tiny_settings(), tmp_path / "run")
    before = files_below(tmp_path / "run")
    again = finetune(tiny_settings(), tmp_path / "run", resume=True)
    assert (again.before, again.after, again.final_loss) == same(first)
    after = files_below(tmp_path / "run")
    before.pop("report.json"), after.pop("report.json")  # it holds measured memory
    assert after == before


def same(result: Result) -> tuple[Any, Any, float]:
    return result.before, result.after, result.final_loss


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"r": 8}, "r was 4 and is 8"),
        ({"learning_rate": 1e-3}, "learning_rate was 0.003 and is 0.001"),
        ({"codebook": "fp4"}, "codebook was 'nf4' and is 'fp4'"),
        ({"steps": 4}, "steps was 3 and is 4"),
        ({"data": str(DATA / "shakespeare.txt")}, "text_sha256 was"),
    ],
)
def test_other_settings_or_text_are_named_and_nothing_is_touched(
    finished: Path, changed: dict[str, Any], message: str
) -> None:
    before = files_below(finished)
    with pytest.raises(ValueError, match=f"is of another run: .*{message}"):
        finetune(tiny_settings(**changed), finished, resume=True)
    assert files_below(finished) == before


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a linear layer": lambda m: m.model.layers[1].mlp.up_proj.weight.data.mul_(1.5),
    "the embedding": lambda m: m.model.embed_tokens.weight.data.mul_(1.5),
    "the output head": lambda m: m.lm_head.weight.data.mul_(1.5),
    "a norm": lambda m: m.model.norm.weight.data.mul_(1.5),
}


@pytest.fixture(scope="module")
def finished_on_a_copy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("copy")
    source = save_changed_model(folder / "model", lambda model: None)
    finetune(tiny_settings(model=str(source), steps=1), folder / "run")
    return source, folder / "run"


@pytest.mark.parametrize("what", CHANGES)
def test_another_model_at_the_same_place_is_found_out(
    finished_on_a_copy: tuple[Path, Path], what: str
) -> None:
    source, output = finished_on_a_copy
    before = files_below(output)
    save_changed_model(source, CHANGES[what])
    with pytest.raises(ValueError, match="is of another run: base_sha256 was"):
        finetune(tiny_settings(model=str(source), steps=1), output, resume=True)
    assert files_below(output) == before


@pytest.mark.parametrize("name", ["training.pt", "adapter_model.safetensors", "run.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_a_damaged_checkpoint_is_named_and_nothing_is_touched(
    finished: Path, tmp_path: Path, name: str, damage: str
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    file = tmp_path / "run" / "checkpoint-000003" / name
    content = file.read_bytes()
    file.unlink()
    if damage != "gone":
        file.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    before = files_below(tmp_path / "run")
    with pytest.raises(ValueError, match=f"cannot read .*{name}"):
        finetune(tiny_settings(), tmp_path / "run", resume=True)
    assert files_below(tmp_path / "run") == before


def write_then_run_out(tensors: Any, path: Path, **options: Any) -> None:
    from safetensors import SafetensorError

    Path(path).write_bytes(b"half of it")
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def run_out(*arguments: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("where", "fake"),
    [("safetensors.torch.save_file", write_then_run_out), ("torch.save", run_out)],
)
def test_a_full_disk_leaves_the_checkpoint_before_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, fake: Callable[..., None]
) -> None:
    settings, output = tiny_settings(steps=4), tmp_path / "run"
    finetune(settings, tmp_path / "unbroken")
    break_run(settings, output, after=3)
    before = files_below(output / "checkpoint-000002")
    with monkeypatch.context() as patched:
        patched.setattr(where, fake)
        with pytest.raises(OSError, match="(?i)no space left"):
            finetune(settings, output, resume=True, save_every=2)
    assert files_below(output / "checkpoint-000002") == before
    assert not any("aside" in path.name for path in output.iterdir())
    finetune(settings, output, resume=True)
    assert facts(output) == facts(tmp_path / "unbroken")


def test_a_disk_that_is_really_full_says_so_in_one_line(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.call(["mount", "-t", "tmpfs", "-o", "size=1300k", "tmpfs", str(disk)]):
        pytest.skip("a small disk needs the right to mount one")
    try:
        settings, output = tiny_settings(steps=4), disk / "run"  # 0.5 MB a checkpoint
        with pytest.raises(OSError, match="(?i)no space left"):
            finetune(settings, output, save_every=1)
        assert [p.name for p in training_state.checkpoints(output)][-1] == "checkpoint-000002"
        assert not any("aside" in path.name for path in output.iterdir())
        subprocess.check_call(["mount", "-o", "remount,size=8m", str(disk)])
        finetune(settings, output, resume=True)
        finetune(settings, tmp_path / "unbroken")
        assert facts(output) == facts(tmp_path / "unbroken")
    finally:
        subprocess.check_call(["umount", str(disk)])


def test_the_random_generator_is_put_back(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    add_lora(model, r=2, targets=["0"])
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad])
    directory = training_state.save_state(tmp_path, 1, model, optimizer, {})
    expected = torch.rand(5)
    torch.manual_seed(99)
    training_state.load_state(directory, model, optimizer)
    assert torch.equal(torch.rand(5), expected)
