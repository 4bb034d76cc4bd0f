"""Questions of one image as a tree, trees as a pack: one sequence that shares what can be shared.

                  segment:  root                  branch 1   branch 2    child 2.1
    tokens in the pack      r0 r1 r2 … r599       a0 a1 a2   b0 b1 b2 b3 c0 c1       next tree …
    positions (M-RoPE)      0 … 28                29 30 31   29 30 31 32 33 34       0 …
    visible until           ─ end of the tree ─   ─ end ──   end of 2.1  ─ end ─

Token i sees token j iff j <= i < visible_until[j]: its own segment's past and its ancestors, nothing else.
Segments lie in depth-first order, so one number per token says it all, for any depth.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from surgvqa.augment import Augmented, Placement, endoscopy
from surgvqa.datasets import Example, ImageRef
from surgvqa.endings import PeerLost, ignore_signals
from surgvqa.grounding import source_pixels
from surgvqa.letterbox import Box, Canvas, read_rgb
from surgvqa.recipe import BadInput
from surgvqa.tokens import Branch, ChatTokens, Root

BLOCK = 128
"""Side of the tiles in which FlexAttention skips what the mask rules out."""

_BOX_TOKENS = 24
"""A box that moves is written with at most so many tokens more: 16 digits, and marks that they may join."""

KEPT_BYTES = 2**30
"""Memory in which the processes of a machine, together, may keep pictures scaled to their canvases."""


Change = Callable[[Image.Image, str], Image.Image]
"""What is done to a picture: itself and its image's key → another of its size."""


@dataclass(frozen=True)
class Tree:
    """One root and its branches; a weight for each answer, in depth-first order of the branches."""

    root: Root
    branches: Sequence[Branch]
    weights: Sequence[float]
    """Weight of each supervised token of the n-th answer."""
    patches: NDArray[np.float32]
    """(patches, values) of the root's images, one after the other."""
    grids: Sequence[tuple[int, int]]
    """(rows, columns) of each image, in patches."""


@dataclass(frozen=True)
class Pack:
    """Trees as tensors, ready for a forward pass of batch size 1. Shapes in `tokens`, `targets`, …"""

    ids: Tensor
    """(1, tokens)"""
    positions: Tensor
    """(3, 1, tokens)"""
    visible_until: Tensor
    """(tokens,): token j is visible to the tokens before `visible_until[j]`, from j on."""
    blocks: Tensor
    """(blocks, blocks) int8: what a BLOCK × BLOCK tile of the mask holds: nothing 0, something 1, all 2."""
    spans: tuple[tuple[int, int, int], ...]
    """(start, end of what is one causal row, end) of each tree: its root, or all of it if nothing forks."""
    image_at: Tensor
    """(image tokens,) which of the tokens are images'."""
    keep: Tensor
    """(kept,) the tokens whose logits are needed, rising."""
    ends: Tensor
    """(branches,) last token of each branch, in depth-first order."""
    pick: Tensor
    """(targets,) which of the kept logits predicts each target."""
    targets: Tensor
    """(targets,) token ids."""
    weights: Tensor
    """(targets,) fp32."""
    answers: Tensor
    """(answers,) how many targets each answer has, in depth-first order."""
    patches: Tensor
    """(patches, values)"""
    grids: Tensor
    """(images, 3): 1, rows, columns in patches; stays on the host, which alone needs it."""

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]

    def to(self, device: torch.device) -> Pack:
        return self._with_each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Pack:
        """Called by the DataLoader where a copy to a GPU will follow."""
        return self._with_each(Tensor.pin_memory)

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> Pack:
        changed: dict[str, Any] = {
            field.name: change(getattr(self, field.name))
            for field in fields(self)
            if field.name not in ("spans", "grids")
        }
        return replace(self, **changed)

    def mask(self) -> Tensor:
        """(tokens, tokens) true where row sees column: the reference for every attention path."""
        index = torch.arange(self.tokens, device=self.visible_until.device)
        return (index[None, :] <= index[:, None]) & (index[:, None] < self.visible_until[None, :])


