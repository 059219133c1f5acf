"""Where the positives and the negatives stand among the logits.

A level is a pair of tensors. Its logits are (B, C, M): B images or anchors, C classes, M places.
Its targets are either class indices (B, M), or 1 / 0 / -1 for each logit (B, C, M). Several levels
are ranked as one list, in turn, and never concatenated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

# Elements that one step of a loop over the logits handles: what bounds the memory on top of them.
CHUNK = 1 << 18

# What an infinite score is ranked as. The same in every dtype, and a float32 whose double is one
# too, so that the difference of two scores cannot overflow.
LARGEST = 2.0**125

# The half-width of the step: 0, or between these. Within them no reciprocal, no sum with a score
# and no slope overflows or loses itself in any algorithm, on any backend.
SMALLEST_DELTA, LARGEST_DELTA = 2.0**-60, 2.0**60


class Batch(NamedTuple):
    """What every count and every gradient takes: the levels, and the positives found in them."""

    logits: Sequence[Tensor]  # levels (B, C, M), any float dtype
    targets: Sequence[Tensor]  # class indices (B, M), or 1 / 0 / -1 (B, C, M), for each level
    index: Tensor  # type: ignore[assignment]  # (P,) int64, where the positives stand: see `locate`
    scores: Tensor  # (P,) their finite scores
    delta: float  # half-width of the step
    ignore_index: int  # the class index that takes an anchor out
    groups: Sequence[Tensor] = ()  # integers in the shapes of the targets: see `positive_groups`
    positive_groups: Tensor | None = None  # (P,) int64; each sees its own group. None: all are one

    def levels(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield the logits, the targets and the groups, if there are any, of each level."""
        groups: Sequence[Tensor | None] = self.groups or [None] * len(self.logits)
        yield from zip(self.logits, self.targets, groups, strict=True)

    def select(self, valid: Tensor) -> Batch:
        """Return the batch with some of its positives, as a mask (P,) says."""
        groups = self.positive_groups
        return self._replace(
            index=self.index[valid],
            scores=self.scores[valid],
            positive_groups=None if groups is None else groups[valid],
        )

    def without_levels(self) -> Batch:
        """Return the batch of the positives alone, as a list without negatives."""
        return self._replace(logits=(), targets=(), groups=())


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which scores are compared.

    16-bit logits are upcast, nothing is rounded.
    """
    return dtype if dtype == torch.float64 else torch.float32


def finite(scores: Tensor, out: Tensor | None = None) -> Tensor:
    """Return scores in their compute dtype, those beyond `LARGEST`, and -inf and +inf, moved there.

    Written to `out` of that dtype, if given.
    """
    return torch.clamp(scores.to(compute_dtype(scores.dtype)), -LARGEST, LARGEST, out=out)


def is_positive(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Return a mask in the shape of `targets`: where a positive stands."""
    return _means_positive(targets, logits, targets.dim() == logits.dim(), ignore_index)


def is_negative(at: tuple[Tensor, ...], targets: Tensor, ignore_index: int) -> Tensor:
    """Return a mask of logits at (row, class, place): which are neither positive nor ignored."""
    values = at_logits(targets, at)
    if targets.dim() == len(at):
        return values == 0
    return (values != at[1]) & (values != ignore_index)


def at_logits(x: Tensor, at: tuple[Tensor, ...]) -> Tensor:
    """Return what x, in the shape of the targets, holds for logits at (row, class, place)."""
    return x[at] if x.dim() == len(at) else x[at[0], at[2]]


def _means_positive(values: Tensor, logits: Tensor, per_logit: bool, ignore_index: int) -> Tensor:
    if per_logit:
        return values == 1
    classes = logits.shape[1]
    positive = (values >= 0) & (values < classes)
    return positive & (values != ignore_index) if 0 <= ignore_index < classes else positive


def exclude_non_negatives(
    x: Tensor, targets: Tensor, ignore_index: int, fill: bool | float = False
) -> Tensor:
    """Write `fill` into `x` (B, C, M), in place, where the logit is positive or ignored.

    Returns `x`. With class indices they are written one by one, since there are few: no comparison
    for every logit.
    """
    if targets.dim() == x.dim():
        return x.masked_fill_(targets != 0, fill)
    rows, places = (targets == ignore_index).nonzero(as_tuple=True)
    x[rows, :, places] = fill
    rows, places = is_positive(x, targets, ignore_index).nonzero(as_tuple=True)
    x[rows, targets[rows, places].long(), places] = fill
    return x


