"""What the tests of the fine-tune share: the tiny model, short texts, runs in other processes."""

from __future__ import annotations

import atexit
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from qlora_ref import Linear4bit
from qlora_ref.cli import main
from qlora_ref.dispatch import force_backend
from qlora_ref.lora import lora_layers
from qlora_ref.models import load_model
from qlora_ref.settings import Settings

REPOSITORY = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data"
TINY = DATA / "tiny_llama"
PAIRS = DATA / "devils_dictionary.jsonl"
PLAYS = DATA / "shakespeare.txt"

# Times and memory are facts about the machine; every other field of a log line is about the run.
MEASURED_FIELDS = ("tokens_per_second", "resident_bytes")

# Logits of about 10 in size after four layers of float32 sums in another order.
FLOAT32_LOGITS = 1e-4


@contextmanager
def on_one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from more threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Holds in every test module that imports it."""
    with on_one_thread():
        yield


@functools.cache
def few_pairs() -> str:
    """A file with the first tenth of the pairs: reading all takes longer than three steps."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    file = Path(folder) / "pairs.jsonl"
    file.write_text("".join(PAIRS.open().readlines()[:100]))
    return str(file)


def tiny_settings(**options: Any) -> Settings:
    """A run of about a second: three steps on pairs, dropout on, everything in float32."""
    defaults: dict[str, Any] = {
        "model": str(TINY),
        "data": few_pairs(),
        "compute_dtype": "float32",
        "steps": 3,
        "batch_size": 2,
        "length": 32,
        "dropout": 0.1,
        "r": 4,
        "alpha": 8.0,
        "learning_rate": 3e-3,
        "evaluation_sequences": 4,
    }
    return Settings(**{**defaults, **options})


def tiny_model() -> nn.Module:
    return load_model(TINY)


def some_ids(rows: int = 2, length: int = 16) -> Tensor:
    return torch.randint(3, 512, (rows, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    return model(input_ids=some_ids() if ids is None else ids).logits


def randomise_adapters(model: nn.Module) -> None:
    """Give B values, as training would: with B = 0 any mistake in an adapter goes unseen."""
    generator = torch.Generator().manual_seed(7)
    for adapter in lora_layers(model).values():
        for matrix in (adapter.lora_A.weight, adapter.lora_B.weight):
            matrix.data = 0.1 * torch.randn(matrix.shape, generator=generator)


def restored_weights(model: nn.Module) -> dict[str, Tensor]:
    """The dense float32 weight of every 4-bit layer, by the layer's name."""
    return {
        name: module.dequantize(torch.float32)
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit)
    }


def log_lines(output: Path) -> list[dict[str, Any]]:
    """log.jsonl without what is measured."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in MEASURED_FIELDS} for line in lines]


def adapter_bytes(output: Path) -> bytes:
    return (output / "adapter" / "adapter_model.safetensors").read_bytes()


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file's content: nothing may change in what a refused run found."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def options_of(settings: Settings) -> list[str]:
    """The settings as options of `qlora-ref finetune`."""
    from dataclasses import asdict

    options = []
    for name, value in asdict(settings).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            options.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            options += [f"--{flag}", str(value)]
    return options


# Runs the command line, and kills it just before the n-th call of a function.
_KILLER = """
import os, pkgutil, signal, sys
path, count, sys.argv = sys.argv[1], int(sys.argv[2]), ["qlora-ref", *sys.argv[3:]]
module, name = pkgutil.resolve_name(path.rpartition(".")[0]), path.rpartition(".")[2]
function, calls = getattr(module, name), []
def counted(*arguments, **options):
    if any("run" in str(a) for a in arguments) or name in ("fsync", "save"):
        calls.append(name)
    if len(calls) == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments, **options)
setattr(module, name, counted)
from qlora_ref.cli import main
main()
"""


def start_cli(*arguments: str, kill_in: str = "", kill_at: int = 1) -> subprocess.Popen[str]:
    """The command line in a process of its own: one thread, reference backend, no network."""
    fixed = {"OMP_NUM_THREADS": "1", "QLORA_REF_BACKEND": "reference", "HF_HUB_OFFLINE": "1"}
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    start = ["-c", _KILLER, kill_in, str(kill_at)] if kill_in else ["-m", "qlora_ref.cli"]
    return subprocess.Popen(
        [sys.executable, *start, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **fixed, "PYTHONPATH": path},
    )


def run_cli(*arguments: str) -> tuple[int, str, str]:
    """The same in this process, to its end."""
    with force_backend("reference"):
        done = qlora(*arguments)
    return done.returncode, done.stdout, done.stderr


def qlora(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command line in this process, which has torch and transformers loaded already."""
    command = ["qlora-ref", *map(str, arguments)]
    out, err, code = io.StringIO(), io.StringIO(), None
    with (
        on_one_thread(),
        mock.patch.object(sys, "argv", command),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as leaving:
            code = leaving.code
    return subprocess.CompletedProcess(command, int(code or 0), out.getvalue(), err.getvalue())


def kill_when(process: subprocess.Popen[str], moment: Callable[[], bool]) -> bool:
    """SIGKILL a process as soon as `moment()`; False if it ended by itself before."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if moment():
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.0005)
    process.communicate(timeout=60)
    return process.returncode == -signal.SIGKILL


def save_changed_model(directory: Path, change: Callable[[Any], None]) -> Path:
    """The tiny model with something changed, and its tokenizer, as transformers saves them."""
    model: Any = tiny_model()
    change(model)
    model.save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / file, directory / file)
    return directory
