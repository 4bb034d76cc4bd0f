"""The procedural endoscopy scenes of `surgvqa.demo`, drawn on first use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from surgvqa.datasets import Example, Problem, tables


def read(path: str | None, revision: str | None) -> Iterator[Example | Problem]:
    """Questions of the demo in the folder `path`, by default one in the cache, written if it is not there.

    The cache is `$SURGVQA_CACHE`, else `~/.cache/surgvqa`.
    """
    from surgvqa.demo.scenes import write_demo

    yield from tables.read(str(write_demo(Path(path) if path else cache_folder() / "demo-v1")), None)


def cache_folder() -> Path:
    """Where generated data and tiny models are kept."""
    return Path(os.environ.get("SURGVQA_CACHE") or Path.home() / ".cache" / "surgvqa")
