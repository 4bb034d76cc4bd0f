"""What `surgvqa check` finds out about a recipe's data: on the terminal, as audit.json and as a page.

    recipe ── examine ──▶ Findings ── table() ──▶ terminal
                                   ── write() ──▶ audit.json, audit.html

Exact token counts, and what cannot fit because of them, are found when training begins; what is counted here
leaves out the chat template.
"""

from __future__ import annotations

import base64
import json
import math
import os
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from io import BytesIO
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image
from rich import box
from rich.table import Table

import surgvqa
from surgvqa import digests, hub, letterbox
from surgvqa.audit import PARTS, load_and_audit, repeated, report, too_short
from surgvqa.datasets import Dataset, Example, ImageRef, Problem
from surgvqa.datasets.boxes import in_brackets
from surgvqa.grounding import left_as_text
from surgvqa.hub import Folder
from surgvqa.metrics import Prior, exact, normalise
from surgvqa.recipe import BadInput, Recipe, printable
from surgvqa.scan import ImageFacts

VERSION = 1
"""Of the layout of audit.json."""

_AT_ONCE = 4096
"""Texts that are tokenized together."""

_THUMB = 200
"""Side of a picture on the page, in pixels."""

_PICTURES, _PICTURE_BYTES = 96, 12_000
"""How many pictures a page has at most, and how many bytes each: about 1.5 MB as text."""

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm"})


