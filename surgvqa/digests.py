"""Digests of a model folder, which show that a base model has changed since a run began.

    Folder ── of ──▶ Digests of weights, config, chat template, tokenizer, image processor
    Digests before and now ── differences ──▶ a line for each part that changed

A checkpoint records the digests of its base model. Config, chat template and image processor are compared as
values, so it does not matter in which file a folder keeps them. No digest depends on the folder's path.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from surgvqa import hub
from surgvqa.hub import Folder
from surgvqa.recipe import BadInput
from surgvqa.results import MANIFEST, json_of

_WHOLE = 64 << 20
"""Safetensors files of up to so many bytes are always read whole."""
_SHOWN = 60
"""Characters of a value in a message."""
_BLOCK = 64 << 10
"""Bytes read from the middle of each tensor of a larger file: 48 MB for the 730 tensors of a 7B model."""


class Digests(BaseModel):
    """SHA-256 of each part of a model folder."""

    model_config = ConfigDict(strict=True, frozen=True)
    commit: str | None
    """The hub's commit; None for a local folder. Two commits with the same files are the same model."""
    weights: dict[str, str]
    """Safetensors file → digest; empty for tiny models, whose weights are drawn from the seed."""
    config: str
    chat_template: str
    tokenizer: dict[str, str]
    """File → digest, the chat template left out."""
    image_processor: str

    def parts(self) -> dict[str, Any]:
        """Return the digests by part, without the commit: equal for equal models."""
        return self.model_dump(exclude={"commit"})

    def summary(self) -> str:
        """Return the first 12 digits of each part's digest, for people to compare."""
        parts = {
            "weights": _sha256_of(self.weights) if self.weights else None,
            "config": self.config,
            "chat template": self.chat_template,
            "tokenizer": _sha256_of(self.tokenizer),
            "image processor": self.image_processor,
        }
        return ", ".join(f"{name} {digest[:12]}" for name, digest in parts.items() if digest)


def of(folder: Folder, *, whole: bool = False) -> Digests:
    """Return the digests of a model folder. Fetches its weights if they are not here.

    Reads of a large weights file its size, its header and a block of each tensor. With `whole` it reads every
    byte, or takes the digest from a checkpoint's manifest. Raises BadInput where weights are missing or are
    not in the safetensors format.
    """
    weights = {} if folder.tiny else _weights(hub.with_weights(folder), folder.name, whole)
    return Digests(
        commit=folder.commit,
        weights=weights,
        config=_sha256_of(hub.read_json(folder.path / "config.json", f"{folder.name} is not a model folder")),
        chat_template=_sha256_of(hub.chat_template(folder.processor, folder.name)),
        tokenizer=_tokenizer(folder),
        image_processor=_sha256_of(hub.image_processor(folder.processor, folder.name)),
    )


def differences(before: Digests, now: Digests, kept: Path, folder: Folder) -> list[str]:
    """Return a line for each part of a model folder that differs between `before` and `now`.

    `now` describes `folder`. `kept` is a folder with the small files of before, such as a checkpoint: the
    lines name the values that differ where its files have the digests of `before`.
    """
    values: dict[str, Callable[[Path], Any]] = {
        "config": lambda path: hub.read_json(path / "config.json", ""),
        "chat_template": lambda path: hub.chat_template(path, ""),
        "image_processor": lambda path: hub.image_processor(path, ""),
    }
    lines = []
    for part in ("weights", "config", "chat_template", "tokenizer", "image_processor"):
        was, is_now = getattr(before, part), getattr(now, part)
        if was == is_now:
            continue
        said = _files_difference(was, is_now) if isinstance(was, dict) else "changed"
        with contextlib.suppress(BadInput, KeyError):
            old = values[part](kept)
            if _sha256_of(old) == was:
                said = _value_difference(old, values[part](folder.path)) or said  # 1 and 1.0, or null
        lines.append(f"{part.replace('_', ' ')}: {said}")
    return lines


def _value_difference(old: Any, new: Any) -> str:
    """Return the keys of two objects that differ, or the first line of two texts that does."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        return "; ".join(f"{key} {_short(old.get(key))} → {_short(new.get(key))}" for key in keys)
    texts = (str(text).splitlines(keepends=True) for text in (old, new))  # a last line may lack its end alone
    pairs = itertools.zip_longest(*texts, fillvalue="")
    number, (line, other) = next((n, pair) for n, pair in enumerate(pairs, 1) if pair[0] != pair[1])
    both = zip(line, other, strict=False)
    start = next((n for n, (a, b) in enumerate(both) if a != b), min(len(line), len(other)))
    return f"line {number}, character {start + 1}: {_short(line[start:])} → {_short(other[start:])}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _weights(path: Path, name: str, whole: bool) -> dict[str, str]:
    known = json_of(path / MANIFEST) if whole else {}
    found = {}
    for file in map(path.joinpath, hub.weights_files(path, name)):
        try:
            entry = known.get(file.name)
            if isinstance(entry, dict) and entry.get("size") == file.stat().st_size and "sha256" in entry:
                found[file.name] = f"sha256:{entry['sha256']}"
            elif whole or file.stat().st_size <= _WHOLE:
                found[file.name] = f"sha256:{sha256(file)}"
            else:
                found[file.name] = f"sampled:{_sampled(file)}"
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadInput(
                f"{name}: {file}: weights cannot be read: {type(error).__name__}: {error}"
            ) from None
    return found


def _sampled(file: Path) -> str:
    """Return a digest of a file's size, its header and the middle of each tensor. Raises ValueError.

    A safetensors file is the header's length in 8 bytes, a header in JSON, and the tensors' bytes.
    """
    size, digest = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= min(size - 8, 100 << 20):  # 100 MiB is the format's own limit
            raise ValueError("it has no safetensors header")
        header = stream.read(length)
        digest.update(f"{size}\n".encode() + header)
        spans = sorted(
            tensor["data_offsets"] for key, tensor in json.loads(header).items() if key[:2] != "__"
        )
        for start, end in spans:
            stream.seek(8 + length + start + max(0, (end - start - _BLOCK) // 2))
            digest.update(stream.read(min(_BLOCK, end - start)))
    return digest.hexdigest()


def _tokenizer(folder: Folder) -> dict[str, str]:
    """Return file → digest. That of tokenizer_config.json leaves out the chat template it may hold."""
    found = {}
    for name in hub.TOKENIZER_FILES:
        file = folder.processor / name
        if name == "tokenizer_config.json" and file.is_file():
            config = hub.read_json(file, f"{folder.name}: unreadable tokenizer")
            found[name] = _sha256_of({key: value for key, value in config.items() if key != "chat_template"})
        elif file.is_file():
            found[name] = f"sha256:{sha256(file)}"
    return found


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def _files_difference(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    kinds = {
        "changed": sorted(name for name in before.keys() & after.keys() if before[name] != after[name]),
        "missing": sorted(before.keys() - after.keys()),
        "new": sorted(after.keys() - before.keys()),
    }
    return "; ".join(f"{', '.join(names)} {kind}" for kind, names in kinds.items() if names)


def _sha256_of(value: Any) -> str:
    """Return the digest of a value as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
