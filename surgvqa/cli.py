"""The `surgvqa` command. Each subcommand imports what it needs when it runs, so that help is instant."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import surgvqa
from surgvqa import recipe
from surgvqa.endings import Stop, Stopped, leave_now, run_command, writing_to
from surgvqa.recipe import BadInput, path_argument
from surgvqa.terminal import forgiving_streams


def check(argv: Sequence[str]) -> int:
    """Read recipes and their data, list everything that is wrong, write a report; imports no torch."""
    parser = argparse.ArgumentParser(
        "surgvqa check",
        description=check.__doc__,
        usage="surgvqa check [-h] [--headers] [--out FOLDER] RECIPE ... [key=value ...]",
    )
    parser.add_argument(
        "recipes", nargs="+", metavar="RECIPE", help="recipe files; key=value overrides may follow"
    )
    parser.add_argument(
        "--headers", action="store_true", help="read rows and the headers of images, and decode none"
    )
    parser.add_argument(
        "--out",
        type=path_argument,
        default=Path("audit"),
        metavar="FOLDER",
        help="where audit.json and audit.html go, in a folder named like the recipe (default: audit)",
    )
    given = parser.parse_intermixed_args(argv)
    overrides = [word for word in given.recipes if recipe.is_override(word)]
    files = [str(recipe.user_path(word)) for word in given.recipes if word not in overrides]
    if not files:
        parser.error("give at least one recipe")
    names = [Path(file).stem for file in files]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        parser.error(f"{', '.join(twice)}: several recipes of that name would write the same files")

    def leave(said: str) -> NoReturn:
        print(said, file=sys.stderr)
        leave_now(128 + signal.Signals.__members__.get(stop.reason or "", signal.SIGTERM))  # as shells do

    try:
        with Stop(start="stopped ({reason}); the images that were looked at are remembered") as stop:
            stop.last_words = leave
            return max(_check(file, overrides, given.out, given.headers) for file in files)
    except Stopped as error:
        leave(str(error))


def _check(file: str, overrides: Sequence[str], out: Path, headers: bool) -> int:
    """Print and write what is wrong with one recipe, its data and its model; returns the exit code."""
    from surgvqa import findings, hub
    from surgvqa.terminal import Console

    try:
        settings = recipe.load(file, overrides)
    except BadInput as error:
        return recipe.explain(error)
    folder, wrong, unseen = None, list[str](), list[str]()
    try:
        folder = hub.find(settings.model.name, settings.model.revision)
    except BadInput as error:
        (unseen if hub.is_remote(settings.model.name) else wrong).extend(error.problems)
    for problem in unseen:
        print(recipe.printable(f"{file}: the model was not looked at: {problem}"))
    found = findings.examine(file, settings, folder, wrong, headers=headers, progress=True)
    try:
        written = found.write(out / Path(file).stem)
    except BadInput as error:
        return recipe.explain(error)
    if "parts" not in found.content:  # nothing could be read
        return recipe.explain(BadInput([problem.what for problem in found.problems]))
    console = Console()
    console.print(found.table())
    for line in (*found.lines(), f"written: {written[0]}, {written[1]}"):
        console.print(line, soft_wrap=True, highlight=False)
    print(found.report())
    return BadInput.exit_code if found.failed else 0


def split(argv: Sequence[str]) -> int:
    """Freeze the split of a recipe's data in a file: which group or image is in which part."""
    parser = argparse.ArgumentParser("surgvqa split", description=split.__doc__)
    parser.add_argument("recipe", type=path_argument, help="recipe file, e.g. recipes/exp1_768.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    parser.add_argument("--out", type=path_argument, required=True, metavar="FILE", help="e.g. splits.json")
    parser.add_argument("--yes", action="store_true", help="replace the file if there is one")
    given = parser.parse_intermixed_args(argv)
    try:
        return _split(recipe.load(given.recipe, given.overrides), given.out, given.yes)
    except BadInput as error:
        return recipe.explain(error)


def _split(settings: recipe.Recipe, out: Path, replace: bool) -> int:
    from surgvqa import checkpoint
    from surgvqa.datasets import splits

    if out.exists() and not (replace and out.is_file()):
        raise BadInput(f"--out {out}: is there already; give another, or --yes to replace a file")
    frozen = splits.freeze(settings.data)
    with writing_to(out):
        checkpoint.write_json(out, frozen.model_dump(mode="json"))
    for part, counts in frozen.counts.items():
        print(f"{part:<6}" + ", ".join(f"{count:>9,} {what}" for what, count in counts.items()))
    print(recipe.printable(f"written: {out}; to use it: data.split: {{by: frozen, path: {out}}}"))
    return 0


def train(argv: Sequence[str]) -> int:
    """Train a recipe in this process, or with --gpus on the GPUs of this machine; --replay runs one step."""
    parser = argparse.ArgumentParser("surgvqa train", add_help=False)
    parser.add_argument("--gpus")
    parser.add_argument("--replay", type=int)
    given, rest = parser.parse_known_args(argv)
    if given.replay is not None:
        from surgvqa.replay import replay
        from surgvqa.terminal import Console

        try:
            if not rest:
                raise BadInput("surgvqa train: give a recipe, e.g. recipes/demo.yaml")
            replay(recipe.load(rest[0], rest[1:]), given.replay, Console())
        except BadInput as error:
            return recipe.explain(error)
        return 0
    if given.gpus:
        from surgvqa.launch import launch

        try:
            launch(given.gpus, rest)
        except BadInput as error:
            return recipe.explain(error)
    from surgvqa.train import main

    return main(argv)


def evaluate(argv: Sequence[str]) -> int:
    """Answer and score a part of the data, with a run, a checkpoint or a published model."""
    from surgvqa.evaluation import main

    return main(argv)


def compare(argv: Sequence[str]) -> int:
    """Compare two runs' answers to the same questions: differences, their intervals and tests."""
    parser = argparse.ArgumentParser("surgvqa compare", description=compare.__doc__)
    parser.add_argument(
        "run_a", type=path_argument, metavar="RUN_A", help="output folder of a run, or its predictions"
    )
    parser.add_argument("run_b", type=path_argument, metavar="RUN_B", help="another; differences are B - A")
    parser.add_argument(
        "--split", choices=["train", "val", "test"], help="default: what the runs are judged by"
    )
    parser.add_argument(
        "--out", type=path_argument, default=Path("compare"), help="folder to write into (default: compare)"
    )
    given = parser.parse_args(argv)
    from surgvqa.comparison import compare as compare_runs
    from surgvqa.comparison import show as show_comparison

    try:
        show_comparison(compare_runs(given.run_a, given.run_b, given.split), given.out)
    except BadInput as error:
        return recipe.explain(error)
    return 0


def export(argv: Sequence[str]) -> int:
    """Write data, and a run's answers, as lmms-eval or VLMEvalKit take them."""
    parser = argparse.ArgumentParser("surgvqa export", description=export.__doc__)
    parser.add_argument(
        "source", metavar="SOURCE", help="recipe file, or a run's folder for its predictions, too"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    forms = ["lmms-eval", "vlmevalkit", "vlmevalkit-choices"]
    parser.add_argument("--to", required=True, choices=forms, help="which tool takes it, docs/export.md")
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="FOLDER", help="new folder to write into"
    )
    parser.add_argument(
        "--split", choices=["train", "val", "test"], help="default: what the run is judged by"
    )
    given = parser.parse_intermixed_args(argv)
    from surgvqa.export import export as export_data

    try:
        made = export_data(given.source, given.to, given.out, given.split, given.overrides)
    except BadInput as error:
        return recipe.explain(error)
    exact = f", exact match of the run's answers {made.exact:.6f}" if made.answered else ""
    print(recipe.printable(f"{made.name}: {len(made.rows)} questions{exact}"))
    for line in (*made.notes, f"written: {given.out}; {given.out / 'README.md'} tells how to use it"):
        print(recipe.printable(line))
    return 0


def show(argv: Sequence[str]) -> int:
    """Show what the model sees of an image and its questions: canvas, tokens, positions, labels."""
    parser = argparse.ArgumentParser("surgvqa show", description=show.__doc__)
    parser.add_argument("recipe", type=path_argument, help="recipe file, e.g. recipes/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    parser.add_argument("--index", type=int, default=0, help="which image of the part, from 0 (default: 0)")
    parser.add_argument("--split", choices=["train", "val", "test"], default="train", help="(default: train)")
    parser.add_argument(
        "--epoch", type=int, help="as this epoch of training shows it, from 0, where image.augment is on"
    )
    parser.add_argument(
        "--out", type=path_argument, default=Path("show"), help="folder to write into (default: show)"
    )
    given = parser.parse_intermixed_args(argv)
    from surgvqa.show import show as show_tree
    from surgvqa.terminal import Console

    try:
        settings = recipe.load(given.recipe, given.overrides)
        show_tree(settings, given.split, given.index, given.out, Console(), given.epoch)
    except BadInput as error:
        return recipe.explain(error)
    return 0


def report(argv: Sequence[str]) -> int:
    """Write one or several runs as a page: scores, curves, and every question with its picture."""
    parser = argparse.ArgumentParser("surgvqa report", description=report.__doc__)
    parser.add_argument("runs", nargs="+", type=path_argument, metavar="RUN", help="output folder of a run")
    parser.add_argument(
        "--out",
        type=path_argument,
        metavar="FILE",
        help="default: report.html in the run's folder, of several runs here",
    )
    parser.add_argument(
        "--split", choices=["train", "val", "test"], help="default: what the runs are judged by"
    )
    parser.add_argument(
        "--markdown", action="store_true", help="print the table for a paper, and write nothing"
    )
    parser.add_argument("--no-pictures", action="store_true", help="leave the images out")
    given = parser.parse_args(argv)
    if given.markdown and (given.out or given.no_pictures):
        parser.error("--markdown writes no page")
    from surgvqa import report as reports

    try:
        if given.markdown:
            print(reports.markdown(given.runs, given.split), end="")
            return 0
        pictures = not given.no_pictures
        file = reports.write(given.runs, given.out, given.split, pictures=pictures, progress=True)
    except BadInput as error:
        return recipe.explain(error)
    print(recipe.printable(f"written: {file} ({file.stat().st_size / 1e6:.1f} MB)"))
    return 0


def submit(argv: Sequence[str]) -> int:
    """Submit a recipe to SLURM: one run or several seeds, requeued or in a chain until done."""
    from surgvqa.slurm import submit as submit_jobs

    return submit_jobs(argv)


def status(argv: Sequence[str]) -> int:
    """List runs: state, job, step, time to go, best score."""
    from surgvqa.slurm import status as list_runs

    return list_runs(argv)


COMMANDS = {
    "check": check, "split": split, "show": show, "train": train, "evaluate": evaluate, "compare": compare,
    "report": report, "export": export, "submit": submit, "status": status,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "surgvqa",
        description="Fine-tune Qwen2-VL and Qwen3-VL on surgical visual question answering.",
        epilog="`surgvqa COMMAND --help` tells what each takes.",
    )
    parser.add_argument("--version", action="version", version=f"surgvqa {surgvqa.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=(command.__doc__ or "").splitlines()[0], add_help=False)
    forgiving_streams()
    given, rest = parser.parse_known_args(argv)
    return run_command(lambda: COMMANDS[given.command](rest))


if __name__ == "__main__":
    raise SystemExit(main())
