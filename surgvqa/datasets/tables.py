"""Tables of one's own: JSON lines, JSON lists, CSV or Parquet with the columns image, question and answer.

    Row ── Fields ──▶ Example        surgvqa.datasets.files reads the rows, .images finds the images

docs/datasets.md describes the columns and their values. What a data set has and is not used is reported: by
a warning if a question may need it, such as further images, else by a quiet Problem.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from surgvqa.datasets import Example, ImageRef, Problem, Region, boxes, choices
from surgvqa.datasets.files import (
    SUFFIXES,
    Row,
    as_text,
    csv_rows,
    encoded,
    held_in,
    is_missing,
    kind_of,
    open_parquet,
    rows_of,
)
from surgvqa.datasets.images import Images, leading_out
from surgvqa.datasets.marks import problems as problems_of_marks
from surgvqa.datasets.marks import without_marks
from surgvqa.recipe import BadInput, Part, Source

__all__ = ["Fields", "Images", "Row", "as_text", "csv_rows", "encoded", "open_parquet", "part_files", "read"]

NEEDED = ("image", "question", "answer")
OPTIONAL = ("id", "question_type", "group", "split", "stage", "box", "boxes", "asked_box", "asked_boxes")

Mapped = Mapping[str, str | list[str] | None]
"""Our name of a column → the data's name, a list of names, or None for no column: `Source.columns`."""

PARTS: dict[str, Part] = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "validate": "val", "dev": "val", "eval": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
"""Names of parts in file names, in columns and on the hub, in lower case."""

_PART_FILE = re.compile(
    rf"(?P<head>.*[-_. ])?(?P<part>{'|'.join(PARTS)})(-\d+-of-(?P<pieces>\d+)(-[0-9a-f]+)?)?", re.IGNORECASE
)
"""Stems that name a part, such as train, Kvasir-VQA-x1-train, or train-00000-of-00002-1a2b3c4d, where the
numbers are how the hub names the pieces of a large file."""

_IMAGES = re.compile(r"(images?|imgs?|pictures?)[ _-]?\d*", re.IGNORECASE)
_BOXES = re.compile(r"objects|bbox(es)?|bounding_box(es)?", re.IGNORECASE)
"""Columns (_IMAGES, too) that are warned of where they are not used: a question may need them."""


def part_named(name: str) -> Part | None:
    """Return the part that a name of a split stands for, if any."""
    return PARTS.get(name.strip().lower())


def read(source: Source) -> Iterator[Example | Problem]:
    """Rows of a table, or of the train, val and test tables of a folder.

    Raises BadInput where there is no such file.
    """
    path = Path(source.path or ".")
    files = part_files(path, roots=source.roots)
    yield from unread_files(path, files)
    for file in files:
        needed, wanted = columns(source, NEEDED, OPTIONAL)
        held = names_of(source.columns, "image")
        rows = rows_of(file, needed, [*wanted, *choices.NAMES], held)
        images = Images(file.parent, source.roots)
        yield from examples(rows, source, str(file), file.stem, part_of(file), images)


def names_of(mapped: Mapped, name: str) -> list[str]:
    """Return the data's names of one of our columns: one, several, or none if the recipe maps it to null."""
    theirs = mapped.get(name, name)
    return [] if theirs is None else [theirs] if isinstance(theirs, str) else theirs


