"""The steps of perf.gpu that say whether everything is right.

Each makes named tasks, which return a part of the report.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from alrp_triton import ALRPLoss, SelfBalance, alrp_loss, ap_loss
from alrp_triton.boxes import KINDS
from alrp_triton.testing import box_tolerance, cases
from alrp_triton.testing.cases import Size
from alrp_triton.testing.kernel_tolerance import Case, gradient_of
from alrp_triton.testing.launches import OnGrid, compiled_variants, counting, same
from alrp_triton.testing.workloads import DISTRIBUTIONS

from .context import DTYPES, ENDING, Call, Context, Task

_ROOT = Path(__file__).parents[2]

# The files whose tests are marked for a GPU, the quick ones first; to collect all takes longer.
_MARKED = ("kernels", "triton", "locate", "sorting", "boxes", "authors", "metrics", "scale")


def parity(context: Context) -> Iterator[Task]:
    """Check operators and public losses at full size, with each distribution and dtype."""
    sizes = context.sizes
    hard = [(sizes.full, name, dtype, 1.0) for name in DISTRIBUTIONS for dtype in DTYPES]
    hard += [(sizes.full, "mid", "float32", 0.0), (sizes.full, "mid", "float32", 0.01)]
    hard += [(sizes.moderate, name, "float64", 1.0) for name in ("mid", "spread")]
    hard += [(sizes.moderate, "spread", dtype, 1.0) for dtype in DTYPES]  # pair by pair
    hard += [(sizes.many, "mid", "float32", 1.0)]
    dtypes = {**DTYPES, "float64": torch.float64}
    for algorithm, kernels in context.algorithms.items():
        for size, distribution, dtype, delta in hard:
            number = size.anchors * size.classes
            name = f"{algorithm} {distribution} {dtype}, {number:,} x {size.positives:,}"
            name += "" if delta == 1 else f", delta {delta:g}"
            draw = partial(
                cases.draw_case, size, distribution, dtypes[dtype], context.device, delta
            )
            yield Task(name, partial(_verify_both, draw, algorithm, kernels))
        draw = partial(
            cases.draw_in_images, context.sizes.full, "mid", torch.float32, context.device
        )
        yield Task(f"{algorithm} within images", partial(_verify_both, draw, algorithm, kernels))


def _verify_both(draw: Callable[[], Case], algorithm: str, kernels: ModuleType) -> dict[str, Any]:
    case = draw()
    operators = cases.verify(case, kernels)
    if case.groups or (case.index < 0).any():  # which the losses would have to be told of
        return operators
    losses = cases.verify_losses(case, algorithm, kernels)
    ratios = {**operators["error_over_budget"], **losses["error_over_budget"]}
    return {"ok": operators["ok"] and losses["ok"], "error_over_budget": ratios}


def edges(context: Context) -> Iterator[Task]:
    """Check small calls of every form, and the ends of each range."""
    for algorithm, kernels in context.algorithms.items():
        hard = cases.edge_cases(context.sizes.edge, context.device)
        for name, draw in hard.items():
            yield Task(f"{algorithm} {name}", partial(_verify_both, draw, algorithm, kernels))
        beyond = (kernels, context.sizes.beyond_float32, context.device)
        for name, call in (
            ("NaN", partial(cases.verify_nan, algorithm, context.device)),
            ("nothing", partial(cases.verify_nothing_to_rank, algorithm, context.device)),
            ("counts beyond 2^24", partial(cases.verify_counts_beyond_float32, *beyond)),
            (
                "offsets beyond 2^31",
                partial(cases.verify_offsets_beyond_32_bits, kernels, context.device),
            ),
        ):
            yield Task(f"{algorithm} {name}", call)


def repeatability(context: Context) -> Iterator[Task]:
    """Check for the same bits, run after run, and on another number of programs."""
    draw = partial(cases.draw_case, context.sizes.full)
    for algorithm, kernels in context.algorithms.items():
        for distribution, dtype in (
            ("mid", "float32"),
            ("init", "float32"),
            ("spread", "bfloat16"),
        ):
            drawn = partial(draw, distribution, DTYPES[dtype], context.device)
            yield Task(
                f"{algorithm} {distribution} {dtype}",
                partial(_repeat, drawn, algorithm, kernels, context.sizes.repeats),
            )
        drawn = partial(draw, "mid", torch.float32, context.device)
        yield Task(f"{algorithm} other grids and tiles", partial(_regrid, drawn, kernels))


def _repeat(
    draw: Callable[[], Case], algorithm: str, kernels: ModuleType, repeats: int
) -> dict[str, Any]:
    call = Call(draw(), algorithm)

    def results() -> list[Tensor]:
        case = call.case
        call.step()
        operators = [*kernels.count(*case.count_input), *kernels.gradient(*case.gradient_input)]
        return [*operators, *(x.clone() for x in call.results())]

    first = results()
    equal = sum(same(results(), first) for _ in range(repeats - 1))
    return {"ok": equal == repeats - 1, "equal": equal, "of": repeats - 1}


def _regrid(draw: Callable[[], Case], kernels: Any) -> dict[str, Any]:
    """Check what both promise: any grid, any gradient tile, and hard counts by any count tile."""
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
    tiles = kernels.choose_tiles(case.batch)
    changed = tiles._replace(gradient_rows=tiles.gradient_rows // 2)
    outcomes["gradient tiles"] = same(kernels.gradient(*case.gradient_input, changed), gradients)
    hard = case._replace(delta=0.0)
    changed = tiles._replace(count_rows=tiles.count_rows // 2)
    other = kernels.count(*hard.count_input, changed)
    outcomes["count tiles, delta = 0"] = same(kernels.count(*hard.count_input)[:2], other[:2])
    return {"ok": all(outcomes.values()), **outcomes}


def synchronisations(context: Context) -> Iterator[Task]:
    """Check that forward and backward run without the host waiting once."""
    yield from _in_each_way(context, _unwaiting)
    draw = partial(cases.draw_case, context.sizes.full, "mid", torch.float32)
    for algorithm in context.algorithms:
        task = partial(_unwaiting_ap, context, draw, algorithm)
        yield Task(f"{algorithm}, AP given positives", task)
    yield Task("the module with boxes", partial(_unwaiting_module, context, draw))


def _in_each_way(context: Context, run: Callable[..., dict[str, Any]]) -> Iterator[Task]:
    """Yield a task for each way to call aLRP: run(context, draw, algorithm, padding)."""
    draw = partial(cases.draw_case, context.sizes.full, "mid", torch.float32)
    images = partial(cases.draw_in_images, context.sizes.full, "mid", torch.float32)
    ways = {
        "given loc_errors": (draw, None),
        "given padded positives": (draw, 24),
        "within images": (images, None),
    }
    for algorithm in context.algorithms:
        for name, (drawn, padding) in ways.items():
            yield Task(f"{algorithm}, {name}", partial(run, context, drawn, algorithm, padding))


def _forbid(context: Context, step: Callable[[], None]) -> dict[str, Any]:
    step()  # compiles
    with context.forbid_waiting():
        step()  # raises if it waits
    return {"ok": True}


def _unwaiting(
    context: Context, draw: Callable[..., Case], algorithm: str, padding: int | None
) -> dict[str, Any]:
    call = Call(draw(context.device), algorithm, padding)
    return _forbid(context, call.step)


def _unwaiting_ap(context: Context, draw: Callable[..., Case], algorithm: str) -> dict[str, Any]:
    call = Call(draw(context.device), algorithm, padding=24)

    def step() -> None:
        ap_loss(call.logits, call.case.targets, **call.settings).backward()

    return _forbid(context, step)


def _unwaiting_module(context: Context, draw: Callable[..., Case]) -> dict[str, Any]:
    case = draw(context.device)
    call = Call(case, "auto")
    criterion = ALRPLoss(balance=SelfBalance(period=2), impl="triton").to(context.device)
    boxes = torch.rand(case.scores.numel(), 4).cumsum(1).to(context.device)
    predicted = (boxes + 0.1).requires_grad_()

    def step() -> None:
        criterion(call.logits, case.targets, predicted, boxes).loss.backward()

    return _forbid(context, step)


def graph(context: Context) -> Iterator[Task]:
    """Check a CUDA graph of forward and backward: the bits of the eager call, on changed logits."""
    return _in_each_way(context, _replay)


def _replay(
    context: Context, draw: Callable[..., Case], algorithm: str, padding: int | None
) -> dict[str, Any]:
    call = Call(draw(context.device), algorithm, padding)
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
    """Check that random sizes compile nothing new, once there is one of each."""
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
        case = cases.draw_case(size, "mid", torch.float32, context.device, 1 / positives)
        torch.manual_seed(anchors)  # draw_case has its own
        kernels.count(*case.count_input)
        kernels.gradient(*case.gradient_input)
        numbers.append(compiled_variants())
    return {"ok": len(set(numbers)) == 1, "after_each": sorted(set(numbers)), "of": len(numbers)}


def boxes(context: Context) -> Iterator[Task]:
    """Check the localisation errors and gradients beside torch's, and the degenerate boxes."""
    kernels = box_tolerance.Backend("triton", context.device.type)
    draw = partial(box_tolerance.random_boxes, context.sizes.edge.anchors)
    for kind in KINDS:
        for dtype in ("float32", "bfloat16", "float16", "float64"):
            name = f"{kind} {dtype}"
            yield Task(name, partial(_verify_boxes, kernels, draw, kind, getattr(torch, dtype)))
        ties = partial(_first, box_tolerance.grid_boxes, 40 * context.sizes.edge.anchors)
        yield Task(f"{kind}, ties", partial(_verify_boxes, kernels, ties, kind, torch.float32))


