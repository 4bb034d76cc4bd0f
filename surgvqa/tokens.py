"""Examples as tokens: the only place that knows chat templates.

A conversation is cut at its last `<|vision_end|>`:

    root    <|im_start|>system … <|im_end|> <|im_start|>user <|vision_start|> image × n <|vision_end|>
    branch  question (instruction) <|im_end|> <|im_start|>assistant answer <|im_end|>
            ├────────────────── prompt ──────────────────────────┤├─ supervised ─┤

Special tokens cut the text before byte-pair merges are made, so the tokens of root and branch are those of
the whole conversation; this is checked on every example. Positions are those of M-RoPE (Qwen2-VL, Wang et
al. 2024, section 2.1): text counts up in all three axes, an image of h × w tokens starting at p takes
(p, p + row, p + column), and what follows continues at p + max(h, w).

Boxes are text, written as surgvqa.grounding does for the family; its special tokens may stand in a branch,
but in no text of the data. Nor may any other structural token (`Folder.special_tokens`).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from surgvqa import grounding
from surgvqa.augment import Placement
from surgvqa.datasets import Example
from surgvqa.hub import Folder, chat_template
from surgvqa.recipe import BadInput
from surgvqa.terminal import tracked

Ints = NDArray[np.int32]

_PAIRS = 4096
"""Questions with their answers that are tokenized together: bounds the memory that takes."""

_NONE: Mapping[str, Placement] = {}

_QUESTION, _ANSWER = "\ufdd0question\ufdd1", "\ufdd0answer\ufdd1"  # noncharacters: in no real text


@dataclass(frozen=True, slots=True)
class Root:
    """What the questions of an image share."""

    ids: Ints
    """(tokens,)"""
    positions: Ints
    """(3, tokens): temporal, row, column."""
    next_position: int
    """Where each branch starts."""
    image_at: Ints
    """(image tokens,) which of the tokens are the images'."""


@dataclass(frozen=True, slots=True)
class Branch:
    """A question and its answer; or, as a child of one, a candidate answer alone (`prompt` is 0)."""

    ids: Ints
    """(tokens,)"""
    prompt: int
    """Tokens before the answer."""
    answer: int
    """Supervised tokens: the answer and its end of turn."""
    children: tuple[Branch, ...] = ()

    @property
    def tokens(self) -> int:
        """Length with all children."""
        return len(self.ids) + sum(child.tokens for child in self.children)

    @property
    def asked(self) -> Branch:
        """The branch up to where the model is to answer."""
        return Branch(self.ids[: self.prompt], self.prompt, 0)


