"""Where the positives stand, and their scores: `reference.layout.locate` in Triton.

The targets of all levels, in the order in which they are flattened, are cut into stretches, one for
each program. A first pass counts the positives of each stretch; a second one knows from these
counts where its own begin, and writes them in their order. So nothing is as large as the targets,
and nobody waits: neither a program for another one, nor the host for the device.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .language import finite, jit

_BLOCK = 1024  # targets, or slots of what is returned, that a program looks at together
_STRETCHES = 2048  # of a level, at most: as many programs as a large GPU runs at a time
_WARPS = 4


@triton.jit
def _read(level, position, mask, ignore_index, PER_LOGIT: tl.constexpr, DENSE: tl.constexpr):
    """Read which flattened positions of a level's targets hold a positive, and the class named.

    Targets per logit name none, their position tells the class: 0.
    """
    targets, _, strides, sizes = level
    if DENSE:
        at = position
    else:
        row, channel, place = _coordinates(position, sizes, PER_LOGIT)
        at = row * strides[3] + channel * strides[4] + place * strides[5]
    target = tl.load(targets + at, mask=mask, other=0)
    if PER_LOGIT:
        return mask & (target == 1), tl.zeros_like(position)
    channel = target.to(tl.int64)
    known = (channel >= 0) & (channel < sizes[0]) & (channel != ignore_index)
    return mask & known, channel


@triton.jit
def _coordinates(position, sizes, PER_LOGIT: tl.constexpr):
    """Return (row, class, place) of a flattened position; class indices have no axis of classes."""
    row = position // sizes[1]
    channel = tl.zeros_like(position)
    if PER_LOGIT:
        channel = row % sizes[0]
        row = row // sizes[0]
    return row, channel, position % sizes[1]


@triton.jit
def _gather(level, position, channel, mask, dtype: tl.constexpr, PER_LOGIT: tl.constexpr):
    """Gather positives: the position in the level's flattened logits, and the score."""
    _, logits, strides, sizes = level
    row, own, place = _coordinates(position, sizes, PER_LOGIT)
    channel += own
    at = row * strides[0] + channel * strides[1] + place * strides[2]
    score = tl.load(logits + at, mask=mask, other=0.0)
    return (row * sizes[0] + channel) * sizes[1] + place, finite(score.to(dtype))


