"""SurgVU25, category 2: one question on each clip."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from sources import load

from surgvqa.datasets.surgvu25 import _type
from surgvqa.recipe import BadInput

SHARED = Path(__file__).resolve().parents[3] / "shared/data"
PIXEL = bytes.fromhex("424d1e000000000000001a0000000c000000010001000100180000ff0000")  # 1×1 BMP


def case(root: Path, name: str, frames: int = 3, below: str = ".") -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / f"{name}_question.json").write_text(json.dumps("Are there forceps being used here?"))
    (folder / f"{name}.json").write_text(json.dumps(["No", "No forceps are being used.", "No"], indent=0))
    (root / below / name).mkdir(parents=True, exist_ok=True)
    for number in range(frames):
        (root / below / name / f"frame_{number:06}.jpg").write_bytes(PIXEL)
    return folder


@pytest.mark.parametrize("below", [".", "../frames"])
def test_cases(tmp_path: Path, below: str) -> None:
    root = tmp_path / "set"
    case(root, "case122", below=below)
    case(root, "case123", below=below)
    dataset = load("surgvu25", root, roots=[str(tmp_path / "frames")])
    assert dataset.problems == []
    assert [(e.id, e.split, e.group, len(e.images)) for e in dataset.examples] == [
        ("case122", "test", "surgvu25/case122", 3),
        ("case123", "test", "surgvu25/case123", 3),
    ]
    first = dataset.examples[0]
    assert (first.question, first.question_type) == ("Are there forceps being used here?", "yes_no")
    assert first.answers == ("No", "No forceps are being used.")
    assert [ref.key.rsplit("/", 1)[1] for ref in first.images] == [f"frame_00000{n}.jpg" for n in range(3)]
    assert len(load("surgvu25", root, roots=[str(tmp_path / "frames")], frames=2).examples[0].images) == 2


@pytest.mark.fault("F17")
def test_bad_cases(tmp_path: Path) -> None:
    good = case(tmp_path, "case001", frames=2)
    for number in range(2, 10):
        case(tmp_path, f"case{number:03}")
    (tmp_path / "case002/case002.json").unlink()
    (tmp_path / "case003/case003.json").write_text("[")
    (tmp_path / "case004/case004.json").write_text('["yes", ""]')
    (tmp_path / "case005/case005_question.json").write_text('""')
    (tmp_path / "case006/case006_question.json").write_bytes(b'"\xff"')
    (tmp_path / "case007/case007.json").unlink()
    os.mkfifo(tmp_path / "case007/case007.json")  # reading it would wait for ever
    for file in (tmp_path / "case008").glob("*.jpg"):
        file.unlink()
    (tmp_path / "case009/case009.json").write_text(" " * (2**20 + 1) + "[]")
    dataset = load("surgvu25", tmp_path)
    assert [e.place for e in dataset.examples] == [str(good / "case001_question.json")]
    for problem, said in zip(
        dataset.problems,
        ["there is no file case002.json", "case003.json cannot be read", "answers are a list that is empty",
         "question is empty", "case006_question.json cannot be read", "there is no file case007.json",
         "there are no frames in", "is larger than 1 MiB"],
        strict=True,
    ):  # fmt: skip
        assert said in problem.what
        assert not problem.warning


def test_uneven_frames(tmp_path: Path) -> None:
    case(tmp_path, "case001", frames=2)
    case(tmp_path, "case002")
    (problem,) = load("surgvu25", tmp_path).problems
    assert problem.what == "cases differ in their number of frames: case001 (2), case002 (3)"
    assert problem.warning
    assert load("surgvu25", tmp_path, frames=2).problems == []


def test_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"holds no case\*/case\*_question.json"):
        load("surgvu25", tmp_path)
    with pytest.raises(BadInput, match="no such folder"):
        load("surgvu25", tmp_path / "gone")


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("Is a large needle driver among the listed tools?", "yes_no"),
        ("What type of forceps is mentioned?", "tool"),
        ("What organ is being manipulated?", "organ"),
        ("What procedure is this summary describing?", "procedure"),
        ("Why?", "other"),
    ],
)
def test_question_types(question: str, kind: str) -> None:
    assert _type(question) == kind


def test_real_cases() -> None:
    real = SHARED / "surgvu25"
    if not real.exists():
        pytest.skip("no real SurgVU25 cases here; test_cases covers generated ones")
    frames = [str(real / "data/testdata/SURGVU25")]
    dataset = load("surgvu25", real / "SURGVU25_cat_2_sample_set_public", roots=frames)
    assert [e.id for e in dataset.part("test")] == [f"case{number}" for number in range(122, 129)]
    assert [len(e.images) for e in dataset.examples] == [4, 4, 4, 4, 30, 4, 4]  # of 30 each
    assert [e.question_type for e in dataset.examples].count("yes_no") == 5
    assert all(len(e.answers) == 5 for e in dataset.examples)
    assert "case126 (30)" in dataset.problems[0].what
    assert load("surgvu25", real / "SURGVU25_cat_2_sample_set_public", roots=frames, frames=4).problems == []
    # the same questions as another project has them, as conversations about a list of frames
    keys = {"columns": {"image": "video"}, "roots": [str(real)], "by": "image"}
    other = load("llava", real / "data/test_data_surgvu25.json", **keys)
    (whole,) = other.examples
    assert (whole.id, whole.question) == ("case126", dataset.examples[4].question)
    assert len(whole.images) == 30