@dataclass(frozen=True)
class Findings:
    content: dict[str, Any]
    """What audit.json holds: plain values, all texts as they are in the data."""
    problems: list[Problem]
    refs: dict[str, ImageRef]
    """Image key → where it is, of those to show."""

    @property
    def failed(self) -> bool:
        return any(not problem.warning for problem in self.problems)

    def table(self) -> Table:
        """A row for each question type."""
        content = self.content
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("question type")
        for part in PARTS:
            table.add_column(part, justify="right", no_wrap=True)
        table.add_column("answers", justify="right")
        table.add_column("majority in train", max_width=32)
        for part in PARTS[1:]:
            table.add_column(f"prior,\n{part} %", justify="right")
        for kind, row in content["question_types"].items():
            counts = [f"{row['questions'][part]:,}" for part in PARTS]
            prior = [_percent(row["prior"][part]) for part in PARTS[1:]]
            majority = row["majority"]
            most = (
                ""
                if majority["answer"] is None
                else f"{majority['answer']} ({_percent(majority['share'])} %)"
            )
            table.add_row(kind, *counts, f"{row['answers']:,}", most, *prior)
        return table

    def lines(self) -> Iterator[str]:
        """How much there is, images and texts in short, and what was not looked at."""
        content = self.content
        yield f"{content['recipe']}: {_size(content)}"
        yield from _facts(content)
        if summary := content["model"].get("summary"):
            yield f"model: {content['model']['name']}; SHA-256 of its {summary}"
        yield from (f"data: {printable(line)}" for line in content["unused"])
        yield from (f"not looked at: {note}" for note in content["notes"])

    def report(self) -> str:
        return report(self.problems, self.content["recipe"])

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write audit.json and audit.html. Raises BadInput where the folder cannot be written."""
        files = folder / "audit.json", folder / "audit.html"
        page = _PAGE.render(
            content=self.content, facts=list(_facts(self.content)), size=_size(self.content), parts=PARTS,
            problems=self._with_pictures(), percent=_percent,
        )  # fmt: skip
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for file, text in zip(files, (json.dumps(self.content, indent=1) + "\n", page), strict=True):
                aside = file.with_name(f".{file.name}.tmp")
                aside.unlink(missing_ok=True)
                with aside.open("x", encoding="utf-8") as stream:  # a new file: a link is not followed
                    stream.write(text)
                aside.replace(file)
        except OSError as error:
            raise BadInput(
                f"--out: {error.filename or folder} cannot be written ({error.strerror}); choose another one"
            ) from None
        return files

    def _with_pictures(self) -> list[dict[str, Any]]:
        """The problems as shown on the page; of the same one in many rows the first ones."""
        made: dict[str, str] = {}
        alike: dict[tuple[bool, str], list[Problem]] = defaultdict(list)
        for problem in self.problems:
            alike[problem.warning, problem.what].append(problem)
        shown = []
        for (warning, what), same in alike.items():
            pictures = []
            for key in dict.fromkeys(key for problem in same for key in problem.images):
                if key not in made and len(made) < _PICTURES:
                    made[key] = _thumbnail(self.refs[key]) if key in self.refs else ""
                if key in made:
                    pictures.append({"name": printable(key), "data": made[key]})
            places = [printable(problem.place) for problem in same]
            shown.append(
                {
                    "severity": "warning" if warning else "error",
                    "places": places[:20],
                    "more": len(places) - 20,
                    "what": printable(what),
                    "pictures": pictures,
                }
            )
        return shown


def examine(
    name: str,
    settings: Recipe,
    folder: Folder | None,
    wrong: Sequence[str] = (),
    *,
    headers: bool = False,
    progress: bool = False,
) -> Findings:
    """Audit a recipe's data and its model. Data that cannot be read at all are a problem like others.

    `name` is the recipe's, for messages; `folder` is the model's, None if it is not here; `wrong` lists
    problems of the model. With `headers` no image is decoded, and large weights files are sampled.
    """
    of_model = [Problem(name, problem, whole=True) for problem in wrong]
    about = {
        "version": VERSION,
        "surgvqa": surgvqa.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "recipe": name,
        "data": [{"format": source.format, "path": source.path} for source in settings.data.sources],
    }
    special = folder.special_tokens if folder else ()
    try:
        dataset, found = load_and_audit(settings, special, headers=headers, progress=progress)
    except BadInput as error:
        problems = [*of_model, *(Problem(name, problem, whole=True) for problem in error.problems)]
        return Findings({**about, "problems": [_problem(problem) for problem in problems]}, problems, {})
    refs = {image.key: image for example in dataset.examples for image in example.images}
    tokens = _tokens_of(folder)
    notes = list(found.notes)
    model: dict[str, Any] = {"name": settings.model.name}
    if folder and (missing := [] if folder.tiny else hub.missing_weights(folder.path, folder.name)):
        notes.append(f"the model's weights: {', '.join(missing[:3])} not in {folder.path}")
    elif folder:
        try:
            held = digests.of(folder, whole=not headers)
            model |= {"revision": folder.revision, "digests": held.parts(), "summary": held.summary()}
        except BadInput as error:
            of_model += [Problem(name, problem, whole=True) for problem in error.problems]
    if tokens is None:
        notes.append("lengths in tokens: the model's tokenizer.json is not here")
    problems = [*of_model, *found.problems]
    if folder and tokens:
        sizes = found.sizes
        if settings.image.crop == "border":
            sizes |= {key: (x2 - x1, y2 - y1) for key, (x1, y1, x2, y2) in found.pictures.items()}
        problems += _too_long(dataset, sizes, settings, folder, tokens)
        canvases = found.canvases(settings.image, folder.factor)
        problems += too_short(settings, dataset, settings.eval.parts, folder.family, canvases, tokens)
    problems.sort(key=lambda problem: problem.warning)
    content = {
        **about,
        "model": model,
        "notes": notes,
        "unused": found.unused,
        "parts": {part: part_counts(dataset.part(part)) for part in PARTS},
        "question_types": type_counts(dataset),
        "repeated_questions": repeated(dataset),
        "texts": _texts(dataset, tokens),
        "boxes": _boxes(dataset),
        "images": {
            **_images(found.facts),
            "decoded_now": 0 if headers else found.decoded,
            "unused": _unused(refs.values()),
        },
        "skipped": found.counts,
        "problems": [_problem(problem) for problem in problems],
    }
    wanted = {key for problem in problems for key in problem.images}
    return Findings(content, problems, {key: refs[key] for key in wanted & refs.keys()})


def _problem(problem: Problem) -> dict[str, Any]:
    severity = "warning" if problem.warning else "error"
    images = list(problem.images)
    return {"severity": severity, "place": problem.place, "what": problem.what, "images": images}


def part_counts(examples: Sequence[Example]) -> dict[str, int]:
    """How many questions, images and groups."""
    images = {image.key for example in examples for image in example.images}
    groups = {example.group for example in examples if example.group}
    return {"questions": len(examples), "images": len(images), "groups": len(groups)}


def type_counts(dataset: Dataset) -> dict[str, dict[str, Any]]:
    """Question type → counts, the majority answer, and how often the prior is right without a look.

    The majority is that of all train questions of the type; the prior is that of the scores.
    """
    prior = Prior(dataset.part("train"))
    by_type: dict[str, list[Example]] = defaultdict(list)
    for example in dataset.examples:
        by_type[example.question_type].append(example)
    found = {}
    for kind, examples in sorted(by_type.items()):
        parts = {part: [e for e in examples if e.split == part] for part in PARTS}
        trained = Counter[str]()
        for answer, count in Counter(e.answers[0] for e in parts["train"]).items():
            trained[normalise(answer)] += count
        majority = prior.by_type.get(kind)
        found[kind] = {
            "questions": {part: len(parts[part]) for part in PARTS},
            "answers": len(set(map(normalise, {e.answers[0] for e in examples}))),
            "majority": {
                "answer": majority,
                "share": trained[majority] / trained.total() if majority is not None else None,
            },
            "prior": {part: _right(prior, parts[part]) for part in PARTS},
        }
    return found


def _right(prior: Prior, examples: Sequence[Example]) -> float | None:
    if not examples:
        return None
    alike = Counter((e.question, e.question_type, e.answers) for e in examples)
    right = (count * exact(prior.answer(*asked), answers) for (*asked, answers), count in alike.items())
    return sum(right) / len(examples)


def _tokens_of(folder: Folder | None) -> Callable[[Iterable[str]], dict[str, int]] | None:
    """Return a function from texts to their numbers of tokens; None if the model's tokenizer is not here."""
    if folder is None or not (folder.processor / "tokenizer.json").is_file():
        return None
    from tokenizers import Tokenizer  # brings no torch

    try:
        tokenizer = Tokenizer.from_file(str(folder.processor / "tokenizer.json"))
    except Exception:  # tokenizers has no narrower one; training says what is wrong with the file
        return None

    def count(texts: Iterable[str]) -> dict[str, int]:
        distinct, counts = list(dict.fromkeys(texts)), dict[str, int]()
        for start in range(0, len(distinct), _AT_ONCE):  # signals are handled between batches
            some = distinct[start : start + _AT_ONCE]
            encoded = tokenizer.encode_batch(some, add_special_tokens=False)
            counts |= {text: len(each.ids) for text, each in zip(some, encoded, strict=True)}
        return counts

    return count


