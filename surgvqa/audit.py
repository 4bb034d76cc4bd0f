"""What is wrong with a data set, found before a model is loaded.

    Dataset ── audit ──▶ Audit(problems, facts)        problems ── report ──▶ text

Every distinct image is decoded once, completely, as training will decode it (see `scan`). The sizes that this
yields are what canvases, and so token counts, are planned from.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from surgvqa import datasets, scores
from surgvqa.augment import Placement
from surgvqa.datasets import Dataset, Example, ImageRef, Problem, splits
from surgvqa.grounding import (
    as_rows,
    decide_units,
    left_as_text,
    misplaced,
    moves,
    on_canvases,
    with_units,
    write_answer,
)
from surgvqa.letterbox import Canvas, Rectangle, Size, canvas_of, check_aspect
from surgvqa.metrics import Prediction, normalise
from surgvqa.recipe import Image, Part, Recipe, printable
from surgvqa.scan import ImageFacts, alike, near, scan

PARTS: tuple[Part, ...] = get_args(Part)

_ALIKE = 20
"""So many rows with the same problem are listed one by one."""

_SHOWN = 5
"""How many of a long list a message names."""

_PICTURES = 12
"""How many of the images concerned a problem names for a page to show."""

NEAR = 4
"""Bits of 64 in which the perceptual hashes of copies of a picture differ at most."""

JUNK = frozenset({"nan", "null", "n/a", "#n/a", "na", "undefined", "-", "--", "?", "."})
"""Texts that stand for a missing value, in lower case."""

RARE_NONE = 0.01
"""Where `none` is a smaller share than this of a question type's answers it may be no answer but a gap."""


@dataclass(frozen=True)
class Audit:
    problems: list[Problem]
    """The data set's own and those found here, errors first."""
    facts: dict[str, ImageFacts]
    """Image key → what it is; only of images that are sound."""
    decoded: int
    """How many images had to be looked at; the others were remembered from before."""
    skipped: list[Problem] = field(default_factory=list)
    """What `data.on_error: skip` left out, each also a warning among the problems."""
    left_out: frozenset[str] = frozenset()
    """Ids of questions that were read well but left out since of an image or a text of theirs."""
    units: dict[str, str] = field(default_factory=dict)
    """Recipe key that leaves the unit of boxes in texts open → the unit that the data proves."""
    counts: dict[str, int] = field(default_factory=dict)
    """How much was left out: rows for what they say, images, and the questions about those."""
    notes: list[str] = field(default_factory=list)
    """What was not looked at, and why."""
    unused: list[str] = field(default_factory=list)
    """Unused data: see `Dataset.unused`."""

    @property
    def sizes(self) -> dict[str, Size]:
        """Image key → width and height in pixels, EXIF orientation applied."""
        return {key: facts.size for key, facts in self.facts.items()}

    @property
    def pictures(self) -> dict[str, Rectangle]:
        """Image key → the part of it without a black border, where it was decoded."""
        return {key: facts.picture for key, facts in self.facts.items() if facts.picture}

    @property
    def digests(self) -> dict[str, str]:
        """Image key → SHA-256 of its bytes, where it was read whole."""
        return {key: facts.digest for key, facts in self.facts.items() if facts.digest}

    def canvases(self, settings: Image, factor: int) -> dict[str, Canvas]:
        """Return image key → canvas, as a recipe's `image` says; see `Folder.factor`."""

        @functools.cache  # most images of a data set have the same size
        def canvas(size: Size, picture: Rectangle | None) -> Canvas:
            return canvas_of(size, settings, factor, picture)

        return {key: canvas(facts.size, facts.picture) for key, facts in self.facts.items()}

    def kept(self, dataset: Dataset) -> Dataset:
        """Return the data without what is left out, and with the units of all boxes decided."""
        examples = (example for example in dataset.examples if example.id not in self.left_out)
        return replace(dataset, examples=[with_units(example, self.units) for example in examples])


