"""The training loop; `python -m surgvqa.train RECIPE key=value …`, on its own or under a launcher.

    prepare → resume or begin → for each step: share its questions among the processes, sum the loss over
    micro-batches, divide once, update → now and then evaluate and save → evaluate at the end

Everything that decides a step (its questions, its learning rate, its random numbers) is a function of
the step's number, so a resumed run goes on as if it had never stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from surgvqa import checkpoint, evaluate, hub, letterbox, metrics, model, recipe
from surgvqa.evaluate import attention_of, autocast_of, predict, workers_of
from surgvqa.loss import TreeLoss
from surgvqa.metrics import Prior
from surgvqa.plan import Plan, Tree
from surgvqa.prepare import Prepared, main_first, prepare, processes
from surgvqa.recipe import BadInput, Recipe
from surgvqa.tree import Questions, packs

log = logging.getLogger("surgvqa")

MOST_SKIPPED = 10
"""So many steps in a row without finite gradients end the run."""

RECORDS = ("metrics.jsonl", "eval.jsonl", "trace.jsonl")
"""Files of a run with a line per step or evaluation."""

HARMLESS = (
    "output",
    "log.",
    "eval.",
    "checkpoint.",
    "data.workers",
    "model.attn",
    "batch.tokens_per_micro_batch",
)
"""Keys that may differ between the runs of one experiment: they do not change what is learned."""


class NumericFailure(Exception):
    """Gradients stayed non-finite; the message names the last good checkpoint."""

    exit_code = 5


@dataclass(frozen=True)
class Job:
    """One micro-batch of one process."""

    step: int
    index: int
    count: int
    """Micro-batches in the step, the same on every process."""
    weightless: bool
    """Whether it is here only to keep the processes in step."""


def train(settings: Recipe, *, fresh: bool = False) -> Path:
    """Run a recipe from start, or from its last checkpoint, to end; returns the run's folder.

    Raises BadInput before the model loads for anything that a person must mend.
    """
    accelerator = processes()
    main, world, rank = accelerator.is_main_process, accelerator.num_processes, accelerator.process_index
    _log_as(rank)
    console = Console(quiet=not main)
    run = Path(settings.output)
    main_first(accelerator, lambda: _claim(run))

    # The data, and everything that can be wrong with it.
    prepared = prepare(settings, accelerator, progress=main)
    if main:
        for warning in prepared.warnings:
            log.warning("warning: %s", warning)
    if settings.eval.every and not prepared.dataset.part(settings.eval.split):
        raise BadInput(
            f"eval.every: the {settings.eval.split} part holds no questions to evaluate on; "
            "set eval.every: null, eval.split: test, or data.split"
        )
    questions = prepared.questions("train")
    plan = prepared.plan(questions)
    sets = {
        name: (part, chosen, prepared.plan(chosen))
        for name, part, most in (
            ("during", settings.eval.split if settings.eval.every else None, settings.eval.questions),
            ("final", settings.eval.final, None),
        )
        if part and len(chosen := prepared.questions(part, most))
    }
    attn = attention_of(settings.model.attn, accelerator.device)
    autocast = autocast_of(settings.train.precision)
    if settings.train.precision == "bf16" and accelerator.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    total = settings.total_steps(len(questions))
    checkpoints = run / "checkpoints"
    if settings.model.tune == "lora":
        model.lora_targets(model.skeleton(prepared.folder), settings.model.lora.modules)
    if fresh:
        main_first(accelerator, lambda: _clear(run))
    last = main_first(accelerator, lambda: _resumable(run, settings, prepared))
    start = last[0] if last else 0
    prior = Prior(prepared.dataset.part("train"))
    workers = workers_of(settings.data.workers, accelerator)

    # The model, and what of it trains.
    if last:
        network = evaluate.restore(prepared, last[1])
    else:
        network = _new_model(settings, prepared.folder)
    loss_of = TreeLoss(network, attn=attn, autocast=autocast)
    if settings.train.gradient_checkpointing:
        _recompute_layers(network)
    network.train()
    loss_of = accelerator.prepare(loss_of)
    parameters = dict(model.trainable(network))
    names = {parameter: name for name, parameter in parameters.items()}
    optimizer = _optimizer(settings, parameters, fused=accelerator.device.type == "cuda")
    if last:
        checkpoint.load_optimizer(last[1] / "optimizer.safetensors", optimizer, names)
    if main:
        _keep_until(run, start)
        (run / "recipe.yaml").write_text(settings.dump(), encoding="utf-8")
    for line in banner(settings, prepared, questions, plan, network, accelerator, attn, total, start):
        console.print(line, soft_wrap=True, highlight=False, markup=False)

    def write(folder: Path, step: int) -> None:
        network.save_pretrained(
            folder, **({"save_embedding_layers": False} if settings.model.tune == "lora" else {})
        )
        prepared.chat.save(folder)
        (folder / "recipe.yaml").write_text(settings.dump(), encoding="utf-8")
        checkpoint.save_optimizer(folder / "optimizer.safetensors", optimizer, names)
        state = {"step": step, "data": prepared.fingerprint(), "world": world}
        checkpoint.write_json(folder / "state.json", state)

    def save(step: int) -> None:
        if main:
            checkpoint.save(
                checkpoints, step, lambda folder: write(folder, step), keep=settings.checkpoint.keep
            )
        accelerator.wait_for_everyone()

    def answer(which: str, advance: Callable[[int], None] | None = None) -> list[metrics.Prediction]:
        _, chosen, its_plan = sets[which]
        return predict(
            network,
            chosen,
            its_plan,
            accelerator=accelerator,
            max_new_tokens=settings.eval.max_new_tokens,
            attn=attn,
            autocast=autocast,
            workers=workers,
            advance=advance,
        )

    saved, skipped = start, 0
    evaluate_every = _interval(settings.eval.every, plan.steps_per_epoch) if "during" in sets else None
    best = (checkpoint.best(checkpoints) or {}).get("value", -math.inf)
    with _Records(run, start, total, settings.log.trace, console) as records:
        nats = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        began = time.perf_counter()
        for job, pack in packs(
            questions,
            _jobs(plan, start, total, rank, world),
            workers=workers,
            pin=accelerator.device.type == "cuda",
        ):
            step = job.step
            asked = [question for tree in plan.step(step) for question in tree]
            if job.index == 0:
                # Dropout's numbers depend on the step and the process, so no random state needs saving.
                torch.manual_seed(_seed(settings.train.seed, step, rank))
                weight = float(questions.total_weights[asked].sum())
            pack = (pack.without_weight() if job.weightless else pack).to(accelerator.device)
            at_last = job.index == job.count - 1
            with contextlib.nullcontext() if at_last else accelerator.no_sync(loss_of):
                pack_nats = loss_of(pack)
                # DDP averages over processes; the sum over all of them is what the weight divides.
                (pack_nats * (world / weight)).backward()
            nats += pack_nats.detach().double()
            if not at_last:
                continue

            norm = nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])
            loss = accelerator.reduce(nats, "sum").item() / weight
            finite = math.isfinite(float(norm)) and math.isfinite(loss)
            rate = learning_rate_share(step, total, settings.train.warmup, settings.train.schedule)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            if finite:
                nn.utils.clip_grads_with_norm_(parameters.values(), settings.train.max_grad_norm, norm)
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            skipped = 0 if finite else skipped + 1
            nats.zero_()
            step += 1
            seconds = time.perf_counter() - began
            ids = [questions.examples[question].id for question in asked]
            if not finite:
                log.warning("step %d: gradients not finite, no update; questions %s", step, ", ".join(ids))
                if skipped == MOST_SKIPPED:
                    raise NumericFailure(
                        f"{skipped} steps in a row without finite gradients, the last at step {step}. "
                        f"The last good checkpoint: {checkpoint.newest(checkpoints)[0] or 'none yet'}. "
                        "Look at the questions named above, or lower train.lr"
                    )
            records.step(
                step=step,
                epoch=step / plan.steps_per_epoch,
                loss=loss,
                lr=optimizer.param_groups[0]["lr"],
                grad_norm=float(norm),
                questions=len(asked),
                tokens=sum(plan.tokens(tree) for tree in plan.step(job.step)),
                questions_per_s=len(asked) / seconds,
                seconds=seconds,
                **_peak_memory(accelerator.device),
            )
            records.trace(step, ids, int(questions.answer_tokens[asked].sum()), loss)

            if evaluate_every and (step % evaluate_every == 0 or step == total):
                result = metrics.scores(answer("during"), prior)["overall"]
                records.evaluation(step, sets["during"][0], result)
                if settings.eval.keep_best and result["exact"] > best:
                    best, saved = result["exact"], step
                    save(step)
                    if main:
                        checkpoint.mark_best(checkpoints, step, settings.eval.metric, best)
            if saved != step and (step == total or step % (settings.checkpoint.every or total) == 0):
                save(step)
                saved = step
            began = time.perf_counter()

    if "final" in sets:
        part, chosen, _ = sets["final"]
        folder = checkpoints / f"step-{total:06d}"
        if settings.eval.keep_best and checkpoint.best(checkpoints):
            folder = main_first(accelerator, lambda: evaluate.chosen_checkpoint(checkpoints))
        if folder.name != f"step-{total:06d}":
            # Let go of the trained model first: two may not fit on the device.
            del loss_of, optimizer, parameters, names
            network = None
            accelerator.free_memory()
            network = evaluate.restore(prepared, folder).to(accelerator.device)
        with _bar(console, f"evaluating {part}", len(chosen)) as advance:
            predictions = answer("final", lambda asked: advance(asked * world))
        if main:
            result = evaluate.write(run, part, predictions, prior, {"checkpoint": folder.name})
            evaluate.show(result, run, console)
    console.print(f"run folder: {run}", soft_wrap=True)
    accelerator.end_training()
    return run


def learning_rate_share(step: int, total: int, warmup: float, schedule: str) -> float:
    """The learning rate of 0-based `step` as a share of its peak.

    It rises linearly over the first `warmup` share of all steps, then follows the schedule: cosine
    (Loshchilov & Hutter, 2017, without restarts) and linear reach 0 at `total`.
    """
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, total - rising)
    return {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[schedule]


def banner(
    settings: Recipe,
    prepared: Prepared,
    questions: Questions,
    plan: Plan,
    network: Any,
    accelerator: Accelerator,
    attn: str,
    total: int,
    start: int,
) -> Iterator[str]:
    """What is about to happen, a line at a time."""
    folder, batch, world = prepared.folder, settings.batch, accelerator.num_processes
    revision = f" at {folder.revision}" if folder.revision else ""
    yield f"model       {folder.name}{revision}, {hub.FAMILIES[folder.family]}; tune: {settings.model.tune}"
    for part, (parameters, trains) in model.count(network).items():
        state = "trains" if trains == parameters else "frozen" if not trains else f"{trains:,} train"
        yield f"            {part:<10}{parameters:>16,}  {state}"
    if settings.model.tune == "lora":
        adapted = [
            name.rsplit(".", 1)[-1] for name, part in network.named_modules() if hasattr(part, "lora_A")
        ]
        listed = ", ".join(f"{name} ×{count}" for name, count in Counter(adapted).items())
        yield f"            adapters on {len(adapted)} modules: {listed}"
    device = accelerator.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    backend = torch.distributed.get_backend() if world > 1 else None
    yield f"world       {f'distributed, {world} processes, {backend}' if backend else '1 process'}, {where}"
    trees = [tree for step in range(min(plan.steps_per_epoch, 50)) for tree in plan.step(step)]
    rows = [[question] for tree in trees for question in tree]
    per_tree = sum(map(plan.tokens, trees)) / len(trees)
    as_rows = sum(map(plan.tokens, rows)) / len(trees)
    micro_batches = len(plan.share(plan.step(0), world)[0])
    yield (
        f"batch       {batch.questions} questions per step, at most {batch.questions_per_image} per image; "
        f"{micro_batches} micro-batch{'es' if micro_batches > 1 else ''} of up to "
        f"{batch.tokens_per_micro_batch:,} tokens per process"
    )
    yield f"canvas      {_canvas_line(settings, prepared, folder.factor)}"
    yield (
        f"trees       {len(rows) / len(trees):.1f} questions and {per_tree:,.0f} tokens per tree; "
        f"as one row per question {as_rows:,.0f} ({as_rows / per_tree:.1f}×)"
    )
    tf32 = "on" if torch.get_float32_matmul_precision() != "highest" and device.type == "cuda" else "off"
    compute = "bf16 autocast, fp32 masters" if settings.train.precision == "bf16" else "fp32"
    yield f"precision   {compute}, TF32 {tf32}, attention {attn}"
    parts = {part: len(prepared.dataset.part(part)) for part in ("train", "val", "test")}
    yield "data        " + ", ".join(f"{count:,} {part}" for part, count in parts.items()) + " questions"
    yield f"steps       {plan.steps_per_epoch:,} per epoch, {total:,} in all" + (
        f"; resuming after step {start:,}" if start else ""
    )
    weights = prepared.answer_weights()
    if weights:
        counts = Counter(metrics.normalise(example.answers[0]) for example in questions.examples)
        yield f"answers     {settings.loss.class_weights} class weights"
        for answer, count in counts.most_common(30):
            yield f"            {answer[:40]:<40}{count:>8,}  × {weights[answer]:.3f}"
        if len(counts) > 30:
            yield f"            and {len(counts) - 30:,} rarer answers"


def _canvas_line(settings: Recipe, prepared: Prepared, factor: int) -> str:
    image = settings.image
    if image.mode == "letterbox":
        assert image.size is not None
        side = letterbox.snap(image.size, factor)
        return f"{image.size} → {side}, {side // factor}×{side // factor} = {(side // factor) ** 2} tokens"
    tokens = [canvas.tokens(factor) for canvas in prepared.canvases.values()]
    mean = sum(tokens) / len(tokens)
    return f"native, {min(tokens)} to {max(tokens)} tokens, mean {mean:.0f} (limit {image.max_tokens})"


def _jobs(plan: Plan, start: int, total: int, rank: int, world: int) -> Iterator[tuple[Job, list[Tree]]]:
    """This process's micro-batches of every step to come."""
    for step in range(start, total):
        trees = plan.step(step)
        mine = plan.share(trees, world)[rank]
        for index, micro_batch in enumerate(mine):
            job = Job(step, index, len(mine), weightless=not micro_batch)
            yield job, micro_batch or [trees[0][:1]]


