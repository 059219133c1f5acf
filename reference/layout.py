"""Where the positives and the negatives stand among the logits.

A level is a pair of tensors. Its logits are (B, C, M): B images or anchors, C classes, M places.
Its targets are either class indices (B, M), or 1 / 0 / -1 for each logit (B, C, M). Several levels
are ranked as one list, in turn, and never concatenated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Elements that one step of a loop over the logits handles: what bounds the memory on top of them.
CHUNK = 1 << 18

# What an infinite score is ranked as. The same in every dtype, and a float32 whose double is one
# too, so that the difference of two scores cannot overflow.
LARGEST = 2.0**125


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which scores are compared: 16-bit logits are upcast, nothing is rounded."""
    return dtype if dtype == torch.float64 else torch.float32


def finite(scores: Tensor) -> Tensor:
    """Scores in their compute dtype, with -inf and +inf replaced by -`LARGEST` and `LARGEST`."""
    return scores.to(compute_dtype(scores.dtype)).clamp(-LARGEST, LARGEST)


def is_positive(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Mask in the shape of `targets`: where a positive stands."""
    if targets.dim() == logits.dim():
        return targets == 1
    return (targets >= 0) & (targets < logits.shape[1]) & (targets != ignore_index)


def exclude_non_negatives(mask: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Clears, in place, `mask` (B, C, M) where the logit is positive or ignored; returns it.

    Positives are cleared one by one, since there are few: no comparison for every logit.
    """
    if targets.dim() == mask.dim():
        return mask.logical_and_(targets == 0)
    mask.logical_and_((targets != ignore_index)[:, None, :])
    rows, places = is_positive(mask, targets, ignore_index).nonzero(as_tuple=True)
    mask[rows, targets[rows, places].long(), places] = False
    return mask


def clear_positives(mask: Tensor, targets: Tensor) -> None:
    """Clears, in place, `mask` (K, C) at the class indices `targets` (K,) that are positive."""
    rows = ((targets >= 0) & (targets < mask.shape[1])).nonzero()[:, 0]
    mask[rows, targets[rows].long()] = False


def blocks(logits: Tensor, targets: Tensor) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Cuts a level into views of about `CHUNK` logits: (rows, places, logits, targets)."""
    batch, classes, places = logits.shape
    if logits.numel() == 0:
        return
    row_step = max(1, CHUNK // (classes * places))
    place_step = max(1, CHUNK // classes) if row_step == 1 else places
    for row in range(0, batch, row_step):
        for place in range(0, places, place_step):
            rows, cut = slice(row, row + row_step), slice(place, place + place_step)
            yield rows, cut, logits[rows, :, cut], targets[rows, ..., cut]


def locate(
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    positives: Tensor | None,
    size: int,
    exact: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Finds the positives and gathers their scores.

    Args:
        logits: levels (B, C, M).
        targets: their targets, (B, M) or (B, C, M).
        positives: (size,) int64 positions in the flattened targets of all levels, -1 for padding;
            None to search for them.
        size: length of what is returned.
        exact: whether `size` is the number of positives, or only a bound on it.
        ignore_index: the class index that takes an anchor out.

    Returns:
        index (size,) int64: positions in the flattened logits of all levels, in the order of the
        targets, -1 for padding; scores (size,): the finite scores there, -inf for padding.

    Raises:
        ValueError: if the positives are not as said. On a device other than the CPU this is an
            asynchronous assertion, and no position is ever read out of bounds.
    """
    if positives is None:
        positives = _search(logits, targets, size, exact, ignore_index)
    index = torch.full_like(positives, -1)
    scores = torch.full(
        (size,), -torch.inf, dtype=compute_dtype(logits[0].dtype), device=positives.device
    )
    first_target = first_logit = 0
    for level, target in zip(logits, targets, strict=True):
        number = target.numel()
        here = (positives >= first_target) & (positives < first_target + number)
        if number:
            flat = torch.where(here, positives - first_target, 0)
            place = _coordinates(level, target, flat)
            here = here & is_positive(level, target, ignore_index)[_at(target, flat)]
            row, channel, column = (torch.where(here, p, 0) for p in place)
            position = (row * level.shape[1] + channel) * level.shape[2] + column
            index = torch.where(here, first_logit + position, index)
            scores = torch.where(here, finite(level[row, channel, column]), scores)
        first_target += number
        first_logit += level.numel()
    _require(
        (index >= 0) == (positives != -1),
        "positives: every entry must be -1 (padding) or the position of a positive in targets",
    )
    return index, scores


def write_positives(gradients: Sequence[Tensor], index: Tensor, own: Tensor) -> None:
    """Writes own (P,) into the levels' gradients at the positions `index` (P,), in place."""
    first = 0
    for out in gradients:
        here = (index >= first) & (index < first + out.numel())
        out[torch.unravel_index(index[here] - first, out.shape)] = own[here].to(out.dtype)
        first += out.numel()


def _at(target: Tensor, flat: Tensor) -> tuple[Tensor, ...]:
    return torch.unravel_index(flat, target.shape)


def _coordinates(logits: Tensor, target: Tensor, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(row, class, place) of the logits that belong to positions in the flattened targets."""
    at = _at(target, flat)
    if target.dim() == logits.dim():
        return at
    return at[0], target[at].long().clamp(0, logits.shape[1] - 1), at[1]


def _search(
    logits: Sequence[Tensor], targets: Sequence[Tensor], size: int, exact: bool, ignore_index: int
) -> Tensor:
    """Positions of the positives in the flattened targets, padded with -1 to `size`.

    Without a search that would have to tell the host how many there are: each positive is sent to
    the slot of its running number, everything else to a slot behind the end that is cut off.
    """
    mask = torch.cat(
        [
            is_positive(level, target, ignore_index).reshape(-1)
            for level, target in zip(logits, targets, strict=True)
        ]
    )
    number = mask.sum()
    fits = number == size if exact else number <= size
    _require(fits, f"loc_errors, values: {size} given, but targets has another number of positives")
    slot = torch.where(mask, mask.cumsum(0) - 1, size).clamp(max=size)
    found = torch.full((size + 1,), -1, dtype=torch.int64, device=mask.device)
    found.scatter_(0, slot, torch.arange(mask.numel(), device=mask.device))
    return found[:size]


def _require(condition: Tensor, message: str) -> None:
    """ValueError where the host can know, an asynchronous device assertion where it cannot."""
    condition = condition.all()
    if condition.device.type != "cpu":
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)
