"""Predictions, exact match, and the prior that needs no image: what training looks at. Imports no torch."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from surgvqa.datasets import Example


@dataclass(frozen=True, slots=True)
class Prediction:
    """One answered question; a line of predictions.jsonl."""

    id: str
    image: str
    group: str
    question: str
    question_type: str
    references: list[str]
    answer: str
    probabilities: dict[str, float] | None = None
    """Label → probability among the labels, where the answer was chosen among them."""

    def row(self) -> dict[str, Any]:
        row = asdict(self)
        if self.probabilities is None:
            del row["probabilities"]
        return row


def normalise(answer: str) -> str:
    """What `exact` compares: NFKC, single blanks, and the set of `;`-parts, each without final full stops.

    Case is kept: some data sets have labels that differ in nothing else.
    """
    text = " ".join(unicodedata.normalize("NFKC", answer).split())
    parts = sorted({part.strip().rstrip(".").strip() for part in text.split(";")} - {""})
    return "; ".join(parts) or text


def exact(answer: str, references: Iterable[str]) -> bool:
    """Whether the answer is one of the references, both normalised."""
    return normalise(answer) in {normalise(reference) for reference in references}


class Prior:
    """The answer that a question gets most often in train, without a look at the image.

    A question that train does not have takes the majority of its type, then of everything. Ties go to
    the answer that comes first in the alphabet.
    """

    def __init__(self, train: Iterable[Example]) -> None:
        by_question: dict[str, Counter[str]] = defaultdict(Counter)
        by_type: dict[str, Counter[str]] = defaultdict(Counter)
        overall: Counter[str] = Counter()
        for example in train:
            answer = normalise(example.answers[0])
            for counter in (by_question[example.question], by_type[example.question_type], overall):
                counter[answer] += 1
        self.by_question = {question: _majority(counter) for question, counter in by_question.items()}
        self.by_type = {kind: _majority(counter) for kind, counter in by_type.items()}
        self.overall = _majority(overall)

    def answer(self, question: str, question_type: str) -> str:
        return self.by_question.get(question, self.by_type.get(question_type, self.overall))


def _majority(counter: Counter[str]) -> str:
    return min(counter, key=lambda answer: (-counter[answer], answer), default="")


def scores(predictions: Sequence[Prediction], prior: Prior) -> dict[str, Any]:
    """`{"overall": {"n", "exact", "prior"}, "by_type": {type: {...}}}`: shares of 1, unrounded."""
    by_type: dict[str, list[Prediction]] = defaultdict(list)
    for prediction in predictions:
        by_type[prediction.question_type].append(prediction)
    return {
        "overall": _score(predictions, prior),
        "by_type": {kind: _score(by_type[kind], prior) for kind in sorted(by_type)},
    }


def _score(predictions: Sequence[Prediction], prior: Prior) -> dict[str, Any]:
    n = len(predictions)
    right = sum(exact(row.answer, row.references) for row in predictions)
    guessed = sum(exact(prior.answer(row.question, row.question_type), row.references) for row in predictions)
    return {"n": n, "exact": right / n if n else None, "prior": guessed / n if n else None}


def class_weights(answers: Sequence[str], kind: str) -> dict[str, float]:
    """Answer → weight, with mean 1 over `answers`; `kind` is `inverse` or `effective`.

    `effective` divides by (1 - b^n) / (1 - b), b = 0.999: the effective number of n samples (Cui et al.,
    "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019).
    """
    counts = Counter(answers)
    beta = 0.999
    weights = {
        answer: 1 / n if kind == "inverse" else (1 - beta) / (1 - beta**n) for answer, n in counts.items()
    }
    mean = sum(weights[answer] * n for answer, n in counts.items()) / len(answers)
    return {answer: weight / mean for answer, weight in weights.items()}
