"""Corpora whose questions are lines of text files beside the frames of videos: what their readers share.

    Corpus(source) ── beside ─▶ Row(image, fields) ── example ──▶ Example      one text file for each frame
                   └─ listed ─▶ Row(image, fields) ── example ──▶ Example      lines that name their frame

Every folder is looked at once and every text file opened once; no image is opened. What is wrong with one
line is a Problem of that line; what is to be said of the corpus as a whole is gathered for `warnings`.
"""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from surgvqa.datasets import Example, ImageRef, Problem
from surgvqa.datasets.tables import Images
from surgvqa.recipe import BadInput, Part, Source

IMAGES = (".png", ".jpg", ".jpeg")

MAX_TEXT = 2**26
"""Bytes. A text file of a whole corpus has some megabytes."""

_UNEVEN = 0.1
"""Frames and question files may differ in number by this share: single frames lack questions."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a text file, split at `|`, with the frame that it is about."""

    id: str
    place: str
    image: ImageRef
    fields: list[str]


@dataclass(frozen=True, slots=True)
class _Frames:
    """A folder's frames by their stems."""

    place: str
    files: dict[str, Path | str]
    missing: str = ""
    """Why there is no such folder to be read."""

    def find(self, stem: str) -> Path | str:
        """The frame's file, or what is wrong."""
        found = self.files.get(stem, f"is not in {self.place}")
        return found if isinstance(found, Path) else self.missing or f"its frame {found}"


