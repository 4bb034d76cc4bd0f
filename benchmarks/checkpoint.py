"""What a checkpoint costs training: `python -m benchmarks.checkpoint` takes turns in one run.

    none         steps alone
    background   a checkpoint is written while training goes on
    waiting      training waits for it

Each turn makes the same number of optimizer steps; the checkpoint comes after the first of them, and the turn
ends when its last step is done and the checkpoint verified.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import inputs
from benchmarks.inputs import Setting, write_images, write_model
from benchmarks.record import spread, write
from benchmarks.train import LEARNING_RATE
from surgvqa import checkpoint, model
from surgvqa.loss import TreeLoss
from surgvqa.results import OPTIMIZER

QUESTIONS = 8
"""In a step, about one image."""
WAYS = ("none", "background", "waiting")


class Training:
    """A model in training, whose steps are alike."""

    def __init__(self, setting: Setting) -> None:
        self.network = setting.network()
        self.parameters = dict(model.trainable(self.network))
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=LEARNING_RATE)
        self.device = torch.device(setting.device)
        attn = "flex" if self.device.type == "cuda" else "sdpa"
        self.loss = TreeLoss(self.network, attn=attn, autocast=setting.autocast)
        self.pack = setting.questions().pack([list(range(QUESTIONS))], cuda=self.device.type == "cuda")

    def step(self) -> float:
        """Seconds of an optimizer step."""
        began = time.perf_counter()
        loss = self.loss(self.pack.to(self.device))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss.item()
        return time.perf_counter() - began

    def fill(self, folder: Path, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Write what surgvqa.train does that has a size worth speaking of."""
        model.save(self.network, folder, weights)
        save_file(moments, folder / OPTIMIZER)
        checkpoint.write_json(folder / checkpoint.STATE, {"step": 0})

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return model.weights(self.network), checkpoint.moments(self.optimizer, self.parameters)


def turn(training: Training, way: str, steps: int, root: Path) -> dict[str, Any]:
    """Seconds of the turn and of its median step, and what its checkpoint took."""
    written: list[checkpoint.Written] = []
    began = time.perf_counter()
    seconds = [training.step()]
    if way == "waiting":
        saving = time.perf_counter()
        with checkpoint.writing(root, 1, keep=1) as folder:
            training.fill(folder, *training.tensors())
        took = time.perf_counter() - saving
        size = sum(
            file.stat().st_size for file in (root / checkpoint.folder_name(1)).rglob("*") if file.is_file()
        )
        written.append(checkpoint.Written(1, size, took, took))
        seconds += [training.step() for _ in range(steps - 1)]
    elif way == "background":
        with checkpoint.Writer(root, 1, written.append) as writer:
            writer.write(1, training.fill, *training.tensors())
            seconds += [training.step() for _ in range(steps - 1)]
    else:
        seconds += [training.step() for _ in range(steps - 1)]
    found = {"turn_s": time.perf_counter() - began, "step_s": statistics.median(seconds)}
    for each in written:
        found |= {"mib": each.bytes / 2**20, "written_s": each.seconds, "waited_s": each.waited}
    return found


def measure(setting: Setting, steps: int, rounds: int, root: Path) -> list[dict[str, Any]]:
    """A row for each way to save: ratios are to an ordinary step of the same round."""
    training = Training(setting)
    training.step()  # AdamW makes its moments
    turn(training, "background", 2, root)
    done = [{way: turn(training, way, steps, root) for way in WAYS} for _ in range(rounds)]
    return [
        {
            "family": setting.family,
            "tune": setting.tune,
            "way": way,
            "trained_parameters": sum(p.numel() for p in training.parameters.values()),
            "mib": done[0][way]["mib"],
            "step_s": spread([each["none"]["step_s"] for each in done]),
            "written_s": spread([each[way]["written_s"] for each in done]),
            "waited_s": spread([each[way]["waited_s"] for each in done]),
            "waited_steps": spread([each[way]["waited_s"] / each["none"]["step_s"] for each in done]),
            "cost_steps": spread(
                [(each[way]["turn_s"] - each["none"]["turn_s"]) / each["none"]["step_s"] for each in done]
            ),
        }
        for way in WAYS[1:]
    ]


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    middle = {key: value["median"] for key, value in row.items() if isinstance(value, dict)}
    return (
        f"{row['family']} {row['tune']:5} {row['way']:10} {row['mib']:7.1f} MiB in "
        f"{middle['written_s']:.2f} s, a step {middle['step_s']:.2f} s; its step waited "
        f"{middle['waited_s']:.2f} s, {middle['waited_steps']:.2f} of a step; in all it cost "
        f"{middle['cost_steps']:.2f} steps"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = inputs.options("checkpoint", __doc__.partition(":")[0])
    parser.set_defaults(size="medium", canvas=256, families=["qwen3_vl"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="in a turn")
    given = parser.parse_args(argv)
    precision = "bf16" if given.device.startswith("cuda") else "fp32"
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as parent:
        images = write_images(1, Path(parent) / "images")
        for family in given.families:
            folder = write_model(family, given.size, Path(parent))
            for tune in ("lora", "full"):
                setting = Setting(folder, images, QUESTIONS, given.canvas, given.device, precision, tune)
                for row in measure(setting, given.steps, given.rounds, Path(parent) / tune):
                    print(line(row), flush=True)
                    table.append(row)
    settings = {key: getattr(given, key) for key in ("rounds", "steps", "size", "canvas", "device")}
    print(f"written: {write('checkpoint', settings, table, given.out)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
