"""Params4bit and the layers that hold one, as bitsandbytes names them.

The layers of this library itself, linear.Linear4bit and Embedding4bit, are better ones to start
from: these exist for programs that know bitsandbytes.
"""

from __future__ import annotations

import copy
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from qlora_ref.integrations.bitsandbytes import functional as F
from qlora_ref.integrations.bitsandbytes.autograd import matmul_4bit
from qlora_ref.integrations.bitsandbytes.nn.embeddings import (  # noqa: F401  (their names)
    Embedding,
    StableEmbedding,
)
from qlora_ref.integrations.bitsandbytes.quant_state import QuantState

_STATE_FIELDS = {"absmax": "absmax", "code": "code", "quant_map": "code", "offset": "offset"}
_NESTED_FIELDS = {"nested_absmax": "absmax", "nested_quant_map": "code", "nested_code": "code"}


class Params4bit(nn.Parameter):
    """A weight that is quantised when it is first moved to a device, also to "cpu".

    Until then it holds the dense values. The arguments are bitsandbytes'; `quant_state` is None
    until it is quantised. A copy takes all of another's attributes as arguments.
    """

    blocksize: int
    compress_statistics: bool
    quant_type: str
    quant_storage: torch.dtype
    quant_state: QuantState | None
    module: Any
    bnb_quantized: bool

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: Linear4bit | None = None,
        bnb_quantized: bool = False,
        **kwargs: Any,
    ) -> Params4bit:
        values = torch.empty(0) if data is None else data
        made = torch.Tensor._make_subclass(cls, values, requires_grad)
        made.blocksize = blocksize or 64
        made.compress_statistics = compress_statistics
        made.quant_type, made.quant_storage = quant_type, quant_storage
        made.quant_state, made.bnb_quantized, made.module = quant_state, bnb_quantized, module
        return made

    @classmethod
    def from_prequantized(
        cls,
        data: Tensor,
        quantized_stats: dict[str, Any],
        requires_grad: bool = False,
        device: Any = "cuda",
        module: Linear4bit | None = None,
        **kwargs: Any,
    ) -> Params4bit:
        """One from the tensors of a file: codes, and the state's by key."""
        state = QuantState.from_dict(quantized_stats, device)
        state.with_codes(data.to(device))  # raises where they do not fit together
        made = cls(
            data.to(device),
            requires_grad,
            state,
            state.blocksize,
            state.nested,
            str(state.quant_type),
            data.dtype,
            module,
            bnb_quantized=True,
        )
        if module is not None:
            module.quant_state = state
        return made

    def _quantize(self, device: Any) -> Params4bit:
        self.data, self.quant_state = F.quantize_4bit(
            self.data.to(device),
            blocksize=self.blocksize,
            compress_statistics=self.compress_statistics,
            quant_type=self.quant_type,
            quant_storage=self.quant_storage,
        )
        self.bnb_quantized = True
        if self.module is not None:
            self.module.quant_state = self.quant_state
        return self

    def to(self, *arguments: Any, **options: Any) -> Any:
        """Move; quantise if that is still to be done. Codes keep their dtype."""
        parsed: Any = torch._C._nn._parse_to(*arguments, **options)
        device, dtype, non_blocking = parsed[:3]
        if device is not None and device.type != "meta" and not self.bnb_quantized:
            return self._quantize(device)
        if self.quant_state is not None:
            dtype = None  # a cast would change the bytes that the codes are
            if device is not None:
                self.quant_state.to(device)
        moved = super().to(device=device, dtype=dtype, non_blocking=non_blocking)
        return type(self)(moved.detach(), self.requires_grad, **self._options())

    def cpu(self) -> Any:  # type: ignore[override]
        """`to("cpu")`."""
        return self.to("cpu")

    def cuda(self, device: Any = None, non_blocking: bool = False) -> Any:  # type: ignore[override]
        """`to` the GPU."""
        return self.to("cuda" if device is None else device, non_blocking=non_blocking)

    def float(self) -> Any:
        """`to(torch.float32)`: what nn.Module.float() calls. Codes stay what they are."""
        return self.to(torch.float32)

    def half(self) -> Any:
        """`to(torch.float16)`."""
        return self.to(torch.float16)

    def double(self) -> Any:
        """`to(torch.float64)`."""
        return self.to(torch.float64)

    def bfloat16(self) -> Any:
        """`to(torch.bfloat16)`."""
        return self.to(torch.bfloat16)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """torch.chunk and torch.split give parts of this class, all with the state of the whole.

        So FSDP finds it in each part. Other functions give plain tensors.
        """
        found = super().__torch_function__(func, types, args, kwargs or {})
        if func not in (torch.chunk, torch.split):
            return found
        whole = args[0] if args else (kwargs or {})["input" if func is torch.chunk else "tensor"]
        parts = (cls(part.detach(), whole.requires_grad, **whole._options()) for part in found)
        return type(found)(parts)

    def _options(self) -> dict[str, Any]:
        names = ("quant_state", "blocksize", "compress_statistics", "quant_type", "quant_storage")
        return {name: getattr(self, name) for name in (*names, "module", "bnb_quantized")}

    def __getattr__(self, name: str) -> Any:
        # FSDP reads the state by the keys of a file.
        state = self.__dict__.get("quant_state")
        if state is not None:
            if name in _STATE_FIELDS:
                return getattr(state, _STATE_FIELDS[name])
            if name == "state2" or name in _NESTED_FIELDS and state.state2 is not None:
                return state.state2 if name == "state2" else _nested(state, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Params4bit:
        options = {**self._options(), "quant_state": copy.deepcopy(self.quant_state, memo)}
        options["module"] = copy.deepcopy(self.module, memo)
        made = type(self)(self.data.clone(), self.requires_grad, **options)
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self), self.data, self.requires_grad, self._options())


