"""All questions with what was answered and what the model saw, packed for the page.

    predictions of each run, examples ── Gallery ──▶ data (gzip, base64), pictures (WebP, base64), notes

Texts are numbered once and pictures are as large as the room for all of them allows; what does not fit is
left out from the end, and errors come first.
"""

from __future__ import annotations

import base64
import bisect
import functools
import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL import Image

from surgvqa import grounding, letterbox
from surgvqa.datasets import Example, ImageRef
from surgvqa.letterbox import Canvas
from surgvqa.metrics import Prediction
from surgvqa.recipe import Recipe, printable
from surgvqa.scan import cores
from surgvqa.terminal import tracked

_SIZES = (
    (768, 80), (640, 75), (512, 72), (448, 70), (384, 66), (320, 62), (256, 58), (224, 54), (192, 50),
    (160, 45),
)  # fmt: skip
"""Longer side in pixels and WebP quality of pictures: the first with which all fit is taken."""

_TRIED = 16
"""So many pictures are made in several sizes to see which fits."""

_FRAMES = 4
"""Most pictures of a clip, beside those that have boxes."""

_DATA = 10_000_000
"""Bytes that texts and numbers may take, as they are in the page."""

_CUTS = (20_000, 2_000, 400, 100)
"""Characters after which texts are cut, the next smaller one where all of them take too much."""

_LIKELY = 5
"""So many labels are shown with their probabilities, of those that were chosen among."""

ASKED, EXPECTED, FOUND = 0, 1, 2
"""What a box is; that of a second run is 3, and so on."""

Row = tuple[Prediction | None, ...]
"""The same question as each run answered it."""


def joined(runs: Sequence[Sequence[Prediction]]) -> list[Row]:
    """One row for each question, errors first, and of these those with the surest answer.

    Questions with the same id are the same where image, texts and type are.
    """
    rows: dict[tuple[object, ...], list[Prediction | None]] = {}
    for number, predictions in enumerate(runs):
        for each in predictions:
            key = each.id, each.image, each.question, each.question_type, tuple(each.references)
            rows.setdefault(key, [None] * len(runs))[number] = each
    return sorted((tuple(row) for row in rows.values()), key=_place)


def _place(row: Row) -> tuple[bool, float]:
    wrong = [each.confidence or 0.0 for each in row if each and not each.right]
    return not wrong, -max(wrong, default=0.0)


@dataclass(frozen=True)
class Pictures:
    """Pictures by image, and where on them boxes are."""

    numbers: dict[str, int]
    """Image key → which of `content`."""
    content: list[tuple[bytes, int, int]]
    """WebP, width and height in pixels."""
    canvases: dict[str, Canvas]
    faults: dict[str, str]
    """Image key → why it cannot be shown."""
    left_out: int = 0
    side: int = 0

    @property
    def packed(self) -> str:
        return base64.b64encode(b"".join(data for data, _, _ in self.content)).decode()


NO_PICTURES = Pictures({}, [], {}, {})


def pictures(
    refs: Sequence[ImageRef], settings: Recipe, factor: int | None, room: int, *, progress: bool = False
) -> Pictures:
    """What the model saw of each image, in at most `room` bytes; the last ones are left out.

    `factor` is the model's; without it the images are shown as they are in the data.
    """
    drawn = functools.partial(_drawn, settings=settings, factor=factor)
    pool = ThreadPoolExecutor(cores())
    try:
        side, quality = _size(pool, drawn, refs, room)
        made = pool.map(functools.partial(_encoded, draw=drawn, side=side, quality=quality), refs)
        found, used = Pictures({}, [], {}, {}, side=side), 0
        left_out = 0
        shown = tracked(made, "pictures", len(refs)) if progress else made
        for ref, (data, size, canvas) in zip(refs, shown, strict=True):
            if canvas is None:
                found.faults[ref.key] = str(data)
            elif used + len(data) > room:
                left_out = len(refs) - len(found.content) - len(found.faults)
                break
            else:
                assert isinstance(data, bytes)
                used += len(data)
                found.numbers[ref.key] = len(found.content)
                found.canvases[ref.key] = canvas
                found.content.append((data, *size))
    finally:
        pool.shutdown(cancel_futures=True)
    return Pictures(found.numbers, found.content, found.canvases, found.faults, left_out, side)


