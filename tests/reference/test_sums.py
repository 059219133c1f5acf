"""The reference adds floats in a fixed order, on devices too whose own sums do not."""

from __future__ import annotations

import pytest
import torch
from batches import batch_of, detector_batch, relative_error, to_batch
from torch.utils._python_dispatch import TorchDispatchMode

from alrp_triton.reference import pairwise, rank_sort, skewed
from alrp_triton.reference.breakpoints import ranks as breakpoints
from alrp_triton.reference.breakpoints import segments, sort, sums

# What torch documents to add in no fixed order on CUDA (`use_deterministic_algorithms`): at any
# time, or given weights, or where `accumulate` is true.
ANY_ORDER = {
    "cumsum", "cumsum_", "cumprod", "scatter_add", "scatter_add_", "scatter_reduce",
    "scatter_reduce_", "index_add", "index_add_", "index_reduce", "index_reduce_", "histc", "put_",
    "median", "kthvalue",
}  # fmt: skip
BY_ARGUMENT = {"bincount": (1, "weights"), "index_put": (3, "accumulate")}
BY_ARGUMENT |= dict.fromkeys(("index_put_", "_index_put_impl_"), (3, "accumulate"))


class InAnyOrder(TorchDispatchMode):
    """Collects the names of operators that add floats in the order of the threads."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        asked = name in ANY_ORDER
        if name in BY_ARGUMENT:
            place, argument = BY_ARGUMENT[name]
            given = args[place] if len(args) > place else kwargs.get(argument)
            asked = given is not None and given is not False
        out = func(*args, **kwargs)
        if asked and out.is_floating_point():
            self.names.add(name)
        return out


def run_all(grouped: bool, delta: float) -> list[torch.Tensor]:
    """Return what every function of the reference returns, whose terms are floats."""
    logits, targets = detector_batch("spread", 300, 4, 40)
    batch = to_batch(logits, targets, delta)
    if grouped:
        batch = batch_of(batch.logits, batch.targets, delta, [torch.arange(300)[:, None] % 7])
    values = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = []
    for module in (breakpoints, pairwise):
        out += module.count(batch, values)
        out += module.gradient(batch, values, -values)
    out.append(skewed.mass(batch, values))
    out += skewed.gradient(batch, values, -values, values)
    out += rank_sort.count(batch, values, values)
    out.append(rank_sort.gradient(batch, values, values))
    return out


@pytest.mark.parametrize("delta", [0.0, 1.0])
@pytest.mark.parametrize("grouped", [False, True])
def test_floats_are_added_in_a_fixed_order(grouped, delta, monkeypatch):
    """No operator runs that torch tells of, and the sums are those in a CPU's order."""
    monkeypatch.setattr(sort, "SEARCH_BELOW", 0)
    monkeypatch.setattr(segments, "TABLE", 0)
    with InAnyOrder() as on_a_cpu:
        expected = run_all(grouped, delta)
    assert "bincount" in on_a_cpu.names  # which goes by order there
    monkeypatch.setattr(sums, "adds_in_order", lambda device: False)
    with InAnyOrder() as elsewhere:
        got = run_all(grouped, delta)
    assert elsewhere.names == set()
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("number", [1, 2, 100, 5000])
def test_sums_by_place_are_those_of_a_bincount(number, monkeypatch):
    """Entries stand at one place, at all, or at some; places without any are 0."""
    for places in (1, 7, 300):
        x = torch.rand(number, dtype=torch.float64)
        place = torch.randint(places, (number,), dtype=torch.int32)
        expected = torch.zeros(places + 3, dtype=torch.float64).index_add_(0, place.long(), x)
        for on_a_cpu in (True, False):
            monkeypatch.setattr(sums, "adds_in_order", lambda device, way=on_a_cpu: way)
            got = sums.sum_by_place(x, place, places + 3)
            torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)
