"""Data sets as examples: one question about one or several images, with the answers that count as right.

    recipe's `data` ── load ──▶ Dataset(examples, problems)

Each corpus is one module here with a function

    read(source: Source) -> Iterator[Example | Problem]

that yields a good row as an Example and a bad one as a Problem, and raises BadInput only where nothing
can be read at all. Nothing is dropped silently; no image is opened here.
"""

from __future__ import annotations

import importlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from surgvqa.recipe import MAPPED, BadInput, Data, Part
from surgvqa.terminal import tracked

MODULES = {
    "demo": "demo",
    "jsonl": "tables",
    "csv": "tables",
    "parquet": "tables",
    "json": "tables",
    "hub": "hub",
    "llava": "conversations",
    "messages": "conversations",
    "kvasir_vqa_x1": "kvasir_vqa_x1",
    "real_colon_vqa": "real_colon_vqa",
    "surgvu25": "surgvu25",
    "kvasir_vqa": "kvasir_vqa",
    "endovis18_vqa": "endovis18_vqa",
    "endovis18_vqla": "endovis_vqla",
    "endovis17_vqla": "endovis_vqla",
    "cholec80_vqa": "cholec80_vqa",
    "surgicalgpt": "surgicalgpt",
    "psi_ava_vqa": "psi_ava_vqa",
    "ssg_vqa": "ssg_vqa",
    "pitvqa": "pitvqa",
    "coco": "coco",
}

LEAKY = frozenset({"kvasir_vqa_x1"})
"""Corpora whose own split has images in several parts: told, not refused."""

MAX_BYTES = 2**30
"""Larger image files are refused: none is one, but a hole of any length looks like a file."""


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Where the bytes of an image are: a file of its own, a cell of a table read with `datasets`, or memory.

    `key` names the image in messages, groups the questions of one image and tells whether two examples
    show the same one.
    """

    key: str
    path: Path | None = None
    table: Any = None
    """A `datasets.Dataset` whose `column` holds `{"bytes", "path"}`."""
    row: int = 0
    column: str = "image"
    index: int = 0
    """Which image of the cell, where it holds a list."""
    data: bytes | None = field(default=None, repr=False)
    """The encoded bytes themselves, of an image in memory."""

    def read(self) -> bytes:
        """The encoded bytes. Raises OSError where there are none."""
        if self.data is not None:
            return self.data
        if self.path is not None:
            if self.path.stat().st_size > MAX_BYTES:
                raise OSError(f"is larger than {MAX_BYTES >> 30} GiB")
            return self.path.read_bytes()
        cell = self.table[self.row][self.column]
        if isinstance(cell, list):
            cell = cell[self.index]
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
    of: tuple[int, int] | None = None
    """Width and height of the image whose pixels these are, where the corpus says so."""
    bare: bool = False
    """Whether it is written as `[x1, y1, x2, y2]` alone, inside JSON of the data's own."""
    undecided: str = ""
    """The recipe key that must say whether `box` is in pixels or thousandths; "" once that is known."""
    notation: str = ""
    """Notation of the text that it was read from; "" if it comes from a column or an annotation."""


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
    layout: str = ""
    """`answers[0]` with `<box>` at the place of each of `regions`; "" if they follow the words."""
    doubtful: str = ""
    """Four numbers in brackets from its texts that may be a box but were not read as one; "" if none."""
    context: tuple[tuple[Example, str], ...] = ()
    """Earlier questions about the images and their answers, which the model reads ahead of the question."""

    @property
    def image_key(self) -> str:
        """Examples with the same key share their images, and so a tree."""
        if len(self.images) == 1:
            return self.images[0].key
        return "\n".join(image.key for image in self.images)

    def prompt(self, instructions: Mapping[str, str]) -> str:
        """What is asked in words: earlier questions with their answers, the question, and its type's
        instruction, each on a line."""
        if not self.context and self.question_type not in instructions:
            return self.question
        earlier = [f"{other.question} {answer}" for other, answer in self.context]
        return "\n".join(filter(None, (*earlier, self.question, instructions.get(self.question_type))))

    @property
    def texts(self) -> tuple[str, ...]:
        """All that the data says in words."""
        texts = (self.question, *self.answers)
        if self.asked_regions or self.regions:
            texts += tuple(region.label for region in (*self.asked_regions, *self.regions))
        if self.context:
            texts += tuple(text for other, answer in self.context for text in (*other.texts, answer))
        return texts


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one row or file. A warning does not stop a run."""

    place: str
    what: str
    warning: bool = False
    whole: bool = False
    """Whether it is about a table or all of the data: nothing that `data.on_error: skip` can leave out."""
    images: tuple[str, ...] = ()
    """Keys of images to look at."""
    quiet: bool = False
    """Whether it only names unused data, for `surgvqa check` to list, and is no warning."""

    def __post_init__(self) -> None:
        """What is no UTF-8 in the data is escaped, so that a problem can be written anywhere."""
        for name in ("place", "what"):
            text = getattr(self, name).encode("utf-8", "backslashreplace").decode()
            object.__setattr__(self, name, text)  # frozen

    def __str__(self) -> str:
        return f"{self.place}: {self.what}"


def type_of(question: str, forms: Mapping[str, str]) -> str:
    """The question type of the first of `forms` (regular expression for how a question begins → type) that
    fits, its case aside; else `other`."""
    return next((kind for form, kind in forms.items() if re.match(form, question, re.IGNORECASE)), "other")


@dataclass(frozen=True)
class Dataset:
    examples: Sequence[Example]
    problems: Sequence[Problem]
    unused: Sequence[str] = ()
    """Unused data, such as files, columns and further answers, each with its place."""
    leaky: bool = False
    """Whether its split is a corpus's own that is known to have images in several parts."""

    def part(self, part: Part) -> Sequence[Example]:
        return self._by_part.get(part, ())

    @cached_property
    def _by_part(self) -> dict[Part | None, list[Example]]:
        found: dict[Part | None, list[Example]] = defaultdict(list)
        for example in self.examples:
            found[example.split].append(example)
        return dict(found)


