"""Tell what runs here and why, and check it: `python -m alrp_triton`.

Each loss runs, forward and backward, on each backend and algorithm that this machine has, beside
the specification (`alrp_triton.reference.pairwise` in float64). The exit status is 1 if one is
wrong.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import __version__, alrp_loss, ap_loss, backend, ndcg_loss, rank_sort_loss
from .kernels.tuning import files

_ANCHORS, _CLASSES, _POSITIVES = 700, 5, 24

# float32 rounds a score's distance to a window's edge and a sum over the positives; both are some
# roundings of numbers no larger than the largest entry, and P is small. Wrong code is off by more.
_ROUNDINGS = 256 * torch.finfo(torch.float32).eps


def main(arguments: list[str] | None = None) -> int:
    """Print the report; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m alrp_triton", description="Tell what runs here and why, and check it."
    )
    parser.parse_args(arguments)
    print("\n".join(versions()))
    wrong = 0
    for device in devices():
        print(f"\n{device}: {device_name(device)}")
        print("  " + "\n  ".join(choices(device)))
        for impl, algorithm in available(device):
            for name, call in LOSSES.items():
                found = check(call, device, impl, algorithm)
                wrong += found is not None
                print(
                    f"  {impl:7}{algorithm:12}{name:12}{found or 'agrees with the specification'}"
                )
    print(f"\n{wrong} wrong" if wrong else "\nall right")
    return int(wrong > 0)


def versions() -> Iterator[str]:
    """Yield the package, what it runs on, and their versions."""
    yield f"alrp_triton {__version__}, {os.path.dirname(__file__)}"
    yield f"python {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield f"torch {torch.__version__}"
    try:
        yield f"triton {importlib.metadata.version('triton')}"
    except importlib.metadata.PackageNotFoundError:
        yield "triton: not installed"


def devices() -> list[torch.device]:
    """Return the CPU, and the GPUs that the losses run on."""
    return [torch.device("cpu")] + [
        torch.device("cuda", number) for number in range(torch.cuda.device_count())
    ]


def device_name(device: torch.device) -> str:
    """Return what a device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads"


def choices(device: torch.device) -> Iterator[str]:
    """Yield what "auto" runs on a device, and why."""
    yield backend.explain(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_properties(device).name
        found = files.find_file(name, os.environ.get(files.FOLDER))
        yield f"tuned file: {found}" if found else "tuned file: none, the defaults hold"


def available(device: torch.device) -> Iterator[tuple[str, str]]:
    """Yield the pairs of backend and algorithm that can run on a device."""
    for impl in ("torch", "triton"):
        if impl == "triton":
            try:
                backend.load_kernels("pairwise", device)
            except RuntimeError:
                continue
        for algorithm in ("pairwise", "breakpoints"):
            yield impl, algorithm


def _alrp(logits: Tensor, targets: Tensor, numbers: Tensor, **options: Any) -> Tensor:
    return torch.stack(alrp_loss(logits, targets, numbers, **options)).sum()


def _ap(logits: Tensor, targets: Tensor, numbers: Tensor, **options: Any) -> Tensor:
    return ap_loss(logits, targets, **options)


def _ndcg(logits: Tensor, targets: Tensor, numbers: Tensor, **options: Any) -> Tensor:
    return ndcg_loss(logits, targets, **options)


def _rank_sort(logits: Tensor, targets: Tensor, numbers: Tensor, **options: Any) -> Tensor:
    return torch.stack(rank_sort_loss(logits, targets, numbers, **options)).sum()


LOSSES: dict[str, Callable[..., Tensor]] = {
    "aLRP": _alrp,
    "AP": _ap,
    "NDCG": _ndcg,
    "Rank & Sort": _rank_sort,
}


def check(
    call: Callable[..., Tensor], device: torch.device, impl: str, algorithm: str
) -> str | None:
    """Return what is wrong with a loss on one backend and algorithm; None if nothing is."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(_ANCHORS, _CLASSES, generator=generator)
    targets = torch.full((_ANCHORS,), -1)
    targets[:_POSITIVES] = torch.randint(_CLASSES, (_POSITIVES,), generator=generator)
    targets[-9:] = -100
    numbers = torch.rand(_POSITIVES, generator=generator)
    expected, slope = _evaluate(call, logits.double(), targets, numbers.double())
    try:
        found, gradient = _evaluate(
            call,
            logits.to(device),
            targets.to(device),
            numbers.to(device),
            impl=impl,
            algorithm=algorithm,
        )
    except Exception as error:  # whatever a broken installation raises is what to report
        return f"FAILS: {type(error).__name__}: {error}"
    value_error = float((found - expected).abs() / expected.abs())
    slope_error = float((gradient - slope).abs().max() / slope.abs().max())
    if value_error <= _ROUNDINGS and slope_error <= _ROUNDINGS:  # not for NaN
        return None
    return f"WRONG: value off by {value_error:.1e}, gradient by {slope_error:.1e}"


def _evaluate(
    call: Callable[..., Tensor],
    logits: Tensor,
    targets: Tensor,
    numbers: Tensor,
    impl: str = "torch",
    algorithm: str = "pairwise",
) -> tuple[Tensor, Tensor]:
    """Return value and gradient by the logits, float64 on the CPU."""
    leaf = logits.clone().requires_grad_()
    value = call(leaf, targets, numbers, impl=impl, algorithm=algorithm)
    value.backward()
    assert leaf.grad is not None
    return value.detach().double().cpu(), leaf.grad.double().cpu()


if __name__ == "__main__":
    sys.exit(main())
