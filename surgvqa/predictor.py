"""A model that answers questions about any image; the data that it was trained on may be gone.

    run, checkpoint or model ── load_predictor ──▶ Predictor ── ask(image, question) ──▶ Answer

Canvas, prompts and decoding are those of `surgvqa evaluate`, and so are the answers.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from accelerate.utils import parse_flag_from_env
from numpy.typing import NDArray
from PIL import Image

from surgvqa import hub, letterbox, processes
from surgvqa.audit import closed_set
from surgvqa.datasets import Dataset, Example, ImageRef, Region, normalise
from surgvqa.evaluation import Reply, answers_of, prediction_of
from surgvqa.letterbox import Canvas
from surgvqa.plan import trees_of
from surgvqa.prepare import Prepared, check_device, resolve_model
from surgvqa.recipe import BadInput, Recipe
from surgvqa.sources import model_of
from surgvqa.tokens import ChatTokens
from surgvqa.tree import Questions

Picture: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]
"""An image: the path of a file, a file's bytes, what PIL opened or made, or an array (height, width, 3) of
RGB or (height, width) of grey. EXIF turns the first three, as it turns images of data."""

_ZERO_SHOT = "{model: {name: none}, data: {format: demo}, image: {mode: letterbox, size: 768}, output: none}"
"""A published model without a recipe: the canvas of most recipes here, the chat template's own system
message, no instructions, written answers, bf16. Its `data` and `output` are not looked at."""


@dataclass(frozen=True)
class Answer:
    """What the model says to one question."""

    question: str
    text: str
    """Without boxes; where the model wrote nothing else, their labels."""
    probabilities: dict[str, float] | None = None
    """Label → probability among the labels, their sum 1; None where the model wrote its answer."""
    regions: tuple[Region, ...] = ()
    """The boxes that the model wrote: `box` is (x1, y1, x2, y2) in pixels of the upright image as it was
    given, 0 the left or upper edge of its first pixel; `label` what is in it; `image` which, from 0."""
    cut: bool = False
    """Whether the answer was cut at the recipe's `eval.max_new_tokens`, before the model ended it."""


class _Ready(Prepared):
    """A recipe made ready without its data."""

    @functools.cached_property
    def grounded(self) -> bool:
        """Boxes are always looked for: what the data had is not known here."""
        return True

    def reads_in_place(self, example: Example) -> bool:
        """Return True, since the form of the reference answer is not known here."""
        return True


class Predictor:
    """A model in memory that can be asked; made by `load_predictor`.

    Nothing is kept of what it was asked: each question stands by itself.
    """

    recipe: Recipe
    """What its prompts, canvas and decoding come from."""
    checkpoint: Path | None
    """The folder of its trained weights; None for a model as it was published."""
    device: torch.device

    def __init__(
        self, settings: Recipe, folder: Path | None, device: torch.device, found: hub.Folder
    ) -> None:
        """Use `load_predictor`, which finds what to give."""
        self.recipe, self.checkpoint, self.device = settings, folder, device
        self._compute = processes.compute(settings.train.precision, settings.model.attn, device)
        prompt = settings.prompt
        chat = ChatTokens(found, system=prompt.system, instructions=prompt.instructions)
        self._prepared = _Ready(settings, found, chat, Dataset([], []), {}, {}, [], [], {})
        network = self._prepared.network(folder) if folder else self._prepared.published()
        self._network = network.to(device).eval()

    def __repr__(self) -> str:
        return f"Predictor({self.checkpoint or self.recipe.model.name}, {self.device})"

    def ask(
        self,
        image: Picture | Sequence[Picture],
        question: str,
        *,
        question_type: str = "question",
        labels: Sequence[str] | None = None,
    ) -> Answer:
        """The answer to one question about an image, or about several such as the frames of a clip.

        `question_type` decides which of the recipe's instructions follows the question. With `labels` the
        most probable of them is chosen (of equals the first) and each gets a probability; with none (`[]`)
        the model writes. By default it does what the recipe's `eval.answers` says, with the labels that
        `data.labels` has for the type. Raises BadInput where an image cannot be read, where a text is empty
        or holds a structural token of the model, such as `<|im_end|>`, where labels are needed and not known,
        and where all of it is longer than `batch.tokens_per_micro_batch`. A question cannot point at boxes,
        as those of data can.
        """
        return self.ask_all(image, [question], question_types=[question_type], labels=labels)[0]

    def ask_all(
        self,
        image: Picture | Sequence[Picture],
        questions: Sequence[str],
        *,
        question_types: Sequence[str] | None = None,
        labels: Sequence[str] | None = None,
    ) -> list[Answer]:
        """The answers to several questions about the same image, which the model sees once for all of them.

        The same answers as one by one, and faster. `question_types` has one for each question, `labels` are
        the same for all; else as `ask`, also in what it raises.
        """
        kinds = ["question"] * len(questions) if question_types is None else question_types
        if isinstance(questions, str) or isinstance(kinds, str) or len(kinds) != len(questions):
            raise BadInput("questions and question_types: give lists of the same length")
        if not questions:
            return []
        refs, canvases = self._images(image)
        examples = [
            Example(str(number), refs, question.strip(), ("",), kind, place=f"question {question!r}")
            for number, (question, kind) in enumerate(zip(questions, kinds, strict=True))
        ]
        if empty := [example.place for example in examples if not example.question]:
            raise BadInput(f"{empty[0]}: is empty")
        prepared = replace(self._prepared, canvases=canvases)
        asked = Questions(
            examples,
            prepared.chat,
            canvases,
            fill=self.recipe.image.fill,
            labels=self._labels(examples, labels),
        )
        plan = prepared.plan(asked)
        trees = trees_of(plan.image) if plan.trees else [[number] for number in range(len(examples))]
        found: dict[int, Reply] = {}
        for micro_batch in plan.share(trees, 1)[0]:
            pack = asked.pack(micro_batch, asked=True, cuda=self.device.type == "cuda").to(self.device)
            numbers = [number for tree in micro_batch for number in tree]
            answers = answers_of(self._network, prepared, asked, numbers, pack, self._compute)
            found.update(zip(numbers, answers, strict=True))
        return [_answer(prepared, example, found[number]) for number, example in enumerate(examples)]

    def _labels(self, examples: Sequence[Example], given: Sequence[str] | None) -> list[Sequence[str]] | None:
        """The closed set of each question; None where the model is to write."""
        if given is None:
            if self.recipe.eval.answers == "generate":
                return None
            sets = [closed_set(self.recipe, example) for example in examples]
            if without := [e.question_type for e, own in zip(examples, sets, strict=True) if not own]:
                known = ", ".join(sorted(self.recipe.data.labels)) or "none"
                raise BadInput(
                    f"labels: the recipe chooses answers among labels and has none for the type "
                    f"{without[0]!r} (it has them for: {known}); give labels, or [] to let the model write"
                )
            return sets
        if isinstance(given, str):
            raise BadInput(f"labels: give a list, such as [{given!r}, …]")
        own = [label.strip() for label in given]
        if "" in own or len({normalise(label) for label in own}) < len(own):
            raise BadInput(f"labels: one is empty, or two count as the same answer: {own}")
        return [own] * len(examples) if own else None

    def _images(self, image: Any) -> tuple[tuple[ImageRef, ...], dict[str, Canvas]]:
        several = isinstance(image, Sequence) and not isinstance(image, (str, bytes))
        pictures = image if several else [image]
        refs = tuple(_ref(picture, number) for number, picture in enumerate(pictures, 1))
        if not refs:
            raise BadInput("image: there is none; give at least one")
        canvases = {}
        for ref in refs:
            try:
                canvases[ref.key] = self._canvas(ref.read())
            except ValueError as error:
                raise BadInput(f"{ref.key}: {error}") from None
        return refs, canvases

    def _canvas(self, data: bytes) -> Canvas:
        image, size = self.recipe.image, letterbox.header(data).size
        picture = letterbox.find_picture(letterbox.open_rgb(data)) if image.crop == "border" else None
        return letterbox.canvas_of(size, image, self._prepared.folder.factor, picture)


