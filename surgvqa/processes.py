"""The processes of a run: found, told apart, brought to agree; and how they compute."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env

import surgvqa
from surgvqa.recipe import BadInput
from surgvqa.terminal import Formatter

log = logging.getLogger("surgvqa")

Result = TypeVar("Result")

PATIENCE = timedelta(hours=1)
"""How long processes wait for each other: the others wait while the main one decodes every image."""


def start() -> Accelerator:
    """This process among those that a launcher started. Raises BadInput where they did not find each other.

    Mixed precision is the recipe's (see `Compute`). Messages go to stderr, and those of other processes
    than the main one say whose they are.
    """
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"),
        mixed_precision="no",
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        raise BadInput(
            f"the launcher started {expected} processes, but each of them is alone; "
            "use one of accelerate_configs/ or torchrun"
        )
    handler = logging.StreamHandler()
    rank = accelerator.process_index
    handler.setFormatter(Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    log.handlers = [handler]
    log.setLevel(logging.INFO)
    return accelerator


def cpu_asked_for() -> bool:
    """Return whether the environment asks to compute on the CPU."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "unset")
    return bool(parse_flag_from_env("ACCELERATE_USE_CPU")) or hidden == "" or hidden.startswith("-1")


def name(device: torch.device) -> str:
    """What a person calls a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Versions, devices and processes: what a figure means nothing without."""
    packages = ("torch", "transformers", "accelerate", "peft", "numpy")
    found = {
        "surgvqa": surgvqa.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "cuda": torch.version.cuda,
        "device": name(accelerator.device),
        "processes": accelerator.num_processes,
    }
    return {key: value for key, value in found.items() if value is not None}


def _commit() -> str | None:
    """That of our own checkout; None where we are installed elsewhere, or there is no git."""
    root = Path(surgvqa.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def stop(accelerator: Accelerator) -> None:
    """Leave the other processes. Call it where nothing holds a wrapped model any more.

    A wrapped model that is freed last would free the process group while it holds Python's lock, which a
    thread of gloo that frees its last tensors may be waiting for: seen as a hang at the very end.
    """
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    accelerator.end_training()


def main_first(accelerator: Accelerator | None, work: Callable[[], Result]) -> Result:
    """`work()` of the main process, on every process; what it raises is raised on all of them."""
    if accelerator is None or accelerator.num_processes == 1:
        return work()
    told: list[tuple[Result | None, Exception | None]] = [(None, None)]
    if accelerator.is_main_process:
        try:
            told = [(work(), None)]
        except Exception as error:
            told = [(None, error)]
    broadcast_object_list(told)
    result, failure = told[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]  # None only where Result has it


def refuse_together(accelerator: Accelerator | None, problems: Sequence[str]) -> None:
    """Raise BadInput on every process with the problems of all of them, if there are any."""
    every = list(problems) if accelerator is None else gather_object(list(problems))
    if every:
        raise BadInput(dict.fromkeys(every))


def anywhere(accelerator: Accelerator, here: bool) -> bool:
    """Whether something is so on any process; the same answer on each."""
    flag = torch.tensor(float(here), device=accelerator.device)
    return bool(accelerator.reduce(flag, "sum").item() > 0)


def seed(*numbers: int) -> int:
    """One seed of several numbers, the same everywhere."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@dataclass(frozen=True)
class Compute:
    """How a recipe's model computes on a device."""

    attn: str
    """`sdpa` or `flex`."""
    autocast: torch.dtype | None
    """The type to compute in; None for that of the weights."""
    tf32: bool


def compute(precision: str, attn: str, device: torch.device) -> Compute:
    """Decide, and set TF32 for the whole process: on with bf16, off with fp32.

    Raises BadInput where the device has no such attention kernel.
    """
    cuda = device.type == "cuda"
    if attn == "flex" and not cuda:
        raise BadInput("model.attn: flex needs a CUDA GPU; leave it at auto")
    tf32 = cuda and precision == "bf16"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    return Compute(
        attn=("flex" if cuda else "sdpa") if attn == "auto" else attn,
        autocast=torch.bfloat16 if precision == "bf16" else None,
        tf32=tf32,
    )


def data_workers(asked: int | None, device: torch.device) -> int:
    """Data workers of this process: as asked, else one per core beyond its own, at most 8; none on CPU."""
    if asked is not None:
        return asked
    if device.type == "cpu":
        return 0
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(8, len(os.sched_getaffinity(0)) // local - 1))
