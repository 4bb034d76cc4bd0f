"""Pictures made worse as an operation makes them worse, to see how far answers hold.

    (kind, key) ── random streams ──▶ clouds, pools, highlights ──┐
    level ──────────────────────────▶ how much of them ───────────┴──▶ the picture, corrupted

What becomes of a picture depends on nothing but its pixels, kind, level and key, so all processes and runs
see the same. The shapes of a kind are the same at every level, only more or denser, and scale with the
picture's shorter side. docs/metrics.md tells the formula, the levels and the source of each kind.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from surgvqa.letterbox import BLACK, Size
from surgvqa.recipe import BadInput

Array = NDArray[np.float32]

SMOKE = (0.25, 0.5, 0.85, 1.35, 2.1)
"""Mean optical depth: of the picture, exp(-depth) is seen."""
BLUR = (1, 2, 3, 4, 6)
"""Standard deviation of the Gaussian, in pixels of a picture with a shorter side of 224."""
BLOOD = (0.04, 0.09, 0.16, 0.26, 0.4)
"""Share of the view that pools cover."""
SPECULAR = (0.003, 0.007, 0.013, 0.022, 0.035)
"""Share of the view that highlights cover."""
NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)
"""Standard deviation as a share of white."""
JPEG = (25, 18, 15, 10, 7)
"""Quality as libjpeg counts it."""
DARK = (0.6, 0.5, 0.4, 0.3, 0.2)
"""What becomes of white."""
PHOTONS = (600, 250, 120, 50, 30)
"""With `dark`: so many are counted where the picture is white."""

SIDE = 384
"""Shapes are made for a shorter side of at most so many pixels, then scaled."""

GREY = np.array([0.80, 0.81, 0.82], np.float32)
"""Smoke in white light."""
RED = np.array([0.42, 0.02, 0.03], np.float32)
"""Blood so deep that nothing is seen through it, in white light."""
WHITE = np.ones(3, np.float32)
ABSORBED = np.array([1.7, 6.0, 6.0], np.float32)
"""Largest optical depth of blood for red, green and blue."""


@dataclass(frozen=True)
class Corruption:
    """What is done to a picture. Raises ValueError for a kind or a level that there is not."""

    kind: str
    """One of KINDS."""
    level: int
    """1 (mild) to 5 (severe)."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.level not in LEVELS:
            raise ValueError(f"no corruption {self.name}: {_EXIST}")

    @property
    def name(self) -> str:
        """Such as `smoke:3`."""
        return f"{self.kind}:{self.level}"

    def __call__(self, image: Image.Image, key: str) -> Image.Image:
        """The RGB picture `image`, corrupted, of the same size; other keys get other shapes."""
        digest = hashlib.sha256(f"{self.kind}:{key}".encode(errors="surrogateescape")).digest()
        rng = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))
        return KINDS[self.kind](image, self.level - 1, rng)


def parse(text: str) -> list[Corruption]:
    """`smoke:3` as one corruption, `smoke:1..5` or `smoke` as five. Raises BadInput."""
    kind, colon, levels = (part.strip() for part in text.partition(":"))
    if kind not in KINDS:
        close = difflib.get_close_matches(kind.lower(), KINDS, n=1, cutoff=0.6)
        meant = f', did you mean "{close[0]}"?' if close else f": {_EXIST}"
        raise BadInput(f'corruption "{text}": no kind is called "{kind}"{meant}')
    if not colon:
        return [Corruption(kind, level) for level in LEVELS]
    found = re.fullmatch(r"([1-5])(?:\.\.([1-5]))?", levels)
    if not found or (found[2] or found[1]) < found[1]:
        raise BadInput(f'corruption "{text}": not a level; write {kind}:3, or {kind}:1..5 for several')
    return [Corruption(kind, level) for level in range(int(found[1]), int(found[2] or found[1]) + 1)]


def _smoke(image: Image.Image, level: int, rng: np.random.Generator) -> Image.Image:
    small, view = _looked_at(image)
    clouds = np.exp(0.55 * _fractal(rng, small, cells=2, octaves=6, swirl=0.08))
    depth = SMOKE[level] * clouds / clouds.mean() * view
    tint = 0.88 * GREY + 0.12 * small.mean((0, 1))
    return _veiled(image, depth, tint, _light(small))


