"""The procedural endoscopy scenes of `surgvqa.demo`, drawn on first use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from surgvqa.datasets import Example, Problem, tables
from surgvqa.demo import cached
from surgvqa.recipe import Source


def read(source: Source) -> Iterator[Example | Problem]:
    """Questions of the demo in the cache, drawn if they are not there, or of a copy in a folder."""
    from surgvqa.demo.scenes import write_demo

    # Only the cache is written to: a recipe does not choose where.
    file = Path(source.path) / "questions.jsonl" if source.path else write_demo(cached("demo"))
    yield from tables.read(Source(format="jsonl", path=str(file)))
