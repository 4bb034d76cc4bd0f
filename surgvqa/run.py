"""A run's folder: claimed, resumed, recorded. Only the main process writes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import math
import os
import shutil
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import numpy as np
from accelerate import Accelerator
from PIL.Image import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from surgvqa import checkpoint, endings, lock
from surgvqa.datasets import Problem
from surgvqa.endings import ENDED, Stop
from surgvqa.lock import METRICS, Lock
from surgvqa.processes import main_first
from surgvqa.recipe import COUNT, BadInput, Eval, Log, Recipe
from surgvqa.results import json_of
from surgvqa.scores import percent
from surgvqa.terminal import Console

log = logging.getLogger("surgvqa")

EVALUATIONS, CHECKPOINTS = "eval.jsonl", "checkpoints.jsonl"
TRACE, UNUSUAL, STARTS = "trace.jsonl", "unusual.jsonl", "starts.jsonl"
RECORDS = (METRICS, EVALUATIONS, CHECKPOINTS, TRACE, UNUSUAL, STARTS)
"""Files with a line per step, evaluation, checkpoint or start."""

RECENT = 50
"""Number of the last gradient norms with which a step's own is compared."""

CHANGES = "changes.jsonl"

SKIPPED = "skipped.jsonl"
"""What data.on_error: skip left out, a line for each row or image; only where there was anything."""

HARMLESS = (
    "output", "log", "eval", "checkpoint", "data.path", "data.revision", "data.labels", "data.on_error",
    "data.workers", "data.split.path", "model.name", "model.revision", "model.attn",
    "batch.tokens_per_micro_batch", "batch.trees", "train.checkpoint_layers", "train.compile",
    "train.max_hours", "train.peer_timeout",
)  # fmt: skip
"""Keys, or sections, that may differ between the runs of one experiment: they do not change what is
learned. The training data and the base model are compared by their digests."""

_ADAPTED = (
    "model.train_vision", "model.train_merger", "model.lora.rank", "model.lora.alpha", "model.lora.modules",
)  # fmt: skip
"""Keys that say which adapters there are and what they do."""

INHERENT = ("model.tune", *_ADAPTED)
"""Keys that say which weights a checkpoint holds: no other value goes on from it."""


@dataclass(frozen=True)
class Resume:
    """Where a run goes on."""

    step: int
    folder: Path
    best: checkpoint.Score
    """The best score so far, by what is now judged by."""
    stale: int
    """How many evaluations in a row had none better."""
    skipped: int
    """How many of the last steps had no finite gradients."""
    settled: bool
    """Whether the evaluation that was due at this step was made."""
    postponed: int
    """Number of skipped steps right before this one. What was due at them is due now."""
    norms: list[float]
    """The gradient norms of the last RECENT steps that had a finite one."""
    adapter: dict[str, str] | None
    """What the run began with: `first_weights` as `identity` tells of it."""
    fitted: tuple[int | str, int, str, int]
    """batch.tokens_per_micro_batch, processes, their device, and the tokens that a micro-batch then had."""
    changes: list[str]
    """In what the run goes on otherwise than it was."""


class _State(BaseModel):
    """What state.json holds beside the score."""

    model_config = ConfigDict(strict=True)
    step: Annotated[int, Field(ge=1, le=COUNT)]
    data: dict[str, int | str]
    skipped: Annotated[int, Field(ge=0, le=COUNT)]
    settled: bool
    fitted: tuple[int | Literal["auto"], int, str, Annotated[int, Field(ge=1, le=COUNT)]]
    adapter: dict[str, str] | None = None
    judged: dict[str, str] | None = None
    stale: Annotated[int, Field(ge=0, le=COUNT)] = 0


