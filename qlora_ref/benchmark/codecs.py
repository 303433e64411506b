"""Other implementations of blockwise codes: what encodes a tensor, and what restores it.

One that is not installed is left out.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qlora_ref.benchmark.candidates import is_installed

# By how much a peer's squared error may exceed ours. Other scales than float32 ones add 0.05 %;
# evenly spaced levels are another format, timed for its speed.
SAME_LEVELS, OTHER_LEVELS = 0.02, 0.3


@dataclass(frozen=True)
class Codec:
    """`decode(encode(x))` is about x."""

    encode: Callable[[Tensor], Any]
    decode: Callable[[Any], Tensor]
    tolerance: float = SAME_LEVELS


def codecs_4bit(device: str, block_size: int) -> dict[str, Callable[[], Codec]]:
    """Those of 4-bit codes that are installed and work on a device."""
    found: dict[str, Callable[[], Codec]] = {}
    if is_installed("bitsandbytes"):
        found["bitsandbytes"] = lambda: _bitsandbytes_4bit(block_size)
    if is_installed("torchao"):
        found["torchao nf4"] = lambda: _torchao(block_size)
    return found


def codecs_8bit(device: str) -> dict[str, Callable[[], Codec]]:
    """Those of the 8-bit dynamic map."""
    return {"bitsandbytes": _bitsandbytes_8bit} if is_installed("bitsandbytes") else {}


def torchao_nf4() -> Any:
    """torchao's module of NF4 tensors, which has moved."""
    for name in (
        "torchao.quantization.quantize_.workflows.nf4.nf4_tensor",
        "torchao.dtypes.nf4tensor",
    ):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise ImportError("torchao is installed, but where its NF4 tensors are is not known")


def _bitsandbytes_4bit(block_size: int) -> Codec:
    import bitsandbytes.functional as bnb

    return Codec(
        lambda x: bnb.quantize_4bit(x, quant_type="nf4", blocksize=block_size),
        lambda stored: bnb.dequantize_4bit(*stored),
    )


def _bitsandbytes_8bit() -> Codec:
    import bitsandbytes.functional as bnb

    return Codec(
        lambda x: bnb.quantize_blockwise(x, blocksize=256),
        lambda stored: bnb.dequantize_blockwise(*stored),
    )


def _torchao(block_size: int) -> Codec:
    nf4 = torchao_nf4()
    return Codec(
        lambda x: nf4.to_nf4(x, block_size, 256),  # its scales are quantised to 8 bits
        lambda stored: stored.get_original_weight(),
    )
