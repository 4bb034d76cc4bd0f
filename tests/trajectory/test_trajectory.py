"""One loss curve: whatever the processes, the micro-batches, trees or rows, killed or not."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOPICS

from surgvqa import recipe, train
from surgvqa import run as runs_folder

from .conftest import ROOT, Runs, trace

TWO_CPU = str(ROOT / "accelerate_configs" / "2cpu.yaml")


def assert_same_curve(run: Path, reference: Path, rel: float = 1e-5) -> None:
    ours, theirs = trace(run), trace(reference)
    assert len(ours) == len(theirs) == 20
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["step"] == other["step"]
        assert mine["ids"] == other["ids"]
        assert mine["tokens"] == other["tokens"]
        assert mine["loss"] == pytest.approx(other["loss"], rel=rel)


def test_the_reference_learns_from_every_question_once_per_epoch(runs: Runs, reference: Path) -> None:
    rows = trace(reference)
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    ids = [
        row["id"]
        for row in map(json.loads, runs.data.read_text(encoding="utf-8").splitlines())
        if row["split"] == "train"
    ]
    steps = -(-len(ids) // 12)
    for epoch in range(20 // steps):
        seen = [question for row in rows[epoch * steps : (epoch + 1) * steps] for question in row["ids"]]
        assert Counter(seen) == Counter(ids)


@pytest.mark.parametrize(
    "change",
    [
        ["batch.tokens_per_micro_batch=90"],
        ["batch.tokens_per_micro_batch=100000"],
        ["batch.tokens_per_micro_batch=auto"],
        ["batch.trees=false"],
        ["batch.trees=false", "batch.tokens_per_micro_batch=90"],
        ["train.checkpoint_layers=all"],
        ["train.checkpoint_layers=2"],
        pytest.param(["train.compile=true", "eval.every=5", "eval.questions=4"], marks=pytest.mark.long),
        ["data.workers=2"],
    ],
    ids=" ".join,
)
@pytest.mark.fault("F25")
def test_the_curve_does_not_depend_on(runs: Runs, reference: Path, change: list[str]) -> None:
    assert_same_curve(runs.here("-".join(change).replace("/", "_"), *change), reference)


@pytest.mark.parametrize(
    "launcher",
    [
        ["accelerate.commands.launch", "--config_file", TWO_CPU],
        pytest.param(
            ["torch.distributed.run", "--nproc-per-node", "2", "--standalone"], marks=pytest.mark.long
        ),
    ],
    ids=["accelerate", "torchrun"],
)
@pytest.mark.fault("F25")
def test_two_processes_give_the_curve_of_one(runs: Runs, reference: Path, launcher: list[str]) -> None:
    done = runs.launched(launcher[0], launcher, "batch.tokens_per_micro_batch=200", "eval.final=test")
    assert done.returncode == 0, done.stderr
    assert "distributed, 2 processes, gloo" in done.stdout
    assert done.stdout.count("steps       ") == 1  # the banner comes once
    assert_same_curve(runs.folder / launcher[0], reference)


OUT_OF_MEMORY_ON_RANK_1 = """
import os, sys
import torch
from surgvqa import loss, train

forward = loss.TreeLoss.forward

def limited(self, pack):
    nats = forward(self, pack)
    if os.environ["RANK"] == "1" and pack.tokens > 80:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return nats

