"""What training looks at on its way: a part's loss, its scores, and a few pictures.

Validation ── look ──▶ Look: the row of eval.jsonl, the score to compare, the picture for TensorBoard
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from PIL.Image import Image

from surgvqa import checkpoint, evaluation, pictures, scores
from surgvqa.endings import Stop
from surgvqa.loss import TreeLoss
from surgvqa.prepare import Prepared
from surgvqa.processes import Compute, main_first
from surgvqa.results import standing

SHOWN = 4
"""Questions in a picture."""


@dataclass(frozen=True)
class Look:
    """What an evaluation during training found."""

    row: dict[str, Any]
    """`loss`, and what `scores.values` gives."""
    score: checkpoint.Score | None
    """None where the recipe's eval.metric is not defined, or the loss is not finite."""
    picture: Image | None
    """On the main process."""


class Validation:
    """The questions that training is judged by."""

    def __init__(self, prepared: Prepared) -> None:
        """Raises BadInput where they are too long."""
        self.settings = settings = prepared.recipe.eval
        self._prepared = prepared
        self.questions = prepared.questions(settings.split, settings.questions, asked=True)
        prepared.plan(self.questions)
        self.prior = prepared.prior()
        self.seed = prepared.recipe.train.seed

    def look(
        self,
        loss: TreeLoss,
        prepared: Prepared,
        *,
        accelerator: Accelerator,
        compute: Compute,
        stop: Stop | None = None,
    ) -> Look:
        """By all processes together, each question once; the same on each. Raises Preempted."""
        drawn: list[Image] = []
        nats = evaluation.loss_of_part(loss, prepared, self.questions, accelerator=accelerator, stop=stop)
        answers = evaluation.predict(
            loss.model, prepared, self.questions, accelerator=accelerator, compute=compute, stop=stop
        )

        def judge() -> dict[str, Any]:
            drawn.append(self._sheet.draw(answers))
            return {"loss": nats if math.isfinite(nats) else None, **scores.values(answers, self.prior)}

        row = main_first(accelerator, judge)
        score = standing(row, self.settings.metric) if row["loss"] is not None else None
        return Look(row, score, drawn[0] if drawn else None)

    @functools.cached_property
    def judged(self) -> dict[str, str]:
        """See `Prepared.judged`; the main process alone needs it."""
        return self._prepared.judged(self.questions)

    @functools.cached_property
    def _sheet(self) -> pictures.Sheet:
        chosen = pictures.choose(self.questions.examples, SHOWN, self.seed)
        return pictures.Sheet(self.questions, chosen)
