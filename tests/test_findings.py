"""What `surgvqa check` writes: true numbers, pictures of what is wrong, and hostile text as text."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import noise_image, write_jsonl
from PIL import Image

from surgvqa import cli, findings, hub, prepare, recipe, scan

RECIPE = """
model: {{name: tiny-qwen3-vl}}
data: {{format: jsonl, path: {folder}/data/questions.jsonl}}
image: {{size: 64}}
batch: {{tokens_per_micro_batch: 600}}
output: {folder}/run
"""
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">\x1b[2J\u202e"

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "small.yaml").write_text(RECIPE.format(folder=tmp_path))
    return tmp_path


def write(folder: Path, *rows: dict[str, Any]) -> None:
    lines = []
    for number, row in enumerate(rows):
        full = {"image": f"{number}.png", "question": "Q?", "answer": "yes", "split": "train"} | row
        if not (folder / "data" / full["image"]).exists():
            noise_image(100, 80, number).save(folder / "data" / full["image"])
        lines.append(json.dumps(full) + "\n")
    (folder / "data" / "questions.jsonl").write_text("".join(lines))


def check(folder: Path, *words: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, audit.json and the page."""
    code = cli.main(["check", str(folder / "small.yaml"), *words, "--out", str(folder / "audit")])
    out = folder / "audit" / "small"
    return code, json.loads((out / "audit.json").read_text()), (out / "audit.html").read_text()


def test_numbers(folder: Path, capsys: Capture) -> None:
    kinds = [("a", "yes"), ("a", "yes"), ("a", "yes"), ("a", "no"), ("b", "left"), ("b", "Left of it all")]
    rows = [{"question_type": kind, "answer": answer, "question": f"{kind}?"} for kind, answer in kinds]
    held = [{**rows[0], "split": "test"}, {**rows[3], "split": "test"}, {**rows[4], "split": "val"}]
    write(folder, *rows, *held, {**rows[0], "image": "0.png"})
    noise_image(50, 60, 80).save(folder / "data" / "nobody asks.jpg")
    code, content, page = check(folder)
    assert code == 0
    assert content["version"] == findings.VERSION
    assert content["parts"] == {
        "train": {"questions": 7, "images": 6, "groups": 6},
        "val": {"questions": 1, "images": 1, "groups": 1},
        "test": {"questions": 2, "images": 2, "groups": 2},
    }
    a, b = content["question_types"]["a"], content["question_types"]["b"]
    assert a["questions"] == {"train": 5, "val": 0, "test": 2}
    assert (a["answers"], a["majority"]) == (2, {"answer": "yes", "share": 0.8})
    assert a["prior"] == {"train": 0.8, "val": None, "test": 0.5}
    assert b["majority"] == {"answer": "Left of it all", "share": 0.5}
    assert content["repeated_questions"] == 1
    assert content["texts"]["answer"]["characters"] == {
        "min": 2, "median": 3, "max": 14, "longest": f"{folder}/data/questions.jsonl:6",
    }  # fmt: skip
    assert content["texts"]["answer"]["tokens"]["max"] >= 3
    images = content["images"]
    assert (images["count"], images["width"], images["height"]) == (9, [100, 100], [80, 80])
    assert images["common_sizes"] == [[100, 80, 9]]
    assert images["unused"] == {str(folder / "data"): 1}
    printed = capsys.readouterr().out
    for said in ("10 questions on 9 sound images", "yes (80.0 %)", "all 100×80", "PNG 9", "1 more files"):
        assert said in printed
        assert said in page or said == "yes (80.0 %)"


def test_every_problem_with_its_pictures(folder: Path) -> None:
    write(folder, {}, {}, {"split": "test", "image": "0.png"}, {"image": "cut.png"})
    (folder / "data" / "cut.png").write_bytes((folder / "data" / "cut.png").read_bytes()[:-100])
    code, content, page = check(folder)
    assert code == 2
    assert [(p["severity"], p["images"]) for p in content["problems"]][:2] == [
        ("error", ["cut.png"]), ("error", ["0.png"]),
    ]  # fmt: skip
    assert page.count("<section") == len(content["problems"])
    assert page.count("data:image/jpeg;base64,") == 1
    assert page.count("cannot be shown") == 1
    assert page.count("<figcaption>0.png") == 1


