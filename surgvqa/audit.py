"""What is wrong with a data set, found before a model is loaded.

    Dataset ── audit ──▶ Audit(problems, sizes)        problems ── report ──▶ text

Every distinct image is decoded once, completely, as training will decode it. The sizes that this yields are
what canvases, and so token counts, are planned from.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import get_args

from surgvqa import datasets
from surgvqa.datasets import Dataset, Example, ImageRef, Problem
from surgvqa.grounding import misplaced
from surgvqa.letterbox import Size, check_aspect, open_rgb
from surgvqa.metrics import normalise
from surgvqa.recipe import Part, Recipe, printable

PARTS: tuple[Part, ...] = get_args(Part)

_ALIKE = 20
"""So many rows with the same problem are listed one by one."""

_SHOWN = 5
"""How many of a long list a message names."""


@dataclass(frozen=True)
class Audit:
    problems: list[Problem]
    """The data set's own and those found here, errors first."""
    sizes: dict[str, Size]
    """Image key → width and height in pixels, EXIF orientation applied; only of images that are sound."""
    digests: dict[str, str]
    """Image key → SHA-256 of its bytes, of the same images."""


def load_and_audit(
    recipe: Recipe,
    special_tokens: Collection[str] = (),
    *,
    evaluated: Collection[Part] | None = None,
    progress: bool = False,
) -> tuple[Dataset, Audit]:
    """A recipe's data and what is wrong with it. Raises BadInput where it cannot be read at all.

    `evaluated` are the parts to be evaluated; None for the recipe's own.
    """
    dataset = datasets.load(recipe.data)
    evaluated = recipe.eval.parts if evaluated is None else evaluated
    found = [*_prompts(recipe, dataset, special_tokens), *_labels(recipe, dataset, evaluated)]
    dataset = Dataset(dataset.examples, [*dataset.problems, *found])
    by, mode = recipe.data.split.by, recipe.image.mode
    return dataset, audit(dataset, mode=mode, by=by, special_tokens=special_tokens, progress=progress)


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
        outside = [example for example in examples if known.isdisjoint(map(normalise, example.answers))]
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


@dataclass(frozen=True, slots=True)
class _Image:
    size: Size
    digest: str


def audit(
    dataset: Dataset,
    *,
    mode: str,
    by: str = "official",
    special_tokens: Collection[str] = (),
    progress: bool = False,
) -> Audit:
    """Check parts, leaks, answers and every image; nothing is raised for what is wrong with the data.

    `mode` is the recipe's image.mode and `by` its data.split.by: a split by image may put a group in two
    parts, which is a warning then. Texts that hold one of the model's `special_tokens` are errors.
    `progress` shows a bar on stderr. Images are decoded in one thread per core, so as many are in memory
    at once.
    """
    uses: dict[str, list[Example]] = defaultdict(list)
    refs: dict[str, ImageRef] = {}
    for example in dataset.examples:
        for ref in example.images:
            refs.setdefault(ref.key, ref)
            uses[ref.key].append(example)

    def check(ref: ImageRef) -> _Image | str:
        try:
            data = ref.read()
            image = open_rgb(data)
            if mode == "native":
                check_aspect(image.size)
        except OSError as error:
            return f"cannot be read: {error.strerror or error}"
        except ValueError as error:
            return str(error)
        return _Image(image.size, hashlib.sha256(data).hexdigest())

    found: dict[str, _Image] = {}
    problems = list(dataset.problems)
    with ThreadPoolExecutor(_cores()) as pool:
        results = _shown(pool.map(check, refs.values()), len(refs), progress)
        for key, result in zip(refs, results, strict=True):
            if isinstance(result, _Image):
                found[key] = result
            else:
                problems.append(_broken(key, result, uses[key]))
    problems += _special(dataset, special_tokens)
    problems += _boxes(dataset, found)
    problems += _parts(dataset)
    problems += _leaks(uses, by)
    problems += _copies(found, uses)
    problems += _unseen_answers(dataset)
    problems += _conflicts(dataset)
    problems.sort(key=lambda problem: problem.warning)
    return Audit(
        problems,
        sizes={key: image.size for key, image in found.items()},
        digests={key: image.digest for key, image in found.items()},
    )


def report(problems: Iterable[Problem]) -> str:
    """The problems as text: errors first, each on one line, and a last line with how many there are."""
    ordered = sorted(problems, key=lambda problem: problem.warning)
    lines = [
        f"{kind}: {line}"
        for kind, is_warning in (("error", False), ("warning", True))
        for line in condensed(problem for problem in ordered if problem.warning == is_warning)
    ]
    warnings = sum(problem.warning for problem in ordered)
    counts = f"{_count(len(ordered) - warnings, 'error')}, {_count(warnings, 'warning')}"
    return "\n".join([*lines, counts])


