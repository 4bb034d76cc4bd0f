"""The procedural endoscopy scenes of `surgvqa.demo`, drawn on first use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from surgvqa.datasets import Example, Problem, tables
from surgvqa.demo import cached


def read(path: str | None, revision: str | None) -> Iterator[Example | Problem]:
    """Questions of the demo in the folder `path`, by default one in the cache, written if it is not there."""
    from surgvqa.demo.scenes import write_demo

    yield from tables.read(str(write_demo(Path(path) if path else cached("demo"))), None)
