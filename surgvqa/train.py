"""The training loop; `python -m surgvqa.train RECIPE key=value …`, on its own or under a launcher.

    prepare → resume or begin → for each step: share its questions among the processes, sum the loss over
    micro-batches, divide once, update → now and then evaluate and save → evaluate at the end

Everything that decides a step (its questions, its learning rate, its random numbers) is a function of
the step's number, so a resumed run goes on as if it had never stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from surgvqa import checkpoint, evaluation, hub, memory, model, processes, recipe
from surgvqa.banner import banner, example
from surgvqa.endings import (
    NOT_BEGUN,
    PEER_LOST,
    NotBegun,
    NumericFailure,
    Preempted,
    Stop,
    Stopped,
    leave_code,
    run_command,
)
from surgvqa.flops import Speed
from surgvqa.loss import TreeLoss
from surgvqa.peers import Peers
from surgvqa.plan import Group, Plan
from surgvqa.prepare import Prepared, prepare
from surgvqa.processes import Compute, main_first
from surgvqa.recipe import BadInput, Recipe, path_argument
from surgvqa.results import OPTIMIZER, RECIPE
from surgvqa.run import (
    RECENT,
    Records,
    Resume,
    clear,
    end,
    first_weights,
    identity,
    newest_whole,
    owned,
    record_changes,
    record_skipped,
    record_start,
    resumable,
)
from surgvqa.sources import Source
from surgvqa.terminal import Console, forgiving_streams
from surgvqa.tree import Questions, packs, workers_watched
from surgvqa.validation import Validation

log = logging.getLogger("surgvqa")

MOST_SKIPPED = 10
"""So many steps in a row without finite gradients end the run."""

SPIKE, KNOWN = 10, 20
"""A gradient norm is unusual if so many times the median of the recent ones, once there are KNOWN."""


@dataclass(frozen=True)
class Job:
    """One micro-batch of one process."""

    last: bool
    """Whether the step's update follows."""
    share: float
    """1, or 0 where it is here only to keep the processes in step."""


def train(settings: Recipe, *, fresh: bool = False, accept_changes: bool = False) -> Path:
    """Run a recipe from start, or from its last checkpoint, to end; returns the run's folder.

    Raises BadInput before the model loads for anything that a person must mend, else one of the endings
    of surgvqa/endings.py, on all processes alike.
    """
    try:
        with Stop(settings.train.max_hours, start=NOT_BEGUN) as stop:
            return _run(settings, stop, fresh=fresh, accept_changes=accept_changes)
    except Stopped as error:
        raise NotBegun(str(error)) from None


def _run(settings: Recipe, stop: Stop, *, fresh: bool, accept_changes: bool) -> Path:
    """Train as `train` says. Raises Stopped if `stop` is asked before the first step."""
    run, ending = Path(settings.output), None
    lost = partial(end, run, PEER_LOST)
    accelerator = processes.start()
    with (
        owned(run, accelerator, stop) as ended,
        Peers(accelerator, settings.train.peer_timeout, lost, stop) as peers,
    ):
        try:
            with workers_watched():
                ended += [_train(settings, run, fresh, accept_changes, accelerator, stop, peers)]
        except Preempted as error:
            ending = Preempted(str(error))  # without the frames, which hold the wrapped model
            stop.obeyed()
        processes.stop(accelerator)
        if ending:
            raise ending
    return run


