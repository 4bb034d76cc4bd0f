"""Checkpoints: written aside, verified, found by step; a folder that PEFT and transformers load as it is.

    checkpoints/
        .tmp-step-000200/     being written; what a killed run leaves is removed at the next start
        step-000200/          adapter_model.safetensors or model.safetensors, tokenizer, processor,
                              recipe.yaml, optimizer.safetensors, state.json, manifest.json
        best.json             which step evaluation liked best

The manifest holds size and SHA-256 of every other file. A folder counts only if all of them agree.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MANIFEST = "manifest.json"
_OWN = re.compile(r"step-(\d{6,})\Z")


def save(root: Path, step: int, write: Callable[[Path], None], *, keep: int) -> Path:
    """Have `write` fill a folder, make it durable, and only then delete old ones beyond `keep`, but the best.

    Raises OSError where the disk fails; what was there before is then still there.
    """
    root.mkdir(parents=True, exist_ok=True)
    final, aside = root / f"step-{step:06d}", root / f".tmp-step-{step:06d}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    write(aside)
    write_json(aside / MANIFEST, _manifest(aside))
    for file in _files(aside):
        _sync(file)
    _sync(aside)
    if final.exists():
        shutil.rmtree(final)
    aside.rename(final)
    _sync(root)
    if problems := verify(final):
        raise OSError(f"checkpoint {final} does not hold what was written: {'; '.join(problems)}")
    kept = {step for step, _ in steps(root)[-keep:]} | {(best(root) or {}).get("step")}
    for old, folder in steps(root):
        if old not in kept:
            shutil.rmtree(folder)
    return final


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
    for folder in root.glob(".tmp-step-*"):
        shutil.rmtree(folder)


def best(root: Path) -> dict[str, Any] | None:
    """`{"step", "metric", "value"}` of the best checkpoint, if one was marked and is there."""
    file = root / "best.json"
    if not file.is_file():
        return None
    marked = json.loads(file.read_text(encoding="utf-8"))
    return dict(marked) if (root / f"step-{marked['step']:06d}" / MANIFEST).is_file() else None


def mark_best(root: Path, step: int, metric: str, value: float) -> None:
    write_json(root / "best.json", {"step": step, "metric": metric, "value": value})


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader finds the old file or the new one, whole."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _sync(aside)
    aside.replace(path)


def save_optimizer(file: Path, optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> None:
    """AdamW's moments as `parameter name|moment` → tensor."""
    tensors = {
        f"{name}|{key}": value.detach().cpu().contiguous()
        for parameter, name in names.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    save_file(tensors, file)


def load_optimizer(file: Path, optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> None:
    """The inverse of `save_optimizer`. Raises KeyError where a parameter has no moments in the file."""
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(file).items():
        name, _, moment = key.rpartition("|")
        states.setdefault(name, {})[moment] = value
    if states:
        for parameter, name in names.items():
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
