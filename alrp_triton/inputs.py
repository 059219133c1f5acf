"""What every loss is called with: checked, laid out as (B, C, M), and the positives found.

The checks are made here and nowhere else. An error names the argument, what was expected and what
came; what only a device knows is an asynchronous assertion there (`ops.locate`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

from . import ops
from .error_driven import Ranking
from .reference.layout import LARGEST_DELTA, SMALLEST_DELTA, gather, is_positive

LogitsOrLevels = Tensor | Sequence[Tensor]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def prepare_ranking(
    logits: LogitsOrLevels,
    targets: LogitsOrLevels,
    delta: float,
    *,
    ignore_index: int,
    positives: Tensor | None,
    groups: LogitsOrLevels | None,
    impl: str,
    algorithm: str,
    per_positive: tuple[str, Tensor | None],
    skew: float = 0.0,
) -> Ranking:
    """Checks what every loss takes, lays the levels out as (B, C, M), and finds the positives."""
    check_delta(delta)
    check_ignore_index(ignore_index)
    if positives is not None and not isinstance(positives, Tensor):
        raise TypeError(f"positives: expected an int64 tensor, got {type(positives).__name__}")
    ops.check_backend(impl, algorithm)
    levels = _levels("logits", logits)
    level_targets = _levels("targets", targets)
    if len(levels) != len(level_targets):
        raise ValueError(
            f"targets: expected one tensor for each of the {len(levels)} levels of logits, "
            f"got {len(level_targets)}"
        )
    laid_out = [
        _lay_out(level, target, levels[0], ignore_index)
        for level, target in zip(levels, level_targets, strict=True)
    ]
    level_groups = _lay_out_groups(groups, level_targets, levels, laid_out)
    levels = [level for level, _ in laid_out]
    level_targets = [target for _, target in laid_out]
    size, exact = _size(levels, level_targets, ignore_index, positives, per_positive)
    index, scores = ops.locate(
        [level.detach() for level in levels],
        level_targets,
        None if positives is None else positives.long(),
        size,
        exact,
        ignore_index,
        impl,
    )
    own_groups = gather(level_groups, levels, index) if level_groups else None
    return Ranking(
        levels,
        level_targets,
        level_groups,
        index,
        index >= 0,
        positives is not None or not exact,
        scores,
        own_groups,
        float(delta),
        ignore_index,
        impl,
        algorithm,
        skew,
    )


def check_delta(delta: float) -> None:
    """Raises TypeError or ValueError unless delta is a half-width that every algorithm takes."""
    if isinstance(delta, bool) or not isinstance(delta, Real):
        raise TypeError(f"delta: expected a number, got {type(delta).__name__}")
    if delta != 0 and not SMALLEST_DELTA <= delta <= LARGEST_DELTA:
        raise ValueError(
            f"delta: expected 0 or a number from {SMALLEST_DELTA:.2g} to {LARGEST_DELTA:.2g}, "
            f"got {delta}"
        )


def check_ignore_index(ignore_index: int) -> None:
    """Raises TypeError or ValueError unless it is an integer that targets can hold."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, Integral):
        raise TypeError(f"ignore_index: expected an integer, got {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index: expected an integer of 64 bits, got {ignore_index}")


def _levels(name: str, given: LogitsOrLevels) -> list[Tensor]:
    levels = [given] if isinstance(given, Tensor) else given
    if not isinstance(levels, (list, tuple)) or not all(isinstance(x, Tensor) for x in levels):
        raise TypeError(
            f"{name}: expected a tensor or a list of tensors, got {type(given).__name__}"
        )
    if not levels:
        raise ValueError(f"{name}: expected at least one level, got an empty list")
    return list(levels)