def _texts(
    dataset: Dataset, tokens: Callable[[Iterable[str]], dict[str, int]] | None
) -> dict[str, dict[str, dict[str, Any]]]:
    """Lengths of questions and answers in characters, and in tokens where a tokenizer is at hand."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for what in ("question", "answer"):
        texts = [e.question if what == "question" else e.answers[0] for e in dataset.examples]
        units: dict[str, Mapping[str, int]] = {"characters": {text: len(text) for text in texts}}
        if tokens:
            units["tokens"] = tokens(texts)
        if texts:
            found[what] = {unit: _lengths(texts, of, dataset) for unit, of in units.items()}
    return found


def _boxes(dataset: Dataset) -> dict[str, Any]:
    """Return how many boxes were read from texts, by notation, and which coordinates texts keep."""
    notations = Counter(
        region.notation
        for example in dataset.examples
        for region in (*example.asked_regions, *example.regions)
        if region.notation
    )
    kept = [
        (example.place, text)
        for example in dataset.examples
        if (text := left_as_text(example)[0] or next(filter(None, map(in_brackets, example.texts)), ""))
    ]
    return {
        "read": dict(notations.most_common()),
        "left_as_text": {"questions": len(kept), "place": kept[0][0], "text": kept[0][1]} if kept else None,
    }


def _lengths(texts: Sequence[str], of: Mapping[str, int], dataset: Dataset) -> dict[str, Any]:
    lengths = [of[text] for text in texts]
    longest = lengths.index(max(lengths))
    return {
        "min": min(lengths),
        "median": statistics.median_low(lengths),
        "max": max(lengths),
        "longest": dataset.examples[longest].place,
    }


def _too_long(
    dataset: Dataset,
    sizes: Mapping[str, letterbox.Size],
    settings: Recipe,
    folder: Folder,
    tokens: Callable[[Iterable[str]], dict[str, int]],
) -> Iterator[Problem]:
    """Questions that cannot fit a micro-batch whatever the chat template adds."""
    limit = settings.batch.tokens_per_micro_batch
    if limit == "auto":
        return
    canvases: dict[letterbox.Size, int] = {}
    for size in set(sizes.values()):
        canvases[size] = letterbox.canvas_of(size, settings.image, folder.factor).tokens(folder.factor)
    counts = tokens(text for e in dataset.examples for text in (e.question, e.answers[0]))
    most_images = max((len(example.images) for example in dataset.examples), default=0)
    if most_images * max(canvases.values(), default=0) + 2 * max(counts.values(), default=0) <= limit:
        return
    for example in dataset.examples:
        if any(ref.key not in sizes for ref in example.images):
            continue
        of_images = sum(canvases[sizes[ref.key]] for ref in example.images)
        least = of_images + counts[example.question] + counts[example.answers[0]]
        if least > limit:
            yield Problem(
                example.place,
                f"question {example.id!r} cannot fit: at least {least:,} tokens ({of_images:,} of them its "
                f"images) against batch.tokens_per_micro_batch {limit:,}",
            )


def _images(facts: Mapping[str, ImageFacts]) -> dict[str, Any]:
    images = list(facts.values())
    sizes = Counter(image.size for image in images)
    borders = [image.border for image in images if image.border is not None]
    return {
        "count": len(images),
        "width": _range(image.size[0] for image in images),
        "height": _range(image.size[1] for image in images),
        "distinct_sizes": len(sizes),
        "common_sizes": [[*size, count] for size, count in sizes.most_common(5)],
        "formats": dict(Counter(image.format for image in images).most_common()),
        "modes": dict(Counter(image.mode for image in images).most_common()),
        "turned": sum(image.turned for image in images),
        "black_border": {
            "mean": math.fsum(borders) / len(borders),
            "max": max(borders),
            "over_10_percent": sum(share > 0.1 for share in borders),
        }
        if borders
        else None,
    }


def _range(values: Iterable[int]) -> list[int] | None:
    found = list(values)
    return [min(found), max(found)] if found else None


def _unused(refs: Iterable[ImageRef]) -> dict[str, int]:
    """Folder → how many of its image files no question is about, of the folders that hold any that one is."""
    used: dict[Path, set[str]] = defaultdict(set)
    for ref in refs:
        if ref.path:
            used[ref.path.parent].add(ref.path.name)
    counts = {}
    for folder, names in used.items():
        try:
            with os.scandir(folder) as entries:
                there = {e.name for e in entries if Path(e.name).suffix.lower() in _SUFFIXES and e.is_file()}
        except OSError:
            continue
        if unused := len(there - names):
            counts[str(folder)] = unused
    return counts


def _size(content: Mapping[str, Any]) -> str:
    questions = sum(part["questions"] for part in content.get("parts", {}).values())
    images = content.get("images", {}).get("count", 0)
    return f"{questions:,} questions on {images:,} sound images"


def _facts(content: Mapping[str, Any]) -> Iterator[str]:
    """Images and texts in a few lines."""
    images = content.get("images", {})
    if images.get("count"):
        (low, high), (short, tall) = images["width"], images["height"]
        width, height, count = images["common_sizes"][0]
        size = f"all {width}×{height}"
        if images["distinct_sizes"] > 1:
            share = _percent(count / images["count"])
            size = f"{low} to {high} wide, {short} to {tall} high, most often {width}×{height} ({share} %)"
        yield f"images: {size}; {_listed(images['formats'])}; {_listed(images['modes'])}"
        if images["turned"]:
            yield f"images: {images['turned']:,} turned as EXIF says"
        if border := images["black_border"]:
            yield (
                f"images: black border {_percent(border['mean'])} % of the area on average, over 10 % in "
                f"{border['over_10_percent']:,}"
            )
        if unused := images["unused"]:
            yield (
                f"images: {sum(unused.values()):,} more files in {len(unused)} of their folders, which no "
                f"question is about; the first in {next(iter(unused))}"
            )
    for what, units in content.get("texts", {}).items():
        lengths = "; ".join(
            f"{of['min']:,} to {of['max']:,} {unit}, median {of['median']:,}" for unit, of in units.items()
        )
        yield f"{what}s: {lengths}; the longest at {units['characters']['longest']}"
    boxes = content.get("boxes", {})
    if boxes.get("read"):
        yield f"boxes: {sum(boxes['read'].values()):,} read from texts: {_listed(boxes['read'])}"
    if left := boxes.get("left_as_text"):
        yield (
            f"boxes: {left['questions']:,} questions keep coordinates as text, such as {left['text'][:80]!r} "
            f"at {left['place']}"
        )
    if content.get("repeated_questions"):
        yield f"questions: {content['repeated_questions']:,} are there again with the same image and answer"


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _thumbnail(ref: ImageRef) -> str:
    """A small JPEG of an image as a data address; "" where it cannot be shown."""
    try:
        image = letterbox.open_rgb(ref.read())
    except (OSError, ValueError):
        return ""
    image.thumbnail((_THUMB, _THUMB), Image.Resampling.BOX)
    for quality in (75, 50, 25, 5):
        buffer = BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        if buffer.tell() <= _PICTURE_BYTES:
            return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return ""


_PAGES = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
_PAGES.filters["printable"] = printable
_PAGE = _PAGES.from_string(
    """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>Audit of {{ content.recipe | printable }}</title>
