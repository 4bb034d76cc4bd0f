"""What an audit costs: `python -m benchmarks.audit` makes a data set as large as Kvasir-VQA, 58,849 questions
on 6,500 JPEG files of 720 × 576 to 1280 × 1024 pixels, and times `surgvqa check`'s work on it: rows and
headers alone, everything, and everything again with what is remembered.

The files are copies of 40 pictures with other bytes at their end, so that each is decoded.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.record import RESULTS, write
from surgvqa import findings, hub, recipe
from surgvqa.scan import cores, near

SIZES = ((720, 576), (768, 576), (1280, 1024), (1225, 966))
PICTURES = 40
QUESTIONS = (
    "Is there a polyp?", "How many polyps are in the image?", "Where in the image is the abnormality?",
    "What color is the abnormality? If more than one separate with ;", "Is there text?",
    "What type of procedure is the image taken from?", "Have all polyps been removed?",
    "What is the size of the polyp?", "Is this finding easy to detect?", "How many findings are present?",
)  # fmt: skip
NEAR = (33_000, 77_000)
"""Images of val and test, and of train, of the largest corpora: their hashes are compared pair by pair."""


def make(folder: Path, images: int, questions: int) -> int:
    """A recipe and its data; returns the bytes of all images."""
    rng = np.random.default_rng(0)
    pictures = []
    for number in range(PICTURES):
        size = SIZES[number % len(SIZES)]
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
        buffer = BytesIO()
        Image.fromarray(noisy).save(buffer, "JPEG", quality=80)
        pictures.append(buffer.getvalue())
    for number in range(images):
        data = pictures[number % PICTURES] + number.to_bytes(8, "little")
        (folder / f"{number}.jpg").write_bytes(data)
    parts = ("train", "train", "train", "train", "train", "val", "test")
    with (folder / "q.jsonl").open("w", encoding="utf-8") as file:
        for number in range(questions):
            image, place = number % images, number // images
            row = {
                "image": f"{image}.jpg",
                "question": QUESTIONS[place % len(QUESTIONS)],
                "answer": str(rng.integers(0, 6)),
                "question_type": f"type {place % 5}",
                "split": parts[image % len(parts)],
            }
            file.write(json.dumps(row) + "\n")
    return sum(file.stat().st_size for file in folder.glob("*.jpg"))


def times(folder: Path) -> list[dict[str, Any]]:
    """Seconds of each way to audit, in the order in which they follow each other."""
    words = [f"data.path={folder / 'q.jsonl'}", f"output={folder / 'run'}"]
    settings = recipe.parse(
        "{model: {name: tiny-qwen3-vl}, data: {format: jsonl}, image: {size: 768}}", words
    )
    model = hub.find(settings.model.name)
    rows = []
    for way, headers in (("rows and headers", True), ("everything", False), ("everything again", False)):
        load, began, busy = os.getloadavg()[0], time.perf_counter(), time.process_time()
        found = findings.examine("benchmark", settings, model, headers=headers)
        row = {"way": way, "seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - busy}
        images = found.content["images"]
        rows.append({**row, "decoded": images["decoded_now"], "images": images["count"], "load": load})
    return rows


def comparing() -> dict[str, Any]:
    """Seconds to compare the hashes of the largest corpora."""
    rng = np.random.default_rng(0)
    ours, theirs = ([f"{value:016x}" for value in rng.integers(0, 2**63, number)] for number in NEAR)
    load, began, busy = os.getloadavg()[0], time.perf_counter(), time.process_time()
    near(ours, theirs, 4)
    row = {"way": f"comparing {NEAR[0]:,} hashes with {NEAR[1]:,}", "seconds": time.perf_counter() - began}
    return {**row, "cpu_seconds": time.process_time() - busy, "decoded": 0, "images": sum(NEAR), "load": load}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.audit", description=__doc__.partition(":")[0])
    parser.add_argument("--images", type=int, default=6500)
    parser.add_argument("--questions", type=int, default=58_849)
    parser.add_argument("--scratch", type=Path, help="where the images go (default: the temporary folder)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for audit.json")
    given = parser.parse_args(argv)
    cache = os.environ.get("SURGVQA_CACHE")
    try:
        with tempfile.TemporaryDirectory(dir=given.scratch) as folder:
            os.environ["SURGVQA_CACHE"] = str(Path(folder, "cache"))
            size = make(Path(folder), given.images, given.questions)
            time.sleep(2)  # files changed just now are not remembered
            rows = [*times(Path(folder)), comparing()]
    finally:
        os.environ.pop("SURGVQA_CACHE")
        if cache is not None:
            os.environ["SURGVQA_CACHE"] = cache
    settings = {"images": given.images, "questions": given.questions, "gb": size / 1e9, "cores": cores()}
    file = write("audit", settings, rows, given.out)
    for row in rows:
        busy = f"{row['cpu_seconds']:.1f} s of processors"
        print(f"{row['way']}: {row['seconds']:.1f} s ({busy}), load {row['load']:.1f}")
    print(f"written: {file}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
