"""Whatever a table has is used, or told: choices, further images, names of parts, list answers, marks."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from sources import PIXEL, errors, load, warnings

from surgvqa import recipe
from surgvqa.datasets import Dataset, choices, files, remote, tables
from surgvqa.recipe import BadInput

pytestmark = pytest.mark.usefixtures("hub_cache")

FORMATS = ("jsonl", "json", "csv", "parquet", "hub")
SPLIT: dict[str, Any] = {"by": "image", "split": {"val": 0, "test": 0}}
ALL = {"list_answers": "alternatives", **SPLIT}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(PIXEL)
    return tmp_path


def write(folder: Path, format: str, rows: list[dict[str, Any]]) -> Path:
    """Write rows as a table, lists as JSON in CSV; returns `data.path` for it."""
    file = folder / f"train.{'parquet' if format == 'hub' else format}"
    if format == "json":
        file.write_text(json.dumps(rows))
    elif format == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif format == "csv":
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            for row in rows:
                lists = {k: json.dumps(v) for k, v in row.items() if isinstance(v, (list, dict))}
                writer.writerow(row | lists)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), file)
    return folder if format == "hub" else file


def row(**fields: Any) -> dict[str, Any]:
    return {"image": "a.png", "question": "What is it?", "answer": "yes"} | fields


def asked(dataset: Dataset) -> list[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    return [(e.question, e.answers, e.labels) for e in dataset.examples]


# ---- all formats alike --------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_formats_behave_alike(folder: Path, format: str) -> None:
    rows = [
        row(question="<image>\nWhich one?", answer="B", options=["knife", "hook"], image2="b.png", lang="en"),
        row(answer=" hook ", options=["knife", "hook"], image2="b.png", lang="en"),
    ]
    dataset = load(format, write(folder, format, rows), **ALL)
    assert errors(dataset) == []
    question = "Which one?\nA. knife\nB. hook"
    assert asked(dataset) == [
        (question, ("B",), ("A", "B")),
        (question.replace("Which one?", "What is it?"), ("B",), ("A", "B")),
    ]
    marks, images = sorted(w for w in warnings(dataset) if "holds no" not in w)[::-1]
    assert marks.startswith("questions have marks of images taken out")
    assert marks.endswith("'<image>' (1)")
    assert images.startswith("columns that are not used: image2; if they are images of the question")
    told = "\n".join(line.partition(": ")[2] for line in dataset.unused)
    assert "columns that are not used: lang" in told
    assert "2 questions have their choices put into them, from options" in told
    whole = load(format, write(folder, format, rows), columns={"image": ["image", "image2"]}, **ALL)
    assert "1 <image>, but the row has 2 images" in errors(whole)[0]
    assert [e.image_key for e in whole.examples] == ["a.png\nb.png"]


@pytest.mark.parametrize("format", FORMATS)
def test_list_answers(folder: Path, format: str) -> None:
    path = write(folder, format, [row(answer=["grasper", "hook", "hook"]), row(answer=["no"])])
    default = load(format, path, **SPLIT)
    assert [e.answers for e in default.examples] == [("grasper", "hook", "hook"), ("no",)]
    assert any(w.startswith("1 row has a list of several answers; the first is") for w in warnings(default))
    for setting, answers in (("join", ("grasper; hook",)), ("alternatives", ("grasper", "hook", "hook"))):
        dataset = load(format, path, **{**SPLIT, "list_answers": setting})
        assert [e.answers for e in dataset.examples] == [answers, ("no",)]
        assert not any("several answers" in warning for warning in warnings(dataset))
        assert any("1 row has a list of several answers" in line for line in dataset.unused)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.fault("F33")
def test_rows_rewritten_with_the_same_size_and_time_are_read(folder: Path, format: str) -> None:
    for answer in ("yes", "now"):
        path = write(folder, format, [row(answer=answer)])
        table = next(folder.glob("train.*"))
        os.utime(table, (1_700_000_000, 1_700_000_000))
        assert load(format, path, **SPLIT).examples[0].answers == (answer,)


@pytest.mark.parametrize("format", ["parquet", "hub"])
@pytest.mark.fault("F33")
def test_embedded_images_rewritten_with_the_same_time_are_decoded_anew(folder: Path, format: str) -> None:
    from surgvqa.datasets import ImageRef
    from surgvqa.scan import scan

    def image() -> ImageRef:
        path = write(folder, format, [row(image={"bytes": data, "path": None})])
        os.utime(folder / "train.parquet", (1_700_000_000, 1_700_000_000))
        return load(format, path, **SPLIT).examples[0].images[0]

    data = PIXEL
    first = scan([image()])
    assert (first.decoded, scan([image()]).decoded) == (1, 0)
    data = PIXEL[:-4] + b"\xff\0\0\0"
    second = scan([image()])
    assert second.decoded == 1
    digests = [[facts.digest for facts in result.found.values()] for result in (first, second)]
    assert digests[0] != digests[1]


@pytest.mark.fault("F33")
def test_an_image_file_replaced_with_the_same_size_and_time_is_decoded_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its inode's time of change, which no program can set, differs."""
    from surgvqa import scan

    monkeypatch.setattr(scan, "_SETTLED_NS", 0)
    ref = load("jsonl", write(folder, "jsonl", [row()]), **SPLIT).examples[0].images[0]
    for data in (PIXEL, PIXEL[:-4] + b"\xff\0\0\0"):
        (folder / "a.png").write_bytes(data)  # the inode stays
        os.utime(folder / "a.png", (1_700_000_000, 1_700_000_000))
        found = scan.scan([ref])
        assert found.decoded == 1
        assert scan.scan([ref]).decoded == 0
        assert found.found["a.png"].digest == hashlib.sha256(data).hexdigest()


