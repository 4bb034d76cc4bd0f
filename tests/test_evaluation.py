"""What is evaluated, on which pictures, in which order; and that an evaluation that was stopped goes on."""

from __future__ import annotations

import errno
import io
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import FAMILIES, closed_sets, write_jsonl
from PIL import Image
from safetensors.torch import load_file, save_file

from surgvqa import cli, comparison, evaluation, processes, recipe, results, scores, sources, train
from surgvqa import prepare as preparation
from surgvqa.datasets import Example, ImageRef, Region, in_context
from surgvqa.decode import greedy
from surgvqa.endings import NumericFailure, Preempted, Stop
from surgvqa.evaluation import Reply, evaluate
from surgvqa.model import base
from surgvqa.prepare import Prepared, prepare
from surgvqa.recipe import BadInput
from surgvqa.sources import opened

RECIPE = """
model: {name: tiny-qwen3-vl, tune: lora}
data: {format: jsonl}
image: {size: 64}
batch: {questions: 12, questions_per_image: 4, tokens_per_micro_batch: 400}
train: {max_steps: 2, lr: 1.0e-2, precision: fp32, checkpoint_layers: 0}
eval: {final: null, max_new_tokens: 4}
"""
STAGES = {"count": 1, "yes_no": 1, "which": 2, "where": 2, "colour": 3, "state": 3}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with its data, whose questions have stages, and a short run of it."""
    folder = tmp_path_factory.mktemp("evaluated")
    data = write_jsonl(folder / "data", images=40)
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        part = f"{row['split']}{int(row['image'][:-4]) // 16}"
        row |= {"stage": STAGES[row["question_type"]], "group": part}
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text = RECIPE.replace("format: jsonl", f"format: jsonl, path: {data}") + f"output: {folder / 'run'}\n"
    (folder / "recipe.yaml").write_text(text)
    train.train(recipe.load(folder / "recipe.yaml"))
    return folder


@pytest.fixture
def run(home: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(home / "run", tmp_path / "run"))


def rows(folder: Path, name: str = "predictions.jsonl") -> list[dict[str, Any]]:
    return results.rows(folder / name)


def prepared_of(folder: Path, *words: str) -> tuple[Accelerator, Prepared]:
    accelerator = processes.start()
    return accelerator, prepare(recipe.load(folder / "recipe.yaml", words), accelerator, evaluated=["test"])


# Sources


def test_a_run_a_checkpoint_and_its_copy_answer_alike(run: Path, tmp_path: Path) -> None:
    scores = evaluate(run, "test")
    assert (scores["checkpoint"], scores["model"]["name"]) == ("step-000002", "tiny-qwen3-vl")
    assert "variant" not in scores
    assert scores == json.loads((run / "scores.json").read_text())
    step = run / "checkpoints" / "step-000002"
    evaluate(step, "test")
    assert rows(run, "predictions.step-000002.jsonl") == rows(run)
    assert opened(step, output=run).files("test", "") == opened(step).files("test", "")
    lone = Path(shutil.copytree(step, tmp_path / "elsewhere" / "adapter"))
    with pytest.raises(BadInput, match="say where the results go with --out"):
        opened(lone)
    evaluate(lone, "test", output=tmp_path / "lone")
    assert rows(tmp_path / "lone") == rows(run)
    assert results.load_run(tmp_path / "lone").evaluation("test").checkpoint == "adapter"


def test_a_full_checkpoint_goes_the_same_way(home: Path, tmp_path: Path) -> None:
    words = ["model.tune=full", "train.max_steps=1", f"output={tmp_path / 'full'}"]
    full = train.train(recipe.load(home / "recipe.yaml", words))
    assert evaluate(full, "test")["overall"]["n"] == len(rows(full))


def test_a_published_model_is_evaluated_with_a_recipe(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it answers is what a new adapter, which changes nothing, answers."""
    command = ["evaluate", "tiny-qwen3-vl", "--recipe", str(home / "recipe.yaml")]
    assert cli.main([*command, "model.adapter=null", f"output={tmp_path / 'exp'}", "--split", "test"]) == 0
    folder = tmp_path / "exp-tiny-qwen3-vl"
    assert f"written: {folder}/predictions.jsonl" in capsys.readouterr().out
    found = results.load_run(folder)
    assert found.recipe.output == str(folder)
    assert found.evaluation().checkpoint is None
    assert found.evaluation().scores["model"] == {"name": "tiny-qwen3-vl", "revision": None}
    accelerator, prepared = prepared_of(home)
    compute = processes.compute("fp32", "auto", accelerator.device)
    answers = evaluation.predict(
        prepared.network(), prepared, prepared.questions("test", asked=True),
        accelerator=accelerator, compute=compute,
    )  # fmt: skip
    assert answers == found.evaluation().predictions
    assert cli.main([*command, f"output={tmp_path / 'exp'}", "--split", "test"]) == 0  # again, into its own
    assert cli.main(["evaluate", str(folder), "--split", "test", "--ablate", "black"]) == 0
    assert len(results.load_run(folder).evaluations) == 2


