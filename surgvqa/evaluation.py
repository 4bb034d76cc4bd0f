"""A model + part of the data → predictions.jsonl and scores.json.

questions ── answered, some images' at a time ──▶ kept on disk, so that a killed evaluation goes on
          ── scored ──▶ predictions.jsonl, scores.json
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.progress import Progress
from rich.table import Table

from surgvqa import checkpoint, corrupt, datasets, grounding, processes, results, scores
from surgvqa.audit import condensed
from surgvqa.datasets import Example, Region
from surgvqa.decode import greedy, log_probabilities
from surgvqa.endings import (
    NotBegun,
    NumericFailure,
    Preempted,
    Stop,
    Stopped,
    file_errors,
    leave_code,
    run_command,
)
from surgvqa.loss import TreeLoss
from surgvqa.metrics import Prediction
from surgvqa.peers import Peers
from surgvqa.plan import Group, Plan, trees_of
from surgvqa.prepare import Prepared, prepare
from surgvqa.processes import Compute, main_first
from surgvqa.recipe import BadInput, Part, path_argument
from surgvqa.sources import Source, claim, opened
from surgvqa.terminal import Console, forgiving_streams
from surgvqa.tree import Pack, Questions, packs, workers_watched

log = logging.getLogger("surgvqa")

_TREES_AT_ONCE = 16
"""Trees per process that are shared out together; then the processes tell each other their answers, and
whether to stop."""

_NOT_BEGUN = "stopped ({reason}) before the first answer; nothing was lost: the same command starts again"

ABLATIONS = ("black", "shuffle")


class Reply(NamedTuple):
    """An answer as the model gave it."""

    text: str
    """The text as written, with its boxes."""
    probabilities: dict[str, float] | None = None
    """Label → probability among the labels; None where the model wrote its answer."""
    cut: bool = False
    """Whether it was cut at `eval.max_new_tokens`, before the model ended it."""


Answers = dict[int, Reply]
"""Number of a question → its answer."""


def predict(
    network: Any,
    prepared: Prepared,
    questions: Questions,
    *,
    accelerator: Accelerator,
    compute: Compute,
    stop: Stop | None = None,
) -> list[Prediction]:
    """Answer every question once, by all processes together; the same list, in order, on each of them."""
    chunks = answered(network, prepared, questions, accelerator=accelerator, compute=compute, stop=stop)
    return _predictions(prepared, questions, {number: a for chunk in chunks for number, a in chunk.items()})


def answered(
    network: Any,
    prepared: Prepared,
    questions: Questions,
    *,
    accelerator: Accelerator,
    compute: Compute,
    stop: Stop | None = None,
    known: Answers | None = None,
) -> Iterator[Answers]:
    """The answers that are not `known` yet, some at a time, the same on every process; each question once.

    A question that has labels gets the most probable one (of equals the first) and their probabilities. In a
    cascade all of a stage are answered before the next is asked. Raises on all processes alike: Preempted,
    behind a share of the answers, where any was asked to stop, NumericFailure where a model gives NaN, and
    BadInput where an image can no longer be read.
    """
    told: Answers = dict(known or {})
    was_training = network.training
    network.eval()
    try:
        for posed, numbers in _stages(prepared, questions, told):
            left = [place for place, number in enumerate(numbers) if number not in told]
            for chunk in _by_chunks(network, prepared, posed, left, accelerator, compute):
                shares = gather_object([(chunk, bool(stop))])
                for share, _ in shares:
                    if isinstance(share, (BadInput, NumericFailure)):
                        raise share
                found = {numbers[place]: answer for share, _ in shares for place, answer in share.items()}
                told |= found
                yield found
                if any(asked for _, asked in shares) and len(told) < len(questions):
                    raise Preempted("stopped while answering questions; the same command goes on")
    finally:
        network.train(was_training)


def _stages(prepared: Prepared, questions: Questions, told: Answers) -> Iterator[tuple[Questions, list[int]]]:
    """What is to be asked at a time, with each question's number; `told` grows in between."""
    examples = questions.examples
    if prepared.recipe.eval.cascade != "answers":
        yield questions, [*range(len(questions))]
        return
    for stage in sorted({example.stage or 0 for example in examples}):
        texts = {
            examples[number].id: prepared.chat.unspecial(_read(prepared, examples[number], reply)[0])
            for number, reply in told.items()
        }
        numbers = [number for number, example in enumerate(examples) if (example.stage or 0) == stage]
        in_context = datasets.in_context(examples, texts)
        posed = prepared.posed([in_context[number] for number in numbers])
        yield posed.shown(questions.instead, questions.change), numbers


