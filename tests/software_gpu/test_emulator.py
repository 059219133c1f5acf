"""The emulator against values computed by hand, one group of instructions after another.

Programs are PTX written here: no Triton takes part. Numbers stand as their bits.
"""

from __future__ import annotations

import math
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from perf.software_gpu import build
from tests.software_gpu import emulator
from tests.software_gpu.emulator import EmulationError, Kernel, memory_of
from tests.software_gpu.emulator_ptx import Unsupported

if reason := emulator.missing(triton=False):
    pytest.skip(reason, allow_module_level=True)

DTYPES = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}


def f(x: float) -> int:
    """Return a float32's bits."""
    return struct.unpack("<I", struct.pack("<f", x))[0]


def d(x: float) -> int:
    """Return a float64's bits."""
    return struct.unpack("<Q", struct.pack("<d", x))[0]


def h(x: float) -> int:
    """Return a float16's bits."""
    return struct.unpack("<H", struct.pack("<e", x))[0]


def b(x: float) -> int:
    """Return a bfloat16's bits, of a number that is one."""
    assert f(x) & 0xFFFF == 0
    return f(x) >> 16


NAN, NAN_64, NAN_16 = 0x7FFFFFFF, 0x7FF8000000000000, 0x7FFF
SUBNORMAL = 0x00000001


def program(body: str, buffers: int, threads: int = 32, shared: int = 0) -> Kernel:
    """Make a kernel of buffers %x0, %x1, ...; %t is the thread, %q the program."""
    parameters = ", ".join(f".param .u64 buffer{k}" for k in range(buffers))
    loads = "\n".join(f"ld.param.b64 %x{k}, [buffer{k}];" for k in range(buffers))
    return Kernel(
        f"""
        .version 8.0
        .target sm_90
        .address_size 64
        .extern .shared .align 16 .b8 memory[];
        .visible .entry test({parameters})
        .reqntid {threads}
        {{
        .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<19>; .reg .b64 %d<9>; .reg .b64 %x<9>;
        .reg .b32 %t; .reg .b32 %q;
        mov.u32 %t, %tid.x; mov.u32 %q, %ctaid.x;
        {loads}
        {body}
        ret;
        }}""",
        shared,
    )


def signed(bits: int, width: int) -> int:
    """As torch keeps them."""
    return bits - (1 << width) if bits >> (width - 1) else bits


def run(body: str, *buffers: Tensor, grid: int = 1, threads: int = 32, shared: int = 0, **options):
    """Run a program on buffers, which are all that it may touch; no note may be left."""
    report = program(body, len(buffers), threads, shared).launch(
        (grid,), buffers, memory_of(buffers), **options
    )
    assert report.notes == []
    return report


def compute(statement: str, widths: list[int], rows: list[tuple[int, ...]]) -> list[int]:
    """Return what a statement makes, as %z, of operands %a, %b, ... of some widths in bits."""
    *of_operands, of_result = widths
    declared, loads, buffers = [], [], []
    for k, (name, width) in enumerate(zip("abcde", of_operands, strict=False)):
        declared.append(f".reg .b{max(width, 16)} %{name};")
        address = f"mul.wide.u32 %d1, %t, {width // 8}; add.s64 %d1, %d1, %x{k};"
        loads.append(f"{address} ld.global.b{width} %{name}, [%d1];")
        column = [signed(row[k], width) if width > 8 else row[k] for row in rows]
        buffers.append(torch.tensor(column, dtype=DTYPES[width]))
    out = torch.zeros(len(rows), dtype=DTYPES[of_result])
    run(
        f""".reg .b{of_result} %z; {" ".join(declared)} {" ".join(loads)}
        mov.b{of_result} %z, 0;
        {statement}
        mul.wide.u32 %d1, %t, {of_result // 8}; add.s64 %d1, %d1, %x{len(buffers)};
        st.global.b{of_result} [%d1], %z;""",
        *buffers,
        out,
        threads=len(rows),
    )
    return [x & ((1 << of_result) - 1) for x in out.tolist()]


# (statement, widths of operands and result, rows of operands and result)
CASES: list[tuple[str, list[int], list[tuple[int, ...]]]] = []


def case(statement: str, widths: list[int], *rows: tuple[int, ...]) -> None:
    CASES.append((statement, widths, list(rows)))


# --- single and double precision ----------------------------------------------------------------

ULP, ABOVE_1 = 2.0**-23, f(1 + 2.0**-23)
for mode, of_tie, of_more, of_negative in (
    ("rn", f(1), ABOVE_1, f(-1)),
    ("rz", f(1), f(1), f(-1)),
    ("rm", f(1), f(1), f(-1 - ULP)),
    ("rp", ABOVE_1, ABOVE_1, f(-1)),
):
    case(
        f"add.{mode}.f32 %z, %a, %b;",
        [32, 32, 32],
        (f(1), f(ULP / 2), of_tie),
        (f(1), f(0.75 * ULP), of_more),
        (f(-1), f(-ULP / 4), of_negative),
        (f(math.inf), f(-math.inf), NAN),
        (0x7FC01234, f(1), NAN),
    )
    case(
        f"add.{mode}.f64 %z, %a, %b;",
        [64, 64, 64],
        (d(-1), d(-(2.0**-54)), d(-1 - 2.0**-52) if mode == "rm" else d(-1)),
        (d(1), d(2.0**-54), d(1 + 2.0**-52) if mode == "rp" else d(1)),
    )
    third = 0x3EAAAAAB if mode in ("rn", "rp") else 0x3EAAAAAA
    case(f"div.{mode}.f32 %z, %a, %b;", [32, 32, 32], (f(1), f(3), third), (f(1), 0, f(math.inf)))
    case(f"rcp.{mode}.f32 %z, %a;", [32, 32], (f(3), third))
    root = 0x3FB504F4 if mode == "rp" else 0x3FB504F3
    case(f"sqrt.{mode}.f32 %z, %a;", [32, 32], (f(2), root), (f(-1), NAN), (f(-0.0), f(-0.0)))
    # 0.1 lies above the float32 below it by 3/4 of a step
    tenth = 0x3DCCCCCC if mode in ("rz", "rm") else 0x3DCCCCCD
    case(f"cvt.{mode}.f32.f64 %z, %a;", [64, 32], (d(0.1), tenth), (NAN_64, NAN))
    largest = f(math.inf) if mode in ("rn", "rp") else 0x7F7FFFFF
    case(f"cvt.{mode}.f32.f64 %z, %a;", [64, 32], (d(1e39), largest))
    subnormal = {"rn": 0, "rz": 0, "rm": 0, "rp": 1}[mode]
    case(f"cvt.{mode}.f32.f64 %z, %a;", [64, 32], (d(2.0**-150), subnormal))

