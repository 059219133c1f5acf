"""All that only a GPU can tell, in one command of nine minutes."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from alrp_triton.kernels.tuning import files

from .. import arguments, timing
from .context import Context, Rehearsal, RehearsalOnCPU
from .runner import _FILES, _RESULTS, failures, run, table
from .steps import FIRST, STEPS, chosen


def make_parser() -> arguments.Parser:
    parser = arguments.Parser("gpu", __doc__)
    parser.add_argument(
        "--rehearse", action="store_true", help="at toy sizes, without a GPU or on one"
    )
    parser.add_argument(
        "--first", action="store_true", help="what decides most, in four minutes; then the rest"
    )
    parser.add_argument(
        "--out", type=arguments.folder, help="folder (default: perf/results/gpu/<GPU>)"
    )
    parser.add_argument(
        "--minutes", type=arguments.minutes, help="at most (default: 9; to rehearse, 90)"
    )
    names = list(dict.fromkeys(step.name for step in (*FIRST, *STEPS)))
    parser.add_argument("--only", nargs="+", metavar="STEP", choices=names, action=arguments.Each,
                        help=f"these steps alone: {', '.join(names)}")  # fmt: skip
    return parser


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; resolve what depends on whether it is a rehearsal."""
    parser = make_parser()
    options = parser.parse_args(given)
    if not (options.rehearse or torch.cuda.is_available()):
        parser.error("no CUDA or ROCm device: --rehearse walks the steps without one")
    # A rehearsal shows that every step can be walked, on a machine however slow.
    options.minutes = options.minutes or (90.0 if options.rehearse else 9.0)
    options.steps = chosen(options.first, options.only)
    if not options.steps:
        parser.error("argument --only: expected a step of this run: some are of --first alone")
    return options


def main(given: Sequence[str] | None = None) -> int:
    """Parse the command line, run, and return the exit status."""
    options, parser = parse_arguments(given), make_parser()
    with arguments.importing("test"):
        import triton  # noqa: F401
    make: type[Context] = Context
    if options.rehearse:
        out = options.out or parser.read("--out", _temporary_folder)
    if options.rehearse and torch.cuda.is_available():
        make = Rehearsal
    elif options.rehearse:
        make = RehearsalOnCPU
        os.environ["TRITON_INTERPRET"] = "1"  # for the worker, which imports the kernels
    else:
        os.environ.pop("TRITON_INTERPRET", None)
        gpu = torch.cuda.get_device_name(0).replace(" ", "-").replace("/", "-")
        out = options.out or _RESULTS / gpu
    device = make(out).device
    tuned_file = files.file_name(timing.machine(device)["device"])
    parser.prepare(out, [*_FILES, *(f"{name}.part" for name in _FILES[:2]), tuned_file])
    if (path := out / tuned_file).exists():
        parser.read("--out", files.read_file, path, files.defaults_for(device, torch.float32))
    report = run(options.steps, make, out, options.minutes)
    print(f"\n{table(report)}\n\n{out / 'report.json'}", flush=True)
    return 1 if failures(report) else 0


def _temporary_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="rehearsal-"))


if __name__ == "__main__":
    sys.exit(main())
