"""`surgvqa train RECIPE --gpus N|all`: the same as `accelerate launch` with the fitting configuration."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from surgvqa.recipe import BadInput


def launch(gpus: str, arguments: list[str]) -> NoReturn:
    """Become `accelerate launch` of surgvqa.train on `gpus` of this machine's GPUs, a number or `all`."""
    count = _count(gpus, available_gpus())
    config = configs() / ("1gpu.yaml" if count == 1 else "2gpu.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--num_processes", str(count), "-m", "surgvqa.train", *arguments]
    # The launcher would kill processes that take longer than 30 seconds to save, and heed SIGHUP under nohup.
    defaults = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        defaults["PET_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGQUIT"
    os.execve(sys.executable, command, {**defaults, **os.environ})


def configs() -> Path:
    """The Accelerate configurations: in the package once installed, else beside it in the repository."""
    package = Path(__file__).parent
    installed = package / "accelerate_configs"
    return installed if installed.is_dir() else package.parent / "accelerate_configs"


def available_gpus() -> int:
    """How many GPUs this process may use: CUDA_VISIBLE_DEVICES counts."""
    import torch

    return torch.cuda.device_count()


def _count(gpus: str, available: int) -> int:
    if gpus != "all" and not (gpus.isdecimal() and int(gpus) > 0):
        raise BadInput(f"--gpus {gpus}: give a number from 1 up, or all")
    if available == 0:
        raise BadInput(
            f"--gpus {gpus}: this machine has no GPU that CUDA can use; without --gpus it trains on the CPU"
        )
    count = available if gpus == "all" else int(gpus)
    if count > available:
        seen = "1 GPU" if available == 1 else f"{available} GPUs"
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        limit = "" if hidden is None else f" within CUDA_VISIBLE_DEVICES={hidden}"
        raise BadInput(f"--gpus {gpus}: this machine has {seen}{limit}; ask for at most {available}, or all")
    return count
