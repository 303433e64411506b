"""What a fine-tune will need, worked out from the configuration of a model alone.

The model is built on PyTorch's meta device, where tensors have shapes and no storage; it is
converted, given adapters and run as finetune.py does, and every tensor that this makes is counted
with the counter that measures real ones (memory.py). So it holds for any architecture, and for the
code as it is. docs/memory.md has the formulas that come out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_ref.convert import convert_model
from qlora_ref.finetune import enable_checkpointing
from qlora_ref.lora import add_lora, count_parameters
from qlora_ref.memory import LiveTensors, StepBytes, step_bytes
from qlora_ref.module4bit import layers_4bit
from qlora_ref.optim import adamw_fields
from qlora_ref.paged import DEFAULT_RESIDENT_BYTES, is_large
from qlora_ref.paging.layout import state_bytes
from qlora_ref.settings import OPTIMIZERS, Settings

# Memory of graphics cards on sale since 2018, in GiB; what is called 141 GB has 140 GiB.
GPU_SIZES = (8, 11, 12, 16, 24, 32, 40, 48, 64, 80, 96, 140)
# A parameter that is trained in 16 bits.
FULL = {"16-bit weights": 2, "gradients": 2, "optimizer state": 8}


@dataclass(frozen=True)
class Part:
    """Bytes of one kind on the device, and how they come about."""

    name: str
    nbytes: int
    formula: str


@dataclass(frozen=True)
class Prediction:
    """What a fine-tune needs.

    parts        what is on the device at the same time, when most is; `total` is their sum
    step         what a step holds: activations, gradients, and the peak of both
    parameters   of the model as it was, values
    quantised    those that are in 4 bits
    trainable    of the adapters
    elsewhere    bytes of optimizer state that are paged out, at most
    """

    model: str
    parts: list[Part]
    step: StepBytes
    parameters: int
    quantised: int
    trainable: int
    elsewhere: int

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(part.nbytes for part in self.parts)

    @property
    def weights(self) -> int:
        """Bytes of the frozen model: codes, scales and what is not in 4 bits."""
        return sum(part.nbytes for part in self.parts[:3])

    def fits(self, reserve: int) -> list[int]:
        """The sizes of GPUs, in GiB, that hold it with `reserve` bytes for what is not counted."""
        return [size for size in GPU_SIZES if self.total + reserve <= size << 30]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        full = sum(FULL.values()) * self.parameters
        return {**asdict(self), "total": self.total, "full_16_bit": full}

    def bars(self) -> dict[str, dict[str, int]]:
        """Bytes by parts, for plots.plot_memory: all weights trained in 16 bits, without
        activations; the same adapters on weights in 16 bits; this fine-tune."""
        parts = {part.name: part.nbytes for part in self.parts}
        full = {name: each * self.parameters for name, each in FULL.items()}
        trained = {part.name: part.nbytes for part in self.parts[3:]}
        weights = {"16-bit weights": full["16-bit weights"]}
        return {"all, 16 bits": full, "LoRA, 16 bits": {**weights, **trained}, "QLoRA": parts}


def predict_memory(
    config: dict[str, Any], settings: Settings, adapter_dtype: torch.dtype = torch.float32
) -> Prediction:
    """What fine-tuning a model with these settings will need, without loading anything.

    config         as of a config.json: see model_sizes.read_config
    settings       as for `finetune`; `data` is not read, every sequence is taken to be full
    adapter_dtype  of the adapters and of their gradients; finetune has float32
    Raises ValueError for a configuration that transformers cannot build a causal model from, and
    where the tensors' shapes depend on what the tokens are.
    """
    model = build_without_storage(config, settings, adapter_dtype)
    parameters = count_parameters(model) - sum(p.numel() for p in _trained(model))
    step = _run(model, settings.batch_size, settings.length)
    trained = _trained(model)
    bits, paged = OPTIMIZERS[settings.optimizer]
    fields = adamw_fields(bits)
    states = {p: state_bytes(p.numel(), fields) for p in trained}
    pages = sum(size for p, size in states.items() if paged and is_large(p, fields))
    resident = min(pages, settings.resident_bytes or DEFAULT_RESIDENT_BYTES)
    quantised = sum(layer.weight_shape.numel() for layer in layers_4bit(model).values())
    return Prediction(
        model=settings.model,
        parts=[
            *weight_parts(model),
            Part("adapters", _size(trained), f"{trained[0].element_size()} r (N + K)"),
            Part("optimizer state", sum(states.values()) - pages + resident, _state_formula(bits)),
            Part("activations, gradients", step.peak, "at the most that are alive at once"),
        ],
        step=step,
        parameters=parameters,
        quantised=quantised,
        trainable=sum(parameter.numel() for parameter in trained),
        elsewhere=pages - resident,
    )


def build_without_storage(
    config: dict[str, Any], settings: Settings, adapter_dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The model in 4 bits with its adapters, on the meta device, as `finetune` would make it."""
    dtype = torch.float32 if settings.compute_dtype == "float32" else torch.bfloat16
    model = _build(config, dtype)
    convert_model(model, settings.codebook, settings.block_size, settings.double_quant)
    lora = (settings.r, settings.alpha, settings.dropout, settings.targets, settings.rslora)
    add_lora(model, *lora, dtype=adapter_dtype)
    if settings.gradient_checkpointing:
        enable_checkpointing(model)
    return model


