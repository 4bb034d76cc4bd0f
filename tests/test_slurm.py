"""The batch scripts, submitted to a real SLURM of two nodes whose GPUs are fake: the CPU does the work."""

import itertools
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import slurm_cluster
from trajectory.conftest import Runs, trace

ROOT = Path(__file__).resolve().parent.parent

needs_slurm = pytest.mark.skipif(bool(slurm_cluster.missing()), reason=slurm_cluster.missing())


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm_cluster.Cluster]:
    """Jobs find this interpreter's `accelerate`, an nvidia-smi as on a node whose driver sees no GPU, and a
    scontrol that notes what checkpoints there are when a job requeues itself."""
    programs = tmp_path_factory.mktemp("bin")
    by_job = '[ "$1" = requeue ] && [ -n "$SLURM_JOB_ID" ]'
    for name, lines in {
        "nvidia-smi": "exit 9",
        "scontrol": f"{by_job} && echo $(ls -A $RUN/checkpoints) >>$RUN.requeued\n"
        f'exec {shutil.which("scontrol")} "$@"',
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{lines}\n")
        (programs / name).chmod(0o755)
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
    seconds = float(os.environ["SLOWLY"])
    records.step = lambda *given, **row: (step(*given, **row), time.sleep(seconds + 4 * (row["step"] == 20)))

if "SLOWLY" in os.environ:
    threading.Thread(target=slow, daemon=True).start()
"""
"""A sitecustomize.py with which every step of a run takes longer, and the last one longest."""


class Jobs:
    """Runs of 20 steps on the cluster, each in a folder and with a log of its own."""

    def __init__(self, cluster: slurm_cluster.Cluster, runs: Runs) -> None:
        self.cluster, self.runs, self.logs = cluster, runs, runs.folder
        (runs.folder / "sitecustomize.py").write_text(SLOWLY)
        cluster.environment |= {"PYTHONPATH": f"{ROOT}:{runs.folder}"}

    def words(self, output: str) -> list[str]:
        return [str(self.runs.recipe), *self.runs._words(output)]

    def submit(self, output: str, seconds: float, *options: str) -> str:
        """`seconds` that a step takes at least; returns the job's number."""
        self.cluster.environment |= {"SLOWLY": str(seconds), "RUN": str(self.runs.folder / output)}
        options = ("--gres=gpu:1", "--cpus-per-task=1", f"--output={self.log_of(output)}", *options)
        words = [*self.words(output), "checkpoint.every=3"]
        return self.cluster.submit("sbatch", "--parsable", *options, "slurm/train.sbatch", *words, cwd=ROOT)

    def surgvqa(self, seconds: float, *words: str) -> list[str]:
        """The numbers of the jobs that `surgvqa submit` submits."""
        self.cluster.environment |= {"SLOWLY": str(seconds), "RUN": str(self.runs.folder / "submitted")}
        command = [sys.executable, "-m", "surgvqa.cli", "submit", *words, "--cpus-per-task=1", "--time=5"]
        printed = self.cluster.submit(*command, cwd=ROOT)
        return [line.split()[1].strip(":") for line in printed.splitlines() if line.startswith("job ")]

    def log_of(self, output: str) -> Path:
        return self.logs / f"{output}.log"

    def until_step(self, output: str, step: int) -> None:
        """Wait until a run has made so many steps."""
        records = self.runs.folder / output / "metrics.jsonl"
        self.until(lambda: records.is_file() and len(records.read_text().splitlines()) >= step, output)

    def until(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + 240
        while not condition():
            assert time.monotonic() < end, what
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
    """A job whose time ends before its run does; submitted early, since that takes two minutes.

    SLURM looks every 30 seconds: it asks after 85 to 115 of the 120.
    """
    return jobs.submit("limited", 5, "--time=2", "--signal=B:USR1@5")


@pytest.fixture(scope="module")
def asked(jobs: Jobs) -> dict[str, str]:
    """Jobs of two processes that were asked to save in the middle, and come back."""
    asked = {
        "gpus": jobs.submit("gpus", 0.5, "--gres=gpu:2"),
        "nodes": jobs.submit("nodes", 0.5, "--nodes=2"),
    }
    for output, job in asked.items():
        jobs.until_step(output, 4)
        jobs.ask_to_save(job)
    return asked


@pytest.fixture(scope="module")
def reference(jobs: Jobs) -> Path:
    """The run that nothing disturbs."""
    done = jobs.runs.launched("reference", ["torch.distributed.run", "--standalone"])
    assert done.returncode == 0, done.stderr
    return jobs.runs.folder / "reference"


def steps(log: str) -> list[str]:
    """Return the step that the run had reached at each stop, starts that were stopped included."""
    said = r"^(?:\[0\] ?)?stopped (?:after step (\d+)|\(.*\) before the first step)"
    found = re.findall(said, log, re.MULTILINE)
    return list(itertools.accumulate(found, lambda before, step: step or before, initial="0"))[1:]


@needs_slurm
@pytest.mark.fault("F6")
def test_arrays_chains_and_evaluations(jobs: Jobs, limited: str) -> None:
    cluster, folder = jobs.cluster, jobs.runs.folder
    array, evaluation = jobs.surgvqa(1.0, *jobs.words("array"), "eval.final=val", "--array-seeds", "2")
    *chain, last = jobs.surgvqa(1.0, *jobs.words("array-chain"), "eval.final=test", "--chain", "3")
    jobs.until(lambda: cluster.fields(f"{array}_42")["JobState"] == "RUNNING", "the job begins")
    jobs.until((ROOT / f"slurm-{cluster.fields(f'{array}_42')['JobId']}").is_dir, "its script begins")
    jobs.ask_to_save(f"{array}_42")  # while Python still imports what it needs
    jobs.until_step("array-chain", 3)
    jobs.ask_to_save(chain[0])

    cluster.environment["COLUMNS"] = "200"
    table = cluster.submit(sys.executable, "-m", "surgvqa.cli", "status", str(folder), cwd=ROOT)
    (row,) = [line.split() for line in table.splitlines() if "array-seed43" in line]
    assert row[1] in ("running", "done")
    assert row[1] == "done" or row[2] == f"{array}_43"
    jobs.until_step("array-seed43", 20)
    jobs.ask_to_save(f"{array}_43")  # while the run ends anyway

    assert [cluster.end(job, 200) for job in chain] == ["FAILED", "COMPLETED", "COMPLETED"]
    assert "A job before this one" in (ROOT / f"slurm-surgvqa-array-chain-{chain[2]}.out").read_text()
    assert trace(folder / "array-chain")[-1]["step"] == 20
    assert cluster.end(last, 200) == "COMPLETED"
    assert json.loads((folder / "array-chain" / "scores.json").read_text())["split"] == "test"
    for seed, stopped in ((42, ["0"]), (43, [])):
        assert cluster.end(f"{array}_{seed}", 200) == "COMPLETED"
        fields = cluster.fields(f"{array}_{seed}")
        log = Path(fields["StdOut"]).read_text()
        assert fields["Restarts"] == str(len(stopped))
        assert "The time is nearly over" in log
        assert steps(log) == stopped
        assert len(trace(folder / f"array-seed{seed}")) == 20
        assert cluster.end(f"{evaluation}_{seed}", 200) == "COMPLETED"
        assert json.loads((folder / f"array-seed{seed}" / "scores.json").read_text())["split"] == "val"
    assert trace(folder / "array-seed42")[0]["ids"] != trace(folder / "array-seed43")[0]["ids"]


@needs_slurm
@pytest.mark.long
@pytest.mark.fault("F6")
def test_a_requeue_and_a_node_that_is_drained_or_down(
    jobs: Jobs, limited: str, asked: dict[str, str], reference: Path
) -> None:
    cluster, spare = jobs.cluster, "--partition=spare"

    def node(state: str) -> None:
        cluster.ask("scontrol", "update", f"nodename={cluster.spare}", f"state={state}", "reason=test")

    job = jobs.submit("hurt", 0.5, spare)
    jobs.until_step("hurt", 4)
    cluster.ask("scontrol", "requeue", job)
    jobs.until(lambda: "resuming" in jobs.log_of("hurt").read_text(), "the job goes on")

    node("drain")
    step = len(trace(jobs.runs.folder / "hurt"))
    other = cluster.submit("sbatch", "--parsable", spare, "--output=/dev/null", "--wrap=true", cwd=ROOT)
    jobs.until_step("hurt", step + 4)
    assert cluster.fields(other)["JobState"] == "PENDING"
    node("resume")
    assert cluster.end(other) == "COMPLETED"

    node("down")
    jobs.until((jobs.runs.folder / "hurt/ended.json").exists, "the run saved")
    node("resume")
    assert cluster.end(job, 200) == "COMPLETED", jobs.log_of("hurt").read_text()
    log = jobs.log_of("hurt").read_text()
    assert cluster.fields(job)["Restarts"] == "2"
    assert log.count("resuming after step") == 2
    assert "DUE TO NODE FAILURE" in log
    assert "asks to go back into the queue" not in log  # nobody else does that
    assert jobs.ended("hurt") == "done"
    jobs.assert_curve("hurt", reference)


@needs_slurm
@pytest.mark.fault("F6")
def test_a_job_goes_on_until_the_run_is_done(
    jobs: Jobs, limited: str, asked: dict[str, str], reference: Path
) -> None:
    """F6: the time limit; the same signal on two GPUs and on two nodes; scancel."""
    cluster = jobs.cluster
    cancelled = jobs.submit("cancelled", 0.7)
    jobs.until_step("cancelled", 4)
    cluster.ask("scancel", cancelled)
    assert cluster.end(cancelled) == "CANCELLED", jobs.log_of("cancelled").read_text()
    assert jobs.ended("cancelled") == "preempted"
    assert cluster.fields(cancelled)["Restarts"] == "0"

    for output, job in {**asked, "limited": limited}.items():
        assert cluster.end(job, 300) == "COMPLETED", jobs.log_of(output).read_text()
        log = jobs.log_of(output).read_text()
        assert (" 2 processes," in log) == (output != "limited")
        assert jobs.ended(output) == "done"
        jobs.assert_curve(output, reference)
        # Requeued once each time, when the checkpoint that it goes on from had its name.
        stopped = steps(log)
        assert len(stopped) == int(cluster.fields(job)["Restarts"]) >= 1
        # A start that is stopped may not come as far as to say where it resumes.
        resumed = dict.fromkeys(re.findall(r"resuming after step (\d+)", log))
        assert list(resumed) == list(dict.fromkeys(step for step in stopped if step != "0"))
        found = [line.split() for line in (jobs.runs.folder / f"{output}.requeued").read_text().splitlines()]
        newest = [[f"step-{int(step):06d}"] if step != "0" else [] for step in stopped]
        assert [names[-1:] for names in found] == newest
        assert all(name.startswith("step-") for names in found for name in names)

    run = jobs.runs.folder / "gpus"
    state, log = submit(cluster, jobs.log_of("evaluated"), "--gres=gpu:2", "slurm/evaluate.sbatch", str(run))
    assert state == "COMPLETED", log
    assert len((run / "predictions.jsonl").read_text().splitlines()) == 18
