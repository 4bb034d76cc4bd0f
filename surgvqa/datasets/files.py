"""Rows as they stand in files: JSON lines, JSON lists, CSV, Parquet, and tables of the hub.

    file ── rows_of ──▶ Row | Problem        what the fields mean is for surgvqa.datasets.tables and others

Files are read in pieces, so that their size is no matter, and a row that cannot be read is a Problem.
"""

from __future__ import annotations

import ast
import csv
import glob
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, TextIO

from surgvqa.datasets import ImageRef, Problem
from surgvqa.datasets.remote import unreachable
from surgvqa.recipe import BadInput

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")

_PIECE = 2**20
_LONGEST = 2**26
"""Characters read from a JSON list at a time, and the most that a row may have."""

_READ = (*SUFFIXES, ".arrow", ".txt", ".md", ".yaml", ".yml")
"""Suffixes of the files in a folder for the hub whose content decides what is read."""

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True, slots=True)
class Row:
    """A row as it stands in a file, nothing checked but that it is one."""

    place: str
    number: int
    """Counts from 1: the line of JSON lines, else the record, without CSV's header."""
    fields: dict[str, Any]
    unread: tuple[str, ...] = ()
    """Further columns of its table, which were not asked for."""


def rows_of(
    file: Path, needed: Sequence[str], wanted: Sequence[str] = (), image: str | Sequence[str] = "image"
) -> Iterator[Row | Problem]:
    """Yield the rows of a file of the kind that its suffix says.

    Where the file itself names its columns (CSV, Parquet), lacking one of `needed` is a Problem, and Parquet
    yields only these and `wanted`. Images embedded in the columns `image` of Parquet are ImageRefs.
    """
    suffix = file.suffix.lower()
    if is_lfs_pointer(file):
        what = "is a Git LFS pointer, not the data; fetch it with `git lfs pull` in its folder"
        yield Problem(str(file), what, whole=True)
    elif suffix == ".parquet":
        try:
            table = open_parquet([file], image)
        except ValueError as error:
            yield Problem(str(file), str(error), whole=True)
            return
        yield from table_rows(table, str(file), needed, wanted, image)
    elif suffix in (".csv", ".tsv"):
        yield from csv_rows(file, needed, wanted)
    else:
        yield from json_rows(file) if suffix == ".json" else jsonl_rows(file)


def is_lfs_pointer(file: Path) -> bool:
    """Return whether a file is the pointer that Git LFS leaves in place of a file it has not fetched."""
    try:
        with file.open("rb") as stream:
            return stream.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return False


def is_missing(value: object) -> bool:
    """Return whether a cell holds nothing: None, or NaN, which pandas writes for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


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


_STRING = re.compile(r"""('(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*")(\s*(?=['"]))?""")
"""A string as Python prints it, and what is before another one that no comma parts from it."""


def held_in(text: str) -> list[Any] | dict[str, Any] | None:
    """Return the list or object that a text holds as JSON, or as Python or NumPy print it; None for others.

    NumPy prints `['knife' 'hook']`, without commas.
    """
    for parse, form in (
        (json.loads, text),
        (ast.literal_eval, _STRING.sub(lambda found: found[1] + "," * (found[2] is not None), text)),
    ):
        try:
            value = parse(form)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, (list, dict)):
            return value
    return None


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
        name, number, decoder = str(file), 0, _Decoder()
        while line := lines.readline(_LONGEST + 1):
            number += 1
            place = f"{name}:{number}"
            if len(line) > _LONGEST:
                yield Problem(place, _TOO_LONG)
                _skip_line(lines, line)
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
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


_TOO_LONG = f"is a row of more than {_LONGEST >> 20} MiB; no question is so long"


def _skip_line(stream: IO[Any], line: str | bytes) -> None:
    """Read on to the end of a line of which `line` is the first piece."""
    end = line[:0] + (b"\n" if isinstance(line, bytes) else "\n")  # type: ignore[operator]  # of one kind
    while line and not line.endswith(end):  # type: ignore[arg-type]
        line = stream.readline(_PIECE)


def _told(error: json.JSONDecodeError) -> str:
    """What is wrong; some of json's messages end in " at", for a place to follow."""
    return error.msg.removesuffix(" at")


