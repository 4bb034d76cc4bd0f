"""Which part a question is in: as the data says, by a hash, stratified, or as a file froze it.

    examples, recipe's `data.split` ── apply ──▶ examples with their part, problems
    recipe's `data` ── freeze ──▶ Frozen ── JSON ──▶ `data.split: {by: frozen, path: …}`

Whole groups (videos, patients) or whole images go to a part, never single questions.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import surgvqa
from surgvqa import datasets
from surgvqa.datasets import Example, Problem, normalise
from surgvqa.recipe import BadInput, Data, Part, Split

PARTS: tuple[Part, ...] = get_args(Part)

Unit = Literal["image", "group"]
"""What goes to a part as a whole; a question without a group goes with its image."""


class Frozen(BaseModel):
    """The file of a frozen split."""

    model_config = ConfigDict(strict=True, extra="forbid")
    by: Unit
    train: list[str]
    """The names of the groups, or the keys of the images, in train; `val` and `test` likewise."""
    val: list[str]
    test: list[str]
    counts: dict[Part, dict[str, int]]
    """Part → how many groups or images it had, and how many questions, when it was made."""
    made: dict[str, Any] = Field(default_factory=dict)
    """How: the recipe's `data.split`, what data, and the version of surgvqa."""

    def part_of(self) -> dict[str, Part]:
        """Name → part. Raises ValueError where a name is there twice."""
        listed: dict[Part, list[str]] = {"train": self.train, "val": self.val, "test": self.test}
        part_of: dict[str, Part] = {}
        for part, names in listed.items():
            for name in names:
                if name in part_of:
                    raise ValueError(f"{name!r} is in {part_of[name]} and again in {part}")
                part_of[name] = part
        return part_of


def apply(examples: list[Example], split: Split) -> tuple[list[Example], list[Problem]]:
    """The examples, each in its part, and what is wrong with them or with a frozen split.

    Those that belong to no part are left out, with a problem that says so. Raises BadInput where the file
    of a frozen split is none.
    """
    if split.by == "official":
        placed = [example for example in examples if example.split is not None]
        return placed, _without_part(examples)
    if split.by == "frozen":
        return _as_frozen(examples, split)
    names = [name_of(example, split.by) for example in examples]
    if split.stratify == "none":
        part_of = {name: _hashed(name, split) for name in dict.fromkeys(names)}
    else:
        part_of = _stratified(examples, names, split)
    return [replace(e, split=part_of[name]) for e, name in zip(examples, names, strict=True)], []


def name_of(example: Example, by: Unit) -> str:
    """The name of the group or image that an example goes to a part with."""
    return example.group if by == "group" and example.group else example.image_key


def unit(split: Split) -> str:
    """`image` or `group`, also of a frozen split; `official` where the data decides.

    Raises BadInput where the file of a frozen split is none.
    """
    return _read(split.path or "")[0].by if split.by == "frozen" else split.by


def freeze(data: Data) -> Frozen:
    """The split that a recipe's `data` has now, whatever `data.stages` takes of it.

    An official one is frozen by group where no group is in two parts, else by image. Raises BadInput where
    the data has errors that `data.on_error` does not skip, or an image is in two parts.
    """
    dataset = datasets.load(data.model_copy(update={"stages": None}))
    skip = data.on_error == "skip"
    if errors := [str(each) for each in dataset.problems if not each.warning and (each.whole or not skip)]:
        raise BadInput(errors)
    kind = unit(data.split)
    units: list[Unit] = ["image"] if kind == "image" else ["group"] if kind == "group" else ["group", "image"]
    for by in units:
        parts_of: dict[str, set[Part]] = defaultdict(set)
        for example in dataset.examples:
            if example.split:
                parts_of[name_of(example, by)].add(example.split)
        if torn := [name for name, parts in parts_of.items() if len(parts) > 1]:
            continue
        names = {part: sorted(n for n, parts in parts_of.items() if part in parts) for part in PARTS}
        questions = Counter(example.split for example in dataset.examples)
        return Frozen(
            by=by,
            **names,
            counts={part: {f"{by}s": len(names[part]), "questions": questions[part]} for part in PARTS},
            made={
                "split": data.split.model_dump(),
                "data": [source.model_dump(include=set(_SOURCE)) for source in data.sources],
                "surgvqa": surgvqa.__version__,
            },
        )
    raise BadInput(
        f"data.split: {len(torn)} images are in two parts or more, such as {torn[0]}: a split that cannot be "
        "frozen, and should not be trained on; set data.split.by to image or group"
    )


_SOURCE = ("format", "path", "revision")


def _hashed(name: str, split: Split) -> Part:
    """The part of an image or group: a pure function of its name, so that adding rows moves none.

    The position of the name is below `test` → test, below `test + val` → val, else train.
    """
    place = position(name, split.seed)
    return "test" if place < split.test else "val" if place < split.test + split.val else "train"


