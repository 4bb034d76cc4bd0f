"""What the page says of runs: numbers as they were scored, comparisons, courses of training, data."""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from surgvqa import datasets, findings, recipe, results, scores
from surgvqa.audit import PARTS
from surgvqa.comparison import Compared, Difference, compare, holm, signed, told_p
from surgvqa.datasets import Dataset
from surgvqa.metrics import Prediction, Prior, normalise
from surgvqa.recipe import BadInput, Data, Recipe, printable
from surgvqa.report.charts import Bin, Chart, Line, Point, curve
from surgvqa.results import Evaluation, Run, json_of, number, rows

CLASSES = 20
"""A confusion matrix shows so many classes, the most frequent ones."""

NAMES = {
    "exact": "Exact match", "prior": "Prior", "above_prior": "Above the prior",
    "balanced_accuracy": "Balanced accuracy", "macro_f1": "Macro F1", "macro_precision": "Macro precision",
    "macro_recall": "Macro recall", "auroc": "AUROC", "ece": "ECE", "iou": "Mean IoU", "ap50": "AP50",
    "bleu1": "BLEU-1", "bleu2": "BLEU-2", "bleu3": "BLEU-3", "bleu4": "BLEU-4", "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "meteor_stem": "METEOR (stems)", "cider": "CIDEr",
    "ssg_map": "mAP as in SSG-VQA", "ssg_maf1": "mAF1 as in SSG-VQA", "ssg_wf1": "wF1 as in SSG-VQA",
}  # fmt: skip
"""Scores of scores.json as people call them, in the order in which they are shown."""

_TILES = ("balanced_accuracy", "macro_f1", "auroc", "ece", "iou", "ap50", "bleu4", "rougeL", "cider")
_PERCENT = {"exact", "prior", "above_prior", "balanced_accuracy", *scores.CLASSES}


class _Known(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)


class _Bin(_Known):
    n: int = Field(ge=1)
    confidence: float = Field(ge=0, le=1)
    exact: float = Field(ge=0, le=1)


class _Values(_Known):
    """Scores by name, whatever they are called."""

    model_config = ConfigDict(extra="allow")
    intervals: dict[str, tuple[float, float]] = {}

    @property
    def values(self) -> dict[str, float]:
        found = {name: number(value) for name, value in (self.model_extra or {}).items()}
        return {name: value for name, value in found.items() if value is not None}


class Bucket(_Values):
    """All questions, or those of a type."""

    n: int
    few: bool
    few_groups: bool
    groups: int
    absent: dict[str, str] = {}
    boxes: int = 0
    cut: int = 0
    reliability: list[_Bin] = []
    legacy: _Values | None = None

    @property
    def marks(self) -> str:
        return scores.marks(self.few, self.few_groups, self.cut)


class Group(_Known):
    """All questions of a video or a patient."""

    n: int
    few: bool
    exact: float
    prior: float | None


class Scores(_Known):
    """What the page reads of scores.json."""

    groups: int
    overall: Bucket
    by_type: dict[str, Bucket]
    by_group: dict[str, Group] = {}


@dataclass(frozen=True)
class Entry:
    """A run on the page."""

    number: int
    name: str
    run: Run
    judged: Evaluation | None
    variants: dict[str, Evaluation]
    """What was done to the images → how the same questions were answered then."""
    notes: list[str] = field(default_factory=list)

    @cached_property
    def scores(self) -> Scores | None:
        return _scores(self.judged, self.notes) if self.judged else None

    @cached_property
    def settings(self) -> Recipe:
        """The recipe with what the evaluation changed."""
        words = self.judged.overrides if self.judged else []
        try:
            return recipe.parse(self.run.recipe.dump(), words) if words else self.run.recipe
        except BadInput:
            return self.run.recipe

    @property
    def corrupted(self) -> bool:
        """Whether it was also evaluated on corrupted images."""
        return any(":" in variant for variant in self.variants)

    @property
    def model(self) -> str:
        revision = self.run.recipe.model.revision
        return self.run.recipe.model.name + (f" at {revision}" if revision else "")


