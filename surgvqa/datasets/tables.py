"""Tables of one's own: JSON lines, JSON lists, CSV or Parquet with the columns image, question and answer.

    Row ── Fields ──▶ Example        surgvqa.datasets.files reads the rows, .images finds the images

The columns and what may be in them are described in docs/datasets.md.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from surgvqa.datasets import Example, ImageRef, Problem, Region, boxes
from surgvqa.datasets.files import (
    SUFFIXES,
    Row,
    as_text,
    csv_rows,
    encoded,
    kind_of,
    open_parquet,
    rows_of,
)
from surgvqa.datasets.images import Images, leading_out
from surgvqa.recipe import BadInput, Part, Source

__all__ = ["Fields", "Images", "Row", "as_text", "csv_rows", "encoded", "open_parquet", "part_files", "read"]

NEEDED = ("image", "question", "answer")
OPTIONAL = ("id", "question_type", "group", "split", "stage", "box", "boxes", "asked_box", "asked_boxes")

PARTS: dict[str, Part] = {"train": "train", "val": "val", "validation": "val", "test": "test"}

_PART_FILE = re.compile(r"(train|val|validation|test)(-\d+-of-\d+)?")
"""Stems that name a part; the number is how the hub names the pieces of a large file."""


def read(source: Source) -> Iterator[Example | Problem]:
    """Rows of a table, or of the train, val and test tables of a folder.

    Raises BadInput where there is no such file.
    """
    for file in part_files(Path(source.path or "."), roots=source.roots):
        needed, wanted = columns(source, NEEDED, OPTIONAL)
        rows = rows_of(file, needed, wanted, needed[0])
        images = Images(file.parent, source.roots)
        yield from examples(rows, source, str(file), file.stem, part_of(file), images)


def columns(source: Source, needed: Sequence[str], optional: Sequence[str]) -> tuple[list[str], list[str]]:
    """A data set's own names of the columns that it must have, all it maps among them, and may have."""
    named = source.columns
    must = [named.get(name, name) for name in needed] + [named[name] for name in optional if name in named]
    return must, [name for name in optional if name not in named]


def examples(
    rows: Iterable[Row | Problem], source: Source, place: str, stem: str, part: Part | None, images: Images
) -> Iterator[Example | Problem]:
    """Rows with the columns of tables as examples: `stem` and number for those without id, `part` for those
    without split; `place` is what holds them."""
    seen: dict[str, None] = {}
    for row in rows:
        if isinstance(row, Problem):
            yield row
            continue
        if not row.fields.keys() <= seen.keys():
            seen.update(dict.fromkeys(row.fields))
        fields = Fields(row.fields, source.columns)
        example = fields.example(row, stem, part, images, source.group_pattern, source.boxes)
        if source.format != "hub" and not fields.wrong:  # whose variant is a subset
            try:
                example = boxes.read(example, source.variant, source.boxes, default="text")
            except ValueError as error:
                fields.wrong.append(f"its text has the box {error}")
        if fields.wrong:
            yield from (Problem(row.place, what) for what in fields.wrong)
        else:
            yield example
    yield from unknown_columns(place, source.columns, seen)


def unknown_columns(place: str, mapped: Mapping[str, str], seen: Mapping[str, None]) -> Iterator[Problem]:
    """Columns that the recipe names and no row has, of files in which each row names its columns."""
    if seen and (lost := [f"{name} (for {ours})" for ours, name in mapped.items() if name not in seen]):
        yield Problem(
            place,
            f"no row has the column {', '.join(lost)} of data.columns; it has {', '.join(seen)}",
            whole=True,
        )


