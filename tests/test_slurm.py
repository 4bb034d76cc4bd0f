"""The batch scripts, submitted to a real SLURM of two nodes whose GPUs are fake: the CPU does the work."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_cluster

ROOT = Path(__file__).resolve().parent.parent
SHORT = ["train.max_steps=2", "eval.every=null", "eval.final=null", "log.trace=true"]

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
    [(["--gres=none"], 1), (["--gres=gpu:1"], 1), (["--gres=gpu:2"], 2), (["--nodes=2", "--gres=gpu:2"], 4)],
    ids=["no GPU", "1 GPU", "2 GPUs", "2 nodes x 2 GPUs"],
)
def test_a_job_trains_on_all_it_was_given(
    cluster: slurm_cluster.Cluster, tmp_path: Path, shape: list[str], processes: int
) -> None:
    run = tmp_path / "run"
    state, log = submit(
        cluster, tmp_path / "log", *shape, "slurm/train.sbatch", "recipes/demo.yaml", f"output={run}", *SHORT
    )
    assert state == "COMPLETED", log
    assert ("1 process," if processes == 1 else f"{processes} processes,") in log
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2


@needs_slurm
def test_a_run_is_evaluated(cluster: slurm_cluster.Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train = ["--gres=gpu:1", "slurm/train.sbatch", "recipes/demo.yaml", f"output={run}", *SHORT]
    assert submit(cluster, tmp_path / "log", *train)[0] == "COMPLETED"
    state, log = submit(cluster, tmp_path / "log", "--gres=gpu:2", "slurm/evaluate.sbatch", str(run))
    assert state == "COMPLETED", log
    assert (run / "predictions.jsonl").stat().st_size > 0


@needs_slurm
@pytest.mark.parametrize(
    ("arguments", "message"), [([], "usage: sbatch"), (["recipes/demo.yaml", "train.lrr=1"], "train.lrr")]
)
def test_a_job_fails_where_its_recipe_does(
    cluster: slurm_cluster.Cluster, tmp_path: Path, arguments: list[str], message: str
) -> None:
    state, log = submit(cluster, tmp_path / "log", "--gres=gpu:1", "slurm/train.sbatch", *arguments)
    assert state == "FAILED"
    assert message in log


def test_both_scripts_start_their_module_in_the_same_way() -> None:
    def body(name: str) -> str:
        text = (ROOT / "slurm" / f"{name}.sbatch").read_text()
        return text.split("?usage: sbatch")[1].split("\n", 1)[1].replace(f"surgvqa.{name}", "surgvqa.MODULE")

    assert body("train") == body("evaluate")