def _drawn(ref: ImageRef, settings: Recipe, factor: int | None) -> tuple[Image.Image, Canvas]:
    """Raises OSError or ValueError where the image cannot be read any more."""
    source, image = letterbox.open_rgb(ref.read()), settings.image
    picture = letterbox.find_picture(source) if image.crop == "border" else None
    if factor is None:
        x1, y1, x2, y2 = picture or (0, 0, *source.size)
        canvas = Canvas(x2 - x1, y2 - y1, 1, 1, 0, 0, *source.size, (x1, y1, x2, y2))
    else:
        canvas = letterbox.canvas_of(source.size, image, factor, picture)
    return letterbox.draw(source, canvas, image.fill), canvas


def _webp(image: Image.Image, side: int, quality: int) -> tuple[bytes, letterbox.Size]:
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.BICUBIC)
    buffer = BytesIO()
    small.save(buffer, "WEBP", quality=quality)
    return buffer.getvalue(), small.size


Draw = Callable[[ImageRef], tuple[Image.Image, Canvas]]


def _encoded(
    ref: ImageRef, draw: Draw, side: int, quality: int
) -> tuple[bytes | str, letterbox.Size, Canvas | None]:
    """A picture, its size and its canvas; without a canvas, why there is none."""
    try:
        image, canvas = draw(ref)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return why, (0, 0), None
    return *_webp(image, side, quality), canvas


