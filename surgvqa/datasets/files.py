"""Rows as they stand in files: JSON lines, JSON lists, CSV, Parquet, and tables of the hub.

    file ── rows_of ──▶ Row | Problem        what the fields mean is for surgvqa.datasets.tables and others

Files are read in pieces, so that their size is no matter, and a row that cannot be read is a Problem.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from surgvqa.datasets import ImageRef, Problem
from surgvqa.recipe import BadInput

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

_PIECE = 2**20
_LONGEST = 2**26
"""Characters read from a JSON list at a time, and the most that one of its rows may have."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row as it stands in a file, nothing checked but that it is one."""

    place: str
    number: int
    """Counts from 1: the line of JSON lines, else the record, without CSV's header."""
    fields: dict[str, Any]


def rows_of(
    file: Path, needed: Sequence[str], wanted: Sequence[str] = (), image: str = "image"
) -> Iterator[Row | Problem]:
    """The rows of a file of the kind that its suffix says.

    Where the file itself names its columns (CSV, Parquet), lacking one of `needed` is a Problem, and Parquet
    yields only these and `wanted`. Images embedded in Parquet's column `image` come as ImageRefs.
    """
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        try:
            table = open_parquet([file], image)
        except ValueError as error:
            yield Problem(str(file), str(error), whole=True)
            return
        yield from table_rows(table, str(file), needed, wanted, image)
    elif suffix == ".csv":
        yield from csv_rows(file, needed)
    else:
        yield from json_rows(file) if suffix == ".json" else jsonl_rows(file)


def as_text(value: object) -> str:
    """A text or number as text without blanks around it; a missing one as "". Its case is left alone.

    Raises ValueError with what is wrong, to be put after the field's name.
    """
    if type(value) is str and value.isascii() and "\0" not in value:  # most are, and this is quick
        return value.strip()
    if value is None:
        return ""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"is {value} instead of text; fill it in or remove the row")
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"is {kind_of(value)} instead of text")
    text = str(value).strip()
    if "\0" in text:
        raise ValueError("holds a NUL byte")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds bytes that are not UTF-8") from None
    return text


