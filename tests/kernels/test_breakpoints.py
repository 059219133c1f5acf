"""What only the breakpoint kernels promise; `test_kernels` holds both to the specification."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alrp_triton.reference import layout
from alrp_triton.reference.breakpoints import sort as reference
from alrp_triton.reference.layout import Batch
from alrp_triton.testing import kernel_tolerance as budgets
from alrp_triton.testing.launches import same

triton = pytest.importorskip("triton")
tl = importlib.import_module("triton.language")
kernels = importlib.import_module("alrp_triton.kernels.breakpoints.ranks")
sort = importlib.import_module("alrp_triton.kernels.breakpoints.sort")
segments_module = importlib.import_module("alrp_triton.kernels.segments")
anchors = importlib.import_module("alrp_triton.kernels.breakpoints.anchors")
bins_module = importlib.import_module("alrp_triton.kernels.breakpoints.bins")
dense = importlib.import_module("alrp_triton.kernels.breakpoints.dense")
language = importlib.import_module("alrp_triton.kernels.language")
scan = importlib.import_module("alrp_triton.kernels.breakpoints.scan")
BreakpointTiles = importlib.import_module("alrp_triton.kernels.tuning.block_sizes").BreakpointTiles

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
SMALL = BreakpointTiles(
    lanes=4, count_rows=2, gradient_rows=2, programs=3, block=8, patterns=1 << 14
)


# --- breakpoints ----------------------------------------------------------------------------------


@triton.jit
def _find_kernel(
    scores, segments, found, keys, table, flags, limits, ends, cells, BLOCK: tl.constexpr
):
    i = tl.arange(0, BLOCK)
    s = tl.load(scores + i)
    segment = tl.load(segments + i)
    limits = sort.read_limits(limits, segment)
    look_up = sort.LookUp(keys, table, tl.load(flags + sort.HALVINGS), ends, cells)
    number = sort.find(sort.within(s, limits), segment, limits, look_up)
    tl.store(found + i, tl.where(s >= limits.lowest, number, 0))


# Scores as they are drawn, in quarters (ties), all equal, and with some far away.
KINDS = {
    "drawn": lambda s: s,
    "ties": lambda s: (4 * s).round() / 4,
    "equal": lambda s: torch.full_like(s, 1.5),
    "far": lambda s: torch.cat([s[1:], s.new_tensor([1e4])]),
    "infinite": lambda s: torch.cat([s[2:], s.new_tensor([layout.LARGEST, -layout.LARGEST])]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("delta", [0.0, 1e-3, 0.25, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_breakpoints_are_those_of_the_reference(
    dtype: torch.dtype, delta: float, kind: str
) -> None:
    """Exactly, as is what is found among them."""
    for positives in (2, 7, 40, 130):
        scores = KINDS[kind](2 * torch.randn(positives, dtype=dtype)).to(DEVICE)
        breakpoints, expected = (
            sort.sort_breakpoints(scores, delta),
            reference.sort_breakpoints(scores, delta),
        )
        key, high, low = expected.key, expected.high[1:], expected.low[1:]
        lower, upper = expected.lower - 1, expected.upper - 1
        if delta == 0:  # one breakpoint a positive there, two here: those at lower places first
            key, high, low = (x.repeat_interleave(2) for x in (key, high, low))
            before, equal = (
                compare(scores, scores[:, None]).sum(1) for compare in (torch.lt, torch.eq)
            )
            lower, upper = lower + before, lower + before + equal
        assert torch.equal(breakpoints.keys[: 2 * positives], key)
        assert torch.equal(breakpoints.high, high)
        assert torch.equal(breakpoints.low, low)
        back = breakpoints.order.argsort()
        assert torch.equal(breakpoints.ranks[0][back], lower.int())
        assert torch.equal(breakpoints.ranks[1][back], upper.int())
        if delta > 0:
            width = (breakpoints.high.diff() + breakpoints.low.diff()) * breakpoints.windows[:-1]
            assert torch.equal(width, expected.width[1:-1])

        others = 3 * torch.randn(256, dtype=dtype, device=DEVICE)
        others[:positives] = breakpoints.keys[:positives][:256]
        others[-2:] = torch.tensor([-torch.inf, torch.inf])
        found = torch.empty(256, dtype=torch.int32, device=DEVICE)
        _find_kernel[(1,)](others, torch.zeros_like(found), found, **breakpoints.look_up, BLOCK=256)
        at = torch.bucketize(layout.finite(others), key, right=True, out_int32=True)
        assert torch.equal(found, at)


@pytest.mark.parametrize("delta", [0.0, 1e-3, 1.0])
def test_breakpoints_of_groups_are_those_of_each_alone(delta: float) -> None:
    """With padding in one of them; and what is found in a segment, others or not."""
    scores, own = 2 * torch.randn(90, device=DEVICE), torch.randint(0, 7, (90,), device=DEVICE)
    scores[:3], own[:3] = -torch.inf, 5
    names = [torch.arange(9, device=DEVICE)[:, None] - 1]
    given = Batch([], [], own, scores, delta, budgets.IGNORE, names, own)
    segments = segments_module.segments_of(given)
    breakpoints = sort.sort_breakpoints(scores, delta, segments.positives)
    others = 3 * torch.randn(256, device=DEVICE)
    others[:90] = breakpoints.keys[:90]
    for group in range(7):
        mine = own == group
        alone = sort.sort_breakpoints(scores[mine], delta)
        start, number = int((own < group).sum()), int(mine.sum())
        segment = segments.levels[0][group + 1, 0]
        assert segment == start
        assert breakpoints.ends[segment] == start + number
        at = slice(2 * start, 2 * (start + number))
        for name in ("keys", "high", "low", "windows"):
            assert torch.equal(
                getattr(breakpoints, name)[at], getattr(alone, name)[: 2 * number]
            ), name
        assert torch.equal(breakpoints.limits[segment, :3], alone.limits[0, :3])
        place = slice(start, start + number)
        assert torch.equal(breakpoints.ranks[:2, place] - 2 * start, alone.ranks[:2])
        assert torch.equal(breakpoints.ranks[2:, place] - 3 * start, alone.ranks[2:])
        found, expected = torch.empty((2, 256), dtype=torch.int32, device=DEVICE)
        _find_kernel[(1,)](
            others, segment.expand(256).contiguous(), found, **breakpoints.look_up, BLOCK=256
        )
        _find_kernel[(1,)](others, torch.zeros_like(found), expected, **alone.look_up, BLOCK=256)
        assert torch.equal(found, torch.where(expected > 0, expected + 2 * start, 0))
    nobody = segments.levels[0][[0, 8], 0]
    assert nobody.tolist() == [90, 90]
    assert breakpoints.limits[90, 0].isnan()
    assert breakpoints.limits[90, 1:].tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_look_up_begins_in_front_of_the_breakpoints(dtype: torch.dtype) -> None:
    """A NaN leaves its segment without limits, and a score then asks the table for any cell."""
    nan = torch.nan
    for scores in ([nan], [nan] * 3, [2.0, 3.0, nan], [-2.0, 3.0, nan], [-torch.inf] * 2, [0.5]):
        given = torch.tensor(scores, dtype=dtype, device=DEVICE)
        breakpoints = sort.sort_breakpoints(given, 1.0)
        assert breakpoints.table.min() >= 1
        assert breakpoints.table.max() <= 2 * given.numel()


@pytest.mark.parametrize("positives", [3, 3000])
def test_no_rounding_leads_behind_the_table(positives: int) -> None:
    """The division of a GPU may be off by two units in the last place, that of a CPU is not."""
    breakpoints = sort.sort_breakpoints(torch.randn(positives, device=DEVICE), 0.5)
    _, first, last, scale = breakpoints.limits[0].double().tolist()
    assert (last - first) * scale * (1 + 2.0**-21) < breakpoints.cells * positives - 1


def test_breakpoints_of_padding_stand_in_front() -> None:
    scores = torch.randn(9, device=DEVICE)
    padded = torch.cat(
        [scores.new_full((3,), -torch.inf), scores, scores.new_full((2,), -torch.inf)]
    )
    breakpoints = sort.sort_breakpoints(padded, 0.5)
    assert breakpoints.keys[:10].eq(-torch.inf).all()
    assert torch.equal(breakpoints.keys[10:28], reference.sort_breakpoints(scores, 0.5).key)
    assert not breakpoints.windows[:10].any()
    for ranks, number in ((breakpoints.ranks[:2], 28), (breakpoints.ranks[2:], 42)):
        expected = torch.arange(number, dtype=torch.int32, device=DEVICE)
        assert torch.equal(ranks.reshape(-1).sort().values, expected)


def test_a_nan_among_the_scores_reads_nothing_out_of_bounds() -> None:
    for scores in (torch.tensor([0.0, torch.nan, 1.0]), torch.tensor([torch.nan] * 3)):
        breakpoints = sort.sort_breakpoints(scores.to(DEVICE), 1.0)
        assert breakpoints.table.ge(0).all()
        assert breakpoints.table.le(6).all()
        assert breakpoints.ranks.ge(0).all()
        assert breakpoints.ranks[:2].lt(6).all()
        assert breakpoints.ranks[2:].lt(9).all()


# --- prefix sums ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("points", [1, 7, 8, 9, 100])
def test_integral_over_stretches(
    points: int, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "_STRETCH", 8)
    monkeypatch.setattr(scan, "_BEFORE", 4)
    high = torch.rand(points, dtype=torch.float64, device=DEVICE).sort().values
    windows = (torch.rand(points, device=DEVICE) < 0.7).to(torch.int8)
    jump, more = torch.rand(2, 2, points, dtype=torch.float64, device=DEVICE)
    running, integral = scan.integrate(
        jump, more, high, torch.zeros_like(high), windows, None, each=1, backward=backward
    )
    distance = high.diff() * windows[:-1]
    nothing = high.new_zeros(1)
    distance = torch.cat([distance, nothing] if backward else [nothing, distance])

    def in_order(segment: Tensor) -> Tensor:
        return segment.flip(-1) if backward else segment

    expected = in_order(in_order(jump).cumsum(1))
    torch.testing.assert_close(running, expected, rtol=1e-14, atol=0)
    parts = (expected - jump) * distance + more
    torch.testing.assert_close(integral, in_order(in_order(parts).cumsum(1)), rtol=1e-13, atol=0)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("each", [2, 3])
@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [3, 1, 7, 2], [14, 1, 60], [1, 9, 1, 1, 30]])
def test_integral_starts_anew_with_each_segment(
    lengths: list[int], each: int, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit what it is alone, next to segments of huge numbers, wherever stretches begin."""
    monkeypatch.setattr(scan, "_STRETCH", 8)
    monkeypatch.setattr(scan, "_BEFORE", 4)
    sizes = torch.tensor(lengths)
    ends = sizes.cumsum(0)
    bounds = (ends if backward else ends - sizes).repeat_interleave(sizes).int().to(DEVICE)
    points = each * sum(lengths)
    high = torch.rand(points, dtype=torch.float64, device=DEVICE).sort().values
    windows = (torch.rand(points, device=DEVICE) < 0.7).to(torch.int8)
    windows[each * ends.to(DEVICE) - 1] = 0
    jump, more = torch.rand(2, 1, points, dtype=torch.float64, device=DEVICE)
    scale = torch.tensor([1e30, 1.0]).repeat(len(lengths))[: len(lengths)]
    jump *= scale.repeat_interleave(each * sizes).to(DEVICE)
    low = torch.zeros_like(high)
    got = scan.integrate(jump, more, high, low, windows, bounds, each=each, backward=backward)
    for end, size in zip(ends.tolist(), lengths, strict=True):
        segment = slice(each * (end - size), each * end)
        distance = high[segment].diff() * windows[segment][:-1]
        nothing = high.new_zeros(1)
        distance = torch.cat([distance, nothing] if backward else [nothing, distance])
        u, d, m = (
            x.flip(-1) if backward else x for x in (jump[0, segment], distance, more[0, segment])
        )
        running = u.cumsum(0)
        integral = ((running - u) * d + m).cumsum(0)
        for x, expected in zip(got, (running, integral), strict=True):
            mine = x[0, segment].flip(-1) if backward else x[0, segment]
            torch.testing.assert_close(mine, expected, rtol=1e-13, atol=0)


