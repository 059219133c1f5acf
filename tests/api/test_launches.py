"""How many kernels a call launches: late in a training, that is most of what it costs on a GPU."""

from __future__ import annotations

import importlib
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from alrp_triton import alrp_loss, backend, ops
from alrp_triton.kernels.tuning.costs import BreakpointCosts, Costs, PairwiseCosts
from alrp_triton.testing import workloads

triton = pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Operators that launch nothing: views, memory, and what the host alone answers.
FREE = (
    "view", "as_strided", "expand", "slice", "select", "split", "unbind", "detach", "alias",
    "unsqueeze", "squeeze", "permute", "transpose", "reshape", "empty", "promote_types",
    "is_nonzero", "_local_scalar",
)  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts the launches of kernels, and the operators of torch that have to launch some."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.operators: Counter[str] = Counter()
        self.interpreting = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "alrp_triton":  # opaque but for this
            with self:
                return ops.functions[func._opname](*args, **(kwargs or {}))
        name = func._opname
        if not self.interpreting and not any(free in name for free in FREE):
            self.operators[name] += 1
        return func(*args, **(kwargs or {}))

    def launch(self, kernel: Any, run: Any, *args: Any, **kwargs: Any) -> Any:
        """Count a launch; what the interpreter asks of torch meanwhile is nobody's."""
        self.kernels[kernel.fn.__name__] += 1
        self.interpreting = True
        try:
            return run(*args, **kwargs)
        finally:
            self.interpreting = False

    @property
    def numbers(self) -> tuple[int, int]:
        """(kernels of ours, operators of torch)."""
        return self.kernels.total(), self.operators.total()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Launches:
    launches = Launches()
    kernel = type(importlib.import_module("alrp_triton.kernels.breakpoints.sort")._merge_kernel)
    on_grid = kernel.__getitem__

    def counting(self: Any, grid: Any) -> Any:
        run = on_grid(self, grid)
        return lambda *args, **kwargs: launches.launch(self, run, *args, **kwargs)

    monkeypatch.setattr(kernel, "__getitem__", counting, raising=False)
    return launches


def train(cell: workloads.Cell, launches: Launches, algorithm: str) -> None:
    """Run aLRP once, forward and backward, with both its parts."""
    inputs = workloads.draw(cell, DEVICE)
    logits = inputs.logits.clone().requires_grad_()
    loc_errors = inputs.loc_errors.clone().requires_grad_()
    with launches:
        cls, loc = alrp_loss(logits, inputs.targets, loc_errors, impl="triton", algorithm=algorithm)
        (cls + loc).backward()


def test_launches_of_a_large_call(counted: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "auto" looks logits up there, and compares positives in pairs."""
    costs = Costs(PairwiseCosts(0.0, 1.0, 0.0, 0.0), BreakpointCosts(1.0, 0.0, 0.0))
    monkeypatch.setattr(backend, "costs_for", lambda device, dtype: costs)
    train(workloads.Cell(8000, 300, "mid"), counted, "auto")
    kernels, operators = counted.numbers
    assert kernels <= 21, counted.kernels
    assert operators <= 45, counted.operators


@pytest.mark.parametrize("positives", [1, 10, 300])
@pytest.mark.parametrize(
    ("algorithm", "dtype", "most"),
    [
        ("pairwise", "float32", (10, 43)),
        ("pairwise", "bfloat16", (10, 43)),
        ("breakpoints", "float32", (26, 47)),
        ("breakpoints", "bfloat16", (28, 48)),
    ],
)
def test_launches_of_a_call(
    algorithm: str, dtype: str, most: tuple[int, int], positives: int, counted: Launches
) -> None:
    """It is so for any number of positives; torch's sort, one operator here, launches more."""
    number = 1600 if algorithm == "pairwise" else 8000  # every pair is interpreted
    train(workloads.Cell(number, positives, "mid", dtype=dtype), counted, algorithm)
    kernels, operators = counted.numbers
    assert kernels <= most[0], counted.kernels
    assert operators <= most[1], counted.operators