def claim(run: Path) -> Lock:
    """Make the folder this run's own, and clear away what a killed run was still writing.

    Raises BadInput where it cannot be written, belongs to a run that is going on, or is not a run's folder,
    and StorageFailure where the disk is full.
    """
    with contextlib.ExitStack() as held:
        try:
            run.mkdir(parents=True, exist_ok=True)
            if problems := _foreign(run):
                raise BadInput(problems)
            lock = Lock(run)
            held.callback(lock.release)
            (run / "checkpoints").mkdir(exist_ok=True)
            checkpoint.remove_leftovers(run / "checkpoints")
            (run / ENDED).unlink(missing_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise BadInput(
                f"output: {error.filename}: a file is where a folder must be ({error.strerror}); choose "
                "another output, or move the file away"
            ) from None
        except OSError as error:
            if endings.is_storage(error) and error.errno != errno.EROFS:
                raise endings.StorageFailure(f"output: {run}: {error.strerror}; make room") from None
            raise BadInput(
                f"output: {error.filename or run} cannot be written ({error.strerror}); choose an output "
                "that can, or have this one made writable"
            ) from None
        held.pop_all()
    return lock


def _foreign(run: Path) -> list[str]:
    """Why a run must not write into a folder: it holds other things, or what leads out of it."""
    names = sorted(entry.name for entry in run.iterdir())
    if names and not lock.is_run(run) and not checkpoint.steps(run / "checkpoints"):
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        return [
            f"output: {run} holds other things ({shown}) and no run; choose a folder of its own, which is "
            "made where it is not there"
        ]
    root, problems = run.resolve(), []
    for folder, folders, files in os.walk(run):
        for path in (Path(folder, name) for name in (*folders, *files)):
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:  # of a run that is going on
                continue
            if stat.S_ISLNK(mode) and not path.resolve().is_relative_to(root):
                problems.append(
                    f"output: {path} is a link out of the run's folder, through which it would write and "
                    "delete; remove it, or make the run's folder itself the link"
                )
            elif not (stat.S_ISLNK(mode) or stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                problems.append(f"output: {path} is a pipe, a socket or a device; remove it")
    return problems


@contextlib.contextmanager
def owned(run: Path, accelerator: Accelerator, stop: Stop) -> Iterator[list[str]]:
    """Hold the run's lock; on exit write how the run ended to ended.json.

    Yields a list: the texts that the caller adds to it are the reason that is written. A run that is done
    stays so when a later start of it is refused. If `stop` has to end the process, it writes the same.
    """
    locks: list[Lock] = []
    before = json_of(run / ENDED)

    def last_words(reason: str) -> None:
        log.error("%s", reason)
        end(run, endings.PREEMPTED, reason)
        locks[0].release()

    def hold() -> None:
        locks.append(claim(run))
        stop.last_words = last_words

    main_first(accelerator, hold)
    code, reason, told = 1, "interrupted", list[str]()
    try:
        yield told
        code, reason = 0, "; ".join(told) or "done"
    except (Exception, endings.Stopped) as error:
        if isinstance(error, OSError):
            error = endings.of_os_error(error, run) or error
        code, reason = getattr(error, "exit_code", 1), str(error)
        raise error
    finally:
        if locks:
            if code == BadInput.exit_code and before.get("code") == 0:
                code, reason = 0, str(before.get("reason"))
            end(run, code, reason)
            locks[0].release()


def record_start(run: Path, step: int, environment: Mapping[str, Any]) -> None:
    """A line of starts.jsonl: after which step, when, and `processes.environment`."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with (run / STARTS).open("a", encoding="utf-8") as file:
        _append(file, {"step": step, "at": now, **environment})


def record_skipped(run: Path, skipped: Sequence[Problem]) -> None:
    """Write skipped.jsonl, or remove that of a former start where nothing is skipped any more."""
    if not skipped:
        (run / SKIPPED).unlink(missing_ok=True)
        return
    rows = [{"place": problem.place, "why": problem.what} for problem in skipped]
    checkpoint.write_text(run / SKIPPED, "".join(json.dumps(row) + "\n" for row in rows))


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
    root = run / "checkpoints"
    for _, folder in (*checkpoint.steps(root), *checkpoint.diverged(root)):
        shutil.rmtree(folder)
    events, traces = "tensorboard/events.out.tfevents.*", "profile/*.pt.trace.json"
    for name in (
        "recipe.yaml",
        ENDED,
        CHANGES,
        SKIPPED,
        *RECORDS,
        "predictions*.jsonl",
        "predictions*.partial",
        "scores*.json",
        events,
        traces,
    ):
        for file in run.glob(name):
            file.unlink()


def newest_whole(run: Path) -> Path | None:
    """Return a run's newest whole checkpoint; None if the run has no checkpoint.

    Raises BadInput if it has some and none is whole.
    """
    folder, rejected = checkpoint.newest(run / "checkpoints")
    for problem in rejected:
        log.warning("warning: %s", problem)
    if folder is None and rejected:
        raise BadInput([*rejected, f"{run}: no checkpoint is whole; train anew with --fresh --yes"])
    return folder


def resumable(
    folder: Path,
    settings: Recipe,
    fingerprint: Mapping[str, str | int],
    accept_changes: bool = False,
    judged: Mapping[str, str] | None = None,
) -> Resume:
    """Return where a run resumes from its checkpoint. Raises BadInput if recipe or data have changed.

    With `accept_changes` it resumes all the same, unless other weights would train. `judged` says by what
    evaluations are judged: scores by anything else do not count. `prepare.resolve_model` compares the base
    model.
    """
    root, run = folder.parent, folder.parent.parent
    state = _state(folder)
    changes = differences(folder, settings, fingerprint)
    inherent = any(_among(INHERENT, change.partition(":")[0]) for change in changes)
    step = state.step
    if inherent or (changes and not accept_changes):
        if inherent:
            cures = (
                "or start over with --fresh --yes; its weights are others, so --accept-changes does not help:"
            )
        else:
            cures = (
                "start over with --fresh --yes, or go on with the changes, which are recorded, with "
                "--accept-changes:"
            )
        cure = f"{folder} was trained otherwise; choose another output, {cures}"
        raise BadInput([cure, *(f"  {change}" for change in changes)])
    top = checkpoint.best(root, up_to=step)
    norms = [_finite(json.loads(row).get("grad_norm")) for row in _whole(run / METRICS, up_to=step)]
    earlier = itertools.takewhile(lambda norm: norm is None, reversed(norms[:-1]))
    return Resume(
        step,
        folder,
        checkpoint.score(top) if top and checkpoint.judged(top) == judged else checkpoint.UNSCORED,
        state.stale if state.judged == judged else 0,
        state.skipped,
        state.settled,
        len(list(earlier)),
        [norm for norm in norms if norm is not None][-RECENT:],
        state.adapter,
        state.fitted,
        changes,
    )


def differences(folder: Path, settings: Recipe, fingerprint: Mapping[str, str | int]) -> list[str]:
    """What a checkpoint was trained with and a recipe and the digest of its data do not say."""
    found = [
        difference
        for difference in checkpoint.recipe_of(folder).differences(settings)
        if not _among(HARMLESS, difference.partition(":")[0])
    ]
    if (data := _state(folder).data) != fingerprint:
        found.append(f"the training data: {_data_difference(data, fingerprint)}")
    return found


def record_changes(run: Path, step: int, changes: Sequence[str]) -> None:
    """Write what the run goes on with after a step into changes.jsonl, where that is not what it was."""
    if changes:
        with (run / CHANGES).open("a", encoding="utf-8") as file:
            _append(file, {"after_step": step, "changes": list(changes)})
        log.warning("warning: going on after step %d with changes: %s", step, "; ".join(changes))


def first_weights(settings: Recipe) -> Path | None:
    """The checkpoint that the recipe's `model.adapter` means; None where a run begins with new weights.

    Raises BadInput where there is none, it is not whole, or it was trained as another model;
    `prepare.resolve_model` compares the base model.
    """
    if settings.model.adapter is None:
        return None
    given = Path(settings.model.adapter)
    if not given.is_dir():
        raise BadInput(f"model.adapter: {given}: no such folder; give a run's, or one of its checkpoints'")
    folder = given
    if not checkpoint.is_checkpoint(given):
        try:
            folder = checkpoint.chosen(given)
        except BadInput as error:
            raise BadInput(f"model.adapter: {problem}" for problem in error.problems) from None
        if json_of(given / ENDED).get("code") != 0:
            log.warning(
                "warning: model.adapter: %s has not finished; beginning with its %s", given, folder.name
            )
    elif problems := checkpoint.verify(folder):
        raise BadInput(f"model.adapter: {folder}: {problem}" for problem in problems)
    if folder.resolve().is_relative_to(Path(settings.output).resolve()):
        raise BadInput(
            f"model.adapter: {folder} lies in this run's own output, which --fresh clears; choose another"
        )
    trained = checkpoint.recipe_of(folder)
    differences = trained.differences(settings)
    adapted = _ADAPTED if settings.model.tune == "lora" else ()
    same = ("model.tune", *adapted)
    if others := [each for each in differences if _among(same, each.partition(":")[0])]:
        raise BadInput(
            [f"model.adapter: {folder} holds weights of another model than this recipe's:"]
            + [f"  {other}" for other in others]
        )
    split = [each for each in differences if _among(["data.split"], each.partition(":")[0])]
    if split and trained.data.format == settings.data.format:
        log.warning(
            "warning: model.adapter: %s was trained with another split, so what is val or test now may have "
            "been in its train: %s", folder, "; ".join(split),
        )  # fmt: skip
    return folder


def identity(folder: Path) -> dict[str, str]:
    """A checkpoint's place, and the digest of its manifest, which has those of all its files."""
    digest = hashlib.sha256((folder / checkpoint.MANIFEST).read_bytes()).hexdigest()
    return {"checkpoint": str(folder), "manifest": f"sha256:{digest}"}


def _data_difference(old: Mapping[str, str | int], new: Mapping[str, str | int]) -> str:
    """What changed between two fingerprints of `prepare`."""
    if old.get("questions") != new["questions"]:
        return f"{old.get('questions')} questions → {new['questions']}"
    if old.get("ids") != new["ids"]:
        return "other questions, by their ids"
    names = {
        "texts": "the texts of questions or answers",
        "kinds": "question types, stages or names of images",
        "images": "the bytes of images",
    }
    changed = [what for key, what in names.items() if old.get(key) != new[key]]
    if old.get("order") != new["order"]:
        changed.append("the order of the questions")
    return " and ".join(changed) + " changed"


def _state(folder: Path) -> _State:
    """A checkpoint's state.json. Raises BadInput where it is not what we write."""
    try:
        state = _State.model_validate_json((folder / checkpoint.STATE).read_bytes())
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, detail['loc']))} {detail['msg']}" for detail in error.errors()]
        raise BadInput(f"{folder / checkpoint.STATE}: not a checkpoint's state: {'; '.join(wrong)}") from None
    if checkpoint.folder_name(state.step) != folder.name:
        raise BadInput(f"{folder / checkpoint.STATE}: says step {state.step}")
    return state


