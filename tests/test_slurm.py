"""The batch scripts, submitted to a real SLURM of two nodes whose GPUs are fake: the CPU does the work."""

import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_cluster
from trajectory.conftest import Runs, trace

ROOT = Path(__file__).resolve().parent.parent
SHORT = ["train.max_steps=2", "eval.every=null", "eval.final=null"]

needs_slurm = pytest.mark.skipif(bool(slurm_cluster.missing()), reason=slurm_cluster.missing())


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm_cluster.Cluster]:
    """Jobs find this interpreter's `accelerate`, and an nvidia-smi as on a node whose driver sees no GPU."""
    programs = tmp_path_factory.mktemp("bin")
    (programs / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (programs / "nvidia-smi").chmod(0o755)
    with slurm_cluster.cluster(nodes=2) as running:
        path = running.environment["PATH"]
        running.environment["PATH"] = f"{programs}:{Path(sys.executable).parent}:{path}"
        before = set(ROOT.glob("slurm-*"))
        yield running
    for left in set(ROOT.glob("slurm-*")) - before:
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def submit(cluster: slurm_cluster.Cluster, log: Path, *arguments: str) -> tuple[str, str]:
    """The state a job ended in, and what it printed."""
    state = cluster.run("--cpus-per-task=2", "--time=5", f"--output={log}", *arguments, cwd=ROOT)
    return state, log.read_text()


@needs_slurm
@pytest.mark.parametrize(
    ("shape", "processes"),
    [(["--gres=gpu:1"], 1), (["--gres=gpu:2"], 2), (["--nodes=2", "--gres=gpu:1"], 2)],
    ids=["1 GPU", "2 GPUs", "2 nodes of 1 GPU"],
)
def test_a_job_trains_on_all_it_was_given(
    cluster: slurm_cluster.Cluster, tmp_path: Path, shape: list[str], processes: int
) -> None:
    run = tmp_path / "run"
    train = [*shape, "slurm/train.sbatch", "recipes/demo.yaml", f"output={run}", *SHORT]
    state, log = submit(cluster, tmp_path / "log", *train)
    assert state == "COMPLETED", log
    assert ("1 process," if processes == 1 else f" {processes} processes,") in log
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    if shape == ["--gres=gpu:2"]:
        state, log = submit(cluster, tmp_path / "log", *shape, "slurm/evaluate.sbatch", str(run))
        assert state == "COMPLETED", log
        assert (run / "predictions.jsonl").stat().st_size > 0


@needs_slurm
@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ([], ["usage: sbatch slurm/train.sbatch RECIPE"]),
        (
            ["recipes/demo.yaml", "train.lrr=1"],
            ["This job has no GPU: one process per node, on the CPU.", "train.lrr"],
        ),
    ],
    ids=["no recipe", "unknown key"],
)
def test_a_job_without_a_sound_recipe_fails(
    cluster: slurm_cluster.Cluster, tmp_path: Path, arguments: list[str], messages: list[str]
) -> None:
    state, log = submit(cluster, tmp_path / "log", "--gres=none", "slurm/train.sbatch", *arguments)
    assert state == "FAILED"
    assert all(message in log for message in messages), log


SLOWLY = """
import os, sys, threading, time

def slow():
    while not hasattr(sys.modules.get("surgvqa.run"), "Records"):
        time.sleep(0.05)
    records = sys.modules["surgvqa.run"].Records
    step = records.step
    records.step = lambda *given, **row: (step(*given, **row), time.sleep(float(os.environ["SLOWLY"])))

if "SLOWLY" in os.environ:
    threading.Thread(target=slow, daemon=True).start()
"""
"""A sitecustomize.py with which every step of a run takes longer."""


class Jobs:
    """Runs of 20 steps on the cluster, each in a folder and with a log of its own."""

    def __init__(self, cluster: slurm_cluster.Cluster, runs: Runs) -> None:
        self.cluster, self.runs, self.logs = cluster, runs, runs.folder
        (runs.folder / "sitecustomize.py").write_text(SLOWLY)
        cluster.environment |= {"PYTHONPATH": f"{ROOT}:{runs.folder}"}

    def words(self, output: str) -> list[str]:
        return [str(self.runs.recipe), *self.runs._words(output, "checkpoint.every=50")]

    def submit(self, output: str, seconds: float, *options: str) -> str:
        """`seconds` that a step takes at least; returns the job's number."""
        self.cluster.environment["SLOWLY"] = str(seconds)
        options = ("--gres=gpu:1", "--cpus-per-task=1", f"--output={self.log_of(output)}", *options)
        command = ["sbatch", "--parsable", *options, "slurm/train.sbatch", *self.words(output)]
        return self.cluster.submit(*command, cwd=ROOT)

    def surgvqa(self, seconds: float, *words: str) -> list[str]:
        """The numbers of the jobs that `surgvqa submit` submits."""
        self.cluster.environment["SLOWLY"] = str(seconds)
        command = [sys.executable, "-m", "surgvqa.cli", "submit", *words, "--cpus-per-task=1", "--time=5"]
        printed = self.cluster.submit(*command, cwd=ROOT)
        return [line.split()[1].strip(":") for line in printed.splitlines() if line.startswith("job ")]

    def log_of(self, output: str) -> Path:
        return self.logs / f"{output}.log"

    def until_step(self, output: str, step: int) -> None:
        """Wait until a run has made so many steps."""
        records, end = self.runs.folder / output / "metrics.jsonl", time.monotonic() + 120
        while not records.is_file() or len(records.read_text().splitlines()) < step:
            assert time.monotonic() < end, output
            time.sleep(0.1)

    def ask_to_save(self, job: str) -> None:
        """What SLURM does for `--signal=B:USR1`."""
        self.cluster.ask("scancel", "--signal=USR1", "--batch", job)

    def ended(self, output: str) -> str:
        return str(json.loads((self.runs.folder / output / "ended.json").read_text())["name"])

    def assert_curve(self, output: str, reference: Path) -> None:
        ours, theirs = trace(self.runs.folder / output), trace(reference)
        assert [row["step"] for row in ours] == list(range(1, 21))
        assert [row["ids"] for row in ours] == [row["ids"] for row in theirs]
        assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-5)