def _seed(*numbers: int) -> int:
    """One seed of several numbers, the same everywhere."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _new_model(settings: Recipe, folder: hub.Folder) -> Any:
    full, lora = settings.model.tune == "full", settings.model.lora
    dtype = torch.float32 if full else autocast_of(settings.train.precision)
    return model.adapt(
        model.build(folder, dtype=dtype or torch.float32, seed=settings.train.seed),
        tune=settings.model.tune,
        train_vision=settings.model.train_vision,
        train_merger=settings.model.train_merger,
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        modules=lora.modules,
        seed=settings.train.seed,
    )


def _recompute_layers(network: Any) -> None:
    """Gradient checkpointing by layer; the reentrant kind fails under DDP."""
    # transformers renamed it in 5.22 and warns about the old name.
    enable = (
        getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
    )
    enable({"use_reentrant": False})


def _optimizer(settings: Recipe, parameters: dict[str, nn.Parameter], fused: bool) -> torch.optim.AdamW:
    """AdamW with a group for each learning rate and decay; each group's `peak` is its own."""
    options = settings.train
    peaks = {
        "vision": options.lr_vision or options.lr,
        "merger": options.lr_merger or options.lr,
        "deepstack": options.lr_merger or options.lr,
    }
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decay = options.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((peaks.get(model.part_of(name), options.lr), decay), []).append(parameter)
    # The language model's group first: its rate is the one that is logged.
    ordered = sorted(groups, key=lambda key: key[0] != options.lr)
    return torch.optim.AdamW(
        [{"params": groups[key], "lr": key[0], "peak": key[0], "weight_decay": key[1]} for key in ordered],
        fused=fused,
    )