def json_rows(file: Path) -> Iterator[Row | Problem]:
    """Yield the objects of one JSON list, or of one object of objects, whose keys are their default ids.

    Past an error of syntax nothing can be read, and the Problem says so.
    """
    try:
        # Bytes that are not UTF-8 pass as lone surrogates here and are refused by `as_text`.
        stream = file.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
    except OSError as error:
        yield Problem(str(file), f"cannot be read: {error.strerror}", whole=True)
        return
    with stream:
        text, number = _Pieces(stream), 0
        first = text.next()
        if first not in ("[", "{"):
            found = f"begins with {first!r}" if first else "is empty"
            yield Problem(str(file), f"{found}; it must be a list of objects, in [ and ]", whole=True)
            return
        try:
            for row in _elements(text, file, first == "{"):
                number += 1
                yield row
                if isinstance(row, Problem) and row.whole:
                    return
        except json.JSONDecodeError as error:
            place = f"{file}:{text.line + error.lineno - 1}"
            column = error.colno + (text.column if error.lineno == 1 else 0)
            where = f"row {number + 1} and what follows it cannot be read"
            what = f"is not valid JSON: {_told(error)} at column {column}; {where}"
            yield Problem(place, what, whole=True)
        except RecursionError as error:
            what = f"is not usable JSON: {error}; row {number + 1} and what follows it cannot be read"
            yield Problem(str(file), what, whole=True)
        except OverflowError:
            what = f"{_TOO_LONG}; row {number + 1} and what follows it cannot be read"
            yield Problem(f"{file}:{text.line}", what, whole=True)
        else:
            text.at += 1
            if text.next():
                end = "object's closing }" if first == "{" else "list's closing ]"
                yield Problem(str(file), f"has text after the {end}", whole=True)


def _elements(text: _Pieces, file: Path, keyed: bool) -> Iterator[Row | Problem]:
    """Yield the rows of the list, or of the object if `keyed`, that begins at `text.at`; go on to its end.

    Raises JSONDecodeError, RecursionError, and OverflowError where a row is too long.
    """
    decoder, number, last = _Decoder(), 0, "}" if keyed else "]"
    text.at += 1
    while text.next() != last or number:
        decoder.wrong, key = "", None
        if keyed:
            key = text.value(decoder)
            if not isinstance(key, str):
                raise json.JSONDecodeError("Expecting a name in quotation marks", text.held, text.at)
            text.pass_by(":")
        value = text.value(decoder)
        number += 1
        if keyed and not isinstance(value, dict):
            what = (
                f"begins with an object whose {key!r} is {kind_of(value)}; it must be a list of objects, "
                "in [ and ], or an object of objects; name it .jsonl if it is one object per line"
            )
            yield Problem(str(file), what, whole=True)
            return
        row = decoder.row(value, f"{file}: row {number}", number)
        if keyed and isinstance(row, Row):
            row.fields.setdefault("id", key)
        yield row
        if text.next() == last:
            break
        text.pass_by(",", f"',' or '{last}'")


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

    def pass_by(self, mark: str, expected: str = "") -> None:
        """Go past a mark. Raises JSONDecodeError where something else is next."""
        if self.next() != mark:
            raise json.JSONDecodeError(f"Expecting {expected or repr(mark)}", self.held, self.at)
        self.at += 1

    def value(self, decoder: json.JSONDecoder) -> object:
        """Return the JSON value that is next.

        Raises JSONDecodeError, RecursionError if it is too deep, or OverflowError if it is too long.
        """
        self.next()
        while True:
            try:
                value, end = decoder.raw_decode(self.held, self.at)
            except json.JSONDecodeError:
                if len(self.held) - self.at > _LONGEST:
                    raise OverflowError from None
                if not self._more():
                    raise
            else:
                if end < len(self.held) or not self._more():  # at the end of a piece 12 may be 123
                    self.at = end
                    return value


