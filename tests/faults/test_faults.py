"""Killed, asked to stop, out of disk, left alone: the run goes on or says why not, and nothing is lost."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from surgvqa import checkpoint

from .conftest import ONE, TWO, Hurt

Make = Callable[..., Hurt]


def ended(run: Hurt) -> dict[str, object]:
    return dict(json.loads((run.folder / "ended.json").read_text(encoding="utf-8")))


@pytest.mark.fault("F1", "F3")
def test_killed_at_any_moment(hurt: Make, reference: Path) -> None:
    """F1, F3: SIGKILL of the whole group at seeded moments, the start included."""
    run, moments = hurt("killed"), random.Random(7)
    for _ in range(3):
        process = run.start(ONE)
        before = run.steps()
        run.until(lambda before=before: run.steps() > before or run.steps() >= 18)  # type: ignore[misc]
        time.sleep(moments.uniform(0, 0.9))
        run.kill(signal.SIGKILL)
        process.wait()
    run.finish(ONE)
    run.assert_curve(reference)
    assert ended(run)["name"] == "done"


@pytest.mark.parametrize(
    ("launcher", "whom", "number"),
    [
        (ONE, "rank 0", signal.SIGINT),
        pytest.param(TWO, "rank 1", signal.SIGUSR1, marks=pytest.mark.long),
        (TWO, "all", signal.SIGTERM),
        pytest.param(TWO, "launcher", signal.SIGTERM, marks=pytest.mark.long),
        pytest.param(TWO, "launcher", signal.SIGUSR1, marks=pytest.mark.long),
    ],
    ids=["alone, Ctrl-C", "one rank, USR1", "all, TERM", "launcher, TERM", "launcher, USR1"],
)
@pytest.mark.fault("F5")
def test_asked_to_stop(
    hurt: Make, reference: Path, reference_of_two: Path, launcher: list[str], whom: str, number: int
) -> None:
    """F5: one checkpoint at one step, the code for it, nobody left behind, the curve goes on bit for bit."""
    run = hurt(f"asked-{len(launcher)}-{whom}-{number}".replace(" ", ""))
    process = run.start(launcher)
    run.until(lambda: run.steps() >= 4)
    if whom == "all":
        run.kill(number)
    else:
        ranks = [process.pid] if launcher == ONE else run.ranks()
        os.kill({"launcher": process.pid, "rank 0": ranks[0], "rank 1": ranks[-1]}[whom], number)
    process.wait(60)
    run.until_gone()
    assert run.left() == 4, run.log
    assert ended(run)["name"] == "preempted"
    newest = max((run.folder / "checkpoints").iterdir())
    state = json.loads((newest / checkpoint.STATE).read_text(encoding="utf-8"))
    assert state["step"] == run.steps() < 20
    assert f"stopped after step {state['step']}" in run.log
    run.finish(launcher)
    run.assert_curve(reference if launcher == ONE else reference_of_two)


@pytest.mark.fault("F5")
def test_a_second_signal_ends_it_at_once(hurt: Make) -> None:
    """In the middle of a step that takes long; of two at once the second is none."""
    run = hurt("twice", pause=60)
    process = run.start(ONE)
    run.until(lambda: run.steps() >= 1)
    for _ in range(2):
        os.kill(process.pid, signal.SIGTERM)
    run.until(lambda: "SIGTERM: stopping and saving; the same again ends it now" in run.log)
    time.sleep(3.5)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(5) == -signal.SIGTERM
    assert run.left() is None


@pytest.mark.fault("F5")
def test_time_is_up(hurt: Make, reference: Path) -> None:
    """train.max_hours saves and stops by itself, as often as it takes."""
    run = hurt("hours")
    starts = 0
    while True:
        process = run.start(ONE, "train.max_hours=0.0025")  # 9 seconds, imports not counted
        starts += 1
        if process.wait(240) == 0:
            break
        assert process.returncode == 4, run.log
        assert "train.max_hours is over" in run.log
        assert starts < 12
    run.assert_curve(reference)


@pytest.mark.fault("F4")
def test_the_number_of_processes_may_change(hurt: Make, reference: Path) -> None:
    """F4: 1, 2, and 1 again, stopped in between in the middle of an epoch."""
    run = hurt("worlds")
    for launcher, until in ((ONE, 5), (TWO, 11)):
        process = run.start(launcher)
        run.until(lambda until=until: run.steps() >= until)  # type: ignore[misc]
        run.kill(signal.SIGTERM)
        process.wait(60)
    run.finish(ONE)
    run.assert_curve(reference, rel=1e-5)


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.long)], ids=lambda how: how.name
)
@pytest.mark.fault("F13")
def test_a_process_that_is_gone_or_stuck(hurt: Make, reference: Path, how: signal.Signals) -> None:
    """F13: the other one ends within the timeout, and says which it was."""
    run = hurt(f"peer-{how.name}", pause=0.3)
    process = run.start(TWO, "train.peer_timeout=8")
    run.until(lambda: run.steps() >= 10)  # seconds after the first one, so that it has told of some
    victim = run.ranks()[1]
    lost = f"process 1 (pid {victim} on"
    began = time.monotonic()
    os.kill(victim, how)
    try:
        run.until(lambda: process.poll() is not None or (run.left() is not None and lost in run.log), 60)
    finally:
        took = time.monotonic() - began
        run.kill(signal.SIGKILL)
        process.wait()
    assert took < 8 + 10, run.log
    assert run.left() == 6, run.log
    assert ended(run)["name"] == "peer lost"
    assert lost in run.log
    assert "the last step it finished was" in run.log
    run.finish(TWO)
    run.assert_curve(reference, rel=1e-5)


@pytest.mark.fault("F8")
def test_a_full_disk(hurt: Make, reference: Path) -> None:
    """F8: files may not grow beyond 100 kB; the run ends with the code for it, and goes on once they may."""
    run = hurt("full")
    small = 100_000
    process = run.start(ONE, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (small, small)))
    assert process.wait(240) == 3, run.log
    assert run.left() == 3
    assert "the checkpoint could not be written" in run.log
    assert str(run.folder / "checkpoints" / "step-000003") in run.log
    assert "bytes of it were" in run.log
    assert ended(run)["name"] == "storage"
    assert "Traceback" not in run.log
    run.finish(ONE)
    run.assert_curve(reference)


@pytest.mark.fault("F20")
def test_two_runs_in_one_folder(hurt: Make, reference: Path) -> None:
    """F20: the second names the owner and leaves; a lock whose owner was killed is taken over."""
    run = hurt("owner")
    first = run.start(ONE)
    run.until(lambda: run.steps() >= 2)
    os.kill(first.pid, signal.SIGSTOP)  # alive, and not finished before the second looks
    second = run.start(ONE)
    assert second.wait(120) == 2
    assert f"belongs to a run that is going on: process {first.pid} on" in run.log
    assert run.left() == 2
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert (run.folder / ".lock").exists()
    run.finish(ONE)
    run.assert_curve(reference)


@pytest.mark.fault("F19")
def test_a_change_is_refused_or_accepted_and_recorded(hurt: Make) -> None:
    """F19."""
    run = hurt("accepted")
    process = run.start(ONE)
    run.until(lambda: run.steps() >= 4)
    os.kill(process.pid, signal.SIGTERM)
    process.wait(60)
    done = run.steps()
    assert run.start(ONE, "train.lr=5e-4").wait(120) == 2
    assert "train.lr: 0.001 → 0.0005" in run.log
    assert "--accept-changes" in run.log
    assert run.start(ONE, "train.lr=5e-4", "--accept-changes").wait(240) == 0
    (change,) = [json.loads(line) for line in (run.folder / "changes.jsonl").open(encoding="utf-8")]
    assert change == {"after_step": done, "changes": ["train.lr: 0.001 → 0.0005"]}
