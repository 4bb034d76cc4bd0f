"""PSI-AVA-VQA (Seenivasan et al. 2023): questions on robotic prostatectomies of the PSI-AVA data set.

    keyframes/CASE021/00001.jpg
    Train/C1_location.txt       CASE021/00001.jpg|Where is the Bipolar Forceps located ?|top left

also C3_phase.txt and C4_step.txt, and the same in Val. The authors' code had C2_action.txt, whose answers are
lists of actions, and then took it out (SurgicalGPT/train.py): the 35 published answers have none. They train
on Train and report on Val, on which they also choose their model. Here Val is `test` and there is no `val`.
"""

from __future__ import annotations

from collections.abc import Iterator

from surgvqa.datasets import Example, Problem
from surgvqa.datasets.frames import Corpus, there
from surgvqa.recipe import Part, Source

LABELS = (
    # 4 locations
    "top left", "top right", "bottom left", "bottom right",
    # 11 phases
    "Complejo_venoso_dorsal", "Control_Pediculos", "Espacio_de_Retzius", "Fascia_Denonvilliers",
    "Id_Cuello_Vesical", "LPAD", "LPAI", "Rec_Cuello_Vesical", "Separacion_Prostata_Uretra", "Tiempo_muerto",
    "Vesículas_Seminales",
    # 21 steps with Tiempo_muerto
    "Anudar", "Clip_Pediculos", "Corte", "Corte_Prostata", "Corte_Vejiga", "Diseccion_Denon",
    "Diseccion_Ganglios_Iliacos", "Diseccion_Ganglios_Obturadores", "Diseccion_Prevesical",
    "Diseccion_Prostata", "Diseccion_Seminal", "Empacar_Ganglios", "Empacar_Prostata", "Halar_sutura",
    "Id_Vena_Arteria_Iliaca", "Pasar_Aguja_Cuello", "Pasar_Aguja_Cvdp", "Pasar_Aguja_Uretra", "Succion",
    "Sujetar_Prostata",
)  # fmt: skip

_PARTS: dict[str, Part] = {"Train": "train", "Val": "test"}
_FILES = {"C1_location": "location", "C2_action": "action", "C3_phase": "phase", "C4_step": "step"}
_LAYOUT = "Train and Val with C1_location.txt, C3_phase.txt and C4_step.txt, and keyframes/<case>/*.jpg"


def read(source: Source) -> Iterator[Example | Problem]:
    """Every line of the published files, and of C2_action.txt in the variant with_actions.

    Raises BadInput where there is no such corpus. Warns of missing files, and of actions left out.
    """
    form = "case/frame.jpg|question|answer"
    corpus = Corpus(source, name="PSI-AVA-VQA", layout=_LAYOUT, marks=["Train", "Val"], form=form)
    for folder, part in _PARTS.items():
        for stem, kind in _FILES.items():
            file = corpus.root / folder / f"{stem}.txt"
            if kind == "action" and source.variant != "with_actions":
                if there(file):
                    corpus.left_out[
                        f"files of actions ({file.name}; data.variant: with_actions reads them)"
                    ] += 1
                continue
            if not there(file):
                corpus.lacks([f"{folder}/{file.name}"])
                continue
            for row in corpus.listed(file, lambda case: [f"keyframes/{case}"]):
                if isinstance(row, Problem):
                    yield row
                else:
                    case = row.image.key.partition("/")[0]
                    labels = () if kind == "action" else LABELS
                    yield corpus.example(row, kind, f"psi_ava/{case}", part, labels=labels)
    yield from corpus.warnings()
