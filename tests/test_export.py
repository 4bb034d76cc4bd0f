"""What other tools get: read back as they read it, scored by what is written for them, and by the tools where
they are installed."""

from __future__ import annotations

import ast
import base64
import io
import json
import random
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets as hf
import numpy as np
import pandas
import pytest
import yaml
from PIL import Image
from sources import PIXEL, SHARED

from surgvqa import datasets, export, letterbox, metrics, recipe
from surgvqa.cli import main
from surgvqa.metrics import exact
from surgvqa.recipe import BadInput

NASTY = [
    "NA", "None", "null", "nan", "", " ", "N/A", "<NA>", "007", "3", "3.50", "+3", "-inf", "1e5",
    "Infinity", "1j", "True", "FALSE", "#N/A", "1_000", "0x10", "1.#IND", "=1+1",
    "+cmd|' /C calc'!A0", "@SUM(A1)", "-2+3", "a\tb", "a\nb", "a\r\nb", "a\rb", 'say "yes"', '"',
    "'", "'=", "</script><b>", "a\\tb", "\\N", "{{ doc }}", "$name", "%s", "{0}", "[1, 2]", "['x']",
    "__import__('os')", "polyp;  tool.", "tool; polyp", "Ａ１", "caf\u00e9", "cafe\u0301", "\u00a0",
    "\u2028", "\x85", "\x0b", "😀", ";", "...", "a;;b.", "x" * 5000,
]  # fmt: skip
REFUSED = ("nan", "", " ", "\u00a0", "\u2028", "\x85", "\x0b")
"""No answers or questions of data, but a model may write them."""
RECIPE = """
model: {{name: tiny-qwen2-vl}}
data: {{format: jsonl, path: {path}, split: {{by: official}}}}
prompt: {{system: "Be $short.\\n", instructions: {{free: "Answer\\tin a word."}}}}
image: {{size: 56}}
eval: {{final: test, max_new_tokens: 9}}
output: {run}
"""


def encoded(image: Image.Image, format: str, **keys: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **keys)
    return file.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that answered every nasty text with it, or with another one, on pictures of several kinds."""
    home = tmp_path_factory.mktemp("nasty")
    picture = Image.radial_gradient("L").resize((60, 40))
    colour = Image.merge("RGB", [picture, picture.rotate(90), picture.rotate(180)])
    turned = Image.Exif()
    turned[0x0112] = 6
    see_through = colour.convert("RGBA")
    see_through.putalpha(picture)
    files = {
        "plain.jpg": encoded(colour, "JPEG"),
        "grey.png": encoded(picture, "PNG"),
        "turned.jpg": encoded(colour, "JPEG", exif=turned),
        "deep.png": encoded(Image.fromarray(np.asarray(picture).astype(np.uint16) * 257), "PNG"),
        "alpha.png": encoded(see_through, "PNG"),
        "tiny.bmp": PIXEL,
    }
    for name, content in files.items():
        (home / name).write_bytes(content)
    asked = [text for text in NASTY if text not in REFUSED]
    rows, chance = [], random.Random(5)
    for number, text in enumerate(asked):
        answer = [text] if number % 3 else [text, "another"]
        kind = ["yes, no", "yes_no", "free", "3", "NA", '"""}\n$name; 1 / 0'][number % 6]
        rows.append(
            {
                "id": f"{text[:40]} {number}" if number % 2 else str(number),
                "image": list(files)[number % len(files)],
                "question": text,
                "answer": answer,
                "question_type": kind,
                "split": "test",
            }
        )
    rows.append({**rows[0], "id": "train", "image": "train.png", "split": "train"})
    (home / "train.png").write_bytes(encoded(colour.rotate(180), "PNG"))
    (home / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "recipe.yaml").write_text(RECIPE.format(path=home / "all.jsonl", run=home / "run"))
    answered(home / "recipe.yaml", lambda example: chance.choice([example.answers[-1], chance.choice(NASTY)]))
    return home / "run"


