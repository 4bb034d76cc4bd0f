"""Scores against scikit-learn, papers' formulas, hand-worked examples and slow references; real answers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    confusion_matrix,
    precision_recall_fscore_support,
    roc_auc_score,
)

from surgvqa import nlg, scores
from surgvqa.datasets import Example
from surgvqa.intervals import bootstrap, draws
from surgvqa.metrics import Prediction, Prior
from surgvqa.recipe import BadInput
from surgvqa.results import Evaluation
from surgvqa.scores import CLASSES, Scored, legacy_iou, score

LABELS = ["Grasping", "Idle", "Cutting", "suction", "Suction"]
NO_PRIOR = Prior([])


def row(number: int, answer: str, *references: str, **more: Any) -> Prediction:
    given = {"image": f"image {number}", "group": f"group {number % 12}", "question_type": "state", **more}
    return Prediction(str(number), question="Q?", references=list(references), answer=answer, **given)


def rows(seed: int, count: int, labels: list[str] = LABELS, **more: Any) -> list[Prediction]:
    rng = random.Random(seed)
    weights = [2.0**-place for place in range(len(labels))]
    made = []
    for number in range(count):
        truth = rng.choices(labels, weights)[0]
        answer = truth if rng.random() < 0.6 else rng.choice(labels)
        made.append(row(number, answer, truth, **more))
    return made


def overall(predictions: list[Prediction], prior: Prior = NO_PRIOR) -> dict[str, Any]:
    found: dict[str, Any] = score(predictions, prior, resamples=50)["overall"]
    return found


# ---- exact match and the prior ------------------------------------------------------------------------


def test_exact_and_prior_by_hand() -> None:
    prior = Prior([Example("t", (), "Q?", ("no",), "yes_no")])
    made = [
        row(0, "no", "no", question_type="yes_no"),
        row(1, "Yes", "yes", question_type="yes_no"),
        row(2, "red;pink", "pink; red", question_type="colour"),
        row(3, "2", "1", "2", question_type="count"),
    ]
    result = score(made, prior, resamples=50)
    assert (result["schema"], result["groups"], result["resamples"], result["seed"]) == (2, 4, 50, 0)
    assert list(result["by_type"]) == ["colour", "count", "yes_no"]
    whole, kind = result["overall"], result["by_type"]["yes_no"]
    assert (whole["n"], whole["exact"], whole["prior"], whole["above_prior"]) == (4, 3 / 4, 1 / 4, 2 / 4)
    assert (kind["n"], kind["exact"], kind["prior"], kind["above_prior"]) == (2, 1 / 2, 1 / 2, 0)
    assert "by_group" not in result


def test_small_buckets_and_few_groups_are_marked() -> None:
    made = [*rows(0, 40), row(99, "a", "b", question_type="rare", group="group 0")]
    result = score(made, NO_PRIOR, resamples=50)
    marks = {kind: (found["few"], found["few_groups"]) for kind, found in result["by_type"].items()}
    assert marks == {"state": (False, False), "rare": (True, True)}
    assert (result["by_type"]["state"]["groups"], result["by_type"]["rare"]["groups"]) == (12, 1)
    assert score(rows(0, 19), NO_PRIOR, resamples=9)["overall"]["few"]
    assert not score(rows(0, 20), NO_PRIOR, resamples=9)["overall"]["few"]
    assert scores.table(result)[0][1] == "41"
    assert scores.table(result)[1][:3] == ("rare", "1*†", "0.0")
    assert scores.table(result)[1][3] == "0.0 – 97.5"
    assert " – " in scores.table(result)[0][3]


def test_a_question_type_may_be_called_all(tmp_path: Path) -> None:
    made = [row(n, "a", "a" if n % 2 else "b", question_type="all" if n % 2 else "other") for n in range(40)]
    result = score(made, NO_PRIOR, resamples=9)
    assert [each[:3] for each in scores.table(result)] == [
        ("all", "40", "50.0"), ("all", "20†", "100.0"), ("other", "20†", "0.0"),
    ]  # fmt: skip
    table = Evaluation(tmp_path / "p", tmp_path / "s", result).scores_table()
    assert [*zip(table.index, table["questions"], strict=True)] == [("all", 40), ("all", 20), ("other", 20)]


def test_groups_that_hold_several_images_are_told_apart() -> None:
    prior = Prior([Example("t", (), "Q?", ("a",), "state")])
    made = [row(n, "a" if n < 3 else "b", "a", group=f"video {n // 3}") for n in range(5)]
    assert score(made, prior, resamples=9)["by_group"] == {
        "video 0": {"n": 3, "few": True, "exact": 1.0, "prior": 1.0},
        "video 1": {"n": 2, "few": True, "exact": 0.0, "prior": 1.0},
    }


def test_an_image_is_its_own_group_where_there_is_none() -> None:
    made = [replace(r, group="") for r in rows(0, 40)]
    assert score(made, NO_PRIOR, resamples=9)["groups"] == 40


def test_nothing_to_score_and_a_single_group() -> None:
    empty = score([], NO_PRIOR)
    assert (empty["overall"]["n"], empty["overall"]["exact"], empty["by_type"]) == (0, None, {})
    assert scores.table(empty) == [("all", "0*†", "-", "-", "-")]
    alone = overall([replace(r, group="one") for r in rows(0, 30)])
    assert alone["intervals"] == {}
    assert 0 < alone["exact"] < 1


def test_everything_is_json_without_nan() -> None:
    made = [*rows(1, 60), row(100, "A polyp is in it", "There is a polyp", question_type="sentence")]
    json.dumps(score(made, NO_PRIOR, resamples=50), allow_nan=False)


# ---- classes ------------------------------------------------------------------------------------------


def ssg_formula(y_true: list[str], y_pred: list[str]) -> tuple[float, ...]:
    """SSG-VQA's own evaluation in words: over classes with support, 0 where nothing is to be divided."""
    matrix = confusion_matrix(y_true, y_pred)
    precisions, recalls, f1s, support = [], [], [], []
    for label in range(len(matrix)):
        n, told, hit = matrix[label].sum(), matrix[:, label].sum(), matrix[label, label]
        if n:
            precision, recall = hit / told if told else 0, hit / n
            precisions.append(precision)
            recalls.append(recall)
            f1s.append(2 * precision * recall / (precision + recall) if precision + recall else 0)
            support.append(n)
    weighted = np.average(f1s, weights=support)
    accuracy = matrix.diagonal().sum() / sum(support)
    return tuple(map(float, (np.mean(precisions), np.mean(recalls), np.mean(f1s), weighted, accuracy)))


