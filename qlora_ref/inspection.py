"""What a checkpoint or a model holds, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qlora_ref.checkpoint import stored_tensors
from qlora_ref.models import load_model
from qlora_ref.module4bit import layers_4bit
from qlora_ref.quantized import QuantizedTensor


@dataclass(frozen=True)
class Row:
    """One tensor; codebook and what follows it is None for a dense one, error without original."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    bits_per_parameter: float
    codebook: str | None = None
    block_size: int | None = None
    double_quant: bool | None = None
    mse: float | None = None
    max_error: float | None = None
    snr_db: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def inspect_source(source: str | Path, original: str | Path | None = None) -> list[Row]:
    """One row for each tensor of a checkpoint (a directory or safetensors file) or of a model.

    source    a safetensors file, a directory with some, or anything that `load_model` takes
    original  the unquantised model: then each 4-bit row says how far it is from it
    Raises ValueError for what cannot be read, and for an original of other shapes.
    """
    dense = dict(load_model(original).state_dict()) if original is not None else {}
    return [_row(name, tensor, dense.get(name)) for name, tensor in _tensors(source)]


def inspect_model(model: nn.Module) -> list[Row]:
    """One row for each weight of a model in memory."""
    return [_row(name, tensor, None) for name, tensor in _model_tensors(model)]


def _tensors(source: str | Path) -> Iterator[tuple[str, QuantizedTensor | Tensor]]:
    path = Path(source)
    if path.is_file() and path.suffix == ".safetensors":
        return stored_tensors(path)
    if path.is_dir() and any(path.glob("*.safetensors")):
        return stored_tensors(path)
    return _model_tensors(load_model(source))


def _model_tensors(model: nn.Module) -> Iterator[tuple[str, QuantizedTensor | Tensor]]:
    layers = layers_4bit(model).items()
    quantised = {f"{name}.weight".lstrip("."): layer.quantized_weight for name, layer in layers}
    for name, parameter in model.named_parameters():
        yield name, quantised.get(name, parameter.detach())


def _row(name: str, tensor: QuantizedTensor | Tensor, original: Tensor | None) -> Row:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if isinstance(tensor, Tensor):
        size = tensor.numel() * tensor.element_size()
        return Row(name, tuple(tensor.shape), dtype, size, 8.0 * tensor.element_size())
    error: dict[str, float] = {}
    if original is not None:
        found = tensor.error(original)
        error = {"mse": found.mse, "max_error": found.max, "snr_db": found.snr_db}
    return Row(
        name,
        tuple(tensor.shape),
        dtype,
        tensor.nbytes,
        tensor.bits_per_parameter,
        tensor.codebook_name,
        tensor.block_size,
        tensor.double_quant,
        **error,
    )
