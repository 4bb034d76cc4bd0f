"""The batch scripts, submitted to a real SLURM of two nodes whose GPUs are fake: the CPU does the work."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_cluster

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
        yield running


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


def test_both_scripts_start_their_module_in_the_same_way() -> None:
    def body(name: str) -> str:
        text = (ROOT / "slurm" / f"{name}.sbatch").read_text()
        return text.split("?usage: sbatch")[1].split("\n", 1)[1].replace(f"surgvqa.{name}", "surgvqa.MODULE")

    assert body("train") == body("evaluate")
