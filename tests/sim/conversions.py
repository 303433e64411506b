"""cvt: from one type to another (PTX ISA 9.7.9.21)."""

from __future__ import annotations

import numpy as np

from .arithmetic import Options, pure
from .formats import TYPES, Array, from_bfloat16, to_bfloat16, to_odd, words

ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@pure(r"cvt(?P<saturate>\.sat)?\.(?P<type>[us]\d+)\.(?P<source>[us]\d+)", "source")
def integer_to_integer(o: Options, a: Array) -> Array:
    """The lowest bits, extended by the source's sign; with .sat the nearest number there is."""
    limits = np.iinfo(TYPES[o["type"]])
    if o["saturate"]:
        a = np.clip(np.asarray(a).astype(object), limits.min, limits.max)
    return np.asarray(a).astype(TYPES[o["type"]])


@pure(r"cvt\.rn\.(?P<type>f32|f64)\.(?P<source>[us]\d+)", "source")
def integer_to_float(o: Options, a: Array) -> Array:
    return np.asarray(a).astype(TYPES[o["type"]])


@pure(r"cvt\.(?P<round>rni|rzi|rmi|rpi)\.(?P<type>[us](16|32))\.(?P<source>f32|f64)", "source")
def float_to_integer(o: Options, a: Array) -> Array:
    """Clamped; NaN to 0 (what the ISA says of NaN to 32 bits)."""
    limits = np.iinfo(TYPES[o["type"]])
    whole = ROUND[o["round"]](np.asarray(a).astype(np.float64))
    clamped = np.clip(np.where(np.isnan(whole), 0.0, whole), limits.min, limits.max)
    return clamped.astype(np.int64).astype(TYPES[o["type"]])


@pure(r"cvt\.(?P<type>f32|f64)\.(?P<source>f16|bf16|f32)", "source")
def widen(o: Options, a: Array) -> Array:
    number = from_bfloat16(a) if o["source"] == "bf16" else np.asarray(a)
    return number.astype(TYPES[o["type"]])


@pure(r"cvt\.rn\.(?P<type>f16|bf16|f32)\.(?P<source>f32|f64)", "source")
def narrow(o: Options, a: Array) -> Array:
    if o["type"] == "bf16":
        return to_bfloat16(a)
    exact = to_odd(a) if o["type"] == "f16" else np.asarray(a)
    return exact.astype(TYPES[o["type"]])


@pure(r"cvt\.rn\.(?P<type>f16x2|bf16x2)\.f32", "f32 f32")
def narrow_two(o: Options, upper: Array, lower: Array) -> Array:
    """The first operand becomes the upper half."""
    return words(np.stack(np.broadcast_arrays(lower, upper), -1), o["type"])


@pure(r"cvt\.(?P<round>rni|rzi|rmi|rpi)\.(?P<type>f32)\.f32", "f32")
def to_whole(o: Options, a: Array) -> Array:
    return ROUND[o["round"]](a)