def answered(file: Path, answer: Callable[[datasets.Example], str]) -> None:
    """The folder of a run that answered the test part."""
    settings = recipe.load(file)
    folder = Path(settings.output)
    folder.mkdir()
    (folder / "recipe.yaml").write_text(settings.dump())
    rows = [
        metrics.Prediction(
            e.id, e.image_key, e.group, e.question, e.question_type, list(e.answers), answer(e)
        ).row()
        for e in datasets.load(settings.data).part("test")
    ]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def lmms_task(folder: Path) -> tuple[dict[str, Any], hf.Dataset]:
    """A task as lmms-eval 0.7.3 reads it (`utils.load_yaml_config`, `ConfigurableTask.download`)."""

    class Loader(yaml.FullLoader):
        pass

    def function(loader: yaml.Loader, node: yaml.ScalarNode) -> Any:
        module, name = loader.construct_scalar(node).split(".")
        return runpy.run_path(str(folder / f"{module}.py"))[name]

    Loader.add_constructor("!function", function)
    (file,) = folder.glob("*.yaml")
    task = yaml.load(file.read_text(), Loader)
    files = {part: str(folder / name) for part, name in task["dataset_kwargs"]["data_files"].items()}
    data = hf.load_dataset(task["dataset_path"], data_files=files, cache_dir=str(folder.parent / "cache"))
    return task, data[task["test_split"]]


def test_an_lmms_eval_task_asks_and_scores_as_we_do(run: Path, tmp_path: Path) -> None:
    made = export.export(run, "lmms-eval", tmp_path / "task")
    task, docs = lmms_task(tmp_path / "task")
    assert task["task"] == made.name == "surgvqa_run_test"
    assert task["generation_kwargs"]["max_new_tokens"] == 9
    assert len(docs) == len(made.rows) == len(NASTY) - len(REFUSED)
    items: dict[str, list[Any]] = {}
    for doc, row in zip(docs, made.rows, strict=True):
        assert task["doc_to_text"](doc, {"pre_prompt": "", "post_prompt": ""}) == row.prompt
        assert task["doc_to_target"](doc) == list(row.example.answers)
        assert (doc["id"], doc["group"]) == (row.example.id, row.example.group)
        (shown,) = task["doc_to_visual"](doc)
        assert shown.tobytes() == letterbox.open_rgb(row.example.images[0].read()).tobytes()
        found = task["process_results"](doc, [(row.answer or "").strip()])
        assert found.pop("score") == exact(row.answer or "", row.example.answers)
        for name, item in found.items():
            items.setdefault(name, []).append(item)
    means = {
        metric["metric"]: metric["aggregation"](items[metric["metric"]]) for metric in task["metric_list"]
    }
    assert means["exact"] == made.exact
    assert 0 < means["exact"] < 1
    # `yes, no` and `yes_no` would be the same word.
    kinds = {"yes_no", "yes_no_2", "free", "3", "na", "name_1_0"}
    assert set(means) == {"exact", *(f"exact_{kind}" for kind in kinds)}
    assert made.rows[2].prompt.endswith("\nAnswer\tin a word.")


def test_prompts_are_those_of_training(run: Path, tmp_path: Path) -> None:
    from surgvqa import hub
    from surgvqa.tokens import ChatTokens

    made = export.export(run, "lmms-eval", tmp_path / "task")
    prompt = made.settings.prompt
    chat = ChatTokens(hub.find("tiny-qwen2-vl"), system=prompt.system, instructions=prompt.instructions)
    assert [row.prompt for row in made.rows] == [chat.question_text(row.example) for row in made.rows]


def test_images_are_the_sources_bytes_where_others_see_the_same(run: Path, tmp_path: Path) -> None:
    made = export.export(run, "lmms-eval", tmp_path / "task")
    assert made.redrawn == {"turned.jpg", "deep.png", "alpha.png", "tiny.bmp"}
    _, docs = lmms_task(tmp_path / "task")
    for doc, row in zip(docs.cast_column("image", hf.Image(decode=False)), made.rows, strict=True):
        same = doc["image"]["bytes"] == row.example.images[0].read()
        assert same == (row.example.images[0].key in ("plain.jpg", "grey.png"))


