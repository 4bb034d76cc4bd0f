"""Before step 0: what fits into memory, found by trying, and the same on every process.

    the plan's fullest micro-batch ── forward, backward ──▶ fits everywhere? ── no ──▶ half the tokens, again
                                                                  └─ yes ─▶ how few layers must be recomputed?

Neither changes what is learned: a step keeps its questions.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size

from surgvqa import model
from surgvqa.loss import TreeLoss
from surgvqa.plan import Group, Plan
from surgvqa.processes import anywhere
from surgvqa.recipe import BadInput
from surgvqa.tree import Questions

log = logging.getLogger("surgvqa")

MARGIN = 0.92
"""Share of a GPU's free memory that a step may take; the rest is for what is not foreseen."""

LOOKED_AT, EPOCHS = 2000, 50
"""Most steps that are searched for the fullest micro-batch, drawn evenly from the next EPOCHS epochs.
Ordering an epoch takes time, and later ones hold the same questions."""

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


def host_free(root: Path = Path("/")) -> int:
    """Bytes of host memory still to be had, on the machine and in each cgroup (v2) that limits this process.

    Caches of files count as free. Where nothing tells, as on other systems than Linux, there is no limit.
    """
    free = [sys.maxsize]
    with contextlib.suppress(OSError):
        kib = re.search(r"^MemAvailable:\s+(\d+) kB$", (root / "proc/meminfo").read_text(), re.MULTILINE)
        free += [1024 * int(kib[1])] if kib else []
    with contextlib.suppress(OSError):
        own = re.search(r"^0::/(.*)$", (root / "proc/self/cgroup").read_text(), re.MULTILINE)
        group = Path("sys/fs/cgroup", own[1] if own else "")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # the outermost has none, and `max` is no number
                most = int((root / folder / "memory.max").read_text())
                used = int((root / folder / "memory.current").read_text())
                stat = dict(line.split() for line in (root / folder / "memory.stat").read_text().splitlines())
                free.append(most - used + int(stat["active_file"]) + int(stat["inactive_file"]))
    return min(free)


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
    few = {"auto": 0, "all": depth}.get(str(layers)) if isinstance(layers, str) else min(layers, depth)
    most = depth if isinstance(layers, str) else few
    assert few is not None
    assert most is not None
    if not steps:  # a run that is only evaluated
        return Fit(plan.tokens_per_micro_batch, few, 0)

    def peak(limit: int, count: int) -> int | None:
        """Of the micro-batch with the most tokens, and of that with the most image where the tower trains."""
        limited = replace(plan, tokens_per_micro_batch=limit)
        fullest = [_fullest(limited, steps, accelerator.num_processes, limited.tokens)]
        if any(p.requires_grad for p in model.base(loss.model).model.visual.parameters()):
            fullest.append(_fullest(limited, steps, accelerator.num_processes, limited.shared_tokens))
        peaks = [_peak(loss, questions, trees, count, accelerator) for trees in fullest]
        return None if None in peaks else max(found for found in peaks if found is not None)

    longest = int(plan.alone().max())
    limit = _share(plan, steps, accelerator.num_processes) if tokens == "auto" else int(tokens)
    too_many = None
    while (found := peak(limit, most)) is None:
        if limit <= longest:
            _refuse_the_model(loss, accelerator.device)
            example = questions.examples[int(plan.alone().argmax())]
            raise BadInput(
                f"{example.place}: out of memory: question {example.id!r} with its image, {longest:,} "
                f"tokens, does not fit even alone with {most} layers recomputed; take a smaller image.size "
                "or image.max_tokens, train.checkpoint_layers: all, model.tune: lora, or a larger GPU"
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
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)  # or trials that failed would count
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
    fullest = _fullest(replace(plan, tokens_per_micro_batch=2**62), steps, world, plan.tokens)
    return sum(map(plan.tokens, fullest))


def _fullest(plan: Plan, steps: range, world: int, size: Callable[[Group], int]) -> Sequence[Group]:
    """The micro-batch whose trees have the largest sizes together, of any process."""
    steps = steps[: EPOCHS * plan.steps_per_epoch]
    some = steps[:: -(-len(steps) // LOOKED_AT)]
    shares = (plan.share(plan.step(step), world) for step in some)
    return max(
        (micro_batch for ranks in shares for mine in ranks for micro_batch in mine),
        key=lambda micro_batch: sum(map(size, micro_batch)),
    )


def _refuse_the_model(loss: TreeLoss, device: torch.device) -> None:
    """Raise BadInput where weights, gradients and optimizer alone are too much for the GPU."""
    if device.type != "cuda":
        return
    weights = sum(p.numel() * p.element_size() for p in loss.parameters())
    training = 12 * sum(p.numel() for p in loss.parameters() if p.requires_grad)
    size = torch.cuda.get_device_properties(device).total_memory
    if weights + training > MARGIN * size:
        raise BadInput(
            f"out of memory: the model's weights take {weights / 2**30:.1f} GiB, gradients and optimizer "
            f"{training / 2**30:.1f} GiB, and the GPU has {size / 2**30:.1f}; take model.tune: lora, a "
            "smaller model, or a GPU with more memory"
        )


def _out_of_memory(error: Exception) -> bool:
    """Also where it is the driver, a library or a kernel's compiler that had no memory left."""
    text = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or should_reduce_batch_size(error)
        or "out of memory" in text
        or "alloc_failed" in text
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
    pack = questions.pack(trees, cuda=cuda)
    used, fits = 0, True
    try:
        # As in a second micro-batch, or under DDP: gradients are there already.
        for parameter in loss.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        loss(pack.to(device)).backward()
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
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
