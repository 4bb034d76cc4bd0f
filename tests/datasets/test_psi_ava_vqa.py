"""PSI-AVA-VQA in its layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from sources import PIXEL, errors, instructed, load, warnings, write

from surgvqa import recipe


def corpus(root: Path) -> Path:
    for part, case in (("Train", "CASE001"), ("Val", "CASE021")):
        image = f"{case}/00001.jpg"
        write(
            root,
            {
                f"keyframes/{image}": PIXEL,
                f"{part}/C1_location.txt": f"{image}|Where is the Bipolar Forceps located ?|top left\n",
                f"{part}/C2_action.txt": f"{image}|What does it do ?|['Cauterize', 'Close']\n",
                f"{part}/C3_phase.txt": f"{image}|What is the phase ?|Vesículas_Seminales\n",
                f"{part}/C4_step.txt": f"{image}|What is the step ?|Tiempo_muerto\n",
            },
        )
    return root


def test_layout_and_official_split(tmp_path: Path) -> None:
    dataset = load("psi_ava_vqa", corpus(tmp_path / "PSI-AVA-VQA").parent)
    assert errors(dataset) == []
    assert warnings(dataset) == [
        "2 files of actions (C2_action.txt; data.variant: with_actions reads them) are left out, "
        "as by the authors"
    ]
    assert [len(dataset.part(part)) for part in ("train", "val", "test")] == [3, 0, 3]
    location, phase, step = dataset.part("test")
    assert (location.id, location.group) == ("Val/C1_location:1", "psi_ava/CASE021")
    assert [e.question_type for e in (location, phase, step)] == ["location", "phase", "step"]
    assert (phase.answers, len(set(phase.labels))) == (("Vesículas_Seminales",), 35)
    assert {e.question_type for e in dataset.examples} == instructed("psi_ava_vqa")


def test_actions_have_no_closed_set(tmp_path: Path) -> None:
    dataset = load("psi_ava_vqa", corpus(tmp_path), variant="with_actions")
    assert dataset.problems == []
    actions = [e for e in dataset.examples if e.question_type == "action"]
    assert [(e.answers, e.labels) for e in actions] == [(("['Cauterize', 'Close']",), ())] * 2


def test_faults(tmp_path: Path) -> None:
    corpus(tmp_path)
    line = "CASE021/00001.jpg|What is the phase ?|Vesículas_Seminales\n"
    (tmp_path / "Val/C3_phase.txt").write_bytes(line.encode("latin-1") + line.encode())
    (tmp_path / "Train/C4_step.txt").unlink()
    write(tmp_path, {"Train/C1_location.txt": "CASE099/1.jpg|Q?|top left\nCASE001/00001.jpg|Q?|left top\n"})
    dataset = load("psi_ava_vqa", tmp_path)
    said = errors(dataset)
    assert said[0].startswith("C1_location.txt:1: there are no frames in keyframes/CASE099 of")
    assert said[1:] == ["C3_phase.txt:1: is not UTF-8 text"]
    assert "lacks Train/C4_step.txt, so its scores" in warnings(dataset)[1]
    assert "1 answers are not among the corpus's 35: 'left top' (1)" in warnings(dataset)
    assert len(dataset.part("test")) == 3


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    write(tmp_path, {"C1_location.txt": ""})
    with pytest.raises(recipe.BadInput, match=r"has Train and Val with C1_loc.*found C1_location.txt"):
        load("psi_ava_vqa", tmp_path)
