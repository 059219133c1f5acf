"""What the steps of perf.gpu run on: a GPU, or a CPU that stands in for one.

What only a GPU can do goes through `Context`; `RehearsalOnCPU` stands in for it, with kernels in
Triton's interpreter and toy sizes, so that every line of a step runs without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from alrp_triton import alrp_loss
from alrp_triton.testing import cases, interpreter, launches
from alrp_triton.testing.cases import Size
from alrp_triton.testing.kernel_tolerance import Case, gradient_of

from .. import timing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Seconds before the end of its time at which what looks at the clock itself should stop.
ENDING = 10.0


class Task(NamedTuple):
    """A part of a step, guarded by itself. Its result holds "ok" if it can fail by its outcome."""

    name: str
    run: Callable[[], dict[str, Any]]


class Sizes(NamedTuple):
    """Of the calls that are made."""

    full: Size  # RetinaNet at 512 px, 8 images
    moderate: Size  # where float64 is held to the specification, pair by pair
    many: Size  # as many positives as any workload has
    edge: Size
    beyond_float32: int  # logits that one positive counts
    repeats: int
    rounds: int  # of a timing
    variants: int  # random calls that may make no new variant of a kernel
    rate: tuple[int, int]  # programs and repeats of a micro-benchmark


FULL = Sizes(
    full=Size(261_888, 80, 1000),  # 20.95 M logits
    moderate=Size(12_500, 80, 300),
    many=Size(100_000, 20, 50_000),
    edge=Size(400, 7, 150),
    beyond_float32=(1 << 24) + 3,
    repeats=10,
    rounds=20,
    variants=50,
    rate=(4096, 16),
)
TOY = Sizes(
    full=Size(40, 4, 9),
    moderate=Size(30, 3, 7),
    many=Size(60, 2, 40),
    edge=Size(24, 3, 9),
    beyond_float32=100,
    repeats=2,
    rounds=1,
    variants=2,
    rate=(2, 1),
)


class Context:
    """A GPU: where everything runs, how large it is, and what only a GPU can do."""

    sizes = FULL
    cells = "gpu"  # of perf.bench
    activity = ProfilerActivity.CUDA
    kernels_on = DeviceType.CUDA
    test_options: tuple[str, ...] = ()

    def __init__(self, out: Path) -> None:
        self.device = torch.device("cuda", 0)
        self.out = out
        self.until = float("inf")  # time.monotonic() at which the running step should end

    def check_health(self) -> None:
        """Raise if an earlier error has left the device unusable."""
        torch.cuda.synchronize(self.device)

    def forbid_waiting(self) -> AbstractContextManager[Any]:
        """Make every synchronisation of the host raise inside the block."""
        return _SynchronisationsRaise()

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """Capture `step` in a CUDA graph and return what replays it."""
        return launches.capture(step)

    @cached_property
    def bandwidth(self) -> float:
        """Bytes a second of a copy."""
        return timing.copy_bandwidth(self.device)

    @cached_property
    def algorithms(self) -> dict[str, ModuleType]:
        """The algorithms that have kernels, by name."""
        return cases.algorithms(self.device)[0]


class Rehearsal(Context):
    """The same on a device that is too slow for these sizes; a GPU in software, for example."""

    sizes = TOY
    cells = "rehearse"
    test_options = ("--collect-only",)  # what they call is of any size

    @cached_property
    def bandwidth(self) -> float:
        return timing.copy_bandwidth(self.device, size=1 << 20, rounds=1)


class RehearsalOnCPU(Rehearsal):
    """A CPU that stands in for it: what a GPU alone can refuse is let pass."""

    activity = ProfilerActivity.CPU
    kernels_on = DeviceType.CPU

    def __init__(self, out: Path) -> None:
        super().__init__(out)
        self.device = torch.device("cpu")
        interpreter.speed_up()

    def check_health(self) -> None:
        pass

    def forbid_waiting(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        step()
        return step


class _SynchronisationsRaise:
    def __enter__(self) -> None:
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_: object) -> None:
        torch.cuda.set_sync_debug_mode("default")


class Call:
    """Forward and backward of aLRP on a case, with leaves of its own that stay where they are."""

    def __init__(self, case: Case, algorithm: str, padding: int | None = None) -> None:
        self.case = case
        self.logits = [level.clone().requires_grad_() for level in case.logits]
        self.loc_errors = case.values.to(torch.float32).detach()
        self.settings: dict[str, Any] = {"impl": "triton", "algorithm": algorithm}
        if case.groups:
            self.settings["groups"] = list(case.groups)
        if padding is not None:
            pad = partial(torch.nn.functional.pad, pad=(0, padding))
            found = [target.reshape(-1).cpu() for target in case.targets]
            positives = torch.cat(found).ge(0).nonzero()[:, 0]
            self.settings["positives"] = pad(positives, value=-1).to(self.loc_errors.device)
            self.loc_errors = pad(self.loc_errors, value=torch.nan)
        self.loc_errors.requires_grad_()
        self.losses: tuple[Tensor, ...] = ()

    def forward(self) -> Tensor:
        cls, loc = alrp_loss(
            self.logits, self.case.targets, self.loc_errors, self.case.delta, **self.settings
        )
        # Kept without their graph: torch refuses to capture while one of another stream is alive.
        self.losses = cls.detach(), loc.detach()
        return cls + loc

    def step(self) -> None:
        for leaf in (*self.logits, self.loc_errors):
            leaf.grad = None
        self.forward().backward()

    def results(self) -> list[Tensor]:
        """Return the values, and the gradients by logits and by loc_errors."""
        leaves = (*self.logits, self.loc_errors)
        return [*self.losses, *map(gradient_of, leaves)]
