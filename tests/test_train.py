"""Parts of the loop by themselves: schedules, parameter groups, options that reach the arithmetic."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import math
import re
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES, TOPICS, noise_image, write_jsonl
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from surgvqa import checkpoint, datasets, evaluation, flops, hub, model, recipe, scores, terminal, train, tree
from surgvqa.banner import example
from surgvqa.endings import StorageFailure
from surgvqa.memory import Fit
from surgvqa.plan import trees_of
from surgvqa.prepare import Prepared, prepare
from surgvqa.recipe import BadInput, Log
from surgvqa.replay import replay
from surgvqa.run import Records, _clock, resumable
from surgvqa.show import show
from surgvqa.sources import opened

RECIPE = """
model: {name: tiny-qwen3-vl, tune: full, train_vision: true, train_merger: true}
data: {format: jsonl}
image: {size: 96}
batch: {questions: 12, questions_per_image: 4, tokens_per_micro_batch: 600}
train: {max_steps: 4, lr: 1.0e-3, precision: fp32, checkpoint_layers: 0}
eval: {final: null}
log: {trace: true}
"""


@pytest.fixture
def settings(tmp_path: Path) -> Any:
    data = write_jsonl(tmp_path / "data", images=16)

    def make(*overrides: str) -> recipe.Recipe:
        words = [f"data.path={data}", f"output={tmp_path / 'run'}", *overrides]
        return recipe.parse(RECIPE, words)

    return make


def rates(scheduler: LambdaLR, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_schedules_are_transformers_one_step_ahead_in_the_warm_up(name: str) -> None:
    """Theirs begins with a step at 0, ours with the first share of the peak; after the warm-up they agree."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    make = {"cosine": get_cosine_schedule_with_warmup, "linear": get_linear_schedule_with_warmup}[name]
    theirs = rates(make(optimizer, num_warmup_steps=10, num_training_steps=100), optimizer, 100)
    ours = [train.lr_factor(step, 100, 0.1, name) for step in range(100)]
    assert ours[10:] == pytest.approx(theirs[10:])
    assert ours[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert ours[:9] == pytest.approx(theirs[1:10])


def test_constant_and_degenerate_schedules() -> None:
    assert [train.lr_factor(step, 4, 0.5, "constant") for step in range(4)] == [0.5, 1.0, 1.0, 1.0]
    assert train.lr_factor(0, 1, 0.0, "cosine") == 1.0
    assert math.isclose(train.lr_factor(99, 100, 0.0, "linear"), 0.01)


def test_each_part_has_its_learning_rate_and_matrices_alone_decay(settings: Any) -> None:
    chosen = settings("train.lr_vision=1e-5", "train.lr_merger=2e-5", "train.weight_decay=0.1")
    network = model.adapt(
        model.build(hub.find("tiny-qwen3-vl")), tune="full", train_vision=True, train_merger=True
    )
    parameters = dict(model.trainable(network))
    optimizer = train._optimizer(chosen, parameters, fused=False)
    assert optimizer.param_groups[0]["lr"] == 1e-3
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(group_of) == len(parameters)
    expected = {"vision": 1e-5, "merger": 2e-5, "deepstack": 2e-5, "language": 1e-3}
    for name, parameter in parameters.items():
        group = group_of[id(parameter)]
        assert group["lr"] == group["peak"] == expected[model.component_of(name)], name
        assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0), name


@pytest.mark.parametrize(
    ("every", "steps"), [(0.25, 40), (1.0, 161), (1, 161), (0.001, 1), (7.0, 7), (None, 0)]
)
def test_evaluation_interval(every: float | None, steps: int) -> None:
    assert train._interval(every, 161) == steps


def first_losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()]


def test_bf16_computes_in_bf16_and_stays_near_fp32(settings: Any, tmp_path: Path) -> None:
    exact = first_losses(train.train(settings(f"output={tmp_path / 'a'}")))
    rounded = first_losses(train.train(settings(f"output={tmp_path / 'b'}", "train.precision=bf16")))
    assert exact != rounded
    assert rounded == pytest.approx(exact, rel=0.02)


