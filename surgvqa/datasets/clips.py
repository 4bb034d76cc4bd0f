"""What the corpora of questions on short clips share: which frames, and where they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from surgvqa.datasets import ImageRef
from surgvqa.datasets.images import Images


def chosen(frames: Sequence[str], most: int | None) -> list[str]:
    """At most `most` frames, evenly spread from the first to the last; all of them if None."""
    if most is None or len(frames) <= most:
        return list(frames)
    if most == 1:
        return [frames[(len(frames) - 1) // 2]]
    return [frames[round(index * (len(frames) - 1) / (most - 1))] for index in range(most)]


def first_of(names: Iterable[str], images: Images) -> ImageRef:
    """The first of the names that is an image. Raises ValueError with what is wrong with the first name."""
    wrong = None
    for name in names:
        try:
            return images.locate(name)
        except ValueError as error:
            wrong = wrong or ValueError(f"{name!r} {error}")
    raise wrong or ValueError("has no name")
