"""Cholec80-VQA in its layouts."""

from __future__ import annotations

from pathlib import Path

import pytest
from sources import PIXEL, errors, instructed, load, warnings, write

from surgvqa import recipe

LINES = """how many tools are operating?|1
what is the phase of image?|calot triangle dissection
is grasper used in calot triangle dissection?|yes
"""


def corpus(root: Path, frames: str = "cropped_image", form: str = "Classification") -> Path:
    for video in range(1, 41):
        for frame in (0, 100):
            files = {f"{frames}/{video}/{frame}.png": PIXEL, f"{form}/{video}/{frame}_QA.txt": LINES}
            write(root, files)
    return root


@pytest.mark.parametrize("frames", ["cropped_image", "cropped_images"])
def test_layout_and_official_split(tmp_path: Path, frames: str) -> None:
    dataset = load("cholec80_vqa", corpus(tmp_path / "Cholec80-VQA", frames).parent)
    assert dataset.problems == []
    assert {e.group for e in dataset.part("test")} == {
        f"cholec80/video{n:02d}" for n in (5, 11, 12, 17, 19, 26, 27, 31)
    }
    assert [len(dataset.part(part)) for part in ("train", "val", "test")] == [192, 0, 48]
    first = dataset.examples[:3]
    assert [e.question_type for e in first] == ["count", "phase", "tool"]
    assert (first[0].id, first[0].image_key, first[0].answers) == ("1/0:1", "1/0", ("1",))
    assert len(first[0].labels) == 13
    assert {e.question_type for e in dataset.examples} == instructed("cholec80_vqa")


def test_every_hundredth_frame(tmp_path: Path) -> None:
    corpus(tmp_path)
    for frame in range(25, 100, 25):
        write(tmp_path, {f"cropped_image/7/{frame}.png": PIXEL, f"Classification/7/{frame}.txt": LINES})
    write(tmp_path, {"Classification/7/all.txt": LINES, "Classification/7/200.txt": LINES})
    dataset = load("cholec80_vqa", tmp_path)
    assert warnings(dataset)[0] == "3 question files of unused frames are left out, as by the authors"
    assert errors(dataset) == [
        f"{name}.txt: its frame is not in {tmp_path}/cropped_image/7" for name in ("200", "all")
    ]
    assert len(dataset.examples) == 240
    assert "7 (2 frames, 4 files)" in warnings(dataset)[1]


def test_sentences(tmp_path: Path) -> None:
    corpus(tmp_path, form="Sentence")
    dataset = load("cholec80_vqa", tmp_path, variant="sentence")
    assert dataset.problems == []
    assert {e.labels for e in dataset.examples} == {()}
    with pytest.raises(
        recipe.BadInput, match=r"which has Classification/<video>.*found Sentence, cropped_im"
    ):
        load("cholec80_vqa", tmp_path)


def test_unknown_answers_and_videos(tmp_path: Path) -> None:
    write(tmp_path, {"cropped_image/41/0.png": PIXEL, "Classification/41/0.txt": LINES + "Q?|No"})
    dataset = load("cholec80_vqa", tmp_path)
    assert "1 answers are not among the corpus's 13: 'No' (1)" in warnings(dataset)
    assert "lacks video 1, video 2," in warnings(dataset)[0]
    assert "4 rows belong to no part" in errors(dataset)[0]