<style>
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
h1, p, td, li { overflow-wrap: anywhere; }
table { border-collapse: collapse; }
th, td { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #8884; text-align: left;
         vertical-align: top; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
section { border-left: 4px solid #d9a400; margin: 1.2rem 0; padding: .1rem 1rem; background: #8881; }
section.error { border-color: #d33; }
section h3 { margin: .4rem 0; font-size: 1rem; }
.places { font: 13px monospace; opacity: .8; }
figure { display: inline-block; margin: .4rem .8rem .4rem 0; max-width: 200px; vertical-align: top; }
figure img { display: block; max-width: 200px; border: 1px solid #8888; }
figure div { width: 160px; height: 100px; border: 1px dashed #8888; display: grid; place-items: center;
             opacity: .7; }
figcaption { font-size: 12px; overflow-wrap: anywhere; }
</style>
<h1>Audit of {{ content.recipe | printable }}</h1>
<p>{{ content.date }}, surgvqa {{ content.surgvqa }}. {{ size }}.</p>
{% if content.question_types is defined %}
<h2>Questions</h2>
<table><tr><th>question type{% for part in parts %}<th class="number">{{ part }}{% endfor %}
<th class="number">answers<th>majority in train<th class="number">share %
<th class="number">prior on val %<th class="number">prior on test %</tr>
{% for kind, row in content.question_types.items() %}<tr><td>{{ kind | printable }}
{%- for part in parts %}<td class="number">{{ "{:,}".format(row.questions[part]) }}{% endfor %}
<td class="number">{{ "{:,}".format(row.answers) }}<td>{{ (row.majority.answer or "") | printable }}
<td class="number">{{ percent(row.majority.share) }}
<td class="number">{{ percent(row.prior.val) }}<td class="number">{{ percent(row.prior.test) }}</tr>
{% endfor %}</table>
<p>The prior is the answer that a question gets most often in train, given without a look at the image.</p>
<h2>Images and texts</h2>
<table><tr><th>part<th class="number">questions<th class="number">images<th class="number">groups</tr>
{% for part, row in content.parts.items() %}<tr><td>{{ part }}
<td class="number">{{ "{:,}".format(row.questions) }}
<td class="number">{{ "{:,}".format(row.images) }}
<td class="number">{{ "{:,}".format(row.groups) }}</tr>{% endfor %}
</table>
<ul>{% for fact in facts %}<li>{{ fact | printable }}{% endfor %}
{% for line in content.unused %}<li>{{ line | printable }}{% endfor %}
{% for note in content.notes %}<li>not looked at: {{ note }}{% endfor %}</ul>
{% endif %}
<h2>Problems</h2>
{% for problem in problems %}<section class="{{ problem.severity }}">
<h3>{{ problem.severity }}: {{ problem.what }}</h3>
<p class="places">{{ problem.places | join(", ") }}
{%- if problem.more > 0 %} and {{ problem.more }} more{% endif %}</p>
{% for picture in problem.pictures %}<figure>
{%- if picture.data %}<img src="{{ picture.data }}" alt="">{% else %}<div>cannot be shown</div>{% endif -%}
<figcaption>{{ picture.name }}</figcaption></figure>
{% endfor %}</section>
{% else %}<p>None found.</p>
{% endfor %}</html>
"""
)
