"""LLaVA's JSON and ShareGPT's or the hub's messages."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from sources import load

from surgvqa.datasets import Dataset

SHARED = Path(__file__).resolve().parents[3] / "shared/data"
PIXEL = bytes.fromhex("424d1e000000000000001a0000000c000000010001000100180000ff0000")  # 1×1 BMP
OTHER_PIXEL = PIXEL[:-4] + b"\xff\0\0\0"


pytestmark = pytest.mark.usefixtures("hub_cache")


def image(folder: Path, name: str) -> str:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(PIXEL)
    return name


def said(*turns: str, roles: tuple[str, str] = ("human", "gpt")) -> list[dict[str, str]]:
    """Turns as LLaVA writes them, question and answer by turns."""
    return [{"from": roles[index % 2], "value": text} for index, text in enumerate(turns)]


def messages(*turns: Any) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(turns)]


def llava(folder: Path, *rows: dict[str, Any], **keys: Any) -> Dataset:
    image(folder, "a.png")
    (folder / "train.json").write_text(json.dumps([{"image": "a.png"} | row for row in rows], indent=4))
    return load("llava", folder / "train.json", **keys)


def chat(folder: Path, *rows: dict[str, Any], **keys: Any) -> Dataset:
    image(folder, "a.png")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load("messages", folder / "train.jsonl", **keys)


def whats(dataset: Dataset) -> list[str]:
    return [f"{Path(problem.place).name}: {problem.what}" for problem in dataset.problems]


def test_llava_as_surg396k_has_it(tmp_path: Path) -> None:
    image(tmp_path, "EndoVis-18-VQA_extended/seq_1/left_frames/frame082.png")
    image(tmp_path, "EndoVis-17-VQA_extended_final/left_frames/seq1_frame015.jpg")
    dataset = llava(
        tmp_path,
        {
            "conversations": said("What is the tool in the right top?", "suction"),
            "image": "EndoVis-18-VQA_extended\\seq_1\\left_frames\\frame082.png",
            "main_tag": "single_phrase",
            "sub_tag": "single_phrase",
        },
        {
            "conversations": said("<image>\nDescribe it.", "A kidney."),
            "image": "EndoVis-17-VQA_extended_final\\left_frames\\seq1_frame015.jpg",
            "main_tag": "caption",
            "sub_tag": "detail",
        },
        group_pattern=r"EndoVis-(1\d).*?(seq_?\d+)",
    )  # fmt: skip
    assert dataset.problems == []
    first, second = dataset.examples
    assert (first.id, first.answers, first.question_type) == ("train:1", ("suction",), "single_phrase")
    assert first.image_key == "EndoVis-18-VQA_extended/seq_1/left_frames/frame082.png"
    assert (second.question, second.question_type) == ("Describe it.", "caption/detail")
    assert [e.group for e in dataset.examples] == ["18/seq_1", "17/seq1"]


def test_each_turn_is_a_question_on_the_same_image(tmp_path: Path) -> None:
    dataset = llava(
        tmp_path,
        {"id": "x", "conversations": said("<image>\nQ1", "A1", "Q2 ", "A2", "Q3", "A3"), "stage": 2},
        {"conversations": said("Q", "A")},
    )
    assert [(e.id, e.question, e.answers, e.image_key, e.stage) for e in dataset.examples] == [
        ("x:1", "Q1", ("A1",), "a.png", 2),
        ("x:2", "Q2", ("A2",), "a.png", 2),
        ("x:3", "Q3", ("A3",), "a.png", 2),
        ("train:2", "Q", ("A",), "a.png", None),
    ]
    assert [(p.warning, p.what.split(";")[0]) for p in dataset.problems] == [
        (True, "2 questions come later in a conversation")
    ]


def test_messages(tmp_path: Path) -> None:
    image(tmp_path, "b.png")
    parts = [{"type": "image", "image": "b.png"}, {"type": "text", "text": "Q2"}]
    dataset = chat(
        tmp_path,
        {"messages": messages("<image>Q1", "A1"), "images": ["a.png"]},
        {"messages": messages(parts, [{"type": "text", "text": "A2"}])},
        {
            "messages": messages([{"type": "image"}, {"type": "text", "text": "Q3"}], "A3"),
            "images": ["a.png"],
        },
        {"messages": messages("<image><image>Which is sharper?", "the first"), "images": ["a.png", "b.png"]},
        {"messages": messages("Is <image> sharper than <image> is?", "no"), "images": ["a.png", "b.png"]},
    )
    assert [(e.image_key, e.question, e.answers[0]) for e in dataset.examples] == [
        ("a.png", "Q1", "A1"),
        ("b.png", "Q2", "A2"),
        ("a.png", "Q3", "A3"),
        ("a.png\nb.png", "Which is sharper?", "the first"),
        ("a.png\nb.png", "Is sharper than is?", "no"),
    ]
    assert [p.what for p in dataset.problems] == [
        "1 questions have an image inside their text; all images come before it here"
    ]


def test_system_messages_are_not_lost(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Answer as a surgeon."}
    dataset = chat(
        tmp_path,
        {"messages": [system, *messages("Q1", "A1", "Q2", "A2")], "images": ["a.png"]},
        {"messages": messages("Q3", "A3"), "images": ["a.png"]},
        {"messages": messages("Q4", "A4"), "images": ["a.png"], "system": "Be brief."},
    )
    assert [e.question for e in dataset.examples] == [
        "Answer as a surgeon.\nQ1",
        "Answer as a surgeon.\nQ2",
        "Q3",
        "Be brief.\nQ4",
    ]
    warning = dataset.problems[1]
    assert warning.warning
    assert "2 rows have a system message, which is put before each" in warning.what
    assert "'Answer as a surgeon.' (1)" in warning.what
    assert "prompt.system" in warning.what


@pytest.mark.fault("F17")
@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({}, "conversations is missing; the row has image"),
        ({"conversations": None}, "conversations is empty"),
        ({"conversations": []}, "conversations is an empty list"),
        ({"conversations": "Q"}, "conversations is text instead of a list"),
        ({"conversations": ["Q"]}, "have text instead of an object in message 1"),
        ({"conversations": said("Q", "A", roles=("tool", "gpt"))}, "have the role 'tool' in message 1"),
        ({"conversations": [{"value": "Q"}]}, "have the role None in message 1"),
        ({"conversations": [{"from": ["x"], "value": "Q"}]}, "have the role ['x'] in message 1"),
        ({"conversations": said("Q", "A", "Q")}, "end with a question that has no answer"),
        ({"conversations": said("Q", "A", roles=("human", "human"))}, "two questions without an answer"),
        ({"conversations": said("A", roles=("gpt", "gpt"))}, "have an answer without question"),
        ({"conversations": said("", "A")}, "have no text in question 1"),
        ({"conversations": said("<image>\n ", "A")}, "have no text in question 1"),
        ({"conversations": said("Q", " ")}, "have no answer in question 1"),
        ({"conversations": [{"from": "human", "value": 1.5e400}]}, "have in message 1 a text that is inf"),
        ({"conversations": said("a\0b", "A")}, "have in message 1 a text that holds a NUL byte"),
        ({"conversations": said("<image><image>Q", "A")}, "have 2 <image>, but the row has 1 images"),
        ({"conversations": said("Q", "A"), "image": "gone.png"}, "image 'gone.png' does not exist"),
        ({"conversations": said("Q", "A"), "image": None}, "image is empty"),
        ({"conversations": said("Q", "A"), "image": "..\\a.png"}, "image '..\\\\a.png'"),
        ({"conversations": said("Q", "A"), "image": "https://x.org/a.png"}, "is an address"),
        ({"conversations": said("Q", "A"), "split": "dev"}, "split is 'dev'"),
        ({"conversations": [{"from": "human", "value": [{"type": "x"}]}]}, "has a part of the type 'x'"),
        ({"conversations": [{"from": "human", "value": ["x"]}]}, "has a part of the type None"),
        ({"conversations": [{"from": "system", "value": "x"}]}, "have no question"),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_bad_rows(tmp_path: Path, row: dict[str, Any], what: str) -> None:
    good = {"conversations": said("Q", "A")}
    dataset = llava(tmp_path, good, row, good)
    assert [e.id for e in dataset.examples] == ["train:1", "train:3"]
    assert what in whats(dataset)[0]
    assert whats(dataset)[0].startswith("train.json: row 2: ")
    assert not dataset.problems[0].warning


def test_paths_of_another_machine(tmp_path: Path) -> None:
    """The first image that is here settles which folders to leave out; what fits no longer is an error."""
    image(tmp_path, "v1/0001.png")
    image(tmp_path, "v2/0001.png")
    rows = [
        "D:/set/images/v1/0001.png",
        "D:\\set\\images\\v2\\0001.png",
        "E:/other/v1/0001.png",
        "/etc/passwd",
    ]
    dataset = llava(tmp_path, *({"conversations": said("Q", "A"), "image": name} for name in rows))
    assert [e.image_key for e in dataset.examples] == ["v1/0001.png", "v2/0001.png"]
    text = "\n".join(whats(dataset))
    assert "row 3: image 'E:/other/v1/0001.png' is an absolute path of Windows" in text
    assert "row 4: image '/etc/passwd' leads out of" in text
    assert "2 images have paths of another machine; 'D:/set/images/' is left out of them" in text
    there = tmp_path / "v1/0001.png"  # one of this machine stays what it is
    dataset = llava(tmp_path, {"conversations": said("Q", "A"), "image": str(there)})
    assert ([e.image_key for e in dataset.examples], dataset.problems) == (["v1/0001.png"], [])


COPESD = "Direct the Forceps[0.14, 0.21, 0.47, 0.77] to the flap and the Knife[0.71, 0.44, 0.89, 0.77]."


def test_boxes_in_the_text(tmp_path: Path) -> None:
    rows = [
        {"conversations": said("Lift the flap.", COPESD)},
        {"conversations": said("What is in [0.1, .2, 0.30, 1.0]?", "It is in [0.179, 0.75, 0.398, 0.999].")},
        {"conversations": said("Is Knife[0.1, 0.2, 0.3, 0.4] idle?", "[1, 2, 3, 4], [0.5, 2, 3, 4]")},
    ]  # fmt: skip
    dataset = llava(tmp_path, *rows, variant="boxes")
    assert dataset.problems == []
    first, second, third = dataset.examples
    assert first.answers == ("Direct the Forceps to the flap and the Knife.",)
    assert first.layout == "Direct the <box> to the flap and the <box>."
    assert [(r.label, r.box, r.relative) for r in first.regions] == [
        ("Forceps", (0.14, 0.21, 0.47, 0.77), True),
        ("Knife", (0.71, 0.44, 0.89, 0.77), True),
    ]
    assert (second.question, second.answers) == ("What is in <box>?", ("It is in.",))
    assert [r.box for r in (*second.asked_regions, *second.regions)] == [
        (0.1, 0.2, 0.3, 1.0),
        (0.179, 0.75, 0.398, 0.999),
    ]
    assert (third.question, third.asked_regions[0].label) == ("Is <box> idle?", "Knife")
    assert third.answers == ("[1, 2, 3, 4], [0.5, 2, 3, 4]",)
    assert third.regions == ()
    unsaid = llava(tmp_path, *rows).examples  # brackets are boxes where the recipe says so
    assert [len(e.regions) + len(e.asked_regions) for e in unsaid] == [2, 0, 1]
    assert [e.doubtful for e in unsaid] == ["", "[0.1, .2, 0.30, 1.0]", ""]
    as_text = llava(tmp_path, *rows, variant="text")
    assert as_text.examples[0].answers == (COPESD,)
    assert not any(e.regions or e.asked_regions for e in as_text.examples)


def test_boxes_that_are_width_and_height(tmp_path: Path) -> None:
    """As some of CoPESD's are: an error, not a box elsewhere."""
    dataset = llava(tmp_path, {"conversations": said("Cut.", "Use the Knife[0.76, 0.26, 0.21, 0.51].")})
    assert not dataset.examples
    assert "the box [0.76, 0.26, 0.21, 0.51], which must have its second corner right of" in whats(dataset)[0]
    assert "if it is x, y, width and height" in whats(dataset)[0]