def _scores(evaluation: Evaluation, notes: list[str]) -> Scores:
    """Those of scores.json; where they are not there or of another form, computed anew without a prior."""
    try:
        if evaluation.scores.get("schema") == scores.SCHEMA:
            return Scores.model_validate(evaluation.scores)
    except ValidationError:
        pass
    notes.append(
        f"{evaluation.scores_file.name} is not there or has another form, so scores were computed from "
        f"{evaluation.predictions_file.name}, without a prior"
    )
    return Scores.model_validate(scores.score(evaluation.predictions, Prior([])))


def entries(folders: Sequence[Path], split: str | None) -> list[Entry]:
    """The runs as they are on the page. Raises BadInput where one is none, or lacks a part asked for."""
    runs = [results.load_run(folder) for folder in folders]
    names = [run.folder.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.folder) for run in runs]
    found = []
    for place, (run, name) in enumerate(zip(runs, names, strict=True)):
        notes: list[str] = []
        try:
            judged: Evaluation | None = run.evaluation(split)
        except BadInput as error:
            if split:
                raise
            judged = None
            notes.append(f"not evaluated: {error}")
        if judged is not None and not judged.predictions:
            judged = None
            notes.append("its predictions hold no question")
        variants = {}
        for variant in sorted({each.variant for each in run.evaluations if each.variant}) if judged else ():
            try:
                told = run.evaluation(split, variant)
            except BadInput:  # only of another part
                continue
            assert judged
            if judged.scores and _conditions(told) != _conditions(judged):
                notes.append(
                    f"{told.scores_file.name} is left out: it is of another part or checkpoint than "
                    f"{judged.scores_file.name}, or by another recipe; evaluate again"
                )
            else:
                variants[variant] = told
        found.append(Entry(place, printable(name), run, judged, variants, notes))
    return found


def _conditions(evaluation: Evaluation) -> tuple[str | None, str | None, list[str]]:
    """The part, the checkpoint, and the overrides but for those that say how the work is done, or which part
    a run is judged by, as `surgvqa submit` does."""
    work = ("batch.", "data.workers=", "model.attn=", "eval.final=")
    words = [word for word in evaluation.overrides if not word.startswith(work)]
    return evaluation.split, evaluation.checkpoint, words


def shown(name: str, value: float | None) -> str:
    """A score as text: shares of questions in per cent, others as they are."""
    if value is None:
        return "–"
    if name in _PERCENT:
        return signed(value) if name == "above_prior" else f"{100 * value:.1f}"
    return f"{value:.2f}" if name == "cider" else f"{value:.3f}"


def ends(name: str, bucket: _Values) -> str:
    """An interval as text; "" where there is none."""
    found = bucket.intervals.get(name)
    return f"{shown(name, found[0])} – {shown(name, found[1])}" if found else ""


def tiles(entry: Entry) -> list[dict[str, str]]:
    """The other scores that apply, a few."""
    assert entry.scores
    bucket = entry.scores.overall
    return [
        {
            "name": NAMES[name],
            "value": shown(name, bucket.values[name]) + (" %" if name in _PERCENT else ""),
            "ends": ends(name, bucket),
        }
        for name in _TILES
        if name in bucket.values
    ]


def all_scores(judged: Sequence[Entry]) -> list[dict[str, Any]]:
    """Every score overall: its name, and of each run its value and interval."""
    known = {name for entry in judged if entry.scores for name in entry.scores.overall.values}
    found = []
    for name in [*(name for name in NAMES if name in known), *sorted(known - NAMES.keys())]:
        buckets = [entry.scores.overall for entry in judged if entry.scores]
        values = [(shown(name, bucket.values.get(name)), ends(name, bucket)) for bucket in buckets]
        found.append({"name": NAMES.get(name, name), "percent": name in _PERCENT, "values": values})
    return found


@dataclass(frozen=True)
class Against:
    """A run compared with the first one."""

    entry: Entry
    overall: Compared | None = None
    by_type: Mapping[str, Compared] = field(default_factory=dict)
    p: float | None = None
    """Of exact match overall, after Holm among the runs."""
    notes: Sequence[str] = ()


