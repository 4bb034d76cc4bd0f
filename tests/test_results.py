"""A run's folder as it is read: which of its evaluations is meant, and what is half written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from surgvqa.recipe import BadInput, Part
from surgvqa.results import file_names, load_run

RECIPE = "model: {name: tiny-qwen3-vl}\ndata: {format: demo}\nimage: {size: 96}\noutput: runs/x\n"
ROW = {
    "id": "1", "image": "a", "group": "a", "question": "Is there?", "question_type": "yes_no",
    "references": ["yes"], "answer": "yes",
}  # fmt: skip


def write(
    run: Path, part: Part, checkpoint: str | None = None, variant: str = "", answer: str = "yes"
) -> None:
    names = file_names(part, "test", checkpoint, variant)
    (run / names[0]).write_text(json.dumps({**ROW, "answer": answer}) + "\n")
    told = {"split": part, "checkpoint": checkpoint or "step-000009", "variant": variant}
    (run / names[1]).write_text(json.dumps({key: value for key, value in told.items() if value}))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    return tmp_path


def test_names() -> None:
    assert file_names("test", "test") == ("predictions.jsonl", "scores.json")
    assert file_names("test", None) == ("predictions.jsonl", "scores.json")
    assert file_names("val", "val") == ("predictions.jsonl", "scores.json")
    assert file_names("val", "test", "step-000009", "smoke:3") == (
        "predictions.val.step-000009.smoke-3.jsonl",
        "scores.val.step-000009.smoke-3.json",
    )


def test_the_evaluation_that_is_meant_is_found(run: Path) -> None:
    write(run, "test", answer="judged")
    write(run, "val", answer="val")
    write(run, "test", "step-000004", answer="earlier")
    write(run, "test", variant="black", answer="blind")
    write(run, "val", variant="smoke:3", answer="smoke")
    found = load_run(run)
    assert [step["step"] for step in found.steps] == [1]
    assert (found.validations, len(found.evaluations)) == ([], 5)
    for split, variant, answer in [
        (None, "", "judged"), ("test", "", "judged"), ("val", "", "val"), (None, "black", "blind"),
        ("test", "black", "blind"), ("val", "smoke:3", "smoke"),
    ]:  # fmt: skip
        assert found.evaluation(split, variant).predictions[0].answer == answer
    assert found.evaluation().checkpoint == "step-000009"


def test_a_checkpoint_may_be_called_like_a_part_of_a_files_name(run: Path) -> None:
    write(run, "test")
    (run / "scores.json").write_text('{"split": "test", "checkpoint": "json"}')
    assert load_run(run).evaluation().checkpoint == "json"


def test_what_is_not_there_is_said_with_the_command(run: Path) -> None:
    with pytest.raises(BadInput, match=r"no predictions; run `surgvqa evaluate \S+` first$"):
        load_run(run).evaluation()
    write(run, "val", "step-000004")
    write(run, "val")
    with pytest.raises(BadInput, match=r"no predictions; run .* first, or take --split val"):
        load_run(run).evaluation()
    with pytest.raises(BadInput, match=r"on test; run `surgvqa evaluate \S+ --split test --corrupt blur:2`"):
        load_run(run).evaluation("test", "blur:2")
    with pytest.raises(BadInput, match=r"run `surgvqa evaluate \S+ --ablate black` first"):
        load_run(run).evaluation(variant="black")
    with pytest.raises(BadInput, match=r"no recipe\.yaml here"):
        load_run(run / "none")
