"""Each instruction of the PTX interpreter against what the PTX ISA says that it computes."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sim.arithmetic import PURE
from sim.formats import TYPES, size_of
from sim.machine import Launch, execute
from sim.memory import GlobalMemory
from sim.parser import PtxError, parse
from sim.program import Program
from sim.transfers import EFFECTS
from sim.warps import TOGETHER

NAN, INF = float("nan"), float("inf")
TINY = 2.0**-149
BF16 = {1.0: 0x3F80, 1.5: 0x3FC0, -2.0: 0xC000, 3.0: 0x4040}


def pair(low: int, high: int) -> int:
    return high << 16 | low


# Mnemonic, types of the operands and of the result, operands, result. Most numbers are worked out
# by hand from section 9.7 of the PTX ISA.
ROWS: list[tuple[str, str, tuple[Any, ...], Any]] = [
    ("add.s32", "s32 s32 s32", (2**31 - 1, 1), -(2**31)),
    ("add.u16", "u16 u16 u16", (65535, 2), 1),
    ("sub.s64", "s64 s64 s64", (-5, 7), -12),
    ("min.s32", "s32 s32 s32", (-1, 3), -1),
    ("max.u32", "u32 u32 u32", (0xFFFFFFFF, 3), 0xFFFFFFFF),
    ("neg.s32", "s32 s32", (-(2**31),), -(2**31)),
    ("abs.s32", "s32 s32", (-7,), 7),
    ("mul.lo.s32", "s32 s32 s32", (2**30, 6), -(2**31)),
    ("mul.hi.u32", "u32 u32 u32", (0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFE),
    ("mul.hi.s32", "s32 s32 s32", (-1, 5), -1),
    ("mul.wide.s32", "s32 s32 s64", (-3, 2**30), -3 * 2**30),
    ("mad.lo.s32", "s32 s32 s32 s32", (7, -2, 20), 6),
    ("mad.wide.u32", "u32 u32 u64 u64", (2**32 - 1, 2, 1), 2**33 - 1),
    ("div.s32", "s32 s32 s32", (-7, 2), -3),
    ("rem.s32", "s32 s32 s32", (-7, 2), -1),
    ("div.u64", "u64 u64 u64", (2**63, 3), 2**63 // 3),
    ("and.b32", "b32 b32 b32", (0b1100, 0b1010), 0b1000),
    ("or.pred", "pred pred pred", (0, 1), 1),
    ("xor.b64", "b64 b64 b64", (2**40 + 5, 5), 2**40),
    ("not.b16", "b16 b16", (0x00FF,), 0xFF00),
    ("lop3.b32", "b32 b32 b32 b32 b32", (0b1111, 0b1100, 0b1010, 0xCA), 0b1100),
    ("shl.b32", "b32 u32 b32", (3, 31), 0x80000000),
    ("shl.b32", "b32 u32 b32", (3, 32), 0),
    ("shr.s32", "s32 u32 s32", (-8, 40), -1),
    ("shr.u32", "u32 u32 u32", (0x80000000, 31), 1),
    ("shf.l.wrap.b32", "b32 b32 u32 b32", (0x80000001, 0x7, 33), 0xF),
    ("shf.r.wrap.b32", "b32 b32 u32 b32", (0x80000000, 0x1, 33), 0xC0000000),
    ("shf.r.clamp.b32", "b32 b32 u32 b32", (0x1, 0x80000007, 40), 0x80000007),
    ("prmt.b32", "b32 b32 b32 b32", (0x33221100, 0x77665544, 0x7531), 0x77553311),
    ("prmt.b32", "b32 b32 b32 b32", (0x80000000, 0x7F, 0x000B | 0xC0), 0x000000FF),
    ("bfe.u32", "u32 u32 u32 u32", (0xABCD1234, 8, 8), 0x12),
    ("bfe.s32", "s32 u32 u32 s32", (0x0000F000, 12, 4), -1),
    ("bfi.b32", "b32 b32 u32 u32 b32", (0xFF, 0, 4, 4), 0xF0),
    ("dp4a.u32.u32", "u32 u32 u32 u32", (0x04030201, 0xFF000A01, 7), 4 * 255 + 2 * 10 + 1 + 7),
    ("popc.b32", "b32 u32", (0xF0F0,), 8),
    ("clz.b32", "b32 u32", (1,), 31),
    ("clz.b32", "b32 u32", (0,), 32),
    ("add.rn.f32", "f32 f32 f32", (1.0, 2.0**-24), 1.0),
    ("sub.f32", "f32 f32 f32", (TINY, 2 * TINY), -TINY),
    ("mul.rn.f32", "f32 f32 f32", (1 + 2.0**-23, 1 + 2.0**-23), 1 + 2.0**-22),
    ("mul.bf16x2", "b32 b32 b32", (pair(BF16[1.5], BF16[-2.0]), pair(BF16[-2.0], BF16[1.5])),
     pair(0xC040, 0xC040)),
    ("div.rn.f32", "f32 f32 f32", (1.0, 3.0), float(np.float32(1) / np.float32(3))),
    ("div.full.f32", "f32 f32 f32", (6.0, 3.0), 2.0),
    ("max.f32", "f32 f32 f32", (NAN, 3.0), 3.0),
    ("min.f32", "f32 f32 f32", (-1.0, 3.0), -1.0),
    ("max.NaN.f32", "f32 f32 f32", (NAN, 3.0), NAN),
    # 2^-22 + 2^-46 is the middle of two floats; 2^-22 + 2^-45 is one, that rounding the product
    # first would lose.
    ("fma.rn.f32", "f32 f32 f32 f32", (1 + 2.0**-23, 1 + 2.0**-23, -1.0), 2.0**-22),
    ("fma.rn.f32", "f32 f32 f32 f32", (1 + 2.0**-22, 1 + 2.0**-23, -1.0 - 2.0**-23),
     2.0**-22 + 2.0**-45),
    # A sum just above the middle of two floats, by less than a double can tell.
    ("fma.rn.f32", "f32 f32 f32 f32", (2.0**-70, 2.0**-20, 1 + 2.0**-23), 1 + 2.0**-23),
    ("fma.rn.bf16x2", "b32 b32 b32 b32",
     (pair(BF16[1.5], BF16[1.0]), pair(BF16[-2.0], BF16[3.0]), pair(BF16[3.0], 0)),
     pair(0x0000, 0x4040)),
    ("neg.f32", "f32 f32", (2.5,), -2.5),
    ("abs.bf16", "b16 b16", (BF16[-2.0],), 0x4000),
    ("rcp.rn.f32", "f32 f32", (4.0,), 0.25),
    ("sqrt.rn.f32", "f32 f32", (2.0,), float(np.float32(2.0**0.5))),
    ("ex2.approx.f32", "f32 f32", (3.0,), 8.0),
    ("rcp.approx.ftz.f32", "f32 f32", (2.0**127,), 0.0),
    ("rcp.approx.ftz.f32", "f32 f32", (-8.0,), -0.125),
    ("rsqrt.approx.ftz.f32", "f32 f32", (4.0,), 0.5),
    ("cvt.s32.s8", "s8 s32", (-3,), -3),
    ("cvt.sat.u8.s32", "s32 u8", (300,), 255),
    ("cvt.u16.u32", "u32 u16", (0x12345,), 0x2345),
    ("cvt.rn.f32.s32", "s32 f32", (2**24 + 1,), 2.0**24),
    ("cvt.rzi.s32.f32", "f32 s32", (-2.9,), -2),
    ("cvt.rni.s32.f32", "f32 s32", (2.5,), 2),
    ("cvt.f32.bf16", "b16 f32", (BF16[-2.0],), -2.0),
    ("cvt.f32.f16", "b16 f32", (0x3C00,), 1.0),
    ("cvt.rn.bf16.f32", "f32 b16", (1 + 3 * 2.0**-8,), 0x3F82),
    ("cvt.rn.f16.f32", "f32 b16", (1 + 2.0**-11,), 0x3C00),
    ("cvt.rn.bf16x2.f32", "f32 f32 b32", (1.0, -2.0), pair(BF16[-2.0], BF16[1.0])),
    ("cvt.rmi.f32.f32", "f32 f32", (-1.5,), -2.0),
    ("cvt.rpi.f32.f32", "f32 f32", (-1.5,), -1.0),
    ("cvt.rzi.f32.f32", "f32 f32", (-1.5,), -1.0),
    ("cvt.rni.f32.f32", "f32 f32", (-2.5,), -2.0),
    ("cvt.rmi.s32.f32", "f32 s32", (-2.5,), -3),
    ("cvt.rpi.s32.f32", "f32 s32", (-2.5,), -2),
    *((f"setp.{name}.s32", "s32 s32 pred", pair, int(name in holds.split()))
      for pair, holds in (((-1, 0), "lt le ne"), ((3, 3), "eq le ge"), ((1, -2), "gt ge ne"))
      for name in ("eq", "ne", "lt", "le", "gt", "ge")),
    *((f"setp.{name}.f32", "f32 f32 pred", pair, int(name in holds.split()))
      for pair, holds in (((-1.0, 0.0), "lt le ne"), ((0.0, -0.0), "eq le ge"),
                          ((1.0, -2.0), "gt ge ne"), ((NAN, NAN), ""))
      for name in ("eq", "ne", "lt", "le", "gt", "ge")),
    *((f"setp.lt.{name}.s32", "s32 s32 pred pred", (first, 1, second), expected)
      for name, outcomes in (("and", (0, 0, 0, 1)), ("or", (0, 1, 1, 1)), ("xor", (0, 1, 1, 0)))
      for expected, (first, second) in zip(outcomes, ((1, 0), (1, 1), (0, 0), (0, 1)))),
    *((f"setp.lt.{name}.f32", "f32 f32 pred pred", (first, 1.0, second), expected)
      for name, outcomes in (("and", (0, 0, 0, 1)), ("or", (0, 1, 1, 1)), ("xor", (0, 1, 1, 0)))
      for expected, (first, second) in zip(outcomes, ((1.0, 0), (1.0, 1), (0.0, 0), (0.0, 1)))),
    ("setp.lt.f32", "f32 f32 pred", (NAN, 0.0), 0),
    ("setp.ltu.f32", "f32 f32 pred", (NAN, 0.0), 1),
    ("setp.num.f32", "f32 f32 pred", (1.0, NAN), 0),
    ("setp.nan.f32", "f32 f32 pred", (1.0, NAN), 1),
    ("selp.b32", "b32 b32 pred b32", (5, 6, 1), 5),
    ("mov.u32", "u32 u32", (7,), 7),
    ("cvta.shared.u64", "u64 u64", (16,), 0x10_0000_0010),
]  # fmt: skip


def memory_kind(kind: str) -> str:
    return "b32" if kind == "pred" else f"b{8 * size_of(kind)}"


def program_of(mnemonic: str, kinds: list[str]) -> str:
    """A kernel that loads the operands from the first pointer on, and stores the result."""
    lines = [".visible .entry test(" + ", ".join(f".param .u64 p{i}" for i in range(len(kinds)))]
    lines += [") {", ".reg .b64 %rd<20>;", ".reg .pred %q;"]
    lines += [f".reg .{memory_kind(kind)} %v{i};" for i, kind in enumerate(kinds)]
    lines += [f"ld.param.u64 %rd{i}, [p{i}];" for i in range(len(kinds))]
    operands = []
    for i, kind in enumerate(kinds[:-1]):
        lines.append(f"ld.global.{memory_kind(kind)} %v{i}, [%rd{i}];")
        if kind == "pred":
            lines.append(f"setp.ne.b32 %q, %v{i}, 0;")
        operands.append("%q" if kind == "pred" else f"%v{i}")
    last = len(kinds) - 1
    target = "%q" if kinds[-1] == "pred" else f"%v{last}"
    lines.append(f"{mnemonic} {', '.join([target, *operands])};")
    if kinds[-1] == "pred":
        lines.append(f"selp.b32 %v{last}, 1, 0, %q;")
    lines += [f"st.global.{memory_kind(kinds[-1])} [%rd{last}], %v{last};", "ret;", "}"]
    return "\n".join(lines)


def run(text: str, arrays: list[np.ndarray], result: np.ndarray, threads: int = 32) -> None:
    """Run the kernel `test` on pointers to arrays; the last one is the result."""
    module = parse(text)
    memory = GlobalMemory(1 << 20)
    addresses = []
    for array in arrays:
        addresses.append(memory.allocate(array.nbytes))
        memory.write(addresses[-1], array.tobytes())
    addresses.append(memory.allocate(result.nbytes))
    packed = struct.pack(f"<{len(addresses)}Q", *addresses)
    execute(
        Program(module.kernels["test"], module),
        Launch((1, 1, 1), (threads, 1, 1), packed, 0),
        memory,
    )
    content, written = memory.read(addresses[-1], result.nbytes)
    assert written.all()
    result.reshape(-1).view(np.uint8)[:] = np.frombuffer(content, np.uint8)


@pytest.mark.parametrize(("mnemonic", "kinds", "operands", "expected"), ROWS)
def test_computes_what_the_isa_says(
    mnemonic: str, kinds: str, operands: tuple, expected: Any
) -> None:
    names = kinds.split()
    types = [TYPES["b32" if name == "pred" else name] for name in names]
    arrays = [np.array([value]).astype(t) for value, t in zip(operands, types[:-1], strict=True)]
    result = np.zeros(1, types[-1])
    run(program_of(mnemonic, names), arrays, result)
    assert result.tobytes() == np.array([expected]).astype(types[-1]).tobytes()


def test_every_other_instruction_is_in_a_kernel_below() -> None:
    mnemonics = set(re.findall(r"[a-z]\w*(?:(?:\.|::)\w+)+", Path(__file__).read_text()))
    untested = {
        builder.__name__
        for pattern, builder in (*EFFECTS, *TOGETHER)
        if not any(pattern.fullmatch(mnemonic) for mnemonic in mnemonics)
    }
    assert untested == set()


# The parts of a mnemonic that change what it computes, beside its types.
CHOICES = re.compile(r"\(\?P<(op|round|mode|nan|unordered|logic|saturate|flush)>([^()]*)\)")


def test_every_opcode_has_a_row_with_each_of_its_modifiers() -> None:
    mnemonics = [row[0] for row in ROWS]
    untested = set()
    for pure in PURE:
        options = [found.groupdict() for m in mnemonics if (found := pure.pattern.fullmatch(m))]
        if not options:
            untested.add(pure.function.__name__)
        for name, choices in CHOICES.findall(pure.pattern.pattern):
            listed = choices.replace("\\", "").strip("[]")
            given = list(listed) if choices.startswith("[") else listed.split("|")
            untested |= {
                f"{pure.function.__name__}: {choice}"
                for choice in given
                if choice not in {o[name] for o in options}
            }
    assert untested == set()


@pytest.mark.parametrize(
    "mnemonic", ["add.rz.f32", "mul.ftz.f32", "wgmma.fence.sync.aligned", "shl.b8", "atom.add.u32"]
)
def test_what_is_not_modelled_is_an_error(mnemonic: str) -> None:
    with pytest.raises(PtxError, match="not known"):
        run(program_of(mnemonic, ["b32", "b32", "b32"]), [np.zeros(1, np.uint32)] * 2,
            np.zeros(1, np.uint32))  # fmt: skip


HEADER = """
.visible .entry test(.param .u64 p0, .param .u64 p1) {
.reg .b32 %r<40>; .reg .b64 %rd<10>; .reg .pred %p<4>; .reg .f32 %f<20>;
.shared .align 16 .b8 tile[1024];
ld.param.u64 %rd0, [p0]; ld.param.u64 %rd1, [p1];
mov.u32 %r0, %tid.x; mul.wide.u32 %rd2, %r0, 4;
add.s64 %rd3, %rd0, %rd2; add.s64 %rd4, %rd1, %rd2;
ld.global.u32 %r1, [%rd3];
"""
FOOTER = "\nst.global.u32 [%rd4], %r2;\nret;\n}"
LANES = np.arange(32, dtype=np.uint32)


def run_lanes(body: str, given: np.ndarray = LANES) -> np.ndarray:
    """%r1 is what each of the threads is given; the result is %r2."""
    result = np.zeros_like(given)
    run(HEADER + body + FOOTER, [given], result, len(given))
    return result


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("shfl.sync.bfly.b32 %r2, %r1, 4, 31, 0xffffffff;", LANES ^ 4),
        ("shfl.sync.idx.b32 %r2, %r1, 3, 31, 0xffffffff;", np.full(32, 3)),
        ("shfl.sync.idx.b32 %r2, %r1, 3, 0x1c1f, 0xffffffff;", LANES // 4 * 4 + 3),  # width 4
        ("shfl.sync.up.b32 %r2, %r1, 2, 0, 0xffffffff;", np.where(LANES < 2, LANES, LANES - 2)),
        ("shfl.sync.down.b32 %r2, %r1, 2, 31, 0xffffffff;", np.minimum(LANES + 2, 31 + 0 * LANES)
         * (LANES < 30) + LANES * (LANES >= 30)),
        ("redux.sync.max.s32 %r2, %r1, 0xffffffff;", np.full(32, 31)),
        ("redux.sync.add.u32 %r2, %r1, 0xffffffff;", np.full(32, 31 * 16)),
        ("setp.lt.u32 %p0, %r1, 5; vote.sync.ballot.b32 %r2, %p0, 0xffffffff;", np.full(32, 31)),
        ("setp.lt.u32 %p0, %r1, 5; vote.sync.any.pred %p1, %p0, 0xffffffff; "
         "selp.b32 %r2, 1, 0, %p1;", np.full(32, 1)),
        ("setp.lt.u32 %p0, %r1, 5; vote.sync.all.pred %p1, %p0, 0xffffffff; "
         "selp.b32 %r2, 1, 0, %p1;", np.full(32, 0)),
        ("setp.lt.u32 %p0, %r1, 5; bar.red.or.pred %p1, 0, %p0; selp.b32 %r2, 1, 0, %p1;",
         np.full(32, 1)),
        ("setp.lt.u32 %p0, %r1, 5; bar.red.and.pred %p1, 0, %p0; selp.b32 %r2, 1, 0, %p1;",
         np.full(32, 0)),
        ("mov.b64 %rd5, {%r1, %r0}; mov.b64 {%r3, %r2}, %rd5;", LANES),
        ("mov.u32 %r2, %laneid;", LANES),
        ("mov.u32 %r2, %ntid.x;", np.full(32, 32)),
        ("shl.b32 %r3, %r0, 2; mov.u32 %r4, tile; add.s32 %r4, %r4, %r3; st.shared.u32 [%r4], %r1; "
         "bar.sync 0; ld.shared.u32 %r2, [%r4];", LANES),
    ],
)  # fmt: skip
def test_threads_do_together_what_the_isa_says(instruction: str, expected: np.ndarray) -> None:
    assert run_lanes(instruction).tolist() == expected.tolist()


def test_a_half_warp_shuffles_by_itself() -> None:
    body = """
    setp.lt.u32 %p0, %r1, 16; mov.u32 %r2, 99;
    @!%p0 bra END;
    shfl.sync.idx.b32 %r2, %r1, 7, 31, 0x0000ffff;
    END:
    """
    assert run_lanes(body).tolist() == [7] * 16 + [99] * 16


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.u32 %r2, [%rd3+128];", "out of bounds"),
        ("ld.global.u32 %r2, [%rd3+2];", "misaligned"),
        ("ld.global.u32 %r2, [%rd4];", "nobody has written"),
        ("ld.shared.u32 %r2, [tile];", "nobody has written"),
        ("ld.shared.u32 %r2, [tile+1024];", "out of bounds"),
        ("st.shared.u32 [tile], %r1; mov.u32 %r2, 0;", "different values"),
        ("st.shared.u32 [tile], 5; bar.warp.sync 0xffffffff; ld.shared.u32 %r2, [tile];", None),
        ("setp.eq.s32 %p0, %r0, 0; @%p0 st.shared.u32 [tile], 5; ld.shared.u32 %r2, [tile];",
         "race"),
        ("st.shared.u32 [tile], 5; bar.sync 0; ld.shared.u32 %r2, [tile]; setp.eq.s32 %p0, %r0, 0;"
         "@%p0 st.shared.u32 [tile], 6;", "write after read"),
        ("setp.eq.s32 %p0, %r0, 0; @%p0 ret; bar.sync 0; mov.u32 %r2, 0;", "do not reach"),
        ("setp.eq.s32 %p0, %r0, 0; @%p0 bra A; shfl.sync.bfly.b32 %r2, %r1, 1, 31, 0xffffffff;"
         " A: mov.u32 %r3, 0; bar.sync 0;", "do not reach|deadlock"),
        ("cp.async.ca.shared.global [tile], [%rd0], 16; ld.shared.u32 %r2, [tile];",
         "nobody has written|race"),
    ],
)  # fmt: skip
def test_what_a_kernel_may_not_do_is_found(body: str, message: str | None) -> None:
    if message is None:
        assert run_lanes(body).tolist() == [5] * 32
        return
    with pytest.raises(PtxError, match=message) as caught:
        run_lanes(body)
    assert "kernel test" in str(caught.value) and "thread" in str(caught.value)


@pytest.mark.parametrize(
    ("body", "thread"),
    [
        ("setp.ge.u32 %p0, %r0, 20; @%p0 ld.global.u32 %r2, [%rd3+4]; @!%p0 mov.u32 %r2, 0;", 31),
        # Of the copies that read, of lanes 8 on, the one of lane 29 leaves the allocation.
        ("setp.ge.u32 %p0, %r0, 8; selp.b32 %r5, 4, 0, %p0; shl.b32 %r3, %r0, 2; mov.u32 %r4, tile;"
         "add.s32 %r4, %r4, %r3; cp.async.ca.shared.global [%r4], [%rd3+12], 4, %r5;", 29),
        # A half of the warp waits for the other; lane 3 asks one that takes no part.
        ("setp.lt.u32 %p0, %r0, 16; @!%p0 bra END; setp.eq.u32 %p1, %r0, 3;"
         "selp.b32 %r6, 20, 1, %p1; shfl.sync.idx.b32 %r2, %r1, %r6, 31, 0x0000ffff;"
         "END: mov.u32 %r2, 0;", 3),
    ],
)  # fmt: skip
def test_the_thread_at_fault_is_named(body: str, thread: int) -> None:
    with pytest.raises(PtxError, match=f"block 0, thread {thread}\n"):
        run_lanes(body)


def test_copies_are_there_after_their_wait() -> None:
    body = """
    shl.b32 %r3, %r0, 4; mov.u32 %r4, tile; add.s32 %r4, %r4, %r3;
    mul.wide.u32 %rd5, %r0, 12; add.s64 %rd5, %rd5, %rd3;
    setp.lt.u32 %p0, %r0, 8; selp.b32 %r5, 16, 0, %p0; selp.b64 %rd6, %rd5, %rd0, %p0;
    cp.async.cg.shared.global [%r4], [%rd6], 16, %r5;
    cp.async.commit_group;
    cp.async.wait_group 0;
    ld.shared.u32 %r2, [%r4];
    """
    assert run_lanes(body).tolist() == [4 * i for i in range(8)] + [0] * 24


def test_matrices_are_loaded_and_multiplied_as_the_isa_lays_them_out() -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(-4, 5, (16, 16)).astype(np.float16)
    b = rng.integers(-4, 5, (16, 8)).astype(np.float16)
    text = """
.visible .entry test(.param .u64 p0, .param .u64 p1, .param .u64 p2) {
.reg .b32 %r<40>; .reg .b64 %rd<10>; .reg .f32 %f<20>;
.shared .align 16 .b8 tile[1024];
ld.param.u64 %rd0, [p0]; ld.param.u64 %rd1, [p1]; ld.param.u64 %rd2, [p2];
mov.u32 %r0, %tid.x; mul.wide.u32 %rd3, %r0, 16;
add.s64 %rd4, %rd0, %rd3; ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd4];
shl.b32 %r5, %r0, 4; mov.u32 %r6, tile; add.s32 %r6, %r6, %r5;
st.shared.v4.u32 [%r6], {%r1, %r2, %r3, %r4};
and.b32 %r7, %r0, 15; mul.wide.u32 %rd5, %r7, 16; add.s64 %rd5, %rd5, %rd1;
ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd5];
shl.b32 %r8, %r7, 4; mov.u32 %r9, tile; add.s32 %r9, %r9, %r8;
st.shared.v4.u32 [%r9+512], {%r1, %r2, %r3, %r4};
bar.sync 0;
and.b32 %r10, %r0, 15; shl.b32 %r10, %r10, 5; shr.u32 %r11, %r0, 4; shl.b32 %r11, %r11, 4;
add.s32 %r12, %r10, %r11; mov.u32 %r13, tile; add.s32 %r12, %r12, %r13;
ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r12];
ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r24, %r25}, [%r9+512];
mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
  {%f0, %f1, %f2, %f3}, {%r20, %r21, %r22, %r23}, {%r24, %r25},
  {0f00000000, 0f00000000, 0f00000000, 0f3F800000};
shr.u32 %r14, %r0, 2; shl.b32 %r14, %r14, 5; and.b32 %r15, %r0, 3; shl.b32 %r15, %r15, 3;
add.s32 %r14, %r14, %r15; cvt.u64.u32 %rd6, %r14; add.s64 %rd6, %rd6, %rd2;
st.global.v2.f32 [%rd6], {%f0, %f1};
st.global.v2.f32 [%rd6+256], {%f2, %f3};
ret;
}
"""
    result = np.zeros((16, 8), np.float32)
    run(text, [a, b], result)
    one = np.zeros((16, 8), np.float32)
    one[8:, 1::2] = 1  # the last of the sums that the product starts from
    assert np.array_equal(result, a.astype(np.float32) @ b.astype(np.float32) + one)
