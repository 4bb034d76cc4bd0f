"""Questions as a picture: what the model saw, boxes drawn on it, and below what was asked and answered."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from surgvqa import grounding, letterbox
from surgvqa.datasets import Example
from surgvqa.datasets.splits import position
from surgvqa.metrics import Prediction
from surgvqa.recipe import printable
from surgvqa.tree import Questions

COLOURS = {"asked": "yellow", "answered": "lime", "predicted": "cyan"}
"""Of boxes."""

WIDTH, MARGIN, FRAMES = 320, 8, 4
"""Pixels of a column and around it; the most images of a question that are shown."""

SIZE, LINES, LETTERS = 15, 6, 500
"""Of text: pixels, and the most lines and characters of each of question, reference and answer."""


def outline(drawn: Image.Image, box: letterbox.Box, label: str, colour: str) -> None:
    """Draw a box (x1, y1, x2, y2 along pixel edges) and what it is called."""
    pen = ImageDraw.Draw(drawn)
    x1, y1, x2, y2 = map(round, box)
    pen.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=2)
    pen.text((x1 + 4, y1 + 2), printable(label), fill=colour, stroke_width=1, stroke_fill="black")


def choose(examples: Sequence[Example], most: int, seed: int) -> list[int]:
    """Which to show: one of each question type first, of different images, drawn by the seed."""
    drawn = sorted(range(len(examples)), key=lambda index: position(examples[index].id, seed))
    types: Counter[str] = Counter()
    images: Counter[str] = Counter()
    places = {}
    for index in drawn:
        example = examples[index]
        places[index] = types[example.question_type], images[example.image_key]
        types[example.question_type] += 1
        images[example.image_key] += 1
    return sorted(drawn, key=lambda index: places[index])[:most]


class Sheet:
    """A few questions side by side, read once and drawn with whatever is answered."""

    def __init__(self, questions: Questions, chosen: Sequence[int]) -> None:
        """Raises BadInput naming an image that cannot be read."""
        self.questions, self.chosen = questions, chosen
        self.font = ImageFont.load_default(SIZE)
        self.frames = {number: self._frames(questions.examples[number]) for number in chosen}

    def _frames(self, example: Example) -> list[Image.Image]:
        frames = []
        for image in example.images[:FRAMES]:
            canvas = self.questions.canvases[image.key]
            drawn = letterbox.draw(letterbox.read_rgb(image), canvas, self.questions.fill)
            frames.append(ImageOps.contain(drawn, (WIDTH, WIDTH)))
        return frames

    def draw(self, predictions: Sequence[Prediction]) -> Image.Image:
        """RGB; `predictions` are of all questions, in order."""
        columns = [self._column(number, predictions[number]) for number in self.chosen]
        size = sum(column.width for column in columns), max(column.height for column in columns)
        sheet, x = Image.new("RGB", size, "white"), 0
        for column in columns:
            sheet.paste(column, (x, 0))
            x += column.width
        return sheet

    def _column(self, number: int, prediction: Prediction) -> Image.Image:
        frames = [
            self._outlined(number, prediction, place, frame.copy())
            for place, frame in enumerate(self.frames[number])
        ]
        more = len(self.questions.examples[number].images) - len(frames)
        texts = [
            *((line, "black") for line in self._lines(prediction.question)),
            *((line, "dimgray") for line in self._lines(f"reference: {' | '.join(prediction.references)}")),
            *(
                (line, "green" if prediction.right else "crimson")
                for line in self._lines(f"answer: {prediction.answer}")
            ),
            *([(f"({more} more images)", "dimgray")] if more else []),
        ]
        height = sum(frame.height + MARGIN for frame in frames) + len(texts) * (SIZE + 5) + 2 * MARGIN
        column, y = Image.new("RGB", (WIDTH + 2 * MARGIN, height), "white"), MARGIN
        for frame in frames:
            column.paste(frame, (MARGIN, y))
            y += frame.height + MARGIN
        pen = ImageDraw.Draw(column)
        for text, colour in texts:
            pen.text((MARGIN, y), text, fill=colour, font=self.font)
            y += SIZE + 5
        return column

    def _outlined(self, number: int, prediction: Prediction, place: int, frame: Image.Image) -> Image.Image:
        example = self.questions.examples[number]
        canvas = self.questions.canvases[example.images[place].key]
        asked = (
            (grounding.source_pixels(region, canvas.source_size).box, region.label)
            for region in example.asked_regions
            if region.image == place
        )
        for kind, boxes in (
            ("asked", asked),
            ("answered", _boxes(prediction.reference_regions, place)),
            ("predicted", _boxes(prediction.regions, place)),
        ):
            for box, label in boxes:
                x1, y1, x2, y2 = canvas.to_canvas(box)
                across, down = frame.width / canvas.width, frame.height / canvas.height
                outline(frame, (x1 * across, y1 * down, x2 * across, y2 * down), label, COLOURS[kind])
        return frame

    def _lines(self, text: str) -> list[str]:
        """The text broken at blanks, or within a word that is too long, into lines of the column's width."""
        rest, lines = printable(" ".join(text[:LETTERS].split())), list[str]()
        while rest and len(lines) < LINES:
            fits = bisect.bisect_right(
                range(1, len(rest) + 1), float(WIDTH), key=lambda end: self.font.getlength(rest[:end])
            )
            blank = rest.rfind(" ", 1, fits + 1) if fits < len(rest) else -1
            cut = blank if blank > 0 else max(1, fits)
            lines.append(rest[:cut])
            rest = rest[cut:].lstrip()
        if lines and (rest or len(text) > LETTERS):
            lines[-1] = f"{lines[-1][:-1]}…"
        return lines


def _boxes(regions: Iterable[dict[str, Any]] | None, place: int) -> list[tuple[letterbox.Box, str]]:
    """The boxes in the image at `place`, in source pixels, with their labels."""
    return [(each["box"], each["label"]) for each in regions or () if each["image"] == place]
