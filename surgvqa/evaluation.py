"""Checkpoint + part of the data → predictions.jsonl and scores.json."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.progress import Progress
from rich.table import Table

from surgvqa import checkpoint, grounding, processes, recipe, scores
from surgvqa.audit import condensed
from surgvqa.datasets import Example, Region
from surgvqa.decode import greedy, log_probabilities
from surgvqa.endings import PeerLost, Preempted, Stop
from surgvqa.metrics import Prediction
from surgvqa.plan import trees_of
from surgvqa.prepare import Prepared, prepare
from surgvqa.processes import Compute, main_first
from surgvqa.recipe import BadInput, Part
from surgvqa.terminal import Console
from surgvqa.tree import Pack, Questions, packs, workers_watched

log = logging.getLogger("surgvqa")

_TREES_AT_ONCE = 16
"""Trees per process that are shared out together; then the processes ask each other whether to stop."""

Probabilities = dict[str, float] | None
"""Label → probability among the labels; None where the model wrote its answer."""


def predict(
    network: Any,
    prepared: Prepared,
    questions: Questions,
    *,
    accelerator: Accelerator,
    compute: Compute,
    stop: Stop | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Prediction]:
    """Answer every question once, by all processes together; the same list, in order, on each of them.

    A question that has labels gets the most probable one (of equals the first) and their probabilities.
    `advance` is called with the number of questions of each finished micro-batch of this process.
    """
    settings, world, device = prepared.recipe, accelerator.num_processes, accelerator.device
    plan = prepared.plan(questions)
    groups = trees_of(plan.image) if plan.trees else [[question] for question in range(len(questions))]
    starts = range(0, len(groups), _TREES_AT_ONCE * world)
    jobs = (
        ((chunk, micro_batch), micro_batch, None)
        for chunk, start in enumerate(starts)
        for micro_batch in plan.share(groups[start : start + starts.step], world)[accelerator.process_index]
        if micro_batch
    )
    chunks_done = 0

    def agree(chunk: int) -> None:
        """All processes come to the end of each chunk, and leave together if any was asked to stop."""
        nonlocal chunks_done
        while chunks_done < chunk:
            chunks_done += 1
            if stop is None or chunks_done == len(starts):  # with all answers there, they count
                continue
            if processes.anywhere(accelerator, bool(stop)):
                network.train(was_training)
                raise Preempted("stopped while answering questions; the same command begins them again")

    was_training = network.training
    network.eval()
    answered: list[tuple[int, str, Probabilities]] = []
    workers = processes.data_workers(settings.data.workers, device)
    for (chunk, micro_batch), pack in packs(
        questions, jobs, asked=True, workers=workers, cuda=device.type == "cuda"
    ):
        agree(chunk)
        asked = [question for tree in micro_batch for question in tree]
        answers = answers_of(network, prepared, questions, asked, pack.to(device), compute)
        answered += [(number, *answer) for number, answer in zip(asked, answers, strict=True)]
        advance(len(asked))
    agree(len(starts))
    network.train(was_training)
    return [
        prediction_of(prepared, questions.examples[number], answer, probabilities)
        for number, answer, probabilities in sorted(gather_object(answered), key=lambda row: int(row[0]))
    ]


def answers_of(
    network: Any,
    prepared: Prepared,
    questions: Questions,
    asked: Sequence[int],
    pack: Pack,
    compute: Compute,
) -> list[tuple[str, Probabilities]]:
    """The answer of each question of a pack, and where it was chosen among labels their probabilities."""
    if questions.labels is None:
        written = greedy(
            network,
            pack,
            stop_ids=prepared.chat.stop_ids,
            max_new_tokens=prepared.recipe.eval.max_new_tokens,
            attn=compute.attn,
            autocast=compute.autocast,
        )
        return [(prepared.chat.text(ids, boxes=prepared.grounded), None) for ids in written]
    labels = [questions.labels[question] for question in asked]
    nats = log_probabilities(network, pack, attn=compute.attn, autocast=compute.autocast)
    return [
        (own[int(scores.argmax())], dict(zip(own, scores.softmax(0).tolist(), strict=True)))
        for own, scores in zip(labels, torch.split(nats, [len(own) for own in labels]), strict=True)
    ]


def prediction_of(
    prepared: Prepared, example: Example, answer: str, probabilities: Probabilities
) -> Prediction:
    canvases = [prepared.canvases[image.key] for image in example.images]
    found: list[Region] = []
    if prepared.grounded and probabilities is None:
        answer, found = grounding.parse_answer(answer, len(canvases))
        found = [grounding.in_source(region, canvases[region.image]) for region in found]
    expected = [
        grounding.source_pixels(region, canvases[region.image].source_size) for region in example.regions
    ]
    with_boxes = bool(found or expected)
    return Prediction(
        id=example.id,
        image=example.image_key,
        group=example.group,
        question=example.question,
        question_type=example.question_type,
        references=list(example.answers),
        answer=answer,
        probabilities=probabilities,
        regions=grounding.as_rows(found) if with_boxes else None,
        reference_regions=grounding.as_rows(expected) if with_boxes else None,
        image_sizes=[list(canvas.source_size) for canvas in canvases] if with_boxes else None,
    )


def examine(
    network: Any,
    prepared: Prepared,
    part: Part,
    questions: Questions,
    folder: Path,
    *,
    run: Path,
    accelerator: Accelerator,
    compute: Compute,
    console: Console,
    stop: Stop | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Answer a part's questions with the model of the checkpoint `folder`; write and print what came of it.

    `overrides` are recipe keys that were changed for it, which the scores record.
    """
    with _bar(console, f"evaluating {part}", len(questions)) as advance:
        predictions = predict(
            network,
            prepared,
            questions,
            accelerator=accelerator,
            compute=compute,
            stop=stop,
            advance=lambda done: advance(done * accelerator.num_processes),
        )
    found = main_first(accelerator, lambda: scores.score(predictions, prepared.prior()))
    result = {**found, "split": part, "checkpoint": folder.name}
    if prepared.recipe.data.on_error == "skip":
        result["skipped"] = prepared.skipped_counts
    if overrides:
        result["overrides"] = list(overrides)
    if accelerator.is_main_process:
        lines = (json.dumps(prediction.row(), ensure_ascii=False) + "\n" for prediction in predictions)
        # What the run is judged by keeps its names; another part has its own beside them.
        other = "" if part == (prepared.recipe.eval.final or "test") else f".{part}"
        files = run / f"predictions{other}.jsonl", run / f"scores{other}.json"
        checkpoint.write_text(files[0], "".join(lines))
        checkpoint.write_json(files[1], result)
        _show(result, files, console)
    return result


