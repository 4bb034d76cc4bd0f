"""From an image as stored to the canvas a model sees, and back again for boxes.

    bytes ── header ───────▶ Header(size, …) ── plan_canvas ──▶ Canvas
    bytes ── open_rgb ─────▶ PIL image ──────── draw ─────────▶ PIL image of exactly the canvas's size
                               └── find_picture ──▶ what a black border surrounds, for plan_canvas

A canvas follows from the source's size alone (and the border, where that is cropped), so the number of image
tokens is known from the header.
The image is resized once, straight from the source, to sides that are multiples of the model's factor
(patch × merge: 28 pixels for Qwen2-VL, 32 for Qwen3-VL), so that no processor resizes it again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from io import BytesIO
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageFilter, UnidentifiedImageError
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from surgvqa import recipe
from surgvqa.datasets import ImageRef
from surgvqa.recipe import BadInput

MAX_PIXELS = 89_000_000
"""Larger images are refused before they are decoded. PIL itself begins to warn just above this."""

MAX_ASPECT = 200
"""Qwen's processors refuse longer images (`smart_resize` in transformers)."""

FORMATS = tuple(
    plugin.format
    for plugin in (
        JpegImageFile,
        PngImageFile,
        BmpImageFile,
        TiffImageFile,
        WebPImageFile,
        GifImageFile,
        PpmImageFile,
    )
)
"""Tried on every file, whatever its name says. For some of the others PIL would start another program."""

BLACK = 24
"""Brightest channel up to which a pixel can be border. Video's black is 16 where it was not stretched, and
JPEG's noise comes on top: on real frames borders were found at 0 to 19."""

Size = tuple[int, int]
Box = tuple[float, float, float, float]
Rectangle = tuple[int, int, int, int]
"""x1, y1, x2, y2 in whole pixels, along their edges as in `Canvas`."""