def part_files(path: Path, suffixes: Sequence[str] = SUFFIXES, *, roots: Sequence[str] = ()) -> list[Path]:
    """The file, or the files of a folder that are named for a part, all of one kind. Raises BadInput."""
    if path.is_file():
        if path.suffix.lower() not in suffixes:
            raise BadInput(f"{path}: is no table; its name must end in {', '.join(suffixes)}")
        return [path]
    if not path.is_dir():
        what = "is neither a file nor a folder" if path.exists() else "no such file or folder"
        raise BadInput(f"{path}: {what}; give a table ({', '.join(suffixes)}) or a folder of them")
    files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in suffixes]
    parts = [file for file in files if part_of(file)]
    if out := leading_out(parts, path, roots):
        raise BadInput(out)
    if wrong := [str(file) for file in parts if not file.is_file()]:
        raise BadInput(f"{', '.join(wrong)}: is named as a table, but is not a file")
    if not parts:
        found = ", ".join(file.name for file in files[:5]) or "no table at all"
        raise BadInput(
            f"{path}: holds no train, val or test table such as train.jsonl; found {found}. "
            "Name the files so, or give the path of one file"
        )
    if len({file.suffix.lower() for file in parts}) > 1:
        names = ", ".join(file.name for file in parts)
        raise BadInput(f"{path}: holds tables of several kinds ({names}); leave those of one kind")
    return parts


def part_of(file: Path) -> Part | None:
    """The part that a file's name stands for, if any."""
    match = _PART_FILE.fullmatch(file.stem)
    return PARTS[match[1]] if match else None


class Fields:
    """One row's fields under our names for them; every fault met while reading is added to `wrong`."""

    def __init__(self, fields: Mapping[str, Any], columns: Mapping[str, str]) -> None:
        """`columns` are our names with the row's for them, where those differ."""
        self._fields = fields
        self._columns = columns
        self.wrong: list[str] = []

    def __getitem__(self, name: str) -> Any:
        if self._columns:
            name = self._columns.get(name, name)
        return self._fields.get(name)

    def example(
        self,
        row: Row,
        stem: str,
        part: Part | None,
        images: Images,
        pattern: str | None = None,
        unit: str = "auto",
    ) -> Example:
        """The row as an example; of no use when `wrong` is not empty afterwards. `unit` is `data.boxes`."""
        refs = self.images("image", images)
        return Example(
            id=self.optional("id") or f"{stem}:{row.number}",
            images=refs,
            question=self.text("question"),
            answers=self._answers(),
            question_type=self.optional("question_type") or "question",
            group=self.group(refs, pattern),
            split=self.split(part),
            stage=self.stage(),
            place=row.place,
            regions=self._regions(("box", "boxes"), len(refs), unit),
            asked_regions=self._regions(("asked_box", "asked_boxes"), len(refs), unit),
        )

    def fault(self, name: str, what: str) -> None:
        """Note what is wrong with a field, by the name that it has in the row."""
        self.wrong.append(f"{self._columns.get(name, name)} {what}")

    def missing(self, name: str) -> None:
        if self._columns.get(name, name) in self._fields:
            self.fault(name, "is empty")
        else:
            has = ", ".join(map(str, self._fields)) or "nothing"
            self.fault(name, f"is missing; the row has {has[:200]}")

    def text(self, name: str) -> str:
        """A field that must have text."""
        return self._required(name, self[name])

    def _required(self, name: str, value: object) -> str:
        try:
            text = as_text(value)
        except ValueError as error:
            self.fault(name, str(error))
            return ""
        if not text:
            self.missing(name)
        elif text.lower() == "nan":
            self.fault(name, f"is {text!r}, which stands for a missing value; fill it in or remove the row")
        return text

    def optional(self, name: str) -> str:
        """A field's text, or "" where it has none."""
        value = self[name]
        if value is None or (isinstance(value, float) and math.isnan(value)):  # NaN: pandas' missing value
            return ""
        try:
            return as_text(value)
        except ValueError as error:
            self.fault(name, str(error))
            return ""

    def _answers(self) -> tuple[str, ...]:
        value = self["answer"]
        if not isinstance(value, list):
            return (self._required("answer", value),)
        if not value:
            self.fault("answer", "is an empty list")
        return tuple(self._required("answer", answer) for answer in value)

    def images(
        self, name: str, images: Images, mend: Mapping[str, str] | None = None
    ) -> tuple[ImageRef, ...]:
        """The images that a field names or holds: one or a list. `mend` has paths to take instead."""
        value = self[name]
        if isinstance(value, list) and not value:
            self.fault(name, "is an empty list")
        refs = []
        for image in value if isinstance(value, list) else [value]:
            if isinstance(image, ImageRef):
                refs.append(image)
            elif isinstance(image, (dict, bytes)):
                self.fault(name, f"holds {kind_of(image)} instead of a path; only Parquet may embed images")
            elif path := self._required(name, image):
                try:
                    refs.append(images.locate((mend or {}).get(path, path)))
                except ValueError as error:
                    self.fault(name, f"{path!r} {error}")
        return tuple(refs)

    def group(self, refs: Sequence[ImageRef], pattern: str | None) -> str:
        """The row's group, else what the pattern's parentheses match in the images' keys, else these."""
        if given := self.optional("group"):
            return given
        key = "\n".join(ref.key for ref in refs)
        if pattern is None or not refs:
            return key
        if not (found := re.search(pattern, key)):
            self.wrong.append(f"data.group_pattern {pattern!r} matches nothing in {key!r}")
            return key
        return "/".join(filter(None, found.groups()))

    def split(self, of_file: Part | None) -> Part | None:
        """The part that the row says, else that of its file."""
        name = self.optional("split")
        if not name:
            return of_file
        if name not in PARTS:
            self.fault("split", f"is {name!r}; it must be train, val or test")
            return None
        if of_file and PARTS[name] != of_file:
            self.fault("split", f"is {name!r}, but the file's name says {of_file}")
        return PARTS[name]

    def stage(self) -> int | None:
        """The row's stage."""
        text = self.optional("stage").removesuffix(".0")  # how pandas writes a column with gaps
        if not text:
            return None
        if not re.fullmatch(r"-?\d{1,9}", text, re.ASCII):
            self.fault("stage", f"is {text!r}; it must be a whole number")
            return None
        return int(text)

    def _regions(self, names: tuple[str, str], images: int, unit: str) -> tuple[Region, ...]:
        """The boxes of the first of the two columns, which has one, and of the second, which has a list."""
        one, many = self._boxes(names[0]), self._boxes(names[1])
        if one is None and many is None:
            return ()
        if one is not None and many is not None:
            self.fault(names[0], f"and {names[1]} are both given; keep one of them")
            return ()
        name, value = (names[0], [one]) if one is not None else (names[1], many)
        if not isinstance(value, list):
            self.fault(name, f"is {kind_of(value)} instead of a list of boxes")
            return ()
        regions = []
        for box in value:
            try:
                regions.append(region(box, images, unit))
            except ValueError as error:
                self.fault(name, f"{json.dumps(box, default=str)[:80]} {error}")
        return tuple(regions)

    def _boxes(self, name: str) -> object:
        """A column's boxes, taken out of the text that CSV has; None where there are none."""
        value = self[name]
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return None
        if not isinstance(value, str):
            return value
        if not value.strip():
            return None
        text = value.strip()
        try:
            found: object = json.loads(text if text[0] in "[{" else f"[{text}]")
        except (ValueError, RecursionError):
            return text
        return found


