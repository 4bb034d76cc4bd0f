"""Conversations about images: LLaVA's JSON (`llava`) and ShareGPT's or the hub's `messages`.

    llava       {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nQ"},
                                                     {"from": "gpt", "value": "A"}]}
    messages    {"images": ["a.png"], "messages": [{"role": "user", "content": "<image>Q"},
                                                   {"role": "assistant", "content": "A"}]}

Each question with the answer that follows it is one Example; those of a row share its images. What came
before in a conversation is not shown with a later question, and a warning counts such questions.

Boxes in texts are read by surgvqa.datasets.boxes, those of ms-swift's `objects` in place of their marks:

    messages    {..., "messages": [{"role": "user", "content": "<image>Where is the <ref-object>?"},
                                   {"role": "assistant", "content": "<bbox>"}],
                 "objects": {"ref": ["polyp"], "bbox": [[320, 180, 960, 540]]}}
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from surgvqa.datasets import Example, ImageRef, Problem, boxes, marks, tables
from surgvqa.datasets.files import Row, as_text, kind_of, rows_of
from surgvqa.datasets.images import Images
from surgvqa.recipe import Source

_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "system": "system",
}  # fmt: skip

_OPTIONAL = ("id", "question_type", "group", "split", "stage", "main_tag", "sub_tag", "system", "objects")

_OBJECT_MARK = re.compile(r"(?P<named><ref-object>\s?<bbox>)|<ref-object>|(?P<key>[\"']\s?:\s?\[?\s?)?<bbox>")
"""Marks for the names and boxes of a row's `objects`. After a key of JSON a box is its numbers alone."""

_UNITS = {"real": "pixels", "norm1": "share", "norm1000": "thousand"}
"""ms-swift's `bbox_type` → the unit, as in `data.boxes`."""


@dataclass
class _Told:
    """What a data set's conversations have that examples do not show as it is."""

    context: int = 0
    system: Counter[str] = field(default_factory=Counter)
    inside: int = 0
    marks: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """question, answer, system message → marks of images beyond those that the format has in questions."""

    def problems(self, place: str) -> Iterator[Problem]:
        if self.context:
            what = (
                f"{self.context} questions come later in a conversation; each is asked without what was said "
                "before it, so one that refers to that cannot be understood"
            )
            yield Problem(place, what, warning=True)
        if self.system:
            listed = ", ".join(f"{text[:80]!r} ({count})" for text, count in self.system.most_common(3))
            more = f", and {len(self.system) - 3} others" if len(self.system) > 3 else ""
            what = (
                f"{self.system.total()} rows have a system message, which is put before each of their "
                f"questions: {listed}{more}; where it is always the same, take it out of the rows and set "
                "prompt.system"
            )
            yield Problem(place, what, warning=True)
        if self.inside:
            what = f"{self.inside} questions have an image inside their text; all images come before it here"
            yield Problem(place, what, warning=True)
        yield from marks.problems(place, self.marks)


def read(source: Source) -> Iterator[Example | Problem]:
    """Every question of a .json, .jsonl or .parquet file, or of the train, val and test files of a folder.

    Raises BadInput where there is no such file.
    """
    names = ("image", "conversations") if source.format == "llava" else ("images", "messages")
    needed, wanted = tables.columns(source, names, _OPTIONAL)
    must = needed if names[0] in source.columns else needed[1:]  # images may also be in the messages
    path, suffixes = Path(source.path or "."), (".json", ".jsonl", ".parquet")
    files = tables.part_files(path, suffixes, roots=source.roots)
    yield from tables.unread_files(path, files)
    used = {theirs for name in (*names, *_OPTIONAL) for theirs in tables.names_of(source.columns, name)}
    for file in files:
        told, seen = _Told(), dict[str, None]()
        images, elsewhere = Images(file.parent, source.roots), _Elsewhere()
        for row in rows_of(file, must, [needed[0], *wanted], needed[0]):
            if isinstance(row, Problem):
                yield row
                continue
            seen.update(dict.fromkeys((*row.fields, *row.unread)))
            yield from _examples(row, source, file, names, images, elsewhere, told)
        yield from tables.unknown_columns(str(file), source.columns, seen, used)
        yield from elsewhere.problems(str(file))
        yield from told.problems(str(file))