def _cores() -> int:
    """The cores that this process may use: under SLURM a few of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def condensed(problems: Iterable[Problem]) -> list[str]:
    """Problems as lines; of over 20 rows with the same one, the first, the last and how many there are."""
    alike: dict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        alike[problem.what].append(problem)
    lines = []
    for what, same in alike.items():
        if len(same) > _ALIKE:
            lines.append(
                f"{same[0].place}: {what} (and {len(same) - 1} more rows, the last at {same[-1].place})"
            )
        else:
            lines += map(str, same)
    return [printable(line) for line in lines]


def _broken(key: str, why: str, examples: Sequence[Example]) -> Problem:
    places = ", ".join(example.place for example in examples[:3]) + (", ..." if len(examples) > 3 else "")
    return Problem(f"image {key}", f"{why} ({_count(len(examples), 'question')}: {places})")


def _special(dataset: Dataset, tokens: Collection[str]) -> Iterator[Problem]:
    for example in dataset.examples:
        held = sorted(token for token in tokens if any(token in text for text in example.texts))
        if held:
            yield Problem(
                example.place, f"holds the special token {held[0]}, which would break the conversation"
            )


def _boxes(dataset: Dataset, found: Mapping[str, _Image]) -> Iterator[Problem]:
    """Boxes that are empty, reach out of their image, or do not fit the question's places for them."""
    sizes = {key: image.size for key, image in found.items()}
    for example in dataset.examples:
        for what in misplaced(example, sizes):
            yield Problem(example.place, what)


def _parts(dataset: Dataset) -> Iterator[Problem]:
    for part in PARTS if dataset.examples else ():  # without any the reasons have been told
        if not dataset.part(part):
            yield Problem(part, "holds no questions", warning=part != "train")


def _leaks(uses: Mapping[str, Sequence[Example]], by: str) -> Iterator[Problem]:
    """Images or groups with questions in more than one part."""
    image_parts = {key: {example.split for example in examples} for key, examples in uses.items()}
    group_parts: dict[str, set[Part | None]] = defaultdict(set)
    for examples in uses.values():
        for example in examples:
            if example.group and example.group not in uses:  # a group that is an image is told of as one
                group_parts[example.group].add(example.split)
    cure = "the test would be on what was trained on; set data.split.by to group, or mend the split"
    yield from _leak("images", image_parts, cure, warning=False)
    yield from _leak("groups", group_parts, cure, warning=by == "image")


def _leak(what: str, parts_of: Mapping[str, set[Part | None]], cure: str, warning: bool) -> Iterator[Problem]:
    leaking = [name for name, parts in parts_of.items() if len(parts - {None}) > 1]
    if leaking:
        counts = Counter(" and ".join(part for part in PARTS if part in parts_of[name]) for name in leaking)
        between = "; ".join(f"{count} in {parts}" for parts, count in counts.items())
        what = (
            f"{len(leaking)} of {len(parts_of)} {what} are in two parts or more ({between}): {_some(leaking)}"
        )
        yield Problem("split", f"{what}; {cure}", warning)


def _copies(found: Mapping[str, _Image], uses: Mapping[str, Sequence[Example]]) -> Iterator[Problem]:
    """Images under different names but with the same bytes, in more than one part."""
    names: dict[str, list[str]] = defaultdict(list)
    for key, image in found.items():
        names[image.digest].append(key)
    leaking = []
    for first, *others in names.values():
        parts = {example.split for example in uses[first]}
        elsewhere = [key for key in others if any(example.split not in parts for example in uses[key])]
        leaking += [f"{first} = {key}" for key in elsewhere[:1]]
    if leaking:
        what = (
            f"{_count(len(leaking), 'picture')} in two parts or more under different names: {_some(leaking)}"
        )
        yield Problem("split", what, warning=True)


def _unseen_answers(dataset: Dataset) -> Iterator[Problem]:
    """Answers of val and test that training cannot teach."""
    trained = {normalise(example.answers[0]) for example in dataset.part("train")}
    for part in PARTS[1:]:
        examples = dataset.part(part)
        unseen = Counter(
            example.answers[0] for example in examples if trained.isdisjoint(map(normalise, example.answers))
        )
        if trained and unseen:
            have = "has" if unseen.total() == 1 else "have"
            what = f"{unseen.total()} of {len(examples)} questions {have} an answer never seen in train"
            yield Problem(part, f"{what}: {_counted(unseen)}", warning=True)


def _conflicts(dataset: Dataset) -> Iterator[Problem]:
    """Questions asked twice about one image, with different answers."""
    answers: dict[tuple[str, str], set[str]] = defaultdict(set)
    place: dict[tuple[str, str], str] = {}
    for example in dataset.examples:
        asked = example.image_key, example.question
        answers[asked].add(example.answers[0])
        place.setdefault(asked, example.place)
    conflicting = [asked for asked, given in answers.items() if len(given) > 1]
    if conflicting:
        listed = ", ".join(
            f"{question!r} on {image} at {place[image, question]}" for image, question in conflicting[:_SHOWN]
        )
        more = ", ..." if len(conflicting) > _SHOWN else ""
        what = f"{_count(len(conflicting), 'question')} asked again about the same image, with another answer"
        yield Problem("answers", f"{what}: {listed}{more}", warning=True)


def _shown(results: Iterator[_Image | str], total: int, progress: bool) -> Iterable[_Image | str]:
    if not progress:
        return results
    from rich.progress import track

    from surgvqa.terminal import Console

    console = Console(stderr=True)
    return track(results, "images", total, console=console, transient=True, disable=not console.is_terminal)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _counted(answers: Counter[str]) -> str:
    listed = ", ".join(f"{answer!r} ({count})" for answer, count in answers.most_common(_SHOWN))
    return listed + (", ..." if len(answers) > _SHOWN else "")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
