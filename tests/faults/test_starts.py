"""Signals during a start end all processes within seconds, wherever each of them is, and nothing is lost."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from trajectory.conftest import ROOT, Runs

from .conftest import ONE, TWO, Hurt

Make = Callable[[str], Hurt]

WITHIN = 5.0
"""Seconds after which a signal must have ended all processes; BUSY are added for a machine under load."""
BUSY = 10.0

READING = """
import os, time
from surgvqa import datasets

load = datasets.load

def slowly(*given, **named):
    found = load(*given, **named)
    if os.environ.get("RANK", "0") in {ranks}:
        print("reading takes long", flush=True)
        for _ in range(1200):
            time.sleep(0.1)
    return found

datasets.load = slowly
"""

LOADING = """
import os, time
from surgvqa.prepare import Prepared

network = Prepared.network

def slowly(*given):
    if os.environ.get("RANK", "0") in {ranks}:
        print("loading takes long", flush=True)
        for _ in range(1200):
            time.sleep(0.1)
    return network(*given)

Prepared.network = slowly
"""

IN_C = """
import ctypes, os, time
from surgvqa.prepare import Prepared

def busy(*given):
    print("in C", flush=True)
    end = time.monotonic() + 120
    while time.monotonic() < end:  # a signal ends sleep(3), so masks stand for a library that goes on
        signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGTERM, signal.SIGUSR1}})
        ctypes.CDLL(None).sleep(60)

Prepared.network = busy
"""


def stopped(run: Hurt) -> dict[str, object]:
    """Return ended.json, which must say that the start was stopped."""
    assert run.left() == 4, run.log
    assert not (run.folder / ".lock").exists()
    assert 'surgvqa/train.py", line' not in run.log  # in a traceback; torchrun prints one of its own
    ended: dict[str, object] = json.loads((run.folder / "ended.json").read_text(encoding="utf-8"))
    assert ended["code"] == 4
    assert str(ended["reason"]).startswith("stopped (SIGTERM) before the first step; nothing was lost")
    return ended


@pytest.mark.fault("F34")
def test_a_process_that_reads_is_asked_to_stop_and_starts_again(hurt: Make) -> None:
    run = hurt("stopped-reading")
    run.write(READING.format(ranks=["0"]))
    process = run.start(ONE)
    run.until(lambda: "reading takes long" in run.log)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(WITHIN + BUSY) == 4
    stopped(run)
    run.write()
    run.finish(ONE, "train.max_steps=1")


@pytest.mark.fault("F34")
@pytest.mark.parametrize(
    ("slow", "what", "asked"),
    [
        pytest.param("0", READING, 0, id="main reads, main is asked"),
        pytest.param("0", READING, 1, id="main reads, the other waits and is asked"),
        pytest.param("1", LOADING, 0, id="other loads, main waits and is asked", marks=pytest.mark.long),
        pytest.param("1", LOADING, 1, id="other loads and is asked", marks=pytest.mark.long),
    ],
)
def test_both_processes_stop_whichever_is_asked(hurt: Make, slow: str, what: str, asked: int) -> None:
    run = hurt(f"stopped-{slow}-{asked}")
    run.write(what.format(ranks=[slow]))
    process = run.start(TWO)
    run.until(lambda: "takes long" in run.log)
    time.sleep(1)  # the other comes to where it waits
    os.kill(run.ranks()[asked], signal.SIGTERM)
    process.wait(WITHIN + BUSY)
    run.until_gone()
    stopped(run)
    codes = re.findall(r"exitcode +: (-?\d+)", run.log)
    assert codes
    assert set(codes) == {"4"}, run.log


LAST = """
import os, time
from surgvqa import train

class Slow(train.Speed):
    def __init__(self, *given):
        super().__init__(*given)
        if os.environ["RANK"] == "0":
            time.sleep(3)
            print("the other waits", flush=True)
            time.sleep(0.1)

train.Speed = Slow
"""


@pytest.mark.fault("F34")
def test_a_process_that_is_asked_while_it_waits_for_the_start_is_not_lost(hurt: Make) -> None:
    """The others start before they hear of it, and then stop as in training: they are not left alone."""
    run = hurt("stopped-last")
    run.write(LAST)
    process = run.start(TWO)
    run.until(lambda: "the other waits" in run.log)
    os.kill(run.ranks()[1], signal.SIGTERM)
    process.wait(WITHIN + BUSY)
    run.until_gone()
    assert run.left() == 4, run.log
    assert json.loads((run.folder / "ended.json").read_text(encoding="utf-8"))["code"] == 4
    assert set(re.findall(r"exitcode +: (-?\d+)", run.log)) == {"4"}, run.log
    assert 'surgvqa/train.py", line' not in run.log


@pytest.mark.fault("F34")
def test_a_process_that_is_busy_in_c_is_ended_by_its_thread(hurt: Make) -> None:
    run = hurt("stopped-in-c")
    run.write("import signal\n" + IN_C.format())
    process = run.start(ONE)
    run.until(lambda: "in C" in run.log)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(WITHIN + BUSY) == 4
    stopped(run)


def interrupted(script: Path, number: signal.Signals) -> tuple[int, str]:
    """Run a script, signal it when it reads its data, and return its exit code and stderr."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, str(script)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        assert "reading takes long" in process.stdout.readline()
        process.send_signal(number)
        _, told = process.communicate(timeout=WITHIN + BUSY)
    return process.returncode, told