def columns(source: Source, needed: Sequence[str], optional: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the data's names of the columns that it must have, mapped ones included, and of those it may."""
    named = source.columns
    must = [theirs for name in needed for theirs in names_of(named, name)]
    must += [theirs for name in named if name not in needed for theirs in names_of(named, name)]
    return must, [name for name in optional if name not in named]


@dataclass
class _Told:
    """Counts what the rows of a table hold that their examples leave out or show in another form."""

    seen: dict[str, None] = field(default_factory=dict)
    """The columns of all rows, in order."""
    choices: Counter[str] = field(default_factory=Counter)
    """Column → questions into which choices from it were put."""
    several: int = 0
    """Rows whose answer is a list of several different ones."""
    marks: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """question, choice, answer → marks of images that were taken out, or were left in."""

    def add(self, row: Row, fields: Fields) -> None:
        if not row.fields.keys() <= self.seen.keys():
            self.seen.update(dict.fromkeys(row.fields))
        if row.unread and row.unread[0] not in self.seen:
            self.seen.update(dict.fromkeys(row.unread))
        if fields.chosen_from:
            self.choices.update(fields.chosen_from)
        if not fields.wrong:
            self.several += fields.several
            for name, marks in fields.marks.items():
                self.marks[name].update(set(marks))

    def problems(self, place: str, source: Source) -> Iterator[Problem]:
        if self.several:
            yield self._several(place, source)
        yield from problems_of_marks(place, self.marks)
        if self.choices:
            questions = max(self.choices.values())
            what = f"questions have their choices put into them, from {', '.join(self.choices)}"
            yield Problem(place, f"{questions} {what}", warning=True, quiet=True)

    def _several(self, place: str, source: Source) -> Problem:
        """Say how answers that are lists are used; quietly if the recipe sets data.list_answers."""
        rows = f"{self.several} {'row has' if self.several == 1 else 'rows have'} a list of several answers"
        what = f"{rows}; the first is trained on, and each counts as right"
        if source.list_answers == "join":
            what = f"{rows}, joined with '; '"
        elif source.list_answers is None:
            what += "; set data.list_answers: join where all belong to the answer, else alternatives"
        return Problem(place, what, warning=True, quiet=source.list_answers is not None)


def examples(
    rows: Iterable[Row | Problem], source: Source, place: str, stem: str, part: Part | None, images: Images
) -> Iterator[Example | Problem]:
    """Rows with the columns of tables as examples: `stem` and number for those without id, `part` for those
    without split; `place` is what holds them."""
    told, known = _Told(), _Known()
    for row in rows:
        if isinstance(row, Problem):
            yield row
            continue
        fields = Fields(row.fields, source.columns)
        example = fields.example(row, stem, part, images, source, known)
        if not fields.wrong:
            variant = None if source.format == "hub" else source.variant  # there it is a subset
            try:
                example = boxes.read(example, variant, source.boxes, default="text")
            except ValueError as error:
                fields.wrong.append(f"its text has the box {error}")
        told.add(row, fields)
        if fields.wrong:
            yield from (Problem(row.place, what) for what in fields.wrong)
        else:
            yield example
    used = {theirs for name in (*NEEDED, *OPTIONAL) for theirs in names_of(source.columns, name)}
    used |= {*told.choices, *names_of(source.columns, "choices")}
    yield from unknown_columns(place, source.columns, told.seen, used)
    yield from told.problems(place, source)


def unknown_columns(
    place: str, mapped: Mapped, seen: Mapping[str, None], used: Collection[str] | None = None
) -> Iterator[Problem]:
    """Yield Problems for columns that the recipe names and no row has, and for `seen` ones not `used`.

    Those not used are warned of if their names stand for images or boxes; else the Problem is quiet.
    """
    lost = [
        f"{theirs} (for {ours})" for ours in mapped for theirs in names_of(mapped, ours) if theirs not in seen
    ]
    if seen and lost:
        yield Problem(
            place,
            f"no row has the column {', '.join(lost)} of data.columns; it has {', '.join(seen)}",
            whole=True,
        )
    if used is None:
        return
    switched_off = {ours for ours, theirs in mapped.items() if theirs is None}
    unused = [name for name in seen if name not in used and name not in switched_off]
    for form, cure in (
        (
            _IMAGES,
            "if they are images of the question, name all in order: data.columns: {image: [image, ...]}",
        ),
        (
            _BOXES,
            "if they are boxes, name them in data.columns as box or boxes, in the form of docs/datasets.md",
        ),
    ):
        if names := [name for name in unused if form.fullmatch(name)]:
            yield Problem(place, f"columns that are not used: {_listed(names)}; {cure}", warning=True)
            unused = [name for name in unused if name not in names]
    if unused:
        yield Problem(place, f"columns that are not used: {_listed(unused)}", warning=True, quiet=True)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(name[:60] for name in names[:20]) + (", ..." if len(names) > 20 else "")


def part_files(path: Path, suffixes: Sequence[str] = SUFFIXES, *, roots: Sequence[str] = ()) -> list[Path]:
    """Return the file, or the files of a folder that are named for a part, all of one kind. Raises BadInput.

    A file named as a part, such as train.json, hides one whose name ends with it, such as all_train.json.
    """
    if path.is_file():
        if path.suffix.lower() not in suffixes:
            raise BadInput(f"{path}: is no table; its name must end in {', '.join(suffixes)}")
        return [path]
    if not path.is_dir():
        what = "is neither a file nor a folder" if path.exists() else "no such file or folder"
        raise BadInput(f"{path}: {what}; give a table ({', '.join(suffixes)}) or a folder of them")
    files = _tables_in(path, suffixes)
    parts = _of_parts(files)
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
    for part in dict.fromkeys(map(part_of, parts)):
        own = [file for file in parts if part_of(file) == part]
        if len({_without_piece(file) for file in own}) > 1:
            names = ", ".join(file.name for file in own)
            raise BadInput(f"{path}: holds several tables for {part} ({names}); leave one, or give its path")
    return parts


def _tables_in(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    return [file for file in sorted(folder.iterdir()) if file.suffix.lower() in suffixes]


def _of_parts(files: Iterable[Path]) -> list[Path]:
    """Return the files that are named for a part; only those with its bare name where there are any."""
    found = {file: match for file in files if (match := _PART_FILE.fullmatch(file.stem))}
    bare = {PARTS[match["part"].lower()] for match in found.values() if not match["head"]}
    return [
        file for file, match in found.items() if not match["head"] or PARTS[match["part"].lower()] not in bare
    ]


def _without_piece(file: Path) -> str:
    """Return the name of a table of which a file may be a piece, with how many pieces that has."""
    match = _PART_FILE.fullmatch(file.stem)
    return f"{match['head'] or ''}{match['part']} {match['pieces']}".lower() if match else file.stem


def unread_files(
    path: Path, files: Collection[Path], suffixes: Sequence[str] = SUFFIXES
) -> Iterator[Problem]:
    """Yield Problems for tables of a folder that are not among the `files` read, and for missing pieces.

    The Problem is quiet for tables whose names stand for no part.
    """
    if not path.is_dir():
        return
    others = [file for file in _tables_in(path, suffixes) if file not in files]
    for of_part, why in ((False, "their names stand for no part"), (True, "another is named as their part")):
        if names := [file.name for file in others if bool(part_of(file)) == of_part]:
            what = f"tables that are not read, since {why}: {_listed(names)}"
            yield Problem(str(path), what, warning=True, quiet=not of_part)
    counts = Counter(map(_without_piece, files))
    for name, count in counts.items():
        table, _, pieces = name.rpartition(" ")
        if pieces.isdigit() and count < int(pieces):
            what = f"holds {count} of the {int(pieces)} pieces of {table}; fetch the others if you want all"
            yield Problem(str(path), what, warning=True)


def part_of(file: Path) -> Part | None:
    """Return the part that a file's name stands for, if any."""
    match = _PART_FILE.fullmatch(file.stem)
    return PARTS[match["part"].lower()] if match else None


@dataclass
class _Known:
    """Keeps what was read of earlier rows of a table, since most rows repeat their values."""

    images: dict[str, tuple[ImageRef, ...]] = field(default_factory=dict)
    """Column `image` → the image."""
    kinds: dict[tuple[Any, ...], tuple[str, Part | None, int | None]] = field(default_factory=dict)
    """Columns `question_type`, `split` and `stage` → question type, part and stage."""


_PLAIN = frozenset({str, int, type(None)})
"""Types of values that are equal only if they read alike, as 1 and 1.0 do not."""

_BOX_COLUMNS = ("box", "boxes", "asked_box", "asked_boxes")


class Fields:
    """One row's fields under our names for them; every fault met while reading is added to `wrong`."""

    def __init__(self, fields: Mapping[str, Any], columns: Mapped) -> None:
        """`columns` are our names with the row's for them, where those differ."""
        self._fields = fields
        self._columns = columns
        self.wrong: list[str] = []
        self.several = False
        """Whether the answer is a list of several."""
        self.marks: dict[str, list[str]] = {}
        """question, choice, answer → marks of images in it."""
        self.chosen_from: tuple[str, ...] = ()
        """The columns of its choices."""

    def __getitem__(self, name: str) -> Any:
        """Return the value of one of our columns; for one that is several, a list of all their values."""
        theirs = self._columns.get(name, name) if self._columns else name
        if isinstance(theirs, str):
            return self._fields.get(theirs)
        values: list[Any] = []
        for column in theirs or ():
            value = self._fields.get(column)
            values += value if isinstance(value, list) else [] if value is None or value == "" else [value]
        return values or None

    def _name(self, name: str) -> str:
        """The row's name of one of our columns."""
        return ", ".join(names_of(self._columns, name))

    def example(
        self, row: Row, stem: str, part: Part | None, images: Images, source: Source, known: _Known
    ) -> Example:
        """Return the row as an example; of no use when `wrong` is not empty afterwards.

        `known` is that of the row's table, for rows with the same `part`.
        """
        refs = self._images(images, known)
        question, answers, given = self._question(len(refs)), self._answers(), self._choices()
        if given:
            question = choices.asked(question, given)
            answers = tuple(self._labelled(answer, given) for answer in answers)
        self.several = len(set(answers)) > 1
        if source.list_answers == "join":
            answers = ("; ".join(dict.fromkeys(answers)),)
        kind, split, stage = self._kind(part, known)
        regions: tuple[Region, ...] = ()
        asked_regions: tuple[Region, ...] = ()
        if self._columns or not self._fields.keys().isdisjoint(_BOX_COLUMNS):
            regions = self._regions(("box", "boxes"), len(refs), source.boxes)
            asked_regions = self._regions(("asked_box", "asked_boxes"), len(refs), source.boxes)
        return Example(
            id=self.optional("id") or f"{stem}:{row.number}",
            images=refs,
            question=question,
            answers=answers,
            labels=() if self.several else tuple(given),
            question_type=kind,
            group=self.group(refs, source.group_pattern),
            split=split,
            stage=stage,
            place=row.place,
            regions=regions,
            asked_regions=asked_regions,
        )

    def _images(self, images: Images, known: _Known) -> tuple[ImageRef, ...]:
        """Return the images of the column `image`."""
        value = self["image"]
        if type(value) is not str:
            return self.images("image", images)
        if (refs := known.images.get(value)) is None:
            refs = self.images("image", images)
            if not self.wrong:
                known.images[value] = refs
        return refs

    def _kind(self, part: Part | None, known: _Known) -> tuple[str, Part | None, int | None]:
        """Return question type, part and stage."""
        values = self["question_type"], self["split"], self["stage"]
        plain = _PLAIN.issuperset(map(type, values))
        if plain and (found := known.kinds.get(values)) is not None:
            return found
        wrong = len(self.wrong)
        found = self.optional("question_type") or "question", self.split(part), self.stage()
        if plain and len(self.wrong) == wrong and len(known.kinds) < 100_000:
            known.kinds[values] = found
        return found

    def fault(self, name: str, what: str) -> None:
        """Note what is wrong with a field, by the name that it has in the row."""
        self.wrong.append(f"{self._name(name)} {what}")

    def missing(self, name: str) -> None:
        if not self._fields.keys().isdisjoint(names_of(self._columns, name)):
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
        if is_missing(value):
            return ""
        try:
            return as_text(value)
        except ValueError as error:
            self.fault(name, str(error))
            return ""

    def _question(self, images: int) -> str:
        """Return the question without the marks of its images."""
        text = self._bare("question", self.text("question"))
        marks = [mark for mark in self.marks.get("question", ()) if mark.lower() == "<image>"]
        if marks and len(marks) != images and not self.wrong:
            self.fault("question", f"has {len(marks)} {marks[0]}, but the row has {images} images")
        return text

    def _bare(self, name: str, text: str) -> str:
        """A field's text without marks of images, which are noted."""
        bare, marks = without_marks(text)
        if marks:
            self.marks[name] = [*self.marks.get(name, ()), *marks]
        if marks and not bare:
            self.fault(name, f"holds nothing but {marks[0]}")
        return bare

    def _answers(self) -> tuple[str, ...]:
        value = _listed_in(self["answer"])
        if not isinstance(value, list):
            return (self._bare("answer", self._required("answer", value)),)
        if not value:
            self.fault("answer", "is an empty list")
        return tuple(self._bare("answer", self._required("answer", answer)) for answer in value)

    def _choices(self) -> choices.Choices:
        """Return the row's choices; {} if it has none."""
        if self._columns.get("choices", "") is None:
            return {}
        try:
            if "choices" in self._columns:
                names = names_of(self._columns, "choices")
                if len(names) == 1:
                    found = choices.parse(self._fields.get(names[0]))
                else:
                    one = choices.single_columns(names)
                    labels = one or dict(zip(ascii_uppercase, names, strict=False))
                    found = choices.cleaned({label: self._fields.get(name) for label, name in labels.items()})
            else:
                found, names = choices.of_row(self._fields, _taken(self._columns))
        except ValueError as error:
            self.wrong.append(f"{error}; set data.columns: {{choices: null}} if it holds no choices")
            return {}
        self.chosen_from = tuple(names) if found else ()
        return {label: self._bare("choice", text) for label, text in found.items()}

    def _labelled(self, answer: str, given: choices.Choices) -> str:
        """Return the label of the choice that an answer names; "" after noting a fault."""
        if not answer:
            return ""
        try:
            return choices.label_of(answer, given)
        except ValueError as error:
            self.fault("answer", str(error))
            return ""

    def images(
        self, name: str, images: Images, mend: Mapping[str, str] | None = None
    ) -> tuple[ImageRef, ...]:
        """The images that a field names or holds: one or a list. `mend` has paths to take instead."""
        value = _listed_in(self[name])
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
        part = part_named(name)
        if part is None:
            self.fault("split", f"is {name!r}; it must be train, val or test{self._switch('split')}")
        elif of_file and part != of_file:
            self.fault("split", f"is {name!r}, but the file's name says {of_file}{self._switch('split')}")
        return part

    def _switch(self, name: str) -> str:
        """Return the advice to ignore a column, to follow what is wrong with it."""
        return f"; if the column means something else, set data.columns: {{{name}: null}}"

    def stage(self) -> int | None:
        """The row's stage."""
        text = self.optional("stage").removesuffix(".0")  # how pandas writes a column with gaps
        if not text:
            return None
        if not re.fullmatch(r"-?\d{1,9}", text, re.ASCII):
            self.fault("stage", f"is {text!r}; it must be a whole number{self._switch('stage')}")
            return None
        return int(text)

    def _regions(self, names: tuple[str, str], images: int, unit: str) -> tuple[Region, ...]:
        """The boxes of the first of the two columns, which has one, and of the second, which has a list."""
        if self[names[0]] is None and self[names[1]] is None:
            return ()
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
        if is_missing(value):
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


def _taken(mapped: Mapped) -> frozenset[str]:
    """Return the data's columns that the recipe gives one of our names."""
    return (
        frozenset(theirs for name in mapped for theirs in names_of(mapped, name)) if mapped else frozenset()
    )


def _listed_in(value: object) -> object:
    """The list of texts that a text such as `["a.png", "b.png"]` holds, as CSV has lists; else the value."""
    if not (isinstance(value, str) and re.match(r"\s*\[\s*[\"'\]]", value) and value.rstrip().endswith("]")):
        return value
    found = held_in(value.strip())
    if isinstance(found, list) and all(one is None or isinstance(one, (str, int, float)) for one in found):
        return found
    return value


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
