"""Each benchmark runs in seconds on tiny models, and the page holds what the committed results say."""

from __future__ import annotations

import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks are beside the package, not in it

from benchmarks import (  # noqa: E402
    audit,
    charts,
    checkpoint,
    corruptions,
    data,
    decode,
    grouping,
    labels,
    options,
    peer,
    plan,
    report,
    scores,
    start,
    train,
    where,
)
from benchmarks.record import RESULTS  # noqa: E402

TINY = ["--size", "tiny", "--canvas", "112", "--rounds", "2", "--device", "cpu"]


def written(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["machine"]["cores"] >= 1
    assert {"torch", "transformers"} <= content["machine"]["versions"].keys()
    return content


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three benchmarks, on both families."""
    out = tmp_path_factory.mktemp("results")
    assert train.main([*TINY, "--groups", "1", "8", "--one-process", "--out", str(out)]) == 0
    assert decode.main([*TINY, "--groups", "8", "--one-process", "--out", str(out)]) == 0
    small = ["--images", "2", "--rounds", "1", "--repeats", "1", "--workers", "0", "1", "--canvas", "112"]
    assert data.main([*small, "--out", str(out)]) == 0
    few = ["--options", "all recomputed", "--families", "qwen3_vl", "--steps", "1"]
    assert options.main([*TINY, *few, "--out", str(out)]) == 0
    assert (
        where.main(
            ["--size", "tiny", "--canvas", "112", "--images", "1", "--device", "cpu", "--out", str(out)]
        )
        == 0
    )
    assert labels.main([*TINY, "--groups", "4", "--one-process", "--out", str(out)]) == 0
    assert checkpoint.main([*TINY, "--steps", "2", "--out", str(out)]) == 0
    assert plan.main(["--sizes", "5000", "--tokenize", "50", "--out", str(out)]) == 0
    return out


@pytest.mark.long
def test_training_ways_agree_on_the_loss_and_fill_every_row(results: Path) -> None:
    rows = written(results / "train.json")["rows"]
    assert [(row["family"], row["questions_per_image"], row["way"]) for row in rows] == [
        (family, group, way)
        for family in ("qwen2_vl", "qwen3_vl")
        for group in (1, 8)
        for way in ("trees", "rows", "plain")
    ]
    for row in rows:
        assert row["loss_difference"] <= 1e-5
        assert row["questions_per_s"]["min"] <= row["questions_per_s"]["median"]
        assert row["peak_gib"] > 0.1
        assert (row["real_tokens_share"] < 1) == (row["way"] == "plain")
        assert ("trees_times_as_fast" in row) == (row["way"] != "trees")
    tokens = {(row["family"], row["questions_per_image"], row["way"]): row["tokens"] for row in rows}
    for family in ("qwen2_vl", "qwen3_vl"):
        assert tokens[family, 1, "trees"] == tokens[family, 1, "rows"]
        assert tokens[family, 8, "trees"] < tokens[family, 8, "rows"] < tokens[family, 8, "plain"]


@pytest.mark.long
def test_adapters_agree_on_the_loss_too_and_processes_apart_have_peaks_of_their_own(tmp_path: Path) -> None:
    lora = ["--groups", "8", "--families", "qwen3_vl", "--tune", "lora", "--steps", "2"]
    assert train.main([*TINY, *lora, "--out", str(tmp_path)]) == 0
    rows = written(tmp_path / "train.json")["rows"]
    assert all(row["loss_difference"] <= 1e-5 for row in rows)
    assert len({row["peak_gib"] for row in rows}) == 3
    for losses in zip(*(row["losses"] for row in rows), strict=True):
        assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)


@pytest.mark.long
def test_decoding_ways_say_the_same(results: Path) -> None:
    rows = written(results / "decode.json")["rows"]
    assert [row["way"] for row in rows] == ["trees", "rows", "batches"] * 2
    assert all(row["same_answers"] == 1 for row in rows)


@pytest.mark.long
def test_labels_as_branches_get_what_rows_of_their_own_get(results: Path) -> None:
    rows = written(results / "labels.json")["rows"]
    assert [row["way"] for row in rows] == ["trees", "rows"] * 2
    assert all(row["labels"] == 18 and row["difference"] <= 1e-5 for row in rows)
    assert rows[0]["tokens"] < rows[1]["tokens"] / 5


@pytest.mark.long
def test_a_steps_time_is_told_by_kinds(results: Path) -> None:
    for row in written(results / "where.json")["rows"]:
        assert {"attention", "matrix products", "optimizer"} <= row["kinds_s"].keys()
        assert 0 < sum(row["kinds_s"].values()) <= 1.5 * row["compute_s"] * 2  # two threads at most
        assert row["kinds_s"].get("other operators", 0) < 0.4 * sum(row["kinds_s"].values())
    assert where.kind("aten::addmm") == "matrix products"
    assert where.kind("aten::_scaled_dot_product_flash_attention_for_cpu") == "attention"


@pytest.mark.long
def test_a_checkpoints_cost_is_told_in_steps(results: Path) -> None:
    rows = written(results / "checkpoint.json")["rows"]
    assert [(row["tune"], row["way"]) for row in rows] == [
        ("lora", "background"), ("lora", "waiting"), ("full", "background"), ("full", "waiting"),
    ]  # fmt: skip
    for row in rows:
        trained = row["trained_parameters"] * 12 / 2**20  # weights and two moments, in fp32
        assert trained < row["mib"] < 1.2 * trained + 0.2
        assert row["waited_s"]["median"] <= row["written_s"]["median"]
        assert row["waited_steps"]["median"] == pytest.approx(
            row["waited_s"]["median"] / row["step_s"]["median"], rel=0.5
        )


def test_an_audit_decodes_once(tmp_path: Path) -> None:
    assert audit.main(["--images", "8", "--questions", "40", "--out", str(tmp_path)]) == 0
    rows = written(tmp_path / "audit.json")["rows"]
    assert [(row["decoded"], row["images"]) for row in rows[:3]] == [(0, 8), (8, 8), (0, 8)]
    assert "| everything again |" in charts.tables(tmp_path)["audit"]


def test_a_start_is_measured_and_stopped(tmp_path: Path) -> None:
    few = ["--images", "20", "--questions", "200", "--data", str(tmp_path / "data")]
    assert start.main([*few, "--only", "empty", "--out", str(tmp_path)]) == 0
    [row] = written(tmp_path / "start.json")["rows"]
    assert row["seconds"] > 0
    assert row["cpu_seconds"] > 0
    assert len(row["peak_gib"]) == 1
    assert "| check, empty image cache | this |" in charts.tables(tmp_path)["start"]
    (tmp_path / "data/run/recipe.yaml").unlink()
    with pytest.raises(SystemExit, match="report failed"):
        start.main([*few, "--only", "report", "--out", str(tmp_path)])


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the references, about the data
def test_scores_are_those_of_their_references(tmp_path: Path) -> None:
    few = ["--seeds", "1", "--predictions", "300", "--resamples", "50", "--rounds", "1"]
    assert scores.main([*few, "--out", str(tmp_path)]) == 0
    rows = written(tmp_path / "scores.json")["rows"]
    compared = {row["scores"]: row for row in rows if "reference" in row}
    unchecked = set() if find_spec("pycocoevalcap") else {"`cider`"}
    assert compared.keys() == {check.scores for check in scores.CHECKS} - unchecked
    assert all(row["difference"] <= row["limit"] and row["values"] for row in compared.values())
    assert [row["answers"] for row in rows if "answers" in row] == list(scores.KINDS)
    assert "| labels, with probabilities | 300 |" in charts.tables(tmp_path)["scores"]
    assert charts.tables(tmp_path)["checks"].count("\n| `") == len(rows) - len(scores.KINDS) - 2


def test_every_score_names_a_test_that_there_is() -> None:
    for check in scores.CHECKS:
        file, _, name = check.test.partition("::")
        assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")


def test_a_score_that_is_another_ends_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = scores.Check("`exact`", "another", lambda seed: {"exact": (0.5, 0.6)}, "")
    monkeypatch.setattr(scores, "CHECKS", [wrong])
    with pytest.raises(SystemExit, match="more than"):
        scores.main(["--seeds", "1", "--out", str(tmp_path)])


def test_corruptions_are_timed_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corruptions, "SIZES", ((64, 48),))
    sheet = tmp_path / "sheet.webp"
    assert corruptions.main(["--rounds", "1", "--out", str(tmp_path), "--sheet", str(sheet)]) == 0
    assert [row["kind"] for row in written(tmp_path / "corruptions.json")["rows"]] == list(corruptions.KINDS)
    assert sheet.stat().st_size < 150_000
    assert "| smoke |" in charts.tables(tmp_path)["corruptions"]


@pytest.mark.long
def test_options_learn_the_same(results: Path) -> None:
    rows = written(results / "options.json")["rows"]
    assert [row["way"] for row in rows] == ["default", "all recomputed"]
    assert all(row["loss_difference"] <= 1e-5 for row in rows)
    assert rows[1]["default_times_as_fast"]["median"] > 0


@pytest.mark.long
def test_grouping_gives_the_same_questions_or_the_same_time(tmp_path: Path) -> None:
    """On a few questions of the demo's."""
    recipe = (ROOT / "recipes" / "demo.yaml").read_text(encoding="utf-8")
    file = tmp_path / "recipe.yaml"
    file.write_text(
        recipe.replace("{format: demo}", f"{{format: jsonl, path: {write_jsonl(tmp_path / 'data')}}}")
    )
    words = ["--recipe", str(file), "--seeds", "1", "--groups", "4", "1", "--runs", str(tmp_path / "runs")]
    small = ["train.epochs=2", "batch.questions=8", "eval.max_new_tokens=4", "image.size=96"]
    assert grouping.main([*words, "--out", str(tmp_path), *small]) == 0
    rows = written(tmp_path / "grouping.json")["rows"]
    assert [(row["compared"], row["questions_per_image"]) for row in rows] == [
        ("questions", 4), ("questions", 1), ("time", 1),
    ]  # fmt: skip
    assert rows[0]["questions"] == rows[1]["questions"] == 2 * 72
    assert rows[2]["steps"] == max(1, round(rows[0]["steps"] * rows[0]["seconds"] / rows[1]["seconds"]))
    assert "| time | 1 |" in charts.tables(tmp_path)["grouping"]


@pytest.mark.long
def test_data_measures_stages_and_workers_against_training(results: Path) -> None:
    rows = written(results / "data.json")["rows"]
    assert len(rows) == 4
    for row in rows:
        speeds = [speed["median"] for speed in row["stages"].values()]
        assert speeds[-1] < min(speeds[:-1])
        assert row["delivered"].keys() == {"0", "1"}
        assert row["training_images_per_s"].keys() == {"1", "8"}
        assert row["gpu_workers"] >= 1


def test_a_page_is_made_and_opened(tmp_path: Path) -> None:
    assert report.main(["--images", "8", "--questions", "60", "--out", str(tmp_path)]) == 0
    without, with_pictures = written(tmp_path / "report.json")["rows"]
    assert without["side"] is None
    assert with_pictures["side"] >= 160
    assert without["mb"] < with_pictures["mb"] < 25
    assert "| with pictures |" in charts.tables(tmp_path)["report"]


@pytest.mark.long
def test_charts_and_tables(results: Path, tmp_path: Path) -> None:
    page = "before\n<!-- train -->\nold\n<!-- /train -->\nafter\n"
    made = charts.filled(page, charts.tables(results))
    assert made.startswith("before\n<!-- train -->\n")
    assert made.endswith("\n<!-- /train -->\nafter\n")
    assert "old" not in made
    assert made.count("| Qwen3-VL |") == 6
    assert charts.filled(made, charts.tables(results)) == made
    pytest.importorskip("matplotlib")
    files = charts.draw(results, tmp_path)
    assert [file.name for file in files] == ["benchmark_train.png", "benchmark_decode.png"]
    assert all(file.stat().st_size < 60_000 for file in files)


def test_the_page_holds_the_committed_results() -> None:
    pages = {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in charts.PAGES}
    for page in pages.values():
        assert charts.filled(page, charts.tables(RESULTS)) == page
    assert "<!-- checks -->\n|" in pages["metrics.md"]
    page = pages["benchmarks.md"]
    for file in RESULTS.glob("*.json"):
        assert f"<!-- {file.stem} -->" in page
    assert {"train", "decode", "data", "labels", "options", "plan", "grouping", "where", "checkpoint"} <= set(
        re.findall(r"<!-- (\w+) -->", page)
    )


def test_a_missing_peer_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    if find_spec("trl") and find_spec("torchvision"):
        assert peer.missing() is None
        return
    assert train.main(["--peer", "trl"]) == 2
    assert "pip install" in capsys.readouterr().err


def test_groups_that_do_not_fill_a_step_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        train.main(["--groups", "3"])
    assert "must divide 16" in capsys.readouterr().err