def load_and_audit(
    recipe: Recipe,
    special_tokens: Collection[str] = (),
    *,
    evaluated: Collection[Part] | None = None,
    headers: bool = False,
    progress: bool = False,
) -> tuple[Dataset, Audit]:
    """A recipe's data and what is wrong with it. Raises BadInput where it cannot be read at all.

    `evaluated` are the parts to be evaluated; None for the recipe's own. `headers`: images are not decoded.
    """
    dataset, trains = datasets.load(recipe.data, progress=progress), evaluated is None
    found = audit(
        dataset,
        mode=recipe.image.mode,
        crop=recipe.image.crop,
        augment=recipe.image.augment,
        by=splits.unit(recipe.data.split),
        special_tokens=special_tokens,
        trains=trains,
        skip=recipe.data.on_error == "skip",
        headers=headers,
        progress=progress,
    )
    dataset = found.kept(dataset)
    problems = [*_final(recipe, dataset)] if trains else []
    evaluated = recipe.eval.parts if evaluated is None else evaluated
    problems += [*_prompts(recipe, dataset, special_tokens), *_labels(recipe, dataset, evaluated)]
    if recipe.eval.every is not None and trains:
        problems += _judged(recipe, dataset)
    if recipe.batch.order == "stages":
        problems += _unstaged(dataset.part("train"), "batch.order: stages")
    if recipe.train.cascade:
        problems += _unstaged(dataset.part("train"), "train.cascade")
    if recipe.eval.cascade != "none":
        asked = [example for part in sorted(evaluated) for example in dataset.part(part)]
        problems += _unstaged(asked, f"eval.cascade: {recipe.eval.cascade}")
    problems = sorted([*found.problems, *problems], key=lambda problem: problem.warning)
    return dataset, replace(found, problems=problems)


def _final(recipe: Recipe, dataset: Dataset) -> Iterator[Problem]:
    """A part to evaluate at the end that has nothing to evaluate."""
    final = recipe.eval.final
    if final and dataset.examples and not dataset.part(final):
        what = f"the {final} part holds no questions: there will be no final scores; set another, or null"
        yield Problem("eval.final", what, warning=True)


def _judged(recipe: Recipe, dataset: Dataset) -> Iterator[Problem]:
    """Questions that training cannot be judged by: there are none, or eval.metric does not apply to them."""
    settings = recipe.eval
    examples = splits.drawn(dataset.part(settings.split), settings.questions)
    if not examples:
        if dataset.examples:
            yield Problem(
                "eval.every",
                f"the {settings.split} part holds no questions to evaluate on; set eval.every: null, or "
                "data.split.by to image or group with enough in data.split.val",
            )
        return
    if settings.metric in ("exact", "loss"):
        return
    if why := scores.why_not(settings.metric, [_as_expected(recipe, example) for example in examples]):
        labels = settings.metric in ("ece", "auroc") and settings.answers != "labels"
        yield Problem(
            "eval.metric",
            f"{settings.metric} does not apply to the {_count(len(examples), 'question')} of "
            f"{settings.split}: {why}; {'set eval.answers: labels, or ' if labels else ''}"
            "choose another, such as exact or loss",
        )


def _as_expected(recipe: Recipe, example: Example) -> Prediction:
    """A question as it could be answered: with one of its labels where it has to be, else as expected."""
    labels = closed_set(recipe, example) if recipe.eval.answers == "labels" else ()
    return Prediction.of(
        example,
        labels[0] if labels else example.answers[0],
        probabilities={label: 1 / len(labels) for label in labels} or None,
        reference_regions=as_rows(example.regions) or None,
    )


def _prompts(recipe: Recipe, dataset: Dataset, special_tokens: Collection[str]) -> Iterator[Problem]:
    """Instructions and labels for types that the data does not have, and texts that would break
    conversations."""
    types = {example.question_type for example in dataset.examples}
    by_type: dict[str, Mapping[str, str | Sequence[str]]]
    by_type = {"prompt.instructions": recipe.prompt.instructions, "data.labels": recipe.data.labels}
    for place, given in by_type.items():
        unused = sorted(given.keys() - types)
        if unused and types:
            what = f"no question has the type {_some(unused)}; the data has {', '.join(sorted(types))}"
            yield Problem(place, what, warning=True)
    texts = {
        f"{place}.{kind}": text if isinstance(text, str) else " ".join(text)
        for place, given in by_type.items()
        for kind, text in given.items()
    }
    for place, text in {**texts, "prompt.system": recipe.prompt.system or ""}.items():
        for token in sorted(special_tokens):
            if token in text:
                yield Problem(place, f"holds the special token {token}, which would break the conversation")


def _unstaged(examples: Iterable[Example], key: str) -> Iterator[Problem]:
    """Questions that what goes by stages has no place for."""
    for example in examples:
        if example.stage is None:
            yield Problem(example.place, f"has no stage, which {key} needs")


