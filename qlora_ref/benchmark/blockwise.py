"""Cases of quantize_4bit, dequantize_4bit, quantize_8bit and dequantize_8bit.

Backends must give the bits of the reference. Peers may hold other codes or scales; what they
restore must be about as near to the original as ours is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlora_ref import codebooks, ops
from qlora_ref.benchmark.candidates import (
    EXACT,
    Case,
    Prepared,
    backends_here,
    forced,
    share_that_differs,
)
from qlora_ref.benchmark.codecs import Codec, codecs_4bit, codecs_8bit

BLOCK_SIZE = 64  # of 4-bit codes; 8-bit ones have the dynamic map's 256
MakeCodec = Callable[[], Codec]


def quantize_4bit(shape: tuple[int, int], dtype: torch.dtype, device: str) -> Case:
    """To NF4 in blocks of 64; no look for values that are not finite, as peers have none."""
    x = _random(shape, dtype, device)
    codebook = codebooks.nf4_codebook().to(device)

    def run() -> Any:
        return ops.quantize_4bit(x, codebook, BLOCK_SIZE, check_finite=False)

    def restore(packed: Tensor, absmax: Tensor) -> Tensor:
        return ops.dequantize_4bit(packed, absmax, codebook, BLOCK_SIZE, shape)

    return _quantize_case("quantize_4bit", x, run, restore, codecs_4bit(device, BLOCK_SIZE))


def dequantize_4bit(shape: tuple[int, int], dtype: torch.dtype, device: str) -> Case:
    """From NF4 in blocks of 64 with float32 scales, into a fresh tensor."""
    x = _random(shape, dtype, device)
    codebook = codebooks.nf4_codebook().to(device)
    packed, absmax = ops.quantize_4bit(x, codebook, BLOCK_SIZE)

    def run() -> Tensor:
        return ops.dequantize_4bit(packed, absmax, codebook, BLOCK_SIZE, shape, dtype)

    return _dequantize_case(
        "dequantize_4bit", x, (packed, absmax), run, codecs_4bit(device, BLOCK_SIZE)
    )


def quantize_8bit(shape: tuple[int, int], dtype: torch.dtype, device: str) -> Case:
    """To the signed dynamic map in blocks of 256."""
    x = _random(shape, dtype, device)
    codebook = codebooks.dynamic_codebook().to(device)

    def run() -> Any:
        return ops.quantize_8bit(x, codebook, check_finite=False)

    def restore(codes: Tensor, absmax: Tensor) -> Tensor:
        return ops.dequantize_8bit(codes, absmax, codebook)

    return _quantize_case("quantize_8bit", x, run, restore, codecs_8bit(device))


def dequantize_8bit(shape: tuple[int, int], dtype: torch.dtype, device: str) -> Case:
    """From the signed dynamic map in blocks of 256, into a fresh tensor."""
    x = _random(shape, dtype, device)
    codebook = codebooks.dynamic_codebook().to(device)
    codes, absmax = ops.quantize_8bit(x, codebook)

    def run() -> Tensor:
        return ops.dequantize_8bit(codes, absmax, codebook, dtype=dtype)

    return _dequantize_case("dequantize_8bit", x, (codes, absmax), run, codecs_8bit(device))


def _quantize_case(
    operation: str,
    x: Tensor,
    run: Callable[[], Any],
    restore: Callable[[Tensor, Tensor], Tensor],
    codecs: Mapping[str, MakeCodec],
) -> Case:
    with_reference = forced("reference", run)()
    ours = _squared_error(restore(*with_reference), x)

    def peer(make: MakeCodec) -> Prepared:
        codec = make()
        return Prepared(
            lambda: codec.encode(x),
            lambda found: _excess(codec.decode(found), x, ours),
            codec.tolerance,
        )

    return _case(operation, x, with_reference, run, (x, *with_reference), codecs, peer)


def _dequantize_case(
    operation: str,
    x: Tensor,
    parts: tuple[Tensor, Tensor],
    run: Callable[[], Tensor],
    codecs: Mapping[str, MakeCodec],
) -> Case:
    with_reference = forced("reference", run)()
    ours = _squared_error(with_reference, x)

    def peer(make: MakeCodec) -> Prepared:
        codec = make()
        stored = codec.encode(x)
        return Prepared(
            lambda: codec.decode(stored), lambda found: _excess(found, x, ours), codec.tolerance
        )

    return _case(operation, x, (with_reference,), run, (*parts, with_reference), codecs, peer)


def _case(
    operation: str,
    x: Tensor,
    expected: tuple[Tensor, ...],
    run: Callable[[], Any],
    moved: tuple[Tensor, ...],
    codecs: Mapping[str, MakeCodec],
    peer: Callable[[MakeCodec], Prepared],
) -> Case:
    def error(found: Any) -> float:
        tensors = (found,) if isinstance(found, Tensor) else found
        return max(map(share_that_differs, tensors, expected))

    def backend(name: str) -> Callable[[], Prepared]:
        return lambda: Prepared(forced(name, run), error, EXACT)

    return Case(
        operation=operation,
        detail="",
        shape="x".join(map(str, x.shape)),
        dtype=str(x.dtype).removeprefix("torch."),
        nbytes=sum(tensor.nbytes for tensor in moved),
        flops=0,
        ours={name: backend(name) for name in backends_here(operation, x.device.type)},
        peers={name: partial(peer, make) for name, make in codecs.items()},
    )


def _random(shape: tuple[int, int], dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def _squared_error(found: Tensor, x: Tensor) -> float:
    return (found.double() - x.double()).square().mean().item()


def _excess(found: Tensor, x: Tensor, ours: float) -> float:
    """By which share a squared error is larger than ours."""
    return _squared_error(found, x) / ours - 1
