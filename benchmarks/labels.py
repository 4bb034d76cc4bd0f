"""Choosing among labels: `python -m benchmarks.labels` scores every label of every question of an image, as
one tree and with each label in a row of its own, and holds the log-probabilities against each other.

Both ways go through the same model and the same kernels, and the rows are packed without padding: what
differs is only what is computed again. Repetitions alternate, and the ratio is taken within each. Reading
the image and cutting it into patches is not timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.record import RESULTS, spread, write
from surgvqa import hub, model
from surgvqa.datasets import Example, ImageRef
from surgvqa.datasets.endovis18_vqa import LABELS
from surgvqa.decode import log_probabilities
from surgvqa.letterbox import snap
from surgvqa.tokens import ChatTokens
from surgvqa.tree import Tree, pack

TOOLS = (
    "bipolar forceps", "prograsp forceps", "large needle driver", "monopolar curved scissors",
    "ultrasound probe", "suction", "clip applier", "stapler",
)  # fmt: skip
LIMIT = 1e-5
"""Largest relative difference between the two ways, in fp32."""


def ways(chat: ChatTokens, size: int, questions: int, most: int) -> dict[str, list[list[Tree]]]:
    """The trees of each pack, for both ways; a pack has at most `most` tokens."""
    folder = chat.folder
    side = snap(size, folder.factor)
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    patches = chat.patches(Image.fromarray(noise))
    root = chat.root([(side // folder.factor, side // folder.factor)])
    texts = [f"{asked} {tool}?" for asked in ("what is the state of", "where is") for tool in TOOLS]
    examples = [Example(text, (ImageRef("x"),), text, LABELS[:1]) for text in texts[:questions]]
    answered = [replace(example, answers=(label,)) for example in examples for label in LABELS]

    def tree(branches: Sequence[Any], answers: int) -> Tree:
        grid = side // folder.patch, side // folder.patch
        return Tree(root, branches, [1.0] * answers, patches, [grid])

    whole = tree(chat.candidates(examples, [LABELS] * questions), len(answered))
    rows = [tree([branch], 1) for branch in chat.branches(answered)]
    longest = len(root.ids) + max(row.branches[0].tokens for row in rows)
    each = most // longest
    return {"tree": [[whole]], "rows": [rows[start : start + each] for start in range(0, len(rows), each)]}


def timed(network: Any, packs: list[list[Tree]]) -> tuple[float, int, Tensor]:
    """Seconds in the model, tokens, and the log-probability of each label."""
    seconds, tokens, found = 0.0, 0, []
    for trees in packs:
        packed = pack(trees)
        began = time.perf_counter()
        found.append(log_probabilities(network, packed))
        seconds += time.perf_counter() - began
        tokens += packed.tokens
    return seconds, tokens, torch.cat(found)


def measured(name: str, questions: int, size: int, most: int, repetitions: int) -> Iterator[dict[str, Any]]:
    """A row for each repetition. Raises SystemExit where the two ways do not give the same numbers."""
    folder = hub.find(name)
    network = model.build(folder, seed=1)
    packs = ways(ChatTokens(folder), size, questions, most)
    timed(network, packs["tree"]), timed(network, packs["rows"][:1])  # warm
    for repetition in range(repetitions):
        order = ("tree", "rows") if repetition % 2 == 0 else ("rows", "tree")
        found = {way: timed(network, packs[way]) for way in order}
        (tree_seconds, tree_tokens, ours), (row_seconds, row_tokens, theirs) = found["tree"], found["rows"]
        difference = float(((ours - theirs).abs() / theirs.abs()).max())
        if not difference <= LIMIT:
            raise SystemExit(f"{name}: log-probabilities differ by {difference:.1e} relative, above {LIMIT}")
        yield {
            "model": name,
            "questions": questions,
            "labels": len(LABELS),
            "tree_seconds": tree_seconds,
            "rows_seconds": row_seconds,
            "ratio": row_seconds / tree_seconds,
            "tree_tokens": tree_tokens,
            "rows_tokens": row_tokens,
            "max_relative_difference": difference,
        }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.labels", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["tiny-qwen2-vl", "tiny-qwen3-vl"])
    parser.add_argument("--questions", type=int, nargs="+", default=[8, 1], help="per image, at most 16")
    parser.add_argument("--size", type=int, default=768, help="side of the canvas")
    parser.add_argument("--tokens", type=int, default=8192, help="most tokens in a pack of rows")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(argv)

    rows: list[dict[str, Any]] = []
    for name in given.models:
        for questions in given.questions:
            mine = list(measured(name, questions, given.size, given.tokens, given.repetitions))
            ratio = spread([row["ratio"] for row in mine])
            print(
                f"{name}, {questions} questions, {len(LABELS)} labels: "
                f"{ratio['median']:.1f}× as fast ({ratio['min']:.1f} to {ratio['max']:.1f}), "
                f"{mine[0]['tree_tokens']:,} tokens against {mine[0]['rows_tokens']:,}, "
                f"largest relative difference {max(row['max_relative_difference'] for row in mine):.1e}"
            )
            rows += mine
    settings = {"size": given.size, "tokens": given.tokens, "repetitions": given.repetitions}
    print(f"written: {write('labels', settings, rows, given.out)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
