"""A recipe made ready: data read, audited and tokenized, and the model it asks for.

    Recipe ── prepare ──▶ Prepared ── questions(part) ──▶ Questions
                                   ── network() ──▶ model

Training, evaluation and `surgvqa show` begin with this, so they all see the same canvases and tokens.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import socket
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from surgvqa import checkpoint as checkpoints
from surgvqa import corrupt, datasets, digests, hub, letterbox, model, processes
from surgvqa.audit import Audit, closed_set, condensed, load_and_audit, too_short
from surgvqa.datasets import splits
from surgvqa.digests import Digests
from surgvqa.metrics import Prior, class_weights, normalise
from surgvqa.plan import Plan
from surgvqa.processes import main_first, refuse_together
from surgvqa.recipe import BadInput, Part, Recipe
from surgvqa.tokens import ChatTokens
from surgvqa.tree import Questions

MOST_ON_CPU = 500_000_000
"""Parameters of a model that computes on the CPU without being asked to; the smallest Qwen2-VL has 2.2e9."""

_UNTRIED = 8192
"""Tokens per micro-batch where the recipe says `auto` and nothing was tried: in evaluation alone."""


@dataclass(frozen=True)
class Prepared:
    recipe: Recipe
    folder: hub.Folder
    chat: ChatTokens
    dataset: datasets.Dataset
    canvases: dict[str, letterbox.Canvas]
    digests: dict[str, str]
    """Image key → SHA-256 of the image's bytes."""
    warnings: list[str]
    skipped: list[datasets.Problem]
    """What `data.on_error: skip` left out of `dataset`."""
    skipped_counts: dict[str, int]
    """How many rows, images and questions that was."""
    tokens_per_micro_batch: int | None = None
    """What was found to fit; None before that is known."""
    base: Digests | None = None
    """Digests of the base model; None until `identified` computes them."""
    base_changes: Sequence[str] = ()
    """Accepted differences of the base model from the one that the checkpoint was trained on."""
    progress: bool = False
    """Whether to show progress."""

    def identified(self, accelerator: Accelerator) -> Prepared:
        """Return the same with `base`, which the main process computes.

        Fetches the weights. Raises BadInput where they are missing.
        """
        if self.base is not None:
            return self
        return replace(self, base=main_first(accelerator, lambda: digests.of(self.folder)))

    def questions(self, part: Part, most: int | None = None, *, asked: bool = False) -> Questions:
        """The questions of a part; with `most`, that many, see `splits.drawn`.

        `asked`: to be answered as the recipe's `eval` says: with labels or without, in a cascade or not.
        Class weights are for training alone.
        """
        examples = self.dataset.part(part)
        if self.recipe.eval.cascade != "none" if asked else self.recipe.train.cascade:
            examples = datasets.in_context(examples, {each.id: each.answers[0].strip() for each in examples})
        examples = splits.drawn(examples, most)
        weights = self.answer_weights() if part == "train" and not asked else {}
        return self.posed(examples, asked=asked, weights=weights)

    def posed(
        self,
        examples: Sequence[datasets.Example],
        *,
        asked: bool = True,
        weights: Mapping[str, float] | None = None,
    ) -> Questions:
        """These examples as `questions` poses them; `weights` are by answer."""
        chosen = asked and self.recipe.eval.answers == "labels"
        return Questions(
            examples,
            self.chat,
            self.canvases,
            fill=self.recipe.image.fill,
            augment=self.recipe.image.augment,
            seed=self.recipe.train.seed,
            weights=np.array([weights[normalise(e.answers[0])] for e in examples]) if weights else None,
            per=self.recipe.loss.per,
            labels=[closed_set(self.recipe, e) for e in examples] if chosen else None,
            progress=self.progress,
        )

    def varied(self, questions: Questions, variant: str) -> Questions:
        """The questions with other pictures: `black` ones, with `shuffle` those of other questions, or as
        `surgvqa.corrupt` says; "" leaves them as they are. Raises BadInput where a variant is none of these.
        """
        if variant == "shuffle":
            return questions.shown(_shuffled(questions.examples, self.recipe.train.seed), None)
        if variant == "black":
            return questions.shown({}, _black)
        if not variant:
            return questions
        first, *others = corrupt.parse(variant)
        if others or first.name != variant:
            raise BadInput(f"variant {variant!r}: is not one corruption's name, such as {first.name}")
        return questions.shown({}, first)

    def plan(self, questions: Questions, *, grow: bool = False) -> Plan:
        """The order of these questions. Raises BadInput naming every question that cannot fit; with `grow` a
        micro-batch takes as many tokens as the longest needs.
        """
        batch = self.recipe.batch
        asked, found = batch.tokens_per_micro_batch, self.tokens_per_micro_batch
        plan = Plan(
            image=questions.image,
            branch_tokens=questions.most_branch_tokens,
            root_tokens=questions.root_tokens,
            questions=batch.questions,
            questions_per_image=batch.questions_per_image,
            tokens_per_micro_batch=_UNTRIED if asked == "auto" else asked,
            seed=self.recipe.train.seed,
            trees=batch.trees,
            stage=_stages(questions.examples) if batch.order == "stages" else None,
            classes=self._classes(questions.examples),
        )
        if asked == "auto" or grow:
            plan.tokens_per_micro_batch = max(plan.tokens_per_micro_batch, int(plan.alone().max()))
        problems = []
        for question in plan.too_long():
            example, root = questions.examples[question], questions.root_tokens[questions.image[question]]
            labels = f" with its {len(questions.labels[question])} labels" if questions.labels else ""
            problems.append(
                f"{example.place}: question {example.id!r}{labels} cannot fit: "
                f"{plan.tokens([question]):,} tokens ({root:,} of them its image and system message) "
                f"against batch.tokens_per_micro_batch {asked:,}"
            )
        if problems:
            raise BadInput(problems)
        if found:
            plan.tokens_per_micro_batch = max(found, int(plan.alone().max()))
        return plan

    def network(self, checkpoint: Path | None = None) -> Any:
        """The model that the recipe asks for, with new weights or those of a checkpoint; on the CPU."""
        full = self.recipe.model.tune == "full"
        frozen = torch.bfloat16 if self.recipe.train.precision == "bf16" else torch.float32
        whole = model.build(
            self.folder,
            dtype=torch.float32 if full else frozen,
            seed=self.recipe.train.seed,
            weights=checkpoint if full else None,
        )
        return self._adapted(whole, None if full else checkpoint)

    def published(self) -> Any:
        """The model as its authors published it, to be asked and not trained; on the CPU."""
        dtype = torch.bfloat16 if self.recipe.train.precision == "bf16" else torch.float32
        return model.build(self.folder, dtype=dtype, seed=self.recipe.train.seed)

    def checkpoint_bytes(self) -> int:
        """About how many bytes a checkpoint will take, from the model's shapes; no weights are read."""
        with torch.device("meta"):
            weights = model.checkpoint_bytes(self._adapted(model.skeleton(self.folder)))
        return weights + sum(map(len, hub.processor_files(self.folder).values()))

    def _adapted(self, whole: Any, adapter: Path | None = None) -> Any:
        settings, lora = self.recipe.model, self.recipe.model.lora
        return model.adapt(
            whole,
            tune=settings.tune,
            train_vision=settings.train_vision,
            train_merger=settings.train_merger,
            rank=lora.rank,
            alpha=lora.alpha,
            dropout=lora.dropout,
            modules=lora.modules,
            seed=self.recipe.train.seed,
            name=self.folder.name,
            revision=self.folder.revision,
            adapter=adapter,
        )

    @functools.cached_property
    def grounded(self) -> bool:
        """Whether any answer of the data has boxes, so that boxes are looked for in what the model writes."""
        return any(example.regions for example in self.dataset.examples)

    def reads_in_place(self, example: datasets.Example) -> bool:
        """Return whether boxes may stand among the words of an answer, as they do in its reference."""
        return bool(example.layout)

    def too_short(self, parts: Collection[Part]) -> list[str]:
        """Return the warnings of `audit.too_short` about parts to evaluate."""
        found = too_short(
            self.recipe, self.dataset, parts, self.folder.family, self.canvases, self.chat.lengths
        )
        return condensed(found)

    def prior(self) -> Prior:
        return Prior(self.dataset.part("train"))

    def fingerprint(self, part: Part = "train") -> dict[str, str | int]:
        """What a part holds, so that a change can be named: how many questions, and their digests.

        `questions` counts them. `order` is a digest of their ids in order. `ids`, `texts` (with all answers
        and boxes), `kinds` (types, stages and names of images) and `images` (bytes of images) are digests in
        the order of the ids.
        """
        examples = self.dataset.part(part)
        ordered = sorted(examples, key=lambda example: example.id)
        return {
            "questions": len(examples),
            "order": _digest(example.id for example in examples),
            "ids": _digest(example.id for example in ordered),
            "texts": _digest(
                (e.id, e.question, e.answers, e.layout, e.regions, e.asked_regions) for e in ordered
            ),
            "kinds": _digest((e.id, e.question_type, e.stage, e.image_key) for e in ordered),
            "images": _digest((e.id, [self.digests[image.key] for image in e.images]) for e in ordered),
        }

    def judged(self, questions: Questions) -> dict[str, str]:
        """What makes scores of evaluations comparable: the metric, and a digest of what is asked and how."""
        ignored = {"every", "split", "questions", "metric", "keep_best", "patience", "final"}
        how = [
            self.recipe.eval.model_dump(exclude=ignored),
            self.recipe.prompt.model_dump(),
            self.recipe.image.model_dump(exclude={"augment"}),
            self.recipe.loss.per,
        ]
        labels = questions.labels or [()] * len(questions)
        asked = sorted(zip(questions.examples, labels, strict=True), key=lambda row: row[0].id)
        rows = (
            (
                e.id,
                e.question,
                e.answers,
                e.layout,
                e.regions,
                e.asked_regions,
                [(other.question, other.asked_regions, answer) for other, answer in e.context],
                [self.digests[image.key] for image in e.images],
                [*own],
            )
            for e, own in asked
        )
        return {"metric": self.recipe.eval.metric, "questions": _digest([how, *rows])}

    def class_of(self, example: datasets.Example) -> str:
        """What data.balance makes equally frequent of an example."""
        by_type = self.recipe.data.balance == "question_type"
        return example.question_type if by_type else normalise(example.answers[0])

    def _classes(self, examples: Sequence[datasets.Example]) -> NDArray[np.int64] | None:
        if self.recipe.data.balance == "none":
            return None
        numbered = np.unique([self.class_of(example) for example in examples], return_inverse=True)[1]
        return numbered.astype(np.int64)

    def answer_weights(self) -> dict[str, float]:
        """Weight of each training answer; empty where the recipe asks for none."""
        kind = self.recipe.loss.class_weights
        answers = [normalise(example.answers[0]) for example in self.dataset.part("train")]
        return {} if kind == "none" else class_weights(answers, kind)


