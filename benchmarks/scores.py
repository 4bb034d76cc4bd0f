"""Scores against what others compute: `python -m benchmarks.scores` gives both the same random answers and
tells the largest difference, then times the scores of 60,000 predictions with 10,000 resamples on one core.

CIDEr is compared with coco-caption's code where that is installed: `pip install pycocoevalcap --no-deps`.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import RESULTS, spread, write
from surgvqa import scores
from surgvqa.comparison import holm
from surgvqa.datasets import Example
from surgvqa.intervals import RESAMPLES, bootstrap, interval
from surgvqa.metrics import Prediction, Prior

LABELS = ("Cutting", "Grasping", "Idle", "Suction", "suction")
WORDS = ("a", "polyp", "in", "the", "colon", "seen", "no")
PREDICTIONS, IMAGES, TYPES = 60_000, 6_500, 10
KINDS = ("labels", "labels, with probabilities", "sentences")

Pairs = Mapping[str, tuple[float, float]]
"""Score → ours, theirs."""


# ---- answers ------------------------------------------------------------------------------------------


def closed(seed: int, count: int = 400, labels: Sequence[str] = LABELS, group: int = 8) -> list[Prediction]:
    """Chosen among labels, with probabilities that often tie; every `group` questions share an image."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        truth = labels[int(min(rng.geometric(0.45), len(labels)) - 1)]
        odds = rng.dirichlet(1 + 2.0 * (np.array(labels) == truth)).round(2)
        odds[-1] = max(0, 1 - odds[:-1].sum())
        shares = dict(zip(labels, odds.tolist(), strict=True))
        answer = max(shares, key=shares.__getitem__)
        kind = f"type {rng.integers(3)}"
        made.append(_row(number, answer, [truth], kind, image=f"{number // group}", probabilities=shares))
    return made