# --- bins ---------------------------------------------------------------------------------------


@given(
    logits=st.integers(1, 1 << 37),
    bins=st.integers(2, 400_000),
    slack=st.integers(1, 1 << 20),
    lanes=st.sampled_from([32, 64]),
)
def test_no_field_of_a_bin_can_overflow(logits: int, bins: int, slack: int, lanes: int) -> None:
    packing = bins_module.pack(logits, bins, slack, lanes)
    most = logits // packing.replicas + slack
    assert most << packing.bits < 1 << (packing.shift - 1)  # distances, taken away or added
    assert most < 1 << (63 - packing.shift)  # the number
    assert 16 <= packing.bits <= 24
    assert packing.replicas % lanes == 0
    assert packing.replicas & (packing.replicas - 1) == 0


@pytest.mark.parametrize(("positives", "replicas", "bits"), [(1000, 64, 24), (50_000, 32, 22)])
def test_bins_of_a_large_call(positives: int, replicas: int, bits: int) -> None:
    """At 20.95 million logits, in at most 2 % of their memory and 32 MB."""
    level = torch.empty(1, device="meta").expand(8, 80, 32_736)
    packing = bins_module.pack_levels([level], 2 * positives, BreakpointTiles())
    assert (packing.replicas, packing.bits) == (replicas, bits)
    assert 2 * positives * packing.replicas * 8 <= 0.02 * 4 * level.numel() + (32 << 20)