class ChatTokens:
    """A model's tokenizer, chat template and image processor, with the recipe's prompts."""

    def __init__(
        self, folder: Folder, *, system: str | None = None, instructions: Mapping[str, str] | None = None
    ) -> None:
        from transformers import AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.folder = folder
        self.system = system
        self.instructions = dict(instructions or {})
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder.processor, trust_remote_code=False)
            self.tokenizer.chat_template = chat_template(folder.processor, folder.name)
            self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder.processor)
            whole = self.render(self._conversation(_QUESTION, _ANSWER))
            prompt = self.render(self._conversation(_QUESTION), add_generation_prompt=True)
        except BadInput:
            raise
        except Exception as error:  # of tokenizers, of transformers, and of jinja2, which runs in a sandbox
            raise BadInput(
                f"{folder.name}: tokenizer, chat template or image processor in {folder.processor} cannot be "
                f"used: {type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
        wrong = [
            f"{folder.name}: the tokenizer gives {token} the id "
            f"{self.tokenizer.convert_tokens_to_ids(token)}, config.json says {expected}"
            for token, expected in folder.special.items()
            if self.tokenizer.convert_tokens_to_ids(token) != expected
        ]
        if wrong:
            raise BadInput(wrong)
        self.end_of_turn: int = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.stop_ids = (self.end_of_turn, self.tokenizer.convert_tokens_to_ids("<|endoftext|>"))
        structural = frozenset(
            token
            for token, added in self.tokenizer.added_tokens_decoder.items()
            if added.content in folder.special_tokens
        )
        self._unspoken = {
            False: structural,
            True: structural - frozenset(self.tokenizer.convert_tokens_to_ids(list(grounding.TOKENS))),
        }
        """Whether to keep the tokens of boxes → tokens to remove from answers."""
        root, cut, branch = whole.rpartition("<|vision_end|>")
        self._root_text = root + cut
        self._before, found, rest = branch.partition(_QUESTION)
        self._between, answer_found, self._after = rest.partition(_ANSWER)
        if not (
            cut and found and answer_found and whole.startswith(prompt) and prompt.endswith(self._between)
        ):
            raise BadInput(
                f"{folder.name}: its chat template does not put image, question and answer in that order"
            )
        self._roots: dict[int, Ints] = {}

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False) -> str:
        """Messages as text, by the model's own chat template; an image is one `<|image_pad|>`."""
        return str(
            self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def root(self, grids: Iterable[tuple[int, int]]) -> Root:
        """The shared tokens of images of `(rows, columns)` tokens each."""
        grids = list(grids)
        image_token = self.folder.special["<|image_pad|>"]
        short = self._short_root(len(grids))
        images = np.flatnonzero(short == image_token)
        repeats, steps = np.ones(len(short), np.int64), np.ones(len(short), np.int64)
        repeats[images] = [rows * columns for rows, columns in grids]
        steps[images] = [max(grid) for grid in grids]
        starts = np.cumsum(steps) - steps
        ids = np.repeat(short, repeats)
        positions = np.tile(np.repeat(starts, repeats), (3, 1)).astype(np.int32)
        image_at = np.flatnonzero(ids == image_token).astype(np.int32)
        if grids:
            positions[1, image_at] += np.concatenate([np.repeat(np.arange(h), w) for h, w in grids])
            positions[2, image_at] += np.concatenate([np.tile(np.arange(w), h) for h, w in grids])
        return Root(ids, positions, int(steps.sum()), image_at)

    def root_tokens(self, grids: Sequence[tuple[int, int]]) -> int:
        """The length of `root(grids)`, without making it."""
        return len(self._short_root(len(grids))) + sum(rows * columns - 1 for rows, columns in grids)

    def _short_root(self, images: int) -> Ints:
        """The shared tokens of so many images, one token for each image."""
        if images not in self._roots:
            conversation = self.render(self._conversation(_QUESTION, images=images))
            text, cut, _ = conversation.rpartition("<|vision_end|>")
            self._roots[images] = self._encode([text + cut])[0]
        return self._roots[images]

    def question_text(self, example: Example, canvases: Mapping[str, Placement] = _NONE) -> str:
        """`Example.prompt` as the model reads it, with the boxes of its questions."""
        if not (example.context or example.asked_regions):
            return example.prompt(self.instructions)
        context = tuple((self._with_boxes(other, canvases), answer) for other, answer in example.context)
        return replace(self._with_boxes(example, canvases), context=context).prompt(self.instructions)

    def _with_boxes(self, example: Example, canvases: Mapping[str, Placement]) -> Example:
        if not example.asked_regions:
            return example
        boxes = grounding.on_canvases(example, example.asked_regions, canvases)
        question = grounding.write_question(self.folder.family, example.question, boxes, len(example.images))
        return replace(example, question=question)

    def answer_text(self, example: Example, canvases: Mapping[str, Placement] = _NONE) -> str:
        """`answers[0]` as the model is to write it, with its boxes."""
        answer = example.answers[0].strip()
        if not example.regions:
            return answer
        boxes = grounding.on_canvases(example, example.regions, canvases)
        return grounding.write_answer(
            self.folder.family, answer, boxes, len(example.images), layout=example.layout
        )

    def branches(
        self,
        examples: Sequence[Example],
        canvases: Mapping[str, Placement] = _NONE,
        *,
        progress: bool = False,
    ) -> list[Branch]:
        """One branch for each example, answering `answers[0]`; boxes are those on `canvases` (image key).

        With `progress` it shows how many of the distinct questions are done.

        Raises BadInput listing every example that holds a special token, or naming the first that cannot
        be cut from its conversation.
        """
        problems = [
            f"{example.place or example.id}: holds the special token {token}, "
            "which would break the conversation"
            for example in examples
            if "<" in "".join((*example.texts, self.instructions.get(example.question_type, "")))
            for texts in ([*example.texts, self.instructions.get(example.question_type, "")],)
            for token in sorted(self.folder.special_tokens)
            if any(token in text for text in texts)
        ]
        if problems:
            raise BadInput(problems)
        first: dict[tuple[str, str], Example] = {}
        number: dict[tuple[str, str], int] = {}
        asked = array("q")
        """(examples,) the number of each example's pair of question and answer."""
        for example in examples:
            pair = self.question_text(example, canvases), self.answer_text(example, canvases)
            first.setdefault(pair, example)
            asked.append(number.setdefault(pair, len(number)))
        pairs, made = list(first), list[Branch]()
        lead = self._encode([self._root_text])[0]
        parts: Iterable[list[tuple[str, str]]] = (
            pairs[start : start + _PAIRS] for start in range(0, len(pairs), _PAIRS)
        )
        if progress:
            parts = tracked(parts, "tokenizing different questions", len(pairs), size=len)
        for some in parts:
            prompts = [self._before + question + self._between for question, _ in some]
            texts = [prompt + answer + self._after for prompt, (_, answer) in zip(prompts, some, strict=True)]
            for pair, text, ids, prompt, whole in zip(
                some,
                texts,
                self._encode(texts),
                self._encode(prompts),
                self._encode([self._root_text + text for text in texts]),
                strict=True,
            ):
                answer_end = int(np.flatnonzero(ids == self.end_of_turn)[-1]) + 1
                if (
                    self.render(self._conversation(*pair)) != self._root_text + text
                    or not np.array_equal(np.concatenate([lead, ids]), whole)
                    or not np.array_equal(ids[: len(prompt)], prompt)
                ):
                    where = first[pair].place or first[pair].id
                    raise BadInput(
                        f"{where}: question and answer cannot be cut from their conversation: "
                        f"{len(lead)} + {len(ids)} tokens against {len(whole)}, "
                        f"{len(prompt)} of them prompt"
                    )
                made.append(Branch(ids, len(prompt), answer_end - len(prompt)))
        return [made[place] for place in asked]

    def candidates(
        self,
        examples: Sequence[Example],
        labels: Sequence[Sequence[str]],
        canvases: Mapping[str, Placement] = _NONE,
    ) -> list[Branch]:
        """Each example asked, with one child for each of its labels: the label and its end of turn.

        Root, branch and child are the tokens of the conversation in which the label alone is the answer, up
        to that end. Raises BadInput as `branches` does.
        """
        keys = [
            (self.question_text(example, canvases), tuple(own))
            for example, own in zip(examples, labels, strict=True)
        ]
        first = dict(zip(reversed(keys), reversed(examples), strict=True))
        answered = iter(
            self.branches(
                [replace(first[key], answers=(label,), regions=()) for key in first for label in key[1]],
                canvases,
            )
        )
        made = {}
        for key in first:
            whole = [next(answered) for _ in key[1]]
            children = (Branch(one.ids[one.prompt :][: one.answer], 0, one.answer) for one in whole)
            made[key] = replace(whole[0].asked, children=tuple(children))
        return [made[key] for key in keys]

    def conversation(
        self, example: Example, canvases: Mapping[str, Placement] = _NONE
    ) -> list[dict[str, Any]]:
        """The whole conversation as messages for the model's chat template."""
        question, answer = self.question_text(example, canvases), self.answer_text(example, canvases)
        return self._conversation(question, answer, images=len(example.images))

    def _conversation(
        self, question: str, answer: str | None = None, images: int = 1
    ) -> list[dict[str, Any]]:
        system: list[dict[str, Any]] = []
        if self.system is not None:
            system.append({"role": "system", "content": self.system})
        content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": question}]
        asked: list[dict[str, Any]] = [*system, {"role": "user", "content": content}]
        return asked if answer is None else [*asked, {"role": "assistant", "content": answer}]

    def patches(self, canvas: Image.Image) -> NDArray[np.float32]:
        """(patches, channels × 2 × patch × patch) of a canvas, by transformers' own image processor."""
        processed = self.image_processor(images=[canvas], do_resize=False, return_tensors="np")
        return np.asarray(processed["pixel_values"], np.float32)

    def text(self, ids: Sequence[int], *, boxes: bool = False) -> str:
        """Return generated ids as an answer, without structural tokens; with `boxes` keep those of boxes.

        Other added tokens stay even if the tokenizer flags them as special: `<think>`, or a user's own.
        """
        left = [token for token in ids if token not in self._unspoken[boxes]]
        return str(self.tokenizer.decode(left, skip_special_tokens=False)).strip()

    def unspecial(self, text: str) -> str:
        """Return the text without structural tokens, so that what a model wrote can stand in a question."""
        while found := [token for token in self.folder.special_tokens if token in text]:
            for token in found:
                text = text.replace(token, "")
        return " ".join(text.split())

    def lengths(self, texts: Iterable[str]) -> dict[str, int]:
        """Return text → number of its tokens, without those of the conversation around it."""
        distinct = list(dict.fromkeys(texts))
        counted: dict[str, int] = {}
        for start in range(0, len(distinct), _PAIRS):
            some = distinct[start : start + _PAIRS]
            counted.update(zip(some, map(len, self._encode(some)), strict=True))
        return counted

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Each token as text, for showing."""
        return [str(self.tokenizer.decode([int(token)])) for token in ids]

    def _encode(self, texts: Sequence[str]) -> list[Ints]:
        encoded = self.tokenizer(list(texts), add_special_tokens=False, padding=False)["input_ids"]
        return [np.asarray(ids, np.int32) for ids in encoded]