def closed_set(recipe: Recipe, example: Example) -> Sequence[str]:
    """The answers that a question can have: those the recipe gives for its type, else its corpus's."""
    return recipe.data.labels.get(example.question_type) or example.labels


def _labels(recipe: Recipe, dataset: Dataset, evaluated: Collection[Part]) -> Iterator[Problem]:
    """Types without a closed set of answers where one is needed, and answers outside of theirs.

    An answer outside is an error where it is to be chosen: it could never be right. Elsewhere it is a
    warning, of the sets that the recipe gives.
    """
    groups: dict[tuple[str, bool, tuple[str, ...]], list[Example]] = defaultdict(list)
    for example in dataset.examples:
        kind = example.question_type
        chosen = recipe.eval.answers == "labels" and example.split in evaluated
        labels = closed_set(recipe, example) if chosen else recipe.data.labels.get(kind, ())
        groups[kind, chosen, tuple(labels)].append(example)
    boxed = [e for e in dataset.examples if e.regions and e.split in evaluated]
    if recipe.eval.answers == "labels" and boxed:
        yield Problem(
            "eval.answers",
            f"labels cannot answer with boxes, as {_count(len(boxed), 'question')} should (the first at "
            f"{boxed[0].place}); set eval.answers: generate",
        )
    for kind, given in recipe.data.labels.items():
        counts = Counter(map(normalise, given))
        if alike := [label for label in given if counts[normalise(label)] > 1]:
            yield Problem(f"data.labels.{kind}", f"{_some(alike)} count as the same answer; keep one of each")
    without = []
    for (kind, chosen, labels), examples in sorted(groups.items()):
        if not labels:
            without += [kind] * chosen
            continue
        known = set(map(normalise, labels))
        right = {each: not known.isdisjoint(map(normalise, each)) for each in {e.answers for e in examples}}
        outside = [example for example in examples if not right[example.answers]]
        if outside:
            counts = Counter(example.answers[0] for example in outside)
            what = f"{_count(len(outside), 'answer')} of the type {kind} not among its labels"
            cure = ", and so never right; mend data.labels or the data, or set eval.answers: generate"
            yield Problem(outside[0].place, f"{what}: {_counted(counts)}{cure * chosen}", warning=not chosen)
    if without:
        yield Problem(
            "eval.answers",
            f"labels needs a closed set of answers of every question type; {', '.join(without)} "
            f"{'has' if len(without) == 1 else 'have'} none. List the answers of each in the recipe, as "
            f"data.labels.{without[0]}, or set eval.answers: generate",
        )


def too_short(
    recipe: Recipe,
    dataset: Dataset,
    parts: Collection[Part],
    family: str,
    canvases: Mapping[str, Placement],
    count: Callable[[Iterable[str]], Mapping[str, int]],
) -> Iterator[Problem]:
    """Yield a warning for each part to evaluate in which `eval.max_new_tokens` cuts right answers.

    A question counts if none of its references fits, each with its boxes as the family writes them and its
    end of turn: then no answer of the model can be right. `count` returns text → number of tokens. Answers
    chosen among labels are never cut.
    """
    limit = recipe.eval.max_new_tokens
    for part in PARTS if recipe.eval.answers == "generate" else ():
        examples = dataset.part(part) if part in parts else []
        texts = [_written(example, family, canvases) for example in examples]
        tokens = count(text for own in texts for text in own)
        lengths = [[tokens[text] + 1 for text in own] for own in texts]
        long = [place for place, own in enumerate(lengths) if min(own) > limit]
        if long:
            needed = max(max(lengths[place]) for place in long)
            what = (
                f"{limit} cuts every right answer to {len(long)} of {_count(len(examples), 'question')} of "
                f"{part}: they have up to {needed} tokens with their end of turn, the first at "
                f"{examples[long[0]].place}; set {needed} or more"
            )
            yield Problem("eval.max_new_tokens", what, warning=True)


def _written(example: Example, family: str, canvases: Mapping[str, Placement]) -> list[str]:
    """Return an example's references as the model would write them, with their boxes."""
    answers = [answer.strip() for answer in example.answers]
    if not example.regions or not all(image.key in canvases for image in example.images):
        return answers
    boxes = on_canvases(example, example.regions, canvases)
    return [
        write_answer(family, answer, boxes, len(example.images), layout=example.layout if number == 0 else "")
        for number, answer in enumerate(answers)
    ]


