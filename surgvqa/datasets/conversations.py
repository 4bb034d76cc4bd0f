"""Conversations about images: LLaVA's JSON (`llava`) and ShareGPT's or the hub's `messages`.

    llava       {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nQ"},
                                                     {"from": "gpt", "value": "A"}]}
    messages    {"images": ["a.png"], "messages": [{"role": "user", "content": "<image>Q"},
                                                   {"role": "assistant", "content": "A"}]}

Each question with the answer that follows it is one Example; those of a row share its images. What came
before in a conversation is not shown with a later question, and a warning counts such questions.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from surgvqa.datasets import Example, ImageRef, Problem, Region, tables
from surgvqa.datasets.files import Row, as_text, kind_of, rows_of
from surgvqa.datasets.images import Images
from surgvqa.recipe import Source

_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "system": "system",
}  # fmt: skip

_OPTIONAL = ("id", "question_type", "group", "split", "stage", "main_tag", "sub_tag", "system")

_PLACEHOLDER = re.compile(r"<image>|<ImageHere>|<video>")
"""Where an image goes in a text; here all images of a row come before its questions."""

_SHARE = r"(?:0(?:\.\d{0,9})?|\.\d{1,9}|1(?:\.0{0,9})?)"
_BOX = re.compile(
    rf"(?:(?P<label>\w[\w-]{{0,99}})|(?P<blank> ?))"
    rf"\[ ?({_SHARE}), ?({_SHARE}), ?({_SHARE}), ?({_SHARE}) ?\]"
)
"""`Knife[0.71, 0.44, 0.89, 0.77]`, as CoPESD writes boxes, or a box without label."""


@dataclass
class _Told:
    """What a data set's conversations have that examples do not show as it is."""

    context: int = 0
    system: Counter[str] = field(default_factory=Counter)
    inside: int = 0

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
    refs = fields.images(names[0], images, elsewhere.mend(fields[names[0]], images))
    system = "\n".join(text for role, text in turns if role == "system")
    if own := fields.optional("system"):  # ShareGPT has it beside the conversation
        system = f"{own}\n{system}".strip()
    said = [(role, text) for role, text in turns if role != "system"]
    pairs = _pairs(said, fields, names[1])
    marks = sum(len(_PLACEHOLDER.findall(text)) for _, text in said)
    if marks not in (0, len(refs)) and not fields.wrong and not any("<video>" in text for _, text in said):
        fields.fault(names[1], f"have {marks} <image>, but the row has {len(refs)} images")
    kind = fields.optional("question_type") or _tags(fields)
    name, part, stage = fields.optional("id"), fields.split(tables.part_of(file)), fields.stage()
    name, group = name or f"{file.stem}:{row.number}", fields.group(refs, source.group_pattern)
    found, inside = [], 0
    for number, (asked, answer) in enumerate(pairs, start=1):
        question, within = _bare(asked)
        inside += within
        asked_regions: tuple[Region, ...] = ()
        regions: tuple[Region, ...] = ()
        if not question or not answer:
            fields.fault(names[1], f"have no {'answer' if question else 'text'} in question {number}")
            continue
        if source.variant != "text" and len(refs) == 1:
            try:
                question, asked_regions = _boxes(question, "<box>")
                answer, regions = _boxes(answer, "")
            except ValueError as error:
                fields.fault(names[1], f"have in question {number} the box {error}")
        found.append(
            Example(
                id=name if len(pairs) == 1 else f"{name}:{number}",
                images=refs,
                question=f"{system}\n{question}" if system else question,
                answers=(answer,),
                question_type=kind,
                group=group,
                split=part,
                stage=stage,
                place=row.place,
                regions=regions,
                asked_regions=asked_regions,
            )
        )
    if fields.wrong:
        yield from (Problem(row.place, what) for what in fields.wrong)
        return
    told.context += len(found) - 1
    told.inside += inside
    if system:
        told.system[system] += 1
    yield from found


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


def _bare(text: str) -> tuple[str, bool]:
    """A question without the marks of where its images go, and whether one was inside of it."""
    parts = _PLACEHOLDER.split(text)
    lines = [
        " ".join(_PLACEHOLDER.sub(" ", line).split()) if _PLACEHOLDER.search(line) else line
        for line in text.splitlines()
    ]
    return "\n".join(lines).strip(), sum(bool(part.strip()) for part in parts) > 1


def _boxes(text: str, mark: str) -> tuple[str, tuple[Region, ...]]:
    """A text with `mark` for each box and its label, or without the box alone, and the boxes.

    Raises ValueError with a box that is none and why, to be put after "the box".
    """
    regions = []
    for found in _BOX.finditer(text):
        box = found[0].removeprefix(found["label"] or found["blank"])
        try:
            region = tables.region([float(number) for number in found.groups()[2:]])
        except ValueError as error:
            raise ValueError(
                f"{box}, which {error}; if it is x, y, width and height, make it corners; data.variant: text "
                "leaves boxes as they are"
            ) from None
        regions.append(Region(region.box, found["label"] or "", relative=True))
    bare = _BOX.sub(lambda found: (found["blank"] or "") + mark if mark else found["label"] or "", text)
    return bare.strip(), tuple(regions)


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
