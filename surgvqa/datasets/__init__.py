"""Data sets as examples: one question about one or several images, with the answers that count as right.

    recipe's `data` ── load ──▶ Dataset(examples, problems)

Each corpus is one module here with a function

    read(source: Source) -> Iterator[Example | Problem]

that yields a good row as an Example and a bad one as a Problem, and raises BadInput only where nothing
can be read at all. Nothing is dropped silently; no image is opened here.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgvqa.recipe import BadInput, Data, Part, Split

MODULES = {
    "demo": "demo",
    "jsonl": "tables",
    "csv": "tables",
    "parquet": "tables",
    "kvasir_vqa": "kvasir_vqa",
    "endovis18_vqa": "endovis18_vqa",
    "coco": "coco",
}


MAX_BYTES = 2**30
"""Larger image files are refused: none is one, but a hole of any length looks like a file."""


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Where the bytes of an image are: a file of its own, or a cell of a table read with `datasets`.

    `key` names the image in messages, groups the questions of one image and tells whether two examples
    show the same one.
    """

    key: str
    path: Path | None = None
    table: Any = None
    """A `datasets.Dataset` whose `column` holds `{"bytes", "path"}`."""
    row: int = 0
    column: str = "image"

    def read(self) -> bytes:
        """The encoded bytes. Raises OSError where there are none."""
        if self.path is not None:
            if self.path.stat().st_size > MAX_BYTES:
                raise OSError(f"is larger than {MAX_BYTES >> 30} GiB")
            return self.path.read_bytes()
        cell = self.table[self.row][self.column]
        if not cell or not cell["bytes"]:
            raise OSError(f"row {self.row + 1} holds no image")
        return bytes(cell["bytes"])


Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 along pixel edges of an upright image: 0 is the left edge of the first pixel."""


@dataclass(frozen=True, slots=True)
class Region:
    """A box in one of an example's images, in source pixels, or in shares of the image's sides."""

    box: Box
    label: str = ""
    """What is in it, where the data says so."""
    image: int = 0
    """Which of the example's images, from 0."""
    relative: bool = False
    """Whether `box` runs from 0 to 1 instead of over pixels."""


@dataclass(frozen=True, slots=True)
class Example:
    """One question. `answers[0]` is trained on; a prediction may match any of them."""

    id: str
    images: tuple[ImageRef, ...]
    question: str
    answers: tuple[str, ...]
    question_type: str = "question"
    group: str = ""
    """What must not be in two parts of a split: the video, else the image."""
    split: Part | None = None
    """The part the data itself puts it in."""
    stage: int | None = None
    place: str = ""
    """File and line or row, for messages."""
    labels: tuple[str, ...] = ()
    """The closed set of its corpus's answers, where there is one."""
    regions: tuple[Region, ...] = ()
    """Boxes that are part of the answer."""
    asked_regions: tuple[Region, ...] = ()
    """Boxes that the question is about."""

    @property
    def image_key(self) -> str:
        """Examples with the same key share their images, and so a tree."""
        return "\n".join(image.key for image in self.images)

    @property
    def texts(self) -> tuple[str, ...]:
        """All that the data says in words."""
        labels = (region.label for region in (*self.asked_regions, *self.regions))
        return (self.question, *self.answers, *labels)


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one row or file. A warning does not stop a run."""

    place: str
    what: str
    warning: bool = False

    def __str__(self) -> str:
        return f"{self.place}: {self.what}"


@dataclass(frozen=True)
class Dataset:
    examples: Sequence[Example]
    problems: Sequence[Problem]

    def part(self, part: Part) -> list[Example]:
        return [example for example in self.examples if example.split == part]


def _module(format: str) -> Any:
    return importlib.import_module(f"surgvqa.datasets.{MODULES[format]}")


def load(data: Data) -> Dataset:
    """Read a recipe's data and put every example in a part.

    Raises BadInput where the data as a whole cannot be read; problems of rows are in the result.
    """
    examples: list[Example] = []
    problems: list[Problem] = []
    first_place: dict[str, str] = {}
    for number, source in enumerate(data.sources):
        before = len(examples) + len(problems)
        for row in _module(source.format).read(source):
            if isinstance(row, Problem):
                problems.append(row)
                continue
            example = _numbered(row, number) if number else row
            if example.id in first_place:
                where = first_place[example.id]
                problems.append(Problem(example.place, f"id {example.id!r} is already used at {where}"))
            else:
                first_place[example.id] = example.place
                examples.append(example)
        if len(examples) + len(problems) == before:
            raise BadInput(f"{source.path}: holds no questions")
    if data.split.by == "official":
        problems += _without_part(examples)
        examples = [example for example in examples if example.split is not None]
    else:
        examples = [replace(example, split=_part(example, data.split)) for example in examples]
    return Dataset(examples, problems)


def _numbered(example: Example, number: int) -> Example:
    """An example of a further data set, whose ids and images may have the names of others there.

    Groups keep their names: a video is the same in all data sets.
    """
    images = tuple(replace(image, key=f"{number}/{image.key}") for image in example.images)
    renamed = replace(example, id=f"{number}/{example.id}", images=images)
    return replace(renamed, group=renamed.image_key) if example.group == example.image_key else renamed


def _without_part(examples: Iterable[Example]) -> list[Problem]:
    lost = [example for example in examples if example.split is None]
    if not lost:
        return []
    return [
        Problem(
            lost[0].place,
            f"{len(lost)} rows belong to no part (this is the first): give them a split column "
            "with train, val or test, or set data.split.by to image or group",
        )
    ]


def _part(example: Example, split: Split) -> Part:
    """The part of an image or group: a pure function of its name, so that adding rows moves none.

    The first 8 bytes of SHA-256("seed:name") as a number in [0, 1): below `test` → test, below
    `test + val` → val, else train.
    """
    name = example.group if split.by == "group" and example.group else example.image_key
    digest = hashlib.sha256(f"{split.seed}:{name}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    return "test" if position < split.test else "val" if position < split.test + split.val else "train"
