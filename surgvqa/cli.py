"""The `surgvqa` command. Each subcommand imports what it needs when it runs, so that help is instant."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import surgvqa
from surgvqa import recipe
from surgvqa.recipe import BadInput


def check(argv: Sequence[str]) -> int:
    """Read recipes and their data and list everything that is wrong; imports no torch."""
    parser = argparse.ArgumentParser(
        "surgvqa check", description=check.__doc__, usage="surgvqa check [-h] RECIPE ... [key=value ...]"
    )
    parser.add_argument(
        "recipes", nargs="+", metavar="RECIPE", help="recipe files; key=value overrides may follow"
    )
    given = parser.parse_intermixed_args(argv)
    overrides = [word for word in given.recipes if "=" in word and not Path(word).exists()]
    files = [word for word in given.recipes if word not in overrides]
    if not files:
        parser.error("give at least one recipe")
    return max(_check(file, overrides) for file in files)


def _check(file: str, overrides: Sequence[str]) -> int:
    """Print what is wrong with one recipe, its data and its model's folder; returns the exit code."""
    from surgvqa import audit, hub

    try:
        settings = recipe.load(file, overrides)
    except BadInput as error:
        return recipe.explain(error)
    code, special_tokens = 0, frozenset[str]()
    try:
        special_tokens = hub.find(settings.model.name, settings.model.revision).special_tokens
    except BadInput as error:
        if hub.is_remote(settings.model.name):
            print(recipe.printable(f"{file}: the model was not looked at: {error}"))
        else:
            code = recipe.explain(error)
    try:
        _, found = audit.load_and_audit(settings, special_tokens, progress=True)
    except BadInput as error:
        return recipe.explain(error)
    print(f"{file}: {audit.report(found.problems)}")
    return BadInput.exit_code if any(not problem.warning for problem in found.problems) else code


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
            replay(recipe.load(rest[0] if rest else "", rest[1:]), given.replay, Console())
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
    """Answer and score a part of a run's data with its best checkpoint."""
    from surgvqa.evaluate import main

    return main(argv)


def compare(argv: Sequence[str]) -> int:
    """Compare two runs' answers to the same questions: differences, their intervals and tests."""
    parser = argparse.ArgumentParser("surgvqa compare", description=compare.__doc__)
    parser.add_argument(
        "run_a", type=Path, metavar="RUN_A", help="output folder of a run, or its predictions"
    )
    parser.add_argument("run_b", type=Path, metavar="RUN_B", help="another; differences are B - A")
    parser.add_argument(
        "--split", choices=["train", "val", "test"], help="default: what the runs are judged by"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("compare"), help="folder to write into (default: compare)"
    )
    given = parser.parse_args(argv)
    from surgvqa.compare import compare as compare_runs
    from surgvqa.compare import show as show_comparison

    try:
        show_comparison(compare_runs(given.run_a, given.run_b, given.split), given.out)
    except BadInput as error:
        return recipe.explain(error)
    return 0


def show(argv: Sequence[str]) -> int:
    """Show what the model sees of an image and its questions: canvas, tokens, positions, labels."""
    parser = argparse.ArgumentParser("surgvqa show", description=show.__doc__)
    parser.add_argument("recipe", type=Path, help="recipe file, e.g. recipes/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    parser.add_argument("--index", type=int, default=0, help="which image of the part, from 0 (default: 0)")
    parser.add_argument("--split", choices=["train", "val", "test"], default="train", help="(default: train)")
    parser.add_argument("--out", type=Path, default=Path("show"), help="folder to write into (default: show)")
    given = parser.parse_intermixed_args(argv)
    from surgvqa.show import show as show_tree
    from surgvqa.terminal import Console

    try:
        settings = recipe.load(given.recipe, given.overrides)
        show_tree(settings, given.split, given.index, given.out, Console())
    except BadInput as error:
        return recipe.explain(error)
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
    "check": check, "show": show, "train": train, "evaluate": evaluate,
    "compare": compare, "submit": submit, "status": status,
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
    given, rest = parser.parse_known_args(argv)
    return COMMANDS[given.command](rest)


if __name__ == "__main__":
    raise SystemExit(main())