def test_logs_are_what_lmms_eval_reads(run: Path, tmp_path: Path) -> None:
    made = export.export(run, "lmms-eval", tmp_path / "task")
    log = json.loads((tmp_path / "task/predictions/from_log.json").read_text())
    assert log["model_configs"]["task"] == made.name
    assert {each["doc_id"]: each["resps"][0][0] for each in log["logs"]} == dict(
        enumerate(row.answer for row in made.rows)
    )
    lines = (tmp_path / f"task/predictions/surgvqa_samples_{made.name}.jsonl").read_text().split("\n")[:-1]
    scores = [json.loads(line)["score"] for line in lines]
    assert sum(scores) / len(scores) == made.exact


def read(file: Path) -> pandas.DataFrame:
    """As VLMEvalKit does: `vlmeval/smp/file.py`, load."""
    return pandas.read_csv(file, sep="\t")


def test_a_vlmevalkit_table_holds_every_text(run: Path, tmp_path: Path) -> None:
    made = export.export(run, "vlmevalkit", tmp_path / "table")
    data = read(tmp_path / f"table/{made.name}.tsv")
    assert made.name.endswith("_openended")
    assert list(data["index"]) == list(range(len(made.rows)))
    told = {"id": [row.example.id for row in made.rows], "question": [row.prompt for row in made.rows]}
    told["category"] = [row.example.question_type for row in made.rows]
    for column, texts in told.items():
        for cell, text in zip(data[column], texts, strict=True):
            assert isinstance(cell, str)
            assert cell in (text, text + "\u00a0")
    for cell, row in zip(data["answer"], made.rows, strict=True):
        assert ast.literal_eval(cell) == json.loads(cell) == list(row.example.answers)
    ours = read(tmp_path / f"table/surgvqa/surgvqa_{made.name}.tsv")
    for cell, row in zip(ours["prediction"], made.rows, strict=True):
        assert cell in (row.answer, f"{row.answer}\u00a0")
    # As ImageBaseDataset finds the images: base64, or in 64 characters the index of the row that has it.
    held = dict(zip(map(str, data["index"]), map(str, data["image"]), strict=True))
    for number, row in enumerate(made.rows):
        image = held[str(number)]
        image = held[image] if len(image) <= 64 else image
        shown = Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB")
        assert shown.tobytes() == letterbox.open_rgb(row.example.images[0].read()).tobytes()
    assert sum(len(image) > 64 for image in held.values()) == len(set(data["image_path"])) == 6


@pytest.mark.parametrize("text", NASTY, ids=lambda text: ascii(text)[:20])
def test_pandas_reads_each_text_as_it_is(text: str, tmp_path: Path) -> None:
    """Each by itself: a column is read as what all of a block of its cells are."""
    with export._table(tmp_path / "one.tsv") as write:
        write(["index", "text"])
        write(["0", export.as_pandas_text(text)])
    cell = read(tmp_path / "one.tsv")["text"][0]
    assert isinstance(cell, str)
    assert cell in (text, text + "\u00a0")
    assert datasets.normalise(cell) == datasets.normalise(text)


def test_all_that_pandas_takes_for_missing_is_known() -> None:
    from pandas._libs.parsers import STR_NA_VALUES

    assert all(export.as_pandas_text(text) != text for text in STR_NA_VALUES)


def test_the_written_scorers_are_ours(run: Path, tmp_path: Path) -> None:
    export.export(run, "lmms-eval", tmp_path / "task")
    export.export(run, "vlmevalkit", tmp_path / "table")
    theirs = [runpy.run_path(str(tmp_path / name))["exact"] for name in ("task/utils.py", "table/score.py")]
    chance = random.Random(1)
    parts = ["polyp", "Polyp", " ", ";", ".", "ﬁ", "fi", "\u00a0", "１", "1", "\t", "e\u0301", "\u00e9"]
    texts = NASTY + ["".join(chance.choices(parts, k=chance.randrange(6))) for _ in range(3000)]
    found = set()
    for _ in range(5000):
        answer, references = chance.choice(texts), chance.choices(texts, k=chance.randrange(1, 4))
        ours = exact(answer, references)
        assert [scorer(answer, references) for scorer in theirs] == [ours, ours]
        found.add(ours)
    assert found == {True, False}