def _blood(image: Image.Image, level: int, rng: np.random.Generator) -> Image.Image:
    small, view = _looked_at(image)
    pools = _fractal(rng, small, cells=2.5, octaves=5, swirl=0.08)
    drops = _fractal(rng, small, cells=22) + 0.5 * pools
    depth = np.maximum(
        _top(pools, BLOOD[level], view, soft=1.0), 0.8 * _top(drops, BLOOD[level] / 12, view, soft=0.7)
    )
    return _veiled(image, depth**0.7, RED, _light(small), ABSORBED)


def _specular(image: Image.Image, level: int, rng: np.random.Generator) -> Image.Image:
    small, view = _looked_at(image)
    wet = _fractal(rng, small, cells=30, octaves=2, swirl=0.08, stretch=1.7)
    bright = _blurred(small.max(2) - small.min(2) ** 2, 0.02)  # and not white already
    shine = _top(wet + 3.5 * bright, SPECULAR[level], view, soft=0.5)
    return _veiled(image, 3 * shine + 0.8 * _blurred(shine, 0.012), WHITE)


def _blur(image: Image.Image, level: int, rng: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(BLUR[level] * min(image.size) / 224))


def _noise(image: Image.Image, level: int, rng: np.random.Generator) -> Image.Image:
    picture = _shares(image)
    return _image(picture + NOISE[level] * _normal(rng, picture))


def _jpeg(image: Image.Image, level: int, rng: np.random.Generator) -> Image.Image:
    file = BytesIO()
    image.save(file, "JPEG", quality=JPEG[level])
    return Image.open(file).convert("RGB")


def _dark(image: Image.Image, level: int, rng: np.random.Generator) -> Image.Image:
    picture = DARK[level] * _shares(image)
    spread = (picture / np.float32(PHOTONS[level]) + (NOISE[level] / 10) ** 2) ** 0.5
    return _image(picture + spread * _normal(rng, picture))


KINDS: dict[str, Callable[[Image.Image, int, np.random.Generator], Image.Image]] = {
    "smoke": _smoke,
    "blur": _blur,
    "blood": _blood,
    "specular": _specular,
    "noise": _noise,
    "jpeg": _jpeg,
    "dark": _dark,
}
LEVELS = range(1, 6)

_EXIST = f"kinds are {', '.join(KINDS)}, levels {LEVELS[0]} to {LEVELS[-1]}"


# ---- light through something --------------------------------------------------------------------------


def _veiled(
    image: Image.Image, depth: Array, colour: Array, light: Array | None = None, absorbed: Array = WHITE[:1]
) -> Image.Image:
    """J·t + A·(1 - t) with t = exp(-depth · absorbed): the picture J through something of the colour A.

    depth, light: (rows, columns) of `_looked_at`, the light that falls on what is in front; absorbed: by
    channel, or (1,) for all.
    """
    t = np.exp(-_scaled(depth, image.size)[..., None] * absorbed)
    if light is not None:
        colour = colour * _scaled(light, image.size)[..., None]
    return _image(colour + t * (_shares(image) - colour))


def _looked_at(image: Image.Image) -> tuple[Array, Array]:
    """The picture scaled down to SIDE, (rows, columns, 3), and its view, (rows, columns): 0 in the black
    around it, 1 a little away from that.

    Black is what is dark all the way to the picture's edge, in any of four directions. Light does not come
    from there, whatever is in front.
    """
    shrink = min(1, SIDE / min(image.size))
    size = round(image.width * shrink), round(image.height * shrink)
    small = _shares(image.resize(size, Image.Resampling.BOX))
    black = small.max(2) * 255 <= BLACK
    around = np.zeros_like(black)
    for turned in (np.s_[:, :], np.s_[::-1, :]):
        for axis in (0, 1):
            flipped = turned if axis == 0 else turned[::-1]
            around[flipped] |= np.logical_and.accumulate(black[flipped], axis)
    return small, (2 * _blurred(~around, 0.02) - 1).clip(0, 1)


def _light(small: Array) -> Array:
    """(rows, columns) 0.4 to 1: how much light there is, from how bright the picture is roundabout."""
    return 0.4 + 0.6 * _blurred(small.max(2), 0.12)


