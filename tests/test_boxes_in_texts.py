"""Boxes inside questions and answers: read in every notation and unit, moved, written in their places."""

from __future__ import annotations

import json
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import noise_image
from sources import load
from test_grounding import FAMILIES, HOSTILE

from surgvqa import cli, hub
from surgvqa.augment import Augmented, endoscopy
from surgvqa.datasets import Dataset, Example, ImageRef, Region
from surgvqa.datasets.boxes import find, in_brackets, read, resembling
from surgvqa.grounding import (
    in_source,
    on_canvas,
    on_canvases,
    parse_answer,
    source_pixels,
    write_answer,
    write_question,
)
from surgvqa.letterbox import Canvas, plan_canvas
from surgvqa.recipe import Source
from surgvqa.tokens import ChatTokens
from surgvqa.tree import Questions

SIZE = (1280, 720)
UNITS = {
    "share": [0.25, 0.25, 0.75, 0.75],
    "thousand": [250, 250, 750, 750],
    "pixels": [320, 180, 960, 540],
}
"""The same box of an image of SIZE in every unit."""

NOTATIONS = {
    "list": '[{{"bbox_2d": {0}, "label": "polyp"}}]',
    "object": "{{'bbox': {0}, 'label': 'polyp'}}",
    "fence": '```json\n[\n\t{{"bbox_2d": {0}, "label": "polyp"}}\n]\n```',
    "tags": "<ref>polyp</ref><box>({1},{2}),({3},{4})</box>",
    "nested": "<ref>polyp</ref><box>[{0}]</box>",
    "special": "<|object_ref_start|>polyp<|object_ref_end|><|box_start|>({1},{2}),({3},{4})<|box_end|>",
    "label": "polyp{0}",
}
CANVASES = {
    "letterbox": ({"mode": "letterbox", "size": 256, "max_tokens": None}, (250, 359, 750, 641)),
    "native": ({"mode": "native", "size": None, "max_tokens": 400}, (250, 250, 750, 750)),
    "crop": (
        {"mode": "letterbox", "size": 256, "max_tokens": None, "picture": (160, 0, 1120, 720)},
        (167, 312, 833, 688),
    ),
}  # fmt: skip
"""Canvas and where on it the box is, in thousandths, computed by hand."""


def written(notation: str, box: list[float]) -> str:
    return NOTATIONS[notation].format(json.dumps(box), *box)


def ask(answer: str, question: str = "Where?", images: int = 1, **keys: Any) -> Example:
    refs = tuple(ImageRef(name) for name in "ab"[:images])
    return Example("1", refs, question, (answer,), place="c.jsonl:1", **keys)


def canvas_of(name: str) -> Canvas:
    return plan_canvas(SIZE, factor=32, **CANVASES[name][0])  # type: ignore[arg-type]


@pytest.mark.parametrize("canvas", CANVASES)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("notation", NOTATIONS)
def test_every_notation_unit_and_canvas(notation: str, unit: str, canvas: str) -> None:
    example = read(ask(written(notation, UNITS[unit])), "marked", unit)
    (region,) = example.regions
    assert (example.answers, example.layout, region.label) == (("polyp",), "", "polyp")
    told = on_canvas(region, canvas_of(canvas))
    assert told.box == CANVASES[canvas][1]
    answer = write_answer("qwen3_vl", "polyp", [told])
    assert answer == json.dumps([{"bbox_2d": [*CANVASES[canvas][1]], "label": "polyp"}])
    # among words, and in a question
    within = written(notation, UNITS[unit])
    placed = read(ask(f"The {within} is flat.", f"Is {within} flat?"), "marked", unit)
    assert placed.answers == ("The polyp is flat.",)
    assert (placed.layout, placed.question) == ("The <box> is flat.", "Is <box> flat?")
    assert [on_canvas(each, canvas_of(canvas)).box for each in (*placed.regions, *placed.asked_regions)] == [
        CANVASES[canvas][1]
    ] * 2


