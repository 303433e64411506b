"""Where a training run stands: written so that a killed run goes on as if it had not been.

    <output>/checkpoint-000020/adapter_*      the adapter (adapter.py)
    <output>/checkpoint-000020/training.pt    optimizer state and the state of the random generators
    <output>/checkpoint-000020/run.json       the step, the settings, fingerprints of base and text

A checkpoint is written aside and renamed: one that is there is whole. The position in the data is
the step, since batches are a function of the seed and the step (data.BatchOrder).
"""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_ref.adapter import (
    fingerprint_tensors,
    load_adapter_tensors,
    read_adapter_tensors,
    write_adapter,
)
from qlora_ref.files import written_aside

_KEPT_CHECKPOINTS = 2


def save_state(
    output: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    identity: dict[str, Any],
    base: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint after `step` steps; the two newest are kept.

    identity  what a run that resumes must share: settings, fingerprints
    base      see adapter.save_adapter
    Raises OSError when the disk is full; the checkpoints before stay as they are.
    """
    directory = output / f"checkpoint-{step:06d}"
    state = {"optimizer": optimizer.state_dict(), "random": _random_state()}
    with written_aside(directory) as aside:
        aside.mkdir()
        write_adapter(model, aside, identity.get("model", ""), base)
        with open(aside / "training.pt", "wb") as file:  # given a path, torch hides the OSError
            torch.save(state, file)
        (aside / "run.json").write_text(json.dumps({"step": step, **identity}, indent=2) + "\n")
    for old in checkpoints(output)[:-_KEPT_CHECKPOINTS]:
        shutil.rmtree(old)
    return directory


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints in an output directory, the newest last."""
    return sorted(output.glob("checkpoint-" + "[0-9]" * 6))


def check_identity(directory: Path, identity: dict[str, Any]) -> int:
    """The step of a checkpoint, if it is of the same run; else ValueError, naming what differs."""
    try:
        saved = json.loads((directory / "run.json").read_text())
        step = int(saved["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cannot read {directory / 'run.json'}: {error}") from error
    differing = [
        f"{key} was {saved.get(key)!r} and is {identity.get(key)!r}"
        for key in sorted(identity.keys() | (saved.keys() - {"step"}))
        if saved.get(key) != identity.get(key)
    ]
    if differing:
        raise ValueError(
            f"{directory} is of another run: {'; '.join(differing)}. "
            "Resume with the settings it was made with, or choose another output directory"
        )
    return step


def load_state(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put model, optimizer and random generators where `save_state` found them."""
    tensors = read_adapter_tensors(directory)
    try:
        state = torch.load(directory / "training.pt", weights_only=True)
        optimizer_state, random = state["optimizer"], state["random"]
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError) as error:
        raise ValueError(f"cannot read {directory / 'training.pt'}: {error}") from error
    load_adapter_tensors(model, tensors, str(directory))
    optimizer.load_state_dict(optimizer_state)
    torch.set_rng_state(random["cpu"])
    if random["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(random["cuda"])


def fingerprint_base(model: nn.Module) -> str:
    """SHA-256 over the frozen tensors of a model: is it the same base, quantised alike?"""
    return fingerprint_tensors(
        (key, tensor) for key, tensor in model.state_dict().items() if ".lora_" not in key
    )


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}