@dataclass(frozen=True)
class Canvas:
    """A canvas of `width` × `height` pixels and the affine map that puts the source image on it.

    x on the canvas = (x in the source - picture's left) × scale_x + offset_x, and the same for y. Coordinates
    run along pixel edges: 0 is the left edge of the first pixel, `source_width` the right edge of the last.
    """

    width: int
    height: int
    scale_x: float
    scale_y: float
    offset_x: int
    offset_y: int
    source_width: int
    source_height: int
    picture: Rectangle
    """The part of the source that is drawn: all of it, or what is left of a crop."""

    @property
    def source_size(self) -> Size:
        """Width and height of the source image in pixels."""
        return self.source_width, self.source_height

    @property
    def drawn_size(self) -> Size:
        """Width and height of the picture once it is on the canvas, in pixels."""
        x1, y1, x2, y2 = self.picture
        return round((x2 - x1) * self.scale_x), round((y2 - y1) * self.scale_y)

    def tokens(self, factor: int) -> int:
        """How many tokens the language model gets for this canvas."""
        return (self.width // factor) * (self.height // factor)

    def grid(self, patch: int) -> tuple[int, int]:
        """Rows and columns of patches of `patch` pixels, as in the model's `image_grid_thw`."""
        return self.height // patch, self.width // patch

    def to_canvas(self, box: Box) -> Box:
        """A box (x1, y1, x2, y2) of source pixels, in canvas pixels; what is not on the canvas is cut off.

        So of a box that a crop removed whole, an empty one at the edge is left.
        """
        x1, y1, x2, y2 = box
        left, top = self.picture[:2]
        return clipped(
            (
                (x1 - left) * self.scale_x + self.offset_x,
                (y1 - top) * self.scale_y + self.offset_y,
                (x2 - left) * self.scale_x + self.offset_x,
                (y2 - top) * self.scale_y + self.offset_y,
            ),
            (self.width, self.height),
        )

    def to_source(self, box: Box) -> Box:
        """A box of canvas pixels, in source pixels; the inverse of `to_canvas`."""
        x1, y1, x2, y2 = box
        left, top = self.picture[:2]
        return (
            (x1 - self.offset_x) / self.scale_x + left,
            (y1 - self.offset_y) / self.scale_y + top,
            (x2 - self.offset_x) / self.scale_x + left,
            (y2 - self.offset_y) / self.scale_y + top,
        )

    def scale(self, image: Image.Image) -> Image.Image:
        """The picture in the source image, of `drawn_size`. The one and only resize."""
        if image.size != self.source_size:
            raise ValueError(
                f"the canvas was planned for {self.source_width}×{self.source_height} pixels, "
                f"but the image has {image.width}×{image.height}"
            )
        if self.picture != (0, 0, *image.size):
            image = image.crop(self.picture)
        # PIL averages when it scales down.
        return image.resize(self.drawn_size, Image.Resampling.BICUBIC)

    def place(self, drawn: Image.Image, fill: str) -> Image.Image:
        """What `scale` made on the canvas, centred, `fill` (a PIL colour) around it."""
        if drawn.size == (self.width, self.height):
            return drawn
        result = Image.new("RGB", (self.width, self.height), fill)
        result.paste(drawn, (self.offset_x, self.offset_y))
        return result


def clipped(box: Box, size: Size) -> Box:
    """What of a box is inside (0, 0, *size)."""
    (x1, y1, x2, y2), (width, height) = box, size
    return max(0, min(x1, width)), max(0, min(y1, height)), max(0, min(x2, width)), max(0, min(y2, height))


def snap(size: int, factor: int) -> int:
    """The largest multiple of `factor` that is not above `size`, and at least one: 768 is 756 for 28."""
    return max(1, size // factor) * factor


def plan_canvas(
    source_size: Size,
    *,
    mode: str,
    size: int | None,
    max_tokens: int | None,
    factor: int,
    picture: Rectangle | None = None,
) -> Canvas:
    """The canvas of an image of `source_size` (width, height; EXIF orientation applied), or of a `picture`
    in it.

    `letterbox`: a square of side `snap(size, factor)`, the image scaled to fit and centred.
    `native`: the image's own size rounded to multiples of `factor`, scaled down to at most `max_tokens`.
    Raises ValueError for a native image that is longer than Qwen accepts.
    """
    left, top, right, bottom = picture = picture or (0, 0, *source_size)
    width, height = right - left, bottom - top
    if mode == "letterbox":
        assert size is not None
        side = snap(size, factor)
        scale = side / max(width, height)
        drawn = max(1, round(width * scale)), max(1, round(height * scale))
        canvas = side, side
    else:
        assert max_tokens is not None
        check_aspect((width, height))
        canvas = drawn = _native_size(width, height, max_tokens, factor)
    return Canvas(
        width=canvas[0],
        height=canvas[1],
        scale_x=drawn[0] / width,
        scale_y=drawn[1] / height,
        offset_x=(canvas[0] - drawn[0]) // 2,
        offset_y=(canvas[1] - drawn[1]) // 2,
        source_width=source_size[0],
        source_height=source_size[1],
        picture=picture,
    )


def canvas_of(
    source_size: Size, settings: recipe.Image, factor: int, picture: Rectangle | None = None
) -> Canvas:
    """`plan_canvas` as a recipe's `image` says, whose `crop` decides whether there is a `picture`."""
    return plan_canvas(
        source_size,
        mode=settings.mode,
        size=settings.size,
        max_tokens=settings.max_tokens,
        factor=factor,
        picture=picture if settings.crop == "border" else None,
    )


def check_aspect(source_size: Size) -> None:
    """Raises ValueError for an image that is too long for mode `native`."""
    width, height = source_size
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(
            f"{width}×{height} is too long: Qwen refuses a side of over {MAX_ASPECT} times the other; "
            "crop it, or use image.mode: letterbox"
        )


def _native_size(width: int, height: int, max_tokens: int, factor: int) -> Size:
    """transformers' `smart_resize` without its lower bound, and with two promises kept for thin images.

    There a side held at one token can leave more than `max_tokens`, and room can make the other side grow.
    """
    columns, rows = max(1, round(width / factor)), max(1, round(height / factor))
    if columns * rows > max_tokens:
        shrink = math.sqrt(width * height / (max_tokens * factor**2))
        columns = min(columns, max(1, math.floor(width / shrink / factor)))
        rows = min(rows, max(1, math.floor(height / shrink / factor)))
        columns = max(1, min(columns, max_tokens // rows))
        rows = min(rows, max_tokens // columns)
    return columns * factor, rows * factor


@dataclass(frozen=True)
class Header:
    """What an image's first bytes say of it."""

    size: Size
    """Width and height in pixels, EXIF orientation applied."""
    format: str
    """One of FORMATS."""
    mode: str
    """PIL's name of the pixels' type, such as RGB, L, P, CMYK or I;16."""
    turned: bool
    """Whether EXIF says that the picture is to be turned or mirrored."""


def header(source: bytes | BinaryIO) -> Header:
    """Read the header alone, of bytes or of an open file, no more of which is read than that takes.

    Raises ValueError with a plain message where this is no image or it is too large.
    """
    image = _open(source)
    turn = _TURNS.get(_orientation(image))
    size = (image.height, image.width) if turn in _SWAPPING else image.size
    return Header(size, str(image.format), image.mode, turn is not None)


def open_rgb(data: bytes) -> Image.Image:
    """Decode completely, turn as EXIF says, and convert to RGB as a viewer would show it.

    16-bit grey keeps its top 8 bits' worth (65535 becomes 255). Transparent pixels are put on black, which
    is what surrounds an endoscope's picture. Of an animation the first frame counts. Colour profiles are
    not applied. Raises ValueError with a plain message where any of the bytes cannot be decoded.
    """
    return upright_rgb(_open(data))


def read_rgb(image: ImageRef) -> Image.Image:
    """`open_rgb` of an image of the data. Raises BadInput naming it where it cannot be read."""
    try:
        return open_rgb(image.read())
    except (OSError, ValueError) as error:
        raise BadInput(f"image {image.key}: {error}") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """`open_rgb` for an image that PIL has opened already, or that somebody made."""
    turn = _TURNS.get(_orientation(image))  # before decoding: a decoded TIFF is already turned
    try:
        image.load()
        image = _as_rgb(image)
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error on broken data
        raise ValueError(f"cannot be decoded: {_reason(error)}") from None
    return image if turn is None else image.transpose(turn)


def draw(image: Image.Image, canvas: Canvas, fill: str) -> Image.Image:
    """The image on its canvas, centred, `fill` (a PIL colour) around it."""
    return canvas.place(canvas.scale(image), fill)


_LOOKED_AT = 256
"""The border is looked for in the image scaled down to less than twice this side, in pixels."""

_LIT = 0.02
"""A row or column belongs to a picture if more than this share of it is not black. A gap of this share of
the side parts two pictures."""

_MAIN = 0.8
"""Share of all that is not black that must be in one picture, or there is no telling which is the one."""

_LEAST = 0.2
"""The picture has at least this share of each side of the image."""


def find_picture(image: Image.Image) -> Rectangle:
    """The rectangle of an RGB image that holds its picture, without the black around it.

    A recursive X-Y cut (Nagy & Seth, ICPR 1984): black columns, then black rows, cut the image; the piece
    with the most that is not black is kept, until nothing is left to cut. So noise and burnt-in text or a
    small box beside the picture do not count, while what touches it stays. All of the image where
    nothing is black, all of it is, or no piece is clearly the picture.
    """
    shrink = max(1, max(image.size) // _LOOKED_AT)
    red, green, blue = image.reduce(shrink).split()
    brightest = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    bright = np.asarray(brightest.filter(ImageFilter.MedianFilter(3))) > BLACK
    before: Rectangle | None = None
    x1, y1, x2, y2 = 0, 0, bright.shape[1], bright.shape[0]
    while before != (x1, y1, x2, y2):
        before = x1, y1, x2, y2
        left, right = _heaviest(bright[y1:y2, x1:x2].mean(0))
        x1, x2 = x1 + left, x1 + right
        top, bottom = _heaviest(bright[y1:y2, x1:x2].mean(1))
        y1, y2 = y1 + top, y1 + bottom
    whole = (0, 0, *image.size)
    found = x1 * shrink, y1 * shrink, min(x2 * shrink, image.width), min(y2 * shrink, image.height)
    main = bright[y1:y2, x1:x2].sum() >= _MAIN * bright.sum()
    large = found[2] - found[0] >= _LEAST * image.width and found[3] - found[1] >= _LEAST * image.height
    return found if main and large else whole


def _heaviest(share: NDArray[np.float64]) -> tuple[int, int]:
    """Start and end of the run of lit rows (or columns) with the most light, of all if none is lit.

    `share` (rows,) is how much of each is not black.
    """
    lit = np.flatnonzero(share > _LIT)
    if not len(lit):
        return 0, len(share)
    runs = np.split(lit, np.flatnonzero(np.diff(lit) > max(1, _LIT * len(share))) + 1)
    run = max(runs, key=lambda run: float(share[run].sum()))
    return int(run[0]), int(run[-1]) + 1


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF tag 0x0112 → what makes the image upright."""

_SWAPPING = {_TURNS[5], _TURNS[6], _TURNS[7], _TURNS[8]}


def _open(source: bytes | BinaryIO) -> Image.Image:
    """The image with only its header read. Raises ValueError."""
    file = BytesIO(source) if isinstance(source, bytes) else source
    if not file.read(1):
        raise ValueError("is empty (0 bytes)")
    file.seek(0)
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"is not an image (none of {', '.join(FORMATS)})") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"has more than {MAX_PIXELS // 10**6} million pixels, the most allowed") from None
    except Exception as error:
        raise ValueError(f"has a broken header: {_reason(error)}") from None
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"has {image.width}×{image.height} pixels, more than the {MAX_PIXELS // 10**6} million allowed"
        )
    return image


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8 as the header gives it; 1 where there is none or it cannot be read."""
    if image.format == "TIFF":
        return 1  # PIL turns a TIFF itself, and gives its turned size from the start
    try:
        # The base class's method: PNG's own one decodes the image to look behind the pixels as well.
        return int(Image.Image.getexif(image).get(0x0112, 1))
    except Exception:  # a broken EXIF block does not make the pixels bad
        return 1


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _from_16_bit(image)
    if image.mode == "F":
        raise ValueError("its pixels are floating point; store it with 8 or 16 bits")
    if image.has_transparency_data:
        see_through = image.convert("RGBA")
        black = Image.new("RGBA", see_through.size, "black")
        return Image.alpha_composite(black, see_through).convert("RGB")
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 bits; PIL's own conversion would clip everything above 255 to white."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("its values do not fit 16 bits; store it with 8 or 16 bits")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")


def _reason(error: Exception) -> str:
    """An exception in one plain line."""
    return " ".join(str(error).split()) or type(error).__name__
