"""Multiple-choice questions: find a row's choices, put them into its question, and make the answer a letter.

{"choices": ["knife", "hook"], "answer": "hook"}  ──▶  "...?\\nA. knife\\nB. hook", "B"
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from itertools import takewhile
from string import ascii_uppercase
from typing import Any

from surgvqa.datasets.files import as_text, held_in, is_missing, kind_of

WHOLE = ("choices", "options", "option")
"""Columns that hold all choices of a question, as a list or an object."""

_ONE = re.compile(r"(choice|option|opt|op)?([ _-]?)(?:([A-Za-z])|(\d{1,2}))", re.IGNORECASE)
"""Columns that hold one choice, such as choice_A, optionB, opc, option_1 or A."""

_LONGEST = 10_000
"""Characters of a text that is looked at as a list of choices."""

_NUMBERS = [str(number) for number in range(len(ascii_uppercase) + 1)]

NAMES = (
    *(spelt for word in WHOLE for spelt in (word, word.capitalize(), word.upper())),
    *ascii_uppercase,
    *(
        f"{word}{mark}{label}"
        for stem in ("choice", "option", "opt", "op")
        for word in (stem, stem.capitalize(), stem.upper())
        for mark in ("", "_", " ", "-")
        for label in (*ascii_uppercase, *ascii_uppercase.lower(), *_NUMBERS)
    ),
)
"""Names under which choices are looked for in tables of which only the columns asked for are read."""

Choices = dict[str, str]
"""Label → text, in order."""


def single_columns(names: Iterable[str]) -> dict[str, str]:
    """Return label → column of the columns that hold one choice each; {} where there are fewer than two.

    Labels must go on without a gap from A, 0 or 1. Columns that are a letter alone must be upper case.
    """
    families: dict[tuple[str, str, bool], dict[str, str]] = {}
    for name in names:
        found = _ONE.fullmatch(name)
        if found is None or (not found[1] and (found[2] or found[4] or name.islower())):
            continue
        label = (found[3] or found[4]).upper()
        families.setdefault((found[1] or "", found[2], label.isdigit()), {})[label] = name
    for columns in families.values():
        for labels in (ascii_uppercase, _NUMBERS, _NUMBERS[1:]):
            run = list(takewhile(columns.__contains__, labels))
            if len(run) > 1:
                return {label: columns[label] for label in run}
    return {}


def of_row(fields: Mapping[str, Any], taken: frozenset[str] = frozenset()) -> tuple[Choices, list[str]]:
    """Return a row's choices, as the names of its columns show them, and these columns.

    Columns that are `taken` hold something else. Raises ValueError with the column and what is wrong with it.
    """
    whole, single = _columns(tuple(fields), taken)
    for name in whole:
        try:
            found = parse(fields[name])
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
        if found:
            return found, [name]
    if single:
        try:
            return cleaned({label: fields[name] for label, name in single.items()}), list(single.values())
        except ValueError as error:
            raise ValueError(f"{', '.join(single.values())}: one {error}") from None
    return {}, []


@functools.lru_cache(1024)
def _columns(names: tuple[str, ...], taken: frozenset[str]) -> tuple[list[str], dict[str, str]]:
    """Return those of a row's columns that hold all choices, and those that hold one each."""
    names = tuple(name for name in names if name not in taken)
    return [name for name in names if name.lower() in WHOLE], single_columns(names)


def parse(value: object) -> Choices:
    """Return the choices in a cell: a list, an object of labels, either of these as JSON, or lines `A. hook`.

    A list gets the labels A, B, C, ... Empty choices are left out. Raises ValueError with what is wrong,
    to follow the column's name in a message.
    """
    if isinstance(value, str):
        value = _of_text(value.strip())
    if is_missing(value):
        return {}
    if isinstance(value, dict):
        texts, labels = value.get("text"), value.get("label")
        if isinstance(texts, list) and isinstance(labels, list) and len(texts) == len(labels):
            if len(set(map(as_text, labels))) < len(labels):
                raise ValueError("has a label more than once")
            return cleaned(dict(zip(map(as_text, labels), texts, strict=True)))
        return cleaned({as_text(label): text for label, text in value.items()})
    if isinstance(value, list):
        if len(value) > len(ascii_uppercase):
            raise ValueError(f"has {len(value)} choices; {len(ascii_uppercase)} can have a letter")
        return cleaned(dict(zip(ascii_uppercase, value, strict=False)))
    raise ValueError(f"is {kind_of(value)} instead of a list or an object of choices")


def cleaned(choices: Mapping[str, Any]) -> Choices:
    """Return choices as text, without empty ones. Remove labels repeated in the texts, such as `A: hook`.

    Raises ValueError.
    """
    texts = {label: as_text(text) for label, text in choices.items() if not is_missing(text)}
    texts = {label: text for label, text in texts.items() if text}
    if wrong := [text for text in texts.values() if text.lower() == "nan"]:
        raise ValueError(f"is {wrong[0]!r}, which stands for a missing value; leave it empty")
    bare = {label: _without_label(label, text) for label, text in texts.items()}
    # "A." in "A. fumigatus" is no label, so labels are removed only where every choice begins with its own.
    return {label: text or "" for label, text in bare.items()} if all(bare.values()) else texts


def _without_label(label: str, text: str) -> str | None:
    """Return a text without the label and mark that it begins with; None if it does not begin so."""
    found = re.fullmatch(rf"\(?{re.escape(label)}\s*[.:)]\s*(.+)", text, re.IGNORECASE | re.DOTALL)
    return found[1] if found else None


def _of_text(text: str) -> object:
    """Return the list or object that a text holds as JSON, as a Python literal, or as lines `A. hook`.

    Raises ValueError.
    """
    if not text:
        return None
    if len(text) <= _LONGEST:
        if (value := held_in(text)) is not None:
            return value
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        labelled = dict(zip(ascii_uppercase, lines, strict=False))
        if len(lines) > 1 and all(_without_label(label, line) for label, line in labelled.items()):
            return labelled
    raise ValueError("is text that holds no choices; write a list or an object")


def asked(question: str, choices: Choices) -> str:
    """Return the question with a line `A. text` for each choice below it, unless it ends with them."""
    lines = question.splitlines()[-len(choices) :]
    if [_without_label(*each) for each in zip(choices, map(str.strip, lines), strict=False)] == [
        *choices.values()
    ]:
        return question
    return "\n".join([question, *(f"{label}. {text}" for label, text in choices.items())])


def label_of(answer: str, choices: Choices) -> str:
    """Return the label of the choice that an answer names by label, by text or by both.

    Raises ValueError with what is wrong, to follow the name of the answer's column in a message.
    """
    found = {label for label in choices if answer.strip("().: ").casefold() == label.casefold()}
    found |= {label for label, text in choices.items() if _plain(answer) == _plain(text)}
    if not found:
        found = {
            label
            for label, text in choices.items()
            if _plain(_without_label(label, answer) or "") == _plain(text)
        }
    if len(found) == 1:
        return found.pop()
    what = "is the label of one choice and the text of another" if found else "is none of its choices"
    listed = ", ".join(f"{label}: {text}" for label, text in choices.items())
    raise ValueError(
        f"{answer!r} {what} ({listed[:200]}); give the letter or the text of one, or set data.columns: "
        "{choices: null} if these columns are no choices"
    )


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()
