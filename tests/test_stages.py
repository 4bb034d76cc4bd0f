"""Staged experiments: runs that begin with another's weights, orders by stages, balanced draws."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_jsonl
from safetensors.torch import load_file

from surgvqa import checkpoint, cli, recipe, train
from surgvqa import run as run_folder
from surgvqa.prepare import prepare
from surgvqa.recipe import BadInput
from surgvqa.replay import replay
from surgvqa.run import first_weights
from surgvqa.terminal import Console

RECIPE = """
model: {name: tiny-qwen3-vl, tune: lora, lora: {rank: 4, dropout: 0.1}}
data: {format: jsonl, workers: 0}
image: {size: 64}
batch: {questions: 6, questions_per_image: 4, tokens_per_micro_batch: 600}
train: {max_steps: 2, lr: 1.0e-2, precision: fp32, checkpoint_layers: 0}
eval: {final: null, max_new_tokens: 2}
checkpoint: {every: 1, keep: 5}
log: {trace: true}
"""
STAGES = {"count": 1, "yes_no": 1, "which": 2, "where": 2, "colour": 3, "state": 3}


@pytest.fixture
def settings(tmp_path: Path) -> Any:
    """A recipe whose run is `name` in tmp_path, on questions that have stages."""
    data = write_jsonl(tmp_path / "data", images=10)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    data.write_text("".join(json.dumps({**r, "stage": STAGES[r["question_type"]]}) + "\n" for r in rows))

    def make(name: str, *overrides: str) -> recipe.Recipe:
        return recipe.parse(RECIPE, [f"data.path={data}", f"output={tmp_path / name}", *overrides])

    return make


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / checkpoint.folder_name(step)
    adapter = folder / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else folder / "model.safetensors")


def traced(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "trace.jsonl").read_text().splitlines()]


def killed_after(monkeypatch: pytest.MonkeyPatch, last: int, settings: recipe.Recipe) -> None:
    step = run_folder.Records.step

    def stop(self: object, **row: object) -> None:
        step(self, **row)  # type: ignore[arg-type]  # the real method
        if row["step"] == last:
            raise RuntimeError("as if killed")

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.Records, "step", stop)
        with pytest.raises(RuntimeError, match="as if killed"):
            train.train(settings)


@pytest.mark.parametrize("tune", ["lora", pytest.param("full", marks=pytest.mark.long)])
def test_a_run_begins_with_the_weights_of_another_and_then_needs_it_no_more(
    settings: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tune: str
) -> None:
    full = ["model={name: tiny-qwen3-vl, tune: full}"] if tune == "full" else []
    first = train.train(settings("first", *full, "data.stages=[1]"))
    begun = [*full, f"model.adapter={first}", "data.stages=[2]"]
    # A step of next to nothing: what is saved is what the run began with.
    still = train.train(settings("still", *begun, "train.lr=1e-20", "train.max_steps=1"))
    theirs, ours = weights(first, 2), weights(still, 1)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    fresh = train.train(settings("fresh", *full, "train.lr=1e-20", "train.max_steps=1"))
    assert not all(torch.equal(theirs[name], value) for name, value in weights(fresh, 1).items())

    whole = train.train(settings("whole", *begun, "train.max_steps=3"))
    folder = first / "checkpoints" / "step-000002"
    assert f"began with the weights of {folder}" in capsys.readouterr().out
    loss, _ = replay(settings("whole", *begun, "train.max_steps=3"), 1, Console(quiet=True))
    assert loss == pytest.approx(float.fromhex(traced(whole)[0]["loss"]), rel=1e-5)
    killed_after(monkeypatch, 3, settings("stopped", *begun, "train.max_steps=3"))
    shutil.rmtree(first)
    stopped = train.train(settings("stopped", *begun, "train.max_steps=3"))
    assert traced(stopped) == traced(whole)
    for run in (whole, stopped):
        state = json.loads((run / "checkpoints/step-000003/trainer/state.json").read_text())
        assert state["adapter"]["checkpoint"] == str(folder)
        assert state["adapter"]["manifest"].startswith("sha256:")
        assert f"adapter: {first}" in (run / "recipe.yaml").read_text()
    with pytest.raises(BadInput, match=f"model.adapter: '{first}' → None"):
        train.train(settings("stopped", *full, "data.stages=[2]", "train.max_steps=3"))
    assert cli.main(["evaluate", str(stopped), "data.stages=null"]) == 0
    assert json.loads((stopped / "scores.json").read_text())["overall"]["n"] > 0


def test_what_a_run_cannot_begin_with(
    settings: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = train.train(settings("first", "train.max_steps=1"))
    caplog.set_level(logging.WARNING, "surgvqa")

    def found(*overrides: str, adapter: Path = first) -> Path | None:
        caplog.clear()
        return first_weights(settings("second", f"model.adapter={adapter}", *overrides))

    def problems(*overrides: str, adapter: Path = first) -> list[str]:
        with pytest.raises(BadInput) as caught:
            found(*overrides, adapter=adapter)
        return caught.value.problems

    folder = first / "checkpoints/step-000001"
    assert first_weights(settings("second")) is None
    assert found() == found(adapter=folder) == folder
    assert found("model.lora.dropout=0.0", "train.lr=1e-4", "batch.questions=4") == folder
    assert not caplog.records
    assert found("data.split={by: image, seed: 3}") == folder
    assert (
        "was trained with another split, so what is val or test now may have been in its train" in caplog.text
    )
    assert "data.split.by: 'official' → 'image'" in caplog.text

    assert problems("model.lora.rank=8", "model.train_merger=true") == [
        f"model.adapter: {folder} holds weights of another model than this recipe's:",
        "  model.lora.rank: 4 → 8",
        "  model.train_merger: False → True",
    ]
    full = f"model={{name: tiny-qwen3-vl, tune: full, adapter: {first}}}"
    assert "  model.tune: 'lora' → 'full'" in problems(full)
    assert problems(adapter=tmp_path / "gone") == [
        f"model.adapter: {tmp_path / 'gone'}: no such folder; give a run's, or one of its checkpoints'"
    ]
    assert "no recipe.yaml here" in problems(adapter=tmp_path / "data")[0]

    (first / "ended.json").unlink()
    assert found() == folder
    assert f"{first} has not finished; beginning with its step-000001" in caplog.text
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    for adapter in (first, folder):
        (problem,) = problems(adapter=adapter)
        assert problem.startswith("model.adapter: ")
        assert problem.endswith(f"{folder}: adapter_model.safetensors: content changed")
    with pytest.raises(BadInput, match=r"content changed"):
        train.train(settings("second", f"model.adapter={first}"))


def test_the_best_checkpoint_of_a_run_is_what_the_next_begins_with(settings: Any) -> None:
    """Nothing is learned, so all score the same, and the first is the best."""
    evaluated = ["train.lr=1e-20", "eval.every=2", "eval.questions=2"]
    first = train.train(settings("first", *evaluated, "train.max_steps=4"))
    found = first_weights(settings("second", f"model.adapter={first}"))
    assert found == first / "checkpoints/step-000002"


def test_balanced_and_ordered_runs_are_repeatable_and_say_what_they_draw(
    settings: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["data.balance=question_type", "batch.order=stages", "train.max_steps=9"]
    whole = train.train(settings("whole", *changes))
    said = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    prepared = prepare(settings("whole", *changes))
    questions = prepared.questions("train")
    counts = Counter(example.question_type for example in questions.examples)
    plan = prepared.plan(questions)
    assert plan.steps_per_epoch < 9
    ids = [name for row in traced(whole)[: plan.steps_per_epoch] for name in row["ids"]]
    known = {example.id: example for example in questions.examples}
    assert len(ids) == len(known)
    drawn = Counter(known[name].question_type for name in ids)
    assert max(drawn.values()) - min(drawn.values()) <= 1 < max(counts.values()) - min(counts.values())
    stages = [known[name].stage for name in ids]
    assert stages == sorted(stages, key=lambda stage: stage or 0)

    at = said.index("balance     question_type; questions there are, and drawn in an epoch")
    table = {line.split()[0]: line.split()[1:3] for line in said[at + 1 : at + 1 + len(counts)]}
    assert table == {kind: [str(counts[kind]), str(drawn[kind])] for kind in counts}
    of = Counter(example.stage for example in questions.examples)
    assert (
        f"order       {of[1]} of stage 1, then {of[2]} of stage 2, then {of[3]} of stage 3, in every epoch"
        in said
    )

    killed_after(monkeypatch, 5, settings("stopped", *changes))
    assert traced(train.train(settings("stopped", *changes))) == traced(whole)
    with pytest.raises(BadInput, match=r"data.balance: 'question_type' → 'none'"):
        train.train(settings("stopped", *changes, "data.balance=none"))


def test_balanced_by_answer_draws_every_answer_equally_often(settings: Any) -> None:
    prepared = prepare(settings("run", "data.balance=answer"))
    questions = prepared.questions("train")
    plan = prepared.plan(questions)
    asked = [q for step in range(plan.steps_per_epoch) for tree in plan.step(step) for q in tree]
    counts = Counter(questions.examples[question].answers[0] for question in asked)
    assert len(counts) == len({example.answers[0] for example in questions.examples})
    assert max(counts.values()) - min(counts.values()) <= 1


def test_an_order_by_stages_needs_the_stage_of_every_training_question(
    settings: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(settings("run").data.path)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    lacking = [number for number, row in enumerate(rows, start=1) if row["question_type"] == "colour"]
    for number in lacking:
        del rows[number - 1]["stage"]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "recipe.yaml"
    file.write_text(settings("run").dump())
    assert cli.main(["check", str(file)]) == 0
    capsys.readouterr()
    assert cli.main(["check", str(file), "batch.order=stages"]) == 2
    said = capsys.readouterr().out
    for number in lacking:
        named = f"error: {data}:{number}: has no stage, which batch.order: stages needs" in said
        assert named == (rows[number - 1]["split"] == "train")
    assert cli.main(["check", str(file), "data.stages=[1, 2]"]) == 2
    assert capsys.readouterr().out.count("has no stage, which data.stages: [1, 2] needs") == len(lacking)


def test_prompts_are_part_of_recipe_and_checkpoint(settings: Any) -> None:
    prompt = "prompt={system: Look., instructions: {count: A number.}}"
    run = train.train(settings("run", prompt, "train.max_steps=1"))
    frozen = checkpoint.recipe_of(checkpoint.chosen(run))
    assert (frozen.prompt.system, frozen.prompt.instructions) == ("Look.", {"count": "A number."})
    with pytest.raises(BadInput, match=r"prompt.instructions.count: 'A number.' → 'A digit.'"):
        train.train(settings("run", prompt, "train.max_steps=1", "prompt.instructions.count=A digit."))


def test_the_staged_experiments_differ_from_the_first_in_what_they_say_alone() -> None:
    folder = Path(__file__).parents[1] / "recipes"
    first = recipe.load(folder / "exp1_768.yaml")
    keys = {
        name: {difference.partition(":")[0] for difference in first.differences(recipe.load(folder / name))}
        for name in ("exp2_ordered.yaml", "exp3_per_stage.yaml", "exp4_curriculum.yaml")
    }
    assert keys == {
        "exp2_ordered.yaml": {"batch.order", "output"},
        "exp3_per_stage.yaml": {"data.stages", "output"},
        "exp4_curriculum.yaml": {"data.stages", "output"},
    }
    said = [
        line.split("surgvqa train recipes/exp4_curriculum.yaml")[1].replace("'", "").split()
        for line in (folder / "exp4_curriculum.yaml").read_text().splitlines()
        if "surgvqa train" in line
    ]
    runs = [recipe.load(folder / "exp4_curriculum.yaml", words) for words in said]
    assert [run.data.stages for run in runs] == [[1], [2], [3]]
    assert [run.model.adapter for run in runs] == [None, *(run.output for run in runs[:2])]
