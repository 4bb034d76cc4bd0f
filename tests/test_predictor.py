"""A model asked about any image answers as `surgvqa evaluate` does, without its data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES, closed_sets, noise_image
from PIL import Image, ImageOps

import surgvqa
from surgvqa import datasets, evaluation, hub, recipe, train
from surgvqa.metrics import Prediction
from surgvqa.predictor import Predictor
from surgvqa.recipe import BadInput
from surgvqa.tokens import ChatTokens

RECIPE = """
data: {format: jsonl}
prompt: {system: Answer in a few words., instructions: {count: A number., where: Left or right.}}
image: {size: 96, fill: "#303030", crop: border}
batch: {questions: 8, questions_per_image: 4}
train: {max_steps: 3, lr: 5.0e-3, precision: fp32, checkpoint_layers: 0}
eval: {max_new_tokens: 3}
model: {tune: lora, lora: {dropout: 0.5}}
"""
QUESTIONS = [
    ("How many polyps are there?", "none", "count"),
    ("Is there bleeding?", "yes", "yes_no"),
    ("Where is the polyp?", "upper left", "where"),
    ("Which organ?", "colon", "which"),
]


def write_data(folder: Path) -> Path:
    """Pictures as they come: turned by EXIF, grey of 8 and 16 bits, see-through, in a border; and a clip."""
    folder.mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    noise_image(70, 40, 1).save(folder / "turned.jpg", exif=turned.tobytes())
    noise_image(40, 90, 2).convert("L").save(folder / "grey.png")
    deep = np.asarray(noise_image(50, 50, 3).convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(folder / "deep.png")
    clear = noise_image(60, 44, 4).convert("RGBA")
    clear.putalpha(noise_image(60, 44, 5).convert("L"))
    clear.save(folder / "clear.png")
    ImageOps.expand(noise_image(64, 48, 6), 20, "black").save(folder / "border.png")
    noise_image(64, 64, 7).save(folder / "train.png")
    tests = ["turned.jpg", "grey.png", "deep.png", "clear.png", "border.png", ["border.png", "clear.png"]]
    rows = [
        {
            "id": f"{number}-{kind}",
            "image": image,
            "question": question,
            "answer": answer,
            "question_type": kind,
            "split": "test" if number else "train",
        }
        for number, image in enumerate(["train.png", *tests])
        for question, answer, kind in QUESTIONS
    ]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module", params=FAMILIES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few steps of LoRA on new data, whose test questions were answered in writing."""
    folder = tmp_path_factory.mktemp(request.param)
    data = write_data(folder / "data")
    words = [f"data.path={data}", f"output={folder / 'run'}", f"model.name={request.param}"]
    return train.train(recipe.parse(RECIPE, words))


@pytest.fixture(scope="module")
def model(run: Path) -> Predictor:
    return surgvqa.load_predictor(run, device="cpu")


def folder_of(run: Path) -> Path:
    """Of its data."""
    return Path(recipe.load(run / "recipe.yaml").data.path or "").parent


def check_answers(model: Predictor, run: Path) -> list[Prediction]:
    """All questions of each image at once, and one of each image by itself, against predictions.jsonl."""
    expected = surgvqa.load_run(run).evaluation().predictions
    assert len(expected) == 24
    examples = {one.id: one for one in datasets.load(recipe.load(run / "recipe.yaml").data).examples}
    by_image: dict[str, list[Prediction]] = {}
    for row in expected:
        by_image.setdefault(row.image, []).append(row)
    for rows in by_image.values():
        paths = [image.path for image in examples[rows[0].id].images if image.path]
        images = paths[0] if len(paths) == 1 else paths
        kinds = [row.question_type for row in rows]
        answers = model.ask_all(images, [row.question for row in rows], question_types=kinds)
        answers.append(model.ask(images, rows[0].question, question_type=kinds[0]))
        for row, answer in zip([*rows, rows[0]], answers, strict=True):
            assert (answer.question, answer.text, answer.regions) == (row.question, row.answer, ())
            assert answer.cut == row.cut
            chances = row.probabilities
            assert answer.probabilities == (None if chances is None else pytest.approx(chances, rel=1e-4))
    assert len({row.answer for row in expected}) > 2  # or all of this shows little
    return expected


