"""EndoVis-18-VQLA and EndoVis-17-VQLA (Bai et al. 2023): questions whose answers have a place in the image.

    seq_3/left_frames/frame000.png    (or left_fr)        left_frames/seq1_frame001.jpg    97 frames, flat
    seq_3/vqla/label/frame000_QAL.txt (or vqla)           vqla/label/seq1_frame001.txt     (or vqla)

A line is `question|answer|x1,y1,x2,y2`: whole numbers counted from 1, both ends inclusive, on frames of
1280 × 1024 pixels (the authors subtract 1 and divide by these: Surgical-VQLA/dataloader.py). Frames, split,
answers and questions of EndoVis-18-VQLA are those of EndoVis-18-VQA. EndoVis-17-VQLA is an external test:
all of it is `test`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from surgvqa.datasets import Example, Problem, Region
from surgvqa.datasets.endovis18_vqa import FRAMES, LABELS, SEQUENCE, group, missing, part, question_type
from surgvqa.datasets.frames import Corpus, Row
from surgvqa.recipe import Part, Source

WIDTH, HEIGHT = 1280, 1024

_FORM = "question|answer|x1,y1,x2,y2"


def read(source: Source) -> Iterator[Example | Problem]:
    """Every line, its box as the region of the answer. Raises BadInput where there is no such corpus."""
    yield from _endovis18(source) if source.format == "endovis18_vqla" else _endovis17(source)


def _endovis18(source: Source) -> Iterator[Example | Problem]:
    layout = "seq_<number>/left_frames/*.png (or left_fr) and seq_<number>/vqla/label/*.txt (or vqla/*.txt)"
    corpus = Corpus(source, name="EndoVis-18-VQLA", layout=layout, marks=["seq_*"], form=_FORM)
    sequences = corpus.videos(corpus.root, SEQUENCE)
    for number, folder in sequences:
        texts = corpus.folder(f"{folder.name}/vqla/label", f"{folder.name}/vqla")
        if texts is None:
            yield Problem(str(folder), "has no vqla/label or vqla and is left out", warning=True)
            continue
        places = [f"{folder.name}/{name}" for name in FRAMES]
        for row in corpus.beside(texts, places, folder.name, counts=(3,)):
            yield _example(corpus, row, group(number), part(number)) if isinstance(row, Row) else row
    corpus.lacks(missing(number for number, _ in sequences))
    yield from corpus.warnings()


def _endovis17(source: Source) -> Iterator[Example | Problem]:
    layout = "left_frames/*.jpg and vqla/label/*.txt (or vqla/*.txt)"
    corpus = Corpus(source, name="EndoVis-17-VQLA", layout=layout, marks=["vqla"], form=_FORM)
    texts = corpus.folder("vqla/label", "vqla")
    if texts is None:
        yield Problem(str(corpus.root / "vqla"), "is not a folder", whole=True)
        return
    rows = corpus.beside(
        texts, FRAMES, "endovis17", counts=(3,), frame=lambda stem: re.sub(r"_QAL?$", "", stem)
    )
    for row in rows:
        if isinstance(row, Problem):
            yield row
            continue
        video = re.match(r"endovis17/seq_?\d+(?=_)", row.image.key)
        yield _example(corpus, row, video[0] if video else row.image.key, "test")
    yield from corpus.warnings()


def _example(corpus: Corpus, row: Row, group: str, part: Part | None) -> Example | Problem:
    """The third field becomes a box along pixel edges: pixels 1 to 3 reach from edge 0 to edge 3."""
    numbers = re.fullmatch(r"(\d{1,5})" + r" *, *(\d{1,5})" * 3, row.fields[2], re.ASCII)
    x1, y1, x2, y2 = map(int, numbers.groups()) if numbers else (0, 0, 0, 0)
    if not (1 <= x1 <= x2 <= WIDTH and 1 <= y1 <= y2 <= HEIGHT):
        shown = row.fields[2][:80]
        return Problem(
            row.place,
            f"{shown!r} is no box x1,y1,x2,y2 with 1 ≤ x1 ≤ x2 ≤ {WIDTH} and 1 ≤ y1 ≤ y2 ≤ {HEIGHT}",
        )
    region = Region((x1 - 1, y1 - 1, x2, y2), of=(WIDTH, HEIGHT))
    kind = question_type(row.fields[0])
    return corpus.example(row, kind, group, part, labels=LABELS, regions=(region,))
