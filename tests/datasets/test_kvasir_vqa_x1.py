"""Kvasir-VQA-x1 and Medico's subset of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sources import load

from surgvqa.audit import audit
from surgvqa.datasets import Dataset, kvasir_vqa_x1
from surgvqa.recipe import BadInput

SHARED = Path(__file__).resolve().parents[3] / "shared/data"
PIXEL = bytes.fromhex("424d1e000000000000001a0000000c000000010001000100180000ff0000")  # 1×1 BMP


pytestmark = pytest.mark.usefixtures("hub_cache")


def rows(start: int, count: int) -> list[dict[str, Any]]:
    classes = ["polyp_type", "text_presence", "abnormality_location"]
    return [
        {
            "img_id": f"p{number % 3}",
            "complexity": 1 + number % 3,
            "question": f"Question {number}?",
            "answer": f"answer {number}",
            "original": [{"q": "Is there text?", "a": "no"}],
            "question_class": classes[: 1 + number % 3],
        }
        for number in range(start, start + count)
    ]


def parts() -> Any:
    import datasets

    return datasets.DatasetDict({
        "train": datasets.Dataset.from_list(rows(0, 6)), "test": datasets.Dataset.from_list(rows(6, 4)),
    })  # fmt: skip


def pictures(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(3):
        (folder / f"p{number}.jpg").write_bytes(PIXEL)
    return folder


def check(dataset: Dataset) -> None:
    assert dataset.problems == []
    assert [
        (e.id, e.split, e.image_key, e.group, e.stage, e.question_type) for e in dataset.part("train")[:3]
    ] == [
        ("train:1", "train", "p0", "kvasir/p0", 1, "polyp_type"),
        ("train:2", "train", "p1", "kvasir/p1", 2, "combined_2"),
        ("train:3", "train", "p2", "kvasir/p2", 3, "combined_3"),
    ]
    assert [len(dataset.part(part)) for part in ("train", "val", "test")] == [6, 0, 4]
    assert dataset.part("test")[0].answers == ("answer 6",)
    assert dataset.part("train")[0].images[0].read() == PIXEL


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_files(tmp_path: Path, kind: str) -> None:
    """As the hub has them, and as people write them out of it."""
    pictures(tmp_path / "images")
    inner = tmp_path / "data" if kind == "parquet" else tmp_path
    inner.mkdir(exist_ok=True)
    for part, table in parts().items():
        if kind == "parquet":
            table.to_parquet(inner / f"{part}-00000-of-00001.parquet")
        elif kind == "jsonl":
            table.to_json(inner / f"{part}.jsonl")
        else:
            table.to_pandas().to_csv(inner / f"{part}.csv", index=False)
    check(load("kvasir_vqa_x1", tmp_path))


@pytest.mark.parametrize("below", ["images", "."])
def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str) -> None:
    import datasets

    pictures(tmp_path / below)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, revision: parts())
    check(load("kvasir_vqa_x1", "SimulaMet/Kvasir-VQA-x1", roots=[str(tmp_path)]))
    with pytest.raises(BadInput, match=r"the hub's rows have no images; list the folder in data.roots"):
        load("kvasir_vqa_x1", "SimulaMet/Kvasir-VQA-x1")


def test_medicos_subset_is_what_the_library_chooses() -> None:
    import datasets

    test = datasets.Dataset.from_dict({"question": [f"Q{number}" for number in range(15_955)]})
    published = test.shuffle(seed=42).select(range(1500))["question"]
    assert [f"Q{row}" for row in kvasir_vqa_x1.medico_rows(15_955)] == list(published)
    # and what that is, should the library ever choose otherwise
    assert kvasir_vqa_x1.medico_rows(15_955)[:5] == [122, 7586, 8248, 11846, 10026]


def test_medico(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvasir_vqa_x1, "MEDICO_ROWS", 3)
    pictures(tmp_path)
    for part, count in (("train", 2), ("test", 9)):
        (tmp_path / f"{part}.json").write_text(json.dumps(rows(0, count)))
    dataset = load("kvasir_vqa_x1", tmp_path, variant="medico")
    assert [e.id for e in dataset.part("test")] == [f"test:{row + 1}" for row in kvasir_vqa_x1.medico_rows(9)]
    assert len(dataset.part("train")) == 2
    few, left = dataset.problems
    assert few.what.startswith("its test part has 9 rows instead of 15955")
    assert left.what == "6 test rows are not in Medico's public subset and are left out"
    assert few.warning
    assert left.warning


def test_images_in_both_official_parts_are_told_not_refused(tmp_path: Path) -> None:
    pictures(tmp_path)
    for part in ("train", "test"):
        (tmp_path / f"{part}.json").write_text(json.dumps(rows(0, 4)))
    dataset = load("kvasir_vqa_x1", tmp_path)
    found = audit(dataset, mode="letterbox").problems
    assert [p.warning for p in found if "3 of 3 images are in two parts" in p.what] == [True]
    own = load("json", tmp_path, columns={"image": "img_id"}, roots=[])
    assert not own.leaky
    mixed = [{"format": "json", "path": str(tmp_path)}]
    assert not load("kvasir_vqa_x1", tmp_path, more=mixed).leaky


def test_bad_rows(tmp_path: Path) -> None:
    pictures(tmp_path)
    good = rows(0, 1)[0]
    faults: dict[str, Any] = {
        "img_id": "gone", "complexity": 4, "question": "", "answer": None,
    }  # fmt: skip
    bad = [good | {name: value} for name, value in faults.items()]
    lines = [*bad, good | {"img_id": "../../p0"}, {"q": 1}, good | {"question_class": None}]
    (tmp_path / "train.json").write_text(json.dumps(lines))
    dataset = load("kvasir_vqa_x1", tmp_path)
    assert [(e.id, e.question_type) for e in dataset.examples] == [("train:7", "other")]
    whats = [p.what for p in dataset.problems]
    for expected, what in zip(
        ["img_id 'gone' does not exist", "complexity is 4; it must be 1, 2 or 3", "question is empty",
         "answer is empty", "img_id '../../p0'", "img_id is missing"],
        whats,
        strict=True,
    ):  # fmt: skip
        assert expected in what


def test_real_rows(tmp_path: Path) -> None:
    real = SHARED / "kvasir_vqa_x1/real_sample_knowledge.json"
    if not real.exists():
        pytest.skip("no real Kvasir-VQA-x1 rows here; test_files covers generated ones")
    lines = []
    for row in json.loads(real.read_text()):
        if row["source_dataset"] == "Kvasir-VQA-x1":
            name = row["image_url"].split("x1_")[1].removesuffix(".jpg")
            (tmp_path / f"{name}.jpg").write_bytes(PIXEL)
            lines.append({**row, "img_id": name, "original": row["original_atomic"]})
    (tmp_path / "test.json").write_text(json.dumps(lines))
    dataset = load("kvasir_vqa_x1", tmp_path)
    assert dataset.problems == []
    assert [(e.stage, e.question_type) for e in dataset.part("test")] == [(3, "combined_3")] * 2
