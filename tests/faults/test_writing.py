"""Checkpoints hurt in writing: killed at each call, too slow, without room, among foreign ones."""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trajectory.conftest import Runs

from surgvqa import checkpoint, memory, model, slurm
from surgvqa.run import Records

from .conftest import ONE, TWO, Hurt
from .moments import killed

Make = Callable[[str], Hurt]

EVERY_CALL = bool(os.environ.get("SURGVQA_EVERY_CALL"))
"""Have training killed before every call, as `make test-faults` does, not only at the moments that differ."""


def saved(root: Path, step: int, keep: int = 2) -> None:
    with checkpoint.writing(root, step, keep=keep) as folder:
        (folder / "weights").write_bytes(os.urandom(500))
        checkpoint.write_json(folder / checkpoint.STATE, {"step": step, "score": None})


def names(root: Path) -> list[str]:
    return sorted(folder.name for folder in root.iterdir())


@pytest.mark.fault("F2")
@pytest.mark.parametrize(
    ("before", "step", "after"),
    [
        ([], 3, [3]),
        ([3, 6], 9, [6, 9]),
        ([3], 3, [3]),
        ([3, 6, 9], 5, [3, 5]),
    ],
    ids=["the first", "one more", "the same step again", "after falling back"],
)
def test_killed_before_each_call(tmp_path: Path, before: list[int], step: int, after: list[int]) -> None:
    """F2: some checkpoint is whole as soon as one was, and the next save tidies up."""
    for call in itertools.count():
        root = tmp_path / str(call)
        root.mkdir()
        for each in before:
            saved(root, each, keep=9)
        was_killed = killed(call, root, lambda root=root: saved(root, step))  # type: ignore[misc]
        checkpoint.remove_leftovers(root)
        newest, rejected = checkpoint.newest(root)
        assert rejected == []
        assert newest is not None or not before, call
        assert not [name for name in names(root) if name.startswith(".")]
        saved(root, step)
        assert names(root) == [checkpoint.folder_name(each) for each in after]
        if not was_killed:
            break
        shutil.rmtree(root)
    assert call > 12


MOMENTS = (
    "os.mkdir .tmp-step-",
    "open .state.json.tmp",
    "open .manifest.json.tmp",
    "os.rename .manifest.json.tmp",
    "os.rename .tmp-step-",
    "open checkpoints",
    "os.rename step-",
    "os.remove model.safetensors",
    "os.rmdir",
)
"""Before the first and the last file, the manifest, the rename, its fsync; then as old ones are deleted."""

KILLED = """
import itertools, sys
sys.path.insert(0, {here!r})
from pathlib import Path
from moments import killed
from surgvqa import checkpoint, train

moments, root, had = {moments}, Path({root!r}), 0
for moment in moments:
    if not killed(moment, root, lambda: train.main(sys.argv[1:])):
        break
    newest, rejected = checkpoint.newest(root)
    step = int(newest.name[5:]) if newest else 0
    assert step >= had and not rejected, (moment, had, newest, rejected)
    had = step
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.fault("F2")
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("every_call", [False, *([True] if EVERY_CALL else [])])
def test_killed_while_it_writes(hurt: Make, reference: Path, runs: Runs, every_call: bool) -> None:
    """F2: killed at each of these moments in turn, each time by the same command again."""
    run = hurt(f"writing-{every_call}")
    words = ["checkpoint.every=1"]
    if every_call:
        words.append("train.max_steps=100")
        undisturbed = hurt("undisturbed-100")
        undisturbed.finish(ONE, *words)
        reference = undisturbed.folder
    moments = f"itertools.chain({MOMENTS}, itertools.count())" if every_call else repr(MOMENTS)
    root = str(run.folder / "checkpoints")
    here = str(Path(__file__).parent)
    run.script.write_text(KILLED.format(here=here, moments=moments, root=root), encoding="utf-8")
    process = run.start(ONE, *words)
    assert process.wait(1800 if every_call else 240) == 0, run.log
    assert run.left() == 0, run.log
    lines = [line for line in run.log.splitlines() if line.startswith("killed before")]
    for line, moment in zip(lines, MOMENTS, strict=not every_call):
        assert line.startswith(f"killed before {moment}")
    assert len(lines) > 50 or not every_call
    run.assert_curve(reference, steps=100 if every_call else 20)
    assert len(names(run.folder / "checkpoints")) == 2


def slowly_written(run: Hurt, seconds: float, first: float) -> None:
    """A run each of whose checkpoints takes so long to write, the first `first` seconds."""
    run.write(f"""