def blocks(
    logits: Tensor, targets: Tensor, size: int | None = None
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Cut a level into views of about `size` (`CHUNK`) logits: (rows, places, logits, targets)."""
    batch, classes, places = logits.shape
    if logits.numel() == 0:
        return
    size = size or CHUNK
    row_step = max(1, size // (classes * places))
    place_step = max(1, size // classes) if row_step == 1 else places
    for row in range(0, batch, row_step):
        for place in range(0, places, place_step):
            rows, cut = slice(row, row + row_step), slice(place, place + place_step)
            yield rows, cut, logits[rows, :, cut], targets[rows, ..., cut]


def over_classes(x: Tensor, logits: Tensor) -> Tensor:
    """View x, in the shape of the targets, in the shape of the logits (B, C, M)."""
    return (x if x.dim() == logits.dim() else x[:, None]).expand_as(logits)


def gather(levels: Sequence[Tensor], logits: Sequence[Tensor], index: Tensor) -> Tensor:
    """Return what levels in the targets' shape hold at positions in the flattened logits.

    Args:
        levels: int levels, (B, M) or (B, C, M).
        logits: levels (B, C, M).
        index: (P,) int64, -1 for padding.

    Returns:
        (P,) int64; 0 for padding.
    """
    found = torch.zeros_like(index)
    first = 0
    for level, like in zip(levels, logits, strict=True):
        here = (index >= first) & (index < first + like.numel())
        if like.numel():
            at = unravel(torch.where(here, index - first, 0), like.shape)
            found = torch.where(here, over_classes(level, like)[at].long(), found)
        first += like.numel()
    return found


def locate(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    positives: Tensor | None,
    size: int,
    exact: bool,
    ignore_index: int,
    name: str = "loc_errors",
) -> tuple[Tensor, Tensor]:
    """Find the positives and gather their scores.

    Args:
        logits: levels (B, C, M).
        targets: their targets, (B, M) or (B, C, M).
        positives: (size,) int64 positions in the flattened targets of all levels, -1 for padding;
            None to search for them.
        size: length of what is returned.
        exact: whether `size` is the number of positives, or only a bound on it.
        ignore_index: the class index that takes an anchor out.
        name: of the argument whose length `size` is.

    Returns:
        index (size,) int64: positions in the flattened logits of all levels, in the order of the
        targets, -1 for padding; scores (size,): the finite scores there, -inf for padding.

    Raises:
        ValueError: if the positives are not as said. On a device other than the CPU this is an
            asynchronous assertion, and no position is ever read out of bounds.
    """
    if positives is None:
        positives = _search(logits, targets, size, exact, ignore_index, name)
    index = torch.full_like(positives, -1)
    scores = torch.full(
        (size,), -torch.inf, dtype=compute_dtype(logits[0].dtype), device=positives.device
    )
    first_target = first_logit = 0
    for level, target in zip(logits, targets, strict=True):
        number, per_logit = target.numel(), target.dim() == level.dim()
        if level.numel():
            here = (positives >= first_target) & (positives < first_target + number)
            at = unravel(torch.where(here, positives - first_target, 0), target.shape)
            values = target[at]
            here &= _means_positive(values, level, per_logit, ignore_index)
            # Whatever is not here is looked up at the first logit, and dropped.
            place = at if per_logit else (at[0], torch.where(here, values, 0).long(), at[1])
            row, channel, column = place
            position = (row * level.shape[1] + channel) * level.shape[2] + column
            index = torch.where(here, first_logit + position, index)
            scores = torch.where(here, finite(level[place]), scores)
        first_target += number
        first_logit += level.numel()
    _require(
        (index >= 0) == (positives != -1),
        "positives: every entry must be -1 (padding) or the position of a positive in targets",
    )
    return index, scores


def unravel(flat: Tensor, shape: Sequence[int]) -> tuple[Tensor, ...]:
    """Return coordinates of flat positions.

    torch.unravel_index copies the shape to the device first.

    One division a dimension: a remainder costs as much as the quotient.
    """
    coordinates = []
    for size in reversed(shape[1:]):
        whole = flat // size
        coordinates.append(flat - whole * size)
        flat = whole
    return flat, *reversed(coordinates)


def write_positives(gradients: Sequence[Tensor], index: Tensor, positive_grad: Tensor) -> None:
    """Write positive_grad (P,) into the gradients at the positions `index` (P,), in place."""
    first = 0
    for out in gradients:
        here = ((index >= first) & (index < first + out.numel())).nonzero()[:, 0]
        at = unravel(index.index_select(0, here) - first, out.shape)
        out[at] = positive_grad.index_select(0, here).to(out.dtype)
        first += out.numel()


def _search(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    size: int,
    exact: bool,
    ignore_index: int,
    name: str,
) -> Tensor:
    """Return positions of positives in the flattened targets, padded with -1 to `size`."""
    masks = [
        is_positive(level, target, ignore_index).reshape(-1)
        for level, target in zip(logits, targets, strict=True)
    ]
    if masks[0].device.type == "cpu":
        found = _places(masks)
        number = found.numel()
        if number > size or (exact and number < size):
            raise ValueError(
                f"{name}: expected {number} entries, one for each positive in targets, got {size}"
            )
        return found if number == size else pad(found, (0, size - number), value=-1)
    total = torch.stack([mask.count_nonzero() for mask in masks]).sum()
    _require(
        total == size if exact else total <= size,
        f"{name}: expected one entry for each positive in targets, got {size}",
    )
    return _places_in_slots(masks, size)


def count_positives(logits: Sequence[Tensor], targets: Sequence[Tensor], ignore_index: int) -> int:
    """Count the positives of the levels; the host asks the device, for each block."""
    return sum(
        int(is_positive(cut, marks, ignore_index).count_nonzero())
        for level in zip(logits, targets, strict=True)
        for _, _, cut, marks in blocks(*level)
    )


def _places(masks: Sequence[Tensor]) -> Tensor:
    """Return where masks hold, laid end to end."""
    places, first = [], 0
    for mask in masks:
        places.append(mask.nonzero()[:, 0] + first)
        first += mask.numel()
    return torch.cat(places)


def _places_in_slots(masks: Sequence[Tensor], size: int) -> Tensor:
    """Return likewise, in `size` slots, without asking the device how many there are.

    Each goes to the slot of its running number, everything else to a slot behind the end.
    """
    found = torch.full((size + 1,), -1, dtype=torch.int64, device=masks[0].device)
    first = 0
    before: int | Tensor = 0
    for mask in masks:
        slot = torch.where(mask, before + mask.cumsum(0) - 1, size).clamp(max=size)
        found.scatter_(0, slot, torch.arange(first, first + mask.numel(), device=mask.device))
        before = before + mask.count_nonzero()
        first += mask.numel()
    return found[:size]


def _require(condition: Tensor, message: str) -> None:
    """Raise ValueError where the host can know; where not, assert asynchronously on the device."""
    condition = condition.all()
    if condition.device.type != "cpu":
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)