@pytest.mark.parametrize("unit", UNITS)
def test_brackets_are_boxes_where_the_recipe_says_so(unit: str) -> None:
    example = ask(f"The location is {UNITS[unit]}.")
    said = read(example, "boxes", unit)
    assert (said.answers, said.layout) == (("The location is.",), "The location is <box>.")
    assert on_canvas(said.regions[0], canvas_of("letterbox")).box == (250, 359, 750, 641)
    assert read(example, None, unit) == replace(example, doubtful=str(UNITS[unit]))
    assert read(example, "marked", unit) == read(example, "text", unit) == example
    corners = ask("From (320, 180), (960, 540) on.")
    assert read(corners, "boxes", "pixels").layout == "From <box> on."


@pytest.mark.parametrize(
    "text",
    [
        "steps [1, 2, 3, 4]",
        "scores [0.05, 0.1, 0.25, 0.6, 0.7]",
        "[1, 2, 3]",
        "one hot [0, 0, 1, 1]",
        "[a, b, c, d]",
        "pages (10, 20)",
        "at 10, 20, 300, 400",
        '{"box": "upper left"}',
        "points: (1) the tip, (2) the base",
        '{"points": 3}',
        "a box of 3 [mm]",
        "bbox: 3, bounding box: 10, 20",
        "x1: 5 of y1",
        "steps <1><2><3>",
        "points: [1, 2]",
    ],
)
def test_what_is_no_box_stays_text_without_a_word(text: str) -> None:
    assert read(ask(text), None, "auto") == ask(text)
    assert find(text, brackets=True) == []
    assert resembling(text) == in_brackets(text) == ""


FLOATS = '{"bbox_2d": [0.17916666666666667, 0.25, 0.9791666666666666, 0.75], "label": "a"}'


def test_long_floats_are_whole_numbers_of_a_box() -> None:
    assert read(ask(FLOATS), None, "auto").regions[0].box == (
        0.17916666666666667, 0.25, 0.9791666666666666, 0.75,
    )  # fmt: skip


REPORT = (
    '{"findings": [{"bbox": [320, 180, 960, 540], "paris": "0-Is"}, '
    '{"paris": "0-Ip", "bbox": [[0, 0, 640, 360], [640, 0, 1280, 720]]}], "count": 3}'
)


@pytest.mark.parametrize("family", FAMILIES)
def test_json_that_says_more_keeps_all_but_its_numbers(family: str) -> None:
    example = read(ask(REPORT), None, "pixels")
    assert example.answers == (
        '{"findings": [{"bbox": [], "paris": "0-Is"}, {"paris": "0-Ip", "bbox": [[], []]}], "count": 3}',
    )
    canvas = canvas_of("letterbox")
    boxes = [on_canvas(region, canvas) for region in example.regions]
    answer = write_answer(family, example.answers[0], boxes, layout=example.layout)
    assert json.loads(answer) == {
        "findings": [
            {"bbox": [250, 359, 750, 641], "paris": "0-Is"},
            {"paris": "0-Ip", "bbox": [[0, 219, 500, 500], [500, 219, 1000, 781]]},
        ],
        "count": 3,
    }
    words, found = parse_answer(answer, in_place=True)
    assert words == example.answers[0]
    assert [region.box for region in found] == [region.box for region in boxes]


