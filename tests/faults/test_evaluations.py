"""Evaluations that are killed or told to stop half-way, on two processes, and go on, on two or one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from trajectory.conftest import ROOT, Runs

from surgvqa import results
from surgvqa.evaluation import evaluate

from .conftest import TWO, Hurt

SLOWLY = """
import sys, time
from surgvqa import evaluation

answers, evaluation._TREES_AT_ONCE = evaluation.answers_of, 1
evaluation.answers_of = lambda *given: (time.sleep(0.3), answers(*given))[1]
sys.exit(evaluation.main())
"""


class Evaluated(Hurt):
    """An evaluation of a run's train part, slow enough to be hurt."""

    def __init__(self, runs: Runs, run: Path) -> None:
        super().__init__(runs, "evaluated")
        self.run, self.part = run, run / "predictions.train.jsonl.partial"
        self.script.write_text(SLOWLY, encoding="utf-8")

    def begin(self, *program: str) -> subprocess.Popen[str]:
        self.code.unlink(missing_ok=True)
        with (self.runs.folder / "evaluated.log").open("w", encoding="utf-8") as log:
            variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "SURGVQA_EXIT_FILE": str(self.code)}
            process = subprocess.Popen(
                [sys.executable, *program, str(self.run), "--split", "train"],
                cwd=ROOT, env={**os.environ, **variables}, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True, text=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    def kept(self) -> int:
        return len(results.rows(self.part))


@pytest.mark.long
@pytest.mark.fault("F26")
def test_an_evaluation_goes_on_after_any_end_on_any_number_of_processes(runs: Runs) -> None:
    run = runs.here("to-evaluate", "train.max_steps=2", "eval.max_new_tokens=4")
    evaluate(run, "train")
    file = run / "predictions.train.jsonl"
    expected = file.read_bytes()
    file.unlink()
    hurt, known = Evaluated(runs, run), 0
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = hurt.begin(*TWO, str(hurt.script))
        # Each tells after as many trees as there are processes.
        hurt.until(lambda known=known: hurt.kept() > known)  # type: ignore[misc]  # bound at once
        assert len(hurt.ranks()) == 2
        if number == signal.SIGKILL:
            hurt.kill(number)
        else:
            process.terminate()  # the launcher, which passes it on
        assert process.wait(60) != 0
        hurt.until_gone()
        assert hurt.left() == (None if number == signal.SIGKILL else 4), hurt.log
        assert (f"going on after {known} of " in hurt.log) == bool(known)
        known = hurt.kept()
        assert not file.exists()
    process = hurt.begin("-m", "surgvqa.evaluate")
    assert process.wait(120) == 0, hurt.log
    assert f"going on after {known} of " in hurt.log
    assert file.read_bytes() == expected
    assert not hurt.part.exists()


@pytest.mark.fault("F24")
def test_two_processes_answer_as_one(runs: Runs) -> None:
    run = runs.here("to-evaluate-alike", "train.max_steps=1", "eval.max_new_tokens=4")
    evaluate(run, "train")
    files = run / "predictions.train.jsonl", run / "scores.train.json"
    expected, scores = files[0].read_bytes(), results.json_of(files[1])
    for file in files:
        file.unlink()
    config = str(ROOT / "accelerate_configs" / "2cpu.yaml")
    hurt = Evaluated(runs, run)
    process = hurt.begin(
        "-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0",
        str(hurt.script),
    )  # fmt: skip
    ranks = 0
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
        ranks = max(ranks, len(hurt.ranks()))
        time.sleep(0.05)
    assert (process.wait(1), ranks) == (0, 2), hurt.log
    assert files[0].read_bytes() == expected
    found = results.json_of(files[1])
    assert (scores.pop("environment")["processes"], found.pop("environment")["processes"]) == (1, 2)
    assert found == scores


@pytest.mark.fault("F13")
def test_a_process_of_an_evaluation_is_gone(runs: Runs) -> None:
    """The other one says which, leaves the code for it, and what was answered is kept."""
    hurt = Evaluated(runs, runs.here("to-evaluate-lost", "train.max_steps=1", "eval.max_new_tokens=4"))
    process = hurt.begin(*TWO, str(hurt.script))
    hurt.until(lambda: hurt.kept() > 0)
    victim = hurt.ranks()[1]
    os.kill(victim, signal.SIGKILL)
    assert process.wait(60) != 0
    hurt.until_gone()
    assert hurt.left() == 6, hurt.log
    assert f"process 1 (pid {victim} on" in hurt.log
    assert hurt.kept() > 0
