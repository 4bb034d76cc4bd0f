"""Training speed: `python -m benchmarks.train` trains the same questions in three ways, in turn in one run.

    trees   this package: an image's tokens once, its questions as branches
    rows    this package with `trees: false`: a row for each question, laid one after the other
    plain   a loop as transformers' documentation shows it: image processor, padded rows, model(**batch).loss

All three see the same pixels and tokens, the same weights and AdamW, the same questions in each optimizer
step. Each frame is read and drawn on its canvas once per measurement, in every way.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks import inputs
from benchmarks.inputs import Setting, write_images, write_model
from benchmarks.record import write
from benchmarks.turns import Measured, in_turn, line, peak_gib, rows, stopwatch
from surgvqa.datasets import Example
from surgvqa.letterbox import draw, open_rgb
from surgvqa.loss import TreeLoss
from surgvqa.plan import Plan
from surgvqa.tokens import ChatTokens
from surgvqa.tree import Questions, packs

STEP = 16
"""Questions per optimizer step."""
PACK = 4096
"""Tokens per micro-batch of trees, and of rows laid one after the other."""
PADDED_ROWS = 4
"""Rows per micro-batch of the plain loop."""
GROUPS = (1, 2, 4, 8, 16)
LEARNING_RATE = 1e-4


def plan_of(questions: Questions, per_image: int, *, step: int = STEP, trees: bool = True) -> Plan:
    """The same questions in the same steps, with and without trees."""
    return Plan(
        image=questions.image,
        branch_tokens=questions.branch_tokens,
        root_tokens=questions.root_tokens,
        questions=step,
        questions_per_image=per_image,
        tokens_per_micro_batch=PACK,
        seed=0,
        trees=trees,
    )


def train_packs(
    network: Any,
    questions: Questions,
    plan: Plan,
    *,
    device: torch.device,
    attn: str = "sdpa",
    autocast: torch.dtype | None = None,
    workers: int = 0,
) -> Measured:
    """Train one epoch of a plan as surgvqa.train does; with or without trees as the plan says."""
    loss_of = TreeLoss(network, attn=attn, autocast=autocast)
    optimizer = _optimizer(network, device)
    steps = [plan.step(step) for step in range(plan.steps_per_epoch)]
    jobs = [
        ((step, index == len(micro_batches) - 1), micro_batch, 0)
        for step, trees in enumerate(steps)
        for micro_batches in plan.share(trees, 1)
        for index, micro_batch in enumerate(micro_batches)
    ]
    weights = [sum(float(questions.total_weights[tree].sum()) for tree in trees) for trees in steps]
    losses, loss = [], 0.0
    with stopwatch(device) as seconds:
        for (step, last), pack in packs(questions, jobs, workers=workers, cuda=device.type == "cuda"):
            nats = loss_of(pack.to(device)) / weights[step]
            nats.backward()
            loss += nats.detach()
            if last:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                losses.append(loss)
                loss = 0.0
    return Measured(
        questions=len(questions),
        seconds=seconds[0],
        tokens=sum(plan.tokens(tree) for trees in steps for tree in trees),
        padding=0,
        losses=tuple(map(float, losses)),
        peak_gib=peak_gib(device),
    )


def train_plain(
    network: Any,
    questions: Questions,
    plan: Plan,
    *,
    device: torch.device,
    autocast: torch.dtype | None = None,
    rows: int = PADDED_ROWS,
) -> Measured:
    """Train the same epoch on a model of transformers, `rows` questions of a step at a time."""
    optimizer = _optimizer(network, device)
    steps = [[q for tree in plan.step(step) for q in tree] for step in range(plan.steps_per_epoch)]
    losses, tokens, padding = [], 0, 0
    drawn: dict[str, Image.Image] = {}
    with stopwatch(device) as seconds:
        for step in steps:
            supervised, loss = int(questions.answer_tokens[step].sum()), 0.0
            for start in range(0, len(step), rows):
                examples = [questions.examples[question] for question in step[start : start + rows]]
                batch = padded(questions.chat, examples, [image_of(questions, e, drawn) for e in examples])
                tokens += batch["input_ids"].numel()
                padding += int((batch["attention_mask"] == 0).sum())
                batch = {key: value.to(device) for key, value in batch.items()}
                with torch.autocast(device.type, autocast, enabled=autocast is not None):
                    # As transformers' Trainer has it where gradients accumulate: the mean of the whole step.
                    nats = network(**batch, num_items_in_batch=supervised, use_cache=False).loss
                nats.backward()
                loss += nats.detach()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss)
    return Measured(
        questions=len(questions),
        seconds=seconds[0],
        tokens=tokens,
        padding=padding,
        losses=tuple(map(float, losses)),
        peak_gib=peak_gib(device),
    )


def padded(
    chat: ChatTokens, examples: Sequence[Example], images: Sequence[Image.Image], *, answers: bool = True
) -> dict[str, Tensor]:
    """A batch as transformers' processor makes it: rows padded to the longest, an image for each.

    With `answers`, padded on the right, and labels (rows, tokens) that supervise each answer and its end of
    turn; without, padded on the left and ending where the model is to answer.
    """
    batch = dict(chat.image_processor(images=list(images), do_resize=False, return_tensors="pt"))
    counts = (batch["image_grid_thw"].prod(1) // chat.folder.merge**2).tolist()
    conversations = [chat.conversation(example) for example in examples]

    def encode(texts: Sequence[str], side: str) -> Any:
        full = [
            text.replace("<|image_pad|>", "<|image_pad|>" * count)
            for text, count in zip(texts, counts, strict=True)
        ]
        return chat.tokenizer(
            full, add_special_tokens=False, padding=True, padding_side=side, return_tensors="pt"
        )

    prompts = encode([chat.render(turns[:-1], add_generation_prompt=True) for turns in conversations], "left")
    text = encode([chat.render(turns) for turns in conversations], "right") if answers else prompts
    batch |= {"input_ids": text["input_ids"], "attention_mask": text["attention_mask"]}
    batch["mm_token_type_ids"] = (batch["input_ids"] == chat.folder.special["<|image_pad|>"]).int()
    if answers:
        place = torch.arange(batch["input_ids"].shape[1])
        asked = prompts["attention_mask"].sum(1, keepdim=True)
        ends = batch["attention_mask"].sum(1, keepdim=True) - 1  # the line feed behind the end of turn
        batch["labels"] = batch["input_ids"].where((asked <= place) & (place < ends), -100)
    return batch


def image_of(questions: Questions, example: Example, drawn: dict[str, Image.Image]) -> Image.Image:
    """An example's image on its canvas, read once and kept in `drawn`."""
    image = example.images[0]
    if image.key not in drawn:
        drawn[image.key] = draw(open_rgb(image.read()), questions.canvases[image.key], questions.fill)
    return drawn[image.key]