from surgvqa import hub

write = hub.write_processor

def slow(files, target):
    time.sleep({seconds} if any(target.parent.glob("step-*")) else {first})
    write(files, target)

hub.write_processor = slow
""")


@pytest.mark.long
@pytest.mark.fault("F5")
@pytest.mark.parametrize("launcher", [ONE, TWO], ids=["one process", "two"])
def test_asked_to_stop_while_a_checkpoint_is_written(
    hurt: Make, reference: Path, launcher: list[str]
) -> None:
    """F5: training goes on meanwhile; it stops after its step, and the code is given once all is saved."""
    run = hurt(f"stopped-writing-{len(launcher)}")
    slowly_written(run, 1.5, 1.5)
    process = run.start(launcher)
    root = run.folder / "checkpoints"
    run.until(lambda: (root / ".tmp-step-000003").exists() and run.steps() >= 4)
    assert not (root / "step-000003").exists()
    run.kill(signal.SIGTERM)
    process.wait(60)
    run.until_gone()
    assert run.left() == 4, run.log
    newest, _ = checkpoint.newest(root)
    assert newest == root / checkpoint.folder_name(run.steps())
    assert run.steps() < 20
    assert names(root) == ["step-000003", newest.name]
    run.finish(launcher)
    run.assert_curve(reference, rel=0 if launcher == ONE else 1e-5)


@pytest.mark.long
@pytest.mark.fault("F7")
@pytest.mark.parametrize("second", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_a_save_slower_than_the_grace_period(hurt: Make, reference: Path, second: signal.Signals) -> None:
    """F7: asked to stop and soon killed, or asked again: it ends at once, and the one before is whole."""
    run = hurt(f"grace-{second.name}")
    slowly_written(run, 60, 0)
    process = run.start(ONE)
    root = run.folder / "checkpoints"
    run.until(lambda: (root / ".tmp-step-000006").exists() and run.steps() >= 7)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(3.5)
    assert process.poll() is None, run.log
    os.kill(process.pid, second)
    assert process.wait(2) == -second
    assert run.left() is None
    assert checkpoint.newest(root) == (root / "step-000003", [])
    if second == signal.SIGKILL:
        run.write()
        run.finish(ONE)
        run.assert_curve(reference)


@pytest.mark.fault("F8")
def test_a_full_disk_ends_all_processes_at_the_next_step(hurt: Make) -> None:
    """F8: the main process alone knows at first."""
    run = hurt("full-two")
    small = 100_000
    process = run.start(TWO, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (small, small)))
    process.wait(240)
    run.until_gone()
    assert run.left() == 3, run.log
    assert 3 < run.steps() < 6, "before the next save"
    assert run.log.count("step-000003: the checkpoint could not be written") == 2, "each process says so"


@pytest.mark.fault("F5", "F8")
def test_a_stop_that_cannot_be_saved_is_not_called_preempted(hurt: Make) -> None:
    """F5, F8: whoever resubmits at code 4 would lose these steps again and again."""
    run = hurt("full-stopped")
    small = 100_000
    process = run.start(
        ONE,
        "checkpoint.every=100",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (small, small)),
    )
    run.until(lambda: run.steps() >= 2)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == 3, run.log
    assert run.left() == 3
    assert "the checkpoint could not be written" in run.log


def files(run: Path) -> dict[str, dict[str, Any]]:
    """Each checkpoint's manifest, without the recipe, which names the run's folder."""
    found = {
        folder.name: json.loads((folder / checkpoint.MANIFEST).read_text(encoding="utf-8"))
        for folder in (run / "checkpoints").iterdir()
    }
    for manifest in found.values():
        del manifest["trainer/recipe.yaml"]
    return found


@pytest.mark.fault("F2")
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_what_is_written_is_what_the_step_left(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, tune: str
) -> None:
    """Training goes on while a checkpoint is written, or waits where memory has no room for a copy: the same
    files, byte for byte."""
    words = [f"model.tune={tune}", "train.max_steps=4", "checkpoint.every=2", "checkpoint.keep=9"]
    with monkeypatch.context() as patch:
        patch.setattr(memory, "host_free", lambda: 0)
        waiting = runs.here(f"waiting-{tune}", *words)
    save, step = model.save, Records.step
    steps: list[int] = []
    monkeypatch.setattr(
        Records, "step", lambda *given, **row: (step(*given, **row), steps.append(row["step"]))
    )

    def save_later(*given: Any) -> None:
        now = steps[-1]
        until = time.monotonic() + 10
        while steps[-1] < min(now + 1, 4) and time.monotonic() < until:
            time.sleep(0.01)
        save(*given)

    monkeypatch.setattr(model, "save", save_later)
    behind = runs.here(f"behind-{tune}", *words)
    assert files(behind) == files(waiting)
    assert len(files(behind)) == 2
    for run in (behind, waiting):
        rows = [json.loads(line) for line in (run / "checkpoints.jsonl").open(encoding="utf-8")]
        assert [row["step"] for row in rows] == [2, 4]
        assert all(row["bytes"] > 10_000 for row in rows)
        assert (rows[0]["waited"] > 0.9 * rows[0]["seconds"]) == (run == waiting)


@pytest.mark.long
@pytest.mark.fault("F28")
def test_thirty_saves_among_foreign_folders(runs: Runs) -> None:
    """F28: at most the newest two and the best stay; what others put there is neither deleted nor loaded."""
    root = runs.folder / "foreign" / "checkpoints"
    foreign = {
        "best/notes": "mine",
        ".tmp-mine/notes": "mine",
        ".tmp-step-7/notes": "mine",
        "step-777777/trainer/manifest.json": "{}",
        "step-888888/manifest.json": "{}",
        "step-888888/trainer/manifest.json": "no JSON",
        "step-999999/model.safetensors": "",
    }
    for name, text in foreign.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    (root / ".tmp-step-000099").mkdir()
    (root.parent / "metrics.jsonl").touch()  # of a run that left no checkpoint
    words = ["train.max_steps=30", "checkpoint.every=1", "eval.every=14", "eval.questions=2"]
    run = runs.here("foreign", *words)
    rows = [json.loads(line) for line in (run / "eval.jsonl").open(encoding="utf-8")]
    top = max(rows, key=lambda row: (row["exact"], -row["loss"]))["step"]
    own = {checkpoint.folder_name(step) for step in (top, 29, 30)}
    expected = {Path(name).parts[0] for name in foreign} | own
    assert set(names(root)) == expected
    assert checkpoint.best(root) == root / checkpoint.folder_name(top)
    assert slurm.saved(run) == 30
    assert len((run / "checkpoints.jsonl").read_text(encoding="utf-8").splitlines()) == 30
    metrics = (run / "metrics.jsonl").read_bytes()
    assert runs.here("foreign", *words) == run
    assert (run / "metrics.jsonl").read_bytes() == metrics, (
        "it went on from step 30, where nothing is left to do"
    )
    assert set(names(root)) == expected
    for name, text in foreign.items():
        assert (root / name).read_text(encoding="utf-8") == text
