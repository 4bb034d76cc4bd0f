"""`surgvqa submit` and `surgvqa status`: jobs of slurm/train.sbatch, and how runs do. Imports no torch.

`python -m surgvqa.slurm RECIPE key=value …` prints the step of a run's newest checkpoint and how the run last
ended, for the batch script.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from surgvqa import lock, recipe
from surgvqa.endings import ENDED
from surgvqa.lock import METRICS
from surgvqa.recipe import BadInput, path_argument
from surgvqa.results import STATE, json_of, number, rows, standing

TRAIN, EVALUATE = Path("slurm/train.sbatch"), Path("slurm/evaluate.sbatch")
PASSED_ON = ("time", "partition", "account", "qos", "mem", "cpus-per-task", "signal")
"""Options of `submit` that sbatch takes under the same name."""
SEED = "%a"
"""Stands for an array job's own number, in both batch scripts."""
RUNS = Path("runs")


@dataclass
class Submission:
    """An sbatch command; `after` are the submissions that it waits for."""

    options: list[str]
    script: list[str]
    after: Submission | None = None
    when: str = "afterany"
    job: str = field(default="", init=False)

    def command(self) -> list[str]:
        waits = [f"--dependency={self.when}:{self.after.job}"] if self.after else []
        return ["sbatch", "--parsable", *waits, *self.options, *self.script]