def test_the_form_among_words_of_each_family() -> None:
    told = "Move the Forceps[100, 200, 300, 400] to <ref>the flap</ref><box>(500,600),(700,800)</box>."
    example = read(ask(told), None, "thousand")
    boxes = [replace(region, box=tuple(1000 * edge for edge in region.box)) for region in example.regions]
    text = example.answers[0]
    assert text == "Move the Forceps to the flap."
    assert write_answer("qwen3_vl", text, boxes, layout=example.layout) == (
        'Move the {"bbox_2d": [100, 200, 300, 400], "label": "Forceps"} to '
        '{"bbox_2d": [500, 600, 700, 800], "label": "the flap"}.'
    )
    assert write_answer("qwen2_vl", text, boxes, layout=example.layout) == (
        "Move the <|object_ref_start|>Forceps<|object_ref_end|><|box_start|>(100,200),(300,400)<|box_end|>"
        " to <|object_ref_start|>the flap<|object_ref_end|><|box_start|>(500,600),(700,800)<|box_end|>."
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_written_read_and_brought_back_to_the_source(family: str) -> None:
    """Random boxes on random canvases: words are the same, edges within half a thousandth of the canvas."""
    rng = random.Random(0)
    words = ["The", "of", "holds", "tissue,", "near", "(left)", "é", "0-Is", "3 mm;", "[sic]"]
    for _ in range(400):
        size = rng.randint(200, 1900), rng.randint(200, 1900)
        mode = rng.choice([("letterbox", 448, None), ("native", None, 576)])
        canvas = plan_canvas(size, mode=mode[0], size=mode[1], max_tokens=mode[2], factor=28)
        unit = rng.choice([*UNITS])
        pieces, true = [], []
        for _ in range(rng.randint(1, 4)):
            pieces += rng.choices(words, k=rng.randint(1, 3))
            x1, x2 = sorted(rng.sample(range(0, 1000, 20), 2))
            y1, y2 = sorted(rng.sample(range(0, 1000, 20), 2))
            shares = [edge / 1000 for edge in (x1, y1, x2, y2)]
            scale = {"share": (1, 1), "thousand": (1000, 1000), "pixels": size}[unit]
            box = [edge * side for edge, side in zip(shares, scale * 2, strict=True)]
            if max(box) < 10 and unit != "share":
                continue
            true.append([edge * side for edge, side in zip(shares, size * 2, strict=True)])
            pieces.append(written(rng.choice(["object", "tags", "nested", "special", "label"]), box))
        pieces.append(rng.choice(words))
        example = read(ask(" ".join(pieces)), None, unit)
        assert len(example.regions) == len(true)
        boxes = on_canvases(example, example.regions, {"a": canvas})
        answer = write_answer(family, example.answers[0], boxes, layout=example.layout)
        text, found = parse_answer(answer, in_place=True)
        assert text == example.answers[0]
        most = max(canvas.width / canvas.scale_x, canvas.height / canvas.scale_y) / 2000
        for region, told, expected in zip(found, boxes, true, strict=True):
            assert (region.box, region.label) == (told.box, told.label)
            for edge, there in zip(in_source(region, canvas).box, expected, strict=True):
                assert abs(edge - there) <= most + 1e-6


def test_an_answer_among_words_is_no_other_where_boxes_follow() -> None:
    """What a model was taught to write behind the words is read as ever, also by a reader of both."""
    for family in FAMILIES:
        for text in ("yes", "polyp", "", "Two lines,\nthe second [1, 2"):
            boxes = [Region((1, 2, 30, 40), "polyp"), Region((5, 6, 70, 80), "hook")]
            answer = write_answer(family, text, boxes)
            assert parse_answer(answer, in_place=True) == parse_answer(answer)


def test_of_a_hub_data_set_brackets_are_noticed(tmp_path: Path, hub_cache: None) -> None:
    """Its variant is a subset, which says nothing of boxes."""
    import datasets as library
    from sources import PIXEL, load

    (tmp_path / "a.png").write_bytes(PIXEL)
    rows = [{"image": "a.png", "question": "Where?", "answer": text} for text in ("[10, 20, 300, 400]", "no")]
    library.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    dataset = load("hub", tmp_path, by="image", split={"val": 0, "test": 0})
    assert [example.doubtful for example in dataset.examples] == ["[10, 20, 300, 400]", ""]
    assert [example.regions for example in dataset.examples] == [(), ()]


@pytest.mark.parametrize(
    "text",
    [
        '{"bbox_2d": ["10", "20", "300", "400"]}',
        '{"bbox_2d": [1e1, 20, 300, 400]}',
        "bounding box: 10, 20, 300, 400",
        "polygon: [[10, 20], [300, 20], [300, 400]]",
        "x1: 12, y1: 34, x2: 56, y2: 78",
        "bbox=10,20,300,400",
        "at {<12><34><56><78>}",
        "<patch_index_0044><patch_index_0863>",
    ],
)
def test_coordinates_that_no_reader_takes_are_noticed(text: str) -> None:
    for variant in (None, "marked"):
        assert replace(read(ask("Q?", text), variant, "auto"), doubtful="") == ask("Q?", text)
    assert resembling(text)


@pytest.mark.parametrize("piece", [*HOSTILE, "<ref>", "a[", "a[1,2,3,", '{"bbox": [[', "(1,2),("])
def test_hostile_text_takes_no_longer_than_its_length(piece: str) -> None:
    start = time.process_time()
    for text in (piece * (100_000 // len(piece)), '{"bbox": [' + piece * (90_000 // len(piece)) + "]}"):
        parse_answer(text, 2, in_place=True)
        resembling(text)
        in_brackets(text)
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("text", "unit", "said"),
    [
        ("Knife[0.76, 0.26, 0.21, 0.51]", "auto", "[0.76, 0.26, 0.21, 0.51], which must have its second"),
        ('{"bbox_2d": [300, 20, 100, 90]}', "pixels", "if it is x, y, width and height"),
        ('{"bbox_2d": [-3, 20, 100, 90]}', "pixels", "none below 0"),
        ('{"bbox_2d": [3, 20, 100, 90]}', "share", "is not in shares from 0 to 1"),
        ('{"bbox_2d": [0.1, 0.2, 0.3, 0.4]}', "thousand", "seems to be in shares from 0 to 1"),
        ('{"bbox_2d": [0.1, 0.2, 0.3, 0.4]}', "pixels", "seems to be in shares from 0 to 1"),
        ('{"bbox_2d": [3, 20, 1001, 90]}', "thousand", "is not from 0 to 1000"),
        ('{"bbox_2d": [0.1, 0.2, 1.3, 0.4]}', "auto", "is neither in pixels nor in shares"),
        ('In <box> is {"bbox_2d": [10, 20, 100, 90]}', "pixels", "<box>, which has no numbers"),
    ],
)  # fmt: skip
def test_boxes_that_are_wrong(text: str, unit: str, said: str) -> None:
    for example in (ask(text), ask("a", text)):
        with pytest.raises(ValueError, match="which") as caught:
            read(example, None, unit)
        assert said in str(caught.value)


def test_of_several_images_a_box_says_which_it_is_in() -> None:
    told = "So Picture 2: <ref>it</ref><box>(5,6),(70,80)</box> is."
    example = read(ask(told, 'In {"image": 1, "bbox_2d": [1, 2, 30, 40]}?', images=2), None, "thousand")
    assert [(region.image, region.label) for region in example.regions] == [(1, "it")]
    assert (example.layout, example.answers) == ("So <box> is.", ("So it is.",))
    assert (example.question, example.asked_regions[0].image) == ("In <box>?", 0)
    for silent in ("<ref>it</ref><box>(1,2),(30,40)</box>", "Picture 3: <box>(1,2),(30,40)</box>"):
        assert read(ask(f"{silent} {told}", images=2), "boxes", "thousand").regions == ()
        assert "<box>(1,2),(30,40)" in resembling(silent)
    for family in FAMILIES:
        boxes = [replace(region, box=(5, 6, 70, 80)) for region in example.regions]
        answer = write_answer(family, "", boxes, 2, layout="so <box> is")
        assert parse_answer(answer, 2, in_place=True) == ("so it is", [Region((5, 6, 70, 80), "it", 1)])
        assert ("Picture 2: " in answer) == (family == "qwen2_vl")


# ---- data sets -----------------------------------------------------------------------------------------


def rows_of(folder: Path, *pairs: tuple[str, str], size: tuple[int, int] = SIZE, **more: Any) -> Path:
    """A file of messages about one image."""
    noise_image(*size, 0).save(folder / "a.png")
    rows = [
        {"messages": [{"role": "user", "content": f"<image>{asked}"}, {"role": "assistant", "content": said}],
         "images": ["a.png"], **more}
        for asked, said in pairs
    ]  # fmt: skip
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def recipe_of(folder: Path, data: dict[str, Any], **image: Any) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(
        json.dumps(
            {
                "model": {"name": "tiny-qwen3-vl", "tune": "full"},
                "data": data,
                "image": image or {"mode": "letterbox", "size": 256},
                "train": {"precision": "fp32"},
                "eval": {"final": None},
                "output": str(folder / "run"),
            }
        )
    )
    return file


def check(capsys: pytest.CaptureFixture[str], file: Path, *words: str) -> tuple[int, str]:
    code = cli.main(["check", str(file), *words, "--out", str(file.parent / "audit")])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_units_that_the_data_proves_or_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(*boxes: list[float], size: tuple[int, int] = SIZE) -> tuple[int, str]:
        pairs = [(f"Q{number}", json.dumps({"bbox_2d": box})) for number, box in enumerate(boxes)]
        data = {"format": "messages", "path": str(rows_of(tmp_path, *pairs, size=size))}
        return check(capsys, recipe_of(tmp_path, data))

    code, text = told([250, 250, 500, 500], [10, 20, 30, 40])
    assert code == 2
    assert "2 boxes in texts may be in pixels or in thousandths" in text
    assert "train.jsonl:1: " in text
    assert (
        "[250, 250, 500, 500] in an image of 1280×720 pixels; set data.boxes: pixels or data.boxes: thousand"
        in text
    )
    code, text = told([250, 250, 500, 500], [10, 20, 30, 900])
    assert code == 0
    assert (
        "without a unit are taken to be thousandths of the sides: 1 of them with corners outside of its image"
        in text
    )
    assert "boxes: 2 read from texts: JSON 2" in text
    code, text = told([250, 250, 500, 500], [10, 20, 1200, 500])
    assert code == 0
    assert "are taken to be pixels: 1 of them with a number above 1000, such as [10, 20, 1200, 500]" in text
    code, text = told([250, 250, 500, 500], [10, 20, 1290, 500])
    assert code == 2
    assert "reaches out of its image of 1280×720 pixels" in text
    assert told([0.25, 0.25, 0.5, 0.5]) == (0, told([0.25, 0.25, 0.5, 0.5])[1])


def test_the_unit_that_was_proved_is_that_of_the_run(tmp_path: Path) -> None:
    from surgvqa.audit import load_and_audit
    from surgvqa.recipe import load as load_recipe

    file = rows_of(tmp_path, ("Q", '{"bbox_2d": [250, 250, 750, 750]}'))
    other = tmp_path / "more"
    other.mkdir()
    second = rows_of(other, ("Q", '{"bbox_2d": [320, 180, 1100, 540]}'))
    data = {"format": "messages", "path": str(file), "more": [{"format": "messages", "path": str(second)}]}
    dataset, found = load_and_audit(load_recipe(recipe_of(tmp_path, data)))
    assert found.units == {"data.boxes": "thousand", "data.more.0.boxes": "pixels"}
    assert [source_pixels(e.regions[0], SIZE).box for e in dataset.examples] == [
        (320, 180, 960, 540),
        (320, 180, 1100, 540),
    ]
    again = found.kept(load("messages", file, more=data["more"]))  # as the other processes of a run do
    assert again.examples == dataset.examples


POINT = '{"point_2d": [320, 180], "label": "tip"}'


@pytest.mark.parametrize(
    ("text", "variant", "wrong"),
    [
        (POINT, None, True),
        ("<point>(3, 4)</point>", "marked", True),
        ('{"tip": {"x": 320, "y": 180}}', None, True),
        ('{"polygon": [[1, 2], [3, 4], [5, 6]]}', None, True),
        ('{"bbox_2d": [0.25, 0.25, 0.5, 0.5]}', "text", True),
        ('{"box_2d": [250, 250, 500, 500]}', None, True),  # Gemini's, which begins with y
        ("polyp <loc0123><loc0456><loc0789><loc0999>", None, True),
        ("scores [0.05, 0.1, 0.25, 0.6]", None, True),
        ("scores [0.05, 0.1, 0.25, 0.6]", "marked", False),
        ("a polyp", None, False),
    ],
)
def test_coordinates_that_stay_text_need_a_canvas_that_leaves_them(
    text: str, variant: str | None, wrong: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"format": "messages", "path": str(rows_of(tmp_path, ("Q", text))), "variant": variant}
    code, told = check(capsys, recipe_of(tmp_path, data))
    assert ("stays text, but image.mode, crop or augment moves" in told, code) == (wrong, 2 if wrong else 0)
    assert ("questions keep coordinates as text" in told) == (text != "a polyp")
    native = {"mode": "native", "max_tokens": 400}
    assert check(capsys, recipe_of(tmp_path, data, **native))[0] == 0
    assert check(capsys, recipe_of(tmp_path, data, **native, augment="endoscopy"))[0] == (2 if wrong else 0)
    rows_of(tmp_path, ("Q", text), size=(300, 300))  # a square has no padding
    assert check(capsys, recipe_of(tmp_path, data))[0] == 0
    assert check(capsys, recipe_of(tmp_path, {**data, "on_error": "skip"}, size=256))[0] == 0


def test_tables_are_looked_through_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise_image(*SIZE, 0).save(tmp_path / "a.png")
    texts = ['{"bbox_2d": [320, 180, 960, 540], "label": "polyp"}', "It is at [320, 180, 960, 540]."]
    rows = [{"image": "a.png", "question": f"Q{n}", "answer": text} for n, text in enumerate(texts)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    data = {"format": "json", "path": str(tmp_path / "train.json")}
    code, told = check(capsys, recipe_of(tmp_path, data))
    assert (code, told.count("stays text, but")) == (2, 2)
    assert check(capsys, recipe_of(tmp_path, {**data, "variant": "marked", "boxes": "pixels"}))[0] == 0
    dataset = load("json", tmp_path / "train.json", variant="boxes", boxes="pixels")
    assert [(e.answers[0], e.layout) for e in dataset.examples] == [
        ("polyp", ""),
        ("It is at.", "It is at <box>."),
    ]


@pytest.mark.parametrize("unit", UNITS)
def test_boxes_of_columns_are_in_the_unit_that_the_recipe_says(unit: str, tmp_path: Path) -> None:
    noise_image(*SIZE, 0).save(tmp_path / "a.png")
    row = {"image": "a.png", "question": "Where?", "answer": "left", "box": UNITS[unit]}
    (tmp_path / "train.json").write_text(json.dumps([row]))
    (example,) = load("json", tmp_path / "train.json", boxes=unit).examples
    assert source_pixels(example.regions[0], SIZE).box == (320, 180, 960, 540)


def test_json_answers_are_whole_and_numbers_that_are_no_box_stay(tmp_path: Path) -> None:
    """One file: a box in JSON in shares, scores in brackets, the box in tags and behind a label."""
    file = rows_of(
        tmp_path,
        ("In JSON?", '[{"bbox_2d": [0.25, 0.25, 0.75, 0.75], "label": "polyp"}]'),
        ("Probabilities?", "scores [0.05, 0.1, 0.25, 0.6]"),
        ("In tags?", "<ref>polyp</ref><box>(0.25,0.25),(0.75,0.75)</box>"),
        ("As ever?", "polyp[0.25, 0.25, 0.75, 0.75]"),
    )
    first, scores, *others = load("messages", file, variant="marked").examples
    for example in (first, *others):
        (told,) = on_canvases(example, example.regions, {"a.png": canvas_of("letterbox")})
        assert write_answer("qwen3_vl", example.answers[0], [told], layout=example.layout) == (
            '[{"bbox_2d": [250, 359, 750, 641], "label": "polyp"}]'
        )
    assert (scores.answers, scores.regions) == (("scores [0.05, 0.1, 0.25, 0.6]",), ())


# ---- ms-swift's objects --------------------------------------------------------------------------------


def swift(folder: Path, pairs: list[tuple[str, str]], objects: Any, **keys: Any) -> Dataset:
    noise_image(*SIZE, 0).save(folder / "a.png")
    turns = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    row = {"messages": turns, "images": keys.pop("images", ["a.png"]), "objects": objects}
    (folder / "train.jsonl").write_text(json.dumps(row) + "\n")
    return load("messages", folder / "train.jsonl", **keys)


def test_objects_take_their_places(tmp_path: Path) -> None:
    box = UNITS["pixels"]
    where = [("<image>Locate the <ref-object> in the image", "<bbox>")]
    (one,) = swift(tmp_path, where, {"ref": ["polyp"], "bbox": [box]}).examples
    assert (one.question, one.answers, one.layout) == ("Locate the polyp in the image", ("polyp",), "")
    assert (one.regions[0].label, one.regions[0].box, one.regions[0].undecided) == ("polyp", tuple(box), "")
    for kind, unit in (("real", "pixels"), ("norm1", "share"), ("norm1000", "thousand")):
        objects = json.dumps(
            {"ref": ["polyp"], "bbox": [UNITS[unit]], "bbox_type": kind}
        )  # as Parquet has it
        (same,) = swift(tmp_path, where, objects, boxes="pixels").examples
        assert source_pixels(same.regions[0], SIZE).box == tuple(box)
    (said,) = swift(
        tmp_path, where, {"ref": ["polyp"], "bbox": [UNITS["thousand"]]}, boxes="thousand"
    ).examples
    assert source_pixels(said.regions[0], SIZE).box == tuple(box)


def test_objects_among_words_in_json_and_over_turns(tmp_path: Path) -> None:
    pairs = [
        ("<image>Describe it.", "<ref-object><bbox> and <ref-object><bbox> play."),
        ("As JSON?", '[{"bbox_2d": <bbox>, "label": "<ref-object>"}]'),
        ("What is at <bbox>?", "A <ref-object>."),
    ]
    boxes = [[10, 20, 300, 400], [20, 30, 310, 410], [30, 40, 320, 420], [40, 50, 330, 430.25]]
    objects = {"ref": ["a dog", "a woman", "cat", "dog"], "bbox": boxes}
    first, second, third = swift(tmp_path, pairs, objects).examples
    assert (first.layout, first.answers) == ("<box> and <box> play.", ("a dog and a woman play.",))
    assert [(r.label, [*r.box]) for r in first.regions] == [("a dog", boxes[0]), ("a woman", boxes[1])]
    assert (second.answers, second.layout, [*second.regions[0].box]) == (("cat",), "", boxes[2])
    assert (third.question, third.answers, [*third.asked_regions[0].box]) == (
        "What is at <box>?", ("A dog.",), boxes[3],
    )  # fmt: skip


def test_objects_in_the_image_that_they_name(tmp_path: Path) -> None:
    noise_image(640, 480, 1).save(tmp_path / "b.png")
    pairs = [("<image><image>Find it.", "<bbox>")]
    objects = {"ref": ["polyp"], "bbox": [[10, 20, 300, 400]], "image_id": [1]}
    (example,) = swift(tmp_path, pairs, objects, images=["a.png", "b.png"]).examples
    assert [(r.image, r.label) for r in example.regions] == [(1, "polyp")]


@pytest.mark.parametrize(
    ("objects", "said"),
    [
        (None, "objects is missing, but the messages have <ref-object>"),
        ({"ref": ["polyp"], "bbox": []}, "has 0 bbox, but the messages have 1 <bbox>"),
        ({"ref": ["polyp"], "bbox": [[1, 2, 30, 40]] * 2}, "has 2 bbox, but the messages have 1 <bbox>"),
        ({"ref": [], "bbox": [[1, 2, 30, 40]]}, "has 0 ref, but the messages have 1 <ref-object>"),
        ({"ref": ["polyp"], "bbox": [[615, 226]]}, "has [615, 226] in bbox, which is no box"),
        ({"ref": ["polyp"], "bbox": [[1, 2, 30, 40]], "bbox_type": "norm"}, "has the bbox_type 'norm'"),
        ({"ref": ["polyp"], "bbox": [[1, 2, 30, 40]], "image_id": [1]}, "has the image_id 1"),
        ({"ref": ["polyp"], "bbox": [[1, 2, 30, 40]], "image_id": [0, 0]}, "one image_id for each bbox"),
        ({"ref": ["polyp"], "bbox": [[30, 2, 1, 40]]}, "must have its second corner right of"),
        ([{"caption": "polyp", "bbox": [[1, 2, 30, 40]]}], "objects is a list; it must be an object"),
        ("{", "objects is not valid JSON"),
    ],
    ids=str,
)
def test_objects_that_are_wrong(objects: Any, said: str, tmp_path: Path) -> None:
    dataset = swift(tmp_path, [("<image>Locate the <ref-object>", "<bbox>")], objects)
    assert dataset.examples == []
    assert said in dataset.problems[0].what


# ---- tokens and training -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-qwen2-vl", "tiny-qwen3-vl"])
def test_training_moves_boxes_among_words_with_the_augmented_picture(name: str, tmp_path: Path) -> None:
    noise_image(*SIZE, 0).save(tmp_path / "a.png")
    text = "The Forceps[0.25, 0.25, 0.75, 0.75] holds tissue."
    example = read(
        replace(
            ask(text, "Is <box>(250,250),(750,750)</box> idle?"), images=(ImageRef("a", tmp_path / "a.png"),)
        ),
        None,
        "auto",
    )
    example = replace(example, asked_regions=(Region((0.25, 0.25, 0.75, 0.75), relative=True),))
    chat = ChatTokens(hub.find(name))
    canvas = plan_canvas(SIZE, mode="letterbox", size=224, max_tokens=None, factor=chat.folder.factor)
    questions = Questions([example], chat, {"a": canvas}, augment="endoscopy", seed=1)
    seen = set()
    for epoch in (None, 0, 1):
        (branch,) = questions.tree([0], epoch=epoch).branches
        placement = questions.placements(0, epoch)[0]
        assert isinstance(placement, Augmented) == (epoch is not None)
        supervised = chat.text(branch.ids[branch.prompt :].tolist(), boxes=True).split("<|im_end|>")[0]
        told = on_canvas(example.regions[0], placement)
        words, (region,) = parse_answer(supervised, in_place=True)
        assert (words, region.box, region.label) == ("The Forceps holds tissue.", told.box, "Forceps")
        asked = write_question(chat.folder.family, "Is <box> idle?", [replace(told, label="")])
        assert asked in chat.tokenizer.decode(branch.asked.ids)
        seen.add(region.box)
    assert len(seen) == 3
    assert endoscopy(1, 0, "a", [(canvas, (320, 180, 960, 540))]) == questions.placements(0, 0)[0].by  # type: ignore[union-attr]


def test_a_model_learns_boxes_among_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From conversations to scores: the words are exact, the boxes are in source pixels."""
    noise_image(96, 64, 0).save(tmp_path / "a.png")
    answer = "The hook[0.125, 0.125, 0.5, 0.5] cuts."
    row = {
        "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": answer}],
        "images": ["a.png"],
    }
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    file = recipe_of(tmp_path, {"format": "messages", "path": str(tmp_path / "train.jsonl")}, size=96)
    words = ["train.max_steps=40", "train.lr=2e-3", "model.train_vision=true", "eval.final=train"]
    assert cli.main(["train", str(file), *words]) == 0, capsys.readouterr().err
    (prediction,) = [json.loads(line) for line in (tmp_path / "run/predictions.jsonl").open()]
    assert prediction["references"] == ["The hook cuts."]
    assert prediction["answer"] == "The hook cuts."
    assert prediction["regions"][0]["box"] == pytest.approx([12, 8, 48, 32], abs=0.05)
    assert prediction["regions"][0]["label"] == "hook"
    assert json.loads((tmp_path / "run/scores.json").read_text())["overall"]["iou"] > 0.99


def test_boxes_is_for_data_of_ones_own() -> None:
    assert Source.model_validate({"format": "llava", "path": "a", "boxes": "thousand"}).boxes == "thousand"