def in_context(examples: Sequence[Example], answers: Mapping[str, str]) -> list[Example]:
    """The examples, each with the questions about the same images that are of an earlier stage, and their
    answers.

    `answers` are by id; a question without one is left out. Those of a lower stage come first, and of one
    stage in the order of `examples`.
    """
    told: dict[str, list[Example]] = defaultdict(list)
    for example in sorted(examples, key=lambda example: example.stage or 0):
        if example.id in answers:
            told[example.image_key].append(example)
    return [
        replace(
            example,
            context=tuple(
                (other, " ".join(answers[other.id].split()))
                for other in told[example.image_key]
                if (other.stage or 0) < (example.stage or 0)
            ),
        )
        for example in examples
    ]


def normalise(answer: str) -> str:
    """Return the form in which answers are compared: NFKC, single blanks, and the set of `;`-parts, each
    without final full stops.

    Full stops are `.` and the marks of other scripts that Unicode calls sentence terminals and that end
    statements: Armenian, Urdu, Devanagari (danda and double danda), Ethiopic, Khmer, Burmese and Chinese or
    Japanese ones. NFKC makes full-width and half-width forms one of these, and an ellipsis three dots. `?`
    and `!` stay, and so does case: some data sets have labels that differ in nothing else.
    """
    stops = ".\u0589\u06d4\u0964\u0965\u104b\u1362\u17d4\u17d5\u3002"
    text = " ".join(unicodedata.normalize("NFKC", answer).split())
    parts = sorted({part.strip().rstrip(stops).strip() for part in text.split(";")} - {""})
    return "; ".join(parts) or text


def _module(format: str) -> Any:
    return importlib.import_module(f"surgvqa.datasets.{MODULES[format]}")


