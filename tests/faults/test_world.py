"""What happens around a run: other processes, their numbers and workers, ports, folders, clocks."""

from __future__ import annotations

import functools
import json
import os
import re
import resource
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TOPICS
from numpy.typing import NDArray
from safetensors.numpy import load_file
from trajectory.conftest import ROOT, Runs, trace

from surgvqa import checkpoint

from .conftest import ONE, TWO, Hurt

Make = Callable[[str], Hurt]

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node"]
LORA = ["model.tune=lora", "model.train_vision=false", "model.train_merger=false", "model.lora.dropout=0"]
CONFIGS = ROOT / "accelerate_configs"

ODD_ON_RANK_1 = """
import hashlib, os, sys
import torch
from surgvqa import loss, memory, train

forward, update, fit = loss.TreeLoss.forward, torch.optim.AdamW.step, memory.fit
calls, digest = 0, hashlib.sha256()

def fit_uncounted(*given, **named):
    global calls
    found = fit(*given, **named)
    calls = 0
    return found

def odd(self, pack):
    global calls
    calls += 1
    factor = {22: 1000.0, 24: float("nan")}.get(calls, 1.0) if os.environ["RANK"] == "1" else 1.0
    return forward(self, pack) * factor

def digested(self, *given, **named):
    update(self, *given, **named)
    for group in self.param_groups:
        for parameter in group["params"]:
            digest.update(parameter.detach().numpy().tobytes())

train.memory.fit, loss.TreeLoss.forward, torch.optim.AdamW.step = fit_uncounted, odd, digested
code = train.main()
sys.stdout.write(f"rank {os.environ['RANK']} steps {calls} weights {digest.hexdigest()}\\n")
sys.exit(code)
"""
"""One micro-batch is one step; the digest is of all weights after each update."""


def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.fault("F11", "F12")
def test_a_loss_that_is_odd_on_one_process(runs: Runs) -> None:
    """Step 22 is 1000 times too large on rank 1, step 24 is NaN there: all do and say the same."""
    words = ["train.max_steps=26", "batch.tokens_per_micro_batch=100000", "checkpoint.every=23"]
    done = runs.launched("odd", [*TORCHRUN, "2"], *words, script=ODD_ON_RANK_1)
    assert done.returncode == 0, done.stderr
    told = dict(re.findall(r"rank (\d) steps 26 weights (\w{64})", done.stdout))
    assert told.keys() == {"0", "1"}
    assert told["0"] == told["1"]
    run = runs.folder / "odd"
    ids = {row["step"]: row["ids"] for row in records(run / "trace.jsonl")}
    jump, skip = records(run / "unusual.jsonl")
    assert (jump["step"], skip["step"]) == (22, 24)
    assert jump["what"].startswith("gradient norm ")
    assert skip["what"] == "gradients not finite, no update"
    for row in (jump, skip):
        assert row["ids"] == ids[row["step"]]
        said = f"step {row['step']}: {row['what']}; questions {', '.join(row['ids'])}"
        lines = done.stderr.splitlines()
        assert said in lines
        assert f"[rank 1] {said}" in lines
    whole, after = (
        load_file(run / "checkpoints" / f"step-{step:06d}" / "model.safetensors") for step in (23, 26)
    )
    assert all(np.isfinite(value).all() for value in [*whole.values(), *after.values()])


