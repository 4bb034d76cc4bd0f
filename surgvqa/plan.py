"""Which questions meet in which optimizer step: a pure function, so there is nothing to fast-forward.

    questions of an epoch, in order:  a3 a1 │ c2 │ b5 b1 b2 │ a2 a4 │ …     groups of one image, shuffled
    steps of exactly `questions`:     └──── step 0 ────┘└── step 1 ──…      a group may be cut at the edge
    trees of a step:                  {a3 a1} {c2} {b5 b1} → ranks → micro-batches

By stages, the groups of a lower one come first. Balanced, the questions are drawn before they are grouped.

The order depends on neither the number of processes nor the size of micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]
Group = list[int]
"""Question numbers that share an image, and so a tree."""


def epoch_order(
    image: Int64s, questions_per_image: int, seed: int, epoch: int, stage: Int64s | None = None
) -> tuple[Int64s, Int64s]:
    """All questions in the order of an epoch, and the number of each one's group (rising along the order).

    Each image's questions are shuffled and cut into groups of at most `questions_per_image`; the groups
    are shuffled. `image` (questions,) tells which questions share an image. With `stage` (questions,) a group
    is of one stage, and those of a lower one come first.
    """
    stage = np.zeros_like(image) if stage is None else stage
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    by_image = np.lexsort((rng.random(len(image)), image, stage))
    sorted_image, sorted_stage = image[by_image], stage[by_image]
    changes = (sorted_image[1:] != sorted_image[:-1]) | (sorted_stage[1:] != sorted_stage[:-1])
    first = np.r_[True, changes]
    rank_in_image = np.arange(len(image)) - np.flatnonzero(first)[np.cumsum(first) - 1]
    begins = rank_in_image % questions_per_image == 0
    group = np.cumsum(begins) - 1
    place_of_group = np.lexsort((rng.random(int(group[-1]) + 1), sorted_stage[begins]))
    place = np.empty_like(place_of_group)
    place[place_of_group] = np.arange(len(place_of_group))
    shuffled = np.argsort(place[group], kind="stable")
    return by_image[shuffled], place[group][shuffled]


def quotas(sizes: Int64s) -> Int64s:
    """(classes,) how many questions of each class a balanced epoch has: in all as many as there are.

    `sizes` (classes,) are the classes' own; what cannot be shared out equally goes to the first.
    """
    questions, classes = int(sizes.sum()), len(sizes)
    return questions // classes + (np.arange(classes) < questions % classes)


def balanced(classes: Int64s, seed: int, epoch: int) -> Int64s:
    """The questions of an epoch in which every class comes equally often; as many as there are.

    Each class is a deck of cards, dealt to its end, shuffled and dealt again, on from one epoch into the
    next: no question comes again before all others of its class, and each comes in time. `classes`
    (questions,) numbers each question's class, from 0 without gaps.
    """
    sizes = np.bincount(classes)
    decks = np.split(np.argsort(classes, kind="stable"), np.cumsum(sizes)[:-1])
    drawn = []
    for number, (deck, quota) in enumerate(zip(decks, quotas(sizes).tolist(), strict=True)):
        first, begin = divmod(epoch * quota, len(deck))
        last, end = divmod((epoch + 1) * quota, len(deck))
        if first == last:
            drawn.append(_shuffled(deck, seed, number, first)[begin:end])
        else:
            drawn.append(_shuffled(deck, seed, number, first)[begin:])
            drawn.append(np.tile(deck, last - first - 1))
            drawn.append(_shuffled(deck, seed, number, last)[:end])
    return np.concatenate(drawn)


def _shuffled(deck: Int64s, seed: int, number: int, deal: int) -> Int64s:
    sequence = np.random.SeedSequence(seed, spawn_key=(number, deal))
    return np.random.Generator(np.random.PCG64(sequence)).permutation(deck)


@dataclass(eq=False)
class Plan:
    """The whole run's order. Questions are numbered as in `image` and `branch_tokens`."""

    image: Int64s
    """(questions,) number of each question's image."""
    branch_tokens: Int64s
    """(questions,) length of each branch."""
    root_tokens: Int64s
    """(images,) length of each root."""
    questions: int
    questions_per_image: int
    tokens_per_micro_batch: int
    seed: int
    trees: bool = True
    stage: Int64s | None = None
    """(questions,) where an epoch goes by stages."""
    classes: Int64s | None = None
    """(questions,) number of each question's class, where these are to come equally often."""
    _orders: dict[int, tuple[Int64s, Int64s]] = field(default_factory=dict, repr=False)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.image) // self.questions)

    def epoch(self, step: int) -> int:
        """The epoch, from 0, that optimizer step `step` belongs to."""
        return step // self.steps_per_epoch

    def too_long(self) -> list[int]:
        """Questions that do not fit a micro-batch even alone with their image."""
        return [int(question) for question in np.flatnonzero(self.alone() > self.tokens_per_micro_batch)]

    def alone(self) -> Int64s:
        """(questions,) tokens of each question alone with its image."""
        return self.root_tokens[self.image] + self.branch_tokens

    def step(self, step: int) -> list[Group]:
        """The trees of optimizer step `step`; one question each where `trees` is off."""
        epoch, within = self.epoch(step), step % self.steps_per_epoch
        if epoch not in self._orders:
            # Two are kept: what reads ahead is in the next epoch while the loop is still in this one.
            for old in self._orders.keys() - {epoch - 1, epoch + 1}:
                del self._orders[old]
            self._orders[epoch] = self._epoch(epoch)
        order, group = self._orders[epoch]
        here = slice(within * self.questions, (within + 1) * self.questions)
        if not self.trees:
            return [[int(question)] for question in order[here]]
        edges = np.flatnonzero(np.diff(group[here])) + 1
        return [[int(question) for question in tree] for tree in np.split(order[here], edges)]

    def _epoch(self, epoch: int) -> tuple[Int64s, Int64s]:
        if self.classes is None:
            return epoch_order(self.image, self.questions_per_image, self.seed, epoch, self.stage)
        drawn = balanced(self.classes, self.seed, epoch)
        stage = None if self.stage is None else self.stage[drawn]
        order, group = epoch_order(self.image[drawn], self.questions_per_image, self.seed, epoch, stage)
        return drawn[order], group

    def share(self, trees: Sequence[Group], world: int) -> list[list[list[Group]]]:
        """[rank][micro-batch] → trees: every rank gets the same number of micro-batches, some maybe empty.

        Longest first to the least loaded rank, then first fit into micro-batches. A tree that is too
        long for one is cut into several with the same root.
        """
        pieces = sorted(
            ((self.tokens(piece), piece) for tree in trees for piece in self._cut(tree)),
            key=lambda sized: (-sized[0], sized[1]),
        )
        load = [0] * world
        ranks: list[list[list[Group]]] = [[] for _ in range(world)]
        room: list[list[int]] = [[] for _ in range(world)]
        for tokens, piece in pieces:
            rank = load.index(min(load))
            load[rank] += tokens
            fitting = [index for index, free in enumerate(room[rank]) if tokens <= free]
            if not fitting:
                fitting.append(len(ranks[rank]))
                ranks[rank].append([])
                room[rank].append(self.tokens_per_micro_batch)
            room[rank][fitting[0]] -= tokens
            ranks[rank][fitting[0]].append(piece)
        most = max(map(len, ranks))
        return [micro_batches + [[]] * (most - len(micro_batches)) for micro_batches in ranks]

    def tokens(self, tree: Group) -> int:
        """Length of a tree: its image once and its branches."""
        return int(self.root_tokens[self.image[tree[0]]] + self.branch_tokens[tree].sum())

    def shared_tokens(self, tree: Group) -> int:
        """Length of a tree's root: its image."""
        return int(self.root_tokens[self.image[tree[0]]])

    def _cut(self, tree: Group) -> list[Group]:
        pieces: list[Group] = [[]]
        for question in tree:
            if pieces[-1] and self.tokens([*pieces[-1], question]) > self.tokens_per_micro_batch:
                pieces.append([])
            pieces[-1].append(question)
        return pieces


def trees_of(image: Int64s) -> list[Group]:
    """All questions, each image's as one tree, in order of first appearance: for evaluation."""
    trees: dict[int, Group] = {}
    for question, number in enumerate(image.tolist()):
        trees.setdefault(number, []).append(question)
    return list(trees.values())