def test_messages_with_embedded_images(tmp_path: Path) -> None:
    """As TRL's data sets on the hub are."""
    import datasets

    features = datasets.Features({
        "images": datasets.List(datasets.Image()),
        "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
    })  # fmt: skip
    cells = [{"bytes": data, "path": None} for data in (PIXEL, OTHER_PIXEL)]
    rows = {
        "images": [cells, cells[1:], []],
        "messages": [
            messages("<image><image>Q1", "A1"), messages("<image>Q2", "A2", "Q3", "A3"), messages("Q", "A"),
        ],
    }  # fmt: skip
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    dataset = load("messages", tmp_path)
    assert [([i.read() for i in e.images], e.question) for e in dataset.examples] == [
        ([PIXEL, OTHER_PIXEL], "Q1"),
        ([OTHER_PIXEL], "Q2"),
        ([OTHER_PIXEL], "Q3"),
    ]
    assert dataset.examples[1].images[0] == dataset.examples[0].images[1]
    assert "row 3: images is an empty list" in "\n".join(whats(dataset))


def test_other_names(tmp_path: Path) -> None:
    dataset = llava(
        tmp_path,
        {"picture": "a.png", "turns": said("Q", "A"), "task": "count"},
        columns={"image": "picture", "conversations": "turns", "question_type": "task"},
    )
    assert [(e.question, e.question_type) for e in dataset.examples] == [("Q", "count")]
    dataset = llava(tmp_path, {"conversations": said("Q", "A")}, columns={"group": "patient"})
    assert "no row has the column patient (for group)" in whats(dataset)[0]