def sentences(seed: int, count: int = 100, least: int = 4) -> list[Prediction]:
    """One to three references, and an answer that has most of the words of one of them."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        references = [rng.choices(WORDS, k=rng.randint(least, 12)) for _ in range(rng.randint(1, 3))]
        answer = [word if rng.random() < 0.8 else rng.choice(WORDS) for word in rng.choice(references)]
        rows.append(_row(number, " ".join(answer), [" ".join(own) for own in references]))
    return rows


def boxed(seed: int, count: int = 60) -> list[Prediction]:
    """Boxes of whole pixels on 20 × 20: one is expected, and one or none answered, often near it."""
    rng = np.random.default_rng(seed)

    def regions(corners: Any) -> list[dict[str, Any]]:
        return [{"label": "", "box": [int(edge) for edge in corners], "image": 0}]

    rows = []
    for number in range(count):
        expected = np.array([0, 0, *rng.integers(3, 8, 2)]) + np.tile(rng.integers(3, 9, 2), 2)
        answered = regions(expected + rng.integers(-1, 2, 4)) if rng.random() < 0.8 else []
        boxes: dict[str, Any] = {
            "regions": answered,
            "reference_regions": regions(expected),
            "image_sizes": [[20, 20]],
        }
        rows.append(_row(number, "x", ["x"], **boxes))
    return rows


def _row(number: int, answer: str, references: list[str], kind: str = "t", **more: Any) -> Prediction:
    given = {"image": str(number), "group": "", "question": f"Q {kind}", **more}
    return Prediction(str(number), question_type=kind, references=references, answer=answer, **given)


def ours(rows: Sequence[Prediction], names: Sequence[str], prior: Prior | None = None) -> list[float]:
    found = scores.score(rows, prior or Prior([]), resamples=1)["overall"]
    return [float(found[name]) for name in names]


def _pairs(names: Sequence[str], first: Sequence[float], second: Sequence[float]) -> Pairs:
    return {name: (a, float(b)) for name, a, b in zip(names, first, second, strict=True)}


# ---- what others compute ------------------------------------------------------------------------------


def accuracy(seed: int) -> Pairs:
    from sklearn.metrics import accuracy_score

    rows = closed(seed)
    truth, told = [row.references[0] for row in rows], [row.answer for row in rows]
    return _pairs(["exact"], ours(rows, ["exact"]), [accuracy_score(truth, told)])


def majority(seed: int) -> Pairs:
    from sklearn.dummy import DummyClassifier

    rows, train = closed(seed, 200), closed(seed + 1000, 200)
    right = 0
    for question in {row.question for row in rows}:
        known = [row.references[0] for row in train if row.question == question]
        asked = [row.references[0] for row in rows if row.question == question]
        dummy = DummyClassifier(strategy="most_frequent").fit(np.zeros((len(known), 1)), known)
        right += int((dummy.predict(np.zeros((len(asked), 1))) == np.array(asked)).sum())
    prior = Prior(Example(r.id, (), r.question, tuple(r.references), r.question_type) for r in train)
    return _pairs(["prior"], ours(rows, ["prior"], prior), [right / len(rows)])


def macro(seed: int) -> Pairs:
    from sklearn.metrics import precision_recall_fscore_support

    rows = closed(seed)
    truth, told = [row.references[0] for row in rows], [row.answer for row in rows]
    names = scores.CLASSES[:3]
    theirs = precision_recall_fscore_support(truth, told, average="macro", zero_division=1)[:3]
    return _pairs(names, ours(rows, names), theirs)


def balanced(seed: int) -> Pairs:
    from sklearn.metrics import balanced_accuracy_score

    rows = closed(seed)
    truth, told = [row.references[0] for row in rows], [row.answer for row in rows]
    names = ["balanced_accuracy"]
    return _pairs(names, ours(rows, names), [balanced_accuracy_score(truth, told)])


def ssg(seed: int) -> Pairs:
    """SSG-VQA's means are over supported classes, with 0 for what is not defined."""
    from sklearn.metrics import precision_recall_fscore_support

    rows = [row for row in closed(seed) if row.references[0] != "suction"]  # answered, never right
    truth, told = [row.references[0] for row in rows], [row.answer for row in rows]
    plain, weighted = (
        precision_recall_fscore_support(truth, told, labels=sorted(set(truth)), average=how, zero_division=0)
        for how in ("macro", "weighted")
    )
    names = ["ssg_map", "ssg_maf1", "ssg_wf1"]
    return _pairs(names, ours(rows, names), [plain[0], plain[2], weighted[2]])


BLEU = ["bleu1", "bleu2", "bleu3", "bleu4"]


def bleu_of_sacrebleu(seed: int) -> Pairs:
    import sacrebleu

    rows = sentences(seed, least=2)
    most = max(len(row.references) for row in rows)
    streams: Any = [[dict(enumerate(row.references)).get(place) for row in rows] for place in range(most)]
    answers = [row.answer for row in rows]
    theirs = [
        sacrebleu.BLEU(smooth_method="none", max_ngram_order=order).corpus_score(answers, streams).score / 100
        for order in range(1, 5)
    ]
    return _pairs(BLEU, ours(rows, BLEU), theirs)


def bleu_of_nltk(seed: int) -> Pairs:
    from nltk.translate.bleu_score import corpus_bleu

    rows = sentences(seed)
    references = [[reference.split() for reference in row.references] for row in rows]
    answers = [row.answer.split() for row in rows]
    theirs = [corpus_bleu(references, answers, [1 / order] * order) for order in range(1, 5)]
    return _pairs(BLEU, ours(rows, BLEU), theirs)


def rouge(seed: int) -> Pairs:
    """Lin's formulas, written out: shared n-grams, and the longest common subsequence."""
    rows = sentences(seed)
    values = []
    for row in rows:
        answer = row.answer.split()
        values.append([max(f(answer, own.split()) for own in row.references) for f in _ROUGE])
    names = ["rouge1", "rouge2", "rougeL"]
    return _pairs(names, ours(rows, names), np.mean(values, 0).tolist())