@dataclass(frozen=True)
class Resolved:
    """The model folder of a recipe, or of a checkpoint."""

    folder: hub.Folder
    base: Digests | None = None
    """Digests of the checkpoint's base model; None without a checkpoint."""
    changes: Sequence[str] = ()
    """Differences of the base model from the one that the checkpoint was trained on."""


def resolve_model(recipe: Recipe, trained: Path | None = None, accept_changes: bool = False) -> Resolved:
    """Find the model that a recipe names, or the one for the checkpoint in `trained`.

    Uses the checkpoint's own tokenizer, chat template and image processor. Adapters need their base model, at
    the commit that they were trained on. A checkpoint of `tune: full` needs a base model only if the recipe
    names another one. Raises BadInput if the base model has changed since the checkpoint was trained, unless
    `accept_changes`.
    """
    name, revision = recipe.model.name, recipe.model.revision
    if trained is None:
        return Resolved(hub.find(name, revision))
    was, before = checkpoints.recipe_of(trained).model, checkpoints.base_of(trained)
    same_name = (was.name, was.revision) == (name, revision)
    if same_name:
        revision = before.commit or revision
    if was.tune == "full" and same_name:
        return Resolved(hub.saved(trained, name, revision), before)
    found = hub.find(name, revision, processor=trained)
    now = digests.of(replace(found, processor=found.path))
    changes = digests.differences(before, now, trained, found)
    if changes and not same_name:
        changes.insert(0, f"model.name: {was.name!r} at {was.revision} → {name!r} at {revision}")
    if changes and not accept_changes:
        raise BadInput(
            [
                f"{trained} was trained on a base model that {name} does not hold any more; restore it, or "
                "go on with the changes, which are recorded, with --accept-changes (tokenizer, chat template "
                "and image processor stay those of the checkpoint):",
                *(f"  {change}" for change in changes),
            ]
        )
    if was.tune == "full":
        return Resolved(hub.saved(trained, name, revision), now, changes)
    hub.check_processor(found)
    return Resolved(found, now, changes)


