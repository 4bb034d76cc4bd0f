"""Boxes in tokens, in training, in predictions and on the canvas that `surgvqa show` saves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FAMILIES
from PIL import Image, ImageDraw

from surgvqa import cli, hub, metrics, scores, show
from surgvqa.audit import audit
from surgvqa.datasets import Dataset, Example, ImageRef, Region
from surgvqa.grounding import on_canvas
from surgvqa.letterbox import Canvas, plan_canvas
from surgvqa.metrics import Prediction, Prior
from surgvqa.recipe import BadInput
from surgvqa.tokens import ChatTokens
from surgvqa.tree import Questions

CANVAS = plan_canvas((200, 100), mode="letterbox", size=224, max_tokens=None, factor=28)  # also 7 × 32
CANVASES = {"a": CANVAS, "b": replace(CANVAS, source_width=400, scale_x=CANVAS.scale_x / 2)}


def ask(
    *regions: Region, question: str = "Where?", answer: str = "left", key: str = "a", **more: Any
) -> Example:
    return Example(
        f"{key}{question}", (ImageRef(key, Path(key)),), question, (answer,), regions=regions, **more
    )


BOX = Region((20, 10, 100, 60))  # 100, 300, 500, 550 thousandths of the canvas
WRITTEN = {
    "qwen2_vl": "<|object_ref_start|>left<|object_ref_end|><|box_start|>(100,300),(500,550)<|box_end|>",
    "qwen3_vl": '[{"bbox_2d": [100, 300, 500, 550], "label": "left"}]',
}
ASKED = {
    "qwen2_vl": "<|box_start|>(100,300),(500,550)<|box_end|>",
    "qwen3_vl": '{"bbox_2d": [100, 300, 500, 550]}',
}


@pytest.fixture(scope="module", params=["Qwen2-VL-7B-Instruct", "Qwen3-VL-8B-Instruct"])
def real(request: pytest.FixtureRequest, shared: Path) -> ChatTokens:
    return ChatTokens(hub.find(str(shared / "qwen" / request.param)))


def check_tokens(chat: ChatTokens) -> None:
    """Branches are those of the whole conversation, boxes supervised, and read back as they were written."""
    example = ask(BOX, question="Is it in <box>?", asked_regions=(BOX,))
    other = replace(example, id="2", images=(ImageRef("b"),))  # the same words on another canvas
    branch, on_b = chat.branches([example, other], CANVASES)
    root = chat.root([(1, 1)])
    whole = chat.render(chat.conversation(example, CANVASES))
    assert [*root.ids, *branch.ids] == chat.tokenizer(whole, add_special_tokens=False)["input_ids"]
    family = chat.folder.family
    supervised = branch.ids[branch.prompt : branch.prompt + branch.answer]
    assert chat.tokenizer.decode(supervised) == f"{WRITTEN[family]}<|im_end|>"
    assert f"Is it in {ASKED[family]}?<|im_end|>" in chat.tokenizer.decode(branch.asked.ids)
    assert chat.text(supervised, boxes=True) == WRITTEN[family]
    assert "(50,300),(250,550)" in chat.tokenizer.decode(on_b.ids).replace(
        "[50, 300, 250, 550]", "(50,300),(250,550)"
    )
    (asked,) = chat.candidates([example], [("left", "right")], CANVASES)
    assert [chat.tokenizer.decode(child.ids) for child in asked.children] == [
        "left<|im_end|>",
        "right<|im_end|>",
    ]
    assert ASKED[family] in chat.tokenizer.decode(asked.ids)


def test_tokens_of_boxes(chat: ChatTokens) -> None:
    check_tokens(chat)


def test_tokens_of_boxes_with_the_real_tokenizers(real: ChatTokens) -> None:
    check_tokens(real)
    branch = real.branches([ask(BOX)], CANVASES)[0]
    supervised = branch.ids[branch.prompt : branch.prompt + branch.answer].tolist()
    digits = {str(digit): 15 + digit for digit in range(10)}
    if real.folder.family == "qwen2_vl":  # the ids of config.json and vocab.json
        numbers = [[digits[d] for d in number] for number in ("100", "300", "500", "550")]
        assert supervised[:4] == [151646, 2359, 151647, 151648]
        assert supervised[-2:] == [151649, 151645]
        assert [token for token in supervised if token in digits.values()] == [
            token for number in numbers for token in number
        ]
    else:
        assert not set(supervised[:-1]) & set(range(151643, 151657))


@pytest.mark.parametrize("token", ["<|box_start|>", "<|object_ref_end|>"])
def test_tokens_of_boxes_stay_errors_in_the_data(chat: ChatTokens, token: str) -> None:
    bad = [
        ask(BOX, question=f"Q {token}", place="a:1"),
        ask(BOX, answer=f"x{token}", place="a:2"),
        ask(replace(BOX, label=token), place="a:3"),
        ask(asked_regions=(replace(BOX, label=token),), place="a:4"),
    ]
    for example in bad:
        with pytest.raises(BadInput, match=rf"a:\d: holds the special token {token.replace('|', '.')}"):
            chat.branches([example], CANVASES)
    numbered = [replace(example, id=str(number)) for number, example in enumerate(bad)]
    found = audit(Dataset(numbered, []), mode="letterbox", special_tokens=chat.folder.special_tokens)
    held = [problem.place for problem in found.problems if "special token" in problem.what]
    assert held == ["a:1", "a:2", "a:3", "a:4"]


def test_lengths_include_the_boxes(chat: ChatTokens) -> None:
    plain, boxed = ask(), ask(BOX)
    lengths = Questions([plain, boxed], chat, CANVASES).answer_tokens
    assert lengths[1] > lengths[0] + 12


# ---- scores -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1.0),
        ((0, 0, 2, 2), (2, 0, 4, 2), 0.0),
        ((0, 0, 2, 2), (1, 0, 3, 2), 1 / 3),
        ((0, 0, 4, 4), (1, 1, 3, 3), 0.25),
        ((0, 0, 0.4, 0.4), (0.2, 0, 0.6, 0.4), 1 / 3),  # the same where sides are 1
        ((0, 0, 0, 2), (0, 0, 2, 2), 0.0),
        ((1, 1, 1, 1), (1, 1, 1, 1), 0.0),
        ((5, 5, 6, 6), (0, 0, 2, 2), 0.0),
    ],
)
def test_iou(first: Any, second: Any, expected: float) -> None:
    assert metrics.iou(first, second) == pytest.approx(expected)
    assert metrics.iou(second, first) == pytest.approx(expected)


def test_scores_have_the_mean_iou_of_the_boxes() -> None:
    def row(found: list[Any] | None, expected: list[Any] | None) -> Prediction:
        as_rows = [
            boxes and [{"label": "", "box": list(box), "image": image} for image, box in boxes]
            for boxes in (found, expected)
        ]
        return Prediction("1", "a", "a", "Q?", "where", ["x"], "x", None, *as_rows)

    reference = [(0, (0, 0, 2, 2)), (0, (5, 5, 6, 6))]
    rows = [
        row([(0, (1, 0, 3, 2))], reference),
        row([], reference),
        row([(1, (0, 0, 2, 2))], reference),
        row([(0, (0, 0, 1, 1))], []),
        row(None, None),
    ]
    overall = scores.values(rows, Prior([]))
    assert (overall["n"], overall["boxes"], overall["iou"]) == (
        5,
        3,
        pytest.approx(1 / 18),
    )  # 1/3 of two, and 0, 0
    assert not {"boxes", "iou"} & scores.values(rows[3:], Prior([])).keys()
    assert "regions" not in rows[-1].row()
    assert rows[3].row()["reference_regions"] == []


# ---- runs ---------------------------------------------------------------------------------------------


def draw_data(folder: Path, boxes: list[tuple[int, int, int, int]], size: tuple[int, int] = (96, 64)) -> Path:
    """COCO detections of one bright square per image, and an image without any."""
    content: dict[str, Any] = {"categories": [{"id": 1, "name": "polyp"}], "images": [], "annotations": []}
    (folder / "imgs").mkdir(parents=True)
    for number, box in enumerate([*boxes, None]):
        image = Image.new("RGB", size, (60, 20, 20))
        content["images"].append({"id": number, "file_name": f"{number}.png"})
        if box:
            x1, y1, x2, y2 = box
            ImageDraw.Draw(image).rectangle((x1, y1, x2 - 1, y2 - 1), (240, 220, 60))
            bbox = [x1, y1, x2 - x1, y2 - y1]
            content["annotations"].append({"image_id": number, "category_id": 1, "bbox": bbox})
        image.save(folder / "imgs" / f"{number}.png")
    (folder / "train.json").write_text(json.dumps(content))
    return folder


def write_recipe(folder: Path, name: str, data: Path, **train: Any) -> Path:
    recipe = {
        "model": {"name": name, "tune": "full", "train_vision": True, "train_merger": True},
        "data": {"format": "coco", "path": str(data)},
        "image": {"size": 96},
        "batch": {"questions": 3, "questions_per_image": 3},
        "train": {"precision": "fp32", "max_steps": 36, "lr": 2e-3, **train},
        "eval": {"final": "train"},
        "output": str(folder / "run"),
    }
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    return file


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_learns_where_a_box_is(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One box by heart, from the COCO file to predictions.jsonl; and none where there is nothing."""
    box = (12, 8, 40, 36)
    recipe = write_recipe(tmp_path, name, draw_data(tmp_path / "data", [box]))
    assert cli.main(["train", str(recipe)]) == 0
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run/predictions.jsonl").open(encoding="utf-8")]
    found, located, nothing = rows
    reference = [{"label": "polyp", "box": list(map(float, box)), "image": 0}]
    for row in (found, located):
        assert row["answer"] == "polyp"
        assert row["references"] == ["polyp"]
        assert row["reference_regions"] == reference
        (region,) = row["regions"]
        assert (region["label"], region["image"]) == ("polyp", 0)
        assert region["box"] == pytest.approx(box, abs=0.05)  # half a thousandth of 96 pixels
    assert nothing["answer"] == "none"
    assert not {"regions", "reference_regions"} & nothing.keys()
    overall = json.loads((tmp_path / "run/scores.json").read_text())["overall"]
    assert (overall["exact"], overall["boxes"]) == (1.0, 2)
    assert overall["iou"] > 0.99
    assert "2 questions with boxes: mean IoU " in printed


