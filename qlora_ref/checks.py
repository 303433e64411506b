"""The checks of an operation's arguments: what was expected, what came, the way out.

But for `check_memory`, they look at shapes and dtypes alone, so that they cost microseconds and
`torch.compile` can trace through them. What depends on values (is every weight finite?) is checked
inside the operators.
"""

from __future__ import annotations

import bisect
import ctypes
import itertools
import os
from array import array
from collections.abc import Iterable, Sequence
from operator import attrgetter, eq

import torch
from torch import Tensor

from qlora_ref.codebooks import CODES_4BIT, CODES_8BIT, DYNAMIC_BLOCK_SIZE

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_MOST_VECTORS = 1024  # of one readv

_INTEGERS = (int, torch.SymInt)
_shape = attrgetter("shape")
_dtype, _layout = attrgetter("dtype"), attrgetter("layout")


def check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got {tensor.layout}; convert it with .to_dense()")


def check_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    check_tensor(name, tensor)
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}; convert it with .to({dtype})")


def check_float(name: str, tensor: Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}; "
            "convert it with .float()"
        )


def check_output_dtype(dtype: torch.dtype) -> None:
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16 or float16, got {dtype}")


def check_block_size(block_size: int) -> None:
    if not isinstance(block_size, _INTEGERS) or isinstance(block_size, bool):
        raise TypeError(f"block_size must be an int, got {type(block_size).__name__}")
    if block_size < 2 or block_size % 2:
        raise ValueError(f"block_size must be even and at least 2, got {block_size}; 64 is usual")
    _check_limit("block_size", block_size)


def check_shape(shape: Sequence[int]) -> None:
    for size in shape:
        if not isinstance(size, _INTEGERS):
            raise TypeError(f"shape must hold ints, got {size!r} in {tuple(shape)}")
        if size < 0:
            raise ValueError(f"shape must hold no negative size, got {tuple(shape)}")
        _check_limit("a size in shape", size)


def check_step(step: int) -> None:
    if not isinstance(step, _INTEGERS):
        raise TypeError(f"step must be an int, got {type(step).__name__}")
    if step < 1:
        raise ValueError(f"step counts from 1, got {step}")
    _check_limit("step", step)


def _check_limit(name: str, count: int) -> None:
    # What an operator's schema and the kernels hold a count in.
    if count >= 2**63:
        raise ValueError(f"{name} must be below 2**63, got {count}")


def check_one_device(first: Tensor, *others: Tensor | None) -> None:
    device = first.device
    for other in others:
        if other is not None and other.device != device:
            raise ValueError(
                f"all tensors must be on one device, got {device} and {other.device}; "
                "move them with .to()"
            )


def check_table(name: str, codebook: Tensor, entries: int) -> None:
    check_dtype(name, codebook, torch.float32)
    if codebook.shape != (entries,):
        raise ValueError(
            f"{name} must have shape ({entries},), got {tuple(codebook.shape)}; "
            "codebooks.as_codebook fills up shorter ones"
        )