def kind_of(value: object) -> str:
    """What a JSON value is, for messages."""
    names = {bool: "true or false", list: "a list", dict: "an object", bytes: "bytes", str: "text"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")


class _Decoder(json.JSONDecoder):
    """JSON in which a key given twice or an endless number leaves the rest readable; `wrong` tells of it."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._object, parse_int=self._integer)
        self.wrong = ""

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):  # of which one would be lost
            names = [name for name, _ in pairs]
            self.wrong = f"key {next(name for name in names if names.count(name) > 1)!r} is given twice"
        return fields

    def _integer(self, digits: str) -> int:
        if len(digits) <= 1000:
            return int(digits)
        self.wrong = f"a number has {len(digits)} digits"
        return 0

    def row(self, value: object, place: str, number: int) -> Row | Problem:
        """What was decoded last."""
        if self.wrong:
            return Problem(place, f"is not usable JSON: {self.wrong}")
        if not isinstance(value, dict):
            return Problem(place, f"is {kind_of(value)}; a row must be an object of columns and values")
        return Row(place, number, value)


def jsonl_rows(file: Path) -> Iterator[Row | Problem]:
    """Objects, one in a line; blank lines count but are nothing."""
    try:
        lines = file.open("rb")
    except OSError as error:
        yield Problem(str(file), f"cannot be read: {error.strerror}", whole=True)
        return
    with lines:
        name, decoder = str(file), _Decoder()
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            place = f"{name}:{number}"
            decoder.wrong = ""
            try:
                value = decoder.decode(line.rstrip(b"\r\n").decode())
            except UnicodeDecodeError:
                yield Problem(place, "is not UTF-8 text")
            except json.JSONDecodeError as error:
                yield Problem(place, f"is not valid JSON: {_told(error)} at column {error.colno}")
            except RecursionError as error:  # endless brackets
                yield Problem(place, f"is not usable JSON: {error}")
            else:
                yield decoder.row(value, place, number)


def _told(error: json.JSONDecodeError) -> str:
    """What is wrong; some of json's messages end in " at", for a place to follow."""
    return error.msg.removesuffix(" at")


def json_rows(file: Path) -> Iterator[Row | Problem]:
    """The objects of one JSON list. Past an error of syntax nothing can be read, and the Problem says so."""
    try:
        # Bytes that are not UTF-8 pass as lone surrogates here and are refused by `as_text`.
        stream = file.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
    except OSError as error:
        yield Problem(str(file), f"cannot be read: {error.strerror}", whole=True)
        return
    with stream:
        text, decoder, number = _Pieces(stream), _Decoder(), 0
        first = text.next()
        if first != "[":
            found = {"": "is empty", "{": "begins with an object"}.get(first, f"begins with {first!r}")
            hint = "; name it .jsonl if it is one object per line" if first == "{" else ""
            yield Problem(str(file), f"{found}; it must be a list of objects, in [ and ]{hint}", whole=True)
            return
        text.at += 1
        try:
            while text.next() != "]" or number:
                decoder.wrong = ""
                value = text.value(decoder)
                number += 1
                yield decoder.row(value, f"{file}: row {number}", number)
                if (mark := text.next()) == "]":
                    break
                if mark != ",":
                    raise json.JSONDecodeError("Expecting ',' or ']'", text.held, text.at)
                text.at += 1
        except json.JSONDecodeError as error:
            place = f"{file}:{text.line + error.lineno - 1}"
            column = error.colno + (text.column if error.lineno == 1 else 0)
            where = f"row {number + 1} and what follows it cannot be read"
            what = f"is not valid JSON: {_told(error)} at column {column}; {where}"
            yield Problem(place, what, whole=True)
        except RecursionError as error:
            what = f"is not usable JSON: {error}; row {number + 1} and what follows it cannot be read"
            yield Problem(str(file), what, whole=True)
        else:
            text.at += 1
            if text.next():
                yield Problem(str(file), "has text after the list's closing ]", whole=True)


class _Pieces:
    """A text file of which only a piece is held: what is before `at` has been read."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.held = ""
        self.at = 0
        self.line, self.column = 1, 0
        """Where `held` begins: its line, and how much of that comes before."""

    def _more(self) -> bool:
        piece = self._stream.read(max(_PIECE, len(self.held) - self.at))
        if not piece:
            return False
        self.line += self.held.count("\n", 0, self.at)
        newline = self.held.rfind("\n", 0, self.at)
        self.column = self.at - newline - 1 if newline >= 0 else self.column + self.at
        self.held, self.at = self.held[self.at :] + piece, 0
        return True

    def next(self) -> str:
        """The next character that is not blank, where `at` is then; "" at the end."""
        while True:
            blank = re.compile(r"[ \t\r\n]*").match(self.held, self.at)
            self.at = blank.end() if blank else self.at
            if self.at < len(self.held):
                return self.held[self.at]
            if not self._more():
                return ""

    def value(self, decoder: json.JSONDecoder) -> object:
        """The JSON value that is next. Raises JSONDecodeError, or RecursionError if it is too deep."""
        self.next()
        while True:
            try:
                value, end = decoder.raw_decode(self.held, self.at)
            except json.JSONDecodeError:
                if len(self.held) - self.at > _LONGEST or not self._more():
                    raise
            else:
                if end < len(self.held) or not self._more():  # at the end of a piece 12 may be 123
                    self.at = end
                    return value


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
                # A quotation mark too many or too few may have made one record of many.
                many = reader.line_num > line
                where = f"; what is up to line {reader.line_num} cannot be read" if many else ""
                yield Problem(place, f"is not valid CSV: {error}{where}", whole=many)
                values = []
            first, line = line, reader.line_num + 1
            if header is None:
                header = [name.strip() for name in values]
                if missing := [name for name in columns if name not in header]:
                    yield Problem(
                        place,
                        f"lacks the columns {', '.join(missing)}; it has {str(header)[1:-1]}",
                        whole=True,
                    )
                    return
                if twice := sorted({name for name in columns if header.count(name) > 1}):
                    yield Problem(place, f"has the columns {', '.join(twice)} more than once", whole=True)
                    return
            elif values:
                number += 1
                if len(values) == len(header):
                    yield Row(place, number, dict(zip(header, values, strict=True)))
                else:
                    many = line - first > 1
                    where = f", up to line {line - 1}" if many else ""
                    what = f"has {len(values)} fields instead of {len(header)}{where}"
                    yield Problem(place, what, whole=many)


def open_parquet(files: Sequence[Path], image: str = "image") -> Any:
    """A `datasets.Dataset` of Parquet files, memory-mapped from a copy in the library's cache.

    Embedded images stay encoded. Raises ValueError with what is wrong.
    """
    import datasets  # takes a second, and only tables of its kind need it; it brings no torch

    try:
        # Names are patterns to `datasets`, hence the escape.
        names = [glob.escape(str(file.resolve())) for file in files]
        return encoded(datasets.load_dataset("parquet", data_files=names, split="train"), image)
    except Exception as error:  # from pyarrow, from fsspec or from datasets itself
        raise ValueError(f"cannot be read as Parquet: {' '.join(str(error).split())}") from None


def open_hub(path: str, revision: str | None, subset: str | None = None, split: str | None = None) -> Any:
    """What `datasets.load_dataset` makes of a hub id or folder: all splits by name, or the one asked for.

    A folder may also be what its `save_to_disk` wrote. Raises BadInput where nothing can be made of it.
    """
    if not Path(path).exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise BadInput(f"{path}: no such file or folder, and no hub id such as owner/name")
    # The library passes over what is no file, such as a link into a cache that has lost it.
    tables = (file for file in Path(path).rglob("*") if file.suffix.lower() in (*SUFFIXES, ".arrow"))
    if wrong := [str(file) for file in tables if not file.is_file()]:
        raise BadInput(f"{', '.join(wrong)}: is named as a table, but is not a file")
    import datasets

    try:
        if (Path(path) / "dataset_dict.json").is_file():
            return datasets.load_from_disk(path)
        if (Path(path) / "state.json").is_file():
            return {Path(path).name: datasets.load_from_disk(path)}
        return datasets.load_dataset(
            path, *filter(None, [subset]), revision=revision, **({"split": split} if split else {})
        )
    except Exception as error:  # no network, no access, no such id, revision or subset
        what = "cannot be read" if Path(path).exists() else "is no folder here and cannot be had from the hub"
        raise BadInput(f"{path}: {what}: {' '.join(str(error).split())}") from None


def encoded(table: Any, column: str = "image") -> Any:
    """A `datasets.Dataset` whose column of embedded images, one or a list in a cell, is not decoded; one
    without any as it is."""
    import datasets

    kind = table.features.get(column)
    many = isinstance(kind, datasets.List)
    if many:
        kind = kind.feature
    embedded = isinstance(kind, (datasets.Image, dict)) or getattr(kind, "dtype", "") in (
        "binary",
        "large_binary",
    )
    image = datasets.Image(decode=False)
    return table.cast_column(column, datasets.List(image) if many else image) if embedded else table


def table_rows(
    table: Any, place: str, needed: Sequence[str], wanted: Sequence[str] = (), image: str = "image"
) -> Iterator[Row | Problem]:
    """Rows of a `datasets.Dataset` that went through `encoded`; class numbers become their names."""
    if missing := [name for name in needed if name not in table.column_names]:
        has = ", ".join(table.column_names)
        yield Problem(place, f"lacks the columns {', '.join(missing)}; it has {has}", whole=True)
        return
    names = [name for name in dict.fromkeys((*needed, *wanted)) if name in table.column_names]
    classes = {name: table.features[name] for name in names if hasattr(table.features[name], "int2str")}
    refs: dict[str, ImageRef] = {}
    number = 0
    columns = table.select_columns(names).with_format("arrow")
    for batch in columns.iter(batch_size=32):  # bounds how many images are in memory
        for fields in _read(batch):
            number += 1
            if fields is None:
                yield Problem(f"{place}: row {number}", "holds text that is not UTF-8")
                continue
            cell = fields.get(image)
            if isinstance(cell, dict):
                fields[image] = _embedded(cell, refs, ImageRef("", None, table, number - 1, image))
            elif isinstance(cell, list):
                fields[image] = [
                    _embedded(one, refs, ImageRef("", None, table, number - 1, image, index))
                    if isinstance(one, dict)
                    else one
                    for index, one in enumerate(cell)
                ]
            for name, kind in classes.items():
                known = fields[name] is not None and 0 <= fields[name] < kind.num_classes  # -1 is none
                fields[name] = kind.int2str(fields[name]) if known else None
            yield Row(f"{place}: row {number}", number, fields)


def _read(batch: Any) -> list[dict[str, Any] | None]:
    """The rows of an Arrow table; None for those whose text is not UTF-8."""
    try:
        rows: list[dict[str, Any] | None] = batch.to_pylist()
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [None]
        rows = [row for index in range(batch.num_rows) for row in _read(batch.slice(index, 1))]
    return rows


def _embedded(cell: dict[str, Any], refs: dict[str, ImageRef], ref: ImageRef) -> ImageRef | str | None:
    """A cell's image, named by its content so that one repeated in many rows is one image; else its path."""
    if not cell.get("bytes"):
        path: str | None = cell.get("path")
        return path
    key = f"sha256:{hashlib.sha256(cell['bytes']).hexdigest()[:32]}"
    return refs.setdefault(key, replace(ref, key=key))