@pytest.mark.fault("F34")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_check_ends_quietly(runs: Runs, tmp_path: Path, number: signal.Signals) -> None:
    script = tmp_path / "check.py"
    words = [str(runs.recipe), f"data.path={runs.data}", "--out", str(tmp_path / "audit")]
    command = f"import sys\nfrom surgvqa import cli\nsys.exit(cli.main({['check', *words]!r}))\n"
    script.write_text(READING.format(ranks=["0"]) + command, encoding="utf-8")
    code, told = interrupted(script, number)
    assert code == 128 + number
    assert told == f"stopped ({number.name}); the images that were looked at are remembered\n"
    assert not (tmp_path / "audit").exists()


IN_C_HERE = """
import ctypes, signal, time
from surgvqa import datasets

def busy(*given, **named):
    print("in C", flush=True)
    end = time.monotonic() + 120
    while time.monotonic() < end:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
        ctypes.CDLL(None).sleep(60)

datasets.load = busy
"""


@pytest.mark.fault("F34")
@pytest.mark.parametrize(("command", "code"), [("check", 128 + signal.SIGTERM), ("evaluate", 4)])
def test_commands_that_are_busy_in_c_say_why_they_end(
    runs: Runs, tmp_path: Path, command: str, code: int
) -> None:
    words = [str(runs.recipe), f"data.path={runs.data}", "--out", str(tmp_path / "out")]
    if command == "evaluate":
        words = ["tiny-qwen3-vl", "--recipe", *words]
    script = tmp_path / "command.py"
    script.write_text(
        f"{IN_C_HERE}import sys\nfrom surgvqa import cli\nsys.exit(cli.main({[command, *words]!r}))\n",
        encoding="utf-8",
    )
    with subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        while "in C" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(1)  # it says so just before it is
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=WITHIN + BUSY)
    assert process.returncode == code
    assert "stopped (SIGTERM)" in told


@pytest.mark.fault("F34")
def test_an_evaluation_that_starts_is_stopped(runs: Runs, tmp_path: Path) -> None:
    script = tmp_path / "evaluate.py"
    words = ["tiny-qwen3-vl", "--recipe", str(runs.recipe), f"data.path={runs.data}", "--split", "test"]
    command = "import sys\nfrom surgvqa import evaluation\n"
    command += f"sys.exit(evaluation.main({[*words, '--out', str(tmp_path / 'out')]!r}))\n"
    script.write_text(READING.format(ranks=["0"]) + command, encoding="utf-8")
    code, told = interrupted(script, signal.SIGTERM)
    assert code == 4, told
    assert "stopped (SIGTERM) before the first answer; nothing was lost" in told
    assert not (tmp_path / "out").exists()


AT_ONCE = """
import os, sys, time
from pathlib import Path
from surgvqa import datasets

load = datasets.load
RANK = int(os.environ["RANK"])
OWN, OTHER = (Path({folder!r}) / f"reads-{{rank}}" for rank in (RANK, 1 - RANK))

def together(*given, **named):
    OWN.touch()
    end = time.monotonic() + 60
    while not OTHER.exists():
        assert time.monotonic() < end, "the other process waits until this one has read"
        time.sleep(0.05)
    return load(*given, **named)

datasets.load = together
"""


def test_processes_read_at_the_same_time(hurt: Make) -> None:
    run = hurt("together")
    run.write(AT_ONCE.format(folder=str(run.runs.folder)))
    run.finish(TWO, "train.max_steps=1")


OTHER_DATA = """
import os
from dataclasses import replace
from surgvqa import datasets

load = datasets.load

def other(*given, **named):
    found = load(*given, **named)
    if os.environ["RANK"] == "1":
        {change}
    return found

datasets.load = other
"""


@pytest.mark.fault("F18")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("found = replace(found, examples=found.examples[1:])", "reads other questions in"),
        ("raise datasets.BadInput('data.path: no such file')", "data.path: no such file"),
        ("from surgvqa import hub; hub.TINY_MODELS = {}", "tiny-qwen3-vl: not in the local cache"),
    ],
    ids=["other rows", "no file", "no model"],  # of its own node
)
def test_other_files_on_another_node_are_refused_by_all(hurt: Make, change: str, message: str) -> None:
    run = hurt("other-files")
    run.write(OTHER_DATA.format(change=change))
    process = run.start(TWO)
    process.wait(120)
    assert run.left() == 2, run.log
    assert "process 1 on " in run.log
    assert message in run.log
    # A launcher sends SIGTERM to a process that still ends when another has ended.
    assert {"2"} <= set(re.findall(r"exitcode +: (-?\d+)", run.log)) <= {"2", "-15"}, run.log
