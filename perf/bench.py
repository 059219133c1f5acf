"""Times the package beside what people use instead, on the CPU: `python -m perf.bench`.

Every row is forward + backward of one call, interleaved with the other variants in rounds, after
the gradient was held to the float64 reference; without parity there is no time.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from alrp_triton import alrp_loss

from .variants import VARIANTS, Variant
from .workloads import (
    DISTRIBUTIONS,
    coco_images,
    draw_logits,
    draw_targets,
    drawn_images,
    retinanet_targets,
)


def run_once(variant: Variant, logits: Tensor, targets: Tensor, loc_errors: Tensor) -> Tensor:
    """Forward and backward; the gradient by the logits."""
    leaf = logits.detach().requires_grad_()
    variant.loss(leaf, targets, loc_errors).backward()
    return leaf.grad


def compare(
    variants: dict[str, Variant],
    distribution: str,
    num_logits: int,
    num_positives: int,
    rounds: int,
    classes: int = 80,
    tolerance: float = 1e-5,
) -> list[dict]:
    """One row a variant; `seconds` is None where its gradient is not the reference's.

    The error is the largest one beside the reference's gradient in float64, over the largest
    gradient. The variants run once each a round, in turn.
    """
    indices = draw_targets(num_logits // classes, classes, num_positives)
    logits = draw_logits(indices, classes, distribution)
    loc_errors = torch.rand(num_positives, generator=torch.Generator().manual_seed(1))
    leaf = logits.double().requires_grad_()
    alrp_loss(leaf, indices, loc_errors.double(), impl="torch")[0].backward()

    largest = leaf.grad.abs().max().clamp(min=torch.finfo(torch.float64).tiny)

    inputs, errors, times = {}, {}, {}
    for name, variant in variants.items():
        inputs[name] = (variant, logits, variant.prepare(logits, indices), loc_errors)
        gradient = run_once(*inputs[name]).double()
        error = float((gradient - leaf.grad).abs().max() / largest)
        errors[name] = error if variant.ranks else None
        if not variant.ranks or error <= tolerance:
            times[name] = []
    for _ in range(rounds):
        for name in times:
            start = time.perf_counter()
            run_once(*inputs[name])
            times[name].append(time.perf_counter() - start)
    return [
        {
            "variant": name,
            "distribution": distribution,
            "N": logits.numel(),
            "P": num_positives,
            "error": errors[name],
            "seconds": statistics.median(times[name]) if name in times else None,
            "least": min(times[name]) if name in times else None,
            "most": max(times[name]) if name in times else None,
        }
        for name in variants
    ]


def retinanet_call(annotations: Path | None, images: int = 4) -> dict:
    """One RetinaNet-sized call on CPU: seconds, and what forward takes beyond the logits."""
    boxes = coco_images(annotations, images) if annotations else drawn_images(images)
    targets = retinanet_targets(boxes)
    logits = draw_logits(targets, 80, "mid").requires_grad_()
    loc_errors = torch.rand(int((targets >= 0).sum()), requires_grad=True)
    memory = PeakMemory()
    start = time.perf_counter()
    cls, loc = alrp_loss(logits, targets, loc_errors)
    forward = time.perf_counter() - start
    extra = memory.grown()
    (cls + loc).backward()
    return {
        "boxes": annotations.name if annotations else "drawn",
        "N": logits.numel(),
        "P": loc_errors.numel(),
        "ignored": int((targets == -100).sum()) * 80,
        "forward_s": forward,
        "forward_backward_s": time.perf_counter() - start,
        "forward_extra_share": None if extra is None else extra / (logits.numel() * 4),
    }


class PeakMemory:
    """Growth of this process' largest resident size since its making; Linux only."""

    def __init__(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
            self._before = self._peak()
        except OSError:
            self._before = None

    def grown(self) -> int | None:
        """Bytes, or None where the system does not tell."""
        return None if self._before is None else self._peak() - self._before

    @staticmethod
    def _peak() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024


def machine() -> dict[str, str | int]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def to_markdown(rows: list[dict]) -> str:
    lines = [
        "| distribution | N | P | variant | ms | least to most | published loop / this | error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        same = [r for r in rows if all(r[k] == row[k] for k in ("distribution", "N", "P"))]
        loop = next((r["seconds"] for r in same if r["variant"] == "published loop"), None)
        wrong = row["seconds"] is None
        ratio = "-" if wrong or loop is None else f"{loop / row['seconds']:.1f}"
        time_ms = "not the reference's gradient" if wrong else f"{row['seconds'] * 1e3:.0f}"
        spread = "-" if wrong else f"{row['least'] * 1e3:.0f} to {row['most'] * 1e3:.0f}"
        error = "-" if row["error"] is None else f"{row['error']:.0e}"
        lines.append(
            f"| {row['distribution']} | {row['N']:,} | {row['P']} | {row['variant']} | {time_ms} "
            f"| {spread} | {ratio} | {error} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m perf.bench", description=__doc__)
    parser.add_argument("--logits", type=int, default=2_000_000, help="N (default: %(default)s)")
    parser.add_argument("--positives", type=int, default=500, help="P (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default: %(default)s)")
    parser.add_argument("--coco", type=Path, help="COCO annotations, for the call on real boxes")
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"))
    options = parser.parse_args(arguments)

    call = retinanet_call(options.coco)
    extra = call["forward_extra_share"]
    print(
        f"RetinaNet at 512 px, {call['boxes']} boxes: N = {call['N']:,}, P = {call['P']}, "
        f"{call['ignored']:,} ignored: forward {call['forward_s']:.2f} s, with backward "
        f"{call['forward_backward_s']:.2f} s; beyond the logits, forward takes "
        f"{'an unknown share' if extra is None else f'{extra:.2f}'} of their memory\n"
    )
    rows = []
    for distribution in DISTRIBUTIONS:
        rows += compare(VARIANTS, distribution, options.logits, options.positives, options.rounds)
    print(to_markdown(rows))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine(), "retinanet": call, "rows": rows}
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
