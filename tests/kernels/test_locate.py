"""Finding the positives in Triton against the specification: interpreted, or on a GPU.

Nothing is computed with, so every result has to be equal bit by bit.
"""

from __future__ import annotations

import importlib
import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alrp_triton.reference import layout
from alrp_triton.testing.kernel_tolerance import IGNORE, to_device

pytest.importorskip("triton")
kernels = importlib.import_module("alrp_triton.kernels.positives")

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CLASS_INDICES = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
PER_LOGIT = [*CLASS_INDICES, torch.bool, torch.float32, torch.bfloat16, torch.float64]


class Levels(NamedTuple):
    """What is searched."""

    logits: list[Tensor]
    targets: list[Tensor]
    ignore_index: int

    @property
    def number(self) -> int:
        """How many positives there are."""
        pairs = zip(self.logits, self.targets, strict=True)
        return sum(int(layout.is_positive(*pair, self.ignore_index).sum()) for pair in pairs)

    def positions(self) -> Tensor:
        """Where the positives stand in the flattened targets of all levels."""
        pairs = zip(self.logits, self.targets, strict=True)
        masks = [layout.is_positive(*pair, self.ignore_index).flatten() for pair in pairs]
        return torch.cat(masks).nonzero()[:, 0]


def check(levels: Levels, positives: Tensor | None, size: int, exact: bool) -> None:
    arguments = (levels.logits, levels.targets, positives, size, exact, levels.ignore_index)
    expected, got = layout.locate(*arguments), kernels.locate(*arguments)
    for name, mine, other in zip(("index", "scores"), got, expected, strict=True):
        assert mine.dtype == other.dtype, name
        assert mine.shape == (size,), name
        assert torch.equal(bits(mine), bits(other)), name


def bits(x: Tensor) -> Tensor:
    """View as integers, in which a NaN, which has many spellings, is equal to itself."""
    nan = torch.where(x == x, x, torch.nan) if x.is_floating_point() else x
    return nan.view(torch.int64 if x.element_size() == 8 else torch.int32)


def lay(x: Tensor, how: str) -> Tensor:
    """Lay out the same numbers with other strides."""
    if how == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "sliced":
        return x.repeat_interleave(2, -1)[..., ::2]
    if how == "expanded":
        return x[:1].expand_as(x)
    return x


@st.composite
def levels(draw: st.DrawFn) -> Levels:
    """Draw up to three levels of any form, with every kind of logit and of target."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES))
    classes = draw(st.integers(0, 5))
    logits, targets = [], []
    # In [0, C) too, which takes a class out; an unsigned byte cannot be -100.
    ignore_index = draw(st.sampled_from([IGNORE, 0, 2]))
    for _ in range(draw(st.integers(1, 3))):
        shape = draw(st.integers(0, 4)), classes, draw(st.sampled_from([0, 1, 2, 7, 23]))
        per_logit = draw(st.booleans())
        of_targets = draw(st.sampled_from(PER_LOGIT if per_logit else CLASS_INDICES))
        x = torch.randn(shape, generator=generator).to(dtype)
        x[torch.rand(shape, generator=generator) < 0.1] = draw(
            st.sampled_from([math.inf, -math.inf, math.nan, 0.0])
        )
        where = shape if per_logit else (shape[0], shape[2])
        density = draw(st.sampled_from([0.0, 0.1, 1.0]))
        mark = torch.randint(-1, classes + 2, where, generator=generator)
        mark[torch.rand(where, generator=generator) > density] = -1
        mark[torch.rand(where, generator=generator) < 0.05] = ignore_index
        if of_targets == torch.bool:
            mark = mark == 1
        elif of_targets == torch.uint8:
            ignore_index = max(ignore_index, 0)
            mark = torch.where(mark < 0, 255, mark)
        arrangement = st.sampled_from(["contiguous", "transposed", "sliced", "expanded"])
        logits.append(to_device(lay(x, draw(arrangement)), DEVICE))
        targets.append(to_device(lay(mark.to(of_targets), draw(arrangement)), DEVICE))
    return Levels(logits, targets, ignore_index)


@settings(max_examples=60, deadline=None)
@given(
    levels(),
    st.integers(0, 9),
    st.sampled_from([4, 32]),
    st.sampled_from([1, 3]),
    st.integers(0, 2**31),
)
def test_is_the_reference(case: Levels, padding: int, block: int, most: int, seed: int) -> None:
    """Positives are searched for, or given in any order, by any sizes of blocks and stretches."""
    number = case.number
    order = torch.randperm(number + padding, generator=torch.Generator().manual_seed(seed))
    said = torch.full((number + padding, 2), -1, device=DEVICE)
    said[order[:number].to(DEVICE), 0] = case.positions()
    with pytest.MonkeyPatch.context() as patch:
        if not HAS_GPU:
            patch.setattr(kernels, "_BLOCK", block)
            patch.setattr(kernels, "_STRETCHES", most)
        check(case, None, number, True)
        check(case, None, number + padding, False)
        check(case, said[:, 0], number + padding, True)


def example() -> Levels:
    """Return two levels, with 3 positives by class and 2 by logit, behind one without places."""
    logits = [torch.randn(2, 3, places, device=DEVICE) for places in (0, 4, 5)]
    indices = torch.tensor([[-1, 2, IGNORE, 0], [3, 1, -1, -1]], device=DEVICE)
    marks = torch.zeros(2, 3, 5, device=DEVICE)
    marks[1, 0, 0] = marks[1, 2, 4] = 1
    marks[0, 0] = -1
    return Levels(logits, [indices[:, :0], indices, marks], IGNORE)


def test_empty() -> None:
    nothing = Levels([torch.randn(0, 3, 2, device=DEVICE)], [torch.zeros(0, 2).long()], IGNORE)
    nothing = nothing._replace(targets=[x.to(DEVICE) for x in nothing.targets])
    for padding in (0, 3):
        check(nothing, None, padding, False)
        check(nothing, torch.full((padding,), -1, device=DEVICE), padding, True)
    check(nothing, None, 0, True)
    check(example(), torch.empty(0, dtype=torch.int64, device=DEVICE), 0, True)


def test_no_classes() -> None:
    """There are anchors, but nothing that they could be positive for."""
    case = Levels(
        [torch.randn(2, 0, 3, device=DEVICE)],
        [torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)],
        IGNORE,
    )
    check(case, None, 2, False)
    check(case, torch.full((2,), -1, device=DEVICE), 2, True)


def test_every_program_of_every_level_pads(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is room for many more than there are: more blocks of padding than stretches."""
    if not HAS_GPU:
        monkeypatch.setattr(kernels, "_BLOCK", 4)
    check(example(), None, 70 if not HAS_GPU else 70 * kernels._BLOCK + 3, False)