def _examples(
    row: Row,
    source: Source,
    file: Path,
    names: tuple[str, str],
    images: Images,
    elsewhere: _Elsewhere,
    told: _Told,
) -> Iterator[Example | Problem]:
    """A row's questions, or all that is wrong with it."""
    fields = tables.Fields(row.fields, source.columns)
    turns, inline = _turns(fields, names[1])
    if fields[names[0]] is None and inline:  # the hub's newest form has them in the messages
        fields = tables.Fields({**row.fields, names[0]: inline}, {**source.columns, names[0]: names[0]})
        turns, _ = _turns(fields, names[1])
    elif inline and _other_images(fields[names[0]], inline):
        fields.fault(names[0], f"and {names[1]} name different images; keep one of them")
    refs = fields.images(names[0], images, elsewhere.mend(fields[names[0]], images))
    system = "\n".join(text for role, text in turns if role == "system")
    if own := fields.optional("system"):  # ShareGPT has it beside the conversation
        system = f"{own}\n{system}".strip()
    system, in_system = marks.without_marks(system)
    taken = {"system message": set(in_system), "question": set[str](), "answer": set[str]()}
    said = [(role, text) for role, text in turns if role != "system"]
    said, unit = _with_objects(said, fields, source.boxes, len(refs))
    pairs = _pairs(said, fields, names[1])
    places = [mark for _, text in said for mark in marks.PLACEHOLDER.findall(text)]
    if (
        len(places) not in (0, len(refs))
        and not fields.wrong
        and not any("video" in m.lower() for m in places)
    ):
        fields.fault(names[1], f"have {len(places)} <image>, but the row has {len(refs)} images")
    kind = fields.optional("question_type") or _tags(fields)
    name, part, stage = fields.optional("id"), fields.split(tables.part_of(file)), fields.stage()
    name, group = name or f"{file.stem}:{row.number}", fields.group(refs, source.group_pattern)
    found, inside = [], 0
    for number, (asked, answer) in enumerate(pairs, start=1):
        question, in_question = marks.without_marks("\n".join(asked.splitlines()))
        answer, in_answer = marks.without_marks(answer)
        taken["question"].update(filter(marks.NUMBERED.fullmatch, in_question))
        taken["answer"].update(in_answer)
        inside += sum(bool(part.strip()) for part in marks.PLACEHOLDER.split(asked)) > 1
        if not question or not answer:
            fields.fault(names[1], f"have no {'answer' if question else 'text'} in question {number}")
            continue
        example = Example(
            id=name if len(pairs) == 1 else f"{name}:{number}",
            images=refs,
            question=f"{system}\n{question}" if system else question,
            answers=(answer,),
            question_type=kind,
            group=group,
            split=part,
            stage=stage,
            place=row.place,
        )
        try:
            found.append(boxes.read(example, source.variant, unit))
        except ValueError as error:
            fields.fault(names[1], f"have in question {number} the box {error}")
    if fields.wrong:
        yield from (Problem(row.place, what) for what in fields.wrong)
        return
    told.context += len(found) - 1
    told.inside += inside
    for what, texts in taken.items():
        told.marks[what].update(texts)
    if system:
        told.system[system] += 1
    yield from found


def _other_images(given: object, inline: list[Any]) -> bool:
    """Return whether messages name other images than the row's column; embedded ones cannot be compared."""
    named = given if isinstance(given, list) else [given]
    return all(isinstance(one, str) for one in (*named, *inline)) and named != inline


def _tags(fields: tables.Fields) -> str:
    """Surg-396K's tags as a question type: `main_tag` and, where it says more, `sub_tag`."""
    main, sub = fields.optional("main_tag"), fields.optional("sub_tag")
    return "/".join(dict.fromkeys(filter(None, (main, sub)))) or "question"


