"""The command as people type it: what it prints, and what it says when something is wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_jsonl
from PIL import Image

from surgvqa import cli, hub

RECIPE = """
model: {name: tiny-qwen3-vl, tune: full, train_vision: true, train_merger: true}
data: {format: jsonl}
image: {size: 96}
batch: {questions: 12, questions_per_image: 4, tokens_per_micro_batch: 600}
train: {max_steps: 2, lr: 1.0e-3, precision: fp32}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # `check` and `show` write into the working folder
    data = write_jsonl(tmp_path / "data", images=12)
    file = tmp_path / "small.yaml"
    file.write_text(RECIPE.replace("jsonl}", f"jsonl, path: {data}}}") + f"output: {tmp_path / 'run'}\n")
    return file


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    printed = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert command in printed


def test_a_run_from_check_to_evaluate(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(recipe)]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith(f"{recipe}: 0 errors, ")
    assert cli.main(["train", str(recipe), "log.trace=true"]) == 0
    printed = capsys.readouterr().out
    run = recipe.parent / "run"
    for said in (
        "tiny-qwen3-vl, Qwen3-VL; tune: full", "vision ", "merger ", "language ", "1 process, cpu",
        "12 questions per step", "96 → 96, 3×3 = 9 tokens", "tokens per tree; as one row per question",
        "fp32, TF32 off", "per epoch, 2 in all", "exact %", "prior %", str(run),
    ):  # fmt: skip
        assert said in printed, said
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    keys = {
        "step",
        "epoch",
        "loss",
        "lr",
        "grad_norm",
        "questions",
        "tokens",
        "questions_per_s",
        "tflops",
        "seconds",
    }
    assert [set(row) for row in rows] == [keys] * 2
    traced = [json.loads(line) for line in (run / "trace.jsonl").open()]
    assert [set(row) for row in traced] == [{"step", "ids", "tokens", "loss"}] * 2
    assert float.fromhex(traced[1]["loss"]) == rows[1]["loss"]
    assert list((run / "tensorboard").iterdir())

    scores = json.loads((run / "scores.json").read_text())
    assert {"n", "exact", "prior", "above_prior", "intervals", "absent"} <= set(scores["overall"])
    predictions = (run / "predictions.jsonl").read_text()
    assert len(predictions.splitlines()) == scores["overall"]["n"]
    assert cli.main(["evaluate", str(run), "--split", "test"]) == 0
    assert (run / "predictions.jsonl").read_text() == predictions
    assert json.loads((run / "scores.json").read_text()) == scores

    # The same command again finds the run finished, and --fresh asks before it deletes.
    capsys.readouterr()
    assert cli.main(["train", str(recipe)]) == 0
    assert "resuming after step 2" in capsys.readouterr().out
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert cli.main(["train", str(recipe), "--fresh"]) == 2
    assert "add --yes to confirm" in capsys.readouterr().err
    assert cli.main(["train", str(recipe), "--fresh", "--yes", "train.max_steps=1"]) == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1


