"""4-bit codes to 16-bit values without memory: all sixteen products of a block lie in registers.

A block has sixteen different values, level times scale. A thread makes them once for a chunk of its
block, rounded as they are to be, and then only picks: the results have the bits of rounding
each product by itself. PTX's `prmt` picks four bytes out of eight by four nibbles of a word,
which are the codes. So the low bytes of the sixteen values lie in four registers, the high bytes in
four more; codes up to 7 and from 8 on are looked up apart, and their fourth bit says which counts.
That is 21 instructions for eight values; making the table takes 32.

Read next: matmul_4bit.py.
"""

from __future__ import annotations

import triton
import triton.language as tl


def _table_asm(narrow: str) -> str:
    """$0 to $7: low and high bytes of the values of codes 0-3, 4-7, 8-11, 12-15. $8: the scale;
    $9 to $24: the levels."""
    pairs = "abcdefgh"
    lines = [f".reg .f32 even, odd; .reg .b32 {', '.join(pairs)};"]
    for i, pair in enumerate(pairs):
        lines += [
            f"mul.rn.f32 even, $8, ${9 + 2 * i}; mul.rn.f32 odd, $8, ${10 + 2 * i};",
            f"cvt.rn.{narrow}x2.f32 {pair}, odd, even;",
        ]
    for i in range(4):
        pair = f"{pairs[2 * i]}, {pairs[2 * i + 1]}"
        # Bytes 0, 2, 4, 6 and 1, 3, 5, 7 of two registers, from the right.
        lines.append(f"prmt.b32 ${i}, {pair}, 0x6420; prmt.b32 ${4 + i}, {pair}, 0x7531;")
    return "{" + "\n".join(lines) + "}"


def _pick_asm() -> str:
    """$0 to $3: pairs of values, of the word $4 and a table in $5 to $12.

    A word is four bytes of two codes each, the earlier one in the high nibble. The 9 in a selector,
    8 + 1, spreads the highest bit of byte 1 over a byte: of the word, for high nibbles, and of the
    word moved up by four bits (bytes 4 to 7), for low ones.
    """
    lines = [
        ".reg .b32 codes, upper, moved, large, low, other_low, high, other_high;",
        "and.b32 codes, $4, 0x77777777; shr.u32 upper, codes, 16; shl.b32 moved, $4, 4;",
    ]
    for i, (spread, four) in enumerate((("0x9d8c", "codes"), ("0xbfae", "upper"))):
        lines += [
            f"prmt.b32 large, $4, moved, {spread};",
            f"prmt.b32 low, $5, $6, {four}; prmt.b32 other_low, $7, $8, {four};",
            f"prmt.b32 high, $9, $10, {four}; prmt.b32 other_high, $11, $12, {four};",
            # Bit by bit: large ? other : this.
            "lop3.b32 low, large, other_low, low, 0xca;",
            "lop3.b32 high, large, other_high, high, 0xca;",
            # A low and a high byte are a value; the high nibble's, byte 1, comes first.
            f"prmt.b32 ${2 * i}, low, high, 0x4051; prmt.b32 ${2 * i + 1}, low, high, 0x6273;",
        ]
    return "{" + "\n".join(lines) + "}"


BFLOAT16_TABLE = tl.constexpr(_table_asm("bf16"))
FLOAT16_TABLE = tl.constexpr(_table_asm("f16"))
TABLE_OPERANDS = tl.constexpr(",".join(["=r"] * 8 + ["f"] * 17))
PICK = tl.constexpr(_pick_asm())
# Results are written while operands are still to be read: "&" keeps their registers apart.
PICK_OPERANDS = tl.constexpr(",".join(["=&r"] * 4 + ["r"] * 9))
FETCH = tl.constexpr("ld.global.nc.f32 $0, [$1];")


@triton.jit
def restore_chunks(
    words_ptr,  # int32 pointers (R, G, 4): the first vector of each of G chunks of R rows
    scale,  # float32 (R, G)
    codebook_ptr,  # float32 (16,)
    dtype: tl.constexpr,  # bfloat16 or float16
    VECTORS: tl.constexpr,  # of a chunk: 1 or 2
):
    """The values of chunks, dtype (R, G * VECTORS * 32): round(level * scale)."""
    R: tl.constexpr = words_ptr.shape[0]
    G: tl.constexpr = words_ptr.shape[1]
    # For every word, so that its thread has the table; equal ones are made once.
    table = _values_of_codes(tl.broadcast_to(scale[:, :, None], (R, G, 4)), codebook_ptr, dtype)
    pairs = _pick(tl.load(words_ptr), table)  # (R, G, 4, 2, 2)
    if VECTORS == 2:
        second = _pick(tl.load(words_ptr + 4), table)
        pairs = tl.permute(tl.join(pairs, second), (0, 1, 5, 2, 3, 4))
    first = pairs.to(tl.int16).to(dtype, bitcast=True)
    last = (pairs >> 16).to(tl.int16).to(dtype, bitcast=True)
    return tl.reshape(tl.join(first, last), (R, G * VECTORS * 32))


@triton.jit
def _values_of_codes(scale, codebook_ptr, dtype: tl.constexpr):
    # Levels are loaded, not constants: the compiler would make constants anew at every use.
    c = codebook_ptr
    return tl.inline_asm_elementwise(
        BFLOAT16_TABLE if dtype == tl.bfloat16 else FLOAT16_TABLE,
        TABLE_OPERANDS,
        [
            scale,
            tl.load(c), tl.load(c + 1), tl.load(c + 2), tl.load(c + 3),
            tl.load(c + 4), tl.load(c + 5), tl.load(c + 6), tl.load(c + 7),
            tl.load(c + 8), tl.load(c + 9), tl.load(c + 10), tl.load(c + 11),
            tl.load(c + 12), tl.load(c + 13), tl.load(c + 14), tl.load(c + 15),
        ],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )  # fmt: skip


@triton.jit
def _pick(words, table):
    """The values of each word's codes, in the order of memory: pairs (..., 2, 2)."""
    low_0, low_1, low_2, low_3, high_0, high_1, high_2, high_3 = table
    a, b, c, d = tl.inline_asm_elementwise(
        PICK,
        PICK_OPERANDS,
        [words, low_0, low_1, low_2, low_3, high_0, high_1, high_2, high_3],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def fetch_scales(
    absmax_ptr,
    nested_absmax_ptr,
    nested_codebook_ptr,
    offset_ptr,
    block,
    NESTED: tl.constexpr,
):
    """`decode.load_scales`, by loads of which Triton makes no asynchronous copies.

    In a loop it would copy each scale by itself to shared memory, four bytes at a time.
    """
    if NESTED:
        code = tl.load(absmax_ptr + block).to(tl.int32)
        scaled = _fetch(nested_codebook_ptr + code) * _fetch(nested_absmax_ptr + block // 256)
        return scaled + tl.load(offset_ptr)
    else:
        return _fetch(absmax_ptr + block)


@triton.jit
def _fetch(pointer):
    return tl.inline_asm_elementwise(FETCH, "=f,l", [pointer], tl.float32, is_pure=True, pack=1)
