"""The memory model: published sizes, the figures of the QLoRA paper, and what is measured here."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import as_json
from torch import nn
from training import qlora

import qlora_ref
from qlora_ref.finetune import enable_checkpointing
from qlora_ref.lora import count_parameters
from qlora_ref.memory import StepBytes, memory_report, step_bytes
from qlora_ref.memory_model import (
    FULL,
    Part,
    Prediction,
    build_without_storage,
    figure_6_bars,
    predict_memory,
    weight_parts,
)
from qlora_ref.model_sizes import CONFIGS, read_config
from qlora_ref.settings import Settings

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TINY = Path(__file__).parent / "data" / "tiny_llama"
NEAR = 0.10  # of a measured peak; what is left are rotary angles, masks and the scratch of kernels
MB = 1e6


def settings(**options: Any) -> Settings:
    common = {"model": "m", "data": "", "r": 64, "compute_dtype": "bfloat16", "dropout": 0.0}
    return Settings(**{**common, **options})


@functools.cache
def counted(name: str, double_quant: bool = True) -> tuple[int, int, int, dict[str, int]]:
    """Parameters, those in 4 bits, trained ones; bytes of the frozen model. As in the paper."""
    model = build_without_storage(
        CONFIGS[name], settings(double_quant=double_quant), torch.bfloat16
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parts = {part.name: part.nbytes for part in weight_parts(model)}
    return count_parameters(model) - trained, 2 * parts["4-bit codes"], trained, parts


# As published with the checkpoints, to the parameter.
PUBLISHED = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
}
# All seven linear layers of each block, r = 64: 64 (N + K) each.
TRAINED = {
    "llama-7b": 159_907_840,
    "llama-13b": 250_347_520,
    "llama-33b": 487_587_840,
    "llama-65b": 799_539_200,
}
BIG = [name for name in PUBLISHED if name not in ("llama-7b", "llama-3-8b")]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in BIG else []) for n in PUBLISHED],
)
def test_parameters_are_those_that_were_published(name: str) -> None:
    parameters, _, trained, _ = counted(name)
    assert parameters == PUBLISHED[name]
    assert trained == TRAINED.get(name, trained)


def test_sizes_that_name_no_number_of_their_own_are_those_they_repeat() -> None:
    assert CONFIGS["llama-2-7b"] == CONFIGS["llama-7b"]
    assert CONFIGS["llama-2-13b"] == CONFIGS["llama-13b"]


def test_llama_7b_takes_3_87_gb_and_not_3_5() -> None:
    parameters, quantised, _, parts = counted("llama-7b")
    assert quantised == 6_476_005_376
    frozen = sum(parts.values())
    assert frozen / 1e9 == pytest.approx(3.866, abs=5e-4)
    assert 4 * parameters / frozen == pytest.approx(6.97, abs=5e-3)  # and not 8 times less
    assert 2 * parameters / frozen == pytest.approx(3.49, abs=5e-3)


def test_double_quantisation_saves_302_mb_of_a_7b_model_and_not_315() -> None:
    with_it, without = (counted("llama-7b", nested)[3] for nested in (True, False))
    assert sum(without.values()) / 1e9 == pytest.approx(4.168, abs=5e-4)
    saved = without["scales"] - with_it["scales"]
    offsets = 4 * 7 * 32  # a mean in float32 for each layer, which 0.373 bits leave out
    assert saved + offsets == 6_476_005_376 * 0.373046875 / 8
    assert saved / MB == pytest.approx(302.0, abs=0.05)


def test_a_large_vocabulary_makes_llama_3_gain_less() -> None:
    parameters, _, _, parts = counted("llama-3-8b")
    assert 4 * parameters / sum(parts.values()) == pytest.approx(5.63, abs=5e-3)


@pytest.mark.slow
def test_llama_2_70b_on_48_gb_is_tight() -> None:
    parameters, quantised, trained, parts = counted("llama-2-70b")
    assert quantised / 1e9 == pytest.approx(68.45, abs=5e-3)
    frozen = sum(parts.values())
    assert frozen / 1e9 == pytest.approx(36.36, abs=5e-3)
    assert frozen / 2**30 == pytest.approx(33.87, abs=5e-3)
    # adapters and gradients in bfloat16, 8 bytes for Adam
    assert (frozen + 12 * trained) / 1e9 == pytest.approx(46.30, abs=5e-3)


@pytest.mark.slow
def test_llama_65b_is_7_58_times_smaller_and_saves_3_02_gb() -> None:
    parameters, quantised, _, parts = counted("llama-65b")
    assert quantised / 1e9 == pytest.approx(64.76, abs=5e-3)
    assert sum(parts.values()) / 1e9 == pytest.approx(34.46, abs=5e-3)
    assert 4 * parameters / sum(parts.values()) == pytest.approx(7.58, abs=5e-3)
    assert quantised * 0.373046875 / 8 / 1e9 == pytest.approx(3.020, abs=5e-4)


def test_780_gb_are_12_bytes_for_each_of_65_billion_parameters() -> None:
    assert sum(FULL.values()) * 65e9 == 780e9


# MiB, of figure 6 of the paper.
FIGURE_6 = {
    "llama-7b": (288, 1152),
    "llama-13b": (450, 1800),
    "llama-33b": (877.5, 3510),
    "llama-65b": (1440, 5760),
}


@pytest.mark.parametrize("name", FIGURE_6)
def test_the_bars_of_figure_6_that_can_be_derived(name: str) -> None:
    bars = figure_6_bars(CONFIGS[name])
    assert (bars["adapters"] / 2**20, bars["optimizer"] / 2**20) == FIGURE_6[name]
    assert TRAINED[name] / (bars["adapters"] / 2) == pytest.approx(1.06, abs=2e-3)


# Against what is measured


def measured(config: dict[str, Any], given: Settings) -> nn.Module:
    """The same model with storage, made by the same steps."""
    dtype = torch.float32 if given.compute_dtype == "float32" else torch.bfloat16
    made = transformers.AutoConfig.for_model(**config)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(made, dtype=dtype)
    qlora_ref.convert_model(model, double_quant=given.double_quant)
    qlora_ref.add_lora(model, given.r, dropout=given.dropout)
    if given.gradient_checkpointing:
        enable_checkpointing(model)
    return model


def a_batch(sequences: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(sequences * length).reshape(sequences, length) % 500
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


LLAMA = json.loads((TINY / "config.json").read_text())
GROUPED = {**LLAMA, "num_key_value_heads": 1, "num_hidden_layers": 2, "tie_word_embeddings": True}
GPT2 = {"model_type": "gpt2", "n_embd": 128, "n_layer": 3, "n_head": 4, "vocab_size": 512}
GPT2 |= {"attn_pdrop": 0.0}  # attention on the CPU keeps its weights if some are dropped
QWEN = {**LLAMA, "model_type": "qwen2", "num_hidden_layers": 3}


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama-float32": (LLAMA, {"compute_dtype": "float32"}),
    "llama-bfloat16-dropout": (LLAMA, {"compute_dtype": "bfloat16", "dropout": 0.1}),
    "one-kv-head-tied": (GROUPED, {"compute_dtype": "float32", "r": 8}),
    "gpt2": (GPT2, {"compute_dtype": "float32", "r": 8}),
    "qwen2-bias": (QWEN, {"compute_dtype": "bfloat16", "r": 8}),
}
# Each kind, and each way of holding activations, at least once in every run.
FAST = {
    *(("llama-float32", True), ("llama-bfloat16-dropout", False), ("one-kv-head-tied", True)),
    *(("gpt2", False), ("qwen2-bias", True)),
}


@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [
        pytest.param(kind, on, marks=[] if (kind, on) in FAST else [pytest.mark.slow])
        for kind in KINDS
        for on in (True, False)
    ],
)
def test_activations_and_peak_are_what_is_measured(kind: str, checkpointing: bool) -> None:
    config, options = KINDS[kind]
    given = settings(**options, batch_size=2, length=128, gradient_checkpointing=checkpointing)
    found = predict_memory(config, given).step
    real = step_bytes(measured(config, given), a_batch(2, 128))
    assert found.activations == pytest.approx(real.activations, rel=NEAR)
    assert found.peak == pytest.approx(real.peak, rel=NEAR)
    assert found.gradients == real.gradients


@pytest.mark.parametrize("optimizer", [pytest.param("adamw", marks=pytest.mark.slow), "adamw_8bit"])
def test_every_part_is_what_a_fine_tune_reports(optimizer: str) -> None:
    given = settings(compute_dtype="float32", r=8, optimizer=optimizer, batch_size=2, length=64)
    model = measured(LLAMA, given)
    trained = [p for p in model.parameters() if p.requires_grad]
    bits = 8 if optimizer == "adamw_8bit" else 32
    adamw = qlora_ref.AdamW(trained, state_bits=bits)
    batch = a_batch(2, 64)
    model.train()(**batch).loss.backward()
    adamw.step()
    adamw.zero_grad()
    real = {item.name: item.measured for item in memory_report(model, adamw, batch).items}
    parts = {part.name: part.nbytes for part in predict_memory(LLAMA, given).parts}
    for name in ("4-bit codes", "scales", "other weights", "adapters", "optimizer state"):
        assert parts[name] == real[name], name


_GROWTH = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_memory_model import LLAMA, a_batch, grown, measured, settings
from qlora_ref.memory import step_bytes

options = {"compute_dtype": "float32", "r": 8, "gradient_checkpointing": sys.argv[2] == "True"}
model = measured(LLAMA, settings(**options)).train()
step_bytes(model, a_batch(1, 32))  # what is loaded and allocated once is there after this
print(min(grown(lambda: step_bytes(model, a_batch(16, 256))) for _ in range(3)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_process_grows_by_what_is_predicted(checkpointing: bool) -> None:
    # What the system says, beside what our own counter does.
    command = [sys.executable, "-c", _GROWTH, str(Path(__file__).parent), str(checkpointing)]
    # Tensors are mapped, and unmapped when they go: the heap would keep what is free.
    variables = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    given = settings(
        compute_dtype="float32",
        r=8,
        batch_size=16,
        length=256,
        gradient_checkpointing=checkpointing,
    )
    predicted = predict_memory(LLAMA, given).step.peak
    assert predicted > 40 * MB
    assert int(done.stdout) == pytest.approx(predicted, rel=NEAR)


def grown(run: Any) -> int:
    """By how much the resident memory of this process rises at most while something runs."""
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is what it is now
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


# Paging, sizes of GPUs, the command


def test_paged_state_leaves_but_for_what_may_stay() -> None:
    given = settings(compute_dtype="float32", r=512, optimizer="paged_adamw", length=16)
    plain = predict_memory(LLAMA, settings(compute_dtype="float32", r=512, length=16))
    all_state = {part.name: part.nbytes for part in plain.parts}["optimizer state"]
    for resident in (1 << 20, 0):
        found = predict_memory(LLAMA, Settings(**{**vars(given), "resident_bytes": resident}))
        here = {part.name: part.nbytes for part in found.parts}["optimizer state"]
        assert here + found.elsewhere == all_state == 8 * plain.trainable
        assert (here == 1 << 20) == (resident > 0)  # 256 MiB hold all of it
        assert found.total == plain.total - found.elsewhere


def test_it_fits_where_there_is_room_for_it_and_the_reserve() -> None:
    found = predict_memory(LLAMA, settings(r=8, length=16))
    assert found.fits(0)[0] == 8 and found.fits(200 << 30) == []
    assert found.fits((16 << 30) - found.total)[0] == 16
    assert found.fits((16 << 30) - found.total + 1)[0] == 24


def test_the_command_prints_a_table_markdown_and_json(tmp_path: Path) -> None:
    what = ("memory", "--model", TINY, "--r", "8", "--length", "64")
    found = as_json(*what, "--plot", tmp_path / "bars")
    assert "16-bit weights" in (tmp_path / "bars.svg").read_text()
    assert found["total"] == sum(part["nbytes"] for part in found["parts"])
    assert found["full_16_bit"] == 12 * found["parameters"] and found["fits_gib"][0] == 8
    done = qlora(*what, "--markdown")
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert lines[1] == "|---|---:|---|"
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:-1]] == [
        part["name"] for part in found["parts"]
    ]
    done = qlora(*what, "--optimizer", "paged_adamw_8bit")
    assert done.returncode == 0 and "4-bit codes" in done.stdout and "GiB" in done.stdout


def test_bars_show_the_same_adapters_on_16_bit_weights_and_all_weights_trained() -> None:
    parts = [
        Part(name, i, "") for i, name in enumerate(("codes", "scales", "other", "adapters"), 1)
    ]
    step = StepBytes(0, 0, 0)
    found = Prediction("", parts, step, parameters=100, quantised=90, trainable=5, elsewhere=0)
    assert found.bars() == {
        "QLoRA": {"codes": 1, "scales": 2, "other": 3, "adapters": 4},
        "LoRA, 16 bits": {"16-bit weights": 200, "adapters": 4},
        "all, 16 bits": {"16-bit weights": 200, "gradients": 200, "optimizer state": 800},
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "llama-8b"), "no known model"),
        (("--model", str(TINY / "tokenizer.json")), "no model_type"),
        (("--model", str(TINY / "model.safetensors")), "no JSON"),
        (("--model", str(TINY), "--adapter-dtype", "int8"), "adapter_dtype"),
        (("--model", str(TINY), "--optimizer", "lion"), "optimizer must be one of"),
        (("--model", str(TINY), "--codebook", "nf5"), "nf5"),
        (("--model", str(TINY), "--json", "--markdown"), "exclude each other"),
    ],
)
def test_an_error_names_what_is_wrong(arguments: Any, message: str) -> None:
    done = qlora("memory", *arguments)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_a_model_that_cannot_be_built_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(ValueError, match="cannot build a causal language model"):
        predict_memory(read_config(tmp_path), settings())
