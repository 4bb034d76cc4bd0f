"""A recipe's data made ready: read, audited, tokenized; everything that can be wrong is found here.

    Recipe ── prepare ──▶ Prepared ── questions(part) ──▶ Questions

Training, evaluation and `surgvqa show` begin with this, so they all see the same canvases and tokens.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from numpy.typing import NDArray

from surgvqa import audit, datasets, hub, letterbox
from surgvqa.metrics import class_weights, normalise
from surgvqa.plan import Plan
from surgvqa.recipe import BadInput, Part, Recipe
from surgvqa.tokens import ChatTokens
from surgvqa.tree import Questions

Result = TypeVar("Result")


@dataclass(frozen=True)
class Prepared:
    recipe: Recipe
    folder: hub.Folder
    chat: ChatTokens
    dataset: datasets.Dataset
    canvases: dict[str, letterbox.Canvas]
    warnings: list[str]

    def questions(self, part: Part, most: int | None = None) -> Questions:
        """The questions of a part; with `most`, those of images drawn by the recipe's seed, that many."""
        examples = self.dataset.part(part)
        if most is not None and most < len(examples):
            examples = _some(examples, most, self.recipe.train.seed)
        return Questions(
            examples,
            self.chat,
            self.canvases,
            fill=self.recipe.image.fill,
            weights=self._class_weights(examples) if part == "train" else None,
            per=self.recipe.loss.per,
        )

    def plan(self, questions: Questions) -> Plan:
        """The order of these questions. Raises BadInput naming every question that cannot fit."""
        batch = self.recipe.batch
        plan = Plan(
            image=questions.image,
            branch_tokens=questions.branch_tokens,
            root_tokens=questions.root_tokens,
            questions=batch.questions,
            questions_per_image=batch.questions_per_image,
            tokens_per_micro_batch=batch.tokens_per_micro_batch,
            seed=self.recipe.train.seed,
            trees=batch.trees,
        )
        problems = []
        for question in plan.too_long():
            example, root = questions.examples[question], questions.root_tokens[questions.image[question]]
            problems.append(
                f"{example.place}: question {example.id!r} cannot fit: {plan.tokens([question]):,} tokens "
                f"({root:,} of them its image and system message) against batch.tokens_per_micro_batch "
                f"{batch.tokens_per_micro_batch:,}"
            )
        if problems:
            raise BadInput(problems)
        return plan

    def fingerprint(self) -> str:
        """SHA-256 of what is trained on: ids, questions, answers, image names and sizes, in order."""
        digest = hashlib.sha256()
        for example in self.dataset.part("train"):
            sizes = [(image.key, self.canvases[image.key]) for image in example.images]
            digest.update(repr((example.id, example.question, example.answers, sizes)).encode())
        return digest.hexdigest()

    def answer_weights(self) -> dict[str, float]:
        """Weight of each training answer, where the recipe asks for class weights."""
        kind = self.recipe.loss.class_weights
        answers = [normalise(example.answers[0]) for example in self.dataset.part("train")]
        return {} if kind == "none" else class_weights(answers, kind)

    def _class_weights(self, examples: list[datasets.Example]) -> NDArray[np.float64] | None:
        weights = self.answer_weights()
        if not weights:
            return None
        return np.array([weights[normalise(example.answers[0])] for example in examples])


def prepare(recipe: Recipe, accelerator: Accelerator | None = None, *, progress: bool = False) -> Prepared:
    """Read and check everything but the weights, on every process.

    Images are decoded by the main process alone, which tells the others. Raises BadInput with all errors.
    """
    image = recipe.image
    folder = main_first(accelerator, lambda: hub.find(recipe.model.name, recipe.model.revision))
    loaded = []

    def read_and_audit() -> tuple[list[datasets.Problem], dict[str, letterbox.Size]]:
        loaded.append(_load(recipe))
        return _audited(recipe, loaded[0], folder.factor, progress)

    problems, sizes = main_first(accelerator, read_and_audit)
    dataset = loaded[0] if loaded else _load(recipe)
    errors = [str(problem) for problem in problems if not problem.warning]
    if errors:
        raise BadInput(errors)
    chat = ChatTokens(folder, system=recipe.prompt.system, instructions=recipe.prompt.instructions)
    canvases = {
        key: letterbox.plan_canvas(
            size, mode=image.mode, size=image.size, max_tokens=image.max_tokens, factor=folder.factor
        )
        for key, size in sizes.items()
    }
    return Prepared(recipe, folder, chat, dataset, canvases, [str(problem) for problem in problems])


def processes() -> Accelerator:
    """This process among those that a launcher started. Raises BadInput where they did not find each other.

    Mixed precision is the recipe's and done by the trainer itself.
    """
    cpu = not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision="no",
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        raise BadInput(
            f"the launcher started {expected} processes, but each of them is alone; "
            "use one of accelerate_configs/ or torchrun"
        )
    return accelerator


def main_first(accelerator: Accelerator | None, work: Callable[[], Result]) -> Result:
    """`work()` of the main process, on every process; what it raises as BadInput is raised on all."""
    if accelerator is None or accelerator.num_processes == 1:
        return work()
    told: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            told = [work(), None]
        except BadInput as error:
            told = [None, error.problems]
    broadcast_object_list(told)
    if told[1] is not None:
        raise BadInput(told[1])
    result: Result = told[0]
    return result


def _load(recipe: Recipe) -> datasets.Dataset:
    data = recipe.data
    return datasets.load(
        data.format,
        data.path,
        data.revision,
        by=data.split.by,
        val=data.split.val,
        test=data.split.test,
        seed=data.split.seed,
    )


def _audited(
    recipe: Recipe, dataset: datasets.Dataset, factor: int, progress: bool
) -> tuple[list[datasets.Problem], dict[str, letterbox.Size]]:
    image = recipe.image
    found = audit.audit(
        dataset,
        mode=image.mode,
        size=image.size,
        max_tokens=image.max_tokens,
        factor=factor,
        by=recipe.data.split.by,
        progress=progress,
    )
    return found.problems, found.sizes


def _some(examples: list[datasets.Example], most: int, seed: int) -> list[datasets.Example]:
    """Exactly `most` examples, of as few images as that takes, in their own order."""
    keys = list(dict.fromkeys(example.image_key for example in examples))
    order = np.random.Generator(np.random.PCG64(seed)).random(len(keys)).argsort()
    rank = {keys[int(key)]: place for place, key in enumerate(order)}
    drawn = sorted(range(len(examples)), key=lambda index: (rank[examples[index].image_key], index))[:most]
    return [examples[index] for index in sorted(drawn)]