def _claim(run: Path) -> None:
    """Make sure that the run's folder can be written."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        probe = run / ".probe"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise BadInput(f"output: {run} cannot be written: {error.strerror}") from None
    checkpoint.remove_leftovers(run / "checkpoints")


def _clear(run: Path) -> None:
    """Remove what a former run left, and nothing else."""
    for name in ("checkpoints", "tensorboard"):
        shutil.rmtree(run / name, ignore_errors=True)
    for name in ("recipe.yaml", *RECORDS, "predictions.jsonl", "scores.json"):
        (run / name).unlink(missing_ok=True)


def _resumable(run: Path, settings: Recipe, prepared: Prepared) -> tuple[int, Path] | None:
    """Step and folder of the checkpoint to go on from. Raises BadInput where it is another experiment's."""
    folder, rejected = checkpoint.newest(run / "checkpoints")
    for problem in rejected:
        log.warning("warning: %s", problem)
    if folder is None:
        if rejected:
            raise BadInput([*rejected, f"{run}: no checkpoint is whole; train anew with --fresh --yes"])
        return None
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    differences = [
        difference
        for difference in recipe.load(folder / "recipe.yaml").differences(settings)
        if not difference.startswith(HARMLESS)
    ]
    if state["data"] != prepared.fingerprint():
        differences.append(
            "the training data: its questions, answers, order or images are not what they were"
        )
    if differences:
        cure = f"{folder} was trained otherwise; choose another output, or start over with --fresh --yes:"
        raise BadInput([cure, *(f"  {difference}" for difference in differences)])
    return int(state["step"]), folder


