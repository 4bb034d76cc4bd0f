"""A run's folder as others read it: its recipe, its curves, what it answered and how that scored.

    runs/exp1 ── load_run ──▶ Run: recipe, steps, validations, evaluations ── evaluation("test") ──▶ one

Nothing is written here, and a run may be read while it goes on. Imports no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from surgvqa import datasets, recipe, scores
from surgvqa.endings import file_errors
from surgvqa.letterbox import read_rgb
from surgvqa.metrics import Prediction, exact
from surgvqa.recipe import SMALLER_IS_BETTER, BadInput, Part, Recipe

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image


TRAINER = "trainer"
"""Folder in a checkpoint for the files that only surgvqa reads. Beside it are only files that PEFT,
transformers and vLLM expect, since vLLM loads every *.safetensors at the top of a model folder."""
MANIFEST, STATE = f"{TRAINER}/manifest.json", f"{TRAINER}/state.json"
RECIPE, OPTIMIZER = f"{TRAINER}/recipe.yaml", f"{TRAINER}/optimizer.safetensors"


@dataclass(frozen=True)
class Evaluation:
    """The questions of a part as a model answered them, and how that scored."""

    predictions_file: Path
    scores_file: Path
    scores: dict[str, Any] = field(repr=False)
    """What scores.json holds, see docs/metrics.md; empty where there is none that can be read."""

    def table(self) -> pd.DataFrame:
        """A row for each question, in order, with the columns id, image, group, type, question, reference
        (the one that the answer meets, else the first), answer, right, confidence: the probability of
        the answer, NaN where the model wrote it, and cut: whether it was cut at `eval.max_new_tokens`. Raises
        what `predictions` raises.
        """
        import pandas as pd

        return pd.DataFrame(
            {
                "id": row.id,
                "image": row.image,
                "group": row.group,
                "type": row.question_type,
                "question": row.question,
                "reference": _met(row),
                "answer": row.answer,
                "right": row.right,
                "confidence": math.nan if row.confidence is None else row.confidence,
                "cut": row.cut,
            }
            for row in self.predictions
        )

    def scores_table(self) -> pd.DataFrame:
        """Exact match in %, the whole (`all`) first, then each question type: columns questions, exact, low
        and high (its 95 % interval, NaN where there is none), prior, and note: what makes it doubtful. Every
        other score is in `scores`. Raises BadInput where there are no scores.
        """
        import pandas as pd

        if self.scores.get("schema") != scores.SCHEMA:
            raise BadInput(f"{self.scores_file}: holds no scores of this form; run `surgvqa evaluate` again")
        found = [("all", self.scores["overall"]), *self.scores["by_type"].items()]
        rows = []
        for _, row in found:
            low, high = row["intervals"].get("exact", (None, None))
            note = "; ".join(scores.MARKS[mark] for mark in _marks(row))
            rows.append((row["n"], row["exact"], low, high, row["prior"], note))
        table = pd.DataFrame(
            rows, [name for name, _ in found], ["questions", "exact", "low", "high", "prior", "note"]
        )
        shares = ["exact", "low", "high", "prior"]
        table[shares] = 100 * table[shares].astype(float)
        return table

    @property
    def split(self) -> Part | None:
        return next((part for part in get_args(Part) if part == self.scores.get("split")), None)

    @property
    def checkpoint(self) -> str | None:
        """Name of the checkpoint's folder; None for a model as it was published."""
        return self._text("checkpoint")

    @property
    def variant(self) -> str:
        """What was done to the images: "" nothing, `black`, `shuffle`, or a corruption such as `smoke:3`."""
        return self._text("variant") or ""

    @property
    def overrides(self) -> list[str]:
        """Recipe keys that were changed for it, as `key=value`."""
        return overrides(self.scores)

    @cached_property
    def predictions(self) -> list[Prediction]:
        """Raises BadInput with every line that is no prediction."""
        return scores.read(self.predictions_file)

    def _text(self, key: str) -> str | None:
        value = self.scores.get(key)
        return value if isinstance(value, str) else None


@dataclass(frozen=True)
class Run:
    """What a training run, or the evaluation of a published model, left in its folder."""

    folder: Path
    recipe: Recipe = field(repr=False)
    steps: list[dict[str, Any]] = field(repr=False)
    """The rows of metrics.jsonl: step, epoch, loss, lr, grad_norm, questions_per_s, seconds, …"""
    validations: list[dict[str, Any]] = field(repr=False)
    """The rows of eval.jsonl: step, split, n, exact, prior, …"""
    evaluations: list[Evaluation]

    def evaluation(self, split: str | None = None, variant: str = "") -> Evaluation:
        """That of a part, by default the one the run is judged by. Raises BadInput where there is none."""
        return choose(self.folder, self.evaluations, split, variant)

    def pictures(self, prediction: Prediction) -> list[Image.Image]:
        """The images that a question is about, upright and RGB, in the pixels that boxes are given in.

        Read from the data of the run's recipe as they are now: neither scaled as the model saw them, nor
        blackened, shuffled or corrupted as a variant of the evaluation showed them. Raises BadInput where
        the data, the question or an image is not there any more.
        """
        example = self._examples.get(prediction.id)
        if example is None or example.image_key != prediction.image:
            raise BadInput(
                f"question {prediction.id!r}: the data do not have it with the image {prediction.image}; "
                f"were they changed? They are read from {self.recipe.data.path or self.recipe.data.format}"
            )
        return [read_rgb(image) for image in example.images]

    @cached_property
    def _examples(self) -> dict[str, datasets.Example]:
        """Question id → what the data says, which is read when this is first asked for."""
        return {example.id: example for example in datasets.load(self.recipe.data).examples}