def against_first(judged: Sequence[Entry]) -> list[Against]:
    """Each further run compared with the first. Where that cannot be, the reason is a note."""
    found: list[Against] = []
    for entry in judged[1:]:
        first = judged[0]
        assert first.judged
        assert entry.judged
        if first.judged.split != entry.judged.split:
            parts = f"{first.name} on {first.judged.split}, {entry.name} on {entry.judged.split}"
            found.append(Against(entry, notes=[f"not compared, other parts of the data: {parts}"]))
            continue
        try:
            each = compare(first.judged.predictions_file, entry.judged.predictions_file)
        except BadInput as error:
            found.append(Against(entry, notes=[f"not compared: {error.problems[0]}", *error.problems[1:]]))
            continue
        notes = [note for note in each.notes if not note.startswith("McNemar")]
        found.append(Against(entry, each.overall, each.by_type, notes=notes))
    known = {str(place): each.overall.scores["exact"].p for place, each in enumerate(found) if each.overall}
    corrected = holm(known)
    return [
        Against(each.entry, each.overall, each.by_type, corrected.get(str(place)), each.notes)
        for place, each in enumerate(found)
    ]


def groups(judged: Sequence[Entry]) -> list[tuple[str, list[tuple[Entry, Group]]]]:
    """Groups that hold several images, with each run's share of right answers: where it is lowest first."""
    found: dict[str, list[tuple[Entry, Group]]] = defaultdict(list)
    for entry in judged:
        assert entry.scores
        for name, group in entry.scores.by_group.items():
            found[name].append((entry, group))
    return sorted(found.items(), key=lambda pair: (min(group.exact for _, group in pair[1]), pair[0]))


@dataclass(frozen=True)
class Blind:
    what: str
    bucket: Bucket
    difference: Difference | None = None
    """The images as they are, minus this."""
    note: str = ""


def blind(entry: Entry) -> list[Blind]:
    """The run with its images and without them; nothing where it was never tried blind."""
    found = []
    names = {"black": "black images", "shuffle": "images of other questions"}
    assert entry.judged
    for variant in names.keys() & entry.variants.keys():
        without = entry.variants[variant]
        told = _scores(without, entry.notes).overall
        try:
            compared = compare(without.predictions_file, entry.judged.predictions_file)
            found.append(Blind(names[variant], told, compared.overall.scores["exact"]))
        except BadInput as error:
            found.append(Blind(names[variant], told, note=f"not compared: {error.problems[0]}"))
    return sorted(found, key=lambda each: each.what)


@dataclass(frozen=True)
class Matrix:
    entry: Entry
    labels: list[str]
    others: bool
    """Whether the last column is that of all other answers."""
    cells: list[list[int]]
    totals: list[int]
    left_out: int
    """Classes beyond the most frequent ones."""

    def share(self, row: int, column: int) -> float:
        return self.cells[row][column] / self.totals[row]


def confusion(judged: Sequence[Entry]) -> dict[str, list[Matrix]]:
    """Question type → a matrix of each run, where it has a closed set: where class scores apply."""
    found: dict[str, list[Matrix]] = defaultdict(list)
    for entry in judged:
        assert entry.scores
        assert entry.judged
        by_type: dict[str, list[Prediction]] = defaultdict(list)
        for row in entry.judged.predictions:
            by_type[row.question_type].append(row)
        for kind, bucket in sorted(entry.scores.by_type.items(), key=lambda pair: -pair[1].n):
            if "macro_f1" in bucket.values and (matrix := _matrix(entry, by_type[kind])):
                found[kind].append(matrix)
    return dict(found)


def _matrix(entry: Entry, predictions: Sequence[Prediction]) -> Matrix | None:
    answers = [normalise(row.answer) for row in predictions]
    pairs = list(zip(scores.truths(predictions)[0], answers, strict=True))
    counts = Counter(truth for truth, _ in pairs)
    if len(counts) < 2:
        return None
    labels = [label for label, _ in counts.most_common(CLASSES)]
    place = {label: number for number, label in enumerate(sorted(labels))}
    cells = [[0] * (len(place) + 1) for _ in place]
    for truth, answer in pairs:
        if truth in place:
            cells[place[truth]][place.get(answer, -1)] += 1
    others = any(row[-1] for row in cells)
    if not others:
        cells = [row[:-1] for row in cells]
    return Matrix(
        entry, [printable(label) for label in place], others, cells, [sum(row) for row in cells],
        len(counts) - len(labels),
    )  # fmt: skip


