"""The order of questions: complete, exact, independent of processes and micro-batches."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from surgvqa.plan import Plan, balanced, epoch_order, quotas, trees_of


def some_plan(seed: int = 0, **changes: object) -> Plan:
    """277 questions on 40 images, 1 to 14 each."""
    rng = np.random.default_rng(5)
    image = rng.permutation(np.repeat(np.arange(40), rng.integers(1, 15, 40))).astype(np.int64)
    branch = rng.integers(5, 60, len(image)).astype(np.int64)
    root = rng.integers(20, 300, 40).astype(np.int64)
    settings: dict[str, object] = {
        "questions": 16,
        "questions_per_image": 4,
        "tokens_per_micro_batch": 700,
        "seed": seed,
        **changes,
    }
    return Plan(image, branch, root, **settings)  # type: ignore[arg-type]


def epoch_of(plan: Plan, epoch: int) -> list[list[list[int]]]:
    return [plan.step(epoch * plan.steps_per_epoch + step) for step in range(plan.steps_per_epoch)]


@pytest.mark.parametrize("epoch", [0, 1, 7])
@pytest.mark.parametrize("trees", [True, False])
def test_every_question_once_per_epoch_and_exactly_as_many_per_step(epoch: int, trees: bool) -> None:
    plan = some_plan(trees=trees)
    steps = epoch_of(plan, epoch)
    sizes = [sum(map(len, step)) for step in steps]
    assert sizes[:-1] == [16] * (len(steps) - 1)
    assert 0 < sizes[-1] <= 16
    assert sorted(question for step in steps for tree in step for question in tree) == list(
        range(len(plan.image))
    )


def test_a_tree_is_one_image_with_at_most_so_many_questions() -> None:
    plan = some_plan()
    for step in epoch_of(plan, 0):
        for tree in step:
            assert len(set(plan.image[tree])) == 1
            assert len(tree) <= 4


def test_groups_are_as_few_as_can_be() -> None:
    image = some_plan().image
    _, group = epoch_order(image, 4, seed=0, epoch=0)
    assert len(set(group.tolist())) == sum(-(-count // 4) for count in Counter(image.tolist()).values())


def test_one_question_per_image_is_the_independent_batch() -> None:
    plan = some_plan(questions_per_image=1)
    order, group = epoch_order(plan.image, 1, seed=0, epoch=0)
    assert group.tolist() == list(range(len(plan.image)))
    # Questions of an image lie no nearer than chance has them: neighbours share one about 1 time in 30.
    same = (plan.image[order][1:] == plan.image[order][:-1]).mean()
    assert same < 0.1


def test_steps_are_the_same_with_and_without_trees() -> None:
    with_trees, without = some_plan(), some_plan(trees=False)
    for step in range(40):
        flat = [question for tree in with_trees.step(step) for question in tree]
        assert [question for tree in without.step(step) for question in tree] == flat


def test_order_depends_on_seed_and_epoch_alone() -> None:
    first = [question for step in epoch_of(some_plan(), 0) for tree in step for question in tree]
    again = [question for step in epoch_of(some_plan(), 0) for tree in step for question in tree]
    later = [question for step in epoch_of(some_plan(), 1) for tree in step for question in tree]
    other = [question for step in epoch_of(some_plan(seed=1), 0) for tree in step for question in tree]
    assert first == again
    assert len({tuple(order) for order in (first, later, other)}) == 3


def test_steps_can_be_asked_for_in_any_order() -> None:
    plan, fresh = some_plan(), some_plan()
    forwards = [plan.step(step) for step in range(45)]
    assert [fresh.step(step) for step in (44, 3, 20, 43)] == [forwards[step] for step in (44, 3, 20, 43)]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("limit", [360, 700, 100_000])
def test_ranks_share_every_question_of_a_step_once(world: int, limit: int) -> None:
    plan = some_plan(tokens_per_micro_batch=limit)
    for step in range(plan.steps_per_epoch):
        trees = plan.step(step)
        shared = plan.share(trees, world)
        assert len(shared) == world
        assert len({len(rank) for rank in shared}) == 1
        assert sorted(q for rank in shared for micro in rank for tree in micro for q in tree) == sorted(
            q for tree in trees for q in tree
        )
        for rank in shared:
            for micro in rank:
                assert sum(map(plan.tokens, micro)) <= limit
                for tree in micro:
                    assert len(set(plan.image[tree])) == 1


def test_work_is_balanced() -> None:
    plan = some_plan(questions=128, tokens_per_micro_batch=100_000)
    loads = [
        sum(plan.tokens(tree) for micro in rank for tree in micro) for rank in plan.share(plan.step(0), 4)
    ]
    assert max(loads) <= 1.05 * sum(loads) / 4


def test_what_cannot_fit_is_named() -> None:
    plan = some_plan(tokens_per_micro_batch=200)
    alone = [plan.tokens([question]) for question in range(len(plan.image))]
    assert plan.too_long() == [question for question, tokens in enumerate(alone) if tokens > 200]
    assert plan.too_long()


def test_steps_of_the_reference_experiment() -> None:
    """41,079 training questions, 16 per step, 3 epochs: 2,568 steps per epoch and 7,704 in all."""
    plan = Plan(np.arange(41_079) // 9, np.full(41_079, 30), np.full(4_565, 600), 16, 8, 8192, 42)
    assert plan.steps_per_epoch == 2568
    assert sum(map(len, plan.step(2567))) == 41_079 - 2567 * 16


def test_trees_of_keeps_order() -> None:
    assert trees_of(np.array([3, 1, 3, 0, 1])) == [[0, 2], [1, 4], [3]]


def test_micro_batches_are_filled_before_another_is_begun() -> None:
    """Kvasir-VQA's sizes: nine questions per image, 770 shared tokens, 8,192 at once."""
    rng = np.random.default_rng(0)
    _, image = np.unique(rng.integers(0, 1000, 9000), return_inverse=True)
    plan = Plan(
        image=image.astype(np.int64),
        branch_tokens=rng.integers(18, 46, 9000),
        root_tokens=np.full(int(image.max()) + 1, 770),
        questions=128,
        questions_per_image=16,
        tokens_per_micro_batch=8192,
        seed=0,
    )
    filled = []
    for step in range(plan.steps_per_epoch):
        for mine in plan.share(plan.step(step), 2):
            tokens = [sum(map(plan.tokens, micro_batch)) for micro_batch in mine]
            assert len(tokens) <= -(-sum(tokens) // 8192) + 1, "as many as must be, or one more"
            filled += [count / 8192 for count in tokens[:-1]]
    assert filled
    assert np.mean(filled) >= 0.9


def stages_of(plan: Plan) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.random.default_rng(7).integers(1, 4, len(plan.image)).astype(np.int64)


def test_by_stages_each_is_whole_before_the_next_and_shuffled() -> None:
    plan = some_plan()
    plan.stage = stages_of(plan)
    orders = [[q for step in epoch_of(plan, epoch) for tree in step for q in tree] for epoch in (0, 1)]
    for order in orders:
        assert sorted(order) == list(range(len(plan.image)))
        assert plan.stage[order].tolist() == sorted(plan.stage.tolist())
    assert orders[0] != orders[1]
    steps = epoch_of(plan, 0)
    assert [sum(map(len, step)) for step in steps[:-1]] == [16] * (len(steps) - 1)
    mixed = [step for step in steps if len({int(plan.stage[q]) for tree in step for q in tree}) > 1]
    assert len(mixed) <= 2, "only the steps at the two edges hold questions of two stages"
    for step in steps:
        for tree in step:
            assert len(tree) <= 4
            assert len({(int(plan.image[q]), int(plan.stage[q])) for q in tree}) == 1


def test_one_stage_alone_is_the_shuffled_order() -> None:
    plain, staged = some_plan(), some_plan()
    staged.stage = np.full(len(staged.image), 2)
    assert [staged.step(step) for step in range(40)] == [plain.step(step) for step in range(40)]


@pytest.mark.parametrize("by_stages", [False, True])
def test_balanced_classes_come_equally_often_and_every_question_in_time(by_stages: bool) -> None:
    plan = some_plan()
    sizes = [190, 50, 36, 1]
    plan.classes = np.repeat(np.arange(4), sizes).astype(np.int64)
    if by_stages:
        plan.stage = stages_of(plan)
    quota = [70, 69, 69, 69]
    assert quotas(np.array(sizes)).tolist() == quota
    drawn: list[Counter[int]] = []
    for epoch in range(5):
        steps = epoch_of(plan, epoch)
        asked = [question for step in steps for tree in step for question in tree]
        assert len(asked) == len(plan.image) == 277
        assert [sum(map(len, step)) for step in steps[:-1]] == [16] * (len(steps) - 1)
        assert Counter(plan.classes[asked].tolist()) == dict(enumerate(quota))
        if plan.stage is not None:
            assert plan.stage[asked].tolist() == sorted(plan.stage[asked].tolist())
        drawn.append(Counter(asked))
        so_far: Counter[int] = sum(drawn, Counter())
        for number, size in enumerate(sizes):
            members = np.flatnonzero(plan.classes == number).tolist()
            times = [so_far[question] for question in members]
            assert sum(times) == quota[number] * (epoch + 1)
            assert max(times) - min(times) <= 1, "none comes again before all others of its class"
            assert size == len(times)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_drawn_questions_are_shared_out_with_their_repeats(world: int) -> None:
    plan, fresh = some_plan(), some_plan()
    plan.classes = fresh.classes = np.repeat(np.arange(4), [190, 50, 36, 1]).astype(np.int64)
    forwards = [plan.step(step) for step in range(45)]
    assert [fresh.step(step) for step in (44, 3, 20, 43)] == [forwards[step] for step in (44, 3, 20, 43)]
    assert any(len({q for tree in step for q in tree}) < 16 for step in forwards[:17]), (
        "rare ones come more than once"
    )
    for trees in forwards[:18]:
        shared = plan.share(trees, world)
        assert sorted(q for rank in shared for micro in rank for tree in micro for q in tree) == sorted(
            q for tree in trees for q in tree
        )


def test_what_is_drawn_depends_on_seed_and_epoch() -> None:
    classes = np.repeat(np.arange(3), [50, 30, 4]).astype(np.int64)
    one = balanced(classes, seed=0, epoch=3)
    assert balanced(classes, seed=0, epoch=3).tolist() == one.tolist()
    assert sorted(balanced(classes, seed=1, epoch=3).tolist()) != sorted(one.tolist())
    assert sorted(balanced(classes, seed=0, epoch=4).tolist()) != sorted(one.tolist())
