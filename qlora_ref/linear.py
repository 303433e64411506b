"""Linear4bit and Embedding4bit: drop-in layers whose frozen weight is held in 4 bits.

Read next: lora.py, which puts trainable matrices on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_ref import ops
from qlora_ref.module4bit import Module4bit
from qlora_ref.quantized import QuantizationError, quantize

# Of a layer whose weight is replaced at once: no storage, plain scales, and a dtype that can be
# quantised, whatever the default one is.
PLACEHOLDER: dict[str, Any] = {"double_quant": False, "device": "meta", "dtype": torch.float32}


class Linear4bit(Module4bit, nn.Linear):
    """y = x W^T + bias with W in 4 bits; gradients flow to x and to the bias, not to W.

    in_features    int     K
    out_features   int     N
    bias           bool
    codebook       a name of codebooks.CODEBOOKS, or up to 16 levels
    block_size     int     values per scale, even
    double_quant   bool    quantise the scales too
    scale_search   bool    the scales with the least squared error in place of absmax
    compute_dtype  dtype that W is restored to and x is cast to; None: the autocast dtype, if
                   autocast is on, else the dtype of x. The result has the dtype of x, under
                   autocast the autocast dtype.
    device, dtype  as for nn.Linear

    A new layer holds random weights, as nn.Linear does, quantised at once. Usually it is made with
    `from_linear`, or for a whole model with `convert_model`. The forward changes no state: training
    and evaluation give the same numbers. Raises what `quantize` and `ops.matmul_4bit` raise.
    Source: QLoRA (arXiv 2305.14314), equation 5, without the adapter.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        codebook: str | Tensor | Sequence[float] = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        scale_search: bool = False,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self.compute_dtype = compute_dtype
        options = codebook, block_size, double_quant, True, scale_search
        self.set_quantized_weight(quantize(self.weight.detach(), *options))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        codebook: str | Tensor | Sequence[float] = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        scale_search: bool = False,
        hessian: Tensor | None = None,
    ) -> Linear4bit:
        """Quantise a dense layer: nn.Linear, or GPT-2's Conv1D, whose weight is (K, N).

        hessian  float (K, K)   mean(x x^T) of the layer's inputs, as for `quantize`

        The bias is shared with the dense layer, which is left as it is.
        Raises TypeError for other layers, ValueError for weights that are not finite.
        """
        weight, bias = dense_parameters(linear)
        rows, columns = weight.shape
        layer = cls(columns, rows, bias is not None, compute_dtype=compute_dtype, **PLACEHOLDER)
        options = codebook, block_size, double_quant, True, scale_search, hessian
        layer.set_quantized_weight(quantize(weight.detach(), *options))
        layer.bias = bias  # type: ignore[assignment]  # nn.Linear says Parameter; None is allowed
        return layer.train(linear.training)

    def with_weight(
        self, weight: Tensor, bias: nn.Parameter | None, training: bool
    ) -> tuple[Linear4bit, QuantizationError]:
        """A layer with another weight (N, K), quantised as this one is, and the error of that."""
        old = self.quantized_weight
        levels = old.codebook_name if old.codebook_name != "custom" else old.codebook
        new = quantize(weight, levels, old.block_size, old.double_quant)
        layer = Linear4bit(self.in_features, self.out_features, bias is not None, **PLACEHOLDER)
        layer.compute_dtype, layer.bias = self.compute_dtype, bias  # type: ignore[assignment]
        layer.set_quantized_weight(new.to(old.dtype))
        return layer.train(training), new.error(weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) to (..., N)."""
        dtype = self.compute_dtype or x.dtype
        autocast = self.compute_dtype is None and _autocasts(x)
        if autocast:
            dtype = torch.get_autocast_dtype(x.device.type)
        # Through the dictionaries: attributes of a module that are tensors are looked up slowly.
        parameters: dict[str, Any] = self._parameters
        buffers: dict[str, Any] = self._buffers
        bias = parameters["bias"]
        y = ops.matmul_4bit(
            _in_dtype(x, dtype),
            parameters["weight"],
            buffers["weight_scales"],
            buffers["weight_codebook"],
            self.block_size,
            self.weight_shape,
            None if bias is None else _in_dtype(bias, dtype),
            False,
            buffers["weight_nested_absmax"],
            buffers["weight_nested_codebook"],
            buffers["weight_offset"],
        )
        return y if autocast else _in_dtype(y, x.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {_describe(self)}"


class Embedding4bit(Module4bit, nn.Embedding):
    """Look-up in a frozen table held in 4 bits; only the rows that are asked for are restored.

    num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse:
    as for nn.Embedding. The last two shape the gradient of the table, which has none here; rows
    are cut down to `max_norm` as they are read, and the stored table stays as it is.
    codebook, block_size, double_quant: as for Linear4bit.

    The result has the dtype of the table that was quantised. Raises IndexError for an index that is
    not in the table, and what `quantize` raises.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        codebook: str | Tensor | Sequence[float] = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        nn.Embedding.__init__(
            self,
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            **options,
        )
        weight = self.weight.detach()
        self.set_quantized_weight(quantize(weight, codebook, block_size, double_quant))

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        codebook: str | Tensor | Sequence[float] = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
    ) -> Embedding4bit:
        """Quantise the table of an nn.Embedding, which is left as it is."""
        layer = cls.without_weight(embedding)
        weight = embedding.weight.detach()
        layer.set_quantized_weight(quantize(weight, codebook, block_size, double_quant))
        return layer.train(embedding.training)

    @classmethod
    def without_weight(cls, embedding: nn.Embedding) -> Embedding4bit:
        """A layer with the options of an nn.Embedding, whose table is set next."""
        return cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            embedding.padding_idx,
            embedding.max_norm,
            embedding.norm_type,
            embedding.scale_grad_by_freq,
            embedding.sparse,
            **PLACEHOLDER,
        )

    def forward(self, input: Tensor) -> Tensor:
        """int64 or int32 (...) to (..., embedding_dim)."""
        rows = self.quantized_weight.rows(input)
        if self.max_norm is None:
            return rows
        norms = rows.float().norm(p=self.norm_type, dim=-1, keepdim=True)
        # nn.Embedding's own rule, with its guard against dividing by 0.
        factors = torch.where(norms > self.max_norm, self.max_norm / (norms + 1e-7), 1.0)
        return (rows * factors).to(rows.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {_describe(self)}"


def _in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _autocasts(x: Tensor) -> bool:
    device = "cpu" if x.is_cpu else x.device.type  # whose string takes longer to make
    return device != "meta" and torch.is_autocast_enabled(device)  # there is none on meta


def dense_parameters(linear: nn.Module) -> tuple[Tensor, nn.Parameter | None]:
    """The weight as (N, K) and the bias of an nn.Linear or of a transformers Conv1D."""
    if isinstance(linear, Module4bit):
        raise TypeError("the layer is in 4 bits already: dequantise it first to change its format")
    if isinstance(linear, nn.Linear):
        return linear.weight, linear.bias
    if is_conv1d(linear):
        weight: Any = linear.weight
        bias: Any = linear.bias
        return weight.t(), bias
    raise TypeError(f"expected an nn.Linear or a Conv1D, got {type(linear).__name__}")


def dense_linear(weight: Tensor, bias: Tensor | None, training: bool) -> nn.Linear:
    """A frozen nn.Linear that holds this weight (N, K) and this bias, in the weight's dtype."""
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
    return layer.train(training)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is the Conv1D of GPT-2: a linear layer with the weight stored (K, N)."""
    # By name, since transformers need not be installed.
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _describe(layer: Module4bit) -> str:
    scales = "double_quant" if layer.weight_nested_absmax is not None else "float32 scales"
    return f"codebook={layer.codebook_name!r}, block_size={layer.block_size}, {scales}"
