"""LoRA: a trainable product of two thin matrices on top of a frozen layer.

    y = base(x) + s (dropout(x) A^T) B^T        A (r, K), B (N, r),  s = alpha / r

Source: Hu et al., LoRA (arXiv 2106.09685), section 4.1; QLoRA (arXiv 2305.14314), equation 5,
which leaves out s; s = alpha / sqrt(r): Kalajdzievski, rsLoRA (arXiv 2312.03732).
Read next: finetune.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from qlora_ref.adapter_init import check_init, loftq, pissa
from qlora_ref.linear import Linear4bit, dense_linear, dense_parameters, is_conv1d
from qlora_ref.module4bit import layers_4bit
from qlora_ref.quantized import QuantizationError, QuantizedTensor, quantize
from qlora_ref.settings import check_adapter


class LoRA(nn.Module):
    """A frozen linear layer with a trainable low-rank update.

    base     Linear4bit, nn.Linear or Conv1D: (..., K) to (..., N)
    r        int     rank of the update, at least 1
    alpha    float   the update is scaled by alpha / r, or alpha / sqrt(r) when rslora
    dropout  float   probability of dropping an input of the update while training
    rslora   bool
    dtype    of A and B as kept and trained; they are multiplied in the dtype of x

    B starts at 0, so that training starts from the base. Raises ValueError for r, alpha or dropout
    out of range, TypeError for another kind of base.
    """

    def __init__(
        self,
        base: nn.Module,
        r: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        rslora: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_adapter(r, alpha, dropout)
        self.base = base
        self.out_features, self.in_features = dense_shape(base)
        self.r, self.alpha, self.rslora = r, alpha, rslora
        self.dropout = nn.Dropout(dropout)
        device = next(base.parameters()).device
        self.lora_A = nn.Linear(self.in_features, r, bias=False, device=device, dtype=dtype)
        self.lora_B = nn.Linear(r, self.out_features, bias=False, device=device, dtype=dtype)
        nn.init.zeros_(self.lora_B.weight)
        self.enabled = True
        self.belongs_to_base = False  # it fits this very base alone, bit for bit
        self.train(base.training)

    @property
    def scaling(self) -> float:
        """s in the formula."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    @property
    def weight(self) -> Tensor:
        """The base's weight, for model code that looks at its dtype or device."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) to (..., N)."""
        y: Tensor = self.base(x)
        if not self.enabled:
            return y
        down = nn.functional.linear(self.dropout(x), self.lora_A.weight.to(x.dtype))
        update = nn.functional.linear(down * self.scaling, self.lora_B.weight.to(x.dtype))
        return y + update.to(y.dtype)

    @torch.no_grad()
    def start_near(
        self, weight: Tensor, init: str, iterations: int = 5, scale_search: bool = False
    ) -> None:
        """Let base and adapter together be near a dense weight (N, K); see `add_lora`, init."""
        base: Any = self.base
        old = base.quantized_weight
        levels = old.codebook_name if old.codebook_name != "custom" else old.codebook
        options = levels, old.block_size, old.double_quant, True, scale_search

        def requantize(x: Tensor) -> QuantizedTensor:
            return quantize(x, *options).to(old.dtype)

        weight = weight.to(old.device)
        if init == "pissa":
            quantized, a, b = pissa(weight, requantize, self.r, iterations)
        else:
            quantized, a, b = loftq(weight, old, requantize, self.r, iterations)
        self.belongs_to_base = quantized is not old
        base.set_quantized_weight(quantized)
        root = math.sqrt(abs(self.scaling))
        self.lora_A.weight.copy_(a / root)
        self.lora_B.weight.copy_(b / math.copysign(root, self.scaling))

    def delta(self) -> Tensor:
        """What the adapter adds to the weight: s B A, float64 (N, K)."""
        delta = self.lora_B.weight.detach().double() @ self.lora_A.weight.detach().double()
        return delta * self.scaling

    @overload
    def merge(
        self, to: Literal["float"] = "float", dtype: torch.dtype = torch.float32
    ) -> nn.Linear: ...

    @overload
    def merge(
        self, to: Literal["4bit"], dtype: torch.dtype = torch.float32
    ) -> tuple[Linear4bit, QuantizationError]: ...

    def merge(
        self, to: str = "float", dtype: torch.dtype = torch.float32
    ) -> nn.Linear | tuple[Linear4bit, QuantizationError]:
        """One layer that does the work of base and adapter. The adapter itself is left as it is.

        to       "float": W + s B A, summed in float64, rounded to float32, then to dtype
                 "4bit":  that, quantised anew as the base is
        returns  nn.Linear; or Linear4bit and the error that quantising the sum caused

        The adapter was trained on top of the restored 4-bit W, so that is the W to add it to: on
        the weight from before quantisation the sum would not be what was trained.
        Raises ValueError for another `to`, TypeError for "4bit" when the base is dense.
        """
        if to not in ("float", "4bit"):
            raise ValueError(f'to must be "float" or "4bit", got {to!r}')
        merged = (_dense_weight(self.base).double() + self.delta()).to(dtype)
        if to == "float":
            return dense_linear(merged, self.bias, self.training)
        if not isinstance(self.base, Linear4bit):
            raise TypeError(
                f"the base is a {type(self.base).__name__}, not in 4 bits: merge to float"
            )
        return self.base.with_weight(merged, self.base.bias, self.training)

    def extra_repr(self) -> str:
        return f"r={self.r}, alpha={self.alpha}, scaling={self.scaling:.4g}, enabled={self.enabled}"