loss.TreeLoss.forward = limited
sys.exit(train.main())
"""


@pytest.mark.fault("F14")
def test_out_of_memory_on_one_process_makes_all_take_less(runs: Runs, reference: Path) -> None:
    launcher = ["accelerate.commands.launch", "--config_file", TWO_CPU]
    done = runs.launched("oom", launcher, "train.checkpoint_layers=auto", script=OUT_OF_MEMORY_ON_RANK_1)
    assert done.returncode == 0, done.stderr
    assert "distributed, 2 processes, gloo" in done.stdout
    assert "600 tokens do not fit into memory; going on with 75" in done.stderr
    assert "of up to 75 tokens per process" in done.stdout
    assert_same_curve(runs.folder / "oom", reference)


@pytest.mark.fault("F24")
def test_the_answers_do_not_depend_on_processes(runs: Runs) -> None:
    # The first evaluation, and so the first best, comes with the last step.
    changes = ["train.max_steps=3", "eval.final=test", "eval.every=100"]
    alone = runs.here("alone", *changes)
    done = runs.launched(
        "together",
        ["accelerate.commands.launch", "--config_file", TWO_CPU],
        *changes,
        "batch.tokens_per_micro_batch=200",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    together = runs.folder / "together"
    assert (together / "predictions.jsonl").read_text() == (alone / "predictions.jsonl").read_text()
    found = [json.loads((run / "scores.json").read_text()) for run in (alone, together)]
    assert [scores.pop("environment")["processes"] for scores in found] == [1, 2]
    for scores in found:
        del scores["manifest"]  # of weights that were trained apart
    assert found[0] == found[1]


@pytest.mark.fault("F24")
def test_label_probabilities_and_the_validation_loss_do_not_depend_on_processes(runs: Runs) -> None:
    sets: dict[str, list[str]] = {}
    for _, answers, kind in TOPICS:
        sets[kind] = [*dict.fromkeys([*sets.get(kind, []), *answers])]
    changes = [
        "train.max_steps=1",
        "train.lr=1e-9",  # AdamW's first step would make much of gradients that are little but rounding
        "eval.final=test",
        "eval.answers=labels",
        "eval.every=9",
        "eval.metric=loss",
        f"data.labels={json.dumps(sets)}",
    ]
    found, judged = [], []
    alone = runs.here("labels-alone", *changes)
    done = runs.launched(
        "labels-together",
        ["accelerate.commands.launch", "--config_file", TWO_CPU],
        *changes,
        "batch.tokens_per_micro_batch=200",
    )
    assert done.returncode == 0, done.stderr
    for run in (alone, runs.folder / "labels-together"):
        rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
        nats = [{label: math.log(p) for label, p in row["probabilities"].items()} for row in rows]
        found.append({row["id"]: each for row, each in zip(rows, nats, strict=True)})
        (row,) = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
        assert row.pop("split") == "val"
        judged.append(row)
    alone_judged, together_judged = judged
    assert together_judged == pytest.approx(alone_judged, rel=1e-5)
    assert together_judged["loss"] == pytest.approx(alone_judged["loss"], rel=1e-6)
    assert found[0].keys() == found[1].keys()
    for question, nats_of_labels in found[0].items():
        assert found[1][question] == pytest.approx(nats_of_labels, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("tune", ["full", "lora"])
@pytest.mark.parametrize("vision", ["true", "false"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.fault("F3", "F26")
def test_a_stopped_run_goes_on_bit_for_bit(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, tune: str, vision: str, precision: str
) -> None:
    """Dropout on, adapters and whole modules, evaluation in between."""
    name = f"{tune}-{vision}-{precision}"
    changes = [
        f"train.precision={precision}",
        f"model.tune={tune}", f"model.train_vision={vision}", f"model.train_merger={vision}",
        *(["model.lora.dropout=0.1"] if tune == "lora" else []),
        "train.max_steps=9", "checkpoint.every=3", "eval.every=4", "eval.questions=3", "eval.keep_best=false",
    ]  # fmt: skip
    whole = trace(runs.here(f"whole-{name}", *changes))
    step = runs_folder.Records.step

    def stop_at_8(self: object, **row: object) -> None:
        step(self, **row)
        if row["step"] == 8:
            raise RuntimeError("as if killed")

    with monkeypatch.context() as patch:
        patch.setattr(runs_folder.Records, "step", stop_at_8)
        with pytest.raises(RuntimeError, match="as if killed"):
            train.main([str(runs.recipe), *runs._words(f"stopped-{name}", *changes)])
    stopped = runs.here(f"stopped-{name}", *changes)
    assert trace(stopped) == whole
    assert [json.loads(line)["step"] for line in (stopped / "metrics.jsonl").open()] == list(range(1, 10))


def test_what_fitted_before_is_taken_again(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others on the GPU come and go; in what portions a step is summed decides the last bits."""
    from surgvqa.loss import TreeLoss

    most = [80]
    forward, step = TreeLoss.forward, runs_folder.Records.step

    def limited(self: TreeLoss, pack: Any) -> Any:
        if pack.tokens > most[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, pack)

    def stop_at_4(self: object, **row: object) -> None:
        step(self, **row)
        if row["step"] == 4:
            raise RuntimeError("as if killed")

    monkeypatch.setattr(TreeLoss, "forward", limited)
    changes = ["train.max_steps=6", "checkpoint.every=3", "batch.tokens_per_micro_batch=auto"]
    whole = trace(runs.here("crowded", *changes))
    with monkeypatch.context() as patch:
        patch.setattr(runs_folder.Records, "step", stop_at_4)
        with pytest.raises(RuntimeError, match="as if killed"):
            runs.here("less-crowded", *changes)
    most[0] = 10**6
    assert trace(runs.here("less-crowded", *changes)) == whole
    assert trace(runs.here("not-crowded", *changes)) != whole


