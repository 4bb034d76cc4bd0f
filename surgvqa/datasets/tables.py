"""Tables of one's own: JSON lines, CSV or Parquet with the columns image, question and answer.

Also for the corpora that are kept as such tables: `locate`, `csv_rows`, `open_parquet`, `as_text`.
The columns and what may be in them are described in docs/datasets.md.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import math
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from surgvqa.datasets import Example, ImageRef, Problem
from surgvqa.recipe import BadInput, Part, Source

SUFFIXES = (".jsonl", ".csv", ".parquet")

PARTS: dict[str, Part] = {"train": "train", "val": "val", "validation": "val", "test": "test"}

_PART_FILE = re.compile(r"(train|val|validation|test)(-\d+-of-\d+)?")
"""Stems that name a part; the number is how the hub names the pieces of a large file."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row as it stands in a file, nothing checked but that it is one."""

    place: str
    number: int
    """Counts from 1: the line of JSON lines, the record of CSV or Parquet without the header."""
    fields: dict[str, Any]


def read(source: Source) -> Iterator[Example | Problem]:
    """Rows of a .jsonl, .csv or .parquet file, or of the train, val and test files of a folder.

    Raises BadInput where there is no such file.
    """
    for file in _files(Path(source.path or ".")):
        yield from _examples(file, source)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise BadInput(f"{path}: is no table; its name must end in {', '.join(SUFFIXES)}")
        return [path]
    if not path.is_dir():
        what = "is neither a file nor a folder" if path.exists() else "no such file or folder"
        raise BadInput(f"{path}: {what}; give a table ({', '.join(SUFFIXES)}) or a folder of them")
    files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in SUFFIXES and file.is_file()]
    parts = [file for file in files if _part_of(file)]
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


def _part_of(file: Path) -> Part | None:
    """The part that a file's name stands for, if any."""
    match = _PART_FILE.fullmatch(file.stem)
    return PARTS[match[1]] if match else None


def _examples(file: Path, source: Source) -> Iterator[Example | Problem]:
    rows: Callable[[Path], Iterator[Row | Problem]] = {
        ".jsonl": _jsonl_rows,
        ".csv": csv_rows,
        ".parquet": _parquet_rows,
    }[file.suffix.lower()]
    images = Images(file.parent, source.roots)
    for row in rows(file):
        if isinstance(row, Problem):
            yield row
            continue
        fields = _Fields(row.fields)
        example = fields.example(row, file, images)
        if fields.wrong:
            for what in fields.wrong:
                yield Problem(row.place, what)
        else:
            yield example


