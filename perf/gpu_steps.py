"""What perf.gpu does, step by step: each is a list of named tasks that return a part of the report.

What only a GPU can do goes through `Context`; `Rehearsal` stands in for it on a CPU, with kernels
in Triton's interpreter and toy sizes, so that every line of a step runs without a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from alrp_triton import ALRPLoss, SelfBalance, alrp_loss, ap_loss, ops
from alrp_triton.boxes import KINDS

from . import box_budget, parity_checks, timing
from .budgets import IGNORE, Case, gradient_of
from .launches import OnGrid, compiled_variants, counting, same
from .parity_checks import Size
from .workloads import DISTRIBUTIONS

_ROOT = Path(__file__).parents[1]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# What the losses may take beyond the logits and their gradient, at full size.
_SHARE, _CONSTANT = 0.02, 32 << 20


# Seconds before the end of its time at which what looks at the clock itself should stop.
_ENDING = 10.0


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

    def __init__(self, out: Path) -> None:
        self.device = torch.device("cuda", 0)
        self.out = out
        self.until = float("inf")  # time.monotonic() at which the running step should end

    def check_health(self) -> None:
        """Raises if an earlier error has left the device unusable."""
        torch.cuda.synchronize(self.device)

    def forbid_waiting(self) -> AbstractContextManager[Any]:
        """In it, every synchronisation of the host raises."""
        return _SynchronisationsRaise()

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """What replays `step` from a CUDA graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    @cached_property
    def bandwidth(self) -> float:
        """Bytes a second of a copy."""
        return timing.copy_bandwidth(self.device)

    @cached_property
    def algorithms(self) -> dict[str, ModuleType]:
        """Those that have kernels."""
        return parity_checks.algorithms(self.device)[0]


class Rehearsal(Context):
    """A CPU that stands in for it: what a GPU alone can refuse is let pass."""

    sizes = TOY
    cells = "rehearse"
    activity = ProfilerActivity.CPU
    kernels_on = DeviceType.CPU

    def __init__(self, out: Path) -> None:
        super().__init__(out)
        self.device = torch.device("cpu")

    def check_health(self) -> None:
        pass

    def forbid_waiting(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        step()
        return step

    @cached_property
    def bandwidth(self) -> float:
        return timing.copy_bandwidth(self.device, size=1 << 20, rounds=1)


class _SynchronisationsRaise:
    def __enter__(self) -> None:
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_: object) -> None:
        torch.cuda.set_sync_debug_mode("default")


class Task(NamedTuple):
    """A part of a step, guarded by itself. Its result holds "ok" if it can fail by its outcome."""

    name: str
    run: Callable[[], dict[str, Any]]


class Step(NamedTuple):
    """Tasks that belong together. They are made in the same order whenever they are asked for."""

    name: str
    tasks: Callable[[Context], Iterator[Task]]
    seconds: float  # what it may take
    required: bool = False  # has to run to its end, whatever is left for the others


# --- what has to be right -----------------------------------------------------------------------


def about(context: Context) -> Iterator[Task]:
    """The machine, and which algorithms have kernels."""

    def machine() -> dict[str, Any]:
        found, missing = parity_checks.algorithms(context.device)
        result = {**timing.machine(context.device), "algorithms": list(found), "missing": missing}
        try:
            result["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv")
        except (OSError, subprocess.CalledProcessError) as error:
            result["driver"] = f"not told: {error}"
        return result

    yield Task("versions", machine)
    yield Task("bandwidth", lambda: {"bytes_per_second": context.bandwidth})


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip().splitlines()[-1]


