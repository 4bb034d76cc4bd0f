"""Tables under other people's column names, JSON lists, boxes, and data sets of the hub."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from sources import load

from surgvqa import recipe
from surgvqa.datasets import Dataset, files
from surgvqa.recipe import BadInput

SHARED = Path(__file__).resolve().parents[3] / "shared/data"
PIXEL = bytes.fromhex("424d1e000000000000001a0000000c000000010001000100180000ff0000")  # 1×1 BMP
OTHER_PIXEL = PIXEL[:-4] + b"\xff\0\0\0"

ROWS: list[dict[str, Any]] = [
    {"img": "a.png", "q": "Is there a polyp?", "label": "yes", "kind": "yes_no", "case": 7, "level": 1},
    {"img": "b.png", "q": "How many?", "label": 2, "kind": "count", "case": 8, "level": 2},
]
COLUMNS = {
    "image": "img", "question": "q", "answer": "label",
    "question_type": "kind", "group": "case", "stage": "level",
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("hub_cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(PIXEL)
    return tmp_path


def write(folder: Path, format: str, rows: list[dict[str, Any]], stem: str = "train") -> Path:
    file = folder / f"{stem}.{format}"
    if format == "json":
        file.write_text(json.dumps(rows, indent=2))
    elif format == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif format == "csv":
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist([row | {"label": str(row.get("label"))} for row in rows]), file)
    return file


def whats(dataset: Dataset) -> list[str]:
    return [f"{Path(problem.place).name}: {problem.what}" for problem in dataset.problems]


@pytest.mark.parametrize("format", ["json", "jsonl", "csv", "parquet"])
def test_columns_under_other_names(folder: Path, format: str) -> None:
    dataset = load(format, write(folder, format, ROWS), columns=COLUMNS)
    assert dataset.problems == []
    assert [
        (e.id, e.image_key, e.question, e.answers, e.question_type, e.group, e.stage, e.split)
        for e in dataset.examples
    ] == [
        ("train:1", "a.png", "Is there a polyp?", ("yes",), "yes_no", "7", 1, "train"),
        ("train:2", "b.png", "How many?", ("2",), "count", "8", 2, "train"),
    ]


@pytest.mark.parametrize("format", ["json", "jsonl", "csv", "parquet"])
def test_a_mapped_column_that_is_not_there(folder: Path, format: str) -> None:
    file = write(folder, format, ROWS)
    text = "\n".join(whats(load(format, file, columns=COLUMNS | {"answer": "labels"})))
    assert "labels" in text
    assert "img, q, label, kind, case, level" in text.replace("'", "")
    dataset = load(format, file, columns=COLUMNS | {"group": "patient"})
    assert any("patient" in what and "case" in what for what in whats(dataset))
    assert not all(problem.warning for problem in dataset.problems)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("format: demo, columns: {image: x}", "data.columns: image cannot be mapped; is for tables"),
        ("format: csv, path: a, columns: {img: x}", "img cannot be mapped; format csv has"),
        ("format: csv, path: a.csv, columns: {image: ' '}", "data.columns.image: is empty"),
        ("format: llava, path: a, columns: {answer: x}", "answer cannot be mapped; format llava has"),
        ("format: json, path: a.jsonl", "data.format: is json, but data.path ends in .jsonl"),
        ("format: hub, path: a/b, group_pattern: abc", "data.group_pattern: 'abc' has no parentheses"),
        ("format: hub, path: a/b, group_pattern: (", "data.group_pattern: '(' is no regular expression"),
        ("format: surgvu25, path: a, group_pattern: (a)", "data.group_pattern: format surgvu25 has groups"),
        ("format: csv, path: a.csv, variant: x", "'x' is none; format csv has text, marked and boxes"),
        ("format: coco, path: a, variant: x", "data.variant: 'x' is none; coco has only one form"),
        ("format: coco, path: a, boxes: share", "data.boxes: format coco has boxes of a known unit"),
        ("format: kvasir_vqa_x1, path: a, variant: x", "'x' is none; format kvasir_vqa_x1 has"),
        ("format: csv, path: a.csv, frames: 3", "data.frames: is for real_colon_vqa and surgvu25"),
        (
            "format: demo, more: [{format: csv, path: b.csv, columns: {x: y}}]",
            "data.more.0.columns: x cannot be mapped",
        ),
    ],
)  # fmt: skip
def test_contradictions(keys: str, said: str) -> None:
    text = f"model: {{name: tiny-qwen3-vl}}\ndata: {{{keys}}}\nimage: {{size: 768}}\noutput: runs/x\n"
    with pytest.raises(BadInput) as caught:
        recipe.parse(text)
    assert len(caught.value.problems) == 1
    assert said in caught.value.problems[0]


def test_columns_can_be_overridden() -> None:
    text = "model: {name: x}\ndata: {format: csv, path: a.csv}\nimage: {size: 768}\noutput: runs/x\n"
    parsed = recipe.parse(text, ["data.columns.answer=label", "data.group_pattern=(case_\\d+)"])
    assert parsed.data.columns == {"answer": "label"}
    assert recipe.parse(parsed.dump()) == parsed


def test_groups_from_the_names_of_images(tmp_path: Path) -> None:
    rows = []
    for name in ("v1/seq_2/0.png", "v1/seq_3/0.png", "other/0.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(PIXEL)
        rows.append({"image": name, "question": "Q", "answer": "a"})
    rows.append(rows[0] | {"group": "own"})
    dataset = load("json", write(tmp_path, "json", rows), group_pattern=r"(v\d).*(seq_\d)")
    assert [e.group for e in dataset.examples] == ["v1/seq_2", "v1/seq_3", "own"]
    assert "matches nothing in 'other/0.png'" in whats(dataset)[0]


# ---- JSON lists ---------------------------------------------------------------------------------------


def rows_of(text: str | bytes, tmp_path: Path) -> tuple[list[Any], list[str]]:
    file = tmp_path / "x.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    rows = list(files.json_rows(file))
    return [r.fields for r in rows if isinstance(r, files.Row)], [
        f"{Path(r.place).name}: {r.what}" for r in rows if not isinstance(r, files.Row)
    ]


def test_json_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the text is cut, the rows are the same, and no more than some pieces of it are held."""
    rows = [
        {"n": n * 12345, "text": 'é\\"] },{[' * (n % 7), "list": [{"a": None}, 1.5e3, True]}
        for n in range(50)
    ]
    for indent in (None, 1):
        text = "\ufeff " + json.dumps(rows, indent=indent, ensure_ascii=False) + " \n"
        for piece in (1, 2, 3, 64, 2**20):
            monkeypatch.setattr(files, "_PIECE", piece)
            assert rows_of(text, tmp_path) == (rows, [])


