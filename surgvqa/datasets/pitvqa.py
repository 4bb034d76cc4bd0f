"""PitVQA (He et al. 2024): questions on endoscopic operations of the pituitary, the videos of PitVis.

    images/video_01/00001.png    (or square_endo_images, preprocessed_images)
    QA/video_01/00001.txt        one `question|answer` in a line

Not every frame has questions. Questions answered no_visible_instrument or no_secondary_instrument are left
out by the authors, who train on 20 videos and report on 5, on which they also choose their model. Here these
are `test` and there is no `val` (PitVQA/dataloader.py, main.py).
"""

from __future__ import annotations

from collections.abc import Iterator

from surgvqa.datasets import Example, Problem, type_of
from surgvqa.datasets.frames import Corpus
from surgvqa.recipe import Part, Source

VIDEOS = range(1, 26)
TEST = frozenset({2, 6, 12, 13, 24})

LABELS = (
    # 15 steps
    "nasal_corridor_creation", "anterior_sphenoidotomy", "septum_displacement", "sphenoid_sinus_clearance",
    "sellotomy", "haemostasis", "synthetic_graft_placement", "durotomy", "tumour_excision",
    "fat_graft_placement", "gasket_seal_construct", "dural_sealant", "nasal_packing", "debris_clearance",
    "end_of_step",
    # 4 phases
    "nasal_sphenoid", "sellar", "closure", "end_of_phase",
    # 18 instruments
    "suction", "freer_elevator", "pituitary_rongeurs", "spatula_dissector", "kerrisons", "cottle",
    "haemostatic_foam", "micro_doppler", "nasal_cutting_forceps", "stealth_pointer", "irrigation_syringe",
    "retractable_knife", "dural_scissors", "ring_curette", "cup_forceps", "bipolar_forceps", "tissue_glue",
    "surgical_drill",
    # 3 numbers of instruments
    "zero", "one", "two",
    # 5 positions
    "top-left", "top-right", "centre", "bottom-left", "bottom-right",
    # 14 operations
    "The middle and superior turbinates are laterally displaced",
    "The sphenoid ostium is identified and opened",
    "The septum is displaced until the opposite ostium is seen",
    "The sphenoid sinus is opened, with removal of sphenoid septations to expose the face of the sella and "
    "mucosa",
    "Haemostasis is achieved with a surgiflo, a bipolar cautery, and a spongostan placement",
    "The sella is identified, confirmed and carefully opened",
    "A cruciate durotomy is performed",
    "The tumour is seen and removed in a piecemeal fashion",
    "spongostan, tachosil and duragen placement",
    "A fat graft is placed over the defact",  # as the corpus spells it
    "Evicel and Adherus dural sealant are applied",
    "Debris is cleared from the nasal cavity and choana",
    "A MedPor implant and a fascia lata graft are placed",
    "The nasal cavity is packed with Bismuth soaked ribbon gauze",
)  # fmt: skip

_NO_ANSWER = frozenset({"no_visible_instrument", "no_secondary_instrument"})
_FRAMES = ("images", "square_endo_images", "preprocessed_images")


def read(source: Source) -> Iterator[Example | Problem]:
    """Every question that has an answer. Raises BadInput where there is no such corpus.

    Warns of those without, which are left out, of missing videos, and of answers that are not among the 59.
    """
    layout = "QA/video_<number>/<frame>.txt and images/video_<number>/<frame>.png"
    corpus = Corpus(source, name="PitVQA", layout=layout, marks=["QA"])
    videos = corpus.videos(corpus.root / "QA", r"video_(\d{1,3})")
    for number, folder in videos:
        places = [f"{name}/{folder.name}" for name in _FRAMES]
        group = f"pitvqa/video_{number:02d}"
        for row in corpus.beside(folder, places, folder.name, even=False):
            if isinstance(row, Problem):
                yield row
            elif row.fields[1] in _NO_ANSWER:
                corpus.left_out[f"questions answered {row.fields[1]}"] += 1
            else:
                yield corpus.example(row, _kind(row.fields[0]), group, _part(number), labels=LABELS)
    absent = sorted(set(VIDEOS).difference(number for number, _ in videos))
    corpus.lacks([f"video_{number:02d}" for number in absent])
    yield from corpus.warnings()


def _part(number: int) -> Part | None:
    """Of the published split, its validation called test."""
    return "test" if number in TEST else "train" if number in VIDEOS else None


def _kind(question: str) -> str:
    """By the nine forms of question, those about activity and operation having the same answers."""
    forms = {
        r"what is the surgical phase\b": "phase",
        r"what is the surgical step\b": "step",
        r"what is the next surgical phase\b": "next_phase",
        r"what is the next surgical step\b": "next_step",
        r"how many instruments\b": "count",
        r"what is the surgical operation\b": "operation",
        r"what surgical activity\b": "operation",
        r"what instrument\b": "instrument",
        r"where is\b": "position",
    }
    return type_of(question, forms)
