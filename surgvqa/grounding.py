"""Boxes as the text that each family was trained to write, and back.

    Region in the source ── on_canvas ──▶ thousandths of the canvas ── write_answer ──▶ text for the model
    Region in the source ◀── in_source ── thousandths of the canvas ◀── parse_answer ── what a model wrote

Boxes follow the words of an answer, or stand among them where the data has them there (`Example.layout`).
Inside JSON that says more than boxes and labels only the four numbers are written.

Both families count from 0 to 1000 along each side of the image that they see, which here is the canvas with
its padding:

- Qwen2-VL: `<|object_ref_start|>polyp<|object_ref_end|><|box_start|>(176,106),(232,160)<|box_end|>` (Wang et
  al., arXiv 2409.12191, section 2.2.1, "Visual Grounding").
- Qwen3-VL: `[{"bbox_2d": [176, 106, 232, 160], "label": "polyp"}]` (QwenLM/Qwen3-VL, cookbooks/2d_grounding;
  that such an object may stand in a question: its issue 1927).

Coordinates are `round(x / width × 1000)`, kept within 0 and 1000, as in that repository's
qwen-vl-finetune/tools/process_bbox.ipynb. So an edge is moved by at most half a thousandth of the canvas.
That is shown / 2000 source pixels, where `shown = canvas.width / canvas.scale_x` is how many of them the
canvas would hold from edge to edge: within one pixel up to 2,000 of them, and 1.92 pixels for 3,840.
Whatever is written in thousandths can be no finer. A box narrower than a thousandth is made one wide, which
moves an edge by less than that.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from surgvqa.augment import Placement
from surgvqa.datasets import Box, Example, Problem, Region
from surgvqa.datasets.boxes import (
    MARK,
    NUMBER,
    OBJECT,
    READ,
    find,
    layout_of,
    resembling,
    stands_first,
    without_boxes,
)
from surgvqa.letterbox import Canvas, Rectangle, Size, clipped

TOKENS = ("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>")
"""The special tokens that are put around boxes; data may not hold them."""

PLACEHOLDER = MARK
"""Where in a question its boxes go, in order; without any they follow it."""

SCALE = 1000
"""The last coordinate on either side."""


def on_canvas(region: Region, canvas: Placement) -> Region:
    """A region of the source in whole thousandths of its canvas; what is not on it is cut off."""
    x1, y1, x2, y2 = canvas.to_canvas(source_pixels(region, canvas.source_size).box)
    left, right = _thousandths(x1, x2, canvas.width)
    top, bottom = _thousandths(y1, y2, canvas.height)
    return replace(region, box=(left, top, right, bottom), relative=False)


def on_canvases(
    example: Example, regions: Sequence[Region], canvases: Mapping[str, Placement]
) -> list[Region]:
    """`on_canvas` for regions of an example, each on the canvas of its image."""
    return [on_canvas(region, canvases[example.images[region.image].key]) for region in regions]


def in_source(region: Region, canvas: Canvas) -> Region:
    """A region in thousandths of the canvas, in source pixels; what is outside the image is cut off."""
    box = canvas.to_source(in_pixels(region.box, canvas))
    return replace(region, box=clipped(box, canvas.source_size))


def source_pixels(region: Region, size: Size) -> Region:
    """A region of a source image of `size` in its pixels; what is outside the image is cut off."""
    return replace(region, box=clipped(_pixels(region, size), size), relative=False)


def in_pixels(box: Box, canvas: Placement) -> Box:
    """A box in thousandths of the canvas, in its pixels."""
    x1, y1, x2, y2 = box
    width, height = canvas.width / SCALE, canvas.height / SCALE
    return x1 * width, y1 * height, x2 * width, y2 * height


def _pixels(region: Region, size: Size) -> Box:
    x1, y1, x2, y2 = region.box
    width, height = size if region.relative else (1, 1)
    return x1 * width, y1 * height, x2 * width, y2 * height


def _thousandths(low: float, high: float, side: int) -> tuple[int, int]:
    first, last = (max(0, min(round(edge / side * SCALE), SCALE)) for edge in (low, high))
    if first < last:
        return first, last
    more_is_after = (low + high) / 2 > first * side / SCALE
    return (first, first + 1) if first == 0 or (more_is_after and first < SCALE) else (first - 1, first)


def decide_units(
    examples: Iterable[Example], sizes: Mapping[str, Size]
) -> tuple[dict[str, str], list[Problem]]:
    """Return the units (`pixels` or `thousand`) of boxes in texts that the recipe leaves open, and problems.

    A unit is by the recipe key that would give it; each data set has its own. A number above 1000 proves
    pixels; a box that would reach out of its image in pixels proves thousandths. Without a proof there is an
    error.
    """
    undecided: dict[str, list[tuple[Example, Region]]] = defaultdict(list)
    for example in examples:
        for region in (*example.asked_regions, *example.regions):
            if region.undecided:
                undecided[region.undecided].append((example, region))
    units: dict[str, str] = {}
    problems = []
    for key, boxes in undecided.items():
        above = [pair for pair in boxes if max(pair[1].box) > SCALE]
        beyond = [] if above else [pair for pair in boxes if _beyond(*pair, sizes)]
        example, region = (above or beyond or boxes)[0]
        size = sizes.get(example.images[region.image].key)
        shown = _shown(region.box) + (f" in an image of {size[0]}×{size[1]} pixels" if size else "")
        count = f"{len(boxes)} boxes in texts" if len(boxes) > 1 else "1 box in a text"
        if not (above or beyond):
            what = (
                f"{count} may be in pixels or in thousandths of the image's sides, such as {shown}; "
                f"set {key}: pixels or {key}: thousand"
            )
            problems.append(Problem(example.place, what, whole=True))
            continue
        units[key] = "pixels" if above else "thousand"
        why = "a number above 1000" if above else "corners outside of its image if they were pixels"
        what = (
            f"{count} without a unit are taken to be {'pixels' if above else 'thousandths of the sides'}: "
            f"{len(above or beyond)} of them with {why}, such as {shown}; set {key}: {units[key]} if "
            "this is right for all, else give boxes of another unit a data set of their own in data.more"
        )
        problems.append(Problem(example.place, what, warning=True))
    return units, problems


def _beyond(example: Example, region: Region, sizes: Mapping[str, Size]) -> bool:
    size = sizes.get(example.images[region.image].key)
    return size is not None and (region.box[2] > size[0] + 1 or region.box[3] > size[1] + 1)


def with_units(example: Example, units: Mapping[str, str]) -> Example:
    """Return the example with its undecided boxes in the units that `decide_units` has found."""

    def decided(regions: tuple[Region, ...]) -> tuple[Region, ...]:
        made = []
        for region in regions:
            if unit := units.get(region.undecided):
                region = replace(region, undecided="")
                if unit == "thousand":
                    x1, y1, x2, y2 = (edge / SCALE for edge in region.box)
                    region = replace(region, box=(x1, y1, x2, y2), relative=True)
            made.append(region)
        return tuple(made)

    if not any(region.undecided for region in (*example.asked_regions, *example.regions)):
        return example
    return replace(example, regions=decided(example.regions), asked_regions=decided(example.asked_regions))


def left_as_text(example: Example) -> tuple[str, bool]:
    """Return coordinates that an example's texts keep, and whether a key or a tag marks them as such.

    Unmarked ones are those of `Example.doubtful`. Returns "" if there are neither.
    """
    question = example.question.replace(PLACEHOLDER, "") if example.asked_regions else example.question
    for text in (question, *example.answers):
        if marked := resembling(text):
            return marked, True
    return example.doubtful, False


def moves(
    image: str, mode: str, crop: str, sizes: Mapping[str, Size], pictures: Mapping[str, Rectangle]
) -> bool:
    """Return whether an image's canvas pads or crops it, so that positions as shares of its sides change.

    `image` is its key, `mode` and `crop` are the recipe's of `image`, `pictures` are the parts that a crop
    keeps.
    """
    width, height = size = sizes[image]
    if crop == "border":
        left = pictures.get(image)
        if left is None or left != (0, 0, *size):
            return True
    return mode == "letterbox" and width != height


def misplaced(
    example: Example, sizes: Mapping[str, Size], pictures: Mapping[str, Rectangle] | None = None
) -> list[str]:
    """What is wrong with an example's boxes, given the (width, height) of images by their key.

    `pictures` are what a crop leaves of them. A box may reach out of its image by a pixel. Boxes in images
    whose size is not known are not looked at.
    """
    wrong = []
    for region in (*example.asked_regions, *example.regions):
        if not 0 <= region.image < len(example.images):
            wrong.append(
                f"box {_shown(region.box)} is in image {region.image + 1}, but the question is about "
                f"{len(example.images)}"
            )
        elif size := sizes.get(example.images[region.image].key):
            x1, y1, x2, y2 = box = _pixels(region, size)
            cut = clipped(box, size)
            if region.of not in (None, size):
                wrong.append(
                    f"its box is in pixels of {region.of[0]}×{region.of[1]}, but the image has "
                    f"{size[0]}×{size[1]}; use the frames as they were published"
                )
            elif not (x1 < x2 and y1 < y2):
                wrong.append(
                    f"box {_shown(region.box)} is empty; it must be x1, y1, x2, y2 with x1 < x2, y1 < y2"
                )
            elif min(x1, y1) < -1 or x2 > size[0] + 1 or y2 > size[1] + 1:
                sides = "of 0 to 1" if region.relative else "of pixels"
                wrong.append(
                    f"box {_shown(region.box)} {sides} reaches out of its image of {size[0]}×{size[1]} pixels"
                )
            elif not (cut[0] < cut[2] and cut[1] < cut[3]):
                wrong.append(f"box {_shown(region.box)} is outside of its image")
            elif pictures and (left := pictures.get(example.images[region.image].key)):
                seen = max(cut[0], left[0]), max(cut[1], left[1]), min(cut[2], left[2]), min(cut[3], left[3])
                if not (seen[0] < seen[2] and seen[1] < seen[3]):
                    wrong.append(
                        f"box {_shown(region.box)} is in the border that image.crop cuts off, which leaves "
                        f"{_shown(left)}; set image.crop: none"
                    )
    if any(region.label for region in example.regions) and not example.answers[0].strip():
        wrong.append("the answer is empty, but its boxes have labels; make them the answer")
    places, boxes = example.question.count(PLACEHOLDER), len(example.asked_regions)
    if boxes and places not in (0, boxes):
        wrong.append(f"the question has {places} {PLACEHOLDER} for {boxes} boxes")
    return wrong


def _shown(box: Box) -> str:
    return "[" + ", ".join(f"{edge:g}" for edge in box) + "]"


def write_answer(
    family: str, text: str, regions: Sequence[Region], images: int = 1, *, layout: str = ""
) -> str:
    """An answer with its boxes, in thousandths of the canvas, as the model is to write it.

    With a `layout` each box stands at its `<box>` there. Else:
    Boxes without any label get the text as theirs: `left-top` in [0, 0, 9, 9] is one labelled box. Where the
    boxes' labels, each once and joined with `; `, are the text, there is nothing else; else the text comes
    first, on lines of its own. With several images each box says which one it is in, counting from 1.
    """
    if not regions:
        return text
    if layout:
        return write_question(family, layout, regions, images)
    if text and not any(region.label for region in regions):
        regions = [replace(region, label=text) for region in regions]
    written = _written(family, regions, images)
    if family == "qwen3_vl":
        written = f"[{written}]"
    return written if text in ("", _labels(regions)) else f"{text}\n{written}"


def write_question(family: str, text: str, regions: Sequence[Region], images: int = 1) -> str:
    """A question with its boxes, in thousandths of the canvas: in place of each `<box>`, else at its end."""
    if not regions:
        return text
    first, *rest = text.split(PLACEHOLDER)
    if len(rest) != len(regions):
        return f"{text} {_written(family, regions, images)}"
    boxes = (_bare(region) if region.bare else _written(family, [region], images) for region in regions)
    return first + "".join(box + following for box, following in zip(boxes, rest, strict=True))


def _written(family: str, regions: Sequence[Region], images: int) -> str:
    return {"qwen2_vl": _tagged, "qwen3_vl": _json}[family](regions, images)


def _bare(region: Region) -> str:
    return json.dumps([int(edge) for edge in region.box])


def _tagged(regions: Sequence[Region], images: int) -> str:
    ref, ref_end, box, box_end = TOKENS
    labelled = any(region.label for region in regions)  # then an empty one ends what the last is called
    written = ""
    for region in regions:
        x1, y1, x2, y2 = map(int, region.box)
        picture = f"Picture {region.image + 1}: " if images > 1 else ""
        label = f"{ref}{region.label}{ref_end}" if labelled else ""
        written += f"{picture}{label}{box}({x1},{y1}),({x2},{y2}){box_end}"
    return written


def _json(regions: Sequence[Region], images: int) -> str:
    return ", ".join(
        json.dumps(
            {
                **({"image": region.image + 1} if images > 1 else {}),
                "bbox_2d": [int(edge) for edge in region.box],
                **({"label": region.label} if region.label else {}),
            },
            ensure_ascii=False,
        )
        for region in regions
    )


def _labels(regions: Sequence[Region]) -> str:
    return "; ".join(dict.fromkeys(region.label for region in regions if region.label))


# Reading. Every pattern below either is anchored, or takes what it has looked at, or is bounded: the time is
# that of a few passes over the text, whatever is in it.


def as_rows(regions: Sequence[Region]) -> list[dict[str, Any]]:
    """Regions as predictions.jsonl has them: image counts from 0, boxes have two decimals."""
    return [
        {"label": region.label, "box": [round(edge, 2) for edge in region.box], "image": region.image}
        for region in regions
    ]


_NUMBER = NUMBER
_GAP = r"[\s,;()\[\]]{1,8}"
_FOUR = rf"{_NUMBER}(?:{_GAP}{_NUMBER}){{3}}"
_TAG = re.compile(r"(<\|(?:object_ref|box)_(?:start|end)\|>|</?(?:ref|box|bbox)>)")
_PLAIN_TAG = {
    "<|object_ref_start|>": "<ref>", "<|object_ref_end|>": "</ref>", "<|box_start|>": "<box>",
    "<|box_end|>": "</box>", "<bbox>": "<box>", "</bbox>": "</box>",
}  # fmt: skip
_BOXES = re.compile(rf"[\s\[({{]{{0,8}}({_NUMBER}(?:{_GAP}{_NUMBER}){{3,}})[\s\])}}]{{0,8}}")
_BARE = re.compile(rf"\[\s{{0,4}}{_FOUR}\s{{0,4}}\]|\(\s{{0,4}}{_FOUR}\s{{0,4}}\)")
_PICTURE = re.compile(r"Picture (\d{1,3}):\Z")
_OBJECT = OBJECT
_KEY = re.compile(r"""["']?\b(?:bbox_2d|box_2d|bbox|box|bounding_box)\b["']?\s{0,4}[:=]\s{0,4}""")
_LABEL = re.compile(
    r"""[\s,]{0,8}["']?\b(?:label|name|category|class)\b["']?\s{0,4}[:=]\s{0,4}(?:"((?:[^"\\]+|\\.?)*)"?|'([^']*)'?)""",
    re.DOTALL,
)
_IMAGE = re.compile(r"""["']image["']\s{0,4}:\s{0,4}(\d{1,3})""")


def parse_answer(text: str, images: int = 1, in_place: bool = False) -> tuple[str, list[Region]]:
    """The text of an answer without its boxes, and the boxes in thousandths of the canvas.

    With `in_place` boxes may stand among the words. Then labels stay there, and so does JSON with more than
    boxes and labels, with `[]` for the numbers of a box, as in the `answers` of an Example with a layout.

    The inverse of `write_answer` for both families; beyond that it takes what models write instead: either
    family's form, `<ref>` and `<box>`, code fences, other keys for the box, missing or unbalanced brackets,
    an end that is cut off, floats, shares of 1, swapped corners. Plain `[x1, y1, x2, y2]` and
    `(x1,y1),(x2,y2)` count where there is nothing better. Where only boxes are written their labels are
    the text. Never raises; numbers that make no box stay text.
    """
    if in_place and (read := _read_in_place(text, images)):
        return read
    reader = _Reader(images)
    head, tail = text[:READ], text[READ:]
    reader.tagged(head)
    if not reader.regions:
        reader = _Reader(images)
        reader.bare(head)
    if not reader.regions:
        for token in TOKENS:
            text = text.replace(token, "")
        return text.strip(), []
    rest = " ".join(piece for piece in map(_prose, [*reader.prose, tail]) if piece)
    return rest or _labels(reader.regions), reader.regions


def _read_in_place(text: str, images: int) -> tuple[str, list[Region]] | None:
    """Return the words and the boxes of an answer with boxes among its words; None for any other."""
    found = find(text, images=images)
    following = [
        Region(
            _kept_within(edges),
            one.label,
            one.image if one.image is not None and 0 <= one.image < images else 0,
            bare=one.bare,
        )
        for one in found
        for edges in one.boxes
    ]
    layout = layout_of(text, found)
    if not found or layout.count(MARK) != len(following) or stands_first(layout, following) is not None:
        return None
    first = [number == 0 for one in found for number in range(len(one.boxes))]
    regions = [each if own else replace(each, label="") for each, own in zip(following, first, strict=True)]
    return without_boxes(layout, regions), regions


def _kept_within(edges: Sequence[float]) -> Box:
    """Return four numbers of a model as a box in thousandths: shares of 1 scaled, corners sorted."""
    if max(edges) <= 1 and any(edge % 1 for edge in edges):
        edges = [edge * SCALE for edge in edges]
    x1, y1, x2, y2 = (max(0.0, min(edge, float(SCALE))) for edge in edges)
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


class _Reader:
    """What has been read so far: boxes, and the text between them."""

    def __init__(self, images: int) -> None:
        self._images = images
        self._image = 0
        self.regions: list[Region] = []
        self.prose: list[str] = []

    def tagged(self, text: str) -> None:
        """Text with `<ref>` and `<box>` tags, JSON between them."""
        label, inside = "", ""
        for piece in _TAG.split(text):
            tag = _PLAIN_TAG.get(piece, piece)
            if tag in ("<ref>", "</ref>", "<box>", "</box>"):
                inside = "" if tag.startswith("</") else tag
            elif inside == "<ref>":
                self._unused(label)
                label = piece.strip()
            elif piece.strip():
                start = 0
                if (inside == "<box>" or label) and (found := _BOXES.match(piece)):
                    self._add(found[1], label)
                    start = found.end()
                elif inside == "<box>" and self.regions:  # one more, cut off
                    start = len(piece)
                elif label:
                    self._unused(label)
                    label = ""
                if rest := piece[start:]:
                    label = label if not rest.strip(_PUNCTUATION) else ""
                    self._json(rest)
        if not (self.regions and inside == "<ref>"):  # else the name of one more was cut off
            self._unused(label)

    def _unused(self, label: str) -> None:
        """A label that no box came for is text."""
        if label and (not self.regions or self.regions[-1].label != label):
            self.prose.append(label)

    def _json(self, text: str) -> None:
        """Objects with a box; the text between them, without the brackets of their list, is prose.

        Where braces are missing, a key with a box is enough; its label may follow.
        """
        spans = [found.span() for found in _OBJECT.finditer(text)]
        at = 0
        for start, end in spans:
            if self._object(text, start, end, text[at:start].rstrip().removesuffix("[" if at == 0 else "")):
                at = end
        if not at:
            for key in _KEY.finditer(text):
                if key.start() >= at and (found := _BOXES.match(text, key.end())):
                    label = _LABEL.match(text, found.end())
                    self._before(text[at : key.start()])
                    self._add(found[1], _unescaped(label))
                    at = (label or found).end()
        rest = text[at:]
        if at:
            rest = rest.lstrip().removeprefix("]")
            if rest.lstrip(" \n,").startswith("{") and "}" not in rest:  # one more, cut off
                rest = ""
        self._before(rest)

    def _object(self, text: str, start: int, end: int, before: str) -> bool:
        """Whether there is a box between `start` and `end`, where braces are; `before` is prose."""
        for key in _KEY.finditer(text, start, end):
            if found := _BOXES.match(text, key.end(), end):
                around = text[start : key.start()] + "," + text[found.end() : end]
                self._before(before)
                if image := _IMAGE.search(around):
                    self._image = int(image[1]) - 1
                self._add(found[1], _unescaped(_LABEL.search(around)))
                return True
        return False

    def bare(self, text: str) -> None:
        """Text with boxes in nothing but brackets."""
        at = 0
        for found in _BARE.finditer(text):
            self._before(text[at : found.start()])
            self._add(found[0], "")
            at = found.end()
        self._before(text[at:])

    def _before(self, text: str) -> None:
        """Prose in front of a box or at the end, which may say which picture the next box is in."""
        text = text.rstrip()
        if self._images > 1 and (picture := _PICTURE.search(text, max(0, len(text) - 12))):
            self._image = int(picture[1]) - 1
            text = text[: picture.start()]
        self.prose.append(text)

    def _add(self, numbers: str, label: str) -> None:
        edges = [float(number) for number in re.findall(_NUMBER, numbers)]
        image = self._image if 0 <= self._image < self._images else 0
        for start in range(0, len(edges) - 3, 4):
            self.regions.append(Region(_kept_within(edges[start : start + 4]), label, image))


_PUNCTUATION = " \t\r\n[]{}(),;:\"'`"


def _prose(piece: str) -> str:
    """A piece of text between boxes, or nothing where it is what is left of their brackets and fences."""
    piece = piece.replace("```json", " ").replace("```", " ").strip()
    return piece if piece.strip(_PUNCTUATION) else ""


def _unescaped(found: re.Match[str] | None) -> str:
    """The label that `_LABEL` found."""
    if found is None or found[1] is None:
        return "" if found is None else found[2].strip()
    try:
        text = str(json.loads(f'"{found[1]}"', strict=False)).strip()
        return text.encode("utf-8", "backslashreplace").decode()  # half a character stays an escape
    except ValueError:  # an escape that is none, or one cut off
        return found[1].strip()