def audit(
    dataset: Dataset,
    *,
    mode: str,
    crop: str = "none",
    augment: str = "none",
    by: str = "official",
    special_tokens: Collection[str] = (),
    trains: bool = True,
    skip: bool = False,
    headers: bool = False,
    progress: bool = False,
) -> Audit:
    """Check parts, leaks, answers and every image; nothing is raised for what is wrong with the data.

    `mode`, `crop` and `augment` are the recipe's of `image`, and `by` what its split keeps together: a split
    by image may put a group in two parts, which is a warning then. Texts that hold one of the model's
    `special_tokens` are errors. Data without questions to train on is an error only if it `trains`. With
    `skip` bad rows, and questions about bad images, are left out and become warnings; everything else is
    checked without them. `headers` and `progress` are those of `scan`.
    """
    uses: dict[str, list[Example]] = defaultdict(list)
    refs: dict[str, ImageRef] = {}
    for example in dataset.examples:
        for ref in example.images:
            refs.setdefault(ref.key, ref)
            uses[ref.key].append(example)
    found = scan(refs.values(), headers=headers, progress=progress)
    faults = {**found.faults, **(_too_long(found.found, crop) if mode == "native" else {})}
    rows = [problem for problem in dataset.problems if not (problem.warning or problem.whole)]
    sizes = {key: facts.size for key, facts in found.found.items()}
    pictures = {key: facts.picture for key, facts in found.found.items() if facts.picture}
    units, of_units = decide_units(dataset.examples, sizes)
    dataset = replace(dataset, examples=[with_units(example, units) for example in dataset.examples])
    uses = {key: [with_units(example, units) for example in examples] for key, examples in uses.items()}
    moved = functools.partial(_moved, mode=mode, crop=crop, augment=augment, sizes=sizes, pictures=pictures)
    special = {
        **dict(_boxes_left(dataset, moved)),
        **dict(_boxes(dataset, sizes, pictures if crop == "border" else {})),
        **dict(_special(dataset, special_tokens)),
    }
    broken = [_broken(key, why, uses[key]) for key, why in faults.items()]
    skipped: list[Problem] = []
    left_out: set[str] = set()
    counts = {"rows": 0, "images": 0, "questions": 0}
    if skip:
        skipped = [*rows, *special.values(), *broken]
        about_faults = {example.id for key in faults for example in uses[key]}
        left_out = {*special, *about_faults}
        places = {problem.place for problem in (*rows, *special.values())}
        counts = {
            "rows": len(places),
            "images": len(faults),
            "questions": len(about_faults - special.keys()),
        }
        if skipped:
            dataset = replace(dataset, examples=[e for e in dataset.examples if e.id not in left_out])
            used = {image.key for example in dataset.examples for image in example.images}
            uses = {k: [e for e in uses[k] if e.id not in left_out] for k in uses if k in used}
    facts = {key: facts for key, facts in found.found.items() if key in uses and key not in faults}
    left = {id(problem) for problem in skipped}
    problems = [
        replace(problem, what=f"{problem.what}; left out", warning=True) if id(problem) in left else problem
        for problem in (*dataset.problems, *broken, *special.values())
    ]
    if skipped and not dataset.examples:
        problems.append(Problem("data.on_error", "skip leaves out everything; mend the data", whole=True))
    problems += _parts(dataset, trains)
    problems += _leaks(uses, by, dataset.leaky)
    problems += _copies(facts, uses, dataset.leaky)
    copies, unlooked = _near(facts, uses, refs)
    problems += copies
    problems += _junk(dataset)
    problems += _boxes_alone(dataset)
    problems += of_units
    problems += _unseen_answers(dataset)
    problems += _spellings(dataset)
    problems += _conflicts(dataset)
    problems.sort(key=lambda problem: problem.warning)
    if found.unkept:
        what = f"cannot be written, so the images will be decoded again next time: {found.unkept}"
        problems.append(Problem("$SURGVQA_CACHE", what, warning=True))
    notes, unused = [*_unseen(facts), *unlooked], list(dataset.unused)
    return Audit(problems, facts, found.decoded, skipped, frozenset(left_out), units, counts, notes, unused)


def _too_long(found: Mapping[str, ImageFacts], crop: str) -> dict[str, str]:
    """Image key → what is wrong with it in mode `native`."""
    faults = {}
    for key, facts in found.items():
        try:
            x1, y1, x2, y2 = (crop == "border" and facts.picture) or (0, 0, *facts.size)
            check_aspect((x2 - x1, y2 - y1))
        except ValueError as error:
            faults[key] = str(error)
    return faults


