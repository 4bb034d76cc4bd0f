"""What a run is about to do, a line at a time."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from surgvqa import hub, letterbox, metrics, model, processes
from surgvqa.memory import Fit
from surgvqa.plan import Plan, quotas
from surgvqa.prepare import Prepared
from surgvqa.processes import Compute
from surgvqa.recipe import printable
from surgvqa.tokens import ChatTokens
from surgvqa.tree import Questions

_SHOWN = 30
"""How many classes are listed."""

_LONG = 600
"""Most characters of an example's text to show; a longer one loses its middle."""


def banner(
    prepared: Prepared,
    questions: Questions,
    plan: Plan,
    network: Any,
    accelerator: Accelerator,
    compute: Compute,
    fitting: Fit,
    total: int,
    start: int,
    adapter: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """Model and what trains, processes, batch, canvas, tokens, precision, data, steps, stages, classes."""
    settings, folder, world = prepared.recipe, prepared.folder, accelerator.num_processes
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
    if adapter:
        yield f"            began with the weights of {adapter['checkpoint']}"
    yield f"world       {_world(accelerator)}"
    micro_batches = len(plan.share(plan.step(0), world)[0])
    yield (
        f"batch       {plan.questions} questions per step, at most {plan.questions_per_image} per image; "
        f"{micro_batches} micro-batch{'es' if micro_batches > 1 else ''} of up to "
        f"{plan.tokens_per_micro_batch:,} tokens per process"
    )
    yield f"canvas      {_canvas(prepared)}"
    yield f"            crop: {_crop(prepared)}; augment: {settings.image.augment}"
    trees = [tree for step in range(min(plan.steps_per_epoch, 50)) for tree in plan.step(step)]
    rows = [[question] for tree in trees for question in tree]
    per_tree = sum(map(plan.tokens, trees)) / len(trees)
    as_rows = sum(map(plan.tokens, rows)) / len(trees)
    yield (
        f"trees       {len(rows) / len(trees):.1f} questions and {per_tree:,.0f} tokens per tree; "
        f"as one row per question {as_rows:,.0f} ({as_rows / per_tree:.1f}×)"
    )
    layers, device = len(model.decoder_layers(network)), accelerator.device
    peak = ""
    if device.type == "cuda":
        size = torch.cuda.get_device_properties(device).total_memory
        peak = f"; a step takes up to {fitting.peak / 2**30:.1f} of {size / 2**30:.1f} GiB"
    yield f"memory      {fitting.checkpoint_layers} of {layers} decoder layers recomputed{peak}"
    numbers = "fp32" if compute.autocast is None else "bf16 autocast, fp32 masters"
    tf32 = "on" if compute.tf32 else "off"
    yield f"precision   {numbers}, TF32 {tf32}, attention {compute.attn}"
    parts = {part: len(prepared.dataset.part(part)) for part in ("train", "val", "test")}
    yield "data        " + ", ".join(f"{count:,} {part}" for part, count in parts.items()) + " questions"
    if any(prepared.skipped_counts.values()):
        left = ", ".join(f"{count:,} {what}" for what, count in prepared.skipped_counts.items())
        yield f"            left out: {left}; see skipped.jsonl"
    resuming = f"; resuming after step {start:,}" if start else ""
    yield f"steps       {plan.steps_per_epoch:,} per epoch, {total:,} in all{resuming}"
    if plan.stage is not None:
        counts = Counter(plan.stage.tolist())
        order = ", then ".join(f"{counts[stage]:,} of stage {stage}" for stage in sorted(counts))
        yield f"order       {order}, in every epoch"
    if plan.classes is not None:
        seen = Counter(map(prepared.class_of, questions.examples))
        drawn = dict(zip(sorted(seen), quotas(np.bincount(plan.classes)).tolist(), strict=True))
        yield f"balance     {settings.data.balance}; questions there are, and drawn in an epoch"
        yield from _listed(seen, lambda name: f"{drawn[name]:>8,}  × {drawn[name] / seen[name]:.3f}")
    if weights := prepared.answer_weights():
        seen = Counter(metrics.normalise(example.answers[0]) for example in questions.examples)
        yield f"answers     {settings.loss.class_weights} class weights"
        yield from _listed(seen, lambda answer: f"  × {weights[answer]:.3f}")


def example(questions: Questions) -> Iterator[str]:
    """Yield lines that show the first question's tokens as text: those given, supervised and ignored.

    They show a wrong column, prompt or template at once. Needs no model. An image's tokens are counted.
    """
    first, chat = questions.examples[0], questions.chat
    grids = [questions.canvases[image.key].grid(chat.folder.factor) for image in first.images]
    branch = chat.branches([first], questions.canvases)[0]
    end = branch.prompt + branch.answer
    yield f"example     the first question of train, at {printable(first.place or first.id)}"
    for name, ids in (
        ("given", [*chat.root(grids).ids, *branch.ids[: branch.prompt]]),
        ("supervised", branch.ids[branch.prompt : end]),
        ("ignored", branch.ids[end:]),
    ):
        yield f"            {name:<12}{_shortened(printable(_decoded(chat, ids)))}"


def _decoded(chat: ChatTokens, ids: Iterable[int]) -> str:
    """Return tokens as text, with a run of an image's tokens as one token and its length."""
    image, pieces = chat.folder.special["<|image_pad|>"], []
    for is_image, run in itertools.groupby(map(int, ids), key=lambda token: token == image):
        tokens = list(run)
        pieces.append(f"<|image_pad|>×{len(tokens)}" if is_image else chat.tokenizer.decode(tokens))
    return "".join(pieces)


def _shortened(text: str) -> str:
    """Return a text; a long one without its middle."""
    if len(text) <= _LONG:
        return text
    return f"{text[: _LONG // 2]} … {len(text) - _LONG:,} characters … {text[-(_LONG // 2) :]}"


def _listed(counts: Counter[str], more: Callable[[str], str]) -> Iterator[str]:
    """The most frequent with their counts and what is to be said of them."""
    for name, count in counts.most_common(_SHOWN):
        yield f"            {name[:40]:<40}{count:>8,}{more(name)}"
    if len(counts) > _SHOWN:
        yield f"            and {len(counts) - _SHOWN:,} rarer ones"


def _world(accelerator: Accelerator) -> str:
    device, world = accelerator.device, accelerator.num_processes
    where = processes.name(device)
    if world == 1:
        return f"1 process, {where}"
    return f"distributed, {world} processes, {torch.distributed.get_backend()}, {where}"


def _crop(prepared: Prepared) -> str:
    if prepared.recipe.image.crop == "none":
        return "none"
    shares = []
    for canvas in prepared.canvases.values():
        x1, y1, x2, y2 = canvas.picture
        shares.append((x2 - x1) * (y2 - y1) / (canvas.source_width * canvas.source_height))
    cropped = [share for share in shares if share < 1]
    kept = f", to {sum(cropped) / len(cropped):.0%} of their area" if cropped else ""
    return f"border, off {len(cropped):,} of {len(shares):,} images{kept}"


def _canvas(prepared: Prepared) -> str:
    image, factor = prepared.recipe.image, prepared.folder.factor
    if image.mode == "letterbox":
        assert image.size is not None
        side = letterbox.snap(image.size, factor)
        return f"{image.size} → {side}, {side // factor}×{side // factor} = {(side // factor) ** 2} tokens"
    tokens = [canvas.tokens(factor) for canvas in prepared.canvases.values()]
    mean = sum(tokens) / len(tokens)
    return f"native, {min(tokens)} to {max(tokens)} tokens, mean {mean:.0f} (limit {image.max_tokens})"
