"""What training looks at on its way: loss, any metric, a fair choice of questions, an early end, pictures."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from conftest import FAMILIES, TOPICS, write_jsonl
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_grounded_runs import draw_data
from test_tree import Row, tiny

from surgvqa import checkpoint, cli, evaluation, pictures, processes, recipe, scores, slurm, train, validation
from surgvqa.datasets import Example, ImageRef, splits
from surgvqa.loss import TreeLoss
from surgvqa.metrics import Prediction, Prior
from surgvqa.prepare import Prepared, prepare
from surgvqa.recipe import BadInput
from surgvqa.run import Records, resumable

RECIPE = """
model: {name: tiny-qwen3-vl, tune: lora}
data: {format: jsonl}
image: {size: 96}
batch: {questions: 12, questions_per_image: 4, tokens_per_micro_batch: 600}
train: {max_steps: 12, lr: 1.0e-20, precision: fp32, checkpoint_layers: 0, warmup: 0}
eval: {every: 2, max_new_tokens: 2, final: test, questions: 6}
"""


@pytest.fixture
def settings(tmp_path: Path) -> Any:
    """Makes recipes of runs that learn next to nothing."""
    data = write_jsonl(tmp_path / "data", images=16)

    def make(*overrides: str) -> recipe.Recipe:
        return recipe.parse(RECIPE, [f"data.path={data}", f"output={tmp_path / 'run'}", *overrides])

    return make


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# ---- the loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_is_that_of_rows_through_transformers(settings: Any, name: str) -> None:
    """Of separate rows in transformers' own model, whatever the micro-batches, trees or labels."""
    words = [f"model.name={name}", "loss.class_weights=inverse", "image.augment=endoscopy"]
    accelerator = processes.start()
    prepared = prepare(settings(*words))
    questions = prepared.questions("train", 21, asked=True)
    reference, network = tiny(prepared.chat, sdpa=True), tiny(prepared.chat)
    losses, tokens = [], []
    for number, example in enumerate(questions.examples):
        tree = questions.tree([number])
        row = Row(prepared.chat, example, tree.patches, tree.grids)
        with torch.no_grad():
            losses.append(float(reference(**row.inputs(row.ids), labels=row.labels).loss))
        tokens.append(int((row.labels != -100).sum()))
    expected = {"token": np.average(losses, weights=tokens), "question": np.mean(losses)}
    assert len({round(loss, 3) for loss in losses}) > 10

    loss = TreeLoss(network.train(), attn="sdpa", autocast=None)
    state = torch.get_rng_state()
    sets: dict[str, list[str]] = {}
    for _, answers, kind in TOPICS:
        sets[kind] = [*dict.fromkeys([*sets.get(kind, []), *answers])]
    for per, change in (
        ("token", ["batch.tokens_per_micro_batch=90"]),
        ("token", ["batch.trees=false"]),
        ("token", ["eval.answers=labels", f"data.labels={json.dumps(sets)}"]),
        ("question", ["loss.per=question"]),
    ):
        changed = prepare(settings(*words, *change))
        asked = changed.questions("train", 21, asked=True)
        found = evaluation.loss_of_part(loss, changed, asked, accelerator=accelerator)
        assert found == pytest.approx(expected[per], rel=1e-6), change
    assert network.training
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(torch.get_rng_state(), state)


# ---- which questions ----------------------------------------------------------------------------------


def asked_of(images: int, kinds: str) -> list[Example]:
    """One question of each type about each image; of types in capitals about every tenth alone."""
    return [
        Example(f"{image}{kind}", (ImageRef(f"{image}.png"),), f"{kind}?", ("yes",), kind)
        for image in range(images)
        for kind in kinds
        if kind.islower() or image % 10 == 3
    ]


def ids(examples: Sequence[Example]) -> set[str]:
    return {example.id for example in examples}


@pytest.mark.parametrize("most", [1, 2, 3, 4, 7, 50, 100, 219])
def test_a_choice_has_each_types_share(most: int) -> None:
    examples = asked_of(100, "abZ")  # 100, 100 and 10
    chosen = splits.drawn(examples, most)
    counts = Counter(example.question_type for example in chosen)
    assert len(ids(chosen)) == len(chosen) == min(most, 210)
    for kind, there in (("a", 100), ("b", 100), ("Z", 10)):
        assert abs(counts[kind] - min(most, 210) * there / 210) < 1
    assert most < 3 or min(counts[kind] for kind in "abZ") >= 1
    # Neither the order of rows nor more than the needed images.
    assert ids(splits.drawn(examples[::-1], most)) == ids(chosen)
    assert [example for example in examples if example in chosen] == chosen
    images = {example.image_key for example in chosen}
    assert len(images) <= max(counts["a"], counts["b"]) + counts["Z"]


