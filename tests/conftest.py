"""What several test files need: tiny models, examples on generated images, the real data where it is."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import CATALOGUE
from PIL import Image

os.environ["HF_HUB_OFFLINE"] = "1"  # before any test file imports what reads it

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
FAMILIES = ("tiny-qwen2-vl", "tiny-qwen3-vl")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Generated data and tiny models go into a folder of this test session, also in processes it starts."""
    os.environ["SURGVQA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def hub_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the copies that `datasets` makes out of the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the real files (../shared/data) are not here; a generated twin of this test runs")
    return SHARED


@pytest.fixture(scope="session", params=FAMILIES)
def chat(request: pytest.FixtureRequest) -> Any:
    """Each family's tokens, by way of its tiny model's folder."""
    from surgvqa import hub
    from surgvqa.tokens import ChatTokens

    return ChatTokens(
        hub.find(request.param), system="Answer in a few words.", instructions={"count": "A number."}
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        names = {name for mark in item.iter_markers("fault") for name in mark.args}
        assert names <= CATALOGUE.keys(), item.nodeid
        item.user_properties += [("fault", name) for name in names]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """With `-m fault`: how often each fault was tried, and survived."""
    if "fault" not in config.getoption("markexpr"):
        return
    found = {
        outcome: Counter(
            name
            for report in terminalreporter.stats.get(outcome, [])
            for key, name in report.user_properties
            if key == "fault"
        )
        for outcome in ("passed", "failed", "error")
    }
    terminalreporter.section("faults")
    terminalreporter.write_line(f"{'fault':48}{'tries':>8}{'survived':>10}")
    for name, what in CATALOGUE.items():
        tries = sum(counts[name] for counts in found.values())
        terminalreporter.write_line(f"{f'{name:4} {what}':48}{tries:>8}{found['passed'][name]:>10}")


def noise_image(width: int, height: int, seed: int) -> Image.Image:
    """A smooth random picture."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


TOPICS = [
    ("How many polyps are there?", ("none", "one", "two polyps, side by side"), "count"),
    ("Is there bleeding?", ("yes", "no"), "yes_no"),
    ("Which instrument is used?", ("grasper", "a pair of monopolar curved scissors"), "which"),
    ("Where is the polyp?", ("upper left", "lower right", "in the middle of the image"), "where"),
    ("What colour is it?", ("pink", "red; white"), "colour"),
    ("Is text visible?", ("no", "yes"), "yes_no"),
    ("What is the state of the jaw?", ("open", "closed"), "state"),
    ("Any artefact?", ("no", "green box"), "which"),
    ("Which organ?", ("colon", "stomach"), "which"),
]


TINY_RUN = """
model: {name: tiny-qwen3-vl, tune: full, train_vision: true, train_merger: true}
data: {format: jsonl}
prompt: {system: Answer in a few words., instructions: {count: A number.}}
image: {size: 64}
batch: {questions: 32}
train: {max_steps: 6, lr: 3.0e-3, precision: fp32, checkpoint_layers: 0}
eval: {every: 3, questions: 8, answers: labels, max_new_tokens: 4}
"""


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps whose 80 or so test questions were answered among labels. Change nothing in it."""
    from surgvqa import recipe, train

    folder = tmp_path_factory.mktemp("tiny-run")
    data = write_jsonl(folder / "data", images=120)
    words = [f"data.path={data}", f"output={folder / 'run'}", *closed_sets()]
    return train.train(recipe.parse(TINY_RUN, words))


def closed_sets() -> list[str]:
    """Overrides that give each type of TOPICS its labels."""
    sets: dict[str, list[str]] = {}
    for _, answers, kind in TOPICS:
        sets[kind] = [*dict.fromkeys([*sets.get(kind, []), *answers])]
    return [f"data.labels.{kind}={json.dumps(labels)}" for kind, labels in sets.items()]


def write_jsonl(folder: Path, images: int = 23, seed: int = 0) -> Path:
    """Images of several sizes with 1 to 9 questions each, and a split column, as a jsonl data set."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(images):
        width, height = (int(side) for side in rng.integers(40, 200, 2))
        noise_image(width, height, number).save(folder / f"{number}.png")
        part = "test" if number % 8 == 6 else "val" if number % 8 == 7 else "train"
        for place in rng.permutation(len(TOPICS))[: 1 + number % len(TOPICS)]:
            question, answers, kind = TOPICS[int(place)]
            rows.append(
                {
                    "id": f"{number}-{place}",
                    "image": f"{number}.png",
                    "question": question,
                    "answer": str(rng.choice(answers)),
                    "question_type": kind,
                    "split": part,
                }
            )
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