def load(data: Data, *, progress: bool = False) -> Dataset:
    """Read a recipe's data and put every example in a part; `progress` shows how many rows were read.

    Raises BadInput where the data as a whole cannot be read; problems of rows are in the result.
    """
    examples: list[Example] = []
    problems: list[Problem] = []
    unused: list[str] = []
    first_place: dict[str, str] = {}
    shared = _Shared()
    for number, source in enumerate(data.sources):
        known, told = len(examples), len(problems)
        rows: Iterable[Example | Problem] = _module(source.format).read(source)
        if progress:
            rows = tracked(rows, f"reading {Path(source.path or source.format).name}", of="rows")
        for row in rows:
            if isinstance(row, Problem):
                if row.quiet:
                    unused.append(str(row))
                else:
                    problems.append(row)
                continue
            example = _numbered(row, number) if number else row
            if example.id in first_place:
                where = first_place[example.id]
                what = f"id {example.id!r} is already used at {where}"
                if source.format in MAPPED:
                    what += "; if the column names no question, set data.columns: {id: null}"
                problems.append(Problem(example.place, what))
            else:
                first_place[example.id] = example.place
                examples.append(shared(example))
        if len(examples) + len(problems) == known + told:
            raise BadInput(f"{source.path}: holds no questions")
        if len(examples) == known and all(problem.warning for problem in problems[told:]):
            problems.append(Problem(source.path or source.format, "holds no questions", whole=True))
    from surgvqa.datasets import splits  # which imports from here

    examples, found = splits.apply(examples, data.split)
    problems += found
    if data.stages:
        examples, found = _of_stages(examples, data.stages)
        problems += found
    leaky = data.split.by == "official" and all(source.format in LEAKY for source in data.sources)
    return Dataset(examples, problems, unused, leaky)


class _Shared:
    """Replaces equal values of many examples by one object, which halves the memory of a million examples."""

    FIELDS = ("images", "question", "answers", "question_type", "group", "labels")

    def __init__(self) -> None:
        self._known: dict[object, object] = {}

    def __call__(self, example: Example) -> Example:
        """Share the example's values and return it. It is frozen but changed in place, as it is still new."""
        known = self._known
        for name in self.FIELDS:
            value = getattr(example, name)
            # Images are looked up by their key, since hashing a path is slow.
            key = (example.image_key, len(value)) if name == "images" else value
            first = known.setdefault(key, value)
            if first is not value and (name != "images" or first == value):
                object.__setattr__(example, name, first)
        return example


def _of_stages(examples: list[Example], stages: Sequence[int]) -> tuple[list[Example], list[Problem]]:
    """The examples of these stages; a warning counts the others."""
    wanted, key = set(stages), f"data.stages: {list(stages)}"
    problems = [Problem(e.place, f"has no stage, which {key} needs") for e in examples if e.stage is None]
    found = Counter(example.stage for example in examples if example.stage is not None)
    if found and (lacking := sorted(wanted - found.keys())):
        has = ", ".join(map(str, sorted(found)))
        what = f"no question is of stage {', '.join(map(str, lacking))}; the data has {has}"
        problems.append(Problem("data.stages", what, whole=True))
    left = sorted(found.keys() - wanted)
    if left:
        others = ", ".join(f"{found[stage]} of stage {stage}" for stage in left)
        problems.append(Problem("data.stages", f"leaves out {others} as asked", warning=True))
    return [example for example in examples if example.stage in wanted], problems


def _numbered(example: Example, number: int) -> Example:
    """An example of a further data set, whose ids and images may have the names of others there.

    Groups keep their names: a video is the same in all data sets.
    """
    # Two slashes are in no path, so no image of the first data set has such a key.
    images = tuple(replace(image, key=f"{number}//{image.key}") for image in example.images)
    renamed = replace(example, id=f"{number}/{example.id}", images=images)
    if any(region.undecided for region in (*example.regions, *example.asked_regions)):
        key = f"data.more.{number - 1}.boxes"
        regions, asked = (
            tuple(replace(each, undecided=key) if each.undecided else each for each in boxes)
            for boxes in (example.regions, example.asked_regions)
        )
        renamed = replace(renamed, regions=regions, asked_regions=asked)
    return replace(renamed, group=renamed.image_key) if example.group == example.image_key else renamed