def _lay_out(
    logits: Tensor, targets: Tensor, first: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """A level as (B, C, M), its targets as (B, M) or (B, C, M): views, if the strides allow."""
    if logits.dtype not in _DTYPES:
        raise TypeError(
            "logits: expected float32, bfloat16, float16 or float64, "
            f"got {str(logits.dtype).removeprefix('torch.')}"
        )
    for name, given in (("logits", logits), ("targets", targets)):
        if given.device != first.device:
            raise ValueError(
                f"{name}: expected on {first.device} like the logits, got {given.device}"
            )
    if logits.dtype != first.dtype:
        raise TypeError(
            f"logits: expected one dtype on all levels, got {first.dtype}, {logits.dtype}"
        )

    per_logit = targets.shape == logits.shape
    anchors = (*logits.shape[:1], *logits.shape[2:])
    if not per_logit and (logits.dim() < 2 or tuple(targets.shape) != anchors):
        raise ValueError(
            f"targets: expected shape {anchors} (class indices) or {tuple(logits.shape)} "
            f"(1 / 0 / -1) for logits of shape {tuple(logits.shape)}, got {tuple(targets.shape)}"
        )
    shape = (*logits.shape, 1, 1)[: max(2, logits.dim())]
    batch, classes, places = shape[0], shape[1], math.prod(shape[2:])
    logits = logits.reshape(batch, classes, places)
    if per_logit:
        return logits, targets.reshape(batch, classes, places)
    if targets.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"targets: expected integer class indices, got {targets.dtype}")
    range_ = torch.iinfo(targets.dtype)
    if not range_.min <= ignore_index <= range_.max or classes > range_.max:
        targets = targets.long()  # or what they are compared with would wrap around
    return logits, targets.reshape(batch, places)


def _lay_out_groups(
    groups: LogitsOrLevels | None,
    targets: Sequence[Tensor],
    logits: Sequence[Tensor],
    laid_out: Sequence[tuple[Tensor, Tensor]],
) -> list[Tensor]:
    """The groups in the shapes of the targets that were laid out: views, if the strides allow."""
    if groups is None:
        return []
    level_groups = _levels("groups", groups)
    if len(level_groups) != len(targets):
        raise ValueError(
            f"groups: expected one tensor for each of the {len(targets)} levels of logits, "
            f"got {len(level_groups)}"
        )
    return [
        _lay_out_group(group, target, level.device).reshape(shaped.shape)
        for group, target, level, (_, shaped) in zip(
            level_groups, targets, logits, laid_out, strict=True
        )
    ]


def _lay_out_group(groups: Tensor, targets: Tensor, device: torch.device) -> Tensor:
    if groups.is_floating_point() or groups.is_complex():
        raise TypeError(f"groups: expected integers, got {groups.dtype}")
    if groups.device != device:
        raise ValueError(f"groups: expected on {device} like the logits, got {groups.device}")
    try:
        return groups.expand(targets.shape)
    except RuntimeError:
        raise ValueError(
            f"groups: expected a shape that can be broadcast to {tuple(targets.shape)}, that of "
            f"targets, got {tuple(groups.shape)}"
        ) from None


def _size(
    levels: Sequence[Tensor],
    targets: Sequence[Tensor],
    ignore_index: int,
    positives: Tensor | None,
    per_positive: tuple[str, Tensor | None],
) -> tuple[int, bool]:
    """How many positives to make room for, and whether that is their exact number."""
    name, values = per_positive
    device = levels[0].device
    for given_name, given in (("positives", positives), (name, values)):
        if given is not None and given.device != device:
            raise ValueError(
                f"{given_name}: expected on {device} like the logits, got {given.device}"
            )
    if positives is not None:
        if positives.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"positives: expected int64, got {positives.dtype}")
        if positives.dim() != 1:
            raise ValueError(f"positives: expected shape (P,), got {tuple(positives.shape)}")
        if values is not None and values.shape != positives.shape:
            raise ValueError(
                f"{name}: expected shape {tuple(positives.shape)} like positives, "
                f"got {tuple(values.shape)}"
            )
        return positives.numel(), True
    if values is not None:
        return values.numel(), True
    if torch.compiler.is_compiling():
        # Under compilation a size cannot depend on data: room for every anchor, mostly padding.
        return sum(target.numel() for target in targets), False
    pairs = zip(levels, targets, strict=True)
    return sum(int(is_positive(*pair, ignore_index).count_nonzero()) for pair in pairs), True


def check_per_positive(name: str, given: Tensor) -> None:
    """Raises TypeError or ValueError, by its name, unless it has a number for each positive."""
    if not isinstance(given, Tensor) or not given.is_floating_point():
        kind = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"{name}: expected a floating tensor, got {kind}")
    if given.dim() != 1:
        raise ValueError(
            f"{name}: expected shape (P,), one entry for each positive, got shape "
            f"{tuple(given.shape)}"
        )