def _interval(every: float | None, steps_per_epoch: int) -> int | None:
    """`eval.every` in steps."""
    if every is None:
        return None
    return max(1, round(every * steps_per_epoch)) if every <= 1 else round(every)


def _peak_memory(device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        return {}
    return {"peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}


def _keep_until(run: Path, step: int) -> None:
    """Drop the records of steps that will be done again."""
    for name in RECORDS:
        file = run / name
        if file.is_file():
            rows = file.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= step]
            file.write_text("".join(kept), encoding="utf-8")


class _Records:
    """The run's records and its progress bar; silent on all but the main process."""

    def __init__(self, run: Path, start: int, total: int, trace: bool, console: Console) -> None:
        self.run, self.start, self.total, self.console = run, start, total, console
        self.writes = not console.quiet
        self.traces = trace and self.writes
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> _Records:
        if self.writes:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.run / "tensorboard"), purge_step=self.start + 1)
            self.stack.callback(self.board.close)
            self.files = {
                name: self.stack.enter_context((self.run / name).open("a", encoding="utf-8"))
                for name in ("metrics.jsonl", "eval.jsonl", *(["trace.jsonl"] if self.traces else []))
            }
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
            )
            self.progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
            self.stack.enter_context(self.progress)
            self.task = self.progress.add_task("training", total=self.total, completed=self.start, numbers="")
        return self

    def __exit__(self, *failure: object) -> None:
        self.stack.close()

    def step(self, **row: Any) -> None:
        if not self.writes:
            return
        # JSON has no NaN: a step without finite gradients says null.
        _append(self.files["metrics.jsonl"], {k: v if math.isfinite(v) else None for k, v in row.items()})
        for key in row.keys() - {"step", "epoch"}:
            self.board.add_scalar(f"train/{key}", row[key], row["step"])
        numbers = (
            f"loss {row['loss']:.4f}  lr {row['lr']:.2e}  {row['questions_per_s']:.1f} questions/s  "
            f"{row['tokens'] / row['seconds']:,.0f} tokens/s"
        )
        self.progress.update(self.task, completed=row["step"], numbers=numbers)
        # A log file gets a line now and then where a terminal gets a bar.
        regular = row["step"] % max(1, self.total // 25) == 0
        if not self.console.is_terminal and (regular or row["step"] in (self.start + 1, self.total)):
            self.console.print(f"step {row['step']}/{self.total}  {numbers}", highlight=False, soft_wrap=True)

    def trace(self, step: int, ids: Sequence[str], tokens: int, loss: float) -> None:
        if self.traces:
            _append(
                self.files["trace.jsonl"], {"step": step, "ids": ids, "tokens": tokens, "loss": loss.hex()}
            )

    def evaluation(self, step: int, part: str, result: dict[str, Any]) -> None:
        if not self.writes:
            return
        _append(self.files["eval.jsonl"], {"step": step, "split": part, **result})
        self.board.add_scalar(f"{part}/exact", result["exact"], step)
        self.console.print(
            f"step {step}: {part} exact {100 * result['exact']:.1f} % of {result['n']} "
            f"(prior {100 * result['prior']:.1f} %)",
            highlight=False,
        )


def _append(file: TextIO, row: dict[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()


@contextlib.contextmanager
def _bar(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    with Progress(console=console, disable=console.quiet or not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, advance=done)


def _log_as(rank: int) -> None:
    """Messages go to stderr; those of other processes than the main one say whose they are."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    log.handlers = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `surgvqa train` and `python -m surgvqa.train` both take."""
    parser.add_argument("recipe", type=Path, help="recipe file, e.g. recipes/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    parser.add_argument("--fresh", action="store_true", help="start over, deleting what a former run left")
    parser.add_argument("--yes", action="store_true", help="confirm --fresh")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 bad recipe or data, 5 gradients not finite."""
    parser = argparse.ArgumentParser(
        "surgvqa.train", description="Train a recipe; resumes a run that was stopped."
    )
    arguments(parser)
    given = parser.parse_intermixed_args(argv)
    try:
        settings = recipe.load(given.recipe, given.overrides)
        if given.fresh and not given.yes:
            raise BadInput(f"--fresh deletes the run in {settings.output}; add --yes to confirm")
        train(settings, fresh=given.fresh)
    except BadInput as error:
        return recipe.explain(error)
    except NumericFailure as error:
        log.error("%s", error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
