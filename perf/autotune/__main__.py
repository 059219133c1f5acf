"""Finds the sizes of the kernels that are best on a GPU, and what the algorithms then cost on it.

    python -m perf.autotune --out alrp_triton/kernels/tiles     # or into $ALRP_TRITON_TILES
    python -m perf.autotune --dry-run --target sm_90 --out .    # no GPU: by the machine code alone

What it does stands in `perf/tune.py`, and of `--dry-run` in `perf/autotune/dry_run.py`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import torch

from alrp_triton.kernels.tuning import files
from perf import arguments
from perf.machine_code.occupancy import LIMITS

_MINUTES, _TARGET = 5.0, "sm_90"


def make_parser() -> arguments.Parser:
    parser = arguments.Parser("autotune", __doc__)
    parser.add_argument(
        "--out", type=arguments.folder, default=os.environ.get(files.FOLDER) or None,
        help=f"folder (default: ${files.FOLDER})",
    )  # fmt: skip
    parser.add_argument(
        "--minutes", type=arguments.minutes, help=f"at most (default: {_MINUTES:g})"
    )
    parser.add_argument("--dry-run", action="store_true", help="compile and rank, without a GPU")
    parser.add_argument("--target", choices=LIMITS, help=f"of --dry-run (default: {_TARGET})")
    return parser


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; set `device` (None for a dry run) and resolve what was left out."""
    parser = make_parser()
    options = parser.parse_args(given)
    interpreted = bool(os.environ.get("TRITON_INTERPRET"))
    if options.out is None:
        parser.error(f"argument --out: say where to write, or set {files.FOLDER}")
    if options.dry_run and options.minutes is not None:
        parser.error("argument --minutes: --dry-run takes the time that it takes")
    if not options.dry_run and options.target is not None:
        parser.error("argument --target: expected with --dry-run only")
    if options.dry_run and interpreted:
        parser.error("argument --dry-run: unset TRITON_INTERPRET, under which nothing compiles")
    if not (options.dry_run or interpreted or torch.cuda.is_available()):
        parser.error("no GPU here: --dry-run ranks by the machine code")
    options.device = None if options.dry_run else torch.device("cpu" if interpreted else "cuda")
    options.minutes = options.minutes or _MINUTES
    options.target = options.target or _TARGET
    return options


def main(given: Sequence[str] | None = None) -> int:
    """Tune, or rank without a GPU, say what was written, and return the exit status."""
    options = parse_arguments(given)
    parser = make_parser()
    with arguments.importing("perf"):
        from perf.autotune import dry_run, tune
    if options.dry_run:
        parser.prepare(options.out, dry_run.files(options.target))
        written = dry_run.run(options.target, options.out)
    else:
        parser.prepare(options.out, tune.written(options.device))
        parser.read("--out", tune.find_in_use, options.device, options.out)
        seconds = 60 * options.minutes
        result = tune.tune(options.device, seconds, folder=str(options.out))
        print(tune.to_text(result))
        written = tune.write(result, options.out)
    print("\n".join(map(str, written)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
