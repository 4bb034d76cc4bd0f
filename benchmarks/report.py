"""What the page of a large evaluation costs: `python -m benchmarks.report` makes a test part of 60,000
questions on 4,000 JPEG files of 720 × 576 to 1280 × 1024 pixels with answers chosen among labels, times
`surgvqa report` on it, and how long headless Chromium takes until the page is ready and for a search in it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import audit
from benchmarks.record import RESULTS, write
from surgvqa import datasets, recipe, report, scores
from surgvqa.metrics import Prediction, Prior
from surgvqa.scan import cores

LABELS = [str(number) for number in range(6)]


def make(folder: Path, images: int, questions: int) -> Path:
    """A run's folder with predictions and scores of a test part."""
    audit.make(folder, images, questions)
    lines = [json.loads(line) for line in (folder / "q.jsonl").read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(lines):
        row["split"] = "test" if number else "train"
        row["question"] = f"{row['question']} ({number % 997})"
    text = "".join(json.dumps(row) + "\n" for row in lines)
    (folder / "q.jsonl").write_text(text, encoding="utf-8")
    run = folder / "run"
    run.mkdir()
    words = [f"data.path={folder / 'q.jsonl'}", f"output={run}"]
    settings = recipe.parse(
        "{model: {name: tiny-qwen3-vl}, data: {format: jsonl}, image: {size: 768}}", words
    )
    (run / "recipe.yaml").write_text(settings.dump(), encoding="utf-8")
    dataset, rng = datasets.load(settings.data), random.Random(0)
    predictions = []
    for example in dataset.part("test"):
        weights = [rng.random() ** 4 for _ in LABELS]
        odds = {label: weight / sum(weights) for label, weight in zip(LABELS, weights, strict=True)}
        answer = example.answers[0] if rng.random() < 0.8 else max(LABELS, key=odds.__getitem__)
        predictions.append(Prediction.of(example, answer, probabilities=odds))
    with (run / "predictions.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row.row()) + "\n" for row in predictions)
    told = {**scores.score(predictions, Prior(dataset.part("train")), resamples=200), "split": "test"}
    (run / "scores.json").write_text(json.dumps(told), encoding="utf-8")
    return run


def opened(page: Path, profile: Path) -> dict[str, float]:
    """Seconds until the page is ready in Chromium and until a search is done; nothing without Chromium."""
    if not shutil.which("chromium"):
        return {}
    file = Path(__file__).parents[1] / "tests/browser.py"
    spec = importlib.util.spec_from_file_location("browser", file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.Browser(profile) as browser:
        ready = browser.open(page)
        began = time.perf_counter()
        browser.js(
            "(() => { const it = document.getElementById('query'); it.value = 'polyp 12';"
            "document.getElementById('filters').requestSubmit() })()"
        )
        return {"ready_s": ready, "search_s": time.perf_counter() - began}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.report", description=__doc__.partition(":")[0])
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--questions", type=int, default=60_000)
    parser.add_argument("--scratch", type=Path, help="where the images go (default: the temporary folder)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for report.json")
    given = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=given.scratch) as name:
        run = make(Path(name), given.images, given.questions)
        for way, pictures in (("without pictures", False), ("with pictures", True)):
            load, began, busy = os.getloadavg()[0], time.perf_counter(), time.process_time()
            page = report.write([run], pictures=pictures)
            row = {"way": way, "seconds": time.perf_counter() - began, "load": load}
            row |= {"cpu_seconds": time.process_time() - busy, "mb": page.stat().st_size / 1e6}
            sides = re.findall(r"longer side at most (\d+) pixels", page.read_text(encoding="utf-8"))
            row["side"] = int(sides[0]) if sides else None
            rows.append({**row, **opened(page, Path(name, f"profile-{pictures}"))})
            print(", ".join(f"{key} {value}" for key, value in rows[-1].items()))
    settings = {"images": given.images, "questions": given.questions, "cores": cores()}
    print(f"written: {write('report', settings, rows, given.out)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
