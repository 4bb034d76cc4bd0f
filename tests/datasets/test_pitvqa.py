"""PitVQA in its layouts, and real lines of one frame."""

from __future__ import annotations

from pathlib import Path

import pytest
from sources import PIXEL, SHARED, errors, instructed, load, warnings, write

from surgvqa import recipe
from surgvqa.datasets.pitvqa import LABELS

LINES = """What is the surgical phase shown in the image?|sellar
What is the surgical step shown in this frame?|tumour_excision
What is the surgical operation performed in the image?|A cruciate durotomy is performed
What is the next surgical phase?|closure
What is the next surgical step?|end_of_step
What instrument is used at the centre of the image?|kerrisons
What instrument is used in the top-left of the image?|no_secondary_instrument
What surgical activity is performing by the instrument kerrisons?|A cruciate durotomy is performed
Where is the surgical instrument kerrisons tip located in the image?|centre
How many instruments are present in the image?|one
"""


@pytest.mark.parametrize("images", ["images", "square_endo_images", "preprocessed_images"])
def test_layout_and_official_split(tmp_path: Path, images: str) -> None:
    for number in range(1, 26):
        name = f"video_{number:02d}"
        frames = {f"{images}/{name}/0000{frame}.png": PIXEL for frame in range(3)}
        write(tmp_path / "PitVQA", {f"QA/{name}/00001.txt": LINES, **frames})
    dataset = load("pitvqa", tmp_path)
    assert errors(dataset) == []
    # Frames without questions are as published.
    assert warnings(dataset) == [
        "25 questions answered no_secondary_instrument are left out, as by the authors"
    ]
    assert {e.group for e in dataset.part("test")} == {
        f"pitvqa/video_{n}" for n in ("02", "06", "12", "13", "24")
    }
    assert [len(dataset.part(part)) for part in ("train", "val", "test")] == [180, 0, 45]
    assert [e.question_type for e in dataset.examples[:9]] == [
        "phase", "step", "operation", "next_phase", "next_step", "instrument", "operation", "position",
        "count",
    ]  # fmt: skip
    assert len(set(LABELS)) == 59
    assert {e.question_type for e in dataset.examples} == instructed("pitvqa")
    assert dataset.examples[0].id == "video_01/00001:1"


def test_faults(tmp_path: Path) -> None:
    write(tmp_path, {"QA/video_01/00001.txt": LINES + "Q?|no_visible_instrument\nQ?|bath\n"})
    write(tmp_path, {"QA/video_26/00001.txt": LINES, "QA/video_02/1.txt": LINES})
    write(tmp_path, {f"images/video_{n}/00001.png": PIXEL for n in ("01", "02", "26")})
    dataset = load("pitvqa", tmp_path)
    assert f"1.txt: its frame is not in {tmp_path}/images/video_02" in errors(dataset)
    assert any("9 rows belong to no part" in what for what in errors(dataset))
    said = "\n".join(warnings(dataset))
    assert "1 questions answered no_visible_instrument are left out" in said
    assert "1 answers are not among the corpus's 59: 'bath' (1)" in said
    assert "lacks video_03, video_04" in said


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    write(tmp_path, {"images/video_01/00001.png": PIXEL})
    with pytest.raises(recipe.BadInput, match=r"is not PitVQA, which has QA/video_<number>.*found images"):
        load("pitvqa", tmp_path)


def test_real_lines(tmp_path: Path) -> None:
    real = SHARED / "pitvqa/demo/03828.txt"
    if not real.exists():
        pytest.skip("no real PitVQA lines here; test_layout_and_official_split covers generated ones")
    frame = (real.parent / "03828_render.png").read_bytes()
    write(tmp_path, {"QA/video_02/03828.txt": real.read_bytes(), "images/video_02/03828.png": frame})
    dataset = load("pitvqa", tmp_path)
    assert errors(dataset) == []
    assert [e.question_type for e in dataset.part("test")] == ["phase", "step", "operation", "instrument"]
    assert ["lacks" in what for what in warnings(dataset)] == [True]