case("sub.f32 %z, %a, %b;", [32, 32, 32], (f(1), f(3), f(-2)), (SUBNORMAL, 0, SUBNORMAL))
case("mul.f32 %z, %a, %b;", [32, 32, 32], (f(3), f(-0.5), f(-1.5)), (0, f(math.inf), NAN))
case("sub.ftz.f32 %z, %a, %b;", [32, 32, 32], (SUBNORMAL, 0, 0), (0x80000001, 0, f(-0.0)))
case("mul.ftz.f32 %z, %a, %b;", [32, 32, 32], (f(2.0**-100), f(-(2.0**-40)), f(-0.0)))
case(
    "add.sat.f32 %z, %a, %b;",
    [32, 32, 32],
    *[(f(2), f(3), f(1)), (f(-2), f(1), 0), (f(0.5), f(0.25), f(0.75)), (NAN, f(1), 0)],
)
case(  # rounded once: (1 + 2^-12)^2 - (1 + 2^-11) is 2^-24
    "fma.rn.f32 %z, %a, %b, %c;",
    [32, 32, 32, 32],
    (f(1 + 2.0**-12), f(1 + 2.0**-12), f(-1 - 2.0**-11), f(2.0**-24)),
)
case(  # rounded twice it is nothing
    "mul.rn.f32 %r1, %a, %b; add.rn.f32 %z, %r1, %c;",
    [32, 32, 32, 32],
    (f(1 + 2.0**-12), f(1 + 2.0**-12), f(-1 - 2.0**-11), 0),
)
case("fma.rn.sat.f32 %z, %a, %a, %a;", [32, 32], (f(2), f(1)), (f(-0.5), 0), (f(0.5), f(0.75)))
case("fma.rn.f64 %z, %a, %a, %b;", [64, 64, 64], (d(1 + 2.0**-30), d(-1 - 2.0**-29), d(2.0**-60)))
case("fma.rp.f32 %z, %a, %a, %b;", [32, 32, 32], (f(1), f(2.0**-30), ABOVE_1))
case("div.rn.f64 %z, %a, %b;", [64, 64, 64], (d(1), d(3), 0x3FD5555555555555))
case("div.full.f32 %z, %a, %b;", [32, 32, 32], (f(6), f(3), f(2)))
case("rcp.approx.ftz.f64 %z, %a;", [64, 64], (0x40080000FFFFFFFF, 0x3FD5555500000000))
case("neg.f32 %z, %a;", [32, 32], (0, 0x80000000), (0x7FC01234, 0xFFC01234))
case("abs.f64 %z, %a;", [64, 64], (d(-2), d(2)), (1 << 63, 0))
case("abs.ftz.f32 %z, %a;", [32, 32], (0x80000001, 0))
case("copysign.f32 %z, %a, %b;", [32, 32, 32], (f(-2), f(3), f(-3)), (0, f(-3), f(3)))
case("ex2.approx.f32 %z, %a;", [32, 32], (f(3), f(8)), (f(-math.inf), 0))
case("ex2.approx.ftz.f32 %z, %a;", [32, 32], (f(-149), 0))
case("lg2.approx.f32 %z, %a;", [32, 32], (f(8), f(3)), (0, f(-math.inf)), (f(-1), NAN))
case("rsqrt.approx.f32 %z, %a;", [32, 32], (f(4), f(0.5)), (0, f(math.inf)))
case("rsqrt.approx.f64 %z, %a;", [64, 64], (d(4), d(0.5)))
case("tanh.approx.f32 %z, %a;", [32, 32], (f(math.inf), f(1)), (0, 0))

EXTREMES = [(NAN, f(1)), (f(1), NAN), (NAN, NAN), (0, f(-0.0)), (f(-0.0), 0), (f(1), f(2))]
for name, results in (
    ("min", [f(1), f(1), NAN, f(-0.0), f(-0.0), f(1)]),
    ("max", [f(1), f(1), NAN, 0, 0, f(2)]),
    ("min.NaN", [NAN, NAN, NAN, f(-0.0), f(-0.0), f(1)]),
    ("max.NaN", [NAN, NAN, NAN, 0, 0, f(2)]),
):
    rows = [(*pair, result) for pair, result in zip(EXTREMES, results, strict=True)]
    case(f"{name}.f32 %z, %a, %b;", [32, 32, 32], *rows)
case(
    "min.xorsign.abs.f32 %z, %a, %b;",
    [32, 32, 32],
    *[(f(-3), f(2), f(-2)), (f(-1), f(-2), f(1)), (NAN, f(-2), f(-2)), (f(-1), NAN, f(-1))],
)
case("max.NaN.xorsign.abs.f32 %z, %a, %b;", [32, 32, 32], (f(-3), f(2), f(-3)), (NAN, f(1), NAN))
case("min.f64 %z, %a, %b;", [64, 64, 64], (NAN_64, d(1), d(1)), (d(-0.0), 0, d(-0.0)))
case("max.ftz.f32 %z, %a, %b;", [32, 32, 32], (SUBNORMAL, 0x80000001, 0))

# --- 16 bits ------------------------------------------------------------------------------------

case(
    "cvt.rn.bf16.f32 %z, %a;",
    [32, 16],
    *[(f(1 + 2.0**-8), b(1)), (f(1 + 3 * 2.0**-8), b(1 + 2.0**-6))],  # ties go to even
    *[(f(1 + 2.0**-8) + 1, b(1 + 2.0**-7)), (0x7F7FFFFF, 0x7F80), (0xFFC00000, NAN_16)],
    (0x00018000, 0x0002),  # of subnormal numbers too
)
case("cvt.rz.bf16.f32 %z, %a;", [32, 16], (0x3F80FFFF, b(1)), (0x7F7FFFFF, 0x7F7F))
case(
    "cvt.rn.f16.f32 %z, %a;",
    [32, 16],
    *[(f(65504), 0x7BFF), (f(65519), 0x7BFF), (f(65520), 0x7C00), (f(-1e9), 0xFC00)],
    *[(f(2.0**-25), 0), (f(2.0**-25) + 1, 1), (f(3 * 2.0**-25), 2), (NAN, NAN_16)],
    (f(-(2.0**-30)), 0x8000),
)
case("cvt.rn.f16.f64 %z, %a;", [64, 16], (d(1 + 2.0**-11 + 2.0**-40), 0x3C01))  # rounded once
case("cvt.f32.f16 %z, %a;", [16, 32], (1, f(2.0**-24)), (0xFC00, f(-math.inf)), (0x7C01, NAN))
case("cvt.f32.bf16 %z, %a;", [16, 32], (0x3F80, f(1)), (1, 0x00010000))
case("cvt.rn.bf16x2.f32 %z, %a, %b;", [32, 32, 32], (f(1), f(2), b(1) << 16 | b(2)))
case("cvt.rn.f16x2.f32 %z, %a, %b;", [32, 32, 32], (f(1), f(2), h(1) << 16 | h(2)))
case("cvt.rn.relu.bf16.f32 %z, %a;", [32, 16], (f(-1), 0), (f(2), b(2)), (NAN, NAN_16))
case("add.f16 %z, %a, %b;", [16, 16, 16], (h(2048), h(1), h(2048)), (h(2048), h(3), h(2052)))
case("sub.bf16 %z, %a, %b;", [16, 16, 16], (b(256), b(1), b(255)), (b(257.0 - 1), b(-1), b(256)))
case("mul.f16 %z, %a, %b;", [16, 16, 16], (h(300), h(300), 0x7C00), (h(3), h(0.5), h(1.5)))
case(  # 1 + 2^-11 lies between two: what is added decides, though double precision cannot hold it
    "fma.rn.f16 %z, %a, %b, %c;",
    [16, 16, 16, 16],
    *[(h(1 + 2.0**-10), h(0.5), h(0.5), h(1)), (h(1), h(2.0**-11), h(1), h(1))],
)
case(
    "fma.rn.bf16 %z, %a, %b, %c;",
    [16, 16, 16, 16],
    *[(b(1), b(2.0**-8), b(1), b(1)), (b(1 + 2.0**-7), b(2.0**-8), b(1), b(1 + 2.0**-7))],
    (b(2.0**-100), b(2.0**-30), b(1), b(1)),
    (b(1 + 2.0**-6), b(1 + 2.0**-6), b(2.0**-100), b(1 + 2.0**-5)),
)
case("max.NaN.bf16 %z, %a, %b;", [16, 16, 16], (NAN_16, b(1), NAN_16), (b(-1), b(-2), b(-1)))
case("min.f16 %z, %a, %b;", [16, 16, 16], (NAN_16, h(1), h(1)), (h(0), h(-0.0), h(-0.0)))
case("neg.bf16 %z, %a;", [16, 16], (b(1), b(-1)))
case("abs.f16x2 %z, %a;", [32, 32], (h(-1) << 16 | h(-2), h(1) << 16 | h(2)))
PAIR = h(1) << 16 | h(2)
case("add.f16x2 %z, %a, %b;", [32, 32, 32], (PAIR, PAIR, h(2) << 16 | h(4)))
case("fma.rn.bf16x2 %z, %a, %a, %a;", [32, 32], (b(2) << 16 | b(3), b(6) << 16 | b(12)))
case("max.NaN.f16x2 %z, %a, %b;", [32, 32, 32], (PAIR, NAN_16 << 16 | h(3), NAN_16 << 16 | h(3)))

