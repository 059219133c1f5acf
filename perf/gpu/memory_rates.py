"""What the kernels for breakpoints hang on: the rates of atomic adds and of table look-ups.

An atomic add of one to an int64 counter in global memory is what a histogram of intervals does for
each logit; a look-up is 32 lanes reading anywhere in a table of 16 KB. Indices are made in
registers, so that nothing but the adds and the look-ups takes time. Every result is checked.
"""

import statistics
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from alrp_triton.kernels.language import jit

from ..timing import interleave

BLOCK = 512  # adds of a program in one go, and four of each thread
TABLE = 4096  # entries of the table, int32: 16 KB

# slots, and whether they are struck in turn or at random.
ADDS = (
    *((slots, False) for slots in (1, 32, 256, 4096)),
    *((slots, True) for slots in (2048, 65536)),
)
# Whether a table is read from global memory, through the L1 cache, or by tl.gather.
LOOK_UPS = (False, True)


@triton.jit
def _scatter(number):
    """Hash uint32 numbers, so that neighbours fall anywhere."""
    number = (number ^ (number >> 16)) * 0x45D9F3B
    number = (number ^ (number >> 16)) * 0x45D9F3B
    return number ^ (number >> 16)


def scatter(number: Tensor) -> Tensor:
    """Hash int64 numbers below 2^32 as the kernels do."""
    for _ in range(2):
        number = ((number ^ (number >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return number ^ (number >> 16)


@jit
def _add_kernel(
    counters,  # (slots,) int64
    repeats,
    slots,  # a power of two
    RANDOM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add one to `repeats` * BLOCK counters."""
    for repeat in range(0, repeats):
        block = tl.program_id(0) * repeats + repeat
        number = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.uint32)
        slot = _scatter(number) if RANDOM else number
        slot = slot & (slots - 1).to(tl.uint32)
        tl.atomic_add(counters + slot, tl.full((BLOCK,), 1, tl.int64), sem="relaxed")


@jit
def _look_up_kernel(
    table,  # (TABLE,) int32
    out,  # (programs,) int64
    repeats,
    GATHER: tl.constexpr,
    TABLE: tl.constexpr,
):
    """Sum `repeats` * TABLE entries of the table, anywhere in it."""
    entry = tl.arange(0, TABLE)
    held = tl.load(table + entry)
    total = tl.zeros((TABLE,), tl.int32)
    for repeat in range(0, repeats):
        block = tl.program_id(0) * repeats + repeat
        place = (_scatter((block * TABLE + entry).to(tl.uint32)) & (TABLE - 1)).to(tl.int32)
        total += tl.gather(held, place, 0) if GATHER else tl.load(table + place)
    tl.store(out + tl.program_id(0), tl.sum(total.to(tl.int64), 0))


def add(counters: Tensor, programs: int, repeats: int, at_random: bool) -> None:
    """Add one `programs` * `repeats` * BLOCK times."""
    _add_kernel[(programs,)](
        counters=counters,
        repeats=repeats,
        slots=counters.numel(),
        RANDOM=at_random,
        BLOCK=BLOCK,
        num_warps=4,
    )


def look_up(table: Tensor, out: Tensor, repeats: int, gather: bool) -> None:
    """Sum `repeats` * TABLE entries for each entry of `out`."""
    _look_up_kernel[(out.numel(),)](
        table=table, out=out, repeats=repeats, GATHER=gather, TABLE=TABLE, num_warps=8
    )


def measure_adds(
    device: torch.device, slots: int, at_random: bool, programs: int, repeats: int, rounds: int
) -> dict[str, Any]:
    """Measure atomic adds a second, and whether every counter is right after one launch."""
    counters = torch.zeros(slots, dtype=torch.int64, device=device)
    number = programs * repeats * BLOCK
    add(counters, programs, repeats, at_random)
    struck = torch.arange(number, device=device)
    struck = (scatter(struck) if at_random else struck) % slots
    right = torch.equal(counters, struck.bincount(minlength=slots))
    calls = {"add": lambda: add(counters, programs, repeats, at_random)}
    seconds = statistics.median(interleave(calls, device, rounds)["add"])
    return {"ok": right, "seconds": seconds, "adds_per_second": number / seconds}


def measure_look_ups(
    device: torch.device, gather: bool, programs: int, repeats: int, rounds: int
) -> dict[str, Any]:
    """Measure look-ups a second, and whether their sums are right."""
    table = torch.arange(TABLE, dtype=torch.int32, device=device) * 7 % 1009
    out = torch.zeros(programs, dtype=torch.int64, device=device)
    look_up(table, out, repeats, gather)
    number = programs * repeats * TABLE
    place = scatter(torch.arange(number, device=device)) % TABLE
    right = torch.equal(out, table[place].view(programs, -1).sum(1))
    calls = {"look up": lambda: look_up(table, out, repeats, gather)}
    seconds = statistics.median(interleave(calls, device, rounds)["look up"])
    return {"ok": right, "seconds": seconds, "look_ups_per_second": number / seconds}