# ---- the real files -----------------------------------------------------------------------------------


def test_real_endochat(tmp_path: Path) -> None:
    real = SHARED / "endochat/endovis_single_phrase.json"
    if not real.exists():
        pytest.skip("no real Surg-396K rows here; test_llava_as_surg396k_has_it covers generated ones")
    for row in json.loads(real.read_text()):
        image(tmp_path, row["image"].replace("\\", "/"))
    dataset = load(
        "llava", real, roots=[str(tmp_path)], by="group", group_pattern=r"VQA-?(1\d)?.*?(seq_?\d+)"
    )
    assert (len(dataset.examples), dataset.problems) == (318, [])
    assert len({e.image_key for e in dataset.examples}) == 44
    assert Counter(e.group.split("/")[-1] for e in dataset.examples)["seq_16"] == 72
    assert {e.question_type for e in dataset.examples} == {"single_phrase"}
    # `Suction` is an action here and `suction` a tool
    assert {"Suction", "suction"} <= {e.answers[0] for e in dataset.examples}


def test_real_copesd(tmp_path: Path) -> None:
    real = SHARED / "copesd/smllm_test.json"
    if not real.exists():
        pytest.skip("no real CoPESD rows here; test_boxes_in_the_text covers generated ones")
    for row in json.loads(real.read_text()):
        image(tmp_path, "/".join(row["image"].split("/")[-2:]))
    keys: dict[str, Any] = {"roots": [str(tmp_path)], "by": "group", "group_pattern": r"(\d{6})/\d+\.jpg"}
    dataset = load("llava", real, **keys)
    errors = [p for p in dataset.problems if not p.warning]
    assert len(dataset.examples) + len({p.place for p in errors}) == 120
    assert len(errors) == 12
    assert all("if it is x, y, width and height" in p.what for p in errors)
    assert Counter(e.group for e in dataset.examples) == {
        "023521": 105,
        "233029": 3,
    }  # 12 of the latter are bad
    assert {r.label for e in dataset.examples for r in e.regions} == {"Forceps", "Knife"}
    assert not any("[" in e.answers[0] for e in dataset.examples)
    text = load("llava", real, variant="text", **keys)
    assert (len(text.examples), [p.warning for p in text.problems]) == (120, [True])


def test_real_x1_messages(tmp_path: Path) -> None:
    real = SHARED / "kvasir_vqa_x1/Kvasir-VQA-x1-train.jsonl"
    if not real.exists():
        pytest.skip("no real messages here; test_messages covers generated ones")
    for line in real.read_text().splitlines():
        image(tmp_path, json.loads(line)["images"][0])
    dataset = load("messages", real, roots=[str(tmp_path)], by="image")
    assert dataset.problems == []
    assert [e.question.split()[0] for e in dataset.examples] == ["Are", "What", "Have"]
    assert dataset.examples[1].answers == ("Evidence of a colonoscopy with a paris iia polyp noted",)
