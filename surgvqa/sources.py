"""What is to be evaluated, and where its results go.

a run's folder, a checkpoint's, or a model's name ── model_of ──▶ recipe and weights
                                                  ── opened ──▶ Source, with the folder for its results
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from surgvqa import checkpoint, recipe, results
from surgvqa.datasets import Example
from surgvqa.digests import Digests
from surgvqa.endings import file_errors
from surgvqa.recipe import BadInput, Part, Recipe

_DECIDING = (
    "model.name:", "model.revision:", "data.", "prompt.", "image.", "train.precision:", "train.seed:",
    "eval.final:", "eval.answers:", "eval.max_new_tokens:", "eval.cascade:",
)  # fmt: skip
"""Keys, or sections, that decide what is asked and what the answers to it are; of the data not how many
workers read them."""
_OF_TRAINING = ("train.", "loss.", "checkpoint.", "log.", "eval.")
"""Sections of which an evaluation reads what decides, and `train.peer_timeout`."""


@dataclass(frozen=True)
class Source:
    """What is to be evaluated, and where the results go."""

    settings: Recipe
    run: Path
    """Folder of predictions and scores."""
    checkpoint: Path | None
    """None: the model as it was published."""
    by_itself: bool = False
    """Whether that checkpoint was asked for, and not a run."""
    overrides: tuple[str, ...] = ()
    """Recipe keys that were changed for it, which the scores record."""

    def files(self, part: Part, variant: str) -> tuple[Path, Path]:
        """Predictions and scores of a part of the data; the names are those of `results.file_names`."""
        name = self.checkpoint.name if self.checkpoint and self.by_itself else None
        names = results.file_names(part, self.settings.eval.final, name, variant)
        return self.run / names[0], self.run / names[1]

    @property
    def unread(self) -> list[str]:
        """Overrides that are for training alone."""
        read = (*_DECIDING, "train.peer_timeout:")
        return [
            word
            for word in self.overrides
            if word.startswith(_OF_TRAINING) and not f"{word.partition('=')[0]}:".startswith(read)
        ]

    @cached_property
    def weights(self) -> str | None:
        """Digest of the checkpoint's manifest, which has those of all its files; None where there is none.

        Of when this is first asked for: training that goes on deletes checkpoints that are being evaluated.
        """
        if self.checkpoint is None:
            return None
        manifest = (self.checkpoint / checkpoint.MANIFEST).read_bytes()
        return f"sha256:{hashlib.sha256(manifest).hexdigest()}"


def opened(
    source: str | Path,
    *,
    recipe_file: str | Path | None = None,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
) -> Source:
    """What is to be evaluated, see `model_of`, and where to: a run's own folder, `output`, or for a published
    model a folder beside that of the recipe.

    Raises BadInput as `model_of` does, and where the results would have no place.
    """
    folder = Path(source)
    settings, found = model_of(source, recipe_file, overrides)
    by_itself = found is not None and folder.resolve() == found.resolve()
    if found is not None and by_itself:
        found = found.resolve()  # `.` has neither a name nor parents
    if output is not None:
        run = Path(output)
    elif found is None:
        told = (folder / "recipe.yaml").is_file()  # an earlier evaluation's folder
        run = folder if told else Path(f"{settings.output.rstrip('/')}-{Path(source).name}")
    else:
        run = found.parent.parent if by_itself else folder
        if not (run / "recipe.yaml").is_file():
            raise BadInput(f"{folder} does not lie in a run's folder; say where the results go with --out")
    in_its_run = found is not None and _in_its_run(found, run)
    return Source(settings, run, found, by_itself and in_its_run, tuple(overrides))


def _in_its_run(found: Path, run: Path) -> bool:
    """Whether a checkpoint is that of the run in a folder."""
    return found.resolve().parent.parent == run.resolve()


@file_errors()
def model_of(
    source: str | Path,
    recipe_file: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    *,
    otherwise: str | None = None,
) -> tuple[Recipe, Path | None]:
    """The recipe of a source, and the checkpoint that has its weights; None for a model as it was published.

    `source` is a run's folder (its best checkpoint, else its newest), a checkpoint's, or a model's name or
    folder. A checkpoint brings the recipe that it was trained with; a published model takes that of
    `recipe_file`, else of the text `otherwise`. Raises BadInput where there is no such thing, or it is not
    whole.
    """
    folder = Path(source)
    by_itself, told = checkpoint.is_checkpoint(folder), folder / "recipe.yaml"
    if (by_itself or told.is_file()) and recipe_file is not None:
        raise BadInput(f"--recipe is for a model as it was published; {folder} brings its own recipe")
    if by_itself:
        if problems := checkpoint.verify(folder):
            raise BadInput(f"{folder}: {problem}" for problem in problems)
        return checkpoint.recipe_of(folder, overrides), folder
    if told.is_file():
        published = any(each.scores and each.checkpoint is None for each in results.evaluations(folder))
        if published and not (folder / "checkpoints").is_dir():
            return recipe.load(told, overrides), None
        chosen = checkpoint.chosen(folder)
        return checkpoint.recipe_of(chosen, overrides), chosen
    if not folder.exists() and len(folder.parts) > 1:
        others = folder.parent.iterdir() if folder.parent.is_dir() else ()
        there = sorted(
            other.name
            for other in others
            if (other / "recipe.yaml").is_file() or checkpoint.is_checkpoint(other)
        )
        if there:
            raise BadInput(f"{source}: no such run or checkpoint; {folder.parent} has {', '.join(there)}")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise BadInput(f"{source} holds neither a run nor a checkpoint, and no model (no config.json)")
    if recipe_file is None and otherwise is None:
        what = "holds neither a run nor a checkpoint" if folder.is_dir() else "is no run's folder"
        raise BadInput(
            f"{source} {what}; to evaluate a model as it was published, name the data with --recipe, e.g. "
            "--recipe recipes/exp1_768.yaml"
        )

    def read(words: Sequence[str]) -> Recipe:
        if recipe_file is not None:
            return recipe.load(recipe_file, words)
        return recipe.parse(otherwise or "", words, where=str(source))

    words = [f"model.name={json.dumps(str(source))}", "model.adapter=null"]
    if read(overrides).model.name != str(source):  # the revision is of the recipe's own model
        words.append("model.revision=null")
    return read([*words, *overrides]), None


def claim(
    source: Source,
    part: Part,
    variants: Sequence[str],
    examples: Sequence[Example],
    base: Digests | None = None,
) -> None:
    """See that the results' folder is the run's own, or make it one for them.

    Raises BadInput where it cannot be written, where another's results are there, or where those on other
    data or of another part would replace others. `base` is what the base model holds.
    """
    try:
        _claim_folder(source, base)
        if not os.access(source.run, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise BadInput(
            f"{source.run} cannot hold results ({error.strerror}); choose another folder for them with --out"
        ) from None
    _keep_others(source, part, variants, {example.id for example in examples})


def _claim_folder(source: Source, base: Digests | None) -> None:
    run, told = source.run, source.run / "recipe.yaml"
    trained = (run / "checkpoints").exists()
    if source.checkpoint and _in_its_run(source.checkpoint, run):
        return
    if trained or (run.is_dir() and any(run.iterdir()) and not told.is_file()):
        what = "holds another run" if trained else "holds other things"
        raise BadInput(f"{run} {what}; choose a folder of its own for the results with --out")
    settings = recipe.parse(source.settings.dump(), [f"output={json.dumps(str(run))}"])
    if not told.is_file():
        run.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text(told, settings.dump())
        return
    # What is changed for one evaluation its scores record, and the folder's recipe stays.
    changed = [word for word in source.overrides if not word.startswith(("model", "data"))]
    others = [
        each
        for each in recipe.load(told, changed).differences(settings)
        if each.startswith(_DECIDING) and not each.startswith("data.workers:")
    ]
    there = [each for each in results.evaluations(run) if each.scores]
    if any(each.scores.get("manifest") != source.weights or _other_base(each, base) for each in there):
        others.append(f"the weights are not those of {there[0].checkpoint or 'the published model'}")
    if others:
        raise BadInput(
            f"{run} holds results of another model, of other data or by another recipe: {'; '.join(others)}; "
            "choose another folder with --out"
        )


def _other_base(there: results.Evaluation, base: Digests | None) -> bool:
    """Return whether an evaluation read other weights of a base model, as far as its scores tell."""
    digests = there.scores.get("digests")
    return base is not None and isinstance(digests, dict) and digests.get("weights") != base.weights


def _keep_others(source: Source, part: Part, variants: Sequence[str], ids: set[str]) -> None:
    """Raise BadInput where results on other data (by `data.…` overrides), or on another part (by
    `eval.final`), would replace others, or go."""
    for variant in variants:
        file, told = source.files(part, variant)
        before = results.json_of(told)
        if file.is_file() and before.get("split", part) != part:
            raise BadInput(
                f"{file} holds answers to the {before['split']} part, whose place those to {part} would take "
                f"(eval.final: {source.settings.eval.final or 'null'}); give --split, say where they go with "
                "--out, or move the file away"
            )
        words = (*source.overrides, *results.overrides(before))
        other = [word for word in words if word.startswith("data.")]
        if other and file.is_file() and {row.get("id") for row in results.rows(file)} != ids:
            raise BadInput(
                f"{file} holds answers to other questions ({other[0]}), whose place these would take; say "
                "where they go with --out, or move the file away"
            )
