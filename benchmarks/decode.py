"""Evaluation speed: `python -m benchmarks.decode` answers the same questions in three ways, in turn.

    trees     this package: an image's tokens once, all its questions growing together
    rows      transformers' `generate`, a row at a time
    batches   transformers' `generate` on rows padded on the left

All three read the same frames, run the same random weights and emit the same number of tokens for each
question, and the run fails where their tokens differ.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks import inputs
from benchmarks.inputs import Setting, write_images, write_model
from benchmarks.record import write
from benchmarks.train import image_of, padded
from benchmarks.turns import Measured, in_turn, line, peak_gib, rows, stopwatch
from surgvqa import decode
from surgvqa.plan import trees_of
from surgvqa.tree import Questions, packs

QUESTIONS = 16
"""Per round."""
NEW_TOKENS = 8
"""For every question: random weights would end a turn anywhere or never."""
PADDED_ROWS = 8
TREES = 1
"""Trees per forward pass."""
GROUPS = (1, 2, 4, 8, 16)


def decode_trees(
    network: Any,
    questions: Questions,
    *,
    device: torch.device,
    attn: str = "sdpa",
    autocast: torch.dtype | None = None,
    trees: int = TREES,
    workers: int = 0,
) -> Measured:
    """Answer all questions, `trees` images in a pack."""
    every = trees_of(questions.image)
    jobs = [
        (every[start : start + trees], every[start : start + trees], None)
        for start in range(0, len(every), trees)
    ]
    answers: dict[int, tuple[int, ...]] = {}
    tokens = 0
    cuda = device.type == "cuda"
    with stopwatch(device) as seconds:
        for group, pack in packs(questions, jobs, asked=True, workers=workers, cuda=cuda):
            made = decode.greedy(
                network,
                pack.to(device),
                stop_ids=(-1,),
                max_new_tokens=NEW_TOKENS,
                attn=attn,
                autocast=autocast,
            )
            answers |= zip((q for tree in group for q in tree), map(tuple, made), strict=True)
            # The last token of an answer is never read.
            tokens += pack.tokens + len(made) * (NEW_TOKENS - 1)
    return Measured(
        questions=len(questions),
        seconds=seconds[0],
        tokens=tokens,
        padding=0,
        answers=tuple(answers[question] for question in range(len(questions))),
        peak_gib=peak_gib(device),
    )


@torch.inference_mode()
def decode_rows(
    network: Any,
    questions: Questions,
    *,
    device: torch.device,
    autocast: torch.dtype | None = None,
    rows: int = 1,
) -> Measured:
    """Answer all questions by `generate`, `rows` at a time."""
    network.generation_config.eos_token_id = None
    answers: list[tuple[int, ...]] = []
    tokens, padding = 0, 0
    drawn: dict[str, Image.Image] = {}
    with stopwatch(device) as seconds:
        for start in range(0, len(questions), rows):
            examples = questions.examples[start : start + rows]
            images = [image_of(questions, example, drawn) for example in examples]
            batch = padded(questions.chat, examples, images, answers=False)
            tokens += batch["input_ids"].numel() + len(examples) * (NEW_TOKENS - 1)
            padding += int((batch["attention_mask"] == 0).sum())
            asked = batch["input_ids"].shape[1]
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                made = network.generate(
                    **{key: value.to(device) for key, value in batch.items()},
                    max_new_tokens=NEW_TOKENS,
                    do_sample=False,
                    pad_token_id=questions.chat.stop_ids[1],
                )
            answers += map(tuple, made[:, asked:].tolist())
    return Measured(
        questions=len(questions),
        seconds=seconds[0],
        tokens=tokens,
        padding=padding,
        answers=tuple(answers),
        peak_gib=peak_gib(device),
    )


def trees(setting: Setting) -> Measured:
    device = torch.device(setting.device)
    attn = "flex" if device.type == "cuda" else "sdpa"
    return decode_trees(
        setting.network().eval(), setting.questions(), device=device, attn=attn, autocast=setting.autocast
    )


def generated(setting: Setting, *, rows: int = 1) -> Measured:
    return decode_rows(
        setting.network(plain=True).eval(),
        setting.questions(),
        device=torch.device(setting.device),
        autocast=setting.autocast,
        rows=rows,
    )


WAYS: dict[str, Callable[[Setting], Measured]] = {
    "trees": trees,
    "rows": generated,
    "batches": partial(generated, rows=PADDED_ROWS),
}


def same_tokens(results: dict[str, list[Measured]]) -> float:
    """Share of the answers that are the same, token for token, in all ways and rounds."""
    every = [each.answers for measured in results.values() for each in measured]
    same = [len(set(answers)) == 1 for answers in zip(*every, strict=True)]
    return sum(same) / len(same)


def main(argv: Sequence[str] | None = None) -> int:
    parser = inputs.options("decode", __doc__.partition("\n")[0])
    parser.add_argument("--groups", type=int, nargs="+", default=GROUPS, help="questions per image")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU, else fp32")
    parser.add_argument(
        "--one-process", action="store_true", help="quicker to start, but all ways share one peak memory"
    )
    given = parser.parse_args(argv)
    precision = given.precision or ("bf16" if given.device.startswith("cuda") else "fp32")
    if bad := [group for group in given.groups if QUESTIONS % group]:
        parser.error(f"--groups {bad[0]}: must divide {QUESTIONS}")
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as parent:
        images = write_images(QUESTIONS, Path(parent) / "images")
        for family in given.families:
            folder = write_model(family, given.size, Path(parent))
            for group in given.groups:
                setting = Setting(
                    folder, images[: QUESTIONS // group], group, given.canvas, given.device, precision
                )
                results = in_turn(
                    WAYS,
                    setting,
                    replace(setting, images=images[:1]),
                    given.rounds,
                    apart=not given.one_process,
                )
                same = same_tokens(results)
                if precision == "fp32" and same < 1:
                    raise SystemExit(f"{family}, {group} per image: only {same:.0%} of the answers agree")
                made = rows(results, "trees", family=family, questions_per_image=group, same_answers=same)
                table += made
                for row in made:
                    print(line(row, "trees"), flush=True)
    settings = {
        **{key: getattr(given, key) for key in ("rounds", "size", "canvas", "device", "one_process")},
        "precision": precision,
        "questions_per_round": QUESTIONS,
        "new_tokens": NEW_TOKENS,
        "trees_per_pack": TREES,
        "rows_per_padded_batch": PADDED_ROWS,
    }
    print(f"written: {write('decode', settings, table, given.out)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
