"""Who pulls harder, positives or negatives? Fig. 4 of the paper, on the detector of perf.train.

    python -m perf.balance            cross entropy, focal loss and aLRP, four minutes on a CPU
    python -m perf.balance --quick    the same in about a minute, far from convergence

In every iteration |dL/ds| is summed over the negatives and over the positives. Prints the least and
the greatest ratio of the two sums, and writes the table, all sums and a picture to `--out`. Ctrl-C
stops the training and reports what has been reached.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from perf import arguments, tables

if TYPE_CHECKING:
    from perf.train.loop import History

LOSSES = {"ce-giou": "cross entropy", "focal-giou": "focal loss", "alrp": "aLRP"}  # and titles
FILES = ("results.json", "results.md", "balance.png")
_SEED = 0
_OPTIMISER = "adamw"
_HEAD = (
    "loss", "least", "median", "greatest", "late least", "late greatest", "classification loss",
    "iterations",
)  # fmt: skip

NOTES = """\
Least, median, greatest: of the ratios of the iterations, each the sum of |dL/ds| over the negatives
over that over the positives. Late: in the second half, where the first steps no longer count. aLRP
stands at 1 by Theorem 2, to the rounding of float32. Classification loss: the mean of the first and
of the last twentieth of the iterations; the levels of two losses do not compare.
Each is trained by AdamW at its own rate (perf/train/detector.py) and with GIoU for the boxes. Cross
entropy is of the sigmoid, over all logits that are not ignored; it and focal loss are divided by
the positives of each image. At the start every logit has a probability of about 0.01, by the bias
of the head.
"""


def make_parser() -> arguments.Parser:
    parser = arguments.Parser("balance", __doc__)
    parser.add_argument(
        "--steps", type=arguments.times, help="iterations a loss (default: 600, or 120 if --quick)"
    )
    parser.add_argument("--quick", action="store_true", help="about a minute in all")
    parser.add_argument(
        "--out", type=arguments.folder, default=Path("runs/balance"),
        help="folder (default: runs/balance)",
    )  # fmt: skip
    return parser


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line and resolve `steps`."""
    options = make_parser().parse_args(given)
    options.steps = options.steps or (120 if options.quick else 600)
    return options


def main(given: Sequence[str] | None = None) -> int:
    """Train with each loss and report; return the exit status: 0, or 130 after Ctrl-C."""
    options = parse_arguments(given)
    with arguments.importing("train"):
        from perf.balance import picture
        from perf.train import loop
    make_parser().prepare(options.out, FILES)
    torch.set_num_threads(1)  # as perf.train on a CPU
    histories: dict[str, History] = {}
    for loss, title in LOSSES.items():
        # On the CPU: under AMP the gradients would be rounded to float16, and so would the ratio.
        run = loop.train(loss, _SEED, options.steps, _OPTIMISER, torch.device("cpu"))
        if len(run.history.loss) > 0:
            histories[title] = run.history
        if run.interrupted:
            break
    if histories:
        save(histories, options.steps, options.out)
        picture.save_balance(
            {title: history.ratio for title, history in histories.items()},
            {title: history.classification for title, history in histories.items()},
            options.out / "balance.png",
        )
        print(f"\n{table(histories)}\n\nTable, sums and picture are in {options.out}/.")
    return 130 if run.interrupted else 0


def table(histories: dict[str, History]) -> str:
    """Make a table with a row per loss: least, median and greatest ratio, and the loss itself."""
    rows = [list(_HEAD)]
    for title, history in histories.items():
        ratio, loss = history.ratio, history.classification
        late = ratio[len(ratio) // 2 :]
        ratios = (ratio.min(), statistics.median(ratio), ratio.max(), late.min(), late.max())
        window = -(-len(loss) // 20)
        fall = f"{loss[:window].mean():.3g} to {loss[-window:].mean():.3g}"
        rows.append([title, *map(tables.significant, ratios), fall, str(len(loss))])
    return tables.aligned(rows)


def save(histories: dict[str, History], steps: int, folder: Path) -> None:
    """Write results.json (the sums and the loss of every iteration) and results.md (the table)."""
    settings = {"steps": steps, "optimiser": _OPTIMISER, "seed": _SEED, "device": "cpu"}
    runs = [
        {
            "title": title,
            "ratio_range": [history.ratio.min(), history.ratio.max()],
            "negatives": history.magnitudes[:, 0].tolist(),
            "positives": history.magnitudes[:, 1].tolist(),
            "classification": history.classification.tolist(),
        }
        for title, history in histories.items()
    ]
    document = {"settings": settings, "machine": tables.machine(), "runs": runs}
    (folder / "results.json").write_text(json.dumps(document) + "\n")
    (folder / "results.md").write_text(f"{table(histories)}\n\n{NOTES}\n{tables.facts(settings)}\n")


if __name__ == "__main__":
    sys.exit(main())
