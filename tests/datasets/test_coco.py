"""COCO detections as questions: TBX11K's layout and others', negatives, crowds and bad rows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sources import load

from surgvqa import recipe
from surgvqa.audit import load_and_audit
from surgvqa.datasets import Dataset, Example, Region
from surgvqa.recipe import BadInput

RECIPE = Path(__file__).parents[2] / "recipes/tbx11k.yaml"
CATEGORIES = ["ActiveTuberculosis", "ObsoletePulmonaryTuberculosis", "PulmonaryTuberculosis"]
FOUND = ("tb/tb0007.png", [[300.5, 60, 100, 150.25, 2], [140, 50, 120, 110, 2], [10, 20, 30, 40, 1]])
NOTHING: tuple[str, list[list[float]]] = ("health/h0001.png", [])


def write(file: Path, *images: tuple[str, list[list[float]]], below: str = "imgs", **change: Any) -> Path:
    """COCO annotations as TBX11K's own; an image is a name and its boxes: x, y, width, height, category."""
    root = file.parent
    while root.name in ("json", "annotations"):
        root = root.parent
    file.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "info": {},
        "licenses": [],
        "categories": [{"id": n, "name": name, "supercategory": ""} for n, name in enumerate(CATEGORIES, 1)],
        "images": [],
        "annotations": [],
    }
    for number, (name, boxes) in enumerate(images, start=1):
        (root / below / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (512, 512), (number, len(file.stem), 0)).save(root / below / name)
        content["images"].append({"id": number, "file_name": name, "width": 512, "height": 512})
        content["annotations"] += [
            {
                "id": 1,
                "image_id": number,
                "category_id": int(box[4]),
                "iscrowd": 0,
                "bbox": box[:4],
                "area": 1,
            }
            for box in boxes
        ]
    file.write_text(json.dumps({**content, **change}), encoding="utf-8")
    return file


def by_id(dataset: Dataset) -> dict[str, Example]:
    return {example.id: example for example in dataset.examples}


def whats(dataset: Dataset) -> list[str]:
    return [str(problem) for problem in dataset.problems]


def test_questions_of_the_layout_of_tbx11k(tmp_path: Path) -> None:
    folder = tmp_path / "annotations/json"
    write(folder / "TBX11K_train.json", FOUND, NOTHING)
    write(folder / "TBX11K_val.json", ("sick/s0003.png", []), ("tb/tb0009.png", [[1, 2, 3, 4, 3]]))
    for other in ("TBX11K_trainval", "all_train", "all_test"):
        (folder / f"{other}.json").write_text("not to be read")
    dataset = load("coco", tmp_path)
    assert whats(dataset) == []
    examples = by_id(dataset)
    key = "imgs/tb/tb0007.png"
    obsolete = [
        Region((140, 50, 260, 160), CATEGORIES[1]),
        Region((300.5, 60, 400.5, 210.25), CATEGORIES[1]),
    ]
    findings = examples[f"{key}:findings"]
    assert findings.regions == (Region((10, 20, 40, 60), CATEGORIES[0]), *obsolete)
    assert findings.answers == ("ActiveTuberculosis; ObsoletePulmonaryTuberculosis",)
    assert findings.question == f"Which of these are in the image, and where: {', '.join(CATEGORIES)}?"
    assert (findings.group, findings.split, findings.question_type) == (key, "train", "findings")
    location = examples[f"{key}:location:ObsoletePulmonaryTuberculosis"]
    assert (location.answers, location.regions) == ((CATEGORIES[1],), tuple(obsolete))
    assert location.question == "Where in the image is ObsoletePulmonaryTuberculosis?"
    assert f"{key}:location:PulmonaryTuberculosis" not in examples
    nothing = examples["imgs/health/h0001.png:findings"]
    assert (nothing.answers, nothing.regions, nothing.split) == (("none",), (), "train")
    assert {e.image_key for e in dataset.part("val")} == {"imgs/sick/s0003.png", "imgs/tb/tb0009.png"}
    assert len(examples) == 3 + 1 + 1 + 2
    # The recipe's own settings; val is what there is to report on.
    words = [f"data.path={tmp_path}", "model.name=tiny-qwen3-vl"]
    _, audit = load_and_audit(recipe.load(RECIPE, words))
    assert [str(problem) for problem in audit.problems if not problem.warning] == []


