"""Times the package beside what people use instead."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from alrp_triton.testing.workloads import CELLS

from .. import arguments
from . import host_time
from .authors_code import load
from .real_boxes import coco_images, retinanet_call
from .report import SUFFIXES, to_markdown, write
from .run import _MINUTES, _ROUNDS, _TOY, run
from .targets import STANDARDS, Row, missed, name_of, verify
from .variants import OURS, VARIANTS


def make_parser() -> arguments.Parser:
    parser = arguments.Parser("bench", __doc__)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: a GPU if there is one, else the CPU"
    )
    parser.add_argument("--cells", choices=tuple(CELLS), help="default: those of the device")
    parser.add_argument(
        "--rounds", type=arguments.times, help="runs of each (default: 7, or 20 on a GPU)"
    )
    parser.add_argument(
        "--minutes",
        type=arguments.minutes,
        help="no cell begins later (default: 3.5, or 9 on a GPU)",
    )
    parser.add_argument(
        "--coco", type=arguments.existing_file, help="COCO annotations, for the call on real boxes"
    )
    parser.add_argument(
        "--peers",
        type=arguments.existing_folder,
        help="checkout of the authors' code, to be timed too",
    )
    parser.add_argument(
        "--out", type=arguments.folder, default=Path("runs"), help="default: %(default)s"
    )
    parser.add_argument("--name", type=arguments.name, help="of the files (default: bench-DEVICE)")
    return parser


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; resolve what depends on the device, and read files and folders."""
    parser = make_parser()
    options = parser.parse_args(given)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: expected cpu, since torch sees no GPU, got cuda")
    options.device = torch.device(
        options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    )
    on_gpu = options.device.type == "cuda"
    options.cells = options.cells or ("gpu" if on_gpu else "cpu")
    options.rounds = options.rounds or _ROUNDS[options.device.type]
    options.minutes = options.minutes or _MINUTES[options.device.type]
    options.name = options.name or f"bench-{'gpu' if on_gpu else 'cpu'}"
    if options.coco is not None:
        options.coco = parser.read("--coco", coco_images, options.coco)
    options.peers = {} if options.peers is None else parser.read("--peers", load, options.peers)
    parser.prepare(options.out, [f"{options.name}.{suffix}" for suffix in SUFFIXES])
    return options


def main(given: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if this package was wrong in some cell, or missed a goal."""
    options = parse_arguments(given)
    until = time.monotonic() + 60 * options.minutes
    variants = VARIANTS | options.peers
    call = retinanet_call(options.coco, device=options.device)
    report = run(CELLS[options.cells], variants, options.device, options.rounds, until)
    report["goals"] = verify(report["rows"], STANDARDS[options.cells])
    report["retinanet"] = call
    if options.cells != _TOY:
        report["host"] = host_time.measure()
    print(to_markdown(report))
    for path in write(report, options.out, options.name):
        print(path, file=sys.stderr)
    failed = failures(report["rows"], [] if options.cells == _TOY else report["goals"])
    if failed:
        print("\n".join(failed))
    return int(bool(failed))


def failures(rows: Sequence[Row], goals: Sequence[Row]) -> list[str]:
    """List what makes the exit status non-zero: wrong cells of ours, and missed goals."""
    wrong = [row for row in rows if row["variant"] == OURS and not row["parity"]]
    return [f"WRONG: {name_of(row)}" for row in wrong] + [f"MISSED: {x}" for x in missed(goals)]


if __name__ == "__main__":
    sys.exit(main())