def test_pictures_are_bounded_in_number_and_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "_PICTURES", 5)
    write(folder, *[{}] * 30, *[{"image": f"{n}.png", "split": "test"} for n in range(30)])
    Image.effect_noise((900, 900), 200).save(folder / "data" / "0.png")
    _, content, page = check(folder)
    (problem,) = (p for p in content["problems"] if p["severity"] == "error")
    assert len(problem["images"]) == 12
    pictures = re.findall(r"data:image/jpeg;base64,([^\"]*)", page)
    assert len(pictures) == 5
    assert all(len(picture) <= 4 * findings._PICTURE_BYTES / 3 + 4 for picture in pictures)


def hostile(folder: Path) -> None:
    row = {"question": HOSTILE, "answer": f"n/a {HOSTILE}", "question_type": HOSTILE, "group": HOSTILE}
    name = "<b>'\".png"
    write(folder, {**row, "image": name}, {**row, "image": name, "split": "test"}, {**row, "answer": "x"})


def test_hostile_text_stays_text(folder: Path, capsys: Capture) -> None:
    hostile(folder)
    code, content, page = check(folder)
    assert code == 2
    assert HOSTILE in content["question_types"]
    assert "&lt;script&gt;" in page
    assert "<script" not in page
    assert "<b>" not in page
    assert 'onerror="' not in page
    printed = capsys.readouterr().out
    for text in (page, printed):
        assert "\x1b[2J" not in text
        assert "\u202e" not in text


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
def test_the_page_runs_nothing_and_shows_its_pictures(folder: Path) -> None:
    hostile(folder)
    Image.new("RGB", (100, 80), (255, 0, 0)).save(folder / "data" / "<b>'\".png", "PNG")
    check(folder)
    page = folder / "audit/small/audit.html"

    def browser(*words: str) -> str:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        options += [f"--user-data-dir={folder / 'profile'}", *words, page.as_uri()]
        return subprocess.run(["chromium", *options], capture_output=True, text=True, timeout=120).stdout

    assert f"<title>Audit of {folder}/small.yaml</title>" in browser("--dump-dom")
    browser(f"--screenshot={folder / 'page.png'}", "--window-size=1000,3000")
    colours = Image.open(folder / "page.png").convert("RGB").getcolors(2**24)
    assert any(red > 240 and green < 20 and blue < 20 for _, (red, green, blue) in colours or [])  # type: ignore[misc]
    page.write_text(page.read_text().replace("<h1>", HOSTILE + "<h1>"))
    dom = browser("--dump-dom")
    assert "<script>" in dom
    assert f"<title>Audit of {folder}/small.yaml</title>" in dom


def test_what_cannot_fit_is_found_without_the_model(folder: Path) -> None:
    write(folder, {}, {"question": "Why? " * 700}, {"answer": "so " * 900})
    code, content, _ = check(folder)
    assert code == 2
    errors = [p for p in content["problems"] if p["severity"] == "error"]
    assert [p["place"].rpartition(":")[2] for p in errors] == ["2", "3"]
    assert "cannot fit: at least" in errors[0]["what"]
    # It is a lower bound: training, which counts exactly, refuses those too, and no others.
    settings = recipe.load(folder / "small.yaml")
    prepared = prepare.prepare(settings)
    with pytest.raises(recipe.BadInput) as caught:
        prepared.plan(prepared.questions("train"))
    exact = [int(re.findall(r"([\d,]+) tokens", said)[0].replace(",", "")) for said in caught.value.problems]
    least = [int(re.findall(r"([\d,]+) tokens", p["what"])[0].replace(",", "")) for p in errors]
    assert all(few <= tokens <= few + 60 for few, tokens in zip(least, exact, strict=True))