def pack(trees: Sequence[Tree], *, multiple: int = 1) -> Pack:
    """Lay trees one after the other; with `multiple`, padded behind the last to a multiple of so many tokens.

    Padding sees nothing but itself, and nothing sees it.
    """
    ids: list[NDArray[np.int32]] = []
    positions: list[NDArray[np.int32]] = []
    until: list[NDArray[np.int64]] = []
    spans: list[tuple[int, int, int]] = []
    ends: list[int] = []
    sources: list[NDArray[np.int64]] = []
    targets: list[NDArray[np.int32]] = []
    weights: list[NDArray[np.float32]] = []
    answers: list[int] = []
    image_at: list[NDArray[Any]] = []
    at = 0

    def add(branch: Branch, parent_end: int, position: int, tree_weights: Iterator[float]) -> None:
        """Append a branch and, behind it, its children; `parent_end` is the token that it continues."""
        nonlocal at
        start, slot = at, len(until)
        ids.append(branch.ids)
        steps = position + np.arange(len(branch.ids), dtype=np.int32)
        positions.append(np.broadcast_to(steps, (3, len(steps))))
        until.append(np.empty(len(branch.ids), np.int64))
        at += len(branch.ids)
        ends.append(at - 1)
        if branch.answer:
            answer = slice(branch.prompt, branch.prompt + branch.answer)
            before = start + np.arange(answer.start, answer.stop) - 1
            if not branch.prompt:
                before[0] = parent_end
            sources.append(before)
            targets.append(branch.ids[answer])
            weights.append(np.full(branch.answer, next(tree_weights), np.float32))
            answers.append(branch.answer)
        own_end = at - 1
        for child in branch.children:
            add(child, own_end, position + len(branch.ids), tree_weights)
        until[slot][:] = at

    for tree in trees:
        start = at
        slot = len(until)
        ids.append(tree.root.ids)
        positions.append(tree.root.positions)
        until.append(np.empty(len(tree.root.ids), np.int64))
        image_at.append(start + tree.root.image_at)
        at += len(tree.root.ids)
        root_end = at
        tree_weights = iter(tree.weights)
        for branch in tree.branches:
            add(branch, root_end - 1, tree.root.next_position, tree_weights)
        until[slot][:] = at
        forks = any((part != at).any() for part in until[slot:])
        spans.append((start, root_end if forks else at, at))
    if padding := -at % multiple:
        ids.append(np.zeros(padding, np.int32))
        positions.append(np.zeros((3, padding), np.int32))
        until.append(np.full(padding, at + padding))
        spans.append((at, at + padding, at + padding))
    visible_until = np.concatenate(until)
    kept, pick = np.unique(_joined(sources, np.int64), return_inverse=True)
    return Pack(
        ids=torch.from_numpy(np.concatenate(ids).astype(np.int64))[None],
        positions=torch.from_numpy(np.concatenate(positions, axis=1).astype(np.int64))[:, None],
        visible_until=torch.from_numpy(visible_until),
        blocks=torch.from_numpy(_blocks(visible_until)),
        spans=tuple(spans),
        image_at=torch.from_numpy(_joined(image_at, np.int64)),
        keep=torch.from_numpy(kept),
        ends=torch.tensor(ends, dtype=torch.int64),
        pick=torch.from_numpy(pick.astype(np.int64)),
        targets=torch.from_numpy(_joined(targets, np.int64)),
        weights=torch.from_numpy(_joined(weights, np.float32)),
        answers=torch.tensor(answers, dtype=torch.int64),
        patches=torch.from_numpy(np.concatenate([tree.patches for tree in trees])),
        grids=torch.tensor(
            [(1, rows, columns) for tree in trees for rows, columns in tree.grids], dtype=torch.int64
        ),
    )


def _joined(parts: Sequence[NDArray[Any]], dtype: type) -> NDArray[Any]:
    return np.concatenate([np.empty(0, dtype), *parts]).astype(dtype)


def _blocks(visible_until: NDArray[np.int64]) -> NDArray[np.int8]:
    """`Pack.blocks` from the ends of visibility: no mask is made.

    Left of the diagonal a tile holds something iff one of its columns is visible to its first row, and
    all iff every column is visible to its last row; a tile on the diagonal is always cut by it.
    """
    tokens = len(visible_until)
    first_row = np.arange(0, tokens, BLOCK)
    last_row = np.minimum(first_row + BLOCK, tokens) - 1
    most = np.maximum.reduceat(visible_until, first_row)
    least = np.minimum.reduceat(visible_until, first_row)
    whole = last_row - first_row == BLOCK - 1
    something = most[None, :] > first_row[:, None]
    everything = (least[None, :] > last_row[:, None]) & whole[:, None]
    kinds = np.tril(something.astype(np.int8) + everything, k=-1)
    np.fill_diagonal(kinds, 1)
    return np.asarray(kinds, np.int8)