def _by_chunks(
    network: Any,
    prepared: Prepared,
    questions: Questions,
    left: Sequence[int],
    accelerator: Accelerator,
    compute: Compute,
) -> Iterator[Answers | BadInput | NumericFailure]:
    """This process's share of the answers to the questions `left`, or why it has none; as many times on every
    process, up to a failure."""
    device = accelerator.device
    chunks = _shares(prepared.plan(questions, grow=True), left, accelerator)
    jobs = (
        ((chunk, micro_batch), micro_batch, None)
        for chunk, mine in enumerate(chunks)
        for micro_batch in mine
        if micro_batch
    )
    done, found = 0, Answers()
    workers = processes.data_workers(prepared.recipe.data.workers, device)
    try:
        for (chunk, micro_batch), pack in packs(
            questions, jobs, asked=True, workers=workers, cuda=device.type == "cuda"
        ):
            while done < chunk:
                yield found
                done, found = done + 1, Answers()
            asked = [question for tree in micro_batch for question in tree]
            answers = answers_of(network, prepared, questions, asked, pack.to(device), compute)
            found |= zip(asked, answers, strict=True)
    except (BadInput, NumericFailure) as failure:
        yield failure
        return
    for _ in range(done, len(chunks)):
        yield found
        found = Answers()


def _shares(plan: Plan, wanted: Sequence[int], accelerator: Accelerator) -> list[list[list[Group]]]:
    """[chunk][micro-batch] → trees: this process's share of the questions that are wanted."""
    world, rank, known = accelerator.num_processes, accelerator.process_index, set(wanted)
    trees = trees_of(plan.image) if plan.trees else [[question] for question in wanted]
    groups = [own for tree in trees if (own := [question for question in tree if question in known])]
    starts = range(0, len(groups), _TREES_AT_ONCE * world)
    return [plan.share(groups[start : start + starts.step], world)[rank] for start in starts]


def answers_of(
    network: Any,
    prepared: Prepared,
    questions: Questions,
    asked: Sequence[int],
    pack: Pack,
    compute: Compute,
) -> list[Reply]:
    """Return the answer to each question of a pack."""
    if questions.labels is None:
        most = prepared.recipe.eval.max_new_tokens
        written = greedy(
            network,
            pack,
            stop_ids=prepared.chat.stop_ids,
            max_new_tokens=most,
            attn=compute.attn,
            autocast=compute.autocast,
        )
        return [
            Reply(prepared.chat.text(ids, boxes=prepared.grounded), cut=len(ids) == most) for ids in written
        ]
    labels = [questions.labels[question] for question in asked]
    nats = log_probabilities(network, pack, attn=compute.attn, autocast=compute.autocast)
    return [
        Reply(own[int(scores.argmax())], dict(zip(own, scores.softmax(0).tolist(), strict=True)))
        for own, scores in zip(labels, torch.split(nats, [len(own) for own in labels]), strict=True)
    ]


def _read(prepared: Prepared, example: Example, reply: Reply) -> tuple[str, list[Region]]:
    """Return a reply's text without boxes, and its boxes in source pixels."""
    if not prepared.grounded or reply.probabilities is not None:
        return reply.text, []
    canvases = [prepared.canvases[image.key] for image in example.images]
    text, found = grounding.parse_answer(reply.text, len(canvases), prepared.reads_in_place(example))
    return text, [grounding.in_source(region, canvases[region.image]) for region in found]


def _predictions(prepared: Prepared, questions: Questions, answers: Answers) -> list[Prediction]:
    return [
        prediction_of(prepared, example, answers[number]) for number, example in enumerate(questions.examples)
    ]


