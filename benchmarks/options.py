"""What the options of speed and memory do: `python -m benchmarks.options` trains trees with each, in turn.

Every option is compared with the settings that `benchmarks.train` measures, round by round.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import inputs
from benchmarks.inputs import Setting, write_images, write_model
from benchmarks.record import write
from benchmarks.train import STEP, loss_difference, plan_of, train_packs
from benchmarks.turns import Measured, in_turn, line, rows
from surgvqa import model

PER_IMAGE = 8


def measure(
    setting: Setting,
    *,
    layers: float = 0,
    compile_layers: bool = False,
    one_tree: bool = False,
    workers: int = 0,
) -> Measured:
    """Train an epoch; `layers` is the share of decoder layers that are recomputed, `one_tree` has
    micro-batches of one tree."""
    questions, device = setting.questions(), torch.device(setting.device)
    plan = plan_of(questions, setting.per_image)
    if one_tree:
        longest = max(plan.tokens(tree) for step in range(plan.steps_per_epoch) for tree in plan.step(step))
        plan = replace(plan, tokens_per_micro_batch=longest)
    network = setting.network()
    model.recompute(network, round(layers * len(model.decoder_layers(network))))
    if compile_layers:
        model.compile_layers(network)
    run = partial(
        train_packs,
        network,
        questions,
        device=device,
        attn="flex" if device.type == "cuda" else "sdpa",
        autocast=setting.autocast,
        workers=workers,
    )
    if compile_layers:  # before the clock, and without learning
        before = {name: weight.clone() for name, weight in network.state_dict().items()}
        run(plan=plan)
        network.load_state_dict(before)
    return run(plan=plan)


WAYS: dict[str, Callable[[Setting], Measured]] = {
    "default": measure,
    "half recomputed": partial(measure, layers=0.5),
    "all recomputed": partial(measure, layers=1),
    "compiled": partial(measure, compile_layers=True),
    "one tree at once": partial(measure, one_tree=True),
    "one data worker": partial(measure, workers=1),
}
"""train.checkpoint_layers (half and all), train.compile, the smallest batch.tokens_per_micro_batch and
data.workers, by themselves."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = inputs.options("options", __doc__.partition("\n")[0])
    parser.add_argument("--options", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help=f"optimizer steps of {STEP} questions per round")
    given = parser.parse_args(argv)
    precision = "bf16" if given.device.startswith("cuda") else "fp32"
    ways = {name: WAYS[name] for name in ("default", *given.options)}
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as parent:
        images = write_images(STEP * given.steps // PER_IMAGE, Path(parent) / "images")
        for family in given.families:
            folder = write_model(family, given.size, Path(parent))
            setting = Setting(folder, images, PER_IMAGE, given.canvas, given.device, precision)
            results = in_turn(ways, setting, replace(setting, images=images[:1]), given.rounds)
            same = {
                "family": family,
                "questions_per_image": PER_IMAGE,
                "loss_difference": loss_difference(results),
            }
            made = rows(results, "default", **same)
            table += made
            for row in made:
                print(line(row, "default"), flush=True)
            print(f"{'':9} losses differ by {same['loss_difference']:.1e} (relative)", flush=True)
    settings = {key: getattr(given, key) for key in ("rounds", "steps", "size", "canvas", "device")}
    print(f"written: {write('options', settings, table, given.out)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
