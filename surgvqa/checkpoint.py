"""Checkpoints: written aside, verified, found by step; a folder that PEFT and transformers load as it is.

    checkpoints/
        .tmp-step-000200/     being written; what a killed run leaves is removed at the next start
        step-000200/          adapter_model.safetensors or model.safetensors, tokenizer, processor,
                              recipe.yaml, optimizer.safetensors, state.json, manifest.json

state.json holds the step, a digest of the training data and, where it was evaluated, the score.

The manifest holds size and SHA-256 of every other file. A folder counts only if all of them agree.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from surgvqa import recipe
from surgvqa.endings import StorageFailure
from surgvqa.recipe import BadInput, Recipe

MANIFEST, STATE = "manifest.json", "state.json"
_OWN = re.compile(r"step-(\d{6,})\Z")


@contextmanager
def writing(root: Path, step: int, *, keep: int) -> Iterator[Path]:
    """A folder to fill; on leaving it is made durable, and then old ones beyond `keep` are deleted.

    The best is kept, and folders of later steps go: they belong to a future that was given up. Raises
    StorageFailure where the disk fails; what was there before is then still there.
    """
    final, aside = root / folder_name(step), root / f".tmp-{folder_name(step)}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        yield aside
        write_json(aside / MANIFEST, _manifest(aside))
        for file in _files(aside):
            _sync(file)
        _sync(aside)
        replaced = root / f".tmp-replaced-{folder_name(step)}"
        if final.exists():
            final.rename(replaced)
        aside.rename(final)
        _sync(root)
        shutil.rmtree(replaced, ignore_errors=True)
        if problems := verify(final):
            raise OSError(f"it does not hold what was written: {'; '.join(problems)}")
    except (OSError, SafetensorError) as error:
        written = sum(file.stat().st_size for file in _files(aside)) if aside.is_dir() else 0
        shutil.rmtree(aside, ignore_errors=True)
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
            shutil.rmtree(folder)


def room(run: Path, needed: int) -> None:
    """Raise StorageFailure where a checkpoint of so many bytes would not fit beside what is there."""
    free = shutil.disk_usage(run).free
    if free < needed:
        raise StorageFailure(
            f"output: {run}: a checkpoint takes about {needed / 2**20:,.0f} MiB and {free / 2**20:,.0f} are "
            "free; make room, or choose another output"
        )


def folder_name(step: int) -> str:
    return f"step-{step:06d}"


def steps(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of what looks like a checkpoint of ours, oldest first; not yet verified."""
    found = [(_OWN.match(folder.name), folder) for folder in root.iterdir()] if root.is_dir() else []
    return sorted(
        (int(match[1]), folder) for match, folder in found if match and (folder / MANIFEST).is_file()
    )


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and what is wrong with newer ones that do not."""
    rejected: list[str] = []
    for _, folder in reversed(steps(root)):
        problems = verify(folder)
        if not problems:
            return folder, rejected
        rejected += [f"{folder}: {problem}" for problem in problems]
    return None, rejected


def verify(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, file by file; nothing where it is whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        expected = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST}: unreadable ({error})"]
    problems = []
    for name, (size, digest) in expected.items():
        file = folder / name
        if not file.is_file():
            problems.append(f"{name}: missing")
        elif file.stat().st_size != size:
            problems.append(f"{name}: {file.stat().st_size} bytes instead of {size}")
        elif _sha256(file) != digest:
            problems.append(f"{name}: content changed")
    return problems


def remove_leftovers(root: Path) -> None:
    """Delete what a killed run was still writing."""
    for folder in root.glob(".tmp-*"):
        shutil.rmtree(folder)


def score(folder: Path) -> float:
    """What evaluation gave a checkpoint, from its state.json; minus infinity where it was not evaluated."""
    try:
        value = json.loads((folder / STATE).read_text(encoding="utf-8")).get("score")
    except (OSError, ValueError, AttributeError):
        return -math.inf
    return float(value) if isinstance(value, (int, float)) else -math.inf


def recipe_of(folder: Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe that a checkpoint was trained with. Raises BadInput where this version cannot read it."""
    overrides = list(overrides)
    try:
        trained = recipe.load(folder / "recipe.yaml")
    except BadInput as error:
        raise BadInput(
            [
                f"{folder} was written by another version of surgvqa, whose recipe this one does not read: "
                "use that version, or start over with --fresh --yes; do not edit the file, the checkpoint "
                "would no longer verify",
                *(f"  {problem}" for problem in error.problems),
            ]
        ) from None
    return recipe.load(folder / "recipe.yaml", overrides) if overrides else trained


def best(root: Path, up_to: int | None = None) -> Path | None:
    """The checkpoint with the highest score, the earliest of several; None where none was evaluated."""
    folders = [folder for step, folder in steps(root) if up_to is None or step <= up_to]
    top = max(folders, key=score, default=None)
    return top if top is not None and score(top) > -math.inf else None


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old one or the new one, whole."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    _sync(aside)
    aside.replace(path)


def save_optimizer(
    file: Path, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> None:
    """AdamW's moments as `parameter name|moment` → tensor."""
    tensors = {
        f"{name}|{key}": value.detach().cpu().contiguous()
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    save_file(tensors, file)


def load_optimizer(
    file: Path, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> None:
    """The inverse of `save_optimizer`. Raises KeyError where a parameter has no moments in the file."""
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(file).items():
        name, _, moment = key.rpartition("|")
        states.setdefault(name, {})[moment] = value
    if states:
        for name, parameter in parameters.items():
            # AdamW keeps its step count on the CPU, unless it is fused.
            fused = any(group.get("fused") for group in optimizer.param_groups)
            optimizer.state[parameter] = {
                key: value if key == "step" and not fused else value.to(parameter.device)
                for key, value in states[name].items()
            }


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": _sha256(file)}
        for file in _files(folder)
    }


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