def reliabilities(judged: Sequence[Entry]) -> list[tuple[str, int, list[Bin]]]:
    found = []
    for entry in judged:
        assert entry.scores
        bins = entry.scores.overall.reliability
        if whole := sum(bin.n for bin in bins):
            made = [Bin(bin.confidence, bin.exact, bin.n / whole, bin.n) for bin in bins]
            found.append((entry.name, entry.number, made))
    return found


def robustness(judged: Sequence[Entry]) -> list[Chart]:
    """A chart for each kind of corruption: exact match by its level, that of images as they are at 0."""
    kinds: dict[str, list[Line]] = defaultdict(list)
    for entry in judged:
        assert entry.scores
        whole = entry.scores.overall
        levels: dict[str, list[tuple[int, Bucket]]] = defaultdict(list)
        for variant, evaluation in entry.variants.items():
            kind, colon, level = variant.partition(":")
            if colon and level.isdecimal() and len(level) < 3:
                levels[kind].append((int(level), _scores(evaluation, entry.notes).overall))
        for kind, of_kind in sorted(levels.items()):
            course = [(0, whole), *sorted(of_kind, key=lambda pair: pair[0])]
            known = [(level, bucket) for level, bucket in course if "exact" in bucket.values]
            points = [(float(level), bucket.values["exact"]) for level, bucket in known]
            spans = [bucket.intervals.get("exact") for _, bucket in known]
            kinds[kind].append(Line(entry.name, points, entry.number, spans))
            if "prior" in whole.values and points:
                prior = [(point[0], whole.values["prior"]) for point in (points[0], points[-1])]
                kinds[kind].append(Line("", prior, entry.number, look="dashed"))
    return [Chart(kind, "level", lines, percent=True) for kind, lines in kinds.items()]


_COURSES = {
    "loss": "loss, nats per token",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "questions_per_s": "questions per second",
}


def curves(shown: Sequence[Entry]) -> list[Chart]:
    """Training and validation by step."""
    found = []
    for key, title in _COURSES.items():
        lines = []
        for entry in shown:
            points = _points(entry.run.steps, key)
            lines += [Line(entry.name, points, entry.number)] if key == "lr" else []
            lines += curve(entry.name, points, entry.number) if key != "lr" else []
        found.append(Chart(title, "step", lines, zero=key != "loss"))
    wanted = ["loss", "exact", *sorted({entry.run.recipe.eval.metric for entry in shown} - {"exact", "loss"})]
    for key in wanted:
        lines = []
        for entry in shown:
            lines.append(Line(entry.name, _points(entry.run.validations, key), entry.number))
            if key == "exact":
                prior = _points(entry.run.validations, "prior")
                lines.append(Line("", prior[:1] + prior[-1:], entry.number, look="dashed"))
        percent = key in _PERCENT
        title = f"validation: {NAMES.get(key, key).lower() if percent else NAMES.get(key, key)}"
        found.append(Chart(f"{title}, %" if percent else title, "step", lines, percent))
    return [chart for chart in found if chart.svg]


def _points(table: Iterable[Mapping[str, Any]], key: str) -> list[Point]:
    pairs = ((number(row.get("step")), number(row.get(key))) for row in table)
    return [(step, value) for step, value in pairs if step is not None and value is not None]


