"""SSG-VQA in its layout, and the real lines of one frame."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from sources import PIXEL, SHARED, errors, instructed, load, warnings, write

from surgvqa import recipe
from surgvqa.datasets.ssg_vqa import LABELS, TEST, TRAIN, VAL

LINES = """Which anatomical structures are present?|liver, gallbladder
Which tools are present?|
What is the action being performed on gallbladder?|grasp

Which target is being grasped in the scene?|gallbladder
What anatomy is at the top-mid of the frame ?|liver|[157.0, 60.0]
How many top-mid instruments are there?|1|zero_hop.json|count|NA
Are there any things left of the hook?|True|one_hop.json|exist|relate_spatial
What is it?|specimenbag|single_and.json|query_component
What is it?|blue|one_hop.json|query_color|relate_spatial
What is it?|anatomy|one_hop.json|query_type|relate_spatial
What is that?|specimen_bag|single_and.json|query_component|NA
"""


def test_the_split_has_45_videos() -> None:
    assert (len(TRAIN), len(VAL), len(TEST), len(TRAIN | VAL | TEST)) == (35, 5, 5, 45)
    assert len(set(LABELS)) == 51


@pytest.mark.parametrize("place", ["", "images/", "data/", "videos/"])
def test_layout_and_official_split(tmp_path: Path, place: str) -> None:
    for number in sorted(TRAIN | VAL | TEST):
        name = f"VID{number:02d}"
        write(tmp_path, {f"qa_txt/{name}/1.txt": LINES, f"{place}{name}/000001.png": PIXEL})
    dataset = load("ssg_vqa", tmp_path)
    assert errors(dataset) == []
    assert warnings(dataset) == ["90 lines, the first of their files, are left out, as by the authors"]
    assert [len(dataset.part(part)) for part in ("train", "val", "test")] == [315, 45, 45]
    ours = dataset.examples[:9]
    kinds = ["action", "target", "at_place", "count", "exist", "query_component", "query_color", "query_type"]
    assert [e.question_type for e in ours] == [*kinds, "query_component"]
    assert set(kinds) == instructed("ssg_vqa")
    assert [e.stage for e in ours] == [None, None, None, 0, 1, 2, 1, 1, 2]
    assert [e.answers[0] for e in ours[2:6]] == ["liver", "1", "True", "specimenbag"]
    assert (ours[0].id, ours[0].image_key) == ("VID01/000001:3", "VID01/000001")
    assert (ours[0].group, ours[0].split, len(ours[0].labels)) == ("cholec80/video01", "val", 51)


def test_frames_in_a_folder_of_their_own(tmp_path: Path) -> None:
    write(tmp_path / "ssg", {"VID02/0.txt": LINES, "VID02/1.txt": LINES, "VID04/1.txt": LINES})
    write(tmp_path / "CholecT45/data", {"VID02/000000.png": PIXEL, "VID02/000001 (1).png": PIXEL})
    dataset = load("ssg_vqa", tmp_path / "ssg", roots=[str(tmp_path / "CholecT45")])
    assert len(dataset.part("test")) == 9
    # The folder with the questions of VID02 has its name too, but no frames.
    assert errors(dataset)[0] == f"1.txt: its frame is not in {tmp_path}/CholecT45/data/VID02"
    assert "VID04: there are no frames in VID04 or images/VID04" in errors(dataset)[1]
    assert "its 1 question files are left out" in errors(dataset)[1]


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    write(tmp_path, {"visual_feats/x": ""})
    with pytest.raises(recipe.BadInput, match=r"is not SSG-VQA, which has qa_txt.*found visual_feats"):
        load("ssg_vqa", tmp_path)


def test_real_frames(tmp_path: Path) -> None:
    """CholecT50 has its videos one folder deeper than CholecT45."""
    release = SHARED / "cholect50-challenge-val"
    if not release.is_dir():
        pytest.skip("no real CholecT50 frames here; test_frames_in_a_folder_of_their_own has generated ones")
    write(tmp_path, {"qa_txt/VID70/30.txt": LINES, "qa_txt/VID74/580.txt": LINES})
    dataset = load("ssg_vqa", tmp_path, roots=[str(release)])
    assert errors(dataset) == []
    keys = [e.image_key for e in dataset.examples[::9]]
    assert keys == ["VID70/000030", "VID74/000580"]
    assert all(e.images[0].read()[:4] == b"\x89PNG" for e in dataset.examples[::9])


def test_real_lines(tmp_path: Path) -> None:
    real = SHARED / "ssg_vqa/qa_txt/VID01/262.txt"
    if not real.exists():
        pytest.skip("no real SSG-VQA lines here; test_layout_and_official_split covers generated ones")
    write(tmp_path, {"qa_txt/VID01/262.txt": real.read_bytes(), "VID01/000262.png": PIXEL})
    dataset = load("ssg_vqa", tmp_path)
    assert errors(dataset) == []
    assert "2 lines, the first of their files, are left out, as by the authors" in warnings(dataset)
    assert not any("not among" in what for what in warnings(dataset))
    assert Counter(e.question_type for e in dataset.part("val")) == {
        "action": 1, "target": 1, "at_place": 2, "count": 5, "exist": 2, "query_component": 3,
        "query_color": 3, "query_type": 2,
    }  # fmt: skip
    assert Counter(e.stage for e in dataset.examples) == {None: 4, 0: 1, 1: 10, 2: 4}