class ShapesOnly(LiveTensors):
    """Counts tensors on the meta device, and answers for them where code asks for a value.

    Asked for one, it says that it is true: that an attention mask leaves nothing out, say. A row
    that is chosen by a condition is chosen.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], [_all_rows(index) for index in args[1]])
        return super().__torch_dispatch__(func, types, args, kwargs)


class _Attention(torch.autograd.Function):
    """What a fused attention keeps: its inputs, its output and a number for each row of weights.

    Every backend of torch but "math", which the meta device would take, keeps this.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, _ = query.shape
        # Laid out as the kernels leave it: heads side by side.
        y = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        sums = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, y, sums)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


@contextmanager
def _fused_attention() -> Iterator[None]:
    real = nn.functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        return _Attention.apply(query, key, value)

    nn.functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = real


def _build(config: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "building a model needs transformers: pip install 'qlora_ref[train]'"
        ) from error
    options = {name: value for name, value in config.items() if name != "quantization_config"}
    try:
        with torch.device("meta"):
            made = transformers.AutoConfig.for_model(**options)
            model: nn.Module = transformers.AutoModelForCausalLM.from_config(made, dtype=dtype)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"cannot build a causal language model from it: {error}") from error
    return model


def _run(model: nn.Module, sequences: int, length: int) -> StepBytes:
    ids = torch.empty(sequences, length, dtype=torch.int64, device="meta")
    batch = {"input_ids": ids, "labels": ids, "attention_mask": ids}
    try:
        with _fused_attention():
            return step_bytes(model, batch, ShapesOnly())
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"the activations of a {type(model).__name__} cannot be counted without running it: "
            f"{error}"
        ) from error


def _all_rows(index: Tensor | None) -> Tensor | None:
    if index is None or index.dtype != torch.bool:
        return index
    return torch.empty(index.numel(), dtype=torch.int64, device="meta")


def weight_parts(model: nn.Module) -> list[Part]:
    """The frozen part of a model: codes, scales, what is not in 4 bits."""
    layers = list(layers_4bit(model).values())
    codes = sum(layer.weight.numel() for layer in layers)
    scales = sum(layer.quantized_weight.nbytes for layer in layers) - codes
    block = layers[0].block_size
    nested = layers[0].quantized_weight.double_quant
    dense = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    return [
        Part("4-bit codes", codes, "n / 2"),
        Part("scales", scales, f"n / {block} (1 + 4 / 256)" if nested else f"4 n / {block}"),
        Part("other weights", _size(dense), "embeddings, norms, output head"),
    ]


def _state_formula(bits: int) -> str:
    return "8 r (N + K)" if bits == 32 else "(2 + 8 / 256) r (N + K)"


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _size(tensors: list[nn.Parameter]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def figure_6_bars(config: dict[str, Any], r: int = 64) -> dict[str, int]:
    """Two bars of figure 6 of QLoRA (arXiv 2305.14314) as its authors came to them, in bytes.

    They count 18 L d r parameters of adapters, those of blocks whose feed-forward has two matrices
    of 4 d, at 2 bytes each, and 8 bytes each for Adam. LLaMA's own three matrices give 6 % more.
    The bars of the model itself are measurements.
    """
    count = 18 * config["num_hidden_layers"] * config["hidden_size"] * r
    return {"adapters": 2 * count, "optimizer": 8 * count}