def prediction_of(prepared: Prepared, example: Example, reply: Reply) -> Prediction:
    """Return the reply as a line of predictions.jsonl."""
    canvases = [prepared.canvases[image.key] for image in example.images]
    text, found = _read(prepared, example, reply)
    expected = [
        grounding.source_pixels(region, canvases[region.image].source_size) for region in example.regions
    ]
    with_boxes = bool(found or expected)
    return Prediction.of(
        example,
        text,
        probabilities=reply.probabilities,
        cut=reply.cut,
        regions=grounding.as_rows(found) if with_boxes else None,
        reference_regions=grounding.as_rows(expected) if with_boxes else None,
        image_sizes=[list(canvas.source_size) for canvas in canvases] if with_boxes else None,
    )


class Begun:
    """Answers on disk as they come, so that an evaluation that was killed goes on; removed at its end."""

    def __init__(self, file: Path, of: str, questions: Questions) -> None:
        """`of` tells what was asked and how; the answers of anything else are not taken."""
        self.file, self.of = file, of
        self.numbers = {example.id: number for number, example in enumerate(questions.examples)}
        self.ids = [example.id for example in questions.examples]

    def known(self) -> Answers:
        """Those of a former start. What a crash left half written is cut off."""
        # Lines of former versions have no "cut": ask those questions again.
        rows = [row for row in results.rows(self.file) if row.get("of") == self.of and "cut" in row]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text(self.file, "".join(map(_line, rows)))
        return {
            self.numbers[row["id"]]: Reply(row["answer"], row["probabilities"], row["cut"]) for row in rows
        }

    def keep(self, answers: Answers) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            for number, reply in answers.items():
                # Each line tells whose it is: another evaluation of the run may write here, too.
                row = {"of": self.of, "id": self.ids[number], "answer": reply.text}
                file.write(_line({**row, "probabilities": reply.probabilities, "cut": reply.cut}))

    def end(self) -> None:
        self.file.unlink(missing_ok=True)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def examine(
    network: Any,
    prepared: Prepared,
    part: Part,
    questions: Questions,
    source: Source,
    *,
    accelerator: Accelerator,
    compute: Compute,
    console: Console,
    stop: Stop | None = None,
    variant: str = "",
) -> dict[str, Any]:
    """Answer a part's questions with the model of `source`; write and print what came of it."""
    settings, main, base = prepared.recipe, accelerator.is_main_process, prepared.base
    files = source.files(part, variant)
    begun = Begun(
        files[0].with_name(f"{files[0].name}.partial"),
        _fingerprint(prepared, part, source, variant) if main else "",
        questions,
    )
    answers = main_first(accelerator, begun.known)
    if main and answers:
        console.print(f"going on after {len(answers)} of {len(questions)} questions")
    chunks = answered(
        network, prepared, questions,
        accelerator=accelerator, compute=compute, stop=stop, known=answers,
    )  # fmt: skip
    what = " ".join(filter(None, ["evaluating", part, variant]))
    with _bar(console, what, len(answers), len(questions)) as advance:
        for chunk in chunks:
            answers |= chunk
            main_first(accelerator, functools.partial(begun.keep, chunk))
            advance(len(chunk))
    predictions = _predictions(prepared, questions, answers)
    found = main_first(accelerator, lambda: scores.score(predictions, prepared.prior()))
    model = {"name": settings.model.name, "revision": prepared.folder.revision}
    environment = processes.environment(accelerator)
    result = {**found, "split": part, "model": model, "environment": environment}
    if source.checkpoint:
        result |= {"checkpoint": source.checkpoint.name, "manifest": source.weights}
    if base:
        result["digests"] = base.parts()
    if prepared.base_changes:
        result["accepted_changes"] = list(prepared.base_changes)
    if variant:
        result["variant"] = variant
    if settings.data.on_error == "skip":
        result["skipped"] = prepared.skipped_counts
    if source.overrides:
        result["overrides"] = list(source.overrides)

    def write() -> None:
        files[1].unlink(missing_ok=True)  # those of before are not beside these answers, whatever happens
        checkpoint.write_text(files[0], "".join(_line(prediction.row()) for prediction in predictions))
        checkpoint.write_json(files[1], result)
        begun.end()
        _show(result, files, console)

    main_first(accelerator, write)
    return result