def region(value: object, images: int = 1, unit: str = "auto") -> Region:
    """`[x1, y1, x2, y2]`, or an object with that as `box` and maybe `label` and `image`, as a Region.

    With the `unit` auto four numbers from 0 to 1 are shares of the image's sides, others are pixels. Raises
    ValueError with what is wrong, to be put after the box; `images` is how many the example has.
    """
    extra = value if isinstance(value, dict) else {"box": value}
    if unknown := sorted(map(str, extra.keys() - {"box", "label", "image"})):
        raise ValueError(f"has the key {unknown[0]}; a box may have box, label and image")
    numbers, image = extra.get("box"), extra.get("image")
    if not isinstance(numbers, list) or len(numbers) != 4 or not all(map(is_coordinate, numbers)):
        raise ValueError("is no box; it must be four numbers, [x1, y1, x2, y2]")
    image = 0 if image is None else image
    if type(image) is not int or not 0 <= image < max(images, 1):
        raise ValueError(f"is in image {image!r}, but the row has {images}, counted from 0")
    box, relative = boxes.measured(numbers, unit)
    return Region(box, as_text(extra.get("label")), image, relative)


def is_coordinate(value: object) -> bool:
    """Whether it is a coordinate: not NaN, and not beyond what an image could have."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e9 < value < 1e9