def _size(pool: ThreadPoolExecutor, draw: Draw, refs: Sequence[ImageRef], room: int) -> tuple[int, int]:
    """The largest size with which all pictures seem to fit, else the smallest."""

    def tried(ref: ImageRef) -> Image.Image | None:
        try:
            return draw(ref)[0]
        except (OSError, ValueError):
            return None

    sample = [each for each in pool.map(tried, refs[:: max(1, len(refs) // _TRIED)][:_TRIED]) if each]

    def fits(size: tuple[int, int]) -> bool:
        lengths = pool.map(lambda image: len(_webp(image, *size)[0]), sample)
        return 1.1 * sum(lengths) * len(refs) <= room * len(sample)

    return _SIZES[min(bisect.bisect_left(_SIZES, True, key=fits), len(_SIZES) - 1)]


def refs_of(rows: Sequence[Row], examples: Mapping[str, Example]) -> dict[str, list[tuple[int, ImageRef]]]:
    """Image key of a question → the images to show with their places in a clip, in the order of the rows.

    Only of questions that are in the data as they were when they were answered.
    """
    found: dict[str, list[tuple[int, ImageRef]]] = {}
    boxed: dict[str, set[int]] = {}
    for row in rows:
        one = _any(row)
        regions = [each for prediction in row if prediction for each in prediction.regions or []]
        boxed.setdefault(one.image, set()).update(
            each["image"] for each in (*regions, *(one.reference_regions or []))
        )
    for row in rows:
        one = _any(row)
        example = examples.get(one.id)
        if one.image in found or example is None or example.image_key != one.image:
            continue
        count = len(example.images)
        evenly = {round(place * (count - 1) / max(1, _FRAMES - 1)) for place in range(min(count, _FRAMES))}
        asked = {region.image for region in example.asked_regions}
        shown = sorted(place for place in evenly | asked | boxed[one.image] if place < count)
        found[one.image] = [(place, example.images[place]) for place in shown[: 2 * _FRAMES]]
    return found


def _any(row: Row) -> Prediction:
    return next(each for each in row if each)


@dataclass(frozen=True)
class Packed:
    data: str
    """Base64 of gzipped JSON."""
    rows: int
    """How many questions it holds, from the first on."""
    cut: int | None
    """Characters after which texts were cut, where any was."""


def pack(
    names: Sequence[str],
    rows: Sequence[Row],
    examples: Mapping[str, Example],
    refs: Mapping[str, Sequence[tuple[int, ImageRef]]],
    shown: Pictures,
) -> Packed:
    """Everything the page shows of the questions, but the pictures' bytes."""
    held = len(rows)
    for cut in (*_CUTS, *([_CUTS[-1]] * 20)):
        table = _Table(names, examples, refs, shown, cut)
        for row in rows[:held]:
            table.add(row)
        text = json.dumps(table.content(), separators=(",", ":"), ensure_ascii=False)
        data = base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()
        if len(data) <= _DATA:
            break
        if cut == _CUTS[-1]:
            held //= 2
    return Packed(data, held, cut if table.was_cut else None)


class _Table:
    """Columns of numbers; texts, types and images are numbered by when they come first."""

    def __init__(
        self,
        names: Sequence[str],
        examples: Mapping[str, Example],
        refs: Mapping[str, Sequence[tuple[int, ImageRef]]],
        shown: Pictures,
        cut: int,
    ) -> None:
        self.names, self.examples, self.refs, self.shown, self.cut = names, examples, refs, shown, cut
        self.was_cut = False
        self.texts: dict[str, int] = {}
        self._known: dict[str, int] = {}
        """A text as it was given → its number: most come many times."""
        self.types: dict[str, int] = {}
        self.images: dict[str, int] = {}
        self.frames: list[list[Any]] = []
        self.columns: dict[str, list[Any]] = {key: [] for key in ("id", "q", "t", "g", "r", "k")}
        self.runs: list[dict[str, list[Any]]] = [{"a": [], "ok": [], "p": [], "cut": []} for _ in names]
        self.boxes: dict[int, list[list[int]]] = {}

    def add(self, row: Row) -> None:
        one, number = _any(row), len(self.columns["id"])
        values = {
            "id": self._text(one.id),
            "q": self._text(one.question),
            "t": self.types.setdefault(one.question_type, len(self.types)),
            "g": self._text("" if one.group == one.image else one.group),
            "r": [self._text(reference) for reference in one.references],
            "k": self._image(one),
        }
        for key, value in values.items():
            self.columns[key].append(value)
        for run, each in zip(self.runs, row, strict=True):
            run["a"].append(self._text(each.answer) if each else -1)
            run["ok"].append(int(each.right) if each else -1)
            run["cut"] += [number] if each and each.cut else []
            odds = sorted((each.probabilities or {}).items(), key=lambda pair: -pair[1]) if each else []
            run["p"].append([[self._text(key), round(1000 * p)] for key, p in odds[:_LIKELY]] or 0)
        if boxes := list(self._boxes(one, row)):
            self.boxes[number] = boxes

    def _text(self, text: str) -> int:
        if (number := self._known.get(text)) is not None:
            return number
        shown = printable(text, keep="\n\t")
        if len(shown) > self.cut:
            shown, self.was_cut = shown[: self.cut] + " …", True
        return self._known.setdefault(text, self.texts.setdefault(shown, len(self.texts)))

    def _image(self, one: Prediction) -> int:
        if one.image not in self.images:
            self.images[one.image] = len(self.images)
            refs = self.refs.get(one.image, ())
            frames = [
                [place, self.shown.numbers[ref.key]] for place, ref in refs if ref.key in self.shown.numbers
            ]
            why = next((self.shown.faults[ref.key] for _, ref in refs if ref.key in self.shown.faults), "")
            self.frames.append([self._text(one.image), 1 + one.image.count("\n"), frames, self._text(why)])
        return self.images[one.image]

    def _boxes(self, one: Prediction, row: Row) -> Iterator[list[int]]:
        """[what, image, x1, y1, x2, y2 in thousandths of the canvas, label] of boxes on shown pictures."""
        if not self.shown.canvases:
            return
        refs = dict(self.refs.get(one.image, ()))
        example = self.examples.get(one.id)
        for place, ref in refs.items():
            every: list[tuple[int, letterbox.Box, str]] = []
            canvas = self.shown.canvases.get(ref.key)
            if canvas is None:
                continue
            if example is not None and example.image_key == one.image:
                for region in example.asked_regions:
                    if region.image == place and not region.undecided:  # its unit is for the audit to find
                        box = grounding.source_pixels(region, canvas.source_size).box
                        every.append((ASKED, canvas.to_canvas(box), region.label))
            told = [(EXPECTED, one.reference_regions)]
            told += [(FOUND + run, each.regions) for run, each in enumerate(row) if each]
            for what, regions in told:
                for found in regions or []:
                    if found["image"] == place:
                        box = canvas.to_canvas(tuple(found["box"]))
                        every.append((what, box, str(found.get("label", ""))))
            for what, (x1, y1, x2, y2), label in every:
                across, down = 1000 / canvas.width, 1000 / canvas.height
                edges = round(x1 * across), round(y1 * down), round(x2 * across), round(y2 * down)
                yield [what, place, *edges, self._text(label)]

    def content(self) -> dict[str, Any]:
        starts, start = [], 0
        for data, width, height in self.shown.content:
            starts.append([start, len(data), width, height])
            start += len(data)
        return {
            "names": [printable(name) for name in self.names],
            "texts": list(self.texts),
            "types": [printable(kind) for kind in self.types],
            "images": self.frames,
            "pictures": starts,
            "runs": self.runs,
            "boxes": self.boxes,
            **self.columns,
        }