def test_shares_by_the_largest_remainder() -> None:
    assert splits._shares({"a": 47, "b": 16, "c": 15, "d": 12, "e": 6, "f": 4}, 10) == {
        "a": 4, "b": 2, "c": 1, "d": 1, "e": 1, "f": 1,
    }  # fmt: skip
    # Hamilton alone gives 5, 2, 1 (of 1.5), 1, 1 (of 0.6), 0; the last gets one of the largest.
    assert splits._shares({"rare": 1, "common": 999}, 2) == {"rare": 1, "common": 1}
    assert splits._shares({"rare": 1, "common": 999}, 1) == {"rare": 0, "common": 1}


# ---- any metric ---------------------------------------------------------------------------------------


def answered(count: int = 10, **changes: Any) -> list[Prediction]:
    """Questions to which every score applies, half of them right."""
    labels = ["the polyp is on the left", "the polyp is on the right"]
    box = {"label": "", "box": [0, 0, 2, 2], "image": 0}
    made = []
    for number in range(count):
        fields = {
            "references": [labels[number % 2]], "answer": labels[number // 2 % 2],
            "probabilities": {labels[0]: 0.3, labels[1]: 0.7}, "reference_regions": [box], **changes,
        }  # fmt: skip
        made.append(Prediction(str(number), f"{number}.png", "", "Where?", "where", **fields))
    return made


def test_every_score_is_a_metric_and_no_other_name() -> None:
    names = scores.values(answered(), Prior([])).keys() - {"n", "prior", "boxes"}
    assert set(get_args(recipe.Metric)) == names | {"loss"}
    assert all(scores.why_not(name, answered()) is None for name in names)
    prior = Prior([Example("1", (), "Where?", ("the polyp is on the left",), "where")])
    assert scores.values(answered(), prior)["prior"] == 0.5
    told = scores.score(answered(), prior, resamples=9)["overall"]
    values = scores.values(answered(), prior)
    assert {name: told[name] for name in values} == values


@pytest.mark.parametrize(
    ("metric", "changes", "why"),
    [
        ("ece", {"probabilities": None}, "there are no probabilities"),
        ("auroc", {"probabilities": None}, "there are no probabilities"),
        ("ap50", {"reference_regions": None}, "no reference has boxes"),
        ("cider", {"references": ["left"]}, "references have 1.0 words on average"),
    ],
)
def test_why_a_metric_does_not_apply(metric: str, changes: dict[str, Any], why: str) -> None:
    assert why in str(scores.why_not(metric, answered(**changes)))


@pytest.mark.parametrize(
    ("metric", "cure"),
    [("iou", "no reference has boxes; choose another"), ("auroc", "set eval.answers: labels, or choose")],
)
def test_a_metric_that_does_not_apply_is_found_before_the_model_loads(
    settings: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    metric: str,
    cure: str,
) -> None:
    monkeypatch.setattr(Prepared, "network", None)
    with pytest.raises(BadInput) as caught:
        train.train(settings(f"eval.metric={metric}"))
    (problem,) = caught.value.problems
    assert problem.startswith(f"eval.metric: {metric} does not apply to the 6 questions of val: ")
    assert cure in problem
    file = tmp_path / "recipe.yaml"
    file.write_text(settings(f"eval.metric={metric}").dump(), encoding="utf-8")
    assert cli.main(["check", str(file), "--out", str(tmp_path / "audit")]) == 2
    assert problem in " ".join(capsys.readouterr().out.split())


def test_labels_may_be_written_otherwise_than_references(settings: Any) -> None:
    """A reference `yes` beside a label `yes.` is chosen among the labels, and so has a probability."""
    sets: dict[str, list[str]] = {}
    for _, answers, kind in TOPICS:
        sets[kind] = [*dict.fromkeys([*sets.get(kind, []), *(f"{answer}." for answer in answers)])]
    words = ["eval.metric=ece", "eval.answers=labels", f"data.labels={json.dumps(sets)}"]
    assert len(validation.Validation(prepare(settings(*words))).questions) == 6


def test_the_smallest_loss_is_the_best_and_is_compared_with_its_like_alone(
    settings: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(evaluation, "loss_of_part", lambda *_, **__: next(told))
    words = ["train.max_steps=6", "eval.metric=loss", "eval.final=null"]
    run = train.train(settings(*words))
    assert "step 4: val loss 1.0000, exact 0.0 % of 6 (prior " in capsys.readouterr().out
    best = checkpoint.best(run / "checkpoints")
    assert best == run / "checkpoints/step-000004"
    assert checkpoint.score(best) == (-1.0, -1.0)
    assert [row["loss"] for row in rows(run / "eval.jsonl")] == [3.0, 1.0, 2.0]
    assert slurm.look(run, {}).best == "val loss 1.0000 at step 4"

    def known(*changes: str) -> tuple[checkpoint.Score, int]:
        prepared = prepare(settings(*words, *changes))
        judged = validation.Validation(prepared).judged
        found = resumable(
            run / "checkpoints/step-000006", prepared.recipe, prepared.fingerprint(), accept_changes=True,
            judged=judged,
        )  # fmt: skip
        return found.best, found.stale

    same = known("checkpoint.every=1", "eval.patience=2", "eval.keep_best=true", "image.augment=endoscopy")
    assert known() == same == ((-1.0, -1.0), 1)
    for change in (
        "eval.metric=exact", "eval.questions=5", "eval.split=test", "eval.max_new_tokens=3",
        "prompt.system=Look!", "image.size=64", "loss.per=question",
    ):  # fmt: skip
        assert known(change) == (checkpoint.UNSCORED, 0), change


def test_of_equal_scores_that_of_the_smallest_loss_is_best(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(evaluation, "loss_of_part", lambda *_, **__: next(told))
    run = train.train(settings("train.max_steps=6", "eval.final=null"))
    assert len({row["exact"] for row in rows(run / "eval.jsonl")}) == 1
    assert checkpoint.best(run / "checkpoints") == run / "checkpoints/step-000004"
    assert slurm.look(run, {}).best == "val 0.0% at step 4"


def test_runs_of_other_seeds_are_judged_by_the_same_questions(settings: Any) -> None:
    asked = [
        validation.Validation(prepare(settings(f"train.seed={seed}"))).questions.examples for seed in (0, 1)
    ]
    assert ids(asked[0]) == ids(asked[1])
    assert len(asked[0]) == 6


def test_a_run_that_is_done_stays_so_where_a_start_is_refused(settings: Any) -> None:
    words = ["train.max_steps=2", "eval.every=null", "eval.final=null"]
    run = train.train(settings(*words))
    with pytest.raises(BadInput, match=r"train\.lr"):
        train.train(settings(*words, "train.lr=0.5"))
    assert json.loads((run / "ended.json").read_text(encoding="utf-8"))["name"] == "done"
    with pytest.raises(BadInput, match="no such"):
        train.train(settings(*words, f"output={run}2", "eval.final=test", "data.path=no such.jsonl"))
    assert json.loads((Path(f"{run}2") / "ended.json").read_text(encoding="utf-8"))["name"] == "bad input"


def test_scores_by_another_metric_are_not_compared(tmp_path: Path) -> None:
    def save(step: int, score: float | None, metric: str) -> None:
        with checkpoint.writing(tmp_path, step, keep=9) as folder:
            state = {"step": step, "score": score and (score, -1), "judged": {"metric": metric}}
            checkpoint.write_json(folder / checkpoint.STATE, state)

    save(1, 0.9, "exact")
    save(2, None, "loss")
    assert checkpoint.best(tmp_path) == tmp_path / "step-000001", "nothing is known by the new one yet"
    save(3, -4.0, "loss")
    save(4, -3.0, "loss")
    save(5, -3.5, "loss")
    assert checkpoint.best(tmp_path) == tmp_path / "step-000004"
    assert checkpoint.best(tmp_path, up_to=3) == tmp_path / "step-000003"
    assert checkpoint.best(tmp_path, up_to=2) == tmp_path / "step-000001"


# ---- stopping early -----------------------------------------------------------------------------------

EARLY = ["eval.patience=2", "eval.questions=3"]
WHY = "stopped early at step 6: no better exact for 2 evaluations"


def assert_stopped_early(run: Path) -> None:
    ended = json.loads((run / "ended.json").read_text(encoding="utf-8"))
    assert (ended["code"], ended["name"], ended["reason"]) == (0, "done", WHY)
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows(run / "eval.jsonl")] == [2, 4, 6]
    assert checkpoint.newest(run / "checkpoints") == (run / "checkpoints/step-000006", [])
    assert json.loads((run / "scores.json").read_text(encoding="utf-8"))["checkpoint"] == "step-000002"


def test_a_run_that_no_longer_gets_better_ends_early_for_good(
    settings: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train.train(settings(*EARLY))
    assert WHY in capsys.readouterr().out
    assert_stopped_early(run)
    (run / "scores.json").unlink()
    train.train(settings(*EARLY))
    assert_stopped_early(run)
    # Who waits longer goes on from there.
    train.train(settings("eval.patience=3", "eval.questions=3"))
    assert rows(run / "metrics.jsonl")[-1]["step"] == 8


@pytest.mark.parametrize("every", ["null", pytest.param("1", marks=pytest.mark.long)])
@pytest.mark.fault("F1")
def test_an_early_end_comes_at_the_same_step_after_a_kill(
    settings: Any, monkeypatch: pytest.MonkeyPatch, every: str
) -> None:
    step = Records.step

    def killed(self: Records, **row: Any) -> None:
        step(self, **row)
        if row["step"] == 5:
            raise KeyboardInterrupt

    words = [*EARLY, f"checkpoint.every={every}"]
    with monkeypatch.context() as patch:
        patch.setattr(Records, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            train.train(settings(*words))
    newest = checkpoint.newest(Path(settings().output) / "checkpoints")[0]
    assert newest is not None
    assert newest.name == {"null": "step-000002", "1": "step-000004"}[every]
    assert_stopped_early(train.train(settings(*words)))


# ---- TensorBoard --------------------------------------------------------------------------------------


def test_pictures_are_of_each_type_and_of_other_images_first() -> None:
    examples = asked_of(20, "abcdeZ")
    for seed in range(5):
        chosen = [examples[index] for index in pictures.choose(examples, 4, seed)]
        assert len({example.question_type for example in chosen}) == 4
        assert len({example.image_key for example in chosen}) == 4
        again = [examples[::-1][index] for index in pictures.choose(examples[::-1], 4, seed)]
        assert again == chosen
    assert len(pictures.choose(examples[:3], 4, 0)) == 3


@pytest.mark.parametrize("text", ["x" * 100_000, "a\n\x1b[31m\u202e\ud800 " * 99, "W" * 60, "", "öß 中文 🙂"])
def test_any_text_stands_below_a_picture(settings: Any, text: str) -> None:
    questions = prepare(settings()).questions("val")
    sheet = pictures.Sheet(questions, [0, 1])
    row = Prediction("1", "a", "", text, "where", [text], text)
    lines = sheet._lines(text)
    assert len(lines) <= pictures.LINES
    assert all(sheet.font.getlength(line) <= pictures.WIDTH + pictures.MARGIN for line in lines)
    drawn = sheet.draw([row, row])
    assert drawn.width == 2 * (pictures.WIDTH + 2 * pictures.MARGIN)
    assert drawn.height <= pictures.WIDTH + 3 * pictures.LINES * 2 * pictures.SIZE
    text_rows = np.asarray(drawn)[pictures.WIDTH + pictures.MARGIN :]
    assert (text_rows < 128).any(), "reference and answer are named at least"


def test_curves_and_pictures_are_in_tensorboard(tmp_path: Path) -> None:
    words = {
        "model": {"name": "tiny-qwen2-vl"},
        "data": {"format": "coco", "path": str(draw_data(tmp_path / "data", [(12, 8, 84, 56)]))},
        "image": {"size": 96},
        "batch": {"questions": 3, "questions_per_image": 3},
        "train": {"precision": "fp32", "max_steps": 2},
        "eval": {"every": 1.0, "split": "train", "final": None, "max_new_tokens": 2, "metric": "iou"},
        "output": str(tmp_path / "run"),
    }
    run = train.train(recipe.parse(json.dumps(words)))
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    told = rows(run / "eval.jsonl")
    assert [row["step"] for row in told] == [1, 2]
    assert {"loss", "exact", "prior", "iou", "ap50"} <= told[0].keys() - {"n", "boxes", "step", "split"}
    for name in told[0].keys() - {"n", "boxes", "step", "split"}:
        found = [(event.step, event.value) for event in board.Scalars(f"train-evaluated/{name}")]
        assert found == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in told]
    images = board.Images("train-evaluated/examples")
    assert [image.step for image in images] == [1, 2]
    sheet = np.asarray(Image.open(io.BytesIO(images[-1].encoded_image_string)).convert("RGB"))
    lime = (sheet == (0, 255, 0)).all(2)
    assert lime.sum() > 500, "the reference's box"
    assert sheet.shape[1] == 3 * (pictures.WIDTH + 2 * pictures.MARGIN)