def _most_a_replica_gets(shape: tuple[int, int], replicas: int, tiles: Any) -> tuple[int, int]:
    """Return the most that a replica gets of (anchors, classes) logits.

    The first is added by the tiles, the second taken away if all anchors are ignored.
    """
    anchors, classes = shape
    place = torch.arange(anchors * classes)
    tile, lane = place // (tiles.count_rows * tiles.lanes), place % tiles.lanes
    added = ((lane + tile * tiles.lanes) % replicas).bincount(minlength=replicas)
    taken = (place % replicas).bincount(minlength=replicas)
    return int(added.max()), int(taken.max())


@pytest.mark.parametrize("rows", [2, 16])
@pytest.mark.parametrize("shape", [(1, 1), (33, 1), (129, 80), (1000, 7), (5000, 3), (257, 91)])
def test_the_slack_of_a_replica_is_enough(shape: tuple[int, int], rows: int) -> None:
    tiles = BreakpointTiles(count_rows=rows)
    level = torch.empty(shape, device="meta")[:, :, None]
    slack = dense.pieces_of(level) * 2 * rows
    for replicas in (32, 64, 256, 1024):
        share = level.numel() // replicas
        assert max(_most_a_replica_gets(shape, replicas, tiles)) <= share + slack


@triton.jit
def _ignored_kernel(ignored, found, classes, classes_magic, BLOCK: tl.constexpr):
    given = anchors.Anchors(None, (0, 0), BLOCK, 1, 0, classes, classes_magic, -100)
    mask = tl.load(ignored + tl.arange(0, BLOCK)) != 0
    order, number = anchors.gather_ignored(mask, BLOCK), tl.sum(mask.to(tl.int32), 0)
    for first in range(0, number * classes, BLOCK):
        anchor, channel, mask = anchors.ignored_logits(order, number, first, given, BLOCK)
        tl.atomic_add(found + anchor * classes + channel, 1, mask=mask)


