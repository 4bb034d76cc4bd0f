"""Predictions, exact match, the prior that needs no image, boxes that match. Imports no torch."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from surgvqa import datasets
from surgvqa.datasets import Example

normalise = functools.lru_cache(maxsize=2**16)(datasets.normalise)
"""`datasets.normalise` with a memory: most answers come many times."""


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
    regions: list[dict[str, Any]] | None = None
    """The answer's boxes in source pixels, `{"label", "box": [x1, y1, x2, y2], "image": from 0}`; None where
    neither the answer nor the reference has any."""
    reference_regions: list[dict[str, Any]] | None = None
    """Those that it should have."""
    image_sizes: list[list[int]] | None = None
    """Width and height of each image in pixels, where there are regions."""
    cut: bool = False
    """Whether the answer was cut at `eval.max_new_tokens`: the model had not ended it."""

    @classmethod
    def of(cls, example: Example, answer: str, **optional: Any) -> Prediction:
        """The answer to a question of the data."""
        return cls(
            id=example.id,
            image=example.image_key,
            group=example.group,
            question=example.question,
            question_type=example.question_type,
            references=list(example.answers),
            answer=answer,
            **optional,
        )

    @property
    def right(self) -> bool:
        """Exact match."""
        return exact(self.answer, self.references)

    @property
    def confidence(self) -> float | None:
        """The probability of the answer; None where none is known."""
        return (self.probabilities or {}).get(self.answer)

    def row(self) -> dict[str, Any]:
        optional = {"probabilities": None, "regions": None, "reference_regions": None, "image_sizes": None}
        absent = {**optional, "cut": False}
        return {
            key: value for key, value in asdict(self).items() if key not in absent or value != absent[key]
        }


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
        alike = Counter((example.question, example.question_type, example.answers[0]) for example in train)
        for (question, kind, given), count in alike.items():
            answer = normalise(given)
            for counter in (by_question[question], by_type[kind], overall):
                counter[answer] += count
        self.by_question = {question: _majority(counter) for question, counter in by_question.items()}
        self.by_type = {kind: _majority(counter) for kind, counter in by_type.items()}
        self.overall = _majority(overall)

    def answer(self, question: str, question_type: str) -> str:
        return self.by_question.get(question, self.by_type.get(question_type, self.overall))


def _majority(counter: Counter[str]) -> str:
    return min(counter, key=lambda answer: (-counter[answer], answer), default="")


def matches(found: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Any]]) -> list[float]:
    """The IoU of each pair of boxes that belong together; none of a pair is in another one.

    Pairs are made by falling IoU, of boxes in the same image that overlap.
    """
    pairs = sorted(
        (
            (iou(one["box"], other["box"]), -first, -second)
            for first, one in enumerate(found)
            for second, other in enumerate(expected)
            if one["image"] == other["image"]
        ),
        reverse=True,
    )
    overlaps, taken, given = [], set(), set()
    for overlap, first, second in pairs:
        if overlap and first not in taken and second not in given:
            overlaps.append(overlap)
            taken.add(first)
            given.add(second)
    return overlaps


def iou(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2) along pixel edges; of an empty box 0."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(0.0, width) * max(0.0, height)
    areas = sum(max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) for box in (first, second))
    return shared / (areas - shared) if shared else 0.0


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