@pytest.mark.fault("F17")
@pytest.mark.parametrize("piece", [1, 2**20])
@pytest.mark.parametrize(
    ("text", "count", "said"),
    [
        ("", 0, "x.json: is empty"),
        ("[]", 0, ""),
        ('{"a": 1}\n{"a": 2}', 0, "x.json: begins with an object whose 'a' is a number; it must"),
        ("x", 0, "x.json: begins with 'x'"),
        ('[{"a": 1},\n{"a" 2},\n{"a": 3}]', 1, ":2: is not valid JSON: Expecting ':' delimiter at column 6"),
        ('[{"a": 1}, {"b": 22}, {"a"', 2, "Expecting ':' delimiter at column 27; row 3 and what"),
        ('[{"a": 1} {"a": 2}]', 1, "x.json:1: is not valid JSON: Expecting ',' or ']' at column 11; row 2"),
        ('[{"a": 1},]', 1, "x.json:1: is not valid JSON: Expecting value"),
        ('[{"a": 1}', 1, "row 2 and what follows it cannot be read"),
        ('[{"a": 1}] x', 1, "x.json: has text after the list's closing ]"),
        ('[{"a": 1}, 7, [1], {"a": 2}]', 2, "x.json: row 2: is a number; a row must be an object"),
        ('[{"a": 1, "a": 2}, {"a": 3}]', 1, "x.json: row 1: is not usable JSON: key 'a' is given twice"),
        ('[{"a": ' + "9" * 5000 + '}, {"a": 3}]', 1, "row 1: is not usable JSON: a number has 5000 digits"),
        ("[" * 100_000, 0, "is not usable JSON"),
    ],
    ids=lambda value: str(value)[:25],
)  # fmt: skip
def test_broken_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, text: str, count: int, said: str
) -> None:
    monkeypatch.setattr(files, "_PIECE", piece)
    rows, problems = rows_of(text, tmp_path)
    assert len(rows) == count
    assert any(said in problem for problem in problems) if said else problems == []