@pytest.fixture(scope="module")
def jobs(cluster: slurm_cluster.Cluster, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(cluster, Runs(tmp_path_factory.mktemp("jobs")))


@pytest.fixture(scope="module")
def limited(jobs: Jobs) -> str:
    """A job whose time ends before its run does; submitted early, since that takes a minute.

    SLURM looks every 30 seconds: it asks after 25 to 55 of the 60.
    """
    return jobs.submit("limited", 2.5, "--time=1", "--signal=B:USR1@5")


@needs_slurm
def test_arrays_chains_and_evaluations(jobs: Jobs, limited: str) -> None:
    cluster, folder = jobs.cluster, jobs.runs.folder
    evaluated = ["--array-seeds", "2", "--evaluate", "val"]
    array, evaluation = jobs.surgvqa(1.0, *jobs.words("array"), *evaluated)
    chain = jobs.surgvqa(1.0, *jobs.words("array-chain"), "--chain", "3")
    jobs.until_step("array-seed43", 3)
    jobs.ask_to_save(f"{array}_43")
    jobs.until_step("array-chain", 3)
    jobs.ask_to_save(chain[0])

    cluster.environment["COLUMNS"] = "200"
    table = cluster.submit(sys.executable, "-m", "surgvqa.cli", "status", str(folder), cwd=ROOT)
    (row,) = [line.split() for line in table.splitlines() if "array-seed42" in line]
    assert row[1] in ("running", "done")
    assert row[1] == "done" or row[2] == f"{array}_42"

    assert [cluster.end(job, 200) for job in chain] == ["FAILED", "COMPLETED", "COMPLETED"]
    assert "A job before this one" in (ROOT / f"slurm-surgvqa-array-chain-{chain[2]}.out").read_text()
    assert trace(folder / "array-chain")[-1]["step"] == 20
    for seed, restarts in ((42, "0"), (43, "1")):
        assert cluster.end(f"{array}_{seed}", 200) == "COMPLETED"
        assert cluster.fields(f"{array}_{seed}")["Restarts"] == restarts
        assert cluster.end(f"{evaluation}_{seed}", 200) == "COMPLETED"
        assert len(trace(folder / f"array-seed{seed}")) == 20
        assert (folder / f"array-seed{seed}" / "scores.val.json").is_file()
    assert trace(folder / "array-seed42")[0]["ids"] != trace(folder / "array-seed43")[0]["ids"]


@needs_slurm
def test_a_job_goes_on_until_the_run_is_done(jobs: Jobs, limited: str) -> None:
    """F6: the time limit, a requeue by an administrator and scancel, of three jobs at the same time."""
    cluster = jobs.cluster
    requeued, cancelled = jobs.submit("requeued", 0.7), jobs.submit("cancelled", 0.7)
    jobs.until_step("requeued", 4)
    cluster.ask("scontrol", "requeue", requeued)
    jobs.until_step("cancelled", 4)
    cluster.ask("scancel", cancelled)
    reference = jobs.runs.launched("reference", ["torch.distributed.run", "--standalone"])
    assert reference.returncode == 0, reference.stderr

    assert cluster.end(cancelled) == "CANCELLED", jobs.log_of("cancelled").read_text()
    assert jobs.ended("cancelled") == "preempted"
    assert cluster.fields(cancelled)["Restarts"] == "0"

    for job, output in ((requeued, "requeued"), (limited, "limited")):
        assert cluster.end(job, 300) == "COMPLETED", jobs.log_of(output).read_text()
        log = jobs.log_of(output).read_text()
        restarts = int(cluster.fields(job)["Restarts"])
        assert restarts >= 1
        assert log.count("stopped after step") == log.count("resuming after step") == restarts, log
        assert jobs.ended(output) == "done"
        jobs.assert_curve(output, jobs.runs.folder / "reference")
        # Requeued by the job itself only where nobody else does.
        assert log.count("asks to go back into the queue") == (restarts if output == "limited" else 0)