def submit(argv: Sequence[str]) -> int:
    """Submit training, and what follows it, to SLURM; prints the commands and the jobs' numbers."""
    parser = argparse.ArgumentParser(
        "surgvqa submit",
        description="Submit a recipe to SLURM, from the repository's root; key=value overrides follow it.",
    )
    parser.add_argument("recipe", type=path_argument, help="recipe file, e.g. recipes/exp1_768.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    parser.add_argument("--gpus", type=_count, default=1, metavar="N", help="GPUs per node (default: 1)")
    parser.add_argument("--nodes", type=_count, default=1, metavar="N", help="(default: 1)")
    for option in PASSED_ON:
        parser.add_argument(f"--{option}", help=f"as in sbatch; default: what {TRAIN} says, else the site's")
    parser.add_argument(
        "--array-seeds", type=_count, metavar="K", help="K runs, with train.seed from the recipe's on"
    )
    parser.add_argument(
        "--chain", type=_count, metavar="N", help="N jobs, one after the other, where jobs may not requeue"
    )
    parser.add_argument(
        "--evaluate", choices=["train", "val", "test"], action="append", default=[], metavar="PART",
        help="a job that evaluates this part too; the one for eval.final is always there",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")
    parser.add_argument("--fresh", action="store_true", help="start over, deleting what a former run left")
    parser.add_argument("--yes", action="store_true", help="confirm --fresh")
    parser.add_argument("--accept-changes", action="store_true", help="go on though recipe or data changed")
    given = parser.parse_intermixed_args(argv)
    try:
        submissions = _submissions(given)
        if not given.dry_run and shutil.which("sbatch") is None:
            raise BadInput(
                "sbatch: not found here; submit on a login node, or see the commands with --dry-run"
            )
        for number, each in enumerate(submissions, 1):
            each.job = f"JOB{number}"
            if not given.dry_run:
                each.job = _submit(each)
                print(f"job {each.job}: ", end="")
            print(shlex.join(each.command()))
    except BadInput as error:
        return recipe.explain(error)
    if not given.dry_run:
        jobs = " ".join(each.job for each in submissions)
        print(f"See how it goes: surgvqa status; end it: scancel {jobs}")
    return 0


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a number from 1 up")
    return int(text)


def _submissions(given: argparse.Namespace) -> list[Submission]:
    """The jobs that were asked for, in order. Raises BadInput where the recipe or the place is not sound."""
    for script in (TRAIN, EVALUATE):
        if not script.is_file():
            raise BadInput(f"{script}: not found; submit from the root of the surgvqa repository")
    if given.fresh and not given.yes:
        raise BadInput("--fresh deletes the run; add --yes to confirm")
    settings = recipe.load(given.recipe, given.overrides)
    words, output, array = [str(given.recipe), *given.overrides], settings.output, []
    final = settings.eval.final
    if final:
        words.append("eval.final=null")  # a job of its own evaluates it
    if given.array_seeds:
        first, output = settings.train.seed, f"{settings.output}-seed{SEED}"
        array = [f"--array={first}-{first + given.array_seeds - 1}"]
        words += [f"train.seed={SEED}", f"output={output}"]
    shape = [f"--nodes={given.nodes}", f"--gres=gpu:{given.gpus}"]
    asked = {name: getattr(given, name.replace("-", "_")) for name in PASSED_ON}
    site = [f"--{name}={value}" for name, value in asked.items() if value and name not in ("time", "signal")]
    own = [f"--{name}={asked[name]}" for name in ("time", "signal") if asked[name]]
    name = Path(settings.output).name
    # The comment is where `status` finds the run of a job that has not begun.
    options = [f"--job-name=surgvqa-{name}", f"--comment={output}", *shape, *own, *site, *array]
    flags = ["--accept-changes"] if given.accept_changes else []
    submissions: list[Submission] = []
    for link in range(given.chain or 1):
        trains = [str(TRAIN), *words, *flags]
        chained = ["--no-requeue"] if given.chain else []
        if link == 0 and given.fresh:
            trains += ["--fresh", "--yes"]
        if link > 0:
            chained += ["--export=ALL,SURGVQA_CHAINED=1"]  # ends at once where the run is done
        before = submissions[-1] if submissions else None
        submissions.append(Submission([*options, *chained], trains, after=before))
    trained = submissions[-1]
    # Where training fails, or a chain ends before it is done, nothing is left waiting.
    options = [f"--job-name=surgvqa-evaluate-{name}", "--kill-on-invalid-dep=yes", *shape, *site, *array]
    when = "aftercorr" if array else "afterok"
    judged = [f"eval.final={final}"] if final else []
    more = [["--split", part] for part in dict.fromkeys(given.evaluate) if part != final]
    for split in [[], *more] if final else more:
        evaluates = [str(EVALUATE), output, *judged, *split]
        submissions.append(Submission(options, evaluates, after=trained, when=when))
    return submissions


def _submit(submission: Submission) -> str:
    """Hand a job to SLURM; returns its number. Raises BadInput where SLURM does not take it."""
    done = subprocess.run(submission.command(), capture_output=True, text=True)
    if done.returncode:
        raise BadInput(f"{shlex.join(submission.command())}: {' '.join(done.stderr.split())}")
    return done.stdout.strip().partition(";")[0]


@dataclass(frozen=True)
class Run:
    """What can be seen of a run from outside, some of it while it is being written."""

    folder: Path
    state: str
    job: str = ""
    step: int | None = None
    total: int | None = None
    eta: float | None = None
    """Seconds that the steps to come will take; None where it does not go on."""
    best: str = ""


@dataclass(frozen=True)
class Queued:
    """A job of this user that SLURM has not forgotten."""

    id: str
    """With the array's number, as scancel takes it."""
    state: str
    output: Path | None
    """Where it trains a run, as `submit` says."""


def status(argv: Sequence[str]) -> int:
    """List runs: state, job, step, time to go, best score."""
    parser = argparse.ArgumentParser("surgvqa status", description=status.__doc__)
    parser.add_argument(
        "folders",
        nargs="*",
        type=path_argument,
        default=[RUNS],
        metavar="FOLDER",
        help="run, or runs' folder (runs)",
    )
    given = parser.parse_args(argv)
    queue = _queue()
    folders = [folder for given_folder in given.folders for folder in _runs(given_folder)]
    known = {folder.resolve() for folder in folders}
    if given.folders == [RUNS]:
        folders += sorted({job.output for job in queue.values() if job.output} - known)
    if not folders:
        return recipe.explain(BadInput(f"{', '.join(map(str, given.folders))}: no run here"))
    from rich.table import Table

    from surgvqa.terminal import Console

    table = Table("run", "state", "job", "step", "to go", "best", box=None, pad_edge=False)
    for run in (look(folder, queue) for folder in folders):
        step = "" if run.step is None else f"{run.step}{f'/{run.total}' if run.total else ''}"
        left = "" if run.eta is None else str(timedelta(seconds=round(run.eta)))
        table.add_row(_short(run.folder), run.state, run.job, step, left, run.best)
    Console().print(table)
    return 0


def look(folder: Path, queue: dict[str, Queued]) -> Run:
    """What a run's folder, and SLURM's queue by job id, tell of a run."""
    owner = lock.owner(folder)
    job = queue.get(str(owner["job"])) if owner and owner.get("job") else None
    if job is None:
        job = next((each for each in queue.values() if each.output == folder.resolve()), None)
    ended = json_of(folder / ENDED)
    if owner and owner["alive"]:
        state = "running"
    elif job and job.state == "PENDING":
        state = "requeued" if ended.get("name") == "preempted" else "pending"
    elif job:
        state = job.state.lower()
    else:
        state = str(ended.get("name") or ("killed" if folder.is_dir() else "unknown"))
    steps = rows(folder / METRICS)
    last = steps[-1] if steps else {}
    step = number(last.get("step"))
    total = _total(folder, last)
    seconds = [value for row in steps[-20:] if (value := number(row.get("seconds"))) is not None]
    eta = None
    if state == "running" and seconds and total and step is not None:
        eta = min(max(0.0, total - step) * sum(seconds) / len(seconds), 1e9)
    return Run(
        folder,
        state,
        job.id if job else str((owner or {}).get("job") or ""),
        None if step is None else int(step),
        total,
        eta,
        _best(folder),
    )


def saved(run: Path) -> int:
    """The step of a run's newest checkpoint, 0 without one; it is the next start that verifies it."""
    names = [file.parts[-3] for file in run.glob(f"checkpoints/step-*/{STATE}")]
    return max((int(match[1]) for name in names if (match := re.fullmatch(r"step-(\d+)", name))), default=0)


def _runs(folder: Path) -> list[Path]:
    """The folder itself where it is a run, else the runs directly in it."""
    if lock.is_run(folder):
        return [folder]
    return sorted(filter(lock.is_run, folder.iterdir())) if folder.is_dir() else []


def _queue() -> dict[str, Queued]:
    """This user's jobs by SLURM_JOB_ID; none where there is no SLURM, or it does not answer."""
    try:
        command = ["squeue", "--me", "--noheader", "--array", "--format=%A|%i|%T|%K|%j|%Z|%k"]
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return {}
    found: dict[str, Queued] = {}
    for line in lines:
        job, shown, state, number, name, folder, comment = (line.split("|", 6) + [""] * 6)[:7]
        ours = name.startswith("surgvqa-") and comment not in ("", "(null)")
        output = Path(folder, comment.replace(SEED, number)).resolve() if ours else None
        # Jobs of an array that wait share a number, so they go by the one that is shown.
        found[shown if job in found else job] = Queued(shown, state, output)
    return found


def _total(folder: Path, last: dict[str, Any]) -> int | None:
    """How many steps the whole run has, from its recipe and its last step."""
    settings = _recipe(folder)
    if settings is None:
        return None
    if settings.train.max_steps:
        return settings.train.max_steps
    step, epoch = number(last.get("step")), number(last.get("epoch"))
    return round(step / epoch) * settings.train.epochs if step and epoch and epoch > 1e-9 else None


def _recipe(folder: Path) -> recipe.Recipe | None:
    """A run's recipe; None where there is none that can be read."""
    try:
        file = folder / "recipe.yaml"
        return recipe.load(file) if file.is_file() else None
    except BadInput:
        return None


def _best(folder: Path) -> str:
    """The final score where there is one, and of those on the way the best by the recipe's eval.metric."""
    told = []
    scores = json_of(folder / "scores.json")
    overall = scores.get("overall")
    if isinstance(overall, dict) and (exact := number(overall.get("exact"))) is not None:
        told.append(f"{scores.get('split', 'final')} {exact:.1%}")
    settings = _recipe(folder)
    metric = settings.eval.metric if settings else "exact"
    known = [(place, row) for row in rows(folder / "eval.jsonl") if (place := standing(row, metric))]
    if known:
        _, top = max(known, key=lambda pair: pair[0])
        value = f"{top[metric]:.1%}" if metric == "exact" else f"{metric} {top[metric]:.4f}"
        told.append(f"{top.get('split', 'val')} {value} at step {top.get('step', '?')}")
    return ", ".join(told)


def _short(folder: Path) -> str:
    try:
        return str(folder.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(folder)


def main(argv: Sequence[str]) -> int:
    words = [word for word in argv if not word.startswith("--")]
    try:
        run = Path(recipe.load(words[0], words[1:]).output)
    except BadInput as error:
        return error.exit_code  # training says what is wrong
    print(saved(run), json_of(run / ENDED).get("name", "unknown"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