# ---- choices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "columns"),
    [
        ({"choice_A": " A: knife ", "choice_B": "B:hook", "answer": "B"}, {}),
        ({"choiceA": "knife", "choiceB": "hook", "answer": "b."}, {}),
        ({"Option A": "knife", "Option B": "hook", "answer": "B. hook"}, {}),
        ({"opa": "knife", "opb": "hook", "answer": "Hook"}, {}),
        ({"A": "knife", "B": "hook", "answer": "(B)"}, {}),
        ({"choices": ["A. knife", "B. hook"], "answer": "hook"}, {}),
        ({"choices": ["knife", "hook", None], "answer": "B"}, {}),
        ({"options": {"A": "knife", "B": "hook", "C": None}, "answer": "B"}, {}),
        ({"options": '{"A": "knife", "B": "hook"}', "answer": "B"}, {}),
        ({"options": "['knife', 'hook']", "answer": "B"}, {}),
        ({"options": "A. knife\nB. hook", "answer": "B"}, {}),
        ({"choices": {"text": ["knife", "hook"], "label": ["A", "B"]}, "answer": "B"}, {}),
        ({"first": "knife", "second": "hook", "answer": "B"}, {"choices": ["first", "second"]}),
        ({"alternatives": ["knife", "hook"], "answer": "B"}, {"choices": "alternatives"}),
        ({"options": ["knife", "hook", float("nan")], "answer": "B"}, {}),
        ({"A": "knife", "B": "hook", "C": float("nan"), "answer": "B"}, {}),
        ({"options": "['knife'\n 'hook']", "answer": "B"}, {}),
        ({"options": ["<image> knife", "hook"], "answer": "B"}, {}),
        ({"question": "What is it?\nA. knife\nB. hook", "options": ["knife", "hook"], "answer": "B"}, {}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_choices_are_asked(folder: Path, fields: dict[str, Any], columns: dict[str, Any]) -> None:
    dataset = load("json", write(folder, "json", [row(**fields)]), columns=columns, **SPLIT)
    assert errors(dataset) == []
    assert asked(dataset) == [("What is it?\nA. knife\nB. hook", ("B",), ("A", "B"))]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"options": ["knife", "hook"], "answer": "C"},
            "answer 'C' is none of its choices (A: knife, B: hook)",
        ),
        ({"options": ["knife", "hook"], "answer": 1}, "answer '1' is none of its choices"),
        ({"options": ["B", "A"], "answer": "A"}, "is the label of one choice and the text of another"),
        ({"options": ["x", "x"], "answer": "x"}, "is the label of one choice and the text of another"),
        ({"options": "knife or hook"}, "options is text that holds no choices"),
        ({"options": 7}, "options is a number instead of a list or an object of choices; set data.columns"),
        ({"options": [["x"], "y"]}, "options is a list instead of text"),
        ({"options": ["x"] * 30}, "options has 30 choices"),
        (
            {"options": {"text": ["x", "y"], "label": ["A", "A"]}, "answer": "y"},
            "options has a label more th",
        ),
        ({"options": ["x", "nan"], "answer": "x"}, "options is 'nan', which stands for a missing value"),
        ({"options": ["<image>", "x"], "answer": "x"}, "choice holds nothing but <image>"),
        ({"options": ["x", "y"], "answer": ["A", "Z"]}, "answer 'Z' is none of its choices"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_choices_that_cannot_be_asked_are_errors(folder: Path, fields: dict[str, Any], said: str) -> None:
    path = write(folder, "json", [row(**fields), row()])
    dataset = load("json", path, **SPLIT)
    assert len(dataset.examples) == 1
    assert said in errors(dataset)[0]
    off = load("json", path, columns={"choices": None}, **SPLIT)
    assert errors(off) == []
    assert off.examples[0].question == "What is it?"
    assert any("columns that are not used: options" in line for line in off.unused)


def test_what_is_no_choice(folder: Path) -> None:
    """Empty ones, a letter alone, letters with a gap, and labels that are text."""
    fields: list[dict[str, Any]] = [
        {"options": None}, {"options": []}, {"A": "x"}, {"A": "x", "C": "y"}, {"a": "x", "b": "y"},
        {"options": ""},
    ]  # fmt: skip
    dataset = load("jsonl", write(folder, "jsonl", [row(**each) for each in fields]), **SPLIT)
    assert errors(dataset) == []
    assert {e.question for e in dataset.examples} == {"What is it?"}
    assert choices.cleaned({"A": "A. fumigatus", "B": "C. albicans"}) == {
        "A": "A. fumigatus",
        "B": "C. albicans",
    }
    assert choices.single_columns(["opt_0", "opt_1", "question"]) == {"0": "opt_0", "1": "opt_1"}


def test_every_name_of_a_choice_is_read_from_parquet(folder: Path) -> None:
    for names in (
        ("choice_A", "choice_B"),
        ("optionA", "optionB"),
        ("opa", "opb"),
        ("A", "B"),
        ("Option 1", "Option 2"),
        tuple("ABCDEFGHIJKL"),
        tuple(f"option_{number}" for number in range(1, 13)),
    ):
        texts = [*map(str, range(len(names) - 2)), "knife", "hook"]
        path = write(folder, "parquet", [row(answer="hook", **dict(zip(names, texts, strict=True)))])
        (example,) = load("parquet", path, **SPLIT).examples
        assert example.question.endswith("knife\n" + example.answers[0] + ". hook"), names
    path = write(folder, "parquet", [row(answer="hook", Options=["knife", "hook"])])
    assert load("parquet", path, **SPLIT).examples[0].question.endswith("\nA. knife\nB. hook")


def test_a_column_that_the_recipe_names_is_no_choice(folder: Path) -> None:
    path = write(folder, "jsonl", [{"image": "a.png", "Q": "What?", "A": "yes", "B": "no"}])
    dataset = load("jsonl", path, columns={"question": "Q", "answer": "A"}, **SPLIT)
    assert asked(dataset) == [("What?", ("yes",), ())]
    path = write(folder, "jsonl", [{"image": "a.png", "question": "What?", "option": "hook"}])
    dataset = load("jsonl", path, columns={"answer": "option"}, **SPLIT)
    assert asked(dataset) == [("What?", ("hook",), ())]


@pytest.mark.parametrize(
    ("cell", "answers"),
    [
        ("['knife' 'hook']", ("knife", "hook")),
        ("['it''s' \"a 'b' c\"]", ("it", "s", "a 'b' c")),
        ('[ "knife"]', ("knife",)),
        ("['knife', 2]", ("knife", "2")),
        ("['knife' is here]", ("['knife' is here]",)),
        ("[]", None),
        ('["knife", null]', None),
    ],
)
def test_lists_as_csv_has_them(folder: Path, cell: str, answers: tuple[str, ...] | None) -> None:
    dataset = load("csv", write(folder, "csv", [row(answer=cell), row()]), **SPLIT)
    if answers is None:
        assert errors(dataset)[0].startswith("train.csv:2: answer is")
    else:
        assert dataset.examples[0].answers == answers


def test_letters_are_the_closed_set_of_their_question(folder: Path) -> None:
    from surgvqa.audit import load_and_audit

    path = write(
        folder, "jsonl", [row(options=["knife", "hook"], answer="A", split="test"), row(split="train")]
    )
    text = f"""
model: {{name: tiny-qwen3-vl}}
data: {{format: jsonl, path: {path}}}
image: {{size: 64}}
eval: {{answers: labels}}
output: {folder / "run"}
"""
    _, found = load_and_audit(recipe.parse(text))
    assert [p.what for p in found.problems if not p.warning and "closed set" in p.what] == []


# ---- marks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mark",
    [
        "<image>",
        "<ImageHere>",
        "<video>",
        "<img>a/b.png</img>",
        "<|vision_start|><|image_pad|><|vision_end|>",
    ],
)
def test_marks_of_images_are_taken_out_and_told(folder: Path, mark: str) -> None:
    rows = [
        row(question=f"{mark}\nQ?"),
        row(question=f"In {mark} what?", answer=f"{mark}no"),
        row(answer=mark),
    ]
    dataset = load("jsonl", write(folder, "jsonl", rows), **SPLIT)
    assert [(e.question, e.answers[0]) for e in dataset.examples] == [("Q?", "yes"), ("In what?", "no")]
    assert errors(dataset) == [f"train.jsonl:3: answer holds nothing but {mark}"]
    told = [warning for warning in warnings(dataset) if "marks" in warning]
    assert told == [
        f"questions have marks of images taken out, since all images come before the question: {mark!r} (2)",
        f"answers have marks of images taken out, since all images come before the question: {mark!r} (1)",
    ]