def _nested(state: QuantState, name: str) -> Any:
    return getattr(state.state2, _NESTED_FIELDS[name])


def _rebuild(cls: Any, data: Tensor, requires_grad: bool, options: dict[str, Any]) -> Params4bit:
    return cls(data, requires_grad, **options)


class _Quantized(nn.Module):
    """What layers with a Params4bit share: a state dict with the file's keys, and reading one."""

    weight: Any
    quant_state: QuantState | None = None

    def _state(self) -> QuantState:
        if self.weight.quant_state is None:
            raise RuntimeError("the weight is not quantised yet: move the layer with .to(device)")
        return self.weight.quant_state

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight.quant_state is not None:
            for key, value in self.weight.quant_state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{key}"] = value if keep_vars else value.detach()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        start = f"{prefix}weight."
        stats = {k.removeprefix(start): v for k, v in state_dict.items() if k.startswith(start)}
        if stats:
            try:
                data, device = state_dict[f"{prefix}weight"], self.weight.device
                device = data.device if device.type == "meta" else device
                made = Params4bit.from_prequantized(data, stats, device=device, module=self)  # type: ignore[arg-type]
                self._parameters["weight"] = made
            except (KeyError, TypeError, ValueError) as error:
                error_msgs.append(f"{prefix}weight: {error}")
                return
        unexpected: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected, error_msgs
        )
        unexpected_keys += [key for key in unexpected if not key.startswith(start)]


class Linear4bit(_Quantized, nn.Linear):
    """A linear layer with bitsandbytes' arguments; the weight is quantised by `.to(device)`.

    compute_dtype  None: the dtype of each input. The forward changes no state.
    Raises RuntimeError when it is called before its weight is quantised.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        nn.Linear.__init__(self, input_features, output_features, bias, device)
        self.weight = Params4bit(
            self.weight.data,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        self.compute_dtype, self.quant_storage = compute_dtype, quant_storage

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) to (..., N) in the dtype of x."""
        dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return matmul_4bit(x.to(dtype), self.weight, self._state(), bias=bias).to(x.dtype)


class LinearNF4(Linear4bit):
    """Linear4bit with NF4."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        options = (bias, compute_dtype, compress_statistics, "nf4", quant_storage, device)
        super().__init__(input_features, output_features, *options)


class LinearFP4(Linear4bit):
    """Linear4bit with FP4."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        options = (bias, compute_dtype, compress_statistics, "fp4", quant_storage, device)
        super().__init__(input_features, output_features, *options)


class Embedding4bit(_Quantized, nn.Embedding):
    """Look-up in a table in 4 bits, with bitsandbytes' arguments."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.weight = Params4bit(
            self.weight.data,
            compress_statistics=False,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,  # type: ignore[arg-type]
        )

    def forward(self, input: Tensor) -> Tensor:
        """int (...) to (..., embedding_dim)."""
        return self._state().with_codes(self.weight.data).rows(input)


class EmbeddingNF4(Embedding4bit):
    """Embedding4bit with NF4."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "nf4", quant_storage, device)


class EmbeddingFP4(Embedding4bit):
    """Embedding4bit with FP4."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "fp4", quant_storage, device)


class _No8bit:
    """Only here to be imported, and asked for with isinstance."""

    def __new__(cls, *arguments: Any, **options: Any) -> NoReturn:
        raise NotImplementedError(
            f"{cls.__name__} belongs to the 8-bit layers of bitsandbytes, which qlora_ref does not "
            "have: quantise to 4 bits"
        )


class Int8Params(_No8bit):
    """Not available."""


class Linear8bitLt(_No8bit):
    """Not available."""


class Embedding8bit(_No8bit):
    """Not available."""


class OutlierAwareLinear(_No8bit):
    """Not available."""