def _top(field: Array, share: float, view: Array, soft: float) -> Array:
    """(rows, columns) 0 to 1: above 0 where a field is highest, in that share of the view.

    It is 1 from `soft` standard deviations above the lowest value there.
    """
    inside = field[view > 0] if view.any() else field
    lowest = np.quantile(inside, 1 - share)
    return np.asarray(np.clip((field - lowest) / (soft * inside.std() + 1e-6), 0, 1) * view, np.float32)


# ---- shapes -------------------------------------------------------------------------------------------


def _fractal(
    rng: np.random.Generator,
    small: Array,
    *,
    cells: float,
    octaves: int = 1,
    swirl: float = 0.0,
    stretch: float = 1.0,
) -> Array:
    """(rows, columns) fractal noise of mean 0 and standard deviation 1, with `cells` to the shorter side.

    Octaves of lattice noise, each of twice the frequency and half the height of the one before (Perlin, "An
    Image Synthesizer", SIGGRAPH 1985), interpolated by PIL. `swirl`, a share of the shorter side, is how far
    points are then moved by noise of their own, and `stretch` how much wider than high cells are.
    """
    size = small.shape[1], small.shape[0]
    streams = rng.spawn(octaves + 2)
    field = np.zeros(small.shape[:2], np.float32)
    for octave, stream in enumerate(streams[2:]):
        field += 0.5**octave * _lattice(stream, size, cells * 2**octave, stretch)
    if swirl:
        rows, columns = np.indices(field.shape, np.float32)
        down, right = (swirl * min(size) * _lattice(stream, size, 2.5) for stream in streams[:2])
        field = _sampled(field, rows + down, columns + right)
    return np.asarray((field - field.mean()) / (field.std() + 1e-6), np.float32)


def _lattice(rng: np.random.Generator, size: Size, cells: float, stretch: float = 1.0) -> Array:
    """(rows, columns) random values, `cells` to the shorter side, and what is between them.

    They are drawn along the longer side, so that pictures of about the same shape have the same.
    """
    width, height = (cells * side / min(size) for side in size)
    drawn = rng.standard_normal((int(max(width, height)) + 3, int(cells) + 3), np.float32)
    values = Image.fromarray(np.ascontiguousarray(drawn.T if width > height else drawn))
    box = (1, 1, 1 + width / stretch, 1 + height)
    return np.asarray(values.resize(size, Image.Resampling.BICUBIC, box=box))


def _sampled(field: Array, rows: Array, columns: Array) -> Array:
    """A field at the given places, linear between its points and mirrored beyond its edges."""
    (y, down), (x, right) = (
        np.divmod(np.abs((at + last) % max(2 * last, 1) - last), 1)
        for at, last in ((rows, field.shape[0] - 1), (columns, field.shape[1] - 1))
    )
    padded = np.pad(field, (0, 1), "edge")
    top, left = y.astype(np.intp), x.astype(np.intp)
    above = padded[top, left] * (1 - right) + padded[top, left + 1] * right
    below = padded[top + 1, left] * (1 - right) + padded[top + 1, left + 1] * right
    return np.asarray(above * (1 - down) + below * down, np.float32)


# ---- pixels -------------------------------------------------------------------------------------------


def _shares(image: Image.Image) -> Array:
    """(rows, columns, 3), 1 is white."""
    return np.asarray(image, np.float32) / np.float32(255)


def _image(shares: Array) -> Image.Image:
    return Image.fromarray((shares.clip(0, 1) * 255 + 0.5).astype(np.uint8))


def _normal(rng: np.random.Generator, picture: Array) -> Array:
    return rng.standard_normal(picture.shape, np.float32)


def _scaled(field: Array, size: Size) -> Array:
    return np.asarray(Image.fromarray(field).resize(size, Image.Resampling.BILINEAR))


def _blurred(field: Array | NDArray[np.bool_], share: float) -> Array:
    """By a Gaussian with a standard deviation of that share of the shorter side; from 0 to 1, in 8 bits."""
    grey = Image.fromarray((field * np.float32(255)).astype(np.uint8))
    return _shares(grey.filter(ImageFilter.GaussianBlur(share * min(grey.size))))