def test_written_answers_are_those_of_the_evaluation(run: Path, model: Predictor) -> None:
    assert not any(row.probabilities for row in check_answers(model, run))


def test_chosen_answers_are_those_of_the_evaluation(run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run, tmp_path / "run"))
    overrides = ["eval.answers=labels", *closed_sets()]
    surgvqa.evaluate(str(run), "test", overrides=overrides)
    chosen = surgvqa.load_predictor(run, overrides=overrides, device="cpu")
    assert all(row.probabilities for row in check_answers(chosen, run))


def test_every_form_of_an_image_gives_the_same_answer(run: Path, model: Predictor) -> None:
    answers = set()
    for name in ("turned.jpg", "grey.png", "deep.png", "clear.png", "border.png"):
        file = folder_of(run) / name
        expected = model.ask(file, "Is there bleeding?", labels=["yes", "no"])
        with Image.open(file) as image:
            forms: list[Any] = [str(file), file.read_bytes(), image]
            if name in ("turned.jpg", "grey.png"):  # what an array holds has no EXIF, and is upright
                forms.append(np.asarray(ImageOps.exif_transpose(image)))
            for form in forms:
                assert model.ask(form, "Is there bleeding?", labels=["yes", "no"]) == expected
        answers.add((expected.probabilities or {})["yes"])
    assert len(answers) == 5


def test_boxes_are_in_pixels_of_the_upright_image(
    run: Path, model: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = {
        "tiny-qwen2-vl": "<|object_ref_start|>polyp<|object_ref_end|>"
        "<|box_start|>(0,0),(500,1000)<|box_end|>",
        "tiny-qwen3-vl": '[{"bbox_2d": [0, 0, 500, 1000], "label": "polyp"}]',
    }[model.recipe.model.name]
    tokenizer = ChatTokens(hub.find(model.recipe.model.name)).tokenizer
    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(evaluation, "greedy", lambda *_, **__: [ids])
    answer = model.ask(folder_of(run) / "turned.jpg", "Where is the polyp?")
    assert answer.text == "polyp"
    (region,) = answer.regions
    # The left half of 70 × 40 pixels that EXIF makes 40 × 70; it is centred to a pixel of the canvas.
    assert (region.label, region.image) == ("polyp", 0)
    assert region.box == pytest.approx((0, 0, 20, 70), abs=0.5)


def test_works_where_the_data_are_gone(run: Path, model: Predictor, tmp_path: Path) -> None:
    picture = noise_image(50, 40, 9)
    before = model.ask(picture, "Which organ?")
    data, away = folder_of(run), tmp_path / "away"
    data.rename(away)
    try:
        (folder,) = (run / "checkpoints").iterdir()
        for source in (run, folder):
            again = surgvqa.load_predictor(source, device="cpu")
            assert again.checkpoint == folder
            assert again.ask(picture, "Which organ?") == before
    finally:
        away.rename(data)


def test_a_published_model_is_asked_with_and_without_a_recipe(tmp_path: Path) -> None:
    """Against transformers' own model, processor and `generate` on the very canvas."""
    from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from surgvqa.demo.tiny import write_tiny_model

    name = str(write_tiny_model("tiny-qwen3-vl", tmp_path / "model"))
    torch.manual_seed(3)
    config = Qwen3VLForConditionalGeneration.config_class.from_pretrained(name)
    theirs = Qwen3VLForConditionalGeneration(config).eval()
    theirs.save_pretrained(name)
    words = ["train.precision=fp32", "image.size=256", "eval.max_new_tokens=8"]
    model = surgvqa.load_predictor(name, overrides=words, device="cpu")
    assert (model.checkpoint, model.recipe.prompt.system) == (None, None)
    assert repr(model) == f"Predictor({name}, cpu)"
    picture = noise_image(256, 256, 1)  # the canvas itself, so that nobody resizes it
    answer = model.ask(picture, "Which organ?")
    tokenizer = AutoTokenizer.from_pretrained(name)
    content = [{"type": "image"}, {"type": "text", "text": "Which organ?"}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    ).replace("<|image_pad|>", "<|image_pad|>" * 64)
    inputs = tokenizer([text], return_tensors="pt")
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == config.image_token_id).int()
    seen = Qwen2VLImageProcessorPil.from_pretrained(name)(images=[picture], return_tensors="pt")
    assert seen["image_grid_thw"].tolist() == [[1, 16, 16]]
    out = theirs.generate(**inputs, **seen, max_new_tokens=8, do_sample=False)
    said = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.text == said.strip()
    file = tmp_path / "recipe.yaml"
    words = ["data.path=/nowhere.jsonl", "output=x", "model.name=tiny-qwen2-vl"]
    file.write_text(recipe.parse(RECIPE, words).dump())
    other = surgvqa.load_predictor(name, recipe=file, device="cpu")
    assert (other.recipe.model.name, other.recipe.image.size) == (name, 96)
    assert other.recipe.prompt.system == "Answer in a few words."
    assert surgvqa.load_predictor("tiny-qwen2-vl", device="cpu").recipe.image.size == 768


