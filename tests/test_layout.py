"""The house: modules import only from above, the data side needs no torch, recipes stay readable."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from surgvqa import recipe

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "surgvqa"
ORDER = [
    "demo", "recipe", "terminal", "endings", "datasets", "letterbox", "augment", "corrupt", "scan",
    "grounding", "metrics", "intervals", "nlg", "scores", "results", "comparison", "audit", "export", "hub",
    "digests", "findings", "report", "tokens", "tree", "plan", "attention", "model", "flops", "loss",
    "processes", "peers", "memory", "checkpoint", "decode", "prepare", "pictures", "sources", "evaluation",
    "validation", "evaluate", "predictor", "plots", "banner", "lock", "run", "replay", "train", "show",
    "launch", "slurm", "cli",
]  # fmt: skip
"""The data's path, and so the order in which to read."""
NO_TORCH = [
    "demo.scenes", "recipe", "terminal", "datasets", "letterbox", "augment", "corrupt", "scan", "grounding",
    "metrics", "scores", "results", "comparison", "audit", "export", "hub", "digests", "findings", "plots",
    "report", "launch", "slurm", "cli",
]  # fmt: skip


def imported(file: Path) -> set[str]:
    """Top modules of surgvqa that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "surgvqa":
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("surgvqa.")}
    return found


def test_every_module_has_its_place() -> None:
    modules = {
        path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert modules - {"__init__"} == set(ORDER)


def test_the_list_for_contributors_is_in_that_order() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert re.findall(r"^    (\w+)(?:\.py|/) +", text, re.MULTILINE) == ORDER


@pytest.mark.parametrize("name", ORDER)
def test_modules_import_only_from_above(name: str) -> None:
    path = PACKAGE / name
    files = sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    allowed = set(ORDER[: ORDER.index(name) + path.is_dir()])
    for file in files:
        assert imported(file) <= allowed, file.name


@pytest.mark.parametrize("name", NO_TORCH)
def test_the_data_side_imports_no_torch(name: str) -> None:
    code = f"import sys, surgvqa.{name}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_libraries_of_scores_are_imported_where_they_are_used() -> None:
    heavy = "{'nltk', 'rouge_score', 'sacrebleu', 'scipy', 'sklearn', 'statsmodels', 'jinja2'}"
    code = f"import sys, surgvqa.comparison, surgvqa.cli; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_checking_a_recipe_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from surgvqa.cli import main; code = main(['check', *sys.argv[1:]]);"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "recipes/demo.yaml", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0 errors" in done.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_are_short_and_say_nothing_of_where(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40
    assert recipe.load(path).output == f"runs/{path.stem}"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.name
)
def test_configs_say_nothing_of_what(path: Path) -> None:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert config["mixed_precision"] == "no"
    assert "gradient_accumulation_steps" not in config