def _train(
    settings: Recipe,
    run: Path,
    fresh: bool,
    accept_changes: bool,
    accelerator: Accelerator,
    stop: Stop,
    peers: Peers,
) -> str:
    """Train in the run's folder; return how the run ended, for ended.json."""
    main, world, device = accelerator.is_main_process, accelerator.num_processes, accelerator.device
    console = Console(quiet=not main)

    # The data, and everything that can be wrong with it.
    compute = processes.compute(settings.train.precision, settings.model.attn, device)
    # A run that resumes needs no `model.adapter`: its own checkpoint holds all weights.
    going_on = None if fresh else main_first(accelerator, lambda: newest_whole(run))
    begin = None if going_on else main_first(accelerator, lambda: first_weights(settings))
    prepared = prepare(
        settings, accelerator, progress=main, checkpoint=going_on or begin, accept_changes=accept_changes
    ).identified(accelerator)
    questions = prepared.questions("train")
    plan = prepared.plan(questions)
    validation = Validation(prepared) if settings.eval.every else None
    final = None
    if settings.eval.final and prepared.dataset.part(settings.eval.final):
        final = prepared.questions(settings.eval.final, asked=True)
        prepared.plan(final)
    total = settings.train.max_steps or settings.train.epochs * plan.steps_per_epoch
    if main:
        for warning in (*prepared.warnings, *prepared.too_short(settings.eval.parts)):
            log.warning("warning: %s", warning)
        for line in example(questions):  # now, since a large model takes minutes to load
            console.print(line, soft_wrap=True, highlight=False, markup=False)

    # Where to begin, and the model.
    if fresh:
        main_first(accelerator, lambda: clear(run))
    # Only the main process reads and writes checkpoints; with much data these digests take seconds.
    fingerprint = prepared.fingerprint() if main else {}
    judged = validation.judged if validation and main else None
    resume = None
    if going_on:
        resume = main_first(
            accelerator, lambda: resumable(going_on, settings, fingerprint, accept_changes, judged)
        )
    changes = [*(resume.changes if resume else ()), *prepared.base_changes]
    start, best, stale = (resume.step, resume.best, resume.stale) if resume else (0, checkpoint.UNSCORED, 0)
    evaluate_every = _interval(settings.eval.every, plan.steps_per_epoch) if validation else 0
    main_first(accelerator, lambda: _room(prepared, start, total, evaluate_every, resume))
    adapter = resume.adapter if resume else identity(begin) if begin else None
    network = prepared.network(resume.folder if resume else begin)
    network.train().to(device)
    tree_loss = TreeLoss(network, attn=compute.attn, autocast=compute.autocast)
    # What fitted before is taken again where all is as before: a sum's portions decide its last bits.
    limit = settings.batch.tokens_per_micro_batch
    conditions = main_first(accelerator, lambda: [limit, world, processes.name(device)])
    again = resume is not None and list(resume.fitted[:-1]) == conditions
    fitting = memory.fit(
        tree_loss,
        questions,
        plan,
        range(start, total),
        tokens=resume.fitted[-1] if resume and again else limit,
        layers=settings.train.checkpoint_layers,
        accelerator=accelerator,
    )
    prepared = replace(prepared, tokens_per_micro_batch=fitting.tokens_per_micro_batch)
    plan = prepared.plan(questions)
    if settings.train.compile:
        model.compile_layers(network)
    loss_of = accelerator.prepare(tree_loss)
    parameters = dict(model.trainable(network))
    optimizer = _optimizer(settings, parameters, fused=device.type == "cuda")
    if resume:
        try:
            checkpoint.load_optimizer(resume.folder / OPTIMIZER, optimizer, parameters)
        except (KeyError, ValueError) as error:
            wrong = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise BadInput(f"{resume.folder}: its optimizer is that of another model; {wrong}") from None
    if main:
        record_changes(run, start, changes)
        checkpoint.write_text(run / "recipe.yaml", settings.dump())
        record_skipped(run, prepared.skipped)
        record_start(run, start, processes.environment(accelerator))
    for line in banner(
        prepared, questions, plan, network, accelerator, compute, fitting, total, start, adapter
    ):
        console.print(line, soft_wrap=True, highlight=False, markup=False)

    saved = start
    # Read now: the model folder may change or be deleted before a checkpoint is written.
    processor = hub.processor_files(prepared.folder) if main else {}

    def save(step: int, score: checkpoint.Score | None, settled: bool) -> None:
        """Start to write a checkpoint. Raises NumericFailure if a weight is NaN or infinite.

        `settled` says whether the evaluation that was due at this step was made.
        """
        nonlocal saved
        if not main_first(accelerator, lambda: model.finite(network)):
            raise diverged(step, f"step {step}: weights became NaN or infinite")
        main_first(accelerator, lambda: begin_to_write(step, score, settled))
        saved = step

    def begin_to_write(step: int, score: checkpoint.Score | None, settled: bool) -> None:
        state = {
            "step": step,
            "data": fingerprint,
            "score": score,
            "judged": judged,
            "stale": stale,
            "skipped": skipped,
            "settled": settled,
            "adapter": adapter,
            "fitted": [*conditions, fitting.tokens_per_micro_batch],
            "base": prepared.base.model_dump() if prepared.base else None,
        }

        def fill(folder: Path, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
            model.save(network, folder, weights)
            hub.write_processor(processor, folder)
            save_file(moments, folder / OPTIMIZER)
            checkpoint.write_text(folder / RECIPE, settings.dump())
            checkpoint.write_json(folder / checkpoint.STATE, state)

        writer.write(step, fill, model.weights(network), checkpoint.moments(optimizer, parameters))

    def settle(step: int, before: int) -> None:
        """Evaluate and save after a step, where either was due after step `before`.

        Do neither while steps are skipped: if the weights are the reason, their checkpoints would replace
        good ones. What was due is done after the next update.
        """
        nonlocal best, stale
        if skipped and step < total:
            return
        score: checkpoint.Score | None = None
        improved = False
        if validation and _due(evaluate_every, before, step, total):
            try:
                found = validation.look(
                    tree_loss, prepared, accelerator=accelerator, compute=compute, stop=stop
                )
            except NumericFailure as error:
                raise diverged(step, str(error)) from None
            records.evaluation(step, settings.eval, found.row, found.picture)
            if settings.eval.keep_best:
                score = found.score
                improved = score is not None and score > best
                best, stale = (score, 0) if score is not None and improved else (best, stale + 1)
        if improved or over(step) or _due(settings.checkpoint.every or total, before, step, total):
            save(step, score, settled=True)

    def over(step: int) -> bool:
        """Whether training ends after a step, early or not."""
        return step >= total or (settings.eval.patience is not None and stale >= settings.eval.patience)

    def trainable(step: int) -> bool:
        """Return whether the weights can still be trained; the last `skipped` steps up to `step` were no
        updates.
        """
        updated = step - skipped
        return updated > 0 and _finite_gradients(updated, network, questions, plan, compute, accelerator)

    def diverged(step: int, why: str) -> NumericFailure:
        """Return the failure that ends the run after a step. It names the checkpoint to resume from.

        Checkpoints that hold weights without finite gradients are renamed first, so they are never resumed.
        """
        main_first(accelerator, writer.wait)
        if not trainable(step):
            main_first(accelerator, lambda: checkpoint.set_aside(writer.root, step - skipped))
        last = main_first(accelerator, lambda: checkpoint.newest(writer.root)[0])
        return NumericFailure(
            f"{why}. The last good checkpoint: {last or 'none yet'}. "
            "Look at the questions named above, or lower train.lr"
        )

    skipped = resume.skipped if resume else 0
    norms = deque(resume.norms if resume else [], maxlen=RECENT)
    speed = Speed(network, questions, device, settings.train.precision, world)
    workers = processes.data_workers(settings.data.workers, device)
    micro_batches = iter(
        packs(
            questions,
            _jobs(plan, start, total, accelerator.process_index, world),
            workers=workers,
            cuda=device.type == "cuda",
        )
    )
    settled = resume.settled if resume else True
    stop.start_together(lambda: processes.anywhere(accelerator, False))
    with (
        Records(run, start, total, settings.log, console, settled) as records,
        checkpoint.Writer(run / "checkpoints", settings.checkpoint.keep, records.saved) as writer,
    ):
        step = start
        try:
            if processes.anywhere(accelerator, bool(stop)):
                raise Preempted
            if not settled:
                settle(start, start - 1 - (resume.postponed if resume else 0))
            while not over(step):
                began = time.perf_counter()
                trees = plan.step(step)
                asked = [question for tree in trees for question in tree]
                weight = float(questions.total_weights[asked].sum())
                # Dropout's numbers depend on the step and the process, so no random state needs saving.
                torch.manual_seed(processes.seed(settings.train.seed, step, accelerator.process_index))
                nats = torch.zeros((), dtype=torch.float64, device=device)
                for job, pack in micro_batches:
                    with contextlib.nullcontext() if job.last else accelerator.no_sync(loss_of):
                        pack_nats = loss_of(pack.to(device)) * job.share
                        # DDP averages over processes; the sum over all of them is what the weight divides.
                        (pack_nats * (world / weight)).backward()
                    nats += pack_nats.detach().double()
                    if job.last:
                        break

                norm = nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])
                here = [torch.full_like(nats, float(flag)) for flag in (bool(stop), writer.failed())]
                nats, stopping, unwritten = accelerator.reduce(torch.stack([nats, *here]), "sum")
                loss, grad_norm, stopping, unwritten = torch.stack(
                    [nats / weight, norm.double(), stopping, unwritten]
                ).tolist()
                finite = math.isfinite(loss) and math.isfinite(grad_norm)
                factor = lr_factor(step, total, settings.train.warmup, settings.train.schedule)
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * factor
                if finite:
                    nn.utils.clip_grads_with_norm_(parameters.values(), settings.train.max_grad_norm, norm)
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)

                seconds = time.perf_counter() - began
                step += 1  # from here on: steps done
                records.step(
                    step=step,
                    epoch=step / plan.steps_per_epoch,
                    loss=loss,
                    lr=optimizer.param_groups[0]["lr"],
                    grad_norm=grad_norm,
                    questions=len(asked),
                    tokens=questions.tokens(trees),
                    seconds=seconds,
                    **speed.of(trees, seconds),
                )
                ids = [questions.examples[question].id for question in asked]
                records.trace(step, ids, int(questions.answer_tokens[asked].sum()), loss)
                before = step - 1 - skipped if finite else step - 1
                skipped = 0 if finite else skipped + 1
                if what := unusual(grad_norm if finite else math.nan, norms):
                    log.warning("step %d: %s; questions %s", step, what, ", ".join(ids))
                    records.unusual(step, what, ids)
                if finite:
                    norms.append(grad_norm)
                if unwritten:
                    main_first(accelerator, writer.wait)
                if skipped == MOST_SKIPPED or (skipped and step == total and not trainable(step)):
                    many = "1 step" if skipped == 1 else f"{skipped} steps in a row"
                    raise diverged(step, f"{many} without finite gradients, the last at step {step}")

                peers.done(step)
                if stopping:
                    raise Preempted
                settle(step, before)
        except Preempted:
            # While steps are skipped, save only weights that can still be trained.
            if step > saved and (not skipped or trainable(step)):
                save(step, None, settled=False)
            main_first(accelerator, writer.wait)
            why = f" ({stop.reason})" if stop.reason else ""
            how = ", without --fresh," if fresh else ""
            raise Preempted(f"stopped after step {step}{why}; the same command{how} goes on") from None
        main_first(accelerator, writer.wait)

    outcome = "done"
    if step < total:
        waited = f"{stale} evaluation{'s' * (stale != 1)}"
        outcome = f"stopped early at step {step}: no better {settings.eval.metric} for {waited}"
        console.print(outcome, highlight=False, soft_wrap=True)
    if final and settings.eval.final:
        folder = main_first(accelerator, lambda: checkpoint.chosen(run))
        if folder.name != checkpoint.folder_name(step):
            # Let go of the trained model first: two may not fit on the device.
            del loss_of, tree_loss, optimizer, parameters
            network = None
            accelerator.free_memory()
            network = prepared.network(folder).to(device)
        evaluation.examine(
            network,
            prepared,
            settings.eval.final,
            final,
            Source(settings, run, folder),
            accelerator=accelerator,
            compute=compute,
            console=console,
            stop=stop,
        )
    elif settings.eval.final:
        console.print(f"not evaluated: the {settings.eval.final} part holds no questions")
    console.print(f"run folder: {run}", soft_wrap=True)
    return outcome


