"""What a start on much data costs: `python -m benchmarks.start` makes a million questions on 25,000 small
JPEG files and runs surgvqa's commands on them as a user does: `check` with an empty and a full image cache,
`train` on one process and on two up to its first step, and `report` on the 100,000 questions of the test
split. Then it sends SIGTERM at some moments of a start and measures how long the processes live on.

    git worktree add /tmp/before COMMIT
    python -m benchmarks.start --code before=/tmp/before --code after=.

measures two checkouts in turns. Seconds of processors and the peak memory of each process are read from
/proc, so this runs on Linux only. The data are made once, in --data.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.record import RESULTS, write
from surgvqa import datasets, recipe, scores
from surgvqa.metrics import Prediction, Prior
from surgvqa.scan import cores

QUESTIONS, ANSWERS, TYPES = 1000, 5, 8
"""Distinct question texts, answers that each of them may have, and question types."""
SIDE = 64
"""Width and height of an image in pixels."""
SIGNALS = (2, 20, 60)
"""Seconds after a run has claimed its folder, or a check has started, at which it is sent SIGTERM."""
PATIENCE = 600
"""Seconds after which a command is killed."""

_TICKS = os.sysconf("SC_CLK_TCK")

RECIPE = """
output: run
model: {name: tiny-qwen3-vl}
data: {format: jsonl}
image: {size: 64}
batch: {questions: 16}
eval: {every: null, final: test}
"""


def make(folder: Path, images: int, questions: int) -> None:
    """Write questions, images, a recipe, and a run with answers to the test split, unless they are there."""
    done = folder / "made.json"
    about = {"images": images, "questions": questions, "version": 1}
    if done.is_file() and json.loads(done.read_text(encoding="utf-8")) == about:
        return
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    pictures = np.random.default_rng(0)
    for number in range(images):
        coarse = Image.fromarray(pictures.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        buffer = BytesIO()
        coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=80)
        (folder / f"images/{number:05}.jpg").write_bytes(buffer.getvalue())
    rng = random.Random(0)
    splits, per_video = ("train",) * 8 + ("val", "test"), max(1, images // 50)
    with (folder / "questions.jsonl").open("w", encoding="utf-8") as file:
        for number in range(questions):
            image, text = number % images, rng.randrange(QUESTIONS)
            row = {
                "id": f"q{number}",
                "image": f"images/{image:05}.jpg",
                "question": f"Which instrument is in region {text} of the frame?",
                "answer": f"instrument {(text + rng.randrange(ANSWERS)) % 40}",
                "question_type": f"type {text % TYPES}",
                "group": f"video {image // per_video}",
                # A whole group is in one split, or every check of it would say so.
                "split": splits[image // per_video % len(splits)],
            }
            file.write(json.dumps(row) + "\n")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    _answer(folder)
    time.sleep(2)  # files that changed just now are not remembered by the image cache
    done.write_text(json.dumps(about), encoding="utf-8")


def _answer(folder: Path) -> None:
    """Write a run's folder with predictions and scores of the test split."""
    run = folder / "run"
    run.mkdir()
    words = [f"data.path={folder / 'questions.jsonl'}", f"output={run}"]
    settings = recipe.parse(RECIPE, words)
    (run / "recipe.yaml").write_text(settings.dump(), encoding="utf-8")
    dataset, rng = datasets.load(settings.data), random.Random(0)
    predictions = []
    for example in dataset.part("test"):
        answer = example.answers[0] if rng.random() < 0.8 else f"instrument {rng.randrange(40)}"
        predictions.append(Prediction.of(example, answer))
    with (run / "predictions.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row.row()) + "\n" for row in predictions)
    result = {**scores.score(predictions, Prior(dataset.part("train")), resamples=200), "split": "test"}
    (run / "scores.json").write_text(json.dumps(result), encoding="utf-8")


@dataclass
class Usage:
    """What a command and all processes below it have used so far."""

    seconds: float = 0
    cpu: dict[int, float] = field(default_factory=dict)
    """Process id → seconds of processors."""
    peak: dict[int, int] = field(default_factory=dict)
    """Process id → most bytes of memory."""


class Command:
    """A running command, with what its processes use; they are found by a variable of their environment."""

    def __init__(self, code: Path, words: Sequence[str], folder: Path, cache: Path) -> None:
        environment = {**os.environ, "SURGVQA_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
        environment |= {"PYTHONPATH": str(code.resolve()), "PYTHONUNBUFFERED": "1", "ACCELERATE_USE_CPU": "1"}
        self.mark = f"SURGVQA_MEASURED={folder.name}"
        environment |= {"SURGVQA_MEASURED": folder.name}
        self.log = folder / "log.txt"
        self.began, self.usage = time.perf_counter(), Usage()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                words, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def alive(self) -> list[int]:
        """The processes that still live, those that a launcher started included."""
        found = []
        for file in Path("/proc").glob("[0-9]*/environ"):
            try:
                if self.mark.encode() in file.read_bytes().split(b"\0"):  # empty of a process that has ended
                    found.append(int(file.parent.name))
            except OSError:
                continue
        return found

    def watch(self, until: str = "", seconds: float = PATIENCE) -> Usage:
        """Wait for its end, for a text in its output, or for so many seconds after its start."""
        while self.process.poll() is None and time.perf_counter() - self.began < seconds:
            self._measure()
            if until and until in self.log.read_text(encoding="utf-8", errors="replace"):
                break
            time.sleep(0.25)
        self.usage.seconds = time.perf_counter() - self.began
        return self.usage

    def end(self) -> None:
        """Kill whatever is left of it."""
        while left := self.alive():
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            self.process.poll()
            time.sleep(0.05)
        self.process.wait()

    def _measure(self) -> None:
        for pid in self.alive():
            if fields := _stat(pid):
                self.usage.cpu[pid] = (int(fields[11]) + int(fields[12])) / _TICKS
            try:
                status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
            except OSError:
                continue
            for line in status.splitlines():
                if line.startswith("VmHWM:"):
                    self.usage.peak[pid] = 1024 * int(line.split()[1])


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on, as in proc(5); none where the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return []


def commands(data: Path, output: Path) -> dict[str, list[str]]:
    """What is measured: its name → the words of the command."""
    words = [str(data / "recipe.yaml"), f"data.path={data / 'questions.jsonl'}"]
    training = [*words, f"output={output / 'run'}"]
    surgvqa = [sys.executable, "-m", "surgvqa.cli"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    report = ["report", str(data / "run"), "--out", str(output / "report.html")]
    return {
        "check, empty image cache": [*surgvqa, "check", *words, "--out", str(output / "audit")],
        "check": [*surgvqa, "check", *words, "--out", str(output / "audit")],
        "train to step 1, 1 process": [sys.executable, "-m", "surgvqa.train", *training],
        "train to step 1, 2 processes": [*torchrun, "-m", "surgvqa.train", *training],
        "report": [*surgvqa, *report],
    }


def measured(code: Path, name: str, data: Path, cache: Path) -> dict[str, Any]:
    """Run a command of a checkout; returns seconds, seconds of processors and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder, "cache") if "empty" in name else cache
        load = os.getloadavg()[0]
        command = Command(code, commands(data, Path(folder))[name], Path(folder), empty)
        try:
            usage = command.watch(until="step 1/" if name.startswith("train") else "")
        finally:
            command.end()
        output = command.log.read_text(encoding="utf-8", errors="replace")
        if "step 1/" not in output if name.startswith("train") else command.process.returncode:
            raise SystemExit(f"{name} failed:\n{output[-2000:]}")
        peaks = sorted((peak for peak in usage.peak.values()), reverse=True)
        return {
            "what": name,
            "seconds": usage.seconds,
            "cpu_seconds": sum(usage.cpu.values()),
            "peak_gib": [round(peak / 2**30, 2) for peak in peaks[: 2 if "2 processes" in name else 1]],
            "load": load,
        }


def stopped(code: Path, name: str, after: float, data: Path, cache: Path) -> dict[str, Any] | None:
    """Send SIGTERM to a command some seconds after its start; returns how long a process of it lived on.

    None where it had ended, or begun to train, before.
    """
    with tempfile.TemporaryDirectory() as folder:
        load = os.getloadavg()[0]
        command = Command(code, commands(data, Path(folder))[name], Path(folder), cache)
        try:
            lock = Path(folder, "run", ".lock")
            while name.startswith("train") and not lock.exists() and command.process.poll() is None:
                time.sleep(0.05)
            command.watch(until="step 1/", seconds=time.perf_counter() - command.began + after)
            if command.process.poll() is not None or "step 1/" in command.log.read_text(errors="replace"):
                return None
            sent = time.perf_counter()
            os.kill(command.process.pid, signal.SIGTERM)
            while command.alive() and time.perf_counter() - sent < PATIENCE:
                time.sleep(0.05)
            seconds = time.perf_counter() - sent
        finally:
            command.end()
    return {"what": name, "signal_after": after, "seconds": seconds, "load": load}


def rounds(
    codes: Mapping[str, Path], data: Path, repeats: int, only: Sequence[str], moments: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """Each measurement, the checkouts in turns."""
    with tempfile.TemporaryDirectory() as caches:
        for name in commands(data, Path(caches)):
            if only and not any(word in name for word in only):
                continue
            for number in range(repeats):
                for code, folder in codes.items():
                    cache = Path(caches, code)
                    if not cache.exists() and "empty" not in name:
                        measured(folder, "check", data, cache)  # fills the image cache
                    yield {"code": code, "round": number, **measured(folder, name, data, cache)}
            if "report" in name or "empty" in name:
                continue
            for after in moments:
                for code, folder in codes.items():
                    if row := stopped(folder, name, after, data, Path(caches, code)):
                        yield {"code": code, **row}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.start", description=__doc__.partition(":")[0])
    parser.add_argument("--images", type=int, default=25_000)
    parser.add_argument("--questions", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--code", action="append", metavar="NAME=FOLDER", help="a checkout to measure (default: this one)"
    )
    parser.add_argument(
        "--only", nargs="*", default=(), metavar="WORD", help="commands with one of the words"
    )
    parser.add_argument("--signals", nargs="*", type=float, default=SIGNALS, metavar="SECONDS")
    parser.add_argument("--data", type=Path, help="where the data are kept (default: made and removed)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for start.json")
    given = parser.parse_args(argv)
    here = [f"this={Path(__file__).parents[1]}"]
    codes = {name: Path(folder) for name, _, folder in (word.partition("=") for word in given.code or here)}
    with tempfile.TemporaryDirectory() as scratch:
        data = (given.data or Path(scratch, "data")).resolve()
        make(data, given.images, given.questions)
        rows = []
        for row in rounds(codes, data, given.rounds, given.only, given.signals):
            rows.append(row)
            print(json.dumps(row), flush=True)
    settings = {
        "images": given.images,
        "questions": given.questions,
        "cores": cores(),
        "code": {name: _commit(folder) for name, folder in codes.items()},
    }
    print(f"written: {write('start', settings, rows, given.out)}")
    return 0


def _commit(code: Path) -> str | None:
    done = subprocess.run(
        ["git", "-C", str(code), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    return done.stdout.strip() or None


if __name__ == "__main__":
    raise SystemExit(main())