def check_scales(name: str, absmax: Tensor, n: int, block_size: int) -> None:
    check_tensor(name, absmax)
    blocks = -(-n // block_size)
    if absmax.shape != (blocks,):
        raise ValueError(
            f"{name} must hold one scale per block: {n} values in blocks of {block_size} need "
            f"{blocks}, got shape {tuple(absmax.shape)}"
        )


def check_packed(packed: Tensor, absmax: Tensor, codebook: Tensor, block_size: int, n: int) -> None:
    check_dtype("packed", packed, torch.uint8)
    if packed.numel() != (n + 1) // 2:
        raise ValueError(
            f"packed must hold two codes a byte: {n} values need {(n + 1) // 2} bytes, "
            f"got {packed.numel()}"
        )
    check_table("codebook", codebook, CODES_4BIT)
    check_block_size(block_size)
    check_scales("absmax", absmax, n, block_size)


def check_features(x: Tensor, features: int, letter: str) -> None:
    if x.dim() == 0 or x.shape[-1] != features:
        raise ValueError(
            f"the last dimension of x must be {letter} = {features}, got shape {tuple(x.shape)}"
        )


def check_nested(
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: Tensor | None,
) -> None:
    if nested_absmax is None and nested_codebook is None and offset is None:
        check_dtype("absmax", absmax, torch.float32)
        return
    if nested_absmax is None or nested_codebook is None or offset is None:
        raise ValueError(
            "nested_absmax, nested_codebook and offset go together: all three, or none for "
            "float32 scales"
        )
    check_dtype("absmax (the codes of nested scales)", absmax, torch.uint8)
    check_dtype("nested_absmax", nested_absmax, torch.float32)
    check_table("nested_codebook", nested_codebook, CODES_8BIT)
    check_scales("nested_absmax", nested_absmax, absmax.numel(), DYNAMIC_BLOCK_SIZE)
    check_dtype("offset", offset, torch.float32)
    if offset.numel() != 1:
        raise ValueError(f"offset must be one number, got shape {tuple(offset.shape)}")


def check_bias(bias: Tensor, x: Tensor, features: int, transposed: bool) -> None:
    if transposed:
        raise ValueError("a transposed product takes no bias: pass bias=None")
    check_dtype("bias", bias, x.dtype)
    if bias.shape != (features,):
        raise ValueError(f"bias must have shape ({features},), got {tuple(bias.shape)}")


def check_gradients(params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    for name, tensors in (("a parameter", params), ("a gradient", grads)):
        if not _all_are(tensors, FLOAT_DTYPES):
            for tensor in tensors:
                check_float(name, tensor)
    _check_shapes("grads", grads, [param.shape for param in params])
    _check_contiguous("parameters", params)
    if len(set(map(id, params))) < len(params):
        raise ValueError("a parameter is listed twice: a step changes each one once")


def check_moments(
    shapes: list[torch.Size], moments: Sequence[Tensor], name: str, dtype: torch.dtype
) -> None:
    if not _all_are(moments, (dtype,)):
        for moment in moments:
            check_dtype(f"each of {name}", moment, dtype)
    _check_shapes(name, moments, shapes)
    _check_contiguous(name, moments)


def _all_are(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> bool:
    """Whether these are dense tensors of some dtypes: for a list in a third of the time that a
    check of each takes, which is for naming the one that is not."""
    return (
        all(issubclass(kind, Tensor) for kind in set(map(type, tensors)))
        and set(map(_dtype, tensors)) <= set(dtypes)
        and set(map(_layout, tensors)) <= {torch.strided}
    )


def _check_shapes(name: str, tensors: Sequence[Tensor], shapes: list[torch.Size]) -> None:
    if list(map(_shape, tensors)) != shapes:
        raise ValueError(
            f"{name} must have the shapes of params, {[tuple(shape) for shape in shapes]}, "
            f"got {[tuple(tensor.shape) for tensor in tensors]}"
        )


def _check_contiguous(name: str, tensors: Sequence[Tensor]) -> None:
    if not all(map(Tensor.is_contiguous, tensors)):
        raise ValueError(f"{name} are changed in place and must be contiguous")


def check_memory(
    changed: Iterable[Tensor], read: Iterable[tuple[Tensor, Sequence[Tensor]]] = ()
) -> None:
    """What is changed in place can be written, and shares no memory with anything else here.

    changed  contiguous tensors in the memory of this process (torch_library.has_memory)
    read     such tensors, too, each with those among the changed that it may be one of
    """
    spans = sorted(map(_span, filter(Tensor.numel, changed)))
    if spans and spans[0][0] == 0:
        raise ValueError("a tensor to change in place has no memory: its storage was freed")
    for (_, end), (begin, _) in itertools.pairwise(spans):
        if begin < end:
            raise ValueError("tensors that are changed in place share memory: clone one of them")
    for tensor, own in read:
        start, stop = _span(tensor)
        if start == stop or (start, stop) in map(_span, own):
            continue
        after = bisect.bisect(spans, (start, stop))
        neighbours = spans[max(after - 1, 0) : after + 1]
        if any(begin < stop and start < end for begin, end in neighbours):
            raise ValueError("a gradient shares memory with what is changed in place: clone it")
    if os.name == "posix" and not _can_write([begin for begin, _ in spans]):
        raise ValueError("a tensor to change in place lies in read-only memory: clone it")


def _span(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


def _can_write(addresses: Sequence[int]) -> bool:
    """Writes the bytes that are there by a system call, which fails where a store would end us."""
    readv = ctypes.CDLL(None).readv
    reader, writer = os.pipe()
    try:
        for start in range(0, len(addresses), _MOST_VECTORS):
            some = addresses[start : start + _MOST_VECTORS]
            os.write(writer, b"".join(ctypes.string_at(address, 1) for address in some))
            vectors = array("Q", [word for address in some for word in (address, 1)])
            place = ctypes.c_void_p(vectors.buffer_info()[0])
            if readv(reader, place, len(some)) != len(some):
                return False
        return True
    finally:
        os.close(reader)
        os.close(writer)


def check_absmaxes(
    params: Sequence[Tensor],
    first_absmaxes: Sequence[Tensor],
    second_absmaxes: Sequence[Tensor],
    first_codebook: Tensor | None,
    second_codebook: Tensor | None,
) -> bool:
    """Whether the moments are 8-bit: they are when they come with scales and codebooks."""
    if first_codebook is None and second_codebook is None:
        if first_absmaxes or second_absmaxes:
            raise ValueError("scales without codebooks: 8-bit moments need both codebooks")
        return False
    if first_codebook is None or second_codebook is None:
        raise ValueError("8-bit moments need both codebooks, or none for 32-bit moments")
    check_table("first_codebook", first_codebook, CODES_8BIT)
    check_table("second_codebook", second_codebook, CODES_8BIT)
    check_moment_scales(params, first_absmaxes, "first_absmaxes")
    check_moment_scales(params, second_absmaxes, "second_absmaxes")
    return True


def check_moment_scales(params: Sequence[Tensor], scales: Sequence[Tensor], name: str) -> None:
    if len(scales) != len(params):
        raise ValueError(f"{name} must hold {len(params)} tensors, got {len(scales)}")
    shapes = [(-(-n // DYNAMIC_BLOCK_SIZE),) for n in map(Tensor.numel, params)]
    if not _all_are(scales, (torch.float32,)) or not all(map(eq, map(_shape, scales), shapes)):
        for param, absmax in zip(params, scales):
            check_dtype(name, absmax, torch.float32)
            check_scales(name, absmax, param.numel(), DYNAMIC_BLOCK_SIZE)
    _check_contiguous(name, scales)