def scored(table: Path, file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", str(table / "score.py"), str(file)]
    return subprocess.run(command, capture_output=True, text=True, cwd=table.parent)


@pytest.mark.parametrize("form", ["tsv", "json"])
def test_vlmevalkits_predictions_score_as_ours(form: str, run: Path, tmp_path: Path) -> None:
    """As `vlmeval/inference.py` leaves them: the table without its images, and a column more."""
    made = export.export(run, "vlmevalkit", tmp_path / "table")
    data = read(tmp_path / f"table/{made.name}.tsv").drop(columns="image")
    data["prediction"] = [row.answer for row in made.rows]
    file = tmp_path / f"model_{made.name}.{form}"
    if form == "tsv":
        data.to_csv(file, sep="\t", index=False, encoding="utf-8", quoting=1)
    else:
        file.write_text(json.dumps(data.to_dict("records")))
    done = scored(tmp_path / "table", file)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"exact\t{made.exact:.6f}\t{len(made.rows)} questions"
    ours = scored(tmp_path / "table", tmp_path / f"table/surgvqa/surgvqa_{made.name}.tsv")
    assert ours.stdout == done.stdout
    data[:-1].to_csv(tmp_path / "less.tsv", sep="\t", index=False, quoting=1)
    less = scored(tmp_path / "table", tmp_path / "less.tsv")
    assert (less.returncode, f"of {len(made.rows)} questions" in less.stderr) == (1, True)
    other = scored(tmp_path / "table", tmp_path / "less.xlsx")
    assert (other.returncode, "set PRED_FORMAT=tsv" in other.stderr) == (1, True)


def test_several_images_and_boxes(tmp_path: Path) -> None:
    for number in range(3):
        colour = (90 * number, 50, 50)
        (tmp_path / f"{number}.png").write_bytes(encoded(Image.new("RGB", (40, 40), colour), "PNG"))
    ask = {"question": "What?", "answer": "tool", "split": "test"}
    rows = [
        {**ask, "image": ["0.png", "1.png"]},
        {**ask, "image": ["0.png", "1.png"], "question": "Where?"},
        {**ask, "image": "2.png", "box": [1, 2, 30, 30]},
        {**ask, "image": "2.png", "asked_box": [1, 2, 30, 30]},
    ]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "clips.yaml"
    file.write_text(RECIPE.format(path=tmp_path / "all.jsonl", run=tmp_path / "run"))
    made = export.export(file, "lmms-eval", tmp_path / "task")
    task, docs = lmms_task(tmp_path / "task")
    assert [len(task["doc_to_visual"](doc)) for doc in docs] == [2, 2, 1]
    assert task["doc_to_visual"](docs[1])[1].getpixel((0, 0)) == (90, 50, 50)
    assert not (tmp_path / "task/predictions").exists()
    assert any("1 questions that point at boxes" in note for note in made.notes)
    assert any("1 answers have boxes" in note for note in made.notes)
    made = export.export(file, "vlmevalkit", tmp_path / "table")
    data = read(tmp_path / f"table/{made.name}.tsv")
    assert [len(ast.literal_eval(data["image"][0])), data["image"][1]] == [2, "0"]
    assert len(ast.literal_eval(data["image_path"][1])) == 2


def test_tables_that_vlmevalkit_would_unpack_wrongly_name_their_images(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "LARGE", 1000)
    made = export.export(run, "vlmevalkit", tmp_path / "table")
    data = read(tmp_path / f"table/{made.name}.tsv")
    assert "image" not in data
    for path, row in zip(data["image_path"], made.rows, strict=True):
        assert Path(path).is_absolute()
        shown = Image.open(path).convert("RGB")
        assert shown.tobytes() == letterbox.open_rgb(row.example.images[0].read()).tobytes()


def choices(home: Path) -> Path:
    """A recipe of four questions with a closed set of answers."""
    (home / "a.png").write_bytes(encoded(Image.new("RGB", (40, 40), "red"), "PNG"))
    rows = [
        {"image": "a.png", "question": f"{n}?", "answer": answer, "question_type": "which", "split": "test"}
        for n, answer in enumerate(("none", "3", "tool", "tool"))
    ]
    (home / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = home / "choices.yaml"
    text = RECIPE.format(path=home / "all.jsonl", run=home / "run").replace("free:", "which:")
    file.write_text(text.replace("official}", "official}, labels: {which: [none, '3', tool]}"))
    return file


def test_closed_sets_as_choices(tmp_path: Path) -> None:
    file = choices(tmp_path)
    answered(file, lambda example: "tool" if example.question != "0?" else "it may be 3")
    made = export.export(tmp_path / "run", "vlmevalkit-choices", tmp_path / "table")
    data = read(tmp_path / f"table/{made.name}.tsv")
    assert list(data["answer"]) == ["A", "B", "C", "C"]
    assert [data[letter][0].strip() for letter in "ABC"] == ["none", "3", "tool"]
    ours = read(tmp_path / f"table/surgvqa/surgvqa_{made.name}.tsv")
    assert list(ours["prediction"]) == ["it may be 3", "C", "C", "C"]
    assert made.exact == 0.5


def test_what_is_no_choice_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"free \(0 labels\).*use --to vlmevalkit"):
        export.export(run, "vlmevalkit-choices", tmp_path / "table")
    assert list(tmp_path.iterdir()) == []


def test_what_the_run_did_not_answer(run: Path, tmp_path: Path) -> None:
    lines = (run / "predictions.jsonl").read_text().split("\n")[:-1]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text((run / "recipe.yaml").read_text())
    file = tmp_path / "run/predictions.jsonl"
    file.write_text("\n".join(lines[:-2]) + "\n")
    made = export.export(tmp_path / "run", "lmms-eval", tmp_path / "less")
    assert len(made.rows) == len(lines) - 2
    assert "Left out: 2 questions that the run has no prediction for." in made.notes
    changed = json.loads(lines[0])
    file.write_text("\n".join([json.dumps({**changed, "references": ["other"]}), *lines[1:]]) + "\n")
    with pytest.raises(BadInput, match="is not what the recipe's data has"):
        export.export(tmp_path / "run", "lmms-eval", tmp_path / "changed")
    with pytest.raises(BadInput, match="holds no predictions on val"):
        export.export(run, "lmms-eval", tmp_path / "other", "val")


def test_what_an_evaluation_changed_holds_for_its_answers(run: Path, tmp_path: Path) -> None:
    """Its prompts, and its part, whatever the run's recipe says by now."""
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    told = {"split": "test", "overrides": ["prompt.instructions.free=One word!", "eval.max_new_tokens=3"]}
    (folder / "scores.json").write_text(json.dumps(told))
    (folder / "recipe.yaml").write_text(
        (run / "recipe.yaml").read_text().replace("final: test", "final: val")
    )
    made = export.export(folder, "lmms-eval", tmp_path / "task")
    assert made.name == "surgvqa_run_test"
    prompts = {row.prompt for row in made.rows if row.example.question_type == "free"}
    assert prompts
    assert all(prompt.endswith("\nOne word!") for prompt in prompts)
    assert made.settings.eval.max_new_tokens == 3


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", str(run), "--to", "lmms-eval", "--out", str(tmp_path / "new/task")]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert (
        f"surgvqa_run_test: {len(NASTY) - len(REFUSED)} questions, exact match of the run's answers 0."
        in told
    )
    assert 'give it to the model: "Be $short.\\n"' in told
    assert "4 images are PNG files" in told
    readme = (tmp_path / "new/task/README.md").read_text()
    assert "--tasks surgvqa_run_test " in readme
    assert '"Be $short.\\n"' in readme
    assert main(command) == 2
    assert "is there already; give a new folder" in capsys.readouterr().err
    recipe_file = str(run.parent / "recipe.yaml")
    assert (
        main(["export", recipe_file, "--to", "vlmevalkit", "--out", str(tmp_path / "v"), "--split", "train"])
        == 0
    )
    assert "surgvqa_recipe_train_openended: 1 questions\n" in capsys.readouterr().out
    for form in export.FORMS:
        assert main([*command[:3], form, *command[4:]]) == 2  # of the folder, not of the form


