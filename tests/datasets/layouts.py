"""The smallest sound data set of every format, written where a test wants it.

A new format gets a function here; tests/datasets/test_fuzz.py then throws bytes at its reader.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

PIXEL = bytes.fromhex("424d1e000000000000001a0000000c000000010001000100180000ff0000")
"""A BMP image of one pixel; readers open no image."""


def rows() -> list[dict[str, Any]]:
    """Twelve questions on three images, with every column of a table."""
    return [
        {
            "id": f"q{number}",
            "image": f"{number % 3}.png",
            "question": f"Is there a polyp, {number}?",
            "answer": ["yes", "no", "2"][number % 3],
            "question_type": "yes_no",
            "group": f"video {number % 3}",
            "split": ["train", "val", "test"][number % 3],
            "stage": number % 3 + 1,
        }
        for number in range(12)
    ]


def _images(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(PIXEL)


def jsonl(folder: Path) -> dict[str, Any]:
    _images(folder, "0.png", "1.png", "2.png")
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    return {"path": str(folder / "q.jsonl")}


def csv(folder: Path) -> dict[str, Any]:
    _images(folder, "0.png", "1.png", "2.png")
    lines = [",".join(rows()[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows())]
    (folder / "q.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"path": str(folder / "q.csv")}


def parquet(folder: Path) -> dict[str, Any]:
    import pyarrow
    import pyarrow.parquet

    _images(folder, "0.png", "1.png", "2.png")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows()), folder / "q.parquet")
    return {"path": str(folder / "q.parquet")}


def demo(folder: Path) -> dict[str, Any]:
    jsonl(folder)
    (folder / "q.jsonl").rename(folder / "questions.jsonl")
    return {"path": str(folder)}


def kvasir_vqa(folder: Path) -> dict[str, Any]:
    _images(folder, *(f"images/{number}.jpg" for number in range(3)))
    lines = [
        f"polyps,How many polyps are in the image?,{number % 4},{number % 3}"  # as the corpus's own columns
        for number in range(12)
    ]
    (folder / "metadata.csv").write_text("\n".join(["source,question,answer,img_id", *lines]) + "\n")
    return {"path": str(folder), "split": {"by": "image"}}


def endovis18_vqa(folder: Path) -> dict[str, Any]:
    for sequence in (1, 2):
        for frame in ("frame000", "frame001"):
            _images(folder, f"seq_{sequence}/left_frames/{frame}.png")
            file = folder / f"seq_{sequence}/vqa/Classification/{frame}_QA.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = ["what organ is being operated?|kidney", "where is bipolar forceps located?|left-top"]
            file.write_text("\n".join([*lines, "what is the state of clip applier?|Idle"]) + "\n")
    return {"path": str(folder)}


LAYOUTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "demo": demo,
    "jsonl": jsonl,
    "csv": csv,
    "parquet": parquet,
    "kvasir_vqa": kvasir_vqa,
    "endovis18_vqa": endovis18_vqa,
}
"""Format → what writes it into an empty folder and returns the further keys of a recipe's `data`."""
