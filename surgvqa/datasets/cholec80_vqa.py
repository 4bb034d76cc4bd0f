"""Cholec80-VQA (Seenivasan et al. 2022): questions on phase and tools in 40 videos of Cholec80.

    cropped_image/5/14400.png        (or cropped_images)
    Classification/5/14400_QA.txt    one `question|answer` in a line; variant sentence: Sentence

What stands behind `_` in a question file's name is of no account. The authors use every hundredth frame of a
video, train on 32 videos and report on 8, on which they also choose their model. Here these are `test` and
there is no `val` (Surgical_VQA/dataloaders/dataloaderClassification.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from surgvqa.datasets import Example, Problem, type_of
from surgvqa.datasets.frames import Corpus
from surgvqa.recipe import Part, Source

VIDEOS = range(1, 41)
TEST = frozenset({5, 11, 12, 17, 19, 26, 27, 31})

LABELS = (
    "no", "calot triangle dissection", "yes", "1", "2", "gallbladder dissection", "clipping cutting",
    "gallbladder retraction", "0", "cleaning coagulation", "gallbladder packaging", "preparation", "3",
)  # fmt: skip

FRAMES = ("cropped_image", "cropped_images")


def read(source: Source) -> Iterator[Example | Problem]:
    """Questions about every hundredth frame. Raises BadInput where there is no such corpus.

    Warns of the question files of other frames, which are left out, of missing videos, and where frames and
    question files differ in number.
    """
    form = "Sentence" if source.variant == "sentence" else "Classification"
    layout = f"{form}/<video>/<frame>_*.txt and cropped_image/<video>/<frame>.png (or cropped_images)"
    labels = LABELS if form == "Classification" else ()
    corpus = Corpus(source, name="Cholec80-VQA", layout=layout, marks=[form])
    videos = corpus.videos(corpus.root / form, r"(\d{1,2})")
    for number, folder in videos:
        places = [f"{name}/{folder.name}" for name in FRAMES]
        for row in corpus.beside(folder, places, folder.name, wanted=_hundredth):
            if isinstance(row, Problem):
                yield row
            else:
                kind = question_type(row.fields[0])
                yield corpus.example(row, kind, group(number), part(number), labels=labels)
    absent = sorted(set(VIDEOS).difference(number for number, _ in videos))
    corpus.lacks([f"video {number}" for number in absent])
    yield from corpus.warnings()


def _hundredth(frame: str) -> bool:
    """Whether the authors use this frame; one whose name is no number is left to be told of."""
    return not re.fullmatch(r"\d{1,9}", frame, re.ASCII) or int(frame) % 100 == 0


def group(number: int) -> str:
    """The video, under the name that it has in every corpus made from Cholec80."""
    return f"cholec80/video{number:02d}"


def part(number: int) -> Part | None:
    """Of the published split, its validation called test."""
    return "test" if number in TEST else "train" if number in VIDEOS else None


def question_type(question: str) -> str:
    """By the three forms of question."""
    forms = {r"how many tools\b": "count", r"what is the phase\b": "phase", r"is .+ used in\b": "tool"}
    return type_of(question, forms)
