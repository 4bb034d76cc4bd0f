"""Steps that are skipped, and weights that are the reason: what is saved, named and gone on from."""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from surgvqa import checkpoint, train
from trajectory.conftest import Runs, runs, trace

__all__ = ["runs"]

STEADY = ("train.schedule=constant", "train.warmup=0", "batch.tokens_per_micro_batch=100000")
"""A learning rate that the run's length does not change, and one micro-batch a step."""
ABSURD = ("train.lr=1e37", "--accept-changes")
"""An update of finite gradients after which no weight is of use."""


class Started:
    """Starts of one run; steps whose loss is NaN, and one after which the process is asked to stop."""

    def __init__(self, runs: Runs, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs, self.name, self.folder = runs, name, runs.folder / name
        self.patch = monkeypatch

    def __call__(
        self,
        *words: str,
        bad: set[int] = frozenset(),
        stop_at: int = 0,
        begin: int = 0,  # type: ignore
    ) -> int:
        """Return the exit code; `begin` is the step that this start goes on from."""
        step, forward, fit = itertools.count(begin + 1), train.TreeLoss.forward, train.memory.fit
        trying = False

        def fit_uncounted(*given: Any, **named: Any) -> Any:
            nonlocal trying
            trying = True
            found = fit(*given, **named)
            trying = False
            return found

        def spoiled(loss: Any, pack: Any) -> Any:
            if trying or not torch.is_grad_enabled():
                return forward(loss, pack)
            number = next(step)
            if number == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return forward(loss, pack) * (float("nan") if number in bad else 1.0)

        with self.patch.context() as patch:
            patch.setattr(train.memory, "fit", fit_uncounted)
            patch.setattr(train.TreeLoss, "forward", spoiled)
            return train.main([str(self.runs.recipe), *self.runs._words(self.name), *STEADY, *words])

    def checkpoints(self) -> list[str]:
        return sorted(folder.name for folder in (self.folder / "checkpoints").iterdir())

    def state(self, step: int) -> dict[str, Any]:
        file = self.folder / "checkpoints" / checkpoint.folder_name(step) / checkpoint.STATE
        return dict(json.loads(file.read_text(encoding="utf-8")))

    def lines(self, record: str) -> list[str]:
        return (self.folder / record).read_text(encoding="utf-8").splitlines()


Start = Callable[[str], Started]


@pytest.fixture
def start(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> Start:
    return lambda name: Started(runs, name, monkeypatch)


@pytest.mark.parametrize(("every", "aside"), [(2, []), (1, ["diverged-step-000007"])])
@pytest.mark.fault("F29")
def test_the_last_good_checkpoint_survives_is_named_and_gone_on_from(
    start: Start, caplog: pytest.LogCaptureFixture, every: int, aside: list[str]
) -> None:
    """The update of step 7 is absurd: with a checkpoint at every step its own is there, and is renamed."""
    run, saves = start(f"absurd-{every}"), f"checkpoint.every={every}"
    assert run("train.max_steps=6", saves) == 0
    kept = [f"step-{6 - every:06d}", "step-000006"]
    with caplog.at_level(logging.WARNING, "surgvqa"):
        assert run("train.max_steps=40", saves, *ABSURD) == 5
    assert "10 steps in a row without finite gradients, the last at step 17" in caplog.text
    assert f"The last good checkpoint: {run.folder / 'checkpoints' / 'step-000006'}." in caplog.text
    assert run.checkpoints() == [*aside, *kept[-2 if every == 2 else -1 :]]
    for name in run.checkpoints()[len(aside) :]:
        weights = load_file(run.folder / "checkpoints" / name / "model.safetensors")
        assert max(float(value.abs().max()) for value in weights.values()) < 100

    assert run("train.max_steps=10", saves, "--accept-changes") == 0
    assert run.checkpoints()[-1] == "step-000010"
    assert not any(name.startswith("diverged") for name in run.checkpoints()), "training got past it"
    undisturbed = start("undisturbed")
    assert undisturbed("train.max_steps=10") == 0
    assert trace(run.folder) == trace(undisturbed.folder)


@pytest.mark.fault("F29")
def test_a_stop_or_an_end_with_absurd_weights_saves_none(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    run = start("absurd-stopped")
    assert run("train.max_steps=6") == 0
    assert run("train.max_steps=40", *ABSURD, begin=6, stop_at=9) == 4
    assert run.checkpoints() == ["step-000006"]
    with caplog.at_level(logging.WARNING, "surgvqa"):
        assert run("train.max_steps=9", *ABSURD) == 5
    assert "2 steps in a row without finite gradients, the last at step 9" in caplog.text
    assert "step-000006. Look" in caplog.text
    assert run.checkpoints() == ["step-000006"]


@pytest.mark.fault("F11", "F29")
def test_a_stop_among_skipped_steps_saves_weights_that_are_sound(start: Start) -> None:
    """Questions, not weights, are to blame: the run goes on as if it had never stopped."""
    words = ("train.max_steps=8", "checkpoint.every=2", "eval.every=4", "eval.questions=4")
    whole = start("skipping")
    assert whole(*words, bad={4, 5, 6}) == 0
    assert whole.checkpoints() == ["step-000007", "step-000008"]
    assert [json.loads(row)["step"] for row in whole.lines("eval.jsonl")] == [7, 8], (
        "what was due at 4 follows"
    )

    parts = start("skipping-stopped")
    assert parts(*words, bad={4, 5, 6}, stop_at=5) == 4
    assert parts.checkpoints()[-1] == "step-000005"
    assert (parts.state(5)["skipped"], parts.state(5)["settled"]) == (2, False)
    assert parts(*words, bad={6}, begin=5, stop_at=7) == 4
    assert parts.checkpoints()[-1] == "step-000007"
    assert parts(*words, begin=7) == 0
    assert parts.lines("trace.jsonl") == whole.lines("trace.jsonl")
    assert parts.lines("eval.jsonl") == whole.lines("eval.jsonl")


@pytest.mark.fault("F11")
def test_the_last_steps_are_skipped_and_the_weights_are_sound(start: Start) -> None:
    run = start("skipped-last")
    assert run("train.max_steps=6", bad={5, 6}) == 0
    assert run.checkpoints() == ["step-000006"]
    assert run.state(6)["skipped"] == 2


@pytest.mark.fault("F29")
def test_weights_that_are_no_numbers_are_not_saved(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, update = start("no-numbers"), torch.optim.AdamW.step
    updates = itertools.count(1)

    def overflow(optimizer: Any, *given: Any) -> Any:
        found = update(optimizer, *given)
        if next(updates) == 4:
            optimizer.param_groups[0]["params"][-1].data.view(-1)[0] = float("inf")
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    with caplog.at_level(logging.WARNING, "surgvqa"):
        assert run("train.max_steps=8", "checkpoint.every=2") == 5
    assert "step 4: weights became NaN or infinite. The last good checkpoint: " in caplog.text
    assert run.checkpoints() == ["step-000002"]
    ended = json.loads((Path(run.folder) / "ended.json").read_text(encoding="utf-8"))
    assert (ended["code"], ended["name"]) == (5, "numeric")
