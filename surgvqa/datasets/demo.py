"""The procedural endoscopy scenes of `surgvqa.demo`, drawn on first use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from surgvqa.datasets import Example, Problem, tables
from surgvqa.demo import cached


def read(path: str | None, revision: str | None) -> Iterator[Example | Problem]:
    """Questions of the demo in the cache, drawn if they are not there, or of a copy in the folder `path`."""
    from surgvqa.demo.scenes import write_demo

    # Only the cache is written to: a recipe does not choose where.
    file = Path(path) / "questions.jsonl" if path else write_demo(cached("demo"))
    yield from tables.read(str(file), None)