def parity(context: Context) -> Iterator[Task]:
    """Full size: the operators and the public losses, each distribution and dtype."""
    sizes = context.sizes
    cases = [(sizes.full, name, dtype, 1.0) for name in DISTRIBUTIONS for dtype in _DTYPES]
    cases += [(sizes.full, "mid", "float32", 0.0), (sizes.full, "mid", "float32", 0.01)]
    cases += [(sizes.moderate, name, "float64", 1.0) for name in ("mid", "spread")]
    cases += [(sizes.moderate, "spread", dtype, 1.0) for dtype in _DTYPES]  # pair by pair
    cases += [(sizes.many, "mid", "float32", 1.0)]
    dtypes = {**_DTYPES, "float64": torch.float64}
    for algorithm, kernels in context.algorithms.items():
        for size, distribution, dtype, delta in cases:
            number = size.anchors * size.classes
            name = f"{algorithm} {distribution} {dtype}, {number:,} x {size.positives:,}"
            name += "" if delta == 1 else f", delta {delta:g}"
            draw = partial(
                parity_checks.draw_case, size, distribution, dtypes[dtype], context.device, delta
            )
            yield Task(name, partial(_judge_both, draw, algorithm, kernels))
        draw = partial(
            parity_checks.draw_in_images, context.sizes.full, "mid", torch.float32, context.device
        )
        yield Task(f"{algorithm} within images", partial(_judge_both, draw, algorithm, kernels))


def _judge_both(draw: Callable[[], Case], algorithm: str, kernels: ModuleType) -> dict[str, Any]:
    case = draw()
    operators = parity_checks.judge(case, kernels)
    if case.groups or (case.index < 0).any():  # which the losses would have to be told of
        return operators
    losses = parity_checks.judge_losses(case, algorithm, kernels)
    ratios = {**operators["error_over_budget"], **losses["error_over_budget"]}
    return {"ok": operators["ok"] and losses["ok"], "error_over_budget": ratios}


def edges(context: Context) -> Iterator[Task]:
    """Small calls of every form, and the ends of each range."""
    for algorithm, kernels in context.algorithms.items():
        cases = parity_checks.edge_cases(context.sizes.edge, context.device)
        for name, draw in cases.items():
            yield Task(f"{algorithm} {name}", partial(_judge_both, draw, algorithm, kernels))
        beyond = (kernels, context.sizes.beyond_float32, context.device)
        for name, call in (
            ("NaN", partial(parity_checks.judge_nan, algorithm, context.device)),
            ("nothing", partial(parity_checks.judge_nothing_to_rank, algorithm, context.device)),
            ("counts beyond 2^24", partial(parity_checks.judge_counts_beyond_float32, *beyond)),
            (
                "offsets beyond 2^31",
                partial(parity_checks.judge_offsets_beyond_32_bits, kernels, context.device),
            ),
        ):
            yield Task(f"{algorithm} {name}", call)


def repeatability(context: Context) -> Iterator[Task]:
    """The same bits, run after run, and on another number of programs."""
    draw = partial(parity_checks.draw_case, context.sizes.full)
    for algorithm, kernels in context.algorithms.items():
        for distribution, dtype in (
            ("mid", "float32"),
            ("init", "float32"),
            ("spread", "bfloat16"),
        ):
            drawn = partial(draw, distribution, _DTYPES[dtype], context.device)
            yield Task(
                f"{algorithm} {distribution} {dtype}",
                partial(_repeat, drawn, algorithm, kernels, context.sizes.repeats),
            )
        drawn = partial(draw, "mid", torch.float32, context.device)
        yield Task(f"{algorithm} other grids and tiles", partial(_regrid, drawn, kernels))


def _repeat(
    draw: Callable[[], Case], algorithm: str, kernels: ModuleType, repeats: int
) -> dict[str, Any]:
    call = _Call(draw(), algorithm)

    def results() -> list[Tensor]:
        case = call.case
        call.step()
        operators = [*kernels.count(*case.count_input), *kernels.gradient(*case.gradient_input)]
        return [*operators, *(x.clone() for x in call.results())]

    first = results()
    equal = sum(same(results(), first) for _ in range(repeats - 1))
    return {"ok": equal == repeats - 1, "equal": equal, "of": repeats - 1}