def prepare(
    recipe: Recipe,
    accelerator: Accelerator | None = None,
    *,
    evaluated: Collection[Part] | None = None,
    progress: bool = False,
    checkpoint: Path | None = None,
    accept_changes: bool = False,
) -> Prepared:
    """Read and check everything but the weights, on every process.

    `evaluated` are the parts to evaluate; None for the recipe's own. `checkpoint` is that to resume from or
    to evaluate, see `resolve_model`. All processes read the rows at the same time. The main process alone
    audits them and decodes images, and sends the result to the others. Raises BadInput on every process, with
    all errors of data and model folder; at once if the model is too large for the CPU.
    """
    settings = recipe.model
    main = accelerator is None or accelerator.is_main_process
    loaded: list[datasets.Dataset] = []
    problems: list[str] = []
    if not main:
        try:
            loaded.append(datasets.load(recipe.data))
        except (BadInput, OSError) as error:  # raised below, if the main process finds no error
            problems = [f"{_here(accelerator)}: {error}"]

    def examine() -> tuple[Audit, str, Resolved]:
        """Check model and data; return the audit, a digest of the questions' ids, and the model.

        Raises BadInput with the errors of both, so that a missing model does not hide those of the data.
        """
        errors, special_tokens, found, resolved = [], frozenset[str](), None, None
        try:
            resolved = resolve_model(recipe, checkpoint, accept_changes)
            folder, special_tokens = resolved.folder, resolved.folder.special_tokens
            if settings.tune == "lora":
                model.lora_targets(
                    model.skeleton(folder),
                    settings.lora.modules,
                    train_vision=settings.train_vision,
                    train_merger=settings.train_merger,
                )
        except BadInput as error:
            errors += error.problems
        if resolved and accelerator:
            check_device(accelerator.device, resolved.folder)
        try:
            dataset, found = load_and_audit(recipe, special_tokens, evaluated=evaluated, progress=progress)
            loaded.append(dataset)
            errors += condensed(problem for problem in found.problems if not problem.warning)
        except BadInput as error:
            errors += error.problems
        if errors or found is None or resolved is None:
            raise BadInput(errors)
        return found, _digest(example.id for example in loaded[0].examples), resolved

    found, kept, resolved = main_first(accelerator, examine)
    folder = resolved.folder
    if folder.path != checkpoint:
        # The main process fetched the model's files; each process finds them on its own node.
        try:
            folder = hub.find(folder.name, folder.revision, processor=checkpoint)
        except BadInput as error:
            problems.append(f"{_here(accelerator)}: {error}")
    if loaded and not main:
        loaded[0] = found.kept(loaded[0])
        if _digest(example.id for example in loaded[0].examples) != kept:
            problems.append(
                f"data.path: {_here(accelerator)} reads other questions in {recipe.data.path} than the main "
                "process; see that its node has the same files"
            )
    refuse_together(accelerator, problems)
    dataset = loaded[0]
    chat = ChatTokens(folder, system=recipe.prompt.system, instructions=recipe.prompt.instructions)
    return Prepared(
        recipe,
        folder,
        chat,
        dataset,
        found.canvases(recipe.image, folder.factor),
        found.digests,
        condensed(problem for problem in found.problems if problem.warning),
        found.skipped,
        found.counts,
        base=resolved.base,
        base_changes=resolved.changes,
        progress=progress,
    )