def test_positives_go_to_slots_as_they_are_listed() -> None:
    """The reference does this where asking for their number would wait for the device."""
    for _ in range(50):
        masks = [torch.rand(number) < 0.3 for number in torch.randint(1, 30, (3,)).tolist()]
        listed = layout._places(masks)
        slots = layout._places_in_slots(masks, listed.numel() + 4)
        assert torch.equal(listed, torch.cat(masks).nonzero()[:, 0])
        assert torch.equal(slots, torch.cat([listed, listed.new_full((4,), -1)]))


@pytest.mark.skipif(HAS_GPU, reason="the assertion would end the process")
@pytest.mark.parametrize(("size", "exact"), [(4, True), (6, True), (0, True), (4, False)])
def test_a_wrong_number_raises_and_writes_nothing_beyond(size: int, exact: bool) -> None:
    case = example()
    arguments = (case.logits, case.targets, None, size, exact, IGNORE)
    with pytest.raises(ValueError, match=r"^loc_errors: expected .* for each positive") as expected:
        layout.locate(*arguments)
    with pytest.raises(ValueError, match=r"^loc_errors: expected .* for each positive") as got:
        kernels.locate(*arguments)
    assert str(got.value) == str(expected.value)
    guard, scores = torch.full((size + 9,), 77), torch.full((size + 9,), 77.0)
    levels = [
        kernels._of_level(*level, ignore_index=IGNORE)
        for level in zip(case.logits, case.targets, strict=True)
    ]
    with pytest.raises(ValueError, match=r"^loc_errors: expected .* for each positive"):
        kernels._search(levels, guard[:size], scores[:size], exact)
    for written in (guard, scores):
        assert (written[size:] == 77).all()
        assert (written[:size] != 77).all()