def test_native_images_train(settings: Any, capsys: pytest.CaptureFixture[str]) -> None:
    native = settings().model_dump(mode="json")
    native["image"] = {"mode": "native", "max_tokens": 12}
    run = train.train(recipe.parse(json.dumps(native)))
    assert len(first_losses(run)) == 4
    banner = capsys.readouterr().out
    assert "native, " in banner
    assert "(limit 12)" in banner


@pytest.mark.parametrize("family", ["tiny-qwen2-vl", "tiny-qwen3-vl"])
def test_the_banner_tells_adapters_canvas_and_class_weights(
    settings: Any, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    lora = ["model.tune=lora", "model.train_vision=false", "model.train_merger=false"]
    train.train(
        settings(*lora, f"model.name={family}", "image.size=100", "loss.class_weights=effective",
                 "train.max_steps=1", "model.lora.modules=[q_proj, down_proj]")
    )  # fmt: skip
    said = capsys.readouterr().out
    layers = 3
    assert f"adapters on {2 * layers} modules: q_proj ×{layers}, down_proj ×{layers}" in said
    assert {"tiny-qwen2-vl": "100 → 84, 3×3 = 9 tokens", "tiny-qwen3-vl": "100 → 96, 3×3 = 9 tokens"}[
        family
    ] in said
    assert "effective class weights" in said
    assert "vision " in said
    assert "frozen" in said


@pytest.mark.parametrize("family", ["tiny-qwen2-vl", "tiny-qwen3-vl"])
def test_the_start_prints_what_is_learned_before_the_model_loads(
    settings: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    def loads(*given: Any) -> None:
        raise BadInput("the model loads")

    monkeypatch.setattr(Prepared, "network", loads)
    asked = settings(f"model.name={family}", "image.size=100", 'prompt.system="Be \\e[2J brief."')
    with pytest.raises(BadInput, match="the model loads"):
        train.train(asked)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    at = next(number for number, line in enumerate(lines) if line.startswith("example  "))
    given, supervised, ignored = (line.split(maxsplit=1) for line in lines[at + 1 : at + 4])
    first = datasets.load(asked.data).part("train")[0]
    assert lines[at].endswith(f"the first question of train, at {first.place}")
    assert given == [
        "given",
        r"<|im_start|>system\nBe \x1b[2J brief.<|im_end|>\n<|im_start|>user\n"
        rf"<|vision_start|><|image_pad|>×9<|vision_end|>{first.question}<|im_end|>\n<|im_start|>assistant\n",
    ]
    assert supervised == ["supervised", f"{first.answers[0]}<|im_end|>"]
    assert ignored == ["ignored", r"\n"]


def test_a_long_example_is_shortened(settings: Any) -> None:
    prepared = prepare(settings("prompt.system=" + "word " * 1000))
    (given,) = [line for line in example(prepared.questions("train")) if line.strip().startswith("given")]
    assert len(given) < 700
    assert re.search(r" … 4,\d{3} characters … .*assistant\\n$", given)


def test_step_lines_tell_the_time(settings: Any, capsys: pytest.CaptureFixture[str]) -> None:
    train.train(settings("train.max_steps=2", "eval.final=null"))
    lines = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("step ") and "/2" in line
    ]
    assert len(lines) == 2
    assert all(re.search(r" tokens/s  \d+:\d\d:\d\d elapsed, \d+:\d\d:\d\d to go$", line) for line in lines)
    assert lines[-1].endswith(" elapsed, 0:00:00 to go")
    assert [_clock(seconds) for seconds in (0.4, 61, 360_000)] == ["0:00:00", "0:01:01", "100:00:00"]


def test_the_best_checkpoint_is_kept_and_answers_at_the_end(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores that fall after step 2: its checkpoint outlives the newer ones and makes the predictions."""
    told, real = iter([0.1, 0.9, 0.5, 0.4, 0.3, 0.2]), scores.values
    monkeypatch.setattr(
        scores, "values", lambda answers, prior: {**real(answers, prior), "exact": next(told, 0.0)}
    )
    run = train.train(
        settings(
            "train.max_steps=6",
            "eval.every=1e-9",
            "eval.final=test",
            "eval.max_new_tokens=4",
            "checkpoint.every=1",
        )
    )
    kept = [folder.name for folder in sorted((run / "checkpoints").iterdir())]
    assert kept == ["step-000002", "step-000005", "step-000006"]
    assert checkpoint.best(run / "checkpoints") == run / "checkpoints/step-000002"
    assert json.loads((run / "scores.json").read_text())["checkpoint"] == "step-000002"
    steps = [json.loads(line)["step"] for line in (run / "eval.jsonl").open()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_no_validation_questions_is_an_error(settings: Any) -> None:
    with pytest.raises(BadInput, match="the val part holds no questions to evaluate on"):
        train.train(
            settings("eval.every=1", "data.split.by=image", "data.split.val=0", "data.split.test=0.2")
        )


def test_an_empty_final_part_is_said_at_the_end(settings: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = train.train(
        settings("train.max_steps=1", "eval.final=test", "data.split={by: image, val: 0.2, test: 0.0}")
    )
    assert "not evaluated: the test part holds no questions" in capsys.readouterr().out
    assert not (run / "scores.json").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_goes_away_during_training_is_named(settings: Any, workers: int) -> None:

    prepared = prepare(settings())
    questions = prepared.questions("train")
    for image in Path(settings().data.path).parent.glob("*.png"):
        image.unlink()
    with pytest.raises(BadInput) as caught:
        list(tree.packs(questions, [("first", [[0]], None)], workers=workers))
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith("image ")
    assert "Traceback" not in caught.value.problems[0]


@pytest.mark.fault("F18")
def test_changed_image_bytes_are_changed_data(settings: Any) -> None:
    train.train(settings("train.max_steps=1"))
    image = Path(settings().data.path).parent / "0.png"
    changed = np.array(Image.open(image).convert("RGB"))
    changed[0, 0] = 255 - changed[0, 0]
    Image.fromarray(changed).save(image)
    with pytest.raises(BadInput, match="the training data"):
        train.train(settings("train.max_steps=1"))


# Answers chosen among labels.


def closed(*kinds: str) -> list[str]:
    """The recipe's closed sets for conftest's questions, of all types or of some."""
    sets: dict[str, list[str]] = {}
    for _, answers, kind in TOPICS:
        sets[kind] = [*dict.fromkeys([*sets.get(kind, []), *answers])]
    return [
        "eval.answers=labels",
        *(f"data.labels.{kind}={json.dumps(sets[kind])}" for kind in kinds or sets),
    ]


def predictions(run: Path, name: str = "predictions.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("family", ["tiny-qwen2-vl", "tiny-qwen3-vl"])
def test_labels_are_chosen_during_training_and_at_its_end(
    settings: Any, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr(evaluation, "greedy", None)  # nothing is generated
    words = [f"model.name={family}", *closed(), "eval.every=2", "eval.final=test"]
    run = train.train(settings(*words))
    rows = predictions(run)
    assert len(rows) > 10
    for row in rows:
        assert list(row)[-2:] == ["answer", "probabilities"]
        chances = row["probabilities"]
        assert sum(chances.values()) == pytest.approx(1)
        assert row["answer"] == max(chances, key=chances.__getitem__)
        assert set(row["references"]) <= chances.keys()
    assert len((run / "eval.jsonl").read_text().splitlines()) == 2

    # The same from rows, when the finished run is evaluated again: its labels may change.
    more = "data.labels.yes_no=[yes, no, perhaps]"
    again = train.train(settings(*words, "batch.trees=false", "batch.tokens_per_micro_batch=150", more))
    for old, new in zip(rows, predictions(again), strict=True):
        odds = {label: chance for label, chance in new["probabilities"].items() if label != "perhaps"}
        assert ("perhaps" in new["probabilities"]) is (new["question_type"] == "yes_no")
        total = sum(odds.values())
        assert {label: chance / total for label, chance in odds.items()} == pytest.approx(
            old["probabilities"], rel=1e-5
        )


def test_evaluate_takes_labels_as_overrides(settings: Any) -> None:
    run = train.train(
        settings("model.tune=lora", "model.train_vision=false", "model.train_merger=false",
                 "train.max_steps=1", "eval.final=test", "eval.max_new_tokens=3")
    )  # fmt: skip
    assert all("probabilities" not in row for row in predictions(run))
    result = evaluation.evaluate(run, "val", overrides=closed())
    assert result["overrides"] == closed()
    assert all(row["probabilities"] for row in predictions(run, "predictions.val.jsonl"))


def test_missing_labels_are_told_before_the_model_loads(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "build", None)
    words = [*closed("yes_no", "count", "where", "which"), "data.labels.yes_no=[yes]", "eval.final=test"]
    with pytest.raises(BadInput) as caught:
        train.train(settings(*words))
    outside, missing = sorted(caught.value.problems, key=lambda problem: "eval.answers: labels" in problem)
    assert "of the type yes_no not among its labels: 'no' (" in outside
    assert "colour, state have none. List the answers of each in the recipe, as data.labels.colour" in missing


def test_lengths_count_every_label(settings: Any) -> None:

    prepared = prepare(settings(*closed(), "eval.final=test"))
    questions = prepared.questions("test", asked=True)
    plan = prepared.plan(questions)
    for tree_of in trees_of(questions.image):
        assert questions.pack([tree_of], asked=True).tokens == plan.tokens(tree_of)
    most = max(plan.tokens([question]) for question in range(len(questions)))
    words = [*closed(), "eval.final=test", f"batch.tokens_per_micro_batch={most - 1}"]
    short = prepare(settings(*words))
    short.plan(prepared.questions("test"))  # without labels they fit
    with pytest.raises(BadInput, match=r"question '\d+-\d' with its \d labels cannot fit"):
        short.plan(questions)


# Checkpoints as others load them.


def logits(network: Any, run: Path) -> torch.Tensor:
    from surgvqa.loss import TreeLoss

    questions = prepare(recipe.load(run / "recipe.yaml")).questions("train")
    loss = TreeLoss(network.eval(), attn="sdpa", autocast=None)
    with torch.no_grad():
        return loss(questions.pack([[0], [1]]))


def test_transformers_loads_a_full_checkpoint_as_it_is(settings: Any) -> None:
    from transformers import AutoModelForImageTextToText, AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    run = train.train(settings())
    folder = checkpoint.chosen(run)
    theirs = AutoModelForImageTextToText.from_pretrained(folder)
    ours = model.build(hub.find("tiny-qwen3-vl"), weights=folder)
    state = ours.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in theirs.state_dict().items())
    base = hub.find("tiny-qwen3-vl").path
    for name in ("preprocessor_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.json"):
        assert (folder / name).read_bytes() == (base / name).read_bytes()
    assert "Qwen3VLProcessor" in (folder / "preprocessor_config.json").read_text()
    assert len(AutoTokenizer.from_pretrained(folder)) > 700
    assert Qwen2VLImageProcessorPil.from_pretrained(folder).patch_size == 16
    served(folder, list(ours.state_dict()))
    # The checkpoint's folder is itself a model to train on.
    assert hub.find(str(folder)).family == "qwen3_vl"


@pytest.mark.parametrize("vision", ["true", "false"])
@pytest.mark.parametrize("merger", ["true", "false"])
def test_peft_loads_a_lora_checkpoint_as_it_is(settings: Any, vision: str, merger: str) -> None:
    from peft import PeftModel, get_peft_model_state_dict

    run = train.train(
        settings(
            "model.tune=lora", f"model.train_vision={vision}", f"model.train_merger={merger}", "train.lr=1e-2"
        )
    )
    folder = checkpoint.chosen(run)
    written = json.loads((folder / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "tiny-qwen3-vl"
    assert not (folder / "README.md").exists()
    seed = settings().train.seed
    plain = model.build(hub.find("tiny-qwen3-vl"), seed=seed)
    before = logits(plain, run)
    theirs = logits(PeftModel.from_pretrained(plain, folder), run)

    network = prepare(recipe.load(run / "recipe.yaml")).network(folder)
    ours = logits(network, run)
    assert not torch.allclose(before, ours, rtol=1e-3)
    torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-6)
    served(folder, list(get_peft_model_state_dict(network)))


def served(folder: Path, weights: list[str]) -> None:
    """Check that a server which loads every *.safetensors at the top finds the weights, each once, and
    nothing else; and that what only training reads lies apart."""
    loaded: list[str] = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as content:
            loaded += content.keys()
    tied = {"lm_head.weight"}  # stored once, as the embedding
    assert set(loaded) | tied == set(weights) | tied
    assert len(loaded) == len(set(loaded)) > 10
    trainer = {"recipe.yaml", "state.json", "manifest.json", "optimizer.safetensors"}
    assert {file.name for file in (folder / "trainer").iterdir()} == trainer
    assert not trainer & {file.name for file in folder.iterdir()}


def test_a_pattern_inside_a_module_that_trains_whole_is_refused(settings: Any) -> None:
    with pytest.raises(BadInput, match=r"which model.train_vision or model.train_merger trains whole"):
        train.train(settings("model.tune=lora", "model.lora.modules=[q_proj, visual.blocks.*.attn.qkv]"))


def test_prompts_are_checked_with_the_data(settings: Any, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(BadInput, match=r"prompt.system: holds the special token <\|im_end\|>"):
        train.train(settings("prompt.system='Be <|im_end|> brief'"))
    train.train(settings("prompt.instructions={yesno: 'Yes or no.'}", "train.max_steps=1"))
    assert "prompt.instructions: no question has the type yesno; the data has colour, count" in caplog.text


def test_the_banner_of_the_full_resolution_recipe(tmp_path: Path) -> None:
    """41,079 training questions, 16 per step, 3 epochs."""

    from surgvqa import processes
    from surgvqa.banner import banner

    for number in range(7):
        noise_image(2000 + number, 1500, number).save(tmp_path / f"{number}.jpg")
    rows = (
        {
            "image": f"{i % 7}.jpg",
            "question": f"How many in {i % 20}?",
            "answer": str(i % 3),
            "split": "train",
        }
        for i in range(41_079)
    )
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = recipe.load(
        Path(__file__).parents[1] / "recipes/qwen3_fullres.yaml",
        ["model.name=tiny-qwen3-vl", "data.format=jsonl", f"data.path={tmp_path / 'q.jsonl'}",
         "data.split={by: official}", "eval.every=null"],
    )  # fmt: skip
    prepared = prepare(chosen)
    questions = prepared.questions("train")
    plan = prepared.plan(questions)
    accelerator = processes.start()
    compute = processes.compute("fp32", "auto", accelerator.device)
    total = chosen.train.epochs * plan.steps_per_epoch
    network, fit = prepared.network(), Fit(8192, 2, 0)
    lines = list(banner(prepared, questions, plan, network, accelerator, compute, fit, total, 0))
    assert "steps       2,568 per epoch, 7,704 in all" in lines
    assert "batch       16 questions per step, at most 9 per image" in "\n".join(lines)
    canvas = next(line for line in lines if line.startswith("canvas"))
    assert "(limit 2900)" in canvas
    tokens = [c.tokens(32) for c in prepared.canvases.values()]
    assert 2700 < min(tokens) <= max(tokens) <= 2900


def as_parquet(source: Path, target: Path) -> list[str]:
    """The same rows with the images' bytes inside."""
    import pyarrow
    import pyarrow.parquet

    rows = [json.loads(line) for line in source.read_text().splitlines()]
    for row in rows:
        row["image"] = {"bytes": (source.parent / row["image"]).read_bytes(), "path": row["image"]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), target / "q.parquet")
    return ["data.format=parquet", f"data.path={target / 'q.parquet'}"]


def as_kvasir(source: Path, target: Path) -> list[str]:
    """Kvasir-VQA's columns and file, with its own question strings."""
    import pyarrow
    import pyarrow.parquet

    asked = ["Have all polyps been removed?", "How many findings are present?"]
    rows = [
        {"image": {"bytes": file.read_bytes(), "path": None}, "source": "x", "question": question,
         "answer": str(number % 2), "img_id": file.stem}
        for number, file in enumerate(sorted(source.parent.glob("*.png")))
        for question in asked
    ]  # fmt: skip
    (target / "data").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), target / "data/raw-00000-of-00001.parquet")
    return ["data.format=kvasir_vqa", f"data.path={target}", "data.split={by: image, val: 0.3, test: 0.3}"]


