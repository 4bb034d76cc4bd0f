"""Data sets read as a recipe would have them read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from surgvqa import datasets
from surgvqa.datasets import Dataset
from surgvqa.recipe import Data, Source


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
