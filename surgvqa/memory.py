"""Before step 0: what fits into memory, found by trying, and the same on every process.

    the plan's fullest micro-batch ── forward, backward ──▶ fits everywhere? ── no ──▶ half the tokens, again
                                                                  └─ yes ─▶ how few layers must be recomputed?

Neither changes what is learned: a step keeps its questions.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size

from surgvqa import model
from surgvqa.loss import TreeLoss
from surgvqa.plan import Group, Plan
from surgvqa.processes import anywhere
from surgvqa.recipe import BadInput
from surgvqa.tree import BLOCK, Questions

log = logging.getLogger("surgvqa")

MARGIN = 0.92
"""Share of a GPU's free memory that a step may take; the rest is for what is not foreseen."""

LOOKED_AT = 2000
"""Steps of the run, evenly drawn, among which the fullest micro-batch is looked for."""

ROUNDS = 3
"""How often `auto` halves the gap between what fits and what does not."""


@dataclass(frozen=True)
class Fit:
    """What every process can hold."""

    tokens_per_micro_batch: int
    checkpoint_layers: int
    """So many decoder layers, the first, are recomputed in the backward pass."""
    peak: int
    """Bytes of GPU memory that a step takes, its optimizer included; 0 on the CPU, which does not tell."""


def fit(
    loss: TreeLoss,
    questions: Questions,
    plan: Plan,
    steps: range,
    *,
    tokens: int | str,
    layers: int | str,
    accelerator: Accelerator,
) -> Fit:
    """Try the fullest micro-batch of `steps`, and smaller ones, until one fits on every process.

    `tokens` is the recipe's limit, or `auto` for the largest that fits, up to the whole share of a step;
    `layers` the recipe's train.checkpoint_layers, where `auto` is the fewest. Raises BadInput where not
    even the longest question fits. The model is left recomputing the layers that were found.
    """
    depth = len(model.decoder_layers(loss.model))
    few, most = {"auto": (0, depth), "all": (depth, depth)}.get(str(layers), (layers, layers))
    assert isinstance(few, int)
    assert isinstance(most, int)

    def peak(limit: int, count: int) -> int | None:
        fullest = _fullest(replace(plan, tokens_per_micro_batch=limit), steps, accelerator.num_processes)
        return _peak(loss, questions, fullest, count, accelerator)

    longest = int(plan.alone().max())
    limit = _share(plan, steps, accelerator.num_processes) if tokens == "auto" else int(tokens)
    too_many = None
    while (found := peak(limit, most)) is None:
        if limit <= longest:
            example = questions.examples[int(plan.alone().argmax())]
            raise BadInput(
                f"{example.place}: out of memory: question {example.id!r} with its image, {longest:,} "
                "tokens, does not fit even alone; take a smaller image.size or image.max_tokens, "
                "train.checkpoint_layers: auto, model.tune: lora, or a GPU with more memory"
            )
        too_many, limit = limit, max(limit // 2, longest)
    if tokens == "auto" and too_many:
        for _ in range(ROUNDS):
            middle = (limit + too_many) // 2
            if (tried := peak(middle, most)) is None:
                too_many = middle
            else:
                limit, found = middle, tried
    fits, too_few = most, few - 1
    while fits - too_few > 1:
        # The fewest first, since it is the likeliest; then between the two.
        count = few if too_few < few else (fits + too_few) // 2
        if (tried := peak(limit, count)) is None:
            too_few = count
        else:
            fits, found = count, tried
    model.recompute(loss.model, fits)
    if tokens not in ("auto", limit) and accelerator.is_main_process:
        log.warning(
            "warning: batch.tokens_per_micro_batch: %s tokens do not fit into memory; going on with %s, "
            "which learns the same",
            f"{tokens:,}",
            f"{limit:,}",
        )
    return Fit(limit, fits, found)


def _share(plan: Plan, steps: range, world: int) -> int:
    """The most tokens that a process has in a step."""
    fullest = _fullest(replace(plan, tokens_per_micro_batch=2**62), steps, world)
    return sum(map(plan.tokens, fullest))


def _fullest(plan: Plan, steps: range, world: int) -> Sequence[Group]:
    """The micro-batch with the most tokens, of any process."""
    some = steps[:: -(-len(steps) // LOOKED_AT)]
    shares = (plan.share(plan.step(step), world) for step in some)
    return max(
        (micro_batch for ranks in shares for mine in ranks for micro_batch in mine),
        key=lambda micro_batch: sum(map(plan.tokens, micro_batch)),
    )


def _peak(
    loss: TreeLoss, questions: Questions, trees: Sequence[Group], layers: int, accelerator: Accelerator
) -> int | None:
    """Bytes that a forward and backward pass and the optimizer take on this process; None where any process
    has not so many."""
    device = accelerator.device
    cuda = device.type == "cuda"
    model.recompute(loss.model, layers)
    free = 0
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    pack = questions.pack(trees, multiple=BLOCK if cuda else 1)
    used, fits = 0, True
    try:
        loss(pack.to(device)).backward()
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
            raise
        fits = False
    loss.zero_grad(set_to_none=True)
    if cuda:
        # AdamW keeps two more numbers in fp32 for each that trains.
        moments = 8 * sum(p.numel() for p in loss.parameters() if p.requires_grad)
        used = torch.cuda.max_memory_reserved(device) + moments
        fits = fits and used <= MARGIN * free
        gc.collect()
        torch.cuda.empty_cache()
    return None if anywhere(accelerator, not fits) else used
