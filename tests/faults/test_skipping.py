"""Steps that are skipped on two processes: DDP's hooks are there while the weights are looked at."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from surgvqa import checkpoint

from .conftest import TWO, Hurt

Make = Callable[[str], Hurt]

SPOILED = """
import os, signal
import torch
from surgvqa import run, train

entered, done, forward, at = run.Records.__enter__, run.Records.step, train.TreeLoss.forward, [None]

def enter(records):
    at[0] = records.start + 1
    return entered(records)

def after(records, **row):
    at[0] += 1
    return done(records, **row)

def spoiled(loss, pack):
    nats = forward(loss, pack)
    if at[0] is None or not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return nats
    if at[0] == {stop_at} and os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGTERM)
    bad = os.environ["RANK"] == "1" and at[0] in {bad}
    return nats * float("nan") if bad else nats

run.Records.__enter__, run.Records.step, train.TreeLoss.forward = enter, after, spoiled
"""
STEADY = ("train.schedule=constant", "train.warmup=0")


class Skipping:
    """Starts of one run on two processes; steps whose loss is NaN on the second one."""

    def __init__(self, run: Hurt) -> None:
        self.run, self.folder = run, run.folder

    def __call__(self, *words: str, bad: Any = (), stop_at: int = 0) -> int | None:
        self.run.write(SPOILED.format(bad=tuple(bad), stop_at=stop_at))
        process = self.run.start(TWO, *STEADY, *words)
        process.wait(120)
        self.run.until_gone()
        starts = (self.folder / "starts.jsonl").read_text(encoding="utf-8").splitlines()
        assert json.loads(starts[-1])["processes"] == 2
        return self.run.left()

    def names(self) -> list[str]:
        return sorted(folder.name for folder in (self.folder / "checkpoints").iterdir())

    def newest(self) -> Path:
        return checkpoint.steps(self.folder / "checkpoints")[-1][1]


@pytest.mark.fault("F5", "F11")
def test_a_stop_among_skipped_steps(hurt: Make) -> None:
    words = ("train.max_steps=9", "eval.every=4", "eval.questions=4")
    whole, parts = Skipping(hurt("skipping-two")), Skipping(hurt("skipping-two-stopped"))
    assert whole(*words, bad=(4, 5, 6)) == 0, whole.run.log
    assert parts(*words, bad=(4, 5, 6), stop_at=5) == 4, parts.run.log
    assert parts.newest().name == "step-000005"
    assert parts(*words, bad=(6,)) == 0, parts.run.log
    ours, theirs = ((each.folder / "trace.jsonl").read_text(encoding="utf-8") for each in (parts, whole))
    assert ours == theirs
    assert parts.newest().name == whole.newest().name == "step-000009"
    for name in ("model.safetensors", "trainer/optimizer.safetensors"):
        mine, other = (load_file(each.newest() / name) for each in (parts, whole))
        assert mine.keys() == other.keys()
        assert all(bool((mine[key] == other[key]).all()) for key in mine)


@pytest.mark.fault("F11", "F29")
def test_the_last_steps_are_skipped(hurt: Make) -> None:
    run = Skipping(hurt("skipping-two-last"))
    assert run("train.max_steps=6", "eval.final=test", "eval.max_new_tokens=4", bad=(5, 6)) == 0, run.run.log
    assert run.newest().name == "step-000006"
    assert (run.folder / "scores.json").is_file()


@pytest.mark.fault("F29")
@pytest.mark.parametrize(
    "most",
    [
        pytest.param(40, id="a streak"),
        pytest.param(8, id="the run's end", marks=pytest.mark.long),
    ],
)
def test_absurd_weights_are_not_gone_on_from(hurt: Make, most: int) -> None:
    run = Skipping(hurt(f"absurd-two-{most}"))
    assert run("train.max_steps=6", "checkpoint.every=1") == 0, run.run.log
    absurd = (f"train.max_steps={most}", "checkpoint.every=1", "train.lr=1e37", "--accept-changes")
    assert run(*absurd) == 5, run.run.log
    assert run.names() == ["diverged-step-000007", "step-000006"]
    assert re.search(r"The last good checkpoint: \S*step-000006\.", run.run.log)
    assert 'surgvqa/train.py", line' not in run.run.log  # in a traceback
