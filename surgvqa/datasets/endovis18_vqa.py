"""EndoVis-18-VQA (Seenivasan et al. 2022): questions on the robotic nephrectomies of MICCAI 2018.

    seq_3/left_frames/frame000.png            (or left_fr)
    seq_3/vqa/Classification/frame000_QA.txt  one `question|answer` in a line; variant sentence: vqa/Sentence

The authors train on eleven sequences and report on 1, 5 and 16, on which they also choose their model. Here
these three are `test` and there is no `val`.
"""

from __future__ import annotations

from collections.abc import Iterator

from surgvqa.datasets import Example, Problem, type_of
from surgvqa.datasets.frames import Corpus, there
from surgvqa.recipe import Part, Source

TRAIN = frozenset({2, 3, 4, 6, 7, 9, 10, 11, 12, 14, 15})
TEST = frozenset({1, 5, 16})

# Written as the corpus writes them: `Suction` is an action. The authors' models choose among all 18,
# whatever the question.
LABELS = (
    "kidney", "Idle", "Grasping", "Retraction", "Tissue_Manipulation", "Tool_Manipulation", "Cutting",
    "Cauterization", "Suction", "Looping", "Suturing", "Clipping", "Staple", "Ultrasound_Sensing",
    "left-top", "right-top", "left-bottom", "right-bottom",
)  # fmt: skip

SEQUENCE = r"seq_(\d{1,4})"
FRAMES = ("left_frames", "left_fr")


def read(source: Source) -> Iterator[Example | Problem]:
    """Questions of all sequences below the source's folder. Raises BadInput where it holds none.

    Warns where sequences are missing, where frames and question files differ in number (the training and
    the test release of the challenge both name their folders seq_1 to seq_4, so images may be of the wrong
    one), and where answers are not among the 18 of the corpus.
    """
    sentences = source.variant == "sentence"
    form, other = ("Sentence", "Classification") if sentences else ("Classification", "Sentence")
    layout = f"seq_<number>/left_frames/*.png (or left_fr) and seq_<number>/vqa/{form}/*.txt"
    labels = () if sentences else LABELS
    corpus = Corpus(source, name="EndoVis-18-VQA", layout=layout, marks=["seq_*"])
    sequences = corpus.videos(corpus.root, SEQUENCE)
    for number, folder in sequences:
        if not there(folder / "vqa" / form):
            what = f"has no vqa/{form} and is left out"
            if there(folder / "vqa" / other):
                what += f"; it has vqa/{other}, which data.variant: {other.lower()} reads"
            yield Problem(str(folder), what, warning=True)
            continue
        places = [f"{folder.name}/{name}" for name in FRAMES]
        for row in corpus.beside(folder / "vqa" / form, places, folder.name):
            if isinstance(row, Problem):
                yield row
            else:
                kind = question_type(row.fields[0])
                yield corpus.example(row, kind, group(number), part(number), labels=labels)
    corpus.lacks(missing(number for number, _ in sequences))
    yield from corpus.warnings()


def missing(numbers: Iterator[int]) -> list[str]:
    """The sequences of the published split that are not among `numbers`."""
    return [f"seq_{number}" for number in sorted((TRAIN | TEST).difference(numbers))]


def group(number: int) -> str:
    """The sequence, under the name that it has in every corpus made from EndoVis 2018."""
    return f"endovis18/seq_{number}"


def part(number: int) -> Part | None:
    """Of the published split, its validation called test."""
    return "train" if number in TRAIN else "test" if number in TEST else None


def question_type(question: str) -> str:
    """By the four forms of question: the last only comes with sentences for answers."""
    forms = {
        r"what organ\b": "organ",
        r"what is the state of\b": "state",
        r"where is\b": "location",
        r"what tools?\b": "tools",
    }
    return type_of(question, forms)
