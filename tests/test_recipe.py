"""Recipes are strict: what is wrong is said, all of it, with its key."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic.fields import FieldInfo

from surgvqa import recipe
from surgvqa.recipe import BadInput

GOOD = """
model: {name: tiny-qwen3-vl}
data: {format: demo}
image: {size: 768}
output: runs/x
"""


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(BadInput) as caught:
        recipe.parse(text, overrides, where="recipes/x.yaml")
    return caught.value.problems


def test_an_unknown_key_is_named_with_the_nearest() -> None:
    assert problems(GOOD + "batch: {question: 3}") == [
        'recipes/x.yaml: batch.question: unknown key, did you mean "questions"?'
    ]
    assert problems(GOOD + "lr: 1.0") == ['recipes/x.yaml: lr: unknown key, did you mean "train.lr"?']
    assert problems(GOOD + "checkpoint: {zzz: 1}") == [
        "recipes/x.yaml: checkpoint.zzz: unknown key; known here: every, keep"
    ]


def test_all_problems_are_listed_at_once() -> None:
    text = """
model: {name: x, tune: qlora}
data: {format: jsonl, split: {by: image, val: 1.5}}
image: {size: 768, fill: blurple}
batch: {questions: 0, trees: yes}
train: {lr: fast, epochs: 1.5, precision: fp16}
"""
    found = problems(text, "no-equals-sign")
    keys = [problem.split(": ")[1] for problem in found]
    assert keys == [
        "override 'no-equals-sign'",
        "model.tune",
        "data.split.val",
        "image.fill",
        "batch.questions",
        "batch.trees",
        "train.epochs",
        "train.lr",
        "train.precision",
        "output",
    ]
    assert "qlora is not available yet; use lora" in found[1]
    assert "fp16 overflows" in found[-2]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("image: {mode: native}", "image.max_tokens: missing"),
        ("image: {mode: native, max_tokens: 100, size: 768}", "image.size: is for mode letterbox"),
        (
            "image: {mode: native, max_tokens: 100, fill: white}",
            "image.fill: is for mode letterbox or ",
        ),
        ("image: {}", "image.size: missing"),
        ("image: {size: 768, max_tokens: 10}", "image.max_tokens: is for mode native"),
        ("data: {format: csv}", "data.path: missing"),
        (
            "data: {format: demo, split: {by: image, val: 0.5, test: 0.5}}",
            "data.split: val and test together",
        ),
        (
            "data: {format: demo, split: {val: 0.3}}",
            'data.split: val, test, seed and stratify are for by "image"',
        ),
        ("batch: {questions: 4}", "batch.questions_per_image: is larger than batch.questions"),
        ("train: {lr_vision: 0.1}", "train.lr_vision: the vision tower does not train"),
        ("train: {lr_merger: 0.1}", "train.lr_merger: the merger does not train"),
        ("model: {name: x, tune: full, lora: {rank: 4}}", "model.lora: is for tune: lora"),
        ("data: {format: csv, path: a.jsonl}", "data.format: is csv, but data.path ends in .jsonl"),
        ("data: {format: demo, revision: main}", "data.revision: is for a hub id"),
        ("eval: {every: 1, split: test}", "eval.keep_best: would choose the checkpoint on the part"),
        (
            "eval: {patience: 2}",
            "eval.patience: counts evaluations without a new best, so it needs eval.every",
        ),
        ("eval: {every: 1, patience: 2, keep_best: false}", "so it needs eval.keep_best: true"),
        (
            "data: {format: demo, labels: {a: [x, ' x'], b: [], c: [''], d: [x, y]}}",
            "data.labels: a has 'x' more than once; b has none; list its answers or leave it out; c has an",
        ),
        (
            "data: {format: demo, labels: {count: [1, '2']}}",
            "data.labels.count.0: input should be a valid string",
        ),
        ("eval: {answers: label}", "eval.answers: input should be 'generate' or 'labels', not 'label'"),
        ("train: {lr: 1e400}", "train.lr: input should be a finite number"),
        ("model: {name: tiny-qwen3-vl, revision: main}", "model.revision: tiny-qwen3-vl is no hub id"),
        ("data: {format: demo, split: {by: frozen}}", "data.split.path: missing; a frozen split is a file"),
        ("data: {format: demo, split: {by: frozen, path: x.json, seed: 1}}", 'not for "frozen"'),
        ("data: {format: demo, split: {by: group, path: x.json}}", "data.split.path: is for by: frozen"),
        ("data: {format: demo, split: {stratify: answer}}", 'not for "official"'),
        ("data: {format: demo, stages: [1, 2, 1]}", "data.stages: has one more than once: [1, 2, 1]"),
        ("data: {format: demo, stages: []}", "data.stages: list should have at least 1 item"),
        (
            "model: {name: x, adapter: runs/../runs/x/checkpoints/step-000001}",
            "model.adapter: is this run's own",
        ),
    ],
)
@pytest.mark.fault("F26")
def test_contradictions(change: str, said: str) -> None:
    kept = [line for line in GOOD.splitlines() if line.split(":")[0] != change.split(":")[0]]
    found = problems("\n".join([*kept, change]))
    assert len(found) == 1
    assert said in found[0]


def test_answers_are_evened_out_once() -> None:
    (found,) = problems(GOOD, "data.balance=answer", "loss.class_weights=inverse")
    assert "loss.class_weights: data.balance: answer makes all answers equally frequent already" in found
    assert recipe.parse(GOOD, ["data.balance=question_type", "loss.class_weights=inverse"])


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("2.0e-4", 2e-4), (".5", 0.5), ("3", 3.0), ("1E+2", 100)]
)
def test_numbers(text: str, value: float) -> None:
    assert recipe.parse(GOOD + f"train: {{lr: {text}}}").train.lr == value
    assert recipe.parse(GOOD, [f"train.lr={text}"]).train.lr == value


def test_yaml_1_2_text_stays_text() -> None:
    parsed = recipe.parse(GOOD + "prompt: {instructions: {yes_no: yes, when: 18:00, on: off}}")
    assert parsed.prompt.instructions == {"yes_no": "yes", "when": "18:00", "on": "off"}


def test_numbers_are_decimal_and_texts_that_look_like_numbers_survive() -> None:
    assert recipe.parse(GOOD, ["train.seed=010"]).train.seed == 10
    texts = {"system": "1e5", "instructions": {"a": "08", "b": "true", "c": "null", "d": "- x: y"}}
    first = recipe.parse(GOOD + f"prompt: {json.dumps(texts)}")
    assert first.prompt.instructions["a"] == "08"
    assert recipe.parse(first.dump()) == first


def test_files_that_would_blow_up_are_refused() -> None:
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{b}: &{b} [{','.join(f'*{a}' for _ in range(9))}]\n" for a, b in itertools.pairwise("abcdefghijkl")
    )
    assert "aliases (*name) are not allowed" in problems(bomb)[0]
    assert "not valid YAML" in problems("a: " + "[" * 5000)[0]


def test_overrides_reach_any_key() -> None:
    changed = recipe.parse(
        GOOD, ["model.name=a/b", "batch.questions=32", "model.lora.modules=[q_proj]", "train.max_steps=null"]
    )
    assert changed.model.name == "a/b"
    assert changed.batch.questions == 32
    assert changed.model.lora.modules == ["q_proj"]
    assert problems(GOOD, "train.epoch=3") == [
        'recipes/x.yaml with train.epoch=3: train.epoch: unknown key, did you mean "epochs"?'
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "not valid YAML"),
        ("- 1", "a recipe is a set of keys"),
        ("", "a recipe is a set of keys"),
        (GOOD + "output: again", "key 'output' is given twice"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("1: 2", "key 1 is not text"),
    ],
)
def test_broken_files(text: str, said: str) -> None:
    assert any(said in problem for problem in problems(text))


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(BadInput, match="cannot be read as a recipe"):
        recipe.load("no/such.yaml")


def test_the_dump_reads_back_equal() -> None:
    first = recipe.parse(GOOD, ["train.lr=1e-4", "prompt.system=Ä “quoted” system", "model.tune=full"])
    assert recipe.parse(first.dump()) == first
    assert first.differences(recipe.parse(first.dump(), ["train.lr=2e-4"])) == ["train.lr: 0.0001 → 0.0002"]


def test_recipes_are_frozen() -> None:
    parsed = recipe.parse(GOOD)
    with pytest.raises(ValueError, match="frozen"):
        parsed.output = "elsewhere"  # type: ignore[misc]


def test_the_reference_lists_every_key_as_the_docs_do() -> None:
    page = Path(__file__).parents[1] / "docs" / "recipe.md"
    assert recipe.reference() in page.read_text(encoding="utf-8")
    for key in recipe._all_keys(recipe.Recipe):
        assert f"| `{key}` |" in recipe.reference()
        row = next(row for row in recipe.reference().splitlines() if row.startswith(f"| `{key}` |"))
        assert not row.endswith("|  |"), f"{key} has no meaning written down"


def numeric_fields() -> list[tuple[str, FieldInfo]]:
    """Every key whose value may be a number, in all sections."""
    found = []
    for key in recipe._all_keys(recipe.Recipe):
        *parents, name = key.split(".")
        section: Any = recipe.Recipe
        for parent in parents:
            section = section.model_fields[parent].annotation
        field = section.model_fields[name]
        if {int, float} & {field.annotation, *get_args(field.annotation)}:
            found.append((key, field))
    return found


@pytest.mark.parametrize("key", [key for key, _ in numeric_fields()])
@pytest.mark.fault("F35")
def test_numbers_that_no_run_can_use_are_refused_with_their_key(key: str) -> None:
    for value in ("1" + 38 * "0", "-" + 27 * "9", "3e38", "-1e-320", ".inf", ".nan", "1e999", "''", "[1]"):
        with pytest.raises(BadInput, match=re.escape(f"with {key}={value}: {key}: ")):
            recipe.parse(GOOD, [f"{key}={value}"])


@pytest.mark.parametrize("key", ["output", "model.name", "model.adapter", "data.path", "data.split.path"])
@pytest.mark.fault("F35")
def test_paths_are_expanded_and_those_that_no_disk_has_are_refused(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "$NOWHERE").mkdir()
    more = ["data.format=jsonl", "data.path=x", "data.split={by: frozen, path: x}"]

    def read(path: str) -> object:
        settings = recipe.parse(GOOD, [*more, f"{key}={path}"])
        assert recipe.parse(settings.dump()) == settings, "read again it is the same"
        return recipe._flat(settings.model_dump())[key]

    assert read("~/runs/a~b") == "/home/someone/runs/a~b"
    assert read("$SCRATCH/${SCRATCH}/x") == "/scratch//scratch/x"
    assert read("$NOWHERE") == "$NOWHERE", "a folder of that very name"
    for path, said in (
        ("a" * 300, "is too long for a path"),
        ("a/" * 3000, "is too long for a path"),
        ("é" * 130, "is too long for a path"),
        ("$NOWHERE/x", "$NOWHERE is not set"),
        ("${NOWHERE}x", "$NOWHERE is not set"),
        ("~nobody-of-that-name/x", "~nobody-of-that-name is no user's home folder"),
    ):
        with pytest.raises(BadInput, match=re.escape(f"{key}: {said}")):
            read(path)


@pytest.mark.fault("F35")
def test_an_override_longer_than_a_files_name_is_none() -> None:
    assert recipe.is_override("prompt.system=" + "Look closely. " * 500)
    assert recipe.is_override("a=\0")
    with pytest.raises(BadInput, match="cannot be read as a recipe"):
        recipe.load("a" * 300)
