"""The page of runs: what it says, that it is one file which asks for nothing, what it does in Chromium."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, needed
from conftest import noise_image, write_jsonl
from PIL import Image
from report_runs import answer, make, record

from surgvqa import cli, datasets, hub, letterbox, recipe, report
from surgvqa.metrics import Prediction, Prior
from surgvqa.recipe import BadInput
from surgvqa.report import charts, content, gallery
from surgvqa.results import load_run

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><b>&amp;'\x1b[2J\u202e\x00`|{{ 7*7 }}"
KINDS = ["black", "shuffle", *(f"{kind}:{level}" for kind in ("blur", "smoke") for level in (1, 5))]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data"), images=170)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data: Path) -> list[Path]:
    """One chosen among labels and tried blind and on corrupted images, and a better one."""
    folder = tmp_path_factory.mktemp("runs")
    return [
        make(folder / "exp1", data, skill=0.6, seed=1, labels=True, variants=KINDS),
        make(folder / "exp2", data, skill=0.9, seed=2, labels=True, lr="1.0e-4", variants=["black"]),
    ]


@pytest.fixture(scope="module")
def pages(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    return {
        "one": report.write(runs[:1], folder / "one.html"),
        "two": report.write(runs, folder / "two.html"),
    }


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def packed(page: Path) -> dict[str, Any]:
    """What the page's script gets to see."""
    found = re.search(r'id="packed">([\w+/=]*)</script>', page.read_text(encoding="utf-8"))
    assert found
    return dict(json.loads(gzip.decompress(base64.b64decode(found[1]))))