def position(name: str, seed: int) -> float:
    """The first 8 bytes of SHA-256("seed:name") as a number in [0, 1)."""
    digest = hashlib.sha256(f"{seed}:{name}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def drawn(examples: Sequence[Example], most: int | None) -> list[Example]:
    """`most` examples in their own order, None for all; which, depends on neither that order
    nor a seed, so that runs are judged by the same.

    Every question type has its share (`_shares`). Of each type they are the questions of the images that come
    first in one order of all images, so that few images are needed.
    """
    if most is None or most >= len(examples):
        return [*examples]
    by_type: dict[str, list[int]] = defaultdict(list)

    def place(index: int) -> tuple[float, str, str, str]:
        example = examples[index]
        return position(example.image_key, 0), example.image_key, example.question, example.id

    for index in sorted(range(len(examples)), key=place):
        by_type[examples[index].question_type].append(index)
    shares = _shares({kind: len(own) for kind, own in by_type.items()}, most)
    chosen = (index for kind, own in by_type.items() for index in own[: shares[kind]])
    return [examples[index] for index in sorted(chosen)]


def _shares(counts: Mapping[str, int], most: int) -> dict[str, int]:
    """`most`, fewer than there are, shared out in proportion to the counts.

    By the largest remainder (Hamilton's method of apportionment). Where all can have one, each of those left
    without gets one of the largest share.
    """
    total = sum(counts.values())
    shares = {kind: most * count // total for kind, count in counts.items()}
    by_remainder = sorted(counts, key=lambda kind: (-(most * counts[kind] % total), kind))
    for kind in by_remainder[: most - sum(shares.values())]:
        shares[kind] += 1
    for kind in sorted(kind for kind, share in shares.items() if not share):
        if most >= len(counts):
            shares[max(shares, key=lambda other: (shares[other], other))] -= 1
            shares[kind] = 1
    return shares


def _stratified(examples: Sequence[Example], names: Sequence[str], split: Split) -> dict[str, Part]:
    """Name → part, such that each part has about its share of every class of questions.

    Greedy: the names with the most questions first, of equals by their hash, each to the part where it
    raises chi-square the least, the sum over parts and classes of (count - share)^2 / share. A function of
    the questions as a set: neither their order nor the machine matters, but one more may move others.
    """
    classes: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
    for example, name in zip(examples, names, strict=True):
        answer = normalise(example.answers[0]) if split.stratify == "answer" else ""
        classes[name][example.question_type, answer] += 1
    totals: Counter[tuple[str, str]] = Counter()
    for counts in classes.values():
        totals.update(counts)
    shares = {"train": 1 - split.val - split.test, "val": split.val, "test": split.test}
    open_parts = [part for part in PARTS if shares[part] > 0]
    placed: dict[Part, Counter[tuple[str, str]]] = {part: Counter() for part in open_parts}
    part_of: dict[str, Part] = {}

    def rise(part: Part, counts: Mapping[tuple[str, str], int]) -> float:
        return sum(
            count * (count + 2 * (placed[part][kind] - shares[part] * totals[kind]))
            / (shares[part] * totals[kind])
            for kind, count in sorted(counts.items())
        )  # fmt: skip

    order = sorted(classes, key=lambda name: (-classes[name].total(), position(name, split.seed), name))
    for name in order:
        part_of[name] = min(open_parts, key=lambda part: rise(part, classes[name]))
        placed[part_of[name]].update(classes[name])
    return part_of


def _as_frozen(examples: Iterable[Example], split: Split) -> tuple[list[Example], list[Problem]]:
    path = split.path or ""
    frozen, part_of = _read(path)
    placed, unlisted = [], dict[str, None]()
    for example in examples:
        name = name_of(example, frozen.by)
        if name in part_of:
            placed.append(replace(example, split=part_of[name]))
        else:
            unlisted[name] = None
    gone = part_of.keys() - {name_of(example, frozen.by) for example in placed}
    cure = f"freeze the split anew, or use the data that {path} was made of"
    return placed, [
        *(
            Problem(f"{frozen.by} {name}", f"is in no part of {path}; {cure}", whole=True)
            for name in unlisted
        ),
        *(
            Problem(f"{frozen.by} {name}", f"is in {path}, but not in the data; {cure}", whole=True)
            for name in sorted(gone)
        ),
    ]


def _read(path: str) -> tuple[Frozen, dict[str, Part]]:
    """A frozen split, and name → part. Raises BadInput where the file is none."""
    try:
        if Path(path).exists() and not Path(path).is_file():  # reading a pipe would wait for ever
            raise ValueError("it is not a file")
        frozen = Frozen.model_validate_json(Path(path).read_bytes())
        return frozen, frozen.part_of()
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, one['loc'])) or 'the file'}: {one['msg']}" for one in error.errors()]
        why = "; ".join(wrong)
    except FileNotFoundError:
        raise BadInput(
            f"data.split.path: {path}: does not exist; `surgvqa split RECIPE --out {path}` writes it"
        ) from None
    except OSError as error:
        why = error.strerror or str(error)
    except ValueError as error:
        why = str(error)
    raise BadInput(f"data.split.path: {path}: not a split that `surgvqa split` wrote: {why}")


def _without_part(examples: Iterable[Example]) -> list[Problem]:
    lost = [example for example in examples if example.split is None]
    if not lost:
        return []
    return [
        Problem(
            lost[0].place,
            f"{len(lost)} rows belong to no part (this is the first): give them a split column "
            "with train, val or test, or set data.split.by to image or group",
            whole=True,
        )
    ]