@pytest.mark.parametrize("classes", [1, 3, 8, 80])
def test_each_logit_of_an_ignored_anchor_has_a_lane(classes: int) -> None:
    """Once, and no other has; of none, some and all anchors of a block."""
    for share in (0.0, 0.3, 1.0):
        ignored = (torch.rand(8, device=DEVICE) < share).int()
        found = torch.zeros(8, classes, dtype=torch.int32, device=DEVICE)
        _ignored_kernel[(1,)](ignored, found, classes, language.magic_of(classes), BLOCK=8)
        assert torch.equal(found, ignored[:, None].expand(8, classes))


def test_pieces_are_no_more_than_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "_PIECE", 64)
    for batch, classes, places in ((7, 3, 30), (1, 1, 700), (100, 5, 7), (3, 70, 4), (9, 64, 1)):
        logits = torch.zeros(batch, classes, 2 * places)[:, :, ::2]
        targets = torch.zeros(batch, places)
        segments = torch.zeros(batch, 1, dtype=torch.int32).expand(batch, places)
        parts = list(dense.pieces(logits, targets, segments))
        assert all(part[2].shape == part[1].shape for part in parts)
        assert sum(part[0].numel() for part in parts) == logits.numel()
        assert len(parts) <= dense.pieces_of(logits)


# --- integers -----------------------------------------------------------------------------------


def draw(
    delta: float = 1.0, dtype: torch.dtype = torch.float32, spread: float = 2.0
) -> budgets.Case:
    torch.manual_seed(0)
    logits = (spread * torch.randn(60, 2, 1) - 1).to(DEVICE, dtype)
    targets = torch.randint(-1, 3, (60, 1))
    targets[torch.rand(60, 1) < 0.2] = budgets.IGNORE
    return budgets.find([logits], [targets.to(DEVICE)], delta)


