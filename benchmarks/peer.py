"""The same questions through TRL's SFTTrainer: `python -m benchmarks.train --peer trl`.

Written from the documentation and the source of TRL 1.16 (prompt and completion with images, so that only
answers are supervised) and not run where it was written: it needs torchvision, without which transformers has
no joint processor for these models. TRL supervises the line feed behind each answer too, so its loss is left
out of the comparison.
"""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.inputs import SYSTEM, Setting
from benchmarks.turns import Measured, peak_gib, stopwatch


def missing() -> str | None:
    """What has to be installed first, in words; None where nothing is."""
    absent = [package for package in ("trl", "torchvision") if find_spec(package) is None]
    if not absent:
        return None
    return (
        f"{' and '.join(absent)} cannot be found here; install with `pip install {' '.join(absent)}` "
        "(torchvision must match this torch)"
    )


def trl(setting: Setting) -> Measured:
    """One epoch of TRL's trainer with the settings of the plain loop, images drawn beforehand."""
    from datasets import Dataset
    from transformers import AutoProcessor
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found, unused-ignore]

    from benchmarks.train import LEARNING_RATE, PADDED_ROWS, STEP, image_of, plan_of

    questions, device = setting.questions(), torch.device(setting.device)
    plan = plan_of(questions, setting.per_image)
    drawn: dict[str, Any] = {}
    order = [
        question for step in range(plan.steps_per_epoch) for tree in plan.step(step) for question in tree
    ]
    examples = [questions.examples[question] for question in order]
    rows = [
        {
            "prompt": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": example.question},
            ],
            "completion": [{"role": "assistant", "content": example.answers[0]}],
            "images": [image_of(questions, example, drawn)],
        }
        for example in examples
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=setting.network(plain=True),
            processing_class=AutoProcessor.from_pretrained(setting.folder),
            train_dataset=Dataset.from_list(rows),
            args=SFTConfig(
                output_dir=folder,
                max_length=None,  # a truncated image is an error
                num_train_epochs=1,
                per_device_train_batch_size=PADDED_ROWS,
                gradient_accumulation_steps=max(1, min(STEP, len(rows)) // PADDED_ROWS),
                gradient_checkpointing=False,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                weight_decay=0.0,
                bf16=setting.precision == "bf16",
                use_cpu=device.type == "cpu",
                dataloader_pin_memory=device.type == "cuda",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
        )
        with stopwatch(device) as seconds:
            trainer.train()
    tokens = sum(plan.tokens([question]) for question in order)
    return Measured(len(rows), seconds[0], tokens, 0, peak_gib=peak_gib(device))
