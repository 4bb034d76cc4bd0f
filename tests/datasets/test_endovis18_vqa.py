"""EndoVis-18-VQA in its layouts, and what all corpora with text files beside frames share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from sources import PIXEL, SHARED, errors, instructed, load, warnings, write

from surgvqa import recipe

QUESTIONS = """What organ is being operated?|kidney
What is the state of bipolar_forceps?|Idle
Where is bipolar_forceps located?|right-top
"""
SEQUENCES = (1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 14, 15, 16)


def corpus(root: Path, frames: str = "left_frames", form: str = "Classification") -> Path:
    for number in SEQUENCES:
        name = f"seq_{number}"
        files = {f"{frames}/frame000.png": PIXEL, f"vqa/{form}/frame000_QA.txt": QUESTIONS}
        write(root / name, files)
    return root


@pytest.mark.parametrize("frames", ["left_frames", "left_fr"])
def test_layout_and_official_split(tmp_path: Path, frames: str) -> None:
    dataset = load("endovis18_vqa", corpus(tmp_path, frames))
    assert dataset.problems == []
    assert {e.group for e in dataset.part("test")} == {f"endovis18/seq_{n}" for n in (1, 5, 16)}
    assert [len(dataset.part(part)) for part in ("train", "val", "test")] == [33, 0, 9]
    first, second, third = dataset.examples[:3]
    assert (first.id, first.image_key, first.answers) == ("seq_1/frame000:1", "seq_1/frame000", ("kidney",))
    assert [e.question_type for e in (first, second, third)] == ["organ", "state", "location"]
    assert first.images[0].read() == PIXEL
    assert len(first.labels) == 18
    assert {e.question_type for e in dataset.examples} == instructed("endovis18_vqa")
    assert instructed("endovis18_vqla") == instructed("endovis17_vqla") == instructed("surgicalgpt")
    assert instructed("surgicalgpt") == instructed("endovis18_vqa")


def test_the_variant_chooses_the_form(tmp_path: Path) -> None:
    corpus(tmp_path)
    sentence = "What tools are operating the organ?|the tools operating are bipolar_forceps"
    for number in SEQUENCES[1:]:
        write(tmp_path, {f"seq_{number}/vqa/Sentence/frame000_QA.txt": sentence})
    assert len(load("endovis18_vqa", tmp_path, variant="classification").examples) == 42
    dataset = load("endovis18_vqa", tmp_path, variant="sentence")
    assert {(e.question_type, e.labels, e.answers[0][:9]) for e in dataset.examples} == {
        ("tools", (), "the tools")
    }
    assert len(dataset.examples) == 13
    assert warnings(dataset) == [
        "has no vqa/Sentence and is left out; it has vqa/Classification, which "
        "data.variant: classification reads"
    ]


def test_a_variant_that_a_format_does_not_have(tmp_path: Path) -> None:
    data = "data: {{format: {0}, path: x, variant: full}}"
    text = f"model: {{{{name: tiny-qwen3-vl}}}}\n{data}\nimage: {{{{size: 96}}}}\noutput: r"
    for format, said in {
        "endovis18_vqa": "'full' is none; format endovis18_vqa has classification and sentence",
        "pitvqa": "'full' is none; pitvqa has only one form",
    }.items():
        with pytest.raises(recipe.BadInput) as wrong:
            recipe.parse(text.format(format))
        assert wrong.value.problems == [f"recipe: data.variant: {said}"]


def test_faults(tmp_path: Path) -> None:
    root = corpus(tmp_path / "EndoVis-18-VQA")
    write(
        root / "seq_2",
        {
            "vqa/Classification/frame000_QA.txt": b"\xef\xbb\xbfQ|suction\r\n\r\nonly one\r\n"
            b"a|b|1,2,3,4\r\nQ|\r\nWhere is \xff?|left-top\nQ\0|kidney\nWhere is x?|left-top",
            "vqa/Classification/frame007_QA.txt": QUESTIONS,
            "vqa/Classification/.frame000_QA.txt": "not data",
            "vqa/Classification/._frame000_QA.txt": b"\0\5\x16\7",
            "vqa/Classification/notes.md": "not data",
        },
    )
    (root / "seq_7/vqa").rename(root / "seq_7/qa")
    (root / "seq_9/left_frames").rename(root / "seq_9/right_frames")
    (root / "seq_16").rename(root / "seq_13")
    dataset = load("endovis18_vqa", tmp_path)
    said, warned = errors(dataset), "\n".join(warnings(dataset))
    for line in (3, 4, 5):
        assert any(f"frame000_QA.txt:{line}: must be `question|answer`" in what for what in said)
    assert "frame000_QA.txt:6: is not UTF-8 text" in said
    assert "frame000_QA.txt:7: holds a NUL byte" in said
    assert f"frame007_QA.txt: its frame is not in {root}/seq_2/left_frames" in said
    nowhere = f"there are no frames in seq_9/left_frames or seq_9/left_fr of {root}"
    assert f"Classification: {nowhere}; its 1 question files are left out" in said
    assert any("3 rows belong" in what for what in said)  # of seq_13, which is in no published part
    assert len(said) == 8
    assert "seq_2 (1 frames, 2 files)" in warned
    assert "has no vqa/Classification and is left out" in warned
    assert "lacks seq_16, so" in warned
    assert "1 answers are not among the corpus's 18: 'suction' (1)" in warned  # the tool, not the action
    ours = [e.answers for e in dataset.examples if e.group == "endovis18/seq_2"]
    assert ours == [("suction",), ("left-top",)]


def test_frames_without_questions_are_told_of_where_they_are_many(tmp_path: Path) -> None:
    corpus(tmp_path)
    for frame in range(1, 10):
        questions = {f"seq_2/vqa/Classification/frame00{frame}_QA.txt": QUESTIONS}
        write(tmp_path, {f"seq_2/left_frames/frame00{frame}.png": PIXEL} | (questions if frame < 9 else {}))
    assert load("endovis18_vqa", tmp_path).problems == []
    write(tmp_path, {f"seq_2/left_frames/frame{frame:03d}.png": PIXEL for frame in range(10, 20)})
    assert "seq_2 (20 frames, 9 files)" in warnings(load("endovis18_vqa", tmp_path))[0]


@pytest.mark.fault("F15")
def test_files_that_are_not_in_the_data(tmp_path: Path) -> None:
    elsewhere = write(tmp_path / "elsewhere", {"frame000.png": PIXEL, "frame000_QA.txt": QUESTIONS})
    root = corpus(tmp_path / "data")
    frames, questions = root / "seq_2/left_frames", root / "seq_2/vqa/Classification"
    for number in range(1, 5):
        write(questions, {f"frame00{number}_QA.txt": QUESTIONS})
    (frames / "frame001.png").symlink_to(elsewhere / "frame000.png")
    (frames / "frame002.png").symlink_to("nowhere.png")
    os.mkfifo(frames / "frame003.png")
    (frames / "frame004.png").symlink_to("frame000.png")
    (questions / "frame005_QA.txt").symlink_to(elsewhere / "frame000_QA.txt")
    os.mkfifo(questions / "frame006_QA.txt")
    write(frames, {"frame005.png": PIXEL, "frame006.png": PIXEL})
    (root / "seq_3/left_frames").rename(tmp_path / "elsewhere/left_frames")
    (root / "seq_3/left_frames").symlink_to(tmp_path / "elsewhere/left_frames")
    said = errors(load("endovis18_vqa", root))
    for name, what in {
        "frame001_QA.txt": "its frame leads out of",
        "frame002_QA.txt": "its frame does not exist",
        "frame003_QA.txt": "its frame is not a file",
        "frame005_QA.txt": "leads out of",
        "frame006_QA.txt": "is not a file",
        "Classification": f"{root}/seq_3/left_frames leads out of",
    }.items():
        assert [line.startswith(f"{name}: {what}") for line in said].count(True) == 1, (name, said)
    assert len(said) == 6
    allowed = load("endovis18_vqa", root, roots=[str(elsewhere)])
    assert len(errors(allowed)) == 3
    assert len(allowed.examples) == 42 + 3 * 3


def test_a_question_file_of_any_length(tmp_path: Path) -> None:
    corpus(tmp_path)
    with (tmp_path / "seq_2/vqa/Classification/frame000_QA.txt").open("ab") as file:
        file.truncate(2**40)  # takes no room
    assert errors(load("endovis18_vqa", tmp_path)) == [
        "frame000_QA.txt: is larger than 64 MiB, so it is no file of questions"
    ]


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(recipe.BadInput, match="no such folder; EndoVis-18-VQA is a folder with seq_<number>"):
        load("endovis18_vqa", tmp_path / "gone")
    write(tmp_path, {"videos/readme": ""})
    with pytest.raises(recipe.BadInput, match=r"which has seq_<number>.*found videos"):
        load("endovis18_vqa", tmp_path)
    with pytest.raises(recipe.BadInput, match="is not a folder"):
        load("endovis18_vqa", tmp_path / "videos/readme")


def test_real_lines(tmp_path: Path) -> None:
    real = SHARED / "endovis18_vqa/demo/frame052_QA.txt"
    if not real.exists():
        pytest.skip("no real EndoVis-18-VQA lines here; test_layout_and_official_split covers generated ones")
    frame = (real.parent / "frame052_render.png").read_bytes()
    files = {"left_frames/frame052.png": frame, "vqa/Classification/frame052_QA.txt": real.read_bytes()}
    write(tmp_path / "seq_1", files)
    dataset = load("endovis18_vqa", tmp_path)
    assert [e.question_type for e in dataset.part("test")] == ["organ", "state", "location"]
    assert ["lacks" in what for what in warnings(dataset)] == [True]
    assert errors(dataset) == []
