"""Handwritten digits on textured canvases: a detection data set that needs no download.

The digits are real (`load_digits` of scikit-learn, 8 x 8 pixels). Places, sizes, proportions,
polarity, background and clutter are drawn on the fly.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

CANVAS = 128  # pixels, both ways
NUM_CLASSES = 10

_TRAIN_DIGITS = 1300  # of 1797, the rest is for testing: no digit is in both
_MAX_DIGITS = 4
_HEIGHTS = (28, 72)  # pixels
_MAX_OVERLAP = 0.1  # of the smaller box
_MAX_FRAGMENTS = 2
_INK = 0.5  # opacity from which a pixel belongs to the digit and its box
_FIELD = 512  # pixels

Box = tuple[int, int, int, int]  # xyxy


class DigitCanvases:
    """An endless, seeded stream of canvases with 1 to 4 digits each.

    Args:
        split: "train" or "test", which of the handwritten digits are used.
        seed: the same seed gives the same stream.
    """

    def __init__(self, split: str, seed: int) -> None:
        self.glyphs, self.labels = _glyphs(split)
        # "train" and "test" differ in the first word, so equal seeds do not share canvases.
        self.rng = np.random.default_rng([split == "test", seed])
        # Canvases are cut out of two large fields: drawing these anew would take half the time.
        self.clouds = self._clouds()
        self.noise = self.rng.standard_normal((_FIELD, _FIELD), np.float32)

    def batch(self, size: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """Return the next `size` canvases.

        Returns:
            images: (1, 128, 128) float32 in [0, 1] each.
            targets: `boxes` (T, 4) float32 xyxy in pixels, tight on the ink; `labels` (T,) int64.
        """
        images, targets = zip(*(self._canvas() for _ in range(size)), strict=True)
        return list(images), list(targets)

    def _canvas(self) -> tuple[Tensor, dict[str, Tensor]]:
        canvas = 0.5 + self.rng.uniform(0.05, 0.2) * self._cut(self.clouds)
        for _ in range(self.rng.integers(_MAX_FRAGMENTS + 1)):
            self._paste_fragment(canvas)
        boxes: list[Box] = []
        labels: list[int] = []
        for _ in range(self.rng.integers(1, _MAX_DIGITS + 1)):
            index = self.rng.integers(len(self.glyphs))
            opacity = self._enlarged(self.glyphs[index])
            place = self._free_place(opacity, boxes)
            if place is not None:
                x, y, box = place
                self._blend(canvas, opacity, x, y)
                boxes.append(box)
                labels.append(int(self.labels[index]))
        canvas += self.rng.uniform(0.01, 0.03) * self._cut(self.noise)
        target = {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.tensor(labels)}
        return torch.from_numpy(canvas).clamp_(0, 1)[None], target

    def _clouds(self) -> np.ndarray:
        """Draw low frequencies: the sum of three random grids, smoothly enlarged, in [-1, 1]."""
        grids = (self.rng.uniform(-1, 1, (n, n)).astype(np.float32) for n in (8, 16, 32))
        clouds = sum(_resize(grid, _FIELD, _FIELD) for grid in grids)
        return clouds / np.abs(clouds).max()

    def _cut(self, field: np.ndarray) -> np.ndarray:
        y, x = self.rng.integers(0, _FIELD - CANVAS, 2)
        return field[y : y + CANVAS, x : x + CANVAS]

    def _paste_fragment(self, canvas: np.ndarray) -> None:
        """Paste clutter: the middle of a digit, too little of it to tell which."""
        glyph = self.glyphs[self.rng.integers(len(self.glyphs))]
        size = int(self.rng.integers(12, 31))
        opacity = _opacity(_resize(np.pad(glyph[3:6, 1:-1][:, :3], 1), size, size))
        x, y = self.rng.integers(0, CANVAS - size, 2)
        self._blend(canvas, opacity, x, y)

    def _enlarged(self, glyph: np.ndarray) -> np.ndarray:
        """Return the opacity of the digit at a random size and proportion."""
        rows, columns = glyph.shape  # with the empty pixels around the ink, hence the 2
        pixel_height = self.rng.uniform(*_HEIGHTS) / (rows - 2)
        pixel_width = pixel_height * self.rng.uniform(0.8, 1.25)
        return _opacity(_resize(glyph, round(rows * pixel_height), round(columns * pixel_width)))

    def _free_place(self, opacity: np.ndarray, boxes: list[Box]) -> tuple[int, int, Box] | None:
        """Find a corner (x, y) where the digit overlaps little with those already there.

        Returns:
            The corner and the digit's box, or None where no place was found.
        """
        left, top, right, bottom = _extent(opacity)
        height, width = opacity.shape
        for _ in range(20):
            x = int(self.rng.integers(0, CANVAS - width + 1))
            y = int(self.rng.integers(0, CANVAS - height + 1))
            box = (x + left, y + top, x + right, y + bottom)
            if all(_overlap(box, other) <= _MAX_OVERLAP for other in boxes):
                return x, y, box
        return None

    def _blend(self, canvas: np.ndarray, opacity: np.ndarray, x: int, y: int) -> None:
        """Draw with an ink that is darker or lighter than what lies beneath, in place."""
        patch = canvas[y : y + opacity.shape[0], x : x + opacity.shape[1]]
        contrast = self.rng.uniform(0.35, 0.5) * (1 if self.rng.random() < 0.5 else -1)
        ink = min(max(patch.mean() + contrast, 0.0), 1.0)
        patch += opacity * (ink - patch)


@cache
def _glyphs(split: str) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the digits of a split, in [0, 1], cropped, and their labels."""
    if split not in ("train", "test"):
        raise ValueError(f'split: expected "train" or "test", got {split!r}')
    data = load_digits()
    part = slice(None, _TRAIN_DIGITS) if split == "train" else slice(_TRAIN_DIGITS, None)
    images = (data.images[part] / 16).astype(np.float32)
    return [_cropped(image) for image in images], data.target[part]


def _cropped(image: np.ndarray) -> np.ndarray:
    """Return the digit with one empty pixel around it, or strokes would end in a straight cut."""
    ys, xs = np.nonzero(image > 0.25)
    return np.pad(image[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1], 1)


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    tensor = torch.from_numpy(image)[None, None]
    return F.interpolate(tensor, (height, width), mode="bicubic")[0, 0].numpy()


def _opacity(intensity: np.ndarray) -> np.ndarray:
    """Give the strokes edges a few pixels wide, where the enlarged digit has broad slopes."""
    return (2.5 * intensity - 0.8).clip(0, 1)


def _extent(opacity: np.ndarray) -> Box:
    """Return the tight box of the ink."""
    ys = np.flatnonzero((opacity >= _INK).any(axis=1))
    xs = np.flatnonzero((opacity >= _INK).any(axis=0))
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


def _overlap(a: Box, b: Box) -> float:
    """Return the intersection over the smaller of the two.

    This also sees a small digit on a large one.
    """
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / min(areas)