@dataclass(frozen=True)
class LoraReport:
    """What `add_lora` did: the layers that got an adapter, and counts of parameters."""

    layers: list[str]
    trainable: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total
        return (
            f"{len(self.layers)} adapters: {self.trainable:,} of {self.total:,} parameters "
            f"are trained ({share:.2f} %)"
        )


def add_lora(
    model: nn.Module,
    r: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all-linear",
    rslora: bool = False,
    dtype: torch.dtype = torch.float32,
    init: str = "zero",
    originals: dict[str, Tensor] | None = None,
    init_iterations: int = 5,
    scale_search: bool = False,
) -> LoraReport:
    """Put a LoRA on a model's linear layers, in place, and freeze everything else.

    targets  "all-linear": every Linear4bit; in a model without any, every linear layer but the
             output head. A list: layers of these names, or ending in ".name". Another string: a
             regular expression for the whole name.
    r, alpha, dropout, rslora, dtype: as for `LoRA`
    init     "zero": the model computes what it did. "loftq", "pissa": base and adapter together are
             near the dense weights (adapter_init.py); the bases are quantised anew for it, except
             by "loftq" with one iteration. Write them with checkpoint.save_base: these adapters
             fit no other base.
    originals        the dense weights (N, K) by layer name: adapter_init.dense_weights, taken
                     before the model was converted; for init other than "zero"
    init_iterations  int, at least 1
    scale_search     bool            as for `quantize`, where a base is quantised anew
    returns  LoraReport; a quantised weight counts as the values that it stands for

    After it the adapters alone require gradients: biases, norms and embeddings do not.
    Raises ValueError if nothing matches, or if the model has adapters already.
    """
    check_without_adapters(model)
    names = _target_names(model, targets)
    check_init(init, init_iterations, {n: model.get_submodule(n) for n in names}, originals)
    adapters = {
        name: LoRA(model.get_submodule(name), r, alpha, dropout, rslora, dtype) for name in names
    }
    if init != "zero":
        assert originals is not None
        for name, adapter in adapters.items():
            adapter.start_near(originals[name], init, init_iterations, scale_search)
    model.requires_grad_(False)
    for name, adapter in adapters.items():
        replace_module(model, name, adapter)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return LoraReport(names, trainable, count_parameters(model))