def test_marks_in_conversations(folder: Path) -> None:
    def said(question: str, answer: str, system: str = "") -> dict[str, Any]:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return {"images": ["a.png"], "system": system, "messages": turns}

    rows = [
        said("<img>x/a.png</img>Q?", "no"),
        said("<|vision_start|><|image_pad|><|vision_end|>\nR?", "no"),
        said("S?", "<IMAGE> no"),
        said("Is <image 2> T?", "no", "Look at <image>."),
        said("U?", "<image>"),
    ]
    dataset = load("messages", write(folder, "json", rows), **SPLIT)
    assert [(e.question, e.answers[0]) for e in dataset.examples] == [
        ("Q?", "no"), ("R?", "no"), ("S?", "no"), ("Look at .\nIs <image 2> T?", "no"),
    ]  # fmt: skip
    assert errors(dataset) == ["train.json: row 5: messages have no answer in question 1"]
    taken = "have marks of images taken out, since all images come before the question"
    assert sorted(warning for warning in warnings(dataset) if "marks" in warning) == [
        f"answers {taken}: '<IMAGE>' (1)",
        "questions have marks of numbered images, which are read as text: '<image 2>' (1)",
        f"system messages {taken}: '<image>' (1)",
    ]


def test_images_of_a_row_and_of_its_messages_are_the_same(folder: Path) -> None:
    def row_with(name: str) -> dict[str, Any]:
        content = [{"type": "image", "image": name}, {"type": "text", "text": "Q?"}]
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "no"}]
        return {"images": ["a.png"], "messages": turns}

    dataset = load("messages", write(folder, "json", [row_with("a.png"), row_with("b.png")]), **SPLIT)
    assert [e.image_key for e in dataset.examples] == ["a.png"]
    assert errors(dataset) == [
        "train.json: row 2: images and messages name different images; keep one of them"
    ]


