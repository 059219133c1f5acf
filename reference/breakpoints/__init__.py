"""The fast path on a CPU: the numbers of `pairwise` in O((N + P) log P), exact.

`ranks` is the road. It sorts the breakpoints (`sort`, with a segment for each group: `segments`),
finds the logits that matter at the speed of memory (`relevant`, `block_maxima`) and works on them
in memory that is used again (`workspace`).
"""

from .ranks import count, gradient

__all__ = ["count", "gradient"]