def test_show_writes_the_canvas_and_every_token(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = recipe.parent / "shown"
    assert cli.main(["show", str(recipe), "--index", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert Image.open(out / "canvas-0.png").size == (96, 96)
    page = (out / "tree.html").read_text(encoding="utf-8")
    assert page.count("&lt;|image_pad|&gt;") == 9
    assert "×9" in printed
    assert page.count('class="token supervised"') > 3
    assert "→" in page
    assert cli.main(["show", str(recipe), "--index", "0", "--out", str(out)]) == 0  # one question: no fork
    assert cli.main(["show", str(recipe), "--index", "99"]) == 2
    assert "images, 0 to" in capsys.readouterr().err


def test_hostile_text_stays_text_in_the_page(recipe: Path) -> None:
    data = recipe.parent / "data" / "questions.jsonl"
    hostile = "<script>alert(1)</script>"
    text = (
        data.read_text()
        .replace("Is text visible?", f"Is {hostile} there?")
        .replace('"id": "', f'"id": "{hostile}')
    )
    data.write_text(text)
    out = recipe.parent / "shown"
    assert cli.main(["show", str(recipe), "--index", "8", "--out", str(out)]) == 0
    page = (out / "tree.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script" not in page


# Bad input: said before a model is loaded, all of it, with its place.


def fails(recipe: Path, capsys: pytest.CaptureFixture[str], *words: str, command: str = "train") -> str:
    assert cli.main([command, str(recipe), *words]) == 2
    printed = capsys.readouterr()
    assert "model       " not in printed.out  # no banner: nothing was loaded
    return printed.err + printed.out


def test_a_question_that_cannot_fit(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = recipe.parent / "data" / "questions.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for number in (3, 7):
        rows[number]["question"] = "Why? " * 700
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = fails(recipe, capsys)
    for number in (3, 7):
        assert f"questions.jsonl:{number + 1}: question {rows[number]['id']!r} cannot fit: " in said
    assert "against batch.tokens_per_micro_batch 600" in said


def test_images_that_cannot_be_read(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (recipe.parent / "data" / "2.png").write_bytes((recipe.parent / "data" / "2.png").read_bytes()[:200])
    (recipe.parent / "data" / "4.png").write_text("not an image")
    (recipe.parent / "data" / "5.png").unlink()
    for command in ("train", "check"):
        said = fails(recipe, capsys, command=command)
        for name in ("2.png", "4.png", "5.png"):
            assert name in said


def test_labels_never_seen_in_training_are_a_warning_with_counts(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = recipe.parent / "data" / "questions.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    next(row for row in rows if row["split"] == "test")["answer"] = "a teapot"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["check", str(recipe)]) == 0
    assert "an answer never seen in train: 'a teapot' (1)" in capsys.readouterr().out
    assert cli.main(["train", str(recipe), "train.max_steps=1", "eval.final=null"]) == 0
    assert "never seen in train: 'a teapot' (1)" in capsys.readouterr().err


def test_check_lists_the_problems_of_all_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text("modle: 1\nlr: 2\n")
    assert cli.main(["check", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")]) == 2
    said = capsys.readouterr().err
    for name in ("a", "b"):
        assert f'{name}.yaml: modle: unknown key, did you mean "model"?' in said
        assert f"{name}.yaml: data: missing" in said


@pytest.mark.fault("F21")
def test_an_output_that_cannot_be_written(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = recipe.parent / "file"
    file.write_text("")
    (recipe.parent / "run").mkdir()
    (recipe.parent / "run" / "checkpoints").write_text("")
    (recipe.parent / "run" / "ended.json").write_text("{}")
    for output in (file, file / "below", recipe.parent / "run"):
        said = fails(recipe, capsys, f"output={output}")
        assert f"output: {output}" in said
        assert "a file is where a folder must be" in said


def test_evaluate_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(tmp_path)]) == 2
    assert "holds neither a run nor a checkpoint" in capsys.readouterr().err


def test_flex_on_a_cpu_is_refused(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "flex needs a CUDA GPU" in fails(recipe, capsys, "model.attn=flex")


def test_a_lora_pattern_that_matches_nothing(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = fails(recipe, capsys, "model.tune=lora", "model.lora.modules=[q_prj]")
    assert "'q_prj' matches no linear layer" in said


def test_problems_are_listed_once_by_several_processes(recipe: Path) -> None:
    root = Path(__file__).parents[1]
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/2cpu.yaml",
        "-m", "surgvqa.train", str(recipe), "batch.tokens_per_micro_batch=16",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=root, env=dict(os.environ), capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "cannot fit" in line]
    assert len([line for line in lines if line.startswith("[rank 1]")]) == 1
    assert len(lines) > 3
    assert len(set(lines)) == len(lines)


def test_many_rows_with_the_same_fault_are_one_line(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = recipe.parent / "data" / "questions.jsonl"
    data.write_text(data.read_text().replace('"answer"', '"anwser"'))
    rows = len(data.read_text().splitlines())
    assert rows > 20
    said = fails(recipe, capsys, command="check")
    assert "questions.jsonl:1: answer is missing; the row has id, image, question, anwser" in said
    assert f" (and {rows - 1} more rows, the last at {data}:{rows})" in said
    assert said.count("answer is missing") == 1
    assert "holds no questions" not in said


def test_a_missing_model_does_not_hide_what_is_wrong_with_the_data(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (recipe.parent / "data" / "2.png").unlink()
    said = fails(recipe, capsys, "model.name=somebody/no-such-model")
    assert "`hf download somebody/no-such-model`" in said
    assert "2.png" in said


def test_a_real_model_does_not_train_on_the_cpu_by_mistake(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    folder = Path(shutil.copytree(hub.find("tiny-qwen2-vl").path, recipe.parent / "model"))
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "intermediate_size": 10**7}))
    (recipe.parent / "data" / "2.png").unlink()
    said = fails(recipe, capsys, f"model.name={folder}")
    assert f"no GPU that CUDA can use, and {folder} would take weeks on the CPU: it has" in said
    assert "2.png" not in said, "found at once, before images are decoded"
    # What is wrong with the model itself is told first.
    file.write_text(json.dumps({**config, "intermediate_size": 10**7, "model_type": "qwen2_5_vl"}))
    for command in ("train", "check"):
        said = fails(recipe, capsys, f"model.name={folder}", command=command)
        assert "model_type is 'qwen2_5_vl'" in said
        assert "weeks" not in said


def test_a_small_model_in_a_folder_trains_on_the_cpu(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    folder = Path(shutil.copytree(hub.find("tiny-qwen3-vl").path, recipe.parent / "model"))
    assert "weights missing: model.safetensors" in fails(recipe, capsys, f"model.name={folder}")


def test_what_is_wrong_with_the_model_is_among_the_errors_of_check(
    recipe: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for word in ("model.name=./nosuch", f"model.name={recipe.parent}"):
        assert cli.main(["check", str(recipe), word, "--out", str(tmp_path / "audit")]) == 2
        assert capsys.readouterr().out.splitlines()[-1].startswith(f"{recipe}: 1 error, ")
    written = json.loads((tmp_path / "audit" / recipe.stem / "audit.json").read_text())
    assert [each["severity"] for each in written["problems"]].count("error") == 1


def test_another_part_has_files_of_its_own(recipe: Path) -> None:
    assert cli.main(["train", str(recipe), "eval.max_new_tokens=2"]) == 0
    run = recipe.parent / "run"
    before = (run / "scores.json").read_text()
    assert cli.main(["evaluate", str(run), "--split", "train"]) == 0
    assert (run / "scores.json").read_text() == before
    scores = json.loads((run / "scores.train.json").read_text())
    assert scores["split"] == "train"
    assert scores["overall"]["n"] == len((run / "predictions.train.jsonl").read_text().splitlines())


def test_key_value_before_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "train.lr=1e-4"]) == 2
    assert "the recipe's file comes before key=value" in capsys.readouterr().err


def test_ctrl_c_ends_a_command_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(argv: list[str]) -> int:
        """Compare two runs."""
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "compare", interrupted)
    assert cli.main(["compare", "a", "b"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
