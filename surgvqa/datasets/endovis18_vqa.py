"""EndoVis-18-VQA (Seenivasan et al. 2022): questions on the robotic nephrectomies of MICCAI 2018.

    seq_3/left_frames/frame000.png            (or left_fr)
    seq_3/vqa/Classification/frame000_QA.txt  one `question|answer` in a line; else vqa/Sentence

The authors train on eleven sequences and report on 1, 5 and 16, on which they also choose their model. Here
these three are `test` and there is no `val`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from surgvqa.datasets import Example, ImageRef, Problem
from surgvqa.recipe import BadInput, Part, Source

TRAIN = frozenset({2, 3, 4, 6, 7, 9, 10, 11, 12, 14, 15})
TEST = frozenset({1, 5, 16})

# Written as the corpus writes them: `Suction` is an action. The authors' models choose among all 18,
# whatever the question.
LABELS = (
    "kidney", "Idle", "Grasping", "Retraction", "Tissue_Manipulation", "Tool_Manipulation", "Cutting",
    "Cauterization", "Suction", "Looping", "Suturing", "Clipping", "Staple", "Ultrasound_Sensing",
    "left-top", "right-top", "left-bottom", "right-bottom",
)  # fmt: skip

_LAYOUT = (
    "seq_<number>/left_frames/*.png (or left_fr) and seq_<number>/vqa/Classification/*.txt (or Sentence)"
)


def read(source: Source) -> Iterator[Example | Problem]:
    """Questions of all sequences below the source's folder. Raises BadInput where it holds none.

    Warns where sequences are missing, where frames and question files differ in number (the training and
    the test release of the challenge both name their folders seq_1 to seq_4, so images may be of the wrong
    one), and where answers are not among the 18 of the corpus.
    """
    root = Path(source.path or ".")
    sequences = _sequences(root)
    warnings: list[str] = []
    uneven: list[str] = []
    unknown: Counter[str] = Counter()
    for number, folder in sorted(sequences.items()):
        frames = _frames(folder)
        questions = _question_folder(folder)
        if questions is None:
            warnings.append(f"seq_{number} has no vqa/Classification or vqa/Sentence and is left out")
            continue
        closed = questions.name == "Classification"
        if not closed:
            warnings.append(
                f"seq_{number} has no vqa/Classification; vqa/Sentence is used, whose answers are sentences"
            )
        files = sorted(file for file in questions.iterdir() if file.suffix == ".txt")
        if len(files) != len(frames):
            uneven.append(f"seq_{number} ({len(frames)} frames, {len(files)} files)")
        for file in files:
            for row in _rows(file, number, frames):
                yield replace(row, labels=LABELS) if closed and isinstance(row, Example) else row
                if closed and isinstance(row, Example) and row.answers[0] not in LABELS:
                    unknown[row.answers[0]] += 1
    if missing := sorted((TRAIN | TEST) - sequences.keys()):
        listed = ", ".join(f"seq_{number}" for number in missing)
        warnings.append(f"lacks {listed}, so its scores cannot be compared with published ones")
    if uneven:
        warnings.append(
            f"frames and question files differ in number in {', '.join(uneven)}; where they differ much, "
            "check that the frames are those of the challenge's training release"
        )
    if unknown:
        listed = ", ".join(f"{label!r} ({count})" for label, count in unknown.most_common(5))
        warnings.append(f"{unknown.total()} answers are not among the corpus's 18: {listed}")
    for warning in warnings:
        yield Problem(str(root), warning, warning=True)


def _sequences(root: Path) -> dict[int, Path]:
    """Number → folder, of `root` or of the EndoVis-18-VQA in it."""
    for folder in (root, root / "EndoVis-18-VQA"):
        if folder.is_dir():
            names = {entry.name: entry for entry in folder.iterdir() if entry.is_dir()}
            found = {
                int(name[4:]): entry for name, entry in names.items() if re.fullmatch(r"seq_\d{1,4}", name)
            }
            if found:
                return found
    if not root.is_dir():
        raise BadInput(f"{root}: no such folder; EndoVis-18-VQA is a folder with {_LAYOUT}")
    listed = ", ".join(sorted(entry.name for entry in root.iterdir())[:5]) or "nothing"
    raise BadInput(f"{root}: is not EndoVis-18-VQA, which has {_LAYOUT}; found {listed}")


def _frames(sequence: Path) -> dict[str, Path]:
    """Stem → image."""
    for name in ("left_frames", "left_fr"):
        if (sequence / name).is_dir():
            files = (sequence / name).iterdir()
            return {file.stem: file for file in files if file.suffix in (".png", ".jpg") and file.is_file()}
    return {}


def _question_folder(sequence: Path) -> Path | None:
    folders = (sequence / "vqa" / name for name in ("Classification", "Sentence"))
    return next((folder for folder in folders if folder.is_dir()), None)


def _rows(file: Path, number: int, frames: dict[str, Path]) -> Iterator[Example | Problem]:
    frame = file.stem.split("_")[0]
    if frame not in frames:
        yield Problem(str(file), f"there is no {frame}.png in seq_{number}/left_frames or left_fr")
        return
    if not file.is_file():
        yield Problem(str(file), "is not a file")
        return
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        yield Problem(str(file), f"cannot be read: {error}")
        return
    image = ImageRef(f"seq_{number}/{frame}", path=frames[frame])
    for index, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{file}:{index}"
        fields = [field.strip() for field in line.split("|")]
        if len(fields) != 2 or not all(fields) or "\0" in line:
            yield Problem(place, f"must be `question|answer`, not {line[:80]!r}")
            continue
        question, answer = fields
        yield Example(
            id=f"{image.key}:{index}",
            images=(image,),
            question=question,
            answers=(answer,),
            question_type=_question_type(question),
            group=f"seq_{number}",
            split=_part(number),
            place=place,
        )


def _part(number: int) -> Part | None:
    return "train" if number in TRAIN else "test" if number in TEST else None


def _question_type(question: str) -> str:
    """By the four forms of question: the last only comes with sentences for answers."""
    forms = {
        r"what organ\b": "organ",
        r"what is the state of\b": "state",
        r"where is\b": "location",
        r"what tools?\b": "tools",
    }
    return next((kind for form, kind in forms.items() if re.match(form, question, re.IGNORECASE)), "other")