def test_a_checkpoint_may_be_named_from_where_it_lies(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = run / "checkpoints" / "step-000002"
    for folder, name in [(step, "."), (step.parent, "step-000002"), (step, "../step-000002"), (run, step)]:
        monkeypatch.chdir(folder)
        predictions, scores = opened(name).files("test", "")
        assert predictions == run.resolve() / "predictions.step-000002.jsonl"
        assert scores == run.resolve() / "scores.step-000002.json"


def test_a_folder_above_runs_is_no_runs_own(run: Path) -> None:
    with pytest.raises(BadInput, match="holds other things; choose a folder of its own"):
        evaluate(run, "test", output=run.parent)
    assert not (run.parent / "predictions.jsonl").exists()


def test_training_may_delete_a_checkpoint_that_is_being_evaluated(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, step = evaluation.answers_of, run / "checkpoints" / "step-000002"

    def meanwhile(*given: Any) -> Any:
        shutil.rmtree(step, ignore_errors=True)
        return answers(*given)

    source = opened(run)
    monkeypatch.setattr(evaluation, "answers_of", meanwhile)
    found = evaluation._evaluate(source, "test", ["", "black"])
    assert not step.exists()
    assert [each["checkpoint"] for each in found] == ["step-000002"] * 2
    assert {each["manifest"] for each in found} == {source.weights}


def test_results_go_where_they_can_be_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for out, said in [("file", "File exists"), ("file/within", "Not a directory")]:
        with pytest.raises(BadInput, match=rf"{out} cannot hold results \({said}\); choose another folder"):
            evaluate(run, "test", output=tmp_path / out)
    monkeypatch.setattr(sources.os, "access", lambda *given: False)
    with pytest.raises(BadInput, match=r"run cannot hold results \(Permission denied\)"):
        evaluate(run, "test")


def test_what_is_no_source_is_told(home: Path, run: Path, tmp_path: Path) -> None:
    recipe_file = home / "recipe.yaml"
    for source, said in [
        (
            tmp_path / "no" / "model",
            r"is no run's folder; to evaluate a model as it was published, name the data",
        ),
        (run / "checkpoints" / "step-000400", r"no such run or checkpoint; .*checkpoints has step-000002"),
        (tmp_path / "rum", r"rum: no such run or checkpoint; .* has run$"),
    ]:
        with pytest.raises(BadInput, match=said):
            opened(source)
    for given in (None, recipe_file):
        with pytest.raises(BadInput, match="holds neither a run nor a checkpoint, and no model"):
            opened(tmp_path, recipe_file=given)
    with pytest.raises(BadInput, match=r"--recipe is for a model as it was published; .*run brings its own"):
        opened(run, recipe_file=recipe_file)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(BadInput, match="mine holds other things; choose a folder of its own"):
        evaluate("tiny-qwen3-vl", "test", recipe=recipe_file, output=tmp_path / "mine")
    evaluate("tiny-qwen3-vl", "test", recipe=recipe_file, output=tmp_path / "qwen3")
    with pytest.raises(
        BadInput, match=r"qwen3 holds results of another model.*'tiny-qwen3-vl' → 'tiny-qwen2"
    ):
        evaluate("tiny-qwen2-vl", "test", recipe=recipe_file, output=tmp_path / "qwen3")
    with pytest.raises(BadInput, match="run holds another run; choose a folder of its own"):
        evaluate("tiny-qwen3-vl", "test", recipe=recipe_file, output=run)
    weights = run / "checkpoints" / "step-000002" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(BadInput, match=r"adapter_model\.safetensors: \d+ bytes instead of"):
        opened(weights.parent)


def test_the_revision_of_the_recipes_own_model_is_not_anothers(home: Path) -> None:
    text = (
        (home / "recipe.yaml")
        .read_text()
        .replace("tiny-qwen3-vl", "Qwen/Qwen2-VL-2B-Instruct, revision: abc")
    )
    other = home / "revision.yaml"
    other.write_text(text)
    assert opened("Qwen/Qwen2-VL-2B-Instruct", recipe_file=other).settings.model.revision == "abc"
    found = opened("Qwen/Qwen2-VL-7B-Instruct", recipe_file=other)
    assert (found.settings.model.revision, found.run.name) == (None, "run-Qwen2-VL-7B-Instruct")
    words = ["model.revision=def"]
    assert opened("Qwen/X", recipe_file=other, overrides=words).settings.model.revision == "def"


# Going on


class Counted(Stop):
    """Asks for a stop after so many looks, and counts the questions that the model is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, looks: int) -> None:
        super().__init__()
        self.looks, self.asked, answers = looks, 0, evaluation.answers_of
        monkeypatch.setattr(evaluation, "_TREES_AT_ONCE", 1)

        def counting(network: Any, prepared: Any, questions: Any, asked: Any, *rest: Any) -> Any:
            self.asked += len(asked)
            return answers(network, prepared, questions, asked, *rest)

        monkeypatch.setattr(evaluation, "answers_of", counting)

    def __bool__(self) -> bool:
        self.looks -= 1
        return self.looks < 0


@pytest.mark.parametrize("words", [[], ["eval.cascade=answers"], ["eval.answers=labels"]], ids=str)
def test_a_stopped_evaluation_goes_on(run: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    if words == ["eval.answers=labels"]:
        kinds: dict[str, set[str]] = {}
        for line in (run.parent / "none", Path(recipe.load(run / "recipe.yaml").data.path or "")):
            for row in results.rows(line):
                kinds.setdefault(row["question_type"], set()).add(row["answer"])
        words = [*words, f"data.labels={json.dumps({kind: sorted(own) for kind, own in kinds.items()})}"]
    source = opened(run, overrides=words)
    whole = Counted(monkeypatch, 10**9)
    evaluation._evaluate(source, "test", [""])
    expected = (run / "predictions.jsonl").read_bytes()
    (run / "predictions.jsonl").unlink()
    total, whole.asked = whole.asked, 0

    stop = Counted(monkeypatch, 3)
    with pytest.raises(Preempted, match="the same command goes on"):
        evaluation._evaluate(source, "test", [""], stop)
    kept = rows(run, "predictions.jsonl.partial")
    assert 0 < stop.asked == len(kept) < total
    with (run / "predictions.jsonl.partial").open("a") as file:
        file.write('{"id": "half a li')
    evaluation._evaluate(source, "test", [""])
    assert stop.asked == total
    assert (run / "predictions.jsonl").read_bytes() == expected
    assert not (run / "predictions.jsonl.partial").exists()


def test_answers_that_are_cut_are_marked_and_counted(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An answer that is still going on at `eval.max_new_tokens` is cut, one that ends there is not."""

    def written(model: Any, pack: Any, *, max_new_tokens: int, **rest: Any) -> list[list[int]]:
        return [[30] * (max_new_tokens - number % 3) for number in range(len(pack.ends))]

    monkeypatch.setattr(evaluation, "greedy", written)
    found = evaluate(run)
    predictions = scores.read(run / "predictions.jsonl")
    lengths = [len(row.answer) for row in predictions]
    assert [row.cut for row in predictions] == [length == max(lengths) for length in lengths]
    assert all(row.get("cut", True) is True for row in rows(run))
    cut = sum(row.cut for row in predictions)
    assert 0 < found["overall"]["cut"] == cut < len(predictions)
    assert sum(bucket.get("cut", 0) for bucket in found["by_type"].values()) == cut
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{cut} of {len(predictions)} answers cut at eval.max_new_tokens" in printed
    assert "‡ answers were cut at eval.max_new_tokens" in printed
    # Where it is read: a notebook's tables, a comparison, files of former versions.
    told = results.load_run(run).evaluation()
    assert told.table()["cut"].tolist() == [row.cut for row in predictions]
    assert "cut at eval.max_new_tokens" in told.scores_table().loc["all", "note"]
    notes = comparison.compare(run, run, resamples=9).notes
    assert f"{run}: {cut} of {len(predictions)} answers were cut at eval.max_new_tokens" in notes
    former = [{key: value for key, value in row.items() if key != "cut"} for row in rows(run)]
    (run / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in former))
    assert not any(row.cut for row in scores.read(run / "predictions.jsonl"))


def test_labels_are_never_cut(run: Path) -> None:
    found = evaluate(run, overrides=["eval.answers=labels", "eval.max_new_tokens=1", *closed_sets()])
    assert "cut" not in found["overall"]


def test_two_evaluations_at_once_do_not_take_each_others_answers(home: Path, tmp_path: Path) -> None:
    _, prepared = prepared_of(home)
    file, questions = tmp_path / "predictions.jsonl.partial", prepared.questions("test", asked=True)
    one, two = (evaluation.Begun(file, of, questions) for of in ("one", "two"))
    assert one.known() == two.known() == {}
    one.keep({0: Reply("of one"), 2: Reply("of one")})
    kept = {0: Reply("of two", cut=True), 1: Reply("too", {"too": 1.0})}
    two.keep(kept)
    assert two.known() == kept
    # A line of a former version does not say whether its answer was cut, so its question is asked again.
    line = {"of": "two", "id": questions.examples[3].id, "answer": "red", "probabilities": None}
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(line) + "\n")
    assert two.known() == kept