@pytest.mark.parametrize("seed", range(6))
def test_class_scores_are_scikit_learns_and_those_of_papers(seed: int) -> None:
    # Odd seeds: some labels are answers alone, so they have to be told by the probabilities.
    labels = LABELS if seed % 2 else LABELS[:3]
    made = rows(seed, 60, labels)
    if seed % 2:
        shares = dict.fromkeys(LABELS, 0.2)
        unsupported = [replace(r, references=["Idle"]) if r.references[0] == "Suction" else r for r in made]
        made = [replace(r, probabilities=shares) for r in unsupported]
    y_true, y_pred = [r.references[0] for r in made], [r.answer for r in made]
    found = overall(made)
    macro = precision_recall_fscore_support(y_true, y_pred, average="macro", zero_division=1)
    assert [found[name] for name in CLASSES[:3]] == pytest.approx(macro[:3])
    ap, ar, af1, wf1, accuracy = ssg_formula(y_true, y_pred)
    assert (found["ssg_map"], found["ssg_maf1"], found["ssg_wf1"]) == pytest.approx((ap, af1, wf1))
    # One number under three names: recall over supported classes; and exact match is the accuracy.
    assert found["balanced_accuracy"] == pytest.approx(ar)
    if not seed % 2:
        assert ar == pytest.approx(balanced_accuracy_score(y_true, y_pred))
    assert found["exact"] == pytest.approx(accuracy) == accuracy_score(y_true, y_pred)


def test_class_scores_by_hand() -> None:
    """b is never answered, c never a reference: each counts 1 where scikit-learn has nothing to divide."""
    shares = {"a": 0.4, "b": 0.3, "c": 0.3}
    made = [row(n, "a", "a", probabilities=shares) for n in range(6)]
    made += [row(n, "a", "b", probabilities=shares) for n in range(6, 8)]
    made += [row(n, "c", "b", probabilities=shares) for n in range(8, 10)]
    found = overall(made)
    # Precision: a 6/8, b nothing, c 0. Recall: a 1, b 0, c nothing. F1: a 12/14, b 0, c 0.
    assert found["macro_precision"] == pytest.approx((6 / 8 + 1 + 0) / 3)
    assert found["macro_recall"] == pytest.approx((1 + 0 + 1) / 3)
    assert found["macro_f1"] == pytest.approx(12 / 14 / 3)
    assert found["balanced_accuracy"] == pytest.approx(1 / 2)
    assert found["ssg_map"] == pytest.approx(6 / 8 / 2)
    assert found["ssg_wf1"] == pytest.approx(12 / 14 * 6 / 10)