def test_no_torch(run: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from surgvqa.cli import main; code = main(['export', *sys.argv[1:]]);"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    words = [str(run), "--to", "lmms-eval", "--out", str(tmp_path / "task")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_lmms_eval_itself(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own model `from_log` gives our answers; its score has to be ours."""
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    made = export.export(run, "lmms-eval", tmp_path / "task")
    monkeypatch.chdir(tmp_path)
    done = simple_evaluate(
        model="from_log",
        model_args=f"logs={tmp_path / 'task/predictions'}",
        tasks=[made.name],
        task_manager=TaskManager(include_path=str(tmp_path / "task"), include_defaults=False),
        batch_size=1,
        bootstrap_iters=0,
    )
    found = done["results"][made.name]
    assert found["exact,none"] == made.exact
    assert isinstance(found["exact_stderr_clustered,none"], float)
    targets = [each["target"] for each in done["samples"][made.name]]
    assert targets == [list(row.example.answers) for row in made.rows]


def test_vlmevalkit_itself(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It builds the data set and its prompts; of choices its own scores have to be ours."""
    pytest.importorskip("vlmeval", reason="VLMEvalKit is not installed")
    made = export.export(run, "vlmevalkit", tmp_path / "table")
    monkeypatch.setenv("LMUData", str(tmp_path / "table"))
    monkeypatch.setenv("PRED_FORMAT", "tsv")
    from vlmeval.dataset import DATASET_TYPE, build_dataset

    built = build_dataset(made.name)
    assert (type(built).__name__, DATASET_TYPE(made.name), len(built)) == (
        "CustomVQADataset",
        "VQA",
        len(made.rows),
    )
    for number, row in enumerate(made.rows):
        image, text = built.build_prompt(number)
        assert text["value"] in (row.prompt, row.prompt + "\u00a0")
        shown = Image.open(image["value"]).convert("RGB")
        assert shown.tobytes() == letterbox.open_rgb(row.example.images[0].read()).tobytes()
    home = tmp_path / "chosen"
    home.mkdir()
    answered(choices(home), lambda example: "tool")
    made = export.export(home / "run", "vlmevalkit-choices", home / "table")
    monkeypatch.setenv("LMUData", str(home / "table"))
    built = build_dataset(made.name)
    assert (type(built).__name__, DATASET_TYPE(made.name)) == ("CustomMCQDataset", "MCQ")
    assert "C. tool" in built.build_prompt(0)[-1]["value"]
    found = built.evaluate(
        str(home / f"table/surgvqa/surgvqa_{made.name}.tsv"), model="exact_matching", nproc=1
    )
    assert float(found["Overall"][0]) == made.exact == 0.5


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not there")
def test_real_frames(tmp_path: Path) -> None:
    file = tmp_path / "frames.yaml"
    text = RECIPE.format(path=SHARED / "real_frames.jsonl", run=tmp_path / "run")
    file.write_text(text.replace("{by: official}", "{by: image, val: 0.3, test: 0.3}"))
    answered(file, lambda example: example.answers[0] if example.question_type == "count" else "yes")
    made = export.export(tmp_path / "run", "lmms-eval", tmp_path / "task")
    task, docs = lmms_task(tmp_path / "task")
    assert [doc["id"] for doc in docs] == [row.example.id for row in made.rows]
    items = [
        task["process_results"](doc, [row.answer])["exact"] for doc, row in zip(docs, made.rows, strict=True)
    ]
    assert task["metric_list"][0]["aggregation"](items) == made.exact
    images = {row.example.image_key: len(row.example.images[0].read()) for row in made.rows}
    assert len(made.rows) > 2 * len(images)
    # In the file each image is there once, however many ask about it.
    assert (tmp_path / "task/data/test.parquet").stat().st_size < 1.2 * sum(images.values())
