"""`surgvqa submit --dry-run` and `surgvqa status`, without a cluster."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from surgvqa import cli, lock, slurm
from surgvqa.endings import Stop

ROOT = Path(__file__).resolve().parent.parent
DEMO = "recipes/demo.yaml"


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def commands(capsys: pytest.CaptureFixture[str], *words: str) -> list[list[str]]:
    assert cli.main(["submit", *words, "--dry-run"]) == 0
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]


def test_one_job(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--gpus", "2", "--nodes", "3", "--time", "18:00:00", "--account", "lab", "--qos", "long"]
    command, evaluation = commands(capsys, DEMO, "train.lr=1e-4", *words)
    assert command[0] == "sbatch"
    assert command[-4:] == ["slurm/train.sbatch", DEMO, "train.lr=1e-4", "eval.final=null"]
    for option in ("gres=gpu:2", "nodes=3", "time=18:00:00", "account=lab", "qos=long"):
        assert f"--{option}" in command
    assert not [word for word in command if word.startswith(("--no-requeue", "--array", "--dependency"))]
    assert evaluation[-3:] == ["slurm/evaluate.sbatch", "runs/demo", "eval.final=test"]
    assert {"--dependency=afterok:JOB1", "--gres=gpu:2", "--nodes=3", "--qos=long"} <= set(evaluation)
    assert "--time=18:00:00" not in evaluation


@pytest.mark.parametrize(
    ("words", "scripts"),
    [
        (["--evaluate", "val"], [["eval.final=test"], ["eval.final=test", "--split", "val"]]),
        (["--evaluate", "test"], [["eval.final=test"]]),
        (["eval.final=null"], []),
        (["eval.final=null", "--evaluate", "val"], [["--split", "val"]]),
    ],
    ids=["another part too", "the same part", "none", "only another part"],
)
def test_what_is_evaluated_when_training_is_done(
    words: list[str], scripts: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    training, *evaluations = commands(capsys, DEMO, *words)
    assert training[-1] == "eval.final=null"  # not by training itself
    assert [command[command.index("runs/demo") + 1 :] for command in evaluations] == scripts


def test_a_chain_starts_over_only_once_and_is_evaluated_last(capsys: pytest.CaptureFixture[str]) -> None:
    *chain, last = commands(capsys, DEMO, "--chain", "3", "--fresh", "--yes")
    assert ["--fresh" in command for command in chain] == [True, False, False]
    assert all("--no-requeue" in command for command in chain)
    assert "--dependency=afterany:JOB1" in chain[1]
    assert "--dependency=afterany:JOB2" in chain[2]
    assert {"--dependency=afterok:JOB3", "--kill-on-invalid-dep=yes", "slurm/evaluate.sbatch"} <= set(last)


def test_seeds_are_an_array(capsys: pytest.CaptureFixture[str]) -> None:
    training, evaluation = commands(capsys, DEMO, "--array-seeds", "3")
    assert "--array=42-44" in training
    assert training[-3:] == ["eval.final=null", "train.seed=%a", "output=runs/demo-seed%a"]
    assert {"--array=42-44", "--dependency=aftercorr:JOB1", "runs/demo-seed%a"} <= set(evaluation)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([DEMO, "train.lrr=1"], "train.lrr: unknown key"),
        ([DEMO, "--fresh"], "add --yes to confirm"),
        ([DEMO], "sbatch: not found here; submit on a login node"),
    ],
    ids=["unknown key", "unconfirmed", "no SLURM"],
)
def test_what_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert cli.main(["submit", *words]) == 2
    assert message in capsys.readouterr().err


def test_elsewhere_there_are_no_scripts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["submit", str(ROOT / DEMO), "--dry-run"]) == 2
    assert "submit from the root of the surgvqa repository" in capsys.readouterr().err


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs train.sbatch with stand-ins for SLURM's programs: `srun` only leaves the code of a run's end."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, lines in {
        "srun": '[ "$SIGNALS" = srun ] && kill -USR1 $PPID && sleep 1\n'
        '[ -e "$SURGVQA_STOP_FILE" ] && touch asked\n'
        'echo "$@" >> srun.txt; echo "$CODE" > "$SURGVQA_EXIT_FILE"; exit 1',
        "scontrol": '[ "$1" = show ] && echo node1 || echo "$@" >> requeued.txt',
        "squeue": '[ -z "$LATE" ] || kill -USR1 $PPID; echo "$STATE"',
        "nvidia-smi": '[ "$SIGNALS" != nvidia-smi ] || kill -USR1 $PPID',
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{lines}\n")
        (programs / name).chmod(0o755)
    for name in ("slurm", "surgvqa", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)

    def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        slurm_sets = {
            "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "12", "SLURM_JOB_NUM_NODES": "1",
            "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_NODELIST": "node1", "STATE": "RUNNING",
            "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        }  # fmt: skip
        return subprocess.run(
            ["bash", ROOT / "slurm/train.sbatch", DEMO, f"output={tmp_path / 'run'}", *words],
            env={**os.environ, **slurm_sets, **environment},
            capture_output=True,
            text=True,
        )

    return run


@pytest.mark.parametrize(
    ("code", "state", "requeued"),
    [
        ("4", "RUNNING", True),
        ("4", "COMPLETING", False),
        ("0", "RUNNING", False),
        ("2", "RUNNING", False),
        ("5", "RUNNING", False),
    ],
    ids=["time over", "SLURM ends it", "done", "another job has the folder", "numeric"],
)
def test_only_a_run_that_saved_is_requeued(
    code: str,
    state: str,
    requeued: bool,
    job: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    done = job(CODE=code, STATE=state)
    assert (tmp_path / "requeued.txt").exists() == requeued, done.stdout + done.stderr
    assert done.returncode == (0 if requeued else int(code))


@pytest.mark.parametrize("sender", ["nvidia-smi", "srun"], ids=["before it begins", "while it runs"])
def test_a_run_is_asked_to_stop_whenever_the_signal_comes(
    sender: str, job: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = job(CODE="4", SIGNALS=sender)
    assert (tmp_path / "asked").exists()
    assert (tmp_path / "requeued.txt").exists(), done.stdout + done.stderr
    (tmp_path / "asked").unlink()
    done = job(CODE="0", SLURM_RESTART_COUNT="1")
    assert done.returncode == 0
    assert not (tmp_path / "asked").exists()  # it was meant for the job's former start


def test_a_run_that_is_done_when_the_signal_comes_is_not_requeued(
    job: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = job(CODE="0", SIGNALS="srun")
    assert "The time is nearly over" in done.stdout
    assert done.returncode == 0
    assert not (tmp_path / "requeued.txt").exists()


def test_a_run_stops_where_a_file_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "stop"
    monkeypatch.setenv("SURGVQA_STOP_FILE", str(file))
    with Stop() as stop:
        assert not stop
        file.touch()
        assert stop
        assert stop.reason == f"asked by {file}, which the next start must not find"


def test_a_signal_that_comes_when_the_run_has_ended_does_no_harm(
    job: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = job(CODE="4", LATE="yes")
    assert "The time is nearly over" in done.stdout
    assert (tmp_path / "requeued.txt").exists(), done.stdout + done.stderr
    assert done.returncode == 0


def test_a_run_that_gets_no_further_is_not_requeued_for_ever(
    job: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    assert [job(CODE="4").returncode for _ in range(3)] == [0, 0, 4]
    assert (tmp_path / "requeued.txt").read_text().splitlines() == ["requeue 12"] * 2


def test_who_comes_back_does_not_start_over(
    job: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    flags = ["--fresh", "--yes", "--accept-changes"]
    job(*flags, CODE="4")
    job(*flags, CODE="0", SLURM_RESTART_COUNT="1", SLURM_ARRAY_JOB_ID="12", SLURM_ARRAY_TASK_ID="3")
    first, second = (tmp_path / "srun.txt").read_text().split("--config_file")[1:]
    assert "--fresh" in first
    assert "--fresh" not in second
    assert "--accept-changes" in second


def a_run(folder: Path, steps: int, **ended: object) -> Path:
    """A run's folder as it may be found: the last lines are being written."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text((ROOT / DEMO).read_text())
    rows = [json.dumps({"step": n, "epoch": n / 20, "seconds": 2.0}) for n in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("\n".join([*rows, '{"step": 99, "epo']))
    evaluations = [{"step": 5, "split": "val", "exact": 0.75}, {"step": 9, "split": "val", "exact": 0.5}]
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluations) + "{")
    (folder / "ended.json").write_text(json.dumps(ended) if ended else '{"code"')
    (folder / "scores.json").write_text('{"overall": {')
    return folder