def test_answers_that_are_no_label_do_not_become_classes() -> None:
    """Free text is wrong for its question; as classes of their own its 30 kinds would lift macro recall."""
    made = rows(3, 100, ["yes", "no"])
    chatty = [replace(r, answer=f"Well, {n}") if n < 30 else r for n, r in enumerate(made)]
    y_true, y_pred = [r.references[0] for r in chatty], [r.answer for r in chatty]
    found = overall(chatty)
    within = precision_recall_fscore_support(
        y_true, y_pred, labels=["no", "yes"], average="macro", zero_division=1
    )
    assert [found[name] for name in CLASSES[:3]] == pytest.approx(within[:3])
    _, everything, _, _ = precision_recall_fscore_support(y_true, y_pred, average="macro", zero_division=1)
    assert everything > 0.9 > found["macro_recall"]


def test_the_reference_that_is_met_is_the_class() -> None:
    made = [row(n, "b", "a", "b") for n in range(10)] + [row(n, "c", "a", "b") for n in range(10, 20)]
    found = overall(made)
    # As (b, b) ten times and (a, c): b is all right, a is missed.
    assert found["balanced_accuracy"] == pytest.approx(1 / 2)
    assert found["ssg_maf1"] == pytest.approx(1 / 2)


def test_why_class_scores_are_absent() -> None:
    many = [row(n, "x", f"label {n % 101}") for n in range(1000)]
    assert "101 different references" in overall(many)["absent"]["class scores"]
    few = [row(n, "x", f"label {n % 10}") for n in range(49)]
    assert "49 questions for 10 different references" in overall(few)["absent"]["class scores"]
    assert "macro_f1" not in overall(few)
    assert "macro_f1" in overall([*few, row(49, "x", "label 9")])


def test_which_scores_there_are_does_not_depend_on_the_answers() -> None:
    """Training that is judged by one of them would lose it half-way."""
    share = {"a": 0.5, "b": 0.3, "c": 0.2}
    alike = [row(n, "a", "a", "b", "c", probabilities=share) for n in range(10)]
    told = [row(n, "abc"[n % 3], "a", "b", "c", probabilities=share) for n in range(10)]
    assert overall(alike).keys() == overall(told).keys() >= {"macro_f1", "ece"}
    assert overall(alike)["absent"].keys() == overall(told)["absent"].keys()


# ---- text ---------------------------------------------------------------------------------------------


def test_text_scores_are_for_sentences() -> None:
    short = [row(n, "calot triangle dissection", "calot triangle dissection") for n in range(10)]
    long = [
        row(20 + n, "the scope is in the patient", "the scope stays in the patient", question_type="scope")
        for n in range(10)
    ]
    result = score([*short, *long], NO_PRIOR, resamples=50)
    assert "3.0 words on average" in result["by_type"]["state"]["absent"]["text scores"]
    assert set(nlg.NAMES) <= result["by_type"]["scope"].keys()
    assert not set(nlg.NAMES) & result["by_type"]["state"].keys()
    # (3 + 6) / 2 = 4.5 words: over everything, they apply, and over all questions.
    whole = nlg.statistics([r.answer for r in [*short, *long]], [r.references for r in [*short, *long]])
    expected = dict(zip(nlg.NAMES, nlg.formula(whole.sum(0)), strict=True))
    assert {name: result["overall"][name] for name in nlg.NAMES} == pytest.approx(expected)


def test_sentences_of_some_types_alone_are_scored() -> None:
    short = [row(n, "yes", "yes") for n in range(40)]
    long = [row(50 + n, "a b c d", "a b c d", question_type="long") for n in range(5)]
    result = score([*short, *long], NO_PRIOR, resamples=50)
    assert "text scores" in result["overall"]["absent"]
    assert result["by_type"]["long"]["bleu4"] == 1


# ---- probabilities ------------------------------------------------------------------------------------