def test_results_of_one_folder_are_of_one_model_and_one_recipe(home: Path, tmp_path: Path) -> None:
    folder, text = tmp_path / "out", (home / "recipe.yaml").read_text()

    def again(*words: str, file: Path = home / "recipe.yaml", split: Any = "test") -> dict[str, Any]:
        return evaluate("tiny-qwen3-vl", split, recipe=file, output=folder, overrides=words)

    again()
    told = (folder / "recipe.yaml").read_text()
    # What one evaluation changes is told with it, and is not the next one's.
    assert again("image.size=96", "data.workers=1")["overrides"] == ["image.size=96", "data.workers=1"]
    assert (folder / "recipe.yaml").read_text() == told
    evaluate(folder, "test", overrides=["image.size=96"])
    assert opened(folder).settings.image.size == 64
    (home / "larger.yaml").write_text(text.replace("size: 64", "size: 96"))
    for words, file, said in [
        ((), home / "larger.yaml", "image.size: 64 → 96"),
        (["data.on_error=skip"], home / "recipe.yaml", "data.on_error: 'fail' → 'skip'"),
    ]:
        with pytest.raises(BadInput, match=said):
            again(*words, file=file, split="val")
    run = home / "run"
    with pytest.raises(BadInput, match="the weights are not those of the published model"):
        evaluate(run / "checkpoints" / "step-000002", "val", output=folder)
    evaluate(run, "test", output=tmp_path / "mine")
    other = train.train(recipe.load(home / "recipe.yaml", [f"output={tmp_path / 'other'}", "train.lr=0.1"]))
    with pytest.raises(BadInput, match="the weights are not those of step-000002"):
        evaluate(other, "val", output=tmp_path / "mine")


