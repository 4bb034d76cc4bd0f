"""A run's records, as a crash may leave them."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from accelerate import Accelerator
from rich.console import Console

from surgvqa import processes
from surgvqa.endings import StorageFailure
from surgvqa.recipe import BadInput, Log
from surgvqa.run import Records, claim, clear, record_start


def reopened(run: Path, start: int, settled: bool = True) -> None:
    with Records(run, start, 9, Log(), Console(), settled=settled):
        pass


@pytest.mark.parametrize(
    "torn", [b'{"step": 2', '{"step": 2, "ids": ["é'.encode()[:-1], b"\0" * 700, b"\0" * 700 + b"\n"]
)
def test_what_a_crash_left_of_a_line_is_dropped(tmp_path: Path, torn: bytes) -> None:
    rows = [json.dumps({"step": 1, "ids": ["é\u2028\x85"]}, ensure_ascii=False) + "\n"]
    file = tmp_path / "trace.jsonl"
    file.write_bytes("".join(rows).encode() + torn)
    reopened(tmp_path, 5)
    assert file.read_bytes() == rows[0].encode()


@pytest.mark.parametrize("settled", [True, False])
def test_an_evaluation_that_will_be_made_again_is_forgotten(tmp_path: Path, settled: bool) -> None:
    """Where the run was stopped before it, and killed after it but before the next checkpoint."""
    for name in ("eval.jsonl", "metrics.jsonl"):
        (tmp_path / name).write_text("".join(f'{{"step": {step}}}\n' for step in (2, 4, 6)))
    reopened(tmp_path, 4, settled)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 2}\n{"step": 4}\n'
    assert (tmp_path / "eval.jsonl").read_text() == '{"step": 2}\n' + '{"step": 4}\n' * settled


def test_a_full_disk_may_leave_nothing_but_metrics(tmp_path: Path) -> None:
    """Neither how it ended nor a checkpoint could be written: the same command goes on all the same."""
    for name in (".ended.json.tmp", "metrics.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "checkpoints").mkdir()
    claim(tmp_path).release()


def test_a_folder_that_cannot_be_claimed_stays_as_it_was(tmp_path: Path) -> None:
    for name in ("ended.json", "checkpoints"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(BadInput, match="a file is where a folder must be"):
        claim(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoints", "ended.json"]


def test_a_disk_that_is_full_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The space is gone as the lock is written: the code is that of the disk, and nothing is left behind."""
    (tmp_path / "ended.json").write_text("{}")

    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("surgvqa.lock.json.dumps", full)
    with pytest.raises(StorageFailure, match="No space left on device; make room"):
        claim(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["ended.json"]


def test_versions_and_devices_of_each_start_that_counts_are_kept(tmp_path: Path) -> None:
    told = processes.environment(Accelerator(cpu=True))
    assert {"surgvqa", "torch", "transformers", "python", "device", "processes"} <= told.keys()
    for step in (0, 7, 9):
        record_start(tmp_path, step, told)
    reopened(tmp_path, 7)
    rows = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 7]
    assert rows[0].items() >= told.items()
    clear(tmp_path)
    assert not (tmp_path / "starts.jsonl").exists()