def as_endovis(source: Path, target: Path) -> list[str]:
    images = sorted(source.parent.glob("*.png"))
    for sequence, image in zip((1, 2, 3, 4, 5, 16), images, strict=False):
        folder = target / f"seq_{sequence}"
        (folder / "left_frames").mkdir(parents=True)
        (folder / "vqa/Classification").mkdir(parents=True)
        (folder / "left_frames/frame000.png").write_bytes(image.read_bytes())
        (folder / "vqa/Classification/frame000_QA.txt").write_text(
            "what organ is being operated?|kidney\nwhat is the state of prograsp_forceps?|Idle\n"
        )
    return ["data.format=endovis18_vqa", f"data.path={target}"]


@pytest.mark.parametrize("write", [as_parquet, as_kvasir, as_endovis])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_format_trains_and_evaluates(settings: Any, tmp_path: Path, write: Any, workers: int) -> None:
    target = tmp_path / "other"
    target.mkdir()
    source = Path(settings().data.path)
    run = train.train(
        settings(*write(source, target), f"data.workers={workers}", "eval.final=test",
                 "eval.max_new_tokens=3",
                 "batch.questions=4")
    )  # fmt: skip
    assert len(first_losses(run)) == 4
    assert json.loads((run / "scores.json").read_text())["overall"]["n"] > 0


