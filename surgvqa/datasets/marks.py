"""Remove the marks of other toolkits for an image's place in a text: here all images come first."""

from __future__ import annotations

import re

PLACEHOLDER = re.compile(
    r"<image>|<ImageHere>|<video>|<img>[^<>]{0,4096}</img>|<img>|<\|image\|>|<IMG_CONTEXT>"
    r"|<\|vision_start\|>(?:<\|(?:image|video)_pad\|>)*<\|vision_end\|>|<\|(?:image|video)_pad\|>",
    re.IGNORECASE,
)
"""Marks that stand for an image of the row."""

NUMBERED = re.compile(r"<image[ _]?\d{1,3}>", re.IGNORECASE)
"""Marks that name one of several images within a sentence."""


def without_marks(text: str) -> tuple[str, list[str]]:
    """Return the text without its marks, and the marks. Lines without a mark stay as they are."""
    if "<" not in text:
        return text, []
    marks: list[str] = PLACEHOLDER.findall(text)
    if not marks:
        return text, []
    lines = [
        " ".join(PLACEHOLDER.sub(" ", line).split()) if PLACEHOLDER.search(line) else line
        for line in text.splitlines()
    ]
    return "\n".join(lines).strip(), marks
