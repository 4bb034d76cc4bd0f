"""Predictions as every score that applies to them, with intervals; docs/metrics.md tells what each is.

    predictions + prior ── score ──▶ overall, by question type, by group: values, intervals, what is absent

Imports no torch, and what a score needs only where it applies.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from surgvqa.intervals import FEW_GROUPS, RESAMPLES, Array, Tally, bootstrap, constant, interval, summed
from surgvqa.metrics import Prediction, Prior, exact, matches, normalise
from surgvqa.recipe import BadInput

SCHEMA = 2
"""Of scores.json. 1 had nothing but n, exact and prior."""

FEW = 20
"""A bucket of fewer questions is marked."""

SENTENCE_WORDS = 4
"""Text scores are for buckets whose references have at least this many words on average."""

LABELS, QUESTIONS_PER_LABEL = 100, 5
"""Class scores are for buckets with at most so many different references, and so many questions for each."""

BINS = 15
"""Of confidence, of equal width."""

CLASSES = (
    "macro_precision",
    "macro_recall",
    "macro_f1",
    "balanced_accuracy",
    "ssg_map",
    "ssg_maf1",
    "ssg_wf1",
)

SCALES = {"exact": (0.0, 1.0), "prior": (0.0, 1.0), "above_prior": (-1.0, 1.0)}
"""Name → ends of the scale, for shares of questions and their difference. With these they have an interval
even if every group has the same value."""

Rows = NDArray[np.intp]


@dataclass(frozen=True)
class Bucket:
    """Some of the questions, and what is computed on them."""

    rows: Rows
    scores: list[Tally] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    """Scores that do not apply, and why."""

    legacy: list[Tally] = field(default_factory=list)
    """Faulty ones that papers used; never beside the others."""


class Scored:
    """Predictions in buckets with what the scores need: sums over each group's questions.

    `groups` are what is resampled: by default the predictions' own. Two runs that are to be compared get the
    same `groups`, and so the same resamples.
    """

    def __init__(
        self, predictions: Sequence[Prediction], prior: Prior | None = None, *, whole: bool = False
    ) -> None:
        """`whole`: only as a whole, not by question type."""
        self.predictions = predictions
        self.groups = sorted({group_of(row) for row in predictions})
        numbers = {group: number for number, group in enumerate(self.groups)}
        self.group = np.array([numbers[group_of(row)] for row in predictions], dtype=np.intp)
        self.truth, self.right = truths(predictions)
        self.guessed = None if prior is None else _guesses(predictions, prior)
        self._words = np.array([len(normalise(row.references[0]).split()) for row in predictions])
        by_type: dict[str, list[int]] = defaultdict(list)
        for number, row in enumerate(() if whole else predictions):
            by_type[row.question_type].append(number)
        rows = {kind: np.array(by_type[kind], dtype=np.intp) for kind in sorted(by_type)}
        everything = np.arange(len(predictions))
        self._text = self._text_statistics([everything, *rows.values()])
        self.overall = self._bucket(everything)
        self.by_type = {kind: self._bucket(own) for kind, own in rows.items()}

    def _of(self, rows: Rows) -> list[Prediction]:
        return [self.predictions[row] for row in rows.tolist()]

    def _sums(self, rows: Rows, statistics: Array) -> Array:
        return summed(statistics, self.group[rows], len(self.groups))

    def _bucket(self, rows: Rows) -> Bucket:
        bucket = Bucket(rows)
        if not len(rows):
            return bucket
        bucket.scores.append(self._exact(rows))
        for family, found in (
            ("class scores", self._classes(rows)),
            ("text scores", self._texts(rows)),
            ("calibration", self._calibration(rows)),
            ("auroc", self._auroc(rows)),
            ("boxes", self._boxes(rows)),
        ):
            if isinstance(found, str):
                bucket.absent[family] = found
            else:
                bucket.scores.append(found)
        bucket.legacy.extend(self._legacy(rows))
        return bucket

    def _exact(self, rows: Rows) -> Tally:
        ones = np.ones(len(rows))
        if self.guessed is None:
            return Tally(("exact",), self._sums(rows, np.column_stack([self.right[rows], ones])), _share)
        columns = np.column_stack([self.right[rows], self.guessed[rows], ones])
        return Tally(("exact", "prior", "above_prior"), self._sums(rows, columns), _share_and_prior)

    def _classes(self, rows: Rows) -> Tally | str:
        truth = [self.truth[row] for row in rows]
        # Whatever is answered, so that a score is not there for one model and absent for another.
        labels = sorted({normalise(row.references[0]) for row in self._of(rows)})
        if len(labels) > LABELS:
            return f"{len(labels)} different references; class scores are for at most {LABELS}"
        if len(rows) < QUESTIONS_PER_LABEL * len(labels):
            return (
                f"{len(rows)} questions for {len(labels)} different references; "
                f"class scores are for at least {QUESTIONS_PER_LABEL} questions for each"
            )
        # An answer that may be given but that no question here has for a reference is a class, too.
        offered = {label for row in self._of(rows) for label in row.probabilities or ()}
        chosen = set(map(normalise, offered))
        answers = [
            reference if right else normalise(row.answer)
            for row, reference, right in zip(self._of(rows), truth, self.right[rows], strict=True)
        ]
        labels = sorted({*truth, *(chosen & set(answers))})
        number = {label: place for place, label in enumerate(labels)}
        outside = len(labels)
        true = np.array([number[label] for label in truth])
        told = np.array([number.get(answer, outside) for answer in answers])
        sums = np.zeros((len(self.groups), 3, outside + 1))
        for part, which in enumerate((true, told, np.where(true == told, true, outside))):
            np.add.at(sums[:, part], (self.group[rows], which), 1)
        return Tally(CLASSES, sums[..., :outside].reshape(len(sums), -1), class_scores)

    def _text_statistics(self, buckets: Iterable[Rows]) -> Array | None:
        """Of all questions that are in a bucket of sentences; NaN elsewhere."""
        wanted = np.zeros(len(self.predictions), dtype=bool)
        for rows in buckets:
            if len(rows) and self._words[rows].mean() >= SENTENCE_WORDS:
                wanted[rows] = True
        if not wanted.any():
            return None
        from surgvqa import nlg

        chosen = self._of(np.flatnonzero(wanted))
        statistics = nlg.statistics([row.answer for row in chosen], [row.references for row in chosen])
        spread = np.full((len(wanted), statistics.shape[1]), np.nan)
        spread[wanted] = statistics
        return spread

    def _texts(self, rows: Rows) -> Tally | str:
        words = self._words[rows].mean()
        if self._text is None or words < SENTENCE_WORDS:
            return (
                f"references have {words:.1f} words on average; text scores are for {SENTENCE_WORDS} and more"
            )
        from surgvqa import nlg

        return Tally(nlg.NAMES, self._sums(rows, self._text[rows]), nlg.formula)

    def _calibration(self, rows: Rows) -> Tally | str:
        given = [row.confidence for row in self._of(rows)]
        if None in given:
            return _NO_PROBABILITIES
        confidence = np.array(given, dtype=np.float64)
        statistics = np.zeros((len(rows), BINS, 3))
        of_bin = np.arange(len(rows)), _bin(confidence)
        statistics[of_bin] = np.column_stack([np.ones(len(rows)), confidence, self.right[rows]])
        return Tally(
            ("ece",), self._sums(rows, statistics.reshape(len(rows), -1)), expected_calibration_error
        )

    def _auroc(self, rows: Rows) -> Tally | str:
        odds = [row.probabilities or {} for row in self._of(rows)]
        labels = sorted(odds[0])
        if not all(odds):
            return _NO_PROBABILITIES
        if any(own.keys() != odds[0].keys() for own in odds):
            return "the questions here have different sets of labels to choose among"
        share = np.array([[own[label] for label in labels] for own in odds])
        names = [normalise(label) for label in labels]
        references = [{normalise(reference) for reference in row.references} for row in self._of(rows)]
        truth = np.array([[name in right for name in names] for right in references])
        both = truth.any(0) & ~truth.all(0)
        if not both.any():
            return "no label is right for some questions and wrong for others"
        placed, whole = placements(share[:, both], truth[:, both])
        return Tally(("auroc",), self._sums(rows, placed), partial(areas, whole=whole))

    def _boxes(self, rows: Rows) -> Tally | str:
        """Sums of: IoU and 1 of questions that expect boxes, then hits, boxes found, boxes expected."""
        own = self._of(rows)
        if not any(row.reference_regions for row in own):
            return _NO_BOXES
        statistics = np.zeros((len(own), 5))
        for place, row in enumerate(own):
            found, expected = row.regions or [], row.reference_regions or []
            overlaps = matches(found, expected)
            hits = sum(overlap >= 0.5 for overlap in overlaps)
            if expected:
                statistics[place, :2] = sum(overlaps) / max(len(found), len(expected)), 1
            statistics[place, 2:] = hits, len(found), len(expected)
        return Tally(("iou", "ap50"), self._sums(rows, statistics), box_scores)

    def _legacy(self, rows: Rows) -> list[Tally]:
        """The mean of `legacy_iou`, where every image's size is known."""
        own = self._of(rows)
        expected = [bool(row.reference_regions) for row in own]
        if not any(expected) or any(row.reference_regions and not row.image_sizes for row in own):
            return []
        overlaps = [_legacy_first(row) if row.reference_regions else 0.0 for row in own]
        return [Tally(("iou",), self._sums(rows, np.column_stack([overlaps, expected])), _share)]

    def cut(self, rows: Rows) -> int:
        """Return how many answers were cut at `eval.max_new_tokens`."""
        return sum(row.cut for row in self._of(rows))

    def boxes(self, rows: Rows) -> int:
        """How many questions expect boxes."""
        return sum(bool(row.reference_regions) for row in self._of(rows))

    def reliability(self, rows: Rows) -> list[dict[str, float | int]] | None:
        """Rows of a reliability diagram, of bins that hold questions. None without probabilities."""
        found = self._calibration(rows) if len(rows) else ""
        if isinstance(found, str):
            return None
        bins = found.sums.sum(0).reshape(BINS, 3)
        return [
            {
                "from": number / BINS, "to": (number + 1) / BINS, "n": int(n),
                "confidence": confidence / n, "exact": right / n,
            }
            for number, (n, confidence, right) in enumerate(bins.tolist()) if n
        ]  # fmt: skip


