"""bitsandbytes.utils: JSON in tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_ref import tensor_format


def pack_dict_to_tensor(source_dict: dict[str, Any]) -> Tensor:
    """A dict as the bytes of its JSON, uint8 (length,)."""
    return tensor_format.json_tensor(source_dict, torch.device("cpu"))


def unpack_tensor_to_dict(tensor_data: Tensor) -> dict[str, Any]:
    """The dict in the bytes of a tensor. Raises ValueError for bytes that are not JSON."""
    return tensor_format.read_json("the tensor", tensor_data)