@pytest.mark.parametrize("model", ["tiny-qwen2-vl", "tiny-qwen3-vl"])
def test_references_longer_than_an_answer_may_be(folder: Path, model: str) -> None:
    """Each with its end of turn and its boxes; not where a shorter one counts as right, too."""
    long, box = "red and blue and green", {"box": [10, 10, 50, 40]}
    answers = [
        {"answer": "red"}, {"answer": long}, {"answer": [long, "red"]}, {"answer": [long, long + " too"]},
        {"answer": "red", "boxes": [box]},
    ]  # fmt: skip
    write(folder, {"answer": long}, *({**row, "split": "test"} for row in answers))
    words = f"model.name={model}", "data.split={by: official}"
    prepared = prepare.prepare(recipe.load(folder / "small.yaml", words))
    lengths = prepared.questions("test").answer_tokens.tolist()  # of the first reference, as it is trained
    too = 1 + prepared.chat.lengths([long + " too"])[long + " too"]
    assert lengths[0] < lengths[1] < too < lengths[4]
    for limit, count, needed in (
        (lengths[0] - 1, 5, lengths[4]), (lengths[0], 3, lengths[4]), (lengths[1] - 1, 3, lengths[4]),
        (lengths[1], 1, lengths[4]), (lengths[4] - 1, 1, lengths[4]), (lengths[4], 0, 0),
    ):  # fmt: skip
        _, content, _ = check(folder, *words, f"eval.max_new_tokens={limit}")
        told = [p["what"] for p in content["problems"] if p["place"] == "eval.max_new_tokens"]
        settings = recipe.load(folder / "small.yaml", [*words, f"eval.max_new_tokens={limit}"])
        at_start = prepare.prepare(settings).too_short(settings.eval.parts)
        assert at_start == [f"eval.max_new_tokens: {what}" for what in told]
        assert len(told) == bool(count)
        if told:
            assert told[0].startswith(f"{limit} cuts every right answer to {count} of 5 questions of test: ")
            assert told[0].endswith(f"set {needed} or more")
    _, content, _ = check(folder, *words, "eval.max_new_tokens=1", "eval.final=null")
    assert not [p for p in content["problems"] if p["place"] == "eval.max_new_tokens"]


def test_without_the_model_the_data_is_looked_at(folder: Path, capsys: Capture) -> None:
    write(folder, {})
    code, content, _ = check(folder, "model.name=somebody/no-such-model")
    assert code == 0
    assert "tokens" not in content["texts"]["question"]
    assert any("tokenizer.json is not here" in note for note in content["notes"])
    assert "not looked at: lengths in tokens" in capsys.readouterr().out


def test_headers_are_not_everything_and_that_is_said(folder: Path, capsys: Capture) -> None:
    write(folder, {}, {"image": "cut.png"})
    (folder / "data" / "cut.png").write_bytes((folder / "data" / "cut.png").read_bytes()[:-100])
    code, content, page = check(folder, "--headers")
    assert code == 0
    assert content["images"]["count"] == 2
    assert content["images"]["black_border"] is None
    for text in (page, capsys.readouterr().out):
        assert "of 2 images only the headers were read" in text
    assert check(folder)[0] == 2


def test_training_decodes_nothing_that_check_has_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "_SETTLED_NS", 0)
    write_jsonl(folder / "data", images=6)
    _, content, _ = check(folder)
    assert content["images"]["decoded_now"] == 6
    monkeypatch.setattr(scan, "open_rgb", None)
    prepared = prepare.prepare(recipe.load(folder / "small.yaml"))
    assert len(prepared.digests) == 6
    assert check(folder)[1]["images"]["decoded_now"] == 0


def test_data_that_cannot_be_read_leaves_no_old_report(folder: Path, capsys: Capture) -> None:
    write(folder, {})
    assert check(folder)[1]["parts"]
    (folder / "data" / "questions.jsonl").unlink()
    code, content, page = check(folder)
    assert code == 2
    assert "parts" not in content
    assert "no such file or folder" in content["problems"][0]["what"]
    assert "no such file or folder" in page
    assert "no such file or folder" in capsys.readouterr().err


def test_where_it_is_written(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, {})
    monkeypatch.chdir(folder)
    assert cli.main(["check", "small.yaml"]) == 0
    assert (folder / "audit/small/audit.html").is_file()
    (folder / "file").write_text("")
    assert cli.main(["check", "small.yaml", "--out", "file"]) == 2
    assert "--out: file/small cannot be written" in capsys.readouterr().err
    (folder / "other").mkdir()
    shutil.copy("small.yaml", "other")
    with pytest.raises(SystemExit):
        cli.main(["check", "small.yaml", "other/small.yaml"])
    assert "small: several recipes of that name" in capsys.readouterr().err
    # What somebody put in the place of the files is replaced, not followed.
    (folder / "audit/small/audit.json").unlink()
    (folder / "audit/small/audit.json").symlink_to(folder / "small.yaml")
    before = (folder / "small.yaml").read_text()
    assert cli.main(["check", "small.yaml"]) == 0
    assert (folder / "small.yaml").read_text() == before


def test_text_that_cannot_be_encoded(folder: Path) -> None:
    """A file's name that is no UTF-8 ends in the report as it is, and does not end the report."""
    found = findings.examine("a\udcff.yaml", recipe.load(folder / "small.yaml"), hub.find("tiny-qwen3-vl"))
    json_file, page = found.write(folder / "out")
    assert json.loads(json_file.read_text())["recipe"] == "a\udcff.yaml"
    assert "a\\udcff.yaml" in page.read_text()
