"""Data speed: `python -m benchmarks.data` measures how many images per second one core reads and decodes,
draws on a canvas and cuts into patches, and what data workers deliver together.

With the speeds that benchmarks.train measured on this machine it says whether workers keep up with training;
and how many a GPU needs that trains on 100 questions per second with 9 questions per image.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.inputs import CANVAS, FAMILIES, SOURCES, Setting, write_images, write_model
from benchmarks.record import RESULTS, spread, write
from surgvqa.augment import Augmented, endoscopy
from surgvqa.letterbox import draw, find_picture, open_rgb
from surgvqa.plan import trees_of
from surgvqa.tree import Questions, packs

IMAGES = 16
PER_IMAGE = 9
GPU_QUESTIONS_PER_S = 100
"""What one GPU is to train on, with PER_IMAGE questions per image."""

Item = TypeVar("Item")
Made = TypeVar("Made")


def per_second(
    work: Callable[[Item], Made], items: Sequence[Item], rounds: int
) -> tuple[list[float], list[Made]]:
    """How many of `items` per second, in each round after a first that is not kept; and what was made."""
    speeds: list[float] = []
    made: list[Made] = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        made = [work(item) for item in items]
        speeds.append(len(items) / (time.perf_counter() - began))
    return speeds[1:], made


def stages(questions: Questions, files: Sequence[Path], rounds: int) -> dict[str, dict[str, float]]:
    """Images per second through each stage, on one core."""
    reading, decoded = per_second(lambda file: open_rgb(file.read_bytes()), files, rounds)
    canvases = [questions.canvases[str(file)] for file in files]
    drawing, drawn = per_second(
        lambda pair: draw(pair[0], pair[1], "black"), list(zip(decoded, canvases, strict=True)), rounds
    )
    cutting, _ = per_second(questions.chat.patches, drawn, rounds)
    together = [1 / (1 / a + 1 / b + 1 / c) for a, b, c in zip(reading, drawing, cutting, strict=True)]
    return {
        "read_and_decode": spread(reading),
        "canvas": spread(drawing),
        "patches": spread(cutting),
        "all_stages": spread(together),
    }


def options(questions: Questions, files: Sequence[Path], rounds: int) -> dict[str, dict[str, float]]:
    """Images per second through what recipes may ask for on top, on one core."""
    decoded = [open_rgb(file.read_bytes()) for file in files]
    canvases = [questions.canvases[str(file)] for file in files]
    moved = [Augmented(canvas, endoscopy(0, 0, str(number))) for number, canvas in enumerate(canvases)]
    scaled = [canvas.scale(image) for canvas, image in zip(canvases, decoded, strict=True)]
    augmenting, _ = per_second(
        lambda pair: pair[0].place(pair[1], "black"), list(zip(moved, scaled, strict=True)), rounds
    )
    finding, _ = per_second(find_picture, decoded, rounds)
    return {"augment": spread(augmenting), "find_border": spread(finding)}


def delivered(setting: Setting, workers: int, repeats: int, rounds: int) -> list[float]:
    """Images per second that packs arrive with, each image read `repeats` times and never kept.

    The clock starts with the first pack, so the workers' start is not counted.
    """
    questions = setting.questions()
    questions.room = 0
    trees = trees_of(questions.image) * repeats
    speeds = []
    for _ in range(rounds):
        arriving = packs(questions, [(None, [tree], None) for tree in trees], workers=workers)
        next(arriving)
        began = time.perf_counter()
        rest = sum(1 for _ in arriving)
        speeds.append(rest / (time.perf_counter() - began))
    return speeds


def needed(results: Path, family: str) -> dict[int, float]:
    """Images per second that training took in, by questions per image, as benchmarks.train measured it."""
    file = results / "train.json"
    if not file.is_file():
        return {}
    return {
        row["questions_per_image"]: row["questions_per_s"]["median"] / row["questions_per_image"]
        for row in json.loads(file.read_text(encoding="utf-8"))["rows"]
        if row["way"] == "trees" and row["family"] == family
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.data", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=IMAGES, help="of each size")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=4, help="times that workers read each image")
    parser.add_argument("--canvas", type=int, default=CANVAS, help="side in pixels")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as parent:
        for family in given.families:
            folder = write_model(family, "tiny", Path(parent))
            for width, height in SOURCES:
                files = write_images(given.images, Path(parent) / f"{width}", [(width, height)])
                setting = Setting(folder, files, PER_IMAGE, given.canvas)
                row: dict[str, Any] = {"family": family, "source": [width, height]}
                row |= {"stages": stages(setting.questions(), files, given.rounds)}
                row["options"] = options(setting.questions(), files, given.rounds)
                row["delivered"] = {
                    str(workers): spread(delivered(setting, workers, given.repeats, given.rounds))
                    for workers in given.workers
                }
                one = row["stages"]["all_stages"]["median"]
                asked = GPU_QUESTIONS_PER_S / PER_IMAGE
                row |= {"gpu_images_per_s": asked, "gpu_workers": math.ceil(asked / one)}
                taken = needed(given.out, family)
                row["training_images_per_s"] = {str(group): speed for group, speed in taken.items()}
                table.append(row)
                print(
                    f"{family}, {width} x {height} JPEG to a canvas of {given.canvas}, images/s on one core:"
                )
                for name, speed in (row["stages"] | row["options"]).items():
                    print(f"  {name.replace('_', ' '):16}{speed['median']:7.1f}")
                for workers, speed in row["delivered"].items():
                    print(f"  {workers} workers       {speed['median']:7.1f} delivered")
                print(
                    f"  {GPU_QUESTIONS_PER_S} questions/s, {PER_IMAGE} per image, need {asked:.1f} images/s: "
                    f"{row['gpu_workers']} workers"
                )
                for group, speed in taken.items():
                    print(
                        f"  training here, {group} per image, takes {speed:.2f} images/s: "
                        f"{speed / one:.1%} of one core"
                    )
    settings = {key: getattr(given, key) for key in ("images", "rounds", "repeats", "canvas")}
    print(f"written: {write('data', settings, table, given.out)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
