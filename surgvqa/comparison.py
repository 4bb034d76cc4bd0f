"""Two runs' answers to the same questions: is one better, and how sure is that?

    predictions of A, of B ── compare ──▶ Comparison ──▶ a table, compare.json, compare.svg

Differences are B - A, so B is the run of which one hopes that it is better.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from surgvqa.endings import writing_to
from surgvqa.intervals import FEW_GROUPS, RESAMPLES, Array, bootstrap, interval, p_value
from surgvqa.metrics import Prediction
from surgvqa.recipe import BadInput, printable
from surgvqa.results import choose, evaluations
from surgvqa.scores import FEW, MARKS, Bucket, Scored, bounds, marks, read

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
"""Of compare.json."""

_DISCORDANT = 25
"""From so many on McNemar's test takes its chi-squared approximation, with continuity correction."""
_SHOWN = 5
"""Differences in the data that are shown."""


@dataclass(frozen=True)
class Side:
    """What was compared: a run's folder or a file of predictions, and what its scores tell of it."""

    path: str
    split: str | None = None
    checkpoint: str | None = None


@dataclass(frozen=True)
class Difference:
    """A score of both runs, and B - A."""

    a: float
    b: float
    difference: float
    interval: tuple[float, float] | None
    """95 %, from resamples of the groups. If all resamples are equal: `intervals.constant` for exact match,
    None for other scores."""
    p: float | None
    """Two-sided, from the same resamples."""
    p_holm: float | None = None
    """The same among all question types; None for the whole."""


@dataclass(frozen=True)
class McNemar:
    """Exact match, question by question; takes questions for independent of each other."""

    both: int
    only_a: int
    only_b: int
    neither: int
    exact: bool
    """Whether p is binomial; else chi-squared with continuity correction."""
    p: float
    p_holm: float | None = None


@dataclass(frozen=True)
class Compared:
    """One question type, or the whole."""

    n: int
    few: bool
    groups: int
    few_groups: bool
    scores: dict[str, Difference]
    mcnemar: McNemar

    @property
    def marks(self) -> str:
        return marks(self.few, self.few_groups)


@dataclass(frozen=True)
class Comparison:
    a: Side
    b: Side
    only_in_a: list[str]
    """Ids of questions that B does not have; they are left out."""
    only_in_b: list[str]
    groups: int
    resamples: int
    seed: int
    overall: Compared
    by_type: dict[str, Compared]
    notes: list[str]

    def table(self) -> pd.DataFrame:
        """Every score of the whole (`all`), then exact match of each question type, as rows (what, score).

        Columns: questions, a, b, difference (b - a), low and high (its 95 % interval), and p, for types after
        Holm; NaN where there is none. Values are shares of 1, CIDEr runs to 10.
        """
        import pandas as pd

        def row(compared: Compared, found: Difference) -> dict[str, Any]:
            low, high = found.interval or (None, None)
            p = found.p if found.p_holm is None else found.p_holm
            values = {"a": found.a, "b": found.b, "difference": found.difference}
            return {"questions": compared.n, **values, "low": low, "high": high, "p": p}

        shown = [("all", name, self.overall) for name in self.overall.scores]
        shown += [(kind, "exact", found) for kind, found in self.by_type.items()]
        index = pd.MultiIndex.from_tuples([each[:2] for each in shown], names=["what", "score"])
        table = pd.DataFrame([row(found, found.scores[name]) for _, name, found in shown], index)
        return table.astype({"low": float, "high": float, "p": float})

    def row(self) -> dict[str, Any]:
        """What compare.json holds."""
        return {"schema": SCHEMA, **asdict(self)}


