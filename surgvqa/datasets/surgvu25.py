"""SurgVU25, category 2: one question on a clip of half a minute of robotic surgery, with five right answers.

    case122/case122_question.json    "Are there forceps being used here?"
    case122/case122.json             ["No", "No forceps are being used.", ...]; the first is trained on
    case122/frame_000000.jpg, ...    frames of the clip; or a folder case122 of them elsewhere in the roots

The public sample set is all there is: its cases are `test`.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

from surgvqa.datasets import Example, ImageRef, Problem, type_of
from surgvqa.datasets.clips import chosen, first_of
from surgvqa.datasets.files import as_text, kind_of
from surgvqa.datasets.images import Images, leading_out
from surgvqa.recipe import BadInput, Source

_LONGEST = 2**20
"""Bytes that a question or its answers may have."""


def read(source: Source) -> Iterator[Example | Problem]:
    """One question of each case below the source's folder. Raises BadInput where it has none."""
    root = Path(source.path or ".")
    files = {
        entry: sorted(entry.glob("case*_question.json")) if entry.is_dir() else []
        for entry in (sorted(root.iterdir()) if root.is_dir() else [])
        if re.fullmatch(r"case\w+", entry.name)
    }
    if not any(files.values()):
        found = "no such folder" if not root.is_dir() else "holds no case*/case*_question.json"
        raise BadInput(f"{root}: {found}, so it is no SURGVU25_cat_2_sample_set_public")
    jsons = (entry.glob("*.json") for entry, questions in files.items() if questions)
    if out := leading_out((*files, *itertools.chain.from_iterable(jsons)), root, source.roots):
        raise BadInput(out)
    for entry, questions in files.items():
        if not questions:
            yield Problem(str(entry), f"is no folder with {entry.name}_question.json")
    images = Images(root, source.roots)
    folders = [root, *map(Path, source.roots)]
    counts: dict[str, int] = {}
    for file in itertools.chain.from_iterable(files.values()):
        case = file.parent.name
        try:
            question = as_text(_json(file))
            answers = _answers(_json(file.with_name(f"{file.stem.removesuffix('_question')}.json")))
            refs = _frames(case, folders, images, source.frames)
            if not question:
                raise ValueError("question is empty")
        except ValueError as error:
            yield Problem(str(file), str(error))
            continue
        counts[case] = len(refs)
        yield Example(
            id=file.stem.removesuffix("_question"),
            images=refs,
            question=question,
            answers=answers,
            question_type=_type(question),
            group=f"surgvu25/{case}",
            split="test",
            place=str(file),
        )
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{case} ({count})" for case, count in counts.items())
        yield Problem(str(root), f"cases differ in their number of frames: {listed}", warning=True)


def _json(file: Path) -> object:
    """What a small JSON file holds. Raises ValueError."""
    if not file.is_file():
        raise ValueError(f"there is no file {file.name}")
    try:
        with file.open("rb") as stream:
            data = stream.read(_LONGEST + 1)
        if len(data) > _LONGEST:
            raise ValueError(f"is larger than {_LONGEST >> 20} MiB")
        value: object = json.loads(data.decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return value


def _answers(value: object) -> tuple[str, ...]:
    answers = [as_text(answer) for answer in value] if isinstance(value, list) else [as_text(value)]
    if not answers or "" in answers:
        raise ValueError(f"answers are {kind_of(value)} that is empty or has an empty one")
    return tuple(dict.fromkeys(answers))


def _frames(case: str, folders: list[Path], images: Images, most: int | None) -> tuple[ImageRef, ...]:
    """The frames in the first of the folders that has a folder of the case. Raises ValueError."""
    for folder in folders:
        files = (folder.resolve() / case).glob("*")
        names = sorted(str(file) for file in files if file.suffix.lower() in (".jpg", ".jpeg", ".png"))
        if names:
            return tuple(first_of([name], images) for name in chosen(names, most))
    looked = " or ".join(str(folder / case) for folder in folders)
    raise ValueError(
        f"there are no frames in {looked}; list their folder in data.roots, or make them with "
        f"ffmpeg -i {case}.mp4 -vf fps=1 -start_number 0 frame_%06d.jpg"
    )


def _type(question: str) -> str:
    """By how a question begins; the last is for forms that the public sample does not have."""
    forms = {
        r"(is|are|was|were|do|does|did|has|have|can)\b": "yes_no",
        r"(what|which)\b.*\b(tool|instrument|forceps|driver|scissors|type)": "tool",
        r"(what|which)\b.*\b(organ|tissue|structure)": "organ",
        r"(what|which)\b.*\b(step|procedure|task|surgery|phase|purpose)": "procedure",
    }
    return type_of(question, forms)
