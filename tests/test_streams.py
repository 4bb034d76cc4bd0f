"""Standard output and error that go away, are closed, full or not UTF-8: commands go on without them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY_RUN, write_jsonl

ROOT = Path(__file__).parents[1]
PRINTS = """
import os, sys
from surgvqa.terminal import Console, forgiving_streams
forgiving_streams()
forgiving_streams()
for number in range(3):
    print("a line \\u2192 \\u00d7", number, "far more than a pipe holds " * 10000)
    Console().print("a table", number)
    Console(stderr=True).print("a bar \\u2192", number, "far more than a pipe holds " * 10000)
file = open(sys.argv[1], "x")
os.write(2, b"a signal came\\n")
file.write("done")
file.close()
sys.exit(7)
"""
"""Its file must get neither descriptor 1 nor 2."""


def shell(script: str, *words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a bash script, in which `$PY` is Python, with its arguments as `$1` and so on."""
    return subprocess.run(
        ["bash", "-c", script, "bash", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "PY": sys.executable, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=300,
    )


@pytest.mark.parametrize(
    "where",
    [
        "| head -1", "| true", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "> /dev/full", "> /dev/full 2>&1",
        "2> /dev/full", "2>&1 | head -1",
    ],
)  # fmt: skip
@pytest.mark.fault("F30")
def test_what_prints_goes_on_without_its_streams(tmp_path: Path, where: str) -> None:
    (tmp_path / "prints.py").write_text(PRINTS, encoding="utf-8")
    program, file = tmp_path / "prints.py", tmp_path / "file"
    done = shell(f'set -o pipefail; "$PY" "$1" "$2" {where}; exit ${{PIPESTATUS[0]}}', program, file)
    assert done.returncode == 7, done.stderr
    assert file.read_text(encoding="utf-8") == "done", "nothing was printed into it"
    assert "Error" not in done.stderr
    assert ("warning: stdout: No space left on device" in done.stderr) == (where == "> /dev/full")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
@pytest.mark.fault("F30")
def test_characters_that_the_encoding_lacks_are_replaced(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "prints.py").write_text(PRINTS, encoding="utf-8")
    words = tmp_path / "prints.py", tmp_path / "file"
    done = shell('"$PY" "$1" "$2" | head -1', *words, PYTHONIOENCODING=encoding)
    assert done.stdout.startswith("a line ? ")
    assert "Error" not in done.stderr


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    data = write_jsonl(folder / "data", images=12)
    lines = TINY_RUN.replace("{format: jsonl}", f"{{format: jsonl, path: {data}}}")
    (folder / "small.yaml").write_text(f"{lines}output: {folder / 'run'}\n", encoding="utf-8")
    return folder / "small.yaml"


@pytest.mark.parametrize("where", ["| head -1", ">&- 2>&-", "> /dev/full"])
@pytest.mark.fault("F30")
def test_no_step_of_a_run_is_lost(recipe_file: Path, tmp_path: Path, where: str) -> None:
    more = f"output={tmp_path} eval.every=null eval.final=null"
    done = shell(f'"$PY" -m surgvqa.train "$1" {more} {where}; exit ${{PIPESTATUS[0]}}', recipe_file)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert len((tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 6
    assert json.loads((tmp_path / "ended.json").read_text(encoding="utf-8"))["code"] == 0


@pytest.mark.long
@pytest.mark.fault("F30")
def test_no_step_of_a_run_of_two_processes_is_lost(recipe_file: Path, tmp_path: Path) -> None:
    more = f"output={tmp_path} eval.every=null eval.final=null"
    launcher = "-m torch.distributed.run --nproc-per-node 2 --standalone -m surgvqa.train"
    done = shell(f'"$PY" {launcher} "$1" {more} 2>&1 | head -1; exit ${{PIPESTATUS[0]}}', recipe_file)
    assert done.returncode == 0
    assert len((tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 6


@pytest.mark.fault("F30")
def test_check_says_its_code_to_whoever_still_listens(recipe_file: Path, tmp_path: Path) -> None:
    check = f'"$PY" -m surgvqa.cli check "$1" --out {tmp_path}'
    code = shell(check, recipe_file).returncode
    for where in ("| head -1", ">&-", "> /dev/full"):
        done = shell(f"{check} {where}; exit ${{PIPESTATUS[0]}}", recipe_file)
        assert (done.returncode, "Traceback" in done.stderr) == (code, False)
    done = shell(check, recipe_file, PYTHONIOENCODING="ascii")
    assert (done.returncode, "Traceback" in done.stderr) == (code, False)
