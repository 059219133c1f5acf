"""The table of what is timed side by side: this package, and what people use instead of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from alrp_triton import alrp_loss
from alrp_triton.testing.workloads import Cell, Inputs

from . import baselines, focal
from .parity import Truth, ranking

Bind = Callable[[Inputs], Callable[[Tensor], Tensor]]
Limit = Callable[[Cell, str], str | None]

OURS = "alrp_triton"  # what the others are compared with


def no_limit(cell: Cell, device: str) -> str | None:
    return None


class Variant(NamedTuple):
    """A loss that a benchmark can time."""

    bind: Bind  # the inputs but for the logits, prepared (not timed): a scalar of the logits (N, C)
    truth: Callable[[Inputs], Truth] = ranking  # what it should compute
    limit: Limit = no_limit  # why it is left out of a cell on a type of device, if it is


def package(impl: str, algorithm: str, by_image: bool = False) -> Bind:
    """Bind aLRP of this package, cls alone.

    The gradient of the whole aLRP by the logits rides on it.
    """

    def bind(inputs: Inputs) -> Callable[[Tensor], Tensor]:
        def loss(logits: Tensor) -> Tensor:
            cls, _ = alrp_loss(
                logits,
                inputs.targets,
                inputs.loc_errors,
                inputs.delta,
                groups=inputs.images if by_image else None,
                impl=impl,
                algorithm=algorithm,
            )
            return cls

        return loss

    return bind


def from_forward(loss: type[baselines.GradientFromForward]) -> Bind:
    """Bind another way to aLRP.

    It wants float32, so the copy of 16-bit logits counts as its own.
    """

    def bind(inputs: Inputs) -> Callable[[Tensor], Tensor]:
        marks, loc_errors, delta = inputs.marks, inputs.loc_errors, inputs.delta
        return lambda logits: loss.apply(logits.float(), marks, loc_errors, delta)

    return bind


def on_a_gpu(cell: Cell, device: str) -> str | None:
    return None if device == "cuda" else "Triton runs on a GPU; its interpreter is not timed"


def at_most_pairs(**most: float) -> Limit:
    """Leave out what takes minutes: more pairs P N than `most` on the type of device."""

    def limit(cell: Cell, device: str) -> str | None:
        if cell.pairs <= most[device]:
            return None
        return f"takes too long: more than {most[device]:.0e} pairs"

    return limit


def at_most_positives(**most: int) -> Limit:
    """Leave out what has no room for P x P numbers."""

    def limit(cell: Cell, device: str) -> str | None:
        if cell.positives <= most[device]:
            return None
        return f"takes too much memory: more than {most[device]:,} positives"

    return limit


VARIANTS = {
    OURS: Variant(package("auto", "auto")),
    "pairwise, triton": Variant(package("triton", "pairwise"), limit=on_a_gpu),
    "breakpoints, triton": Variant(package("triton", "breakpoints"), limit=on_a_gpu),
    "pairwise, torch": Variant(
        package("torch", "pairwise"), limit=at_most_pairs(cpu=3e7, cuda=3e9)
    ),
    "breakpoints, torch": Variant(package("torch", "breakpoints")),
    "ranked within 8 images": Variant(
        package("auto", "auto", by_image=True), partial(ranking, by_image=True)
    ),
    "published loop": Variant(
        from_forward(baselines.PublishedLoop), limit=at_most_pairs(cpu=2e9, cuda=2e11)
    ),
    "sort and bucket": Variant(
        from_forward(baselines.SortAndBucket), limit=at_most_positives(cpu=10_000, cuda=50_000)
    ),
    "sort and bucket, filtered": Variant(
        from_forward(baselines.FilteredSortAndBucket),
        limit=at_most_positives(cpu=10_000, cuda=50_000),
    ),
    "focal, torchvision": Variant(focal.eager, focal.exact),
    "focal, fused": Variant(focal.fused, focal.exact),
}
