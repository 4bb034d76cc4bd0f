"""Checkpoints: written aside, verified, found by step; a folder that PEFT and transformers load as it is.

    checkpoints/
        .tmp-step-000200/            being written or deleted
        .tmp-replaced-step-000200/   the former one of this step, until the new one is verified
        diverged-step-000200/        renamed by `set_aside`: its weights give no finite gradients
        step-000200/                 what PEFT, transformers and vLLM expect, and nothing else:
                                     adapter_model.safetensors or model.safetensors, config, tokenizer,
                                     processor
            trainer/                 recipe.yaml, state.json, manifest.json, optimizer.safetensors

state.json holds the step, a digest of the training data and, where it was evaluated, the score with minus the
loss (the larger the better: a metric that should be small is made negative); and what scores are judged by:
the metric, a digest of the questions.

The manifest holds size and SHA-256 of every other file. A folder counts only if all of them agree, and if it
holds plain files alone, no pickles among them. What a killed run leaves is put in order at the next start;
whatever else lies here is left alone.

Training goes on while a `Writer` writes, in a thread of its own, what it copied into host memory.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from surgvqa import memory, recipe
from surgvqa.digests import Digests, sha256
from surgvqa.endings import StorageFailure
from surgvqa.recipe import BadInput, Recipe
from surgvqa.results import MANIFEST as MANIFEST
from surgvqa.results import RECIPE, TRAINER
from surgvqa.results import STATE as STATE

log = logging.getLogger("surgvqa")

PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
"""What such files hold could run code when it is read; we write none."""
Score = tuple[float, float]
"""The value that a checkpoint is judged by and, for equal ones, minus the loss: the larger the better."""
UNSCORED: Score = (-math.inf, -math.inf)
_NO_MANIFEST = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)
_OWN = re.compile(r"step-(\d{6,})\Z")
_DIVERGED = re.compile(r"diverged-step-(\d{6,})\Z")
_ASIDE = re.compile(r"\.tmp-(replaced-)?(step-\d{6,})\Z")


@dataclass(frozen=True)
class Written:
    """What a checkpoint took."""

    step: int
    bytes: int
    seconds: float
    """From the end of its step until it was verified and older ones were deleted."""
    waited: float
    """Seconds that training waited: for the copy, and for the rest where something needed it whole."""


class Writer:
    """Writes checkpoints while training goes on, one at a time. Only the main process's writes.

    `tell` is called, by `write`, `failed` or `wait`, with what each took.
    """

    def __init__(self, root: Path, keep: int, tell: Callable[[Written], None]) -> None:
        self.root, self.keep, self.tell = root, keep, tell
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[Written] | None = None
        self._waited = 0.0

    def write(self, step: int, fill: Callable[..., None], *tensors: Mapping[str, Tensor]) -> None:
        """Begin to write a step's checkpoint: `fill(folder, *tensors)`, with the tensors as they are now.

        Where a copy of them would take more than half of the host's free memory, nothing is copied, and the
        checkpoint is written when this returns. Raises what `wait` raises, of the one before.
        """
        self.wait()
        began = time.perf_counter()
        unique = {id(tensor): tensor.nbytes for each in tensors for tensor in each.values()}
        copied = 2 * sum(unique.values()) <= memory.host_free()
        held = [copies(each) for each in tensors] if copied else tensors
        self._pending = self._thread.submit(self._write, step, began, fill, held)
        self._waited = time.perf_counter() - began
        if not copied:
            self.wait()

    def failed(self) -> bool:
        """Whether the write that was going on has failed, which `wait` raises. Never waits."""
        if self._pending is None or not self._pending.done():
            return False
        if self._pending.exception() is None:
            self.wait()
        return self._pending is not None

    def wait(self) -> None:
        """Until nothing is being written. Raises StorageFailure, once, where it could not be written."""
        if self._pending is not None:
            began = time.perf_counter()
            pending, self._pending = self._pending, None
            written = pending.result()
            self.tell(replace(written, waited=self._waited + time.perf_counter() - began))

    def _write(self, step: int, began: float, fill: Callable[..., None], tensors: Iterable[Any]) -> Written:
        with writing(self.root, step, keep=self.keep) as folder:
            fill(folder, *tensors)
        size = sum(file.stat().st_size for file in _files(self.root / folder_name(step)))
        return Written(step, size, time.perf_counter() - began, 0.0)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Wait for what is being written; where the run ends for another reason, a failure is only logged."""
        try:
            self.wait()
        except Exception as failure:
            if error is None:
                raise
            log.error("%s", failure)
        finally:
            self._thread.shutdown()


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in host memory, whatever becomes of the originals; of tied ones a single copy."""
    made = {id(tensor): tensor.detach().to("cpu", copy=True).contiguous() for tensor in tensors.values()}
    return {name: made[id(tensor)] for name, tensor in tensors.items()}


@contextmanager
def writing(root: Path, step: int, *, keep: int) -> Iterator[Path]:
    """Yield a folder to fill, with an empty TRAINER in it. On exit make it durable, then delete old ones
    beyond `keep`.

    The best is kept, and folders of later steps are deleted, as this run has replaced them. Raises
    StorageFailure where the disk fails; the former checkpoints are then still there.
    """
    final, aside = root / folder_name(step), root / f".tmp-{folder_name(step)}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        if final.exists() and not _ours(final):
            raise FileExistsError("something that is not a checkpoint has its name; move it away")
        shutil.rmtree(aside, ignore_errors=True)
        (aside / TRAINER).mkdir(parents=True)
        yield aside
        write_json(aside / MANIFEST, _manifest(aside))
        for file in _files(aside):
            _sync(file)
        _sync(aside / TRAINER)
        _sync(aside)
        if final.exists():
            final.rename(root / f".tmp-replaced-{final.name}")
        aside.rename(final)
        _sync(root)
        if problems := verify(final):
            final.rename(aside)
            raise OSError(f"it does not hold what was written: {'; '.join(problems)}")
    except (OSError, SafetensorError) as error:
        written = sum(file.stat().st_size for file in _files(aside)) if aside.is_dir() else 0
        remove_leftovers(root)
        last = newest(root)[0]
        raise StorageFailure(
            f"{final}: the checkpoint could not be written: {error} ({written:,} bytes of it were, "
            f"{shutil.disk_usage(root.parent).free:,} are free). The last good one is "
            f"{last or 'none: this was the first'}. Make room, and the same command goes on from there"
        ) from error
    ours = steps(root)
    kept = {best(root, up_to=step), *[folder for old, folder in ours if old <= step][-keep:]}
    for _, folder in ours:
        if folder not in kept:
            folder.rename(root / f".tmp-{folder.name}")
    for old, folder in diverged(root):
        if old <= step:  # training got past it
            shutil.rmtree(folder, ignore_errors=True)
    remove_leftovers(root)


def set_aside(root: Path, step: int) -> None:
    """Rename the checkpoints of `step` and later, so that no start resumes from or evaluates them."""
    for number, folder in steps(root):
        if number >= step:
            aside = root / f"diverged-{folder.name}"
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            _sync(root)
            log.warning("warning: %s gives no finite gradients; renamed to %s", folder, aside.name)


def diverged(root: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of the checkpoints that `set_aside` renamed, oldest first."""
    return _found(root, _DIVERGED)