@pytest.mark.parametrize("name", FAMILIES)
def test_show_draws_the_boxes_on_the_canvas(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, name, draw_data(tmp_path / "data", [(12, 8, 84, 56)]))
    out = tmp_path / "shown"
    assert cli.main(["show", str(recipe), "--out", str(out)]) == 0
    assert "drawn on it: 2 answered (lime)" in capsys.readouterr().out
    pixels = np.asarray(Image.open(out / "canvas-0.png"))
    side = pixels.shape[0]
    canvas: Canvas = plan_canvas((96, 64), mode="letterbox", size=side, max_tokens=None, factor=side)
    x1, y1, x2, y2 = (round(edge * side / 1000) for edge in on_canvas(Region((12, 8, 84, 56)), canvas).box)
    lime = (pixels == (0, 255, 0)).all(2)
    assert lime[y1, x1:x2].all()
    assert lime[y2 - 1, x1 + 1 : x2 - 1].all()
    assert lime[y1:y2, x1].all()
    assert not lime[:y1].any()
    assert not lime[:, :x1].any()
    assert cli.main(["show", str(recipe), "--index", "1", "--out", str(out)]) == 0
    assert "drawn on it" not in capsys.readouterr().out


def test_show_tells_asked_boxes_from_answered_ones() -> None:
    drawn = Image.new("RGB", (CANVAS.width, CANVAS.height))
    example = ask(BOX, asked_regions=(Region((120, 10, 180, 60)), Region((0, 0, 9, 9), image=1)))
    said = show._outline(drawn, CANVAS, [example, ask()], 0)
    assert said == "1 asked (yellow), 1 answered (lime)"
    assert drawn.getpixel((round(0.6 * CANVAS.width), round(0.4 * CANVAS.height))) == (255, 255, 0)
    assert drawn.getpixel((round(0.1 * CANVAS.width), round(0.5 * CANVAS.height))) == (0, 255, 0)
    assert drawn.getpixel((0, 60)) == (0, 0, 0)  # the box of the other image