class Corpus:
    """The folder of a corpus, as its reader goes through it."""

    def __init__(
        self,
        source: Source,
        *,
        name: str,
        layout: str,
        marks: Sequence[str],
        form: str = "question|answer",
    ) -> None:
        """Find the corpus: the source's folder, or the folder `name` in it, that holds any of `marks`.

        Marks are names or patterns of entries, and `form` is what a line looks like. Raises BadInput that
        says what was looked for, `layout`, and what was found.
        """
        self.root = _find(Path(source.path or "."), name, layout, marks)
        self.form = form
        self.left_out: Counter[str] = Counter()
        """What a reader leaves out as the authors do → how much of it."""
        self._roots = [self.root, *(Path(root) for root in source.roots)]
        self._images = Images(Path(source.path or "."), source.roots)
        self._folders: dict[tuple[str, ...], _Frames] = {}
        self._unknown: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
        self._uneven: list[str] = []
        self._lacking: list[str] = []

    def folder(self, *names: str) -> Path | None:
        """The first of the named folders that there is, in the corpus's own or in those of `data.roots`."""
        places = (root / name for name in names for root in self._roots)
        return next((place for place in places if there(place)), None)

    def videos(self, folder: Path | None, pattern: str) -> list[tuple[int, Path]]:
        """The subfolders whose names match `pattern`, with the number that is its group, in order.

        Raises BadInput where the folder cannot be listed.
        """
        if folder is None or not there(folder):
            return []
        try:
            found = [(re.fullmatch(pattern, entry.name), entry) for entry in folder.iterdir()]
        except OSError as error:
            raise BadInput(f"{folder}: cannot be listed: {error.strerror or error}") from None
        return sorted((int(match[1]), place) for match, place in found if match)

    def texts(self, folder: Path) -> dict[str, Path | str]:
        """Names of the text files in a folder → the file, or what is wrong with it.

        Raises ValueError where the folder cannot be listed, to be put after the folder.
        """
        return self._images.files(folder, (".txt",))

    def beside(
        self,
        texts: Path,
        frames: Sequence[str],
        key: str,
        *,
        counts: Collection[int] = (2,),
        skip: int = 0,
        frame: Callable[[str], str] = lambda stem: stem.split("_")[0],
        wanted: Callable[[str], bool] = lambda frame: True,
        even: bool = True,
    ) -> Iterator[Row | Problem]:
        """Rows of the text files in `texts`, one for each frame.

        The frames are in the first of the folders `frames` that has any. `frame` makes a frame's stem of a
        text file's; those that are not `wanted` are left out, counted. `key` begins the names of images and
        rows. A line has a number of fields that is among `counts`; the first `skip` lines of a file are left
        out, counted. `even` says that each frame should have a file.
        """
        try:
            files = self.texts(texts)
        except ValueError as error:
            yield Problem(str(texts), str(error), whole=True)
            return
        stems = {name: frame(name[:-4]) for name in sorted(files)}
        kept = {name: stem for name, stem in stems.items() if wanted(stem)}
        if len(kept) < len(stems):
            self.left_out["question files of unused frames"] += len(stems) - len(kept)
        images = self._frames(frames)
        if images.missing:
            if kept:
                yield Problem(
                    str(texts), f"{images.missing}; its {len(kept)} question files are left out", whole=True
                )
            return
        have = sum(map(wanted, images.files))
        if even and abs(have - len(kept)) > _UNEVEN * max(have, len(kept)):
            self._uneven.append(f"{key} ({have} frames, {len(kept)} files)")
        for name, stem in kept.items():
            file, path = files[name], images.find(stem)
            if isinstance(file, str):
                yield Problem(str(texts / name), file)
            elif isinstance(path, str):
                yield Problem(str(file), path)
            else:
                image = ImageRef(f"{key}/{stem}", path=path)
                for row in self._lines(file, counts, skip):
                    if isinstance(row, Problem):
                        yield row
                    else:
                        number, fields = row
                        yield Row(f"{image.key}:{number}", f"{file}:{number}", image, fields)

    def listed(
        self, file: Path, frames: Callable[[str], Sequence[str]], *, pattern: str = r"\w[\w.-]*"
    ) -> Iterator[Row | Problem]:
        """Rows of a text file whose lines begin with `video/frame`, which is not among their `fields` here.

        The names of videos match `pattern`; `frames` gives the folders in which those of one may be.
        """
        stem = f"{file.parent.name}/{file.stem}"
        refs: dict[Path, ImageRef] = {}
        try:
            found = self._images.files(file.parent, (file.name.lower(),)).get(file.name, "does not exist")
        except ValueError as error:
            found = str(error)
        if isinstance(found, str):
            yield Problem(str(file), found, whole=True)
            return
        for row in self._lines(file, (3,)):
            if isinstance(row, Problem):
                # Here a file is no frame's, but a table of many.
                yield replace(row, whole=row.place == str(file))
                continue
            number, (name, *fields) = row
            place = f"{file}:{number}"
            video, _, frame = name.partition("/")
            frame = frame[: -len(Path(frame).suffix)] if Path(frame).suffix.lower() in IMAGES else frame
            if not re.fullmatch(pattern, video) or not re.fullmatch(r"\w[\w.-]*", frame):
                yield Problem(place, f"must be `{self.form}`, but begins with {name[:80]!r}")
                continue
            path = self._frames(frames(video)).find(frame)
            if isinstance(path, str):
                yield Problem(place, path)
            else:
                image = refs.setdefault(path, ImageRef(f"{video}/{frame}", path=path))
                yield Row(f"{stem}:{number}", place, image, fields)

    def example(
        self,
        row: Row,
        kind: str,
        group: str,
        split: Part | None,
        *,
        labels: tuple[str, ...] = (),
        **more: Any,
    ) -> Example:
        """A row whose first two fields are question and answer; `labels` is the answer's closed set, if any.

        `more` are further fields of the example.
        """
        question, answer = row.fields[:2]
        if labels and answer not in labels:
            self._unknown[labels][answer] += 1
        return Example(
            id=row.id,
            images=(row.image,),
            question=sys.intern(question),  # most corpora have few distinct ones, repeated for each frame
            answers=(sys.intern(answer),),
            question_type=kind,
            group=group,
            split=split,
            place=row.place,
            labels=labels,
            **more,
        )

    def lacks(self, names: Sequence[str]) -> None:
        """Videos of the published corpus that are not here."""
        self._lacking += names

    def warnings(self) -> Iterator[Problem]:
        """What there is to say of the corpus as a whole; to be asked for last."""
        said = [f"{count} {what} are left out, as by the authors" for what, count in self.left_out.items()]
        if self._lacking:
            listed = ", ".join(self._lacking[:8]) + (", ..." if len(self._lacking) > 8 else "")
            said.append(f"lacks {listed}, so its scores cannot be compared with published ones")
        if self._uneven:
            said.append(
                f"frames and question files differ in number in {', '.join(self._uneven)}; check that the "
                "frames are those of this corpus's release"
            )
        for labels, unknown in self._unknown.items():
            listed = ", ".join(f"{answer!r} ({count})" for answer, count in unknown.most_common(5))
            said.append(f"{unknown.total()} answers are not among the corpus's {len(labels)}: {listed}")
        yield from (Problem(str(self.root), what, warning=True) for what in said)

    def _frames(self, names: Sequence[str]) -> _Frames:
        """The frames in the first of the named folders that holds images; each choice is made once."""
        names = tuple(names)
        if names not in self._folders:
            self._folders[names] = self._first_with_frames(names)
        return self._folders[names]

    def _first_with_frames(self, names: Sequence[str]) -> _Frames:
        for folder in (root / name for name in names for root in self._roots):
            if there(folder):
                try:
                    files = self._images.files(folder, IMAGES)
                except ValueError as error:
                    return _Frames(str(folder), {}, f"{folder} {error}")
                if files:
                    return _Frames(str(folder), {n.rpartition(".")[0]: files[n] for n in sorted(files)})
        place, where = " or ".join(names), " or ".join(map(str, self._roots))
        return _Frames(place, {}, f"there are no frames in {place} of {where}")

    def _lines(
        self, file: Path, counts: Collection[int], skip: int = 0
    ) -> Iterator[tuple[int, list[str]] | Problem]:
        """Number from 1 and fields of the lines that are not blank, without the first `skip` of them."""
        try:
            if file.stat().st_size > MAX_TEXT:
                yield Problem(
                    str(file), f"is larger than {MAX_TEXT >> 20} MiB, so it is no file of questions"
                )
                return
            data = file.read_bytes()
        except OSError as error:
            yield Problem(str(file), f"cannot be read: {error.strerror or error}")
            return
        for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
            if not line.strip():
                continue
            if skip:
                skip -= 1
                self.left_out["lines, the first of their files,"] += 1
                continue
            try:
                text = line.decode().strip()
            except UnicodeDecodeError:
                yield Problem(f"{file}:{number}", "is not UTF-8 text")
                continue
            fields = [field.strip() for field in text.split("|")]
            if "\0" in text:
                yield Problem(f"{file}:{number}", "holds a NUL byte")
            elif len(fields) in counts and all(fields):
                yield number, fields
            else:
                yield Problem(f"{file}:{number}", f"must be `{self.form}`, not {text[:80]!r}")


def there(place: Path) -> bool:
    """Whether there is such an entry; also where this may not be known, so that reading it tells why."""
    try:
        return place.exists() or place.is_symlink()
    except OSError:
        return True


def _find(path: Path, name: str, layout: str, marks: Sequence[str]) -> Path:
    """The folder that holds any of the marks: `path` or the folder `name` in it."""
    listed: list[str] = []
    try:
        if not path.is_dir():
            what = "is not a folder" if path.exists() else "no such folder"
            raise BadInput(f"{path}: {what}; {name} is a folder with {layout}")
        for folder in (path, path / name):
            if folder.is_dir():
                listed = sorted(entry.name for entry in folder.iterdir())
                if any(fnmatch(entry, mark) for entry in listed for mark in marks):
                    return folder
        listed = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        raise BadInput(f"{path}: cannot be listed: {error.strerror or error}") from None
    found = ", ".join(listed[:5]) + (", ..." if len(listed) > 5 else "") or "nothing"
    raise BadInput(f"{path}: is not {name}, which has {layout}; found {found}")