def sure(seed: int, count: int, labels: list[str]) -> list[Prediction]:
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        truth = labels[int(rng.integers(len(labels)))]
        odds = rng.dirichlet(np.ones(len(labels)) + 2 * (np.array(labels) == truth)).round(2)
        odds[-1] = 1 - odds[:-1].sum()
        shares = dict(zip(labels, odds.tolist(), strict=True))
        made.append(row(number, max(shares, key=shares.__getitem__), truth, probabilities=shares))
    return made


@pytest.mark.parametrize("labels", [["no", "yes"], LABELS])
def test_auroc_is_scikit_learns(labels: list[str]) -> None:
    made = sure(0, 300, labels)
    found = overall(made)["auroc"]
    ordered = sorted(labels)
    share = np.array([[r.probabilities[label] for label in ordered] for r in made if r.probabilities])
    truth = [r.references[0] for r in made]
    if len(labels) == 2:
        expected = roc_auc_score([t == ordered[1] for t in truth], share[:, 1])
    else:
        expected = roc_auc_score(truth, share, multi_class="ovr", average="macro", labels=ordered)
    assert found == pytest.approx(expected)
    assert len(np.unique(share[:, 0])) < len(share)  # there are ties


def test_auroc_by_hand() -> None:
    # "yes" has 0.9, 0.4 where right, 0.4, 0.1 where wrong: 3 of 4 pairs in order, and a tie.
    shares = [(0.9, "yes"), (0.4, "yes"), (0.4, "no"), (0.1, "no")]
    made = [row(n, "no", truth, probabilities={"yes": p, "no": 1 - p}) for n, (p, truth) in enumerate(shares)]
    assert overall(made)["auroc"] == pytest.approx(3.5 / 4)


def test_auroc_takes_every_reference_for_right() -> None:
    """Whichever of them was answered."""
    shares = [(0.9, ("yes", "maybe")), (0.4, ("maybe", "yes")), (0.4, ("no",)), (0.1, ("no",))]
    for answers in (["yes"] * 4, ["maybe", "yes", "no", "no"]):
        made = [
            row(n, answer, *truth, probabilities={"yes": p, "no": 1 - p})
            for n, (answer, (p, truth)) in enumerate(zip(answers, shares, strict=True))
        ]
        assert overall(made)["auroc"] == pytest.approx(3.5 / 4)


def test_auroc_of_resamples_is_close_to_that_of_repeated_questions() -> None:
    made = sure(1, 240, ["no", "yes"])
    tally = next(t for t in Scored(made).overall.scores if t.names == ("auroc",))
    (fast,) = bootstrap([tally], resamples=300, seed=2)
    ordered = sorted({r.group for r in made})
    slow = []
    for drawn in np.concatenate(list(draws(12, 300, seed=2))):
        times = [int(drawn[ordered.index(r.group)]) for r in made]
        share = [r.probabilities["yes"] for r in made if r.probabilities]
        slow.append(roc_auc_score([r.references[0] == "yes" for r in made], share, sample_weight=times))
    assert fast[:, 0] == pytest.approx(np.array(slow), abs=0.01)
    assert fast.std() == pytest.approx(np.std(slow), rel=0.1)


def test_calibration_error_by_hand() -> None:
    # Two answers of 0.9, one right: |1/2 - 0.9| of 2/4. One of 0.6, right: 0.4 of 1/4. One of 0.55, wrong:
    # 0.55 of 1/4. 0.6 is the upper end of its bin (8/15, 9/15], in which 0.55 is, too: (1 - 1.15) / 4.
    shares = [(0.9, "a"), (0.9, "b"), (0.6, "a"), (0.55, "b")]
    made = [row(n, "a", truth, probabilities={"a": p, "b": 1 - p}) for n, (p, truth) in enumerate(shares)]
    found = overall(made)
    assert found["ece"] == pytest.approx(0.8 / 4 + 0.15 / 4)
    assert found["reliability"] == [
        {"from": 8 / 15, "to": 9 / 15, "n": 2, "confidence": pytest.approx(0.575), "exact": 0.5},
        {"from": 13 / 15, "to": 14 / 15, "n": 2, "confidence": pytest.approx(0.9), "exact": 0.5},
    ]


def test_calibration_error_is_the_sum_over_bins() -> None:
    made = sure(2, 500, LABELS)
    confidence = np.array([r.probabilities[r.answer] for r in made if r.probabilities])
    right = np.array([r.answer == r.references[0] for r in made])
    expected = 0.0
    for number in range(15):
        inside = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert overall(made)["ece"] == pytest.approx(expected)


