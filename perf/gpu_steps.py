"""What perf.gpu does, step by step: what is checked, what is measured, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from . import gpu_checks, gpu_measurements
from .gpu_context import Context, Task


class Step(NamedTuple):
    """Tasks that belong together. They are made in the same order whenever they are asked for."""

    name: str
    tasks: Callable[[Context], Iterator[Task]]
    seconds: float  # what it may take
    required: bool = False  # has to run to its end, whatever is left for the others


# In the order of their worth: what the design hangs on, what has to be right, what the package
# promises, the rest. The seconds are those of a GPU, kernels still to be compiled; what does not
# fit into the command's time is cut from the end, and said.
STEPS = (
    Step("machine", gpu_measurements.about, 20),
    Step("rates", gpu_measurements.rates, 45),
    Step("parity", gpu_checks.parity, 150, required=True),
    Step("edges", gpu_checks.edges, 90, required=True),
    Step("repeatability", gpu_checks.repeatability, 30, required=True),
    Step("synchronisations", gpu_checks.synchronisations, 20, required=True),
    Step("graph", gpu_checks.graph, 20, required=True),
    Step("boxes", gpu_checks.boxes, 30),
    Step("memory", gpu_measurements.memory, 15),
    Step("timings", gpu_measurements.timings, 60),
    Step("tuning", gpu_measurements.tuning, 150),
    Step("benchmark", gpu_measurements.benchmark, 120),  # by the sizes and costs just found
    Step("variants", gpu_checks.variants, 20),
    Step("compilation", gpu_checks.compilation, 60),
    Step("assertions", gpu_checks.assertions, 40),
    Step("tests", gpu_checks.tests, 150),
)
