"""What instructions compute that have only registers as operands.

Each function below is one line of the PTX ISA's chapter 9.7, on numpy arrays with one element for
each thread. `@pure` says which mnemonics it stands for; a mnemonic that nothing stands for is an
error, so a modifier that is not modelled can not be passed over.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .formats import TYPES, Array, from_bfloat16, halves, to_bfloat16, to_odd, words
from .memory import WINDOWS

Options = dict[str, str]  # the named parts of a mnemonic; "" for those that are absent


@dataclass(frozen=True)
class Pure:
    """A function of registers. Types are those of the mnemonic's parts, or fixed."""

    pattern: re.Pattern[str]
    sources: str  # types of the operands; "type" and "wide" stand for the mnemonic's
    result: str
    function: Callable[..., Array]


PURE: list[Pure] = []

INTEGER = r"(?P<type>[us](16|32|64))"
FLOAT = r"(?P<type>f32|f64|f16|bf16|f16x2|bf16x2)"
BITS = r"(?P<type>b(16|32|64)|pred)"


def pure(
    pattern: str, sources: str, result: str = "type"
) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
    """Register a function for mnemonics. It is called with the options and the sources."""

    def register(function: Callable[..., Array]) -> Callable[..., Array]:
        PURE.append(Pure(re.compile(pattern), sources, result, function))
        return function

    return register


# Integers.

SIMPLE = {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum}


@pure(rf"(?P<op>add|sub|min|max)\.{INTEGER}", "type type")
def integer(o: Options, a: Array, b: Array) -> Array:
    return SIMPLE[o["op"]](a, b)


@pure(r"(?P<op>neg|abs)\.(?P<type>s(16|32|64))", "type")
def signed(o: Options, a: Array) -> Array:
    return np.negative(a) if o["op"] == "neg" else np.abs(a)


@pure(rf"mul\.lo\.{INTEGER}", "type type")
def multiply(o: Options, a: Array, b: Array) -> Array:
    return a * b


@pure(r"mul\.hi\.(?P<type>[us]32)", "type type")
def multiply_high(o: Options, a: Array, b: Array) -> Array:
    return (_widened(o, a) * _widened(o, b)) >> 32


@pure(r"mul\.wide\.(?P<type>[us](16|32))", "type type", "wide")
def multiply_wide(o: Options, a: Array, b: Array) -> Array:
    return _widened(o, a) * _widened(o, b)


@pure(rf"mad\.lo\.{INTEGER}", "type type type")
def multiply_add(o: Options, a: Array, b: Array, c: Array) -> Array:
    return a * b + c


@pure(r"mad\.wide\.(?P<type>[us](16|32))", "type type wide", "wide")
def multiply_add_wide(o: Options, a: Array, b: Array, c: Array) -> Array:
    return _widened(o, a) * _widened(o, b) + c


@pure(rf"(?P<op>div|rem)\.{INTEGER}", "type type")
def divide(o: Options, a: Array, b: Array) -> Array:
    """Rounded towards zero. By zero: what the hardware gives is unspecified; all ones here."""
    a, b = np.broadcast_arrays(a, b)
    safe = np.where(b == 0, b.dtype.type(1), b)
    remainder = np.fmod(a, safe)
    result = (a - remainder) // safe if o["op"] == "div" else remainder
    return np.where(b == 0, ~b.dtype.type(0), result)


def _widened(o: Options, a: Array) -> Array:
    return np.asarray(a).astype(TYPES[wide(o["type"])])


def wide(kind: str) -> str:
    """The type of twice as many bits."""
    return f"{kind[0]}{2 * int(kind[1:])}" if kind[0] in "us" else kind


# Bits.

LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@pure(rf"(?P<op>and|or|xor)\.{BITS}", "type type")
def logic(o: Options, a: Array, b: Array) -> Array:
    return LOGIC[o["op"]](a, b)


