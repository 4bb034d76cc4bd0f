"""Runs as one HTML file that needs nothing else: what `surgvqa report` writes.

    runs' folders ── write ──▶ report.html        ── markdown ──▶ a table for a paper

The page asks for nothing, and its own style and script are all that it lets run (their digests are in its
content security policy). What comes from data and runs is text there, never markup. Imports no torch.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import surgvqa
from surgvqa import hub, scores
from surgvqa.audit import PARTS
from surgvqa.comparison import signed, told_p
from surgvqa.datasets import Example
from surgvqa.recipe import BadInput, printable
from surgvqa.report import charts, content, gallery
from surgvqa.report.content import Entry
from surgvqa.results import json_of

MOST = 25_000_000
"""Bytes that a page has at most."""

_TYPES, _GROUPS = 60, 60
"""Question types, and groups, that are shown as bars."""


def markdown(folders: Sequence[Path], split: str | None = None) -> str:
    """The table for a paper. Raises BadInput where a run is none or has no evaluation."""
    shown = content.entries(folders, split)
    if lacking := [note for entry in shown if entry.judged is None for note in entry.notes]:
        raise BadInput(lacking)
    return "\n".join(content.table(shown, content.against_first(shown))) + "\n"


def write(
    folders: Sequence[Path],
    out: Path | None = None,
    split: str | None = None,
    *,
    pictures: bool = True,
    progress: bool = False,
) -> Path:
    """Write the page of some runs; returns its file, by default report.html in the only run's folder or here.

    Data or a model that is not here any more is told on the page. Raises BadInput where a run is none, lacks
    the part that was asked for, or the file cannot be written.
    """
    shown = content.entries(folders, split)
    judged = [entry for entry in shown if entry.judged]
    summaries = content.summaries(shown, progress=progress)
    answered = {row.id for entry in judged if entry.judged for row in entry.judged.predictions}
    examples: dict[str, Example] = {}
    for summary in reversed(summaries):
        if summary.dataset:
            examples |= {e.id: e for e in summary.dataset.examples if e.id in answered}
    page = _Page(shown, judged, summaries)
    packed, seen, notes = _gallery(judged, examples, page, pictures=pictures, progress=progress)
    text = page.render(packed, seen, notes)
    out = out or (shown[0].run.folder / "report.html" if len(shown) == 1 else Path("report.html"))
    _write(out, text)
    return out


def _gallery(
    judged: Sequence[Entry],
    examples: dict[str, Example],
    page: _Page,
    *,
    pictures: bool,
    progress: bool,
) -> tuple[gallery.Packed | None, gallery.Pictures, list[str]]:
    """The questions as they are in the page, the pictures that fit beside them, and what is not shown."""
    if not judged:
        return None, gallery.NO_PICTURES, []
    rows = gallery.joined([entry.judged.predictions for entry in judged if entry.judged])
    names, notes = [entry.name for entry in judged], []
    refs = gallery.refs_of(rows, examples)
    packed = gallery.pack(names, rows, examples, refs, gallery.NO_PICTURES)
    seen = gallery.NO_PICTURES
    if pictures and refs:
        boxes = sum(len(p.regions or []) + len(p.reference_regions or []) for row in rows for p in row if p)
        used = len(page.render(packed, seen, []).encode()) + 40 * boxes + 200_000
        each = {ref.key: ref for images in refs.values() for _, ref in images}
        used += 30 * len(each)
        factor = _factor(judged[0])
        seen = gallery.pictures(
            list(each.values()), judged[0].settings, factor, max(0, MOST - used) * 3 // 4, progress=progress
        )
        packed = gallery.pack(names, rows, examples, refs, seen)
        notes += _pictured(seen, factor, judged)
    if packed.rows < len(rows):
        notes.append(f"the first {packed.rows:,} of {len(rows):,} questions, errors first")
    if packed.cut:
        notes.append(f"texts are cut after {packed.cut:,} characters")
    images = {one.image for row in rows for one in row if one}
    if pictures and len(refs) < len(images):
        notes.append(
            f"{len(images) - len(refs):,} of {len(images):,} images have no picture: their questions are not "
            "in the data as it is now"
        )
    return packed, seen, notes


def _pictured(seen: gallery.Pictures, factor: int | None, judged: Sequence[Entry]) -> list[str]:
    """What is to be said of the pictures."""
    notes, shown = [], len(seen.content)
    whole = shown + seen.left_out + len(seen.faults)
    if shown:
        notes.append(f"{shown:,} of {whole:,} pictures, their longer side at most {seen.side} pixels")
    if seen.left_out:
        notes.append(f"{seen.left_out:,} left out, those of right answers first, to keep this file small")
    if seen.faults:
        key, why = next(iter(seen.faults.items()))
        notes.append(
            f"{len(seen.faults):,} cannot be read any more, such as {printable(key)}: {printable(why)}"
        )
    if factor is None:
        notes.append("shown as they are in the data: the model is not here, so its canvas is not known")
    elif len({entry.settings.image for entry in judged}) > 1 or len({e.model for e in judged}) > 1:
        notes.append(f"as {judged[0].name} saw them")
    return notes


def _factor(entry: Entry) -> int | None:
    """Pixels per token and side of a run's model: by a checkpoint, or by the model's folder if it is here."""
    for file in sorted(entry.run.folder.glob("checkpoints/step-*/config.json")):
        if found := hub.factor_of(json_of(file)):
            return found
    try:
        return hub.find(entry.run.recipe.model.name, entry.run.recipe.model.revision, fetch=False).factor
    except BadInput:
        return None


class _Page:
    """All but the gallery, ready to be rendered."""

    def __init__(
        self, shown: Sequence[Entry], judged: Sequence[Entry], summaries: Sequence[content.Summary]
    ) -> None:
        compared = content.against_first(judged) if len(judged) > 1 else []
        kinds: dict[str, int] = {}
        for entry in judged:
            assert entry.scores
            for kind, bucket in entry.scores.by_type.items():
                kinds[kind] = max(kinds.get(kind, 0), bucket.n)
        blind = {entry.number: content.blind(entry) for entry in judged}
        groups = content.groups(judged)
        environments = [content.environment(entry) for entry in shown]
        costs = [content.costs(entry) for entry in shown]
        legacy = [
            (entry, entry.scores.overall.legacy)
            for entry in judged
            if entry.scores and entry.scores.overall.legacy
        ]
        self.values: dict[str, Any] = {
            "title": " · ".join(entry.name for entry in shown),
            "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "version": surgvqa.__version__,
            "shown": shown,
            "judged": judged,
            "compared": {each.entry.number: each for each in compared},
            "kinds": sorted(kinds, key=lambda kind: (-kinds[kind], kind))[:_TYPES],
            "more_kinds": max(0, len(kinds) - _TYPES),
            "groups": groups[:_GROUPS],
            "more_groups": max(0, len(groups) - _GROUPS),
            "marks": _marks(judged),
            "tiles": {entry.number: content.tiles(entry) for entry in judged},
            "all_scores": content.all_scores(judged),
            "absent": [(entry, entry.scores.overall.absent) for entry in judged if entry.scores],
            "legacy": legacy,
            "blind": blind,
            "confusion": content.confusion(judged),
            "reliability": content.reliabilities(judged),
            "robustness": content.robustness(judged),
            "curves": content.curves(shown),
            "costs": costs,
            "cost_names": list(dict.fromkeys(name for cost in costs for name in cost)),
            "summaries": summaries,
            "differences": content.differences(shown),
            "environments": environments,
            "environment_names": list(dict.fromkeys(name for each in environments for name in each)),
        }

    def render(self, packed: gallery.Packed | None, seen: gallery.Pictures, notes: Sequence[str]) -> str:
        style, script = _part("page.css"), _part("page.js")
        policy = (
            f"default-src 'none'; img-src data: blob:; style-src '{_digest(style)}'; "
            f"script-src '{_digest(script)}'; base-uri 'none'; form-action 'none'"
        )
        return _TEMPLATES.get_template("page.html.jinja").render(
            **self.values, policy=policy, style=Markup(style), script=Markup(script), packed=packed,
            pictures=seen.packed, gallery_notes=notes,
        )  # fmt: skip


def _marks(judged: Sequence[Entry]) -> list[tuple[str, str]]:
    """Marks that stand at a number on the page, and what they mean."""
    buckets = [
        bucket
        for entry in judged
        if entry.scores
        for bucket in (entry.scores.overall, *entry.scores.by_type.values())
    ]
    used = "".join(bucket.marks for bucket in buckets)
    return [(mark, meaning) for mark, meaning in scores.MARKS.items() if mark in used]


def _part(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


_TEMPLATES = jinja2.Environment(
    loader=jinja2.FunctionLoader(_part),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {
    "printable": printable,
    "signed": signed,
    "p": told_p,
    "percent": scores.percent,
}
_TEMPLATES.globals |= {
    "bar": charts.bar, "reliability_chart": charts.reliability, "score": content.shown,
    "ends": content.ends, "parts": PARTS,
}  # fmt: skip


def _write(out: Path, text: str) -> None:
    aside = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside.unlink(missing_ok=True)
        with aside.open("x", encoding="utf-8", errors="backslashreplace") as file:  # never through a link
            file.write(text)
        aside.replace(out)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise BadInput(f"--out {out}: cannot be written ({error.strerror}); choose another file") from None
