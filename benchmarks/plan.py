"""What the plan costs, and how full its micro-batches are: `python -m benchmarks.plan`.

Prints, for data sets of 100,000 and a million questions, seconds and memory for the order of an epoch and
milliseconds for a step's share among processes; then how full micro-batches are with the recipes' settings,
and how long it takes to tokenize questions that are all different.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import RESULTS, write
from surgvqa import hub
from surgvqa.datasets import Example, ImageRef
from surgvqa.letterbox import plan_canvas
from surgvqa.plan import Plan, epoch_order
from surgvqa.tokens import ChatTokens
from surgvqa.tree import Questions

SETTINGS = {
    # name: questions per image in the data, tokens of a root, questions per step, limit
    "Kvasir-VQA, 756 canvas, 64 questions": (9, 770, 64, 8192),
    "Kvasir-VQA, 768 canvas, 64 questions": (9, 617, 64, 8192),
    "Kvasir-VQA, 768 canvas, 256 questions": (9, 617, 256, 8192),
    "SSG-VQA, 768 canvas, 64 questions": (38, 617, 64, 8192),
    "Kvasir-VQA, 2,900 tokens, 16 questions": (9, 2941, 16, 8192),
}


def some_plan(questions: int, per_image: int, root: int, step: int, limit: int) -> Plan:
    """A data set with about `per_image` questions for each image, of 18 to 45 tokens."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, max(1, questions // per_image), questions)
    _, image = np.unique(images, return_inverse=True)
    return Plan(
        image=image.astype(np.int64),
        branch_tokens=rng.integers(18, 46, questions),
        root_tokens=np.full(int(image.max()) + 1, root),
        questions=step,
        questions_per_image=8,
        tokens_per_micro_batch=limit,
        seed=0,
    )


def order(questions: int) -> dict[str, Any]:
    """Seconds and peak memory for an epoch's order, and milliseconds to share out a step."""
    plan = some_plan(questions, 38, 617, 64, 8192)
    seconds, _ = timed(lambda: epoch_order(plan.image, 8, 0, 0))
    tracemalloc.start()
    epoch_order(plan.image, 8, 0, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    plan.step(0)
    share, _ = timed(lambda: [plan.share(plan.step(step), 2) for step in range(200)])
    return {
        "questions": questions,
        "order_s": seconds,
        "order_peak_mib": peak / 2**20,
        "share_ms_per_step": share * 1000 / 200,
    }


def fill(name: str) -> dict[str, Any]:
    """Tokens over what the micro-batches could hold; all, and all but the last of each step."""
    per_image, root, step, limit = SETTINGS[name]
    plan = some_plan(40_000, per_image, root, step, limit)
    held, last = [], []
    for number in range(plan.steps_per_epoch - 1):
        (mine,) = plan.share(plan.step(number), 1)
        tokens = [sum(map(plan.tokens, micro_batch)) for micro_batch in mine]
        held += tokens[:-1]
        last += tokens[-1:]
    everything = held + last
    return {
        "setting": name,
        "micro_batches_per_step": len(everything) / (plan.steps_per_epoch - 1),
        "filled": float(np.mean(everything) / limit),
        "filled_before_the_last": float(np.mean(held) / limit) if held else None,
    }


def tokenizing(questions: int) -> dict[str, Any]:
    """Seconds to make branches of questions that are all different, with every check."""
    chat = ChatTokens(hub.find("tiny-qwen3-vl"))
    canvas = plan_canvas((1280, 1024), mode="letterbox", size=768, max_tokens=None, factor=32)
    examples = [
        Example(
            str(n), (ImageRef(str(n // 38)),), f"Where is instrument number {n}?", (f"upper left {n % 97}",)
        )
        for n in range(questions)
    ]
    canvases = {str(n): canvas for n in range(questions // 38 + 1)}
    seconds, _ = timed(lambda: Questions(examples, chat, canvases))
    return {"different_questions": questions, "tokenize_s": seconds}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.plan", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--tokenize", type=int, default=50_000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for size in given.sizes:
        row = order(size)
        cost = f"{row['order_s']:.2f} s, {row['order_peak_mib']:.0f} MiB"
        share = f"{row['share_ms_per_step']:.2f} ms"
        print(f"{size:>9,} questions: order of an epoch {cost}; a step's share {share}")
        rows.append(row)
    for name in SETTINGS:
        row = fill(name)
        before = row["filled_before_the_last"]
        rest = f", {before:.0%} before a step's last" if before else ""
        count = f"{row['micro_batches_per_step']:.1f} micro-batches per step"
        print(f"{name}: {count}, {row['filled']:.0%} full{rest}")
        rows.append(row)
    rows.append(tokenizing(given.tokenize))
    print(f"{given.tokenize:,} different questions tokenized and checked in {rows[-1]['tokenize_s']:.1f} s")
    print(f"written: {write('plan', {'sizes': given.sizes, 'tokenize': given.tokenize}, rows, given.out)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