def _turns(fields: tables.Fields, name: str) -> tuple[list[tuple[str, str]], list[Any]]:
    """(role, text) of each message, and the images that are named or held in messages."""
    value = fields[name]
    if not isinstance(value, list) or not value:
        if value is None:
            fields.missing(name)
        else:
            fields.fault(
                name, "is an empty list" if value == [] else f"is {kind_of(value)} instead of a list"
            )
        return [], []
    turns: list[tuple[str, str]] = []
    images: list[Any] = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            fields.fault(name, f"have {kind_of(message)} instead of an object in message {number}")
            continue
        role = message.get("role") or message.get("from")
        if not isinstance(role, str) or role not in _ROLES:
            fields.fault(name, f"have the role {role!r} in message {number}; known are {', '.join(_ROLES)}")
            continue
        content = message["content"] if "content" in message else message.get("value")
        try:
            text = _text(content, images)
        except ValueError as error:
            fields.fault(name, f"have in message {number} a text that {error}")
            continue
        turns.append((_ROLES[role], text))
    return turns, images


def _text(content: object, images: list[Any]) -> str:
    """A message's text; images among its parts are added to `images` and leave an `<image>`.

    Raises ValueError, to be put after "a text that".
    """
    if not isinstance(content, list):
        return as_text(content)
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            texts.append(as_text(part.get("text")))
        elif kind in ("image", "image_url"):
            held = part.get(kind)
            held = held.get("url") if isinstance(held, dict) else held
            images.extend([held] if held else [])
            texts.append("<image>")
        else:
            raise ValueError(f"has a part of the type {kind!r}; known are text, image and image_url")
    return "\n".join(texts)


def _pairs(turns: Iterable[tuple[str, str]], fields: tables.Fields, name: str) -> list[tuple[str, str]]:
    """Question and answer by turns; whatever is not in that order is a fault."""
    pairs: list[tuple[str, str]] = []
    asked: str | None = None
    for role, text in turns:
        if role == "user" and asked is None:
            asked = text
        elif role == "assistant" and asked is not None:
            pairs.append((asked, text))
            asked = None
        else:
            what = (
                "two questions without an answer between" if role == "user" else "an answer without question"
            )
            fields.fault(name, f"have {what} them" if role == "user" else f"have {what}")
            return []
    if asked is not None:
        fields.fault(name, "end with a question that has no answer")
    elif not pairs and not fields.wrong:
        fields.fault(name, "have no question")
    return pairs


def _with_objects(
    turns: list[tuple[str, str]], fields: tables.Fields, unit: str, images: int
) -> tuple[list[tuple[str, str]], str]:
    """Return the messages with ms-swift's `objects` in place of their marks, and the unit of their boxes.

    Names and boxes are taken in order, over all messages of the row. A box gets a label from the name right
    before it, or in an answer of boxes alone. `unit` is the recipe's; it holds if the row gives none.
    """
    objects = fields["objects"]
    marks = [mark for _, text in turns for mark in ("<ref-object>", "<bbox>") if mark in text]
    if objects is None:
        if marks:
            fields.fault(
                "objects", f"is missing, but the messages have {marks[0]}, for which it has the text"
            )
        return turns, unit
    try:
        names, numbers, unit = _objects(objects, unit, images)
    except ValueError as error:
        fields.fault("objects", str(error))
        return turns, unit
    wanted = {"bbox": sum(text.count("<bbox>") for _, text in turns)}
    wanted |= {"ref": sum(text.count("<ref-object>") for _, text in turns)}
    for key, given in (("bbox", numbers), ("ref", names)):
        # Without marks for names in the text, there may be one name for all boxes or one for each.
        if len(given) != wanted[key] and not (
            key == "ref" and not wanted[key] and len(given) in (1, len(numbers))
        ):
            mark = "<bbox>" if key == "bbox" else "<ref-object>"
            fields.fault("objects", f"has {len(given)} {key}, but the messages have {wanted[key]} {mark}")
            return turns, unit
    of_box = (
        names
        if len(names) == len(numbers)
        else names * len(numbers)
        if len(names) == 1
        else [""] * len(numbers)
    )
    named, boxed = iter(names), iter(zip(of_box, numbers, strict=True))

    def written(text: str) -> str:
        alone = not text.replace("<bbox>", "").strip(" \n,;")

        def one(mark: re.Match[str]) -> str:
            if mark[0] == "<ref-object>":
                return next(named)
            label, (box, where) = next(boxed)
            if mark["key"]:
                return f"{mark['key']}{box}"
            label = next(named) if mark["named"] else label if alone else ""
            return f"{where}<ref>{label}</ref><box>{box}</box>" if label else f"{where}<box>{box}</box>"

        return _OBJECT_MARK.sub(one, text)

    return [(role, written(text)) for role, text in turns], unit


