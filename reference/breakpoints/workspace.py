"""Memory that one part of a level after another is worked on in."""

from __future__ import annotations

import torch
from torch import Tensor


class Workspace:
    """Vectors by name and dtype, each as long as the longest that was asked for.

    Fresh memory for every part would cost more than the arithmetic: the system clears it page by
    page, and may take it back as soon as it is free.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a vector with an entry for each of `like`; what had this name is lost."""
        kept = self._kept.get((name, dtype))
        if kept is None or kept.numel() < like.numel():
            kept = self._kept[name, dtype] = like.new_empty(like.numel(), dtype=dtype)
        return kept[: like.numel()]
