"""Small real runs: in this process, or started as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl

from surgvqa import recipe, train

ROOT = Path(__file__).parents[2]

RECIPE = """
model: {name: tiny-qwen3-vl, tune: full, train_vision: true, train_merger: true}
data: {format: jsonl}
image: {size: 96}
batch: {questions: 12, questions_per_image: 4, tokens_per_micro_batch: 600}
train: {max_steps: 20, lr: 1.0e-3, precision: fp32, checkpoint_layers: 0}
eval: {final: null}
log: {trace: true}
"""


class Runs:
    """Runs of one small experiment, each in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = write_jsonl(folder / "data")
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(RECIPE + f"output: {folder / 'run'}\n", encoding="utf-8")

    def here(self, name: str, *overrides: str) -> Path:
        """Run in this process."""
        return train.train(recipe.load(self.recipe, self._words(name, *overrides)))

    def launched(
        self, name: str, launcher: list[str], *overrides: str, script: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run through a launcher, e.g. `["torchrun", "--nproc-per-node", "2"]`; `script` may change
        surgvqa before it calls `surgvqa.train.main`."""
        program = ["-m", "surgvqa.train"]
        if script:
            file = self.folder / f"{name}.py"
            file.write_text(script, encoding="utf-8")
            program = [str(file)]
        module = [sys.executable, "-m", *launcher, *program, str(self.recipe)]
        return subprocess.run(
            [*module, *self._words(name, *overrides)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )

    def _words(self, name: str, *overrides: str) -> list[str]:
        return [f"data.path={self.data}", f"output={self.folder / name}", *overrides]


def trace(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "trace.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{**row, "loss": float.fromhex(row["loss"])} for row in rows]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def reference(runs: Runs) -> Path:
    """One process, micro-batches of several trees."""
    return runs.here("reference")
