"""Scores against hand-worked examples and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from surgvqa import metrics, scores
from surgvqa.datasets import Example
from surgvqa.metrics import Prediction, Prior


def asked(question: str, answer: str, kind: str = "yes_no") -> Example:
    return Example(question + answer, (), question, (answer,), kind)


def predicted(question: str, answer: str, *references: str, kind: str = "yes_no") -> Prediction:
    return Prediction(question, "image", "group", question, kind, list(references), answer)


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("yes", "yes", True),
        ("  yes.", "yes", True),
        ("Yes", "yes", False),
        ("Suction", "suction", False),
        ("pink; red", "red;pink", True),
        ("pink; red", "pink", False),
        ("not relevant", "no", False),
        ("no", "not relevant", False),
        ("11–20  mm", "11–20 mm", True),
        ("2", "2.", True),
        (">20mm", ">20", False),
        ("", "", True),
        ("ﬁne", "fine", True),
        ("", ".", False),
        (".", ";", False),
        ("肝脏。", "肝脏", True),
        ("肝臓｡", "肝臓．", True),
        ("हाँ।", "हाँ", True),
        ("हाँ॥", "हाँ।", True),
        ("ہاں۔", "ہاں", True),
        ("այո։", "այո", True),
        ("አዎ።", "አዎ", True),
        ("បាទ។", "បាទ៕", True),
        ("red…", "red", True),
        ("红。; 粉。", "粉；红", True),
        ("yes?", "yes", False),
        ("对！", "对", False),
        ("对？", "对?", True),
    ],
)
def test_exact(answer: str, reference: str, same: bool) -> None:
    assert metrics.exact(answer, [reference]) is same


def test_any_reference_counts() -> None:
    assert metrics.exact("b", ["a", "b"])
    assert not metrics.exact("c", ["a", "b"])


def test_the_prior_is_the_majority_of_each_question_in_train() -> None:
    train = [
        *[asked("Is there text?", "no")] * 3,
        *[asked("Is there text?", "yes")] * 2,
        *[asked("How many?", "b", "count")] * 2,
        *[asked("How many?", "a", "count")] * 2,
    ]
    prior = Prior(train)
    assert prior.answer("Is there text?", "yes_no") == "no"
    assert prior.answer("How many?", "count") == "a"  # a tie: first in the alphabet
    assert prior.answer("Never asked", "count") == "a"
    assert prior.answer("Never asked", "new type") == "no"
    assert Prior([]).answer("anything", "at all") == ""


def test_scores_by_hand() -> None:
    prior = Prior([asked("Q", "no"), asked("How many?", "1", "count")])
    rows = [
        predicted("Q", "yes", "yes"),
        predicted("Q", "no", "yes"),
        predicted("Q", "no", "no", "none"),
        predicted("How many?", "1", "2", kind="count"),
    ]
    assert scores.values(rows, prior) == {"n": 4, "exact": 2 / 4, "prior": 1 / 4, "above_prior": 1 / 4}
    by_type = scores.score(rows, prior, resamples=1)["by_type"]
    assert {kind: (own["n"], own["exact"], own["prior"]) for kind, own in by_type.items()} == {
        "count": (1, 0.0, 0.0),
        "yes_no": (3, 2 / 3, 1 / 3),
    }
    assert scores.values([], prior) == {"n": 0, "exact": None, "prior": None}
    assert scores.values(rows, Prior([]))["prior"] is None


def test_inverse_class_weights_are_scikit_learns() -> None:
    answers = ["no"] * 70 + ["yes"] * 25 + ["not relevant"] * 5
    ours = metrics.class_weights(answers, "inverse")
    classes = np.unique(answers)
    theirs = compute_class_weight("balanced", classes=classes, y=answers)
    assert [ours[str(name)] for name in classes] == pytest.approx(theirs)


def test_effective_class_weights_by_hand() -> None:
    weights = metrics.class_weights(["a"] * 3 + ["b"], "effective")
    effective_a = (1 - 0.999**3) / (1 - 0.999)
    ratio = weights["b"] / weights["a"]
    assert ratio == pytest.approx(effective_a)
    assert (3 * weights["a"] + weights["b"]) / 4 == pytest.approx(1)