def _due(every: int, before: int, step: int, total: int) -> bool:
    """Return whether a multiple of `every` lies after `before` and up to `step`, or `step` is the last."""
    return step // every > before // every or step == total


def lr_factor(step: int, total: int, warmup: float, schedule: str) -> float:
    """The learning rate of 0-based `step` as a share of its peak.

    It rises by equal amounts over the first `warmup` share of all steps, then follows the schedule:
    cosine (Loshchilov & Hutter, 2017, without restarts) and linear would reach 0 at step `total`.
    """
    warmup_steps = round(warmup * total)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total - warmup_steps)
    return {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[schedule]


def unusual(norm: float, recent: Sequence[float]) -> str | None:
    """What is odd about a step with this gradient norm, NaN where it was skipped, after those of others.

    All processes have the same norms, and so say the same. It is said and no more: clipping bounds the step.
    """
    if not math.isfinite(norm):
        return "gradients not finite, no update"
    median = statistics.median(recent) if len(recent) >= KNOWN else math.inf
    if norm <= SPIKE * median:
        return None
    return f"gradient norm {norm:.4g}, where the median of the last {len(recent)} is {median:.4g}"


def _finite_gradients(
    updated: int,
    network: nn.Module,
    questions: Questions,
    plan: Plan,
    compute: Compute,
    accelerator: Accelerator,
) -> bool:
    """Return, on every process alike, whether the weights give finite gradients on the questions of a step.

    `updated` is the number of the last step that changed the weights, counted from 1. The gradients are those
    of the sum of the hidden states: answers and loss of the skipped steps may be at fault, not the weights.
    """
    device, rank = accelerator.device, accelerator.process_index
    epoch, trees = plan.epoch(updated - 1), plan.step(updated - 1)
    for micro_batch in filter(None, plan.share(trees, accelerator.num_processes)[rank]):
        pack = questions.pack(micro_batch, epoch=epoch, cuda=device.type == "cuda").to(device)
        with torch.autocast(device.type, compute.autocast, enabled=compute.autocast is not None):
            hidden = model.hidden_states(network, pack, compute.attn)
        torch.autograd.backward(hidden.float().sum())
    norm = nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])
    network.zero_grad(set_to_none=True)
    return not processes.anywhere(accelerator, not math.isfinite(norm))