# --- integers -----------------------------------------------------------------------------------

LEAST_32, LEAST_64, ALL_32, ALL_64 = 1 << 31, 1 << 63, (1 << 32) - 1, (1 << 64) - 1


def m(x: int, width: int = 32) -> int:
    """Return a negative number's bits."""
    return x & ((1 << width) - 1)


case("add.s32 %z, %a, %b;", [32, 32, 32], (0x7FFFFFFF, 1, LEAST_32))
case("sub.u16 %z, %a, %b;", [16, 16, 16], (0, 1, 0xFFFF))
case("add.s64 %z, %a, %b;", [64, 64, 64], (ALL_32, 1, 1 << 32), (ALL_64, 2, 1))
case("mul.lo.s32 %z, %a, %b;", [32, 32, 32], (0x10001, 0x10001, 0x20001))
case("mul.lo.s64 %z, %a, %b;", [64, 64, 64], (ALL_32, ALL_32, 0xFFFFFFFE00000001))
case("mul.hi.u32 %z, %a, %b;", [32, 32, 32], (ALL_32, ALL_32, 0xFFFFFFFE), (1 << 31, 2, 1))
case("mul.hi.s32 %z, %a, %b;", [32, 32, 32], (ALL_32, ALL_32, 0), (LEAST_32, 2, ALL_32))
case("mul.hi.u64 %z, %a, %b;", [64, 64, 64], (ALL_64, ALL_64, ALL_64 - 1))
case("mul.hi.s64 %z, %a, %b;", [64, 64, 64], (ALL_64, 5, ALL_64))
case("mul.wide.s32 %z, %a, %b;", [32, 32, 64], (m(-3), 5, m(-15, 64)))
case("mul.wide.u16 %z, %a, %b;", [16, 16, 32], (0xFFFF, 0xFFFF, 0xFFFE0001))
case("mad.lo.s32 %z, %a, %b, %c;", [32, 32, 32, 32], (m(-3), 5, 16, 1))
case("mad.wide.s32 %z, %a, %b, %c;", [32, 32, 64, 64], (m(-3), 5, 1 << 40, (1 << 40) - 15))
case("mad.wide.u32 %z, %a, %b, %c;", [32, 32, 64, 64], (ALL_32, 2, 1, (1 << 33) - 1))
case("mad.hi.u32 %z, %a, %b, %c;", [32, 32, 32, 32], (1 << 31, 4, 7, 9))
case(
    "div.s32 %z, %a, %b;",
    [32, 32, 32],
    *[(m(-7), 2, m(-3)), (7, m(-2), m(-3)), (LEAST_32, m(-1), LEAST_32), (7, 0, ALL_32)],
)
case("rem.s32 %z, %a, %b;", [32, 32, 32], (m(-7), 2, m(-1)), (7, m(-2), 1), (LEAST_32, m(-1), 0))
case("div.u64 %z, %a, %b;", [64, 64, 64], (ALL_64, 10, 1844674407370955161))
case("rem.s64 %z, %a, %b;", [64, 64, 64], (m(-(10**18), 64), 7, m(-(10**18 % 7), 64)))
case("min.s32 %z, %a, %b;", [32, 32, 32], (ALL_32, 1, ALL_32))
case("min.u32 %z, %a, %b;", [32, 32, 32], (ALL_32, 1, 1))
case("max.s64 %z, %a, %b;", [64, 64, 64], (LEAST_64, 1, 1))
case("max.relu.s32 %z, %a, %b;", [32, 32, 32], (m(-5), m(-3), 0), (4, m(-3), 4))
case("abs.s32 %z, %a;", [32, 32], (m(-5), 5), (LEAST_32, LEAST_32))
case("neg.s64 %z, %a;", [64, 64], (5, m(-5, 64)))

# --- bits ---------------------------------------------------------------------------------------

case("and.b32 %z, %a, %b;", [32, 32, 32], (0b1100, 0b1010, 0b1000))
case("or.b64 %z, %a, %b;", [64, 64, 64], (1 << 63, 1, 1 << 63 | 1))
case("xor.b16 %z, %a, %b;", [16, 16, 16], (0xFFFF, 0x0F0F, 0xF0F0))
case("not.b16 %z, %a;", [16, 16], (0x00FF, 0xFF00))
case("shl.b32 %z, %a, %b;", [32, 32, 32], (1, 31, 1 << 31), (1, 32, 0), (1, 300, 0))
case("shl.b64 %z, %a, %b;", [64, 32, 64], (1, 63, 1 << 63), (1, 64, 0))
case("shr.u32 %z, %a, %b;", [32, 32, 32], (1 << 31, 31, 1), (ALL_32, 32, 0))
case("shr.s32 %z, %a, %b;", [32, 32, 32], (m(-8), 1, m(-4)), (m(-8), 40, ALL_32), (8, 40, 0))
case("shr.s16 %z, %a, %b;", [16, 32, 16], (0x8000, 3, 0xF000))
case("shr.s64 %z, %a, %b;", [64, 32, 64], (LEAST_64, 63, ALL_64))
case("shf.l.wrap.b32 %z, %a, %b, %c;", [32] * 4, (0x80000000, 1, 33, 3))
case("shf.r.clamp.b32 %z, %a, %b, %c;", [32] * 4, (0, 5, 40, 5), (0x10, 1, 4, 0x10000001))
case("prmt.b32 %z, %a, %b, %c;", [32] * 4, (0x33221100, 0x77665584, 0x7C40, 0x77FF8400))
case("lop3.b32 %z, %a, %b, %c, 0x96;", [32] * 4, (0b1100, 0b1010, 0b1001, 0b1111))
case("lop3.b32 %z, %a, %b, %c, 0xEA;", [32] * 4, (0b1100, 0b1010, 0b0001, 0b1001))
case("popc.b64 %z, %a;", [64, 32], (ALL_64, 64), (5, 2))
case("clz.b32 %z, %a;", [32, 32], (0, 32), (1, 31), (ALL_32, 0))
case("clz.b64 %z, %a;", [64, 32], (0, 64), (1, 63))
case("brev.b32 %z, %a;", [32, 32], (1, 1 << 31), (0b1101, 0b1011 << 28))
case("bfind.u32 %z, %a;", [32, 32], (0, ALL_32), (0x100, 8))
case("bfind.s32 %z, %a;", [32, 32], (ALL_32, ALL_32), (m(-256), 7))
case("bfind.shiftamt.u32 %z, %a;", [32, 32], (0x100, 23))
case("bfe.u32 %z, %a, %b, %c;", [32] * 4, (0xABCD, 4, 8, 0xBC), (0xABCD, 4, 0, 0))
case("bfe.s32 %z, %a, %b, %c;", [32] * 4, (0x80, 4, 4, m(-8)), (LEAST_32, 28, 8, m(-8)))
case(
    "bfi.b32 %z, %a, %b, %c, %d;", [32] * 5, (0xF, 0, 28, 8, 0xF0000000), (0, 0xFFFF, 4, 8, 0xF00F)
)