def test_marks_must_be_as_many_as_images_and_numbered_ones_stay(folder: Path) -> None:
    rows = [row(question="<image><image>Q?"), row(question="Is <image 1> sharp?"), row(question="a < b <c>?")]
    dataset = load("jsonl", write(folder, "jsonl", rows), **SPLIT)
    assert errors(dataset) == ["train.jsonl:1: question has 2 <image>, but the row has 1 images"]
    assert [e.question for e in dataset.examples] == ["Is <image 1> sharp?", "a < b <c>?"]
    assert any(
        "marks of numbered images, which are read as text: '<image 1>' (1)" in w for w in warnings(dataset)
    )


# ---- names of parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stem", "part"),
    [
        ("train", "train"), ("Training", "train"), ("VAL", "val"), ("valid", "val"), ("validate", "val"),
        ("dev", "val"), ("eval", "val"), ("testing", "test"), ("Kvasir-VQA-x1-train", "train"),
        ("slake_validation", "val"), ("train-00000-of-00001-eb8844602202be60", "train"),
        ("vqa-test-00001-of-00002", "test"), ("latest", None), ("constrain", None), ("test_open", None),
        ("trainval", None), ("questions", None),
    ],
)  # fmt: skip
def test_names_of_files(stem: str, part: str | None) -> None:
    assert tables.part_of(Path(f"{stem}.json")) == part


