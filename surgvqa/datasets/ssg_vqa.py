"""SSG-VQA (Yuan et al. 2024): questions made from scene graphs of the laparoscopies of CholecT45.

    qa_txt/VID01/262.txt      `question|answer|hops|type|relation` in a line
    VID01/000262.png          CholecT45's frames, in a folder of their own (data.roots) or here

The first two lines of a file ask for lists of anatomy and of tools; the authors skip them. Then come lines
without hops: the action on a target and the target of an action (two fields), and what is at a place, with
its centre as a third field. Parts are the authors' (SSG-VQA/train.py). CholecT45's videos are of Cholec80.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from surgvqa.datasets import Example, Problem
from surgvqa.datasets.frames import Corpus, there
from surgvqa.recipe import Part, Source

VAL = frozenset({1, 18, 31, 35, 48})
TEST = frozenset({2, 22, 43, 60, 74})
TRAIN = frozenset({
    4, 5, 6, 8, 10, 12, 13, 14, 15, 23, 25, 26, 27, 29, 32, 36, 40, 42, 47, 49, 50, 51, 52, 56, 57, 62, 65,
    66, 68, 70, 73, 75, 78, 79, 80,
})  # fmt: skip

# One thing has two spellings.
LABELS = (
    "0", "1", "10", "2", "3", "4", "5", "6", "7", "8", "9", "False", "True", "abdominal_wall_cavity",
    "adhesion", "anatomy", "aspirate", "bipolar", "blood_vessel", "blue", "brown", "clip", "clipper",
    "coagulate", "cut", "cystic_artery", "cystic_duct", "cystic_pedicle", "cystic_plate", "dissect", "fluid",
    "gallbladder", "grasp", "grasper", "gut", "hook", "instrument", "irrigate", "irrigator", "liver",
    "omentum", "pack", "peritoneum", "red", "retract", "scissors", "silver", "specimen_bag", "specimenbag",
    "white", "yellow",
)  # fmt: skip

HOPS = {"zero_hop.json": 0, "one_hop.json": 1, "single_and.json": 2}
"""Their number is an example's stage; two for questions about both of two relations."""

_FRAMES = (
    "{video}", "images/{video}", "data/{video}", "videos/{video}", "CholecT45/data/{video}",
    "CholecT50/videos/{video}",
)  # fmt: skip


def read(source: Source) -> Iterator[Example | Problem]:
    """Every question but the lists. Raises BadInput where there is no such corpus.

    Warns of the lists, which are left out, of missing videos, and of answers that are not among the 51.
    """
    layout = (
        "qa_txt/VID<number>/<frame>.txt and CholecT45's frames as VID<number>/<six digits>.png, here, in "
        "images, data or videos, or in a folder that data.roots names"
    )
    form = "question|answer|hops|type"
    corpus = Corpus(source, name="SSG-VQA", layout=layout, marks=["qa_txt", "VID*"], form=form)
    texts = corpus.root / "qa_txt"
    videos = corpus.videos(texts if there(texts) else corpus.root, r"VID(\d{2,3})")
    for number, folder in videos:
        places = [name.format(video=folder.name) for name in _FRAMES]
        group = f"cholec80/video{number:02d}"
        for row in corpus.beside(
            folder, places, folder.name, counts=range(2, 6), skip=2, frame=_six_digits, even=False
        ):
            if isinstance(row, Problem):
                yield row
                continue
            kind, hops = _kind(row.fields)
            yield corpus.example(row, kind, group, _part(number), labels=LABELS, stage=hops)
    absent = sorted((TRAIN | VAL | TEST).difference(number for number, _ in videos))
    corpus.lacks([f"VID{number:02d}" for number in absent])
    yield from corpus.warnings()


def _six_digits(stem: str) -> str:
    return f"{int(stem):06d}" if re.fullmatch(r"\d{1,6}", stem, re.ASCII) else stem


def _part(number: int) -> Part | None:
    return "train" if number in TRAIN else "val" if number in VAL else "test" if number in TEST else None


def _kind(fields: list[str]) -> tuple[str, int | None]:
    """Type of a line, and its hops where it has some."""
    if len(fields) >= 4:
        return fields[3], HOPS.get(fields[2])
    if len(fields) == 3:
        return "at_place", None
    return ("action" if fields[0].lower().startswith("what is the action") else "target"), None
