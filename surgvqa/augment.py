"""Training pictures that differ from epoch to epoch: moved and coloured a little, on the same canvas.

    (seed, epoch, image) ── endoscopy ──▶ Augmentation        Canvas + Augmentation = Augmented, a Placement

The picture is scaled to its canvas as ever, then coloured, then moved by one affine map at the canvas's
resolution (PIL's own map from the source would not average where it scales down). What an epoch shows depends
on nothing but seed, epoch and image, so all processes and workers, and a resumed run, see the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageEnhance

from surgvqa.letterbox import Box, Canvas, Size, clipped

LEAST_SHARE, MOST_DEGREES, MOST_SHIFT, MOST_COLOUR = 0.9, 10.0, 0.1, 0.2
"""Of `endoscopy`: share of the sides that a crop leaves, rotation either way, shift as a share of the sides,
and change of brightness, contrast and saturation."""

MOST_LOST = 0.5
"""A movement that would push a larger share of any box off the canvas is drawn anew."""

TRIES = 10
"""So many movements are drawn before the picture stays where it is."""


@dataclass(frozen=True)
class Augmentation:
    """What happens to a picture; by default nothing."""

    zoom: float = 1.0
    """1 / share of the sides that stays."""
    angle: float = 0.0
    """Degrees, clockwise, about the picture's centre."""
    shift_x: float = 0.0
    """How far the centre moves, as a share of the picture's width on the plain canvas."""
    shift_y: float = 0.0
    """The same of its height."""
    brightness: float = 1.0
    """Factor, as of PIL's ImageEnhance; also of the two below."""
    contrast: float = 1.0
    saturation: float = 1.0


def endoscopy(seed: int, epoch: int, key: str, boxes: Sequence[tuple[Canvas, Box]] = ()) -> Augmentation:
    """The augmentation of the image(s) `key` in an epoch.

    A crop of 0.9 to 1 of the sides at a random place, rotation by up to 10° and a shift of up to 0.1 of the
    sides; brightness, contrast and saturation changed by up to 0.2. Not mirrored,
    since left and right are answers, and no change of hue, since colours are.

    `boxes` (source pixels, each on its canvas) are what must still be seen: of movements that leave at least
    half of each, the first that is drawn; with none in ten, only the colours change.
    """
    digest = hashlib.sha256(f"{seed}:{epoch}:{key}".encode(errors="surrogateescape")).digest()
    rng = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))
    brightness, contrast, saturation = rng.uniform(1 - MOST_COLOUR, 1 + MOST_COLOUR, 3).tolist()
    colours = Augmentation(brightness=brightness, contrast=contrast, saturation=saturation)
    for _ in range(TRIES):
        share = rng.uniform(LEAST_SHARE, 1)
        centre = rng.uniform(-0.5, 0.5, 2) * (1 - share) / share
        shift_x, shift_y = (centre + rng.uniform(-MOST_SHIFT, MOST_SHIFT, 2)).tolist()
        angle = float(rng.uniform(-MOST_DEGREES, MOST_DEGREES))
        moved = replace(colours, zoom=float(1 / share), angle=angle, shift_x=shift_x, shift_y=shift_y)
        if all(Augmented(canvas, moved).shown(box) >= 1 - MOST_LOST for canvas, box in boxes):
            return moved
    return colours


@dataclass(frozen=True)
class Augmented:
    """A canvas with its picture moved and coloured: same size, same tokens."""

    canvas: Canvas
    by: Augmentation

    @property
    def width(self) -> int:
        return self.canvas.width

    @property
    def height(self) -> int:
        return self.canvas.height

    @property
    def source_size(self) -> Size:
        return self.canvas.source_size

    def to_canvas(self, box: Box) -> Box:
        """A box of source pixels, in canvas pixels: the upright box around its moved corners.

        What the canvas does not show is cut off, before the movement and after it.
        """
        return clipped(self._moved(self.canvas.to_canvas(box)), (self.width, self.height))

    def shown(self, box: Box) -> float:
        """Which share of a box of source pixels is still on the canvas; 1 if the plain one has none."""
        before = self.canvas.to_canvas(box)
        after = self._moved(before)
        return _area(clipped(after, (self.width, self.height))) / _area(after) if _area(before) else 1.0

    def place(self, drawn: Image.Image, fill: str) -> Image.Image:
        """What the canvas's `scale` made, coloured and moved; `fill` (a PIL colour) where it is not."""
        for enhance, factor in (
            (ImageEnhance.Brightness, self.by.brightness),
            (ImageEnhance.Contrast, self.by.contrast),
            (ImageEnhance.Color, self.by.saturation),
        ):
            drawn = enhance(drawn).enhance(factor)
        cos, sin = self._turn()
        (x, y), (new_x, new_y) = self._centres()
        zoom = self.by.zoom
        # PIL asks where each pixel comes from: the inverse of `_moved`, into `drawn`.
        a, b, d, e = cos / zoom, sin / zoom, -sin / zoom, cos / zoom
        left, top = x - self.canvas.offset_x, y - self.canvas.offset_y
        back = (a, b, left - a * new_x - b * new_y, d, e, top - d * new_x - e * new_y)
        return drawn.transform(
            (self.width, self.height),
            Image.Transform.AFFINE,
            back,
            Image.Resampling.BICUBIC,
            fillcolor=fill,
        )

    def _moved(self, box: Box) -> Box:
        """The upright box around a box of the plain canvas once it is moved."""
        cos, sin = self._turn()
        (x, y), (new_x, new_y) = self._centres()
        xs, ys = [], []
        for corner_x, corner_y in ((box[i], box[j]) for i in (0, 2) for j in (1, 3)):
            right, down = (corner_x - x) * self.by.zoom, (corner_y - y) * self.by.zoom
            xs.append(new_x + cos * right - sin * down)
            ys.append(new_y + sin * right + cos * down)
        return min(xs), min(ys), max(xs), max(ys)

    def _turn(self) -> tuple[float, float]:
        angle = math.radians(self.by.angle)
        return math.cos(angle), math.sin(angle)

    def _centres(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """The picture's centre on the plain canvas, and where it moves."""
        width, height = self.canvas.drawn_size
        x, y = self.canvas.offset_x + width / 2, self.canvas.offset_y + height / 2
        return (x, y), (x + self.by.shift_x * width, y + self.by.shift_y * height)


Placement = Canvas | Augmented
"""Where a source image lies on its canvas: `width`, `height`, `source_size`, `to_canvas`, `place`."""


def _area(box: Box) -> float:
    x1, y1, x2, y2 = box
    return max(0, x2 - x1) * max(0, y2 - y1)
