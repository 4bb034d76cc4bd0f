"""Splits: by a hash, stratified, frozen in a file and read back."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SHARED, noise_image
from sources import load

from surgvqa import cli, datasets
from surgvqa.datasets import Dataset, splits
from surgvqa.recipe import BadInput, Data


def table(folder: Path, groups: int = 60, **columns: list[Any]) -> Path:
    """Groups of one image each, or two, with questions whose answers are of very unequal frequency."""
    folder.mkdir(exist_ok=True)
    noise_image(8, 8, 0).save(folder / "seed.png")
    rng = np.random.default_rng(3)
    rows = []
    for group in range(groups):
        for image in range(1 + group % 2):
            name = f"{group}-{image}.png"
            (folder / name).write_bytes((folder / "seed.png").read_bytes())
            for number in range(int(rng.integers(1, 7))):
                kind = ("yes_no", "count")[number % 2]
                answers, odds = {
                    "yes_no": (["yes", "no"], [0.9, 0.1]),
                    "count": (["0", "1", "2; 3", "3; 2"], [0.7, 0.2, 0.05, 0.05]),
                }[kind]
                rows.append(
                    {
                        "image": name, "question": f"{kind} {number}?", "group": f"video{group}",
                        "question_type": kind, "answer": str(rng.choice(answers, p=odds)),
                        "stage": 1 + number % 3,
                        **{column: values[group % len(values)] for column, values in columns.items()},
                    }
                )  # fmt: skip
    file = folder / "questions.jsonl"
    write(file, rows)
    return file


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def parts(dataset: Dataset) -> dict[str, str | None]:
    return {example.group: example.split for example in dataset.examples}


STRATIFIED = {"val": 0.2, "test": 0.2, "stratify": "answer"}


def worst(dataset: Dataset) -> float:
    """How far a part's share of any answer of a type is from what it should be, in questions."""
    shares = {"train": 0.6, "val": 0.2, "test": 0.2}
    of = [(e.question_type, datasets.normalise(e.answers[0]), e.split) for e in dataset.examples]
    totals, placed = Counter(each[:2] for each in of), Counter(of)
    return max(
        abs(placed[(*kind, part)] - share * total)  # type: ignore[index]  # part is a Part
        for kind, total in totals.items()
        for part, share in shares.items()
    )


def test_a_stratified_split_has_every_answers_share_and_tears_no_group(tmp_path: Path) -> None:
    file = table(tmp_path)
    hashed = load("jsonl", file, by="group", split={"val": 0.2, "test": 0.2})
    stratified = load("jsonl", file, by="group", split=STRATIFIED)
    assert not stratified.problems
    assert len(stratified.examples) == len(rows_of(file))
    for group in parts(stratified):
        assert len({e.split for e in stratified.examples if e.group == group}) == 1
    assert worst(stratified) <= 2
    assert worst(stratified) < worst(hashed)
    by_type = load("jsonl", file, by="group", split={**STRATIFIED, "stratify": "question_type"})
    counts = Counter((e.question_type, e.split) for e in by_type.examples)
    for kind in ("yes_no", "count"):
        total = sum(counts[kind, part] for part in splits.PARTS)
        assert abs(counts[kind, "test"] - 0.2 * total) <= 2


def test_a_stratified_split_depends_on_the_questions_and_the_seed_not_on_their_order(tmp_path: Path) -> None:
    file = table(tmp_path)
    before = parts(load("jsonl", file, by="group", split=STRATIFIED))
    rows = rows_of(file)
    write(file, [rows[int(place)] for place in np.random.default_rng(0).permutation(len(rows))])
    assert parts(load("jsonl", file, by="group", split=STRATIFIED)) == before
    assert parts(load("jsonl", file, by="group", split={**STRATIFIED, "seed": 1})) != before


def test_a_share_of_none_stays_empty(tmp_path: Path) -> None:
    file = table(tmp_path)
    dataset = load("jsonl", file, by="image", split={"val": 0.0, "test": 0.3, "stratify": "question_type"})
    assert {example.split for example in dataset.examples} == {"train", "test"}


def test_adding_rows_moves_no_group_of_a_hashed_split(tmp_path: Path) -> None:
    few, many = table(tmp_path / "few", groups=20), table(tmp_path / "many", groups=60)
    before, after = parts(load("jsonl", few, by="group")), parts(load("jsonl", many, by="group"))
    assert len(after) == 60
    assert {group: after[group] for group in before} == before


