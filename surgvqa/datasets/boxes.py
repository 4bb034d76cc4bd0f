"""Find boxes in texts, convert them to Regions, and keep their places.

    "the Knife[0.7, 0.4, 0.9, 0.8] cuts" ── find ──▶ [Found] ── read ──▶ layout "the <box> cuts", one Region

The same notations are read in the data and in the answers of models: JSON objects with a key such as
`bbox_2d`, `<ref>` and `<box>` tags or Qwen's special tokens, and a label followed by four numbers in
brackets. Four numbers in brackets alone are a box only if the recipe says so. surgvqa.grounding writes boxes
back into texts, moved with the canvas, in the notation of the model's family.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from surgvqa.datasets import Box, Example, Region

MARK = "<box>"
"""Marks the place of a box in a question or in a layout."""

READ = 100_000
"""Characters of a text that are searched for boxes; the rest stays text."""

NUMBER = r"[-+]?(?:\d{1,9}(?:\.\d{0,30})?|\.\d{1,30})"

_GAP = r"[\s,;()\[\]]{1,8}"
_TAG_BOX = (
    r"(?:<box>|<bbox>|<\|box_start\|>)"
    rf"(?P<numbers>[\s\[(]{{0,8}}{NUMBER}(?:{_GAP}{NUMBER}){{3,}}[\s\])]{{0,8}})"
    r"(?:</box>|</bbox>|<\|box_end\|>)"
)
_TAGGED = re.compile(
    r"(?:(?:<ref>|<\|object_ref_start\|>)"
    r"(?P<label>(?:(?!</ref>|<\|object_ref_end\|>)[\s\S]){0,200})"
    rf"(?:</ref>|<\|object_ref_end\|>)\s{{0,4}})?{_TAG_BOX}"
)
_PICTURE = re.compile(r"Picture (\d{1,3}):\s{0,2}\Z")

OBJECT = re.compile(r"""\{(?:[^{}"]+|"(?:[^"\\]+|\\.?)*(?:"|\Z))*\}?""", re.DOTALL)
_BOX_KEYS = frozenset({"bbox_2d", "bbox", "bounding_box", "box"})
_LABEL_KEYS = frozenset({"label", "name", "category", "class"})
_KEY = re.compile(r"""["']?\b(?:bbox_2d|bbox|bounding_box|box)\b["']?\s{0,4}[:=]\s{0,4}(?=[\[(])""")
_VALUE_END = re.compile(r"[^\s\d.,+\-\[\]()]")
_LIST = re.compile(r"[\[(][^\[\]()]*[\])]")

_COMMA = r"\s{0,2},\s{0,2}"
_IN_BRACKETS = re.compile(
    rf"(?P<label>\w[\w-]{{0,99}})?(?:\[\s{{0,2}}{_COMMA.join([NUMBER] * 4)}\s{{0,2}}\]"
    rf"|\(\s{{0,2}}{_COMMA.join([NUMBER] * 4)}\s{{0,2}}\)"
    rf"|\(\s{{0,2}}{NUMBER}{_COMMA}{NUMBER}\s{{0,2}}\){_COMMA}\(\s{{0,2}}{NUMBER}{_COMMA}{NUMBER}\s{{0,2}}\))"
)

_RESEMBLING = re.compile(
    r"""(?:["']?\b(?:bbox_2d|box_2d|bbox|bounding_box|point_2d)\b["']?"""
    r"""|["'](?:box|points?|polygon|segmentation|keypoints?)["'])"""
    r"""\s{0,4}[:=]\s{0,4}[\[(][\s\[(]{0,8}["']?[-+.]?\d[\d.eE+-]{0,20}["']?\s{0,2},[^\]\n]{0,60}"""
    r"""|\b(?:bbox_2d|box_2d|bbox|bounding[ _]box)\b["']?\s{0,4}[:=]\s{0,4}"""
    r"[-+.]?\d[\d.]{0,20}(?:\s{0,2},\s{0,2}[-+.]?\d[\d.]{0,20}){3}"
    r"|\b(?:points?|polygon|segmentation|keypoints?)\s{0,4}[:=]\s{0,4}[\[(]\s{0,4}[\[(]\s{0,4}"
    r"[-+.]?\d[\d.]{0,20}\s{0,2},[^\]\n]{0,60}"
    r"|<(?:box|bbox|points?|poly|polygon|quad)>[\s\[(]{0,8}[-+.]?\d[^<\n]{0,60}"
    r"|<points?\s+x\d{0,3}\s*=[^>\n]{0,60}"
    r"|<bbox>|<ref-object>|<loc_?\d{1,4}>|<patch_index_\d{1,4}>|(?:<\d{1,4}>){4}"
    r"""|\bx_?1["']?\s{0,4}[:=]\s{0,4}[-+.]?[\d.]{1,20}[,;\s]{1,4}["']?y_?1\b"""
    r"""|["'](?:x1|xmin|x_min)["']\s{0,4}:\s{0,4}[-+.]?\d"""
    r"""|["']x["']\s{0,4}:\s{0,4}[-+.]?[\d.]{1,20},\s{0,4}["']y["']"""
)
"""Coordinates that a key or a tag marks, in notations that `find` does not read."""


@dataclass(frozen=True, slots=True)
class Found:
    """Boxes at one place of a text."""

    start: int
    end: int
    boxes: tuple[Box, ...]
    """The numbers as written: unit and corners are not checked."""
    label: str = ""
    image: int | None = None
    """Number of the image, from 0; None where the text does not say it."""
    notation: str = "JSON"
    bare: bool = False
    """Whether only the numbers are replaced, inside JSON that has more keys than box and label."""


def find(text: str, *, images: int = 1, brackets: bool = False) -> list[Found]:
    """Return all boxes in a text in their order; with `brackets` also four numbers in brackets alone.

    Takes time in proportion to the length of the text.
    """
    if not any(mark in text for mark in "[(<"):
        return []
    head = text[:READ]
    found = list(_tagged(head, images))
    head = _without(head, found)
    objects = list(_in_json(head, images))
    found += objects
    head = _without(head, objects)
    for match in _IN_BRACKETS.finditer(head):
        box = _edges(match[0].removeprefix(match["label"] or ""))
        named = bool(match["label"]) and not match["label"].isdigit() and match[0][-1] == "]"
        if _plausible(box, named) and (named or brackets):
            start = match.start() if named else match.end("label") if match["label"] else match.start()
            notation = "label in front" if named else "brackets"
            found.append(Found(start, match.end(), (box,), match["label"] if named else "", None, notation))
    return sorted(found, key=lambda one: one.start)


def _without(text: str, found: Sequence[Found]) -> str:
    """Return the text with NULs in place of what was found, so that later positions stay the same."""
    pieces, at = [], 0
    for one in found:
        pieces += [text[at : one.start], "\0" * (one.end - one.start)]
        at = one.end
    return "".join([*pieces, text[at:]])


def _edges(text: str) -> Box:
    x1, y1, x2, y2 = (float(number) for number in re.findall(NUMBER, text)[:4])
    return x1, y1, x2, y2


def _plausible(box: Box, named: bool) -> bool:
    """Return whether four numbers in brackets can be a box, rather than a list of small whole numbers.

    The largest number of a box is at least 10 or at most 1. Without a label, 0s and 1s alone are a list too.
    """
    return min(box) >= 0 and (max(box) >= 10 or (max(box) <= 1 and (named or any(e % 1 for e in box))))


def _tagged(text: str, images: int) -> Iterator[Found]:
    for match in _TAGGED.finditer(text):
        numbers = [float(number) for number in re.findall(NUMBER, match["numbers"])]
        if len(numbers) % 4:
            continue
        quads = tuple((a, b, c, d) for a, b, c, d in zip(*[iter(numbers)] * 4, strict=True))
        start, image = match.start(), None
        before = text[max(0, start - 16) : start]
        if images > 1 and (picture := _PICTURE.search(before)):
            start, image = start - len(picture[0]), int(picture[1]) - 1
        yield Found(start, match.end(), quads, (match["label"] or "").strip(), image, "tags")


def _in_json(text: str, images: int) -> Iterator[Found]:
    """Yield JSON objects that hold a box and its label alone, and of other objects the numbers of the box."""
    whole: list[Found] = []
    objects = [match.span() for match in OBJECT.finditer(text)]
    number, at = 0, 0
    for key in _KEY.finditer(text):
        quads = list(_quads(text, key.end())) if key.start() >= at else []
        if not quads:
            continue
        while number < len(objects) and objects[number][1] <= key.start():
            number += 1
        start, end = objects[number] if number < len(objects) else (len(text), 0)
        said = _object(text[start:end]) if start <= key.start() else None
        if said is not None and _says_no_more(said, images):
            label = next((value for name, value in said.items() if name in _LABEL_KEYS), "")
            image = said["image"] - 1 if "image" in said else None
            boxes = tuple(box for _, _, box in quads)
            whole.append(Found(start, end, boxes, label.strip(), image))
            at = end
        else:
            yield from _in_runs(text, whole)
            whole = []
            yield from (Found(first, last, (box,), bare=True) for first, last, box in quads)
            at = quads[-1][1]
    yield from _in_runs(text, whole)


def _quads(text: str, at: int) -> Iterator[tuple[int, int, Box]]:
    """Yield start, end and numbers of each box in the list that begins at `at`; nothing for other lists."""
    stop = _VALUE_END.search(text, at, at + 4000)
    value = text[at : stop.start() if stop else at + 4000]
    depth = 0
    for place, mark in enumerate(value):
        depth += (mark in "[(") - (mark in "])")
        if not depth:
            value = value[: place + 1]
            break
    else:
        return
    if len(re.findall(NUMBER, value)) == 4:
        yield at, at + len(value), _edges(value)
        return
    lists = list(_LIST.finditer(value))
    if lists and all(len(re.findall(NUMBER, one[0])) == 4 for one in lists):
        yield from ((at + one.start(), at + one.end(), _edges(one[0])) for one in lists)


def _object(text: str) -> dict[str, Any] | None:
    """Return the JSON object that a text is, also if it has single quotation marks; else None."""
    for form in (text, text.replace("'", '"')):
        try:
            value = json.loads(form)
        except (ValueError, RecursionError):
            continue
        return value if isinstance(value, dict) else None
    return None


def _says_no_more(said: dict[str, Any], images: int) -> bool:
    """Return whether an object has no keys but a box, at most one label and, with several images, `image`."""
    labels = said.keys() & _LABEL_KEYS
    more = said.keys() - _BOX_KEYS - labels
    return (
        len(said.keys() & _BOX_KEYS) == 1
        and len(labels) <= 1
        and all(isinstance(said[name], str) for name in labels)
        and (not more or (more == {"image"} and images > 1 and type(said["image"]) is int))
    )


def _in_runs(text: str, found: Sequence[Found]) -> Iterator[Found]:
    """Yield the objects; widen the first and the last of a list by its brackets and the code fence around."""
    run: list[Found] = []
    for one in found:
        if run and text[run[-1].end : one.start].strip() != ",":
            yield from _unbracketed(text, run)
            run = []
        run.append(one)
    if run:
        yield from _unbracketed(text, run)


def _unbracketed(text: str, run: list[Found]) -> Iterator[Found]:
    start, end = run[0].start, run[-1].end
    for opening, closing in ((r"\[\s{0,20}\Z", r"\s{0,20}\]"), (r"```(?:json)?\s{0,20}\Z", r"\s{0,20}```")):
        before = re.search(opening, text[max(0, start - 27) : start])
        after = re.compile(closing).match(text, end)
        if before and after:
            start, end = start - len(before[0]), after.end()
    run[0] = replace(run[0], start=start)
    run[-1] = replace(run[-1], end=end)
    yield from run


def layout_of(text: str, found: Sequence[Found]) -> str:
    """Return the text with MARK in place of every box."""
    pieces, at = [], 0
    for one in found:
        pieces += [text[at : one.start], ", ".join([MARK] * len(one.boxes))]
        at = one.end
    return "".join([*pieces, text[at:]]).strip()


def without_boxes(layout: str, regions: Sequence[Region]) -> str:
    """Return a layout's text with labels in place of their boxes, and `[]` in place of numbers in JSON."""
    text, *rest = layout.split(MARK)
    for region, following in zip(regions, rest, strict=True):
        word = "[]" if region.bare else region.label
        text = (text if word else text.removesuffix(" ").removesuffix(",")) + word + following
    return text.strip()


def stands_first(layout: str, regions: Sequence[Region]) -> str | None:
    """Return the words of a layout if all its boxes follow them; None if a box stands among the words.

    Such an answer needs no layout: `grounding.write_answer` puts boxes behind the words by default.
    """
    if any(region.bare for region in regions):
        return None
    before, _, after = layout.partition(MARK)
    if after.replace(MARK, "").strip(" \n,;."):
        return None
    if not before.strip():
        return ""
    return before.strip() if before.rstrip(" ")[-1:] == "\n" and all(r.label for r in regions) else None


def measured(edges: Sequence[float], unit: str) -> tuple[Box, bool]:
    """Return four numbers as a box, and True if it is in shares of the image's sides, False if in pixels.

    `unit` is the recipe's `data.boxes`. Thousandths are converted to shares. With `auto` numbers up to 1 are
    shares. Raises ValueError with what is wrong, to follow the box in a message.
    """
    x1, y1, x2, y2 = box = (float(edges[0]), float(edges[1]), float(edges[2]), float(edges[3]))
    if min(box) < 0 or x1 >= x2 or y1 >= y2:
        raise ValueError("must have its second corner right of and below its first, and none below 0")
    most = max(box)
    if unit == "share" and most > 1:
        raise ValueError("is not in shares from 0 to 1, which data.boxes says")
    if unit in ("pixels", "thousand") and most <= 1:
        raise ValueError(f"seems to be in shares from 0 to 1, but data.boxes says {unit}")
    if most <= 1:
        return box, True
    if unit == "thousand":
        if most > 1000:
            raise ValueError("is not from 0 to 1000, which data.boxes says")
        return (x1 / 1000, y1 / 1000, x2 / 1000, y2 / 1000), True
    if most < 2:
        raise ValueError("is neither in pixels nor in shares from 0 to 1")
    return box, False


_UNDECIDED = "data.boxes"


def _regions(found: Sequence[Found], unit: str) -> tuple[Region, ...]:
    """Return the boxes as Regions; of several at one place the first has the label. Raises ValueError."""
    regions = []
    for one in found:
        for number, edges in enumerate(one.boxes):
            try:
                box, relative = measured(edges, unit)
            except ValueError as error:
                shown = ", ".join(f"{edge:g}" for edge in edges)
                raise ValueError(
                    f"[{shown}], which {error}; if it is x, y, width and height, make it corners; "
                    "data.variant: text leaves boxes as they are"
                ) from None
            undecided = "" if relative or unit != "auto" else _UNDECIDED
            label = one.label if number == 0 else ""
            regions.append(
                Region(box, label, one.image or 0, relative, None, one.bare, undecided, one.notation)
            )
    return tuple(regions)


def read(example: Example, variant: str | None, unit: str, default: str = "marked") -> Example:
    """Return the example with the boxes in its question and its first answer as Regions.

    `variant` is `marked`, `boxes` (four numbers in brackets are boxes too), `text` (reads nothing) or None:
    then `default` holds, and brackets that may be a box are noted in `doubtful`. A question or answer with
    boxes from columns stays as it is. So does a text of an example with several images, if one of its boxes
    does not say which image it is in. Raises ValueError for a wrong box, to follow "the box" in a message.
    """
    images = len(example.images)
    several = images > 1
    chosen = variant or default

    def found_in(text: str) -> list[Found]:
        found = find(text, images=images, brackets=chosen == "boxes")
        if several and not all(one.image is not None and 0 <= one.image < images for one in found):
            return []
        if found and MARK in _without(text[:READ], found):
            raise ValueError(f"{MARK}, which has no numbers, beside boxes that have some")
        return found

    made = example
    if chosen != "text":
        if not example.asked_regions and (found := found_in(example.question)):
            question = layout_of(example.question, found)
            made = replace(made, question=question, asked_regions=_regions(found, unit))
        if not example.regions and (found := found_in(example.answers[0])):
            made = _answered(made, found, unit)
    unsaid = variant is None or (variant == "boxes" and several)
    if unsaid and (bracket := next(filter(None, map(in_brackets, (made.question, *made.answers))), "")):
        made = replace(made, doubtful=bracket)
    return made


def _answered(example: Example, found: Sequence[Found], unit: str) -> Example:
    """Return the example with the boxes of its answer, with a layout if boxes stand among its words."""
    text, regions = layout_of(example.answers[0], found), _regions(found, unit)
    named = iter(regions)
    following = tuple(
        replace(next(named), label=one.label) for one in found for _ in one.boxes
    )  # each with its label, as these are not words of a sentence
    words = stands_first(text, following)
    if words is None:
        return replace(
            example,
            answers=(without_boxes(text, regions), *example.answers[1:]),
            regions=regions,
            layout=text,
        )
    labels = "; ".join(dict.fromkeys(region.label for region in following if region.label))
    return replace(example, answers=(words or labels, *example.answers[1:]), regions=following)


_COORDINATES = re.compile(r"[<\[(:=]")
"""A character without which `resembling` finds nothing: most texts have none."""


def resembling(text: str) -> str:
    """Return the first coordinates, of boxes or points, that a key or a tag marks in a text; "" if none."""
    if not _COORDINATES.search(text):
        return ""
    found = _RESEMBLING.search(text[:READ])
    if found:
        return found[0].strip()
    named = next((one for one in find(text) if not one.bare), None)
    return text[named.start : named.end] if named else ""


def in_brackets(text: str) -> str:
    """Return the first four numbers in brackets that may be the corners of a box; "" if none."""
    if "[" not in text and "(" not in text:
        return ""
    for one in find(text, brackets=True):
        x1, y1, x2, y2 = one.boxes[0]
        if one.notation == "brackets" and x1 < x2 and y1 < y2:
            return text[one.start : one.end]
    return ""