def compare(
    run_a: str | Path,
    run_b: str | Path,
    split: str | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compare two runs' answers to the questions that both have.

    `run_a` and `run_b` are output folders of training runs that `surgvqa evaluate` has been through, or files
    of predictions; `split` is the part, by default the one that the runs are judged by. Raises BadInput where
    there are no predictions, or where questions with the same id are not the same.
    """
    (a, rows_a), (b, rows_b) = _load(Path(run_a), split), _load(Path(run_b), split)
    if a.split != b.split and a.split and b.split:
        raise BadInput(
            f"{a.path} was evaluated on {a.split} and {b.path} on {b.split}; choose one part with --split"
        )
    of_b = {row.id: row for row in rows_b}
    common = [row for row in rows_a if row.id in of_b]
    if not common:
        raise BadInput(
            f"{a.path} and {b.path} have no question in common: "
            f"ids such as {rows_a[0].id!r} against {rows_b[0].id!r}"
        )
    others = [of_b[row.id] for row in common]
    _same_questions(a, b, common, others)
    ids_a = {row.id for row in common}
    scored = Scored(common), Scored(others)
    pairs = {kind: (scored[0].by_type[kind], scored[1].by_type[kind]) for kind in scored[0].by_type}
    overall, *types = _compared(
        scored, [(scored[0].overall, scored[1].overall), *pairs.values()], resamples, seed
    )
    cut = [
        f"{run.path}: {sum(row.cut for row in rows)} of {len(rows)} answers were cut at eval.max_new_tokens"
        for run, rows in ((a, common), (b, others))
        if any(row.cut for row in rows)
    ]
    comparison = Comparison(
        a=a,
        b=b,
        only_in_a=[row.id for row in rows_a if row.id not in of_b],
        only_in_b=[row.id for row in rows_b if row.id not in ids_a],
        groups=len(scored[0].groups),
        resamples=resamples,
        seed=seed,
        overall=overall,
        by_type=_corrected(dict(zip(pairs, types, strict=True))),
        notes=[],
    )
    return replace(comparison, notes=[*_notes(comparison), *cut])


def _load(path: Path, split: str | None) -> tuple[Side, list[Prediction]]:
    if not path.exists():
        raise BadInput(f"{path}: no such run")
    if path.is_dir():
        found = choose(path, evaluations(path), split)
        run, rows = Side(str(path), found.split, found.checkpoint), found.predictions
    else:
        run, rows = Side(str(path)), read(path)
    if not rows:
        raise BadInput(f"{path}: holds no predictions")
    return run, rows


def _same_questions(a: Side, b: Side, rows_a: Sequence[Prediction], rows_b: Sequence[Prediction]) -> None:
    """Raises BadInput with the first differences where a question is not the same in both."""
    different = [
        f"question {one.id!r}: {key} is {getattr(one, key)!r} in {a.path}, "
        f"but {getattr(two, key)!r} in {b.path}"
        for one, two in zip(rows_a, rows_b, strict=True)
        for key in ("image", "group", "question", "question_type", "references")
        if getattr(one, key) != getattr(two, key)
    ]
    if different:
        more = [f"and {len(different) - _SHOWN} more"] if len(different) > _SHOWN else []
        raise BadInput(
            [
                f"{a.path} and {b.path} did not answer the same questions, so they cannot be compared:",
                *different[:_SHOWN],
                *more,
            ]
        )


def _compared(
    scored: tuple[Scored, Scored], pairs: Sequence[tuple[Bucket, Bucket]], resamples: int, seed: int
) -> list[Compared]:
    every = [tally for pair in pairs for bucket in pair for tally in bucket.scores]
    drawn = bootstrap(every, resamples=resamples, seed=seed) if len(scored[0].groups) > 1 else []
    samples = dict(zip(map(id, every), drawn, strict=bool(drawn)))

    def columns(bucket: Bucket) -> dict[str, Array]:
        return {
            name: samples[id(tally)][:, place] if samples else np.zeros(0)
            for tally in bucket.scores
            for place, name in enumerate(tally.names)
        }

    def values(bucket: Bucket) -> dict[str, float | None]:
        return {name: value for tally in bucket.scores for name, value in tally.told().items()}

    found = []
    for one, two in pairs:
        a, b, draws_a, draws_b = values(one), values(two), columns(one), columns(two)
        n, groups = len(one.rows), len(np.unique(scored[0].group[one.rows]))
        differences = {}
        for name, value in a.items():
            other = b.get(name)
            if value is not None and other is not None:
                change = draws_b[name] - draws_a[name]
                ends = interval(change)
                if ends is None and name == "exact":  # a difference of two shares, as above_prior is
                    ends = bounds("above_prior", other - value, groups)
                differences[name] = Difference(value, other, other - value, ends, p_value(change))
        test = _mcnemar(scored[0].right[one.rows], scored[1].right[one.rows])
        found.append(Compared(n, n < FEW, groups, groups < FEW_GROUPS, differences, test))
    return found


def _mcnemar(right_a: Array, right_b: Array) -> McNemar:
    from statsmodels.stats.contingency_tables import mcnemar

    a, b = right_a.astype(bool), right_b.astype(bool)
    both, only_a, only_b, neither = (int(part.sum()) for part in (a & b, a & ~b, b & ~a, ~a & ~b))
    few = only_a + only_b < _DISCORDANT
    test = mcnemar([[both, only_a], [only_b, neither]], exact=few, correction=True)
    return McNemar(both, only_a, only_b, neither, few, float(test.pvalue) if only_a + only_b else 1.0)


def holm(values: Mapping[str, float | None]) -> dict[str, float]:
    """p by name, corrected for how many there are; those that are None are left out.

    Holm, "A simple sequentially rejective multiple test procedure" (Scand. J. Stat. 6, 1979): the smallest
    times their number, the next times one less, and so on; none smaller than the one before, none over 1.
    (statsmodels' `multipletests` gives the same, and collects garbage each time it is called.)
    """
    known = sorted((p, name) for name, p in values.items() if p is not None)
    times = range(len(known), 0, -1)
    rising = accumulate((min(1.0, p * left) for (p, _), left in zip(known, times, strict=True)), max)
    return {name: p for (_, name), p in zip(known, rising, strict=True)}


def _corrected(types: Mapping[str, Compared]) -> dict[str, Compared]:
    """With every p among those of all question types."""
    names = {name for found in types.values() for name in found.scores}
    of_score = {
        name: holm({kind: found.scores[name].p for kind, found in types.items() if name in found.scores})
        for name in names
    }
    of_mcnemar = holm({kind: found.mcnemar.p for kind, found in types.items()})
    return {
        kind: replace(
            found,
            scores={
                name: replace(difference, p_holm=of_score[name].get(kind))
                for name, difference in found.scores.items()
            },
            mcnemar=replace(found.mcnemar, p_holm=of_mcnemar[kind]),
        )
        for kind, found in types.items()
    }


def _notes(found: Comparison) -> list[str]:
    notes = [
        f"{len(ids)} questions are only in {run.path} and were left out, such as {ids[0]!r}"
        for run, ids in ((found.a, found.only_in_a), (found.b, found.only_in_b))
        if ids
    ]
    if found.groups == 1:
        notes.append(
            "all questions are of one group: there are no intervals, and McNemar's p is not to be trusted"
        )
    elif found.groups < FEW_GROUPS:
        notes.append(f"only {found.groups} groups: intervals and p are not to be trusted")
    if found.overall.n > found.groups:
        notes.append(
            "McNemar's test takes questions for independent, but those of one image or video are not: where "
            "they go right and wrong together its p is too small; the bootstrap over groups allows for that"
        )
    return notes


def rows_of_table(found: Mapping[str, Difference]) -> list[tuple[str, ...]]:
    """Differences as rows (what, A, B, B - A, interval, p), times 100."""
    return [
        (
            name,
            f"{100 * row.a:.1f}",
            f"{100 * row.b:.1f}",
            signed(row.difference),
            " … ".join(map(signed, row.interval)) if row.interval else "–",
            told_p(row.p if row.p_holm is None else row.p_holm),
        )
        for name, row in found.items()
    ]


def signed(share: float) -> str:
    """A difference of shares, times 100."""
    return f"{100 * share:+.1f}".replace("-", "−")


def told_p(p: float | None) -> str:
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def show(found: Comparison, out: Path) -> None:
    """Print a comparison, and write compare.json and compare.svg into the folder `out`."""
    from rich.table import Table

    from surgvqa.terminal import Console

    console = Console()
    for name, run in (("A", found.a), ("B", found.b)):
        what = ", ".join(filter(None, (run.split, run.checkpoint)))
        console.print(f"{name}: {run.path}{f' ({what})' if what else ''}", soft_wrap=True)
    counted = f"{found.overall.n} questions of {found.groups} groups"
    whole = Table(title=f"{counted}; scores times 100")
    kinds = Table(title="exact match by question type; p after Holm")
    for table, first in ((whole, "score"), (kinds, "type")):
        table.add_column(first)
        for heading in ("A", "B", "B - A", "95 % interval", "p"):
            table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("n", "McNemar's p"):
        kinds.add_column(heading, justify="right")
    for row in rows_of_table(found.overall.scores):
        whole.add_row(*row)
    marked = set()
    for kind, compared in found.by_type.items():
        marked |= set(compared.marks)
        for row in rows_of_table({kind: compared.scores["exact"]}):
            kinds.add_row(*row, f"{compared.n}{compared.marks}", told_p(compared.mcnemar.p_holm))
    console.print(whole)
    test = found.overall.mcnemar
    console.print(
        f"exact match: right in both {test.both}, only in A {test.only_a}, only in B {test.only_b}, "
        f"in neither {test.neither}; McNemar's p {told_p(test.p)} "
        f"({'exact' if test.exact else 'chi-squared'})",
        soft_wrap=True,
    )
    console.print(kinds)
    for note in [*(f"{mark} {MARKS[mark]}" for mark in sorted(marked)), *found.notes]:
        console.print(note, soft_wrap=True)
    files = out / "compare.json", out / "compare.svg"
    with writing_to(out):
        out.mkdir(parents=True, exist_ok=True)
        files[0].write_text(json.dumps(found.row(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        files[1].write_text(drawing(found), encoding="utf-8")
    console.print(f"written: {files[0]}, {files[1]}", soft_wrap=True)


def drawing(found: Comparison) -> str:
    """The differences in exact match, overall and by question type, with their intervals, as an SVG."""
    import jinja2

    parts = [("all", found.overall), *found.by_type.items()]
    shown = [(name, part.scores["exact"], f"n = {part.n}{part.marks}") for name, part in parts]
    edges = [edge for _, row, _ in shown for edge in (row.difference, *(row.interval or ()))]
    reach: float = max(1, math.ceil(20 * max(map(abs, edges)))) / 20  # a whole number of times 5 points

    def x(share: float) -> int:
        return _MIDDLE + round(share / reach * _REACH)

    rows = [
        {
            "name": printable(name)[:40],
            "what": f"{signed(row.difference)}, {counted}",
            "y": 70 + 26 * number,
            "x": x(row.difference),
            "span": [x(edge) for edge in row.interval] if row.interval else None,
        }
        for number, (name, row, counted) in enumerate(shown)
    ]
    ticks = [
        (x(share), f"{100 * share:+.3g}" if share else "0")
        for share in (-reach, -reach / 2, 0, reach / 2, reach)
    ]
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_SVG)
    title = f"Exact match: {printable(found.b.path)} - {printable(found.a.path)}, percentage points"
    return str(template.render(rows=rows, ticks=ticks, title=title, bottom=70 + 26 * len(rows), zero=_MIDDLE))


_MIDDLE, _REACH = 500, 190
_SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 {{ bottom + 40 }}" role="img">
<title>{{ title }}</title>
<style>
svg { background: #fff; font: 14px system-ui, sans-serif; } text { fill: #1b2733; }
.grid { stroke: #ccd4da; } .zero { stroke: #6b7780; } .all { font-weight: 600; }
.span { stroke: #1c6f9c; stroke-width: 3; stroke-linecap: round; } circle { fill: #1c6f9c; }
@media (prefers-color-scheme: dark) { svg { background: #14191d; } text { fill: #e4eaee; }
.grid { stroke: #39434a; } .zero { stroke: #90a0aa; } .span { stroke: #63b7e2; } circle { fill: #63b7e2; } }
</style>
<text x="20" y="28" class="all">{{ title }}</text>
{% for x, label in ticks %}<line x1="{{ x }}" x2="{{ x }}" y1="48" y2="{{ bottom }}"
 class="{{ 'zero' if x == zero else 'grid' }}"/>
<text x="{{ x }}" y="{{ bottom + 20 }}" text-anchor="middle">{{ label }}</text>
{% endfor %}
{% for row in rows %}
<text x="290" y="{{ row.y + 5 }}" text-anchor="end"
 class="{{ 'all' if loop.first else '' }}">{{ row.name }}</text>
{% if row.span %}<line x1="{{ row.span[0] }}" x2="{{ row.span[1] }}" y1="{{ row.y }}" y2="{{ row.y }}"
 class="span"/>{% endif %}
<circle cx="{{ row.x }}" cy="{{ row.y }}" r="5"/><text x="710" y="{{ row.y + 5 }}">{{ row.what }}</text>
{% endfor %}</svg>
"""