_NO_BOXES = "no reference has boxes"
_NO_PROBABILITIES = "not every answer was chosen among labels, so there are no probabilities"


def group_of(row: Prediction) -> str:
    """What is resampled as one: the video, else the image."""
    return row.group or row.image


def truths(predictions: Sequence[Prediction]) -> tuple[list[str], Array]:
    """The reference that an answer matches, else the first; and whether it matches one."""
    truth, right = [], []
    for row in predictions:
        references, answer = [normalise(reference) for reference in row.references], normalise(row.answer)
        right.append(answer in references)
        truth.append(answer if right[-1] else references[0])
    return truth, np.array(right, dtype=np.float64)


def _guesses(predictions: Sequence[Prediction], prior: Prior) -> Array:
    return np.array(
        [exact(prior.answer(row.question, row.question_type), row.references) for row in predictions],
        dtype=np.float64,
    )


def _share(sums: Array) -> Array:
    with np.errstate(invalid="ignore"):
        return sums[..., :1] / sums[..., 1:]


def _share_and_prior(sums: Array) -> Array:
    with np.errstate(invalid="ignore"):
        right, guessed = sums[..., 0] / sums[..., 2], sums[..., 1] / sums[..., 2]
    return np.stack([right, guessed, right - guessed], -1)


def class_scores(sums: Array) -> Array:
    """(..., 3 · labels) to the seven scores of `CLASSES`: questions with each label, answers, and right ones.

    The first three are scikit-learn's `precision_recall_fscore_support(average="macro",
    zero_division=1)` over the labels that are a reference or an answer; the others are over labels that are a
    reference, and 0 divided by 0 is 0.
    """
    true, told, right = np.moveaxis(sums.reshape(*sums.shape[:-1], 3, -1), -2, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = right / told, right / true
        f1 = 2 * right / (true + told)
        present, supported = true + told > 0, true > 0

        def mean(values: Array, over: Any) -> Any:
            return np.where(over, values, 0).sum(-1) / over.sum(-1)

        filled = np.where(told > 0, precision, 0)
        return np.stack(
            [
                mean(np.where(told > 0, precision, 1), present),
                mean(np.where(supported, recall, 1), present),
                mean(f1, present),
                mean(recall, supported),
                mean(filled, supported),
                mean(f1, supported),
                np.where(supported, f1 * true, 0).sum(-1) / true.sum(-1),
            ],
            -1,
        )


def expected_calibration_error(sums: Array) -> Array:
    """(..., 3 · bins) sums of 1, confidence and right answers to (..., 1).

    Σ over bins of (questions in it / all) · |share of right answers - mean confidence|: Guo et al., "On
    Calibration of Modern Neural Networks" (ICML 2017), equation 3.
    """
    n, confidence, right = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, 3), -1, 0)
    with np.errstate(invalid="ignore"):
        return np.asarray((np.abs(right - confidence).sum(-1) / n.sum(-1))[..., None], dtype=np.float64)