def costs(entry: Entry) -> dict[str, str]:
    """What training took, as far as its records say."""
    steps = entry.run.steps
    questions = sum(_all(steps, "questions"))
    hours = sum(_all(steps, "seconds")) / 3600
    if not steps or not hours:
        return {}
    gpu_hours = sum(
        asked / speed
        for row in steps
        if (asked := number(row.get("questions"))) and (speed := number(row.get("questions_per_gpu_hour")))
    )
    written = rows(entry.run.folder / "checkpoints.jsonl")
    found: dict[str, str | None] = {
        "Steps": f"{max(_all(steps, 'step'), default=0):,.0f}",
        "Questions trained on": f"{questions:,.0f}",
        "Tokens, each tree once": _told(sum(_all(steps, "tokens")), "{:,.0f}"),
        "Training": _time(hours),
        "Questions per hour": f"{questions / hours:,.0f}",
        "GPU-hours": _told(gpu_hours, "{:,.2f}"),
        "Questions per GPU-hour": _told(gpu_hours and questions / gpu_hours, "{:,.0f}"),
        "MFU, median": _told(_median(steps, "mfu"), "{:.1%}"),
        "Useful TFLOP/s of a process, median": _told(_median(steps, "tflops"), "{:.3g}"),
        "Peak memory of a GPU": _told(max(_all(steps, "peak_memory_gib"), default=0), "{:.1f} GiB"),
        "Checkpoints": _told(len(written), "{:,}"),
        "Training waited for them": _told(sum(_all(written, "waited")), "{:.1f} s"),
    }
    return {name: text for name, text in found.items() if text}


