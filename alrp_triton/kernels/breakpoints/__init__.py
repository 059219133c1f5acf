"""Counts and sums between the sorted breakpoints: `reference/breakpoints/` in Triton.

`ranks` is the road: it sorts the breakpoints (`sort`), counts the logits between them (`histogram`,
`dense`), takes prefix sums along the segments (`scan`) and writes the gradient, a piecewise linear
function of the score (`linear_pieces`).
"""

from .ranks import choose_tiles, count, gradient

__all__ = ["choose_tiles", "count", "gradient"]
