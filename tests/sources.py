"""Data sets read as a recipe would have them read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgvqa import datasets, recipe
from surgvqa.datasets import Dataset
from surgvqa.recipe import Data, Source

SHARED = Path(__file__).resolve().parents[2] / "shared/data"
PIXEL = bytes.fromhex("424d1e000000000000001a0000000c000000010001000100180000ff0000")  # 1×1 BMP


def source(format: str, path: str | Path | None = None, **keys: Any) -> Source:
    """What a recipe says of one data set."""
    return Source.model_validate({"format": format, "path": path and str(path), **keys})


def load(format: str, path: str | Path | None = None, **keys: Any) -> Dataset:
    """The data of a recipe with `data.format`, `data.path` and further keys of `data`; `by` is `split.by`."""
    by = keys.pop("by", "official")
    split = {"by": by, **keys.pop("split", {})}
    return datasets.load(
        Data.model_validate({"format": format, "path": path and str(path), "split": split, **keys})
    )


def write(root: Path, files: Mapping[str, str | bytes]) -> Path:
    """The files, by their paths below `root`; images are given as PIXEL."""
    for name, content in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def instructed(stem: str) -> set[str]:
    """Question types for which a recipe in recipes/ has instructions."""
    return set(recipe.load(Path(__file__).parents[1] / f"recipes/{stem}.yaml").prompt.instructions)


def errors(dataset: Dataset) -> list[str]:
    """`file:line: what` of its problems that are no warnings, without the folders."""
    return [f"{Path(p.place).name}: {p.what}" for p in dataset.problems if not p.warning]


def warnings(dataset: Dataset) -> list[str]:
    return [problem.what for problem in dataset.problems if problem.warning]
