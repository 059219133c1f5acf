"""What only the pairwise kernels promise; `test_kernels` holds both to the specification."""

from __future__ import annotations

import importlib

import pytest
import torch

from alrp_triton.kernels import language
from alrp_triton.reference import layout
from alrp_triton.testing import kernel_tolerance as budgets
from alrp_triton.testing.launches import same

pytest.importorskip("triton")
kernels = importlib.import_module("alrp_triton.kernels.pairwise")
levels = importlib.import_module("alrp_triton.kernels.strided")
tiles_module = importlib.import_module("alrp_triton.kernels.tuning.block_sizes")

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
SMALL = tiles_module.Tiles(
    lanes=4, few=2, count_block=8, count_rows=2, count_fold=2, count_programs=6,
    gradient_block=8, gradient_rows=2, gradient_fold=2,
)  # fmt: skip


def draw(delta: float, anchors: int) -> budgets.Case:
    logits = torch.randn(anchors, 2, 1, device=DEVICE)
    return budgets.find([logits], [torch.randint(-1, 2, (anchors, 1), device=DEVICE)], delta)


def test_warps_do_not_change_the_gradient() -> None:
    case = draw(1.0, 50)
    one, four = (
        kernels.gradient(*case.gradient_input, SMALL._replace(gradient_warps=warps))
        for warps in (1, 4)
    )
    assert same(one, four)


def test_infinity_is_as_large_as_in_the_reference() -> None:
    assert language.LARGEST.value == layout.LARGEST


def test_float32_sums_are_bounded() -> None:
    for lanes, major in ((32, 8), (32, 9), (32, 10), (64, 9)):
        tiles = tiles_module.default_tiles(lanes, major)
        tiles.check()
    with pytest.raises(ValueError, match="float32 cannot sum so many"):
        tiles._replace(count_fold=1 << 20).check()


@pytest.mark.parametrize(
    "changed",
    [
        {"count_programs": 1},
        {"count_programs": 50},
        {"count_block": 16, "few": 4},
        {"count_rows": 4, "lanes": 8},
        {"count_rows": 1, "lanes": 2},
        {"count_fold": 1},
        {"count_warps": 2, "count_stages": 3},
    ],
)
def test_tile_sizes_do_not_change_hard_counts(changed: dict[str, int]) -> None:
    """NFP and rank+ are integers there; the sum of the values is not, and only kept to rounding."""
    case = draw(0.0, 40)
    counts, others = (
        kernels.count(*case.count_input, tiles) for tiles in (SMALL, SMALL._replace(**changed))
    )
    assert same(counts[:2], others[:2])
    torch.testing.assert_close(counts[2], others[2], rtol=1e-14, atol=0)


@pytest.mark.skipif(HAS_GPU, reason="counts calls inside the interpreter")
def test_irrelevant_tiles_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """H is never evaluated in a tile that lies below min_P(s) - delta as a whole."""
    evaluated = []

    def counted(*args, step=kernels.step):
        evaluated.append(args[0].shape)
        return step(*args)

    logits, targets = torch.full((64, 1, 1), -5.0), torch.full((64, 1), -1)
    logits[:4], targets[:4] = 1.0, 0  # the positives, in the first tile of 8
    logits[20], logits[40] = 0.5, -0.5  # one logit within reach, one just out of it
    case = budgets.find([logits], [targets], 1.0)
    monkeypatch.setattr(kernels, "step", counted)
    kernels.count(*case.count_input, SMALL)
    in_tiles = [shape for shape in evaluated if len(shape) == 3]
    assert len(in_tiles) == 1
    evaluated.clear()
    kernels.gradient(*case.gradient_input, SMALL)
    # The positives, in one tile of 8.
    assert len(evaluated) == SMALL.gradient_fold * (4 // SMALL.gradient_fold)


@pytest.mark.parametrize("divisor", [1, 2, 3, 5, 7, 80, 91, 100, 4096, (1 << 30) - 1])
def test_division(divisor: int) -> None:
    magic = language.magic_of(divisor)
    factor, shift = magic & 0xFFFFFFFF, magic >> 32
    assert factor < 1 << 32
    for number in (0, 1, divisor - 1, divisor, 7 * divisor - 1, (1 << 31) - 1):
        if number < 1 << 31:
            assert ((number * factor >> 32) + number) >> shift == number // divisor