def _shared(answer: Sequence[str], reference: Sequence[str], size: int) -> float:
    first, second = (
        list(zip(*(words[n:] for n in range(size)), strict=False)) for words in (answer, reference)
    )
    hits = sum(min(first.count(gram), second.count(gram)) for gram in set(first))
    return 2 * hits / max(1, len(first) + len(second))


def _subsequence(answer: Sequence[str], reference: Sequence[str]) -> float:
    longest = np.zeros((len(answer) + 1, len(reference) + 1), int)
    for i, j in np.ndindex(len(answer), len(reference)):
        same = answer[i] == reference[j]
        longest[i + 1, j + 1] = longest[i, j] + 1 if same else max(longest[i, j + 1], longest[i + 1, j])
    return float(2 * longest[-1, -1] / max(1, len(answer) + len(reference)))


_ROUGE: list[Callable[[list[str], list[str]], float]] = [
    lambda answer, reference: _shared(answer, reference, 1),
    lambda answer, reference: _shared(answer, reference, 2),
    _subsequence,
]


def meteor(seed: int) -> Pairs:
    """Banerjee and Lavie's formula on the best of all alignments, where no word is there twice."""
    rng = random.Random(seed)
    rows = []
    for number in range(100):
        both = [rng.sample(WORDS, rng.randint(4, len(WORDS))) for _ in range(2)]
        rows.append(_row(number, " ".join(both[0]), [" ".join(both[1])]))
    values = [_meteor(row.answer.split(), row.references[0].split()) for row in rows]
    return _pairs(["meteor_stem"], ours(rows, ["meteor_stem"]), [float(np.mean(values))])


def _meteor(answer: Sequence[str], reference: Sequence[str]) -> float:
    places = [(place, reference.index(word)) for place, word in enumerate(answer) if word in reference]
    if not places:
        return 0.0
    chunks = 1 + sum(after != (place + 1, own + 1) for (place, own), after in itertools.pairwise(places))
    precision, recall = len(places) / len(answer), len(places) / len(reference)
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    return mean * (1 - 0.5 * (chunks / len(places)) ** 3)


def cider(seed: int) -> Pairs:
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    rows = sentences(seed)
    theirs = CiderScorer(n=4, sigma=6.0)
    for row in rows:
        theirs += (row.answer, row.references)
    return _pairs(["cider"], ours(rows, ["cider"]), [theirs.compute_score()[0]])


def auroc(seed: int) -> Pairs:
    from sklearn.metrics import roc_auc_score

    rows = closed(seed)
    odds = np.array([[(row.probabilities or {})[label] for label in LABELS] for row in rows])
    odds /= odds.sum(1, keepdims=True)
    rows = [
        replace(row, probabilities=dict(zip(LABELS, own.tolist(), strict=True)))
        for row, own in zip(rows, odds, strict=True)
    ]
    truth = [row.references[0] for row in rows]
    theirs = roc_auc_score(truth, odds, multi_class="ovr", average="macro", labels=LABELS)
    return _pairs(["auroc"], ours(rows, ["auroc"]), [theirs])


def calibration(seed: int) -> Pairs:
    from sklearn.calibration import calibration_curve

    rows = closed(seed, 300)
    sure = np.array([max((row.probabilities or {}).values()) for row in rows])
    right = np.array([row.answer == row.references[0] for row in rows])
    shares, means = calibration_curve(right, sure, n_bins=15, strategy="uniform")
    places = np.searchsorted(np.linspace(0, 1, 16)[1:-1], sure)
    n = np.bincount(places, minlength=15)
    n = n[n > 0]
    found = scores.score(rows, Prior([]), resamples=1)["overall"]
    pairs = {"ece": (found["ece"], float((n * np.abs(shares - means)).sum() / n.sum()))}
    for place, row in enumerate(found["reliability"]):
        pairs[f"bin {place}: exact"] = row["exact"], float(shares[place])
        pairs[f"bin {place}: confidence"] = row["confidence"], float(means[place])
    return pairs