@pytest.mark.parametrize(
    ("name", "below"),
    [
        ("annotations/instances_train2017.json", "train2017"),
        ("annotations/instances_train2017.json", "images/train2017"),
        ("annotations/train.json", "images"),
        ("train.json", ""),
    ],
)
def test_other_layouts(tmp_path: Path, name: str, below: str) -> None:
    file = write(tmp_path / name, FOUND, below=below)
    for path in (tmp_path, file):
        dataset = load("coco", path)
        assert whats(dataset) == []
        assert [example.split for example in dataset.examples] == ["train"] * 3
        assert dataset.examples[0].image_key == (Path(below) / "tb/tb0007.png").as_posix()


def test_images_with_crowds_and_tuberculosis_without_boxes_are_left_out(tmp_path: Path) -> None:
    file = write(tmp_path / "annotations/TBX11K_train.json", FOUND, ("tb/tb1199.png", []), NOTHING)
    content = json.loads(file.read_text())
    content["annotations"][0]["iscrowd"] = 1
    file.write_text(json.dumps(content))
    dataset = load("coco", tmp_path)
    assert list(by_id(dataset)) == ["imgs/health/h0001.png:findings"]
    assert [what.split(": ", 1)[1] for what in whats(dataset)] == [
        "1 images are left out: a crowd stands for some of their boxes (iscrowd)",
        "1 images are left out: they are below tb/, but have no box",
    ]
    assert all(problem.warning for problem in dataset.problems)


BAD = [
    (
        "annotations",
        {"bbox": [1, 2, 0, 4]},
        "annotations 1: bbox is [1, 2, 0, 4]; it must be x, y and a width",
    ),
    ("annotations", {"bbox": [1, 2, 3]}, "annotations 1: bbox is [1, 2, 3]"),
    ("annotations", {"bbox": [1, 2, float("nan"), 3]}, "annotations 1: bbox is [1, 2, nan, 3]"),
    ("annotations", {"bbox": ["1", 2, 3, 4]}, "annotations 1: bbox is ['1'"),
    ("annotations", {"bbox": None}, "annotations 1: bbox is None"),
    ("annotations", {"category_id": 7}, "annotations 1: category_id 7 is not listed in this file"),
    ("annotations", {"image_id": 9}, "annotations 1: image_id 9 is not listed in this file"),
    ("annotations", {"image_id": [1]}, "annotations 1: image_id is missing or no number"),
    ("images", {"id": 2}, "images 2: has the id 2 of another"),
    ("images", {"file_name": ""}, "images 1: file_name is empty"),
    ("images", {"file_name": ["a"]}, "images 1: file_name is a list instead of text"),
    ("images", {"file_name": "tb/gone.png"}, "image 1: image 'tb/gone.png' does not exist in"),
    ("images", {"file_name": "../../x.png"}, "image 1: image '../../x.png'"),
    ("categories", {"name": None}, "categories 1: name is empty"),
]


@pytest.mark.fault("F17")
@pytest.mark.parametrize(("key", "change", "what"), BAD, ids=[what[:40] for _, _, what in BAD])
def test_bad_rows(tmp_path: Path, key: str, change: dict[str, Any], what: str) -> None:
    file = write(tmp_path / "train.json", FOUND, NOTHING)
    content = json.loads(file.read_text())
    content[key][0] |= change
    file.write_text(json.dumps(content))
    dataset = load("coco", tmp_path)
    assert f"{file}: {what}" in "\n".join(whats(dataset))
    assert not all(problem.warning for problem in dataset.problems)
    if "image_id" not in change and key != "images":  # without all of its boxes an image is not asked about
        assert "imgs/tb/tb0007.png:findings" not in by_id(dataset)


@pytest.mark.fault("F17")
@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "has no list of categories"),
        ('{"categories": [1], "images": {}}', "has no list of images"),
        ('{"categories": [1], "images": [1], "annotations": []}', "has no list of annotations"),
        ('{"categories": [1], "images": [1], "annotations": [1]}', "categories 1: id is missing"),
    ],
)
def test_files_that_are_no_detections(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "train.json").write_text(text)
    dataset = load("coco", tmp_path)
    assert dataset.examples == []
    assert what in whats(dataset)[0]


