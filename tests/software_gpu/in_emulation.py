"""What `test_kernels_emulated.py` runs in a process in which kernels are emulated.

By hand, `python -m pytest -n 0 -p tests.software_gpu.emulator_plugin` and the name of this file.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.software_gpu import mutants
from tests.software_gpu.emulator import Emulation, EmulationError, Unsupported

# --- what Triton lowers to shuffles, shared memory and atomics ------------------------------------


@triton.jit
def _block_kernel(x, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HOW: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    block = tl.load(x + tl.program_id(0) * ROWS * COLUMNS + at)
    out += tl.program_id(0) * ROWS * COLUMNS
    if HOW == "scan":
        tl.store(out + at, tl.cumsum(block, 1))
    elif HOW == "scan of columns, from behind":
        tl.store(out + at, tl.cumsum(block, 0, reverse=True))
    elif HOW == "sort":
        tl.store(out + at, tl.sort(block, 1))
    elif HOW == "place of the largest":
        tl.store(out + tl.arange(0, ROWS), tl.argmax(block, 1).to(tl.float32))
    elif HOW == "transpose":
        turned = tl.arange(0, COLUMNS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        tl.store(out + turned, tl.trans(block))
    elif HOW == "gather":
        tl.store(out + at, tl.gather(block, (at * 7) % COLUMNS, 1))
    elif HOW == "histogram":
        flat = tl.reshape((tl.abs(block) * 10).to(tl.int32) % 64, (ROWS * COLUMNS,))
        tl.store(out + tl.arange(0, 64), tl.histogram(flat, 64).to(tl.float32))


def _counts(x: Tensor) -> Tensor:
    bins = (x.abs() * 10).int() % 64
    return torch.stack([torch.bincount(block.flatten(), minlength=64) for block in bins]).float()


BLOCKS: dict[str, Callable[[Tensor], Tensor]] = {
    "scan": lambda x: x.cumsum(2),
    "scan of columns, from behind": lambda x: x.flip(1).cumsum(1).flip(1),
    "sort": lambda x: x.sort(2).values,
    "place of the largest": lambda x: x.argmax(2).float(),
    "transpose": lambda x: x.transpose(1, 2),
    "gather": lambda x: x.gather(2, (torch.arange(512).view(16, 32) * 7 % 32).expand_as(x)),
    "histogram": _counts,
}


@pytest.mark.parametrize("how", BLOCKS)
def test_a_block(how: str, emulation: Emulation) -> None:
    """Integers, whose sums are exact in any order."""
    x = torch.randint(-99, 99, (3, 16, 32), generator=torch.Generator().manual_seed(0)).float()
    out = torch.zeros_like(x)
    _block_kernel[(3,)](x, out, 16, 32, how)
    expected = BLOCKS[how](x).reshape(3, -1)
    assert torch.equal(out.view(3, -1)[:, : expected.shape[1]], expected)


@triton.jit
def _add_kernel(x, out, NUMBER: tl.constexpr):
    at = tl.arange(0, NUMBER)
    tl.atomic_add(out + at % 7, tl.load(x + tl.program_id(0) * NUMBER + at))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.float64])
def test_atomics(dtype: torch.dtype, emulation: Emulation) -> None:
    x, out = torch.ones(4, 128, dtype=dtype), torch.zeros(7, dtype=dtype)
    _add_kernel[(4,)](x, out, 128)
    assert out.tolist() == [76, 76, 72, 72, 72, 72, 72]
    with pytest.raises(EmulationError, match="read of global memory out of bounds"):
        _add_kernel[(5,)](x, out, 128)


@triton.jit
def _store_then_load_kernel(memory, out, NUMBER: tl.constexpr, BARRIER: tl.constexpr):
    at = tl.arange(0, NUMBER)
    tl.store(memory + at, at)
    if BARRIER:
        tl.debug_barrier()
    tl.store(out + at, tl.load(memory + (at + 64) % NUMBER))


def test_threads_of_a_program_do_not_see_each_others_stores(emulation: Emulation) -> None:
    """In the interpreter they do."""
    memory, out = torch.zeros(2, 128, dtype=torch.int32)
    _store_then_load_kernel[(1,)](memory, out, 128, True)
    assert torch.equal(out, torch.arange(128, dtype=torch.int32).roll(-64))
    with pytest.raises(EmulationError, match="race in global memory"):
        _store_then_load_kernel[(1,)](memory, out, 128, False)


@triton.jit
def _dot_kernel(x, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    block = tl.load(x + at)
    tl.store(out + at, tl.dot(block, block))


def test_tensor_cores_raise(emulation: Emulation) -> None:
    with pytest.raises(Unsupported):
        _dot_kernel[(1,)](torch.ones(32, 32).half(), torch.ones(32, 32), 32)


# --- the package's kernels ----------------------------------------------------------------------


def test_the_same_bits_in_any_order(emulation: Emulation) -> None:
    """Of programs: every launch of some calls is repeated; nothing is left to chance either."""
    recordings = mutants.record(emulation, mutants.calls(quick=True))
    assert len(recordings) > 5
    for recording in recordings:
        for schedule in (*mutants.SCHEDULES, {"order": 11, "concurrent": 64}):
            assert recording.repeat(recording.kernel, **schedule) == ""


def test_mutants_are_noticed(emulation: Emulation) -> None:
    """Some of each kind; and of the barriers nearly all: few separate nothing."""
    verdicts = mutants.run(emulation, quick=True)
    print(mutants.summary(verdicts))
    by_kind = {
        kind: [verdict.noticed for verdict in verdicts if verdict.mutant.kind == kind]
        for kind in mutants.KINDS
    }
    assert all(any(noticed) for noticed in by_kind.values())
    assert all(noticed.startswith("check") for noticed in by_kind[mutants.MISALIGNED])
    barriers = [noticed.startswith("check") for noticed in by_kind[mutants.BARRIER]]
    assert sum(barriers) > 0.9 * len(barriers)