@pytest.mark.parametrize("spread", [2.0, 0.01])  # many intervals; all logits in one
@pytest.mark.parametrize(
    "changed",
    [
        {"count_rows": 8},
        {"lanes": 8},
        {"lanes": 16, "count_rows": 1},
        {"programs": 50},
        {"block": 32},
    ],
)
def test_tile_sizes_change_nothing(changed: dict[str, int], spread: float) -> None:
    """Integers are added, so that every sum is the same bit by bit."""
    case = draw(spread=spread)
    expected = kernels.count(*case.count_input, SMALL)
    assert same(kernels.count(*case.count_input, SMALL._replace(**changed)), expected)


def test_what_is_taken_out_again_leaves_no_trace() -> None:
    """Class indices are counted as a whole and then corrected, targets per logit are not."""
    case = draw()
    marks = (case.targets[0] == torch.arange(2, device=DEVICE)).float()[:, :, None]
    marks[case.targets[0][:, 0] == budgets.IGNORE] = -1
    per_logit = case._replace(targets=[marks])
    expected = kernels.count(*per_logit.count_input, SMALL)
    assert same(kernels.count(*case.count_input, SMALL), expected)
    gradients = kernels.gradient(*case.gradient_input, SMALL)
    assert same(gradients, kernels.gradient(*per_logit.gradient_input, SMALL))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bit_patterns_are_counted_like_their_numbers(dtype: torch.dtype) -> None:
    """The sums of 16-bit logits are those of the same numbers in float32, bit by bit."""
    case = draw(dtype=dtype)
    upcast = case._replace(logits=[case.logits[0].float()])
    assert same(kernels.count(*case.count_input, SMALL), kernels.count(*upcast.count_input, SMALL))


def test_nobody_below_means_exactly_nothing() -> None:
    """Negatives out of reach, and an ignored one in reach that is taken out again: NFP is 0."""
    logits = torch.tensor([[3.0], [-3.0], [2.9], [3.1]], device=DEVICE)[:, :, None]
    targets = torch.tensor([[0], [-1], [budgets.IGNORE], [0]], device=DEVICE)
    case = budgets.find([logits], [targets], 1.0)
    nfp, rank_positive, _ = kernels.count(*case.count_input, SMALL)
    assert nfp.tolist() == [0.0, 0.0]
    torch.testing.assert_close(
        rank_positive.cpu(), torch.tensor([1.55, 1.45]).double(), rtol=1e-6, atol=0
    )


# --- against every pair -------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 1 << 30),
    positives=st.integers(1, 40),
    negatives=st.integers(0, 60),
    delta=st.sampled_from([0.0, 1e-3, 0.25, 1.0, 3.0]),
    shape=st.sampled_from(["spread", "equal", "one interval", "outlier", "large", "infinite"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_equal_to_pairwise_in_float64(
    seed: int, positives: int, negatives: int, delta: float, shape: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(seed)
    scores = 2 * torch.randn(positives + negatives)
    if shape == "equal":
        scores[:] = 0.5
    elif shape == "one interval":
        scores[positives:] = scores[0] + 1e-4 * torch.randn(negatives)
    elif shape == "outlier":
        scores[0] = -40.0
        scores[-1] = 1e4
    elif shape == "large":
        scores *= 1e4
    elif shape == "infinite":
        scores[torch.rand(scores.shape) < 0.1] = torch.inf
        scores[torch.rand(scores.shape) < 0.1] = -torch.inf
    targets = torch.full((scores.numel(), 1), -1)
    targets[:positives] = 0
    logits = scores[:, None, None].to(DEVICE, dtype)
    case = budgets.find([logits], [targets.to(DEVICE)], delta)
    exact = case.expected_count(torch.float64)
    error = (torch.stack(kernels.count(*case.count_input, SMALL)) - exact).abs()
    assert error.le(budgets.count_budget(case, SMALL, exact)).all()
    truth = case.expected_gradient(torch.float64)
    (gradient,) = kernels.gradient(*case.gradient_input, SMALL)
    (allowed,) = budgets.gradient_budget(case, SMALL, truth)
    assert (gradient.double() - truth[0]).abs().le(allowed).all()
