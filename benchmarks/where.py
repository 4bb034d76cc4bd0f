"""Where the time of a training step goes: `python -m benchmarks.where` profiles trees of both families.

Operators are put into kinds by their names, by the time in each itself; what the profiler saw no operator
for is Python and the libraries' own bookkeeping.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import inputs
from benchmarks.inputs import Setting, write_images, write_model
from benchmarks.record import write
from benchmarks.train import LEARNING_RATE
from surgvqa.loss import TreeLoss

KINDS = {
    "attention": r"scaled_dot_product|flash_attention|_attention",
    "matrix products": r"aten::(add)?mm$|aten::bmm$|aten::linear|mkldnn",
    "optimizer": r"Optimizer|_fused_adamw|foreach|addcdiv|addcmul|lerp",
    "copies": r"copy_|aten::(cat|contiguous|clone|index|repeat|_to_copy|embedding|gather|fill|zero|empty)",
    "element by element": (
        r"aten::(mul|add|sub|div|silu|gelu|rsqrt|pow|mean|sum|neg|exp|layer_norm|native|cos|sin)"
    ),
}
PER_IMAGE = 8


def kind(operator: str) -> str:
    """Which of KINDS an operator is."""
    return next((name for name, pattern in KINDS.items() if re.search(pattern, operator)), "other operators")


def shares(setting: Setting) -> dict[str, Any]:
    """Seconds of a step by kind, after a step that is not counted."""
    questions, device = setting.questions(), torch.device(setting.device)
    network = setting.network()
    loss = TreeLoss(network, attn="flex" if device.type == "cuda" else "sdpa", autocast=setting.autocast)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, fused=device.type == "cuda")
    count = len(setting.images)
    trees = [list(range(PER_IMAGE * n, PER_IMAGE * (n + 1))) for n in range(count)]

    def step() -> tuple[float, float]:
        began = time.perf_counter()
        pack = questions.pack(trees)
        packed = time.perf_counter()
        loss(pack.to(device)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return packed - began, time.perf_counter() - packed

    first_data, _ = step()  # reads and draws the images, which later epochs find drawn
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as found:
        data, compute = step()
    time_in = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    spent: Counter[str] = Counter()
    for event in found.key_averages():
        spent[kind(event.key)] += getattr(event, time_in) / 1e6
    return {
        "family": setting.family,
        "data_s": data,
        "data_first_s": first_data,
        "compute_s": compute,
        "kinds_s": dict(spent.most_common()),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = inputs.options("where", __doc__.partition(":")[0])
    parser.add_argument("--images", type=int, default=2, help="in the step, with 8 questions each")
    given = parser.parse_args(argv)
    precision = "bf16" if given.device.startswith("cuda") else "fp32"
    rows = []
    with tempfile.TemporaryDirectory() as parent:
        images = write_images(given.images, Path(parent) / "images")
        for family in given.families:
            folder = write_model(family, given.size, Path(parent))
            row = shares(Setting(folder, images, PER_IMAGE, given.canvas, given.device, precision))
            whole = sum(row["kinds_s"].values())
            print(
                f"{family}: data {row['data_s']:.2f} s ({row['data_first_s']:.2f} s the first time), "
                f"compute {row['compute_s']:.2f} s: "
                + ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in row["kinds_s"].items())
            )
            rows.append(row)
    settings = {key: getattr(given, key) for key in ("images", "size", "canvas", "device")}
    print(f"written: {write('where', settings, rows, given.out)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