def test_why_scores_of_probabilities_are_absent() -> None:
    made = sure(0, 40, ["no", "yes"])
    assert "not every answer" in overall([*made, row(99, "no", "no")])["absent"]["calibration"]
    other = row(99, "a", "a", probabilities={"a": 0.6, "b": 0.4})
    mixed = overall([*made, other])
    assert "different sets of labels" in mixed["absent"]["auroc"]
    assert "ece" in mixed
    alike = overall([r for r in made if r.references == ["no"]])
    assert "right for some questions and wrong for others" in alike["absent"]["auroc"]


# ---- boxes --------------------------------------------------------------------------------------------


def boxed(number: int, found: list[Any], expected: list[Any], size: list[int] | None = None) -> Prediction:
    regions = [
        [{"label": "", "box": list(box), "image": image} for image, box in boxes]
        for boxes in (found, expected)
    ]
    return row(
        number, "x", "x", regions=regions[0], reference_regions=regions[1], image_sizes=size and [size, size]
    )


def test_boxes_by_hand() -> None:
    square, half, far = (0, (0, 0, 2, 2)), (0, (0, 0, 2, 1)), (0, (8, 8, 9, 9))
    found = overall(
        [
            boxed(0, [square], [square]),  # 1, hit
            boxed(1, [half], [square]),  # 1/2, hit
            boxed(2, [(0, (1, 0, 3, 2))], [square]),  # 1/3, none
            boxed(3, [], [square]),  # 0
            boxed(4, [(1, (0, 0, 2, 2))], [square]),  # in another image: 0
            boxed(5, [far, half, square], [square]),  # the best one counts, a third of it: 1/3, hit
            boxed(6, [square], [square, far]),  # 1/2, hit
            boxed(7, [square], []),  # nothing to be found: only AP50 counts it
            row(8, "x", "x"),
        ]
    )
    assert found["boxes"] == 7
    assert found["iou"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 0 + 0 + 1 / 3 + 1 / 2) / 7)
    # 4 hits, 9 boxes found, 8 expected.
    assert found["ap50"] == pytest.approx(4 / 9 * 4 / 8)
    assert "legacy" not in found
    assert "no reference has boxes" in overall([row(0, "x", "x")])["absent"]["boxes"]


def test_ap50_is_the_area_under_the_curve_of_equal_confidences() -> None:
    rng = np.random.default_rng(0)
    made, hits, expected = [], [], 0
    for number in range(50):
        reference = (0, (0, 0, 4, 4))
        shift = float(rng.uniform(0, 4))
        answered = [(0, (shift, 0, 4 + shift, 4))] if rng.random() < 0.8 else []
        made.append(boxed(number, answered, [reference]))
        expected += 1
        # Shifted by s, squares of side 4 share (4 - s) · 4 of (4 + s) · 4: half or more where s ≤ 4/3.
        hits += [shift <= 4 / 3] * len(answered)
    recall = sum(hits) / expected
    assert overall(made)["ap50"] == pytest.approx(average_precision_score(hits, np.ones(len(hits))) * recall)


def test_legacy_iou_is_the_published_formula() -> None:
    # Far apart, and yet (0.6 · 0.6) / (2 · 1.2² - 0.36) = 1/7.
    assert legacy_iou((0, 0, 0.2, 0.2), (0.6, 0.6, 0.8, 0.8)) == pytest.approx(0.143, abs=5e-4)
    # An IoU of 0.04 / 0.28 = 1/7 becomes 1.2² / (2 · 1.4² - 1.44).
    assert legacy_iou((0, 0, 0.4, 0.4), (0.2, 0.2, 0.6, 0.6)) == pytest.approx(0.581, abs=5e-4)
    assert legacy_iou((0, 0, 0.4, 0.4), (0, 0, 0.4, 0.4)) == 1


def test_legacy_is_kept_apart() -> None:
    size = [1000, 500]
    made = [
        boxed(0, [(0, (0, 0, 200, 100))], [(0, (600, 300, 800, 400))], size),  # 1/7 for nothing in common
        boxed(1, [(1, (0, 0, 400, 200))], [(1, (200, 100, 600, 300))], size),
        boxed(2, [], [(0, (0, 0, 400, 200))], size),
        row(3, "x", "x"),
    ]
    found = overall(made)
    assert found["iou"] == pytest.approx((0 + 1 / 7 + 0) / 3)
    assert found["legacy"]["iou"] == pytest.approx((0.36 / 2.52 + 1.44 / 2.48 + 0) / 3)
    assert set(found["legacy"]) == {"iou", "intervals"}
    assert "legacy" not in str(scores.table(score(made, NO_PRIOR, resamples=9)))


