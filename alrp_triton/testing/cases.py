"""Every kernel beside the reference: the cases that a GPU has to get right, and how each is judged.

A result is judged by the worst ratio of its error to its budget (`budgets`, `loss_budget`): 1 is
the most that is allowed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from alrp_triton import alrp_loss, backend
from alrp_triton.reference import breakpoints, layout, pairwise
from alrp_triton.reference.layout import Batch

from .kernel_tolerance import (
    IGNORE,
    Case,
    count_budget,
    find,
    gradient_budget,
    gradient_of,
    group,
    to_device,
)
from .loss_tolerance import LOSSES, evaluate, loss_budget
from .workloads import draw_logits, draw_targets

# Up to so many pairs the truth is the specification itself, evaluated pair by pair.
_SPECIFIED = 1 << 29


class Size(NamedTuple):
    """How large a call is."""

    anchors: int
    classes: int
    positives: int


def algorithms(device: torch.device) -> tuple[dict[str, ModuleType], dict[str, str]]:
    """Return the algorithms whose kernels run on a device, and why the others do not."""
    runnable, missing = {}, {}
    for name in backend.ALGORITHMS:
        if name != "auto":
            try:
                runnable[name] = backend.select("triton", name, [], torch.empty(0, device=device))
            except RuntimeError as error:
                missing[name] = str(error)
    return runnable, missing


def draw_case(
    size: Size, distribution: str, dtype: torch.dtype, device: torch.device, delta: float = 1.0
) -> Case:
    """Draw a call as at a stage of training: (anchors, classes) logits and class indices."""
    torch.manual_seed(0)
    logits, targets = _draw(size, distribution)
    # Made on the CPU, so that it is the same case on a device that computes nothing, or wrongly.
    case = find([logits.to(dtype)[:, :, None]], [targets[:, None]], delta)
    return tree_map_only(Tensor, lambda x: x.to(device), case)


def draw_in_images(*arguments: Any) -> Case:
    """Draw a call of `draw_case`, ranked within eight images."""
    case = draw_case(*arguments)
    images = [
        torch.arange(target.shape[0])[:, None] * 8 // target.shape[0] for target in case.targets
    ]
    return group(case, images)


@lru_cache(maxsize=8)
def _draw(size: Size, distribution: str) -> tuple[Tensor, Tensor]:
    """Draw logits and targets on the CPU; nobody writes to them."""
    targets = draw_targets(size.anchors, size.classes, size.positives)
    return draw_logits(targets, size.classes, distribution), targets


def verify(case: Case, kernels: ModuleType) -> dict[str, Any]:
    """Hold one count and one gradient to the truth."""
    reference, tiles = truth_for(case), kernels.choose_tiles(case.batch)
    with poisoned():
        counts = torch.stack(kernels.count(*case.count_input))
        gradients = kernels.gradient(*case.gradient_input)
    exact = case.expected_count(torch.float64, reference)
    ratios = dict(
        zip(
            ("NFP", "rank+", "S"),
            map(worst, counts, exact, count_budget(case, tiles, exact)),
            strict=True,
        )
    )
    truth = case.expected_gradient(torch.float64, reference)
    ratios["gradient"] = worst_of(gradients, truth, gradient_budget(case, tiles, truth))
    shaped = all(
        out.dtype == level.dtype and out.shape == level.shape
        for out, level in zip(gradients, case.logits, strict=True)
    )
    return verdict(ratios) if shaped else {"ok": False, "why": "shape or dtype of the gradient"}


def verify_losses(case: Case, algorithm: str, kernels: ModuleType) -> dict[str, Any]:
    """Hold the values and gradients of the public losses to the truth; no padding here."""
    reference, ratios = truth_for(case), {}
    tiles = kernels.choose_tiles(case.batch)
    truth_algorithm = "pairwise" if reference is pairwise else "breakpoints"
    for loss in LOSSES:
        truth = evaluate(loss, case, "torch", truth_algorithm, torch.float64)
        budget = loss_budget(loss, case, tiles, truth, reference)
        with poisoned():
            got = evaluate(loss, case, "triton", algorithm)
        ratios[f"{loss} value"] = worst(got.values, truth.values, budget.values)
        ratios[f"{loss} gradient"] = worst_of(got.by_logits, truth.by_logits, budget.by_logits)
        if loss == "alrp":
            parts = got.by_loc_errors, truth.by_loc_errors, budget.by_loc_errors
            ratios[f"{loss} by loc_errors"] = worst(*parts)
    return verdict(ratios)


def truth_for(case: Case) -> ModuleType:
    """Return the specification if it can go pair by pair; else what agrees with it to 4e-14.

    Float64 kernels may be off by less than that, so they always get the specification.
    """
    pairs = case.scores.numel() * sum(level.numel() for level in case.logits)
    specified = pairs <= _SPECIFIED or case.scores.dtype == torch.float64
    return pairwise if specified else breakpoints


def worst(got: Tensor, truth: Tensor, budget: Tensor) -> float:
    """Return the largest error over its budget; NaN if there is any."""
    error = (got.double() - truth.double()).abs()
    ratio = torch.where(error == 0, 0.0, error / budget.double())
    return float(ratio.max()) if ratio.numel() else 0.0


def worst_of(got: Sequence[Tensor], truth: Sequence[Tensor], budget: Sequence[Tensor]) -> float:
    """Return the largest error over its budget, of all levels."""
    ratios = [worst(*level) for level in zip(got, truth, budget, strict=True)]
    return float(torch.tensor([0.0, *ratios]).max())  # keeps NaN, which max() of Python may not


def verdict(ratios: dict[str, float]) -> dict[str, Any]:
    """Return what goes into the report."""
    return {
        "ok": all(ratio <= 1 for ratio in ratios.values()),
        "error_over_budget": {name: round(ratio, 4) for name, ratio in ratios.items()},
    }


@contextmanager
def poisoned() -> Iterator[None]:
    """Make torch.empty give NaN, so that whatever a kernel does not write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before)