def _fingerprint(prepared: Prepared, part: Part, source: Source, variant: str) -> str:
    """Digest of all that decides an answer; not of how many processes and questions share the work."""
    settings = prepared.recipe.model_dump(mode="json")
    # The seed draws shuffled images and tiny models' weights.
    conditions = [
        source.weights, prepared.base.parts() if prepared.base else None,
        part, variant, prepared.fingerprint(part),
        {key: value for key, value in settings["model"].items() if key not in ("name", "revision")},
        settings["prompt"], settings["image"],
        settings["train"]["precision"], settings["train"]["seed"], settings["data"]["labels"],
        {key: settings["eval"][key] for key in ("answers", "max_new_tokens", "cascade")},
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()[:16]


def _show(result: Mapping[str, Any], files: Sequence[Path], console: Console) -> None:
    trained = f" by {result['checkpoint']}" if "checkpoint" in result else ""
    variant = f", images: {result['variant']}" if "variant" in result else ""
    table = Table(
        title=f"exact match on {result['split']}{trained}{variant}",
        caption="prior: each question's most frequent answer in train",
    )
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
    if cut := (overall := result["overall"]).get("cut"):
        console.print(f"{cut} of {overall['n']} answers cut at eval.max_new_tokens", highlight=False)
    if "iou" in overall:
        console.print(
            f"{overall['boxes']} questions with boxes: "
            f"mean IoU {overall['iou']:.3f}, AP50 {overall['ap50']:.3f}"
        )
    console.print(f"written: {files[0]}, {files[1]}", soft_wrap=True)


def evaluate(
    source: str | Path,
    split: Part | None = None,
    *,
    variant: str = "",
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    accept_changes: bool = False,
) -> dict[str, Any]:
    """Answer and score a part of the data; what `surgvqa evaluate` does. Returns what scores.json holds.

    `source` is a run's folder, one of its checkpoints, or a model's name or folder, which then needs a
    `recipe` file. `variant` is what is done to the images: nothing, `black`, `shuffle`, or a corruption such
    as `smoke:3`. `overrides` are recipe keys to change, as `key=value`; `output` is another folder for the
    results. A base model that is not what a checkpoint was trained on is refused, unless `accept_changes`.
    Raises BadInput with all that a person must mend.
    """
    found = opened(source, recipe_file=recipe, overrides=overrides, output=output)
    return _evaluate(found, split, [variant], accept_changes=accept_changes)[0]


def _evaluate(
    source: Source,
    part: Part | None,
    variants: Sequence[str],
    stop: Stop | None = None,
    accept_changes: bool = False,
) -> list[dict[str, Any]]:
    """The scores of each variant, by a model that is loaded once."""
    accelerator = processes.start()
    with Peers(accelerator, source.settings.train.peer_timeout, stop=stop):
        found = _evaluated(source, part, variants, stop, accelerator, accept_changes)
    processes.stop(accelerator)
    return found


def _evaluated(
    source: Source,
    part: Part | None,
    variants: Sequence[str],
    stop: Stop | None,
    accelerator: Accelerator,
    accept_changes: bool,
) -> list[dict[str, Any]]:
    main, settings = accelerator.is_main_process, source.settings
    if stop is not None and main:
        stop.last_words = log.error
    compute = processes.compute(settings.train.precision, settings.model.attn, accelerator.device)
    part = part or settings.eval.final or "test"
    prepared = prepare(
        settings, accelerator, evaluated=[part], progress=main,
        checkpoint=source.checkpoint, accept_changes=accept_changes,
    ).identified(accelerator)  # fmt: skip
    if not prepared.dataset.part(part):
        raise BadInput(f"{source.run}: the data has no {part} part to evaluate; choose another with --split")
    questions = prepared.questions(part, asked=True)
    prepared.plan(questions)  # finds what cannot fit before the model loads
    for variant in variants:
        prepared.varied(questions, variant)  # finds what cannot be done, too
    main_first(accelerator, lambda: claim(source, part, variants, questions.examples, prepared.base))
    if main:
        if prepared.base_changes:
            log.warning("warning: the base model changed: %s", "; ".join(prepared.base_changes))
        if source.unread:
            words, asked = ", ".join(source.unread), f"all {len(questions):,} questions are asked"
            log.warning("warning: %s: is for training and changes nothing here; %s", words, asked)
        left_out = condensed(replace(p, what=f"{p.what}; left out") for p in prepared.skipped)
        for warning in (*left_out, *prepared.too_short([part])):
            log.warning("warning: %s", warning)
    network = prepared.network(source.checkpoint) if source.checkpoint else prepared.published()
    network = network.to(accelerator.device)
    if stop is not None:
        stop.start_together(lambda: processes.anywhere(accelerator, False))
    return [
        examine(
            network,
            prepared,
            part,
            prepared.varied(questions, variant),
            source,
            accelerator=accelerator,
            compute=compute,
            console=Console(quiet=not main),
            stop=stop,
            variant=variant,
        )
        for variant in variants
    ]


@torch.inference_mode()
def loss_of_part(
    loss: TreeLoss,
    prepared: Prepared,
    questions: Questions,
    *,
    accelerator: Accelerator,
    stop: Stop | None = None,
) -> float:
    """Mean cross entropy of the reference answers (`answers[0]`) in nats, by all processes together.

    Each question counts once, weighted as the recipe's `loss.per` says, with the pictures that evaluation
    shows and without dropout. `loss` is the network's own, not one that DDP wraps. Raises Preempted, on all
    processes together, where any was asked to stop.
    """
    device = accelerator.device
    jobs = (
        ((index == len(mine) - 1, bool(micro_batch)), micro_batch or [[0]], None)
        for mine in _shares(prepared.plan(questions), range(len(questions)), accelerator)
        for index, micro_batch in enumerate(mine)
    )
    nats = torch.zeros((), dtype=torch.float64, device=device)
    was_training = loss.model.training
    loss.model.eval()
    try:
        workers = processes.data_workers(prepared.recipe.data.workers, device)
        for (last, counts), pack in packs(questions, jobs, workers=workers, cuda=device.type == "cuda"):
            nats += loss(pack.to(device)).double() * counts
            if last and stop is not None and processes.anywhere(accelerator, bool(stop)):
                raise Preempted("stopped while evaluating; the same command goes on")
    finally:
        loss.model.train(was_training)
    return float(accelerator.reduce(nats, "sum")) / float(questions.total_weights.sum())


@contextlib.contextmanager
def _bar(console: Console, what: str, done: int, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, ten lines in a log."""
    with Progress(console=console, disable=console.quiet or not console.is_terminal) as progress:
        task = progress.add_task(what, completed=done, total=total)

        def advance(more: int) -> None:
            nonlocal done
            tenths, done = 10 * done // total, done + more
            progress.update(task, completed=done)
            if not console.is_terminal and 10 * done // total > tenths and done < total:
                console.print(f"{what}: {done:,}/{total:,} questions", highlight=False)

        yield advance


def main(argv: Sequence[str] | None = None) -> int:
    """Returns an exit code of surgvqa/endings.py."""
    parser = argparse.ArgumentParser(
        "surgvqa evaluate",
        description="Answer and score a part of the data with a trained or a published model.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        type=lambda text: str(path_argument(text)) if text.startswith(("~", "$")) else text,
        help="a run's folder, one of its checkpoints, or with --recipe a model's name or folder",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    parser.add_argument("--split", choices=["train", "val", "test"], help="default: the recipe's eval.final")
    parser.add_argument(
        "--recipe", type=path_argument, help="which data to ask a published model about, and how"
    )
    parser.add_argument(
        "--ablate",
        action="append",
        choices=ABLATIONS,
        help="show black pictures, or those of other questions",
    )
    parser.add_argument(
        "--corrupt",
        action="append",
        metavar="KIND:LEVEL",
        help=f"spoil the pictures: {', '.join(corrupt.KINDS)}, from 1 to 5, or 1..5 for all of them",
    )
    parser.add_argument("--out", type=path_argument, help="folder for the results (default: the run's)")
    parser.add_argument(
        "--accept-changes", action="store_true", help="go on though the base model changed, and record how"
    )
    forgiving_streams()
    given = parser.parse_intermixed_args(argv)

    def work() -> None:
        spoiled = [each.name for text in given.corrupt or () for each in corrupt.parse(text)]
        variants = list(dict.fromkeys([*(given.ablate or ()), *spoiled])) or [""]
        source = opened(given.source, recipe_file=given.recipe, overrides=given.overrides, output=given.out)
        try:
            with file_errors(source.run), Stop(start=_NOT_BEGUN) as stop, workers_watched():
                _evaluate(source, given.split, variants, stop, given.accept_changes)
        except Stopped as error:
            raise NotBegun(str(error)) from None

    return leave_code(run_command(work))