def test_other_names_of_parts_are_read(folder: Path) -> None:
    for name, part in (("Train", "train"), ("validate", "val"), ("x-test", "test")):
        (folder / f"{name}.jsonl").write_text(json.dumps(row(split=part.upper() + "ing" * (part != "val"))))
    (folder / "test_open.jsonl").write_text(json.dumps(row()))
    dataset = load("jsonl", folder)
    assert errors(dataset) == []
    assert [len(dataset.part(part)) for part in ("train", "val", "test")] == [1, 1, 1]
    assert dataset.unused == [
        f"{folder}: tables that are not read, since their names stand for no part: test_open.jsonl"
    ]
    (folder / "all_train.jsonl").write_text(json.dumps(row()))  # the bare name goes before
    dataset = load("jsonl", folder)
    assert len(dataset.part("train")) == 1
    assert "not read, since another is named as their part: all_train.jsonl" in warnings(dataset)[0]
    (folder / "dev.jsonl").write_text(json.dumps(row()))
    with pytest.raises(BadInput, match=r"several tables for val \(dev.jsonl, validate.jsonl\)"):
        load("jsonl", folder)


def test_pieces_of_a_table(folder: Path) -> None:
    for number in (0, 2):
        (folder / f"x_train-{number:05}-of-00003.jsonl").write_text(json.dumps(row()))
    (folder / "test-00000-of-00001.jsonl").write_text(json.dumps(row()))
    said = [w for w in warnings(load("jsonl", folder)) if "piece" in w]
    assert said == ["holds 2 of the 3 pieces of x_train; fetch the others if you want all"]
    (folder / "x_train-00001-of-00003.jsonl").write_text(json.dumps(row()))
    dataset = load("jsonl", folder)
    assert len(dataset.part("train")) == 3
    assert not any("piece" in warning for warning in warnings(dataset))
    (folder / "test.jsonl").write_text(json.dumps(row()))
    with pytest.raises(BadInput, match="several tables for test"):
        load("jsonl", folder)


# ---- columns that are none of ours --------------------------------------------------------------------


def test_a_column_is_switched_off(folder: Path) -> None:
    rows = [row(stage="Change", split="fold3", id="a"), row(stage="Maintain", split="fold4", id="a")]
    path = write(folder, "jsonl", rows)
    said = errors(load("jsonl", path, **SPLIT))
    assert "set data.columns: {split: null}" in said[0]
    assert "set data.columns: {stage: null}" in said[1]
    dataset = load("jsonl", path, columns={"stage": None, "split": None, "id": None}, **SPLIT)
    assert (errors(dataset), dataset.unused) == ([], [])
    assert [(e.id, e.stage) for e in dataset.examples] == [("train:1", None), ("train:2", None)]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ("{image: null}", "data.columns.image: is null, but format jsonl needs it"),
        ('{stage: ""}', "data.columns.stage: is empty"),
        ("{image: []}", "data.columns.image: is empty"),
        ("{stage: [a, b]}", "data.columns.stage: is a list; only image and choices"),
        ("{image: [a, a]}", "data.columns.image: has a column more than once"),
        ("{stage: 3}", "data.columns: 'stage' is 3; give a column's name, a list of names, or null"),
        ("{image: [3]}", "data.columns: 'image' is [3]; give a column's name"),
    ],
)
def test_columns_that_mean_nothing(columns: str, said: str) -> None:
    text = f"""
model: {{name: tiny-qwen3-vl}}
data: {{format: jsonl, path: x.jsonl, columns: {columns}}}
image: {{size: 64}}
output: run
"""
    with pytest.raises(BadInput) as wrong:
        recipe.parse(text)
    assert len(wrong.value.problems) == 1
    assert said in wrong.value.problems[0]


