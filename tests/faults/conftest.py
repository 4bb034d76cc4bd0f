"""Runs that are hurt while they go on, as a user starts them; each must end as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from trajectory.conftest import ROOT, Runs, runs, trace

__all__ = ["runs"]

SLOWLY = """
{more}
import sys, time
from surgvqa import run, train

step = run.Records.step
run.Records.step = lambda *given, **row: (step(*given, **row), time.sleep({pause}))
sys.exit(train.main())
"""
"""A run whose steps take some seconds longer, so that one of 20 steps can be hurt in the middle."""

ONE: list[str] = []
TWO = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]


class Hurt:
    """One run folder, started again and again; steps of the reference are 20.

    `pause` is the number of seconds that each step takes longer, `every` the steps between checkpoints.
    """

    def __init__(self, runs: Runs, name: str, pause: float = 0.15, every: int = 3) -> None:
        self.runs, self.name, self.folder = runs, name, runs.folder / name
        self.script = runs.folder / f"{name}.py"
        self.pause, self.every = pause, every
        self.write()
        self.code = runs.folder / f"{name}.code"
        self.started: list[subprocess.Popen[str]] = []

    def write(self, more: str = "") -> None:
        """The script that runs, which first does `more`."""
        self.script.write_text(SLOWLY.format(pause=self.pause, more=more), encoding="utf-8")

    def start(self, launcher: list[str], *overrides: str, **options: Any) -> subprocess.Popen[str]:
        """Start the run in a session, and so a process group, of its own."""
        program = [sys.executable, *launcher, str(self.script), str(self.runs.recipe)]
        self.code.unlink(missing_ok=True)
        log = (self.runs.folder / f"{self.name}.log").open("w", encoding="utf-8")
        process = subprocess.Popen(
            [*program, *self.runs._words(self.name, f"checkpoint.every={self.every}", *overrides)],
            cwd=ROOT,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
                "SURGVQA_EXIT_FILE": str(self.code),
            },
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
            **options,
        )
        self.started.append(process)
        return process

    def finish(self, launcher: list[str], *overrides: str, seconds: float = 240) -> None:
        """The same command again, to its end."""
        process = self.start(launcher, *overrides)
        assert process.wait(seconds) == 0, self.log
        assert self.left() == 0, self.log

    @property
    def log(self) -> str:
        return (self.runs.folder / f"{self.name}.log").read_text(encoding="utf-8")

    def left(self) -> int | None:
        """The exit code that the run itself left behind."""
        return int(self.code.read_text()) if self.code.is_file() else None

    def steps(self) -> int:
        """Steps that were recorded so far."""
        with contextlib.suppress(OSError, ValueError):
            lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            return int(json.loads(lines[-1])["step"]) if lines else 0
        return 0

    def until(self, what: Callable[[], bool], seconds: float = 120) -> None:
        """Wait until something is so."""
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, self.log
            assert self.started[-1].poll() is None or what(), self.log  # it may be so by the end
            time.sleep(0.02)

    def processes(self) -> dict[int, dict[str, str]]:
        """Process id → environment of whatever lives of this run, launchers and data workers included."""
        found = {}
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                text = environ.read_bytes().decode(errors="replace")
                variables = dict(part.split("=", 1) for part in text.split("\0") if "=" in part)
                if variables.get("SURGVQA_EXIT_FILE") == str(self.code):
                    found[int(environ.parent.name)] = variables
        return found

    def until_gone(self) -> None:
        """Wait until nothing of this run lives any more."""
        end = time.monotonic() + 30
        while self.processes():
            assert time.monotonic() < end, f"left behind:\n{self.log}"
            time.sleep(0.1)

    def ranks(self) -> list[int]:
        """Process ids of the processes that train, by rank, of a run started through a launcher."""
        found = {
            int(variables["RANK"]): pid for pid, variables in self.processes().items() if "RANK" in variables
        }
        return [found[rank] for rank in sorted(found)]

    def kill(self, number: int) -> None:
        """Send a signal to all of them."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def assert_curve(self, reference: Path, rel: float = 0.0, steps: int = 20) -> None:
        """Each step once, with the reference's questions and losses: bit for bit, or within `rel`."""
        ours, theirs = trace(self.folder), trace(reference)
        assert [row["step"] for row in ours] == list(range(1, steps + 1))
        for mine, other in zip(ours, theirs, strict=True):
            assert mine["ids"] == other["ids"]
            if rel:
                assert mine["loss"] == pytest.approx(other["loss"], rel=rel)
            else:
                assert mine["loss"] == other["loss"]
        assert not list((self.folder / "checkpoints").glob(".tmp-*"))
        assert not (self.folder / ".lock").exists()


@pytest.fixture(scope="session")
def reference(runs: Runs) -> Path:
    """The run that nothing happens to, of one process with one thread, as the others."""
    undisturbed = Hurt(runs, "undisturbed")
    undisturbed.finish(ONE)
    return undisturbed.folder


@pytest.fixture(scope="session")
def reference_of_two(runs: Runs) -> Path:
    """The same on two processes, whose sums are rounded otherwise."""
    undisturbed = Hurt(runs, "undisturbed-two")
    undisturbed.finish(TWO)
    return undisturbed.folder


@pytest.fixture
def hurt(runs: Runs, request: pytest.FixtureRequest) -> Iterator[Callable[..., Hurt]]:
    """Makes runs to hurt, and ends what is left of them."""
    made: list[Hurt] = []

    def make(name: str, pause: float = 0.15) -> Hurt:
        made.append(Hurt(runs, name, pause))
        return made[-1]

    yield make
    for each in made:
        each.kill(signal.SIGKILL)
        for process in each.started:
            process.wait()