class _Lines:
    """Counts the lines of a text file and limits the length of a record, so that none fills the memory."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.count = 0
        self.held = 0
        """Characters read since the caller set this to 0, at the begin of a record."""

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        """Return the next line. Raises OverflowError if it makes the record too long, and passes by it."""
        line = self._stream.readline(_LONGEST + 1)
        if not line:
            raise StopIteration
        self.count += 1
        self.held += len(line)
        if self.held > _LONGEST:
            _skip_line(self._stream, line)
            raise OverflowError
        return line


def _separator(lines: TextIO, file: Path, columns: Sequence[str]) -> str:
    """Return the separator with which the first line names all of `columns`; a comma if there is none."""
    if file.suffix.lower() == ".tsv":
        return "\t"
    names = lines.readline(_PIECE)
    lines.seek(0)
    held = {
        mark: {name.strip().strip('"') for name in names.split(mark)}.issuperset(columns) for mark in ",;\t|"
    }
    return next((mark for mark, right in held.items() if right), ",")


def csv_rows(
    file: Path, columns: Sequence[str] = ("image", "question", "answer"), wanted: Sequence[str] = ()
) -> Iterator[Row | Problem]:
    """Yield the records of a UTF-8 file whose first one names at least `columns`.

    None of these, nor of those `wanted`, may be named twice.
    Fields are separated by tabs in .tsv, else by what separates those names: `,`, `;`, a tab or `|`.
    """
    try:
        # Bytes that are not UTF-8 pass as lone surrogates here and are refused by `as_text`.
        stream = file.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
    except OSError as error:
        yield Problem(str(file), f"cannot be read: {error.strerror}", whole=True)
        return
    with stream:
        separator = _separator(stream, file, columns)
        lines = _Lines(stream)
        reader = csv.reader(lines, strict=True, delimiter=separator)
        header: list[str] | None = None
        number = 0
        while True:
            line, lines.held = lines.count + 1, 0
            place = f"{file}:{line}"
            try:
                values = next(reader)
            except StopIteration:
                return
            except (csv.Error, OverflowError) as error:
                # A quotation mark too many or too few may have made one record of many.
                many = lines.count > line
                where = f"; what is up to line {lines.count} cannot be read" if many else ""
                what = f"is not valid CSV: {error}" if isinstance(error, csv.Error) else _TOO_LONG
                yield Problem(place, f"{what}{where}", whole=many)
                values = []
            if header is None:
                header = [name.strip() for name in values]
                if wrong := _wrong_header(header, columns, wanted):
                    yield Problem(place, wrong, whole=True)
                    return
            elif values:
                number += 1
                if len(values) == len(header):
                    yield Row(place, number, dict(zip(header, values, strict=True)))
                else:
                    many = lines.count > line
                    where = f", up to line {lines.count}" if many else ""
                    what = f"has {len(values)} fields instead of {len(header)}{where}"
                    yield Problem(place, what, whole=many)


def _wrong_header(header: Sequence[str], columns: Sequence[str], wanted: Sequence[str]) -> str:
    """Return what is wrong with the names of a CSV file's columns, "" if nothing is."""
    if missing := [name for name in columns if name not in header]:
        return f"lacks the columns {', '.join(missing)}; it has {str(header)[1:-1]}"
    if twice := sorted({name for name in header if header.count(name) > 1}.intersection([*columns, *wanted])):
        return f"has the columns {', '.join(twice)} more than once"
    return ""


def open_parquet(files: Sequence[Path], image: str | Sequence[str] = "image") -> Any:
    """Return a `datasets.Dataset` of Parquet files, memory-mapped from a copy in the library's cache.

    The copy belongs to a digest of the files. Embedded images stay encoded. Raises ValueError with what is
    wrong.
    """
    import datasets  # takes a second, and only tables of its kind need it; it brings no torch

    try:
        digest = _digest(files)
        # Names are patterns to `datasets`, hence the escape.
        names = [glob.escape(str(file.resolve())) for file in files]
        table = datasets.load_dataset("parquet", data_files=names, split="train", cache_dir=_copies(digest))
        table._fingerprint = digest  # the library's own depends on times of change
        return encoded(table, image)
    except Exception as error:  # from pyarrow, from fsspec or from datasets itself
        raise ValueError(f"cannot be read as Parquet: {' '.join(str(error).split())}") from None


