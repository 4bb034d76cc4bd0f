"""Checkpoint + part of the data → predictions.jsonl and scores.json; `python -m surgvqa.evaluate RUN`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from rich.table import Table

from surgvqa import checkpoint, metrics, model, recipe
from surgvqa.decode import greedy
from surgvqa.metrics import Prediction, Prior
from surgvqa.plan import Plan, trees_of
from surgvqa.prepare import Prepared, prepare, processes
from surgvqa.recipe import BadInput, Part
from surgvqa.tree import Questions, packs

_TREES_AT_ONCE = 64
"""Trees per process that are shared out together; bounds the time that takes."""


def predict(
    network: Any,
    questions: Questions,
    plan: Plan,
    *,
    accelerator: Accelerator,
    max_new_tokens: int,
    attn: str,
    autocast: torch.dtype | None,
    workers: int = 0,
    advance: Callable[[int], None] | None = None,
) -> list[Prediction]:
    """Answer every question once, by all processes together; the same list, in order, on each of them.

    `advance` is called with the number of questions of each finished micro-batch of this process.
    """
    trees = trees_of(plan.image)
    if not plan.trees:
        trees = [[question] for tree in trees for question in tree]
    chunk = _TREES_AT_ONCE * accelerator.num_processes
    jobs = (
        (micro_batch, micro_batch)
        for start in range(0, len(trees), chunk)
        for micro_batch in plan.share(trees[start : start + chunk], accelerator.num_processes)[
            accelerator.process_index
        ]
        if micro_batch
    )
    was_training = network.training
    network.eval()
    answered: list[tuple[int, str]] = []
    device = accelerator.device
    for micro_batch, pack in packs(questions, jobs, asked=True, workers=workers, pin=device.type == "cuda"):
        asked = [question for tree in micro_batch for question in tree]
        answers = greedy(
            network,
            pack.to(device),
            stop_ids=questions.chat.stop_ids,
            max_new_tokens=max_new_tokens,
            attn=attn,
            autocast=autocast,
        )
        answered += zip(asked, map(questions.chat.text, answers), strict=True)
        if advance:
            advance(len(asked))
    network.train(was_training)
    return [_prediction(questions, number, answer) for number, answer in sorted(gather_object(answered))]


def _prediction(questions: Questions, number: int, answer: str) -> Prediction:
    example = questions.examples[number]
    return Prediction(
        id=example.id,
        image=example.image_key,
        group=example.group,
        question=example.question,
        question_type=example.question_type,
        references=list(example.answers),
        answer=answer,
    )


def write(
    folder: Path, part: Part, predictions: Sequence[Prediction], prior: Prior, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """predictions.jsonl and scores.json in a run's folder; returns the scores. `facts` are added to them."""
    result = {**metrics.scores(predictions, prior), "split": part, **facts}
    lines = [json.dumps(prediction.row(), ensure_ascii=False) for prediction in predictions]
    aside = folder / ".predictions.jsonl.tmp"
    aside.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    aside.replace(folder / "predictions.jsonl")
    checkpoint.write_json(folder / "scores.json", result)
    return result


def show(result: Mapping[str, Any], folder: Path, console: Console) -> None:
    """Scores as a table, and where everything is."""
    table = Table(title=f"{result['split']}: exact match against the majority answer of each question")
    table.add_column("question type")
    for heading in ("questions", "exact %", "prior %"):
        table.add_column(heading, justify="right")
    for row in metrics.table(result):
        table.add_row(*row)
    console.print(table)
    console.print(f"written: {folder / 'predictions.jsonl'}, {folder / 'scores.json'}", soft_wrap=True)


def autocast_of(precision: str) -> torch.dtype | None:
    """The type to compute in for a recipe's `train.precision`."""
    return torch.bfloat16 if precision == "bf16" else None


def attention_of(attn: str, device: torch.device) -> str:
    """`model.attn` with `auto` decided. Raises BadInput where the device has no such kernel."""
    if attn == "flex" and device.type != "cuda":
        raise BadInput("model.attn: flex needs a CUDA GPU; leave it at auto")
    return attn if attn != "auto" else "flex" if device.type == "cuda" else "sdpa"


def restore(prepared: Prepared, folder: Path) -> Any:
    """The model of a checkpoint, ready to answer or to train on."""
    settings = prepared.recipe.model
    lora = settings.lora
    dtype = torch.float32 if settings.tune == "full" else autocast_of(prepared.recipe.train.precision)
    network = model.build(
        prepared.folder,
        dtype=dtype or torch.float32,
        seed=prepared.recipe.train.seed,
        weights=folder if settings.tune == "full" else None,
    )
    return model.adapt(
        network,
        tune=settings.tune,
        train_vision=settings.train_vision,
        train_merger=settings.train_merger,
        rank=lora.rank,
        alpha=lora.alpha,
        modules=lora.modules,
        adapter=folder if settings.tune == "lora" else None,
    )


def evaluate(run: Path, part: Part | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluate a run's best checkpoint, else its newest, as `surgvqa evaluate` does; returns the scores.

    Raises BadInput where the folder holds no run or no checkpoint that verifies.
    """
    accelerator = processes()
    console = Console(quiet=not accelerator.is_main_process)
    if not (run / "recipe.yaml").is_file():
        raise BadInput(f"{run}: no recipe.yaml here; give the output folder of a training run")
    settings = recipe.load(run / "recipe.yaml", overrides)
    folder = chosen_checkpoint(run / "checkpoints")
    prepared = prepare(settings, accelerator)
    part = part or settings.eval.final or "test"
    questions = prepared.questions(part)
    if not len(questions):
        raise BadInput(f"{run}: the data has no {part} part to evaluate")
    network = restore(prepared, folder).to(accelerator.device)
    predictions = predict(
        network,
        questions,
        prepared.plan(questions),
        accelerator=accelerator,
        max_new_tokens=settings.eval.max_new_tokens,
        attn=attention_of(settings.model.attn, accelerator.device),
        autocast=autocast_of(settings.train.precision),
        workers=workers_of(settings.data.workers, accelerator),
    )
    result: dict[str, Any] = {}
    if accelerator.is_main_process:
        prior = Prior(prepared.dataset.part("train"))
        result = write(run, part, predictions, prior, {"checkpoint": folder.name})
        show(result, run, console)
    accelerator.end_training()
    return result


def chosen_checkpoint(root: Path) -> Path:
    """The best checkpoint, else the newest that verifies. Raises BadInput where there is none."""
    if marked := checkpoint.best(root):
        folder = root / f"step-{marked['step']:06d}"
        if not checkpoint.verify(folder):
            return folder
    newest, rejected = checkpoint.newest(root)
    if newest is None:
        raise BadInput(rejected or f"{root}: no checkpoint here; has the run saved one yet?")
    return newest


def workers_of(asked: int | None, accelerator: Accelerator) -> int:
    """Data workers of this process: as asked, else one per core beyond its own, at most 8; none on CPU."""
    if asked is not None:
        return asked
    if accelerator.device.type == "cpu":
        return 0
    import os

    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(8, len(os.sched_getaffinity(0)) // local - 1))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "surgvqa evaluate", description="Answer and score a part of a run's data."
    )
    parser.add_argument("run", type=Path, help="output folder of a training run")
    parser.add_argument("--split", choices=["train", "val", "test"], help="default: the recipe's eval.final")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    arguments = parser.parse_intermixed_args(argv)
    try:
        evaluate(arguments.run, arguments.split, arguments.overrides)
    except BadInput as error:
        return recipe.explain(error)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
