"""The question files of SurgicalGPT (Seenivasan et al. 2023), one for each type of question.

    EndoVis-18-VQA/Val/endovis_C1.txt     seq_1/frame110|What is the state of bipolar_forceps?|Idle
    Cholec80-VQA/Val/C1_Phase.txt         5/14400|what is the phase of image?|calot triangle dissection

They repeat questions of EndoVis-18-VQA and Cholec80-VQA, whose frames lie beside Val as those corpora have
them (SurgicalGPT/dataloaders/ClasswisedataloaderGPT2Classification.py). Parts are those of the two corpora.
"""

from __future__ import annotations

from collections.abc import Iterator

from surgvqa.datasets import Example, Problem, cholec80_vqa, endovis18_vqa
from surgvqa.datasets.frames import Corpus, Row, there
from surgvqa.recipe import Source

_LAYOUT = (
    "Val/*.txt or Train/*.txt beside the frames of EndoVis-18-VQA, seq_<number>/left_frames (or left_fr), or "
    "of Cholec80-VQA, cropped_image/<video> (or cropped_images)"
)
_FORM = "video/frame|question|answer"


def read(source: Source) -> Iterator[Example | Problem]:
    """Every line of every file. Raises BadInput where there are none."""
    corpus = Corpus(source, name="SurgicalGPT", layout=_LAYOUT, marks=["Train", "Val"], form=_FORM)
    for folder in (corpus.root / "Train", corpus.root / "Val"):
        try:
            names = sorted(corpus.texts(folder)) if there(folder) else []
        except ValueError as error:
            yield Problem(str(folder), str(error), whole=True)
            continue
        for name in names:
            for row in corpus.listed(folder / name, _frames, pattern=r"seq_\d{1,4}|\d{1,2}"):
                yield _example(corpus, row) if isinstance(row, Row) else row
    yield from corpus.warnings()


def _frames(video: str) -> list[str]:
    if video.startswith("seq_"):
        return [f"{video}/{name}" for name in endovis18_vqa.FRAMES]
    return [f"{name}/{video}" for name in cholec80_vqa.FRAMES]


def _example(corpus: Corpus, row: Row) -> Example:
    """Type, group, part and labels are those of the corpus that the question is from."""
    video, question = row.image.key.partition("/")[0], row.fields[0]
    if video.startswith("seq_"):
        number = int(video[4:])
        kind, group = endovis18_vqa.question_type(question), endovis18_vqa.group(number)
        return corpus.example(row, kind, group, endovis18_vqa.part(number), labels=endovis18_vqa.LABELS)
    number = int(video)
    kind, group = cholec80_vqa.question_type(question), cholec80_vqa.group(number)
    return corpus.example(row, kind, group, cholec80_vqa.part(number), labels=cholec80_vqa.LABELS)
