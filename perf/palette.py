"""Colours that the colour-blind can tell apart."""

from __future__ import annotations

# Okabe and Ito's palette: tells apart with any kind of colour vision.
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