def _among(names: Sequence[str], key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


class Records:
    """The run's records and its progress bar; silent on all but the main process."""

    def __init__(
        self, run: Path, start: int, total: int, log: Log, console: Console, settled: bool = True
    ) -> None:
        """`settled`: whether the evaluation that was due at `start` was made."""
        self.run, self.start, self.total, self.console = run, start, total, console
        self.settled = settled
        self.writes = not console.quiet
        self.traces, self.profiles = log.trace and self.writes, log.profile and self.writes
        self.stack = contextlib.ExitStack()
        self.began = time.monotonic()

    def __enter__(self) -> Records:
        if self.writes:
            from torch.utils.tensorboard import SummaryWriter

            self._forget_later_steps()
            self.board = SummaryWriter(str(self.run / "tensorboard"), purge_step=self.start + 1)
            self.stack.callback(self.board.close)
            names = (METRICS, EVALUATIONS, CHECKPOINTS, *([TRACE] if self.traces else []))
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
        _append(self.files[METRICS], {k: v if math.isfinite(v) else None for k, v in row.items()})
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
            elapsed = time.monotonic() - self.began
            left = elapsed / (row["step"] - self.start) * (self.total - row["step"])
            times = f"{_clock(elapsed)} elapsed, {_clock(left)} to go"
            self.console.print(
                f"step {row['step']}/{self.total}  {numbers}  {times}", highlight=False, soft_wrap=True
            )

    def trace(self, step: int, ids: Sequence[str], tokens: int, loss: float) -> None:
        """A line of trace.jsonl, where the recipe asks for it."""
        if self.traces:
            _append(self.files[TRACE], {"step": step, "ids": ids, "tokens": tokens, "loss": loss.hex()})

    def unusual(self, step: int, what: str, ids: Sequence[str]) -> None:
        """A line of unusual.jsonl, which a run that goes well does not have."""
        if self.writes:
            with (self.run / UNUSUAL).open("a", encoding="utf-8") as file:
                _append(file, {"step": step, "what": what, "ids": ids})

    def evaluation(
        self, step: int, settings: Eval, row: Mapping[str, Any], picture: Image | None = None
    ) -> None:
        """A line of eval.jsonl, the same in TensorBoard with the picture, and a line to read."""
        if not self.writes:
            return
        part, metric = settings.split, settings.metric
        tag = "train-evaluated" if part == "train" else part  # train/loss is each step's
        _append(self.files[EVALUATIONS], {"step": step, "split": part, **row})
        for name, value in row.items():
            if name not in ("n", "boxes") and value is not None:
                self.board.add_scalar(f"{tag}/{name}", value, step)
        if picture is not None:
            self.board.add_image(f"{tag}/examples", np.asarray(picture), step, dataformats="HWC")
        named = [name for name in dict.fromkeys(("loss", metric)) if name != "exact"]
        told = [f"{name} {row[name]:.4f}" if row[name] is not None else f"{name} -" for name in named]
        self.console.print(
            f"step {step}: {part} {', '.join(told)}, exact {percent(row['exact'])} % of {row['n']} "
            f"(prior {percent(row['prior'])} %)"
            + (f", {row['cut']} cut at eval.max_new_tokens" if row.get("cut") else ""),
            highlight=False,
            soft_wrap=True,
        )

    def saved(self, written: checkpoint.Written) -> None:
        """A line of checkpoints.jsonl."""
        if not self.writes:
            return
        row = asdict(written)
        _append(self.files[CHECKPOINTS], row)
        for key in row.keys() - {"step"}:
            self.board.add_scalar(f"checkpoint/{key}", row[key], written.step)
        self.console.print(
            f"step {written.step}: checkpoint {written.bytes / 2**20:,.1f} MiB in {written.seconds:.2f} s "
            f"(the step waited {written.waited:.2f} s)",
            highlight=False,
        )

    def _forget_later_steps(self) -> None:
        """Drop the lines of what will be done again, and what a crash left of a line."""
        for name in RECORDS:
            file = self.run / name
            if file.is_file():
                last = self.start - 1 if name == EVALUATIONS and not self.settled else self.start
                checkpoint.write_text(file, "".join(_whole(file, up_to=last)))


def _clock(seconds: float) -> str:
    """Return a duration as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _whole(file: Path, up_to: int) -> list[str]:
    """The whole lines of a record up to a step; none where there is no such file."""
    rows = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
    return [row.decode() for row in rows if _step(row) <= up_to]


def _finite(value: object) -> float | None:
    """Return a value of a record if it is a finite number; else None."""
    try:
        return float(value) if type(value) in (int, float) and math.isfinite(value) else None  # type: ignore
    except OverflowError:
        return None


def _step(row: bytes) -> float:
    """The step of a line; infinity where it is no whole one."""
    try:
        return float(json.loads(row)["step"]) if row.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf


def _append(file: TextIO, row: dict[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()