def freeze(file: Path, out: Path, *words: str) -> int:
    """`surgvqa split` of a table."""
    recipe = out.with_suffix(".yaml")
    recipe.write_text(
        f"model: {{name: tiny-qwen3-vl}}\ndata: {{format: jsonl, path: {file}}}\n"
        f"image: {{size: 64}}\noutput: {out.parent / 'run'}\n"
    )
    return cli.main(["split", str(recipe), "--out", str(out), *words])


@pytest.mark.parametrize(
    ("split", "by"),
    [
        ({"by": "image"}, "image"),
        ({"by": "group", "seed": 5}, "group"),
        ({"by": "group", **STRATIFIED}, "group"),
        ({"by": "official"}, "group"),
    ],
    ids=["image", "group", "stratified", "official"],
)
def test_a_frozen_split_is_the_one_that_was_frozen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], split: dict[str, Any], by: str
) -> None:
    file = table(tmp_path / "data", split=["train", "train", "test", "val"])
    out = tmp_path / "splits.json"
    # The stages that are trained on have no say in it.
    assert freeze(file, out, f"data.split={json.dumps(split)}", "data.stages=[1]") == 0
    said = capsys.readouterr().out
    made = load("jsonl", file, split=split, by=split["by"])
    again = load("jsonl", file, by="frozen", split={"path": str(out)})
    assert not again.problems
    assert again.examples == made.examples
    content = json.loads(out.read_text(encoding="utf-8"))
    assert content["by"] == by
    assert content["made"]["split"]["by"] == split["by"]
    assert content["made"]["data"] == [{"format": "jsonl", "path": str(file), "revision": None}]
    for part in splits.PARTS:
        assert content["counts"][part] == {f"{by}s": len(content[part]), "questions": len(made.part(part))}
        assert f"{len(made.part(part))} questions" in said
    assert list(tmp_path.glob(".*")) == []


def test_a_frozen_split_is_not_replaced_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = table(tmp_path / "data"), tmp_path / "splits.json"
    out.write_text("mine")
    assert freeze(file, out, "data.split.by=group") == 2
    assert "is there already; give another, or --yes" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert freeze(file, out, "data.split.by=group", "--yes") == 0
    assert json.loads(out.read_text())["by"] == "group"
    assert (
        cli.main(["split", str(out.with_suffix(".yaml")), "data.split.by=group", "--out", str(file / "x")])
        == 2
    )
    assert f"--out {file / 'x'}: cannot be written: Not a directory" in capsys.readouterr().err


def test_freezing_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = table(tmp_path / "data"), tmp_path / "splits.json"
    assert freeze(file, out) == 2
    assert "rows belong to no part" in capsys.readouterr().err
    rows = rows_of(file)
    write(file, [{**row, "split": ("train", "test")[place % 2]} for place, row in enumerate(rows)])
    assert freeze(file, out) == 2
    assert "images are in two parts or more, such as" in capsys.readouterr().err
    write(file, [*rows, {"image": "gone.png", "question": "Q?", "answer": "a"}])
    assert freeze(file, out, "data.split.by=group") == 2
    assert "gone.png" in capsys.readouterr().err
    assert not out.exists()


def test_a_frozen_split_that_does_not_fit_the_data_names_every_group(tmp_path: Path) -> None:
    file, out = table(tmp_path / "data", groups=10), tmp_path / "splits.json"
    assert freeze(file, out, "data.split.by=group") == 0
    rows = rows_of(file)
    renamed = [{**row, "group": {"video3": "new one"}.get(row["group"], row["group"])} for row in rows]
    write(file, [row for row in renamed if row["group"] != "video7"])
    dataset = load("jsonl", file, by="frozen", split={"path": str(out)})
    assert [problem.place for problem in dataset.problems] == [
        "group new one",
        "group video3",
        "group video7",
    ]
    new, *gone = [problem.what for problem in dataset.problems]
    assert new.startswith(f"is in no part of {out}")
    assert all(what.startswith(f"is in {out}, but not in the data") for what in gone)
    assert not any(problem.warning for problem in dataset.problems)
    assert "new one" not in parts(dataset)