# --- conversion ---------------------------------------------------------------------------------

case(
    "cvt.rni.s32.f32 %z, %a;",
    [32, 32],
    *[(f(2.5), 2), (f(3.5), 4), (f(-2.5), m(-2)), (f(3e9), 0x7FFFFFFF), (f(-3e9), LEAST_32)],
    *[(NAN, 0), (f(math.inf), 0x7FFFFFFF)],
)
case("cvt.rzi.s32.f32 %z, %a;", [32, 32], (f(-2.7), m(-2)), (f(2.7), 2))
case("cvt.rmi.s32.f32 %z, %a;", [32, 32], (f(-2.1), m(-3)))
case("cvt.rpi.s32.f32 %z, %a;", [32, 32], (f(2.1), 3))
case("cvt.rzi.u32.f32 %z, %a;", [32, 32], (f(-1), 0), (f(5e9), ALL_32), (f(4e9), 4000000000))
case("cvt.rzi.s16.f32 %z, %a;", [32, 16], (f(40000), 0x7FFF), (f(-40000), 0x8000))
case("cvt.rzi.s32.f64 %z, %a;", [64, 32], (NAN_64, LEAST_32), (d(-1e10), LEAST_32))
case("cvt.rzi.s64.f32 %z, %a;", [32, 64], (NAN, LEAST_64), (f(1e30), (1 << 63) - 1))
case("cvt.rzi.u64.f64 %z, %a;", [64, 64], (d(2.0**63), 1 << 63), (d(1e30), ALL_64))
case("cvt.rzi.ftz.u32.f32 %z, %a;", [32, 32], (SUBNORMAL, 0))
case("cvt.rmi.f64.f64 %z, %a;", [64, 64], (d(-2.5), d(-3)))
case("cvt.rni.f32.f32 %z, %a;", [32, 32], (f(0.5), 0), (f(1.5), f(2)), (f(-0.25), f(-0.0)))
case("cvt.sat.f32.f32 %z, %a;", [32, 32], (f(7), f(1)), (NAN, 0))
case("cvt.f64.f32 %z, %a;", [32, 64], (f(0.1), 0x3FB99999A0000000))
case("cvt.rn.f32.s32 %z, %a;", [32, 32], (16777217, f(16777216)), (16777219, f(16777220)))
case("cvt.rn.f32.u64 %z, %a;", [64, 32], (ALL_64, f(2.0**64)), (m(-1), f(2.0**32)))
case("cvt.rz.f32.u64 %z, %a;", [64, 32], (ALL_64, 0x5F7FFFFF))
case("cvt.rn.f32.s64 %z, %a;", [64, 32], ((1 << 60) + (1 << 36) + 1, f(2.0**60 + 2.0**37)))
case("cvt.rn.f64.s64 %z, %a;", [64, 64], ((1 << 53) + 1, d(2.0**53)), (m(-1, 64), d(-1)))
case("cvt.rp.f64.u64 %z, %a;", [64, 64], ((1 << 53) + 1, d(2.0**53 + 2)))
case("cvt.rn.f16.s32 %z, %a;", [32, 16], (2049, h(2048)), (70000, 0x7C00))
case("cvt.s64.s8 %z, %a;", [16, 64], (0x12FF, ALL_64), (0x7F, 0x7F))
case("cvt.u32.u16 %z, %a;", [16, 32], (0xFFFF, 0xFFFF))
case("cvt.s32.s16 %z, %a;", [16, 32], (0x8000, 0xFFFF8000))
case("cvt.u16.u64 %z, %a;", [64, 16], (0x123456, 0x3456))
case("cvt.s64.s32 %z, %a;", [32, 64], (m(-5), m(-5, 64)))
case("cvt.u64.u32 %z, %a;", [32, 64], (m(-5), m(-5)))
case("cvt.sat.u16.s32 %z, %a;", [32, 16], (70000, 0xFFFF), (m(-5), 0))
case("cvt.sat.s16.u32 %z, %a;", [32, 16], (ALL_32, 0x7FFF))

# --- predicates ---------------------------------------------------------------------------------

P = "selp.b32 %z, 1, 0, %p1;"
for comparison, equal, less, nan in (
    *[("eq", 1, 0, 0), ("ne", 0, 1, 0), ("lt", 0, 1, 0), ("le", 1, 1, 0), ("gt", 0, 0, 0)],
    *[("ge", 1, 0, 0), ("equ", 1, 0, 1), ("neu", 0, 1, 1), ("ltu", 0, 1, 1), ("leu", 1, 1, 1)],
    *[("gtu", 0, 0, 1), ("geu", 1, 0, 1), ("num", 1, 1, 0), ("nan", 0, 0, 1)],
):
    for kind, width, of, not_a_number in (
        *[("f32", 32, f, NAN), ("f64", 64, d, NAN_64), ("f16", 16, h, NAN_16)],
        ("bf16", 16, b, NAN_16),
    ):
        case(
            f"setp.{comparison}.{kind} %p1, %a, %b; {P}",
            [width, width, 32],
            *[(of(2), of(2), equal), (of(1), of(2), less), (not_a_number, of(2), nan)],
        )