@pure(rf"not\.{BITS}", "type")
def complement(o: Options, a: Array) -> Array:
    return ~np.asarray(a)


@pure(r"lop3\.b32", "b32 b32 b32 b32", "b32")
def logic_of_three(o: Options, a: Array, b: Array, c: Array, table: Array) -> Array:
    """Bit i of the table is the result where a, b, c are the bits 2, 1, 0 of i."""
    result = np.uint32(0)
    for i in range(8):
        chosen = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        result = result | np.where((table >> np.uint32(i)) & np.uint32(1), chosen, np.uint32(0))
    return result


@pure(r"(?P<op>shl|shr)\.(?P<type>[bus](16|32|64))", "type u32")
def shift(o: Options, a: Array, by: Array) -> Array:
    """Shifts by more than all bits leave none, or copies of the sign."""
    a = np.asarray(a)
    bits = 8 * a.itemsize
    near = np.minimum(by, bits - 1).astype(a.dtype)
    if o["op"] == "shr" and o["type"][0] == "s":
        return a >> near
    shifted = a << near if o["op"] == "shl" else a >> near
    return np.where(np.asarray(by) >= bits, a.dtype.type(0), shifted)


@pure(r"shf\.(?P<op>[lr])\.(?P<mode>wrap|clamp)\.b32", "b32 b32 u32", "b32")
def funnel_shift(o: Options, low: Array, high: Array, by: Array) -> Array:
    """The upper half of (high, low) shifted left, or the lower one of it shifted right."""
    by = by & np.uint32(31) if o["mode"] == "wrap" else np.minimum(by, np.uint32(32))
    both = np.asarray(high).astype(np.uint64) << np.uint64(32) | np.asarray(low).astype(np.uint64)
    by = np.asarray(by).astype(np.uint64)
    return (both << by) >> np.uint64(32) if o["op"] == "l" else both >> by