@jit
def _count_kernel(
    logits,  # (batch, classes, places), one level
    targets,  # (batch, places) or (batch, classes, places)
    counts,  # (programs,) int32, out
    stretch: tl.int64,
    number: tl.int64,
    classes: tl.int64,
    places: tl.int64,
    logits_0: tl.int64,
    logits_1: tl.int64,
    logits_2: tl.int64,
    targets_0: tl.int64,
    targets_1: tl.int64,
    targets_2: tl.int64,
    ignore_index: tl.int64,
    PER_LOGIT: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count the positives of a stretch of a level."""
    strides = (logits_0, logits_1, logits_2, targets_0, targets_1, targets_2)
    level = (targets, logits, strides, (classes, places))
    start = tl.cast(tl.program_id(0), tl.int64) * stretch
    found = tl.zeros((BLOCK,), tl.int32)
    for first in range(start, tl.minimum(start + stretch, number), BLOCK):
        position = tl.cast(first, tl.int64) + tl.arange(0, BLOCK)
        positive, _ = _read(level, position, position < number, ignore_index, PER_LOGIT, DENSE)
        found += positive.to(tl.int32)
    tl.store(counts + tl.program_id(0), tl.sum(found, 0))


@jit
def _write_kernel(
    logits,  # as in `_count_kernel`; so is `targets`
    targets,
    counts,  # (stretches,) int32, of all levels in turn
    index,  # (size,) int64, out: positions in the flattened logits of all levels, then -1
    scores,  # (size,) out: the scores there, then -inf
    fits,  # (1,) int8, out: whether there are as many positives as said
    stretches,
    earlier,  # stretches of the levels before this one
    first_logit: tl.int64,  # logits of the levels before this one
    size: tl.int64,
    least: tl.int64,
    stretch: tl.int64,
    number: tl.int64,
    classes: tl.int64,
    places: tl.int64,
    logits_0: tl.int64,
    logits_1: tl.int64,
    logits_2: tl.int64,
    targets_0: tl.int64,
    targets_1: tl.int64,
    targets_2: tl.int64,
    ignore_index: tl.int64,
    PER_LOGIT: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the positives of a stretch behind those of all earlier ones."""
    strides = (logits_0, logits_1, logits_2, targets_0, targets_1, targets_2)
    level = (targets, logits, strides, (classes, places))
    dtype: tl.constexpr = scores.dtype.element_ty
    this = earlier + tl.program_id(0)
    lane = tl.arange(0, BLOCK)

    # 1. How many positives there are, and how many of them in earlier stretches.
    total = tl.zeros((), tl.int64)
    slot = tl.zeros((), tl.int64)
    for first in range(0, stretches, BLOCK):
        count = tl.load(counts + first + lane, mask=first + lane < stretches, other=0).to(tl.int64)
        total += tl.sum(count, 0)
        slot += tl.sum(tl.where(first + lane < this, count, 0), 0)
    tl.store(fits, ((total >= least) & (total <= size)).to(tl.int8), mask=this == 0)

    # 2. The positives, if there are any. None is written behind the end.
    start = tl.cast(tl.program_id(0), tl.int64) * stretch
    end = tl.minimum(start + stretch, number)
    end = tl.where(tl.load(counts + this) > 0, end, start)
    for first in range(start, end, BLOCK):
        position = tl.cast(first, tl.int64) + lane
        positive, channel = _read(
            level, position, position < number, ignore_index, PER_LOGIT, DENSE
        )
        found = positive.to(tl.int32)
        here = tl.sum(found, 0)
        if here > 0:
            at, score = _gather(level, position, channel, positive, dtype, PER_LOGIT)
            out = slot + tl.cumsum(found, 0) - 1
            tl.store(index + out, first_logit + at, mask=positive & (out < size))
            tl.store(scores + out, score, mask=positive & (out < size))
        slot += here

    # 3. What is left behind them is padding, which the programs of all levels share.
    for first in range(total + tl.cast(this, tl.int64) * BLOCK, size, stretches * BLOCK):
        out = tl.cast(first, tl.int64) + lane
        tl.store(index + out, tl.full((BLOCK,), -1, tl.int64), mask=out < size)
        tl.store(scores + out, tl.full((BLOCK,), float("-inf"), dtype), mask=out < size)


@jit
def _look_up_kernel(
    logits,  # as in `_count_kernel`; so is `targets`
    targets,
    positives,  # (size,) int64 positions in the flattened targets of all levels, -1 for padding
    index,  # (size,) int64, out; so are the next two
    scores,
    right,  # (size,) int8: whether there is a positive where one is said to be
    first_target: tl.int64,  # targets of the levels before this one
    first_logit: tl.int64,
    lowest: tl.int64,  # this launch answers for the positions from here
    highest: tl.int64,  # to here
    size: tl.int64,
    number: tl.int64,
    classes: tl.int64,
    places: tl.int64,
    logits_0: tl.int64,
    logits_1: tl.int64,
    logits_2: tl.int64,
    targets_0: tl.int64,
    targets_1: tl.int64,
    targets_2: tl.int64,
    ignore_index: tl.int64,
    PER_LOGIT: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gather the positives that are said to be in a level, and check that they are."""
    strides = (logits_0, logits_1, logits_2, targets_0, targets_1, targets_2)
    level = (targets, logits, strides, (classes, places))
    dtype: tl.constexpr = scores.dtype.element_ty
    out = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    said = tl.load(positives + out, mask=out < size, other=-1)
    mine = (out < size) & (said >= lowest) & (said <= highest)
    # A position in another level, or in none, is looked up nowhere.
    inside = mine & (said >= first_target) & (said - first_target < number)
    position = tl.where(inside, said - first_target, 0)
    positive, channel = _read(level, position, inside, ignore_index, PER_LOGIT, DENSE)
    at, score = _gather(level, position, channel, positive, dtype, PER_LOGIT)
    tl.store(index + out, tl.where(positive, first_logit + at, -1), mask=mine)
    tl.store(scores + out, tl.where(positive, score, float("-inf")), mask=mine)
    tl.store(right + out, (positive | (said == -1)).to(tl.int8), mask=mine)


def locate(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    positives: Tensor | None,
    size: int,
    exact: bool,
    ignore_index: int,
    name: str = "loc_errors",
) -> tuple[Tensor, Tensor]:
    """Find the positives and gather their scores, as `reference.layout.locate`.

    What is wrong raises as there: a ValueError under the interpreter, an asynchronous assertion on
    a device.
    """
    device = logits[0].device
    dtype = torch.promote_types(logits[0].dtype, torch.float32)
    index = torch.empty(size, dtype=torch.int64, device=device)
    scores = torch.empty(size, dtype=dtype, device=device)
    levels = [
        _of_level(*level, ignore_index=ignore_index) for level in zip(logits, targets, strict=True)
    ]
    with torch.cuda.device_of(index):
        if positives is None:
            _search(levels, index, scores, exact, name)
        else:
            _look_up(levels, positives, index, scores)
    return index, scores


def _search(
    levels: Sequence[dict[str, Any]],
    index: Tensor,
    scores: Tensor,
    exact: bool,
    name: str = "loc_errors",
) -> None:
    """Write the positives into `index` and `scores`, in the order of the targets."""
    lengths = [_length_of_stretch(level["number"]) for level in levels]
    grids = [
        max(1, triton.cdiv(level["number"], length))
        for level, length in zip(levels, lengths, strict=True)
    ]
    counts = torch.empty(sum(grids), dtype=torch.int32, device=index.device)
    fits = torch.empty(1, dtype=torch.int8, device=index.device)
    for level, length, own in zip(levels, lengths, counts.split(grids), strict=True):
        _count_kernel[(own.numel(),)](counts=own, stretch=length, **level)
    earlier = first_logit = 0
    for level, length, programs in zip(levels, lengths, grids, strict=True):
        _write_kernel[(programs,)](
            counts=counts,
            index=index,
            scores=scores,
            fits=fits,
            stretches=counts.numel(),
            earlier=earlier,
            first_logit=first_logit,
            size=index.numel(),
            least=index.numel() if exact else 0,
            stretch=length,
            **level,
        )
        earlier += programs
        first_logit += level["logits"].numel()
    number, size = "one entry", index.numel()
    if counts.device.type == "cpu" and not fits:  # the host knows
        number = f"{int(counts.sum())} entries, one"
    _require(fits, f"{name}: expected {number} for each positive in targets, got {size}")


def _length_of_stretch(targets: int) -> int:
    """Return how many targets a program takes, so that at most `_STRETCHES` programs run."""
    return _BLOCK * max(1, triton.cdiv(triton.cdiv(targets, _BLOCK), _STRETCHES))


def _look_up(
    levels: Sequence[dict[str, Any]], positives: Tensor, index: Tensor, scores: Tensor
) -> None:
    """Write the positives that are given into `index` and `scores`."""
    if not positives.numel():
        return
    right = torch.empty_like(positives, dtype=torch.int8, memory_format=torch.contiguous_format)
    grid = (triton.cdiv(positives.numel(), _BLOCK),)
    anywhere = torch.iinfo(torch.int64)
    first_target = first_logit = 0
    for place, level in enumerate(levels):
        behind = first_target + level["number"]
        # The first and the last level answer for what is in none.
        _look_up_kernel[grid](
            positives=positives.contiguous(),
            index=index,
            scores=scores,
            right=right,
            first_target=first_target,
            first_logit=first_logit,
            lowest=first_target if place else anywhere.min,
            highest=behind - 1 if place < len(levels) - 1 else anywhere.max,
            size=positives.numel(),
            **level,
        )
        first_target = behind
        first_logit += level["logits"].numel()
    _require(
        right.all(),
        "positives: every entry must be -1 (padding) or the position of a positive in targets",
    )


def _of_level(logits: Tensor, targets: Tensor, ignore_index: int) -> dict[str, Any]:
    """Return arguments that describe a level, which all kernels take."""
    per_logit = targets.dim() == logits.dim()
    beside = targets if per_logit else targets[:, None]
    arguments = {
        "logits": logits,
        "targets": targets,
        "number": targets.numel(),
        # What a position is divided by, even where the level has none.
        "classes": max(1, logits.shape[1]) if per_logit else logits.shape[1],
        "places": max(1, logits.shape[2]),
        "ignore_index": ignore_index,
        "PER_LOGIT": per_logit,
        "DENSE": targets.is_contiguous(),
        "BLOCK": _BLOCK,
        "num_warps": _WARPS,
    }
    for axis in range(3):
        arguments[f"logits_{axis}"] = logits.stride(axis)
        arguments[f"targets_{axis}"] = beside.stride(axis)
    return arguments


def _require(condition: Tensor, message: str) -> None:
    """Raise ValueError where the host can know; where not, assert asynchronously on the device."""
    if condition.device.type != "cpu":
        torch._assert_async(condition.view(torch.bool), message)
    elif not condition:
        raise ValueError(message)


_WRITTEN = 256  # positives of a program that writes their own gradient


@jit
def _positive_grads_kernel(
    index,  # (P,) int64
    positive_grad,  # (P,) float64
    out,  # (batch, classes, places), one level
    positives,
    first: tl.int64,
    size: tl.int64,
    classes: tl.int64,
    places: tl.int64,
    out_0: tl.int64,
    out_1: tl.int64,
    out_2: tl.int64,
    LANES: tl.constexpr,
):
    """Write the gradient of each positive where it stands in the level that begins at `first`."""
    i = tl.cast(tl.program_id(0), tl.int64) * LANES + tl.arange(0, LANES)
    place = tl.load(index + i, mask=i < positives, other=-1) - first
    mask = (place >= 0) & (place < size)
    row = place // places
    at = (row // classes) * out_0 + (row % classes) * out_1 + (place % places) * out_2
    value = tl.load(positive_grad + i, mask=mask)
    if out.dtype.element_ty != tl.float64:
        value = value.to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


def write_positive_grads(gradients: Sequence[Tensor], index: Tensor, positive_grad: Tensor) -> None:
    """Write positive_grad (P,) into the gradients at the positions `index` (P,); -1 is padding."""
    index, positive_grad = index.contiguous(), positive_grad.contiguous()
    first = 0
    for out in gradients:
        if out.numel() and index.numel():
            _positive_grads_kernel[(triton.cdiv(index.numel(), _WRITTEN),)](
                index=index,
                positive_grad=positive_grad,
                out=out,
                positives=index.numel(),
                first=first,
                size=out.numel(),
                classes=out.shape[1],
                places=out.shape[2],
                out_0=out.stride(0),
                out_1=out.stride(1),
                out_2=out.stride(2),
                LANES=_WRITTEN,
                num_warps=1,
            )
        first += out.numel()
