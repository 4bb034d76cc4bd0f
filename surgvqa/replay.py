"""One step of a run again, alone: `surgvqa train RECIPE --replay STEP` tells what each question costs.

For finding the question that made a step's loss jump or its gradients overflow. Nothing is written.
"""

from __future__ import annotations

from pathlib import Path

import torch
from rich.table import Table
from torch import nn

from surgvqa import checkpoint, digests, memory, model, processes
from surgvqa.loss import TreeLoss
from surgvqa.prepare import Prepared, prepare
from surgvqa.recipe import BadInput, Recipe
from surgvqa.run import differences, first_weights
from surgvqa.terminal import Console


def replay(settings: Recipe, step: int, console: Console) -> tuple[float, float]:
    """Loss and gradient norm of 1-based `step`, on one process, with the last checkpoint before it.

    Prints them, and each question's nats without dropout, the largest first. Dropout is that of a run on one
    process. Raises BadInput where the run has no checkpoint before the step, no such step, or was trained
    with another recipe or other data.
    """
    accelerator = processes.start()
    device = accelerator.device
    cuda = device.type == "cuda"
    compute = processes.compute(settings.train.precision, settings.model.attn, device)
    root = Path(settings.output) / "checkpoints"
    folder = _before(root, step) if step > 0 else None
    begin = folder or first_weights(settings)
    prepared = prepare(settings, accelerator, progress=True, checkpoint=begin)
    questions = prepared.questions("train")
    plan = prepared.plan(questions)
    total = settings.train.max_steps or settings.train.epochs * plan.steps_per_epoch
    if not 1 <= step <= total:
        raise BadInput(f"--replay {step}: the run's steps are 1 to {total}")
    if folder and (changes := differences(folder, settings, prepared.fingerprint())):
        raise BadInput(
            [f"--replay {step}: {folder} was trained otherwise:", *(f"  {change}" for change in changes)]
        )
    if folder is None:
        _same_base(root, prepared.identified(accelerator))
    network = prepared.network(begin).to(device).train()
    loss_of = TreeLoss(network, attn=compute.attn, autocast=compute.autocast)
    fitting = memory.fit(
        loss_of,
        questions,
        plan,
        range(step - 1, step),
        tokens=settings.batch.tokens_per_micro_batch,
        layers=settings.train.checkpoint_layers,
        accelerator=accelerator,
    )
    plan.tokens_per_micro_batch = fitting.tokens_per_micro_batch
    trees, epoch = plan.step(step - 1), plan.epoch(step - 1)
    asked = [question for tree in trees for question in tree]
    weight = float(questions.total_weights[asked].sum())

    torch.manual_seed(processes.seed(settings.train.seed, step - 1, accelerator.process_index))
    nats = torch.zeros((), dtype=torch.float64, device=device)
    for micro_batch in plan.share(trees, 1)[0]:
        pack_nats = loss_of(questions.pack(micro_batch, epoch=epoch, cuda=cuda).to(device))
        (pack_nats / weight).backward()
        nats += pack_nats.detach().double()
    norm = nn.utils.get_total_norm([p.grad for _, p in model.trainable(network) if p.grad is not None])
    loss, grad_norm = float(nats / weight), float(norm)

    network.eval()
    rows = []
    with torch.no_grad():
        for question in asked:
            own = float(loss_of(questions.pack([[question]], epoch=epoch, cuda=cuda).to(device)))
            example = questions.examples[question]
            rows.append((own, example.id, example.question, example.answers[0]))
    table = Table()
    for heading in ("weighted nats", "id", "question", "answer"):
        table.add_column(heading, overflow="fold")
    for own, *texts in sorted(rows, key=lambda row: -row[0] if row[0] == row[0] else float("-inf")):
        table.add_row(f"{own:.4f}", *texts)
    console.print(table)
    start = folder or settings.model.adapter or "new weights"
    console.print(f"step {step} with {start}: loss {loss:.6f}, gradient norm {grad_norm:.4g}", soft_wrap=True)
    return loss, grad_norm


def _before(root: Path, step: int) -> Path | None:
    """The newest whole checkpoint from before a step; None where the step is the first and there is none."""
    for done, folder in reversed(checkpoint.steps(root)):
        if done < step and not checkpoint.verify(folder):
            return folder
    if step == 1:
        return None
    raise BadInput(f"--replay {step}: {root} holds no whole checkpoint from before that step")


def _same_base(root: Path, prepared: Prepared) -> None:
    """Raise BadInput where the newest checkpoint tells of another base model; none is older than the step."""
    folder = checkpoint.newest(root)[0]
    if folder is None or prepared.base is None:
        return
    if changes := digests.differences(checkpoint.base_of(folder), prepared.base, folder, prepared.folder):
        raise BadInput(
            [f"{folder} was trained on another base model:", *(f"  {change}" for change in changes)]
        )
