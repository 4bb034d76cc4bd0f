"""A run's folder: claimed, resumed, recorded. Only the main process writes."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from surgvqa import checkpoint, endings
from surgvqa.endings import ENDED
from surgvqa.lock import Lock
from surgvqa.processes import main_first
from surgvqa.recipe import BadInput, Log, Recipe

log = logging.getLogger("surgvqa")

RECORDS = ("metrics.jsonl", "eval.jsonl", "trace.jsonl")
"""Files with a line per step or evaluation."""

CHANGES = "changes.jsonl"

HARMLESS = (
    "output", "log", "eval", "checkpoint", "data.path", "data.revision", "data.labels", "data.workers",
    "model.attn", "batch.tokens_per_micro_batch", "batch.trees", "train.checkpoint_layers", "train.compile",
    "train.max_hours", "train.peer_timeout",
)  # fmt: skip
"""Keys, or sections, that may differ between the runs of one experiment: they do not change what is
learned. The training data itself is compared by its digest."""


@dataclass(frozen=True)
class Resume:
    """Where a run goes on."""

    step: int
    folder: Path
    best: float
    """The best score so far."""
    skipped: int
    """How many of the last steps had no finite gradients."""
    settled: bool
    """Whether the evaluation that was due at this step was made."""


def claim(run: Path) -> Lock:
    """Make the folder this run's own, and clear away what a killed run was still writing.

    Raises BadInput where it cannot be written or belongs to a run that is going on.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = Lock(run)
        (run / ENDED).unlink(missing_ok=True)
        checkpoint.remove_leftovers(run / "checkpoints")
    except OSError as error:
        raise BadInput(f"output: {run} cannot be written: {error.strerror}") from None
    return lock


@contextlib.contextmanager
def owned(run: Path, accelerator: Accelerator) -> Iterator[None]:
    """Hold the run's folder, and leave in it how the run ended."""
    locks: list[Lock] = []
    main_first(accelerator, lambda: locks.append(claim(run)))
    code, reason = 1, "interrupted"
    try:
        yield
        code, reason = 0, "done"
    except Exception as error:
        if isinstance(error, OSError) and endings.is_storage(error):
            full = f"{error.filename or run}: {error.strerror}; make room, and the same command goes on"
            error = endings.StorageFailure(full)
        code, reason = getattr(error, "exit_code", 1), str(error)
        raise error
    finally:
        if accelerator.is_main_process:
            end(run, code, reason)
            locks[0].release()


