"""The settings of a run: the schedule against transformers, the choice of a dtype, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from qlora_ref.settings import Settings, choose_dtype, learning_rate


def settings(**options: Any) -> Settings:
    return Settings(**{"model": "m", "data": "d", "learning_rate": 0.5, **options})


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize(("steps", "warmup"), [(50, 0.1), (50, 0.03), (7, 0.0), (3, 1.0), (1, 0.5)])
def test_the_rate_is_that_of_transformers_one_step_ahead_in_the_warm_up(
    schedule: str, steps: int, warmup: float
) -> None:
    """transformers spends its first step at rate 0, which changes nothing; here it counts."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    rising = math.ceil(warmup * steps)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    if schedule == "constant":
        theirs = transformers.get_constant_schedule_with_warmup(optimizer, rising)
    else:
        theirs = transformers.get_cosine_schedule_with_warmup(optimizer, rising, steps)
    factor = theirs.lr_lambdas[0]
    chosen = settings(steps=steps, warmup=warmup, schedule=schedule)
    for step in range(steps):
        expected = 0.5 * factor(step + 1 if step < rising else step)
        assert learning_rate(chosen, step) == pytest.approx(expected, rel=1e-12)


def test_every_step_has_a_rate_above_zero_and_none_above_the_peak() -> None:
    for schedule in ("constant", "cosine"):
        for steps in range(1, 30):
            chosen = settings(steps=steps, schedule=schedule)
            rates = [learning_rate(chosen, step) for step in range(steps)]
            assert all(0 < rate <= 0.5 for rate in rates) and max(rates) == 0.5


def test_a_dtype_is_chosen_by_name_or_by_what_the_device_multiplies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = torch.device("cpu")
    assert choose_dtype("float32", cpu) == torch.float32
    assert choose_dtype("bfloat16", cpu) == torch.bfloat16
    assert choose_dtype("float16", cpu) == torch.float16
    with pytest.raises(ValueError, match="must be auto, float32, bfloat16, float16, got 'int8'"):
        choose_dtype("int8", cpu)
    for native in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert choose_dtype("auto", cpu) == (torch.bfloat16 if native else torch.float32)


@pytest.mark.parametrize("name", ["steps", "batch_size", "accumulation", "evaluation_sequences"])
def test_counts_below_one_are_refused(name: str) -> None:
    for value in (0, -1):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got {value}"):
            settings(**{name: value})


@pytest.mark.parametrize("name", ["learning_rate", "max_grad_norm"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_rates_that_are_not_above_zero_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be above 0, got"):
        settings(**{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codebook": "nf5"}, "codebook must be one of nf4, .*, got 'nf5'"),
        ({"codebook": "none"}, "codebook must be one of nf4, .*, got 'none'"),
        ({"block_size": 3}, "block_size must be even and at least 2, got 3"),
        ({"block_size": 0}, "block_size must be even and at least 2, got 0"),
        ({"r": 0}, "r must be a whole number of at least 1, got 0"),
        ({"r": 2.5}, "r must be a whole number of at least 1, got 2.5"),
        ({"alpha": math.nan}, "alpha must be finite, got nan"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"dropout": math.nan}, "dropout must be at least 0 and below 1, got nan"),
        ({"beta2": 1.0}, "beta2 must be at least 0 and below 1, got 1.0"),
        ({"beta2": math.nan}, "beta2 must be at least 0 and below 1, got nan"),
        ({"weight_decay": -1}, "weight_decay must be at least 0, got -1"),
        ({"weight_decay": math.nan}, "weight_decay must be at least 0, got nan"),
        ({"held_out": 0.0}, "held_out is a share of the text, between 0 and 1, got 0.0"),
        ({"held_out": 1.0}, "held_out is a share of the text, between 0 and 1, got 1.0"),
        ({"length": 1}, "length must be at least 2, got 1"),
        ({"resident_bytes": -1}, "resident_bytes must be at least 1,048,576, got -1"),
    ],
)
def test_what_the_run_would_refuse_after_loading_is_refused_at_once(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**options)


def test_the_ends_of_the_ranges_are_allowed() -> None:
    least: dict[str, Any] = {"block_size": 2, "r": 1, "dropout": 0.0, "length": 2, "beta2": 0.0}
    settings(**least, weight_decay=0.0, alpha=-1.0, max_grad_norm=math.inf, resident_bytes=0)


@pytest.mark.parametrize("warmup", [-0.1, 1.1, math.nan])
def test_a_warm_up_that_is_no_share_is_refused(warmup: float) -> None:
    with pytest.raises(ValueError, match="warmup is a share"):
        settings(warmup=warmup)


@pytest.mark.parametrize("name", ["optimizer", "schedule", "compute_dtype"])
def test_names_outside_the_list_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .*got 'fp8'"):
        settings(**{name: "fp8"})