def test_a_file_that_is_no_frozen_split(tmp_path: Path) -> None:
    file, out = table(tmp_path / "data", groups=10), tmp_path / "splits.json"
    assert freeze(file, out, "data.split.by=group") == 0
    good = json.loads(out.read_text())
    twice = {**good, "val": [*good["val"], good["train"][0]]}
    os.mkfifo(tmp_path / "pipe")
    for path, text, said in [
        (out, "[]", "Input should be an object"),
        (out, "{", "Invalid JSON"),
        (out, "{}", "by: Field required; train: Field required"),
        (out, json.dumps({**good, "by": "question"}), "by: Input should be 'image' or 'group'"),
        (out, json.dumps({**good, "train": [1]}), "train.0: Input should be a valid string"),
        (out, json.dumps({**good, "tset": []}), "tset: Extra inputs are not permitted"),
        (out, json.dumps(twice), f"{good['train'][0]!r} is in train and again in val"),
        (tmp_path / "gone.json", None, "does not exist; `surgvqa split RECIPE --out"),
        (tmp_path, None, "it is not a file"),
        (tmp_path / "pipe", None, "it is not a file"),
    ]:
        if text is not None:
            path.write_text(text)
        with pytest.raises(BadInput) as caught:
            load("jsonl", file, by="frozen", split={"path": str(path)})
        assert caught.value.problems[0].startswith(f"data.split.path: {path}: ")
        assert said in caught.value.problems[0]


def test_what_is_skipped_is_not_frozen(tmp_path: Path) -> None:
    file, out = table(tmp_path / "data", groups=10), tmp_path / "splits.json"
    file.write_text(file.read_text() + "{\n")
    assert freeze(file, out, "data.split.by=group") == 2
    assert freeze(file, out, "data.split.by=group", "data.on_error=skip") == 0
    frozen = {"path": str(out)}
    assert load("jsonl", file, by="frozen", split=frozen, on_error="skip").part("train")


def test_the_audit_knows_what_a_frozen_split_keeps_together(tmp_path: Path) -> None:
    file, out = table(tmp_path / "data", groups=10), tmp_path / "splits.json"
    assert freeze(file, out, "data.split.by=image") == 0
    split = Data.model_validate(
        {"format": "jsonl", "path": str(file), "split": {"by": "frozen", "path": str(out)}}
    )
    assert splits.unit(split.split) == "image"
    assert (
        cli.main(["check", str(out.with_suffix(".yaml")), "data.split.by=frozen", f"data.split.path={out}"])
        == 0
    )


def test_stages_are_chosen_after_the_split(tmp_path: Path) -> None:
    file = table(tmp_path)
    for split in (STRATIFIED, {"stratify": "none"}):
        every = {e.id: e for e in load("jsonl", file, by="group", split=dict(split)).examples}
        some = load("jsonl", file, by="group", split=dict(split), stages=[1, 3])
        assert {e.stage for e in some.examples} == {1, 3}
        assert all(every[example.id] == example for example in some.examples)
        assert len(some.examples) == sum(example.stage != 2 for example in every.values())
        (left,) = some.problems
        assert left.warning
        assert left.what == f"leaves out {len(every) - len(some.examples)} of stage 2 as asked"


def test_questions_without_a_stage_and_stages_without_a_question_are_named(tmp_path: Path) -> None:
    file = table(tmp_path)
    rows = rows_of(file)
    del rows[4]["stage"], rows[9]["stage"]
    write(file, rows)
    assert not load("jsonl", file, by="group").problems
    problems = load("jsonl", file, by="group", stages=[1, 2, 3, 7]).problems
    assert [problem.place for problem in problems] == [f"{file}:5", f"{file}:10", "data.stages"]
    assert problems[0].what == "has no stage, which data.stages: [1, 2, 3, 7] needs"
    assert problems[2].what == "no question is of stage 7; the data has 1, 2, 3"


def test_real_questions_are_stratified(tmp_path: Path) -> None:
    real = SHARED / "kvasir_vqa/kvasir_raw_6500_image_level_70_15_15/val.jsonl"
    if not real.exists():
        pytest.skip("no real Kvasir-VQA rows here; the tests above cover generated ones")
    noise_image(8, 8, 0).save(tmp_path / "a.png")
    rows = [
        {"image": "a.png", "group": row["image_id"], "question": row["question"], "answer": row["answer"]}
        for row in rows_of(real)
    ]
    file = tmp_path / "questions.jsonl"
    write(file, [{**row, "question_type": row["question"]} for row in rows])
    hashed = load("jsonl", file, by="group", split={"val": 0.2, "test": 0.2})
    stratified = load("jsonl", file, by="group", split=STRATIFIED)
    assert len(stratified.examples) == 449
    assert worst(stratified) < 4 < worst(hashed)
