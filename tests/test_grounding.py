"""Boxes as text: both families' forms, what models write instead, and the way from and to source pixels."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import pytest

from surgvqa import grounding
from surgvqa.datasets import Box, Example, ImageRef, Region
from surgvqa.grounding import (
    SCALE,
    in_source,
    misplaced,
    on_canvas,
    parse_answer,
    write_answer,
    write_question,
)
from surgvqa.letterbox import Canvas, plan_canvas

FAMILIES = ("qwen2_vl", "qwen3_vl")


def boxes(regions: list[Region]) -> list[Box]:
    return [region.box for region in regions]


# ---- what is written ----------------------------------------------------------------------------------


def test_the_form_of_each_family_exactly() -> None:
    one = [Region((176, 106, 232, 160))]
    assert write_answer("qwen2_vl", "left-top", one) == (
        "<|object_ref_start|>left-top<|object_ref_end|><|box_start|>(176,106),(232,160)<|box_end|>"
    )
    assert (
        write_answer("qwen3_vl", "left-top", one)
        == '[{"bbox_2d": [176, 106, 232, 160], "label": "left-top"}]'
    )
    assert write_answer("qwen2_vl", "", one) == "<|box_start|>(176,106),(232,160)<|box_end|>"
    assert write_answer("qwen3_vl", "", one) == '[{"bbox_2d": [176, 106, 232, 160]}]'
    assert write_answer("qwen3_vl", "no box", []) == "no box"
    two = [Region((1, 2, 3, 4), "polyp"), Region((5, 6, 7, 8), "a “big” one")]
    assert write_answer("qwen3_vl", "yes", two) == (
        'yes\n[{"bbox_2d": [1, 2, 3, 4], "label": "polyp"}, '
        '{"bbox_2d": [5, 6, 7, 8], "label": "a “big” one"}]'
    )
    assert write_answer("qwen2_vl", "polyp; a “big” one", two) == (
        "<|object_ref_start|>polyp<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>"
        "<|object_ref_start|>a “big” one<|object_ref_end|><|box_start|>(5,6),(7,8)<|box_end|>"
    )


def test_boxes_of_a_question_take_their_places_or_follow() -> None:
    two = [Region((1, 2, 3, 4)), Region((5, 6, 7, 8), "hook")]
    assert write_question("qwen3_vl", "What is <box>?", two[:1]) == 'What is {"bbox_2d": [1, 2, 3, 4]}?'
    assert write_question("qwen2_vl", "Is <box> left of <box>?", two) == (
        "Is <|box_start|>(1,2),(3,4)<|box_end|> left of "
        "<|object_ref_start|>hook<|object_ref_end|><|box_start|>(5,6),(7,8)<|box_end|>?"
    )
    assert (
        write_question("qwen2_vl", "What is it?", two[:1])
        == "What is it? <|box_start|>(1,2),(3,4)<|box_end|>"
    )
    assert write_question("qwen3_vl", "Compare.", two) == (
        'Compare. {"bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": [5, 6, 7, 8], "label": "hook"}'
    )
    assert write_question("qwen2_vl", "What is a <box>?", []) == "What is a <box>?"


TEXTS = [
    "",
    "yes",
    "left-top",
    "a; b",
    "Two lines,\nthe second [1, 2",
    'of "quotes" {and} <5 mm; é 不',
    "ends with [",
]
LABELS = ["", "polyp", "a", "b", "a; b", '"} ]\\', "<5 mm (small), [ref]", "ça\u2028va", "label: 5, box"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("images", [1, 3])
def test_what_is_written_is_read_back(family: str, images: int) -> None:
    rng = random.Random(0)
    for _ in range(3000):
        edges = [sorted(rng.sample(range(SCALE + 1), 2)) for _ in range(2)]
        regions = [
            Region((x[0], y[0], x[1], y[1]), rng.choice(LABELS), rng.randrange(images))
            for x, y in [(edges[0], edges[1]), (edges[1], edges[0])][: rng.choice([1, 2])]
        ]
        text = rng.choice(TEXTS)
        if not text:  # boxes alone have no labels: these are the text
            regions = [replace(region, label="") for region in regions]
        expected = regions
        if text and not any(region.label for region in regions):
            expected = [replace(region, label=text) for region in regions]
        written = write_answer(family, text, regions, images)
        assert parse_answer(written, images) == (text, expected), written


TWO = [(1, 2, 3, 4), (5, 6, 7, 8)]


# ---- what models write instead ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "text", "expected", "labels"),
    [
        ('```json\n[\n\t{"bbox_2d": [1, 2, 3, 4], "label": "cat"}\n]\n```', "cat", [(1, 2, 3, 4)], ["cat"]),
        ('Yes. ```[{"label": "cat", "bbox": [1, 2, 3, 4]}]```', "Yes.", [(1, 2, 3, 4)], ["cat"]),
        ('{"box_2d": [1.5, 2, 3, 4.25], "name": "x"}', "x", [(1.5, 2, 3, 4.25)], ["x"]),
        ("{'bbox_2d': [[1, 2], [3, 4]], 'label': 'x y'}", "x y", [(1, 2, 3, 4)], ["x y"]),
        ('[{"bbox_2d": [30, 40, 10, 20], "label": "x"}]', "x", [(10, 20, 30, 40)], ["x"]),
        ('[{"bbox_2d": [0.1, 0.2, 0.5, 1.0], "label": "x"}]', "x", [(100, 200, 500, 1000)], ["x"]),
        ('[{"bbox_2d": [-4, 20, 1200, 40], "label": "x"}]', "x", [(0, 20, 1000, 40)], ["x"]),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "pol', "pol", [(1, 2, 3, 4)], ["pol"]),
        ('[{"bbox_2d": [1, 2, 3, 4], "lab', "", [(1, 2, 3, 4)], [""]),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "x"}, {"bbox_2d": [5, 6', "x", [(1, 2, 3, 4)], ["x"]),
        ("<ref>x</ref><box>(1,2),(3,4)</box><ref>x</ref><box>(5,", "x", [(1, 2, 3, 4)], ["x"]),
        ("<ref>x</ref><box>(1,2),(3,4)</box><ref>so", "x", [(1, 2, 3, 4)], ["x"]),
        ('"bbox_2d": 1, 2, 3, 4, "label": "x" there', "there", [(1, 2, 3, 4)], ["x"]),
        ('[{"bbox_2d": [[1, 2, 3, 4], [5, 6, 7, 8]], "label": "x"}]', "x", TWO, ["x", "x"]),
        ("<ref>a b</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>", "a b", TWO, ["a b"] * 2),
        ("<|object_ref_start|>a<|object_ref_end|>(1, 2), (3, 4)", "a", [(1, 2, 3, 4)], ["a"]),
        ("<|box_start|>(1,2),(3,4 and so on", "and so on", [(1, 2, 3, 4)], [""]),
        ("A <|object_ref_start|>cat<|object_ref_end|> sits", "A cat sits", [], []),
        ("It is at [10, 20, 30, 40] there", "It is at there", [(10, 20, 30, 40)], [""]),
        ("polyp (1,2),(3,4)", "polyp", [(1, 2, 3, 4)], [""]),
        ("1, 2, 3, 4", "1, 2, 3, 4", [], []),
        ("[nan, 1, 2, 3]", "[nan, 1, 2, 3]", [], []),
        ("yes", "yes", [], []),
        ("", "", [], []),
    ],
)  # fmt: skip
def test_what_else_models_write(written: str, text: str, expected: list[Box], labels: list[str]) -> None:
    found, regions = parse_answer(written)
    assert (found, boxes(regions), [region.label for region in regions]) == (text, expected, labels)


def test_an_image_that_the_question_does_not_have_is_the_first() -> None:
    assert parse_answer('[{"image": 9, "bbox_2d": [1, 2, 3, 4]}]', images=2)[1][0].image == 0
    assert parse_answer("Picture 2: <box>1,2,3,4</box>", 2) == ("", [Region((1, 2, 3, 4), "", 1)])
    assert parse_answer("Picture 2: <box>(1,2),(3,4)</box>")[0] == "Picture 2:"


HOSTILE = [
    '{"', "[", "{", "<ref>", '"bbox":', "1", "1,", " ", '{"bbox_2d": ', "<box>(1,2", "\\", '{"\\',
    '"label":"',
    "bbox:1,2,3,4", "[1,2,3,4", "'label':'", '{"bbox":[1,2,3,4]', "(", "1.", "-", '"bbox":1,2,3,4,"label":"x',
    "Picture 1:", "```", "<|box_start|>1,2,3,4", "{'label': ", "</box>", "[[[1,2],",
]  # fmt: skip


@pytest.mark.parametrize("piece", HOSTILE)
def test_hostile_text_takes_no_longer_than_its_length(piece: str) -> None:
    """A reading that grows with the square would take minutes for these, not a part of a second."""
    start = time.process_time()
    for text in (piece * (200_000 // len(piece)), '{"bbox": [' + piece * (90_000 // len(piece)) + "]}"):
        parse_answer(text, 2)
    assert time.process_time() - start < 5


def test_no_text_raises() -> None:
    rng = random.Random(1)
    pieces = [*HOSTILE, "\0", "polyp", "é", "]", "}", ")", '"', "\n", "NaN", "1e9", "0.5", "bbox_2d", "label"]
    pieces += ['{"bbox_2d": [1, 2, 3, 4], "label": "\\ud83d"}']
    for _ in range(5000):
        text, regions = parse_answer("".join(rng.choices(pieces, k=rng.randrange(30))), rng.choice([1, 2]))
        (text + "".join(region.label for region in regions)).encode()
        for region in regions:
            x1, y1, x2, y2 = region.box
            assert 0 <= x1 <= x2 <= SCALE
            assert 0 <= y1 <= y2 <= SCALE


# ---- there and back -----------------------------------------------------------------------------------

SIZES = [
    (1280, 1024), (1024, 1280), (512, 512), (1920, 1080), (854, 480), (622, 531), (3840, 2160), (300, 2000),
    (60, 40), (2000, 2000),
]  # fmt: skip
MODES = [("letterbox", 768, None), ("letterbox", 224, None), ("native", None, 576), ("native", None, 16384)]


def canvases() -> list[Canvas]:
    return [
        plan_canvas(source, mode=mode, size=size, max_tokens=tokens, factor=factor)
        for source in SIZES
        for factor in (28, 32)
        for mode, size, tokens in MODES
    ]


@pytest.mark.parametrize("canvas", canvases(), ids=str)
def test_the_way_there_and_back_moves_no_edge_by_over_half_a_thousandth_of_the_canvas(canvas: Canvas) -> None:
    width, height = canvas.source_size
    half_x, half_y = canvas.width / canvas.scale_x / 2000, canvas.height / canvas.scale_y / 2000
    assert max(half_x, half_y) <= 1 or max(width, height) >= 2000  # within one pixel of the source
    rng = random.Random(0)
    for _ in range(200):
        x1, x2 = sorted((rng.uniform(0, width), rng.uniform(0, width)))
        y1, y2 = sorted((rng.uniform(0, height), rng.uniform(0, height)))
        told = on_canvas(Region((x1, y1, x2, y2)), canvas)
        assert all(isinstance(edge, int) and 0 <= edge <= SCALE for edge in told.box)
        back = in_source(told, canvas).box
        wide = 1 if x2 - x1 > 2 * half_x else 2  # a narrower one may become a whole thousandth wide
        high = 1 if y2 - y1 > 2 * half_y else 2
        for edge, there, most in zip(back, (x1, y1, x2, y2), (wide * half_x, high * half_y) * 2, strict=True):
            assert abs(edge - there) <= most + 1e-6
        assert told.box[0] < told.box[2]
        assert told.box[1] < told.box[3]


def test_the_whole_image_is_the_whole_of_what_is_drawn() -> None:
    canvas = plan_canvas((1280, 1024), mode="letterbox", size=768, max_tokens=None, factor=32)
    assert on_canvas(Region((0, 0, 1280, 1024)), canvas).box == (0, 100, 1000, 900)  # 77 rows of padding
    shares = on_canvas(Region((0.25, 0.5, 0.5, 1), relative=True), canvas)
    assert shares == on_canvas(Region((320, 512, 640, 1024)), canvas)
    assert in_source(Region((0, 0, 1000, 1000)), canvas).box == (0, 0, 1280, 1024)


@pytest.mark.parametrize(("size", "most"), [((1280, 1024), 0.64), ((1920, 1080), 0.96), ((3840, 2160), 1.92)])
def test_how_exact_boxes_can_be(size: tuple[int, int], most: float) -> None:
    """What docs/datasets.md says, at any size of canvas."""
    for side in (224, 768):
        canvas = plan_canvas(size, mode="letterbox", size=side, max_tokens=None, factor=32)
        edges = [edge / 7 for edge in range(7 * size[0])]
        found = [in_source(on_canvas(Region((x, 0, x + 9, 9)), canvas), canvas).box[0] for x in edges[:-70]]
        worst = max(abs(there - back) for there, back in zip(edges[:-70], found, strict=True))
        assert 0.98 * most < worst <= most + 1e-9


def test_boxes_too_thin_to_be_told_are_made_a_thousandth_wide() -> None:
    canvas = plan_canvas((4000, 4000), mode="letterbox", size=768, max_tokens=None, factor=32)
    thin = {0: (0, 1), 3999.9: (999, 1000), 9.9: (2, 3), 8.1: (2, 3), 7.8: (1, 2)}
    for left, told in thin.items():
        x1, _, x2, _ = on_canvas(Region((left, 0, left + 0.1, 4000)), canvas).box
        assert (x1, x2) == told


def test_what_reaches_out_by_a_pixel_is_cut_off() -> None:
    canvas = plan_canvas((100, 100), mode="letterbox", size=224, max_tokens=None, factor=28)
    assert on_canvas(Region((-0.9, 0, 100.9, 50)), canvas) == on_canvas(Region((0, 0, 100, 50)), canvas)


# ---- boxes that are not right -------------------------------------------------------------------------


def example(
    *regions: Region, question: str = "Q?", asked: tuple[Region, ...] = (), answer: str = "a"
) -> Example:
    refs = (ImageRef("a"), ImageRef("b"))
    return Example("1", refs, question, (answer,), regions=regions, asked_regions=asked)


@pytest.mark.parametrize(
    ("region", "what"),
    [
        (Region((10, 10, 20, 20)), None),
        (Region((-1, 0, 101, 51)), None),
        (Region((0.1, 0, 1, 1), relative=True), None),
        (Region((0, 0, 70, 60), image=1), None),
        (Region((-1.1, 0, 20, 20)), "reaches out of its image of 100×50 pixels"),
        (Region((0, 0, 20, 51.5)), "box [0, 0, 20, 51.5] of pixels reaches out"),
        (Region((0, 0, 70, 60)), "reaches out"),
        (Region((0, 0, 1.2, 1), relative=True), "of 0 to 1 reaches out"),
        (Region((0, 0, float("inf"), 1)), "reaches out"),
        (Region((20, 10, 20, 20)), "is empty"),
        (Region((30, 10, 20, 20)), "is empty"),
        (Region((float("nan"), 10, 20, 20)), "is empty"),
        (Region((-0.9, 10, -0.1, 20)), "is outside of its image"),
        (Region((0, 0, 1, 1), image=2), "is in image 3, but the question is about 2"),
        (Region((0, 0, 1, 1), image=-1), "is in image 0"),
    ],
)
def test_misplaced_boxes(region: Region, what: str | None) -> None:
    sizes = {"a": (100, 50), "b": (70, 60)}
    for found in (misplaced(example(region), sizes), misplaced(example(asked=(region,)), sizes)):
        assert found == [] if what is None else len(found) == 1 and what in found[0]


def test_places_for_boxes_must_fit_their_number() -> None:
    one = (Region((0, 0, 1, 1)),)
    assert misplaced(example(asked=one, question="Is <box> left of <box>?"), {}) == [
        "the question has 2 <box> for 1 boxes"
    ]
    assert misplaced(example(question="What is <box>?"), {}) == []
    assert misplaced(example(asked=one, question="What is <box>?"), {}) == []
    assert "make them the answer" in misplaced(example(Region((0, 0, 1, 1), "polyp"), answer=""), {})[0]
    assert grounding.PLACEHOLDER == "<box>"