def lora_layers(model: nn.Module) -> dict[str, LoRA]:
    """The adapters of a model, by the name of the layer that each sits on."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRA)}


def check_without_adapters(model: nn.Module) -> None:
    """Raise ValueError if a model has adapters."""
    if lora_layers(model):
        raise ValueError("the model has adapters already: merge or remove them first")


def merge_lora(
    model: nn.Module, to: Literal["float", "4bit"] = "float", dtype: torch.dtype = torch.float32
) -> dict[str, QuantizationError]:
    """Merge every adapter of a model, in place, one layer at a time; see `LoRA.merge`.

    returns  for "4bit", the error that quantising each sum caused; for "float", nothing
    Raises ValueError if the model has no adapters.
    """
    adapters = lora_layers(model)
    if not adapters or "" in adapters:
        raise ValueError("the model has no adapters to merge; of a single LoRA, call its merge()")
    errors: dict[str, QuantizationError] = {}
    for name in list(adapters):
        adapter = adapters.pop(name)  # so that its base is freed before the next is merged
        if to == "4bit":
            layer, errors[name] = adapter.merge("4bit", dtype)
            replace_module(model, name, layer)
        else:
            replace_module(model, name, adapter.merge(to, dtype))
    return errors


def set_adapters_enabled(model: nn.Module, enabled: bool) -> None:
    """Switch all adapters of a model on or off; off, the model computes what its base does."""
    for adapter in lora_layers(model).values():
        adapter.enabled = enabled


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """The model without its adapters inside a `with` block; each is as it was afterwards."""
    before = {adapter: adapter.enabled for adapter in lora_layers(model).values()}
    set_adapters_enabled(model, False)
    try:
        yield
    finally:
        for adapter, enabled in before.items():
            adapter.enabled = enabled


def count_parameters(
    model: nn.Module, only_trainable: bool = False, exclude: Sequence[Tensor] = ()
) -> int:
    """The number of parameters; a quantised weight counts as the values that it stands for."""
    layers = layers_4bit(model).values()
    packed = {id(layer.weight): layer.weight_shape.numel() for layer in layers}
    left_out = {id(parameter) for parameter in exclude}
    return sum(
        packed.get(id(p), p.numel())
        for p in model.parameters()
        if id(p) not in left_out and (p.requires_grad or not only_trainable)
    )


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one of that name."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    setattr(parent, child, module)
    if isinstance(parent, nn.TransformerEncoderLayer):
        # Its fast path reads linear1.weight and passes the layer by. This attribute, 0 where the
        # activation is neither ReLU nor GELU, switches that path off and decides nothing else.
        parent.activation_relu_or_gelu = 0
    parts = name.split(".")
    for end in range(len(parts)):
        above = model.get_submodule(".".join(parts[:end]))
        if isinstance(above, nn.TransformerEncoder):
            above.use_nested_tensor = False  # only the fast path can take them


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model that can have an adapter, by name."""
    # No other subclasses: nn.MultiheadAttention reads out_proj.weight, past any adapter.
    kinds = (nn.Linear, Linear4bit)
    return {name: m for name, m in model.named_modules() if type(m) in kinds or is_conv1d(m)}


def _target_names(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    layers = linear_layers(model)
    linear = list(layers)
    if targets == "all-linear":
        quantised = [name for name in linear if isinstance(layers[name], Linear4bit)]
        names = quantised or [name for name in linear if not is_output_head(model, name)]
    elif isinstance(targets, str):
        names = [name for name in linear if re.fullmatch(targets, name)]
    else:
        names = [n for n in linear if any(n == t or n.endswith(f".{t}") for t in targets)]
    if not names or "" in names:
        raise ValueError(
            f"no linear layer of the model matches the targets {targets!r}; "
            f"its linear layers are {linear[:8]}{' ...' if len(linear) > 8 else ''}"
        )
    return names


def is_output_head(model: nn.Module, name: str) -> bool:
    """Whether a layer maps to the vocabulary: what transformers says it is, or called lm_head."""
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    head = get_output_embeddings() if callable(get_output_embeddings) else None
    return model.get_submodule(name) is head or name.rpartition(".")[2] == "lm_head"


def dense_shape(base: nn.Module) -> tuple[int, int]:
    """(N, K) of a linear layer, in 4 bits or not. Raises TypeError for another kind of layer."""
    if isinstance(base, Linear4bit):
        return base.out_features, base.in_features
    rows, columns = dense_parameters(base)[0].shape
    return rows, columns


def _dense_weight(base: nn.Module) -> Tensor:
    if isinstance(base, Linear4bit):
        return base.dequantize(torch.float32)
    return dense_parameters(base)[0].detach()