def test_status_of_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, here = tmp_path / "runs", socket.gethostname()
    done = a_run(runs / "done", 200, name="done")
    (done / "scores.json").write_text('{"overall": {"exact": 0.625}, "split": "test"}')
    going = a_run(runs / "going", 50)
    own = {"host": here, "pid": os.getpid(), "started": lock._started(os.getpid()), "job": "7"}
    own["place"] = lock._place()
    (going / lock.NAME).write_text(json.dumps(own))
    killed = a_run(runs / "killed", 9)
    (killed / lock.NAME).write_text(json.dumps(own | {"started": "long ago", "job": "8"}))
    waiting = a_run(runs / "waiting", 9, name="preempted")
    queue = {
        "7": slurm.Queued("7", "RUNNING", going.resolve()),
        "9": slurm.Queued("9_1", "PENDING", waiting.resolve()),
        "10": slurm.Queued("10", "PENDING", runs / "to-come"),
    }
    states = {
        name: (run.state, run.job, run.step, run.total, run.eta, run.best)
        for name in ("done", "going", "killed", "waiting", "to-come")
        for run in [slurm.look(runs / name, queue)]
    }
    best = "val 75.0% at step 5"
    assert states == {
        "done": ("done", "", 200, 200, None, f"test 62.5%, {best}"),
        "going": ("running", "7", 50, 200, 300.0, best),
        "killed": ("killed", "8", 9, 200, None, best),
        "waiting": ("requeued", "9_1", 9, 200, None, best),
        "to-come": ("pending", "10", None, None, None, ""),
    }
    monkeypatch.setenv("COLUMNS", "160")
    assert cli.main(["status", str(runs)]) == 0
    printed = capsys.readouterr().out
    assert "50/200" in printed
    assert "0:05:00" in printed


def test_status_of_runs_that_wait_for_their_first_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs of an array, their evaluation and somebody else's work."""
    rows = [
        f"8|8_42|PENDING|42|surgvqa-exp|{tmp_path}|runs/exp-seed%a",
        f"8|8_43|PENDING|43|surgvqa-exp|{tmp_path}|runs/exp-seed%a",
        f"9|9_42|PENDING|42|surgvqa-evaluate-exp|{tmp_path}|(null)",
        f"10|10|RUNNING|N/A|notebook|{tmp_path}|for the grant",
    ]
    (tmp_path / "squeue").write_text("#!/bin/sh\ncat <<END\n" + "\n".join(rows) + "\nEND\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["status"]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[1:] == [
        ["runs/exp-seed42", "pending", "8_42"],
        ["runs/exp-seed43", "pending", "8_43"],
    ]


def test_status_without_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", str(tmp_path)]) == 2
    assert "no run here" in capsys.readouterr().err
