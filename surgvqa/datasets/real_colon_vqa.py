"""REAL-Colon-VQA (Drago et al. 2025): questions on clips of eight frames from six colonoscopies.

    annotations/in_template.jsonl             {"id", "video_id": "002-003", "frames": ["002-003_3806", ...],
                                               "question", "question_type", "answer", "short_answer"}
    videos/002-003_frames/002-003_3806.jpg    (as REAL-Colon has them; or frames/002-003/..., or 002-003/...)

`out_template.jsonl` asks the same of the same clips in other words. The authors train on five videos and
report on the sixth, 002-006, on which they also choose their model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from surgvqa.datasets import Example, Problem
from surgvqa.datasets.clips import chosen, first_of
from surgvqa.datasets.files import Row, jsonl_rows, kind_of
from surgvqa.datasets.images import Images, leading_out
from surgvqa.datasets.tables import PARTS, Fields
from surgvqa.recipe import BadInput, Part, Source

TRAIN = frozenset({"002-001", "002-002", "002-003", "002-004", "002-005"})
TEST = frozenset({"002-006"})

_PARTS: dict[str, Part] = {**PARTS, "eval": "val"}


def read(source: Source) -> Iterator[Example | Problem]:
    """The questions of a file, or of a folder's in_template.jsonl, or of its train, eval and test files.

    Files whose names begin with a part are that part; in others it goes by the video. Raises BadInput where
    there is no such file.
    """
    path = Path(source.path or ".")
    files = _files(path)
    if path.is_dir() and (out := leading_out(files, path, source.roots)):
        raise BadInput(out)
    folder = path if path.is_dir() else path.parent
    images = Images(folder.parent if folder.name == "annotations" else folder, source.roots)
    used: set[str] = set()
    again = 0
    for file in files:
        for row in jsonl_rows(file):
            example = row if isinstance(row, Problem) else _example(row, file, images, source)
            if isinstance(row, Row) and isinstance(example, Example):
                if example.id in used:
                    again += 1
                    example = replace(example, id=f"{example.id}:{row.number}")
                used.add(example.id)
            yield example
    if again:
        what = (
            f"{again} {'row has' if again == 1 else 'rows have'} an id that another row has, as known of this"
        )
        yield Problem(str(path), f"{what} corpus; the line's number is added to it", warning=True)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    for folder in (path, path / "annotations"):
        own = [folder / "in_template.jsonl"]
        parts = sorted(file for file in folder.glob("*.jsonl") if _part_of(file))
        if found := [file for file in parts or own if file.is_file()]:
            return found
    what = "it holds no" if path.is_dir() else "no such file or folder; it would hold"
    raise BadInput(
        f"{path}: {what} in_template.jsonl, or train_*.jsonl and so on, by itself or in annotations, "
        "so it is no REAL-Colon-VQA"
    )


def _part_of(file: Path) -> Part | None:
    found = re.match(r"(train|val|eval|test)(?:_|$)", file.stem)
    return _PARTS[found[1]] if found else None


def _example(row: Row, file: Path, images: Images, source: Source) -> Example | Problem:
    fields = Fields(row.fields, {})
    video, question = fields.text("video_id"), fields.text("question")
    answers = [fields.text("short_answer"), fields.text("answer")]
    frames = fields["frames"]
    if not isinstance(frames, list):
        fields.fault("frames", f"is {kind_of(frames)} instead of a list of names")
        frames = []
    elif not frames or not all(isinstance(name, str) for name in frames):
        fields.fault("frames", f"is {'a list of other than names' if frames else 'an empty list'}")
        frames = []
    refs = []
    for name in chosen(frames, source.frames):
        below = (
            f"videos/{video}_frames/",
            f"{video}_frames/",
            f"frames/{video}/",
            f"{video}/",
            "frames/",
            "",
        )
        try:
            refs.append(first_of((f"{folder}{name}.jpg" for folder in below), images))
        except ValueError as error:
            fields.fault("frames", str(error))
            break  # a video that is not there is told of once in a row
    if source.variant == "long":
        answers.reverse()
    example = Example(
        id=fields.optional("id") or f"{file.stem}:{row.number}",
        images=tuple(refs),
        question=question,
        answers=tuple(dict.fromkeys(answers)),
        question_type=fields.optional("question_type") or "question",
        group=f"real_colon/{video}",
        split=_part_of(file) or ("train" if video in TRAIN else "test" if video in TEST else None),
        place=row.place,
    )
    return Problem(row.place, "; ".join(fields.wrong)) if fields.wrong else example
