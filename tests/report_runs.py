"""Runs made up for the page: recipe, records, predictions and scores, without any training."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from surgvqa import datasets, recipe, scores
from surgvqa.datasets import Example
from surgvqa.metrics import Prediction, Prior
from surgvqa.recipe import Part
from surgvqa.results import file_names

RECIPE = """
model: {{name: tiny-qwen3-vl}}
data: {{format: jsonl, path: {data}}}
image: {{size: 128}}
train: {{lr: {lr}}}
output: {folder}
"""


def answer(
    examples: Sequence[Example], skill: float, seed: int, *, labels: bool = False, boxes: bool = False
) -> list[Prediction]:
    """Made-up answers, right with this probability; drawn from the type's own answers else."""
    rng = random.Random(seed)
    closed: dict[str, list[str]] = {}
    for example in examples:
        known = closed.setdefault(example.question_type, [])
        known += [each for each in example.answers if each not in known]
    made = []
    for example in examples:
        own = sorted(closed[example.question_type])
        given = example.answers[0] if rng.random() < skill else rng.choice(own)
        odds = None
        if labels:
            weights = [math.exp(rng.gauss(0, 1) + 2.5 * (label == given)) for label in own]
            top = own.index(given)
            weights[top] = max(weights) * (1 + rng.random())
            odds = {label: weight / sum(weights) for label, weight in zip(own, weights, strict=True)}
        row = Prediction(
            example.id, example.image_key, example.group, example.question, example.question_type,
            list(example.answers), given, odds,
        )  # fmt: skip
        if boxes:
            left, top = rng.randrange(30), rng.randrange(20)
            expected = {"label": "polyp", "box": [left, top, left + 30, top + 20], "image": 0}
            moved = [edge + rng.randrange(-6, 7) for edge in [left, top, left + 30, top + 20]]
            row = replace(
                row, regions=[{"label": given, "box": moved, "image": 0}], reference_regions=[expected],
                image_sizes=[[80, 60]],
            )  # fmt: skip
        made.append(row)
    return made


def record(
    run: Path,
    predictions: Sequence[Prediction],
    prior: Prior,
    part: Part = "test",
    variant: str = "",
    *,
    resamples: int = 100,
    **more: Any,
) -> None:
    """What an evaluation leaves."""
    names = file_names(part, "test", None, variant)
    lines = [json.dumps(row.row(), ensure_ascii=False) + "\n" for row in predictions]
    (run / names[0]).write_text("".join(lines), encoding="utf-8")
    told = {**scores.score(predictions, prior, resamples=resamples), "split": part, "model": "tiny-qwen3-vl"}
    told |= {"checkpoint": "step-000200", **({"variant": variant} if variant else {}), **more}
    (run / names[1]).write_text(json.dumps(told), encoding="utf-8")


def make(
    folder: Path,
    data: Path,
    *,
    skill: float = 0.75,
    seed: int = 1,
    lr: str = "2.0e-4",
    labels: bool = False,
    boxes: bool = False,
    variants: Sequence[str] = (),
    change: Callable[[Prediction], Prediction] = lambda row: row,
) -> Path:
    """A run's folder on a data set in jsonl."""
    folder.mkdir(parents=True)
    settings = recipe.parse(RECIPE.format(data=data, folder=folder, lr=lr))
    (folder / "recipe.yaml").write_text(settings.dump(), encoding="utf-8")
    dataset = datasets.load(settings.data)
    prior = Prior(dataset.part("train"))
    examples = dataset.part("test")
    record(folder, [change(row) for row in answer(examples, skill, seed, labels=labels, boxes=boxes)], prior)
    for variant in variants:
        level = variant.partition(":")[2]
        lost = skill * (0.12 * int(level) if level.isdecimal() else 0.8)
        record(
            folder, answer(examples, skill - lost, seed, labels=labels, boxes=boxes), prior, variant=variant
        )
    rng = random.Random(seed)
    steps = [
        {
            "step": step, "epoch": step / 70, "loss": 2.2 * math.exp(-step / 60) + 0.25 + rng.gauss(0, 0.05),
            "lr": float(lr) * min(1, step / 12) * 0.5 * (1 + math.cos(math.pi * step / 201)),
            "grad_norm": abs(rng.gauss(0.8, 0.2)), "questions": 64, "tokens": 9000, "seconds": 1.9,
            "questions_per_s": 33 + rng.gauss(0, 1), "tflops": 41.0, "questions_per_gpu_hour": 60_000.0,
            "peak_memory_gib": 31.5, "mfu": 0.43,
        }
        for step in range(1, 201)
    ]  # fmt: skip
    validations = [
        {"step": step, "split": "val", "n": 40, "loss": 1.9 * math.exp(-step / 70) + 0.4, "prior": 0.41,
         "exact": skill * (1 - math.exp(-step / 50))}
        for step in range(20, 201, 20)
    ]  # fmt: skip
    start = {
        "step": 0, "at": "2026-11-21T09:00:00+00:00", "surgvqa": "0.1.0", "commit": "f9f2475",
        "python": "3.11.7", "torch": "2.13.0", "device": "NVIDIA H100 80GB HBM3", "processes": 2,
    }  # fmt: skip
    for name, rows in (("metrics", steps), ("eval", validations), ("starts", [start])):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (folder / "ended.json").write_text(
        '{"code": 0, "name": "done", "reason": "done", "at": "2026-11-21T09:07:00"}'
    )
    return folder
