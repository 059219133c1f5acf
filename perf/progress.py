"""A progress bar, or a line now and then where tqdm is not installed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
_LINES = 10  # without tqdm, about how many of them


def bar(items: Iterable[T], name: str, total: int, shown: bool = True) -> Iterable[T]:
    """Yield the items, with a display of how many of `total` are done."""
    if not shown:
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return _lines(items, name, total)
    return tqdm(items, desc=name, total=total)


def _lines(items: Iterable[T], name: str, total: int) -> Iterator[T]:
    every = max(1, total // _LINES)
    for number, item in enumerate(items, 1):
        yield item
        if number % every == 0 or number == total:
            print(f"{name}: {number} of {total}", flush=True)