case(f"setp.lt.s32 %p1, %a, %b; {P}", [32, 32, 32], (ALL_32, 0, 1))
case(f"setp.lt.u32 %p1, %a, %b; {P}", [32, 32, 32], (ALL_32, 0, 0))
case(f"setp.hs.u64 %p1, %a, %b; {P}", [64, 64, 32], (ALL_64, 0, 1))
case(f"setp.gt.s16 %p1, %a, %b; {P}", [16, 16, 32], (0x8000, 1, 0))
case(f"setp.eq.b16 %p1, %a, %b; {P}", [16, 16, 32], (7, 7, 1))
case(f"setp.lt.ftz.f32 %p1, %a, %b; {P}", [32, 32, 32], (0, SUBNORMAL, 0))
TWO = "selp.b32 %r1, 1, 0, %p1; selp.b32 %r2, 2, 0, %p2; or.b32 %z, %r1, %r2;"
case(f"setp.lt.s32 %p1|%p2, %a, %b; {TWO}", [32, 32, 32], (1, 2, 1), (2, 1, 2))
THIRD = "setp.ne.b32 %p3, %c, 0;"
case(  # the second one: of the opposite comparison
    f"{THIRD} setp.lt.and.s32 %p1|%p2, %a, %b, %p3; {TWO}",
    [32] * 4,
    *[(1, 2, 1, 1), (1, 2, 0, 0), (2, 1, 1, 2)],
)
case(f"{THIRD} setp.lt.or.s32 %p1, %a, %b, !%p3; {P}", [32] * 4, (2, 1, 0, 1), (2, 1, 1, 0))
case(f"{THIRD} setp.lt.xor.s32 %p1, %a, %b, %p3; {P}", [32] * 4, (1, 2, 1, 0), (2, 1, 1, 1))
case(f"setp.gt.f16x2 %p1|%p2, %a, %b; {TWO}", [32, 32, 32], (PAIR, h(1) << 16 | h(1), 1))
case(
    "setp.ne.b32 %p1, %a, 0; setp.ne.b32 %p2, %b, 0; and.pred %p3, %p1, %p2; not.pred %p4, %p3;"
    " selp.b32 %z, 1, 0, %p4; @%p3 add.s32 %z, %z, 8; @!%p1 add.s32 %z, %z, 16;",
    [32, 32, 32],
    *[(1, 1, 8), (1, 0, 1), (0, 1, 17)],
)
case("mov.b32 {%h1, %h2}, %a; mov.b32 %z, {%h2, %h1};", [32, 32], (0x12345678, 0x56781234))
case("mov.b64 {%r1, %r2}, %a; mov.b64 %z, {%r2, %r1};", [64, 64], (1, 1 << 32))
case("mov.b64 {%r1, _}, %a; mov.b32 %z, %r1;", [64, 32], (1 << 32 | 5, 5))


@pytest.mark.parametrize(("statement", "widths", "rows"), CASES, ids=[c[0][:60] for c in CASES])
def test_computes(statement: str, widths: list[int], rows: list[tuple[int, ...]]) -> None:
    found = compute(statement, widths, [row[:-1] for row in rows])
    assert [hex(x) for x in found] == [hex(row[-1]) for row in rows]


# --- control ------------------------------------------------------------------------------------

STORE = "mul.wide.u32 %d1, %t, 4; add.s64 %d1, %d1, %x0; st.global.b32 [%d1], %r1;"


def of_lanes(body: str, threads: int = 32, **options) -> list[int]:
    """Return what every lane leaves in %r1."""
    out = torch.zeros(threads, dtype=torch.int32)
    run(body + STORE, out, threads=threads, **options)
    return out.tolist()