# ---- resamples ----------------------------------------------------------------------------------------


def repeated(predictions: list[Prediction], counts: np.ndarray) -> list[Prediction]:
    groups = sorted({r.group for r in predictions})
    times = dict(zip(groups, counts.astype(int), strict=True))
    return [r for r in predictions for _ in range(times[r.group])]


@pytest.mark.parametrize("kind", ["classes", "text", "calibration", "boxes"])
def test_resampled_sums_are_the_scores_of_repeated_questions(kind: str) -> None:
    """Every score whose question sums are exact; CIDEr's idf and AUROC are of the questions as they are."""
    rng = random.Random(7)
    make: dict[str, Callable[[], list[Prediction]]] = {
        "classes": lambda: rows(2, 150),
        "calibration": lambda: sure(3, 150, LABELS),
        "text": lambda: [
            row(n, *(" ".join(rng.choices("abcdef", k=rng.randint(4, 8))) for _ in range(2)))
            for n in range(100)
        ],
        "boxes": lambda: [
            boxed(n, [(0, (0, 0, 1 + rng.random(), 2))] * rng.randint(0, 2), [(0, (0, 0, 2, 2))], [9, 9])
            for n in range(60)
        ],
    }
    made = make[kind]()
    bucket = Scored(made, NO_PRIOR).overall
    samples = bootstrap([*bucket.scores, *bucket.legacy], resamples=5, seed=8)
    assert len({name for tally in bucket.scores for name in tally.names}) > 3
    for number, counts in enumerate(np.concatenate(list(draws(12, 5, seed=8)))):
        again = Scored(repeated(made, counts), NO_PRIOR).overall
        slow = {name: value for tally in again.scores for name, value in tally.told().items()}
        for tally, drawn in zip(bucket.scores, samples, strict=False):
            for name, value in zip(tally.names, drawn[number], strict=True):
                if name not in ("cider", "auroc"):
                    assert value == pytest.approx(slow[name]), name
        for tally, drawn in zip(bucket.legacy, samples[len(bucket.scores) :], strict=True):
            assert drawn[number, 0] == pytest.approx(again.legacy[0].told()[tally.names[0]])


def test_every_score_has_an_interval_around_it() -> None:
    prior = Prior([Example("t", (), "Q?", ("none of them",), "state")])
    found = overall(sure(4, 300, LABELS), prior)
    for name in ("exact", "above_prior", *CLASSES, "auroc"):
        low, high = found["intervals"][name]
        assert low < found[name] < high, name
    assert "ece" in found["intervals"]


@pytest.mark.parametrize(("answer", "value"), [("a", 1), ("b", 0)])
def test_a_score_at_the_end_of_its_scale_has_the_interval_of_its_groups(answer: str, value: int) -> None:
    """Clopper and Pearson's, of groups: 12 of them with 5 questions each, 3 of which have another type."""
    prior = Prior([Example("t", (), "Q?", ("a",), "state")])
    made = [
        row(n, answer, "a", group=f"video {n % 12}", question_type="rare" if n % 12 < 3 else "state")
        for n in range(60)
    ]
    result = score(made, prior, resamples=50)
    for bucket, groups in ((result["overall"], 12), (result["by_type"]["rare"], 3)):
        exact = stats.binomtest(value * groups, groups).proportion_ci(0.95, method="exact")
        assert (bucket["exact"], bucket["groups"]) == (value, groups)
        assert bucket["intervals"]["exact"] == pytest.approx([exact.low, exact.high])
        assert bucket["intervals"]["prior"] == pytest.approx([0.025 ** (1 / groups), 1])
        low, high = bucket["intervals"]["above_prior"]
        assert low <= value - 1 <= high
        # Other scores have none: how far they could be off is not known from the groups alone.
        assert "macro_f1" not in bucket["intervals"]
    assert scores.table(result)[0][3] == {1: "73.5 – 100.0", 0: "0.0 – 26.5"}[value]