def _objects(value: object, unit: str, images: int) -> tuple[list[str], list[tuple[str, str]], str]:
    """Return the names, each box as `[x1, y1, x2, y2]` with a prefix for its image, and the unit.

    Raises ValueError, to follow "objects" in a message.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError("is not valid JSON") from None
    if not isinstance(value, dict):
        raise ValueError(f"is {kind_of(value)}; it must be an object with ref and bbox")
    names, numbers, kind = value.get("ref") or [], value.get("bbox") or [], value.get("bbox_type")
    if not isinstance(names, list) or not isinstance(numbers, list):
        raise ValueError("must have a list as ref and as bbox")
    if kind is not None and kind not in _UNITS:
        raise ValueError(f"has the bbox_type {kind!r}; known are {', '.join(_UNITS)}")
    places = value.get("image_id") or [0] * len(numbers)
    if not isinstance(places, list) or len(places) != len(numbers):
        raise ValueError("must have one image_id for each bbox")
    made = []
    for box, place in zip(numbers, places, strict=True):
        if not isinstance(box, list) or len(box) != 4 or not all(map(tables.is_coordinate, box)):
            raise ValueError(
                f"has {json.dumps(box, default=str)[:80]} in bbox, which is no box; it must be four numbers, "
                "[x1, y1, x2, y2], since points cannot be moved with the canvas"
            )
        if type(place) is not int or not 0 <= place < max(images, 1):
            raise ValueError(f"has the image_id {place!r}, but the row has {images} images, counted from 0")
        text = ", ".join(f"{edge:.12f}".rstrip("0").rstrip(".") for edge in box)
        made.append((f"[{text}]", f"Picture {place + 1}: " if images > 1 else ""))
    return (
        [as_text(name) for name in names],
        made,
        _UNITS[kind] if kind else "pixels" if unit == "auto" else unit,
    )


class _Elsewhere:
    """Paths of the machine on which a data set was made, such as `D:/data/set/a.png`.

    The first of them that is an image here without its first folders settles how many those are, for all.
    """

    def __init__(self) -> None:
        self._prefix: str | None = None
        self._count = 0

    def mend(self, value: object, images: Images) -> dict[str, str]:
        """Path as it is given → with `/` and without those folders, for the paths that have to change."""
        names = [name for name in (value if isinstance(value, list) else [value]) if isinstance(name, str)]
        return {
            name.strip(): mended for name in names if (mended := self._mended(name.strip(), images)) != name
        }

    def _mended(self, name: str, images: Images) -> str:
        windows = PureWindowsPath(name)
        path = windows.as_posix() if "\\" in name or windows.drive else name
        if not (windows.drive or path.startswith("/")) or self._here(path, images):
            return path
        if self._prefix is None:
            folders = path.split("/")
            for first in range(1, len(folders)):
                if self._here("/".join(folders[first:]), images):
                    self._prefix = "/".join(folders[:first]) + "/"
                    break
        if self._prefix is None or not path.startswith(self._prefix):
            return path
        self._count += 1
        return path.removeprefix(self._prefix)

    def _here(self, name: str, images: Images) -> ImageRef | None:
        try:
            return images.locate(name)
        except ValueError:
            return None

    def problems(self, place: str) -> Iterator[Problem]:
        if self._prefix is not None:
            what = f"{self._count} images have paths of another machine; {self._prefix!r} is left out of them"
            yield Problem(place, what, warning=True)