def _bin(confidence: Array) -> Rows:
    """Bin m of 0 … BINS - 1 holds (m / BINS, (m + 1) / BINS]; 0 is in the first."""
    return np.clip(np.ceil(confidence * BINS - 1e-12).astype(np.intp) - 1, 0, BINS - 1)


def placements(share: Array, truth: NDArray[np.bool_]) -> tuple[Array, float]:
    """(questions, 4 · labels) sums of `areas`, and the macro-averaged AUROC that they give.

    share: (questions, labels) probabilities. truth: whether each label is right; each for some, not for all.
    For each label: where the question has it, the share of the questions without it that give it a smaller
    probability, equal ones counting half, and 1; where it has not, the share of those with it that give it a
    larger one, and 1 (the structural components of DeLong, DeLong & Clarke-Pearson, Biometrics 44, 1988).
    """
    found = np.zeros((*share.shape, 4))
    for label, (values, true) in enumerate(zip(share.T, truth.T, strict=True)):
        for own, others, larger in ((true, ~true, True), (~true, true, False)):
            ranked = np.sort(values[others])
            below = (
                np.searchsorted(ranked, values[own], "left") + np.searchsorted(ranked, values[own], "right")
            ) / (2 * len(ranked))
            found[own, label, 0 if larger else 2] = below if larger else 1 - below
            found[own, label, 1 if larger else 3] = 1
    sums = found.sum(0)
    return found.reshape(len(found), -1), float((sums[:, 0] / sums[:, 1]).mean())