def load_predictor(
    source: str | os.PathLike[str],
    *,
    recipe: str | os.PathLike[str] | None = None,
    overrides: Iterable[str] = (),
    device: str | torch.device | None = None,
    accept_changes: bool = False,
) -> Predictor:
    """A model that can be asked. No data are read.

    `source` is a run's folder (its best checkpoint, else its newest), one of its checkpoints, or the name or
    folder of a model as it was published. For the last, `recipe` is a file whose prompts and image settings
    hold; without one: a letterbox of 768 pixels, no prompts of our own, bf16. A checkpoint brings its recipe.
    `overrides` change recipe keys, such as `eval.max_new_tokens=200`; those that an evaluation was given must
    be given here too for the same answers. `device` is by default the first GPU;
    name `cpu` where a large model is to compute there. A base model that is not what the checkpoint was
    trained on is refused, unless `accept_changes`. Sets TF32 for the process, as evaluation does. Raises
    BadInput saying what is wrong with source, recipe, model or device.
    """
    settings, folder = model_of(os.fspath(source), recipe, list(overrides), otherwise=_ZERO_SHOT)
    found = resolve_model(settings, folder, accept_changes).folder
    if device is None:
        gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
        device = "cuda" if gpu else "cpu"
        check_device(torch.device(device), found)
    return Predictor(settings, folder, torch.device(device), found)


def _ref(picture: Any, number: int) -> ImageRef:
    """An image in memory, whatever form it came in. Raises BadInput where it is none."""
    name = f"image {number}"
    try:
        if isinstance(picture, (str, os.PathLike)):
            name = os.fspath(picture)
            return ImageRef(name, data=ImageRef(name, Path(picture)).read())
        if isinstance(picture, bytes):
            return ImageRef(name, data=picture)
        if isinstance(picture, np.ndarray):
            if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or picture.shape[2:] not in ((), (3,)):
                raise ValueError(
                    f"is an array {picture.shape} of {picture.dtype}; give (height, width, 3) of uint8, RGB, "
                    "and several frames as a list"
                )
            picture = Image.fromarray(picture)
        if isinstance(picture, Image.Image):
            stream = BytesIO()
            letterbox.upright_rgb(picture).save(stream, "PPM")  # every pixel as it is, and fast
            return ImageRef(name, data=stream.getvalue())
    except OSError as error:
        raise BadInput(f"{name}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise BadInput(f"{name}: {error}") from None
    raise BadInput(f"{name}: is a {type(picture).__name__}; give a path, bytes, a PIL image or an array")


def _answer(prepared: Prepared, example: Example, reply: Reply) -> Answer:
    said = prediction_of(prepared, example, reply)
    regions = (Region(tuple(row["box"]), row["label"], row["image"]) for row in said.regions or ())
    return Answer(example.question, said.answer, said.probabilities, tuple(regions), said.cut)
