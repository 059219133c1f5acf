"""What Triton lacks: numbers that no kernel specialises on, NaN kept, an exact division."""

import inspect
import struct
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from .launcher import Kernel

# What an infinite score is ranked as, as in `reference.layout`.
LARGEST = tl.constexpr(2.0**125)


def jit(kernel: Callable) -> Any:
    """Compile as triton.jit does, specialised on no number's value and no pointer's alignment.

    P, N and what follows from them change at every call and must never make another variant.
    """
    arguments = [
        parameter.name
        for parameter in inspect.signature(kernel).parameters.values()
        if parameter.annotation is not tl.constexpr
    ]
    function = triton.jit(
        kernel, do_not_specialize=arguments, do_not_specialize_on_alignment=arguments
    )
    return Kernel(function) if isinstance(function, triton.JITFunction) else function


@triton.jit
def real(bits, dtype: tl.constexpr):
    """Return a number from the bits of its float64: a float argument may arrive as float32."""
    return tl.cast(tl.cast(bits, tl.int64), tl.float64, bitcast=True).to(dtype)


@triton.jit
def nan_maximum(a, b):
    """Return the larger one, or NaN; for tl.reduce."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def finite(scores):
    """Replace -inf and +inf by -LARGEST and LARGEST; NaN stays."""
    scores = tl.maximum(scores, -LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(scores, LARGEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def divide(number, divisor, magic):
    """Return number // divisor and the remainder, for 0 <= number < 2^31.

    `magic` is of `magic_of`.
    """
    factor = tl.cast(tl.cast(magic, tl.int64) & 0xFFFFFFFF, tl.uint32)
    shift = tl.cast(tl.cast(magic, tl.int64) >> 32, tl.uint32)
    quotient = (tl.umulhi(number, factor) + number) >> shift
    return quotient, number - quotient * tl.cast(divisor, tl.uint32)


def magic_of(divisor: int) -> int:
    """Return what `divide` divides by, after Granlund and Montgomery (1994).

    It is (shift << 32) + factor.
    """
    shift = (divisor - 1).bit_length()
    return (shift << 32) + (((1 << 32) * ((1 << shift) - divisor)) // divisor + 1)


def bits_of(number: float) -> int:
    """Return a float64 as the integer of the same bits, see `real`."""
    return struct.unpack("<q", struct.pack("<d", number))[0]