def overlap(seed: int) -> Pairs:
    """Pixels that are counted."""
    rows = boxed(seed)

    def pixels(regions: Sequence[Mapping[str, Any]] | None) -> Any:
        grid = np.zeros((20, 20), bool)
        for region in regions or ():
            x1, y1, x2, y2 = region["box"]
            grid[y1:y2, x1:x2] = True
        return grid

    pairs = [(pixels(row.regions), pixels(row.reference_regions)) for row in rows]
    theirs = np.mean([(one & two).sum() / (one | two).sum() for one, two in pairs])
    return _pairs(["iou"], ours(rows, ["iou"]), [float(theirs)])


def average_precision(seed: int) -> Pairs:
    from sklearn.metrics import average_precision_score

    rows = boxed(seed)
    alone = [ours([row], ["iou"])[0] >= 0.5 for row in rows if row.regions]
    theirs = average_precision_score(alone, np.ones(len(alone))) * sum(alone) / len(rows)
    return _pairs(["ap50"], ours(rows, ["ap50"]), [theirs])


def intervals(seed: int) -> Pairs:
    """scipy's own resamples of the images: they differ by chance, as two seeds do."""
    from scipy.stats import bootstrap as resampled

    rows = closed(seed, 800)
    scored = scores.Scored(rows)
    tally = scored.overall.scores[0]
    (drawn,) = bootstrap([tally])
    found = interval(drawn[:, 0]) or (math.nan, math.nan)
    theirs = resampled(
        (tally.sums[:, 0], tally.sums[:, 1]),
        lambda right, n, axis: right.sum(axis) / n.sum(axis),
        paired=True, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(seed + 1),
    ).confidence_interval  # fmt: skip
    return _pairs(["lower end", "upper end"], found, [theirs.low, theirs.high])


def standard_error(seed: int) -> Pairs:
    """The cluster-robust one of a mean."""
    from statsmodels.api import OLS

    rows = closed(seed, 4000, group=20)
    scored = scores.Scored(rows)
    (drawn,) = bootstrap([scored.overall.scores[0]])
    fitted = OLS(scored.right, np.ones(len(rows))).fit(
        cov_type="cluster", cov_kwds={"groups": scored.group, "use_correction": False}
    )
    return _pairs(["standard error of exact"], [float(drawn[:, 0].std())], [float(fitted.bse[0])])


def mcnemar(seed: int) -> Pairs:
    from scipy.stats import binomtest, chi2

    from surgvqa.comparison import _mcnemar

    rng = np.random.default_rng(seed)
    pairs = {}
    for count in (30, 200):
        a, b = (rng.random(count) < share for share in (0.7, 0.8))
        one, other = int((a & ~b).sum()), int((b & ~a).sum())
        if one + other < 25:
            theirs = binomtest(one, one + other, 0.5).pvalue if one + other else 1.0
        else:
            theirs = chi2.sf((abs(one - other) - 1) ** 2 / (one + other), 1)
        pairs[f"p of {count} questions"] = _mcnemar(a.astype(float), b.astype(float)).p, float(theirs)
    return pairs


def corrected(seed: int) -> Pairs:
    from statsmodels.stats.multitest import multipletests

    values = {str(n): float(p) for n, p in enumerate(np.random.default_rng(seed).random(9) ** 4)}
    theirs = multipletests(list(values.values()), method="holm")[1]
    found = holm(values)
    return _pairs(list(values), [found[name] for name in values], theirs)


@dataclass(frozen=True)
class Check:
    scores: str
    reference: str
    compare: Callable[[int], Pairs]
    """Seed → values of both on the same random answers."""
    test: str
    """Of tests/, which holds it, too."""
    packages: tuple[str, ...] = ()
    limit: float = 1e-9
    """Largest difference that may be found; more where both draw at random."""