@pytest.mark.skipif(HAS_GPU, reason="the assertion would end the process")
@pytest.mark.parametrize(
    "wrong",
    [0, 2, 4, 7, 8, 17, 38, -2, 2**31, 2**62, torch.iinfo(torch.int64).max, -(2**63)],
)
def test_a_wrong_position_raises_and_is_read_nowhere(wrong: int) -> None:
    """It is background, ignored, or outside of every level; to the rest it is as padding."""
    case = example()
    said = torch.tensor([3, wrong, 5, -1])
    for module in (layout, kernels):
        with pytest.raises(ValueError, match="positives: every entry"):
            module.locate(case.logits, case.targets, said, 4, True, IGNORE)
    levels = [
        kernels._of_level(*level, ignore_index=IGNORE)
        for level in zip(case.logits, case.targets, strict=True)
    ]
    index, scores = torch.zeros(4, dtype=torch.int64), torch.zeros(4)
    with pytest.raises(ValueError, match="positives: every entry"):
        kernels._look_up(levels, said, index, scores)
    without = torch.tensor([3, -1, 5, -1])
    expected = layout.locate(case.logits, case.targets, without, 4, True, IGNORE)
    assert torch.equal(index, expected[0])
    assert torch.equal(scores, expected[1])


def test_repeats() -> None:
    case = example()
    arguments = (case.logits, case.targets, None, 9, False, IGNORE)
    first, second = kernels.locate(*arguments), kernels.locate(*arguments)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


# --- beyond 32 bits -----------------------------------------------------------------------------


def far_apart(dtype: torch.dtype, *shape: int) -> Tensor:
    """Lay out rows 2^30 elements apart; memory that is never touched is never allocated."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    storage = torch.empty((1 << 31) + 64, dtype=dtype, device=DEVICE)
    torch.utils.deterministic.fill_uninitialized_memory = True
    inner = [math.prod(shape[axis + 1 :]) for axis in range(1, len(shape))]
    return storage.as_strided(shape, ((1 << 30) + 8, *inner))


def test_offsets_beyond_32_bits() -> None:
    logits = far_apart(torch.bfloat16, 3, 3, 5)
    logits.copy_(torch.randn(3, 3, 5))
    marks, indices = far_apart(torch.int8, 3, 3, 5), far_apart(torch.int8, 3, 5)
    marks.copy_(torch.randint(-1, 2, (3, 3, 5)))
    indices.copy_(torch.randint(-1, 4, (3, 5)))
    for targets in (marks, indices):
        case = Levels([logits], [targets], IGNORE)
        check(case, None, case.number, True)
        check(case, case.positions(), case.number, True)


def test_positions_beyond_32_bits() -> None:
    """There are as many logits and targets as there may be, all in the memory of one."""
    one = torch.randn(1, 1, 1, device=DEVICE)
    many = one.expand(1, 1 << 20, 5000)  # 5.2e9 logits of 5000 anchors
    indices = torch.full((1, 5000), -1, device=DEVICE)
    indices[0, ::999] = torch.tensor([0, 1, 1 << 19, (1 << 20) - 2, (1 << 20) - 1, 7]).to(DEVICE)
    case = Levels([many, many], [indices, indices], IGNORE)
    check(case, None, 12, True)
    marks = torch.ones(1, 1, 1, dtype=torch.int8, device=DEVICE).expand_as(many)
    said = torch.tensor([0, 1 << 31, (1 << 32) + 17, many.numel() - 1, many.numel()]).to(DEVICE)
    check(Levels([many, many], [marks, indices], IGNORE), said, 5, True)


@pytest.mark.parametrize("targets", [0, 1, 1023, 1024, 1025, 2_097_152, 2_097_153, 2**31 + 17])
def test_stretches_cover_the_targets(targets: int) -> None:
    length = kernels._length_of_stretch(targets)
    programs = max(1, -(-targets // length))
    assert programs <= kernels._STRETCHES
    assert (programs - 1) * length <= targets <= programs * length
    assert length % kernels._BLOCK == 0


# --- on a GPU -----------------------------------------------------------------------------------


def pyramid(per_logit: bool) -> Levels:
    """Draw a pyramid as of RetinaNet: 10 million logits, several blocks in a stretch."""
    torch.manual_seed(0)
    logits, targets = [], []
    for places in (24_000, 6_000, 1_500, 375, 100):
        x = torch.randn(4, 80, places, device=DEVICE)
        indices = torch.randint(0, 80, (4, places), device=DEVICE)
        indices[torch.rand(indices.shape, device=DEVICE) > 0.01] = -1
        logits.append(x)
        targets.append((x > 3.5).long() if per_logit else indices)
    return Levels(logits, targets, IGNORE)


@pytest.mark.gpu
@pytest.mark.parametrize("per_logit", [False, True])
def test_full_size_without_waiting(per_logit: bool) -> None:
    case = pyramid(per_logit)
    number, positions = case.number, case.positions()
    check(case, None, number, True)
    check(case, None, number + 5000, False)
    check(case, positions.flip(0), number, True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for positives in (None, positions):
            kernels.locate(case.logits, case.targets, positives, number, True, IGNORE)
    finally:
        torch.cuda.set_sync_debug_mode("default")