def test_a_row_without_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_LONGEST", 1000)
    monkeypatch.setattr(files, "_PIECE", 100)
    rows, problems = rows_of('[{"a": 1}, {"b": "' + "x" * 100_000, tmp_path)
    assert rows == [{"a": 1}]
    assert problems == [
        "x.json:1: is a row of more than 64 MiB; no question is so long; row 2 and what follows it cannot be "
        "read"
    ]


def test_text_that_is_not_utf8_spoils_its_row_alone(folder: Path) -> None:
    good = b'{"image": "a.png", "question": "Q", "answer": "a"}'
    (folder / "val.json").write_bytes(b"[" + good + b"," + good.replace(b"Q", b"\xff") + b"," + good + b"]")
    dataset = load("json", folder / "val.json")
    assert [e.id for e in dataset.examples] == ["val:1", "val:3"]
    assert whats(dataset) == ["val.json: row 2: question holds bytes that are not UTF-8"]


def test_real_kvasir_rows(tmp_path: Path) -> None:
    real = SHARED / "kvasir_vqa/kvasir_raw_6500_image_level_70_15_15/val.json"
    if not real.exists():
        pytest.skip("no real JSON list here; test_columns_under_other_names covers generated ones")
    rows = json.loads(real.read_text())
    for row in rows:
        (tmp_path / row["image_filename"]).write_bytes(PIXEL)
    keys = {"columns": {"image": "image_filename", "group": "image_id"}, "roots": [str(tmp_path)]}
    dataset = load("json", real, **keys)
    assert dataset.problems == []
    assert [(e.question, e.answers[0], e.stage) for e in dataset.part("val")] == [
        (row["question"], row["answer"], row["stage"]) for row in rows
    ]
    assert len(dataset.examples) == 449
    lines = load("jsonl", real.with_suffix(".jsonl"), **keys)
    assert [(e.question, e.answers) for e in lines.examples] == [
        (e.question, e.answers) for e in dataset.examples
    ]


def test_real_image_and_answer_pairs() -> None:
    if not (SHARED / "surgvlm/qa.jsonl").exists():
        pytest.skip("no SurgVLM rows here; test_columns_under_other_names covers generated ones")
    dataset = load("jsonl", SHARED / "surgvlm/qa.jsonl", columns={"question_type": "task"}, by="image")
    assert dataset.problems == []
    assert [e.question_type for e in dataset.examples][:2] == [
        "Instrument Recognition",
        "Instrument Localization",
    ]
    assert all(e.images[0].read()[:4] == b"\x89PNG" for e in dataset.examples)


# ---- boxes --------------------------------------------------------------------------------------------


