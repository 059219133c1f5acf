"""What each public call asks of the device: launches, copies, waits and allocations, as counted.

    python -m tests.software_gpu.host_cost           # prints what is found
    python -m tests.software_gpu.host_cost --write   # and holds the test to it from now on

Every call is small, since no number depends on the size, and runs on the device of
`perf.software_gpu.runtime`, where kernels do nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alrp_triton import (
    ALRPLoss,
    SelfBalance,
    alrp_loss,
    ap_loss,
    error_driven_loss,
    localisation_errors,
    ndcg_loss,
    rank_sort_loss,
)
from alrp_triton.testing.workloads import Cell, Inputs, draw
from perf.bench import focal
from perf.software_gpu import build, runtime

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_name("host_cost.json")
CELL = Cell(160_000, 300, "mid")  # 2000 anchors
LEVELS = {"one level": (2000,), "five levels": (1500, 375, 94, 24, 7)}
IMAGES, PADDING = 8, 20
ALGORITHMS = "breakpoints", "pairwise"

Numbers = dict[str, dict[str, int]]  # by stage: forward, backward
Losses = Tensor | tuple[Tensor, ...]


class Batch(NamedTuple):
    """What the losses are called with, in one form, on the device."""

    logits: list[Tensor]
    targets: list[Tensor]
    loc_errors: Tensor
    settings: dict[str, Any]  # positives=, groups=

    @property
    def leaves(self) -> list[Tensor]:
        """What a gradient is wanted of."""
        return [*self.logits, self.loc_errors]


def make(level: str, dtype: str, form: str) -> Batch:
    """Draw a batch in levels: "plain", "grouped" by image, or with "padded" positives."""
    inputs = draw(CELL._replace(dtype=dtype), torch.device("cpu"))
    sizes = LEVELS[level]
    settings: dict[str, Any] = {}
    loc_errors = inputs.loc_errors
    if form == "grouped":
        images = torch.arange(sum(sizes)) * IMAGES // sum(sizes)
        settings["groups"] = [x.cuda() for x in images.split(sizes)]
    if form == "padded":
        pad = torch.nn.functional.pad
        settings["positives"] = pad(_positives(inputs), (0, PADDING), value=-1).cuda()
        loc_errors = pad(loc_errors, (0, PADDING))
    return Batch(
        [x.clone().cuda().requires_grad_() for x in inputs.logits.split(sizes)],
        [x.clone().cuda() for x in inputs.targets.split(sizes)],
        loc_errors.cuda().requires_grad_(),
        settings,
    )


def _positives(inputs: Inputs) -> Tensor:
    return inputs.targets.ge(0).nonzero()[:, 0]


def count(batch: Batch, call: Callable[[], Losses]) -> Numbers:
    """Count forward and backward of a call that was made before, as in a training."""
    for _ in range(2):
        _forward_backward(batch, call)
    total = None
    with runtime.operations() as forward:
        total = _total(call())
    with runtime.operations() as backward:
        total.backward()
    return {"forward": forward.numbers(), "backward": backward.numbers()}


def _forward_backward(batch: Batch, call: Callable[[], Losses]) -> None:
    _total(call()).backward()
    for leaf in batch.leaves:
        leaf.grad = None


def _total(losses: Losses) -> Tensor:
    """Return a scalar to call backward on; the sum of two is one operation."""
    return losses if isinstance(losses, Tensor) else losses[0] + losses[1]


Case = tuple[str, Callable[[], Numbers]]


def cases() -> Iterator[Case]:
    """Name every call that is counted."""
    for algorithm in ALGORITHMS:
        for level in LEVELS:
            for dtype in ("float32", "bfloat16"):
                for form in ("plain", "padded", "grouped"):
                    name = f"alrp_loss, {algorithm}, {level}, {dtype}, {form}"
                    yield name, lambda x=(level, dtype, form), y=algorithm: _alrp(*x, y)
    for algorithm in ALGORITHMS:
        for name, call in OTHERS.items():
            yield f"{name}, {algorithm}", lambda x=call, y=algorithm: _other(x, y)
    yield "localisation_errors", _boxes
    yield "focal loss, fused", _focal


def _alrp(level: str, dtype: str, form: str, algorithm: str) -> Numbers:
    batch = make(level, dtype, form)
    settings = {**batch.settings, "algorithm": algorithm}
    return count(
        batch, lambda: alrp_loss(batch.logits, batch.targets, batch.loc_errors, **settings)
    )


def _other(prepare: Callable[..., Callable[[], Losses]], algorithm: str) -> Numbers:
    # Positives are given: to find out how many there are takes kernels that do something.
    batch = make("one level", "float32", "padded")
    call = prepare(batch, batch.settings["positives"], algorithm)
    return count(batch, call)


def _module(batch: Batch, positives: Tensor, algorithm: str, **settings: Any) -> Callable:
    target = torch.rand(batch.loc_errors.numel(), 4).cumsum(1).cuda()
    predicted = (target + 0.1).requires_grad_()
    criterion = ALRPLoss(algorithm=algorithm, **settings).cuda()
    return lambda: criterion(batch.logits, batch.targets, predicted, target, positives).loss


def _compiled(batch: Batch, positives: Tensor, algorithm: str) -> Callable:
    torch.compiler.reset()
    loss = torch.compile(alrp_loss, fullgraph=True)
    settings = {"positives": positives, "algorithm": algorithm}
    return lambda: loss(batch.logits, batch.targets, batch.loc_errors, **settings)


def _of_logits(loss: Callable[..., Losses]) -> Callable[..., Callable[[], Losses]]:
    def prepare(batch: Batch, positives: Tensor, algorithm: str) -> Callable[[], Losses]:
        settings = {"positives": positives, "algorithm": algorithm}
        return lambda: loss(batch.logits, batch.targets, **settings)

    return prepare


def _rank_sort(batch: Batch, positives: Tensor, algorithm: str) -> Callable[[], Losses]:
    quality = batch.loc_errors.detach()
    settings = {"positives": positives, "algorithm": algorithm}
    return lambda: rank_sort_loss(batch.logits, batch.targets, quality, **settings)


def _own_errors(batch: Batch, positives: Tensor, algorithm: str) -> Callable[[], Losses]:
    settings = {"positives": positives, "algorithm": algorithm}

    def errors(counts: Any) -> tuple[Tensor, float, float]:
        return counts.nfp / counts.rank, 0.0, 1.0

    return lambda: error_driven_loss(batch.logits, batch.targets, errors, **settings)


OTHERS: dict[str, Callable[..., Callable[[], Losses]]] = {
    "ALRPLoss with boxes": _module,
    "ALRPLoss with boxes and SelfBalance": lambda *x: _module(*x, balance=SelfBalance(period=2)),
    "ap_loss": _of_logits(ap_loss),
    "ndcg_loss": _of_logits(ndcg_loss),
    "rank_sort_loss": _rank_sort,
    "error_driven_loss": _own_errors,
    "alrp_loss under torch.compile": _compiled,
}


def _boxes() -> Numbers:
    batch = make("one level", "float32", "plain")
    target = torch.rand(300, 4).cumsum(1).cuda()
    predicted = (target + 0.1).requires_grad_()
    return count(batch, lambda: localisation_errors(predicted, target).sum())


def _focal() -> Numbers:
    inputs = draw(CELL, torch.device("cuda"))
    logits = inputs.logits.requires_grad_()
    loss = focal.fused(inputs)
    batch = Batch([logits], [inputs.targets], inputs.loc_errors, {})
    return count(batch, lambda: loss(logits))


# --- the table ------------------------------------------------------------------------------------


def versions() -> str:
    """Name the versions that the numbers hang on."""
    return ", ".join(f"{x} {'.'.join(version(x).split('.')[:2])}" for x in ("torch", "triton"))


def measure() -> dict[str, Numbers]:
    """Count every call, in a process of its own that has the device.

    Raises:
        build.Unavailable: there is no such device here.
    """
    done = runtime.run("-m", "tests.software_gpu.host_cost", cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"the calls could not be counted:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def write(found: dict[str, Numbers]) -> None:
    """Put the numbers into the table, a line for each call."""
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    table[versions()] = found
    parts = []
    for key, numbers in sorted(table.items()):
        lines = [f"  {json.dumps(name)}: {json.dumps(of)}" for name, of in numbers.items()]
        parts.append(f"{json.dumps(key)}: {{\n" + ",\n".join(lines) + "\n}")
    TABLE.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def main() -> None:
    """Count where the device is; elsewhere start the process that does."""
    if runtime.is_running():
        print(json.dumps({name: run() for name, run in cases()}))
        return
    found = measure()
    for name, numbers in found.items():
        print(name, *(f"{stage}: {of}" for stage, of in numbers.items()), sep="\n    ")
    if "--write" in sys.argv[1:]:
        write(found)


if __name__ == "__main__":
    try:
        main()
    except build.Unavailable as reason:
        sys.exit(str(reason))