def _unseen(facts: Mapping[str, ImageFacts]) -> Iterator[str]:
    """What was not looked at."""
    headers = sum(image.digest is None for image in facts.values())
    if headers:
        yield (
            f"of {_count(headers, 'image')} only the headers were read: damage behind them, copies, black "
            "borders and near-identical images were not looked for"
        )
    elif any(image.phash is None for image in facts.values()):
        yield "near-identical images were not looked for; for that: pip install 'surgvqa[audit]'"


def report(problems: Iterable[Problem], name: str = "") -> str:
    """The problems as text: errors first, each on one line, and a last line with how many there are, behind
    the name of what has them."""
    ordered = sorted(problems, key=lambda problem: problem.warning)
    lines = [
        f"{kind}: {line}"
        for kind, is_warning in (("error", False), ("warning", True))
        for line in condensed(problem for problem in ordered if problem.warning == is_warning)
    ]
    warnings = sum(problem.warning for problem in ordered)
    counts = f"{_count(len(ordered) - warnings, 'error')}, {_count(warnings, 'warning')}"
    return "\n".join([*lines, f"{name}: {counts}" if name else counts])


_NAMES = re.compile(r"'[^']*'|\"[^\"]*\"")
"""What problems of the same kind differ in."""


def condensed(problems: Iterable[Problem]) -> list[str]:
    """Problems as lines; of over 20 rows with the same one, whatever names are in it, the first, the place of
    the last and how many there are."""
    alike: dict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        alike[_NAMES.sub("", problem.what)].append(problem)
    lines = []
    for same in alike.values():
        if len(same) > _ALIKE:
            lines.append(f"{same[0]} (and {len(same) - 1} more rows, the last at {same[-1].place})")
        else:
            lines += map(str, same)
    return [printable(line) for line in lines]


def _broken(key: str, why: str, examples: Sequence[Example]) -> Problem:
    places = ", ".join(example.place for example in examples[:3]) + (", ..." if len(examples) > 3 else "")
    return Problem(f"image {key}", f"{why} ({_count(len(examples), 'question')}: {places})", images=(key,))


def _special(dataset: Dataset, tokens: Collection[str]) -> Iterator[tuple[str, Problem]]:
    """Ids of questions whose text holds a special token, and the problem."""
    ordered = sorted(tokens)

    @functools.lru_cache(maxsize=2**16)  # most texts come many times
    def held(text: str) -> tuple[str, ...]:
        return tuple(token for token in ordered if token in text)

    for example in dataset.examples if ordered else ():
        if found := [token for text in example.texts for token in held(text)]:
            what = f"holds the special token {min(found)}, which would break the conversation"
            yield example.id, Problem(example.place, what)


def _boxes(
    dataset: Dataset, sizes: Mapping[str, Size], pictures: Mapping[str, Rectangle]
) -> Iterator[tuple[str, Problem]]:
    """Ids of questions with boxes that are empty, reach out of their image, or do not fit the question's
    places for them, and the problem."""
    for example in dataset.examples:
        if not (example.asked_regions or example.regions):
            continue
        if wrong := misplaced(example, sizes, pictures):
            yield example.id, Problem(example.place, "; ".join(wrong))


def _moved(
    example: Example,
    *,
    mode: str,
    crop: str,
    augment: str,
    sizes: Mapping[str, Size],
    pictures: Mapping[str, Rectangle],
) -> bool:
    """Return whether canvas or augmentation moves what an example's images show: see `grounding.moves`."""
    if augment != "none" and example.split == "train":
        return True
    return any(
        moves(image.key, mode, crop, sizes, pictures) for image in example.images if image.key in sizes
    )


def _boxes_left(dataset: Dataset, moved: Callable[[Example], bool]) -> Iterator[tuple[str, Problem]]:
    """Yield the ids of questions whose texts keep coordinates of something that the canvas moves, each with
    its problem.
    """
    for example in dataset.examples:
        text, marked = left_as_text(example)
        if not text or not moved(example):
            continue
        what = f"{text[:80]!r} stays text, but image.mode, crop or augment moves what it points at"
        if marked:
            cure = (
                "if it is a box, set data.variant: marked and write it as docs/datasets.md has it; points, "
                "polygons and boxes that are to stay text need image.mode: native without crop and augment"
            )
        else:
            cure = (
                "if it is a box, set data.variant: boxes and data.boxes, else data.variant: marked "
                "(for format hub, whose variants are subsets, on a copy in Parquet)"
            )
        yield example.id, Problem(example.place, f"{what}; {cure}", images=(example.images[0].key,))