def _all(table: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    return [value for row in table if (value := number(row.get(key))) is not None]


def _median(table: Iterable[Mapping[str, Any]], key: str) -> float | None:
    values = _all(table, key)
    return statistics.median(values) if values else None


def _told(value: float | None, form: str) -> str | None:
    return form.format(value) if value else None


def _time(hours: float) -> str:
    minutes, seconds = divmod(round(3600 * hours), 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min {seconds:02} s"


def environment(entry: Entry) -> dict[str, str]:
    """Versions and devices of the last start, else of the evaluation, and how the run ended."""
    started = rows(entry.run.folder / "starts.jsonl")
    known = started[-1] if started else entry.judged.scores.get("environment") if entry.judged else None
    known = known if isinstance(known, dict) else {}
    last = {key: str(value) for key, value in known.items() if key not in ("step", "at")}
    last |= {"started": str(started[-1]["at"])} if started and "at" in started[-1] else {}
    ended = json_of(entry.run.folder / "ended.json")
    told = {"ended": _ended(ended)} if ended else {}
    return {key: printable(value) for key, value in {**last, **told}.items()}


def _ended(ended: Mapping[str, Any]) -> str:
    """How, when, and where that says more, why."""
    told = [str(ended[key]) for key in ("name", "at") if key in ended]
    reason = ended.get("reason")
    return " ".join(told) + (f": {reason}" if reason and reason != ended.get("name") else "")


@dataclass(frozen=True)
class Summary:
    """One data set of the runs."""

    entries: list[str]
    sources: list[str]
    dataset: Dataset | None = None
    note: str = ""
    audit: str = ""

    @cached_property
    def parts(self) -> dict[str, dict[str, int]]:
        return {part: findings.part_counts(self.dataset.part(part)) for part in PARTS} if self.dataset else {}

    @cached_property
    def types(self) -> dict[str, dict[str, Any]]:
        return findings.type_counts(self.dataset) if self.dataset else {}


def summaries(
    shown: Sequence[Entry], audits: Path = Path("audit"), *, progress: bool = False
) -> list[Summary]:
    """Each data set once, with the runs it is of; one that cannot be read any more is told, and why."""
    of_data: dict[str, list[Entry]] = defaultdict(list)
    for entry in shown:
        of_data[json.dumps(entry.settings.data.model_dump(), sort_keys=True)].append(entry)
    found = []
    for same in of_data.values():
        data = same[0].settings.data
        names, sources = [entry.name for entry in same], [printable(_source(each)) for each in data.sources]
        audit = next(filter(None, (_audit(entry, audits) for entry in same)), "")
        try:
            found.append(Summary(names, sources, datasets.load(data, progress=progress), audit=audit))
        except (BadInput, OSError) as error:
            why = printable(" ".join(str(error).split()))
            found.append(Summary(names, sources, note=why, audit=audit))
    return found


def _source(source: Any) -> str:
    return f"{source.format}: {source.path}" if source.path else str(source.format)


def _audit(entry: Entry, audits: Path) -> str:
    """What `surgvqa check` wrote of the same data, in a line; "" where there is none."""
    told = json_of(audits / entry.run.folder.resolve().name / "audit.json")
    problems, of = told.get("problems"), told.get("data")
    data: Data = entry.settings.data
    same = of == [{"format": source.format, "path": source.path} for source in data.sources]
    if not same or not isinstance(problems, list):
        return ""
    errors = sum(isinstance(each, dict) and each.get("severity") == "error" for each in problems)
    date = printable(str(told.get("date", ""))[:10])
    return f"surgvqa check, {date}: {errors} errors, {len(problems) - errors} warnings"


def differences(shown: Sequence[Entry]) -> list[tuple[str, list[str]]]:
    """Keys in which recipes differ from the first one's, but for where the runs are: key, values of all."""
    changed: dict[str, None] = {}
    for entry in shown[1:]:
        for told in shown[0].run.recipe.differences(entry.run.recipe):
            changed.setdefault(told.partition(":")[0])
    changed.pop("output", None)
    dumps = [entry.run.recipe.model_dump(mode="json") for entry in shown]
    return [(key, [printable(_value(dump, key)) for dump in dumps]) for key in changed]


def _value(dump: Any, key: str) -> str:
    for name in key.split("."):
        dump = dump.get(name) if isinstance(dump, dict) else None
    return json.dumps(dump, ensure_ascii=False)


def table(judged: Sequence[Entry], compared: Sequence[Against]) -> Iterator[str]:
    """Exact match with its intervals beside the prior as a table in GitHub's Markdown."""
    of_runs = [f"{_escaped(entry.name)}, % [95 %]" for entry in judged]
    of_changes = [
        head
        for each in compared
        if each.overall
        for head in (f"{_escaped(each.entry.name)} − {_escaped(judged[0].name)} [95 %]", "p")
    ]
    if len(judged) == 1:
        of_runs = ["Exact match, % [95 %]"]
    head = ["Questions", "n", "Prior, %", *of_runs, *of_changes]
    yield f"| {' | '.join(head)} |"
    yield "|---" + "|--:" * (len(head) - 1) + "|"
    kinds = dict.fromkeys(kind for entry in judged if entry.scores for kind in entry.scores.by_type)
    marks = ""
    for kind in (None, *kinds):
        buckets = [
            entry.scores.overall if kind is None else entry.scores.by_type.get(kind)
            for entry in judged
            if entry.scores
        ]
        first = next(bucket for bucket in buckets if bucket)
        marks += first.marks
        cells = [
            "**All**" if kind is None else _escaped(printable(kind)),
            f"{first.n:,}{first.marks}".replace("*", "\\*"),
            shown("prior", first.values.get("prior")),
        ]
        for bucket in buckets:
            interval = ends("exact", bucket).replace(" – ", ", ") if bucket else ""
            value = shown("exact", bucket.values.get("exact")) if bucket else "–"
            cells.append(value + (f" [{interval}]" if interval else ""))
        for each in compared:
            if each.overall:
                part = each.overall if kind is None else each.by_type.get(kind)
                cells += _change(part, each.p if kind is None else None)
        yield f"| {' | '.join(cells)} |"
    notes = [
        f"{mark.replace('*', chr(92) + '*')} {scores.MARKS[mark]}." for mark in scores.MARKS if mark in marks
    ]
    if any(each.overall for each in compared):
        notes.append(
            "p: paired bootstrap over groups; by question type after Holm over the types"
            + ("." if len(compared) == 1 else ", overall after Holm over the runs.")
        )
    if notes:
        yield ""
        yield " ".join(notes)


def _change(part: Compared | None, p: float | None) -> list[str]:
    if part is None or "exact" not in part.scores:
        return ["–", "–"]
    exact = part.scores["exact"]
    interval = f" [{', '.join(map(signed, exact.interval))}]" if exact.interval else ""
    corrected = exact.p_holm if exact.p_holm is not None else p if p is not None else exact.p
    return [f"{signed(exact.difference)}{interval}", told_p(corrected).replace("<", "\\<")]


def _escaped(text: str) -> str:
    """Text that Markdown leaves as it is, also in a cell."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|~#!&" else letter for letter in text)
