"""A run's records, as a crash may leave them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from surgvqa.recipe import Log
from surgvqa.run import Records


def reopened(run: Path, start: int, settled: bool = True) -> None:
    with Records(run, start, 9, Log(), Console(), settled=settled):
        pass


@pytest.mark.parametrize(
    "torn", [b'{"step": 2', '{"step": 2, "ids": ["é'.encode()[:-1], b"\0" * 700, b"\0" * 700 + b"\n"]
)
def test_what_a_crash_left_of_a_line_is_dropped(tmp_path: Path, torn: bytes) -> None:
    rows = [json.dumps({"step": 1, "ids": ["é\u2028\x85"]}, ensure_ascii=False) + "\n"]
    file = tmp_path / "trace.jsonl"
    file.write_bytes("".join(rows).encode() + torn)
    reopened(tmp_path, 5)
    assert file.read_bytes() == rows[0].encode()


@pytest.mark.parametrize("settled", [True, False])
def test_an_evaluation_that_will_be_made_again_is_forgotten(tmp_path: Path, settled: bool) -> None:
    """Where the run was stopped before it, and killed after it but before the next checkpoint."""
    for name in ("eval.jsonl", "metrics.jsonl"):
        (tmp_path / name).write_text("".join(f'{{"step": {step}}}\n' for step in (2, 4, 6)))
    reopened(tmp_path, 4, settled)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 2}\n{"step": 4}\n'
    assert (tmp_path / "eval.jsonl").read_text() == '{"step": 2}\n' + '{"step": 4}\n' * settled
