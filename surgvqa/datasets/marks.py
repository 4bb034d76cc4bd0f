"""Remove the marks of other toolkits for an image's place in a text: here all images come first."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping

from surgvqa.datasets import Problem

PLACEHOLDER = re.compile(
    r"<image>|<ImageHere>|<video>|<img>[^<>]{0,4096}</img>|<img>|<\|image\|>|<IMG_CONTEXT>"
    r"|<\|vision_start\|>(?:<\|(?:image|video)_pad\|>)*<\|vision_end\|>|<\|(?:image|video)_pad\|>",
    re.IGNORECASE,
)
"""Marks that stand for an image of the row."""

NUMBERED = re.compile(r"<image[ _]?\d{1,3}>", re.IGNORECASE)
"""Marks that name one of several images within a sentence."""


def without_marks(text: str) -> tuple[str, list[str]]:
    """Return the text without the marks in it, and these; numbered ones are left in.

    Lines without a mark stay as they are.
    """
    if "<" not in text:
        return text, []
    marks: list[str] = PLACEHOLDER.findall(text)
    if not marks:
        return text, NUMBERED.findall(text)
    lines = [
        " ".join(PLACEHOLDER.sub(" ", line).split()) if PLACEHOLDER.search(line) else line
        for line in text.splitlines()
    ]
    bare = "\n".join(lines).strip()
    return bare, [*marks, *NUMBERED.findall(bare)]


def problems(place: str, marks: Mapping[str, Counter[str]]) -> Iterator[Problem]:
    """Yield warnings of `marks`: what texts are, such as question → in how many of them each mark is."""
    for name, counts in marks.items():
        taken = {mark: count for mark, count in counts.items() if not NUMBERED.fullmatch(mark)}
        left = {mark: count for mark, count in counts.items() if mark not in taken}
        for found, what in (
            (taken, "marks of images taken out, since all images come before the question"),
            (left, "marks of numbered images, which are read as text"),
        ):
            if found:
                listed = ", ".join(f"{mark[:60]!r} ({count})" for mark, count in list(found.items())[:5])
                yield Problem(place, f"{name}s have {what}: {listed}", warning=True)
