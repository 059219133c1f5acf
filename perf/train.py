"""Train a small RetinaNet on handwritten digits with ranking losses and focal loss, and compare.

    python -m perf.train            three losses, within four minutes on two CPU cores
    python -m perf.train --quick    the same within a minute, far from convergence

Prints a table and writes it, the curves over training and a picture of detections to `--out`.
Ctrl-C stops the training and reports what has been reached; a second one reports what is complete.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

LOSSES = ("alrp", "ap", "focal-l1", "focal-giou", "ce-giou")
DEFAULT_LOSSES = ("alrp", "ap", "focal-giou")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with `steps` and `test_images` resolved."""
    parser = argparse.ArgumentParser(
        prog="python -m perf.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--losses", nargs="+", choices=LOSSES, default=list(DEFAULT_LOSSES), metavar="LOSS",
        help=f"of {', '.join(LOSSES)} (default: {' '.join(DEFAULT_LOSSES)})",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], metavar="SEED",
        help="one run per loss and seed; the table shows mean and spread (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=positive, help="iterations a run (default: 600, or 120 if --quick)"
    )
    parser.add_argument("--opt", choices=("sgd", "adamw"), default="adamw", help="(default: adamw)")
    parser.add_argument("--quick", action="store_true", help="at most a minute in all")
    parser.add_argument(
        "--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder (default: runs)")
    options = parser.parse_args(arguments)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"argument --device: {options.device}, but torch sees no GPU")
    options.steps = options.steps or (120 if options.quick else 600)
    options.test_images = 100 if options.quick else 300
    return options


def positive(text: str) -> int:
    """Argument type: a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text}")
    return number


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison; returns the exit code: 0, or 130 after Ctrl-C."""
    options = parse_arguments(arguments)
    with importing_the_extra():
        from perf import comparison
    return comparison.run(options)


@contextmanager
def importing_the_extra() -> Iterator[None]:
    """Exits with a hint where an import of the block fails."""
    try:
        yield
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision for another torch
        sys.exit(f'{error}\nThis command needs the extra "train": pip install -e ".[train]"')


if __name__ == "__main__":
    sys.exit(main())
