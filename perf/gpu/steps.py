"""What perf.gpu does, step by step: what is checked, what is measured, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from . import checks, first, measurements
from .context import Context, Task


class Step(NamedTuple):
    """Tasks that belong together. They are made in the same order whenever they are asked for."""

    name: str
    tasks: Callable[[Context], Iterator[Task]]
    seconds: float  # what it may take
    required: bool = False  # has to run to its end, whatever is left for the others


# Of `--first`: less than four minutes together, kernels still to be compiled.
FIRST = (
    Step("machine", measurements.about, 20),
    Step("launches", first.launches, 10),
    Step("first rates", first.memory, 25),
    Step("first parity", first.parity, 40),
    Step("beside focal", first.beside_focal, 80),
    Step("profiles", first.profiles, 20),
    Step("first captures", first.captures, 20),
)

# In the order of their worth: what the design hangs on, what has to be right, what the package
# promises, the rest. The seconds are those of a GPU, kernels still to be compiled; what does not
# fit into the command's time is cut from the end, and said.
STEPS = (
    Step("machine", measurements.about, 20),
    Step("rates", measurements.rates, 45),
    Step("parity", checks.parity, 150, required=True),
    Step("edges", checks.edges, 90, required=True),
    Step("repeatability", checks.repeatability, 30, required=True),
    Step("synchronisations", checks.synchronisations, 20, required=True),
    Step("graph", checks.graph, 20, required=True),
    Step("boxes", checks.boxes, 30),
    Step("memory", measurements.memory, 15),
    Step("timings", measurements.timings, 60),
    Step("tuning", measurements.tuning, 150),
    Step("benchmark", measurements.benchmark, 120),  # by the sizes and costs just found
    Step("variants", checks.variants, 20),
    Step("compilation", checks.compilation, 60),
    Step("assertions", checks.assertions, 40),
    Step("tests", checks.tests, 150),
)


def chosen(first: bool, only: list[str] | None) -> tuple[Step, ...]:
    """Return the steps in their order, the first answers before the rest; or those named."""
    steps = (*FIRST, *(step for step in STEPS if step not in FIRST)) if first else STEPS
    return tuple(step for step in steps if only is None or step.name in only)