def _first(draw: Callable[[], tuple[Tensor, Tensor]], pairs: int) -> tuple[Tensor, Tensor]:
    """Return some of the boxes, from all over them."""
    pred, target = draw()
    step = max(1, len(pred) // pairs)
    return pred[::step], target[::step]


def _verify_boxes(
    backend: box_tolerance.Backend,
    draw: Callable[[], tuple[Tensor, Tensor]],
    kind: str,
    dtype: torch.dtype,
) -> dict[str, Any]:
    pred, target = (box.to(dtype) for box in draw())
    result = box_tolerance.evaluate(backend, pred, target, kind)
    found = box_tolerance.deviations(result, pred, target, kind)
    return cases.verdict({part: deviation / budget for part, (deviation, budget) in found.items()})


def compilation(context: Context) -> Iterator[Task]:
    """Check that torch.compile(fullgraph=True) of the loss gives the gradients of the eager one."""
    for algorithm in context.algorithms:
        yield Task(algorithm, partial(_compile, context, algorithm))


def _compile(context: Context, algorithm: str) -> dict[str, Any]:
    case = cases.draw_case(context.sizes.edge, "spread", torch.float32, context.device)
    call = Call(case, algorithm)
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
    """Check that what only the device knows to be wrong ends in an assertion, not in a number."""
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


def tests(context: Context) -> Iterator[Task]:
    """Run the tests marked for a GPU, and those of the other kernels, where pytest is there."""
    yield Task("pytest -m gpu", partial(_pytest, context, _MARKED, "-m", "gpu"))
    yield Task("Rank & Sort and skew", partial(_pytest, context, ("sorting", "skewed")))


def _pytest(context: Context, names: Sequence[str], *options: str) -> dict[str, Any]:
    if importlib.util.find_spec("pytest") is None:
        return {"dropped": "pytest is not installed"}
    options = (*options, *context.test_options)
    # In one process, which has the GPU to itself: pytest-xdist may be missing there.
    one = ("-q", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers")
    command = [sys.executable, "-m", "pytest", *one, *options]
    files = [str(path) for name in names for path in _ROOT.glob(f"tests/*/test_{name}.py")]
    seconds = max(1.0, context.until - ENDING - time.monotonic())
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
