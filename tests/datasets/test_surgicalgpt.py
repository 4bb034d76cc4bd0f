"""SurgicalGPT's question files, beside the frames of both corpora."""

from __future__ import annotations

from pathlib import Path

import pytest
from sources import PIXEL, errors, load, write

from surgvqa import recipe


def test_endovis(tmp_path: Path) -> None:
    line = "seq_1/frame110|What is the state of bipolar_forceps?|Idle\n"
    write(tmp_path, {"seq_1/left_fr/frame110.png": PIXEL, "Val/endovis_C1.txt": line * 2})
    dataset = load("surgicalgpt", tmp_path)
    assert dataset.problems == []
    first, second = dataset.examples
    assert (first.id, second.id) == ("Val/endovis_C1:1", "Val/endovis_C1:2")
    assert (first.image_key, first.group, first.split) == ("seq_1/frame110", "endovis18/seq_1", "test")
    assert first.images[0] is second.images[0]
    assert (first.question_type, len(first.labels)) == ("state", 18)


def test_cholec80(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "cropped_image/5/14400.png": PIXEL,
            "cropped_image/1/100.png": PIXEL,
            "Val/C1_Phase.txt": "5/14400|what is the phase of image?|calot triangle dissection\n",
            "Val/C2_Tool.txt": "5/14400|is hook used in calot triangle dissection?|yes\n",
            "Val/._C2_Tool.txt": b"\0",
            "Train/C3_Count.txt": "1/100.png|how many tools are operating?|2\n",
        },
    )
    dataset = load("surgicalgpt", tmp_path)
    assert dataset.problems == []
    assert [(e.question_type, e.split, e.group) for e in dataset.examples] == [
        ("count", "train", "cholec80/video01"),
        ("phase", "test", "cholec80/video05"),
        ("tool", "test", "cholec80/video05"),
    ]
    assert {len(e.labels) for e in dataset.examples} == {13}


@pytest.mark.fault("F15")
def test_lines_that_name_no_frame(tmp_path: Path) -> None:
    write(tmp_path, {"secret/1.png": PIXEL})
    write(
        tmp_path / "data",
        {
            "cropped_image/5/0.png": PIXEL,
            "Val/x.txt": "../secret/1|Q?|yes\n5/../../../secret/1|Q?|yes\n/etc/passwd|Q?|yes\n5|Q?|yes\n"
            "5/1|Q?|yes\n6/0|Q?|yes\nQ?|yes\n5/0|Q?|yes\n",
        },
    )
    (tmp_path / "data/Val/y.txt").symlink_to(tmp_path / "secret/1.png")
    dataset = load("surgicalgpt", tmp_path / "data")
    said = errors(dataset)
    assert all("must be `video/frame|question|answer`, but begins with" in line for line in said[:4])
    assert said[4] == f"x.txt:5: its frame is not in {tmp_path}/data/cropped_image/5"
    assert said[5].startswith("x.txt:6: there are no frames in cropped_image/6 or cropped_images/6 of")
    assert said[6] == "x.txt:7: must be `video/frame|question|answer`, not 'Q?|yes'"
    assert said[7].startswith("y.txt: leads out of")
    assert len(said) == 8
    assert len(dataset.examples) == 1


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(recipe.BadInput, match=r"is not SurgicalGPT, which has Val/\*.txt.*found nothing"):
        load("surgicalgpt", tmp_path)