def areas(sums: Array, whole: float) -> Array:
    """(..., 4 · labels) sums of `placements` to (..., 1): AUROC of each label against the rest, their mean.

    On the questions themselves this is the mean area `whole`. On resamples it is the area to first order,
    which is what Obuchowski, "Nonparametric Analysis of Clustered ROC Curve Data" (Biometrics 53, 1997),
    takes the variance of.
    """
    parts = sums.reshape(*sums.shape[:-1], -1, 4)
    with np.errstate(invalid="ignore"):
        each = parts[..., 0] / parts[..., 1] + parts[..., 2] / parts[..., 3]
        known = np.isfinite(each)
        mean = np.where(known, each, 0).sum(-1) / known.sum(-1)
    return np.asarray(np.clip(mean - whole, 0, 1)[..., None], dtype=np.float64)


def box_scores(sums: Array) -> Array:
    """(..., 5) sums of the questions' boxes to (..., 2): mean IoU and AP50.

    Written boxes have no confidence, so precision and recall are known at one point, and the area under the
    interpolated curve through it is their product.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        overlap = sums[..., 0] / sums[..., 1]
        precision = np.where(sums[..., 3] > 0, sums[..., 2] / sums[..., 3], 0)
        return np.stack([overlap, precision * (sums[..., 2] / sums[..., 4])], -1)


def legacy_iou(first: Sequence[float], second: Sequence[float]) -> float:
    """What Surgical-VQLA's `mIoU_xyxy` gives for two boxes in shares of the image's sides.

    It is not the IoU: it adds 1, meant for pixels, to widths of at most 1, and gives boxes that do not
    overlap a positive intersection. Only for comparison with papers that used it.
    """
    x1, y1 = max(first[0], second[0]), max(first[1], second[1])
    x2, y2 = min(first[2], second[2]), min(first[3], second[3])
    shared = (x2 - x1 + 1) * (y2 - y1 + 1)
    sizes = ((box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (first, second))
    return shared / max(sum(sizes) - shared, 1)


def _legacy_first(row: Prediction) -> float:
    """Of the first box with the first expected one; 0 where there is none, or it is in another image."""
    assert row.reference_regions
    assert row.image_sizes
    expected = row.reference_regions[0]
    if not row.regions or row.regions[0]["image"] != expected["image"]:
        return 0.0
    width, height = row.image_sizes[expected["image"]]
    scale = np.array([width, height, width, height])
    return legacy_iou((row.regions[0]["box"] / scale).tolist(), (expected["box"] / scale).tolist())


def score(
    predictions: Sequence[Prediction], prior: Prior, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """What scores.json holds, as docs/metrics.md describes it; values are unrounded, shares are of 1.

    There is no prior where nothing was trained on.
    """
    scored = Scored(predictions, prior if prior.overall else None)
    buckets = [scored.overall, *scored.by_type.values()]
    tallies = [tally for bucket in buckets for tally in (*bucket.scores, *bucket.legacy)]
    drawn = bootstrap(tallies, resamples=resamples, seed=seed) if len(scored.groups) > 1 else []
    samples = dict(zip(map(id, tallies), drawn, strict=bool(drawn)))
    told = [_described(scored, bucket, samples) for bucket in buckets]
    result = {
        "schema": SCHEMA,
        "groups": len(scored.groups),
        "resamples": resamples,
        "seed": seed,
        "overall": told[0],
        "by_type": dict(zip(scored.by_type, told[1:], strict=True)),
    }
    if len({row.image for row in predictions}) > len(scored.groups):
        result["by_group"] = _by_group(scored)
    return result


def values(predictions: Sequence[Prediction], prior: Prior) -> dict[str, Any]:
    """`n`, `exact`, `prior` and every other score that applies to the questions as a whole; no intervals.

    None where a score is not defined. `boxes` is how many questions expect boxes, where any does, and `cut`
    how many answers were cut at `eval.max_new_tokens`, where any was.
    """
    scored = Scored(predictions, prior if prior.overall else None, whole=True)
    told = {name: value for tally in scored.overall.scores for name, value in tally.told().items()}
    boxes, cut = scored.boxes(scored.overall.rows), scored.cut(scored.overall.rows)
    return {
        "n": len(predictions),
        "exact": None,
        "prior": None,
        **told,
        **({"boxes": boxes} if boxes else {}),
        **({"cut": cut} if cut else {}),
    }


def why_not(name: str, predictions: Sequence[Prediction]) -> str | None:
    """Why a score does not apply to the questions as a whole, whatever their answers; None where it does."""
    overall = Scored(predictions, whole=True).overall
    if any(name in tally.names for tally in overall.scores):
        return None
    families = {**dict.fromkeys(CLASSES, "class scores"), "ece": "calibration", "auroc": "auroc"}
    families |= {"iou": "boxes", "ap50": "boxes"}
    return overall.absent[families.get(name, "text scores")]


def _described(scored: Scored, bucket: Bucket, samples: Mapping[int, Array]) -> dict[str, Any]:
    n, groups = len(bucket.rows), len(np.unique(scored.group[bucket.rows]))
    described: dict[str, Any] = {"n": n, "few": n < FEW, "groups": groups, "few_groups": groups < FEW_GROUPS}
    values = _valued(bucket.scores, samples, groups)
    described |= {"exact": None, "prior": None, **values, "absent": bucket.absent}
    if cut := scored.cut(bucket.rows):
        described["cut"] = cut
    if boxes := scored.boxes(bucket.rows):
        described["boxes"] = boxes
    if reliability := scored.reliability(bucket.rows):
        described["reliability"] = reliability
    if bucket.legacy:
        described["legacy"] = _valued(bucket.legacy, samples, groups)
    return described


def _valued(tallies: Sequence[Tally], samples: Mapping[int, Array], groups: int) -> dict[str, Any]:
    """Return score → value, and `intervals`: score → lower and upper end, of a bucket with so many groups."""
    found: dict[str, float | None] = {}
    intervals = {}
    for tally in tallies:
        told = tally.told()
        found |= told
        for place, (name, value) in enumerate(told.items()):
            ends = interval(samples[id(tally)][:, place]) if samples else None
            if ends := ends or bounds(name, value, groups):
                intervals[name] = list(ends)
    return {**found, "intervals": intervals}


def bounds(name: str, value: float | None, groups: int) -> tuple[float, float] | None:
    """Return the interval of a score with the same value in every group; None if there is none.

    There is one for a score of SCALES with a value of 0 or at an end of its scale. Any other value may come
    from a single group, which has no resamples.
    """
    if name not in SCALES or value not in (0, *SCALES[name]):
        return None
    return constant(value, groups, *SCALES[name])


def _by_group(scored: Scored) -> dict[str, dict[str, Any]]:
    ones = np.ones(len(scored.group))
    guessed = np.full(len(ones), np.nan) if scored.guessed is None else scored.guessed
    sums = summed(
        np.column_stack([ones, scored.right, guessed]),
        scored.group,
        len(scored.groups),
    )
    return {
        group: {"n": int(n), "few": n < FEW, "exact": right / n, "prior": sure / n if sure == sure else None}
        for group, (n, right, sure) in zip(scored.groups, sums.tolist(), strict=True)
    }


def table(result: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """`score`'s result as rows (what, questions, exact %, its interval, prior %), the whole first.

    Marks at the number of questions: see MARKS.
    """
    return [
        (
            name,
            f"{row['n']}{marks(row['few'], row['few_groups'], row.get('cut', 0))}",
            percent(row["exact"]),
            " – ".join(map(percent, row["intervals"].get("exact", ()))) or "-",
            percent(row["prior"]),
        )
        for name, row in [("all", result["overall"]), *result["by_type"].items()]
    ]


MARKS = {
    "*": f"fewer than {FEW} questions",
    "†": f"fewer than {FEW_GROUPS} groups: do not trust the interval",
    "‡": "answers were cut at eval.max_new_tokens; raise it",
}


def marks(few: bool, few_groups: bool, cut: int = 0) -> str:
    """Return the marks to put behind a number of questions, see MARKS; `cut` is how many answers were cut."""
    return "*" * few + "†" * few_groups + "‡" * bool(cut)


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def read(path: Path) -> list[Prediction]:
    """The predictions in a file of `surgvqa evaluate`. Raises BadInput with every line that is none."""
    predictions: list[Prediction] = []
    problems = []
    first: dict[str, int] = {}
    form = TypeAdapter(Prediction)
    try:
        # Not splitlines(): answers may hold other characters that it takes for the end of a line.
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        try:
            row = form.validate_json(line, strict=True)
        except ValidationError as error:
            found = error.errors()[0]
            key = ".".join(map(str, found["loc"]))
            problems.append(f"{path}:{number}: {key}{': ' * bool(key)}{found['msg']}")
            continue
        if wrong := _wrong(row):
            problems.append(f"{path}:{number}: {wrong}")
        elif row.id in first:
            problems.append(f"{path}:{number}: id {row.id!r} is already at line {first[row.id]}")
        first.setdefault(row.id, number)
        predictions.append(row)
    if problems:
        raise BadInput(problems)
    return predictions


def _wrong(row: Prediction) -> str | None:
    """What the types do not show."""
    if not row.references:
        return "references: there is none"
    if any(not 0 <= share <= 1 for share in (row.probabilities or {}).values()):
        return "probabilities: not all are between 0 and 1"
    if row.image_sizes and not all(len(size) == 2 and min(size) > 0 for size in row.image_sizes):
        return "image_sizes: not all are width and height"
    images = len(row.image_sizes) if row.image_sizes else 2**31
    if not all(_is_region(region, images) for region in (row.regions or []) + (row.reference_regions or [])):
        return "regions: not all have a box of four numbers and an image"
    return None


def _is_region(region: Mapping[str, Any], images: int) -> bool:
    box, image = region.get("box"), region.get("image")
    return (
        isinstance(image, int)
        and 0 <= image < images
        and isinstance(box, list)
        and len(box) == 4
        and all(isinstance(edge, (int, float)) and abs(edge) < 1e9 for edge in box)
    )