def _room(prepared: Prepared, start: int, total: int, evaluate_every: int, resume: Resume | None) -> None:
    """Raise StorageFailure where the checkpoints of the steps to come will not fit on the disk."""
    settings = prepared.recipe
    every = settings.checkpoint.every or total
    best = evaluate_every if settings.eval.keep_best else 0

    def multiples(number: int) -> int:  # of the steps to come; there may be far too many to look at each
        return total // number - start // number

    due = multiples(every) + (multiples(best) - multiples(math.lcm(every, best)) if best else 0)
    due += bool(start < total and total % every and (not best or total % best))
    checkpoint.room(
        Path(settings.output),
        prepared.checkpoint_bytes(),
        keep=settings.checkpoint.keep + bool(best),
        saves=due + bool(resume and not resume.settled),
    )


def _jobs(
    plan: Plan, start: int, total: int, rank: int, world: int
) -> Iterator[tuple[Job, list[Group], int]]:
    """This process's micro-batches of every step to come, each with its epoch."""
    for step in range(start, total):
        trees = plan.step(step)
        mine = plan.share(trees, world)[rank]
        for index, micro_batch in enumerate(mine):
            job = Job(last=index == len(mine) - 1, share=float(bool(micro_batch)))
            yield job, micro_batch or [trees[0][:1]], plan.epoch(step)


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
        groups.setdefault((peaks.get(model.component_of(name), options.lr), decay), []).append(parameter)
    # The language model's group first: its rate is the one that is logged.
    ordered = sorted(groups, key=lambda key: key[0] != options.lr)
    return torch.optim.AdamW(
        [{"params": groups[key], "lr": key[0], "peak": key[0], "weight_decay": key[1]} for key in ordered],
        fused=fused,
    )


