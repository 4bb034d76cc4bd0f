"""`--gpus`, and the Accelerate configurations it and people use."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from surgvqa import launch
from surgvqa.recipe import BadInput


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The command that would have replaced this process, and its environment's words on ending."""
    command: list[str] = []

    def replace(program: str, words: list[str], environment: dict[str, str]) -> None:
        command.extend([program, *words[1:]])
        ending = {
            name: value for name, value in environment.items() if "SHUTDOWN" in name or "SIGNALS" in name
        }
        command.extend(f"{name}={value}" for name, value in sorted(ending.items()))

    monkeypatch.setattr(os, "execve", replace)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
    yield command
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("gpus", "there", "config", "processes"),
    [
        ("1", 4, "1gpu", "1"),
        ("all", 1, "1gpu", "1"),
        ("2", 2, "2gpu", "2"),
        ("3", 4, "2gpu", "3"),
        ("all", 8, "2gpu", "8"),
    ],
)
def test_becomes_accelerate_launch(
    gpus: str, there: int, config: str, processes: str, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "available_gpus", lambda: there)
    launch.launch(gpus, ["recipes/demo.yaml", "train.lr=1e-4"])
    file = launch.configs() / f"{config}.yaml"
    assert file.is_file()
    assert started == [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)),
        *("--num_processes", processes, "-m", "surgvqa.train", "recipes/demo.yaml", "train.lr=1e-4"),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600",
    ]


def test_the_launcher_heeds_nohup_too(started: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "available_gpus", lambda: 2)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        launch.launch("2", ["recipes/demo.yaml"])
    finally:
        signal.signal(signal.SIGHUP, before)
    assert "PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGQUIT" in started


@pytest.mark.parametrize(
    ("gpus", "there", "visible", "message"),
    [
        ("4", 1, None, "--gpus 4: this machine has 1 GPU; ask for at most 1, or all"),
        (
            "4",
            2,
            "0,1",
            "--gpus 4: this machine has 2 GPUs within CUDA_VISIBLE_DEVICES=0,1; ask for at most 2, or all",
        ),
        ("all", 0, None, "no GPU that CUDA can use; without --gpus it trains on the CPU"),
        ("0", 2, None, "--gpus 0: give a number from 1 up, or all"),
        ("-1", 2, None, "--gpus -1: give a number"),
        ("two", 2, None, "--gpus two: give a number"),
    ],
)
def test_refuses_gpus_that_are_not_there(
    gpus: str,
    there: int,
    visible: str | None,
    message: str,
    started: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "available_gpus", lambda: there)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(BadInput) as refusal:
        launch.launch(gpus, ["recipes/demo.yaml"])
    assert message in str(refusal.value)
    assert not started


def test_configurations_say_where_and_leave_precision_to_the_recipe() -> None:
    found = {file.stem: load_config_from_file(str(file)) for file in launch.configs().glob("*.yaml")}
    assert {name: config.num_processes for name, config in found.items()} == {
        "cpu": 1, "2cpu": 2, "1gpu": 1, "2gpu": 2, "4gpu": 4, "multinode": 8,
    }  # fmt: skip
    assert {config.mixed_precision for config in found.values()} == {"no"}


SCRIPT = """
import sys, time, torch
from accelerate import Accelerator

accelerator = Accelerator(cpu=not torch.cuda.is_available())
total = accelerator.reduce(torch.tensor(float(accelerator.process_index + 1)))
words = accelerator.num_processes, torch.distributed.get_backend(), accelerator.device.type, total.item()
sys.stdout.write(" ".join(map(str, words)) + "\\n")  # at once: two processes write here
time.sleep(2)
accelerator.end_training()
"""


@pytest.mark.fault("F22")
def test_two_jobs_of_two_cpu_processes_run_side_by_side(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(launch.configs() / "2cpu.yaml"), str(script)]
    jobs = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    for job in jobs:
        output, _ = job.communicate(timeout=120)
        assert job.returncode == 0, output
        assert output.count("2 gloo cpu 3.0") == 2, output
