"""PTX types as numpy types, and the two that numpy does not know: bfloat16, and pairs of 16 bits.

Registers hold bits; an instruction's type says what they mean. bfloat16 stays as the bits of a
uint16 until an instruction computes with it.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

Array = Any  # a numpy array or scalar

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}

TYPES: dict[str, Any] = {"pred": np.bool_, "f16": np.float16, "f32": np.float32, "f64": np.float64}
for _bytes in UNSIGNED:
    for _letter, _kinds in (("u", UNSIGNED), ("b", UNSIGNED), ("s", SIGNED)):
        TYPES[f"{_letter}{8 * _bytes}"] = _kinds[_bytes]
TYPES |= {"bf16": np.uint16, "f16x2": np.uint32, "bf16x2": np.uint32}


def size_of(kind: str) -> int:
    """Bytes of a type."""
    return int(np.dtype(TYPES[kind]).itemsize)


def unsigned(kind: str) -> Any:
    """The numpy type of a register of this type."""
    return np.bool_ if kind == "pred" else UNSIGNED[size_of(kind)]


def immediate(text: str, kind: str) -> Array:
    """A constant as it stands in PTX: 12, -3, 0x7f, 0f3F800000 (a float's bits), 0d... or 1.5."""
    dtype = np.dtype(TYPES[kind])
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", text):
        bits = int(match[1] or match[2], 16)
        number = np.uint32(bits).view(np.float32) if match[1] else np.uint64(bits).view(np.float64)
        return number.view(dtype) if dtype.itemsize == number.itemsize else dtype.type(number)
    if re.fullmatch(r"-?\d+\.\d*", text):
        return dtype.type(float(text))
    value = int(text.removesuffix("U"), 0)
    if kind == "pred":
        return np.bool_(value)
    return UNSIGNED[dtype.itemsize](value & ((1 << 8 * dtype.itemsize) - 1)).view(dtype)


def from_bfloat16(bits: Array) -> Array:
    """bfloat16 is the upper half of a float32."""
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(values: Array) -> Array:
    """float32 or float64 to the nearest bfloat16, ties to even; every NaN becomes 0x7fff."""
    bits = np.ascontiguousarray(to_odd(values)).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))


def to_odd(values: Array) -> Array:
    """float64 to float32, where what is inexact gets an odd last bit.

    Rounding the result once more, to fewer bits, is then as if there had been one rounding
    (Boldo and Melquiond, "When double rounding is odd", 2005).
    """
    values = np.asarray(values)
    if values.dtype == np.float32:
        return values
    near = values.astype(np.float32)
    bits = np.ascontiguousarray(near).view(np.uint32)
    is_even = (bits & 1) == 0
    back = near.astype(np.float64)
    farther = is_even & (np.abs(values) > np.abs(back)) & np.isfinite(near)
    nearer = is_even & (np.abs(values) < np.abs(back)) & ~np.isnan(values)
    step = farther.astype(np.int64) - nearer.astype(np.int64)
    return (bits.astype(np.int64) + step).astype(np.uint32).view(np.float32).reshape(values.shape)


def halves(words: Array, kind: str) -> Array:
    """The two numbers in each 32-bit word, as float32 (..., 2), the lower one first."""
    pairs = np.ascontiguousarray(words, np.uint32)[..., None].view(np.uint16)
    return from_bfloat16(pairs) if kind == "bf16x2" else pairs.view(np.float16).astype(np.float32)


def words(pairs: Array, kind: str) -> Array:
    """The inverse of `halves`, rounding once to 16 bits."""
    narrow = to_bfloat16(pairs) if kind == "bf16x2" else pairs.astype(np.float16).view(np.uint16)
    return np.ascontiguousarray(narrow).view(np.uint32)[..., 0]
