"""Stops at odd moments, and what looks like a fault and is none."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import time
from collections.abc import Callable

import pytest

from .conftest import ONE, TWO, Hurt

Make = Callable[[str], Hurt]


@pytest.mark.fault("F5")
@pytest.mark.parametrize(
    "launcher", [ONE, pytest.param(TWO, marks=pytest.mark.long)], ids=["alone", "torchrun"]
)
def test_its_terminal_is_closed(hurt: Make, launcher: list[str]) -> None:
    """As when a connection is lost: it saves, though what it prints can go nowhere."""
    run = hurt(f"terminal-{len(launcher)}")
    terminal, its_end = pty.openpty()
    name = os.ttyname(its_end)

    def sit_down() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where these tests run under nohup
        opened = os.open(name, os.O_RDWR)  # the first of a session: it controls it
        for standard in (0, 1, 2):
            os.dup2(opened, standard)

    def done(step: int) -> bool:
        with contextlib.suppress(BlockingIOError):
            os.read(terminal, 1 << 16)
        return run.steps() >= step

    os.set_blocking(terminal, False)
    process = run.start(launcher, preexec_fn=sit_down)
    os.close(its_end)
    run.until(lambda: done(4))
    os.close(terminal)
    process.wait(60)
    assert run.left() == 4
    ended = json.loads((run.folder / "ended.json").read_text(encoding="utf-8"))
    assert ended["reason"].startswith(f"stopped after step {run.steps()} (SIGHUP)")


@pytest.mark.long
@pytest.mark.fault("F5")
def test_nohup_is_heeded(hurt: Make) -> None:
    run = hurt("nohup")
    process = run.start(
        ONE, "train.max_steps=6", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    run.until(lambda: run.steps() >= 2)
    os.kill(process.pid, signal.SIGHUP)
    assert process.wait(120) == 0, run.log


@pytest.mark.long
@pytest.mark.fault("F13")
def test_all_are_stopped_and_go_on(hurt: Make) -> None:
    """As after Ctrl-Z and `fg`, or when SLURM suspends a job for longer than train.peer_timeout."""
    run = hurt("suspended")
    process = run.start(TWO, "train.peer_timeout=5", "train.max_steps=100")
    for step in (2, 8, 14):
        run.until(lambda step=step: run.steps() >= step)  # type: ignore[misc]
        run.kill(signal.SIGSTOP)
        time.sleep(8)
        run.kill(signal.SIGCONT)
    time.sleep(8)
    run.kill(signal.SIGTERM)
    process.wait(60)
    assert run.left() == 4, run.log