def test_the_same_seed_gives_the_same_scores() -> None:
    made = rows(5, 100)
    assert score(made, NO_PRIOR, resamples=100) == score(made, NO_PRIOR, resamples=100)
    assert score(made, NO_PRIOR, resamples=100, seed=1) != score(made, NO_PRIOR, resamples=100)


# ---- files --------------------------------------------------------------------------------------------


def test_predictions_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    made = [*sure(0, 3, LABELS), boxed(9, [(0, (0, 0, 1, 1))], [], [4, 5]), row(10, "a\u2028b\x85c", "d\re")]
    file = tmp_path / "predictions.jsonl"
    file.write_text("".join(json.dumps(r.row(), ensure_ascii=False) + "\n" for r in made), encoding="utf-8")
    assert scores.read(file) == made


GOOD = (
    '{"id": "1", "image": "i", "group": "g", "question": "Q", "question_type": "t", "references": ["a"], '
    '"answer": "a"}'
)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "Invalid JSON"),
        ("[" * 100_000, "Invalid JSON"),
        ("[1]", "Input should be an object"),
        ('{"id": "1"}', "Field required"),
        (GOOD.replace('"answer": "a"', '"answer": 3'), "answer: Input should be a valid string"),
        (GOOD.replace('["a"]', "[]"), "references: there is none"),
        (GOOD.replace("}", ', "probabilities": {"a": NaN}}'), "probabilities: not all are between 0 and 1"),
        (GOOD.replace("}", ', "probabilities": {"a": 1.5}}'), "probabilities: not all are between 0 and 1"),
        (GOOD.replace("}", ', "regions": [{"box": [0, 1]}]}'), "regions: not all have a box"),
        (GOOD.replace("}", ', "regions": [{"box": [0, 1, 2, NaN], "image": 0}]}'), "regions: not all"),
        (GOOD.replace("}", ', "image_sizes": [[0, 5]]}'), "image_sizes: not all are width and height"),
        (
            GOOD.replace("}", ', "regions": [{"box": [0, 1, 2, 3], "image": 1}], "image_sizes": [[4, 5]]}'),
            "regions: not all",
        ),
        (GOOD.replace('"id": "1"', '"id": "0"'), "id '0' is already at line 1"),
    ],
)
def test_lines_that_are_no_predictions_are_named(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "predictions.jsonl"
    first = GOOD.replace('"id": "1"', '"id": "0"')
    file.write_text(f"{first}\n{line}\n")
    with pytest.raises(BadInput) as caught:
        scores.read(file)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{file}:2: ")
    assert said in problem


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read"):
        scores.read(tmp_path / "none.jsonl")


# ---- real answers -------------------------------------------------------------------------------------


def test_real_sentences(shared: Path) -> None:
    """REAL-Colon-VQA, Qwen3-VL before and after fine-tuning: sentences, from one video."""
    found = {}
    for name in ("zeroshot", "finetuned"):
        file = shared / f"real_colon_vqa/results/qwen3_{name}_test.jsonl"
        told = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        made = [
            Prediction(
                t["question_id"], t["question_id"], "002-004", t["question"], t["question_type"],
                [t["ground_truth"]], t["predicted_answer"],
            )
            for t in told
        ]  # fmt: skip
        found[name] = overall(made)
        assert found[name]["n"] == 120
        assert found[name]["few_groups"]
        assert found[name]["intervals"].keys() <= {"exact"}  # of one group: only at 0 or 1
    for score_name in ("exact", *nlg.NAMES):
        assert found["finetuned"][score_name] > found["zeroshot"][score_name]
    assert 0.5 < found["finetuned"]["bleu4"] < 1


def test_real_short_answers(shared: Path) -> None:
    """Kvasir-VQA, the reference experiment's long answers against short references."""
    file = shared / "kvasir_vqa/results/exp1_predictions_concise.json"
    told = json.loads(file.read_text(encoding="utf-8"))["predictions"]
    made = [
        Prediction(
            str(n), t["image_id"], t["image_id"], t["question"], t["question"], [t["ground_truth"]], answer
        )
        for n, t in enumerate(told)
        for answer in [t["prediction_concise"]]
    ]
    result = score(made, NO_PRIOR, resamples=500)
    assert (result["overall"]["n"], result["groups"]) == (304, 20)
    low, high = result["overall"]["intervals"]["exact"]
    assert low < result["overall"]["exact"] < high
    assert "by_group" not in result
    assert "text scores" in result["overall"]["absent"]
    assert any("macro_f1" in bucket for bucket in result["by_type"].values())
