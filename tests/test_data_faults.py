"""Broken, odd and changed data as a user meets them: `surgvqa check`, `surgvqa train`, the same again."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SHARED, noise_image, write_jsonl
from PIL import Image

from surgvqa import checkpoint, cli, recipe
from surgvqa.prepare import prepare
from surgvqa.recipe import BadInput
from surgvqa.run import resumable

ROOT = Path(__file__).parents[1]
RECIPE = """
model: {{name: tiny-qwen3-vl, tune: lora}}
data: {{format: jsonl, path: {folder}/data/questions.jsonl}}
image: {{size: 64}}
batch: {{questions: 12, questions_per_image: 4, tokens_per_micro_batch: 600}}
train: {{max_steps: 1, lr: 1.0e-3, precision: fp32, checkpoint_layers: 0}}
eval: {{max_new_tokens: 2}}
log: {{trace: true}}
output: {folder}/run
"""

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with 12 images, questions.jsonl, and beside it a recipe and what is outside."""
    write_jsonl(tmp_path / "data", images=12)
    (tmp_path / "small.yaml").write_text(RECIPE.format(folder=tmp_path))
    noise_image(50, 50, 99).save(tmp_path / "outside.png")
    return tmp_path / "data"


def rows(data: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data / "questions.jsonl").read_text().splitlines()]


