"""Train a small RetinaNet on handwritten digits with ranking losses and focal loss, and compare.

    python -m perf.train            three losses, within four minutes on two CPU cores
    python -m perf.train --quick    the same within a minute, far from convergence

Prints a table and writes it, the curves over training and a picture of detections to `--out`.
Ctrl-C stops the training and reports what has been reached; a second one reports what is complete.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from perf import arguments

LOSSES = ("alrp", "ap", "focal-l1", "focal-giou", "ce-giou")
DEFAULT_LOSSES = ("alrp", "ap", "focal-giou")
FILES = ("results.json", "results.md", "curves.png", "detections.png")


def make_parser() -> arguments.Parser:
    parser = arguments.Parser("train", __doc__)
    parser.add_argument(
        "--losses", nargs="+", choices=LOSSES, default=list(DEFAULT_LOSSES), metavar="LOSS",
        action=arguments.Each,
        help=f"of {', '.join(LOSSES)} (default: {' '.join(DEFAULT_LOSSES)})",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", nargs="+", type=arguments.seed, default=[0], metavar="SEED",
        action=arguments.Each,
        help="one run per loss and seed; the table shows mean and spread (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=arguments.times, help="iterations a run (default: 600, or 120 if --quick)"
    )
    parser.add_argument("--opt", choices=("sgd", "adamw"), default="adamw", help="(default: adamw)")
    parser.add_argument("--quick", action="store_true", help="at most a minute in all")
    parser.add_argument(
        "--device", type=arguments.device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=arguments.folder, default=Path("runs"), help="folder (default: runs)"
    )
    return parser


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, and resolve `steps` and `test_images`."""
    options = make_parser().parse_args(given)
    options.steps = options.steps or (120 if options.quick else 600)
    options.test_images = 100 if options.quick else 300
    return options


def main(given: Sequence[str] | None = None) -> int:
    """Run the comparison; return the exit status: 0, or 130 after Ctrl-C."""
    options = parse_arguments(given)
    with arguments.importing("train"):
        from perf.train import comparison
    make_parser().prepare(options.out, FILES)
    return comparison.run(options)


if __name__ == "__main__":
    sys.exit(main())