def _show(result: Mapping[str, Any], files: tuple[Path, Path], console: Console) -> None:
    table = Table(title=f"exact match on {result['split']}, and the prior: each question's majority answer")
    table.add_column("question type")
    for heading in ("questions", "exact %", "95 % interval", "prior %"):
        table.add_column(heading, justify="right")
    rows = scores.table(result)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for mark, meaning in scores.MARKS.items():
        if any(mark in row[1] for row in rows):
            console.print(f"{mark} {meaning}")
    if "iou" in (overall := result["overall"]):
        console.print(
            f"{overall['boxes']} questions with boxes: "
            f"mean IoU {overall['iou']:.3f}, AP50 {overall['ap50']:.3f}"
        )
    console.print(f"written: {files[0]}, {files[1]}", soft_wrap=True)


def evaluate(run: str | Path, part: Part | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What `surgvqa evaluate` does: a run's best checkpoint, else its newest; returns the scores.

    The recipe is the one frozen in the checkpoint. Raises BadInput where the folder holds no run or no
    checkpoint that verifies.
    """
    run = Path(run)
    accelerator = processes.start()
    folder = main_first(accelerator, lambda: checkpoint.chosen(run))
    settings = checkpoint.recipe_of(folder, overrides)
    processes.check_device(accelerator.device, settings.model.name)
    compute = processes.compute(settings.train.precision, settings.model.attn, accelerator.device)
    part = part or settings.eval.final or "test"
    prepared = prepare(settings, accelerator, evaluated=[part], progress=accelerator.is_main_process)
    if not prepared.dataset.part(part):
        raise BadInput(f"{run}: the data has no {part} part to evaluate; choose another with --split")
    questions = prepared.questions(part, asked=True)
    prepared.plan(questions)  # finds what cannot fit before the model loads
    if accelerator.is_main_process:
        for warning in condensed(replace(p, what=f"{p.what}; left out") for p in prepared.skipped):
            log.warning("warning: %s", warning)
    network = prepared.network(folder).to(accelerator.device)
    result = examine(
        network,
        prepared,
        part,
        questions,
        folder,
        run=run,
        accelerator=accelerator,
        compute=compute,
        console=Console(quiet=not accelerator.is_main_process),
        overrides=overrides,
    )
    processes.stop(accelerator)
    return result


@contextlib.contextmanager
def _bar(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    with Progress(console=console, disable=console.quiet or not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, advance=done)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "surgvqa evaluate", description="Answer and score a part of a run's data."
    )
    parser.add_argument("run", type=Path, help="output folder of a training run")
    parser.add_argument("--split", choices=["train", "val", "test"], help="default: the recipe's eval.final")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    arguments = parser.parse_intermixed_args(argv)
    try:
        with workers_watched():
            evaluate(arguments.run, arguments.split, arguments.overrides)
    except BadInput as error:
        return recipe.explain(error)
    except PeerLost as error:
        log.error("%s", error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