CHECKS = [
    Check(
        "`exact`", "scikit-learn, `accuracy_score`", accuracy,
        "test_scores.py::test_class_scores_are_scikit_learns_and_those_of_papers", ("scikit-learn",),
    ),
    Check(
        "`prior`", "scikit-learn, a `DummyClassifier` for each question", majority,
        "test_metrics.py::test_the_prior_is_the_majority_of_each_question_in_train", ("scikit-learn",),
    ),
    Check(
        "`macro_precision`, `macro_recall`, `macro_f1`", "scikit-learn, `precision_recall_fscore_support`",
        macro,
        "test_scores.py::test_class_scores_are_scikit_learns_and_those_of_papers", ("scikit-learn",),
    ),
    Check(
        "`balanced_accuracy`", "scikit-learn, `balanced_accuracy_score`", balanced,
        "test_scores.py::test_class_scores_are_scikit_learns_and_those_of_papers", ("scikit-learn",),
    ),
    Check(
        "`ssg_map`, `ssg_maf1`, `ssg_wf1`", "scikit-learn, over supported classes, 0 for 0 / 0", ssg,
        "test_scores.py::test_class_scores_are_scikit_learns_and_those_of_papers", ("scikit-learn",),
    ),
    Check(
        "`bleu1` … `bleu4`", "sacrebleu, all questions at once", bleu_of_sacrebleu,
        "test_nlg.py::test_bleu_is_that_of_sacrebleu_and_of_nltk", ("sacrebleu",),
    ),
    Check(
        "`bleu1` … `bleu4`", "nltk, `corpus_bleu`, answers of 4 words and more", bleu_of_nltk,
        "test_nlg.py::test_bleu_is_that_of_sacrebleu_and_of_nltk", ("nltk",),
    ),
    Check(
        "`rouge1`, `rouge2`, `rougeL`", "Lin's formulas (2004), written out", rouge,
        "test_nlg.py::test_rouge_is_that_of_rouge_score",
    ),
    Check(
        "`meteor_stem`", "the formula, where no word is there twice", meteor,
        "test_nlg.py::test_meteor_matches_words_and_stems_but_no_synonyms",
    ),
    Check(
        "`cider`", "coco-caption's `CiderScorer`", cider,
        "test_nlg.py::test_cider_is_the_formula", ("pycocoevalcap",),
    ),
    Check(
        "`auroc`", "scikit-learn, `roc_auc_score`", auroc,
        "test_scores.py::test_auroc_is_scikit_learns", ("scikit-learn",),
    ),
    Check(
        "`ece`, `reliability`", "scikit-learn, `calibration_curve`", calibration,
        "test_scores.py::test_calibration_error_is_the_sum_over_bins", ("scikit-learn",),
    ),
    Check(
        "`iou`", "pixels of whole-numbered boxes, counted", overlap,
        "test_scores.py::test_boxes_by_hand",
    ),
    Check(
        "`ap50`", "scikit-learn, `average_precision_score` times recall", average_precision,
        "test_scores.py::test_ap50_is_the_area_under_the_curve_of_equal_confidences", ("scikit-learn",),
    ),
    Check(
        "`intervals`", "scipy, `bootstrap`, with other resamples", intervals,
        "test_intervals.py::test_sums_give_what_repeating_the_questions_gives", ("scipy",), 0.005,
    ),
    Check(
        "`intervals`, their standard error", "statsmodels, cluster-robust", standard_error,
        "test_intervals.py::test_groups_cover_the_truth_where_single_questions_do_not", ("statsmodels",),
        0.001,
    ),
    Check(
        "McNemar's p", "scipy, `binomtest` and `chi2`", mcnemar,
        "test_comparison.py::test_mcnemar", ("scipy",),
    ),
    Check(
        "p after Holm", "statsmodels, `multipletests`", corrected,
        "test_comparison.py::test_holm_is_that_of_statsmodels", ("statsmodels",),
    ),
]  # fmt: skip