def room(run: Path, size: int, *, keep: int, saves: int) -> None:
    """Raise StorageFailure where the disk has no room for the checkpoints to come.

    They are `saves`, of about `size` bytes each; `keep` of them, the best included, lie there while one more
    is written. What already lies there counts as theirs.
    """
    there = [folder for _, folder in steps(run / "checkpoints")]
    most = min(len(there) + saves, keep + 1)
    needed = most * size - sum(file.stat().st_size for folder in there for file in _files(folder))
    needed = max(needed, size) if saves else 0
    free = shutil.disk_usage(run).free
    if free < needed:
        raise StorageFailure(
            f"output: {run}: a checkpoint takes about {_mib(size)}, and up to {most} lie there at a time "
            f"(checkpoint.keep, the best, one being written). That is {_mib(needed)} more than is there now, "
            f"and {_mib(free)} are free; make room or choose another output"
            + (", or lower checkpoint.keep" if keep > 3 else "")
        )


def folder_name(step: int) -> str:
    return f"step-{step:06d}"


def steps(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of what looks like a checkpoint of ours, oldest first; not yet verified."""
    return _found(root, _OWN)


def _found(root: Path, names: re.Pattern[str]) -> list[tuple[int, Path]]:
    """Return (step, folder) of our checkpoints whose name matches, oldest first."""
    found = [(names.match(folder.name), folder) for folder in root.iterdir()] if root.is_dir() else []
    return sorted(
        (int(match[1]), folder)
        for match, folder in found
        if match and not folder.is_symlink() and _ours(folder)
    )


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and what is wrong with newer ones that do not."""
    rejected = [f"{folder}: {why}" for folder, why in _closed(root)]
    for _, folder in reversed(steps(root)):
        problems = verify(folder)
        if not problems:
            return folder, rejected
        rejected += [f"{folder}: {problem}" for problem in problems]
    return None, rejected


def verify(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, file by file; nothing where it is whole.

    Of files that the manifest does not name, only pickles, links and the like are refused.
    """
    try:
        if _former(folder):
            return [
                "was written by another version of surgvqa, which kept its files beside the weights and not "
                f"in {TRAINER}/; use that version, or start over with --fresh --yes"
            ]
        if not (folder / MANIFEST).is_file():
            return [f"{MANIFEST}: missing"]
        expected = _expected(folder)
    except _NO_MANIFEST as error:
        return [f"{MANIFEST}: unreadable ({error})"]
    problems = [] if STATE in expected else [f"{MANIFEST}: does not name {STATE}"]
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.suffix in PICKLES:
            problems.append(f"{name}: could run code when it is read, and is not of surgvqa")
        elif file.is_symlink() or not (file.is_file() or file.is_dir()):
            problems.append(f"{name}: is a link, a pipe or a device")
    for name, (size, digest) in expected.items():
        try:
            fault = _fault(folder, name, size, digest)
        except (OSError, ValueError) as error:  # no permission, a bad sector, a name that is none
            fault = f"cannot be read ({getattr(error, 'strerror', None) or error})"
        if fault:
            problems.append(f"{name}: {fault}")
    return problems


def _fault(folder: Path, name: str, size: int, digest: str) -> str | None:
    """Return what is wrong with a file that the manifest names; None where it is whole. Raises OSError."""
    file = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return "is not in the checkpoint's folder"
    if not file.is_file():
        return "missing"
    if file.stat().st_size != size:
        return f"{file.stat().st_size} bytes instead of {size}"
    if sha256(file) != digest:
        return "content changed"
    return _unreadable(file) if file.suffix == ".safetensors" else None


def _closed(root: Path) -> list[tuple[Path, str]]:
    """Return the folders with a checkpoint's name that cannot be read, each with the reason."""
    found = []
    for folder in sorted(root.iterdir(), reverse=True) if root.is_dir() else []:
        if _OWN.match(folder.name) and not folder.is_symlink():
            try:
                next(folder.iterdir(), None)
                (folder / STATE).is_file()
            except NotADirectoryError:
                continue
            except OSError as error:
                found.append((folder, f"cannot be read ({error.strerror})"))
    return found


def remove_leftovers(root: Path) -> None:
    """Delete what was being written or deleted, and put back what was to be replaced and is not yet."""
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        match = _ASIDE.match(folder.name)
        if match and match[1] and not (root / match[2]).exists():
            folder.rename(root / match[2])
        elif match:
            shutil.rmtree(folder, ignore_errors=True)


def score(folder: Path) -> Score:
    """What evaluation gave a checkpoint, from its state.json; UNSCORED where it was not evaluated."""
    try:
        value, nats = json.loads((folder / STATE).read_text(encoding="utf-8"))["score"]
        found = float(value), float(nats)
    except (OSError, ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return UNSCORED
    return found if all(map(math.isfinite, found)) else UNSCORED


def judged(folder: Path) -> Any:
    """What a checkpoint's score was judged by; only scores of the same can be compared."""
    try:
        return json.loads((folder / STATE).read_text(encoding="utf-8")).get("judged")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def base_of(folder: Path) -> Digests:
    """Return the digests that a checkpoint's base model had in training. Raises BadInput without them."""
    try:
        return Digests.model_validate(json.loads((folder / STATE).read_text(encoding="utf-8"))["base"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise BadInput(f"{folder / STATE}: not a checkpoint's state: its base model: {said}") from None


def recipe_of(folder: Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe that a checkpoint was trained with. Raises BadInput where this version cannot read it."""
    overrides = list(overrides)
    try:
        trained = recipe.load(folder / RECIPE)
    except BadInput as error:
        raise BadInput(
            [
                f"{folder} was written by another version of surgvqa, whose recipe this one does not read: "
                "use that version, or start over with --fresh --yes; do not edit the file, the checkpoint "
                "would no longer verify",
                *(f"  {problem}" for problem in error.problems),
            ]
        ) from None
    return recipe.load(folder / RECIPE, overrides) if overrides else trained


def best(root: Path, up_to: int | None = None) -> Path | None:
    """The checkpoint with the highest score, the earliest of several; None where none was evaluated.

    Where they were judged by different things, of those judged as the last.
    """
    scored = [
        folder
        for step, folder in steps(root)
        if (up_to is None or step <= up_to) and score(folder) > UNSCORED
    ]
    comparable = [folder for folder in scored if judged(folder) == judged(scored[-1])]
    return max(comparable, key=score, default=None)


def chosen(run: Path) -> Path:
    """The best checkpoint of a run, else the newest that verifies. Raises BadInput where there is none."""
    if not (run / "recipe.yaml").is_file():
        raise BadInput(f"{run}: no recipe.yaml here; give the output folder of a training run")
    root = run / "checkpoints"
    top = best(root)
    problems = verify(top) if top else []
    if top and not problems:
        return top
    last, rejected = newest(root)
    for problem in dict.fromkeys([*(f"{top}: {problem}" for problem in problems), *rejected]):
        log.warning("warning: %s", recipe.printable(problem))
    if last is None:
        raise BadInput(rejected or f"{root}: no checkpoint here; has the run saved one yet?")
    return last


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old one or the new one, whole."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.unlink(missing_ok=True)
    with aside.open("x", encoding="utf-8") as file:  # a new file: a link of that name is not followed
        file.write(text)
    _sync(aside)
    aside.replace(path)


def moments(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """AdamW's own moments as `parameter name|moment` → tensor."""
    return {
        f"{name}|{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(
    file: Path, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> None:
    """Load `moments` from a safetensors file into an optimizer.

    Raises KeyError if the file lacks a parameter, ValueError if its moments have another type or shape.
    """
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(file).items():
        name, _, moment = key.rpartition("|")
        states.setdefault(name, {})[moment] = value
    for name, parameter in parameters.items() if states else ():
        if not _moments_of(parameter, states[name]):
            raise ValueError(f"{name} needs exp_avg and exp_avg_sq of its shape and a step count, in fp32")
    if states:
        for name, parameter in parameters.items():
            # AdamW keeps its step count on the CPU, unless it is fused.
            fused = any(group.get("fused") for group in optimizer.param_groups)
            optimizer.state[parameter] = {
                key: value if key == "step" and not fused else value.to(parameter.device)
                for key, value in states[name].items()
            }


def _moments_of(parameter: nn.Parameter, moments: Mapping[str, Tensor]) -> bool:
    """Return whether these are the parameter's AdamW moments: a count and two of its shape, all in fp32."""
    shapes = {name: (value.dtype, value.shape) for name, value in moments.items()}
    own, count = (torch.float32, parameter.shape), (torch.float32, torch.Size([]))
    return shapes == {"step": count, "exp_avg": own, "exp_avg_sq": own}


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder is a checkpoint rather than a run; `verify` says whether it is whole."""
    return any((folder / name).exists() for name in (MANIFEST, STATE)) or _former(folder)


def _ours(folder: Path) -> bool:
    """Whether a folder has, or by its manifest had, a step's state."""
    try:
        return _former(folder) or (folder / STATE).is_file() or STATE in _expected(folder)
    except _NO_MANIFEST:
        return False


def _former(folder: Path) -> bool:
    """Return whether a folder is a checkpoint of a version that kept its files beside the weights."""
    return (folder / "state.json").is_file() and (folder / "manifest.json").is_file()


def _expected(folder: Path) -> dict[str, tuple[int, str]]:
    """File name → (bytes, SHA-256), as the manifest has it."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest.items()}


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": sha256(file)}
        for file in _files(folder)
    }


def _unreadable(file: Path) -> str | None:
    """What safetensors says of a file that is none."""
    try:
        with safe_open(file, "pt"):
            return None
    except (OSError, SafetensorError) as error:
        return f"no safetensors file ({error})"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
