"""COCO detections as grounded questions; TBX11K (Liu et al., CVPR 2020), chest X-rays, is one such.

    annotations/json/TBX11K_train.json    or annotations/instances_train.json, or train.json
    imgs/tb/tb0005.png                    file_name in imgs, images, the part's folder or the root

Each image is asked for all its boxes (type `findings`), and for those of each category that it has (type
`location`). The answer's text is the names of the categories, each once and joined with `; `. An image
without annotations is a negative: its only answer is `none`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from surgvqa.datasets import Box, Example, ImageRef, Problem, Region
from surgvqa.datasets.images import Images, leading_out
from surgvqa.datasets.tables import PARTS, as_text, is_coordinate
from surgvqa.recipe import BadInput, Part, Source

NONE = "none"

_PART = re.compile(r"(?:(.*)[_.-])?(train|val|validation|test)(\d{4})?")
_LAYOUT = "annotations/json/*_train.json, annotations/*_train.json or *_train.json (also val and test)"


def read(source: Source) -> Iterator[Example | Problem]:
    """Questions of the train, val and test files of a folder, or of one file. Raises BadInput without any.

    Warns of images that are left out: those in which a crowd stands for some boxes, and in TBX11K those of
    tuberculosis without a box.
    """
    path = Path(source.path or ".")
    root, files = _files(path)
    if path.is_dir() and (out := leading_out([file for file, _ in files], path, source.roots)):
        raise BadInput(out)
    images = Images(root, source.roots)
    left_out: Counter[str] = Counter()
    for file, part in files:
        yield from _File(file, part, images, left_out).rows()
    for why, count in left_out.items():
        yield Problem(str(path), f"{count} images are left out: {why}", warning=True)


def _files(path: Path) -> tuple[Path, list[tuple[Path, Part | None]]]:
    """The root below which the images are, and the files with their parts."""
    if path.is_file():
        root = path.parent
        while root.name in ("json", "annotations"):
            root = root.parent
        return root, [(path, _part(path))]
    if not path.is_dir():
        what = "is neither a file nor a folder" if path.exists() else "no such file or folder"
        raise BadInput(f"{path}: {what}; give COCO annotations, or a folder with {_LAYOUT}")
    for folder in (path / "annotations" / "json", path / "annotations", path):
        files = sorted(folder.glob("*.json")) if folder.is_dir() else []
        if own := [file for file in files if file.stem.startswith("TBX11K_")]:
            files = own  # beside those of the data sets that its authors add, all_train.json and the like
        found: list[tuple[Path, Part | None]] = [(file, part) for file in files if (part := _part(file))]
        if twice := [part for part, count in Counter(part for _, part in found).items() if count > 1]:
            names = ", ".join(file.name for file, part in found if part in twice)
            raise BadInput(f"{folder}: holds several files of one part ({names}); leave one of each")
        if found:
            return path, found
    listed = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
    raise BadInput(f"{path}: holds no COCO annotations, which are {_LAYOUT}; found {listed}")


def _part(file: Path) -> Part | None:
    match = _PART.fullmatch(file.stem)
    return PARTS[match[2]] if match else None


class _File:
    """One annotation file."""

    def __init__(self, file: Path, part: Part | None, images: Images, left_out: Counter[str]) -> None:
        self._file = file
        self._part = part
        self._images = images
        self._left_out = left_out
        last = re.split(r"[_.-]", file.stem)[-1]
        self._folders = ("imgs/", "images/", f"{last}/", f"images/{last}/", "")

    def rows(self) -> Iterator[Example | Problem]:
        if not self._file.is_file():  # reading a pipe would wait for ever
            yield Problem(str(self._file), "is not a file", whole=True)
            return
        try:
            content = json.loads(self._file.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            yield Problem(str(self._file), f"cannot be read as JSON: {error}", whole=True)
            return
        for key in ("categories", "images", "annotations"):
            if not isinstance(content, dict) or not isinstance(content.get(key), list) or not content[key]:
                yield Problem(str(self._file), f"has no list of {key}, as COCO detections do", whole=True)
                return
        names: dict[object, str] = {}
        files: dict[object, str] = {}
        hurt: set[object] = set()
        for key, field, known in (("categories", "name", names), ("images", "file_name", files)):
            for number, row in enumerate(content[key], start=1):
                try:
                    if _id(row, "id") in known:
                        raise ValueError(f"has the id {row['id']!r} of another")
                    known[row["id"]] = _text(row, field)
                except ValueError as error:
                    if key == "images" and isinstance(row, dict) and isinstance(row.get("id"), (int, str)):
                        hurt.add(row["id"])
                    # All questions name the categories.
                    where = f"{self._file}: {key} {number}"
                    yield Problem(where, str(error), whole=key == "categories")
        regions: dict[object, list[Region]] = {image: [] for image in (*files, *hurt)}
        crowded: set[object] = set()
        for number, row in enumerate(content["annotations"], start=1):
            image = None
            try:
                image = _id(row, "image_id", regions)
                region = Region(_box(row), names[_id(row, "category_id", names)])
            except ValueError as error:
                hurt.add(image)
                # Of an image that is not known, any may lack this box.
                yield Problem(f"{self._file}: annotations {number}", str(error), whole=image is None)
                continue
            if row.get("iscrowd"):
                crowded.add(image)
            else:
                regions[image].append(region)
        for image, name in files.items():
            if image in hurt:  # its problems are told; without their boxes its answers would be wrong
                continue
            if image in crowded:
                self._left_out["a crowd stands for some of their boxes (iscrowd)"] += 1
            elif self._file.stem.startswith("TBX11K_") and name.startswith("tb/") and not regions[image]:
                self._left_out["they are below tb/, but have no box"] += 1
            else:
                yield from self._asked(image, name, regions[image], list(names.values()))

    def _asked(
        self, number: object, name: str, regions: list[Region], names: list[str]
    ) -> Iterator[Example | Problem]:
        """The questions about one image."""
        place = f"{self._file}: image {number}"
        try:
            image = self._locate(name)
        except ValueError as error:
            yield Problem(place, f"image {name!r} {error}")
            return
        regions = sorted(regions, key=lambda region: region.box)
        by_name = {label: [each for each in regions if each.label == label] for label in names}
        question = f"Which of these are in the image, and where: {', '.join(names)}?"
        asked = [("findings", question, regions)]
        asked += [
            ("location", f"Where in the image is {label}?", own) for label, own in by_name.items() if own
        ]
        for kind, question, boxes in asked:
            labels = list(dict.fromkeys(box.label for box in boxes))
            yield Example(
                id=f"{image.key}:{kind}" + (f":{labels[0]}" if kind == "location" else ""),
                images=(image,),
                question=question,
                answers=("; ".join(labels) or NONE,),
                question_type=kind,
                group=image.key,
                split=self._part,
                place=place,
                regions=tuple(boxes),
            )

    def _locate(self, name: str) -> ImageRef:
        """The image, in the first of the folders that has it. Raises ValueError where none has."""
        for folder in self._folders:
            try:
                return self._images.locate(f"{folder}{name}")
            except ValueError as error:
                reason = error
        raise reason


def _id(row: object, field: str, known: Container[object] | None = None) -> object:
    """A number or name that stands for something. Raises ValueError where it is none, or of nothing known."""
    value = row.get(field) if isinstance(row, dict) else None
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"{field} is missing or no number")
    if known is not None and value not in known:
        raise ValueError(f"{field} {value!r} is not listed in this file")
    return value


def _text(row: dict[str, Any], field: str) -> str:
    try:
        text = as_text(row.get(field))
    except ValueError as error:
        raise ValueError(f"{field} {error}") from None
    if not text:
        raise ValueError(f"{field} is empty")
    return text


def _box(row: dict[str, Any]) -> Box:
    """COCO's x, y, width, height as x1, y1, x2, y2."""
    box = row.get("bbox")
    if (
        not isinstance(box, list)
        or len(box) != 4
        or not all(is_coordinate(edge) for edge in box)
        or min(box[2:]) <= 0
    ):
        raise ValueError(f"bbox is {str(box)[:80]}; it must be x, y and a width and height above 0")
    x, y, width, height = map(float, box)
    return x, y, x + width, y + height
