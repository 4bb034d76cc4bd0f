"""What is shown of work that takes long."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import write_jsonl

from surgvqa import datasets, recipe, terminal
from surgvqa.audit import load_and_audit
from surgvqa.terminal import tracked


def settings(folder: Path) -> recipe.Recipe:
    data = write_jsonl(folder / "data", images=4)
    words = [f"data.path={data}", f"output={folder / 'run'}"]
    return recipe.parse("{model: {name: tiny-qwen3-vl}, data: {format: jsonl}, image: {size: 64}}", words)


def test_a_log_gets_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(tracked(iter(range(5)), "images", 5)) == [0, 1, 2, 3, 4]
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(terminal, "LINE_EVERY", 0.0)
    assert list(tracked(iter("abc"), "images", 3)) == ["a", "b", "c"]
    assert capsys.readouterr().err == "images: 1/3\nimages: 2/3\nimages: 3/3\n"
    assert list(tracked(iter([[1] * 1500, [2]]), "reading a.jsonl", of="rows", size=len))
    assert capsys.readouterr().err == "reading a.jsonl: 1,500 rows\nreading a.jsonl: 1,501 rows\n"


def test_an_audit_tells_of_its_rows_and_images_only_where_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "LINE_EVERY", 0.0)
    chosen = settings(tmp_path)
    count = len(datasets.load(chosen.data).examples)
    assert capsys.readouterr() == ("", "")
    load_and_audit(chosen, progress=True)
    told = capsys.readouterr().err
    assert f"reading {Path(chosen.data.path or '').name}: {count:,} rows\n" in told
    assert "images: 4/4\n" in told