def test_each_lane_leaves_a_loop_when_it_is_done() -> None:
    found = of_lanes("""
        mov.b32 %r1, 0; mov.b32 %r2, 0;
        again: setp.ge.u32 %p1, %r2, %t; @%p1 bra done;
        add.s32 %r1, %r1, %r2; add.s32 %r2, %r2, 1; bra.uni again;
        done:""")
    assert found == [n * (n - 1) // 2 for n in range(32)]


def test_branches_in_branches_meet_again() -> None:
    found = of_lanes("""
        and.b32 %r2, %t, 1; and.b32 %r3, %t, 2; mov.b32 %r1, 0;
        setp.eq.s32 %p1, %r2, 0; @%p1 bra even;
        add.s32 %r1, %r1, 1; setp.eq.s32 %p2, %r3, 0; @%p2 bra after;
        add.s32 %r1, %r1, 10; bra after;
        even: add.s32 %r1, %r1, 100;
        after: activemask.b32 %r4; setp.eq.s32 %p3, %r4, -1; @%p3 add.s32 %r1, %r1, 1000;""")
    assert found == [1100, 1001, 1100, 1011] * 8


def test_lanes_that_returned_take_no_part() -> None:
    out = torch.zeros(32, dtype=torch.int32)
    run(
        f"setp.ge.u32 %p1, %t, 20; @%p1 ret; activemask.b32 %r1; bar.sync 0; {STORE}",
        out,
    )
    assert out.tolist() == [(1 << 20) - 1] * 20 + [0] * 12


def test_special_registers() -> None:
    out = torch.zeros(4, 64, dtype=torch.int32)
    body = """
        mov.u32 %r2, %laneid; mov.u32 %r3, %warpid; mov.u32 %r4, %ntid.x; mov.u32 %r5, %nctaid.x;
        mad.lo.s32 %r1, %r3, 100, %r2; mad.lo.s32 %r1, %r4, 1000, %r1;
        mad.lo.s32 %r1, %r5, 100000, %r1;
        mad.lo.s32 %t, %q, %r4, %t;"""
    run(body + STORE, out, grid=4, threads=64)
    assert out.tolist() == [[464000 + lane // 32 * 100 + lane % 32 for lane in range(64)]] * 4


def test_an_endless_loop_ends() -> None:
    with pytest.raises(EmulationError, match="an endless loop"):
        run("again: bra again;", most_instructions=1000)


def test_a_trap_is_a_failure() -> None:
    with pytest.raises(EmulationError, match=r"trap .PTX line \d+: trap; program 0,0,0, warp 0"):
        run("trap;")


# --- what lanes tell each other -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("shuffle", "expected"),
    [
        ("up.b32 %r1, %t, 3, 0", [max(lane - 3, lane if lane < 3 else 0) for lane in range(32)]),
        ("down.b32 %r1, %t, 3, 31", [lane + 3 if lane < 29 else lane for lane in range(32)]),
        ("bfly.b32 %r1, %t, 5, 31", [lane ^ 5 for lane in range(32)]),
        ("idx.b32 %r1, %t, 7, 31", [7] * 32),
        # segments of 8 lanes: (32 - 8) << 8
        ("down.b32 %r1, %t, 3, 6175", [x + 3 if x % 8 < 5 else x for x in range(32)]),
        ("up.b32 %r1, %t, 3, 6144", [x - 3 if x % 8 >= 3 else x for x in range(32)]),
        ("idx.b32 %r1, %t, 2, 6175", [x // 8 * 8 + 2 for x in range(32)]),
    ],
)
def test_shuffles(shuffle: str, expected: list[int]) -> None:
    assert of_lanes(f"shfl.sync.{shuffle}, -1;") == expected


def test_a_shuffle_says_whether_it_stayed_inside() -> None:
    found = of_lanes("shfl.sync.down.b32 %r2|%p1, %t, 30, 31, -1; selp.b32 %r1, 1, 0, %p1;")
    assert found == [1, 1] + [0] * 30


def test_a_shuffle_wants_all_whom_it_names() -> None:
    with pytest.raises(EmulationError, match="lanes that have to take part"):
        of_lanes("setp.lt.u32 %p1, %t, 8; @%p1 shfl.sync.bfly.b32 %r1, %t, 1, 31, -1;")
    with pytest.raises(EmulationError, match="from a lane that takes no part"):
        of_lanes("setp.lt.u32 %p1, %t, 8; @%p1 shfl.sync.down.b32 %r1, %t, 1, 31, 255;")


@pytest.mark.parametrize(
    ("vote", "expected"),
    [
        ("vote.sync.ballot.b32 %r1, %p1, -1;", signed(0xFFFFFFE0, 32)),
        ("vote.sync.ballot.b32 %r1, !%p1, -1;", 0x1F),
        ("vote.sync.any.pred %p2, %p1, -1; selp.b32 %r1, 1, 0, %p2;", 1),
        ("vote.sync.all.pred %p2, %p1, -1; selp.b32 %r1, 1, 0, %p2;", 0),
        ("vote.sync.uni.pred %p2, %p1, -1; selp.b32 %r1, 1, 0, %p2;", 0),
        ("redux.sync.add.s32 %r1, %t, -1;", 496),
        ("redux.sync.max.s32 %r1, %r2, -1;", 26),
        ("redux.sync.min.u32 %r1, %r2, -1;", 0),
        ("redux.sync.min.s32 %r1, %r2, -1;", -5),
        ("redux.sync.or.b32 %r1, %t, -1;", 31),
        ("redux.sync.xor.b32 %r1, %t, -1;", 0),
    ],
)
def test_votes_and_reductions(vote: str, expected: int) -> None:
    """%p1 holds from lane 5 on; %r2 is the lane less 5."""
    found = of_lanes(f"setp.ge.u32 %p1, %t, 5; sub.s32 %r2, %t, 5; {vote}")
    assert found == [expected] * 32


def test_one_lane_is_elected() -> None:
    found = of_lanes("elect.sync %r2|%p1, -1; selp.b32 %r1, 1, 0, %p1; or.b32 %r1, %r1, %r2;")
    assert found == [1] + [0] * 31


# --- memory -------------------------------------------------------------------------------------

AT = "mul.wide.u32 %d1, %t, {}; add.s64 %d2, %d1, %x0; add.s64 %d3, %d1, %x1;"


def test_vectors() -> None:
    given = torch.arange(128, dtype=torch.int32)
    for kind, parts in (("v4.b32", "%r1, %r2, %r3, %r4"), ("v2.b64", "%d4, %d5")):
        out = torch.zeros_like(given)
        run(
            f"{AT.format(16)} ld.global.{kind} {{{parts}}}, [%d2];"
            f"st.global.{kind} [%d3], {{{parts}}};",
            *(given, out),
        )
        assert torch.equal(out, given)
    out = torch.zeros_like(given)
    parts = "%r1, %r2, %r3, %r4"
    run(
        f"{AT.format(16)} ld.global.v4.b32 {{{parts}}}, [%d2 + 0]; "
        "st.global.v2.b32 [%d3 + 8], {%r4, %r1};",
        *(given, out),
    )
    assert out[:8].tolist() == [0, 0, 3, 0, 0, 0, 7, 4]


def test_bytes_are_extended() -> None:
    given = torch.tensor([-1] * 32, dtype=torch.int8)
    for kind, expected in (("s8", -1), ("u8", 255), ("b8", 255)):
        out = torch.zeros(32, dtype=torch.int32)
        run(
            f"cvt.u64.u32 %d1, %t; add.s64 %d1, %d1, %x1; ld.global.{kind} %r1, [%d1];{STORE}",
            *(out, given),
        )
        assert out.tolist() == [expected] * 32


def test_a_lane_whose_predicate_fails_touches_nothing() -> None:
    given, out = torch.arange(20, dtype=torch.int32), torch.zeros(20, dtype=torch.int32)
    report = run(
        f"{AT.format(4)} setp.lt.u32 %p1, %t, 20; mov.b32 %r1, 7;"
        "@%p1 ld.global.b32 %r1, [%d2]; @%p1 st.global.b32 [%d3], %r1;",
        *(given, out),
        counts=True,
    )
    assert torch.equal(out, given)
    assert [x.lanes for x in report.counts if x.opcode.startswith(("ld.global", "st.global"))] == [
        20,
        20,
    ]
    assert report.sectors in (6, 7, 8)  # of 32 bytes: 80 bytes twice, wherever they begin


def test_local_memory_is_each_threads_own() -> None:
    found = of_lanes("""
        .local .align 8 .b8 stack[16];
        mov.b64 %d1, stack; st.local.v2.b32 [%d1 + 8], {%t, 7}; ld.local.b32 %r1, [%d1 + 8];
        ld.local.b32 %r2, [%d1 + 12]; mad.lo.s32 %r1, %r1, 10, %r2;""")
    assert found == [10 * lane + 7 for lane in range(32)]
    with pytest.raises(EmulationError, match="local memory out of bounds"):
        of_lanes(".local .align 8 .b8 stack[16]; mov.b64 %d1, stack; st.local.b32 [%d1 + 16], %t;")


@pytest.mark.parametrize("access", ["ld.global.b32 %r1, [%d2];", "st.global.b32 [%d2], %t;"])
def test_one_element_too_short(access: str) -> None:
    with pytest.raises(EmulationError, match="global memory out of bounds"):
        run(AT.format(4) + access, torch.zeros(31, dtype=torch.int32), torch.zeros(1))


def test_a_view_ends_before_its_storage() -> None:
    storage, out = torch.zeros(64, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    run(f"{AT.format(4)} ld.global.b32 %r1, [%d2];", storage[10:42], out)
    with pytest.raises(EmulationError, match="read of global memory out of bounds"):
        run(f"{AT.format(4)} ld.global.b32 %r1, [%d2];", storage[10:41], out)


def test_unknown_bounds_are_not_checked() -> None:
    buffer = torch.zeros(32, dtype=torch.int32)
    kernel = program(f"mov.b32 %r1, 5; {STORE}", 1)
    assert kernel.launch((1,), [buffer[16:].data_ptr() - 64]).notes == []
    assert buffer.tolist() == [5] * 32


@pytest.mark.parametrize(
    "access",
    [
        "ld.global.v2.b32 {%r1, %r2}, [%d2 + 4];",
        "st.global.b32 [%d2 + 2], %t;",
        "mov.u32 %r1, memory; st.shared.v4.b32 [%r1 + 8], {%t, %t, %t, %t};",
    ],
)
def test_misaligned(access: str) -> None:
    buffer = torch.zeros(200, dtype=torch.int32)
    with pytest.raises(EmulationError, match="misaligned access"):
        run(AT.format(8) + access, buffer, buffer, shared=64)


@pytest.mark.parametrize(
    ("operation", "width", "before", "given", "after"),
    [
        ("add.u32", 32, 5, 2, 69),
        ("add.u64", 64, (1 << 40), 2, (1 << 40) + 64),
        ("min.s32", 32, 5, m(-7), m(-7)),
        ("min.u32", 32, 5, m(-7), 5),
        ("max.s64", 64, 5, m(-7, 64), 5),
        ("and.b32", 32, 0b1100, 0b1010, 0b1000),
        ("or.b64", 64, 0b1100, 0b1010, 0b1110),
        ("xor.b32", 32, 0b1100, 0b1010, 0b1100),
        ("exch.b32", 32, 5, 9, 9),
        ("inc.u32", 32, 0, 9, 2),  # 32 steps around 10 numbers
        ("dec.u32", 32, 0, 9, 8),
        ("add.f32", 32, f(1), f(0.5), f(17)),
        ("add.f32", 32, 0, SUBNORMAL, 0),
        ("add.f64", 64, d(1), d(0.5), d(17)),
        ("add.noftz.f16", 16, h(1), h(0.5), h(17)),
        ("add.noftz.bf16", 16, b(1), b(0.5), b(17)),
        ("add.noftz.f16x2", 32, PAIR, PAIR, h(33) << 16 | h(66)),
    ],
)
def test_atomics(operation: str, width: int, before: int, given: int, after: int) -> None:
    """All 32 lanes at one address."""
    memory = torch.tensor([signed(before, width)], dtype=DTYPES[width])
    register = {16: "%h1", 32: "%r1", 64: "%d1"}[width]
    body = (
        f"mov.b{width} {register}, {given}; red.global.gpu.relaxed.{operation} [%x0], {register};"
    )
    report = run(body, memory)
    assert m(memory.item(), width) == after
    assert report.atomics == 32


def test_atomics_return_what_was_there() -> None:
    counter, out = torch.zeros(1, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    run(f"atom.global.gpu.acq_rel.add.u32 %r1, [%x1], 2;{STORE}", out, counter)
    assert sorted(out.tolist()) == list(range(0, 64, 2))


@pytest.mark.parametrize("width", [16, 32, 64])
def test_compare_and_swap(width: int) -> None:
    memory = torch.tensor([3], dtype=DTYPES[width])
    register = {16: "%h", 32: "%r", 64: "%d"}[width]
    body = f"atom.relaxed.gpu.global.cas.b{width} {register}1, [%x0], {{}}, 9;"
    run(body.format(4), memory)
    assert memory.item() == 3
    run(body.format(3), memory)
    assert memory.item() == 9


def test_atomics_in_shared_memory() -> None:
    found = of_lanes(
        "mov.u32 %r2, memory; setp.eq.u32 %p1, %t, 0; mov.b32 %r3, 1;"
        "@%p1 st.shared.b32 [%r2], %r3;"
        "bar.sync 0; atom.shared.add.u32 %r4, [%r2], %r3; bar.sync 0; ld.shared.b32 %r1, [%r2];",
        threads=64,
        shared=4,
    )
    assert found == [65] * 64


# --- shared memory ------------------------------------------------------------------------------

EXCHANGE = """
    mov.u32 %r2, memory; mad.lo.s32 %r3, %t, 4, %r2; st.shared.b32 [%r3], %t;
    {}
    xor.b32 %r4, %t, {}; mad.lo.s32 %r5, %r4, 4, %r2; ld.shared.b32 %r1, [%r5];"""


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_a_barrier_orders_warps(order: int) -> None:
    found = of_lanes(EXCHANGE.format("bar.sync 0;", 33), threads=64, shared=256, order=order)
    assert found == [lane ^ 33 for lane in range(64)]


@pytest.mark.parametrize(("barrier", "partner"), [("", 33), ("bar.warp.sync -1;", 33), ("", 1)])
def test_without_its_barrier_it_is_a_race(barrier: str, partner: int) -> None:
    """Between warps, whatever the order; and between the lanes of one, which run in step here."""
    out = torch.zeros(64, dtype=torch.int32)
    kernel = program(EXCHANGE.format(barrier, partner) + STORE, 1, 64, 256)
    for order in range(5):
        notes = kernel.launch((1,), [out], memory_of([out]), order=order).notes
        assert any("race in shared memory" in note for note in notes)


def test_lanes_of_a_warp_need_no_more_than_its_own_barrier() -> None:
    found = of_lanes(EXCHANGE.format("bar.warp.sync -1;", 1), threads=64, shared=256)
    assert found == [lane ^ 1 for lane in range(64)]


def test_a_write_after_a_read_wants_a_barrier_too() -> None:
    body = EXCHANGE.format("bar.sync 0;", 33) + "st.shared.b32 [%r3], 77;"
    out = torch.zeros(64, dtype=torch.int32)
    notes = program(body + STORE, 1, 64, 256).launch((1,), [out], memory_of([out])).notes
    assert any("a write of what another thread touched" in note for note in notes)


def test_all_may_write_the_same() -> None:
    body = "mov.u32 %r2, memory; st.shared.b32 [%r2], 7; bar.sync 0; ld.shared.b32 %r1, [%r2];"
    assert of_lanes(body, threads=64, shared=4) == [7] * 64


def test_what_nobody_wrote() -> None:
    out = torch.zeros(32, dtype=torch.int32)
    kernel = program(f"mov.u32 %r2, memory; ld.shared.b32 %r1, [%r2 + 4];{STORE}", 1, 32, 8)
    (note,) = kernel.launch((1,), [out], memory_of([out])).notes
    assert "shared memory that nobody wrote is read" in note
    assert "ld.shared.b32 %r1, [%r2 + 4];" in note


def test_shared_memory_ends() -> None:
    with pytest.raises(EmulationError, match="shared memory out of bounds"):
        of_lanes("mov.u32 %r2, memory; st.shared.b32 [%r2 + 8], %t;", shared=8)


def test_a_barrier_in_divergent_code() -> None:
    with pytest.raises(EmulationError, match="barrier in divergent code"):
        run("setp.lt.u32 %p1, %t, 5; @%p1 bra.uni over; bar.sync 0; over:")


def test_matrices() -> None:
    """Numbers 0 to 255 of 16 bits, as four matrices of 8 x 8; lane l has elements 2l and 2l + 1."""
    given, out = torch.arange(256, dtype=torch.int16), torch.zeros(32, 4, dtype=torch.int32)
    body = """mul.wide.u32 %d1, %t, 16; add.s64 %d2, %d1, %x0; add.s64 %d3, %d1, %x1;
        mov.u32 %r9, memory; mad.lo.s32 %r10, %t, 16, %r9;
        ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%d2];
        st.shared.v4.b32 [%r10], {{%r1, %r2, %r3, %r4}}; bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x4{}.shared.b16 {{%r5, %r6, %r7, %r8}}, [%r10];
        {}
        st.global.v4.b32 [%d3], {{%r5, %r6, %r7, %r8}};"""
    run(body.format("", ""), given, out, shared=512)
    assert torch.equal(out.view(torch.int16).view(32, 4, 2).transpose(0, 1).flatten(), given)
    run(body.format(".trans", ""), given, out, shared=512)
    matrices = out.view(torch.int16).view(32, 4, 2).transpose(0, 1).reshape(4, 8, 8)
    assert torch.equal(matrices, given.view(4, 8, 8).transpose(1, 2))
    back = """bar.warp.sync -1;
        stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%r10], {%r5, %r6, %r7, %r8};
        bar.warp.sync -1; ld.shared.v4.b32 {%r5, %r6, %r7, %r8}, [%r10];"""
    run(body.format(".trans", back), given, out, shared=512)
    assert torch.equal(out.view(torch.int16).flatten(), given)


COPY = """mul.wide.u32 %d1, %t, 4; add.s64 %d2, %d1, %x1; mov.u32 %r2, memory;
    mad.lo.s32 %r3, %t, 4, %r2; cp.async.ca.shared.global [%r3 + 0], [%d2 + 0], 4, {};
    cp.async.commit_group; {} ld.shared.b32 %r1, [%r3];"""


def test_copies_are_there_when_somebody_waited() -> None:
    given = torch.arange(1, 33, dtype=torch.int32)
    for size, expected in ((4, given.tolist()), (0, [0] * 32)):
        out = torch.zeros(32, dtype=torch.int32)
        run(COPY.format(size, "cp.async.wait_group 0;") + STORE, out, given, shared=128)
        assert out.tolist() == expected
    out = torch.zeros(32, dtype=torch.int32)
    kernel = program(COPY.format(4, "cp.async.wait_group 1;") + STORE, 2, 32, 128)
    (note,) = kernel.launch((1,), [out, given], memory_of([out, given])).notes
    assert "nobody wrote" in note


# --- programs -----------------------------------------------------------------------------------

TICKET = """setp.eq.u32 %p1, %t, 0; @!%p1 bra over;
    {} mul.wide.u32 %d1, %q, 4; add.s64 %d1, %d1, %x0; st.global.b32 [%d1], %r1; over:"""
ATOMIC = "atom.global.gpu.relaxed.add.u32 %r1, [%x1], 1;"
NOT_ATOMIC = "ld.global.b32 %r1, [%x1]; add.s32 %r2, %r1, 1; st.global.b32 [%x1], %r2;"


def tickets(body: str, **options) -> tuple[list[int], int, list[str]]:
    """When each of 20 programs came; what was counted; the notes."""
    out, counter = torch.zeros(20, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    kernel = program(TICKET.format(body), 2)
    report = kernel.launch((20,), [out, counter], memory_of([out, counter]), **options)
    return out.tolist(), int(counter), report.notes


def test_orders_of_programs() -> None:
    assert tickets(ATOMIC, order=emulator.ASCENDING)[0] == list(range(20))
    assert tickets(ATOMIC, order=emulator.DESCENDING)[0] == list(range(20))[::-1]
    random = [tickets(ATOMIC, order=seed)[0] for seed in (5, 5, 6)]
    assert random[0] == random[1] != random[2]
    assert all(sorted(order) == list(range(20)) != order for order in random)


@pytest.mark.parametrize("order", [0, 1, 7])
def test_atomics_of_programs_that_take_turns_lose_nothing(order: int) -> None:
    found, number, notes = tickets(ATOMIC, order=order, concurrent=6)
    assert (sorted(found), number, notes) == (list(range(20)), 20, [])


def test_an_addition_that_is_not_atomic_is_a_race() -> None:
    """It is noted though nothing is lost where programs run one after another."""
    found, number, notes = tickets(NOT_ATOMIC)
    assert (found, number) == (list(range(20)), 20)
    assert any("a read of what another program" in note for note in notes)
    assert any("a write of what another program" in note for note in notes)


def test_writes_of_the_same_and_reads_alone_are_no_race() -> None:
    out, flag = torch.zeros(32, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    run(f"st.global.b32 [%x1], 1; mov.b32 %r1, 4;{STORE}", out, flag, grid=5)
    body = f"ld.global.b32 %r1, [%x1]; setp.eq.u32 %p1, %q, 0; @!%p1 bra over;{STORE} over:"
    run(body, out, flag, grid=5)
    assert out.tolist() == [1] * 32


def test_what_an_acquire_orders_is_not_judged() -> None:
    out, counter = torch.zeros(20, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    body = f"atom.global.gpu.acq_rel.add.u32 %r5, [%x2], 1; {NOT_ATOMIC}"
    other = torch.zeros(1, dtype=torch.int32)
    run(TICKET.format(body), out, counter, other, grid=20)
    assert int(counter) == 20


def test_a_store_that_another_warp_reads_wants_a_barrier() -> None:
    """In global memory as in shared memory."""
    body = "mul.wide.u32 %d1, %t, 4; add.s64 %d1, %d1, %x1; st.global.b32 [%d1], %t; {}" + (
        "xor.b32 %r2, %t, 32; mul.wide.u32 %d1, %r2, 4; add.s64 %d1, %d1, %x1;"
        "ld.global.b32 %r1, [%d1];"
    )
    buffers = torch.zeros(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    run(body.format("bar.sync 0;") + STORE, *buffers, threads=64)
    assert buffers[0].tolist() == [lane ^ 32 for lane in range(64)]
    notes = program(body.format("") + STORE, 2, 64).launch((1,), buffers, memory_of(buffers)).notes
    assert any("race in global memory" in note for note in notes)


# --- what is not modelled -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "add.cc.s32 %r1, %r1, %r2;",
        "add.sat.s32 %r1, %r1, %r2;",
        "add.s32.ftz %r1, %r1, %r2;",
        "add.s32 %r1, %r1;",
        "add.s32 %r1, %r1, %r2, %r3;",
        "add.s32 %r1, %r1, %unknown;",
        "add.f32 %r1, %r1, 1.0;",
        "mul24.lo.s32 %r1, %r1, %r2;",
        "mul.s32 %r1, %r1, %r2;",
        "fma.f32 %r1, %r1, %r2, %r3;",
        "div.f32 %r1, %r1, %r2;",
        "min.xorsign.f32 %r1, %r1, %r2;",
        "setp.lo.s32 %p1, %r1, %r2;",
        "setp.lt.b32 %p1, %r1, %r2;",
        "setp.lt.and.s32 %p1, %r1, %r2;",
        "cvt.s32.f32 %r1, %r2;",
        "cvt.f32.s32 %r1, %r2;",
        "cvt.f32.f64 %r1, %d1;",
        "cvt.rna.tf32.f32 %r1, %r2;",
        "cvt.rn.satfinite.e4m3x2.f32 %h1, %r1, %r2;",
        "mov.u32 %r1, %clock;",
        "mov.u64 %d1, %globaltimer;",
        "mov.u32 %r1, %cluster_ctaid.x;",
        "ld.const.b32 %r1, [%d1];",
        "ld.b32 %r1, [%d1];",
        "ld.param.b32 %r1, [nothing];",
        "atom.add.u32 %r1, [%d1], 1;",
        "atom.global.gpu.relaxed.v2.f32.add {%r1, %r2}, [%d1], {%r1, %r2};",
        "bar.sync 1;",
        "bar.sync 0, 16;",
        "bar.arrive 0, 32;",
        "barrier.sync 0;",
        "match.any.sync.b32 %r1, %r2, -1;",
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%r1}, {%r2}, {%r3}, {%r4};",
        "wgmma.fence.sync.aligned;",
        "cp.async.wait_all;",
        "call.uni vprintf, (%d1);",
        "bra nowhere;",
        "nanosleep.u32 100;",
        ".const .align 8 .b8 table[16];",
    ],
)
def test_what_is_not_modelled_raises(statement: str) -> None:
    with pytest.raises(Unsupported):
        program(statement, 0)


@pytest.mark.parametrize(
    ("type", "expected"), [("s32", -100), ("u32", 2**32 - 100), ("b32", 2**32 - 100)]
)
def test_a_parameter_is_extended_as_its_type_says(type: str, expected: int) -> None:
    """It fills a register of 64 bits."""
    kernel = Kernel(f"""
        .version 8.0
        .target sm_90
        .address_size 64
        .visible .entry test(.param .u64 buffer, .param .u32 number)
        .reqntid 32
        {{
        .reg .b64 %d<3>;
        ld.param.b64 %d1, [buffer];
        ld.param.{type} %d2, [number];
        st.global.b64 [%d1], %d2;
        ret;
        }}""")
    out = torch.zeros(1, dtype=torch.int64)
    kernel.launch((1,), [out, -100], memory_of([out]))
    assert out.item() == expected


# --- building -----------------------------------------------------------------------------------


def test_many_may_build_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.FOLDER, str(tmp_path / "cache"))
    source = tmp_path / "answer.cpp"
    source.write_text('extern "C" int answer() { return 42; }')
    with ThreadPoolExecutor(4) as pool:
        (built,) = set(pool.map(lambda _: build.shared_object("answer.so", [source]), range(4)))
    assert list((tmp_path / "cache").iterdir()) == [built.parent]
    source.write_text('extern "C" int answer() { return 43; }')
    assert build.shared_object("answer.so", [source]) != built


def test_the_parts_agree_on_their_structures() -> None:
    """In another process, since the library may have been loaded here before a change."""
    code = "from tests.software_gpu import emulator; emulator._library()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
