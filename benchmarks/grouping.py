"""What grouping does to learning: `python -m benchmarks.grouping` trains the demo with 1, 4 and 8 questions
of an image per group, from several seeds, and scores each model on the test part.

Every setting first gets the same number of questions. Then the slower ones get as many steps as they can do
in the time that the largest group needs, with a schedule of that length.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, write


def one_run(
    recipe: Path, folder: Path, group: int, seed: int, steps: int | None, extra: Sequence[str]
) -> dict[str, Any]:
    """Train and score one model; returns its row."""
    run = folder / f"group{group}-seed{seed}-{steps or 'all'}"
    overrides = [
        f"batch.questions_per_image={group}", f"train.seed={seed}", f"output={run}",
        "eval.every=null", "checkpoint.every=null", *([f"train.max_steps={steps}"] if steps else []), *extra,
    ]  # fmt: skip
    subprocess.run([sys.executable, "-m", "surgvqa.train", str(recipe), *overrides], check=True)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    scores = json.loads((run / "scores.json").read_text(encoding="utf-8"))["overall"]
    return {
        "questions_per_image": group,
        "seed": seed,
        "steps": len(metrics),
        "questions": sum(row["questions"] for row in metrics),
        "seconds": sum(row["seconds"] for row in metrics),
        "exact": scores["exact"],
        "prior": scores["prior"],
        "final_loss": statistics.mean(row["loss"] for row in metrics[-20:]),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.grouping", description=__doc__)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/demo.yaml"))
    parser.add_argument("--groups", type=int, nargs="+", default=[8, 4, 1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", type=Path, default=Path("runs/grouping"), help="folder for the runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_intermixed_args(argv)

    same_questions = [
        one_run(given.recipe, given.runs, group, seed, None, given.overrides) | {"compared": "questions"}
        for seed in given.seeds
        for group in given.groups
    ]
    seconds = {
        group: statistics.median(
            row["seconds"] for row in same_questions if row["questions_per_image"] == group
        )
        for group in given.groups
    }
    largest = max(given.groups)
    same_time = [
        one_run(given.recipe, given.runs, group, seed, steps, given.overrides) | {"compared": "time"}
        for seed in given.seeds
        for group in given.groups
        if group != largest
        for steps in [max(1, round(same_questions[0]["steps"] * seconds[largest] / seconds[group]))]
    ]
    rows = same_questions + same_time
    file = write("grouping", {"recipe": str(given.recipe), "overrides": given.overrides}, rows, given.out)
    for compared in ("questions", "time"):
        print(f"the same {compared}:")
        for group in given.groups:
            found = [
                r
                for r in rows
                if r["questions_per_image"] == group and (r["compared"] == compared or group == largest)
            ]
            exact = [100 * row["exact"] for row in found]
            print(
                f"  {group} per image: {statistics.mean(exact):5.1f} % exact (each seed: "
                f"{', '.join(f'{value:.1f}' for value in exact)}), "
                f"{statistics.mean(row['questions'] for row in found):,.0f} questions, "
                f"{statistics.mean(row['seconds'] for row in found):.0f} s"
            )
    print(f"written: {file}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