def _optimizer(network: Any, device: torch.device) -> torch.optim.AdamW:
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=device.type == "cuda")


def trees(setting: Setting, *, shared: bool = True) -> Measured:
    questions, device = setting.questions(), torch.device(setting.device)
    attn = "flex" if device.type == "cuda" else "sdpa"
    plan = plan_of(questions, setting.per_image, trees=shared)
    return train_packs(
        setting.network(), questions, plan, device=device, attn=attn, autocast=setting.autocast
    )


def rows_apart(setting: Setting) -> Measured:
    return trees(setting, shared=False)


def plain(setting: Setting) -> Measured:
    questions, device = setting.questions(), torch.device(setting.device)
    plan = plan_of(questions, setting.per_image)
    return train_plain(setting.network(plain=True), questions, plan, device=device, autocast=setting.autocast)


WAYS = {"trees": trees, "rows": rows_apart, "plain": plain}


def loss_difference(results: dict[str, list[Measured]]) -> float:
    """Largest relative difference of the first step's loss, between any two ways or rounds."""
    losses = [each.losses[0] for measured in results.values() for each in measured if each.losses]
    return (max(losses) - min(losses)) / max(losses)


def main(argv: Sequence[str] | None = None) -> int:
    parser = inputs.options("train", __doc__.partition("\n")[0])
    parser.add_argument("--groups", type=int, nargs="+", default=GROUPS, help="questions per image")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1, help=f"optimizer steps of {STEP} questions per round")
    parser.add_argument("--tune", choices=("full", "lora"), default="full")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU, else fp32")
    parser.add_argument("--peer", choices=("trl",), help="another trainer beside the three")
    parser.add_argument(
        "--one-process", action="store_true", help="quicker to start, but all ways share one peak memory"
    )
    given = parser.parse_args(argv)
    precision = given.precision or ("bf16" if given.device.startswith("cuda") else "fp32")
    if bad := [group for group in given.groups if STEP % group]:
        parser.error(f"--groups {bad[0]}: must divide {STEP}, so that every step holds whole images")
    ways = dict(WAYS)
    if given.peer:
        from benchmarks import peer

        if missing := peer.missing():
            print(f"--peer {given.peer}: {missing}", file=sys.stderr)
            return 2
        ways[given.peer] = peer.trl

    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as parent:
        images = write_images(STEP * given.steps, Path(parent) / "images")
        for family in given.families:
            folder = write_model(family, given.size, Path(parent))
            for group in given.groups:
                count = STEP * given.steps // group
                setting = Setting(
                    folder, images[:count], group, given.canvas, given.device, precision, given.tune
                )
                results = in_turn(
                    ways,
                    setting,
                    replace(setting, images=images[:1]),
                    given.rounds,
                    apart=not given.one_process,
                )
                difference = loss_difference(results)
                same = {"family": family, "questions_per_image": group, "loss_difference": difference}
                made = rows(results, "trees", **same)
                table += made
                for row in made:
                    print(line(row, "trees"), flush=True)
                print(f"{'':9} losses differ by {difference:.1e} (relative)", flush=True)
    settings = {
        **{
            key: getattr(given, key)
            for key in ("rounds", "steps", "size", "canvas", "tune", "device", "one_process")
        },
        "precision": precision,
        "questions_per_step": STEP,
        "tokens_per_micro_batch": PACK,
        "rows_per_padded_batch": PADDED_ROWS,
    }
    print(f"written: {write('train', settings, table, given.out)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