def _boxes_alone(dataset: Dataset) -> Iterator[Problem]:
    """Answers without words, of which exact match says nothing."""
    alone = [example for example in dataset.examples if example.regions and not example.answers[0].strip()]
    if alone:
        what = f"{_count(len(alone), 'answer')} of boxes without words: any boxes are an exact match, see iou"
        yield Problem(alone[0].place, what, warning=True)


def _parts(dataset: Dataset, trains: bool) -> Iterator[Problem]:
    for part in PARTS if dataset.examples else ():  # without any the reasons have been told
        if not dataset.part(part):
            yield Problem(part, "holds no questions", warning=part != "train" or not trains)


def _leaks(uses: Mapping[str, Sequence[Example]], by: str, leaky: bool) -> Iterator[Problem]:
    """Images or groups with questions in more than one part; a group also where two data sets have it.

    In a `leaky` split these are warnings.
    """
    of_image: _Parts = {key: _first_of_parts(examples) for key, examples in uses.items()}
    of_group: _Parts = defaultdict(dict)
    for examples in uses.values():
        for example in examples:
            if example.group and example.group not in uses:  # a group that is an image is told of as one
                of_group[example.group].setdefault(example.split, example)
    cure = "the test would be on what was trained on; set data.split.by to group, or mend the split"
    yield from _leak("images", of_image, cure, warning=leaky)
    yield from _leak("groups", of_group, cure, warning=leaky or by == "image")


_Parts = dict[str, dict[Part | None, Example]]
"""Name of an image or a group → parts that it is in, each with the first of its questions there."""


def _first_of_parts(examples: Iterable[Example]) -> dict[Part | None, Example]:
    first: dict[Part | None, Example] = {}
    for example in examples:
        first.setdefault(example.split, example)
    return first


def _leak(what: str, parts_of: _Parts, cure: str, warning: bool) -> Iterator[Problem]:
    leaking = [name for name, parts in parts_of.items() if len(parts.keys() - {None}) > 1]
    if leaking:
        counts = Counter(" and ".join(part for part in PARTS if part in parts_of[name]) for name in leaking)
        between = "; ".join(f"{count} in {parts}" for parts, count in counts.items())
        first = parts_of[leaking[0]]
        where = ", ".join(f"{part} at {first[part].place}" for part in PARTS if part in first)
        what = (
            f"{len(leaking)} of {len(parts_of)} {what} are in two parts or more ({between}): "
            f"{_some(leaking)}; the first in {where}"
        )
        shown = (example.images[0].key for name in leaking for example in parts_of[name].values())
        yield Problem("split", f"{what}; {cure}", warning, images=_few(shown))


_SOURCE = re.compile(r"(\d+//)?")
"""What `datasets.load` puts before the images of a further data set."""


def _copies(
    facts: Mapping[str, ImageFacts], uses: Mapping[str, Sequence[Example]], leaky: bool
) -> Iterator[Problem]:
    """Images under different names but with the same bytes, in more than one part."""
    names: dict[str, list[str]] = defaultdict(list)
    for key, image in facts.items():
        if image.digest:
            names[image.digest].append(key)
    leaking = []
    for first, *others in names.values():
        parts = {example.split for example in uses[first]}
        elsewhere = [key for key in others if any(example.split not in parts for example in uses[key])]
        leaking += [(first, key) for key in elsewhere[:1]]
    # The same data set read twice is a mistake; a few pictures that a data set holds twice are its own.
    twice = [pair for pair in leaking if len({_SOURCE.match(key)[0] for key in pair}) > 1]  # type: ignore[index]  # matches all
    for pairs, warning in ((twice, leaky), ([pair for pair in leaking if pair not in twice], True)):
        if pairs:
            listed = _some([f"{first} = {key}" for first, key in pairs])
            what = f"{_count(len(pairs), 'picture')} in two parts or more under different names: {listed}"
            if not warning:
                what += "; two data sets share them: split by group, with the same group in both"
            yield Problem("split", what, warning, images=_few(key for pair in pairs for key in pair))