def test_boxes(folder: Path) -> None:
    row = {"image": ["a.png", "b.png"], "question": "Where?", "answer": "left"}
    rows = [
        row | {"box": [10, 20.5, 30, 40]},
        row | {"box": [0.1, 0.2, 1, 1.0], "boxes": None},
        row | {"boxes": [[1, 2, 3, 4], {"box": [0, 0, 1, 1], "label": "polyp", "image": 1}]},
        row | {"asked_box": [1, 2, 3, 4], "box": float("nan")},
        row | {"boxes": []},
    ]
    dataset = load("json", write(folder, "json", rows))
    assert dataset.problems == []
    shown = [[(r.box, r.label, r.image, r.relative) for r in e.regions] for e in dataset.examples]
    assert shown == [
        [((10, 20.5, 30, 40), "", 0, False)],
        [((0.1, 0.2, 1, 1), "", 0, True)],
        [((1, 2, 3, 4), "", 0, False), ((0, 0, 1, 1), "polyp", 1, True)],
        [],
        [],
    ]
    assert [r.box for r in dataset.examples[3].asked_regions] == [(1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"box": [1, 2, 3]}, "box [1, 2, 3] is no box; it must be four numbers"),
        ({"box": [1, 2, 3, "4"]}, "is no box"),
        ({"box": [1, 2, 3, True]}, "is no box"),
        ({"box": [1, 2, float("inf"), 4]}, "is no box"),
        ({"box": [1, 2, 10**400, 4]}, "is no box"),
        ({"box": [0.6, 0.3, 0.2, 0.5]}, "must have its second corner right of and below its first"),
        ({"box": [-1, 0, 5, 5]}, "none below 0"),
        ({"box": [0.1, 0.1, 1.2, 0.9]}, "is neither in pixels nor in shares"),
        ({"box": [1, 2, 3, 4], "boxes": [[1, 2, 3, 4]]}, "box and boxes are both given"),
        ({"boxes": {"x": 1}}, "boxes is an object instead of a list of boxes"),
        ({"boxes": [{"bbox": [1, 2, 3, 4]}]}, "has the key bbox; a box may have box, label and image"),
        ({"boxes": [{"box": [1, 2, 3, 4], "image": 1}]}, "is in image 1, but the row has 1"),
        ({"boxes": [{"box": [1, 2, 3, 4], "label": [1]}]}, "is a list instead of text"),
        ({"asked_boxes": "x"}, "asked_boxes is text instead of a list of boxes"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_boxes(folder: Path, fields: dict[str, Any], said: str) -> None:
    row = {"image": "a.png", "question": "Where?", "answer": "left"}
    dataset = load("json", write(folder, "json", [row, row | fields]))
    assert len(dataset.examples) == 1
    assert said in whats(dataset)[0]


def test_boxes_in_csv_and_parquet(folder: Path) -> None:
    row = {"image": "a.png", "question": "Where?", "answer": "left"}
    boxes = ["1, 2, 3, 4", "[0.1, 0.2, 0.3, 0.4]", "", '{"box": [1, 2, 3, 4], "label": "polyp"}', "[[1"]
    dataset = load("csv", write(folder, "csv", [row | {"box": box} for box in boxes]))
    assert [[(r.box, r.label) for r in e.regions] for e in dataset.examples] == [
        [((1, 2, 3, 4), "")],
        [((0.1, 0.2, 0.3, 0.4), "")],
        [],
        [((1, 2, 3, 4), "polyp")],
    ]
    assert 'box "[[1" is no box' in whats(dataset)[0]
    (folder / "train.csv").unlink()
    rows = [row | {"label": "x", "where": [[1, 2, 3, 4], [5, 6, 7, 8]]}, row | {"label": "x", "where": None}]
    dataset = load("parquet", write(folder, "parquet", rows), columns={"boxes": "where"})
    assert [[r.box for r in e.regions] for e in dataset.examples] == [[(1, 2, 3, 4), (5, 6, 7, 8)], []]


def test_real_boxes() -> None:
    if not (SHARED / "real_frames.jsonl").exists():
        pytest.skip("no real boxes here; test_boxes covers generated ones")
    dataset = load("jsonl", SHARED / "real_frames.jsonl", by="group")
    assert (len(dataset.examples), dataset.problems) == (182, [])
    grounded = [e for e in dataset.examples if e.regions]
    assert len(grounded) == 18
    assert grounded[0].regions[0].box == (117.0, 209.0, 453.0, 374.0)
    assert not any(e.regions[0].relative for e in grounded)


def test_a_quotation_mark_that_takes_further_rows_with_it(folder: Path) -> None:
    """Those cannot be skipped as one bad row; a record of one line can."""
    rows = "".join(f'a.png,"Question {number}?",yes\n' for number in range(5))
    for bad, whole in (('a.png,"Q?,yes\n', True), ('a.png,"Q"?,yes\n', False), ("a.png,Q?\n", False)):
        (folder / "train.csv").write_text(f"image,question,answer\n{bad}{rows}")
        dataset = load("csv", folder / "train.csv")
        (problem,) = dataset.problems
        assert problem.place.endswith("train.csv:2")
        assert (problem.whole, len(dataset.examples) == 5) == (whole, not whole), bad


# ---- hub data sets ------------------------------------------------------------------------------------


def tables(named: str = "image") -> Any:
    import datasets

    features = datasets.Features({
        named: datasets.Image(), "question": datasets.Value("string"),
        "answer": datasets.ClassLabel(names=["no", "yes"]), "case": datasets.Value("int64"),
    })  # fmt: skip
    rows = {
        named: [{"bytes": data, "path": None} for data in (PIXEL, OTHER_PIXEL, PIXEL)],
        "question": ["Is there a polyp?"] * 3, "answer": [1, 0, -1], "case": [1, 2, 3],
    }  # fmt: skip
    table = datasets.Dataset.from_dict(rows, features=features)
    return datasets.DatasetDict(
        {"train": table.select([0, 2]), "validation": table.select([1]), "extra": table}
    )


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load_dataset(*names: str, revision: str | None) -> Any:
        asked.append((*names, revision))
        return tables("picture")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    keys: dict[str, Any] = {
        "columns": {"image": "picture", "group": "case"},
        "revision": "v1",
        "variant": "small",
    }
    dataset = load("hub", "some/thing", **keys)
    assert asked == [("some/thing", "small", "v1")]
    assert [(e.id, e.split, e.answers, e.group) for e in dataset.examples] == [
        ("train:1", "train", ("yes",), "1"),
        ("validation:1", "val", ("no",), "2"),
    ]
    assert [e.images[0].read() for e in dataset.examples] == [PIXEL, OTHER_PIXEL]
    text = "\n".join(whats(dataset))
    assert "thing train: row 2: answer is empty" in text  # the class -1 is none
    assert "2 rows belong to no part" in text  # of the split extra
    assert len(load("hub", "some/thing", by="image", **keys).examples) == 4
    dataset = load("hub", "some/thing", columns={"image": "photo"})
    assert "thing train: lacks the columns photo; it has picture, question, answer, case" in whats(dataset)[0]

    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        BadInput, match="some/thing: is no folder here and cannot be had from the hub: no route"
    ):
        load("hub", "some/thing")
    with pytest.raises(BadInput, match="no such file or folder, and no hub id"):
        load("hub", "/no/such/folder")


