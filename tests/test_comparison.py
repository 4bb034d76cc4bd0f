"""Two runs compared: against statsmodels, hand-worked tests, and what is refused."""

from __future__ import annotations

import json
import random
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from surgvqa import cli
from surgvqa.comparison import compare, drawing, holm
from surgvqa.intervals import draws
from surgvqa.metrics import Prediction
from surgvqa.recipe import BadInput


def answered(
    seed: int, skill: float, count: int = 300, kinds: Iterable[str] = ("count", "yes_no")
) -> list[Prediction]:
    """The same questions for every seed and skill; answers differ."""
    asked, rng = random.Random(0), random.Random(seed)
    made = []
    for number in range(count):
        kind = [*kinds][number % len([*kinds])]
        truth = asked.choice("abc")
        answer = truth if rng.random() < skill else rng.choice("abc")
        made.append(Prediction(str(number), f"image {number % 30}", "", "Q?", kind, [truth], answer))
    return made


def write(folder: Path, rows: Iterable[Prediction], split: str = "test", suffix: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    lines = (json.dumps(row.row(), ensure_ascii=False) + "\n" for row in rows)
    (folder / f"predictions{suffix}.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / f"scores{suffix}.json").write_text(json.dumps({"split": split, "checkpoint": "step-000009"}))
    return folder


def right(rows: list[Prediction]) -> np.ndarray:
    return np.array([row.answer == row.references[0] for row in rows])


def test_differences_intervals_and_tests(tmp_path: Path) -> None:
    one, two = answered(1, 0.5), answered(2, 0.8)
    found = compare(write(tmp_path / "a", one), write(tmp_path / "b", two), resamples=2000, seed=3)
    exact = found.overall.scores["exact"]
    assert (exact.a, exact.b) == pytest.approx((right(one).mean(), right(two).mean()))
    assert exact.difference == pytest.approx(exact.b - exact.a)
    # The same images are drawn for both: resample the questions' differences by hand.
    change = right(two).astype(float) - right(one)
    images = sorted({row.image for row in one})
    sums = np.array([change[[row.image == image for row in one]].sum() for image in images])
    slow = np.concatenate([counts @ sums for counts in draws(30, 2000, seed=3)]) / 300  # 10 questions each
    assert exact.interval == pytest.approx(np.quantile(slow, [0.025, 0.975]))
    assert exact.p == pytest.approx(2 * ((slow <= 0).sum() + 1) / 2001)
    assert exact.p_holm is None
    assert {"exact", "macro_f1", "balanced_accuracy"} <= found.overall.scores.keys()
    assert (found.overall.n, found.groups, found.overall.groups) == (300, 30, 30)
    assert (found.a.split, found.a.checkpoint) == ("test", "step-000009")
    assert list(found.by_type) == ["count", "yes_no"]


@pytest.mark.parametrize(
    ("only_a", "only_b", "few"), [(4, 12, True), (20, 41, False), (0, 0, True), (12, 12, True)]
)
def test_mcnemar(tmp_path: Path, only_a: int, only_b: int, few: bool) -> None:
    outcomes = [(True, False)] * only_a + [(False, True)] * only_b + [(True, True)] * 9 + [(False, False)] * 5
    runs = [
        write(
            tmp_path / name,
            [
                Prediction(str(n), str(n), "", "Q?", "t", ["yes"], "yes" if outcome[which] else "no")
                for n, outcome in enumerate(outcomes)
            ],
        )
        for which, name in enumerate("ab")
    ]
    test = compare(*runs, resamples=20).overall.mcnemar
    assert (test.both, test.only_a, test.only_b, test.neither) == (9, only_a, only_b, 5)
    assert test.exact is few
    if only_a + only_b:
        theirs = mcnemar([[9, only_a], [only_b, 5]], exact=few, correction=True).pvalue
        assert test.p == pytest.approx(theirs)
    if only_a == 4:
        # Twice the chance of at most 4 heads in 16 tosses: 2 · (1 + 16 + 120 + 560 + 1820) / 2¹⁶.
        assert test.p == pytest.approx(2 * 2517 / 65536)
    if only_a == 20:
        # (|20 - 41| - 1)² / 61 = 6.557; chi-squared with one degree of freedom.
        assert test.p == pytest.approx(0.01044, abs=1e-5)
    if only_a == only_b:
        assert test.p == 1


def test_holm_by_hand(tmp_path: Path) -> None:
    """Five types; p in rising order are times 5, 4, 3, …, never less than the one before, at most 1."""
    kinds = ["a", "b", "c", "d", "e"]
    one = answered(1, 0.5, 400, kinds)
    better = {"a": 0.9, "b": 0.7, "c": 0.6}
    mixed = {kind: answered(5, better.get(kind, 0.5), 400, kinds) for kind in kinds}
    two = [mixed[row.question_type][number] for number, row in enumerate(one)]
    found = compare(write(tmp_path / "a", one), write(tmp_path / "b", two), resamples=500)
    for values in (
        [(c.scores["exact"].p, c.scores["exact"].p_holm) for c in found.by_type.values()],
        [(c.mcnemar.p, c.mcnemar.p_holm) for c in found.by_type.values()],
    ):
        most = 0.0
        for place, (p, corrected) in enumerate(sorted(values)):
            assert p is not None
            most = max(most, min(1, (5 - place) * p))
            assert corrected == pytest.approx(most)


@pytest.mark.parametrize("seed", range(5))
def test_holm_is_that_of_statsmodels(seed: int) -> None:
    values = {str(n): p for n, p in enumerate(np.random.default_rng(seed).random(7) ** 4)}
    expected = multipletests(list(values.values()), method="holm")[1]
    found = holm({**values, "none": None})
    assert [found[name] for name in values] == pytest.approx(expected)
    assert "none" not in found
    assert holm({}) == {}


def test_a_question_type_may_be_called_all(tmp_path: Path) -> None:
    one, two = (answered(seed, skill, kinds=("all", "yes_no")) for seed, skill in ((1, 0.5), (2, 0.8)))
    found = compare(write(tmp_path / "a", one), write(tmp_path / "b", two), resamples=100)
    table = found.table().xs("exact", level="score")
    assert [*zip(table.index, table["questions"], strict=True)] == [
        ("all", 300), ("all", 150), ("yes_no", 150),
    ]  # fmt: skip
    assert [counted for counted in ("n = 300", "n = 150") if counted in drawing(found)] == [
        "n = 300",
        "n = 150",
    ]


def test_a_run_equals_itself(tmp_path: Path) -> None:
    run = write(tmp_path / "a", answered(1, 0.5))
    found = compare(run, run, resamples=200)
    for name, difference in found.overall.scores.items():
        assert (difference.difference, difference.p) == (0, 1)
        assert (difference.interval is None) == (name != "exact")
    exact = stats.binomtest(0, found.groups).proportion_ci(0.95, method="exact")
    assert found.overall.scores["exact"].interval == pytest.approx((-exact.high, exact.high))
    assert found.overall.mcnemar.p == 1


def test_all_right_against_all_wrong(tmp_path: Path) -> None:
    right = [replace(row, answer=row.references[0]) for row in answered(1, 0.5)]
    wrong = [replace(row, answer="something else") for row in right]
    runs = write(tmp_path / "a", wrong), write(tmp_path / "b", right)
    found = compare(*runs, resamples=200)
    most = 1 - 0.025 ** (1 / found.groups)
    assert found.overall.scores["exact"].interval == pytest.approx((1 - 2 * most, 1))


def test_questions_that_one_alone_has_are_told_and_left_out(tmp_path: Path) -> None:
    one, two = answered(1, 0.5)[5:], answered(2, 0.8)[:-3]
    found = compare(write(tmp_path / "a", one), write(tmp_path / "b", two[::-1]), resamples=50)
    assert found.only_in_a == ["297", "298", "299"]
    assert sorted(found.only_in_b) == ["0", "1", "2", "3", "4"]
    assert found.overall.n == 292
    assert found.overall.scores["exact"].a == pytest.approx(right(one[:-3]).mean())
    assert any("3 questions are only in" in note and "'297'" in note for note in found.notes)
    alone = write(tmp_path / "c", [replace(row, id=f"c{row.id}") for row in one])
    with pytest.raises(BadInput, match="no question in common: ids such as '5' against 'c5'"):
        compare(tmp_path / "a", alone)


@pytest.mark.parametrize("key", ["image", "group", "question", "question_type", "references"])
def test_other_data_are_refused_with_the_differences(tmp_path: Path, key: str) -> None:
    rows = answered(1, 0.5)
    other = ["else"] if key == "references" else "else"
    changed = [replace(row, **{key: other}) if number > 290 else row for number, row in enumerate(rows)]
    with pytest.raises(BadInput) as caught:
        compare(write(tmp_path / "a", rows), write(tmp_path / "b", changed))
    first, shown, *_, more = caught.value.problems
    assert "did not answer the same questions" in first
    assert shown.startswith("question '291': ")
    assert f"{key} is {getattr(rows[291], key)!r} in" in shown
    assert f"but {other!r} in {tmp_path / 'b'}" in shown
    assert (len(caught.value.problems), more) == (7, "and 4 more")


def test_parts(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        write(tmp_path / name, answered(seed, 0.5))
        write(tmp_path / name, answered(seed, 0.5, 60), split="val", suffix=".val")
    assert compare(tmp_path / "a", tmp_path / "b", resamples=20).overall.n == 300
    assert compare(tmp_path / "a", tmp_path / "b", "test", resamples=20).overall.n == 300
    found = compare(tmp_path / "a", tmp_path / "b", "val", resamples=20)
    assert (found.overall.n, found.a.split) == (60, "val")
    with pytest.raises(
        BadInput, match=r"holds no predictions on train; run `surgvqa evaluate .* --split train`"
    ):
        compare(tmp_path / "a", tmp_path / "b", "train")
    with pytest.raises(BadInput, match=r"was evaluated on test and .* on val"):
        compare(tmp_path / "a", write(tmp_path / "c", answered(1, 0.5), split="val"))
    with pytest.raises(BadInput, match=r"holds no predictions; run `surgvqa evaluate"):
        compare(tmp_path, tmp_path / "a")
    files = (tmp_path / name / "predictions.val.jsonl" for name in "ab")
    assert compare(*files, resamples=20).overall.n == 60
    (tmp_path / "a" / "predictions.jsonl").write_text("")
    with pytest.raises(BadInput, match=r"predictions\.jsonl:1: Invalid JSON"):
        compare(tmp_path / "a", tmp_path / "b")


def test_few_groups_are_said(tmp_path: Path) -> None:
    few = [[replace(row, group=f"video {int(row.id) % 3}") for row in answered(seed, 0.5)] for seed in (1, 2)]
    found = compare(write(tmp_path / "a", few[0]), write(tmp_path / "b", few[1]), resamples=50)
    assert "only 3 groups: intervals and p are not to be trusted" in found.notes
    assert found.overall.few_groups
    assert any("McNemar's test takes questions for independent" in note for note in found.notes)
    one = [[replace(row, group="video") for row in rows] for rows in few]
    alone = compare(write(tmp_path / "c", one[0]), write(tmp_path / "d", one[1]))
    assert alone.overall.scores["exact"].interval is None
    assert alone.overall.scores["exact"].p is None
    assert any("one group" in note for note in alone.notes)


HOSTILE = "</text><script>alert(1)</script>\x1b]0;x\x07\u202e&\x00"


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ["count", HOSTILE]
    a = write(tmp_path / "a", answered(1, 0.5, kinds=kinds))
    b = write(tmp_path / "b", answered(2, 0.8, 290, kinds=kinds))
    out = tmp_path / "out"
    assert cli.main(["compare", str(a), str(b), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for said in (
        "A: ",
        "(test, step-000009)",
        "B - A",
        "95 % interval",
        "exact",
        "macro_f1",
        "McNemar's p",
        "only in A",
    ):
        assert said in printed, said
    assert "290 questions of 30 groups" in printed
    assert len(re.findall(r"[−+]\d+\.\d … [−+]\d+\.\d │", printed)) == printed.count(" … ")  # none is folded
    assert "10 questions are only in" in printed.replace("\n", " ")
    assert "\x1b]0;" not in printed
    told = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    found = compare(a, b)
    assert told["schema"] == 1
    assert told["overall"]["scores"]["exact"]["difference"] == found.overall.scores["exact"].difference
    assert told["by_type"].keys() == set(kinds)
    drawn = (out / "compare.svg").read_text(encoding="utf-8")
    assert "<script" not in drawn
    picture = ET.fromstring(drawn)
    texts = [text.text or "" for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert any("count" in text for text in texts)
    assert any(text.startswith("</text><script>") for text in texts)
    assert sum(line.get("class") == "span" for line in picture.iter("{http://www.w3.org/2000/svg}line")) == 3


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a", answered(1, 0.5))
    assert cli.main(["compare", str(a), str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert "none: no such run" in capsys.readouterr().err
    other = write(tmp_path / "other", answered(1, 0.5), "val", ".val")
    assert cli.main(["compare", str(a), str(other), "--out", str(tmp_path / "out")]) == 2
    assert "first, or take --split val" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (a / "scores.json").write_text("[" * 100_000)
    assert cli.main(["compare", str(a), str(a), "--out", str(tmp_path / "out")]) == 0


def test_real_runs(shared: Path, tmp_path: Path) -> None:
    """REAL-Colon-VQA before and after fine-tuning: what changed, from one video."""
    runs = []
    for name in ("zeroshot", "finetuned"):
        file = shared / f"real_colon_vqa/results/qwen3_{name}_test.jsonl"
        told = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        rows = [
            Prediction(
                t["question_id"], t["question_id"], "002-004", t["question"], t["question_type"],
                [t["ground_truth"]], t["predicted_answer"],
            )
            for t in told
        ]  # fmt: skip
        runs.append(write(tmp_path / name, rows))
    found = compare(*runs)
    assert found.overall.n == 120
    assert found.overall.scores["exact"].difference > 0.3
    assert found.overall.mcnemar.p < 1e-9
    assert found.overall.scores["bleu4"].interval is None
    assert any("one group" in note for note in found.notes)
