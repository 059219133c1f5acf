"""Finding few among many at the speed of memory: by the highest of each run of neighbours.

A vector (n,) is cut into runs of `RUN` entries. Their maxima read it once, and leave a vector that
is so much shorter to search. The last run may be shorter.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# So many floats are four of the widest vector registers, from where on a maximum along the last
# dimension runs at full speed. A power of two, by which a place is divided in one step.
LOG_RUN = 6
RUN = 1 << LOG_RUN


def find(x: Tensor, wanted: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the places in x (n,), int64, of what is wanted.

    Of several where one is wanted, the highest must be wanted too.
    """
    runs = wanted(run_maxima(x)).nonzero()[:, 0]
    if 2 * RUN * runs.numel() > x.numel():
        return wanted(x).nonzero()[:, 0]
    return where_in_runs(runs, wanted(in_runs(x, runs)).nonzero()[:, 0])


def run_maxima(x: Tensor) -> Tensor:
    """Return the highest of each run of x (n,), NaN where it holds one."""
    whole = x.numel() // RUN * RUN
    highest = x[:whole].view(-1, RUN).amax(1)
    return highest if whole == x.numel() else torch.cat([highest, x[whole:].amax(0, True)])


def in_runs(x: Tensor, runs: Tensor) -> Tensor:
    """Return what stands in some runs of x (n,), one after the other; the runs are ascending."""
    whole = x.numel() // RUN * RUN
    rows = x[:whole].view(-1, RUN)
    if runs.numel() and int(runs[-1]) * RUN == whole:
        return torch.cat([rows.index_select(0, runs[:-1]).view(-1), x[whole:]])
    return rows.index_select(0, runs).view(-1)


def where_in_runs(runs: Tensor, found: Tensor) -> Tensor:
    """Return where in x stands what was found in some runs of it."""
    return runs.index_select(0, found >> LOG_RUN).mul_(RUN).add_(found & (RUN - 1))