def _interval(every: float | None, steps_per_epoch: int) -> int:
    """`eval.every` in steps; 0 for never."""
    if every is None:
        return 0
    return max(1, round(every * steps_per_epoch if every <= 1 else every))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns an exit code of surgvqa/endings.py."""
    parser = argparse.ArgumentParser(
        "surgvqa train", description="Train a recipe; the same command again resumes a run that was stopped."
    )
    parser.add_argument("recipe", type=path_argument, help="recipe file, e.g. recipes/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    parser.add_argument("--gpus", metavar="N|all", help="with `surgvqa train`: GPUs of this machine to use")
    parser.add_argument(
        "--replay", metavar="STEP", help="with `surgvqa train`: run this step alone, to look at"
    )
    parser.add_argument("--fresh", action="store_true", help="start over, deleting what a former run left")
    parser.add_argument("--yes", action="store_true", help="confirm --fresh")
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="go on though recipe, data or base model changed, and record how",
    )
    forgiving_streams()
    given = parser.parse_intermixed_args(argv)

    def work() -> None:
        if given.gpus or given.replay:
            raise BadInput(
                "--gpus and --replay are for `surgvqa train`; here a launcher decides how many processes "
                "there are"
            )
        settings = recipe.load(given.recipe, given.overrides)
        if given.fresh and not given.yes:
            raise BadInput(f"--fresh deletes the run in {settings.output}; add --yes to confirm")
        train(settings, fresh=given.fresh, accept_changes=given.accept_changes)

    return leave_code(run_command(work))


if __name__ == "__main__":
    raise SystemExit(main())