def _regrid(draw: Callable[[], Case], kernels: Any) -> dict[str, Any]:
    """What both promise: any grid, any gradient tile, and hard counts by any count tile."""
    case = draw()
    counts, gradients = kernels.count(*case.count_input), kernels.gradient(*case.gradient_input)
    module = counting(kernels)
    outcomes, launched = {}, module._count_kernel
    for programs in (1000, 333):
        module._count_kernel = OnGrid(launched, programs)
        try:
            outcomes[f"{programs} programs"] = same(kernels.count(*case.count_input), counts)
        finally:
            module._count_kernel = launched
    tiles = kernels.choose_tiles(case.logits, case.scores)
    changed = tiles._replace(gradient_rows=tiles.gradient_rows // 2)
    outcomes["gradient tiles"] = same(kernels.gradient(*case.gradient_input, changed), gradients)
    hard = case._replace(delta=0.0)
    changed = tiles._replace(count_rows=tiles.count_rows // 2)
    other = kernels.count(*hard.count_input, changed)
    outcomes["count tiles, delta = 0"] = same(kernels.count(*hard.count_input)[:2], other[:2])
    return {"ok": all(outcomes.values()), **outcomes}


class _Call:
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
            found = [target.reshape(-1) for target in case.targets]
            positives = torch.cat(found).ge(0).nonzero()[:, 0]
            self.settings["positives"] = pad(positives, value=-1)
            self.loc_errors = pad(self.loc_errors, value=torch.nan)
        self.loc_errors.requires_grad_()
        self.losses: tuple[Tensor, ...] = ()

    def forward(self) -> Tensor:
        self.losses = alrp_loss(
            self.logits, self.case.targets, self.loc_errors, self.case.delta, **self.settings
        )
        return self.losses[0] + self.losses[1]

    def step(self) -> None:
        for leaf in (*self.logits, self.loc_errors):
            leaf.grad = None
        self.forward().backward()

    def results(self) -> list[Tensor]:
        """Values, and the gradients by logits and by loc_errors."""
        leaves = (*self.logits, self.loc_errors)
        return [*(x.detach() for x in self.losses), *map(gradient_of, leaves)]


def synchronisations(context: Context) -> Iterator[Task]:
    """Forward and backward without the host waiting once."""
    draw = partial(parity_checks.draw_case, context.sizes.full, "mid", torch.float32)
    images = partial(parity_checks.draw_in_images, context.sizes.full, "mid", torch.float32)
    for algorithm in context.algorithms:
        for name, padding in (("loc_errors", None), ("padded positives", 24)):
            yield Task(
                f"{algorithm}, given {name}", partial(_unwaiting, context, draw, algorithm, padding)
            )
        yield Task(
            f"{algorithm}, within images", partial(_unwaiting, context, images, algorithm, None)
        )
        yield Task(
            f"{algorithm}, AP given positives", partial(_unwaiting_ap, context, draw, algorithm)
        )
    yield Task("the module with boxes", partial(_unwaiting_module, context, draw))


def _forbid(context: Context, step: Callable[[], None]) -> dict[str, Any]:
    step()  # compiles
    with context.forbid_waiting():
        step()  # raises if it waits
    return {"ok": True}


def _unwaiting(
    context: Context, draw: Callable[..., Case], algorithm: str, padding: int | None
) -> dict[str, Any]:
    call = _Call(draw(context.device), algorithm, padding)
    return _forbid(context, call.step)


def _unwaiting_ap(context: Context, draw: Callable[..., Case], algorithm: str) -> dict[str, Any]:
    call = _Call(draw(context.device), algorithm, padding=24)

    def step() -> None:
        ap_loss(call.logits, call.case.targets, **call.settings).backward()

    return _forbid(context, step)


def _unwaiting_module(context: Context, draw: Callable[..., Case]) -> dict[str, Any]:
    case = draw(context.device)
    call = _Call(case, "auto")
    criterion = ALRPLoss(balance=SelfBalance(period=2), impl="triton").to(context.device)
    boxes = torch.rand(case.scores.numel(), 4).cumsum(1).to(context.device)
    predicted = (boxes + 0.1).requires_grad_()

    def step() -> None:
        criterion(call.logits, case.targets, predicted, boxes).loss.backward()

    return _forbid(context, step)


def graph(context: Context) -> Iterator[Task]:
    """Forward and backward in a CUDA graph: with changed logits, the bits of the eager call."""
    draw = partial(parity_checks.draw_case, context.sizes.full, "mid", torch.float32)
    images = partial(parity_checks.draw_in_images, context.sizes.full, "mid", torch.float32)
    for algorithm in context.algorithms:
        for name, padding in (("loc_errors", None), ("padded positives", 24)):
            yield Task(
                f"{algorithm}, given {name}", partial(_replay, context, draw, algorithm, padding)
            )
        task = partial(_replay, context, images, algorithm, None)
        yield Task(f"{algorithm}, within images", task)


def _replay(
    context: Context, draw: Callable[..., Case], algorithm: str, padding: int | None
) -> dict[str, Any]:
    call = _Call(draw(context.device), algorithm, padding)
    replay = context.capture(call.step)
    replay()
    before = [x.clone() for x in call.results()]
    with torch.no_grad():
        for leaf in call.logits:
            leaf.copy_(leaf.flip(0))
    replay()
    replayed = [x.clone() for x in call.results()]
    call.step()
    equal, changed = same(replayed, call.results()), not same(before, replayed)
    return {"ok": equal and changed, "equal": equal, "changed": changed}


def variants(context: Context) -> Iterator[Task]:
    """Random sizes compile nothing new, once there is one of each."""
    for algorithm, kernels in context.algorithms.items():
        yield Task(algorithm, partial(_vary, context, kernels))


def _vary(context: Context, kernels: ModuleType) -> dict[str, Any]:
    torch.manual_seed(0)
    numbers = []
    for _ in range(context.sizes.variants):
        anchors, positives = (
            int(n) for n in torch.randint(2, 3 * context.sizes.edge.anchors, (2,))
        )
        size = Size(anchors, context.sizes.edge.classes, min(anchors, positives))
        case = parity_checks.draw_case(size, "mid", torch.float32, context.device, 1 / positives)
        torch.manual_seed(anchors)  # draw_case has its own
        kernels.count(*case.count_input)
        kernels.gradient(*case.gradient_input)
        numbers.append(compiled_variants())
    return {"ok": len(set(numbers)) == 1, "after_each": sorted(set(numbers)), "of": len(numbers)}


def boxes(context: Context) -> Iterator[Task]:
    """The localisation errors and their gradients beside torch's, and the degenerate boxes."""
    kernels = box_budget.Backend("triton", context.device.type)
    draw = partial(box_budget.random_boxes, context.sizes.edge.anchors)
    for kind in KINDS:
        for dtype in ("float32", "bfloat16", "float16", "float64"):
            name = f"{kind} {dtype}"
            yield Task(name, partial(_judge_boxes, kernels, draw, kind, getattr(torch, dtype)))
        ties = partial(_first, box_budget.grid_boxes, 40 * context.sizes.edge.anchors)
        yield Task(f"{kind}, ties", partial(_judge_boxes, kernels, ties, kind, torch.float32))


def _first(draw: Callable[[], tuple[Tensor, Tensor]], pairs: int) -> tuple[Tensor, Tensor]:
    """Some of the boxes, from all over them."""
    pred, target = draw()
    step = max(1, len(pred) // pairs)
    return pred[::step], target[::step]


def _judge_boxes(
    backend: box_budget.Backend,
    draw: Callable[[], tuple[Tensor, Tensor]],
    kind: str,
    dtype: torch.dtype,
) -> dict[str, Any]:
    pred, target = (box.to(dtype) for box in draw())
    result = box_budget.evaluate(backend, pred, target, kind)
    found = box_budget.deviations(result, pred, target, kind)
    return parity_checks.verdict(
        {part: deviation / budget for part, (deviation, budget) in found.items()}
    )


def compilation(context: Context) -> Iterator[Task]:
    """torch.compile(fullgraph=True) of the loss gives the gradients of the eager one."""
    for algorithm in context.algorithms:
        yield Task(algorithm, partial(_compile, context, algorithm))


def _compile(context: Context, algorithm: str) -> dict[str, Any]:
    case = parity_checks.draw_case(context.sizes.edge, "spread", torch.float32, context.device)
    call = _Call(case, algorithm)
    call.step()
    eager = [x.clone() for x in call.results()]
    start = time.monotonic()
    forward = torch.compile(_loss, fullgraph=True)
    for leaf in (*call.logits, call.loc_errors):
        leaf.grad = None
    loss = forward(call.logits, case.targets, call.loc_errors, call.settings)
    loss.backward()
    seconds = time.monotonic() - start
    by_logits = same([gradient_of(leaf) for leaf in call.logits], eager[2:-1])
    # Float64 sums in another order, rounded once or twice to float32.
    rounding = 2 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(loss.detach(), eager[0] + eager[1], rtol=rounding, atol=0)
    torch.testing.assert_close(call.loc_errors.grad, eager[-1], rtol=rounding, atol=0)
    return {"ok": by_logits, "seconds_to_compile": seconds}


def _loss(
    logits: list[Tensor], targets: list[Tensor], loc_errors: Tensor, settings: dict[str, Any]
) -> Tensor:
    cls, loc = alrp_loss(logits, targets, loc_errors, **settings)
    return cls + loc


# A wrong call, and what it has to say. On a GPU the assertion ends the process that made it.
_WRONG = {
    "too few loc_errors": (
        "alrp_loss(logits, targets, torch.rand(1, device=device), impl='triton')",
        "loc_errors, values",
    ),
    "a position that is no positive": (
        "alrp_loss(logits, targets, torch.rand(2, device=device), impl='triton', "
        "positives=torch.tensor([0, 3], device=device))",
        "positives: every entry",
    ),
}


def assertions(context: Context) -> Iterator[Task]:
    """What only the device can know to be wrong ends in an assertion, and not in a number."""
    for name, (call, message) in _WRONG.items():
        yield Task(name, partial(_fail, context, call, message))


def _fail(context: Context, call: str, message: str) -> dict[str, Any]:
    code = (
        "import torch\nfrom alrp_triton import alrp_loss\n"
        f"device = '{context.device.type}'\n"
        "logits = torch.randn(6, 2, device=device)\n"
        "targets = torch.tensor([0, -1, 1, -1, -1, -1], device=device)\n"
        f"cls, loc = {call}\nprint('value', float(cls + loc))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True, timeout=60
    )
    return {
        "ok": done.returncode != 0 and "value" not in done.stdout,
        "says_why": message in done.stdout + done.stderr,
        "last_line": (done.stderr.strip().splitlines() or [""])[-1][:200],
    }


def memory(context: Context) -> Iterator[Task]:
    """What forward and backward take beyond the logits and their gradient."""
    for algorithm in context.algorithms:
        for dtype in ("float32", "bfloat16"):
            yield Task(f"{algorithm} {dtype}", partial(_peak, context, algorithm, dtype))


def _peak(context: Context, algorithm: str, dtype: str) -> dict[str, Any]:
    draw = partial(parity_checks.draw_case, context.sizes.full, "mid", _DTYPES[dtype])
    call = _Call(draw(context.device), algorithm)
    call.step()
    for leaf in (*call.logits, call.loc_errors):
        leaf.grad = None
    peak = timing.peak_memory(call.step, context.device)
    if peak is None:
        return {"peak": None, "why": "the system does not tell"}
    logits = sum(leaf.numel() * leaf.element_size() for leaf in call.logits)
    beyond = max(0, peak - logits)  # the gradient is as large as the logits
    goal = int(_SHARE * logits + _CONSTANT)
    return {"beyond": beyond, "logits": logits, "goal": goal, "reached": beyond <= goal}


# --- what is measured ---------------------------------------------------------------------------


def timings(context: Context) -> Iterator[Task]:
    """Forward and backward, eager and as a graph, stage by stage, and kernel by kernel."""
    for algorithm, kernels in context.algorithms.items():
        for dtype in ("float32", "bfloat16"):
            for distribution in DISTRIBUTIONS:
                drawn = partial(
                    parity_checks.draw_case,
                    context.sizes.full,
                    distribution,
                    _DTYPES[dtype],
                    context.device,
                )
                name = f"{algorithm} {distribution} {dtype}"
                yield Task(name, partial(_time, context, drawn, algorithm, kernels))
        drawn = partial(
            parity_checks.draw_case, context.sizes.full, "mid", torch.float32, context.device
        )
        yield Task(
            f"{algorithm} mid float32, kernels", partial(_profile, context, drawn, algorithm)
        )


def _time(
    context: Context, draw: Callable[[], Case], algorithm: str, kernels: ModuleType
) -> dict[str, Any]:
    case = draw()
    call, captured = _Call(case, algorithm), _Call(case, algorithm)
    number = case.scores.numel()
    calls = {
        "forward + backward": call.step,
        "forward": lambda: call.forward(),
        "graph replay": context.capture(captured.step),
        "locate": lambda: ops.locate(case.logits, case.targets, None, number, True, IGNORE, "auto"),
        "count": lambda: kernels.count(*case.count_input),
        "gradient": lambda: kernels.gradient(*case.gradient_input),
    }
    seconds = timing.interleave(
        calls, context.device, context.sizes.rounds, warmup=1, until=context.until
    )
    logits = sum(level.numel() * level.element_size() for level in case.logits)
    floor = 3 * logits / context.bandwidth  # one read forward; one read and one write backward
    times = {name: timing.Times.of(taken) for name, taken in seconds.items()}
    return {
        "rounds": len(seconds["graph replay"]),
        "floor_seconds": floor,
        "share_of_floor": floor / times["graph replay"].median,
        "seconds": {name: taken._asdict() for name, taken in times.items()},
    }


def _profile(context: Context, draw: Callable[[], Case], algorithm: str) -> dict[str, Any]:
    call = _Call(draw(), algorithm)
    call.step()
    with profile(activities=list({ProfilerActivity.CPU, context.activity})) as record:
        call.step()
        context.check_health()
    on_device = "self_cpu_time_total" if context.activity == ProfilerActivity.CPU else (
        "self_device_time_total"
    )  # fmt: skip
    events = [x for x in record.key_averages() if x.device_type == context.kernels_on]
    events.sort(key=lambda x: -getattr(x, on_device))
    return {
        "launches": sum(x.count for x in events),
        "microseconds": {x.key[:80]: getattr(x, on_device) for x in events[:20]},
    }


def rates(context: Context) -> Iterator[Task]:
    """What the choice among algorithms and primitives hangs on; each result is checked.

    Adds in memory, and the count that is made of them; look-ups; the instructions that pairwise
    issues; how long breakpoints take to begin.
    """
    memory_rates, kernel_rates = (  # need triton
        importlib.import_module(f"perf.{name}") for name in ("memory_rates", "kernel_rates")
    )
    device, rounds, (programs, repeats) = context.device, context.sizes.rounds, context.sizes.rate

    def of_kernels(measure: Callable[..., dict[str, Any]], size: Size, stage: str) -> dict:
        case = parity_checks.draw_case(size, stage, torch.float32, device)
        return measure(case, context.capture, rounds)

    for slots, at_random in memory_rates.ADDS:
        name = f"adds to {slots} slots {'at random' if at_random else 'in turn'}"
        measure = memory_rates.measure_adds
        yield Task(name, partial(measure, device, slots, at_random, programs, repeats, rounds))
    full, many = context.sizes.full, context.sizes.many
    for stage in ("init", "mid", "spread"):
        intervals = partial(of_kernels, kernel_rates.measure_intervals, full, stage)
        yield Task(f"logits counted between edges, {stage}", intervals)
    for gather in memory_rates.LOOK_UPS:
        name = f"look-ups by {'tl.gather' if gather else 'tl.load'}"
        measure = memory_rates.measure_look_ups
        yield Task(name, partial(measure, device, gather, max(1, programs // 4), repeats, rounds))
    yield Task("pairs, spread", partial(of_kernels, kernel_rates.measure_pairs, full, "spread"))
    for size in (full, many):
        sort = partial(of_kernels, kernel_rates.measure_edges, size, "mid")
        yield Task(f"edges of {size.positives:,} positives sorted", sort)


def benchmark(context: Context) -> Iterator[Task]:
    """The package beside its peers."""
    yield Task("table", partial(_benchmark, context))


def _benchmark(context: Context) -> dict[str, Any]:
    bench = importlib.import_module("perf.bench")
    cells, rounds, until = bench.CELLS[context.cells], context.sizes.rounds, context.until - _ENDING
    with _tuned(context):
        report = bench.run(cells, bench.VARIANTS, context.device, rounds, until, progress=False)
    rows = report["rows"]
    report["goals"] = bench.judge(rows, bench.STANDARDS[context.cells])
    files = bench.write(report, context.out, "bench")
    wrong = [row for row in rows if row["variant"] == bench.OURS and not row["parity"]]
    result = {"ok": not wrong, "rows": len(rows), "files": _names(files)}
    # As in the middle of a training, where most of it is spent.
    middle = next((row for row in rows if row["distribution"] == "mid"), None)
    if middle is not None:
        shared = ("distribution", "dtype", "N", "P", "delta")
        same_cell = [row for row in rows if all(row[key] == middle[key] for key in shared)]
        result |= {key: middle[key] for key in ("N", "P")}
        result["milliseconds"] = {
            row["variant"]: 1e3 * row["seconds"] for row in same_cell if row["parity"]
        }
    result["goals"] = {
        goal["what"]: {name: goal[name] for name in ("found", "bound", "reached")}
        for goal in report["goals"]
    }
    return result | {"not_run": [f"{x['variant']}: {x['why']}" for x in report["dropped"]]}


@contextmanager
def _tuned(context: Context) -> Iterator[None]:
    """In it, the package takes the sizes and costs in the folder, if there are any."""
    tuned = importlib.import_module("alrp_triton.kernels.tuned")
    before = os.environ.get(tuned.FOLDER)
    if tuned.find_file(timing.machine(context.device)["device"], str(context.out)):
        os.environ[tuned.FOLDER] = str(context.out)
    try:
        yield
    finally:
        os.environ.pop(tuned.FOLDER, None)
        if before is not None:
            os.environ[tuned.FOLDER] = before


def tuning(context: Context) -> Iterator[Task]:
    """Block sizes for this GPU, and what the algorithms cost by them."""
    yield Task("sizes and costs", partial(_tune, context))


def _tune(context: Context) -> dict[str, Any]:
    autotune = importlib.import_module("perf.autotune")
    seconds = context.until - _ENDING - time.monotonic()
    with _tuned(context):  # those of an earlier run are what has to be beaten
        result = autotune.tune(context.device, seconds, progress=False)
    files = _names(autotune.write(result, context.out))
    costs = {
        fit["dtype"]: {
            "taken": fit["taken"],
            **fit["measured"],
            "lost_before": fit["before"]["lost"],
        }
        for fit in result["fits"]
    }
    gains = autotune.gains(result)
    return {"files": files, "gains": gains, "costs": costs, "not_reached": result["left_out"]}


def _names(files: Any) -> list[str]:
    files = files if isinstance(files, (list, tuple)) else [files]
    return [Path(file).name for file in files]


def tests(context: Context) -> Iterator[Task]:
    """The tests that are marked for a GPU, where pytest is there."""
    yield Task("pytest -m gpu", partial(_pytest, context))


def _pytest(context: Context) -> dict[str, Any]:
    if importlib.util.find_spec("pytest") is None:
        return {"dropped": "pytest is not installed"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    files = ("tests/test_kernels.py", "tests/test_breakpoints.py", "tests/test_triton.py")
    seconds = max(1.0, context.until - _ENDING - time.monotonic())
    try:
        done = subprocess.run(
            [*command, *files], cwd=_ROOT, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired as stopped:
        printed = (stopped.stdout or b"").decode()
        return {"dropped": f"not done after {seconds:.0f} s", "printed": printed[-1000:]}
    summary = (done.stdout.strip().splitlines() or ["nothing was printed"])[-1]
    failed = re.findall(r"^(?:FAILED|ERROR) (.*)$", done.stdout, re.MULTILINE)
    return {"ok": done.returncode == 0, "summary": summary, "failed": failed}


# In the order of their worth: what the design hangs on, what has to be right, what the package
# promises, the rest. The seconds are those of a GPU, kernels still to be compiled; what does not
# fit into the command's time is cut from the end, and said.
STEPS = (
    Step("machine", about, 20),
    Step("rates", rates, 45),
    Step("parity", parity, 150, required=True),
    Step("edges", edges, 90, required=True),
    Step("repeatability", repeatability, 30, required=True),
    Step("synchronisations", synchronisations, 20, required=True),
    Step("graph", graph, 20, required=True),
    Step("boxes", boxes, 30),
    Step("memory", memory, 15),
    Step("timings", timings, 60),
    Step("tuning", tuning, 150),
    Step("benchmark", benchmark, 120),  # by the sizes and costs just found
    Step("variants", variants, 20),
    Step("compilation", compilation, 60),
    Step("assertions", assertions, 40),
    Step("tests", tests, 90),
)