# --- inputs at the edge -------------------------------------------------------------------------


def _class_indices(batch: int, classes: int, places: int, share: float) -> Tensor:
    """Draw class indices of which `share` are positive and a tenth is ignored."""
    targets = torch.randint(classes, (batch, places))
    background = torch.where(torch.rand(batch, places) < 0.5, -1, classes)
    targets = torch.where(torch.rand(batch, places) < share, targets, background)
    return targets.masked_fill_(torch.rand(batch, places) < 0.1, IGNORE)


def _pyramid(dtype: torch.dtype, per_logit: bool, size: Size) -> tuple[list, list]:
    """Draw levels in the orders of memory that heads and their callers hand over."""
    classes, places = size.classes, max(4, size.anchors // 8)
    share = min(0.3, size.positives / size.anchors)

    def draw(*shape: int) -> Tensor:  # cast before it is cut, or the strides would be lost
        return (2 * torch.randn(shape)).to(dtype)

    levels = [
        draw(4, classes, places),
        draw(2, places, classes).transpose(1, 2),  # channels last
        draw(classes, places // 2).t()[:, :, None],  # batch fastest
        draw(3, 2 * classes, places)[1:, ::2, 1::2],  # every other place and class
        draw(1, classes, 9).expand(4, classes, 9),
        draw(2, classes, 1),
        draw(2, classes, 0),
    ]
    targets = [_class_indices(x.shape[0], x.shape[1], x.shape[2], share) for x in levels]
    if per_logit:
        targets = [_marks(x, target) for x, target in zip(levels, targets, strict=True)]
    return levels, targets


def _marks(logits: Tensor, targets: Tensor) -> Tensor:
    """Return 1 / 0 / -1 for each logit from class indices."""
    marks = (targets[:, None, :] == torch.arange(logits.shape[1])[None, :, None]).to(torch.int8)
    return torch.where((targets == IGNORE)[:, None, :], -1, marks)


def _plain(size: Size, positives: int | None = None) -> tuple[list[Tensor], list[Tensor]]:
    positives = size.positives if positives is None else positives
    targets = draw_targets(size.anchors, size.classes, positives)
    logits = draw_logits(targets, size.classes, "spread")
    return [logits[:, :, None]], [targets[:, None]]


def _infinite(size: Size) -> tuple[list[Tensor], list[Tensor]]:
    (logits,), targets = _plain(size)
    draw = torch.rand_like(logits)
    logits = logits.masked_fill(draw < 0.05, -torch.inf).masked_fill(draw > 0.95, torch.inf)
    return [logits], targets


def edge_cases(size: Size, device: torch.device) -> dict[str, Callable[[], Case]]:
    """Return small calls, by name: every form of input, and the ends of each range."""

    def make(parts: tuple[Sequence[Tensor], Sequence[Tensor]], delta: float, padding: int) -> Case:
        levels, targets = ([to_device(x, device) for x in part] for part in parts)
        return find(levels, targets, delta, padding)

    def case(
        draw: Callable[..., Any], *arguments: Any, delta: float = 1.0, padding: int = 0
    ) -> Callable[[], Case]:
        def drawn() -> Case:
            torch.manual_seed(0)
            return make(draw(*arguments), delta, padding)

        return drawn

    def ignored(size: Size) -> tuple[list[Tensor], list[Tensor]]:
        logits, (targets,) = _plain(size)
        return logits, [torch.full_like(targets, IGNORE)]

    def all_positive(size: Size) -> tuple[list[Tensor], list[Tensor]]:
        (logits,), _ = _plain(size)
        logits = logits[: size.positives]
        return [logits], [torch.ones_like(logits)]

    def grouped(drawn: Callable[[], Case], by_image: bool) -> Callable[[], Case]:
        def with_groups() -> Case:
            case = drawn()
            if by_image:
                places = [
                    torch.arange(x.shape[0]).view(-1, *[1] * (x.dim() - 1)) for x in case.targets
                ]
                return group(
                    case, [x.expand_as(y) for x, y in zip(places, case.targets, strict=True)]
                )
            return group(case, [torch.randint(-2, 3, x.shape) * 2**40 for x in case.targets])

        return with_groups

    single = torch.float32
    return {
        "levels, awkward strides, class indices": case(_pyramid, single, False, size),
        "the same, targets per logit": case(_pyramid, single, True, size),
        "the same, bfloat16": case(_pyramid, torch.bfloat16, False, size),
        "the same, float64": case(_pyramid, torch.float64, False, size),
        "the same, padded": case(_pyramid, single, False, size, padding=37),
        "the same, delta = 0": case(_pyramid, single, False, size, delta=0.0),
        "the same, within images": grouped(case(_pyramid, single, False, size, padding=37), True),
        "the same, within any groups": grouped(case(_pyramid, single, True, size), False),
        "the same, bfloat16 within images": grouped(
            case(_pyramid, torch.bfloat16, False, size), True
        ),
        "one positive": case(_plain, size, 1),
        "no positive": case(_plain, size, 0),
        "no positive, padded": case(_plain, size, 0, padding=5),
        "no negative": case(all_positive, size),
        "all ignored": case(ignored, size),
        "-inf and +inf": case(_infinite, size),
        "-inf and +inf, delta = 0": case(_infinite, size, delta=0.0),
    }


def verify_counts_beyond_float32(kernels: ModuleType, number: int, device: torch.device) -> dict:
    """Count more negatives above a positive than float32 can, by way of a stride of 0."""
    logits = torch.ones(1, 1, 1, device=device).expand(1, 1, number)
    targets = torch.zeros(1, 1, 1, dtype=torch.int8, device=device).expand(1, 1, number)
    scores = torch.zeros(1, device=device)
    nothing = scores.long()  # where the positive stands is not looked at
    batch = Batch([logits], [targets], nothing, scores, 0.0, IGNORE)
    nfp, _, _ = kernels.count(batch, scores.double())
    return {"ok": nfp.item() == number, "counted": nfp.item(), "of": number}


def verify_offsets_beyond_32_bits(kernels: ModuleType, device: torch.device) -> dict[str, Any]:
    """Place a row 2^31 elements behind the first; a CPU spends no memory on what is untouched."""
    storage = torch.empty((1 << 31) + 64, dtype=torch.bfloat16, device=device)
    logits = storage.as_strided((3, 3, 5), ((1 << 30) + 8, 5, 1))
    torch.manual_seed(0)
    logits.copy_(torch.randn(3, 3, 5))
    targets = torch.tensor([[0, -1, 2, -1, IGNORE]] * 3, device=device)
    return verify(find([logits], [targets], 1.0), kernels)


def verify_nan(algorithm: str, device: torch.device) -> dict[str, Any]:
    """Check that a NaN logit gives a NaN loss, unless it is ignored."""
    outcomes = {}
    for name, place, expected in (("negative", 3, True), ("positive", 0, True), ("out", 5, False)):
        logits = torch.linspace(-1, 1, 12, device=device).view(6, 2).clone()
        targets = torch.tensor([0, -1, 1, -1, -1, IGNORE], device=device)
        logits[place, 0] = torch.nan
        loc_errors = torch.rand(2, device=device)
        cls, _ = alrp_loss(logits, targets, loc_errors, impl="triton", algorithm=algorithm)
        outcomes[name] = bool(cls.isnan()) == expected
    return {"ok": all(outcomes.values()), **outcomes}


def verify_nothing_to_rank(algorithm: str, device: torch.device) -> dict[str, Any]:
    """Check that without a positive or a negative all is 0, attached, with zero gradients."""
    outcomes = []
    for targets in (torch.full((6,), -1), torch.zeros(6).long()):
        positives = int(layout.is_positive(targets[:, None], targets, IGNORE).sum())
        logits = torch.zeros(6, 1, device=device, requires_grad=True)
        loc_errors = torch.rand(positives, device=device, requires_grad=True)
        given = logits, targets.to(device), loc_errors
        cls, loc = alrp_loss(*given, impl="triton", algorithm=algorithm)
        (cls + loc).backward()
        outcomes.append(cls.item() == 0 and loc.isfinite().item() and not gradient_of(logits).any())
    return {"ok": all(outcomes)}