class Questions:
    """The questions of one part: lengths known, images still on disk.

    Picklable, so that data workers can pack ahead.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        chat: ChatTokens,
        canvases: Mapping[str, Canvas],
        *,
        fill: str = "black",
        augment: str = "none",
        seed: int = 0,
        weights: NDArray[np.float64] | None = None,
        per: str = "token",
        labels: Sequence[Sequence[str]] | None = None,
        progress: bool = False,
    ) -> None:
        """`canvases` maps image keys; `weights` (questions,) are class weights.

        `per`, `fill`, `augment` and `seed` are as in the recipe.

        `labels` are each question's possible answers, where it is to be asked which one is right.
        """
        self.examples = examples
        self.chat = chat
        self.canvases = canvases
        self.fill = fill
        self.augment = augment
        self.seed = seed
        self.instead: Mapping[str, Sequence[ImageRef]] = {}
        self.change: Change | None = None
        self._kept: dict[tuple[str, str], Image.Image] = {}
        self.room = KEPT_BYTES
        """Bytes left for scaled pictures to keep."""
        self.labels = labels
        self.branches = chat.branches(examples, canvases, progress=progress)
        self.candidates = None if labels is None else chat.candidates(examples, labels, canvases)
        """Each question with its labels as children."""
        answer_tokens = np.array([branch.answer for branch in self.branches], np.float64)
        question_weights = np.ones(len(examples)) if weights is None else weights
        self.token_weights = question_weights / answer_tokens if per == "question" else question_weights
        """(questions,) weight of each of a question's supervised tokens."""
        self.total_weights = self.token_weights * answer_tokens
        """(questions,) weight of the whole question."""
        self.answer_tokens = answer_tokens.astype(np.int64)
        self._boxes: defaultdict[str, list[tuple[Canvas, Box]]] = defaultdict(list)
        for example in examples if augment != "none" else ():
            for region in (*example.asked_regions, *example.regions):
                canvas = canvases[example.images[region.image].key]
                box = source_pixels(region, canvas.source_size).box
                self._boxes[example.image_key].append((canvas, box))
        numbers: dict[str, int] = {}
        self.image = np.array(
            [numbers.setdefault(example.image_key, len(numbers)) for example in examples], np.int64
        )
        shown = {example.image_key: example for example in examples}
        self.root_tokens = np.array([chat.root_tokens(self._grids(shown[key])) for key in numbers], np.int64)
        self.branch_tokens = np.array(
            [branch.tokens for branch in self.candidates or self.branches], np.int64
        )
        """(questions,) length of each branch."""
        boxes = [len(example.asked_regions) + len(example.regions) for example in examples]
        moved = _BOX_TOKENS if augment != "none" else 0
        self.most_branch_tokens = self.branch_tokens + moved * np.array(boxes, np.int64)
        """(questions,) the same, or where boxes move with their pictures the most that it can be."""

    def __len__(self) -> int:
        return len(self.examples)

    def shown(self, instead: Mapping[str, Sequence[ImageRef]], change: Change | None) -> Questions:
        """The same questions about other pictures.

        `instead` are images to show in the place of others (`Example.image_key` → as many), stretched to that
        place. `change` gets every picture, scaled to its canvas, and its image's key.
        """
        others = copy.copy(self)
        others.instead, others.change, others._kept = instead, change, {}
        return others

    def tokens(self, trees: Sequence[Sequence[int]]) -> int:
        """The length of trees of question numbers together, where boxes have not moved."""
        roots = self.root_tokens[self.image[[tree[0] for tree in trees]]].sum()
        return int(roots + sum(self.branch_tokens[tree].sum() for tree in trees))

    def placements(self, question: int, epoch: int | None = None) -> list[Placement]:
        """How a training epoch shows each of a question's images; None: as evaluation shows them.

        All images of a question are moved alike, as frames of one clip must be. All its image's questions
        get the same, since they share a tree.
        """
        example = self.examples[question]
        canvases = [self.canvases[image.key] for image in example.images]
        if epoch is None or self.augment == "none":
            return list(canvases)
        by = endoscopy(self.seed, epoch, example.image_key, self._boxes.get(example.image_key, ()))
        return [Augmented(canvas, by) for canvas in canvases]

    def tree(self, questions: Sequence[int], *, asked: bool = False, epoch: int | None = None) -> Tree:
        """The tree of questions that share their images; `asked` leaves the answers off, for decoding.

        `epoch` is for training, whose images may differ by epoch. Raises BadInput naming an image that can
        no longer be read.
        """
        example = self.examples[questions[0]]
        placements = self.placements(questions[0], epoch)
        patches = [
            self.chat.patches(placement.place(self._scaled(image, shown), self.fill))
            for image, shown, placement in zip(
                example.images,
                self.instead.get(example.image_key, example.images),
                placements,
                strict=True,
            )
        ]
        if asked and self.candidates:
            branches = [self.candidates[question] for question in questions]
        else:
            branches = [self._branch(question, placements) for question in questions]
            branches = [branch.asked for branch in branches] if asked else branches
        # A question weighs the same in every epoch, however its boxes are written.
        weights = (
            [
                float(self.total_weights[question]) / branch.answer
                for question, branch in zip(questions, branches, strict=True)
            ]
            if not asked
            else []
        )
        return Tree(
            root=self.chat.root(self._grids(example)),
            branches=branches,
            weights=[1.0] * sum(len(branch.children) for branch in branches) if asked else weights,
            patches=np.concatenate(patches),
            grids=[self.canvases[image.key].grid(self.chat.folder.patch) for image in example.images],
        )

    def _branch(self, question: int, placements: Sequence[Placement]) -> Branch:
        """A question's branch, with its boxes where the images are placed."""
        example = self.examples[question]
        moved = any(isinstance(placement, Augmented) for placement in placements)
        if not moved or not (example.asked_regions or example.regions):
            return self.branches[question]
        keys = [image.key for image in example.images]
        return self.chat.branches([example], dict(zip(keys, placements, strict=True)))[0]

    def pack(
        self,
        trees: Sequence[Sequence[int]],
        *,
        asked: bool = False,
        epoch: int | None = None,
        cuda: bool = False,
    ) -> Pack:
        """Trees of question numbers as one pack, see `tree`; for `cuda` padded to whole blocks."""
        made = [self.tree(tree, asked=asked, epoch=epoch) for tree in trees]
        return pack(made, multiple=BLOCK if cuda else 1)

    def _scaled(self, image: ImageRef, shown: ImageRef) -> Image.Image:
        """The picture `shown` scaled to the canvas of `image`, before anything that differs by epoch.

        Kept while there is room, since its questions come back every epoch.
        """
        keys = image.key, shown.key
        if keys in self._kept:
            return self._kept[keys]
        scaled = self.canvases[shown.key].scale(read_rgb(shown))
        if shown.key != image.key:
            scaled = scaled.resize(self.canvases[image.key].drawn_size, Image.Resampling.BICUBIC)
        if self.change:
            scaled = self.change(scaled, image.key)
        size = 3 * scaled.width * scaled.height
        if self.room >= size:
            self.room -= size
            self._kept[keys] = scaled
        return scaled

    def _grids(self, example: Example) -> list[tuple[int, int]]:
        """(rows, columns) of each image in tokens."""
        return [self.canvases[image.key].grid(self.chat.folder.factor) for image in example.images]


