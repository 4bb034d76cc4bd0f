"""Kvasir-VQA-x1 (Gautam et al. 2025): questions that combine one to three of Kvasir-VQA's.

159,549 rows with the columns img_id, complexity (1 to 3), question, answer, original, question_class, in the
official parts train (143,594) and test (15,955). The images are Kvasir-VQA's, as `<img_id>.jpg`, and do not
come with the rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from surgvqa.datasets import Example, ImageRef, Problem
from surgvqa.datasets.files import Row, open_hub, rows_of, table_rows
from surgvqa.datasets.images import Images
from surgvqa.datasets.tables import Fields, part_files, part_named, part_of
from surgvqa.recipe import BadInput, Part, Source

TEST_ROWS = 15_955

MEDICO_ROWS = 1500
"""The public score of MediaEval Medico 2025 is on `test.shuffle(seed=42).select(range(1500))` (as in
simula/MediaEval-Medico-2025, its organisers')."""

_COLUMNS = ("img_id", "complexity", "question", "answer", "question_class")


def read(source: Source) -> Iterator[Example | Problem]:
    """The rows of the hub's data set, or of train and test files in a folder or in its folder `data`.

    With `variant: medico` the test part is the public subset of Medico 2025. Images are looked for in the
    source's folder and its roots. Raises BadInput where there are no rows, or no folder for images.
    """
    path = Path(source.path or ".")
    if path.exists():
        own, roots = path if path.is_dir() else path.parent, source.roots
    elif source.roots:
        own, roots = Path(source.roots[0]), source.roots[1:]
    else:
        raise BadInput(
            f"{path}: is no folder here, and the hub's rows have no images; list the folder in data.roots "
            "that has Kvasir-VQA's as images/<img_id>.jpg or <img_id>.jpg"
        )
    images = Images(own, roots)
    test: list[Row | Problem] = []
    for part, row in _rows(source, path):
        if part == "test" and source.variant == "medico":
            test.append(row)
        else:
            yield _example(row, part, images)
    if source.variant == "medico":
        if len(test) != TEST_ROWS:
            what = (
                f"its test part has {len(test)} rows instead of {TEST_ROWS}, so that Medico's subset of it "
                "is not the published one"
            )
            yield Problem(str(path), what, warning=True)
        for index in medico_rows(len(test)):
            yield _example(test[index], "test", images)
        if len(test) > MEDICO_ROWS:
            what = f"{len(test) - MEDICO_ROWS} test rows are not in Medico's public subset and are left out"
            yield Problem(str(path), what, warning=True)


def medico_rows(count: int) -> list[int]:
    """Which of `count` test rows are in Medico's public subset, in its order; from 0."""
    import datasets

    shuffled = datasets.Dataset.from_dict({"row": range(count)}).shuffle(seed=42)
    return list(shuffled.select(range(min(MEDICO_ROWS, count)))["row"]) if count else []


def _rows(source: Source, path: Path) -> Iterator[tuple[Part | None, Row | Problem]]:
    if path.exists():
        inner = path / "data"
        folder = inner if inner.is_dir() and not _has_parts(path) else path
        files = part_files(folder, roots=source.roots)
        for file in files:
            for row in rows_of(file, _COLUMNS):
                yield part_of(file), row
        return
    for split, table in open_hub(str(path), source.revision).items():
        for row in table_rows(table, f"{path} {split}", _COLUMNS):
            yield part_named(split), row


def _has_parts(folder: Path) -> bool:
    return any(part_of(file) for file in folder.iterdir() if file.is_file())


def _example(row: Row | Problem, part: Part | None, images: Images) -> Example | Problem:
    if isinstance(row, Problem):
        return row
    fields = Fields(row.fields, {"stage": "complexity"})
    name, question, answer = (fields.text(column) for column in ("img_id", "question", "answer"))
    complexity = fields.stage()
    if complexity not in (1, 2, 3) and not fields.wrong:
        fields.fault("stage", f"is {complexity}; it must be 1, 2 or 3")
    refs = []
    if name:
        try:
            refs.append(_image(name, images))
        except ValueError as error:
            fields.fault("img_id", f"{name!r} {error}")
    if fields.wrong:
        return Problem(row.place, "; ".join(fields.wrong))
    return Example(
        id=f"{part or 'row'}:{row.number}",
        images=tuple(refs),
        question=question,
        answers=(answer,),
        question_type=_type(fields["question_class"]),
        group=f"kvasir/{name}",
        split=part,
        stage=complexity,
        place=row.place,
    )


def _image(name: str, images: Images) -> ImageRef:
    """`images/<img_id>.jpg`, else `<img_id>.jpg`, under the img_id, as Kvasir-VQA's own reader has it."""
    try:
        found = images.locate(f"images/{name}.jpg")
    except ValueError as error:
        try:
            found = images.locate(f"{name}.jpg")
        except ValueError:
            raise error from None
    return replace(found, key=name)


def _type(value: object) -> str:
    """One class is the type; a question of two or three has the type `combined_2` or `combined_3`.

    The hub has a list of classes, copies of it have its text: `['polyp_type' 'text_presence']`.
    """
    names = value if isinstance(value, list) else re.findall(r"[\w-]+", str(value or ""))
    classes = list(dict.fromkeys(str(name).strip() for name in names))
    return "other" if not classes else classes[0] if len(classes) == 1 else f"combined_{len(classes)}"