def test_a_profile_is_written_where_the_recipe_asks_for_it(settings: Any) -> None:
    run = train.train(settings("log.profile=true", "train.max_steps=7"))
    (trace,) = (run / "profile").glob("*.pt.trace.json")
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    names = {event.get("name", "") for event in events}
    assert {"ProfilerStep#3", "ProfilerStep#4", "ProfilerStep#5"} <= names
    assert "ProfilerStep#6" not in names
    assert any("scaled_dot_product" in name for name in names)
    assert not (train.train(settings(f"output={run.parent / 'other'}")) / "profile").exists()


def test_speed_is_told_by_questions_flops_and_share_of_the_peak(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train.train(settings())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    prepared = prepare(settings())
    questions = prepared.questions("train")
    plan, work = prepared.plan(questions), flops.StepCost(prepared.network(), questions)
    for row in rows:
        trees = plan.step(row["step"] - 1)
        assert row["questions_per_s"] == pytest.approx(sum(map(len, trees)) / row["seconds"])
        assert row["tflops"] == pytest.approx(work.step(trees) / row["seconds"] / 1e12)
        assert "mfu" not in row, "the peak of a CPU is not known"
    # A GPU that is not here: two of them, half a second for the step.
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    speed = flops.Speed(prepared.network(), questions, torch.device("cuda"), "bf16", world=2)
    trees = plan.step(0)
    found = speed.of(trees, 0.5)
    assert found["questions_per_gpu_hour"] == pytest.approx(12 / 0.5 * 3600 / 2)
    assert found["mfu"] == pytest.approx(work.step(trees) / 0.5 / 2 / 989e12)
    assert found["peak_memory_gib"] == 3
    terminal = io.StringIO()
    row = {"step": 1, "epoch": 0.1, "loss": 12.3456, "lr": 1e-4, "tokens": 10, "seconds": 0.5, **found}
    row |= {"questions_per_s": 123.4, "questions_per_gpu_hour": 444_240.0, "mfu": 0.39}
    with Records(run, 0, 10_000, Log(), Console(width=80, force_terminal=True, file=terminal)) as records:
        records.step(**row)
    assert "loss 12.3456  lr 1.0e-04  123.4 q/s  444,240 q/GPU-h  MFU 39%" in terminal.getvalue(), "uncut"


def test_a_corpus_brings_its_labels(settings: Any, tmp_path: Path) -> None:
    """All 18 of EndoVis-18-VQA, whatever the question."""
    words = as_endovis(Path(settings().data.path), tmp_path)
    run = train.train(settings(*words, "eval.final=test", "eval.answers=labels", "batch.questions=4"))
    rows = predictions(run)
    assert {len(row["probabilities"]) for row in rows} == {18}
    assert {row["question_type"] for row in rows} == {"organ", "state"}


def test_a_corpus_that_is_all_test_is_evaluated(settings: Any, tmp_path: Path) -> None:
    frame = io.BytesIO()
    noise_image(1280, 1024, 1).save(frame, "PNG")
    for name, content in {
        "left_frames/seq1_frame001.png": frame.getvalue(),
        "vqla/label/seq1_frame001.txt": b"What organ is being operated?|kidney|1,1,1280,1024\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(content)
    external = ["data.format=endovis17_vqla", f"data.path={tmp_path}"]
    with pytest.raises(BadInput, match="train: holds no questions"):
        train.train(settings(*external))
    show(settings(*external), "test", 0, tmp_path / "shown", terminal.Console(quiet=True))
    assert (tmp_path / "shown/canvas-0.png").is_file()
    scores = evaluation.evaluate(train.train(settings()), "test", overrides=external)
    assert scores["overall"]["n"] == 1


def test_the_trained_model_is_let_go_before_the_best_one_is_loaded(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two may not fit on the device."""
    made: list[weakref.ref[Any]] = []
    alive: list[list[bool]] = []
    network = Prepared.network

    def watched(self: Prepared, folder: Path | None = None) -> Any:
        gc.collect()
        alive.append([ref() is not None for ref in made])
        new = network(self, folder)
        made.append(weakref.ref(new))
        return new

    monkeypatch.setattr(Prepared, "network", watched)
    told, real = iter([0.9, 0.1, 0.1, 0.1, 0.1]), scores.values
    monkeypatch.setattr(
        scores, "values", lambda answers, prior: {**real(answers, prior), "exact": next(told)}
    )
    train.train(settings("eval.every=2", "eval.questions=2", "eval.final=test", "eval.max_new_tokens=2"))
    assert alive == [[], [False]]


def test_a_checkpoint_whose_recipe_is_of_another_version_is_not_to_be_edited(settings: Any) -> None:
    run = train.train(settings("train.max_steps=1"))
    (folder,) = (run / "checkpoints").iterdir()
    text = (folder / "trainer/recipe.yaml").read_text(encoding="utf-8")
    (folder / "trainer/recipe.yaml").write_text(text.replace("checkpoint_layers", "gradient_checkpointing"))
    with pytest.raises(BadInput, match="was written by another version of surgvqa") as caught:
        checkpoint.recipe_of(folder)
    assert "train.gradient_checkpointing: unknown key" in caught.value.problems[1]


def test_a_checkpoint_of_the_former_layout_is_named_and_not_passed_over(settings: Any, capsys: Any) -> None:
    words = ["train.max_steps=1"]
    run = train.train(settings(*words))
    (folder,) = (run / "checkpoints").iterdir()
    for file in (folder / "trainer").iterdir():
        file.rename(folder / file.name)
    (folder / "trainer").rmdir()
    said = rf"{folder}: was written by another version of surgvqa.*--fresh --yes"
    with pytest.raises(BadInput, match=said):
        train.train(settings(*words))
    for source in (run, folder):
        with pytest.raises(BadInput, match=said):
            opened(source)
    with pytest.raises(BadInput, match=said):
        train.train(settings(*words, f"model.adapter={folder}", f"output={run}-second"))
    train.train(settings(*words), fresh=True)
    assert checkpoint.verify(folder) == []


def test_a_step_is_replayed_as_it_was(settings: Any) -> None:
    run = train.train(settings("checkpoint.every=1", "checkpoint.keep=9", "model.tune=full"))
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    traced = [json.loads(line) for line in (run / "trace.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    console = Console(record=True, width=200, file=io.StringIO())
    loss, norm = replay(settings("checkpoint.every=1", "checkpoint.keep=9"), 3, console)
    assert loss == float.fromhex(traced[2]["loss"])
    assert norm == pytest.approx(rows[2]["grad_norm"], rel=1e-6)
    said = console.export_text()
    assert str(run / "checkpoints" / "step-000002") in said
    assert all(question in said for question in traced[2]["ids"])
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    with pytest.raises(BadInput, match="the run's steps are 1 to 4"):
        replay(settings(), 5, console)


@pytest.mark.fault("F8")
def test_a_disk_too_small_for_a_checkpoint_is_found_before_training(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=5 * 2**20))
    monkeypatch.setattr(Prepared, "network", None)  # the weights are not read
    with pytest.raises(StorageFailure, match=r"a checkpoint takes about \d+ MiB, .*, and 5 MiB are free"):
        train.train(settings())
    ended = json.loads((Path(settings().output) / "ended.json").read_text(encoding="utf-8"))
    assert (ended["code"], ended["name"]) == (3, "storage")
    assert not (Path(settings().output) / "metrics.jsonl").exists()


@pytest.mark.fault("F8")
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("vision", ["true", "false"])
def test_what_a_checkpoint_takes_is_about_what_was_foreseen(
    settings: Any, name: str, tune: str, vision: str
) -> None:
    chosen = settings(f"model.name={name}", f"model.tune={tune}", f"model.train_vision={vision}",
                      "model.train_merger=false", "train.max_steps=1", "train.precision=bf16")  # fmt: skip
    (folder,) = (train.train(chosen) / "checkpoints").iterdir()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert prepare(chosen).checkpoint_bytes() == pytest.approx(size, rel=0.03)


@pytest.mark.fault("F8")
def test_room_is_needed_for_what_is_kept_and_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint takes 100; two are kept."""
    usage = shutil.disk_usage
    root = tmp_path / "checkpoints"
    root.mkdir()

    def needs(free: int, saves: int) -> None:
        for left, fits in ((free, True), (free - 1, False)):
            monkeypatch.setattr(shutil, "disk_usage", lambda path, left=left: usage(path)._replace(free=left))
            with contextlib.nullcontext() if fits else pytest.raises(StorageFailure):
                checkpoint.room(tmp_path, 100, keep=2, saves=saves)

    needs(100, saves=1)
    needs(200, saves=2)
    needs(300, saves=9)
    for step, free in ((1, 200), (2, 100), (3, 100)):
        folder = root / checkpoint.folder_name(step)
        (folder / "trainer").mkdir(parents=True)
        (folder / checkpoint.STATE).write_bytes(b"x" * 100)
        needs(free, saves=9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=0))
    checkpoint.room(tmp_path, 100, keep=2, saves=0)  # a finished run


def test_saves_to_come_are_counted(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(checkpoint, "room", lambda run, size, *, keep, saves: found.append((keep, saves)))
    train._room(prepare(settings()), 0, 10, 0, None)
    train._room(prepare(settings("checkpoint.every=4")), 0, 10, 0, None)
    train._room(prepare(settings("checkpoint.every=4", "eval.every=3")), 4, 10, 3, None)
    train._room(prepare(settings("eval.every=3", "eval.keep_best=false")), 0, 10, 3, None)
    assert found == [(2, 1), (2, 3), (3, 4), (2, 1)]


def test_norms_of_the_last_steps_are_known_again(settings: Any) -> None:
    run = train.train(settings())
    prepared = prepare(settings())
    resume = resumable(run / "checkpoints/step-000004", settings(), prepared.fingerprint())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert resume.norms == [row["grad_norm"] for row in rows]
    assert len(resume.norms) == 4


def test_a_gradient_norm_is_unusual_beside_those_before() -> None:
    assert train.unusual(1e9, [1.0] * 19) is None, "too few to tell"
    assert train.unusual(10.0, [1.0] * 19 + [1e6]) is None, "one large one is no measure"
    assert train.unusual(10.1, [1.0] * 20) == "gradient norm 10.1, where the median of the last 20 is 1"
    assert train.unusual(math.nan, []) == "gradients not finite, no update"


@pytest.mark.parametrize(
    ("failure", "code"),
    [(KeyboardInterrupt(), 1), (ValueError("odd"), 1), (OSError(28, "No space left", "metrics.jsonl"), 3)],
    ids=["interrupted", "a defect", "a full disk"],
)
def test_how_a_run_ended_is_left_in_its_folder(
    settings: Any, monkeypatch: pytest.MonkeyPatch, failure: BaseException, code: int
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(Records, "step", fail)
        with pytest.raises((type(failure), StorageFailure)):
            train.train(settings())
    run = Path(settings().output)
    assert json.loads((run / "ended.json").read_text(encoding="utf-8"))["code"] == code
    assert not (run / ".lock").exists()
    assert json.loads((train.train(settings()) / "ended.json").read_text(encoding="utf-8"))["code"] == 0