def test_columns_survive_a_dump() -> None:
    text = """
model: {name: tiny-qwen3-vl}
data: {format: jsonl, path: x.jsonl, columns: {image: [a, b], stage: null, choices: c}, list_answers: join}
image: {size: 64}
output: run
"""
    read = recipe.parse(text)
    assert read.data.columns == {"image": ["a", "b"], "stage": None, "choices": "c"}
    assert recipe.parse(read.dump()) == read


def test_boxes_of_other_toolkits_are_told(folder: Path) -> None:
    dataset = load(
        "jsonl", write(folder, "jsonl", [row(objects={"bbox": [[1, 2, 3, 4]]}, bbox=[1])]), **SPLIT
    )
    assert any(
        w.startswith("columns that are not used: objects, bbox; if they are boxes") for w in warnings(dataset)
    )


@pytest.mark.parametrize("format", ["json", "jsonl", "parquet"])
def test_conversations_tell_what_they_do_not_use(folder: Path, format: str) -> None:
    turns = [{"role": "user", "content": "<image>Q?"}, {"role": "assistant", "content": "no"}]
    rows = [{"images": ["a.png"], "image_2": "b.png", "keywords": "x", "messages": turns}]
    write(folder, format, rows).rename(folder / f"x-train.{format}")
    (folder / f"extra.{format}").write_text("")
    dataset = load("messages", folder, **SPLIT)
    assert errors(dataset) == []
    assert any(w.startswith("columns that are not used: image_2; if they are im") for w in warnings(dataset))
    assert [line.partition(": ")[2] for line in dataset.unused] == [
        f"tables that are not read, since their names stand for no part: extra.{format}",
        "columns that are not used: keywords",
    ]


# ---- other people's files -----------------------------------------------------------------------------


def test_an_image_named_without_its_suffix(folder: Path) -> None:
    (folder / "images").mkdir()
    (folder / "images/clb0.jpg").write_bytes(PIXEL)
    rows = [row(image=name) for name in ("clb0", "a", "gone", "images/clb0", "a.b.")]
    dataset = load("jsonl", write(folder, "jsonl", rows), roots=[str(folder / "images")], **SPLIT)
    assert [e.image_key for e in dataset.examples] == ["images/clb0.jpg", "a.png", "images/clb0.jpg"]
    assert "'gone' does not exist" in errors(dataset)[0]
    (folder / "a.jpg").write_bytes(PIXEL)
    assert "may be a.jpg or a.png" in errors(load("jsonl", folder / "train.jsonl", **SPLIT))[1]
    (folder / "link.png").symlink_to("/etc/hostname")
    leak = load(
        "jsonl", write(folder, "jsonl", [row(image="link"), row(image="../../etc/hostname")]), **SPLIT
    )
    assert "leads out of" in errors(leak)[0]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("q.csv", "image;question;answer\na.png;Q, or R?;no\n"),
        ("q.csv", '"image"\t"question"\t"answer"\na.png\tQ, or R?\tno\n'),
        ("q.tsv", "image\tquestion\tanswer\na.png\tQ, or R?\tno\n"),
        ("q.csv", 'image,question,answer,a;b\na.png,"Q, or R?",no,\n'),
        ("q.json", '{"7": {"image": "a.png", "question": "Q, or R?", "answer": "no"}}'),
    ],
)
def test_other_separators_and_objects_of_objects(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    dataset = load(name[2:].replace("tsv", "csv"), folder / name, **SPLIT)
    assert errors(dataset) == []
    ((question, answers, _),) = asked(dataset)
    assert (question, answers) == ("Q, or R?", ("no",))
    assert dataset.examples[0].id == ("7" if name == "q.json" else "q:1")


def test_a_used_column_that_is_there_twice(folder: Path) -> None:
    for name, said in (("split", True), ("options", True), ("note", False)):
        (folder / "q.csv").write_text(f"image,question,answer,{name},{name}\na.png,Q,no,,\n")
        found = errors(load("csv", folder / "q.csv", **SPLIT))
        assert any(f"has the columns {name} more than once" in each for each in found) == said


def test_an_object_of_objects_that_is_broken(folder: Path) -> None:
    good = json.dumps(row())
    for text, count, said in (
        (f'{{"0": {good}, "1": {good}', 2, "row 3 and what follows it cannot be read"),
        (f'{{"0": {good}, 7: {good}}}', 1, "is not valid JSON"),
        (f'{{"0": {good}}} x', 1, "has text after the object's closing }"),
        (f'{{"0": {good}, "data": [{good}]}}', 1, "whose 'data' is a list"),
        ("{}", 0, ""),
    ):
        (folder / "q.json").write_text(text)
        rows = list(files.json_rows(folder / "q.json"))
        assert sum(isinstance(each, files.Row) for each in rows) == count, text
        assert said in str(rows[-1] if rows else ""), text


@pytest.mark.parametrize("format", ["jsonl", "json", "csv", "parquet"])
def test_a_git_lfs_pointer_is_named(folder: Path, format: str) -> None:
    (folder / f"train.{format}").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 262328\n"
    )
    (said,) = errors(load(format, folder / f"train.{format}"))
    assert "is a Git LFS pointer, not the data; fetch it with `git lfs pull`" in said


