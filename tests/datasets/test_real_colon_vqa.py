"""REAL-Colon-VQA: questions on clips of eight frames."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sources import load

from surgvqa.datasets.clips import chosen
from surgvqa.recipe import BadInput

SHARED = Path(__file__).resolve().parents[3] / "shared/data"
PIXEL = bytes.fromhex("424d1e000000000000001a0000000c000000010001000100180000ff0000")  # 1×1 BMP


def clip(number: int, video: str) -> dict[str, Any]:
    frames = [100 * number + 4 * index for index in range(8)]
    return {
        "id": f"qa_{number:06}",
        "video_id": video,
        "frames": [f"{video}_{frame}" for frame in frames],
        "frame_numbers": frames,
        "question": "Is clean mucosa visible in this sequence?",
        "question_type": "mucosa_visibility",
        "support_frames": 8,
        "total_frames": 8,
        "support_ratio": 1.0,
        "support_percentage": 100.0,
        "answer": "No, clean mucosa is not consistently visible.",
        "short_answer": "no",
    }


def write(file: Path, *rows: dict[str, Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def frames(root: Path, *rows: dict[str, Any], below: str = "videos/{}_frames") -> None:
    for row in rows:
        folder = root / below.format(row["video_id"])
        folder.mkdir(parents=True, exist_ok=True)
        for name in row["frames"]:
            (folder / f"{name}.jpg").write_bytes(PIXEL)


CLIPS = [clip(1, "002-001"), clip(2, "002-001"), clip(3, "002-006"), clip(4, "009-001")]


@pytest.mark.parametrize("below", ["videos/{}_frames", "{}_frames", "frames/{}", "{}", "frames", "."])
def test_the_authors_layout(tmp_path: Path, below: str) -> None:
    write(tmp_path / "annotations/in_template.jsonl", *CLIPS)
    frames(tmp_path, *CLIPS, below=below)
    dataset = load("real_colon_vqa", tmp_path)
    assert [(e.id, e.split, e.group, len(e.images)) for e in dataset.examples] == [
        ("qa_000001", "train", "real_colon/002-001", 8),
        ("qa_000002", "train", "real_colon/002-001", 8),
        ("qa_000003", "test", "real_colon/002-006", 8),
    ]
    first = dataset.examples[0]
    assert (first.answers, first.question_type) == (
        ("no", "No, clean mucosa is not consistently visible."),
        "mucosa_visibility",
    )
    assert [ref.key.split("_")[-1] for ref in first.images] == [f"{100 + 4 * n}.jpg" for n in range(8)]
    assert "1 rows belong to no part" in dataset.problems[0].what  # a video that the authors do not have


def test_which_answer_and_how_many_frames(tmp_path: Path) -> None:
    file = write(tmp_path / "annotations/out_template.jsonl", CLIPS[0])
    frames(tmp_path, CLIPS[0])
    dataset = load("real_colon_vqa", file, variant="long", frames=3)
    assert dataset.problems == []
    assert dataset.examples[0].answers == ("No, clean mucosa is not consistently visible.", "no")
    assert [ref.key.split("_")[-1] for ref in dataset.examples[0].images] == ["100.jpg", "116.jpg", "128.jpg"]
    assert load("real_colon_vqa", file, variant="short", frames=99).examples[0].answers[0] == "no"


def test_chosen_frames_are_even() -> None:
    names = [str(number) for number in range(30)]
    assert chosen(names, None) == chosen(names, 30) == names
    assert chosen(names, 1) == ["14"]
    assert chosen(names, 2) == ["0", "29"]
    assert chosen(names, 4) == ["0", "10", "19", "29"]
    assert chosen([], 4) == []
    for most in range(2, 31):
        found = chosen(names, most)
        assert len(set(found)) == most
        assert (found[0], found[-1]) == ("0", "29")


def test_files_named_for_parts(tmp_path: Path) -> None:
    for part, row in zip(("train", "eval", "test"), CLIPS, strict=False):
        write(tmp_path / f"{part}_multivideo.jsonl", row)
    write(tmp_path / "in_template.jsonl", *CLIPS)
    frames(tmp_path, *CLIPS)
    dataset = load("real_colon_vqa", tmp_path)
    assert {e.id: e.split for e in dataset.examples} == {
        "qa_000001": "train", "qa_000002": "val", "qa_000003": "test",
    }  # fmt: skip


def test_ids_that_are_used_twice(tmp_path: Path) -> None:
    rows = [CLIPS[0], CLIPS[2] | {"id": "qa_000001"}]
    write(tmp_path / "in_template.jsonl", *rows)
    frames(tmp_path, *rows)
    dataset = load("real_colon_vqa", tmp_path)
    assert [e.id for e in dataset.examples] == ["qa_000001", "qa_000001:2"]
    assert [p.warning for p in dataset.problems] == [True]
    assert dataset.problems[0].what.startswith("1 row has an id that another row has")


@pytest.mark.fault("F17")
def test_bad_rows(tmp_path: Path) -> None:
    rows = [
        CLIPS[0] | {"frames": None},
        CLIPS[0] | {"frames": []},
        CLIPS[0] | {"frames": [3806]},
        CLIPS[0] | {"frames": ["../../secret"]},
        CLIPS[1],
        CLIPS[0] | {"short_answer": "", "answer": None},
        CLIPS[0] | {"video_id": None},
        CLIPS[0] | {"id": [1]},
    ]
    write(tmp_path / "set/in_template.jsonl", *rows)
    frames(tmp_path / "set", CLIPS[0])
    (tmp_path / "secret.jpg").write_bytes(PIXEL)
    dataset = load("real_colon_vqa", tmp_path / "set")
    assert not dataset.examples
    for problem, said in zip(
        dataset.problems,
        ["frames is null instead of a list of names", "frames is an empty list", "is a list of other than",
         "'videos/002-001_frames/../../secret.jpg'", "'videos/002-001_frames/002-001_200.jpg' does not",
         "short_answer is empty; answer is empty", "video_id is empty", "id is a list instead of text"],
        strict=True,
    ):  # fmt: skip
        assert said in problem.what


def test_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").touch()
    with pytest.raises(BadInput, match=r"it holds no in_template.jsonl"):
        load("real_colon_vqa", tmp_path)
    with pytest.raises(BadInput, match="no such file or folder"):
        load("real_colon_vqa", tmp_path / "gone")


@pytest.mark.parametrize(
    ("name", "count", "part", "again"),
    [
        ("in_template", 240, "train", 1),
        ("out_template", 120, "train", 1),
        ("test_multivideo", 120, "test", 0),
    ],
)
def test_real_rows(tmp_path: Path, name: str, count: int, part: Any, again: int) -> None:
    real = SHARED / f"real_colon_vqa/{name}.jsonl"
    if not real.exists():
        pytest.skip("no real REAL-Colon-VQA rows here; test_the_authors_layout covers generated ones")
    frames(tmp_path, *(json.loads(line) for line in real.read_text().splitlines()))
    dataset = load("real_colon_vqa", real, roots=[str(tmp_path)])
    assert len(dataset.part(part)) == len(dataset.examples) == count
    assert len(dataset.problems) == again
    assert {len(e.images) for e in dataset.examples} == {8}
    assert len({e.question_type for e in dataset.examples}) == 20
