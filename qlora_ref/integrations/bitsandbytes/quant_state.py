"""QuantState: what bitsandbytes keeps beside packed codes. Ours is quantized.QuantizedTensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qlora_ref import tensor_format
from qlora_ref.codebooks import DYNAMIC_BLOCK_SIZE, resolve_codebook
from qlora_ref.quantized import QuantizedTensor

_TOLERANCE = 1e-6  # two states with scales nearer than this are equal
_PACKED_KEY = "quant_state."


class QuantState:
    """Scales, codebook, shape and dtype of a quantised tensor; `state2` holds those of the scales.

    The arguments are bitsandbytes'. Codes are not part of it.
    """

    valid_quant_types = ("fp4", "nf4")

    def __init__(
        self,
        absmax: Tensor,
        shape: Any = None,
        code: Tensor | None = None,
        blocksize: int | None = None,
        quant_type: str | None = None,
        dtype: torch.dtype | None = None,
        offset: Tensor | None = None,
        state2: QuantState | None = None,
    ) -> None:
        self.absmax, self.shape, self.code, self.blocksize = absmax, shape, code, blocksize
        self.quant_type, self.dtype, self.offset, self.state2 = quant_type, dtype, offset, state2
        self.nested = state2 is not None

    @classmethod
    def of(cls, tensor: QuantizedTensor) -> QuantState:
        """The state of one of our tensors."""
        state2 = None
        if tensor.nested_absmax is not None:
            state2 = cls(
                tensor.nested_absmax,
                code=tensor.nested_codebook,
                blocksize=DYNAMIC_BLOCK_SIZE,
                dtype=torch.float32,
            )
        return cls(
            tensor.scales,
            tensor.shape,
            tensor.codebook,
            tensor.block_size,
            tensor.codebook_name,
            tensor.dtype,
            tensor.offset,
            state2,
        )

    def with_codes(self, packed: Tensor) -> QuantizedTensor:
        """Our tensor of these codes (any shape, any dtype of the same bytes) and this state.

        Raises ValueError or TypeError where codes and scales do not fit together.
        """
        if self.quant_type not in self.valid_quant_types:
            raise ValueError(f"quant_type must be nf4 or fp4, got {self.quant_type!r}")
        levels = resolve_codebook(self.quant_type)[1] if self.code is None else self.code
        return QuantizedTensor(
            packed=packed.detach().contiguous().flatten().view(torch.uint8),
            scales=self.absmax,
            codebook=levels.to(packed.device),
            codebook_name=self.quant_type,
            block_size=self.blocksize,  # type: ignore[arg-type]  # checked there
            shape=self.shape,
            dtype=self.dtype,  # type: ignore[arg-type]
            nested_absmax=None if self.state2 is None else self.state2.absmax,
            nested_codebook=None if self.state2 is None else self.state2.code,
            offset=self.offset,
        )

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The state by key; packed: only tensors, as a file holds them."""
        tensors: dict[str, Any] = {"absmax": self.absmax, "quant_map": self.code}
        offset = None
        if self.state2 is not None:
            assert self.offset is not None
            tensors["nested_absmax"] = self.state2.absmax.clone()
            tensors["nested_quant_map"] = self.state2.code
            offset = self.offset.item()
        fields = tensor_format.state_json(
            str(self.quant_type), self.blocksize or 0, self._dtype(), self.shape, offset
        )
        if packed:
            key = tensor_format.state_key(str(self.quant_type))
            return {**tensors, key: tensor_format.json_tensor(fields, self.absmax.device)}
        return {**fields, "shape": tuple(self.shape), **tensors}

    @classmethod
    def from_dict(cls, qs_dict: Mapping[str, Any], device: torch.device | str) -> QuantState:
        """Read what `as_dict` gives, packed or not, under keys with any prefix.

        Raises ValueError for keys that are missing and for JSON that is not.
        """
        found = {key.rpartition(".")[2]: value for key, value in qs_dict.items()}
        packed = [key for key in qs_dict if _PACKED_KEY in f".{key}"]
        if len(packed) + ("quant_type" in found) != 1:
            raise ValueError(f"expected one key quant_state.bitsandbytes__*, got {list(qs_dict)}")
        for key in packed:
            found |= tensor_format.read_json(key, qs_dict[key])
        missing = {"absmax", "quant_map", "blocksize", "quant_type", "dtype", "shape"} - set(found)
        if missing:
            raise ValueError(f"the state lacks {sorted(missing)}")
        offset, state2 = None, None
        if "nested_absmax" in found:
            offset = torch.tensor(float(found["nested_offset"]), dtype=torch.float32).to(device)
            state2 = cls(
                found["nested_absmax"].to(device),
                code=found["nested_quant_map"].to(device),
                blocksize=found["nested_blocksize"],
                dtype=getattr(torch, found["nested_dtype"]),
            )
        return cls(
            found["absmax"].to(device),
            torch.Size(found["shape"]),
            found["quant_map"].to(device),
            found["blocksize"],
            found["quant_type"],
            getattr(torch, found["dtype"]),
            offset,
            state2,
        )

    def to(self, device: torch.device | str) -> None:
        """Move all tensors, in place."""
        self.absmax = self.absmax.to(device)
        self.code = None if self.code is None else self.code.to(device)
        self.offset = None if self.offset is None else self.offset.to(device)
        if self.state2 is not None:
            self.state2.to(device)

    def __getitem__(self, index: int) -> Any:
        """As the list that a state once was."""
        nested = None if self.state2 is None else [self.offset, self.state2]
        return [self.absmax, self.shape, self.dtype, self.blocksize, nested, self.quant_type][index]

    def __getattr__(self, name: str) -> Any:
        # FSDP looks for the packed JSON by the last part of its key.
        if name.startswith("bitsandbytes__") and name.endswith(str(self.__dict__["quant_type"])):
            return self.as_dict(packed=True)[f"quant_state.{name}"]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantState):
            return False
        mine, theirs = ((s.shape, s.quant_type, s.dtype, s.blocksize) for s in (self, other))
        pairs = [(getattr(self, n), getattr(other, n)) for n in ("absmax", "code", "offset")]
        return mine == theirs and all(_near(*p) for p in pairs) and self.state2 == other.state2

    __hash__ = None  # type: ignore[assignment]  # equal by value, and holds tensors

    def _dtype(self) -> torch.dtype:
        return self.dtype or torch.float32


def _near(mine: Tensor | None, theirs: Tensor | None) -> bool:
    if mine is None or theirs is None:
        return mine is theirs
    same = mine.shape == theirs.shape and mine.dtype == theirs.dtype
    return same and torch.allclose(mine.float(), theirs.float(), atol=_TOLERANCE)