def test_a_line_too_long_is_passed_and_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_LONGEST", 1000)
    monkeypatch.setattr(files, "_PIECE", 64)
    good, long = json.dumps(row()), json.dumps(row(question="x" * 5000))
    (folder / "train.jsonl").write_text(f"{good}\n{long}\n{good}\n{long}")
    dataset = load("jsonl", folder / "train.jsonl", **SPLIT)
    assert [e.id for e in dataset.examples] == ["train:1", "train:3"]
    assert [said.split(": ")[0] for said in errors(dataset)] == ["train.jsonl:2", "train.jsonl:4"]
    assert "is a row of more than" in errors(dataset)[0]
    for field, whole in (("x" * 5000, False), ('"x\n' + "y\n" * 600 + '"', True)):
        (folder / "q.csv").write_text(f"image,question,answer\na.png,Q,no\na.png,{field},no\na.png,R,no\n")
        dataset = load("csv", folder / "q.csv", **SPLIT)
        assert dataset.examples[0].question == "Q"
        first = next(p for p in dataset.problems if not p.warning)
        assert (first.place, first.whole) == (f"{folder}/q.csv:3", whole)
        assert "is a row of more than" in first.what


def test_a_long_line_takes_no_memory(folder: Path) -> None:
    """A line of 300 MB, most of it a hole, is passed with less than that in memory."""
    import tracemalloc

    with (folder / "train.jsonl").open("wb") as stream:
        stream.write(json.dumps(row()).encode() + b"\n")
        stream.truncate(300 * 2**20)
    tracemalloc.start()
    dataset = load("jsonl", folder / "train.jsonl", **SPLIT)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(dataset.examples) == 1
    assert "is a row of more than 64 MiB" in errors(dataset)[0]
    assert peak < 150 * 2**20


# ---- the hub out of reach -----------------------------------------------------------------------------


@pytest.fixture
def silent() -> Any:
    """The address of a server that takes connections and never answers."""
    server, held = socket.socket(), []
    server.bind(("127.0.0.1", 0))
    server.listen(50)

    def serve() -> None:
        try:
            while True:
                held.append(server.accept())
        except OSError:
            return

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}"
    server.close()


@pytest.mark.parametrize("hangs", [True, False])
def test_a_hub_out_of_reach_is_told_in_seconds(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    silent: str,
    hangs: bool,
) -> None:
    from huggingface_hub import constants

    from surgvqa import hub

    endpoint = silent if hangs else "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(remote, "PATIENCE_S", 1)
    began = time.monotonic()
    for kind in ("hub", "kvasir_vqa"):
        with pytest.raises(BadInput, match=f"owner/name: .*{endpoint} cannot be reached"):
            load(kind, "owner/name")
    with pytest.raises(BadInput, match=f"owner/model: not in the local cache .*{endpoint} cannot be reached"):
        hub.find("owner/model")
    assert time.monotonic() - began < 8
    said = capfd.readouterr().err
    assert f"fetching the data set owner/name from {endpoint}" in said
    assert f"fetching the model owner/model from {endpoint}" in said
    (tmp_path / "a.png").write_bytes(PIXEL)
    load("hub", write(tmp_path, "hub", [row()]), **SPLIT)  # a folder needs no hub
    assert "fetching" not in capfd.readouterr().err