_CANDIDATES = 8
"""Number of images, those with the nearest hashes, whose pixels are compared with those of one image."""


def _near(
    facts: Mapping[str, ImageFacts], uses: Mapping[str, Sequence[Example]], refs: Mapping[str, ImageRef]
) -> tuple[list[Problem], list[str]]:
    """Return warnings of images in val or test that are copies of one in another part with other bytes, and
    notes on images that were not compared.

    Candidates have perceptual hashes within NEAR bits; `scan.alike` compares their pixels. A copy with other
    compression, size or brightness is found; the next frame of a video only if nothing has moved. A copy
    cropped by a twentieth is not found.
    """
    names: dict[str, list[str]] = {part: [] for part in PARTS}
    for key, image in facts.items():
        if image.phash:
            names[uses[key][0].split or "train"].append(key)
    found: list[tuple[Part, list[Part], list[tuple[str, str, int]]]] = []
    for part, earlier in _EARLIER.items():
        own, others = names[part], [key for other in earlier for key in names[other]]
        ours, theirs = ([facts[key].phash or "" for key in keys] for keys in (own, others))
        pairs = [(own[a], others[b], bits) for a, b, bits in near(ours, theirs, NEAR, _CANDIDATES)]
        pairs = [pair for pair in pairs if facts[pair[0]].digest != facts[pair[1]].digest]
        found.append((part, earlier, sorted(pairs, key=lambda pair: pair[2])))
    every = [pair for _, _, pairs in found for pair in pairs]
    verdicts = (
        iter(alike([(refs[one], refs[other]) for one, other, _ in every], facts)) if every else iter(())
    )
    problems, unknown = [], set()
    for part, earlier, pairs in found:
        copies: dict[str, str] = {}
        for (key, other, _), verdict in zip(pairs, verdicts, strict=False):
            if verdict:
                copies.setdefault(key, other)
            elif verdict is None:
                unknown.add(key)
        unknown -= copies.keys()
        if copies:
            listed = _some([f"{key} ~ {other}" for key, other in copies.items()])
            what = (
                f"{len(copies)} of {len(names[part])} images are copies of one of {' or '.join(earlier)}, "
                f"saved again (the same picture by perceptual hash and pixels): {listed}"
            )
            shown = _few(key for pair in copies.items() for key in pair)
            problems.append(Problem(part, what, warning=True, images=shown))
    notes = []
    if unknown:
        notes.append(
            f"whether {_count(len(unknown), 'image')} with a hash like one of another part show the same "
            "picture; the next check goes on with them"
        )
    return problems, notes


_EARLIER: dict[Part, list[Part]] = {"val": ["train"], "test": ["train", "val"]}


def _junk(dataset: Dataset) -> Iterator[Problem]:
    """Questions and answers that stand for a missing value."""
    odd_questions = {text for text in {e.question for e in dataset.examples} if _is_junk(text)}
    odd_answers = {text for text in {e.answers[0] for e in dataset.examples} if _is_junk(text)}
    if not (odd_questions or odd_answers):
        return
    kinds = Counter(example.question_type for example in dataset.examples)
    nones = Counter(
        example.question_type for example in dataset.examples if example.answers[0].lower() == "none"
    )
    found: dict[str, list[tuple[str, Example]]] = defaultdict(list)
    for example in dataset.examples:
        kind, answer = example.question_type, example.answers[0]
        if example.question in odd_questions:
            found["question"].append((example.question, example))
        # "none" is what many data sets say where there is nothing to name, but then they say it often.
        often = answer.lower() == "none" and nones[kind] >= RARE_NONE * kinds[kind]
        if answer in odd_answers and not often:
            found["answer"].append((answer, example))
    for what, rows in found.items():
        counts = _counted(Counter(text for text, _ in rows))
        verb = "stands" if len(rows) == 1 else "stand"
        told = f"{_count(len(rows), what)} that {verb} for a missing value: {counts}"
        yield Problem(rows[0][1].place, told, warning=True)


def _is_junk(text: str) -> bool:
    return text.lower() in JUNK or text.lower() == "none"


def _unseen_answers(dataset: Dataset) -> Iterator[Problem]:
    """Answers of val and test that training cannot teach."""
    trained = set(map(normalise, {example.answers[0] for example in dataset.part("train")}))
    for part in PARTS[1:]:
        examples = dataset.part(part)
        unseen = Counter[str]()
        for answers, count in Counter(example.answers for example in examples).items():
            if trained.isdisjoint(map(normalise, answers)):
                unseen[answers[0]] += count
        if trained and unseen:
            have = "has" if unseen.total() == 1 else "have"
            what = f"{unseen.total()} of {len(examples)} questions {have} an answer never seen in train"
            yield Problem(part, f"{what}: {_counted(unseen)}", warning=True)