def end(run: Path, code: int, reason: str) -> None:
    """Write `ended.json`: how the run ended, for scripts and for `surgvqa status`."""
    content = {
        "code": code,
        "name": endings.NAMES.get(code, "failed"),
        "reason": reason,
        "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    # A full disk must not hide what went wrong.
    with contextlib.suppress(OSError):
        checkpoint.write_json(run / ENDED, content)


def clear(run: Path) -> None:
    """Remove what a former run left, and nothing else."""
    for name in ("checkpoints", "tensorboard", "profile"):
        shutil.rmtree(run / name, ignore_errors=True)
    for name in ("recipe.yaml", ENDED, CHANGES, *RECORDS, "predictions*.jsonl", "scores*.json"):
        for file in run.glob(name):
            file.unlink()


def resumable(run: Path, settings: Recipe, fingerprint: str, accept_changes: bool = False) -> Resume | None:
    """The newest checkpoint that is whole. Raises BadInput where it is another experiment's.

    With `accept_changes` it goes on all the same, and the differences are written to changes.jsonl.
    """
    root = run / "checkpoints"
    folder, rejected = checkpoint.newest(root)
    for problem in rejected:
        log.warning("warning: %s", problem)
    if folder is None:
        if rejected:
            raise BadInput([*rejected, f"{run}: no checkpoint is whole; train anew with --fresh --yes"])
        return None
    state = json.loads((folder / checkpoint.STATE).read_text(encoding="utf-8"))
    differences = [
        difference
        for difference in checkpoint.recipe_of(folder).differences(settings)
        if not _harmless(difference.partition(":")[0])
    ]
    if state["data"] != fingerprint:
        differences.append(
            "the training data: its questions, answers, order or images are not what they were"
        )
    step = int(state["step"])
    if differences and not accept_changes:
        cure = (
            f"{folder} was trained otherwise; choose another output, start over with --fresh --yes, or go on "
            "with the changes, which are recorded, with --accept-changes:"
        )
        raise BadInput([cure, *(f"  {difference}" for difference in differences)])
    if differences:
        with (run / CHANGES).open("a", encoding="utf-8") as file:
            _append(file, {"after_step": step, "changes": differences})
        log.warning("warning: going on after step %d with changes: %s", step, "; ".join(differences))
    top = checkpoint.best(root, up_to=step)
    return Resume(
        step,
        folder,
        checkpoint.score(top) if top else -math.inf,
        int(state["skipped"]),
        bool(state["settled"]),
    )


def _harmless(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in HARMLESS)


class Records:
    """The run's records and its progress bar; silent on all but the main process."""

    def __init__(self, run: Path, start: int, total: int, log: Log, console: Console) -> None:
        self.run, self.start, self.total, self.console = run, start, total, console
        self.writes = not console.quiet
        self.traces, self.profiles = log.trace and self.writes, log.profile and self.writes
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> Records:
        if self.writes:
            from torch.utils.tensorboard import SummaryWriter

            self._forget_later_steps()
            self.board = SummaryWriter(str(self.run / "tensorboard"), purge_step=self.start + 1)
            self.stack.callback(self.board.close)
            names = RECORDS if self.traces else RECORDS[:2]
            self.files = {
                name: self.stack.enter_context((self.run / name).open("a", encoding="utf-8"))
                for name in names
            }
            columns = (  # within 80 characters, or the last ones are cut
                MofNCompleteColumn(),
                BarColumn(bar_width=8),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
            )
            self.progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
            self.stack.enter_context(self.progress)
            self.task = self.progress.add_task("training", total=self.total, completed=self.start, numbers="")
        if self.profiles:
            from torch.profiler import profile, schedule, tensorboard_trace_handler

            written = tensorboard_trace_handler(str(self.run / "profile"))
            steps = schedule(wait=2, warmup=1, active=3, repeat=1)
            self.profiler = self.stack.enter_context(profile(schedule=steps, on_trace_ready=written))
        return self

    def __exit__(self, *failure: object) -> None:
        self.stack.close()

    def step(self, **row: Any) -> None:
        """A line of metrics.jsonl, the same in TensorBoard, and the progress bar."""
        if not self.writes:
            return
        if self.profiles:
            self.profiler.step()
        # JSON has no NaN: a step without finite gradients says null.
        _append(self.files["metrics.jsonl"], {k: v if math.isfinite(v) else None for k, v in row.items()})
        for key in row.keys() - {"step", "epoch"}:
            self.board.add_scalar(f"train/{key}", row[key], row["step"])
        numbers = f"loss {row['loss']:.4f}  lr {row['lr']:.1e}  {row['questions_per_s']:.1f} questions/s  "
        if "questions_per_gpu_hour" in row:
            numbers += f"{row['questions_per_gpu_hour']:,.0f} questions/GPU-hour"
        else:
            numbers += f"{row['tokens'] / row['seconds']:,.0f} tokens/s"
        if "mfu" in row:
            numbers += f"  MFU {row['mfu']:.0%}"
        short = numbers.replace("questions", "q").replace("tokens", "tok").replace("GPU-hour", "GPU-h")
        self.progress.update(self.task, completed=row["step"], numbers=short)
        # A log file gets a line now and then where a terminal gets a bar.
        regular = row["step"] % max(1, self.total // 25) == 0
        if not self.console.is_terminal and (regular or row["step"] in (self.start + 1, self.total)):
            self.console.print(f"step {row['step']}/{self.total}  {numbers}", highlight=False, soft_wrap=True)

    def trace(self, step: int, ids: Sequence[str], tokens: int, loss: float) -> None:
        """A line of trace.jsonl, where the recipe asks for it."""
        if self.traces:
            _append(
                self.files["trace.jsonl"], {"step": step, "ids": ids, "tokens": tokens, "loss": loss.hex()}
            )

    def evaluation(self, step: int, part: str, result: dict[str, Any]) -> None:
        """A line of eval.jsonl."""
        if not self.writes:
            return
        _append(self.files["eval.jsonl"], {"step": step, "split": part, **result})
        self.board.add_scalar(f"{part}/exact", result["exact"], step)
        self.console.print(
            f"step {step}: {part} exact {100 * result['exact']:.1f} % of {result['n']} "
            f"(prior {100 * result['prior']:.1f} %)",
            highlight=False,
        )

    def _forget_later_steps(self) -> None:
        """Drop the lines of steps that will be done again, and a line that was cut off."""
        for name in RECORDS:
            file = self.run / name
            if file.is_file():
                rows = file.read_text(encoding="utf-8").splitlines(keepends=True)
                kept = [row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= self.start]
                checkpoint.write_text(file, "".join(kept))


def _append(file: TextIO, row: dict[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()