Label = TypeVar("Label")


def packs(
    questions: Questions,
    jobs: Iterable[tuple[Label, Sequence[Sequence[int]], int | None]],
    *,
    asked: bool = False,
    workers: int = 0,
    cuda: bool = False,
) -> Iterator[tuple[Label, Pack]]:
    """Pack the trees of each `(label, trees, epoch)` in order, ahead of need where there are workers.

    The epoch is that of training, from 0; None: images as evaluation shows them.
    For `cuda` they are padded to whole blocks and pinned. Raises BadInput naming an image that can no
    longer be read.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    questions.room = min(questions.room, KEPT_BYTES // (local * max(1, workers)))
    loader: DataLoader[Any] = DataLoader(
        _Packing(questions, asked, cuda),
        batch_size=None,
        sampler=jobs,
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=ignore_signals,
        pin_memory=cuda,
        generator=torch.Generator(),  # or it would draw from the numbers that dropout takes
    )
    for label, packed in loader:
        if isinstance(packed, BadInput):
            raise packed
        yield label, packed


@contextlib.contextmanager
def workers_watched() -> Iterator[None]:
    """Raises PeerLost where a data worker was killed.

    torch tells of it as a RuntimeError wherever the main thread then is, so this is put around all of it.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise PeerLost(
            f"{str(error).strip().rstrip('.')}. Most likely the machine had no memory left: lower "
            "data.workers, or give the run more memory. The same command goes on from the last checkpoint"
        ) from error


class _Packing(Dataset[tuple[Label, "Pack | BadInput"]], Generic[Label]):
    """A map from a job to its pack, which is what a DataLoader wants."""

    def __init__(self, questions: Questions, asked: bool, cuda: bool) -> None:
        self.questions, self.asked, self.cuda = questions, asked, cuda

    def __getitem__(
        self, job: tuple[Label, Sequence[Sequence[int]], int | None]
    ) -> tuple[Label, Pack | BadInput]:
        label, trees, epoch = job
        try:
            return label, self.questions.pack(trees, asked=self.asked, epoch=epoch, cuda=self.cuda)
        except BadInput as error:  # raised in a worker it would reach the person as a page of traceback
            return label, error


def _unchanged(item: Any) -> Any:
    return item