def write(data: Path, rows: list[Any]) -> None:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    (data / "questions.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def surgvqa(data: Path, *words: str) -> int:
    command, *rest = words
    out = ["--out", str(data.parent / "audit")] if command == "check" else []
    return cli.main([command, str(data.parent / "small.yaml"), *rest, *out])


def odd(data: Path) -> dict[str, tuple[int, int]]:
    """Images that are odd but sound, and their sizes upright."""
    picture = noise_image(90, 60, 5)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.convert("CMYK").save(data / "cmyk.jpg")
    picture.quantize(16).save(data / "palette.png")
    picture.save(data / "turned.jpg", exif=exif)
    wide = np.linspace(0, 65535, 90 * 60).reshape(60, 90).astype(np.uint16)
    Image.fromarray(wide).save(data / "deep.png")
    Image.new("RGB", (1, 1), (200, 0, 0)).save(data / "one.png")
    return {
        "cmyk.jpg": (90, 60), "palette.png": (90, 60), "turned.jpg": (60, 90), "deep.png": (90, 60),
        "one.png": (1, 1),
    }  # fmt: skip


def bad(data: Path) -> list[str]:
    """Images that are no sound images."""
    (data / "cut.jpg").write_bytes(b"")
    noise_image(300, 300, 6).save(data / "cut.jpg")
    (data / "cut.jpg").write_bytes((data / "cut.jpg").read_bytes()[:-300])
    (data / "text.jpg").write_text("<html>not found</html>")
    (data / "empty.png").touch()
    Image.new("1", (14_200, 14_200)).save(data / "bomb.png")  # 200 million pixels, 30 kB
    return ["cut.jpg", "text.jpg", "empty.png", "bomb.png"]


def asking(names: list[str], part: str = "train") -> list[dict[str, str]]:
    return [
        {"id": f"about {name}", "image": name, "question": "Is it odd?", "answer": "yes", "split": part}
        for name in names
    ]


@pytest.mark.fault("F15")
def test_odd_images_train(data: Path, capsys: Capture) -> None:
    sizes = odd(data)
    write(data, asking([*sizes]) + asking(["0.png"], "test"))
    assert surgvqa(data, "check") == 0
    images = json.loads((data.parent / "audit/small/audit.json").read_text())["images"]
    assert images["modes"] == {"RGB": 3, "CMYK": 1, "P": 1, "I;16": 1}
    assert images["turned"] == 1
    settings = recipe.load(data.parent / "small.yaml")
    canvases = prepare(settings).canvases
    assert {k: (c.source_width, c.source_height) for k, c in canvases.items() if k in sizes} == sizes
    assert surgvqa(data, "train", "eval.final=null") == 0
    (step,) = (data.parent / "run/trace.jsonl").read_text().splitlines()
    assert set(json.loads(step)["ids"]) == {f"about {name}" for name in sizes}


@pytest.mark.fault("F15", "F17")
def test_bad_images_and_rows_are_listed_before_the_model_loads(data: Path, capsys: Capture) -> None:
    names = bad(data)
    good = rows(data)
    write(data, [*good, *asking(names), "{bad", {"image": "0.png", "question": "Q?"}])
    for command in ("check", "train"):
        assert surgvqa(data, command) == 2
        printed = capsys.readouterr()
        for name in (*(f"image {name}: " for name in names), "is not valid JSON", "answer is missing"):
            assert name in printed.out + printed.err
        assert "model       " not in printed.out


@pytest.mark.fault("F15")
def test_a_bomb_takes_no_memory(data: Path) -> None:
    """200 million pixels would be 600 MB as RGB."""
    bad(data)
    code = (
        "import resource, sys; from surgvqa import cli; before = resource.getrusage(resource.RUSAGE_SELF);"
        "code = cli.main(sys.argv[1:]); after = resource.getrusage(resource.RUSAGE_SELF);"
        "print('grew', after.ru_maxrss - before.ru_maxrss); sys.exit(code)"
    )
    words = [str(data.parent / "small.yaml"), "--out", str(data.parent / "audit")]

    def grew() -> int:
        done = subprocess.run([sys.executable, "-c", code, "check", *words], capture_output=True, text=True)
        assert "grew" in done.stdout, done.stderr
        return int(done.stdout.rpartition("grew")[2])

    usual = grew()
    write(data, [*rows(data), *asking(["bomb.png"])])
    assert grew() < usual + 60_000  # kB


@pytest.mark.long
@pytest.mark.fault("F15", "F17")
def test_skipping_is_the_same_on_one_process_and_on_two(data: Path, capsys: Capture) -> None:
    names, good = bad(data), rows(data)
    hurt = [
        *good[:5],
        "{bad",
        *asking(names),
        *good[5:],
        *asking(["gone.png"], "test"),
        *asking(["text.jpg"], "test"),
    ]
    hurt[-1]["id"] = "again"
    write(data, hurt)
    results = {}
    for world in (1, 2):
        run = data.parent / f"run {world}"
        command = [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file",
            "accelerate_configs/2cpu.yaml" if world == 2 else "accelerate_configs/cpu.yaml",
            "-m", "surgvqa.train", str(data.parent / "small.yaml"), "data.on_error=skip", f"output={run}",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "left out: 2 rows, 4 images, 5 questions; see skipped.jsonl" in done.stdout
        traced = [json.loads(line) for line in (run / "trace.jsonl").read_text().splitlines()]
        scores = json.loads((run / "scores.json").read_text())
        assert scores["skipped"] == {"rows": 2, "images": 4, "questions": 5}
        assert scores["overall"]["n"] == sum(row["split"] == "test" for row in good)
        results[world] = (
            [row["ids"] for row in traced],
            (run / "skipped.jsonl").read_text(),
            [json.loads(line)["id"] for line in (run / "predictions.jsonl").read_text().splitlines()],
        )
    assert results[1] == results[2]
    skipped = [json.loads(line) for line in results[1][1].splitlines()]
    assert len(skipped) == 6
    assert {row["place"] for row in skipped} >= {f"image {name}" for name in names}
    assert all(row["why"] for row in skipped)
    # The same rows without the bad ones are the same experiment.
    clean = data.parent / "clean"
    shutil.copytree(data, clean)
    write(clean, good)
    with_bad = recipe.load(data.parent / "small.yaml", ["data.on_error=skip"])
    without = recipe.load(data.parent / "small.yaml", [f"data.path={clean}/questions.jsonl"])
    assert prepare(with_bad).fingerprint() == prepare(without).fingerprint()


@pytest.mark.fault("F15")
def test_nothing_is_left(data: Path, capsys: Capture) -> None:
    for image in data.glob("*.png"):
        image.write_text("")
    assert surgvqa(data, "train", "data.on_error=skip") == 2
    assert "skip leaves out everything" in capsys.readouterr().err


@pytest.mark.fault("F16")
def test_images_elsewhere_are_refused_before_the_model_loads(data: Path, capsys: Capture) -> None:
    outside = data.parent / "outside.png"
    (data / "link.png").symlink_to(outside)
    os.mkfifo(data / "pipe.png")
    names = {
        "gone.png": "does not exist", "../outside.png": "leads out", str(outside): "leads out",
        "link.png": "leads out", "pipe.png": "is not a file", "https://example.org/a.png": "is an address",
    }  # fmt: skip
    write(data, [*rows(data), *asking([*names])])
    for command in ("check", "train"):
        assert surgvqa(data, command) == 2
        printed = capsys.readouterr()
        for name, what in names.items():
            assert f"image {name!r} {what}" in printed.out + printed.err
        assert "model       " not in printed.out


@pytest.mark.fault("F16")
def test_a_pipe_in_the_place_of_an_image_that_was_good(data: Path, capsys: Capture) -> None:
    """Between two starts; the second must neither wait nor trust what it knew."""
    assert surgvqa(data, "check") == 0
    (data / "3.png").unlink()
    os.mkfifo(data / "3.png")
    assert surgvqa(data, "check") == 2
    assert "image '3.png' is not a file" in capsys.readouterr().out


@pytest.mark.fault("F17")
def test_odd_rows(data: Path, capsys: Capture) -> None:
    """A mark at the start, CRLF and no final newline are fine; all else is listed at once with its line."""
    good = [json.dumps(row) for row in rows(data)]
    (data / "questions.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(good).encode())
    assert surgvqa(data, "check") == 0
    row = {"image": "0.png", "question": "Q?", "answer": "a", "split": "train"}
    hurt = {
        "{bad": "is not valid JSON", json.dumps({**row, "answer": ""}): "answer is empty",
        json.dumps({"image": "0.png", "answer": "a", "split": "train"}): "question is missing",
        json.dumps({**row, "id": rows_id(good[0])}): "is already used at",
        json.dumps({**row, "question": "a\0b"}): "question holds a NUL byte",
        json.dumps({**row, "answer": float("nan")}): "answer is nan", "\0": "is not valid JSON",
    }  # fmt: skip
    (data / "questions.jsonl").write_text("\n".join([*good, *hurt]))
    capsys.readouterr()
    assert surgvqa(data, "check") == 2
    said = capsys.readouterr().out.splitlines()
    for number, what in enumerate(hurt.values(), start=len(good) + 1):
        assert any(f"questions.jsonl:{number}: " in line and what in line for line in said), what
    assert sum("error: " in line for line in said) == len(hurt)


def rows_id(line: str) -> str:
    return str(json.loads(line)["id"])


def _changed(rows: list[Any]) -> list[Any]:
    return [{**row, "answer": "changed"} if row["id"] == rows[0]["id"] else row for row in rows]


CHANGES: dict[str, tuple[Callable[[list[Any]], list[Any]], str]] = {
    "a row changed": (_changed, "the texts of questions or answers changed"),
    "reordered": (
        lambda rows: random.Random(1).sample(rows, len(rows)),
        "the order of the questions changed",
    ),
    "of another type": (
        lambda rows: [{**row, "question_type": "other"} for row in rows],
        "question types, stages or names of images changed",
    ),
    "appended": (lambda rows: [*rows, *asking(["0.png"])], r"\d+ questions → \d+"),
    "renamed": (
        lambda rows: [{**row, "id": row["id"] + "x"} for row in rows],
        "other questions, by their ids",
    ),
}


@pytest.mark.fault("F18")
def test_changed_data_is_refused_with_the_difference(data: Path, capsys: Capture) -> None:
    assert surgvqa(data, "train", "eval.final=null") == 0
    settings, original = recipe.load(data.parent / "small.yaml"), rows(data)
    ((_, saved),) = checkpoint.steps(Path(settings.output) / "checkpoints")

    def refused(why: str) -> None:
        fingerprint = prepare(settings).fingerprint()
        with pytest.raises(BadInput, match=f"the training data: {why}"):
            resumable(saved, settings, fingerprint)

    for change, why in CHANGES.values():
        write(data, change(original))
        refused(why)
    write(data, original)
    assert resumable(saved, settings, prepare(settings).fingerprint()).changes == []
    noise_image(80, 80, 77).save(data / "0.png")
    refused("the bytes of images changed")
    write(data, _changed(original))
    # The override goes on, and is recorded.
    capsys.readouterr()
    assert surgvqa(data, "train", "eval.final=null", "train.max_steps=2") == 2
    assert not (data.parent / "run/changes.jsonl").exists()
    more = ["eval.final=null", "train.max_steps=2", "--accept-changes"]
    assert surgvqa(data, "train", *more) == 0
    (change,) = map(json.loads, (data.parent / "run/changes.jsonl").read_text().splitlines())
    assert change["after_step"] == 1
    assert "the texts of questions or answers and the bytes of images changed" in str(change["changes"])


@pytest.mark.fault("F15")
@pytest.mark.skipif(not SHARED.is_dir(), reason="the real files are not here; generated ones are above")
def test_real_awkward_images(data: Path, capsys: Capture) -> None:
    names = sorted(file.name for file in (SHARED / "awkward").iterdir())
    for name in names:
        shutil.copyfile(SHARED / "awkward" / name, data / name)
    write(data, [*rows(data), *asking(names)])
    assert surgvqa(data, "check") == 2
    said = capsys.readouterr().out
    assert "image truncated_jpeg.jpg: cannot be decoded" in said
    assert said.count("error: ") == 1
    assert surgvqa(data, "check", "data.on_error=skip") == 0