@pure(r"prmt\.b32", "b32 b32 b32", "b32")
def permute(o: Options, a: Array, b: Array, selector: Array) -> Array:
    """Byte i is that of (b, a) which nibble i of the selector names, or 8 copies of its sign."""
    both = np.asarray(b).astype(np.uint64) << np.uint64(32) | np.asarray(a).astype(np.uint64)
    result = np.uint64(0)
    for i in range(4):
        nibble = (np.asarray(selector).astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(15)
        byte = (both >> ((nibble & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        result = result | np.where(nibble & np.uint64(8), sign, byte) << np.uint64(8 * i)
    return result


@pure(r"bfe\.(?P<type>[us]32)", "type u32 u32")
def extract_field(o: Options, a: Array, position: Array, length: Array) -> Array:
    """Bits from position on; beyond the end a copy of the sign, for s32 of the field's own."""
    position, length = (np.asarray(x).astype(np.int64) & 255 for x in (position, length))
    extended = np.asarray(a).astype(np.int64)
    shifted = extended >> np.minimum(position, 63)
    short = np.minimum(length, 32)
    field = shifted & ((1 << short) - 1)
    if o["type"] == "s32":
        last = np.minimum(position + length - 1, 31)
        sign = np.where(length > 0, (extended >> last) & 1, 0)
        return np.where(sign == 1, field | (-1 << short), field)
    return field


@pure(r"bfi\.b32", "b32 b32 u32 u32", "b32")
def insert_field(o: Options, a: Array, b: Array, position: Array, length: Array) -> Array:
    """b with the lowest bits of a put at the position."""
    position, length = (np.asarray(x).astype(np.int64) & 255 for x in (position, length))
    mask = ((1 << np.minimum(length, 32)) - 1) << np.minimum(position, 32)
    shifted = np.asarray(a).astype(np.int64) << np.minimum(position, 31)
    return (np.asarray(b).astype(np.int64) & ~mask) | (shifted & mask)


@pure(r"dp4a\.u32\.u32", "u32 u32 u32", "u32")
def sum_of_byte_products(o: Options, a: Array, b: Array, c: Array) -> Array:
    """c + the products of the four bytes of a with those of b."""
    total = np.asarray(c)
    for shift in (np.uint32(8 * i) for i in range(4)):
        total = total + (a >> shift & np.uint32(255)) * (b >> shift & np.uint32(255))
    return total


@pure(r"popc\.(?P<type>b32|b64)", "type", "u32")
def count_ones(o: Options, a: Array) -> Array:
    return np.bitwise_count(a)


@pure(r"clz\.b32", "b32", "u32")
def count_leading_zeros(o: Options, a: Array) -> Array:
    return 32 - np.frexp(np.asarray(a).astype(np.float64))[1]


# Floats. The result is that of exact arithmetic, rounded once.


def _rounded(kind: str, function: Callable[..., Array], *sources: Array) -> Array:
    """The function on the numbers that bits of this type stand for, as such bits again."""
    if kind.endswith("x2"):
        return words(function(*(halves(x, kind).astype(np.float64) for x in sources)), kind)
    if kind == "bf16":
        return to_bfloat16(function(*(from_bfloat16(x).astype(np.float64) for x in sources)))
    if kind == "f16":
        exact = function(*(np.asarray(x).astype(np.float64) for x in sources))
        return to_odd(exact).astype(np.float16)
    return function(*sources)


FLOATS = SIMPLE | {"mul": np.multiply, "div": np.divide}


@pure(rf"(?P<op>add|sub|mul)(\.rn)?\.{FLOAT}", "type type")
@pure(r"(?P<op>div)\.rn\.(?P<type>f32|f64)", "type type")
def arithmetic(o: Options, a: Array, b: Array) -> Array:
    return _rounded(o["type"], FLOATS[o["op"]], a, b)


@pure(r"div\.full\.f32", "f32 f32", "f32")
def divide_nearly(o: Options, a: Array, b: Array) -> Array:
    """To 2 units in the last place on hardware; to the nearest here."""
    return np.divide(a, b)


@pure(rf"(?P<op>min|max)(?P<nan>\.NaN)?\.{FLOAT}", "type type")
def extremum(o: Options, a: Array, b: Array) -> Array:
    """Of a NaN and a number the number, or, with .NaN, NaN."""
    if o["nan"]:
        return _rounded(o["type"], SIMPLE[o["op"]], a, b)
    return _rounded(o["type"], np.fmin if o["op"] == "min" else np.fmax, a, b)


@pure(rf"fma\.rn\.{FLOAT}", "type type type")
def fused(o: Options, a: Array, b: Array, c: Array) -> Array:
    if o["type"] == "f64":
        raise NotImplementedError("fma.rn.f64 would be rounded twice")
    if o["type"] == "f32":
        wide_sources = (np.asarray(x).astype(np.float64) for x in (a, b, c))
        return _sum_to_odd(*wide_sources).astype(np.float32)
    return _rounded(o["type"], _sum_to_odd, a, b, c)


def _sum_to_odd(a: Array, b: Array, c: Array) -> Array:
    """a b + c in float64, inexact sums with an odd last bit; a b is exact: 48 bits at most."""
    product = a * b
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)  # exact (Knuth's TwoSum)
    bits = np.ascontiguousarray(total).view(np.int64)
    inexact = (error != 0) & np.isfinite(total) & (bits & 1 == 0)
    away = (error > 0) == (total > 0)
    return (
        (bits + np.where(inexact, np.where(away, 1, -1), 0)).view(np.float64).reshape(total.shape)
    )


@pure(rf"(?P<op>neg|abs)\.{FLOAT}", "type")
def sign(o: Options, a: Array) -> Array:
    """The sign bit alone: a NaN keeps its others."""
    kind = o["type"]
    bits = 16 if "16" in kind else int(kind[1:])
    total = 32 if kind.endswith("x2") else bits
    mask = (1 << (bits - 1)) * (1 + (1 << 16) * (total > bits))
    dtype = TYPES[f"u{total}"]
    raw = np.asarray(a).view(dtype)
    mixed = raw ^ dtype(mask) if o["op"] == "neg" else raw & dtype(~mask & ((1 << total) - 1))
    return mixed.view(TYPES[kind])


@pure(r"rcp\.rn\.f32", "f32", "f32")
def reciprocal(o: Options, a: Array) -> Array:
    return np.divide(np.float32(1), a)


@pure(r"sqrt\.rn\.f32", "f32", "f32")
def square_root(o: Options, a: Array) -> Array:
    return np.sqrt(a)


# By how many units in the last place they are off.
approximations_off = 0


@pure(r"(?P<op>rsqrt|ex2|rcp)\.approx(?P<flush>\.ftz)?\.f32", "f32", "f32")
def approximation(o: Options, a: Array) -> Array:
    """To a few units in the last place on hardware; to the nearest here, unless a test wants them
    to be off."""
    if o["flush"]:
        a = _flushed(np.asarray(a))
    exact = np.asarray(a).astype(np.float64)
    result = {"rsqrt": lambda x: 1 / np.sqrt(x), "ex2": np.exp2, "rcp": lambda x: 1 / x}[o["op"]]
    near = result(exact).astype(np.float32)
    if approximations_off:
        regular = np.isfinite(near) & (near != 0)
        moved = (np.ascontiguousarray(near).view(np.int32) + approximations_off).view(np.float32)
        near = np.where(regular, moved.reshape(near.shape), near)
    return _flushed(near) if o["flush"] else near


def _flushed(a: Array) -> Array:
    tiny = np.finfo(np.float32).smallest_normal
    return np.where(np.abs(a) < tiny, np.copysign(np.float32(0), a), a)


# Comparisons and choices.

COMPARE = {
    **{"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal},
    **{"gt": np.greater, "ge": np.greater_equal},
}


@pure(
    r"setp\.(?P<op>eq|ne|lt|le|gt|ge)(\.(?P<logic>and|or|xor))?\.(?P<type>[usb](16|32|64))",
    "type type",
    "pred",
)
@pure(
    r"setp\.(?P<op>eq|ne|lt|le|gt|ge|num|nan)(?P<unordered>u)?(\.(?P<logic>and|or|xor))?\.(?P<type>f32|f64|f16)",
    "type type",
    "pred",
)
def compare(o: Options, a: Array, b: Array, *previous: Array) -> Array:
    """Of floats: false when one is NaN, or true with u behind the comparison."""
    result = _comparison(o, a, b)
    return LOGIC[o["logic"]](result, previous[0]) if previous else result


def _comparison(o: Options, a: Array, b: Array) -> Array:
    if o["type"][0] != "f":
        return COMPARE[o["op"]](a, b)
    unordered = np.isnan(a) | np.isnan(b)
    if o["op"] in ("num", "nan"):
        return unordered if o["op"] == "nan" else ~unordered
    result = COMPARE[o["op"]](a, b)
    return result | unordered if o["unordered"] else result & ~unordered


@pure(r"selp\.(?P<type>[bus](16|32|64)|f32|f64)", "type type pred")
def select(o: Options, a: Array, b: Array, condition: Array) -> Array:
    return np.where(condition, a, b)


@pure(r"mov\.(?P<type>[bus](16|32|64)|f32|f64|pred)", "type")
def copy(o: Options, a: Array) -> Array:
    return a


@pure(r"cvta(?P<to>\.to)?\.(?P<space>global|shared|local|param)\.(?P<type>u64)", "type")
def convert_address(o: Options, a: Array) -> Array:
    """From a space's own addresses to generic ones, or back."""
    window = np.uint64(WINDOWS.get(o["space"], 0))
    return a - window if o["to"] else a + window