@pytest.mark.fault("F18", "F19")
def test_a_changed_recipe_or_changed_data_is_refused(runs: Runs) -> None:
    run = runs.here("changed", "train.max_steps=2")
    with pytest.raises(train.BadInput) as caught:
        runs.here("changed", "train.max_steps=2", "train.lr=2e-3", "batch.questions=6")
    assert [line.strip() for line in caught.value.problems[1:]] == [
        "batch.questions: 12 → 6",
        "train.lr: 0.001 → 0.002",
    ]
    original = runs.data.read_text(encoding="utf-8")
    try:
        runs.data.write_text(original.replace('"grasper"', '"hook"'), encoding="utf-8")
        with pytest.raises(train.BadInput, match="the training data: the texts of questions or answers"):
            runs.here("changed", "train.max_steps=2")
    finally:
        runs.data.write_text(original, encoding="utf-8")
    assert runs.here("changed", "train.max_steps=2", "log.trace=false") == run
    for change in ("model.train_merger=false", "model.tune=lora"):
        words = runs._words("changed", "train.max_steps=2", "train.lr=2e-3", change)
        with pytest.raises(train.BadInput, match=r"--accept-changes does not help") as caught:
            train.train(recipe.load(runs.recipe, words), accept_changes=True)
        assert change.partition("=")[0] in str(caught.value)
    assert not (run / "changes.jsonl").exists()


def test_class_weights_and_question_loss_are_what_they_say(runs: Runs) -> None:
    """The first loss, worked out from the untrained model's own nats."""
    import torch

    from surgvqa import model, prepare
    from surgvqa import recipe as recipes
    from surgvqa.loss import TreeLoss

    changes = ["loss.per=question", "loss.class_weights=inverse", "train.max_steps=1"]
    first = trace(runs.here("weighted", *changes))[0]
    settings = recipes.load(runs.recipe, runs._words("weighted", *changes))
    prepared = prepare.prepare(settings)
    questions = prepared.questions("train")
    number = {example.id: index for index, example in enumerate(questions.examples)}
    network = TreeLoss(model.build(prepared.folder, seed=settings.train.seed), attn="sdpa", autocast=None)
    weights = prepared.answer_weights()
    assert len({round(weight, 6) for weight in weights.values()}) > 2
    total = mean = 0.0
    with torch.no_grad():
        for name in first["ids"]:
            pack = questions.pack([[number[name]]])
            answer = questions.examples[number[name]].answers[0]
            weight = weights["red; white" if answer == "red; white" else answer]
            pack.weights.fill_(1.0)
            total += weight * network(pack).item() / len(pack.targets)
            mean += weight
    assert first["loss"] == pytest.approx(total / mean, rel=1e-5)


@pytest.mark.parametrize(("bad", "code"), [({4}, 0), (set(range(3, 40)), 5)], ids=["one step", "for good"])
@pytest.mark.fault("F11")
def test_gradients_that_are_not_finite_update_nothing(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, bad: set[int], code: int
) -> None:
    import logging

    from surgvqa.loss import TreeLoss

    calls = itertools.count(1)
    fit = train.memory.fit

    def fit_uncounted(*given: Any, **named: Any) -> Any:
        nonlocal calls
        found = fit(*given, **named)
        calls = itertools.count(1)
        return found

    monkeypatch.setattr(train.memory, "fit", fit_uncounted)

    class Spoiled(TreeLoss):
        """One micro-batch is one step here: some come out as NaN."""

        def forward(self, pack: Any) -> Any:
            return super().forward(pack) * (float("nan") if next(calls) in bad else 1.0)

    monkeypatch.setattr(train, "TreeLoss", Spoiled)
    name = f"spoiled-{code}"
    run = runs.folder / name
    words = runs._words(
        name, "batch.tokens_per_micro_batch=100000", "checkpoint.every=1", "checkpoint.keep=30"
    )
    with caplog.at_level(logging.WARNING, "surgvqa"):
        assert train.main([str(runs.recipe), *words]) == code
    ids = {row["step"]: row["ids"] for row in map(json.loads, (run / "trace.jsonl").open())}
    for row in map(json.loads, (run / "metrics.jsonl").open()):
        step = row["step"]
        assert (row["loss"] is None) == (step in bad)
        said = f"step {step}: gradients not finite, no update; questions {', '.join(ids[step])}"
        assert (said in caplog.text) == (step in bad)
        saved = run / f"checkpoints/step-{step:06d}"
        assert saved.exists() == (step not in bad), "nothing is saved while steps are skipped"
    last, after = (run / f"checkpoints/step-{step:06d}/model.safetensors" for step in (2, 3))
    assert code or last.read_bytes() != after.read_bytes()
    if code:
        assert max(ids) == 12
        assert "10 steps in a row without finite gradients, the last at step 12" in caplog.text
        assert f"The last good checkpoint: {run / 'checkpoints' / 'step-000002'}." in caplog.text