def _here(accelerator: Accelerator | None) -> str:
    rank = accelerator.process_index if accelerator is not None else 0
    return f"process {rank} on {socket.gethostname()}"


def check_device(device: torch.device, folder: hub.Folder) -> None:
    """Raise BadInput where a large model is about to compute on the CPU though nobody asked for that."""
    if device.type != "cpu" or processes.cpu_asked_for():
        return
    parameters = sum(parameter.numel() for parameter in model.skeleton(folder).parameters())
    if parameters > MOST_ON_CPU:
        raise BadInput(
            f"this machine has no GPU that CUDA can use, and {folder.name} would take weeks on the CPU: it "
            f"has {parameters:,} parameters, more than {MOST_ON_CPU:,}. Look at nvidia-smi and at the torch "
            "that is installed. To use the CPU all the same: accelerate_configs/cpu.yaml, or "
            "ACCELERATE_USE_CPU=true"
        )


def _stages(examples: Sequence[datasets.Example]) -> NDArray[np.int64]:
    """(questions,) stages; the audit refuses training questions without one, and others have no order."""
    return np.array([example.stage or 0 for example in examples], np.int64)


def _black(picture: Image.Image, key: str) -> Image.Image:
    return Image.new("RGB", picture.size)


def _shuffled(examples: Sequence[datasets.Example], seed: int) -> dict[str, Sequence[datasets.ImageRef]]:
    """For the images of each question (by `image_key`) as many of another, drawn by the seed.

    They are of another group (video) wherever no group has more than half of them; questions that share an
    image are of one group. Raises BadInput where there are no others.
    """
    known = {example.image_key: example for example in examples}
    if len(known) < 2:
        raise BadInput("shuffle: all questions are about the same image; there is no other to show")
    drawn = np.random.Generator(np.random.PCG64(seed)).permutation(sorted(known)).tolist()
    group = _joined({key: known[key] for key in sorted(known)})
    # Groups lie together, so a step as long as the longest leads out of each.
    order = sorted(drawn, key=lambda key: group[key])
    longest = max(Counter(group.values()).values())
    step = longest if 2 * longest <= len(order) else 1
    others = dict(zip(order, order[step:] + order[:step], strict=True))
    return {
        key: [image for image, _ in zip(itertools.cycle(known[other].images), known[key].images)]
        for key, other in others.items()
    }


def _joined(known: Mapping[str, datasets.Example]) -> dict[str, str]:
    """`image_key` → the name of its group, one for all groups that share images."""
    node: dict[tuple[str, str], int] = {}
    edges = [
        [
            node.setdefault(("group", example.group or key), len(node)),
            node.setdefault(("", image.key), len(node)),
        ]
        for key, example in known.items()
        for image in example.images
    ]
    graph = coo_array((np.ones(len(edges)), np.transpose(edges)), shape=(len(node), len(node)))
    _, part = connected_components(graph, directed=False)
    names: dict[int, str] = {}
    return {
        key: names.setdefault(part[node["group", example.group or key]], example.group or key)
        for key, example in known.items()
    }


def _digest(values: Iterable[object]) -> str:
    digest = hashlib.sha256()
    lines = (f"{value!r}\n" for value in values)
    while some := "".join(itertools.islice(lines, 1000)):
        digest.update(some.encode())
    return digest.hexdigest()