def texts(page: Path) -> str:
    """The page's own text, without marks and data."""
    text = re.sub(r"<(script|style).*?</\1>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text))


def test_the_numbers_are_those_of_the_scores(runs: list[Path], pages: dict[str, Path]) -> None:
    told = json.loads((runs[0] / "scores.json").read_text())["overall"]
    text = texts(pages["one"])
    low, high = told["intervals"]["exact"]
    assert f"95 % interval {100 * low:.1f} – {100 * high:.1f}" in text
    assert f"{100 * told['exact']:.1f} %" in text
    assert f"Prior, no look at the image {100 * told['prior']:.1f} %" in text
    assert f"ECE {told['ece']:.3f}" in text
    assert f"Macro F1 {100 * told['macro_f1']:.1f} %" in text
    for kind, bucket in json.loads((runs[0] / "scores.json").read_text())["by_type"].items():
        marks = "*" * bucket["few"] + "†" * bucket["few_groups"]
        assert re.search(rf"{kind} {bucket['n']}{re.escape(marks)} +{100 * bucket['exact']:.1f} ", text), kind
    for heading in ("Does it look at the image?", "Robustness", "Reliability", "What is taken for what"):
        assert heading in text
    for said in ("Questions trained on 12,800", "GPU-hours 0.21", "6 min 20 s", "43.0%", "31.5 GiB"):
        assert said in text
    assert "NVIDIA H100 80GB HBM3" in text
    assert "rank: 16" in text
    assert "surgvqa evaluate" not in text


def test_blind_is_compared_in_pairs(runs: list[Path]) -> None:
    (entry,) = content.entries(runs[:1], None)
    black, shuffled = content.blind(entry)
    assert (black.what, shuffled.what) == ("black images", "images of other questions")
    full, without = load_run(runs[0]).evaluation(), load_run(runs[0]).evaluation(variant="black")
    lost = full.scores["overall"]["exact"] - without.scores["overall"]["exact"]
    assert black.difference
    assert black.difference.difference == pytest.approx(lost)
    assert black.difference.interval
    assert black.difference.interval[0] < lost < black.difference.interval[1]


@pytest.mark.parametrize(
    "more",
    [{"checkpoint": "step-000100"}, {"overrides": ["image.size=256"]}, {"split": "val"}],
    ids=str,
)
def test_other_pictures_count_only_where_all_else_is_the_same(
    data: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    run = make(tmp_path / "run", data, variants=["black", "shuffle"])
    file = run / "scores.black.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **more}))
    (entry,) = content.entries([run], None)
    assert [each.what for each in content.blind(entry)] == ["images of other questions"]
    assert "scores.black.json is left out" in entry.notes[0]
    same = {"split": "test", "checkpoint": "step-000200", "overrides": ["data.workers=1", "eval.final=test"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | same))
    assert len(content.entries([run], None)[0].variants) == 2


def test_the_legend_of_corruptions_names_the_runs_that_have_them(pages: dict[str, Path]) -> None:
    page = pages["two"].read_text(encoding="utf-8")
    (legend,) = re.findall(r'<section id="robustness">.*?<p class="legend">(.*?)</p>', page, re.DOTALL)
    assert re.findall(r"</i>([^<]*)</span>", legend) == ["exp1"]


def test_runs_side_by_side(runs: list[Path], pages: dict[str, Path]) -> None:
    first, second = (json.loads((run / "scores.json").read_text())["overall"] for run in runs)
    text = texts(pages["two"])
    assert f"{100 * (second['exact'] - first['exact']):+.1f}" in text
    assert "< 0.001" in text.replace("&lt;", "<")
    assert "train.lr 0.0002 0.0001" in text
    assert "output" not in text.split("What differs")[1].split("recipe with every default")[0]
    shown = packed(pages["two"])
    assert shown["names"] == ["exp1", "exp2"]
    assert all(len(run["a"]) == len(shown["id"]) for run in shown["runs"])


def test_groups_of_several_images_worst_first(data: Path, tmp_path: Path) -> None:
    videos = {"video 1": 0.9, "video 2": 0.2, "<b>video 3": 0.5}
    rows = [
        Prediction(
            f"{video} {n}", f"{video} {n}", video, "Q?", "t", ["yes"], "yes" if n < 10 * share else "no"
        )
        for video, share in videos.items()
        for n in range(10)
    ]
    run = make(tmp_path / "run", data)
    record(run, rows, Prior([]))
    text = texts(report.write([run], pictures=False)).split("By group, the worst first")[1]
    found = re.search(r"video 2 10\* +20\.0 – .*&lt;b&gt;video 3 10\* +50\.0 .*video 1 10\* +90\.0", text)
    assert found


def test_answers_that_were_cut_are_marked(data: Path, tmp_path: Path) -> None:
    run = make(tmp_path / "run", data, change=lambda row: replace(row, cut=row.question_type == "count"))
    cut = [row.id for row in load_run(run).evaluation().predictions if row.cut]
    assert cut
    page = report.write([run], pictures=False)
    said = texts(page)
    assert f"Answers cut at eval.max_new_tokens {len(cut)} " in said
    assert "‡ answers were cut at eval.max_new_tokens" in said
    shown = packed(page)
    numbers = shown["runs"][0]["cut"]
    assert sorted(shown["texts"][shown["id"][number]] for number in numbers) == sorted(cut)
    marked = [line for line in report.markdown([run]).splitlines() if "‡" in line]
    assert [line.split("|")[1].strip() for line in marked[:-1]] == ["**All**", "count"]
    whole = make(tmp_path / "whole", data)
    assert "‡" not in texts(report.write([whole], pictures=False))


def test_a_score_of_100_percent_has_an_interval(data: Path, tmp_path: Path) -> None:
    run = make(tmp_path / "run", data, skill=1)
    groups = len({row.group for row in load_run(run).evaluation().predictions})
    low = f"{100 * 0.025 ** (1 / groups):.1f}"
    assert f"95 % interval {low} – 100.0" in texts(report.write([run], pictures=False))
    assert f"| 100.0 [{low}, 100.0] |" in report.markdown([run])


def test_a_confusion_matrix_counts(data: Path, tmp_path: Path) -> None:
    pairs = [("yes", "yes", 12), ("yes", "no", 3), ("no", "no", 4), ("no", "maybe so", 1)]
    rows = [
        Prediction(f"{truth}{told}{n}", str(n), "", "Q?", "yes_no", [truth], told)
        for truth, told, count in pairs
        for n in range(count)
    ]
    run = make(tmp_path / "run", data)
    record(run, rows, Prior([]))
    (matrix,) = content.confusion(content.entries([run], None))["yes_no"]
    assert matrix.labels == ["no", "yes"]
    assert matrix.cells == [[4, 0, 1], [3, 12, 0]]
    assert (matrix.totals, matrix.others, matrix.left_out) == ([5, 15], True, 0)
    assert matrix.share(1, 1) == 0.8


def test_the_gallery_shows_what_the_model_saw(data: Path, runs: list[Path], pages: dict[str, Path]) -> None:
    shown = packed(pages["one"])
    row = next(n for n, key in enumerate(shown["id"]) if shown["texts"][key].startswith("6-"))
    ((frame, number),) = shown["images"][shown["k"][row]][2]
    assert frame == 0
    start, length, width, height = shown["pictures"][number]
    blob = re.search(r'id="pictures">([\w+/=]*)</script>', pages["one"].read_text())
    assert blob
    (Path(data).parent / "seen.webp").write_bytes(base64.b64decode(blob[1])[start : start + length])
    seen = Image.open(Path(data).parent / "seen.webp").convert("RGB")
    assert seen.size == (width, height) == (128, 128)
    source = letterbox.open_rgb((data.parent / "6.png").read_bytes())
    factor = hub.find("tiny-qwen3-vl").factor
    canvas = letterbox.plan_canvas(source.size, mode="letterbox", size=128, max_tokens=None, factor=factor)
    expected = letterbox.draw(source, canvas, "black")
    differences = [abs(a - b) for a, b in zip(seen.tobytes(), expected.tobytes(), strict=True)]
    assert sum(differences) / len(differences) < 8


def test_errors_come_first_the_surest_before(pages: dict[str, Path]) -> None:
    shown = packed(pages["one"])
    run = shown["runs"][0]
    wrong = run["ok"].count(0)
    assert 0 < wrong < len(run["ok"])
    assert run["ok"] == [0] * wrong + [1] * (len(run["ok"]) - wrong)
    sure = [dict(map(tuple, odds))[told] for odds, told in zip(run["p"], run["a"], strict=True)]
    assert sure[:wrong] == sorted(sure[:wrong], reverse=True)


def test_boxes_are_on_the_canvas(data: Path, tmp_path: Path) -> None:
    page = report.write([make(tmp_path / "run", data, boxes=True)])
    assert page == tmp_path / "run/report.html"
    shown = packed(page)
    number = next(n for n, key in enumerate(shown["id"]) if shown["texts"][key].startswith("14-"))
    size = Image.open(data.parent / "14.png").size
    factor = hub.find("tiny-qwen3-vl").factor
    canvas = letterbox.plan_canvas(size, mode="letterbox", size=128, max_tokens=None, factor=factor)
    prediction = next(
        row
        for row in load_run(tmp_path / "run").evaluation().predictions
        if row.id == shown["texts"][shown["id"][number]]
    )
    for what, region in (
        (gallery.EXPECTED, prediction.reference_regions[0]),
        (gallery.FOUND, prediction.regions[0]),
    ):
        (box,) = (box for box in shown["boxes"][str(number)] if box[0] == what)
        assert box[1] == 0
        assert box[2:6] == pytest.approx(
            [edge / 0.128 for edge in canvas.to_canvas(tuple(region["box"]))], abs=1
        )
        assert shown["texts"][box[6]] == region["label"]
    text = texts(page)
    assert "Mean IoU" in text
    assert "AP50" in text
    tile, legacy = text.index("Mean IoU"), text.index("Legacy IoU")
    assert tile < legacy
    told = json.loads((tmp_path / "run/scores.json").read_text())["overall"]
    assert f"{told['legacy']['iou']:.3f}" in text[legacy:]


def test_hostile_text_is_text(tmp_path: Path, data: Path) -> None:
    run = make(
        tmp_path / "<b>&run",
        data,
        change=lambda row: replace(
            row,
            question=HOSTILE,
            question_type=HOSTILE,
            answer=HOSTILE,
            group=HOSTILE,
            references=[HOSTILE + "x"],
        ),
    )
    page = report.write([run]).read_text(encoding="utf-8")
    assert page.count("</script>") == page.count("<script") == 3
    assert "<img" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    for hidden in ("\x1b", "\u202e", "\x00"):
        assert hidden not in page
    assert "7*7" in page
    assert "<b>&run" not in page
    told = packed(run / "report.html")
    assert any("\\u202e" in text for text in told["texts"])


def test_records_that_are_nonsense_do_no_harm(data: Path, tmp_path: Path) -> None:
    run = make(tmp_path / "run", data, labels=True, variants=["black", "smoke:1", "smoke:²", "<u>:1"])
    rows = [
        {"step": 1, "loss": "<u>", "lr": None, "grad_norm": [], "seconds": True, "questions": 1e300},
        {"step": "one", "loss": 1}, {"step": 2, "loss": math.nan, "lr": math.inf, "seconds": -3},
        {"step": 3, "loss": -1e14, "lr": 1e-300, "grad_norm": 0, "seconds": 0, "questions": -1},
    ]  # fmt: skip
    for name in ("metrics", "eval", "checkpoints", "starts"):
        (run / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "[1]\n{")
    (run / "ended.json").write_text(json.dumps({"name": {"<u>": 1}, "at": ["<u>"]}))
    assert "<u>" not in report.write([run]).read_text()
    told = json.loads((run / "scores.json").read_text())
    for key, value in (
        ("exact", math.nan), ("exact", "<u>"), ("exact", 1e300), ("n", -5), ("intervals", {"exact": [2, -1]}),
        ("intervals", {"exact": [1]}), ("absent", {"<u>": "<u>"}), ("few", "x"), ("legacy", {"iou": "x"}),
        ("reliability", [{"n": -1, "confidence": 0, "exact": 0}]), ("<u>", 1), ("exact", None),
    ):  # fmt: skip
        (run / "scores.json").write_text(json.dumps({**told, "overall": {**told["overall"], key: value}}))
        assert "<u>" not in report.write([run], pictures=False).read_text()
        report.markdown([run])
    (run / "scores.json").write_text(
        json.dumps({**told, "overrides": ["data.path=/none", 3, "x"], "split": 3})
    )
    assert "By question type" in texts(report.write([run]))


def test_what_is_gone_is_said_and_the_page_is_made(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data", images=40)
    run = make(tmp_path / "run", data)
    for name in (6, 14):
        (tmp_path / f"data/{name}.png").write_bytes(b"no picture")
    text = texts(report.write([run]))
    assert "2 cannot be read any more, such as" in text
    assert "is not an image" in text
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows if row["image"] != "22.png"))
    assert "1 of 5 images have no picture: their questions are not in the data" in texts(report.write([run]))
    data.unlink()
    text = texts(report.write([run]))
    assert "The data cannot be read here" in text
    assert "Prior, no look at the image" in text
    assert len(packed(run / "report.html")["id"]) > 10
    (run / "scores.json").write_text('{"schema": 2, "overall": {"n": "many"}}')
    text = texts(report.write([run]))
    assert "scores were computed from predictions.jsonl, without a prior" in text


def test_a_model_that_is_not_here(tmp_path: Path, data: Path) -> None:
    run = make(tmp_path / "run", data)
    text = (run / "recipe.yaml").read_text().replace("tiny-qwen3-vl", "somebody/no-such-model")
    (run / "recipe.yaml").write_text(text)
    said = "shown as they are in the data: the model is not here, so its canvas is not known"
    assert said in texts(report.write([run]))
    shown = packed(run / "report.html")
    assert [shown["pictures"][0][2:]] != [[128, 128]]
    checkpoint = run / "checkpoints/step-000200"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text(
        '{"model_type": "qwen2_vl", "vision_config": {"patch_size": 14, "spatial_merge_size": 2}}'
    )
    assert said not in texts(report.write([run]))
    assert all(picture[2:] == [112, 112] for picture in packed(run / "report.html")["pictures"])


def test_a_run_that_still_trains(tmp_path: Path, data: Path) -> None:
    run = make(tmp_path / "run", data)
    for file in (*run.glob("predictions*"), *run.glob("scores*"), run / "ended.json"):
        file.unlink()
    text = texts(report.write([run]))
    assert "run: not evaluated:" in text
    assert "loss, nats per token" in text
    with pytest.raises(BadInput, match="holds no predictions on val"):
        report.write([run], split="val")
    with pytest.raises(BadInput, match="not evaluated"):
        report.markdown([run])


def test_clips_show_a_few_frames_and_those_with_boxes(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    names = [f"{number}.png" for number in range(12)]
    for number, name in enumerate(names):
        noise_image(60, 50, number).save(folder / name)
    row = {"question": "Q?", "answer": "yes", "question_type": "t", "image": names}
    lines = [{**row, "split": "train", "image": "0.png"}, {**row, "split": "test", "image": names[1:]}]
    (folder / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = make(tmp_path / "run", folder / "q.jsonl")
    (one,) = load_run(run).evaluation().predictions
    region = {"label": "polyp", "box": [5, 5, 20, 20], "image": 5}
    record(run, [replace(one, regions=[], reference_regions=[region])], Prior([]))
    report.write([run])
    shown = packed(run / "report.html")
    _, count, frames, _ = shown["images"][0]
    assert (count, [frame for frame, _ in frames]) == (11, [0, 3, 5, 7, 10])
    assert [box[:2] for box in shown["boxes"]["0"]] == [[gallery.EXPECTED, 5]]


def test_pictures_fit_their_room(data: Path) -> None:
    settings = recipe.parse(
        f"{{model: {{name: tiny-qwen3-vl}}, data: {{format: jsonl, path: {data}}}, "
        "image: {size: 768}, output: x}"
    )
    every = {ref.key: ref for e in datasets.load(settings.data).examples for ref in e.images}
    refs = list(every.values())[:12]
    sizes = []
    for room in (10_000_000, 100_000, 10_000):
        made = gallery.pictures(refs, settings, 32, room)
        assert sum(len(data) for data, _, _ in made.content) <= room
        assert len(made.content) + made.left_out == len(refs)
        sizes.append(made.side)
        assert list(made.numbers) == [ref.key for ref in refs[: len(made.content)]]
    assert sizes[0] == 768
    assert sizes[0] > sizes[1] > sizes[2]
    assert made.left_out > 0


def test_long_texts_are_cut_where_they_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [" ".join(str(n * k % 9973) for k in range(5000)) for n in range(50)]
    rows = [Prediction(str(n), "i", "", text, "t", ["yes"], "yes") for n, text in enumerate(texts)]
    joined = gallery.joined([rows])
    whole = gallery.pack(["run"], joined, {}, {}, gallery.NO_PICTURES)
    assert (whole.rows, whole.cut) == (50, 20_000)
    monkeypatch.setattr(gallery, "_DATA", len(whole.data) // 5)
    cut = gallery.pack(["run"], joined, {}, {}, gallery.NO_PICTURES)
    assert cut.cut is not None
    assert cut.cut < 20_000
    monkeypatch.setattr(gallery, "_DATA", 600)
    few = gallery.pack(["run"], joined, {}, {}, gallery.NO_PICTURES)
    assert few.rows < 50
    assert len(few.data) <= 600


def test_charts() -> None:
    assert charts.steps(0.0, 1.0) == [0, 0.25, 0.5, 0.75, 1]
    assert charts.steps(0, 5, whole=True) == [0, 1, 2, 3, 4, 5]
    assert charts.steps(3, 3) == [3]
    assert [charts.number(value) for value in (0, 2e-4, 0.25, 12_000, 3e6)] == [
        "0",
        "2e-4",
        "0.25",
        "12k",
        "3M",
    ]
    points = [(float(n), float(n % 2)) for n in range(10_000)]
    assert len(charts.thinned(points)) <= 300
    assert charts.smooth([(0.0, 1.0), (1.0, 1.0)]) == [(0.0, 1.0), (1.0, pytest.approx(1.0))]
    drawn = charts.Chart("a<b", "step", [charts.Line("</svg><script>", [(0, 1), (1, 2)])]).svg
    assert "<script" not in drawn
    assert "&lt;/svg&gt;" in drawn
    assert charts.Chart("none", "step", []).svg == ""
    assert 'width="500"' in charts.bar(0.5)


def test_markdown(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(runs[0]), "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = json.loads((runs[0] / "scores.json").read_text())
    overall = told["overall"]
    assert lines[0] == "| Questions | n | Prior, % | Exact match, % [95 %] |"
    assert lines[1] == "|---|--:|--:|--:|"
    low, high = overall["intervals"]["exact"]
    assert lines[2] == (
        f"| **All** | {overall['n']} | {100 * overall['prior']:.1f} | {100 * overall['exact']:.1f} "
        f"[{100 * low:.1f}, {100 * high:.1f}] |"
    )
    assert any(line.startswith("| yes\\_no |") for line in lines)
    assert not (runs[0] / "report.html").exists()
    assert cli.main(["report", *map(str, runs), "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("| exp1, % [95 %] | exp2, % [95 %] | exp2 − exp1 [95 %] | p |")
    assert len({line.count("|") - line.count("\\|") for line in lines if line.startswith("|")}) == 1
    assert lines[-1].endswith("after Holm over the types.")
    odd = Path(shutil.copytree(runs[0], tmp_path / "a|b"))
    assert cli.main(["report", str(odd), str(runs[1]), "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("| exp2 − a\\|b [95 %] | p |")
    assert lines[1] == "|---|--:|--:|--:|--:|--:|--:|"


def test_the_command(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", *map(str, runs), "--no-pictures"]) == 0
    assert "written: report.html" in capsys.readouterr().out
    assert packed(tmp_path / "report.html")["pictures"] == []
    assert cli.main(["report", str(tmp_path / "none")]) == 2
    assert "no recipe.yaml here" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert cli.main(["report", str(runs[0]), "--out", "file/report.html", "--no-pictures"]) == 2
    assert "--out file/report.html: cannot be written" in capsys.readouterr().err
    (tmp_path / "folder").mkdir()
    assert cli.main(["report", str(runs[0]), "--out", "folder", "--no-pictures"]) == 2
    assert "--out folder: cannot be written" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*"))
    (tmp_path / "report.html").unlink()
    (tmp_path / "report.html").symlink_to(runs[0] / "recipe.yaml")
    assert cli.main(["report", *map(str, runs), "--no-pictures"]) == 0
    assert "<html" not in (runs[0] / "recipe.yaml").read_text()


def test_it_imports_no_torch(runs: list[Path], tmp_path: Path) -> None:
    code = "import sys; from surgvqa.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "report", str(runs[1]), "--out", str(tmp_path / "page.html")]
    assert subprocess.run(command, capture_output=True).returncode == 0


# In the browser.


def count(browser: Browser) -> int:
    return int(browser.js("document.getElementById('count').textContent.replace(/\\D/g, '')"))


def choose(browser: Browser, name: str, value: str) -> None:
    event = "change" if name in ("verdict", "type") else "input"
    browser.js(
        f"(() => {{ const it = document.getElementById('{name}'); it.value = {json.dumps(value)};"
        f"it.dispatchEvent(new Event('{event}', {{bubbles: true}})) }})()"
    )
    browser.js("new Promise(done => setTimeout(done, 180))")


def cards(browser: Browser) -> list[str]:
    return list(browser.js("[...document.querySelectorAll('.card')].map(card => card.innerText)"))


@needed
def test_the_page_asks_for_nothing_and_complains_of_nothing(pages: dict[str, Path], browser: Browser) -> None:
    for page in pages.values():
        browser.look()
        browser.complaints.clear()
        browser.requests.clear()
        browser.open(page)
        browser.until(
            "[...document.images].length > 10 && [...document.images].every(i => i.naturalWidth > 0)"
        )
        assert browser.complaints == []
        assert {url.partition(":")[0] for url in browser.requests} <= {"file", "blob", "about"}
        assert sum(url.startswith("file:") for url in browser.requests) == 1
    browser.js(
        "(() => { const s = document.createElement('script'); s.textContent = 'document.title = 1';"
        "document.body.append(s); fetch('https://example.org').catch(() => 0) })()"
    )
    browser.until("true")
    assert browser.js("document.title") != "1"
    assert any("Content Security Policy" in complaint for complaint in browser.complaints)
    browser.complaints.clear()


@needed
def test_filters(pages: dict[str, Path], browser: Browser) -> None:
    shown = packed(pages["two"])
    browser.look()
    browser.open(pages["two"])
    total, (first, second) = len(shown["id"]), (run["ok"] for run in shown["runs"])
    assert count(browser) == total
    for value, expected in (
        ("wrong", sum(a == 0 or b == 0 for a, b in zip(first, second, strict=True))),
        ("right", sum(a == b == 1 for a, b in zip(first, second, strict=True))),
        ("differ", sum(a != b for a, b in zip(first, second, strict=True))),
        ("wrong1", second.count(0)),
    ):
        choose(browser, "verdict", value)
        assert count(browser) == expected, value
    assert browser.js("location.hash") == "#v=wrong1"
    choose(browser, "verdict", "all")
    choose(browser, "type", "yes_no")
    yes_no = shown["types"].index("yes_no")
    assert count(browser) == shown["t"].count(yes_no)
    choose(browser, "query", "BLEEDING")
    assert all("Is there bleeding?" in card for card in cards(browser))
    assert 0 < count(browser) < shown["t"].count(yes_no)
    choose(browser, "query", "")
    choose(browser, "type", "")
    choose(browser, "group", "14.png")
    assert 0 < count(browser) < 10
    assert all("14.png" in card for card in cards(browser))
    choose(browser, "query", "nothing has this")
    assert count(browser) == 0
    assert cards(browser) == []
    assert (
        browser.js("getComputedStyle(document.getElementById('cards'), '::after').content")
        == '"No question fits."'
    )
    assert browser.complaints == []


@needed
def test_paging_keys_and_addresses(pages: dict[str, Path], browser: Browser) -> None:
    browser.look()
    browser.open(pages["one"])
    page = "Number(document.getElementById('page').value)"
    current = "[...document.querySelectorAll('.card')].findIndex(card => card.matches('.current'))"
    first = cards(browser)
    assert len(first) == 24
    for key, expected in (("j", 2), ("ArrowRight", 3), ("k", 2), ("ArrowLeft", 1), ("k", 1)):
        browser.press(key)
        assert browser.js(page) == expected, key
    assert cards(browser) == first
    for key, expected in (("n", 1), ("n", 2), ("p", 1), ("p", 0), ("p", 0)):
        browser.press(key)
        assert browser.js(current) == expected, key
    for _ in range(24):
        browser.press("n")
    assert (browser.js(page), browser.js(current)) == (2, 0)
    browser.press("p")
    assert (browser.js(page), browser.js(current)) == (1, 23)
    browser.press("Enter")
    assert browser.js("document.querySelectorAll('.card.large').length") == 1
    browser.press("/")
    assert browser.js("document.activeElement.id") == "query"
    browser.press("n")  # is typed
    assert browser.js("document.getElementById('query').value") == "n"
    browser.press("Escape")
    assert browser.js("document.activeElement === document.body")
    browser.press("?")
    assert browser.js("document.getElementById('help').open")
    browser.js("document.getElementById('help').close()")
    browser.open(pages["one"], "#v=wrong&t=which&p=1")
    assert browser.js("document.getElementById('verdict').value") == "wrong"
    assert browser.js("document.getElementById('type').value") == "which"
    assert all("✗" in card for card in cards(browser))
    browser.js("location.hash = '#v=right'")
    browser.until("document.getElementById('verdict').value === 'right'")
    assert all("✓" in card for card in cards(browser))
    browser.open(pages["one"], "#v=constructor")
    assert count(browser) == len(packed(pages["one"])["id"])
    browser.open(pages["one"], "#v=%22%3E&t=none&p=-7&g=%FF")
    assert browser.complaints == []


@needed
def test_hostile_text_stays_text_in_the_browser(tmp_path: Path, data: Path, browser: Browser) -> None:
    long = "word" * 2500
    run = make(
        tmp_path / "run",
        data,
        labels=True,
        change=lambda row: replace(
            row,
            question=HOSTILE,
            question_type=HOSTILE if row.id < "5" else long,
            answer=HOSTILE,
            group=HOSTILE,
            references=[HOSTILE + long],
            probabilities={HOSTILE: 1.0},
        ),
    )
    browser.look(width=1000)
    browser.complaints.clear()
    browser.open(report.write([run]))
    browser.until("document.images.length > 5")
    assert browser.js("document.title") == "run"
    assert browser.js("document.querySelectorAll('#cards script, #cards b, [onerror]').length") == 0
    assert "</script><img src=x onerror=" in cards(browser)[0]
    assert browser.js("document.documentElement.scrollWidth <= innerWidth")
    choose(browser, "query", "onerror")
    choose(
        browser,
        "type",
        HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e").replace("\x00", "\\x00"),
    )
    assert count(browser) > 0
    assert browser.complaints == []


def luminance(colour: str) -> float:
    channels = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(browser: Browser, what: str) -> float:
    """WCAG's ratio of an element's colour to the page's ground."""
    colours = browser.js(
        f"[getComputedStyle(document.querySelector('{what}')).color,"
        "getComputedStyle(document.body).backgroundColor]"
    )
    light, dark = sorted(map(luminance, colours), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@needed
def test_dark_light_and_narrow(pages: dict[str, Path], browser: Browser) -> None:
    grounds = []
    for dark in (False, True):
        browser.look(dark=dark)
        browser.open(pages["two"])
        grounds.append(luminance(browser.js("getComputedStyle(document.body).backgroundColor")))
        for what in ("h1", ".quiet", ".num", ".card .no", ".card .tags", ".chart", "nav a"):
            assert contrast(browser, what) >= 4.5, (dark, what)
    assert grounds[0] > 0.9
    assert grounds[1] < 0.02
    browser.js("document.getElementById('theme').click()")
    assert luminance(browser.js("getComputedStyle(document.body).backgroundColor")) > 0.9
    for width in (360, 800, 1600):
        browser.look(width=width)
        for page in pages.values():
            browser.open(page)
            assert browser.js("document.documentElement.scrollWidth <= innerWidth"), width
    browser.look()
    assert browser.complaints == []


@needed
def test_print(pages: dict[str, Path], browser: Browser) -> None:
    browser.look(dark=True)
    browser.open(pages["two"])
    every = "[...document.querySelectorAll('details')].every(each => each.open)"
    browser.js(f"addEventListener('beforeprint', () => {{ window.all = {every} }})")
    pdf = browser.pdf()
    assert pdf.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 30
    assert browser.js("window.all") is True
    assert browser.js("document.querySelectorAll('details[open]').length") == 1
    browser.look(dark=True, media="print")
    assert luminance(browser.js("getComputedStyle(document.body).backgroundColor")) == 1
    assert browser.js("getComputedStyle(document.querySelector('.controls')).display") == "none"
    browser.look()


@needed
@pytest.mark.long
@pytest.mark.long
def test_sixty_thousand_predictions(tmp_path: Path, browser: Browser) -> None:
    """Of 4,000 images; `python -m benchmarks.report` measures it with a test part as large."""
    data = write_jsonl(tmp_path / "data", images=4000)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    many = [
        {**row, "id": f"{row['id']}-{n}", "question": f"{row['question']} ({n})", "split": "test"}
        for n in range(3)
        for row in rows
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:50], *many[50:]]))
    run = make(tmp_path / "run", data, labels=True)
    began = time.monotonic()
    page = report.write([run])
    print(f"{len(many):,} predictions: {time.monotonic() - began:.1f} s, {page.stat().st_size / 1e6:.1f} MB")
    assert page.stat().st_size <= report.MOST
    browser.complaints.clear()
    assert browser.open(page) < 8
    began = time.monotonic()
    choose(browser, "query", "polyp")
    assert time.monotonic() - began < 1
    assert browser.complaints == []


def test_predictions_match_between_runs_by_what_was_asked(data: Path) -> None:
    settings = recipe.parse(
        f"{{model: {{name: tiny-qwen3-vl}}, data: {{format: jsonl, path: {data}}}, "
        "image: {size: 64}, output: x}"
    )
    examples = datasets.load(settings.data).part("test")
    one, two = answer(examples, 0.5, 1), answer(examples, 0.5, 2)
    assert len(gallery.joined([one, two])) == len(examples)
    other = [replace(row, references=["something else"]) for row in two]
    rows = gallery.joined([one, other])
    assert len(rows) == 2 * len(examples)
    assert all(sum(each is not None for each in row) == 1 for row in rows)
