"""What a fine-tune is made of, checked before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch

from qlora_ref.checks import check_block_size
from qlora_ref.codebooks import CODEBOOKS
from qlora_ref.paging.tier import page_size

# name -> bits of its state, and whether that is paged
OPTIMIZERS = {
    "adamw": (32, False),
    "adamw_32bit": (32, False),
    "adamw_8bit": (8, False),
    "paged_adamw": (32, True),
    "paged_adamw_32bit": (32, True),
    "paged_adamw_8bit": (8, True),
}
SCHEDULES = ("constant", "cosine")
INITS = ("zero", "loftq", "pissa")
COMPUTE_DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class Settings:
    """What a fine-tune is made of. Lengths are in tokens, sizes of batches in sequences."""

    model: str
    data: str
    codebook: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    scale_search: bool = False
    calibration: str = ""  # text for error feedback; "": the nearest levels
    calibration_sequences: int = 128
    compute_dtype: str = "auto"  # auto, float32 or bfloat16
    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    rslora: bool = False
    targets: str | list[str] = "all-linear"
    init: str = "zero"  # zero, loftq or pissa: where adapters start
    init_iterations: int = 5
    steps: int = 100
    batch_size: int = 1
    accumulation: int = 1
    length: int = 512
    packing: bool = False
    group_by_length: bool = True
    learning_rate: float = 2e-4
    schedule: str = "constant"
    warmup: float = 0.03  # share of the steps over which the learning rate rises
    max_grad_norm: float = 0.3
    weight_decay: float = 0.0
    beta2: float = 0.999
    optimizer: str = "adamw"
    resident_bytes: int = 0  # what pages of a paged optimizer may occupy; 0: AdamW's default
    page_directory: str = ""  # where they are on the CPU; "": AdamW's default
    gradient_checkpointing: bool = True
    held_out: float = 0.1  # share of the text
    evaluation_sequences: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        _check_settings(self)

    @property
    def plain_base(self) -> bool:
        """Whether `convert_model` with codebook, block size and double_quant gives the base."""
        return self.init == "zero" and not self.scale_search and not self.calibration


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype of a name; "auto" is bfloat16 where the device multiplies it natively."""
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name in named:
        return named[name]
    if name != "auto":
        raise ValueError(f"a compute dtype must be auto, {', '.join(named)}, got {name!r}")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def learning_rate(settings: Settings, step: int) -> float:
    """The learning rate of a step, from 0: linear warm-up, then constant or half a cosine."""
    warmup = math.ceil(settings.warmup * settings.steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    if settings.schedule == "constant":
        return settings.learning_rate
    progress = (step - warmup) / max(1, settings.steps - warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def check_adapter(r: int, alpha: float, dropout: float) -> None:
    """Raises ValueError for what no adapter can have; see lora.LoRA."""
    if not isinstance(r, int) or r < 1:
        raise ValueError(f"r must be a whole number of at least 1, got {r!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite, got {alpha}")


def _check_settings(settings: Settings) -> None:
    choices: dict[str, Collection[str]] = {"codebook": CODEBOOKS, "compute_dtype": COMPUTE_DTYPES}
    choices |= {"optimizer": OPTIMIZERS, "schedule": SCHEDULES, "init": INITS}
    for name, allowed in choices.items():
        if getattr(settings, name) not in allowed:
            raise ValueError(
                f"{name} must be one of {', '.join(allowed)}, got {getattr(settings, name)!r}"
            )
    counts = ["steps", "batch_size", "accumulation", "evaluation_sequences"]
    counts += ["calibration_sequences", "init_iterations"]
    # Two tokens: one, and the next to predict.
    for name, least in {**dict.fromkeys(counts, 1), "length": 2, "weight_decay": 0}.items():
        if not getattr(settings, name) >= least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(settings, name)}")
    for name in ("learning_rate", "max_grad_norm"):
        if not getattr(settings, name) > 0:
            raise ValueError(f"{name} must be above 0, got {getattr(settings, name)}")
    if not 0 <= settings.warmup <= 1:
        raise ValueError(f"warmup is a share of the steps, from 0 to 1, got {settings.warmup}")
    if not 0 < settings.held_out < 1:
        raise ValueError(
            f"held_out is a share of the text, between 0 and 1, got {settings.held_out}"
        )
    if not 0 <= settings.beta2 < 1:
        raise ValueError(f"beta2 must be at least 0 and below 1, got {settings.beta2}")
    check_block_size(settings.block_size)
    check_adapter(settings.r, settings.alpha, settings.dropout)
    if settings.resident_bytes != 0:
        page_size(settings.resident_bytes)  # raises ValueError where that is too little
    _check_base(settings)


def _check_base(settings: Settings) -> None:
    keeps_base = settings.init == "zero" or (settings.init, settings.init_iterations) == (
        "loftq",
        1,
    )
    if settings.calibration and not keeps_base:
        raise ValueError(
            f"init={settings.init!r} quantises the base anew, without the calibration text: "
            'use init="loftq" with init_iterations=1, which leaves it as it is'
        )