class _Fields:
    """One row's fields; every fault met while reading them is added to `wrong`."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = fields
        self.wrong: list[str] = []

    def example(self, row: Row, file: Path, images: Images) -> Example:
        """The row as an example; of no use when `wrong` is not empty afterwards."""
        refs = self._images(images)
        return Example(
            id=self._optional("id") or f"{file.stem}:{row.number}",
            images=refs,
            question=self._required("question", self._fields.get("question")),
            answers=self._answers(),
            question_type=self._optional("question_type") or "question",
            group=self._optional("group") or "\n".join(ref.key for ref in refs),
            split=self._split(_part_of(file)),
            stage=self._stage(),
            place=row.place,
        )

    def _required(self, name: str, value: object) -> str:
        try:
            text = as_text(value)
        except ValueError as error:
            self.wrong.append(f"{name} {error}")
            return ""
        if not text:
            self.wrong.append(f"{name} is {'empty' if name in self._fields else 'missing'}")
        elif text.lower() == "nan":
            self.wrong.append(
                f"{name} is {text!r}, which stands for a missing value; fill it in or remove the row"
            )
        return text

    def _optional(self, name: str) -> str:
        value = self._fields.get(name)
        if isinstance(value, float) and math.isnan(value):  # how pandas writes a missing value
            return ""
        try:
            return as_text(value)
        except ValueError as error:
            self.wrong.append(f"{name} {error}")
            return ""

    def _answers(self) -> tuple[str, ...]:
        value = self._fields.get("answer")
        if not isinstance(value, list):
            return (self._required("answer", value),)
        if not value:
            self.wrong.append("answer is an empty list")
        return tuple(self._required("answer", answer) for answer in value)

    def _images(self, images: Images) -> tuple[ImageRef, ...]:
        value = self._fields.get("image")
        if isinstance(value, list) and not value:
            self.wrong.append("image is an empty list")
        refs = []
        for image in value if isinstance(value, list) else [value]:
            if isinstance(image, ImageRef):
                refs.append(image)
            elif isinstance(image, (dict, bytes)):
                self.wrong.append("image is a list of embedded images; put one image in a row, or give paths")
            elif name := self._required("image", image):
                try:
                    refs.append(images.locate(name))
                except ValueError as error:
                    self.wrong.append(f"image {name!r} {error}")
        return tuple(refs)

    def _split(self, of_file: Part | None) -> Part | None:
        name = self._optional("split")
        if not name:
            return of_file
        if name not in PARTS:
            self.wrong.append(f"split is {name!r}; it must be train, val or test")
            return None
        if of_file and PARTS[name] != of_file:
            self.wrong.append(f"split is {name!r}, but the file's name says {of_file}")
        return PARTS[name]

    def _stage(self) -> int | None:
        text = self._optional("stage").removesuffix(".0")  # how pandas writes a column with gaps
        if not text:
            return None
        if not re.fullmatch(r"-?\d{1,9}", text, re.ASCII):
            self.wrong.append(f"stage is {text!r}; it must be a whole number")
            return None
        return int(text)


def as_text(value: object) -> str:
    """A text or number as text without blanks around it; a missing one as "". Its case is left alone.

    Raises ValueError with what is wrong, to be put after the field's name.
    """
    if value is None:
        return ""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"is {value} instead of text; fill it in or remove the row")
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"is {_kind(value)} instead of text")
    text = str(value).strip()
    if "\0" in text:
        raise ValueError("holds a NUL byte")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds bytes that are not UTF-8") from None
    return text


def _kind(value: object) -> str:
    names = {bool: "true or false", list: "a list", dict: "an object", bytes: "bytes"}
    return names.get(type(value), f"a {type(value).__name__}")


class Images:
    """The images that the rows of a data set may name. Each is looked up once, and none is opened."""

    def __init__(self, folder: Path, roots: Sequence[str] = ()) -> None:
        """`folder` is the data's own; `roots` are those that the recipe's `data.roots` allows beside it."""
        self._roots = [folder.resolve(), *(Path(root).resolve() for root in roots)]
        self._known: dict[str, ImageRef | str] = {}
        self._named: dict[str, Path] = {}

    def locate(self, name: str) -> ImageRef:
        """The regular file `name`, really inside one of the folders; its key is its path in there.

        A relative name is looked for in one folder after the other; the keys of those in `roots` begin with
        that folder's name. Raises ValueError with what is wrong, to be put after the name.
        """
        if name not in self._known:
            try:
                self._known[name] = self._find(name)
            except ValueError as error:
                self._known[name] = str(error)
        found = self._known[name]
        if isinstance(found, str):
            raise ValueError(found)
        return found

    def _find(self, name: str) -> ImageRef:
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|data:", name):
            raise ValueError("is an address; download the image and give its path")
        if PureWindowsPath(name).is_absolute() and not name.startswith("/"):
            raise ValueError(f"is an absolute path of Windows; give it relative to {self._roots[0]}")
        outside = None
        for root in self._roots:
            try:
                file = (root / name).resolve()
                home = next((root for root in self._roots if file.is_relative_to(root)), None)
                if home is None:
                    outside = file
                    continue
                mode = file.stat().st_mode
                break
            except FileNotFoundError:
                continue
            except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
                raise ValueError(
                    f"cannot be looked up: {getattr(error, 'strerror', None) or error}"
                ) from None
        else:
            if outside:
                raise ValueError(
                    f"leads out of {self._roots[0]}, to {outside}; list a folder around it in data.roots if "
                    "that is meant"
                )
            hint = " (write / instead of \\)" if "\\" in name else ""
            raise ValueError(f"does not exist in {' or '.join(map(str, self._roots))}{hint}")
        if not stat.S_ISREG(mode):
            raise ValueError("is not a file" if not stat.S_ISDIR(mode) else "is a folder, not a file")
        key = file.relative_to(home if home == self._roots[0] else home.parent).as_posix()
        if (other := self._named.setdefault(key, file)) != file:
            raise ValueError(f"is {file}, which cannot be told from {other}; rename one of their folders")
        return ImageRef(key, path=file)


def _jsonl_rows(file: Path) -> Iterator[Row | Problem]:
    try:
        lines = file.open("rb")
    except OSError as error:
        yield Problem(str(file), f"cannot be read: {error.strerror}", whole=True)
        return
    with lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            place = f"{file}:{number}"
            try:
                fields = json.loads(line.decode(), object_pairs_hook=_object)
            except UnicodeDecodeError:
                yield Problem(place, "is not UTF-8 text")
            except json.JSONDecodeError as error:
                yield Problem(place, f"is not valid JSON: {error.msg} at column {error.colno}")
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, endless brackets
                yield Problem(place, f"is not usable JSON: {error}")
            else:
                if isinstance(fields, dict):
                    yield Row(place, number, fields)
                else:
                    yield Problem(
                        place, f"is {_kind(fields)}; a line must be an object with image, question, answer"
                    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a key that is there twice, of which one would be lost."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return fields


def csv_rows(file: Path, columns: Sequence[str] = ("image", "question", "answer")) -> Iterator[Row | Problem]:
    """Records of a comma-separated UTF-8 file whose first one names at least `columns`."""
    try:
        # Bytes that are not UTF-8 pass as lone surrogates here and are refused by `as_text`.
        lines = file.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
    except OSError as error:
        yield Problem(str(file), f"cannot be read: {error.strerror}", whole=True)
        return
    with lines:
        reader = csv.reader(lines, strict=True)
        header: list[str] | None = None
        number, line = 0, 1
        while True:
            place = f"{file}:{line}"
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Problem(place, f"is not valid CSV: {error}")
                values = []
            line = reader.line_num + 1
            if header is None:
                header = [name.strip() for name in values]
                if missing := [name for name in columns if name not in header]:
                    what = f"lacks the columns {', '.join(missing)}; it has {str(header)[1:-1]}"
                    yield Problem(place, what, whole=True)
                    return
                if twice := sorted({name for name in columns if header.count(name) > 1}):
                    what = f"has the columns {', '.join(twice)} more than once"
                    yield Problem(place, what, whole=True)
                    return
            elif values:
                number += 1
                if len(values) == len(header):
                    yield Row(place, number, dict(zip(header, values, strict=True)))
                else:
                    yield Problem(place, f"has {len(values)} fields instead of {len(header)}")


def open_parquet(files: Sequence[Path]) -> Any:
    """A `datasets.Dataset` of Parquet files, memory-mapped from a copy in the library's cache.

    Embedded images stay encoded. Raises ValueError with what is wrong.
    """
    import datasets  # takes a second, and only Parquet needs it; it brings no torch

    try:
        # Names are patterns to `datasets`, hence the escape.
        names = [glob.escape(str(file.resolve())) for file in files]
        return encoded(datasets.load_dataset("parquet", data_files=names, split="train"))
    except Exception as error:  # from pyarrow, from fsspec or from datasets itself
        raise ValueError(f"cannot be read as Parquet: {' '.join(str(error).split())}") from None


def encoded(table: Any, column: str = "image") -> Any:
    """A `datasets.Dataset` whose column of embedded images is not decoded; one without any as it is."""
    import datasets

    kind = table.features.get(column)
    embedded = isinstance(kind, (datasets.Image, dict)) or getattr(kind, "dtype", "") in (
        "binary",
        "large_binary",
    )
    return table.cast_column(column, datasets.Image(decode=False)) if embedded else table


def _parquet_rows(file: Path) -> Iterator[Row | Problem]:
    wanted = ["image", "question", "answer", "id", "question_type", "group", "split", "stage"]
    try:
        table = open_parquet([file])
    except ValueError as error:
        yield Problem(str(file), str(error), whole=True)
        return
    if missing := [name for name in wanted[:3] if name not in table.column_names]:
        what = f"lacks the columns {', '.join(missing)}; it has {', '.join(table.column_names)}"
        yield Problem(str(file), what, whole=True)
        return
    refs: dict[str, ImageRef] = {}
    number = 0
    columns = table.select_columns([name for name in wanted if name in table.column_names])
    for batch in columns.with_format("arrow").iter(batch_size=32):  # bounds how many images are in memory
        for fields in batch.to_pylist():
            number += 1
            if isinstance(fields["image"], dict):
                fields["image"] = _embedded(fields["image"], table, number - 1, refs)
            yield Row(f"{file}: row {number}", number, fields)


def _embedded(cell: dict[str, Any], table: Any, row: int, refs: dict[str, ImageRef]) -> ImageRef | str | None:
    """A cell's image, named by its content so that one repeated in many rows is one image; else its path."""
    if not cell["bytes"]:
        path: str | None = cell["path"]
        return path
    key = f"sha256:{hashlib.sha256(cell['bytes']).hexdigest()[:32]}"
    return refs.setdefault(key, ImageRef(key, table=table, row=row))
