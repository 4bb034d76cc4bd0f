"""EndoVis-18-VQLA and EndoVis-17-VQLA: lines whose answers have boxes."""

from __future__ import annotations

from pathlib import Path

import pytest
from sources import PIXEL, errors, load, warnings, write

from surgvqa import recipe
from surgvqa.datasets import Region

LINES = """What organ is being operated?|kidney|1,1,1280,1024
What is the state of bipolar_forceps?|Idle|641, 513, 960, 1000
"""


@pytest.mark.parametrize("labels", ["vqla/label", "vqla"])
def test_18(tmp_path: Path, labels: str) -> None:
    for number in (1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 14, 15, 16):
        name = f"EndoVis-18-VQLA/seq_{number}"
        write(tmp_path / name, {"left_frames/frame000.png": PIXEL, f"{labels}/frame000_QAL.txt": LINES})
    dataset = load("endovis18_vqla", tmp_path)
    assert dataset.problems == []
    assert [len(dataset.part(part)) for part in ("train", "val", "test")] == [22, 0, 6]
    organ, state = dataset.examples[:2]
    # Pixels 1 to 1280, both inclusive, are the whole width: from edge 0 to edge 1280.
    assert organ.regions == (Region((0, 0, 1280, 1024), of=(1280, 1024)),)
    assert state.regions == (Region((640, 512, 960, 1000), of=(1280, 1024)),)
    assert (state.answers, state.question_type, state.group) == (("Idle",), "state", "endovis18/seq_1")
    assert len(state.labels) == 18


def test_17_is_all_test(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "left_frames/seq1_frame001.jpg": PIXEL,
            "left_frames/seq_2_frame007.jpg": PIXEL,
            "left_frames/x.png": PIXEL,
            "vqla/label/seq1_frame001.txt": LINES,
            "vqla/label/seq_2_frame007_QAL.txt": LINES,
            "vqla/label/x.txt": LINES,
        },
    )
    dataset = load("endovis17_vqla", tmp_path)
    assert dataset.problems == []
    assert len(dataset.part("test")) == len(dataset.examples) == 6
    groups = ["endovis17/seq1", "endovis17/seq_2", "endovis17/x"]  # a frame of no known video by itself
    assert [e.group for e in dataset.examples[::2]] == groups
    assert dataset.examples[0].id == "endovis17/seq1_frame001:1"


def test_boxes_that_are_none(tmp_path: Path) -> None:
    boxes = [
        "0,1,2,3",
        "1,1,1281,2",
        "1,1,2,1025",
        "5,1,4,2",
        "1,2,3",
        "1,2,3,4,5",
        "1.5,2,3,4",
        "a,b,c,d",
        "-1,1,2,2",
    ]
    lines = "".join(f"Where is x?|left-top|{box}\n" for box in boxes)
    text = lines + "Where is x?|left-top\nWhere is x?|left-top|7,8,7,8\n"
    write(tmp_path, {"left_frames/a.png": PIXEL, "vqla/a.txt": text})
    dataset = load("endovis17_vqla", tmp_path)
    said = errors(dataset)
    assert [line.split(": ")[0] for line in said] == [f"a.txt:{n}" for n in range(1, 11)]
    assert all("is no box x1,y1,x2,y2" in line for line in said[:9])
    assert "must be `question|answer|x1,y1,x2,y2`" in said[9]
    assert [e.regions[0].box for e in dataset.examples] == [(6, 7, 7, 8)]


def test_what_is_missing(tmp_path: Path) -> None:
    write(tmp_path, {"seq_1/left_frames/frame000.png": PIXEL, "seq_1/vqa/frame000.txt": ""})
    assert "has no vqla/label or vqla and is left out" in warnings(load("endovis18_vqla", tmp_path))
    with pytest.raises(recipe.BadInput, match=r"is not EndoVis-17-VQLA, which has left_frames.*found seq_1"):
        load("endovis17_vqla", tmp_path)