@pytest.mark.parametrize(
    "word", ["eval.max_new_tokens=3", "prompt.system=Look!", "image.size=96", "train.precision=bf16"]
)
def test_answers_to_other_questions_are_not_taken(
    run: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    stop = Counted(monkeypatch, 2)
    with pytest.raises(Preempted):
        evaluation._evaluate(opened(run), "test", [""], stop)
    again = Counted(monkeypatch, 10**9)
    scores = evaluation._evaluate(opened(run, overrides=[word]), "test", [""])[0]
    assert again.asked == scores["overall"]["n"]
    assert scores["overrides"] == [word]


def test_answers_of_a_folders_former_weights_are_not_taken(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["model.tune=full", "train.max_steps=1", f"output={tmp_path / 'full'}"]
    step = train.train(recipe.load(home / "recipe.yaml", words)) / "checkpoints" / "step-000001"
    model = tmp_path / "published"
    model.mkdir()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for file in step.iterdir():
        if file.is_file():
            shutil.copy(file, model)
    stop = Counted(monkeypatch, 2)
    again = (opened(model, recipe_file=home / "recipe.yaml", output=tmp_path / "out"), "test", [""])
    with pytest.raises(Preempted):
        evaluation._evaluate(*again, stop)
    weights = load_file(model / "model.safetensors")
    save_file({name: 0.5 * value for name, value in weights.items()}, model / "model.safetensors")
    counted = Counted(monkeypatch, 10**9)
    assert evaluation._evaluate(*again)[0]["overall"]["n"] == counted.asked


def test_answers_about_other_shuffled_pictures_are_not_taken(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = Counted(monkeypatch, 2)
    with pytest.raises(Preempted):
        evaluation._evaluate(opened(run), "test", ["shuffle"], stop)
    again = Counted(monkeypatch, 10**9)
    scores = evaluation._evaluate(opened(run, overrides=["train.seed=7"]), "test", ["shuffle"])[0]
    assert again.asked == scores["overall"]["n"]


def test_batches_and_rows_change_nothing(run: Path) -> None:
    evaluate(run, "test")
    expected = rows(run)
    for words in (["batch.tokens_per_micro_batch=2000"], ["batch.trees=false"], ["data.workers=1"]):
        evaluate(run, "test", overrides=words)
        assert rows(run) == expected, words


# Other pictures


def pictures(prepared: Prepared, variant: str) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
    """Of each image key: group, what is seen, and what is seen in the variant, as patches."""
    questions = prepared.questions("test", asked=True)
    varied = prepared.varied(questions, variant)
    for number, example in enumerate(questions.examples):
        before, after = questions.tree([number]), varied.tree([number])
        assert before.grids == after.grids
        yield example.image_key, example.group, before.patches, after.patches


@pytest.mark.parametrize(
    "words", [[], ["image.mode=native", "image.size=null", "image.max_tokens=6"]], ids=str
)
def test_ablations(home: Path, words: list[str]) -> None:
    _, prepared = prepared_of(home, *words)
    seen: dict[str, np.ndarray] = {}
    for key, _, before, black in pictures(prepared, "black"):
        seen[key] = before
        assert len(np.unique(black, axis=0)) == 1  # every patch is the same: black, as is the fill
        assert len(np.unique(before, axis=0)) > 1
    for key, _, before, after in pictures(prepared, "shuffle"):
        assert not np.array_equal(after, before), key


def test_shuffled_pictures_are_of_other_videos(home: Path) -> None:
    _, prepared = prepared_of(home, "image.mode=native", "image.size=null", "image.max_tokens=6")
    questions = prepared.questions("test", asked=True)
    instead = prepared.varied(questions, "shuffle").instead
    known = {example.image_key: example for example in questions.examples}
    shown = {key: others[0].key for key, others in instead.items()}
    assert shown.keys() == set(shown.values()) == known.keys()
    assert all(known[key].group != known[other].group for key, other in shown.items())
    for number, example in enumerate(questions.examples):
        (other,), canvas = instead[example.image_key], prepared.canvases[example.image_key]
        picture = Image.open(io.BytesIO(other.read())).convert("RGB")
        picture = picture.resize(prepared.canvases[other.key].drawn_size, Image.Resampling.BICUBIC)
        picture = picture.resize((canvas.width, canvas.height), Image.Resampling.BICUBIC)
        seen = prepared.varied(questions, "shuffle").tree([number]).patches
        assert np.array_equal(seen, prepared.chat.patches(picture))


@pytest.mark.parametrize("seed", range(4))
def test_shuffled_pictures_are_of_no_question_about_the_same(seed: int) -> None:
    clips = ["aa", "ab", "ba", "c", "a", "def", "g", "h", "ij", "jk"]
    asked = [
        Example(str(number), tuple(ImageRef(name) for name in clip), "Q?", ("yes",))
        for number, clip in enumerate(clips)
    ]
    instead = preparation._shuffled(asked, seed)
    for example in asked:
        others = instead[example.image_key]
        assert len(others) == len(example.images)
        together = "ab", "def", "ijk"
        own = next((each for each in together if example.images[0].key in each), example.images[0].key)
        assert not any(other.key in own for other in others), (example.image_key, others)


def test_there_must_be_another_picture(home: Path) -> None:
    _, prepared = prepared_of(home)
    one = prepared.questions("test", asked=True).examples[0]
    with pytest.raises(BadInput, match="all questions are about the same image"):
        prepared.varied(prepared.posed([one]), "shuffle")


def test_variants_are_evaluated_beside_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", str(run), "--split", "test", "--ablate", "black", "--corrupt", "noise:1..2"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    for title in ("images: black", "images: noise:1", "images: noise:2"):
        assert f"exact match on test by step-000002, {title}" in " ".join(printed.split())
    found = results.load_run(run)
    assert {each.variant for each in found.evaluations} == {"black", "noise:1", "noise:2"}
    assert found.evaluation("test", "noise:2").scores["variant"] == "noise:2"
    assert len({str([row.answer for row in each.predictions]) for each in found.evaluations}) > 1
    assert cli.main([*command[:-1], "fog:1"]) == 2
    assert "fog" in capsys.readouterr().err


def test_keys_that_are_for_training_are_told(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = ["train.seed=3", "eval.questions=1", "train.lr=1", "eval.answers=generate"]
    scored = evaluate(run, "test", overrides=given)
    (told,) = [row.getMessage() for row in caplog.records if "changes nothing here" in row.getMessage()]
    assert told.startswith("warning: eval.questions=1, train.lr=1: is for training")
    assert told.endswith(f"all {scored['overall']['n']} questions are asked")


@pytest.mark.parametrize("variant", ["smoke", "smoke:1..5", " smoke:1"])
def test_a_variant_is_a_single_corruption(home: Path, variant: str) -> None:
    _, prepared = prepared_of(home)
    with pytest.raises(BadInput, match="is not one corruption's name, such as smoke:1"):
        prepared.varied(prepared.questions("test", asked=True), variant)


# Cascade


def asked_texts(monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> dict[str, str]:
    """Id → the question as the model read it."""
    texts: dict[str, str] = {}
    answers = evaluation.answers_of

    def watched(network: Any, prepared: Any, questions: Any, asked: Any, *rest: Any) -> Any:
        for number in asked:
            example = questions.examples[number]
            texts[example.id] = prepared.chat.question_text(example, prepared.canvases)
        return answers(network, prepared, questions, asked, *rest)

    monkeypatch.setattr(evaluation, "answers_of", watched)
    act()
    return texts


@pytest.mark.parametrize("kind", ["answers", "references"])
def test_a_cascade_puts_earlier_stages_ahead(run: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    texts = asked_texts(
        monkeypatch, lambda: evaluate(run, "test", overrides=[f"eval.cascade={kind}", "train.seed=42"])
    )
    told = rows(run)
    stage = {row["id"]: STAGES[row["question_type"]] for row in told}
    longest = 0
    for row in told:
        own = [
            f"{other['question']} {other['answer' if kind == 'answers' else 'references']}"
            if kind == "answers" else f"{other['question']} {other['references'][0]}"
            for other in sorted(told, key=lambda other: stage[other["id"]])
            if other["image"] == row["image"] and stage[other["id"]] < stage[row["id"]]
        ]  # fmt: skip
        own = [" ".join(line.split()) for line in own]
        assert [" ".join(line.split()) for line in texts[row["id"]].split("\n")] == [*own, row["question"]]
        longest = max(longest, len(own))
    assert longest >= 2


def test_training_in_a_cascade_reads_references(home: Path) -> None:
    settings = recipe.load(home / "recipe.yaml", ["train.cascade=true"])
    questions = prepare(settings).questions("train")
    texts = [questions.chat.question_text(example) for example in questions.examples]
    assert any(text.count("\n") >= 2 for text in texts)
    assert all("\n" not in t for t, e in zip(texts, questions.examples, strict=True) if e.stage == 1)


def test_a_cascade_needs_stages(home: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data", images=8)
    words = [f"data.path={data}", f"output={tmp_path / 'run'}"]
    for word, key in [
        ("eval.cascade=answers", "eval.cascade: answers"),
        ("train.cascade=true", "train.cascade"),
    ]:
        with pytest.raises(BadInput, match=f"has no stage, which {key} needs"):
            prepare(recipe.load(home / "recipe.yaml", [*words, word, "eval.final=test"]))
    with pytest.raises(BadInput, match=r"eval\.questions: is for cascade none or references"):
        recipe.load(home / "recipe.yaml", ["eval.cascade=answers", "eval.every=2", "eval.questions=3"])


def test_special_tokens_that_a_model_writes_do_not_break_a_cascade(home: Path) -> None:
    _, prepared = prepared_of(home)
    assert prepared.chat.unspecial("a <|im_<|im_end|>end|> b\n<|vision_end|>") == "a b"


def test_the_model_is_left_in_the_mode_it_was_in(home: Path) -> None:
    accelerator, prepared = prepared_of(home)
    network = prepared.network().train()
    compute = processes.compute("fp32", "auto", accelerator.device)
    chunks = evaluation.answered(
        network, prepared, prepared.questions("test", asked=True), accelerator=accelerator, compute=compute
    )
    next(chunks)
    assert not network.training
    chunks.close()
    assert network.training


@pytest.mark.parametrize("words", [[], ["eval.answers=labels", *closed_sets()]], ids=["written", "chosen"])
def test_nan_is_no_answer(home: Path, words: list[str]) -> None:
    accelerator, prepared = prepared_of(home, *words)
    network = prepared.network()
    with torch.no_grad():
        next(iter(network.parameters())).fill_(math.nan)
    compute = processes.compute("fp32", "auto", accelerator.device)
    asked = prepared.questions("test", asked=True)
    with pytest.raises(NumericFailure, match="gives NaN where an answer should be"):
        evaluation.predict(network, prepared, asked, accelerator=accelerator, compute=compute)


@pytest.mark.parametrize("family", FAMILIES)
def test_nan_behind_the_first_token_is_no_answer_either(home: Path, family: str) -> None:
    """Of a word that no prompt holds but that the model begins with."""
    accelerator, prepared = prepared_of(home, f"model.name={family}")
    network, asked = prepared.network(), prepared.questions("test", asked=True)
    questions = asked.pack([[number] for number in range(len(asked))], asked=True)
    first = greedy(network, questions, stop_ids=prepared.chat.stop_ids, max_new_tokens=1)
    words = base(network).get_input_embeddings().weight
    own = torch.nn.Parameter(words.detach().clone())  # the output's stay as they are
    damaged = sorted({token for answer in first for token in answer} - {*questions.ids.flatten().tolist()})
    assert damaged
    with torch.no_grad():
        own[damaged] = math.nan
    base(network).get_input_embeddings().weight = own
    compute = processes.compute("fp32", "auto", accelerator.device)
    with pytest.raises(NumericFailure, match="gives NaN where an answer should be"):
        evaluation.predict(network, prepared, asked, accelerator=accelerator, compute=compute)


def test_an_image_that_is_gone_is_told_to_all_processes(home: Path, tmp_path: Path) -> None:
    accelerator, prepared = prepared_of(home)
    asked = prepared.questions("test", asked=True)
    last = asked.examples[-1]
    gone = [replace(image, path=tmp_path / "gone.png") for image in last.images]
    shown = asked.shown({last.image_key: gone}, None)
    compute, left = processes.compute("fp32", "auto", accelerator.device), range(len(asked))
    *_, failure = evaluation._by_chunks(prepared.network(), prepared, shown, left, accelerator, compute)
    assert isinstance(failure, BadInput)
    with pytest.raises(BadInput, match=last.images[0].key):
        evaluation.predict(prepared.network(), prepared, shown, accelerator=accelerator, compute=compute)


def test_scores_are_never_beside_other_answers(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(run, "test")

    def killed(*given: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(evaluation.checkpoint, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate(run, "test", overrides=["image.size=96"])
    assert results.load_run(run).evaluations[0].scores == {}
    assert evaluate(run, "test", overrides=["image.size=96"])["overrides"] == ["image.size=96"]


def test_a_full_disk_is_named(run: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(run / "predictions.jsonl.partial"))

    monkeypatch.setattr(evaluation.Begun, "keep", full)
    assert cli.main(["evaluate", str(run), "--split", "test"]) == 3


def test_answers_on_other_data_take_nobodys_place(run: Path, tmp_path: Path) -> None:
    evaluate(run, "test")
    other = [f"data.path={write_jsonl(tmp_path / 'other', images=8)}"]
    with pytest.raises(BadInput, match=r"holds answers to other questions \(data\.path=.* with --out"):
        evaluate(run, "test", overrides=other)
    evaluate(run, "test", overrides=other, output=tmp_path / "out")
    evaluate(
        run, "test", overrides=[f"data.path={recipe.load(run / 'recipe.yaml').data.path}"]
    )  # it may move


def test_answers_to_another_part_take_nobodys_place(run: Path) -> None:
    evaluate(run, overrides=["eval.final=test"])
    with pytest.raises(BadInput, match=r"predictions\.jsonl holds answers to the test part, .* to val would"):
        evaluate(run, overrides=["eval.final=val"])
    evaluate(run, "val")
    assert [each.split for each in results.load_run(run).evaluations] == ["test", "val"]


def test_earlier_questions_have_their_boxes(home: Path) -> None:
    _, prepared = prepared_of(home)
    example = prepared.dataset.part("test")[0]
    pointed = replace(example, question="What is in <box>?", asked_regions=(Region((10, 10, 30, 30)),))
    (later,) = in_context(
        [replace(pointed, id="1", stage=1), replace(example, id="2", stage=2)], {"1": "a\nhook"}
    )[1:]
    first, last = prepared.chat.question_text(later, prepared.canvases).split("\n")
    asked = prepared.chat.question_text(replace(pointed, stage=1), prepared.canvases)
    assert (first, last) == (f"{asked} a hook", example.question)
    assert "<box>" not in first
