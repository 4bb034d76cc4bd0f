"""One owner per folder, whoever starts when and wherever."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from surgvqa import lock
from surgvqa.lock import Lock
from surgvqa.recipe import BadInput

CONTAINER = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
ROOT = Path(__file__).parents[1]
QUICK = "from surgvqa import lock; lock.TOUCHED_EVERY = 0.2; from pathlib import Path; import sys, time"
HOLD = f"{QUICK}; lock.Lock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"

RACE = """
import json, multiprocessing, os, sys
from pathlib import Path
from surgvqa.lock import Lock
from surgvqa.recipe import BadInput

def starter(folders, barrier, won):
    for number, folder in enumerate(folders):
        barrier.wait()
        try:
            held = Lock(folder)
            with won.get_lock():
                won[number] += 1
        except BadInput:
            held = None
        barrier.wait()
        if held:
            held.release()

context = multiprocessing.get_context("fork")
folders = sorted(Path(sys.argv[1]).iterdir())
barrier, won = context.Barrier(4), context.Array("i", len(folders))
starters = [context.Process(target=starter, args=(folders, barrier, won)) for _ in range(4)]
for each in starters:
    each.start()
for each in starters:
    each.join()
print(json.dumps(list(won)))
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a process, maybe by way of others, that holds the lock of `tmp_path`."""
    started: list[subprocess.Popen[str]] = []

    def hold(*through: str) -> subprocess.Popen[str]:
        command = [*through, sys.executable, "-c", HOLD, str(tmp_path)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_of_several_that_start_at_once_one_wins(tmp_path: Path) -> None:
    """20 times, by turns with nothing there and with the lock of a process that is gone."""
    gone = {"place": lock._place(), "host": "here", "pid": 2**22 + 1, "started": "1"}
    for number in range(20):
        (tmp_path / f"{number:02}").mkdir()
        if number % 2:
            (tmp_path / f"{number:02}" / lock.NAME).write_text(json.dumps(gone))
    done = subprocess.run(
        [sys.executable, "-c", RACE, str(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    assert json.loads(done.stdout) == [1] * 20, done.stderr
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def can_unshare() -> bool:
    command = ["unshare", "--pid", "--fork", "--mount-proc", "true"]
    return (
        shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0
    )


@pytest.mark.skipif(not can_unshare(), reason="making a container takes rights that are not here")
def test_a_container_of_the_same_name_is_another_machine(
    tmp_path: Path, holder: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    holder(*CONTAINER)
    monkeypatch.setattr(lock, "WATCHED_FOR", 3.0)
    with pytest.raises(BadInput, match="belongs to a run that is going on: process 1 on"):
        Lock(tmp_path)


def test_a_number_that_another_process_has_now_is_no_owner(tmp_path: Path) -> None:
    former = {"place": lock._place(), "host": "here", "pid": os.getpid(), "started": "1"}
    (tmp_path / lock.NAME).write_text(json.dumps(former))
    Lock(tmp_path).release()


def test_a_lock_that_was_removed_is_taken_again(
    tmp_path: Path, holder: Callable[..., subprocess.Popen[str]]
) -> None:
    process = holder()
    (tmp_path / lock.NAME).unlink()
    end = time.monotonic() + 10
    while not (tmp_path / lock.NAME).exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    with pytest.raises(BadInput, match=f"process {process.pid} on"):
        Lock(tmp_path)


def test_an_owner_whose_folder_was_taken_over_ends(
    tmp_path: Path, holder: Callable[..., subprocess.Popen[str]]
) -> None:
    """As when its machine was asleep while another watched the lock."""
    process = holder()
    other = tmp_path / "other"
    other.write_text(json.dumps({"place": None, "host": "elsewhere", "pid": 7, "started": None}))
    other.rename(tmp_path / lock.NAME)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 2
    assert "is held by process 7 on elsewhere: it took the folder over" in said
