"""Kvasir-VQA (Gautam et al. 2024), from the hub as `SimulaMet-HOST/Kvasir-VQA` or from a local copy.

58,849 rows with the columns image, source, question, answer, img_id, on 6,500 images of the gastrointestinal
tract, each image repeated in every row about it. There is no official split and no column for the patient.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgvqa.datasets import Example, ImageRef, Problem
from surgvqa.datasets.files import as_text, csv_rows, encoded, open_hub, open_parquet
from surgvqa.datasets.images import Images
from surgvqa.recipe import BadInput, Source

_COLUMNS = ("question", "answer", "img_id")

QUESTION_TYPES = {
    "Have all polyps been removed?": "yes_no",
    "Is this finding easy to detect?": "yes_no",
    "Is there text?": "yes_no",
    "Is there a green/black box artefact?": "yes_no",
    "Does this image contain any finding?": "yes_no",
    "How many polyps are in the image?": "count",
    "How many findings are present?": "count",
    "How many instrumnets are in the image?": "count",  # as the corpus spells it
    "How many instruments are in the image?": "count",  # as copies of it mend it
    "What type of procedure is the image taken from?": "procedure",
    "What type of polyp is present?": "polyp_type",
    "What is the size of the polyp?": "polyp_size",
    "Are there any abnormalities in the image? Check all that are present.": "multi",
    "Are there any anatomical landmarks in the image? Check all that are present.": "multi",
    "Are there any instruments in the image? Check all that are present.": "multi",
    "Where in the image is the abnormality?": "location",
    "Where in the image is the instrument?": "location",
    "Where in the image is the anatomical landmark?": "location",
    "What color is the abnormality? If more than one separate with ;": "colour",
    "What color is the anatomical landmark? If more than one separate with ;": "colour",
}


_ASSESSMENT = {
    "Is there text?",
    "Is there a green/black box artefact?",
    "Is this finding easy to detect?",
    "What type of procedure is the image taken from?",
}
_CONTEXT = {"Have all polyps been removed?"}


def stage(question: str) -> int | None:
    """1, initial assessment of the image; 2, findings; 3, clinical context; None of a question not known.

    The corpus has no stages. These apply the definitions that the experiments with stages on it give a
    language model as its prompt (MuhraAlMahri/Surgical_COT, docs/COMPLETE_EXPERIMENT_HISTORY.md) to each
    question once. Their own files have a stage per row that the model chose anew each time, so the same
    question is in two or three.
    """
    if question not in QUESTION_TYPES:
        return None
    return 1 if question in _ASSESSMENT else 3 if question in _CONTEXT else 2


@dataclass(frozen=True, slots=True)
class _Row:
    place: str
    image: str
    question: str
    answer: str


def read(source: Source) -> Iterator[Example | Problem]:
    """Every row as an example whose references are all answers given to that question on that image.

    The source is a hub id, a Parquet file, a folder with Parquet files, or one with metadata.csv and the
    images as `images/<img_id>.jpg` or `<img_id>.jpg`. The corpus's rows without a question
    or answer are left out with one warning. Raises BadInput where there is nothing of the kind.
    """
    path = source.path
    place = path or "Kvasir-VQA"
    if path and (Path(path) / "metadata.csv").is_file():
        rows, image_of = _from_csv(Path(path), source.roots)
    else:
        rows, image_of = _from_table(place, _open(place, source.revision))

    kept: list[_Row] = []
    junk: list[_Row] = []
    for row in rows:
        if isinstance(row, Problem):
            yield row
        elif row.question.lower() in ("", "none") or row.answer.lower() in ("", "nan"):
            junk.append(row)
        else:
            kept.append(row)
    yield from _examples(kept, image_of)
    if junk:
        what = f"{len(junk)} rows have no question or no answer and are left out, as known of this corpus"
        yield Problem(place, f"{what}; the first is {junk[0].place}", warning=True)
    unknown = Counter(row.question for row in kept if row.question not in QUESTION_TYPES)
    if unknown:
        listed = ", ".join(f"{question!r} ({count})" for question, count in unknown.most_common(5))
        what = f"{unknown.total()} rows ask a question new to this corpus; its type is other: {listed}"
        yield Problem(place, what, warning=True)


def _examples(rows: list[_Row], image_of: Callable[[str], ImageRef]) -> Iterator[Example | Problem]:
    answers: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)  # a dict as an ordered set
    for row in rows:
        answers[row.image, row.question][row.answer] = None
    seen: Counter[str] = Counter()
    for row in rows:
        number, seen[row.image] = seen[row.image], seen[row.image] + 1
        try:
            image = image_of(row.image)
        except ValueError as error:
            yield Problem(row.place, f"image {row.image!r} {error}")
            continue
        others = [answer for answer in answers[row.image, row.question] if answer != row.answer]
        yield Example(
            id=f"{row.image}:{number}",
            images=(image,),
            question=row.question,
            answers=(row.answer, *others),
            question_type=QUESTION_TYPES.get(row.question, "other"),
            group=f"kvasir/{row.image}",
            stage=stage(row.question),
            place=row.place,
        )


def _open(path: str, revision: str | None) -> Any:
    """The corpus as a `datasets.Dataset` with encoded images. Raises BadInput."""
    place = Path(path)
    files = sorted(place.rglob("*.parquet")) if place.is_dir() else [place] if place.is_file() else []
    if files:
        try:
            return open_parquet(files)
        except ValueError as error:
            raise BadInput(f"{path}: {error}") from None
    if place.exists():
        raise BadInput(
            f"{path}: holds neither *.parquet files nor metadata.csv, so it is no copy of Kvasir-VQA"
        )
    return encoded(open_hub(path, revision, split="raw"))


def _from_table(path: str, table: Any) -> tuple[Iterator[_Row | Problem], Callable[[str], ImageRef]]:
    if missing := [name for name in (*_COLUMNS, "image") if name not in table.column_names]:
        raise BadInput(
            f"{path}: lacks the columns {', '.join(missing)}; it has {', '.join(table.column_names)}"
        )
    # Only the text is read: the embedded images are gigabytes.
    fields = table.select_columns(list(_COLUMNS)).with_format("arrow")[:].to_pylist()
    first_row: dict[str, int] = {}
    for index, row in enumerate(fields):
        first_row.setdefault(str(row["img_id"]).strip(), index)

    def image_of(name: str) -> ImageRef:
        return ImageRef(name, table=table, row=first_row[name])

    rows = (_checked(f"{path}: row {index}", row) for index, row in enumerate(fields, start=1))
    return rows, image_of


def _from_csv(
    folder: Path, roots: Sequence[str]
) -> tuple[Iterator[_Row | Problem], Callable[[str], ImageRef]]:
    images = Images(folder, roots)
    below = "images/" if (folder / "images").is_dir() else ""

    def image_of(name: str) -> ImageRef:
        found = images.locate(f"{below}{name}.jpg")
        return ImageRef(name, path=found.path)

    rows = csv_rows(folder / "metadata.csv", _COLUMNS)
    return (row if isinstance(row, Problem) else _checked(row.place, row.fields) for row in rows), image_of


def _checked(place: str, fields: dict[str, Any]) -> _Row | Problem:
    texts = {}
    for name in _COLUMNS:
        value = fields[name]
        try:
            texts[name] = (
                "" if value != value else as_text(value)
            )  # a float NaN is the only value unlike itself
        except ValueError as error:
            return Problem(place, f"{name} {error}")
    if not texts["img_id"]:
        return Problem(place, "img_id is empty")
    return _Row(place, texts["img_id"], texts["question"], texts["answer"])
