"""What `import surgvqa` offers: at once, with its types, and nothing else."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import surgvqa
from surgvqa import comparison, evaluation, predictor, results

ROOT = Path(__file__).parents[1]

if TYPE_CHECKING:  # mypy reads this file: the names have their real types behind `__getattr__`
    from typing_extensions import assert_type

    assert_type(surgvqa.load_run("run"), results.Run)
    assert_type(surgvqa.load_predictor("run"), predictor.Predictor)
    assert_type(surgvqa.load_predictor("run").ask("image.png", "Is there bleeding?"), surgvqa.Answer)
    assert_type(surgvqa.Answer("question", "text").probabilities, dict[str, float] | None)
    assert_type(surgvqa.compare("a", "b"), comparison.Comparison)
    assert_type(surgvqa.evaluate("run", "val"), dict[str, Any])
    assert_type(surgvqa.__version__, str)


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_the_names_are_those_of_their_modules() -> None:
    found = {name: getattr(surgvqa, name) for name in surgvqa.__all__}
    assert found == {
        "Answer": predictor.Answer,
        "Predictor": predictor.Predictor,
        "__version__": surgvqa.__version__,
        "compare": comparison.compare,
        "evaluate": evaluation.evaluate,
        "load_predictor": predictor.load_predictor,
        "load_run": results.load_run,
    }
    assert set(found) <= set(dir(surgvqa))
    assert all(value.__doc__ for value in found.values())
    with pytest.raises(AttributeError, match="has no attribute 'load_model'"):
        _ = surgvqa.load_model  # type: ignore[attr-defined]  # what mypy says, too


def test_importing_it_imports_nothing_else() -> None:
    code = (
        "import sys; before = set(sys.modules); import surgvqa; dir(surgvqa);"
        "heavy = {'torch', 'transformers', 'pandas', 'numpy', 'PIL', 'pydantic', 'matplotlib', 'datasets'};"
        "sys.exit(', '.join(heavy & set(sys.modules) - before) or 0)"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    done = python("import sys, surgvqa; surgvqa.load_run, surgvqa.compare; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_help_is_instant() -> None:
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        assert subprocess.run([sys.executable, "-m", "surgvqa.cli", "--help"], cwd=ROOT).returncode == 0
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) <= 1


def test_evaluate_is_always_the_function() -> None:
    """There is a file of that name too, for `python -m surgvqa.evaluate`; it cannot be imported."""
    with pytest.raises(ImportError, match="evaluate is a function"):
        importlib.import_module("surgvqa.evaluate")
    assert surgvqa.evaluate is evaluation.evaluate
    first = "try:\n import surgvqa.evaluate\nexcept ImportError: pass\nelse: raise SystemExit('imported')\n"
    done = python(f"{first}from surgvqa import evaluate, evaluation; assert evaluate is evaluation.evaluate")
    assert done.returncode == 0, done.stderr


def test_evaluate_is_still_a_command() -> None:
    command = [sys.executable, "-m", "surgvqa.evaluate", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--split" in done.stdout


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "surgvqa" / "py.typed").is_file()