def _marks(row: Mapping[str, Any]) -> str:
    return scores.marks(row["few"], row["few_groups"], row.get("cut", 0))


def _met(row: Prediction) -> str:
    """The reference that an answer meets, else the first."""
    return next((one for one in row.references if exact(row.answer, [one])), row.references[0])


@file_errors()
def load_run(folder: str | Path) -> Run:
    """Read a run's folder. Raises BadInput if it is no run or cannot be read."""
    folder = recipe.user_path(folder)
    if not (folder / "recipe.yaml").is_file():
        raise BadInput(f"{folder}: no recipe.yaml here; give the output folder of a run")
    return Run(
        folder,
        recipe.load(folder / "recipe.yaml"),
        rows(folder / "metrics.jsonl"),
        rows(folder / "eval.jsonl"),
        evaluations(folder),
    )


def file_names(
    part: Part, final: Part | None, checkpoint: str | None = None, variant: str = ""
) -> tuple[str, str]:
    """What an evaluation's predictions and scores are called.

    What a run is judged by, `final` or else test, has the plain names; others name their part, a `checkpoint`
    that was asked for by itself, and their variant.
    """
    named = (None if part == (final or "test") else part, checkpoint, variant.replace(":", "-"))
    tag = "".join(f".{each}" for each in named if each)
    return f"predictions{tag}.jsonl", f"scores{tag}.json"


def evaluations(folder: Path) -> list[Evaluation]:
    """All whose predictions lie in a folder, the one that the run is judged by first."""
    files = sorted(folder.glob("predictions*.jsonl"), key=lambda file: (len(file.name), file.name))
    found = []
    for file in files:
        told = folder / file.name.replace("predictions", "scores", 1).replace(".jsonl", ".json")
        found.append(Evaluation(file, told, json_of(told)))
    return [each for each in found if each.predictions_file.is_file()]


def choose(
    folder: Path, among: Sequence[Evaluation], split: str | None = None, variant: str = ""
) -> Evaluation:
    """The evaluation of a part (see `Run.evaluation`), by the checkpoint that the run chose itself."""
    judged_by = file_names("test", "test", variant=variant)[0]
    for each in among:  # those with the shortest names come first
        asked_by_itself = each.checkpoint and f".{each.checkpoint}." in each.predictions_file.name
        right = each.split == split if split else each.predictions_file.name == judged_by
        if right and each.variant == variant and not asked_by_itself:
            return each
    options = "".join([f" --split {split}" if split else "", f" --{_option(variant)}" if variant else ""])
    others = sorted({each.split for each in among if each.split and each.variant == variant})
    there = f", or take {' or '.join(f'--split {other}' for other in others)}" if others else ""
    raise BadInput(
        f"{folder}: holds no predictions{f' on {split}' if split else ''}; run "
        f"`surgvqa evaluate {folder}{options}` first{there}"
    )


def _option(variant: str) -> str:
    return f"corrupt {variant}" if ":" in variant else f"ablate {variant}"


def json_of(file: Path) -> dict[str, Any]:
    """A JSON file's object; empty where there is none, or only half of one."""
    try:
        if not file.is_file():  # reading a pipe would wait for ever
            return {}
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def rows(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a .jsonl file; none where there is none."""
    try:
        if not file.is_file():
            return []
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            found.append(row)
    return found


def overrides(scores: Mapping[str, Any]) -> list[str]:
    """Recipe keys that were changed for an evaluation, as its scores.json records them."""
    told = scores.get("overrides")
    return [word for word in told if isinstance(word, str)] if isinstance(told, list) else []


def standing(row: Mapping[str, Any], metric: str) -> tuple[float, float] | None:
    """A row of eval.jsonl among others, the larger the better: its value of the metric and, for equal ones,
    minus its loss (minus infinity where it has none). None where it has no such value."""
    value, loss = number(row.get(metric)), number(row.get("loss"))
    if value is None:
        return None
    return (-value if metric in SMALLER_IS_BETTER else value), -math.inf if loss is None else -loss


def number(value: object) -> float | None:
    """Text, NaN and what no run comes to are none."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number and abs(value) < 1e15 else None  # type: ignore[arg-type]
