"""The authors' own code, from a checkout that the user has: `python -m perf.bench --peers DIR`.

Known are the repositories aLRPLoss, RankSortLoss and BucketedRankingBasedLosses; of each the class
`aLRPLoss`. Its file is loaded by its path, without the mmdetection around it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from alrp_triton.testing.workloads import Inputs

from .variants import Variant, at_most_pairs

_FILES = ("alrp_loss.py", "ranking_losses.py")  # in mmdet/models/losses
_PACKAGE = "_published_code"  # what the files take for mmdet.models


def load(checkout: Path) -> dict[str, Variant]:
    """Load the variants that a checkout holds.

    Raises:
        FileNotFoundError: if it holds none.
    """
    folder = checkout / "mmdet" / "models" / "losses"
    variants = {}
    for name in _FILES:
        path = folder / name
        loss = getattr(_import(path), "aLRPLoss", None) if path.is_file() else None
        if loss is not None:
            variants[f"authors' code, {name}"] = Variant(
                _bind(loss), limit=at_most_pairs(cpu=2e9, cuda=2e11)
            )
    if not variants:
        raise FileNotFoundError(
            f"expected {' or '.join(_FILES)} with a class aLRPLoss in {folder}: a checkout of "
            "aLRPLoss, RankSortLoss or BucketedRankingBasedLosses"
        )
    return variants


def _bind(loss: Any) -> Callable[[Inputs], Callable[[Tensor], Tensor]]:
    def bind(inputs: Inputs) -> Callable[[Tensor], Tensor]:
        marks = inputs.marks.reshape(-1)

        def call(logits: Tensor) -> Tensor:
            with _cuda_is_here(logits.device):
                # The authors cast to float32 outside.
                flat = logits.float().reshape(-1)
                return loss.apply(flat, marks, inputs.loc_errors, inputs.delta)[0]

        return call

    return bind


@contextmanager
def _cuda_is_here(device: torch.device) -> Iterator[None]:
    """Let `.cuda()`, by which the code moves what it makes, leave it in place without a GPU."""
    if device.type == "cuda":
        yield
        return
    original = torch.Tensor.cuda
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.cuda = original  # type: ignore[method-assign]


class _Registry:
    """Stands in for mmdetection's: registers nothing."""

    def register_module(self) -> Callable[[type], type]:
        return lambda cls: cls


def _import(path: Path) -> ModuleType:
    """Run a file as a module of a package whose `builder` is the stand-in."""
    builder = ModuleType(f"{_PACKAGE}.builder")
    builder.LOSSES = _Registry()  # type: ignore[attr-defined]
    losses = ModuleType(f"{_PACKAGE}.losses")
    losses.__path__ = [str(path.parent)]
    name = f"{losses.__name__}.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    package = ModuleType(_PACKAGE)
    package.__path__ = []
    stand_ins = {one.__name__: one for one in (package, builder, losses)}
    before = set(sys.modules)
    sys.modules.update(stand_ins)
    try:
        spec.loader.exec_module(module)
    finally:
        for new in set(sys.modules) - before:
            if new.split(".")[0] == _PACKAGE:
                del sys.modules[new]
    return module