@pytest.mark.fault("F16", "F17")
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    write(tmp_path / "train.json", FOUND)
    os.mkfifo(tmp_path / "val.json")
    assert whats(load("coco", tmp_path)) == [f"{tmp_path / 'val.json'}: is not a file"]


def test_folders_that_hold_nothing_or_too_much(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file or folder"):
        load("coco", tmp_path / "gone")
    (tmp_path / "notes.json").touch()
    with pytest.raises(BadInput, match=r"holds no COCO annotations.*found notes.json"):
        load("coco", tmp_path)
    write(tmp_path / "a_train.json", NOTHING)
    write(tmp_path / "b_train.json", NOTHING)
    with pytest.raises(BadInput, match=r"several files of one part \(a_train.json, b_train.json\)"):
        load("coco", tmp_path)


def test_the_audit_finds_boxes_outside_of_their_image(tmp_path: Path) -> None:
    write(tmp_path / "train.json", ("a.png", [[500, 0, 20, 20, 1]]), ("b.png", [[500, 0, 12.5, 20, 1]]))
    words = [f"data.path={tmp_path}", "model.name=tiny-qwen3-vl"]
    _, audit = load_and_audit(recipe.load(RECIPE, words))
    wrong = [str(problem) for problem in audit.problems if not problem.warning]
    assert len(wrong) == 2  # its two questions
    assert wrong[0].endswith("box [500, 0, 520, 20] of pixels reaches out of its image of 512×512 pixels")
    assert "train.json: image 1" in wrong[0]


def test_labels_cannot_be_chosen_where_answers_have_boxes(tmp_path: Path) -> None:
    write(tmp_path / "train.json", FOUND)
    write(tmp_path / "val.json", ("b.png", [[5, 0, 12.5, 20, 1]]))
    words = [f"data.path={tmp_path}", "model.name=tiny-qwen3-vl", "eval.answers=labels"]
    _, audit = load_and_audit(recipe.load(RECIPE, words))
    assert any(
        "labels cannot answer with boxes, as 2 questions should" in str(problem)
        for problem in audit.problems
        if not problem.warning
    )


def test_real_tbx11k(shared: Path) -> None:
    dataset = load("coco", shared / "tbx11k")
    assert whats(dataset) == []
    examples = by_id(dataset)
    assert list(examples) == [
        "imgs/tb/tb0005.png:findings",
        "imgs/tb/tb0005.png:location:ActiveTuberculosis",
        "imgs/tb/tb0007.png:findings",
        "imgs/tb/tb0007.png:location:ObsoletePulmonaryTuberculosis",
        "imgs/health/h0001.png:findings",
    ]
    assert examples["imgs/health/h0001.png:findings"].answers == ("none",)
    first, second = examples["imgs/tb/tb0007.png:findings"].regions
    assert first.box == pytest.approx((144.12, 52.93, 270.30, 169.16), abs=0.01)
    assert second.box == pytest.approx((307.31, 62.05, 442.81, 208.66), abs=0.01)
    _, audit = load_and_audit(
        recipe.load(RECIPE, [f"data.path={shared / 'tbx11k'}", "model.name=tiny-qwen3-vl"])
    )
    assert [str(problem) for problem in audit.problems if not problem.warning] == []


def test_what_can_be_skipped(tmp_path: Path) -> None:
    """An image by itself; not a category, which all questions name, nor a box that may be any image's."""
    file = write(tmp_path / "train.json", FOUND, NOTHING, below="")
    good = json.loads(file.read_text())
    for key, change, whole in (
        ("images", {"file_name": ""}, False),
        ("categories", {"name": ""}, True),
        ("annotations", {"image_id": 9}, True),
        ("annotations", {"bbox": None}, False),
    ):
        rows = [good[key][0] | change, *good[key][1:]]
        file.write_text(json.dumps({**good, key: rows}))
        dataset = load("coco", file)
        assert any(problem.whole for problem in dataset.problems) == whole, (key, change)
        if not whole:
            assert len(dataset.problems) == 1
            assert [e.image_key for e in dataset.examples] == [NOTHING[0]]