def checked(check: Check, seeds: int) -> dict[str, Any]:
    """The largest difference over so many data sets. Raises ModuleNotFoundError without the reference."""
    found = [pair for seed in range(seeds) for pair in check.compare(seed).values()]
    return {
        "scores": check.scores,
        "reference": check.reference,
        "versions": {package: _version(package) for package in check.packages},
        "data_sets": seeds,
        "values": len(found),
        "difference": max(abs(one - other) for one, other in found),
        "limit": check.limit,
        "test": check.test,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"  # on the path, but not installed


# ---- speed --------------------------------------------------------------------------------------------


def asked(kind: str, count: int) -> list[Prediction]:
    """As many predictions as wanted, of ten question types, on a ninth as many images."""
    rng = np.random.default_rng(0)
    images = max(2, round(count * IMAGES / PREDICTIONS))
    labels = [f"label {number}" for number in range(18)]
    words = np.array([f"word{number}" for number in range(300)])
    rows = []
    for number in range(count):
        more: dict[str, Any] = {"image": str(number % images)}
        if kind == "sentences":
            own = [" ".join(rng.choice(words, rng.integers(4, 16))) for _ in range(2)]
        else:
            odds = rng.dirichlet(np.ones(len(labels)))
            own = [labels[int(rng.integers(len(labels)))], labels[int(odds.argmax())]]
            if kind == "labels, with probabilities":
                more["probabilities"] = dict(zip(labels, odds.tolist(), strict=True))
        rows.append(_row(number, own[1], own[:1], f"type {number // images % TYPES}", **more))
    return rows


def timed(kind: str, count: int, resamples: int, rounds: int) -> dict[str, Any]:
    """Seconds of the processor to sum what answers give, and for resamples of all that."""
    rows = asked(kind, count)
    began = time.process_time()
    scored = scores.Scored(rows)
    summed = time.process_time() - began
    buckets = [scored.overall, *scored.by_type.values()]
    tallies = [tally for bucket in buckets for tally in bucket.scores]
    wall, busy = [], []
    for _ in range(rounds):
        starts = time.perf_counter(), time.process_time()
        for samples in bootstrap(tallies, resamples=resamples):
            for column in samples.T:
                interval(column)
        wall.append(time.perf_counter() - starts[0])
        busy.append(time.process_time() - starts[1])
    return {
        "answers": kind,
        "predictions": len(rows),
        "images": len(scored.groups),
        "buckets": len(buckets),
        "scores": sum(len(tally.names) for tally in tallies),
        "resamples": resamples,
        "sums_cpu_s": summed,
        "resamples_cpu_s": spread(busy),
        "resamples_s": spread(wall),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.scores", description=__doc__.partition(":")[0])
    parser.add_argument("--seeds", type=int, default=20, help="data sets for each comparison")
    parser.add_argument("--predictions", type=int, default=PREDICTIONS)
    parser.add_argument("--resamples", type=int, default=RESAMPLES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for scores.json")
    given = parser.parse_args(argv)
    table: list[dict[str, Any]] = []
    for check in CHECKS:
        try:
            row = checked(check, given.seeds)
        except ModuleNotFoundError as error:
            print(f"{check.scores}: not compared, {error.name} is not installed")
            continue
        table.append(row)
        print(f"{check.scores}: {row['difference']:.1e} from {check.reference}", flush=True)
        if row["difference"] > check.limit:
            raise SystemExit(f"more than {check.limit}")
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        with threadpool_limits(1):  # the threads of matrix products were counted before
            for kind in KINDS:
                row = timed(kind, given.predictions, given.resamples, given.rounds)
                table.append(row)
                busy, wall = row["resamples_cpu_s"]["median"], row["resamples_s"]["median"]
                print(
                    f"{kind}: sums {row['sums_cpu_s']:.1f} s, resamples {busy:.1f} s ({wall:.1f} s)",
                    flush=True,
                )
    finally:
        os.sched_setaffinity(0, allowed)
    settings = {"seeds": given.seeds, "rounds": given.rounds, "cores": 1}
    print(f"written: {write('scores', settings, table, given.out)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