def test_what_cannot_be_asked_is_said(run: Path, tmp_path: Path) -> None:
    words = ["eval.answers=labels", "data.labels.count=['0', '1']"]
    model = surgvqa.load_predictor(run, overrides=words, device="cpu")
    picture = noise_image(50, 40, 9)
    torn = tmp_path / "torn.png"
    picture.save(torn)
    torn.write_bytes(torn.read_bytes()[:-40])
    for image, question, more, what in [
        (picture, "Is <|im_end|> there?", {"labels": []}, r"question 'Is .*holds the special token <"),
        (picture, "Which?", {"labels": ["a", "<|vision_end|>"]}, r"special token <\|vision_end\|>"),
        (picture, " ", {}, "is empty"),
        (picture, "Which organ?", {}, r"none for the type 'question' \(it has them for: count\)"),
        (picture, "Which organ?", {"labels": "yes"}, r"labels: give a list, such as \['yes', …\]"),
        (picture, "Which organ?", {"labels": ["a", "a."]}, "two count as the same answer"),
        (picture, "Which organ?", {"labels": ["a", ""]}, "one is empty"),
        (np.zeros((5, 5, 3)), "Which?", {"labels": []}, r"image 1: is an array \(5, 5, 3\) of float64; give"),
        (np.zeros((2, 5, 5, 3), np.uint8), "Which?", {"labels": []}, "several frames as a list"),
        (np.zeros((0, 5, 3), np.uint8), "Which?", {"labels": []}, "image 1: "),
        ([], "Which?", {"labels": []}, "image: there is none"),
        (5, "Which?", {"labels": []}, "image 1: is a int; give a path"),
        (tmp_path / "none.png", "Which?", {"labels": []}, r"none\.png: cannot be read: No such file"),
        (torn, "Which?", {"labels": []}, r"torn\.png: cannot be decoded"),
        ([picture, b"no image"], "Which?", {"labels": []}, "image 2: is not an image"),
        (Image.new("F", (9, 9)), "Which?", {"labels": []}, "image 1: .* floating point"),
    ]:  # fmt: skip
        with pytest.raises(BadInput, match=what):
            model.ask(image, question, **more)
    with pytest.raises(BadInput, match="give lists of the same length"):
        model.ask_all(picture, "Which organ?")
    assert model.ask_all(picture, []) == []
    assert set(model.ask(picture, "How many?", question_type="count").probabilities or {}) == {"0", "1"}


def test_sources_that_are_none_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"--recipe is for .* brings its own"):
        surgvqa.load_predictor(run, recipe=run / "recipe.yaml")
    copy = Path(shutil.copytree(next((run / "checkpoints").iterdir()), tmp_path / "step-000003"))
    with (copy / "adapter_model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(BadInput, match=r"step-000003: adapter_model\.safetensors: "):
        surgvqa.load_predictor(copy)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="empty holds neither a run nor a checkpoint, and no model"):
        surgvqa.load_predictor(tmp_path / "empty")


def test_a_real_model_computes_on_the_cpu_only_if_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(hub.find("tiny-qwen2-vl").path, tmp_path / "model")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput, match="weights missing"):
        surgvqa.load_predictor(tmp_path / "model")  # it is small
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "intermediate_size": 10**7}))
    with pytest.raises(BadInput, match="no GPU that CUDA can use"):
        surgvqa.load_predictor(tmp_path / "model")
    with pytest.raises(BadInput, match="weights missing"):
        surgvqa.load_predictor(tmp_path / "model", device="cpu")