def _digest(files: Iterable[Path]) -> str:
    """Return a digest of files: of all names, of the content of tables and of files that describe tables, and
    of the size and times of the others. Raises OSError."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file}\0".encode("utf-8", "surrogateescape"))
        if file.suffix.lower() in _READ:
            with file.open("rb") as stream:
                while piece := stream.read(_PIECE):
                    digest.update(piece)
        else:
            status = file.stat()
            digest.update(f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}".encode())
    return digest.hexdigest()[:32]


def _copies(digest: str) -> str:
    """Return the folder in which `datasets` keeps its copies of files with this digest.

    The library's own choice depends on paths and times of change, which files with other rows may share.
    """
    import datasets

    return str(Path(datasets.config.HF_DATASETS_CACHE) / "surgvqa" / digest)


def open_hub(path: str, revision: str | None, subset: str | None = None, split: str | None = None) -> Any:
    """Return what `datasets` makes of a hub id or folder: its splits by name, or the one asked for.

    A folder may also be what its `save_to_disk` wrote. Raises BadInput where nothing can be made of it.
    """
    if Path(path).exists():
        return _open_folder(Path(path), subset)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise BadInput(f"{path}: no such file or folder, and no hub id such as owner/name")
    import datasets
    from datasets.naming import camelcase_to_snakecase

    why = unreachable(f"the data set {path}")
    owner, name = path.split("/")
    copies = Path(datasets.config.HF_DATASETS_CACHE) / f"{owner}___{camelcase_to_snakecase(name)}"
    if why and not copies.is_dir():
        raise BadInput(
            f"{path}: is no folder here, has no copy in {datasets.config.HF_DATASETS_CACHE}, and {why}"
        )
    before = datasets.config.HF_HUB_OFFLINE
    try:
        datasets.config.HF_HUB_OFFLINE = before or bool(why)  # takes the copy at once
        return datasets.load_dataset(
            path, *filter(None, [subset]), revision=revision, **({"split": split} if split else {})
        )
    except Exception as error:  # no access, no such id, revision or subset
        what = "is no folder here and cannot be had from the hub"
        raise BadInput(f"{path}: {what}: {' '.join(str(error).split())}") from None
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _open_folder(folder: Path, subset: str | None) -> dict[str, Any]:
    """Return the splits of a folder that `datasets` loads, by name. Raises BadInput.

    The result is that of the files' present content.
    """
    # The library ignores what is not a file, such as a link to a file that was deleted from a cache.
    entries = list(folder.rglob("*"))
    tables = (file for file in entries if file.suffix.lower() in (*SUFFIXES, ".arrow"))
    if wrong := [str(file) for file in tables if not file.is_file()]:
        raise BadInput(f"{', '.join(wrong)}: is named as a table, but is not a file")
    import datasets

    try:
        digest = _digest(entry for entry in entries if entry.is_file())
        if (folder / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(str(folder))
        elif (folder / "state.json").is_file():
            splits = {folder.name: datasets.load_from_disk(str(folder))}
        else:
            splits = datasets.load_dataset(str(folder), *filter(None, [subset]), cache_dir=_copies(digest))
    except Exception as error:
        raise BadInput(f"{folder}: cannot be read: {' '.join(str(error).split())}") from None
    for split, table in splits.items():
        table._fingerprint = f"{digest}{split}"
    return dict(splits)


def encoded(table: Any, columns: str | Sequence[str] = "image") -> Any:
    """Return a `datasets.Dataset` that does not decode its columns of embedded images or lists of them."""
    import datasets

    for column in [columns] if isinstance(columns, str) else columns:
        kind = table.features.get(column)
        many = isinstance(kind, datasets.List)
        if many:
            kind = kind.feature
        dtype = getattr(kind, "dtype", "")
        if isinstance(kind, (datasets.Image, dict)) or dtype in ("binary", "large_binary"):
            image = datasets.Image(decode=False)
            table = table.cast_column(column, datasets.List(image) if many else image)
    return table


def table_rows(
    table: Any,
    place: str,
    needed: Sequence[str],
    wanted: Sequence[str] = (),
    image: str | Sequence[str] = "image",
) -> Iterator[Row | Problem]:
    """Yield rows of a `datasets.Dataset` that went through `encoded`; class numbers become their names."""
    if missing := [name for name in needed if name not in table.column_names]:
        has = ", ".join(table.column_names)
        yield Problem(place, f"lacks the columns {', '.join(missing)}; it has {has}", whole=True)
        return
    names = [name for name in dict.fromkeys((*needed, *wanted)) if name in table.column_names]
    unread = tuple(name for name in table.column_names if name not in names)
    classes = {name: table.features[name] for name in names if hasattr(table.features[name], "int2str")}
    held = [name for name in ([image] if isinstance(image, str) else image) if name in names]
    refs: dict[str, ImageRef] = {}
    number = 0
    columns = table.select_columns(names).with_format("arrow")
    for batch in columns.iter(batch_size=32):  # bounds how many images are in memory
        for fields in _read(batch):
            number += 1
            if fields is None:
                yield Problem(f"{place}: row {number}", "holds text that is not UTF-8")
                continue
            for name in held:
                fields[name] = _cell(fields.get(name), refs, ImageRef("", None, table, number - 1, name))
            for name, kind in classes.items():
                known = fields[name] is not None and 0 <= fields[name] < kind.num_classes  # -1 is none
                fields[name] = kind.int2str(fields[name]) if known else None
            yield Row(f"{place}: row {number}", number, fields, unread)


def _cell(cell: Any, refs: dict[str, ImageRef], ref: ImageRef) -> Any:
    """Return a cell of a column of images, with an ImageRef for each embedded image."""
    if isinstance(cell, dict):
        return _embedded(cell, refs, ref)
    if isinstance(cell, list):
        return [
            _embedded(one, refs, replace(ref, index=index)) if isinstance(one, dict) else one
            for index, one in enumerate(cell)
        ]
    return cell


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
