"""Choosing among labels: `python -m benchmarks.labels` scores every label of every question of an image, as
one tree and with each label in a row of its own, and holds the log-probabilities against each other.

Both ways go through the same model and the same kernels, and rows are packed without padding: what differs is
only what is computed again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import inputs
from benchmarks.inputs import Setting, write_images, write_model
from benchmarks.record import write
from benchmarks.train import PACK
from benchmarks.turns import Measured, in_turn, line, peak_gib, rows, stopwatch
from surgvqa.datasets.endovis18_vqa import LABELS
from surgvqa.decode import log_probabilities
from surgvqa.tree import Questions

LIMIT = 1e-5
"""Largest relative difference between the two ways in fp32."""


def trees(setting: Setting) -> Measured:
    """All questions and labels of each image in one forward pass."""
    asked = setting.questions()
    questions = Questions(asked.examples, asked.chat, asked.canvases, labels=[LABELS] * len(asked))
    per_image = range(0, len(questions), setting.per_image)
    jobs = [[list(range(start, start + setting.per_image))] for start in per_image]
    return _score(setting, questions, jobs, asked=True)


def rows_apart(setting: Setting) -> Measured:
    """A row for each label, as many rows in a pass as a pack of training has tokens for."""
    asked = setting.questions()
    examples = [replace(each, answers=(label,)) for each in asked.examples for label in LABELS]
    questions = Questions(examples, asked.chat, asked.canvases)
    at_once = PACK // int(questions.root_tokens.max() + questions.branch_tokens.max())
    numbers = [[number] for number in range(len(questions))]
    jobs = [numbers[start : start + at_once] for start in range(0, len(numbers), at_once)]
    return _score(setting, questions, jobs, asked=False)


def _score(
    setting: Setting, questions: Questions, jobs: Sequence[Sequence[Sequence[int]]], *, asked: bool
) -> Measured:
    device = torch.device(setting.device)
    network = setting.network().eval()
    attn = "flex" if device.type == "cuda" else "sdpa"
    tokens, found = 0, []
    with stopwatch(device) as seconds:
        for job in jobs:
            pack = questions.pack(job, asked=asked, cuda=device.type == "cuda")
            found += log_probabilities(
                network, pack.to(device), attn=attn, autocast=setting.autocast
            ).tolist()
            tokens += pack.tokens
    return Measured(
        questions=len(setting.images) * setting.per_image,
        seconds=seconds[0],
        tokens=tokens,
        padding=0,
        nats=tuple(found),
        peak_gib=peak_gib(device),
    )


WAYS = {"trees": trees, "rows": rows_apart}


def difference(results: dict[str, list[Measured]]) -> float:
    """Largest relative difference between the two ways' log-probabilities."""
    ours, theirs = (torch.tensor(results[way][0].nats, dtype=torch.float64) for way in WAYS)
    return float(((ours - theirs).abs() / theirs.abs()).max())


def main(argv: Sequence[str] | None = None) -> int:
    parser = inputs.options("labels", __doc__.partition(":")[0])
    parser.add_argument("--groups", type=int, nargs="+", default=(1, 8), help="questions per image")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one-process", action="store_true", help="all ways share one peak memory")
    given = parser.parse_args(argv)
    precision = "bf16" if given.device.startswith("cuda") else "fp32"
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as parent:
        images = write_images(1, Path(parent) / "images")
        for family in given.families:
            folder = write_model(family, given.size, Path(parent))
            for group in given.groups:
                setting = Setting(folder, images, group, given.canvas, given.device, precision)
                warm_up = replace(setting, per_image=1)
                results = in_turn(WAYS, setting, warm_up, given.rounds, apart=not given.one_process)
                differ = difference(results)
                made = rows(
                    results, "trees",
                    family=family, questions_per_image=group, labels=len(LABELS), difference=differ,
                )  # fmt: skip
                table += made
                for row in made:
                    print(line(row, "trees"), flush=True)
                print(f"{'':9} log-probabilities differ by {differ:.1e} (relative)", flush=True)
                if precision == "fp32" and differ > LIMIT:
                    raise SystemExit(f"{family}: more than {LIMIT}")
    settings = {key: getattr(given, key) for key in ("rounds", "size", "canvas", "device")}
    print(f"written: {write('labels', settings, table, given.out)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