def test_hub_folders_on_this_machine(tmp_path: Path) -> None:
    found = tables()
    (tmp_path / "clone/data").mkdir(parents=True)
    for split in ("train", "validation"):
        found[split].to_parquet(tmp_path / f"clone/data/{split}-00000-of-00001.parquet")
    found.save_to_disk(tmp_path / "saved")
    found["extra"].save_to_disk(tmp_path / "one")
    for name, by, parts in (
        ("clone", "official", [1, 1]),
        ("saved", "official", [1, 1]),
        ("one", "image", [2, 0]),
    ):
        dataset = load("hub", tmp_path / name, by=by, split={"val": 0, "test": 0} if by == "image" else {})
        assert [len(dataset.part(part)) for part in ("train", "val")] == parts, name
        assert dataset.examples[0].images[0].read() == PIXEL
        assert dataset.examples[0].answers == ("yes",)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="empty: cannot be read"):
        load("hub", tmp_path / "empty")


def test_hub_image_folder(tmp_path: Path) -> None:
    """`datasets` has paths of its files here, not their bytes, and those must be inside the folder."""
    for part in ("train", "test"):
        (tmp_path / "set" / part).mkdir(parents=True)
        (tmp_path / "set" / part / "a.bmp").write_bytes(PIXEL)
        (tmp_path / "set" / part / "metadata.csv").write_text("file_name,question,answer\na.bmp,Q,yes\n")
    dataset = load("hub", tmp_path / "set")
    assert dataset.problems == []
    assert [(e.split, e.image_key) for e in dataset.examples] == [
        ("train", "train/a.bmp"),
        ("test", "test/a.bmp"),
    ]
    assert dataset.examples[0].images[0].read() == PIXEL


def test_values_that_python_calls_equal_are_read_apart(folder: Path) -> None:
    """Rows that repeat a value share what was read of it: true is no stage though it equals 1."""
    row = {"image": "a.png", "question": "Is it red?", "answer": "yes", "question_type": 1}
    stages: list[Any] = [1, True, 1, "1", None]
    rows = [{**row, "id": str(number), "stage": stage} for number, stage in enumerate(stages)]
    dataset = load("jsonl", write(folder, "jsonl", rows))
    assert [(e.id, e.stage, e.question_type) for e in dataset.examples] == [
        ("0", 1, "1"), ("2", 1, "1"), ("3", 1, "1"), ("4", None, "1")
    ]  # fmt: skip
    assert whats(dataset) == ["train.jsonl:2: stage is true or false instead of text"]