@pytest.mark.long
@pytest.mark.fault("F21")
@pytest.mark.parametrize("launcher", [ONE, TWO], ids=["one", "two"])
def test_an_output_that_cannot_be_written(hurt: Make, launcher: list[str]) -> None:
    """A file in its place, and a folder that not even root can make."""
    run = hurt(f"unwritable-{len(launcher)}")
    output = Path("/proc/run")
    if launcher == TWO:
        output = run.runs.folder / "unwritable"
        output.write_text("mine", encoding="utf-8")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = run.start(launcher, f"output={output}").wait(60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    worked = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert worked / (3 if launcher == TWO else 1) < 10, "seconds of each process, however busy the machine"
    assert code == (1 if launcher == TWO else 2), run.log
    assert run.left() == 2
    said = f"output: {output}"
    assert said in run.log
    assert "; choose an" in run.log
    assert (f"[rank 1] stopped: {said}" in run.log) == (launcher == TWO)
    assert ("Traceback" in run.log) == (launcher == TWO), "the launcher's own"
    assert "questions per step" not in run.log, "nothing was loaded"


@pytest.fixture
def occupied() -> Iterator[int]:
    """A port that another program listens on."""
    with socket.create_server(("", 0)) as server:
        yield server.getsockname()[1]


def launch(*words: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """A command that starts processes, and how many seconds it took."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done, time.monotonic() - began


@pytest.mark.long
@pytest.mark.fault("F22")
def test_on_one_machine_another_port_is_taken(runs: Runs, occupied: int) -> None:
    accelerate = ["accelerate.commands.launch", "--config_file", str(CONFIGS / "2cpu.yaml")]
    port = ["--main_process_port", str(occupied)]
    done = runs.launched("port", [*accelerate, *port], "train.max_steps=1")
    assert done.returncode == 0, done.stderr
    assert "distributed, 2 processes, gloo" in done.stdout


@pytest.mark.long
@pytest.mark.fault("F22")
@pytest.mark.parametrize("launcher", ["accelerate on two machines", "torchrun"])
def test_where_the_port_was_agreed_on_an_error_says_so(runs: Runs, occupied: int, launcher: str) -> None:
    words = {
        "accelerate on two machines": [
            "accelerate.commands.launch", "--config_file", str(CONFIGS / "multinode.yaml"),
            "--num_processes", "2", "--machine_rank", "0", "--main_process_ip", "127.0.0.1",
            "--main_process_port", str(occupied),
        ],
        "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(occupied)],
    }[launcher]  # fmt: skip
    command = [*words, "-m", "surgvqa.train", str(runs.recipe), *runs._words("port-agreed")]
    done, took = launch(*command, ACCELERATE_USE_CPU="true")
    assert done.returncode == 1
    assert took < 30
    assert str(occupied) in done.stderr
    assert "address already in use" in done.stderr or "another process is utilizing it" in done.stderr
    assert not (runs.folder / "port-agreed").exists()


YESTERDAY = """
import datetime, os, time

os.environ["TZ"] = "Pacific/Kiritimati"  # 14 hours ahead of UTC
time.tzset()
day, now = datetime.timedelta(days=1), time.time

class Late(datetime.datetime):
    @classmethod
    def now(cls, zone=None):
        return super().now(zone) - day

datetime.datetime, time.time = Late, lambda: now() - day.total_seconds()
"""
"""The clock as this process reads it. Files get the real one's time."""


@pytest.mark.long
@pytest.mark.fault("F23")
def test_clocks_zones_and_file_times_do_not_matter(hurt: Make, reference: Path) -> None:
    """A killed run leaves its lock; then it is a day earlier, elsewhere, and new files look old."""
    run = hurt("clock")
    process = run.start(ONE)
    run.until(lambda: run.steps() >= 8)
    lock = json.loads((run.folder / ".lock").read_text(encoding="utf-8"))
    run.kill(signal.SIGKILL)
    process.wait()
    folders = checkpoint.steps(run.folder / "checkpoints")
    assert len(folders) == 2
    for place, (_, folder) in enumerate(folders):
        for path in (folder, *folder.iterdir()):
            os.utime(path, (2e9 - 1e9 * place, 2e9 - 1e9 * place))
    began = datetime.now(timezone.utc)
    run.write(YESTERDAY)
    run.finish(ONE)
    run.assert_curve(reference)
    newest = folders[-1][0]
    assert f"step {newest + 1}/20 " in run.log
    assert f"step {newest}/20 " not in run.log
    ended = json.loads((run.folder / "ended.json").read_text(encoding="utf-8"))
    for text in (lock["since"], ended["at"]):
        assert text.endswith("+00:00")
    assert abs(began - timedelta(days=1) - datetime.fromisoformat(ended["at"])) < timedelta(minutes=10)


ANSWERS = """
import json, sys
from pathlib import Path
from surgvqa import evaluation, processes, recipe, scores
from surgvqa.prepare import prepare

def answers(file, words):
    accelerator, found = processes.start(), {}
    for how in ("labels", "generate"):
        settings = recipe.load(Path(file), [*words, f"eval.answers={how}", "eval.max_new_tokens=3"])
        compute = processes.compute("fp32", "auto", accelerator.device)
        prepared = prepare(settings, accelerator, evaluated=["train"])
        network = prepared.network()
        for most in (1, 2, 3, 9, 23):
            rows = evaluation.predict(
                network, prepared, prepared.questions("train", most, asked=True),
                accelerator=accelerator, compute=compute,
            )
            found[f"{how} {most}"] = [row.row() for row in rows], scores.values(rows, prepared.prior())
    rank = accelerator.process_index
    processes.stop(accelerator)
    return rank, accelerator.num_processes, found

if __name__ == "__main__":
    out, file, *words = sys.argv[1:]
    rank, world, found = answers(file, words)
    Path(f"{out}.{rank}of{world}").write_text(json.dumps(found))
"""


@pytest.mark.fault("F24")
def test_any_number_of_questions_on_any_number_of_processes(runs: Runs) -> None:
    script, out = runs.folder / "answers.py", runs.folder / "answers"
    script.write_text(ANSWERS, encoding="utf-8")
    sets: dict[str, list[str]] = {}
    for _, labels, kind in TOPICS:
        sets[kind] = [*dict.fromkeys([*sets.get(kind, []), *labels])]
    words = runs._words("answers-run", f"data.labels={json.dumps(sets)}", "batch.tokens_per_micro_batch=200")
    _, _, alone = runpy.run_path(str(script))["answers"](runs.recipe, words)
    command = [*TORCHRUN, "2", str(script), str(out), str(runs.recipe), *words]
    done, _ = launch(*command, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    both = [json.loads(Path(f"{out}.{rank}of2").read_text(encoding="utf-8")) for rank in (0, 1)]
    assert both[0] == both[1]
    for name, (rows, scores) in both[0].items():
        theirs, their_scores = alone[name]
        assert len({row["id"] for row in rows}) == len(rows) == int(name.split()[1])
        assert scores == pytest.approx(their_scores, rel=1e-5)
        for mine, other in zip(rows, theirs, strict=True):
            odds, others = mine.pop("probabilities", {}), other.pop("probabilities", {})
            assert odds == pytest.approx(others, rel=1e-5)
            assert mine == other
    assert alone["labels 23"][1]["exact"] > 0


@pytest.mark.fault("F24")
def test_evaluation_in_between_leaves_training_as_it_is(runs: Runs) -> None:
    """Bit for bit, with dropout."""
    words = ["model.tune=lora", "model.lora.dropout=0.1", "train.max_steps=9"]
    plain = trace(runs.here("not-evaluated", *words))
    words += ["eval.every=2", "eval.max_new_tokens=3", "eval.questions=5", "eval.metric=loss"]
    evaluated = runs.here("evaluated", *words)
    assert len((evaluated / "eval.jsonl").read_text(encoding="utf-8").splitlines()) == 5
    assert trace(evaluated) == plain


GRADIENTS = """
import os, sys
import numpy as np
import torch
from surgvqa import train
from surgvqa.prepare import Prepared

network = Prepared.network
Prepared.network = lambda *given: network(*given).double()  # in fp32 rounding alone is about 1e-6
update, found = torch.optim.AdamW.step, []

def kept(self, *given, **named):
    gradients = [p.grad.flatten().double() for group in self.param_groups for p in group["params"]]
    found.append(torch.cat(gradients).numpy())
    return update(self, *given, **named)

torch.optim.AdamW.step = kept
code = train.main(sys.argv[2:])
np.save(f"{sys.argv[1]}.{os.environ.get('RANK', '0')}of{os.environ.get('WORLD_SIZE', '1')}", found)
sys.exit(code)
"""


@pytest.mark.fault("F25", "F26")
@pytest.mark.parametrize(
    ("world", "words"),
    [
        ("2", ["batch.tokens_per_micro_batch=90"]),
        pytest.param(
            "3", ["batch.tokens_per_micro_batch=200", "train.checkpoint_layers=all"], marks=pytest.mark.long
        ),
        pytest.param(
            "2",
            ["batch.tokens_per_micro_batch=90", "train.checkpoint_layers=all", *LORA],
            marks=pytest.mark.long,
        ),
    ],
    ids=["two", "three", "two, adapters"],
)
def test_gradients_are_those_of_the_batch_as_a_whole(
    runs: Runs, whole_batches: Callable[..., NDArray[np.float64]], world: str, words: list[str]
) -> None:
    """Each step of an epoch, the last of which is not full, with weights that stay as they are."""
    whole = whole_batches(*(LORA if LORA[0] in words else []))
    found = whole_batches(*words, world=world)
    assert found.shape == whole.shape
    assert len(whole) == 8
    for mine, other in zip(found, whole, strict=True):
        assert np.linalg.norm(mine - other) < 1e-6 * np.linalg.norm(other)


@pytest.fixture(scope="module")
def whole_batches(runs: Runs) -> Callable[..., NDArray[np.float64]]:
    """(steps, weights) the gradients of a run's first epoch."""
    script = runs.folder / "gradients.py"
    script.write_text(GRADIENTS, encoding="utf-8")

    @functools.cache
    def gradients(*words: str, world: str = "1") -> NDArray[np.float64]:
        name = f"gradients-{world}-{len(list(runs.folder.glob('gradients-*')))}"
        fixed = ["train.lr=1e-30", "train.max_grad_norm=1e9", "batch.questions=10", "train.max_steps=8",
                 "batch.tokens_per_micro_batch=100000"]  # fmt: skip
        out = runs.folder / name
        command = [*TORCHRUN, world, str(script), str(out), str(runs.recipe)]
        done, _ = launch(*command, *runs._words(name, *fixed, *words), PYTHONPATH=str(ROOT))
        assert done.returncode == 0, done.stderr
        return np.asarray(np.load(f"{out}.0of{world}.npy"))

    return gradients


@pytest.mark.long
@pytest.mark.fault("F26")
@pytest.mark.parametrize("tune", ["full", "lora"])
@pytest.mark.parametrize("vision", ["true", "false"])
def test_recomputed_layers_give_the_same_gradients_whatever_trains(
    runs: Runs, tune: str, vision: str
) -> None:
    words = [f"model.tune={tune}", f"model.train_vision={vision}", "model.train_merger=false"]
    name = f"kinds-{tune}-{vision}"
    norms = []
    for layers in ("0", "all"):
        run = runs.here(f"{name}-{layers}", *words, f"train.checkpoint_layers={layers}", "train.max_steps=2")
        rows = records(run / "metrics.jsonl")
        norms.append([(row["loss"], row["grad_norm"]) for row in rows])
    assert norms[0] == norms[1]


@pytest.mark.long
@pytest.mark.fault("F27")
@pytest.mark.parametrize("launcher", [ONE, TWO], ids=["one", "two"])
def test_a_data_worker_is_killed(hurt: Make, reference: Path, launcher: list[str]) -> None:
    """It is named with what to do; with workers the curve is that without."""
    run = hurt(f"worker-{len(launcher)}")
    process = run.start(launcher, "data.workers=2")
    run.until(lambda: run.steps() >= 4)
    rank = "1" if launcher == TWO else "0"
    worker = max(pid for pid, variables in run.processes().items() if variables.get("RANK", "0") == rank)
    began = time.monotonic()
    os.kill(worker, signal.SIGKILL)
    code = process.wait(60)
    assert time.monotonic() - began < 30
    assert code == (1 if launcher == TWO else 6), run.log
    assert run.left() == 6, run.log
    end = time.monotonic() + 10
    while run.processes():
        assert time.monotonic() < end, run.log
        time.sleep(0.1)
    assert f"DataLoader worker (pid {worker}) is killed by signal: Killed. Most likely" in run.log
    assert "lower data.workers" in run.log
    ended = json.loads((run.folder / "ended.json").read_text(encoding="utf-8"))
    assert ended["name"] == "peer lost"
    if launcher == ONE:
        assert "Traceback" not in run.log
        run.finish(ONE, "data.workers=2")
        run.assert_curve(reference)