def _spellings(dataset: Dataset) -> Iterator[Problem]:
    """Yield a warning for each question type with answers that differ only in case or punctuation.

    Exact match, the prior and class weights count them as different. Answers that the corpus's own closed
    set holds side by side are no such case.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    first: dict[tuple[str, str], Example] = {}
    labels = {normalise(label) for own in {example.labels for example in dataset.examples} for label in own}
    for example in dataset.examples:
        for answer in map(normalise, example.answers):
            if answer.lower() in JUNK:  # `_junk` warns of it
                continue
            counts[example.question_type][answer] += 1
            first.setdefault((example.question_type, answer), example)
    for kind, answers in sorted(counts.items()):
        forms: dict[str, list[str]] = defaultdict(list)
        for answer, _ in answers.most_common():
            forms[_letters(answer)].append(answer)
        several = [same for same in forms.values() if len(same) > 1 and not labels.issuperset(same)]
        if several:
            listed = "; ".join(
                " and ".join(f"{answer!r} ({answers[answer]})" for answer in same)
                for same in several[:_SHOWN]
            )
            more = "; ..." if len(several) > _SHOWN else ""
            what = (
                f"{_count(len(several), 'answer')} of the type {kind} written in ways that differ only in "
                f"case or punctuation, which exact match tells apart: {listed}{more}; write each in one way"
            )
            yield Problem(first[kind, several[0][1]].place, what, warning=True)


def _letters(answer: str) -> str:
    """Return an answer without case, blanks and punctuation. Those beside a digit stay: 1.5 is not 15."""
    text = answer.casefold()
    return (
        "".join(
            letter
            for place, letter in enumerate(text)
            if not (letter == " " or unicodedata.category(letter).startswith("P"))
            or any(beside.isdigit() for beside in (text[place - 1 : place], text[place + 1 : place + 2]))
        )
        or text
    )


def _conflicts(dataset: Dataset) -> Iterator[Problem]:
    """Questions asked twice about one image, with different answers."""
    _, first, number = np.unique(_asked(dataset), return_index=True, return_inverse=True)
    answer = _numbered(example.answers[0] for example in dataset.examples)
    others = np.flatnonzero(answer != answer[first][number])
    conflicting = [dataset.examples[index] for index in np.unique(first[number[others]]).tolist()]
    if conflicting:
        listed = ", ".join(f"{e.question!r} on {e.image_key} at {e.place}" for e in conflicting[:_SHOWN])
        more = ", ..." if len(conflicting) > _SHOWN else ""
        what = f"{_count(len(conflicting), 'question')} asked again about the same image, with another answer"
        shown = _few(example.images[0].key for example in conflicting)
        yield Problem("answers", f"{what}: {listed}{more}", warning=True, images=shown)


def repeated(dataset: Dataset) -> int:
    """Return how many questions repeat another about the same image, with the same answer."""
    asked = np.column_stack([_asked(dataset), _numbered(e.answers[0] for e in dataset.examples)])
    return len(asked) - len(np.unique(asked, axis=0))


def _asked(dataset: Dataset) -> NDArray[np.int64]:
    """Return (questions,) numbers, equal for questions that ask the same about the same image."""
    questions = _numbered((e.question, e.asked_regions) for e in dataset.examples)
    distinct = int(questions.max(initial=0)) + 1
    return _numbered(e.image_key for e in dataset.examples) * distinct + questions


def _numbered(values: Iterable[Hashable]) -> NDArray[np.int64]:
    """Return (values,) the number of each value among the distinct ones, in order of first appearance."""
    numbers: dict[Hashable, int] = {}
    return np.fromiter((numbers.setdefault(value, len(numbers)) for value in values), np.int64)


def _few(keys: Iterable[str]) -> tuple[str, ...]:
    return tuple(itertools.islice(dict.fromkeys(keys), _PICTURES))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _counted(answers: Counter[str]) -> str:
    listed = ", ".join(f"{answer!r} ({count})" for answer, count in answers.most_common(_SHOWN))
    return listed + (", ..." if len(answers) > _SHOWN else "")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
